//! The scrubber: segments that take no more batches are read again, round after round, so that damage
//! is found while other replicas can still repair it.
//!
//! It reads past the page cache, where the disk can, and at a bounded rate; what it finds is listed as
//! damage that a reader met is. It keeps no log open.

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

/// How far the round is: everything before was read.
#[derive(Default)]
struct Progress {
    log: Option<(GroupId, ReplicaId)>,
    /// First index of the segment that is being read.
    base: u64,
    /// In that segment, when its reading has begun.
    cursor: Option<Cursor>,
}

/// What a step did.
enum Step {
    Read(usize),
    RoundEnds,
}

impl Engine {
    /// Reads until the store stops.
    pub fn run_scrubber(&self) {
        let rate = self.options.scrub_rate_max;
        let (mut progress, mut round_at, mut round_size) = (Progress::default(), Instant::now(), 0);
        while !self.stopped() {
            let begin = Instant::now();
            let pause = match self.scrub_step(&mut progress) {
                Step::Read(size) => {
                    round_size += size;
                    metrics::add(&self.metrics.scrubbed_size, size);
                    Duration::from_secs_f64(size as f64 / rate as f64).saturating_sub(begin.elapsed())
                }
                Step::RoundEnds => {
                    progress = Progress::default();
                    let is_empty = std::mem::take(&mut round_size) == 0;
                    let rest = if is_empty { EMPTY_PAUSE } else { ROUND_TIME_MIN.saturating_sub(round_at.elapsed()) };
                    metrics::add(&self.metrics.scrub_round_count, usize::from(!is_empty));
                    round_at = Instant::now() + rest;
                    rest
                }
            };
            self.rest(pause);
        }
    }

    /// Reads about [`STEP_SIZE`] bytes, of one segment.
    fn scrub_step(&self, progress: &mut Progress) -> Step {
        loop {
            let Some((key, core)) = self.scrubbed_log(progress.log) else { return Step::RoundEnds };
            if progress.log != Some(key) {
                *progress = Progress { log: Some(key), ..Progress::default() };
            }
            let stretch = core.upgrade().and_then(|core| core.stretch_from(progress));
            let Some(stretch) = stretch else {
                // This log is read through: the next one begins behind it.
                *progress =
                    Progress { log: Some((key.0, ReplicaId(key.1.0.saturating_add(1)))), ..Progress::default() };
                if self.stopped() {
                    return Step::RoundEnds;
                }
                continue;
            };
            let size = self.scrub(&core, &stretch, progress);
            return Step::Read(size);
        }
    }

    /// The first open log at or behind `from`.
    fn scrubbed_log(&self, from: Option<(GroupId, ReplicaId)>) -> Option<((GroupId, ReplicaId), Weak<LogCore>)> {
        let logs = self.logs();
        let open = logs.iter().filter_map(|(key, place)| match place {
            Place::Open(core) if Some(*key) >= from => Some((*key, Weak::clone(core))),
            _ => None,
        });
        open.min_by_key(|(key, _)| *key)
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
