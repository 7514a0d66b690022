//! The scrubber: segments that take no more batches are read again, round after round, so that damage
//! is found while other replicas can still repair it.
//!
//! It reads past the page cache, where the disk can, and at a bounded rate; what it finds is listed as
//! damage that a reader met is. It keeps no log open.

use std::collections::VecDeque;
use std::sync::Weak;
use std::time::{Duration, Instant};

use arqon_proto::{GroupId, ReplicaId};

use crate::damage::{Cursor, Hole, Stretch, first_break};
use crate::engine::{Engine, Place};
use crate::log::LogCore;
use crate::metrics;

/// Bytes read between two pauses.
const STEP_SIZE: usize = 1 << 20;
/// A round begins no sooner after the one before.
const ROUND_TIME_MIN: Duration = Duration::from_secs(60);
/// Something may have been written when there was nothing to read.
const EMPTY_PAUSE: Duration = Duration::from_secs(1);

/// What is left of a round.
#[derive(Default)]
struct Progress {
    /// Logs to read; the first one is being read.
    logs: VecDeque<(GroupId, ReplicaId)>,
    /// Segments of that log before the one with this first index were read.
    base: u64,
    /// In that segment, when its reading has begun.
    cursor: Option<Cursor>,
}

/// What a step did.
enum Step {
    Read(usize),
    RoundEnds,
}

/// The rounds of a store.
pub(crate) struct Scrubber {
    progress: Progress,
    /// The next step begins a round.
    begins: bool,
    round_at: Instant,
    round_size: usize,
}

impl Scrubber {
    pub fn new() -> Self {
        Self { progress: Progress::default(), begins: true, round_at: Instant::now(), round_size: 0 }
    }

    /// Reads some bytes; returns how long to rest then.
    pub fn step(&mut self, engine: &Engine) -> Duration {
        let begin = Instant::now();
        if self.begins {
            self.progress.logs = engine.logs().keys().copied().collect();
        }
        self.begins = false;
        match engine.scrub_step(&mut self.progress) {
            Step::Read(size) => {
                self.round_size += size;
                metrics::add(&engine.metrics.scrubbed_size, size);
                let rate = engine.options.scrub_rate_max;
                Duration::from_secs_f64(size as f64 / rate as f64).saturating_sub(begin.elapsed())
            }
            Step::RoundEnds => {
                let is_empty = std::mem::take(&mut self.round_size) == 0;
                let rest = if is_empty { EMPTY_PAUSE } else { ROUND_TIME_MIN.saturating_sub(self.round_at.elapsed()) };
                metrics::add(&engine.metrics.scrub_round_count, usize::from(!is_empty));
                (self.round_at, self.begins) = (Instant::now() + rest, true);
                rest
            }
        }
    }
}

impl Engine {
    /// Reads until the store stops.
    pub fn run_scrubber(&self) {
        let mut scrubber = Scrubber::new();
        while !self.stopped() {
            let pause = scrubber.step(self);
            self.rest(pause);
        }
    }

    /// Reads about [`STEP_SIZE`] bytes, of one segment.
    fn scrub_step(&self, progress: &mut Progress) -> Step {
        while let Some(key) = progress.logs.front().copied() {
            let core = match self.logs().get(&key) {
                Some(Place::Open(core)) => Weak::clone(core),
                _ => Weak::new(),
            };
            let stretch = core.upgrade().and_then(|core| core.stretch_from(progress));
            if let Some(stretch) = stretch {
                return Step::Read(self.scrub(&core, &stretch, progress));
            }
            let logs = progress.logs.split_off(1);
            *progress = Progress { logs, ..Progress::default() };
        }
        Step::RoundEnds
    }

    fn scrub(&self, core: &Weak<LogCore>, stretch: &Stretch, progress: &mut Progress) -> usize {
        let mut size = 0;
        let result = first_break(&stretch.segment, stretch.from, stretch.end, |batch_size| {
            size += batch_size;
            size < STEP_SIZE
        });
        let next = match result {
            Ok((cursor, None)) => Some(cursor),
            Ok((_, Some(broken))) => match stretch.damage(broken) {
                Ok(Some((damage, behind))) => {
                    if let Some(core) = core.upgrade() {
                        core.note_damage(&stretch.segment, &damage, behind);
                    }
                    let (index, offset, chain) = (damage.last.0 + 1, damage.next_offset.0, damage.chain_after);
                    match damage.hole {
                        Hole::Inside { end, .. } => Some(Cursor { at: end, index, offset, chain, term: 0 }),
                        Hole::Between { .. } => None,
                    }
                }
                _ => None,
            },
            Err(error) => {
                tracing::warn!("{} cannot be read: {error}", stretch.segment.path());
                None
            }
        };
        match next.filter(|next| next.at < stretch.end) {
            Some(next) => (progress.base, progress.cursor) = (stretch.segment.header.base_index.0, Some(next)),
            None => (progress.base, progress.cursor) = (stretch.segment.header.base_index.0 + 1, None),
        }
        size
    }
}

impl LogCore {
    /// What comes next in this log's full segments.
    fn stretch_from(&self, progress: &Progress) -> Option<Stretch> {
        let state = self.lock();
        let flushed = state.flushed.map_or(0, |flushed| flushed.index.0 + 1);
        let full_count = state.segments.len().saturating_sub(1);
        let mut full = state.segments.iter().take(full_count).enumerate();
        full.find_map(|(number, segment)| {
            let goes_on = progress.cursor.filter(|_| segment.base_index() == progress.base);
            if segment.base_index() < progress.base || segment.next_index > flushed {
                return None;
            }
            let stretch = Stretch::of(&state, number, goes_on.map_or(0, |cursor| cursor.at))?;
            match goes_on {
                Some(cursor) if cursor.at < stretch.end => Some(stretch.starting_at(cursor)),
                Some(_) => None,
                None => Some(stretch),
            }
        })
    }
}
