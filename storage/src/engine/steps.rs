//! A store without threads: whoever opened it does its work, step by step, and so decides when and in
//! which order things reach the disk.

use std::sync::Mutex;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use super::{Engine, PLAIN_ROUND_LOG_COUNT_MAX, Pace, lock};
use crate::scrub::Scrubber;

/// What the threads would know.
pub(super) struct Steps {
    announced: Notify,
    state: Mutex<State>,
}

struct State {
    pace: Pace,
    space_at: Instant,
    scrubber: Scrubber,
    scrub_at: Instant,
}

impl Steps {
    pub fn new() -> Self {
        let now = Instant::now();
        let state = State { pace: Pace::new(), space_at: now, scrubber: Scrubber::new(), scrub_at: now };
        Self { announced: Notify::new(), state: Mutex::new(state) }
    }
}

impl Engine {
    /// Whether the store has threads of its own.
    pub fn has_threads(&self) -> bool {
        self.steps.is_none()
    }

    /// Tells whoever takes the steps that there is one.
    pub(super) fn announce_step(&self) {
        if let Some(steps) = &self.steps {
            steps.announced.notify_one();
        }
    }

    /// Until there is a step. Those that come with time are not announced.
    pub async fn step_announced(&self) {
        match &self.steps {
            Some(steps) => steps.announced.notified().await,
            None => std::future::pending().await,
        }
    }

    /// Takes one step: a round, an operation or a chore. False: there is none now.
    pub fn step(&self) -> bool {
        let Some(steps) = &self.steps else { return false };
        let work = lock(&self.pool).take(PLAIN_ROUND_LOG_COUNT_MAX);
        if let Some(work) = work {
            self.perform(work);
            return true;
        }
        let mut state = lock(&steps.state);
        if state.space_at.elapsed() >= self.space_interval() {
            self.refresh_space();
            state.space_at = Instant::now();
        }
        let chore = {
            let mut chores = lock(&self.chores);
            let stopped = self.stopped.load(Ordering::SeqCst);
            let chore = chores.take(Instant::now(), state.pace.next_mark_at, stopped);
            chore.inspect(|_| self.begin())
        };
        if let Some(chore) = chore {
            self.perform_chore(chore, &mut state.pace);
            return true;
        }
        if self.options.scrub_rate_max > 0 && state.scrub_at <= Instant::now() {
            let pause = state.scrubber.step(self).max(SCRUB_PAUSE_MIN);
            state.scrub_at = Instant::now() + pause;
        }
        false
    }
}

/// Without threads, reading takes no time.
const SCRUB_PAUSE_MIN: Duration = Duration::from_millis(10);
