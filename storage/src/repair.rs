//! Damage put right with the entries that another replica has.
//!
//! Every field of an entry but its chain value and its header's CRC is equal on all replicas, and those
//! two are computed anew. The chain value behind the damage then proves every bit that came. The
//! segment is written whole to a new file, synced, and takes the place of the old one by its name: a
//! crash leaves the one or the other.

use std::cell::Cell;
use std::io;
use std::sync::Arc;

use arqon_proto::planted;
use arqon_proto::{Batch, BatchKind, Header, RaftIndex, Term};
use bytes::Bytes;
use tokio::sync::oneshot;

use crate::damage::{Damage, Hole};
use crate::disk::{File, blocks, join, read_around};
use crate::flush::{Done, Op};
use crate::index::IndexPoint;
use crate::layout::{MARK_AT, Mark, SEGMENT_DATA_AT, SegmentHeader};
use crate::log::{Log, LogCore, State, wait};
use crate::metrics;
use crate::segment::{Segment, SegmentState};
use crate::space::SpaceState;

/// Bytes copied at once.
const COPY_SIZE: usize = 1 << 20;

/// Entries that were proven to be the ones lost.
pub(crate) struct Repair {
    damage: Damage,
    headers: Vec<Header>,
    /// What stands in the file: header, stamps and records of each entry.
    pieces: Vec<Bytes>,
    size: u64,
}

impl Repair {
    /// Gives `batches` the fields that differ between replicas.
    fn prove(damage: &Damage, batches: Vec<Batch>) -> io::Result<Self> {
        let refuse = |reason: String| Err(io::Error::new(io::ErrorKind::InvalidData, reason));
        let (mut index, mut offset, mut chain) = (damage.first, damage.first_offset, damage.chain_before);
        let (mut headers, mut pieces, mut size) = (Vec::new(), Vec::new(), 0);
        for mut batch in batches {
            if batch.header.index != index {
                return refuse(format!("entry {} came in the place of entry {index}", batch.header.index));
            }
            if let Err(error) = batch.check_crcs() {
                return refuse(format!("entry {index}: {error}"));
            }
            (batch.header.base_offset, batch.header.chain) = (offset, chain);
            let encoded = batch.header.encode();
            (index, offset, chain) = (index.next(), batch.header.next_offset(), Header::chain_value(&encoded));
            size += batch.header.batch_size() as u64;
            pieces.extend([Bytes::copy_from_slice(&encoded), batch.stamps, batch.records]);
            headers.push(batch.header);
        }
        let reached = (RaftIndex(index.0.wrapping_sub(1)), offset, chain);
        if reached != (damage.last, damage.next_offset, damage.chain_after) {
            return refuse(format!("entries {} to {} are not those that were lost", damage.first, damage.last));
        }
        if let Hole::Inside { at, end, .. } = damage.hole
            && size != end - at
        {
            return refuse(format!("{size} bytes came for the {} that were lost", end - at));
        }
        Ok(Self { damage: damage.clone(), headers, pieces, size })
    }

    /// Newest time of a data batch, ms since 1970.
    fn time_ms(&self) -> u64 {
        let data = self.headers.iter().filter(|header| header.kind == BatchKind::Data);
        data.map(|header| header.time_ms).max().unwrap_or_default()
    }

    /// Places where the repaired entries may be entered, about `step` bytes apart.
    fn points(&self, mut at: u64, step: u64) -> Vec<IndexPoint> {
        let (mut points, mut last_at, mut time_before_ms) = (Vec::new(), at, 0);
        for header in &self.headers {
            // Before the first batch with a time nothing is known of the times before.
            if at - last_at >= step && time_before_ms > 0 {
                last_at = at;
                let (index, offset) = (header.index.0, header.base_offset.0);
                points.push(IndexPoint { at, index, offset, time_before_ms, chain: header.chain, term: header.term.0 });
            }
            at += header.batch_size() as u64;
            if header.kind == BatchKind::Data {
                time_before_ms = time_before_ms.max(header.time_ms);
            }
        }
        points
    }
}

/// A segment file that is written anew without some of its bytes.
struct Copy<'a> {
    old: &'a dyn File,
    new: &'a dyn File,
    /// Ranges of bytes, in order, that nobody needs: other damage, and what follows the entries.
    needless: Vec<(u64, u64)>,
    /// Where the device could not read what is needed.
    unread_at: Cell<Option<u64>>,
}

impl Copy<'_> {
    /// Copies bytes `from..end` to the same place. What is needless is zero where the device cannot read it.
    fn run(&self, from: u64, end: u64) -> io::Result<()> {
        let mut at = from;
        while at < end {
            let size = usize::try_from(end - at).unwrap_or(usize::MAX).min(COPY_SIZE);
            let mut bytes = vec![0; size];
            let read = read_around(self.old, &mut bytes, at, |part| {
                let is_needless = self.is_needless(part.start, part.end);
                if !is_needless {
                    self.unread_at.set(Some(part.start));
                }
                is_needless
            })?;
            if read == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            bytes.truncate(read);
            self.new.write_at(&[Bytes::from(bytes)], at)?;
            at += read as u64;
        }
        Ok(())
    }

    fn is_needless(&self, from: u64, to: u64) -> bool {
        let ranges = self.needless.iter();
        ranges.fold(from, |at, (begin, end)| if *begin <= at { at.max(*end) } else { at }) >= to
    }
}

/// The segment that fills the hole at `first`.
fn segment_header(core: &LogCore, state: &State, repair: &Repair) -> SegmentHeader {
    let first = repair.damage.first;
    let count = state.segments.partition_point(|segment| segment.base_index() < first.0);
    let before = count.checked_sub(1).and_then(|at| state.segments.get(at));
    SegmentHeader {
        group: core.group,
        replica: core.replica,
        incarnation: state.incarnation,
        generation: state.generation,
        base_index: first,
        base_offset: repair.damage.first_offset,
        chain: repair.damage.chain_before,
        term_before: before
            .map_or_else(|| state.purged.map_or(Term(0), |purged| purged.term), |before| Term(before.last_term)),
        time_before_ms: before.map_or(0, |before| before.last_time_ms),
        capacity: blocks::round_up(SEGMENT_DATA_AT + repair.size),
    }
}

impl LogCore {
    /// Puts the entries of `repair` in their place. In the log's turn, so nothing else writes.
    pub fn repair(self: &Arc<Self>, repair: &Repair) -> io::Result<()> {
        let _io = self.lock_io();
        if !self.lock().damage.iter().any(|known| *known == repair.damage) {
            // Purged, truncated or repaired meanwhile.
            return Ok(());
        }
        match &repair.damage.hole {
            Hole::Inside { base, at, end } => self.repair_inside(repair, *base, *at, *end)?,
            Hole::Between { lost } => self.repair_between(repair, lost)?,
        }
        metrics::add(&self.engine.metrics.repaired_count, 1);
        let (first, last) = (repair.damage.first, repair.damage.last);
        tracing::warn!(group = self.group.0, replica = self.replica.0, "entries {first} to {last} are repaired");
        Ok(())
    }

    fn repair_inside(self: &Arc<Self>, repair: &Repair, base: u64, at: u64, end: u64) -> io::Result<()> {
        let gone = || io::Error::other(format!("segment {base} is gone"));
        let (segment, needless) = {
            let state = self.lock();
            let known = state.segments.iter().find(|segment| segment.base_index() == base).ok_or_else(gone)?;
            let inside = state.damage.iter().filter(|damage| damage.inside(known).is_some());
            let ranges = inside.filter_map(Damage::bytes).chain([(known.end, u64::MAX)]);
            (Arc::clone(&known.segment), ranges.collect())
        };
        let old = segment.file()?;
        let size = old.size()?;
        let mut unread_at = None;
        let written = self.write_fresh(&segment.path(), |file| {
            let copy = Copy { old: old.as_ref(), new: file, needless, unread_at: Cell::default() };
            // The bytes of the hole are not even looked at: the disk may fail to read them.
            let copied = copy
                .run(0, at)
                .and_then(|()| file.write_at(&repair.pieces, at))
                .and_then(|()| copy.run(end, size.max(end)));
            unread_at = copy.unread_at.get();
            copied
        });
        let file = match (written, unread_at) {
            (Err(error), Some(unread_at)) => {
                // Once it is listed it stands in the way of nobody.
                self.examine(&segment, unread_at);
                return Err(io::Error::new(error.kind(), format!("{} byte {unread_at}: {error}", segment.path())));
            }
            (written, _) => written?,
        };
        segment.replace_file(file);
        {
            let mut state = self.lock();
            let points = repair.points(at, self.engine.options.index_step);
            let known = state.segments.iter_mut().find(|known| Arc::ptr_eq(&known.segment, &segment));
            let known = known.map(|known| (known.end >= end, known));
            match known {
                // Purged or truncated while the file was written: these entries are not in the log any more.
                None | Some((false, _)) => {}
                Some((true, known)) => known.fill_in(points, end, repair.time_ms()),
            }
            state.damage.remove(&repair.damage);
        }
        self.engine.request_index(self, &segment);
        self.sync_names()
    }

    /// Makes the new file's name durable. What is appended from now on goes to that file: when its name may be
    /// lost with the power, nothing more may be acknowledged.
    fn sync_names(self: &Arc<Self>) -> io::Result<()> {
        let synced = self.engine.disk.sync_dir(&self.dir);
        if let Err(error) = &synced {
            self.poison(&format!("syncing the directory after a repair failed: {error}"));
        }
        synced
    }

    fn repair_between(self: &Arc<Self>, repair: &Repair, lost: &[String]) -> io::Result<()> {
        let disk = self.engine.disk.as_ref();
        let header = segment_header(self, &self.lock(), repair);
        // Older than every mark that counts.
        let mark = Mark {
            sequence: 0,
            next_index: header.base_index.0,
            chain: header.chain,
            sealed_at: None,
            committed: None,
        };
        let (path, name) = (join(&self.dir, &header.file_name()), header.file_name());
        let file = self.write_fresh(&path, |file| {
            file.write_at(&[Bytes::from(header.encode())], 0)?;
            file.write_at(&[Bytes::from(mark.encode())], MARK_AT[0])?;
            file.write_at(&repair.pieces, SEGMENT_DATA_AT)
        })?;
        let segment = Arc::new(Segment::opened(&self.dir, header, file, 0));
        let mut fresh = SegmentState::new(Arc::clone(&segment), self.engine.options.index_step);
        repair.headers.iter().for_each(|header| fresh.push(header));
        {
            let mut state = self.lock();
            if !state.damage.iter().any(|known| *known == repair.damage) {
                // Purged or dropped while the file was written.
                drop(state);
                disk.remove(&path)?;
                return self.sync_names();
            }
            // One that held no entry that can be read had the same name.
            state.segments.retain(|known| known.base_index() != fresh.base_index());
            let at = state.segments.partition_point(|known| known.base_index() < fresh.base_index());
            state.segments.insert(at, fresh);
            state.damage.remove(&repair.damage);
        }
        self.engine.request_index(self, &segment);
        self.sync_names()?;
        for other in lost.iter().filter(|other| **other != name) {
            match disk.remove(&join(&self.dir, other)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        disk.sync_dir(&self.dir)
    }

    /// Writes a file beside `path`, makes it durable and gives it that name.
    fn write_fresh(&self, path: &str, fill: impl FnOnce(&dyn File) -> io::Result<()>) -> io::Result<Arc<dyn File>> {
        let disk = self.engine.disk.as_ref();
        let fresh = format!("{path}.tmp");
        let written = disk.create(&fresh).and_then(|file| {
            fill(file.as_ref())?;
            file.sync()?;
            planted::crash_point("repair-written");
            disk.rename(&fresh, path)?;
            planted::crash_point("repair-named");
            Ok(file)
        });
        if written.is_err() {
            // The old file stands. What is left of the new one goes with the next start at the latest.
            let _ = disk.remove(&fresh);
        }
        written
    }
}

impl Log {
    /// Puts the entries of `damage`, as another replica has them, in the place of the bytes that cannot be
    /// read. They are durable and readable on return, and the damage is off the list. Appends of this log
    /// wait as long as copying one segment takes.
    ///
    /// # Errors
    /// `InvalidData` when they are not, bit by bit, the entries that were lost; nothing was changed
    /// then. `StorageFull` while the disk has no room for another copy of a segment. Or the log is closed for
    /// writing or the disk failed; the damage stays listed then, unless the new file is in place already.
    pub async fn repair(&self, damage: &Damage, batches: Vec<Batch>) -> io::Result<()> {
        let repair = Box::new(Repair::prove(damage, batches)?);
        // A whole segment is written anew, beside the old one; votes and marks need what is kept in reserve.
        let space = self.store_space();
        let size = repair.size.max(self.core.engine.options.segment_size_max);
        if space.state == SpaceState::Full || space.free_size < size.saturating_add(space.reserve_size / 4) {
            let text = format!("{} bytes are free, too few to write a segment anew", space.free_size);
            return Err(io::Error::new(io::ErrorKind::StorageFull, text));
        }
        let (done, receiver) = oneshot::channel();
        {
            let mut state = self.core.lock();
            state.writable()?;
            self.core.enqueue(&mut state, Op::Repair { repair, done: Done::new(done) });
        }
        wait(receiver).await
    }
}
