//! Ranges of entries whose bytes are lost or fail their checks: how they are found and delimited.
//!
//! ```text
//!   entry 6     entry 7      8      9        entry 10
//!   ──┬──────┬────────────┬──────┬───────┬───────────────
//!     │ good │ header bad │  ?   │   ?   │ header good, and the chain leads from it to the goal
//!   ──┴──────┴────────────┴──────┴───────┴───────────────
//!            ▲ chain before              ▲ chain after
//! ```
//!
//! The *goal* is a place behind the break whose chain value is known from elsewhere: a point of the
//! index, the header of the next segment, the durable mark. A header from which the chain leads to
//! the goal belongs to the log, and its chain field proves every entry before it: so whoever brings
//! the lost entries can be checked to the last bit.

use std::io;
use std::sync::Arc;

use arqon_proto::{BATCH_HEADER_SIZE, Header, Offset, RaftIndex, limits};

use crate::disk::{File, is_unreadable};
use crate::error::ReadError;
use crate::index::IndexPoint;
use crate::layout::SEGMENT_DATA_AT;
use crate::log::{Log, LogCore, State};
use crate::metrics::{self, Metrics};
use crate::search::resync;
use crate::segment::{BatchError, Segment, SegmentState, Walk};

/// Consecutive entries that cannot be read here. Both chain values are known, so entries that are
/// put in their place are proven.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Damage {
    /// First entry lost.
    pub first: RaftIndex,
    /// Last entry lost.
    pub last: RaftIndex,
    /// Offset of the first record lost, if any is.
    pub first_offset: Offset,
    /// Offset after the last record lost; equal to `first_offset` when none is.
    pub next_offset: Offset,
    /// Segment file, and the first bad byte.
    pub place: String,
    /// What is wrong there.
    pub reason: String,
    /// Chain value that the first entry carries.
    pub(crate) chain_before: u64,
    /// Chain value that the entry after the last one carries.
    pub(crate) chain_after: u64,
    pub(crate) hole: Hole,
}

/// Where the lost bytes stood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Hole {
    /// Bytes `at..end` of the segment that begins with entry `base`.
    Inside { base: u64, at: u64, end: u64 },
    /// Between two segments; the files, if any, that stood there and hold nothing of use.
    Between { lost: Vec<String> },
}

impl Damage {
    /// What a reader is told.
    #[must_use]
    pub fn read_error(&self) -> ReadError {
        ReadError::Damaged {
            first: self.first_offset,
            last: Offset(self.next_offset.0.wrapping_sub(1)),
            index: self.first,
            reason: format!("{}: {}", self.place, self.reason),
        }
    }

    /// Where it begins and ends in its segment, when it lies inside of one.
    pub(crate) fn bytes(&self) -> Option<(u64, u64)> {
        match self.hole {
            Hole::Inside { at, end, .. } => Some((at, end)),
            Hole::Between { .. } => None,
        }
    }

    /// Where it begins in the segment, when it lies inside of one.
    pub(crate) fn inside(&self, segment: &SegmentState) -> Option<u64> {
        match self.hole {
            Hole::Inside { base, at, .. } if base == segment.base_index() => Some(at),
            _ => None,
        }
    }
}

/// The damage that a log knows of, in order, without overlap.
/// `damage_count` of the metrics counts that of all logs.
#[derive(Default)]
pub(crate) struct DamageList {
    list: Vec<Damage>,
    metrics: Arc<Metrics>,
}

impl DamageList {
    pub fn new(metrics: Arc<Metrics>, found: Vec<Damage>) -> Self {
        metrics::add(&metrics.damage_found_count, found.len());
        metrics::add(&metrics.damage_count, found.len());
        Self { list: found, metrics }
    }

    pub fn iter(&self) -> impl Iterator<Item = &Damage> {
        self.list.iter()
    }

    /// Adds `damage` unless part of it is known, or too much is.
    pub fn insert(&mut self, damage: Damage) -> bool {
        let at = self.list.partition_point(|known| known.last < damage.first);
        let is_new = self.list.get(at).is_none_or(|next| next.first > damage.last);
        let fits = is_new && self.list.len() < limits::DAMAGE_COUNT_MAX;
        if fits {
            self.list.insert(at, damage);
            metrics::add(&self.metrics.damage_found_count, 1);
            metrics::add(&self.metrics.damage_count, 1);
        }
        fits
    }

    pub fn at_index(&self, index: u64) -> Option<&Damage> {
        let at = self.list.partition_point(|known| known.last.0 < index);
        self.list.get(at).filter(|damage| damage.first.0 <= index)
    }

    pub fn at_offset(&self, offset: u64) -> Option<&Damage> {
        self.list.iter().find(|damage| (damage.first_offset.0..damage.next_offset.0).contains(&offset))
    }

    /// The first damage inside `segment` at or behind byte `at`.
    pub fn inside_from(&self, segment: &SegmentState, at: u64) -> Option<(u64, &Damage)> {
        if self.list.is_empty() {
            return None;
        }
        let inside = self.list.iter().filter_map(|damage| Some((damage.inside(segment)?, damage)));
        inside.filter(|(damaged_at, _)| *damaged_at >= at).min_by_key(|(damaged_at, _)| *damaged_at)
    }

    /// The hole that ends where entry `base` begins a segment.
    pub fn before_segment(&self, base: u64) -> Option<&Damage> {
        self.list.iter().find(|damage| matches!(damage.hole, Hole::Between { .. }) && damage.last.0 + 1 == base)
    }

    /// Whether it was there.
    pub fn remove(&mut self, damage: &Damage) -> bool {
        self.retain(|known| known != damage) > 0
    }

    /// Forgets what lies wholly outside of the entries `from..end`, and gives the names of the files that
    /// nobody asks for any more then.
    pub fn keep(&mut self, from: u64, end: u64) -> Vec<String> {
        let mut lost_files = Vec::new();
        self.retain(|damage| {
            let keeps = damage.last.0 >= from && damage.first.0 < end;
            if let Hole::Between { lost } = &damage.hole
                && !keeps
            {
                lost_files.extend(lost.iter().cloned());
            }
            keeps
        });
        lost_files
    }

    fn retain(&mut self, keep: impl FnMut(&Damage) -> bool) -> usize {
        let before = self.list.len();
        self.list.retain(keep);
        let gone = before - self.list.len();
        metrics::subtract(&self.metrics.damage_count, gone);
        gone
    }
}

impl Drop for DamageList {
    fn drop(&mut self) {
        metrics::subtract(&self.metrics.damage_count, self.list.len());
    }
}

/// Where a walk along the chain is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Cursor {
    pub at: u64,
    pub index: u64,
    pub offset: u64,
    pub chain: u64,
    pub term: u64,
}

/// A place whose chain value is known; byte and offset where they are.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Goal {
    pub at: Option<u64>,
    pub index: u64,
    pub offset: Option<u64>,
    pub chain: u64,
}

impl Goal {
    pub fn is_met_by(&self, cursor: &Cursor) -> bool {
        self.index == cursor.index
            && self.chain == cursor.chain
            && self.at.is_none_or(|at| at == cursor.at)
            && self.offset.is_none_or(|offset| offset == cursor.offset)
    }
}

impl Cursor {
    /// Where the batch of `header`, whose bytes stand at the cursor, ends; `None` when it does not
    /// continue the chain.
    pub fn after(&self, bytes: &[u8; BATCH_HEADER_SIZE], header: &Header) -> Option<Self> {
        let place = (header.index.0, header.base_offset.0, header.chain);
        if place != (self.index, self.offset, self.chain) || header.term.0 < self.term {
            return None;
        }
        let (index, offset) = (header.index.0 + 1, header.next_offset().0);
        let at = self.at + header.batch_size() as u64;
        Some(Self { at, index, offset, chain: Header::chain_value(bytes), term: header.term.0 })
    }
}

/// A break of the chain, or a batch whose payload fails its checks.
pub(crate) struct Break {
    pub at: Cursor,
    /// Where the batch ends, when its header is whole and continues the chain.
    pub batch_end: Option<Cursor>,
    pub reason: String,
}

/// Checks every batch from `from` to byte `end`, past the page cache where the disk can. `pass` is
/// told of the size of each batch and may wait; it says whether to go on.
pub(crate) fn first_break(
    segment: &Segment,
    from: Cursor,
    end: u64,
    mut pass: impl FnMut(usize) -> bool,
) -> io::Result<(Cursor, Option<Break>)> {
    let file = segment.file()?;
    let mut walk = Walk::of_batches(file.as_ref(), from.at, end, usize::MAX >> 1);
    let mut cursor = from;
    let broken = |at: Cursor, batch_end: Option<Cursor>, reason: &str| {
        Ok((at, Some(Break { at, batch_end, reason: reason.to_owned() })))
    };
    while cursor.at < end {
        let bytes = match walk.bytes() {
            Ok(Some(bytes)) => bytes,
            Ok(None) => return broken(cursor, None, "the file ends too early"),
            Err(error) if is_unreadable(&error) => return broken(cursor, None, &error.to_string()),
            Err(error) => return Err(error),
        };
        let header = match Header::decode(&bytes) {
            Ok(header) => header,
            Err(error) => return broken(cursor, None, &error.to_string()),
        };
        let Some(next) = cursor.after(&bytes, &header) else {
            return broken(cursor, None, "the batch does not continue the chain");
        };
        if next.at > end {
            return broken(cursor, None, "the batch passes the end of the batches");
        }
        match walk.batch(segment, cursor.at, &header) {
            Ok(_) => {}
            Err(BatchError::Disk(error)) if !BatchError::is_damage_of(&error) => return Err(error),
            Err(error) => return broken(cursor, Some(next), &error.to_string()),
        }
        walk.at = next.at;
        cursor = next;
        if !pass(header.batch_size()) {
            break;
        }
    }
    Ok((cursor, None))
}

/// The part of a segment that can be checked: from a known place over known places to its end.
pub(crate) struct Stretch {
    pub segment: Arc<Segment>,
    pub from: Cursor,
    /// In order; the last one is the end.
    goals: Vec<Goal>,
    pub end: u64,
    /// Term of the entry that follows in the same segment, if one does.
    term_behind: Option<u64>,
}

impl Stretch {
    /// From the last place at or before byte `at` where `segment` may be entered, to its end or to
    /// where entries are that may not have been written yet. `None` when that is nothing.
    pub fn of(state: &State, number: usize, at: u64) -> Option<Self> {
        let known = state.segments.get(number)?;
        let header = &known.segment.header;
        let begin = Cursor {
            at: SEGMENT_DATA_AT,
            index: header.base_index.0,
            offset: header.base_offset.0,
            chain: header.chain,
            term: header.term_before.0,
        };
        let entered = known.points().iter().rfind(|point| point.at <= at);
        let from = entered.map_or(begin, |point| Cursor {
            at: point.at,
            index: point.index,
            offset: point.offset,
            chain: point.chain,
            // The term of the entry before is not known here, and never above.
            term: 0,
        });
        let goal = |at, index, offset, chain| Goal { at: Some(at), index, offset: Some(offset), chain };
        let recent = state.recent.front().filter(|oldest| Arc::ptr_eq(&oldest.segment, &known.segment));
        let last = match (recent, state.segments.get(number + 1)) {
            (Some(oldest), _) => {
                let header = &oldest.batch.header;
                goal(oldest.at, header.index.0, header.base_offset.0, header.chain)
            }
            // A hole follows: only the bytes before it are known.
            (None, Some(next)) if next.base_index() != known.next_index => {
                let damage = state.damage.before_segment(next.base_index())?;
                goal(known.end, known.next_index, known.next_offset, damage.chain_before)
            }
            (None, Some(next)) => goal(known.end, known.next_index, known.next_offset, next.segment.header.chain),
            (None, None) => goal(known.end, known.next_index, known.next_offset, state.chain),
        };
        let end = last.at?;
        let points = known.points().iter().filter(|point| point.at > from.at && point.at < end);
        let mut goals: Vec<_> = points.map(|point| goal(point.at, point.index, point.offset, point.chain)).collect();
        goals.push(last);
        let term_behind = recent.map(|oldest| oldest.batch.header.term.0);
        (from.at < end).then(|| Self { segment: Arc::clone(&known.segment), from, goals, end, term_behind })
    }

    /// The rest of it, when everything before `from` was checked.
    pub fn starting_at(self, from: Cursor) -> Self {
        Self { from, ..self }
    }

    /// What is lost at a break, and where the segment may be entered behind it.
    pub fn damage(&self, broken: Break) -> io::Result<Option<(Damage, Option<IndexPoint>)>> {
        let file = self.segment.file()?;
        let Break { at: from, batch_end, reason } = broken;
        let end = match batch_end {
            Some(end) => Some(end),
            None => self.resync(file.as_ref(), &from)?,
        };
        let Some(end) = end.filter(|end| end.index > from.index && end.at > from.at) else { return Ok(None) };
        let term = if end.at == self.end {
            self.term_behind
        } else {
            Walk::new(file.as_ref(), end.at, self.end).next().ok().flatten().map(|(_, header)| header.term.0)
        };
        let behind = term.map(|term| IndexPoint {
            at: end.at,
            index: end.index,
            offset: end.offset,
            // The times of what is lost are not known; see `SegmentState::fill_in`.
            time_before_ms: 0,
            chain: end.chain,
            term,
        });
        let damage = Damage {
            first: RaftIndex(from.index),
            last: RaftIndex(end.index - 1),
            first_offset: Offset(from.offset),
            next_offset: Offset(end.offset),
            place: format!("{} byte {}", self.segment.path(), from.at),
            reason,
            chain_before: from.chain,
            chain_after: end.chain,
            hole: Hole::Inside { base: self.segment.header.base_index.0, at: from.at, end: end.at },
        };
        Ok(Some((damage, behind)))
    }

    fn resync(&self, file: &dyn File, from: &Cursor) -> io::Result<Option<Cursor>> {
        for goal in self.goals.iter().filter(|goal| goal.at.is_some_and(|at| at > from.at)) {
            let (Some(at), Some(offset)) = (goal.at, goal.offset) else { continue };
            let reached = Cursor { at, index: goal.index, offset, chain: goal.chain, term: from.term };
            let stands = at == self.end || {
                let found = Walk::new(file, at, self.end).next();
                let place = (goal.index, offset, goal.chain);
                matches!(found, Ok(Some((_, header))) if (header.index.0, header.base_offset.0, header.chain) == place)
            };
            if stands {
                return Ok(Some(resync(file, from, at, goal)?.unwrap_or(reached)));
            }
        }
        Ok(None)
    }
}

impl LogCore {
    /// Delimits the damage that a reader met at byte `at` of a segment, and notes it. `None` when the
    /// bytes pass their checks by now, or the damage cannot be delimited.
    pub fn examine(&self, segment: &Arc<Segment>, at: u64) -> Option<Damage> {
        let stretch = {
            let state = self.lock();
            let number = state.segments.iter().position(|known| Arc::ptr_eq(&known.segment, segment))?;
            Stretch::of(&state, number, at)?
        };
        let limit = at.max(stretch.from.at) + 1;
        let mut passed = stretch.from.at;
        let found = first_break(segment, stretch.from, stretch.end, |size| {
            passed += size as u64;
            passed < limit
        });
        let damage = found.and_then(|(_, broken)| broken.map_or(Ok(None), |broken| stretch.damage(broken)));
        match damage {
            Ok(found) => found.map(|(damage, behind)| {
                self.note_damage(segment, &damage, behind);
                damage
            }),
            Err(error) => {
                tracing::warn!(group = self.group.0, "{} cannot be read: {error}", segment.path());
                None
            }
        }
    }

    /// Lists `damage`, so that it is repaired and nothing is read from there. Readers of what stands behind
    /// it enter at `behind`.
    pub fn note_damage(&self, segment: &Arc<Segment>, damage: &Damage, behind: Option<IndexPoint>) {
        let mut state = self.lock();
        let Some(number) = state.segments.iter().position(|known| Arc::ptr_eq(&known.segment, segment)) else { return };
        // It was looked at without the lock: what was truncated meanwhile is no damage.
        if damage.last.0 >= state.segments[number].next_index {
            return;
        }
        segment.forbid_reuse();
        if state.damage.insert(damage.clone()) {
            // Appended since it was looked at, or not yet.
            let appended = state.recent_at(damage.last.0 + 1).filter(|next| Arc::ptr_eq(&next.segment, segment));
            let behind = behind.or_else(|| appended.map(|next| IndexPoint::of(next.at, 0, &next.batch.header)));
            let ends_log = damage.last.0 + 1 == state.segments[number].next_index;
            match behind {
                Some(point) => state.segments[number].add_point(point),
                None if ends_log => state.segments[number].enter_at_end(),
                None => {}
            }
            drop(state);
            let (first, last) = (damage.first.0, damage.last.0);
            tracing::warn!(
                group = self.group.0,
                replica = self.replica.0,
                "entries {first} to {last} are damaged, at {}: {}",
                damage.place,
                damage.reason
            );
        }
    }
}

impl Log {
    /// The damage known of, in order: found when the log was opened, by readers, or by the scrubber.
    /// At most 256 ranges; the rest is found when these are repaired.
    #[must_use]
    pub fn damaged(&self) -> Vec<Damage> {
        self.core.lock().damage.iter().cloned().collect()
    }
}
