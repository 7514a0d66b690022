//! Reads: from the recent entries in memory, otherwise from the segments.

use std::ops::{Range, RangeInclusive};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use arqon_proto::{Batch, BatchKind, Header, Offset, RaftIndex, Term};

use crate::damage::Damage;
use crate::disk::is_unreadable;
use crate::error::ReadError;
use crate::index::IndexPoint;
use crate::log::{Log, LogCore, State};
use crate::position::{LogPosition, index_after};
use crate::recent::Recent;
use crate::segment::{BatchError, Segment, SegmentState, Walk};

/// Part of one segment to walk, taken under the lock and read without it.
struct Span {
    segment: Arc<Segment>,
    at: u64,
    end: u64,
    /// Offset after the last record before `end`.
    next_offset: u64,
    /// Index and offset of the next entry to walk.
    index: u64,
    offset: u64,
}

/// What a walk does with a header.
enum Step {
    Skip,
    Take,
    Stop,
}

impl Span {
    /// From `from` to the end of `segment`, or to where the entries in memory begin: those may
    /// not have been written yet.
    fn of(state: &State, segment: &SegmentState, from: IndexPoint) -> Self {
        let (mut end, mut next_offset) = (segment.end, segment.next_offset);
        if let Some(oldest) = state.recent.front()
            && Arc::ptr_eq(&oldest.segment, &segment.segment)
        {
            (end, next_offset) = (oldest.at, oldest.batch.header.base_offset.0);
        }
        let segment = Arc::clone(&segment.segment);
        Self { segment, at: from.at, end, next_offset, index: from.index, offset: from.offset }
    }

    /// The same, at most to where damage begins that is known of.
    fn sound(state: &State, segment: &SegmentState, from: IndexPoint) -> Self {
        let mut span = Self::of(state, segment, from);
        if let Some((at, damage)) = state.damage.inside_from(segment, from.at)
            && at < span.end
        {
            (span.end, span.next_offset) = (at, damage.first_offset.0);
        }
        span
    }
}

/// Entries up to and with `until`, which all have its term unless those before it are given.
struct TermChange {
    /// Those on disk,
    span: Option<Span>,
    /// and those in memory, which may not have been written yet.
    recent: Vec<LogPosition>,
    until: LogPosition,
}

impl LogCore {
    /// The whole log, in the pieces that points of the index make.
    fn term_changes(&self) -> Result<Vec<TermChange>, ReadError> {
        let state = self.lock();
        let first_recent = state.first_recent().unwrap_or(u64::MAX);
        let mut changes: Vec<TermChange> = Vec::new();
        let mut term = state.purged.map_or(Term(0), |purged| purged.term);
        for segment in &state.segments {
            if let Some(damage) = state.damage.before_segment(segment.base_index()) {
                let until = LogPosition { term: segment.segment.header.term_before, index: damage.last };
                if until.term != term {
                    return Err(damage.read_error());
                }
                changes.push(TermChange { span: None, recent: Vec::new(), until });
            }
            // Damage at its beginning has no point of the index.
            if let Some(first) = segment.points().first()
                && first.index > segment.base_index()
                && Term(first.term) != segment.segment.header.term_before
                && let Some(damage) = state.damage.at_index(segment.base_index())
            {
                return Err(damage.read_error());
            }
            term = Term(segment.last_term);
            let Some(last) = segment.last() else { continue };
            let position = |point: &IndexPoint| LogPosition::new(point.term, point.index);
            for (number, from) in segment.points().iter().enumerate() {
                let until = segment.points().get(number + 1).map_or(last, position);
                let differs = from.term != until.term.0;
                let within = |recent: &&Recent| (from.index..until.index.0).contains(&recent.batch.header.index.0);
                let recent = state.recent.iter().filter(within).map(|recent| &recent.batch.header);
                let recent = recent.map(|header| LogPosition { term: header.term, index: header.index });
                changes.push(TermChange {
                    span: (differs && from.index < first_recent).then(|| Span::of(&state, segment, *from)),
                    recent: if differs { recent.collect() } else { Vec::new() },
                    until,
                });
            }
        }
        Ok(changes)
    }

    /// Walks the headers of `span`, and reads the batches that `choose` takes, about `size`
    /// bytes of them. Says whether the end of the span was reached.
    fn walk(
        &self,
        mut span: Span,
        size: usize,
        mut choose: impl FnMut(&Header) -> Step,
        mut take: impl FnMut(Batch),
    ) -> Result<bool, ReadError> {
        let segment = Arc::clone(&span.segment);
        let file = segment.file()?;
        let mut walk = Walk::of_batches(file.as_ref(), span.at, span.end, size);
        let mut at = span.at;
        loop {
            let header = match walk.next() {
                Ok(Some((_, header))) => header,
                Ok(None) if walk.at >= span.end => return Ok(true),
                Ok(None) => return Err(self.damage(&span, at, None, "the file ends too early".to_owned())),
                Err(BatchError::Disk(error)) if !is_unreadable(&error) => return Err(error.into()),
                Err(error) => return Err(self.damage(&span, at, None, error.to_string())),
            };
            if header.index.0 != span.index {
                let reason = format!("entry {} stands in the place of entry {}", header.index, span.index);
                return Err(self.damage(&span, at, None, reason));
            }
            match choose(&header) {
                Step::Skip => {}
                Step::Stop => return Ok(false),
                Step::Take => match walk.batch(&segment, at, &header) {
                    Ok(batch) => take(batch),
                    Err(BatchError::Disk(error)) if !BatchError::is_damage_of(&error) => return Err(error.into()),
                    Err(error) => return Err(self.damage(&span, at, Some(&header), error.to_string())),
                },
            }
            (span.index, span.offset) = (header.index.0 + 1, header.next_offset().0);
            at = walk.at;
        }
    }

    /// Offset after the last record at or before index `through`.
    fn offset_after(&self, state: &State, through: RaftIndex) -> Result<Offset, ReadError> {
        if through.0 + 1 >= index_after(state.last) {
            return Ok(state.next_offset);
        }
        if through.0 < index_after(state.purged) {
            return Ok(state.log_start);
        }
        Ok(self.locate(state, through.0)?.1.next_offset())
    }

    /// The answer to a read of known damage.
    fn refuse(&self, damage: &Damage) -> ReadError {
        self.engine.metrics.damaged_read_count.fetch_add(1, Ordering::Relaxed);
        damage.read_error()
    }

    fn damage(&self, span: &Span, at: u64, header: Option<&Header>, reason: String) -> ReadError {
        self.engine.metrics.damaged_read_count.fetch_add(1, Ordering::Relaxed);
        let known = self.examine(&span.segment, at);
        if let Some(damage) = known.filter(|damage| (damage.first.0..=damage.last.0).contains(&span.index)) {
            return damage.read_error();
        }
        let (index, first, next) = match header {
            Some(header) => (header.index.0, header.base_offset.0, header.next_offset().0),
            // Without a header nothing is known up to the next point of the index.
            None => {
                let state = self.lock();
                let segment = state.segments.iter().find(|other| Arc::ptr_eq(&other.segment, &span.segment));
                let next = segment.map_or(span.offset, |segment| segment.offset_after(at));
                (span.index, span.offset, next)
            }
        };
        tracing::warn!(group = self.group.0, index, "damaged bytes in {} at {at}: {reason}", span.segment.path());
        ReadError::Damaged { first: Offset(first), last: Offset(next.wrapping_sub(1)), index: RaftIndex(index), reason }
    }
}

fn at_or_after(header: &Header, time_ms: u64) -> bool {
    header.kind == BatchKind::Data && header.time_ms >= time_ms
}

impl State {
    /// The segment that holds `index`.
    fn segment_of_index(&self, index: u64) -> Option<&SegmentState> {
        let count = self.segments.partition_point(|segment| segment.base_index() <= index);
        let segment = self.segments.get(count.checked_sub(1)?)?;
        (index < segment.next_index).then_some(segment)
    }

    /// The first segment with an entry that reaches `offset` or later.
    fn segment_of_offset(&self, offset: u64) -> Option<&SegmentState> {
        let count = self.segments.partition_point(|segment| segment.next_offset <= offset);
        self.segments.get(count)
    }
}

/// Batches gathered up to a size; the first one always fits.
struct Gathered {
    batches: Vec<Batch>,
    size: usize,
    size_max: usize,
}

impl Gathered {
    fn new(size_max: usize) -> Self {
        Self { batches: Vec::new(), size: 0, size_max }
    }

    /// What was gathered, or what stands in the way.
    fn or(self, error: impl FnOnce() -> ReadError) -> Result<Vec<Batch>, ReadError> {
        if self.batches.is_empty() { Err(error()) } else { Ok(self.batches) }
    }

    fn fits(&mut self, header: &Header) -> bool {
        let size = self.size + header.batch_size();
        if !self.batches.is_empty() && size > self.size_max || self.size > self.size_max {
            return false;
        }
        self.size = size;
        true
    }
}

impl Log {
    /// Consecutive entries from `range.start` on, below `range.end`, about `size_max` bytes of
    /// them but at least one if it is there.
    ///
    /// # Errors
    /// The start was purged, the bytes are damaged, or the disk failed. Entries before a damaged
    /// one are returned first.
    pub fn entries(&self, range: Range<RaftIndex>, size_max: usize) -> Result<Vec<Batch>, ReadError> {
        let mut next = range.start.0;
        let mut gathered = Gathered::new(size_max);
        loop {
            let span = {
                let state = self.core.lock();
                let first = index_after(state.purged);
                if range.start.0 < first && range.start < range.end {
                    return Err(ReadError::Purged { first: RaftIndex(first) });
                }
                let end = range.end.0.min(index_after(state.last));
                while next < end
                    && let Some(recent) = state.recent_at(next)
                {
                    if !gathered.fits(&recent.batch.header) {
                        return Ok(gathered.batches);
                    }
                    gathered.batches.push(recent.batch.clone());
                    next += 1;
                }
                if next >= end {
                    return Ok(gathered.batches);
                }
                if let Some(damage) = state.damage.at_index(next) {
                    return gathered.or(|| self.core.refuse(damage));
                }
                let Some(segment) = state.segment_of_index(next) else { return Ok(gathered.batches) };
                Span::sound(&state, segment, segment.enter_index(next))
            };
            let Gathered { batches, size, size_max } = &mut gathered;
            let wanted = size_max.saturating_sub(*size);
            let start = next;
            let choose = |header: &Header| {
                if header.index.0 < start {
                    return Step::Skip;
                }
                let with = *size + header.batch_size();
                if header.index >= range.end || *size > 0 && with > *size_max {
                    return Step::Stop;
                }
                *size = with;
                Step::Take
            };
            let result = self.core.walk(span, wanted, choose, |batch| {
                next = batch.header.index.0 + 1;
                batches.push(batch);
            });
            match result {
                Ok(true) if next > start => {}
                Ok(true) if gathered.batches.is_empty() => {
                    return Err(std::io::Error::other(format!("entry {next} is not where the index says")).into());
                }
                Ok(_) => return Ok(gathered.batches),
                Err(_) if !gathered.batches.is_empty() => return Ok(gathered.batches),
                Err(error) => return Err(error),
            }
        }
    }

    /// Data batches that reach offset `from` or later, in order, none past index `through`,
    /// about `size_max` bytes of them but at least one if it is there. The first one may begin
    /// below `from`.
    ///
    /// # Errors
    /// The offset is below the log start, the bytes are damaged, or the disk failed. Batches
    /// before a damaged one are returned first.
    pub fn read_data(&self, from: Offset, through: RaftIndex, size_max: usize) -> Result<Vec<Batch>, ReadError> {
        let mut gathered = Gathered::new(size_max);
        let mut next = from.0;
        loop {
            let span = {
                let state = self.core.lock();
                if from < state.log_start {
                    return Err(ReadError::OutOfRange { log_start: state.log_start });
                }
                if next >= state.next_offset.0 {
                    return Ok(gathered.batches);
                }
                if state.recent.front().is_some_and(|oldest| oldest.batch.header.base_offset.0 <= next) {
                    state.gather_recent(next, through, &mut gathered);
                    return Ok(gathered.batches);
                }
                if let Some(damage) = state.damage.at_offset(next) {
                    return if damage.first > through {
                        Ok(gathered.batches)
                    } else {
                        gathered.or(|| self.core.refuse(damage))
                    };
                }
                let Some(segment) = state.segment_of_offset(next) else { return Ok(gathered.batches) };
                Span::sound(&state, segment, segment.enter_offset(next))
            };
            let span_next = span.next_offset;
            let Gathered { batches, size, size_max } = &mut gathered;
            let wanted = size_max.saturating_sub(*size);
            let start = next;
            let choose = |header: &Header| {
                if header.index > through {
                    return Step::Stop;
                }
                if header.kind != BatchKind::Data || header.next_offset().0 <= start {
                    return Step::Skip;
                }
                let with = *size + header.batch_size();
                if *size > 0 && with > *size_max {
                    return Step::Stop;
                }
                *size = with;
                Step::Take
            };
            match self.core.walk(span, wanted, choose, |batch| batches.push(batch)) {
                Ok(true) if span_next > next => next = span_next,
                // Damage was listed after the index was asked where to enter: ask again next time.
                Ok(true) if gathered.batches.is_empty() => {
                    return Err(std::io::Error::other(format!("offset {next} is not where the index says")).into());
                }
                Ok(true) => return Ok(gathered.batches),
                Ok(false) => return Ok(gathered.batches),
                Err(_) if !gathered.batches.is_empty() => return Ok(gathered.batches),
                Err(error) => return Err(error),
            }
        }
    }

    /// Whether reading from `offset` on needs no disk: it is among the recent entries or beyond
    /// the end.
    #[must_use]
    pub fn is_recent(&self, offset: Offset) -> bool {
        let state = self.core.lock();
        let oldest = state.recent.front().map(|oldest| oldest.batch.header.base_offset);
        offset >= state.next_offset || oldest.is_some_and(|oldest| oldest <= offset)
    }

    /// Offset of the first record whose batch time is at or after `time_ms` (ms since 1970), not
    /// looking past index `through`; the offset after the last record there when none is.
    ///
    /// # Errors
    /// Headers on the way are damaged, or the disk failed.
    pub fn offset_at_time(&self, time_ms: u64, through: RaftIndex) -> Result<Offset, ReadError> {
        let mut next_index = 0;
        loop {
            let span = {
                let state = self.core.lock();
                let through = through.min(state.last.map_or(RaftIndex(0), |last| last.index));
                let first_recent = state.first_recent().unwrap_or(u64::MAX);
                let found = state.segments.iter().find(|segment| {
                    let on_disk = segment.base_index() < first_recent && segment.next_index > next_index;
                    on_disk && segment.last_time_ms >= time_ms
                });
                match found {
                    Some(segment) if segment.base_index() <= through.0 => {
                        let hole = state.damage.before_segment(segment.base_index());
                        if let Some(damage) = hole.filter(|_| segment.segment.header.time_before_ms >= time_ms) {
                            return Err(self.core.refuse(damage));
                        }
                        next_index = segment.next_index;
                        let from = segment.enter_time(time_ms);
                        // The times in there are not known.
                        if let Some(damage) = from.index.checked_sub(1).and_then(|before| state.damage.at_index(before))
                        {
                            return Err(self.core.refuse(damage));
                        }
                        Span::of(&state, segment, from)
                    }
                    Some(_) => return self.core.offset_after(&state, through),
                    None => {
                        let mut recent = state.recent.iter().map(|recent| &recent.batch.header);
                        let mut recent = recent.by_ref().take_while(|header| header.index <= through);
                        return match recent.find(|header| at_or_after(header, time_ms)) {
                            Some(header) => Ok(header.base_offset.max(state.log_start)),
                            None => self.core.offset_after(&state, through),
                        };
                    }
                }
            };
            let mut found = None;
            let choose = |header: &Header| {
                if header.index > through || at_or_after(header, time_ms) {
                    found = Some(header.base_offset);
                    return Step::Stop;
                }
                Step::Skip
            };
            self.core.walk(span, 0, choose, drop)?;
            if let Some(offset) = found {
                return Ok(offset.max(self.log_start()));
            }
        }
    }

    /// The last entry of each term among those of `range`, in order.
    ///
    /// # Errors
    /// Headers where the term changes are damaged, or the disk failed.
    pub fn term_ends(&self, range: RangeInclusive<RaftIndex>) -> Result<Vec<LogPosition>, ReadError> {
        let mut ends: Vec<LogPosition> = Vec::new();
        let mut meet = |found: LogPosition| {
            if found.index < *range.start() || ends.last().is_some_and(|last| last.index == *range.end()) {
                return;
            }
            let found = LogPosition { index: found.index.min(*range.end()), ..found };
            match ends.last_mut() {
                Some(last) if last.term == found.term => *last = found,
                _ => ends.push(found),
            }
        };
        for change in self.core.term_changes()? {
            if let Some(span) = change.span {
                let look = |header: &Header| {
                    if header.index >= change.until.index {
                        return Step::Stop;
                    }
                    meet(LogPosition { term: header.term, index: header.index });
                    Step::Skip
                };
                self.core.walk(span, 0, look, drop)?;
            }
            change.recent.into_iter().for_each(&mut meet);
            meet(change.until);
        }
        Ok(ends)
    }

    /// The last entry of the last full segment that ends at or before index `at_most`: where a
    /// retention checkpoint may stand.
    #[must_use]
    pub fn last_segment_boundary(&self, at_most: RaftIndex) -> Option<LogPosition> {
        let state = self.core.lock();
        let full_count = state.segments.len().saturating_sub(1);
        let full = state.segments.iter().take(full_count);
        full.filter_map(SegmentState::last)
            .rfind(|last| last.index <= at_most)
            .filter(|last| Some(*last) > state.purged)
    }

    /// Up to where whole segments may expire: the position to purge through, and the log start
    /// that follows. A segment expires when its newest batch is older than `retention_ms` or
    /// when the segments after it hold `retention_size` bytes. Never past `floor`, the committed
    /// position, or the last segment. `None` when nothing expires.
    #[must_use]
    pub fn retention_point(
        &self,
        now_ms: u64,
        retention_ms: Option<u64>,
        retention_size: Option<u64>,
        floor: Offset,
    ) -> Option<(LogPosition, Offset)> {
        let state = self.core.lock();
        let committed = state.committed.max(state.purged);
        let sizes = state.segments.iter().map(|segment| segment.end - crate::layout::SEGMENT_DATA_AT);
        let mut size: u64 = sizes.sum();
        let mut point = None;
        for segment in state.segments.iter().take(state.segments.len().saturating_sub(1)) {
            let Some(last) = segment.last() else { break };
            size -= segment.end - crate::layout::SEGMENT_DATA_AT;
            let old = retention_ms.is_some_and(|age| segment.last_time_ms.saturating_add(age) < now_ms);
            let large = retention_size.is_some_and(|limit| size >= limit);
            let free = segment.next_offset <= floor.0 && Some(last.index) <= committed.map(|committed| committed.index);
            if !(old || large) || !free {
                break;
            }
            point = Some((last, Offset(segment.next_offset)));
        }
        point.filter(|(last, _)| Some(*last) > state.purged)
    }

    /// Bytes of entries in the segments from the one that holds `offset` on.
    #[must_use]
    pub fn size_from(&self, offset: Offset) -> u64 {
        let state = self.core.lock();
        let kept = state.segments.iter().filter(|segment| segment.next_offset > offset.0);
        kept.map(|segment| segment.end - crate::layout::SEGMENT_DATA_AT).sum()
    }
}

impl State {
    /// Data batches in memory from offset `from` on.
    fn gather_recent(&self, from: u64, through: RaftIndex, gathered: &mut Gathered) {
        let at = self.recent.partition_point(|recent| recent.batch.header.next_offset().0 <= from);
        for recent in self.recent.iter().skip(at) {
            let header = &recent.batch.header;
            if header.index > through {
                return;
            }
            if header.kind != BatchKind::Data {
                continue;
            }
            if !gathered.fits(header) {
                return;
            }
            gathered.batches.push(recent.batch.clone());
        }
    }
}
