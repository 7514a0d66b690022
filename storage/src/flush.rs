//! What the engine does to the disk for one log, one operation at a time and in order.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use arqon_proto::planted::{self, Bug};
use arqon_proto::{BATCH_HEADER_SIZE, Batch, Offset};
use bytes::Bytes;
use tokio::sync::oneshot;

use crate::checkpoint::{self, CheckpointKind};
use crate::disk::{self, Disk};
use crate::engine::Engine;
use crate::index;
use crate::layout::{MANIFEST_FILE, Manifest, Mark, REWRITE_FILE, VOTE_FILE, What, seal};
use crate::log::{LogCore, OnFlushed, State};
use crate::metrics;
use crate::pool;
use crate::position::{LogPosition, index_after};
use crate::repair::Repair;
use crate::segment::Segment;
use crate::space::SpaceState;

/// Logs whose groups are larger than this of late are not filled ahead: what the sync of a growing
/// file costs more is less than writing every byte twice.
const FILL_GROUP_SIZE_MAX: usize = 128 << 10;
/// A group changes the size that is typical by this part of the difference.
const GROUP_SIZE_SHARE: usize = 8;

/// Whoever waits for an operation.
pub(crate) struct Done(oneshot::Sender<io::Result<()>>);

impl Done {
    pub fn new(sender: oneshot::Sender<io::Result<()>>) -> Self {
        Self(sender)
    }

    pub fn send(self, result: io::Result<()>) {
        // The caller may have gone; the operation stands.
        let _ = self.0.send(result);
    }
}

/// Segments that a step drops, and the names of files that hold nothing of use.
pub(crate) type Removed = (Vec<Arc<Segment>>, Vec<String>);

/// One step of a log, in the order in which the log was changed in memory.
pub(crate) enum Op {
    /// Create this segment.
    Roll(Arc<Segment>),
    Append(Group),
    /// Only tell that everything before is durable.
    Barrier(OnFlushed),
    /// End `segment` at `sealed_at`, remove the later ones.
    Truncate {
        segment: Arc<Segment>,
        sealed_at: u64,
        removed: Vec<Arc<Segment>>,
        keep: Option<LogPosition>,
        chain: u64,
        done: Done,
    },
    /// Raise the log start.
    Purge {
        position: LogPosition,
        start_chain: u64,
        start_offset: Offset,
        removed: Removed,
        done: Done,
    },
    /// Make the log empty behind `purged`.
    Restart {
        generation: u64,
        purged: Option<LogPosition>,
        start_chain: u64,
        start_offset: Offset,
        removed: Removed,
        checkpoints: Vec<(CheckpointKind, Bytes)>,
        done: Done,
    },
    Vote {
        vote: Bytes,
        done: Done,
    },
    /// Sync the durable mark.
    Mark(Option<Done>),
    /// Put lost entries in their place.
    Repair {
        repair: Box<Repair>,
        done: Done,
    },
    /// Remove the log.
    Delete(OnFlushed),
}

/// Entries that are written together and made durable together.
pub(crate) struct Group {
    pub segment: Arc<Segment>,
    pub at: u64,
    pub size: usize,
    pub callbacks: Vec<OnFlushed>,
    entry_count: usize,
    last: LogPosition,
    chain: u64,
    headers: Vec<[u8; BATCH_HEADER_SIZE]>,
    /// Stamps and records of each header.
    bodies: Vec<[Bytes; 2]>,
    queued_at: Instant,
}

impl Group {
    pub fn new(segment: Arc<Segment>, at: u64) -> Self {
        Self {
            segment,
            at,
            size: 0,
            callbacks: Vec::new(),
            entry_count: 0,
            last: LogPosition::default(),
            chain: 0,
            headers: Vec::new(),
            bodies: Vec::new(),
            queued_at: Instant::now(),
        }
    }

    pub fn push(&mut self, header: &[u8; BATCH_HEADER_SIZE], batch: &Batch, position: LogPosition, chain: u64) {
        self.headers.push(*header);
        self.bodies.push([batch.stamps.clone(), batch.records.clone()]);
        self.size += batch.header.batch_size();
        self.entry_count += 1;
        self.last = position;
        self.chain = chain;
    }

    /// Everything to write from `at` on, in order.
    pub fn parts(&self) -> impl Iterator<Item = &[u8]> {
        let entries = self.headers.iter().zip(&self.bodies);
        entries.flat_map(|(header, [stamps, records])| [header.as_slice(), stamps.as_ref(), records.as_ref()])
    }

    pub fn entry_count(&self) -> usize {
        self.entry_count
    }

    pub fn end(&self) -> u64 {
        self.at + self.size as u64
    }
}

/// What the operations of a log know of its files. Held by one thread at a time.
pub(crate) struct LogIo {
    pub manifest: Manifest,
    pub mark: Mark,
    /// Segment that holds the newest mark.
    pub marked: Option<Arc<Segment>>,
    /// Since when marks were written there and not synced.
    pub unsynced_since: Option<Instant>,
}

/// What made a group durable.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Flushed {
    /// A flush of the disk, which leaves the durable mark in the page cache.
    Disk,
    /// A sync of its file, which carries the mark of the group before.
    File,
}

impl LogIo {
    fn save_manifest(&mut self, disk: &dyn Disk, dir: &str, manifest: Manifest) -> io::Result<()> {
        disk::replace(disk, dir, MANIFEST_FILE, manifest.encode(), disk::MANIFEST_POINTS)?;
        self.manifest = manifest;
        Ok(())
    }

    /// Writes the next mark, without syncing it: it survives the end of the process, and the
    /// next sync of its segment carries it.
    fn write_mark(&mut self, segment: &Arc<Segment>, mark: Mark) -> io::Result<()> {
        segment.write_mark(&mark)?;
        self.mark = mark;
        self.marked = Some(Arc::clone(segment));
        self.unsynced_since.get_or_insert_with(Instant::now);
        Ok(())
    }

    fn next_mark(&self, state: &State) -> Mark {
        let committed = state.committed.max(self.mark.committed);
        Mark { sequence: self.mark.sequence + 1, sealed_at: None, committed, ..self.mark.clone() }
    }
}

fn call(callback: OnFlushed, result: io::Result<()>) {
    // A callback that panics must not take the writes of all other logs with it.
    if catch_unwind(AssertUnwindSafe(|| callback(result))).is_err() {
        tracing::error!("a callback of an append panicked");
    }
}

/// The same error for somebody else.
pub(crate) fn copy(error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), error.to_string())
}

fn remove_segments(disk: &dyn Disk, dir: &str, segments: &[Arc<Segment>], lost: &[String]) -> io::Result<()> {
    let of_segment = |segment: &Arc<Segment>| [segment.path(), disk::join(dir, &index::file_name(&segment.header))];
    let lost = lost.iter().map(|name| disk::join(dir, name));
    let paths: Vec<String> = segments.iter().flat_map(of_segment).chain(lost).collect();
    if paths.is_empty() {
        return Ok(());
    }
    remove_files(disk, &paths)?;
    disk.sync_dir(dir)
}

/// Removes what is there of `paths`.
fn remove_files(disk: &dyn Disk, paths: &[String]) -> io::Result<()> {
    for path in paths {
        match disk.remove(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

impl LogCore {
    /// Takes the group in front of the queue, if that is what stands there.
    pub fn take_group(&self) -> Option<Group> {
        let mut state = self.lock();
        if !matches!(state.queue.front(), Some(Op::Append(_))) {
            return None;
        }
        match state.queue.pop_front()? {
            Op::Append(group) => Some(group),
            _ => None,
        }
    }

    /// Runs one operation on the calling thread.
    pub fn run(self: &Arc<Self>, op: Op) {
        match op {
            // Groups are written in rounds: see the engine. It gives no others to this.
            Op::Append(_) => unreachable!("a group is written in a round"),
            Op::Barrier(callback) => call(callback, Ok(())),
            Op::Roll(segment) => {
                if let Err(error) = self.roll(&segment) {
                    self.poison(&format!("creating {} failed: {error}", segment.path()));
                }
            }
            Op::Truncate { segment, sealed_at, removed, keep, chain, done } => {
                let result = self.truncate(&segment, sealed_at, &removed, keep, chain);
                self.finish("truncation", done, result);
            }
            Op::Purge { position, start_chain, start_offset, removed, done } => {
                let result = self.purge(position, start_chain, start_offset, removed);
                self.finish("purge", done, result);
            }
            Op::Restart { generation, purged, start_chain, start_offset, removed, checkpoints, done } => {
                let result = self.restart_on_disk(generation, purged, start_chain, start_offset, &removed, checkpoints);
                self.finish("restart of the log", done, result);
            }
            Op::Vote { vote, done } => {
                let result = self.write_vote(vote);
                self.finish("write of the vote", done, result);
            }
            Op::Mark(done) => {
                let result = self.sync_mark();
                match done {
                    Some(done) => self.finish("sync of the durable mark", done, result),
                    None => {
                        if let Err(error) = result {
                            self.poison(&format!("sync of the durable mark failed: {error}"));
                        }
                    }
                }
            }
            // The log is as it was when this fails, or closed for writing.
            Op::Repair { repair, done } => done.send(self.repair(&repair)),
            Op::Delete(done) => {
                self.lock().closed = true;
                self.fail_queue("the log was deleted");
                call(done, crate::store::delete_dir(self.engine.disk.as_ref(), self.group, self.replica));
            }
        }
    }

    fn finish(self: &Arc<Self>, what: &str, done: Done, result: io::Result<()>) {
        if let Err(error) = &result {
            self.poison(&format!("{what} failed: {error}"));
        }
        done.send(result);
    }

    /// What follows when a group is durable or failed: the mark, then the callbacks.
    pub fn finish_group(self: &Arc<Self>, group: Group, started: Instant, result: io::Result<Flushed>) {
        let engine = &self.engine;
        let result = result.and_then(|flushed| self.mark_group(&group, flushed));
        metrics::subtract(&engine.metrics.queue_depth, group.entry_count);
        metrics::subtract(&engine.metrics.queue_size, group.size);
        if let Err(error) = result {
            self.lock().pending_size -= group.size;
            let reason = format!("writing {} failed: {error}", group.segment.path());
            self.close_for_writing(&reason);
            for callback in group.callbacks {
                call(callback, Err(copy(&error)));
            }
            self.fail_queue(&reason);
            return;
        }
        let now = Instant::now();
        engine.metrics.flush_latency.record(now - started);
        engine.metrics.append_latency.record(now - group.queued_at);
        metrics::add(&engine.metrics.flush_count, 1);
        metrics::add(&engine.metrics.written_size, group.size);
        let fills;
        {
            let mut state = self.lock();
            state.pending_size -= group.size;
            state.flush_through(group.last);
            state.mark_dirty = true;
            state.flushed_at = Some(now);
            state.last_group_count = group.entry_count;
            let typical = state.group_size;
            state.group_size = typical - typical / GROUP_SIZE_SHARE + group.size / GROUP_SIZE_SHARE;
            fills = state.group_size < FILL_GROUP_SIZE_MAX;
            engine.watch_mark(self, &mut state);
            checkpoint::start_ready(self, &mut state);
        }
        if fills && group.segment.wants_fill(group.end(), engine.options.fill_size) {
            engine.request_fill(self, &group.segment);
        }
        for callback in group.callbacks {
            call(callback, Ok(()));
        }
    }

    fn mark_group(&self, group: &Group, flushed: Flushed) -> io::Result<()> {
        let mut io = self.lock_io();
        if flushed == Flushed::File {
            io.unsynced_since = None;
        }
        let mark = Mark { next_index: group.last.index.0 + 1, chain: group.chain, ..io.next_mark(&self.lock()) };
        io.write_mark(&group.segment, mark)?;
        planted::crash_point("mark-written");
        Ok(())
    }

    /// Creates a segment. Everything before it was flushed, which its first mark says; then the
    /// manifest says that it must be there.
    fn roll(self: &Arc<Self>, segment: &Arc<Segment>) -> io::Result<()> {
        let engine = &self.engine;
        let mut io = self.lock_io();
        let base = segment.header.base_index;
        let mark = Mark { next_index: base.0, chain: segment.header.chain, ..io.next_mark(&self.lock()) };
        let fill_size = if engine.space().state == SpaceState::Enough { engine.options.fill_size } else { 0 };
        let disk = engine.disk.as_ref();
        match engine.files.take(&self.owner(), segment.header.capacity) {
            Some(spare) => {
                segment.recycle(disk, &mark, &spare, fill_size)?;
                metrics::add(&engine.metrics.recycled_count, 1);
            }
            None => segment.create(disk, &mark, fill_size)?,
        }
        planted::crash_point("segment-begun");
        engine.refresh_space();
        io.mark = mark;
        io.unsynced_since = None;
        if let Some(before) = io.marked.replace(Arc::clone(segment)) {
            before.end_writes();
            engine.request_index(self, &before);
        }
        let manifest = Manifest { tail: Some(base), ..io.manifest.clone() };
        io.save_manifest(engine.disk.as_ref(), &self.dir, manifest)?;
        planted::crash_point("segment-in-manifest");
        metrics::add(&engine.metrics.roll_count, 1);
        Ok(())
    }

    /// The lowered mark makes the cut, in one block; it stands before any later segment goes.
    fn truncate(
        &self,
        segment: &Arc<Segment>,
        sealed_at: u64,
        removed: &[Arc<Segment>],
        keep: Option<LogPosition>,
        chain: u64,
    ) -> io::Result<()> {
        let disk = self.engine.disk.as_ref();
        segment.end_writes();
        // Entries that were cut off stand in it, whose like may be appended again.
        segment.forbid_reuse();
        removed.iter().for_each(|segment| segment.end_writes());
        let mut io = self.lock_io();
        let mark = io.next_mark(&self.lock());
        io.write_mark(segment, Mark { next_index: index_after(keep), chain, sealed_at: Some(sealed_at), ..mark })?;
        segment.file()?.sync()?;
        io.unsynced_since = None;
        planted::crash_point("truncate-marked");
        if !removed.is_empty() {
            let manifest = Manifest { tail: Some(segment.header.base_index), ..io.manifest.clone() };
            io.save_manifest(disk, &self.dir, manifest)?;
            planted::crash_point("truncate-in-manifest");
            remove_segments(disk, &self.dir, removed, &[])?;
            planted::crash_point("truncate-removed");
        }
        self.cut_done(keep);
        Ok(())
    }

    fn cut_done(&self, last: Option<LogPosition>) {
        let mut state = self.lock();
        state.cuts.pop_front();
        state.flushed = last;
    }

    fn purge(
        &self,
        position: LogPosition,
        start_chain: u64,
        start_offset: Offset,
        (removed, lost): Removed,
    ) -> io::Result<()> {
        let disk = self.engine.disk.as_ref();
        let mut io = self.lock_io();
        let manifest = Manifest { purged: Some(position), start_chain, start_offset, ..io.manifest.clone() };
        io.save_manifest(disk, &self.dir, manifest)?;
        planted::crash_point("purge-in-manifest");
        self.retire(removed, &lost)?;
        planted::crash_point("purge-removed");
        Ok(())
    }

    /// Removes segments that were purged, or puts their files into the pool. Every entry that ever stood in such
    /// a file is then below the log start, and was never cut off: in this log none can come again.
    fn retire(&self, segments: Vec<Arc<Segment>>, lost: &[String]) -> io::Result<()> {
        let Engine { disk, files, .. } = self.engine.as_ref();
        let disk = disk.as_ref();
        let has_space = self.engine.space().takes_spares();
        let mut spares = Vec::new();
        let mut removed: Vec<String> = lost.iter().map(|name| disk::join(&self.dir, name)).collect();
        for segment in segments {
            let (path, header) = (segment.path(), segment.header.clone());
            removed.push(disk::join(&self.dir, &index::file_name(&header)));
            let reusable =
                if has_space && files.takes(header.capacity) { Segment::into_reusable(segment) } else { None };
            let spare = reusable.map(|durable_end| (files.next_path(), durable_end));
            // A pool on another file system is none.
            match spare.filter(|(spare, _)| disk.rename(&path, spare).is_ok()) {
                Some(spare) => spares.push(spare),
                None => removed.push(path),
            }
        }
        if removed.is_empty() {
            return Ok(());
        }
        if !spares.is_empty() {
            planted::crash_point("retire-renamed");
        }
        remove_files(disk, &removed)?;
        planted::crash_point("retire-removed");
        disk.sync_dir(&self.dir)?;
        // Only now: a file that is a segment again must not come back under its old name.
        let owner = self.owner();
        for (path, durable_end) in spares {
            pool::remove(disk, &files.put(path, durable_end, owner.clone()));
            planted::crash_point("retire-pooled");
        }
        Ok(())
    }

    fn restart_on_disk(
        self: &Arc<Self>,
        generation: u64,
        purged: Option<LogPosition>,
        start_chain: u64,
        start_offset: Offset,
        (removed, lost): &Removed,
        checkpoints: Vec<(CheckpointKind, Bytes)>,
    ) -> io::Result<()> {
        let disk = self.engine.disk.as_ref();
        removed.iter().for_each(|segment| segment.end_writes());
        for (kind, bytes) in checkpoints {
            let position = purged.ok_or_else(|| io::Error::other("a checkpoint needs a position"))?;
            checkpoint::write(self, kind, position, &bytes)?;
        }
        planted::crash_point("install-checkpoint");
        let mut io = self.lock_io();
        let manifest = Manifest { generation, purged, start_chain, start_offset, tail: None, ..io.manifest.clone() };
        io.save_manifest(disk, &self.dir, manifest)?;
        planted::crash_point("install-in-manifest");
        io.mark = Mark { next_index: index_after(purged), chain: start_chain, ..io.mark.clone() };
        io.marked = None;
        remove_segments(disk, &self.dir, removed, lost)?;
        planted::crash_point("install-removed");
        drop(io);
        self.cut_done(purged);
        checkpoint::prune(self)
    }

    fn write_vote(&self, vote: Bytes) -> io::Result<()> {
        if !planted::has(Bug::VoteNotSaved) {
            let (disk, bytes) = (self.engine.disk.as_ref(), encode_vote(Some(&vote)));
            disk::replace(disk, &self.dir, VOTE_FILE, bytes, disk::VOTE_POINTS)?;
        }
        self.lock().vote = Some(vote);
        metrics::add(&self.engine.metrics.vote_count, 1);
        Ok(())
    }

    fn sync_mark(&self) -> io::Result<()> {
        let mut io = self.lock_io();
        let Some(segment) = io.marked.clone() else { return Ok(()) };
        let mark = {
            let mut state = self.lock();
            if !std::mem::replace(&mut state.mark_dirty, false) {
                return Ok(());
            }
            Mark { sealed_at: io.mark.sealed_at, ..io.next_mark(&state) }
        };
        if mark.committed != io.mark.committed {
            io.write_mark(&segment, mark)?;
        }
        io.unsynced_since = None;
        segment.file()?.sync()
    }

    /// Syncs the marks of a log that is busy, if none of its flushes has for `delay`. Its
    /// appends go on meanwhile.
    pub fn sync_old_mark(self: &Arc<Self>, delay: Duration) {
        let segment = {
            // Whoever holds this now syncs the mark, or will have written another.
            let Ok(mut io) = self.io.try_lock() else { return };
            if io.unsynced_since.is_none_or(|since| since.elapsed() < delay) {
                return;
            }
            io.unsynced_since = None;
            io.marked.clone()
        };
        let Some(segment) = segment else { return };
        if let Err(error) = segment.file().and_then(|file| file.sync()) {
            self.poison(&format!("sync of the durable mark failed: {error}"));
        }
    }

    /// Closes the log for writing for good: a failed sync may have dropped bytes that a second
    /// one would call durable.
    pub fn poison(self: &Arc<Self>, reason: &str) {
        self.close_for_writing(reason);
        self.fail_queue(reason);
    }

    fn close_for_writing(&self, reason: &str) {
        {
            let mut state = self.lock();
            if state.poisoned.is_some() {
                return;
            }
            state.poisoned = Some(reason.to_owned());
        }
        tracing::error!(group = self.group.0, replica = self.replica.0, "log is closed for writing: {reason}");
        metrics::add(&self.engine.metrics.poisoned_count, 1);
        // Left for the next start, where the disk lets us: see recovery.
        let disk = self.engine.disk.as_ref();
        let marker = disk.create(&disk::join(&self.dir, REWRITE_FILE)).and_then(|file| file.sync());
        if let Err(error) = marker.and_then(|()| disk.sync_dir(&self.dir)) {
            tracing::warn!("no marker of the failure could be left in {}: {error}", self.dir);
        }
    }

    /// Answers everything that waits with an error.
    pub fn fail_queue(self: &Arc<Self>, reason: &str) {
        let (queue, checkpoints) = {
            let mut state = self.lock();
            (std::mem::take(&mut state.queue), std::mem::take(&mut state.checkpoints_waiting))
        };
        let error = || io::Error::other(reason.to_owned());
        for op in queue {
            match op {
                Op::Append(group) => {
                    self.lock().pending_size -= group.size;
                    metrics::subtract(&self.engine.metrics.queue_depth, group.entry_count);
                    metrics::subtract(&self.engine.metrics.queue_size, group.size);
                    group.callbacks.into_iter().for_each(|callback| call(callback, Err(error())));
                }
                Op::Barrier(callback) | Op::Delete(callback) => call(callback, Err(error())),
                Op::Truncate { done, .. }
                | Op::Purge { done, .. }
                | Op::Restart { done, .. }
                | Op::Vote { done, .. }
                | Op::Repair { done, .. }
                | Op::Mark(Some(done)) => done.send(Err(error())),
                Op::Roll(_) | Op::Mark(None) => {}
            }
        }
        for write in checkpoints {
            write.done.send(Err(error()));
        }
    }
}

/// The vote file: there from the creation of a log on, so that a missing one is damage.
pub(crate) fn encode_vote(vote: Option<&Bytes>) -> Vec<u8> {
    let mut payload = vec![u8::from(vote.is_some())];
    payload.extend_from_slice(vote.map_or(&[], |vote| vote));
    seal(What::Vote, &payload)
}
