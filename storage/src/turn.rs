//! A round on the thread that appends.
//!
//! Waking a thread of the store and being woken by it costs more than a small write on a fast disk.
//! So an append that finds everything at rest may get the turn to write its group itself, when its
//! thread has nothing else to do.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::engine::{Engine, Writer};
use crate::log::LogCore;

/// A group up to this size is written by the thread that appended it, in bytes.
pub(crate) const TURN_SIZE_MAX: usize = 32 << 10;
/// A turn should not take longer: on a slower disk threads must not be kept waiting for it.
const TURN_TIME_MAX: Duration = Duration::from_millis(1);
/// How long the threads of the store write everything after a turn that took too long.
const SLOW_PAUSE: Duration = Duration::from_millis(100);

/// The right to run a round for one log, which is idle but for what was just appended.
///
/// Dropped without being run, it goes to the threads of the store.
#[must_use = "what was appended waits for it"]
pub struct Turn {
    core: Arc<LogCore>,
    writer: Option<Box<Writer>>,
}

impl Turn {
    pub(crate) fn new(core: Arc<LogCore>, writer: Box<Writer>) -> Self {
        Self { core, writer: Some(writer) }
    }

    /// Makes durable what was appended, and runs the callbacks, on this thread.
    pub fn run(mut self) {
        if let Some(writer) = self.writer.take() {
            let engine = Arc::clone(&self.core.engine);
            let begin = Instant::now();
            engine.run_turn(Arc::clone(&self.core), writer);
            if begin.elapsed() > TURN_TIME_MAX {
                engine.pause_turns(SLOW_PAUSE);
            }
        }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        if let Some(writer) = self.writer.take() {
            let engine: &Engine = &self.core.engine;
            engine.give_back_turn(Arc::clone(&self.core), writer);
        }
    }
}
