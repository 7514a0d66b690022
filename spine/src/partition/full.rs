//! When a partition takes no new records: its topic's size limit is reached behind a holder, or
//! the disks of its replicas are nearly full.
//!
//! ```text
//!             floor of a holder
//!                    v
//!   | first segment kept | segments after it: the limit or more |      -> TOPIC_FULL
//!   | first segment kept | segments after it: less              |      -> there is room
//! ```
//!
//! Segments expire whole, and the active one counts. A topic without holders never gets here,
//! because its first segment goes before it can be in the way. Control entries always pass: they
//! are what moves holders and retention on.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use arqon_proto::{Offset, TopicClass, wire, wire::ErrorCode};

use super::{Replica, error::error};

/// The log is looked at again after this many bytes of new records.
const JUDGED_SIZE: u64 = 1 << 20;
/// What a client is told to wait after TOPIC_FULL and STORAGE_FULL, in milliseconds: nothing
/// changes before a worker settles jobs or somebody frees space.
const RETRY_AFTER_MS: u32 = 500;

/// What was found when the partition was last judged.
#[derive(Debug, Default)]
pub(super) struct Fullness {
    is_full: AtomicBool,
    size_since: AtomicU64,
}

impl Replica {
    /// Why `size` bytes more may not be written now. Cheap but for one call in a mebibyte.
    pub(super) fn refuses(&self, size: usize) -> Option<wire::Error> {
        let since = self.fullness.size_since.fetch_add(size as u64, Relaxed) + size as u64;
        if since < JUDGED_SIZE && !self.fullness.is_full.load(Relaxed) {
            return self.storage_refusal();
        }
        self.refusal()
    }

    /// Why nothing new may be written, by looking at the log.
    pub(super) fn refusal(&self) -> Option<wire::Error> {
        self.fullness.size_since.store(0, Relaxed);
        let full = self.topic_refusal();
        self.fullness.is_full.store(full.is_some(), Relaxed);
        full.or_else(|| self.storage_refusal())
    }

    fn topic_refusal(&self) -> Option<wire::Error> {
        let limit = self.settings().retention_bytes;
        if limit == 0 {
            return None;
        }
        let holder = self.first_holder()?;
        // What would go by size alone, if nobody needed it.
        let (_, end) = self.group.log().retention_point(0, None, Some(limit), Offset(u64::MAX))?;
        if end <= holder.floor {
            return None;
        }
        let message = format_args!(
            "{} holds its limit of {limit} bytes and keeps more for {holder}; it takes records again when that moves on; {}",
            self.name(),
            holder.remedy(&self.topic.name)
        );
        Some(wire::Error {
            field: self.topic.name.clone(),
            retry_after_ms: RETRY_AFTER_MS,
            ..error(ErrorCode::TopicFull, message)
        })
    }

    fn storage_refusal(&self) -> Option<wire::Error> {
        // The bus's own topics stay alive as long as control entries do: without heartbeats all
        // operators would lose their leases.
        if self.class == TopicClass::System {
            return None;
        }
        let reason = self.services.storage_refusal(&self.status.borrow().voters)?;
        let message = format_args!("{} takes no records: {reason}", self.name());
        Some(wire::Error { retry_after_ms: RETRY_AFTER_MS, ..error(ErrorCode::StorageFull, message) })
    }
}
