//! The threads of a store: they take the operations of all its logs to the disk.
//!
//! ```text
//!   append, truncate, vote ... ──> queue of the log ──> ready ──┬─> round: the groups of all
//!                                  (in order, one at a time)    │   logs that have one
//!                                                               └─> one operation of one log
//!   zeroes ahead, marks, checkpoints, indexes ──> housekeeper      full segments ──> scrubber
//! ```
//!
//! A log is run by one thread at a time, so its operations and callbacks keep their order.
//! While one group of a log is being flushed the next one gathers: that is the group commit.
//! The thread that takes a round does all of it, so that a group wakes one thread on its way to
//! the disk; one that comes alone may wake none: see `turn.rs`. While a round waits for the disk,
//! the next one may be written by another thread.

mod round;
mod steps;

use std::collections::{HashMap, VecDeque};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use arqon_proto::{GroupId, ReplicaId};

pub(crate) use self::round::Writer;
use crate::checkpoint::{self, CheckpointWrite};
use crate::disk::ring::Ring;
use crate::disk::{Disk, blocks};
use crate::error::OpenError;
use crate::flush::Op;
use crate::index;
use crate::log::{LogCore, State};
use crate::metrics::{self, Metrics};
use crate::options::{Backend, Options};
use crate::pool::FilePool;
use crate::recent::RecentTotal;
use crate::segment::Segment;
use crate::space::{self, Space, SpaceState, SpaceWatch};
use steps::Steps;

/// Rounds that run side by side, with io_uring.
const ROUND_COUNT: usize = 2;
/// Logs of one round with io_uring.
const ROUND_LOG_COUNT_MAX: usize = 256;
/// Logs of one round without it: its writes follow one another.
const PLAIN_ROUND_LOG_COUNT_MAX: usize = 16;
/// Requests for filling ahead that may wait; more are dropped, since the next flush asks again.
const FILL_QUEUE_MAX: usize = 1_024;

/// Syncs of marks of busy logs leave the disk alone for this many times as long as they take.
const MARK_PAUSE: u32 = 8;

/// The logs that are open, or were until their last handle was dropped.
pub(crate) type Logs = HashMap<(GroupId, ReplicaId), Place>;

/// What has the place of one log.
pub(crate) enum Place {
    /// It is being opened.
    Opening,
    Open(Weak<LogCore>),
}

impl Place {
    fn weak(&self) -> Option<Weak<LogCore>> {
        match self {
            Self::Opening => None,
            Self::Open(core) => Some(Weak::clone(core)),
        }
    }

    /// The log, unless it is being opened or nobody has it any more.
    pub fn log(&self) -> Option<Arc<LogCore>> {
        match self {
            Self::Opening => None,
            Self::Open(core) => core.upgrade(),
        }
    }
}

pub(crate) struct Engine {
    pub disk: Arc<dyn Disk>,
    pub options: Options,
    pub metrics: Arc<Metrics>,
    /// Recent entries of all logs.
    pub recent: Arc<RecentTotal>,
    /// Files of purged segments.
    pub files: FilePool,
    space: SpaceWatch,
    logs: Mutex<Logs>,
    /// A log was opened or could not be.
    opened: Condvar,
    uring: bool,
    writer_count: usize,
    pool: Mutex<Pool>,
    pool_ready: Condvar,
    chores: Mutex<Chores>,
    chores_ready: Condvar,
    /// For the scrubber's pauses.
    resting: Mutex<()>,
    rested: Condvar,
    /// Logs that are scheduled and chores that run. The threads end when there are none left,
    /// since each of them may still get work from another.
    active_count: AtomicUsize,
    stopped: AtomicBool,
    /// There where the store has no threads.
    steps: Option<Steps>,
}

/// What a log waits for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Next {
    Round,
    Operation,
}

impl Next {
    pub fn of(state: &State) -> Self {
        if matches!(state.queue.front(), Some(Op::Append(_))) { Self::Round } else { Self::Operation }
    }
}

#[derive(Default)]
struct Pool {
    rounds: VecDeque<Arc<LogCore>>,
    operations: VecDeque<Arc<LogCore>>,
    /// Operations that threads are at.
    running_count: usize,
    /// No round runs on the thread of an append before this time.
    no_turns_until: Option<Instant>,
    /// One for each round that may begin now.
    #[expect(clippy::vec_box, reason = "handed around whole")]
    writers: Vec<Box<Writer>>,
    idle_count: usize,
    /// Threads that were woken and have not come yet.
    waking_count: usize,
}

enum Work {
    Round(Vec<Arc<LogCore>>, Box<Writer>),
    Operation(Arc<LogCore>),
}

impl Pool {
    fn take(&mut self, round_log_count_max: usize) -> Option<Work> {
        if !self.rounds.is_empty()
            && let Some(writer) = self.writers.pop()
        {
            let count = self.rounds.len().min(round_log_count_max);
            return Some(Work::Round(self.rounds.drain(..count).collect(), writer));
        }
        let core = self.operations.pop_front()?;
        self.running_count += 1;
        Some(Work::Operation(core))
    }

    fn push(&mut self, core: Arc<LogCore>, next: Next) {
        match next {
            Next::Round => self.rounds.push_back(core),
            Next::Operation => self.operations.push_back(core),
        }
    }

    /// Whether a thread should be woken: it would find something to do, and none is on its way.
    fn wakes(&mut self) -> bool {
        let work = !self.operations.is_empty() || !self.rounds.is_empty() && !self.writers.is_empty();
        let wakes = work && self.waking_count == 0 && self.idle_count > 0;
        self.waking_count += usize::from(wakes);
        wakes
    }
}

#[derive(Default)]
struct Chores {
    /// Segments that want zeroes ahead, unless they are purged before: see `indexes`.
    fills: VecDeque<(Arc<LogCore>, Weak<Segment>)>,
    checkpoints: VecDeque<(Arc<LogCore>, CheckpointWrite)>,
    /// Full segments whose index is to be saved, unless they are purged before: waiting here must not
    /// keep their files from being used again.
    indexes: VecDeque<(Arc<LogCore>, Weak<Segment>)>,
    marks: VecDeque<(Instant, Weak<LogCore>)>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn rings() -> io::Result<Vec<Ring>> {
    (0..ROUND_COUNT).map(|_| Ring::new(ROUND_LOG_COUNT_MAX as u32)).collect()
}

impl Engine {
    /// Starts the threads. Files without a descriptor go through the pool in any case.
    pub fn start(disk: Arc<dyn Disk>, options: Options) -> Result<(Arc<Self>, Vec<JoinHandle<()>>), OpenError> {
        let name = disk.name();
        let rings = match options.backend {
            Backend::Plain => None,
            Backend::Auto => rings().inspect_err(|error| tracing::info!("io_uring is refused: {error}")).ok(),
            Backend::Uring => Some(rings().map_err(|error| OpenError::NoUring { reason: error.to_string() })?),
        };
        let failed = |source| OpenError::Io { what: format!("starting the threads of {name}"), source };
        let thread_count = options.thread_count;
        let uring = rings.is_some();
        let writers: io::Result<Vec<Box<Writer>>> = match rings {
            Some(rings) => rings.into_iter().map(|ring| Writer::new(Some(ring)).map(Box::new)).collect(),
            None => (0..thread_count.max(1)).map(|_| Writer::new(None).map(Box::new)).collect(),
        };
        let pool = Pool { writers: writers.map_err(failed)?, ..Pool::default() };
        let metrics = Arc::<Metrics>::default();
        let recent = RecentTotal::new(Arc::clone(&metrics), options.recent_size_max, options.recent_total_max);
        let space = SpaceWatch::new(Arc::clone(&metrics));
        space.refresh(disk.as_ref());
        let capacity = blocks::round_up(options.segment_size_max);
        let files = FilePool::new(Arc::clone(&metrics), options.pool_size_max, capacity);
        let engine = Arc::new(Self {
            disk,
            files,
            options,
            metrics,
            recent: Arc::new(recent),
            space,
            logs: Mutex::default(),
            opened: Condvar::new(),
            uring,
            writer_count: pool.writers.len(),
            pool: Mutex::new(pool),
            pool_ready: Condvar::new(),
            chores: Mutex::default(),
            chores_ready: Condvar::new(),
            resting: Mutex::default(),
            rested: Condvar::new(),
            active_count: AtomicUsize::new(0),
            stopped: AtomicBool::new(false),
            steps: (thread_count == 0).then(Steps::new),
        });
        if thread_count == 0 {
            return Ok((engine, Vec::new()));
        }
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
        if engine.options.scrub_rate_max > 0 {
            let scrubber = Arc::clone(&engine);
            spawn("log-scrub", Box::new(move || scrubber.run_scrubber())).map_err(failed)?;
        }
        Ok((engine, threads))
    }

    pub fn logs(&self) -> MutexGuard<'_, Logs> {
        lock(&self.logs)
    }

    /// As [`Engine::logs`], when none of those that `matter` is being opened any more.
    pub fn logs_opened(&self, matter: impl Fn(&(GroupId, ReplicaId)) -> bool) -> MutexGuard<'_, Logs> {
        let opening = |logs: &mut Logs| logs.iter().any(|(key, place)| matches!(place, Place::Opening) && matter(key));
        self.opened.wait_while(self.logs(), opening).unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the opening of a log: with the log, or with an error.
    pub fn end_opening(&self, key: (GroupId, ReplicaId), core: Option<&Arc<LogCore>>) {
        {
            let mut logs = self.logs();
            match core {
                Some(core) => logs.insert(key, Place::Open(Arc::downgrade(core))),
                None => logs.remove(&key),
            };
        }
        self.opened.notify_all();
    }

    /// What the disk still takes, as far as is known now.
    pub fn space(&self) -> Space {
        self.space.now(&self.options)
    }

    /// Asks the disk what is free, and gives it the spare files when that is little.
    pub fn refresh_space(&self) {
        let before = self.space().state;
        self.space.refresh(self.disk.as_ref());
        if !self.space().takes_spares() && self.files.clear(self.disk.as_ref(), None) {
            self.space.refresh(self.disk.as_ref());
        }
        let now = self.space();
        if now.state != before {
            let (name, free, reserve) = (self.disk.name(), now.free_size, now.reserve_size);
            tracing::warn!("{name} has {free} bytes free and a reserve of {reserve}: space is {:?}", now.state);
        }
    }

    pub fn backend_name(&self) -> &'static str {
        if self.uring { "io_uring" } else { "plain" }
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
        drop(lock(&self.resting));
        self.rested.notify_all();
    }

    pub fn stopped(&self) -> bool {
        self.stopped.load(Ordering::SeqCst)
    }

    /// Waits, or until the store stops.
    pub fn rest(&self, pause: Duration) {
        let resting = lock(&self.resting);
        let waited = self.rested.wait_timeout_while(resting, pause, |()| !self.stopped());
        drop(waited.unwrap_or_else(PoisonError::into_inner));
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
    pub fn schedule(&self, core: Arc<LogCore>, next: Next) {
        self.begin();
        let wakes = {
            let mut pool = lock(&self.pool);
            pool.push(core, next);
            pool.wakes()
        };
        self.announce_step();
        if wakes {
            self.pool_ready.notify_one();
        }
    }

    fn run_pool(&self) {
        let round_log_count_max = if self.uring { ROUND_LOG_COUNT_MAX } else { PLAIN_ROUND_LOG_COUNT_MAX };
        loop {
            let (work, wakes) = {
                let mut pool = lock(&self.pool);
                loop {
                    if let Some(work) = pool.take(round_log_count_max) {
                        break (work, pool.wakes());
                    }
                    if self.may_end() {
                        return;
                    }
                    pool.idle_count += 1;
                    pool = self.pool_ready.wait(pool).unwrap_or_else(PoisonError::into_inner);
                    pool.idle_count -= 1;
                    pool.waking_count = pool.waking_count.saturating_sub(1);
                }
            };
            if wakes {
                self.pool_ready.notify_one();
            }
            self.perform(work);
        }
    }

    fn perform(&self, work: Work) {
        match work {
            Work::Round(cores, writer) => {
                self.run_round(cores, writer);
                self.trim();
            }
            Work::Operation(core) => {
                let op = core.lock().queue.pop_front();
                if let Some(op) = op
                    && catch_unwind(AssertUnwindSafe(|| core.run(op))).is_err()
                {
                    // A broken rule of one log must not end the writes of all others.
                    core.poison("an operation of the log panicked");
                }
                lock(&self.pool).running_count -= 1;
                self.release(core);
            }
        }
    }

    /// What it takes to run a round for one log on the calling thread, which then counts as
    /// scheduled: `None` while anything else is written for any log.
    pub fn begin_turn(&self) -> Option<Box<Writer>> {
        let mut pool = lock(&self.pool);
        let at_rest = self.steps.is_none()
            && pool.rounds.is_empty()
            && pool.writers.len() == self.writer_count
            && pool.operations.is_empty()
            && pool.running_count == 0;
        if !at_rest || pool.no_turns_until.is_some_and(|until| Instant::now() < until) {
            return None;
        }
        let writer = pool.writers.pop();
        if writer.is_some() {
            self.begin();
        }
        writer
    }

    pub fn run_turn(&self, core: Arc<LogCore>, writer: Box<Writer>) {
        self.run_round(vec![core], writer);
        self.wake_one();
        self.trim();
    }

    pub fn give_back_turn(&self, core: Arc<LogCore>, writer: Box<Writer>) {
        {
            let mut pool = lock(&self.pool);
            pool.writers.push(writer);
            pool.rounds.push_back(core);
        }
        self.wake_one();
    }

    pub fn pause_turns(&self, pause: Duration) {
        lock(&self.pool).no_turns_until = Some(Instant::now() + pause);
    }

    // For a thread that does not look for work itself.
    fn wake_one(&self) {
        let wakes = lock(&self.pool).wakes();
        if wakes {
            self.pool_ready.notify_one();
        }
    }

    fn run_round(&self, cores: Vec<Arc<LogCore>>, mut writer: Box<Writer>) {
        if catch_unwind(AssertUnwindSafe(|| round::run(self, &cores, &mut writer))).is_err() {
            cores.iter().for_each(|core| core.poison("a round of writes panicked"));
            writer.reset();
        }
        lock(&self.pool).writers.push(writer);
        cores.into_iter().for_each(|core| self.release(core));
    }

    /// Cuts what each log keeps in memory to a share that lets all of them fit, when they have
    /// grown.
    fn trim(&self) {
        if !self.recent.begin_trim() {
            return;
        }
        let logs: Vec<_> = self.logs().values().filter_map(Place::weak).collect();
        // One at a time: a log that is held here counts as open.
        let sizes = logs.iter().filter_map(|core| Some(core.upgrade()?.lock().recent.size()));
        self.recent.share_among(sizes.collect());
        logs.iter().filter_map(Weak::upgrade).for_each(|core| core.lock().evict());
    }

    /// Gives a log back after one operation: to the end of the line, so that all logs get on.
    /// Wakes nobody, since the calling thread looks for work next.
    fn release(&self, core: Arc<LogCore>) {
        let mut state = core.lock();
        if state.queue.is_empty() {
            state.scheduled = false;
            drop(state);
            self.end();
            return;
        }
        let next = Next::of(&state);
        drop(state);
        lock(&self.pool).push(core, next);
    }

    /// Sees to it that the durable mark is synced when the log falls idle.
    pub fn watch_mark(&self, core: &Arc<LogCore>, state: &mut State) {
        if std::mem::replace(&mut state.mark_watched, true) {
            return;
        }
        let due = Instant::now() + Duration::from_millis(self.options.mark_delay_ms);
        lock(&self.chores).marks.push_back((due, Arc::downgrade(core)));
        self.chores_ready.notify_one();
        self.announce_step();
    }

    pub fn request_checkpoint(&self, core: &Arc<LogCore>, write: CheckpointWrite) {
        lock(&self.chores).checkpoints.push_back((Arc::clone(core), write));
        self.chores_ready.notify_one();
        self.announce_step();
    }

    pub fn request_index(&self, core: &Arc<LogCore>, segment: &Arc<Segment>) {
        lock(&self.chores).indexes.push_back((Arc::clone(core), Arc::downgrade(segment)));
        self.chores_ready.notify_one();
        self.announce_step();
    }

    pub fn request_fill(&self, core: &Arc<LogCore>, segment: &Arc<Segment>) {
        let mut chores = lock(&self.chores);
        let waits = chores.fills.iter().any(|(_, other)| other.as_ptr() == Arc::as_ptr(segment));
        if !waits && chores.fills.len() < FILL_QUEUE_MAX {
            chores.fills.push_back((Arc::clone(core), Arc::downgrade(segment)));
            self.chores_ready.notify_one();
            self.announce_step();
        }
    }

    fn run_chores(&self) {
        let mut pace = Pace::new();
        let mut space_at = Instant::now();
        loop {
            if space_at.elapsed() >= self.space_interval() {
                self.refresh_space();
                space_at = Instant::now();
            }
            let chore = {
                let mut chores = lock(&self.chores);
                loop {
                    let stopped = self.stopped.load(Ordering::SeqCst);
                    if let Some(chore) = chores.take(Instant::now(), pace.next_mark_at, stopped) {
                        self.begin();
                        break Some(chore);
                    }
                    if self.may_end() {
                        return;
                    }
                    let look_again = self.space_interval().saturating_sub(space_at.elapsed());
                    if look_again.is_zero() {
                        break None;
                    }
                    let next = chores.marks.front().filter(|_| !stopped);
                    let due =
                        next.map(|(due, _)| (*due).max(pace.next_mark_at).saturating_duration_since(Instant::now()));
                    let wait = due.map_or(look_again, |due| due.min(look_again));
                    chores = self.chores_ready.wait_timeout(chores, wait).unwrap_or_else(PoisonError::into_inner).0;
                }
            };
            if let Some(chore) = chore {
                self.perform_chore(chore, &mut pace);
            }
        }
    }

    fn perform_chore(&self, chore: Chore, pace: &mut Pace) {
        match chore {
            Chore::Checkpoint(core, write) => checkpoint::perform(&core, write),
            Chore::Index(core, segment) => index::save(&core, &segment),
            Chore::Fill(core, segment) => self.fill(&core, &segment, &mut pace.next_fill_at),
            Chore::Mark(core) => self.sync_mark(&core, &mut pace.next_mark_at),
        }
        self.end();
    }

    fn space_interval(&self) -> Duration {
        let busy = self.space.is_stale() || self.space().state != SpaceState::Enough;
        if busy { space::BUSY_INTERVAL } else { space::IDLE_INTERVAL }
    }

    fn fill(&self, core: &LogCore, segment: &Segment, next_fill_at: &mut Instant) {
        let now = Instant::now();
        if now < *next_fill_at || core.lock().poisoned.is_some() || self.space().state != SpaceState::Enough {
            return;
        }
        match segment.fill(self.options.fill_size) {
            Ok(size) => {
                let pause = Duration::from_secs_f64(size as f64 / self.options.fill_rate_max.max(1) as f64);
                *next_fill_at = now + pause;
                metrics::add(&self.metrics.filled_size, usize::try_from(size).unwrap_or(usize::MAX));
            }
            // Appends do not need the zeroes; if the disk is full they will say so themselves.
            Err(error) => tracing::warn!("filling {} ahead failed: {error}", segment.path()),
        }
    }

    /// Syncs the mark of a log, in its turn when the log is idle and beside its appends when it
    /// is busy. With many busy logs a mark waits longer, so that their flushes get on.
    fn sync_mark(&self, core: &Arc<LogCore>, next_mark_at: &mut Instant) {
        let delay = Duration::from_millis(self.options.mark_delay_ms);
        let mut state = core.lock();
        state.mark_watched = false;
        if state.poisoned.is_some() || state.closed {
            return;
        }
        if state.flushed_at.is_none_or(|at| at.elapsed() >= delay) {
            if state.mark_dirty {
                core.enqueue(&mut state, Op::Mark(None));
            }
            return;
        }
        // Look again when this flush may have been the last one.
        self.watch_mark(core, &mut state);
        drop(state);
        let begin = Instant::now();
        core.sync_old_mark(delay);
        *next_mark_at = begin + begin.elapsed() * MARK_PAUSE;
    }
}

/// When the next chores of a kind may be done.
struct Pace {
    next_fill_at: Instant,
    next_mark_at: Instant,
}

impl Pace {
    fn new() -> Self {
        Self { next_fill_at: Instant::now(), next_mark_at: Instant::now() }
    }
}

enum Chore {
    Checkpoint(Arc<LogCore>, CheckpointWrite),
    Index(Arc<LogCore>, Arc<Segment>),
    Fill(Arc<LogCore>, Arc<Segment>),
    Mark(Arc<LogCore>),
}

impl Chores {
    fn take(&mut self, now: Instant, next_mark_at: Instant, stopped: bool) -> Option<Chore> {
        while let Some((core, segment)) = self.fills.pop_front() {
            if let Some(segment) = segment.upgrade() {
                return Some(Chore::Fill(core, segment));
            }
        }
        if let Some((core, write)) = self.checkpoints.pop_front() {
            return Some(Chore::Checkpoint(core, write));
        }
        while let Some((core, segment)) = self.indexes.pop_front() {
            if let Some(segment) = segment.upgrade() {
                return Some(Chore::Index(core, segment));
            }
        }
        while !stopped && next_mark_at <= now && self.marks.front().is_some_and(|(due, _)| *due <= now) {
            if let Some(core) = self.marks.pop_front().and_then(|(_, core)| core.upgrade()) {
                return Some(Chore::Mark(core));
            }
        }
        None
    }
}
