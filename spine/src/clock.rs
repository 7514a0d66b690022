//! The wall clock. Leases and time-outs never use it.

use std::time::{SystemTime, UNIX_EPOCH};

/// Milliseconds since 1970; 0 when the clock stands before that.
pub(crate) fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_millis() as u64)
}

/// Seconds since 1970.
pub(crate) fn now_seconds() -> u64 {
    now_ms() / 1000
}
