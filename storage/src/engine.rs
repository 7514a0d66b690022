//! The threads of a store: they take the operations of all its logs to the disk.
//!
//! ```text
//!   append, truncate, vote ... ──> queue of the log ──> ready ──┬─> ring ──> writes + fdatasync
//!                                  (in order, one at a time)    │    │       of many logs at once
//!                                                               │    └─ all but plain appends
//!                                                               └─> pool <┘
//!   zeroes ahead, idle marks, checkpoints ──> housekeeper
//! ```
//!
//! A log is run by one thread at a time, so its operations and callbacks keep their order.
//! While one group of a log is being flushed the next one gathers: that is the group commit.
//! Different logs are in flight side by side.

pub(crate) mod ring;

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::checkpoint::{self, CheckpointWrite};
use crate::disk::Disk;
use crate::error::OpenError;
use crate::flush::Op;
use crate::log::{LogCore, State};
use crate::metrics::{self, Metrics};
use crate::options::{Backend, Options};
use crate::segment::Segment;

/// Largest step of filling ahead, in bytes.
const FILL_STEP_MAX: u64 = 4 << 20;
/// Requests for filling ahead that may wait; more are dropped, since the next flush asks again.
const FILL_QUEUE_MAX: usize = 1_024;

pub(crate) struct Engine {
    pub disk: Arc<dyn Disk>,
    pub options: Options,
    pub metrics: Arc<Metrics>,
    ring: Option<ring::Handle>,
    pool: Mutex<Pool>,
    pool_ready: Condvar,
    chores: Mutex<Chores>,
    chores_ready: Condvar,
    /// Logs that are scheduled and chores that run. The threads end when there are none left,
    /// since each of them may still get work from another.
    active_count: AtomicUsize,
    stopped: AtomicBool,
}

#[derive(Default)]
struct Pool {
    logs: VecDeque<Arc<LogCore>>,
}

#[derive(Default)]
struct Chores {
    fills: VecDeque<(Arc<LogCore>, Arc<Segment>)>,
    checkpoints: VecDeque<(Arc<LogCore>, CheckpointWrite)>,
    marks: VecDeque<(Instant, Weak<LogCore>)>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Engine {
    /// Starts the threads. Files without a descriptor go through the pool in any case.
    pub fn start(disk: Arc<dyn Disk>, options: Options) -> Result<(Arc<Self>, Vec<JoinHandle<()>>), OpenError> {
        let name = disk.name();
        let ring = match options.backend {
            Backend::Plain => None,
            Backend::Auto => ring::Ring::new().inspect_err(|error| tracing::info!("io_uring is refused: {error}")).ok(),
            Backend::Uring => {
                Some(ring::Ring::new().map_err(|error| OpenError::NoUring { reason: error.to_string() })?)
            }
        };
        let failed = |source| OpenError::Io { what: format!("starting the threads of {name}"), source };
        let thread_count = options.thread_count.max(1);
        let engine = Arc::new(Self {
            disk,
            options,
            metrics: Arc::default(),
            ring: ring.as_ref().map(ring::Ring::handle),
            pool: Mutex::default(),
            pool_ready: Condvar::new(),
            chores: Mutex::default(),
            chores_ready: Condvar::new(),
            active_count: AtomicUsize::new(0),
            stopped: AtomicBool::new(false),
        });
        let mut threads = Vec::new();
        let mut spawn = |name: &str, run: Box<dyn FnOnce() + Send>| {
            threads.push(std::thread::Builder::new().name(name.to_owned()).spawn(run)?);
            Ok(())
        };
        for _ in 0..thread_count {
            let engine = Arc::clone(&engine);
            spawn("log-pool", Box::new(move || engine.run_pool())).map_err(failed)?;
        }
        let housekeeper = Arc::clone(&engine);
        spawn("log-chores", Box::new(move || housekeeper.run_chores())).map_err(failed)?;
        if let Some(ring) = ring {
            let engine = Arc::clone(&engine);
            spawn("log-ring", Box::new(move || ring.run(&engine))).map_err(failed)?;
        }
        Ok((engine, threads))
    }

    pub fn backend_name(&self) -> &'static str {
        if self.ring.is_some() { "io_uring" } else { "plain" }
    }

    /// Ends the threads after what is queued.
    pub fn stop(&self) {
        {
            // Under this lock, so that a chore either counts already or is never begun.
            let _chores = lock(&self.chores);
            self.stopped.store(true, Ordering::SeqCst);
        }
        self.wake_all();
    }

    fn wake_all(&self) {
        // Taking the locks: a thread between its check and its wait would miss the news.
        drop(lock(&self.pool));
        self.pool_ready.notify_all();
        drop(lock(&self.chores));
        self.chores_ready.notify_all();
        if let Some(ring) = &self.ring {
            ring.wake();
        }
    }

    fn may_end(&self) -> bool {
        self.stopped.load(Ordering::SeqCst) && self.active_count.load(Ordering::SeqCst) == 0
    }

    fn begin(&self) {
        self.active_count.fetch_add(1, Ordering::SeqCst);
    }

    fn end(&self) {
        if self.active_count.fetch_sub(1, Ordering::SeqCst) == 1 && self.stopped.load(Ordering::SeqCst) {
            self.wake_all();
        }
    }

    /// Takes a log that was not scheduled and now has operations in its queue.
    pub fn schedule(&self, core: Arc<LogCore>) {
        self.begin();
        self.push(core);
    }

    fn push(&self, core: Arc<LogCore>) {
        match &self.ring {
            Some(ring) => {
                if let Err(core) = ring.push(core) {
                    self.push_to_pool(core);
                }
            }
            None => self.push_to_pool(core),
        }
    }

    fn push_to_pool(&self, core: Arc<LogCore>) {
        lock(&self.pool).logs.push_back(core);
        self.pool_ready.notify_one();
    }

    fn run_pool(&self) {
        loop {
            let core = {
                let mut pool = lock(&self.pool);
                loop {
                    if let Some(core) = pool.logs.pop_front() {
                        break core;
                    }
                    if self.may_end() {
                        return;
                    }
                    pool = self.pool_ready.wait(pool).unwrap_or_else(PoisonError::into_inner);
                }
            };
            let op = core.lock().queue.pop_front();
            if let Some(op) = op
                && catch_unwind(AssertUnwindSafe(|| core.run(op))).is_err()
            {
                // A broken rule of one log must not end the writes of all others.
                core.poison("an operation of the log panicked");
            }
            self.release(core);
        }
    }

    /// Gives a log back after one operation: to the end of the line, so that all logs get on.
    fn release(&self, core: Arc<LogCore>) {
        let mut state = core.lock();
        if state.queue.is_empty() {
            state.scheduled = false;
            drop(state);
            self.end();
            return;
        }
        drop(state);
        self.push(core);
    }

    /// Sees to it that the durable mark is synced when the log falls idle.
    pub fn watch_mark(&self, core: &Arc<LogCore>, state: &mut State) {
        if std::mem::replace(&mut state.mark_watched, true) {
            return;
        }
        let due = Instant::now() + Duration::from_millis(self.options.mark_delay_ms);
        lock(&self.chores).marks.push_back((due, Arc::downgrade(core)));
        self.chores_ready.notify_one();
    }

    pub fn request_checkpoint(&self, core: &Arc<LogCore>, write: CheckpointWrite) {
        lock(&self.chores).checkpoints.push_back((Arc::clone(core), write));
        self.chores_ready.notify_one();
    }

    pub fn request_fill(&self, core: &Arc<LogCore>, segment: &Arc<Segment>) {
        let mut chores = lock(&self.chores);
        let waits = chores.fills.iter().any(|(_, other)| Arc::ptr_eq(other, segment));
        if !waits && chores.fills.len() < FILL_QUEUE_MAX {
            chores.fills.push_back((Arc::clone(core), Arc::clone(segment)));
            self.chores_ready.notify_one();
        }
    }

    fn run_chores(&self) {
        let mut next_fill_at = Instant::now();
        loop {
            let chore = {
                let mut chores = lock(&self.chores);
                loop {
                    let stopped = self.stopped.load(Ordering::SeqCst);
                    if let Some(chore) = chores.take(Instant::now(), stopped) {
                        self.begin();
                        break chore;
                    }
                    if self.may_end() {
                        return;
                    }
                    let next = chores.marks.front().filter(|_| !stopped);
                    let wait = next.map(|(due, _)| due.saturating_duration_since(Instant::now()));
                    chores = match wait {
                        Some(wait) => {
                            self.chores_ready.wait_timeout(chores, wait).unwrap_or_else(PoisonError::into_inner).0
                        }
                        None => self.chores_ready.wait(chores).unwrap_or_else(PoisonError::into_inner),
                    };
                }
            };
            match chore {
                Chore::Checkpoint(core, write) => checkpoint::perform(&core, write),
                Chore::Fill(core, segment) => self.fill(&core, &segment, &mut next_fill_at),
                Chore::Mark(core) => self.sync_idle_mark(&core),
            }
            self.end();
        }
    }

    fn fill(&self, core: &LogCore, segment: &Segment, next_fill_at: &mut Instant) {
        let now = Instant::now();
        if now < *next_fill_at || core.lock().poisoned.is_some() {
            return;
        }
        let step =
            (segment.header.capacity / 16).clamp(self.options.fill_size, FILL_STEP_MAX.max(self.options.fill_size));
        match segment.fill(step) {
            Ok(size) => {
                let pause = Duration::from_secs_f64(size as f64 / self.options.fill_rate_max.max(1) as f64);
                *next_fill_at = now + pause;
                metrics::add(&self.metrics.filled_size, usize::try_from(size).unwrap_or(usize::MAX));
            }
            // Appends do not need the zeroes; if the disk is full they will say so themselves.
            Err(error) => tracing::warn!("filling {} ahead failed: {error}", segment.path()),
        }
    }

    fn sync_idle_mark(&self, core: &Arc<LogCore>) {
        let mut state = core.lock();
        state.mark_watched = false;
        let delay = Duration::from_millis(self.options.mark_delay_ms);
        if state.flushed_at.is_some_and(|at| at.elapsed() < delay) {
            // The next flush carries the mark; look again when it may have been the last one.
            self.watch_mark(core, &mut state);
        } else if state.mark_dirty && state.poisoned.is_none() && !state.closed {
            core.enqueue(&mut state, Op::Mark(None));
        }
    }
}

enum Chore {
    Checkpoint(Arc<LogCore>, CheckpointWrite),
    Fill(Arc<LogCore>, Arc<Segment>),
    Mark(Arc<LogCore>),
}

impl Chores {
    fn take(&mut self, now: Instant, stopped: bool) -> Option<Chore> {
        if let Some((core, segment)) = self.fills.pop_front() {
            return Some(Chore::Fill(core, segment));
        }
        if let Some((core, write)) = self.checkpoints.pop_front() {
            return Some(Chore::Checkpoint(core, write));
        }
        while !stopped && self.marks.front().is_some_and(|(due, _)| *due <= now) {
            if let Some(core) = self.marks.pop_front().and_then(|(_, core)| core.upgrade()) {
                return Some(Chore::Mark(core));
            }
        }
        None
    }
}
