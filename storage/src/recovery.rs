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
//!   bytes that the device cannot read   | refuse             | quarantine     | go round it
//!   a segment that does not continue    | cut there          | quarantine     | go round it
//!   a whole batch of a newer format     | refuse             | refuse         | refuse
//!   ------------------------------------+--------------------+----------------+--------------
//!   a segment before the newest one is missing, of another log or place, or its header or both
//!   its mark slots are bad: as a break where its entries should stand
//!   the newest segment is so, or its last entry is damaged: quarantine
//!   manifest or vote bad or missing, segment of a newer generation: quarantine
//!   a whole sealed block of a newer format, whatever it is: refuse
//!   segment of an older generation, or wholly purged: leftover, removed
//!   segment behind the newest mark, which says that the log was cut there: leftover, removed
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

mod settle;
mod walk;

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use arqon_proto::planted::{self, Bug};
use arqon_proto::{DecodeError, GroupId, Offset, RaftIndex, ReplicaId};
use bytes::Bytes;

use crate::checkpoint;
use crate::damage::{Cursor, Damage, DamageList, Goal, Hole};
use crate::disk::{self, Disk, File, is_unreadable, join};
use crate::engine::Engine;
use crate::error::OpenError;
use crate::flush::LogIo;
use crate::index;
use crate::layout::{
    MANIFEST_FILE, Manifest, Mark, REWRITE_FILE, SEGMENT_DATA_AT, SegmentHeader, VOTE_FILE, What, log_dir,
    parse_file_name, unseal,
};
use crate::log::State;
use crate::position::{LogPosition, index_after};
use crate::recent::RecentEntries;
use crate::segment::{SegmentState, read_front};

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
        if planted::has(Bug::CutAtDamage) {
            return 0;
        }
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
    let Segments { mut found, lost, stale: mut leftover } = opener.segments(&names, &manifest)?;
    let newest = found.iter().map(|found| &found.mark).max_by_key(|mark| mark.sequence);
    let mark = newest.cloned().unwrap_or(Mark {
        sequence: 0,
        next_index: index_after(manifest.purged),
        chain: manifest.start_chain,
        sealed_at: None,
        committed: None,
    });
    let tail_is_there = manifest.tail.is_none_or(|tail| found.iter().any(|found| found.header.base_index == tail));
    // A cut that was made, and of which some files are still there. They may even continue the chain, where the
    // cut lies between two segments; one that was begun behind the cut has a newer mark.
    if mark.sealed_at.is_some() {
        let is_dropped =
            |found: &Found| found.header.base_index.0 >= mark.next_index && found.mark.sequence < mark.sequence;
        leftover.extend(found.extract_if(.., |found| is_dropped(found)).map(|found| found.name));
    }
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
    let kept_checkpoints = opener.sort_checkpoints(&names, walked.last, &mut leftover)?;
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
            let front = read_front(file.as_ref());
            let mut lose = |reason: String| match parse_file_name(name) {
                Some((_, base_index)) => {
                    lost.push(Lost { name: name.clone(), base_index: base_index.0, reason });
                    Ok(())
                }
                None => Err(self.quarantine(format!("{name}: {reason}"))),
            };
            let is_tail = || parse_file_name(name).map(|(_, base)| base) == manifest.tail;
            let front = match front {
                Ok(front) => front,
                // Of the newest one the next try may still read it: without it the replica is lost.
                Err(error) if is_unreadable(&error) && !is_tail() => {
                    lose(error.to_string())?;
                    continue;
                }
                Err(error) => return Err(self.io(&path, error)),
            };
            let header = match front.header {
                Ok(header) => header,
                Err(error @ DecodeError::Version { .. }) => return Err(self.refuse(name, &error)),
                Err(error) => {
                    lose(error.to_string())?;
                    continue;
                }
            };
            // The blocks in front are there before the name: without them, the newest mark may be gone.
            let size = file.size().map_err(|error| self.io(&path, error))?;
            if size < SEGMENT_DATA_AT {
                lose(format!("it is cut short at byte {size}"))?;
                continue;
            }
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
            // One slot may be torn; one that is whole and newer was written after the other.
            let slot_error = front.slot_error.unwrap_or(DecodeError::Magic { what: "durable mark" });
            if matches!(slot_error, DecodeError::Version { .. }) {
                return Err(self.refuse(name, &slot_error));
            }
            match front.mark {
                Some(mark) => found.push(Found { name: name.clone(), header, mark, slot: front.slot, file }),
                None => lose(slot_error.to_string())?,
            }
        }
        found.sort_by_key(|found| found.header.base_index);
        Ok(Segments { found, lost, stale })
    }

    /// Gives each lost segment to the hole in which it stood. One whose entries stand elsewhere was
    /// replaced and not yet removed.
    fn place_lost(&self, lost: Vec<Lost>, start: u64, walked: &mut Walked) -> Result<(), OpenError> {
        for Lost { name, base_index, reason } in lost {
            let (is_empty, was_purged) = (walked.end.index == start, base_index < start);
            // It may begin with entries that were purged.
            let base_index = base_index.max(start);
            let hole = walked.damaged.iter_mut().find_map(|damage| match &mut damage.hole {
                Hole::Between { lost } if (damage.first.0..=damage.last.0).contains(&base_index) => Some(lost),
                _ => None,
            });
            let stands = |segment: &SegmentState| (segment.base_index()..segment.next_index).contains(&base_index);
            match hole {
                Some(files) => files.push(name),
                // Where the log is empty by its mark, which is looked at next, all that it held was dropped.
                None if is_empty && was_purged => walked.leftover.push(name),
                None if walked.segments.iter().any(stands) => walked.leftover.push(name),
                None => return Err(self.quarantine(format!("{name}: {reason}"))),
            }
        }
        Ok(())
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
        if index < mark.next_index && !planted::has(Bug::CutAtDamage) {
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
    ) -> Result<Vec<(checkpoint::CheckpointKind, LogPosition)>, OpenError> {
        let mut kept = Vec::new();
        for name in names {
            let Some(found) = checkpoint::parse_file_name(name) else { continue };
            checkpoint::check_version(self.disk, &join(&self.dir, name)).map_err(|error| self.refuse(name, &error))?;
            if found.1.index.0 < index_after(last) {
                kept.push(found);
            } else {
                leftover.push(name.clone());
            }
        }
        Ok(kept)
    }
}
