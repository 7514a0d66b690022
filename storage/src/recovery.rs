//! Opening a log after whatever happened to it.
//!
//! The walk follows the chain from the log start. In each segment it passes over what lies before
//! the last point of a saved index that is below the mark (see `index.rs`): damage there is met by
//! whoever reads it. Where the walk stops, this table says what is done; "mark" is the newest
//! durable mark in any segment of the log.
//!
//! ```text
//!   what stands at the first break      | above the mark     | at or below it | and committed
//!   ------------------------------------+--------------------+----------------+--------------
//!   zeroes, or the end of the file      | the end of the log | quarantine     | go round it
//!   bytes that fail checks or the chain | cut there          | quarantine     | go round it
//!   a segment that does not continue    | cut there          | quarantine     | go round it
//!   a whole batch of a newer format     | refuse             | refuse         | refuse
//!   ------------------------------------+--------------------+----------------+--------------
//!   a segment before the newest one is missing, of another log or place, or its header or both
//!   its mark slots are bad: as a break where its entries should stand
//!   the newest segment is so, or its last entry is damaged: quarantine
//!   manifest or vote bad or missing, segment of a newer generation: quarantine
//!   manifest, vote or segment header of a newer format: refuse
//!   segment of an older generation, or wholly purged: leftover, removed
//!   checkpoint above the end of the log: removed
//!   index file bad or missing: the segment is walked
//! ```
//!
//! Quarantine and refuse change nothing on disk. A cut seals the segment where the chain
//! breaks, so that its later bytes never count again, and appends go on in a new segment.
//!
//! To go round a break is to go on at the next header from which the chain leads to a place that is
//! known: the header of the next segment, or the durable mark. It takes that every entry in between
//! is committed, by what the mark says, so that a majority has it; the log opens with this damage
//! known, nothing is read from there, and it is repaired while the log is in use (see `repair.rs`).

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use arqon_proto::{DecodeError, GroupId, Header, Offset, RaftIndex, ReplicaId, limits};
use bytes::Bytes;

use crate::checkpoint;
use crate::damage::{Cursor, Damage, DamageList, Goal, Hole, resync};
use crate::disk::{self, Disk, File, join};
use crate::engine::Engine;
use crate::error::OpenError;
use crate::flush::LogIo;
use crate::index::{self, IndexPoint};
use crate::layout::{
    MANIFEST_FILE, Manifest, Mark, REWRITE_FILE, SEGMENT_DATA_AT, SegmentHeader, VOTE_FILE, What, log_dir,
    parse_file_name, unseal,
};
use crate::log::State;
use crate::position::{LogPosition, index_after};
use crate::recent::RecentEntries;
use crate::segment::{BatchError, Segment, SegmentState, Walk, read_front};

/// Largest manifest or vote file read, in bytes.
const SMALL_SIZE_MAX: usize = 1 << 20;

/// What was found when a log was opened.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Recovery {
    /// The log was not there and was created.
    pub created: bool,
    /// Last entry kept.
    pub last: Option<LogPosition>,
    /// Entries above the durable mark that were whole and were kept.
    pub unmarked_count: u64,
    /// The torn tail that was cut off.
    pub cut: Option<Cut>,
    /// Segment files removed: behind the cut, purged, or left over.
    pub removed_segment_count: usize,
    /// Checkpoints above the end of the log, removed.
    pub removed_checkpoint_count: usize,
    /// The tail was written again because a sync failed in the run before.
    pub rewritten: bool,
    /// Committed entries that cannot be read; see [`Log::damaged`](crate::Log::damaged).
    pub damaged: Vec<Damage>,
}

/// A torn tail: writes that were never acknowledged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cut {
    /// Index of the first entry that is gone.
    pub index: RaftIndex,
    /// Segment file and byte of the first bad byte or batch.
    pub place: String,
    /// What is wrong there.
    pub reason: String,
}

/// Why the walk stopped in a segment.
enum Stop {
    Sealed,
    Zeroes,
    Bad(String),
    Newer(u32),
}

/// One segment file as found.
struct Found {
    name: String,
    header: SegmentHeader,
    mark: Mark,
    slot: usize,
    file: Arc<dyn File>,
}

/// The segment files of a directory.
struct Segments {
    /// Those of this generation, by index.
    found: Vec<Found>,
    lost: Vec<Lost>,
    /// Names of those of older generations.
    stale: Vec<String>,
}

/// A segment file that holds nothing of use.
struct Lost {
    name: String,
    base_index: u64,
    reason: String,
}

/// What manifest and mark say about entries.
struct Bounds<'a> {
    manifest: &'a Manifest,
    mark: &'a Mark,
    /// Index after the last entry that is surely on a majority.
    committed_end: u64,
}

impl Bounds<'_> {
    /// Index after the last entry that may be gone round.
    fn known_end(&self) -> u64 {
        self.committed_end.min(self.mark.next_index)
    }

    /// The place nearest behind a segment that `next` follows, if any does, whose chain is known.
    fn goal(&self, next: Option<&SegmentHeader>) -> Goal {
        match next.filter(|next| next.base_index.0 <= self.mark.next_index) {
            Some(next) => {
                Goal { at: None, index: next.base_index.0, offset: Some(next.base_offset.0), chain: next.chain }
            }
            None => Goal { at: None, index: self.mark.next_index, offset: None, chain: self.mark.chain },
        }
    }
}

struct Opener<'a> {
    disk: &'a dyn Disk,
    dir: String,
    index_step: u64,
    group: GroupId,
    replica: ReplicaId,
}

/// Everything the walk found out; nothing was changed so far.
struct Walked {
    segments: VecDeque<SegmentState>,
    /// Why the last segment ended, and the byte.
    stop: Stop,
    stop_place: String,
    end: Cursor,
    damaged: Vec<Damage>,
    /// Segment and byte at which the entries above the mark begin.
    marked_at: Option<(usize, u64)>,
    last: Option<LogPosition>,
    /// Files that do not belong to the log any more.
    leftover: Vec<String>,
    unmarked_count: u64,
}

/// Opens the log of a directory that exists.
pub(crate) fn recover(
    engine: &Arc<Engine>,
    group: GroupId,
    replica: ReplicaId,
) -> Result<(State, LogIo, Recovery), OpenError> {
    let index_step = engine.options.index_step;
    let opener = Opener { disk: engine.disk.as_ref(), dir: log_dir(group, replica), index_step, group, replica };
    let mut manifest = opener.manifest()?;
    let vote = opener.vote()?;
    let names = opener.disk.list(&opener.dir).map_err(|error| opener.io(&opener.dir, error))?;
    let Segments { found, lost, stale: mut leftover } = opener.segments(&names, &manifest)?;
    let newest = found.iter().map(|found| &found.mark).max_by_key(|mark| mark.sequence);
    let mark = newest.cloned().unwrap_or(Mark {
        sequence: 0,
        next_index: index_after(manifest.purged),
        chain: manifest.start_chain,
        sealed_at: None,
        committed: None,
    });
    let tail_is_there = manifest.tail.is_none_or(|tail| found.iter().any(|found| found.header.base_index == tail));
    let committed_end = mark.committed.map_or(0, |committed| committed.index.0 + 1);
    let mut walked = opener.walk(&Bounds { manifest: &manifest, mark: &mark, committed_end }, found)?;
    opener.place_lost(lost, index_after(manifest.purged), &mut walked)?;
    let cut = opener.judge(&mark, &walked, manifest.tail.filter(|_| !tail_is_there))?;

    let mut recovery = Recovery {
        last: walked.last,
        unmarked_count: walked.unmarked_count,
        rewritten: names.iter().any(|name| name == REWRITE_FILE),
        damaged: std::mem::take(&mut walked.damaged),
        ..Recovery::default()
    };
    leftover.append(&mut walked.leftover);
    recovery.removed_segment_count = leftover.len();
    let kept_checkpoints = opener.sort_checkpoints(&names, walked.last, &mut leftover);
    recovery.removed_checkpoint_count = leftover.len() - recovery.removed_segment_count;
    let segments = || walked.segments.iter().map(|segment| &segment.segment.header);
    let orphans = names.iter().filter(|name| name.ends_with(".tmp") || index::is_orphan(name, segments()));
    leftover.extend(orphans.cloned());

    if let Some(cut) = &cut {
        tracing::warn!(
            group = group.0,
            replica = replica.0,
            "torn tail cut from entry {} on, at {}: {}",
            cut.index,
            cut.place,
            cut.reason
        );
    }
    for damage in &recovery.damaged {
        tracing::warn!(
            group = group.0,
            replica = replica.0,
            "entries {} to {} are damaged, at {}: {}",
            damage.first,
            damage.last,
            damage.place,
            damage.reason
        );
    }
    recovery.cut = cut;
    let (mark, sealed) = opener
        .settle(&mut manifest, mark, &mut walked, &recovery, &leftover, &vote)
        .map_err(|error| opener.io(&opener.dir, error))?;
    let marked = walked.segments.back().map(|tail| Arc::clone(&tail.segment));
    let tail_open = !sealed && !walked.segments.is_empty();
    let options = &engine.options;
    let next_capacity = marked.as_ref().map_or(options.segment_size_first, |tail| tail.header.capacity * 2);
    let state = State {
        purged: manifest.purged,
        log_start: manifest.start_offset,
        last: walked.last,
        flushed: walked.last,
        committed: mark.committed.map(|committed| clamp(committed, walked.last)).unwrap_or_default(),
        vote,
        next_offset: Offset(walked.end.offset),
        chain: walked.end.chain,
        incarnation: manifest.incarnation,
        generation: manifest.generation,
        segments: walked.segments,
        tail_open,
        next_capacity: next_capacity.min(options.segment_size_max),
        damage: DamageList::new(Arc::clone(&engine.metrics), recovery.damaged.clone()),
        checkpoints: kept_checkpoints,
        recent: RecentEntries::new(Arc::clone(&engine.recent)),
        ..State::default()
    };
    Ok((state, LogIo { manifest, mark, marked, unsynced_since: None }, recovery))
}

/// A committed position beyond the end becomes the end.
fn clamp(committed: LogPosition, last: Option<LogPosition>) -> Option<LogPosition> {
    if committed.index.0 < index_after(last) { Some(committed) } else { last }
}

impl Opener<'_> {
    fn io(&self, what: &str, source: io::Error) -> OpenError {
        OpenError::Io { what: join(&self.disk.name(), what), source }
    }

    fn quarantine(&self, reason: String) -> OpenError {
        OpenError::Quarantined { group: self.group, replica: self.replica, reason }
    }

    /// A file that does not decode: a newer program's, or damage.
    fn refuse(&self, name: &str, error: &DecodeError) -> OpenError {
        match error {
            DecodeError::Version { version, .. } => {
                OpenError::NewerFormat { what: join(&self.disk.name(), &join(&self.dir, name)), version: *version }
            }
            error => self.quarantine(format!("{name}: {error}")),
        }
    }

    fn small(&self, name: &str) -> Result<Vec<u8>, OpenError> {
        let path = join(&self.dir, name);
        disk::read_all(self.disk, &path, SMALL_SIZE_MAX).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => self.quarantine(format!("{name} is not there")),
            io::ErrorKind::InvalidData => self.quarantine(error.to_string()),
            _ => self.io(&path, error),
        })
    }

    fn manifest(&self) -> Result<Manifest, OpenError> {
        let bytes = self.small(MANIFEST_FILE)?;
        let manifest = Manifest::decode(&bytes).map_err(|error| self.refuse(MANIFEST_FILE, &error))?;
        if (manifest.group, manifest.replica) != (self.group, self.replica) {
            let reason = format!("its manifest is of group {} replica {}", manifest.group, manifest.replica);
            return Err(self.quarantine(reason));
        }
        Ok(manifest)
    }

    fn vote(&self) -> Result<Option<Bytes>, OpenError> {
        let bytes = Bytes::from(self.small(VOTE_FILE)?);
        let payload = unseal(What::Vote, &bytes).map_err(|error| self.refuse(VOTE_FILE, &error))?;
        match payload.split_first() {
            Some((0, [])) => Ok(None),
            Some((1, vote)) => Ok(Some(bytes.slice_ref(vote))),
            _ => Err(self.quarantine(format!("{VOTE_FILE}: it does not say whether there is a vote"))),
        }
    }

    /// The segment files.
    fn segments(&self, names: &[String], manifest: &Manifest) -> Result<Segments, OpenError> {
        let (mut found, mut lost, mut stale) = (Vec::new(), Vec::new(), Vec::new());
        for name in names.iter().filter(|name| name.ends_with(".seg")) {
            let path = join(&self.dir, name);
            let file = self.disk.open(&path).map_err(|error| self.io(&path, error))?;
            let front = read_front(file.as_ref()).map_err(|error| self.io(&path, error))?;
            let mut lose = |reason: String| match parse_file_name(name) {
                Some((_, base_index)) => {
                    lost.push(Lost { name: name.clone(), base_index: base_index.0, reason });
                    Ok(())
                }
                None => Err(self.quarantine(format!("{name}: {reason}"))),
            };
            let header = match front.header {
                Ok(header) => header,
                Err(error @ DecodeError::Version { .. }) => return Err(self.refuse(name, &error)),
                Err(error) => {
                    lose(error.to_string())?;
                    continue;
                }
            };
            let owner = (header.group, header.replica, header.incarnation);
            if owner != (manifest.group, manifest.replica, manifest.incarnation) || header.file_name() != *name {
                lose("it belongs to another log or place".to_owned())?;
                continue;
            }
            if header.generation < manifest.generation {
                stale.push(name.clone());
                continue;
            }
            if header.generation > manifest.generation {
                return Err(self.quarantine(format!("{name}: it is newer than the manifest")));
            }
            match front.mark {
                Some(mark) => found.push(Found { name: name.clone(), header, mark, slot: front.slot, file }),
                None => {
                    let error = front.slot_error.unwrap_or(DecodeError::Magic { what: "durable mark" });
                    if matches!(error, DecodeError::Version { .. }) {
                        return Err(self.refuse(name, &error));
                    }
                    lose(error.to_string())?;
                }
            }
        }
        found.sort_by_key(|found| found.header.base_index);
        Ok(Segments { found, lost, stale })
    }

    /// Gives each lost segment to the hole in which it stood. One whose entries stand elsewhere was
    /// replaced and not yet removed.
    fn place_lost(&self, lost: Vec<Lost>, start: u64, walked: &mut Walked) -> Result<(), OpenError> {
        for Lost { name, base_index, reason } in lost {
            // It may begin with entries that were purged.
            let base_index = base_index.max(start);
            let hole = walked.damaged.iter_mut().find_map(|damage| match &mut damage.hole {
                Hole::Between { lost } if (damage.first.0..=damage.last.0).contains(&base_index) => Some(lost),
                _ => None,
            });
            let stands = |segment: &SegmentState| (segment.base_index()..segment.next_index).contains(&base_index);
            match hole {
                Some(files) => files.push(name),
                None if walked.segments.iter().any(stands) => walked.leftover.push(name),
                None => return Err(self.quarantine(format!("{name}: {reason}"))),
            }
        }
        Ok(())
    }

    /// Follows the chain through the segments.
    fn walk(&self, bounds: &Bounds<'_>, found: Vec<Found>) -> Result<Walked, OpenError> {
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
            let goal = bounds.goal(found.peek().map(|(_, next)| &next.header));
            let (segment, stop) = self.walk_segment(this, bounds, &goal, &mut end, &mut walked)?;
            walked.stop = stop;
            walked.stop_place = format!("{} byte {}", segment.segment.header.file_name(), segment.end);
            walked.segments.push_back(segment);
        }
        if end.index < start {
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
        goal: &Goal,
        end: &mut Cursor,
        walked: &mut Walked,
    ) -> Result<(SegmentState, Stop), OpenError> {
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
        let mut points = self.saved_points(&segment, data_end, mark);
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
            let behind = if may_go_round { resync(file.as_ref(), end, data_end, goal).map_err(failed)? } else { None };
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
        let Some(bytes) = walk.bytes()? else { return Ok(Err(Stop::Zeroes)) };
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
    fn saved_points(&self, segment: &Segment, data_end: u64, mark: &Mark) -> Vec<IndexPoint> {
        let path = join(&self.dir, &index::file_name(&segment.header));
        let Ok(bytes) = disk::read_all(self.disk, &path, SMALL_SIZE_MAX) else { return Vec::new() };
        let mut points = index::decode(&bytes).unwrap_or_default();
        // The walk goes on at an entry below the mark, which gives it its term. Above the mark every entry is
        // looked at, and behind a cut there are none.
        points.truncate(points.partition_point(|point| point.index < mark.next_index && point.at < data_end));
        let meets = |point: &IndexPoint| {
            let found = segment.file().map(|file| Walk::new(file.as_ref(), point.at, data_end).next());
            matches!(found, Ok(Ok(Some((_, found)))) if (found.index.0, found.base_offset.0, found.chain, found.term.0)
                == (point.index, point.offset, point.chain, point.term))
        };
        if !points.last().is_some_and(meets) {
            points.clear();
        }
        points
    }

    /// The table above.
    fn judge(&self, mark: &Mark, walked: &Walked, missing: Option<RaftIndex>) -> Result<Option<Cut>, OpenError> {
        let index = walked.end.index;
        if let Stop::Newer(version) = walked.stop {
            let what = format!("{}/{}/{}", self.disk.name(), self.dir, walked.stop_place);
            return Err(OpenError::NewerFormat { what, version });
        }
        let reason = match &walked.stop {
            Stop::Bad(reason) => Some(reason.as_str()),
            Stop::Sealed | Stop::Zeroes | Stop::Newer(_) => None,
        };
        if index < mark.next_index {
            return Err(self.quarantine(format!(
                "entries {index} to {} were durable and are lost or damaged, at {}: {}",
                mark.next_index - 1,
                walked.stop_place,
                reason.unwrap_or("the log ends there")
            )));
        }
        if let Some(base) = missing {
            return Err(self.quarantine(format!("the segment that begins with entry {base} is not there")));
        }
        Ok(reason.map(|reason| Cut {
            index: RaftIndex(index),
            place: walked.stop_place.clone(),
            reason: reason.to_owned(),
        }))
    }

    fn sort_checkpoints(
        &self,
        names: &[String],
        last: Option<LogPosition>,
        leftover: &mut Vec<String>,
    ) -> Vec<(checkpoint::CheckpointKind, LogPosition)> {
        let mut kept = Vec::new();
        for name in names {
            let Some(found) = checkpoint::parse_file_name(name) else { continue };
            if found.1.index.0 < index_after(last) {
                kept.push(found);
            } else {
                leftover.push(name.clone());
            }
        }
        kept
    }

    /// Makes the disk agree with what was found, all of it durable: the bytes above the mark
    /// may be in the page cache only. Says the new mark, and whether the tail is sealed.
    fn settle(
        &self,
        manifest: &mut Manifest,
        mark: Mark,
        walked: &mut Walked,
        recovery: &Recovery,
        leftover: &[String],
        vote: &Option<Bytes>,
    ) -> io::Result<(Mark, bool)> {
        if recovery.rewritten {
            // After a failed sync the pages count as clean: only fresh blocks can be believed.
            tracing::warn!(
                group = self.group.0,
                replica = self.replica.0,
                "a sync failed before: writing the tail again"
            );
            for segment in &mut walked.segments {
                if segment.next_index > mark.next_index || segment.next_index == walked.end.index {
                    segment.segment = Arc::new(self.rewrite(segment)?);
                }
            }
            disk::replace(self.disk, &self.dir, MANIFEST_FILE, manifest.encode())?;
            disk::replace(self.disk, &self.dir, VOTE_FILE, crate::flush::encode_vote(vote.as_ref()))?;
        }
        if let Some((number, from)) = walked.marked_at.filter(|_| !recovery.rewritten) {
            self.write_again(walked.segments.iter().skip(number), from)?;
        }
        for name in [MANIFEST_FILE, VOTE_FILE] {
            self.disk.open(&join(&self.dir, name))?.sync()?;
        }
        let count = walked.segments.len();
        for (number, segment) in walked.segments.iter().enumerate() {
            if segment.next_index > mark.next_index || number + 1 == count {
                segment.segment.file()?.sync()?;
            }
        }
        let mut mark = mark;
        let mut sealed = matches!(walked.stop, Stop::Sealed);
        if let Some(tail) = walked.segments.back() {
            let torn = recovery.cut.is_some() && !sealed;
            if torn || mark.next_index != walked.end.index {
                sealed |= torn;
                let sealed_at = sealed.then_some(tail.end);
                let (next_index, chain) = (walked.end.index, walked.end.chain);
                mark = Mark { sequence: mark.sequence + 1, next_index, chain, sealed_at, committed: mark.committed };
                tail.segment.write_mark(&mark)?;
                tail.segment.file()?.sync()?;
            }
        }
        if let Some(tail) = walked.segments.back().filter(|_| !sealed) {
            tail.segment.allow_fill();
        }
        // A truncation that had lowered the mark and not yet the manifest is completed here.
        let tail = walked.segments.back().map(|tail| tail.segment.header.base_index);
        if manifest.tail != tail {
            manifest.tail = tail;
            disk::replace(self.disk, &self.dir, MANIFEST_FILE, manifest.encode())?;
        }
        for name in leftover {
            match self.disk.remove(&join(&self.dir, name)) {
                // Replacing a file has used up its `.tmp`.
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        self.disk.sync_dir(&self.dir)?;
        if recovery.rewritten {
            self.disk.remove(&join(&self.dir, REWRITE_FILE))?;
            self.disk.sync_dir(&self.dir)?;
        }
        Ok((mark, sealed))
    }

    /// Writes what lies above the mark, from byte `from` of the first segment on, over itself: nobody
    /// was told that it is durable, perhaps because a sync failed and no marker of that could be left.
    /// The pages count as clean then, and only those that are written again reach the disk.
    fn write_again<'s>(&self, segments: impl Iterator<Item = &'s SegmentState>, from: u64) -> io::Result<()> {
        let mut at = from;
        for segment in segments {
            let file = segment.segment.file()?;
            let mut bytes = vec![0; usize::try_from(segment.end.saturating_sub(at)).map_err(io::Error::other)?];
            if file.read_at(&mut bytes, at)? < bytes.len() {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            file.write_at(&[Bytes::from(bytes)], at)?;
            file.sync()?;
            at = SEGMENT_DATA_AT;
        }
        Ok(())
    }

    /// Copies a segment up to its last good batch to fresh blocks.
    fn rewrite(&self, segment: &SegmentState) -> io::Result<Segment> {
        let old = &segment.segment;
        let mut bytes = vec![0; usize::try_from(segment.end).map_err(io::Error::other)?];
        let read = old.file()?.read_at(&mut bytes, 0)?;
        bytes.truncate(read);
        let fresh = format!("{}.tmp", old.path());
        let file = self.disk.create(&fresh)?;
        file.write_at(&[Bytes::from(bytes)], 0)?;
        file.sync()?;
        self.disk.rename(&fresh, &old.path())?;
        self.disk.sync_dir(&self.dir)?;
        let slot = read_front(file.as_ref())?.slot;
        Ok(Segment::opened(&self.dir, old.header.clone(), file, slot))
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
