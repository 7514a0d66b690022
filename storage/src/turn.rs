//! A round on the thread that appends.
//!
//! Waking a thread of the store and being woken by it takes a part of the time of a small write on a
//! fast disk. So an entry that comes alone, when nothing else is written, may be made durable by the
//! thread that appended it, if that has nothing else to do.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::engine::Writer;
use crate::log::Log;

/// An entry up to this size is written by the thread that appended it, in bytes.
pub(crate) const TURN_SIZE_MAX: usize = 32 << 10;
/// What comes sooner after the last flush has company: whoever waited for that flush was quick.
pub(crate) const TURN_REST_MIN: Duration = Duration::from_micros(50);
/// A turn should not take longer.
const TURN_TIME_MAX: Duration = Duration::from_millis(1);
/// After a turn that took too long the threads of the store write everything for this many times as
/// long: a disk that is slow holds up the other threads for a hundredth of the time.
const SLOW_PAUSE: u32 = 100;

/// The right to run a round for one log, which is idle but for what was just appended. Other
/// threads can still append to it.
///
/// Dropped without being run, it goes to the threads of the store.
#[must_use = "what was appended waits for it"]
pub struct Turn {
    // The threads of the store must not be waited for before this turn has come to its end.
    log: Log,
    writer: Option<Box<Writer>>,
}

impl Turn {
    pub(crate) fn new(log: Log, writer: Box<Writer>) -> Self {
        Self { log, writer: Some(writer) }
    }

    /// Makes durable what was appended, and runs the callbacks, on this thread.
    pub fn run(mut self) {
        if let Some(writer) = self.writer.take() {
            let core = &self.log.core;
            let begin = Instant::now();
            core.engine.run_turn(Arc::clone(core), writer);
            let took = begin.elapsed();
            if took > TURN_TIME_MAX {
                core.engine.pause_turns(took * SLOW_PAUSE);
            }
        }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        if let Some(writer) = self.writer.take() {
            let core = &self.log.core;
            core.engine.give_back_turn(Arc::clone(core), writer);
        }
    }
}
