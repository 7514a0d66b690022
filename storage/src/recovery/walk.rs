//! The walk along the chain when a log is opened, over its damage.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use arqon_proto::{DecodeError, Header, Offset, RaftIndex, limits};

use super::{Bounds, Found, Opener, SMALL_SIZE_MAX, Stop, Walked};
use crate::damage::{Cursor, Damage, Hole};
use crate::disk::{self, is_unreadable, join};
use crate::error::OpenError;
use crate::index::{self, IndexPoint};
use crate::layout::{Manifest, Mark, SEGMENT_DATA_AT, SegmentHeader};
use crate::position::{LogPosition, index_after};
use crate::search::resync;
use crate::segment::{BatchError, Segment, SegmentState, Walk};

impl Opener<'_> {
    /// Follows the chain through the segments.
    pub(super) fn walk(&self, bounds: &Bounds<'_>, found: Vec<Found>) -> Result<Walked, OpenError> {
        let manifest = bounds.manifest;
        let start = index_after(manifest.purged);
        let mut end = Cursor {
            at: 0,
            index: start,
            offset: manifest.start_offset.0,
            chain: manifest.start_chain,
            term: manifest.purged.map_or(0, |purged| purged.term.0),
        };
        let mut walked = Walked {
            segments: VecDeque::new(),
            stop: Stop::Zeroes,
            stop_place: "the log start".to_owned(),
            end,
            damaged: Vec::new(),
            marked_at: None,
            last: manifest.purged,
            leftover: Vec::new(),
            unmarked_count: 0,
        };
        let purged_count = found.iter().skip(1).take_while(|next| next.header.base_index.0 <= start).count();
        let mut gap = false;
        let mut found = found.into_iter().enumerate().peekable();
        while let Some((number, this)) = found.next() {
            if number < purged_count {
                walked.leftover.push(this.name);
                continue;
            }
            let header = &this.header;
            if walked.segments.is_empty() && header.base_index.0 < start {
                // It begins with purged entries: its own chain leads to the log start.
                end = begin_of(header);
            }
            if !gap && let Some(hole) = walked.hole_before(&self.dir, &end, header, bounds) {
                walked.damaged.push(hole);
                end = begin_of(header);
            }
            if gap || (header.base_index.0, header.base_offset.0, header.chain) != (end.index, end.offset, end.chain) {
                if !gap && !matches!(walked.stop, Stop::Bad(_)) {
                    walked.stop = Stop::Bad("the segment does not continue the log".to_owned());
                    walked.stop_place = this.name.clone();
                }
                gap = true;
                walked.leftover.push(this.name);
                continue;
            }
            let next = found.peek().map(|(_, next)| next.header.clone());
            let (segment, stop) = self.walk_segment(this, bounds, next.as_ref(), &mut end, &mut walked)?;
            walked.stop = stop;
            walked.stop_place = format!("{} byte {}", segment.segment.header.file_name(), segment.end);
            walked.segments.push_back(segment);
        }
        if end.index < start && !matches!(walked.stop, Stop::Newer(_)) {
            return Err(self.quarantine(format!("its entries end at {} and it starts at {start}", end.index)));
        }
        if end.index > start {
            walked.last = Some(LogPosition::new(end.term, end.index - 1));
        }
        walked.damaged.retain(|damage| damage.last.0 >= start);
        if walked.damaged.len() > limits::DAMAGE_COUNT_MAX {
            return Err(self.quarantine(format!("{} ranges of its entries are damaged", walked.damaged.len())));
        }
        walked.end = end;
        Ok(walked)
    }

    fn walk_segment(
        &self,
        found: Found,
        bounds: &Bounds<'_>,
        next: Option<&SegmentHeader>,
        end: &mut Cursor,
        walked: &mut Walked,
    ) -> Result<(SegmentState, Stop), OpenError> {
        let goal = bounds.goal(next);
        let Bounds { manifest, mark, .. } = bounds;
        let path = join(&self.dir, &found.name);
        let failed = |error| self.io(&path, error);
        let size = found.file.size().map_err(failed)?;
        let sealed_at = found.mark.sealed_at.unwrap_or(u64::MAX);
        let data_end = size.min(found.header.capacity).min(sealed_at);
        let start = index_after(manifest.purged);
        let segment = Arc::new(Segment::opened(&self.dir, found.header, found.file, found.slot));
        let mut state = SegmentState::new(Arc::clone(&segment), self.index_step);
        let file = segment.file().map_err(failed)?;
        let mut walk = Walk::new(file.as_ref(), SEGMENT_DATA_AT, data_end);
        end.at = SEGMENT_DATA_AT;
        let limit = next.map_or(u64::MAX, |next| next.base_index.0 + 1).min(mark.next_index);
        let mut points = self.saved_points(&segment, data_end, limit, start)?;
        // The log start and the durable mark are met by walking, what lies before by jumping.
        if end.index < start {
            let count = points.partition_point(|point| point.index <= start);
            jump(&points[..count], &mut walk, &mut state, end);
        }
        let check = |at: (u64, u64), chain: u64, what: &str| {
            if at.0 == at.1 && end_differs(chain, at.0, manifest, mark) {
                return Err(
                    self.quarantine(format!("entry {} does not continue the chain that the {what} names", at.0))
                );
            }
            Ok(())
        };
        let stop = loop {
            check((end.index, start), end.chain, "manifest")?;
            check((end.index, mark.next_index), end.chain, "durable mark")?;
            // The next segment was begun here: what stands behind was truncated, whatever the marks say.
            let begun = next.map(|next| (next.base_index.0, next.base_offset.0, next.chain));
            if begun == Some((end.index, end.offset, end.chain)) {
                break Stop::Zeroes;
            }
            if end.index >= start && points.last().is_some_and(|last| last.index > end.index) {
                jump(&std::mem::take(&mut points), &mut walk, &mut state, end);
                continue;
            }
            let stop = match self.look(&mut walk, &segment, end, data_end, mark.next_index).map_err(failed)? {
                Ok((header, next)) => {
                    if header.index.0 >= mark.next_index {
                        walked.unmarked_count += 1;
                        walked.marked_at.get_or_insert((walked.segments.len(), end.at));
                    }
                    state.push(&header);
                    (walk.at, *end) = (next.at, next);
                    continue;
                }
                Err(stop) => stop,
            };
            let may_go_round = !matches!(stop, Stop::Newer(_)) && end.index < bounds.known_end();
            let behind = if may_go_round { resync(file.as_ref(), end, data_end, &goal).map_err(failed)? } else { None };
            let Some(behind) = behind.filter(|behind| behind.index <= bounds.known_end()) else { break stop };
            walked.damaged.push(round(&path, &segment.header, end, &behind, &stop));
            state.skip_to(IndexPoint {
                at: behind.at,
                index: behind.index,
                offset: behind.offset,
                time_before_ms: state.last_time_ms,
                chain: behind.chain,
                term: behind.term,
            });
            (walk.at, *end) = (behind.at, behind);
        };
        let stop = if state.end == sealed_at { Stop::Sealed } else { stop };
        Ok((state, stop))
    }

    /// The batch at the cursor and where it ends, or why the log does not go on there.
    fn look(
        &self,
        walk: &mut Walk<'_>,
        segment: &Segment,
        cursor: &Cursor,
        data_end: u64,
        marked_end: u64,
    ) -> io::Result<Result<(Header, Cursor), Stop>> {
        let bad = |reason: &str| Ok(Err(Stop::Bad(reason.to_owned())));
        let bytes = match walk.bytes() {
            // What is promised to be there is damaged. Above the mark it may only be out of reach now, and a cut
            // there would be for good.
            Err(error) if is_unreadable(&error) && cursor.index < marked_end => return bad(&error.to_string()),
            bytes => bytes?,
        };
        let Some(bytes) = bytes else { return Ok(Err(Stop::Zeroes)) };
        if bytes.iter().all(|byte| *byte == 0) {
            return Ok(Err(Stop::Zeroes));
        }
        let header = match Header::decode(&bytes) {
            Ok(header) => header,
            Err(DecodeError::Version { version, .. }) => return Ok(Err(Stop::Newer(version))),
            Err(error) => return bad(&error.to_string()),
        };
        let Some(next) = cursor.after(&bytes, &header) else { return bad("the batch does not continue the chain") };
        if next.at > data_end {
            return bad("the batch is cut short");
        }
        if header.index.0 >= marked_end {
            // Below the mark the payload is checked when it is read.
            match segment.batch_at(cursor.at, &header) {
                Ok(_) => {}
                Err(BatchError::Disk(error)) if error.kind() != io::ErrorKind::UnexpectedEof => return Err(error),
                Err(error) => return bad(&error.to_string()),
            }
        }
        Ok(Ok((header, next)))
    }

    /// The saved index of a segment up to the mark, if it was made of the entries that are there.
    fn saved_points(
        &self,
        segment: &Segment,
        data_end: u64,
        limit: u64,
        start: u64,
    ) -> Result<Vec<IndexPoint>, OpenError> {
        let name = index::file_name(&segment.header);
        let path = join(&self.dir, &name);
        let Ok(bytes) = disk::read_all(self.disk, &path, SMALL_SIZE_MAX) else { return Ok(Vec::new()) };
        let mut points = match index::decode(&bytes) {
            Ok(points) => points,
            Err(error @ DecodeError::Version { .. }) => return Err(self.refuse(&name, &error)),
            Err(_) => return Ok(Vec::new()),
        };
        // The walk goes on at an entry below the mark, which gives it its term. Above the mark every entry is
        // looked at, and behind a cut there are none.
        points.truncate(points.partition_point(|point| point.index < limit && point.at < data_end));
        let meets = |point: &IndexPoint| {
            let found = segment.file().map(|file| Walk::new(file.as_ref(), point.at, data_end).next());
            matches!(found, Ok(Ok(Some((_, found)))) if (found.index.0, found.base_offset.0, found.chain, found.term.0)
                == (point.index, point.offset, point.chain, point.term))
        };
        let header = &segment.header;
        let (base_index, base_offset) = (header.base_index.0, header.base_offset.0);
        let begins_here = |first: &IndexPoint| {
            first.at >= SEGMENT_DATA_AT && first.index >= base_index && first.offset >= base_offset
        };
        // The two at which the walk goes on: at the log start, and before the mark.
        let at_start = points.iter().take_while(|point| point.index <= start).last();
        let is_sound =
            points.first().is_some_and(begins_here) && points.last().is_some_and(meets) && at_start.is_none_or(meets);
        if !is_sound {
            points.clear();
        }
        Ok(points)
    }
}

/// Goes on at the last of `points`.
fn jump(points: &[IndexPoint], walk: &mut Walk<'_>, state: &mut SegmentState, end: &mut Cursor) {
    if let Some(point) = points.last() {
        state.jump(points);
        walk.at = point.at;
        (end.at, end.index, end.offset, end.chain) = (point.at, point.index, point.offset, point.chain);
    }
}

/// Where the entries of a segment begin.
fn begin_of(header: &SegmentHeader) -> Cursor {
    let (index, offset) = (header.base_index.0, header.base_offset.0);
    Cursor { at: SEGMENT_DATA_AT, index, offset, chain: header.chain, term: header.term_before.0 }
}

/// The damage from a break at `from` to a header at `behind` in the same segment.
fn round(path: &str, header: &SegmentHeader, from: &Cursor, behind: &Cursor, stop: &Stop) -> Damage {
    Damage {
        first: RaftIndex(from.index),
        last: RaftIndex(behind.index - 1),
        first_offset: Offset(from.offset),
        next_offset: Offset(behind.offset),
        place: format!("{path} byte {}", from.at),
        reason: match stop {
            Stop::Bad(reason) => reason.clone(),
            Stop::Sealed | Stop::Zeroes | Stop::Newer(_) => "zeroes stand there".to_owned(),
        },
        chain_before: from.chain,
        chain_after: behind.chain,
        hole: Hole::Inside { base: header.base_index.0, at: from.at, end: behind.at },
    }
}

impl Walked {
    /// What is missing between the end of the walk and the segment of `next`, if everything that is
    /// may be gone round.
    fn hole_before(&self, dir: &str, end: &Cursor, next: &SegmentHeader, bounds: &Bounds<'_>) -> Option<Damage> {
        let is_behind = next.base_index.0 > end.index
            && next.base_offset.0 >= end.offset
            && next.term_before.0 >= end.term
            && next.base_index.0 <= bounds.known_end();
        if !is_behind || matches!(self.stop, Stop::Newer(_)) {
            return None;
        }
        let reason = match &self.stop {
            Stop::Bad(reason) => reason.clone(),
            Stop::Sealed | Stop::Zeroes | Stop::Newer(_) => "the segment that holds them is lost".to_owned(),
        };
        Some(Damage {
            first: RaftIndex(end.index),
            last: RaftIndex(next.base_index.0 - 1),
            first_offset: Offset(end.offset),
            next_offset: next.base_offset,
            place: format!("{} {}", dir, self.stop_place),
            reason,
            chain_before: end.chain,
            chain_after: next.chain,
            hole: Hole::Between { lost: Vec::new() },
        })
    }
}

/// Whether `chain` contradicts what the manifest or the mark says about the entry at `index`.
fn end_differs(chain: u64, index: u64, manifest: &Manifest, mark: &Mark) -> bool {
    index == index_after(manifest.purged) && chain != manifest.start_chain
        || index == mark.next_index && chain != mark.chain
}
