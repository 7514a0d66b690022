//! The handle of one log, its state in memory, and what changes it.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use arqon_proto::{Batch, BatchKind, GroupId, Header, Offset, RaftIndex, ReplicaId, Term};
use bytes::Bytes;
use tokio::sync::oneshot;

use crate::checkpoint::{CheckpointKind, CheckpointWrite};
use crate::damage::DamageList;
use crate::engine::{Engine, Next, Writer};
use crate::error::Error;
use crate::flush::{Done, Group, LogIo, Op, Removed};
use crate::layout::SegmentHeader;
use crate::metrics;
use crate::pool::Owner;
use crate::position::{LogPosition, index_after};
use crate::recent::{Recent, RecentEntries};
use crate::segment::{Segment, SegmentState};
use crate::space::Space;
use crate::store::StoreHold;
use crate::turn::{TURN_REST_MIN, TURN_SIZE_MAX, Turn};

/// Called once, when everything appended up to and with its append is durable, or never will be.
pub type OnFlushed = Box<dyn FnOnce(io::Result<()>) + Send>;

/// A vote is a few numbers; this is far above.
const VOTE_SIZE_MAX: usize = 64 << 10;

/// The log of one replica of one Raft group. Clones share it.
///
/// Writes are called in order by one task; reads by anyone.
#[derive(Clone)]
pub struct Log {
    pub(crate) core: Arc<LogCore>,
    /// Keeps the threads of the store and its lock on the directory.
    pub(crate) _store: Arc<StoreHold>,
}

pub(crate) struct LogCore {
    pub group: GroupId,
    pub replica: ReplicaId,
    pub dir: String,
    pub engine: Arc<Engine>,
    state: Mutex<State>,
    /// Held by the one thread that runs an operation of this log.
    pub io: Mutex<LogIo>,
}

#[derive(Default)]
pub(crate) struct State {
    pub purged: Option<LogPosition>,
    pub log_start: Offset,
    pub last: Option<LogPosition>,
    pub flushed: Option<LogPosition>,
    pub committed: Option<LogPosition>,
    pub vote: Option<Bytes>,
    pub next_offset: Offset,
    /// Chain value that the next entry carries.
    pub chain: u64,
    pub incarnation: u64,
    /// Whose files this log may take and leave; none: its own.
    pub owner: Option<Arc<str>>,
    /// Raised when the log restarts empty.
    pub generation: u64,
    pub segments: VecDeque<SegmentState>,
    /// Whether the last segment takes more batches.
    pub tail_open: bool,
    /// Capacity of the segment after this one.
    pub next_capacity: u64,
    pub recent: RecentEntries,
    pub queue: VecDeque<Op>,
    /// Whether the engine has this log or will run it without being told.
    pub scheduled: bool,
    pub pending_size: usize,
    /// For each cut in the queue, the index from which flushes before it do not count.
    pub cuts: VecDeque<u64>,
    pub closed: bool,
    pub poisoned: Option<String>,
    /// What cannot be read from the segments.
    pub damage: DamageList,
    pub checkpoints: Vec<(CheckpointKind, LogPosition)>,
    pub checkpoints_waiting: Vec<CheckpointWrite>,
    /// Whether a mark was written and not synced, or a committed position not written.
    pub mark_dirty: bool,
    pub mark_watched: bool,
    pub flushed_at: Option<Instant>,
    /// Entries of the last group.
    pub last_group_count: usize,
    /// Typical size of the groups of late, in bytes.
    pub group_size: usize,
}

impl State {
    /// Bookkeeping of entries flushed up to and with `last`.
    pub fn flush_through(&mut self, last: LogPosition) {
        if self.cuts.iter().all(|cut| last.index.0 < *cut) {
            self.flushed = Some(last);
        }
        self.evict();
    }

    /// Drops recent entries beyond the limit, but for those not flushed yet.
    pub fn evict(&mut self) {
        self.recent.evict(index_after(self.flushed));
    }

    pub fn first_recent(&self) -> Option<u64> {
        self.recent.front().map(|oldest| oldest.batch.header.index.0)
    }

    /// The recent entry at `index`.
    pub fn recent_at(&self, index: u64) -> Option<&Recent> {
        let at = index.checked_sub(self.first_recent()?)?;
        self.recent.get(usize::try_from(at).ok()?)
    }

    pub fn writable(&self) -> Result<(), Error> {
        if let Some(reason) = &self.poisoned {
            return Err(Error::Poisoned(reason.clone()));
        }
        if self.closed {
            return Err(Error::Closed);
        }
        Ok(())
    }
}

/// The result of an operation that the engine runs.
pub(crate) async fn wait(receiver: oneshot::Receiver<io::Result<()>>) -> io::Result<()> {
    receiver.await.unwrap_or_else(|_| Err(Error::Closed.into()))
}

impl LogCore {
    pub fn new(group: GroupId, replica: ReplicaId, dir: String, engine: Arc<Engine>, state: State, io: LogIo) -> Self {
        Self { group, replica, dir, engine, state: Mutex::new(state), io: Mutex::new(io) }
    }

    pub fn lock(&self) -> MutexGuard<'_, State> {
        // A panic under this lock is a broken rule of the log; the next user of the log must not
        // go on from a state that is half changed.
        match self.state.lock() {
            Ok(state) => state,
            Err(error) => {
                let mut state = error.into_inner();
                state.poisoned.get_or_insert_with(|| "a thread panicked while it changed the log".to_owned());
                state
            }
        }
    }

    pub fn lock_io(&self) -> MutexGuard<'_, LogIo> {
        self.io.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whose files this log may take.
    pub fn owner(&self) -> Owner {
        self.lock().owner.clone().map_or(Owner::Log(self.group, self.replica), Owner::Named)
    }

    /// Gives the log to the engine unless the engine has it.
    pub fn schedule(self: &Arc<Self>, state: &mut State) {
        if !std::mem::replace(&mut state.scheduled, true) {
            self.engine.schedule(Arc::clone(self), Next::of(state));
        }
    }

    /// What it takes to write what stands in the queue on this thread: when that is one small entry
    /// which came alone, as the one before it did, and no log writes. Where more come at once
    /// they gather while the threads of the store write.
    fn take_turn(&self, state: &mut State) -> Option<Box<Writer>> {
        let is_small = state.queue.len() == 1
            && matches!(&state.queue[0], Op::Append(group) if group.entry_count() == 1 && group.size <= TURN_SIZE_MAX);
        let rested = state.flushed_at.is_none_or(|at| at.elapsed() >= TURN_REST_MIN);
        if state.scheduled || !is_small || state.last_group_count > 1 || !rested {
            return None;
        }
        let writer = self.engine.begin_turn()?;
        state.scheduled = true;
        Some(writer)
    }

    pub fn enqueue(self: &Arc<Self>, state: &mut State, op: Op) {
        state.queue.push_back(op);
        self.schedule(state);
    }

    /// Gives `batch` its place: offset, chain, segment.
    fn place(&self, state: &mut State, mut batch: Batch) {
        let header = &mut batch.header;
        assert_eq!(header.index.0, index_after(state.last), "entries are appended without gap");
        assert!(state.last.is_none_or(|last| last.term <= header.term), "terms never decrease");
        assert!(
            header.kind == BatchKind::Data || header.record_count == 0,
            "only data batches have records that take offsets"
        );
        header.base_offset = state.next_offset;
        header.chain = state.chain;
        let encoded = header.encode();
        let (size, next_offset) = (header.batch_size(), header.next_offset());
        let position = LogPosition { term: header.term, index: header.index };
        self.make_room(state, size, header);

        let tail = state.segments.back_mut().expect("make_room leaves an open segment");
        let (segment, at) = (Arc::clone(&tail.segment), tail.end);
        tail.push(&batch.header);
        state.chain = Header::chain_value(&encoded);
        state.next_offset = next_offset;
        state.last = Some(position);
        let options = &self.engine.options;
        let group = match state.queue.back_mut() {
            Some(Op::Append(group)) if Arc::ptr_eq(&group.segment, &segment) && group.size < options.flush_size_max => {
                group
            }
            _ => {
                state.queue.push_back(Op::Append(Group::new(Arc::clone(&segment), at)));
                match state.queue.back_mut() {
                    Some(Op::Append(group)) => group,
                    _ => unreachable!("an append was pushed just now"),
                }
            }
        };
        group.push(&encoded, &batch, position, state.chain);
        state.pending_size += size;
        state.recent.push(Recent { batch, segment, at });
    }

    /// Starts a new segment when the last one is closed or has no room for `size` bytes.
    fn make_room(&self, state: &mut State, size: usize, header: &Header) {
        let size = size as u64;
        if state.tail_open
            && let Some(tail) = state.segments.back()
            && tail.end + size <= tail.segment.header.capacity
        {
            return;
        }
        let options = &self.engine.options;
        let capacity = crate::disk::blocks::round_up(state.next_capacity.max(crate::layout::SEGMENT_DATA_AT + size));
        state.next_capacity = (state.next_capacity * 2).min(options.segment_size_max).max(state.next_capacity);
        let segment = Arc::new(Segment::new(
            &self.dir,
            SegmentHeader {
                group: self.group,
                replica: self.replica,
                incarnation: state.incarnation,
                generation: state.generation,
                base_index: header.index,
                base_offset: state.next_offset,
                chain: state.chain,
                term_before: state.last.map_or(Term(0), |last| last.term),
                time_before_ms: state.segments.back().map_or(0, |tail| tail.last_time_ms),
                capacity,
            },
        ));
        // One that was cut at its first entry has the same name: this one takes its place on disk, and a
        // purge of it would remove this one.
        if state.segments.back().is_some_and(|tail| tail.base_index() == header.index.0) {
            state.segments.pop_back();
        }
        state.queue.push_back(Op::Roll(Arc::clone(&segment)));
        state.segments.push_back(SegmentState::new(segment, self.engine.options.index_step));
        state.tail_open = true;
    }
}

impl Log {
    /// Raft group of this log.
    #[must_use]
    pub fn group(&self) -> GroupId {
        self.core.group
    }

    /// Replica placement of this log.
    #[must_use]
    pub fn replica(&self) -> ReplicaId {
        self.core.replica
    }

    /// Lets the files of purged segments pass between this log and all others of the same `owner`, whose
    /// bytes may stand in them until they are written over. Without an owner, only this log uses them again.
    pub fn set_owner(&self, owner: &str) {
        self.core.lock().owner = Some(owner.into());
    }

    /// Last entry dropped from the front, also by an installed snapshot.
    #[must_use]
    pub fn purged(&self) -> Option<LogPosition> {
        self.core.lock().purged
    }

    /// Last entry appended, durable or not; otherwise [`Log::purged`].
    #[must_use]
    pub fn last(&self) -> Option<LogPosition> {
        self.core.lock().last
    }

    /// Last entry known to be durable; otherwise [`Log::purged`].
    #[must_use]
    pub fn flushed(&self) -> Option<LogPosition> {
        self.core.lock().flushed
    }

    /// Bytes of entries that all logs of the store have written since it was opened: whoever reads
    /// sees by it whether others append.
    #[must_use]
    pub fn store_written_size(&self) -> u64 {
        self.core.engine.metrics.written_size.load(std::sync::atomic::Ordering::Relaxed)
    }

    /// Whether the store does its work on threads of its own; see
    /// [`Store::has_threads`](crate::Store::has_threads).
    #[must_use]
    pub fn store_has_threads(&self) -> bool {
        self.core.engine.has_threads()
    }

    /// What the disk of the store still takes; see [`Store::space`](crate::Store::space).
    #[must_use]
    pub fn store_space(&self) -> Space {
        self.core.engine.space()
    }

    /// Offset of the first record retained, or of the next one when none is.
    #[must_use]
    pub fn log_start(&self) -> Offset {
        self.core.lock().log_start
    }

    /// Offset that the next record takes.
    #[must_use]
    pub fn next_offset(&self) -> Offset {
        self.core.lock().next_offset
    }

    /// Why this log takes no more writes: a write or sync of it failed.
    #[must_use]
    pub fn poisoned(&self) -> Option<String> {
        self.core.lock().poisoned.clone()
    }

    /// Appends entries as [`Log::append`] does. When nothing else is written and this log's last
    /// entry came alone too, the caller may get the turn to make them durable itself: then `on_flushed`,
    /// and those of appends that came meanwhile, may run where that is done.
    ///
    /// # Errors
    /// As [`Log::append`].
    ///
    /// # Panics
    /// As [`Log::append`].
    pub fn append_or_turn(&self, batches: Vec<Batch>, on_flushed: OnFlushed) -> Result<Option<Turn>, Error> {
        self.append_on(batches, on_flushed, true)
    }

    /// Appends entries. They are readable when this returns; it never waits for the disk.
    ///
    /// Term and index stand in the headers; offset and chain are filled in here. `on_flushed`
    /// runs after all of them are durable, in the order of the appends, on a thread of the store or
    /// on that of a [`Turn`]; it must be quick. It also runs, with an error, when the log fails or closes.
    ///
    /// # Errors
    /// The log is closed for writing or too much waits for the disk. Nothing was kept then, and
    /// `on_flushed` was dropped without a call.
    ///
    /// # Panics
    /// An index that is not the one after [`Log::last`], or a term below its term.
    pub fn append(&self, batches: Vec<Batch>, on_flushed: OnFlushed) -> Result<(), Error> {
        self.append_on(batches, on_flushed, false).map(drop)
    }

    fn append_on(&self, batches: Vec<Batch>, on_flushed: OnFlushed, here: bool) -> Result<Option<Turn>, Error> {
        let core = &self.core;
        let count = batches.len();
        let size: usize = batches.iter().map(|batch| batch.header.batch_size()).sum();
        let mut state = core.lock();
        state.writable()?;
        let limit = core.engine.options.pending_size_max;
        if state.pending_size > 0 && state.pending_size + size > limit {
            return Err(Error::Overloaded { pending_size: state.pending_size, limit });
        }
        // Before anybody can count them off again.
        let metrics = &core.engine.metrics;
        metrics::add(&metrics.appended_count, count);
        metrics::add(&metrics.queue_depth, count);
        metrics::add(&metrics.queue_size, size);
        for batch in batches {
            core.place(&mut state, batch);
        }
        match state.queue.back_mut() {
            Some(Op::Append(group)) if count > 0 => group.callbacks.push(on_flushed),
            _ => state.queue.push_back(Op::Barrier(on_flushed)),
        }
        let writer = if here { core.take_turn(&mut state) } else { None };
        let turn = writer.map(|writer| Turn::new(self.clone(), writer));
        if turn.is_none() {
            core.schedule(&mut state);
        }
        drop(state);
        Ok(turn)
    }

    /// Drops the entries from `index` on; offsets rewind. The cut is durable on return, and
    /// before any later append is. Beyond the end it does nothing.
    ///
    /// # Errors
    /// The log is closed for writing, or the disk failed; the log is poisoned then.
    ///
    /// # Panics
    /// An index that was purged.
    pub async fn truncate_from(&self, index: RaftIndex) -> io::Result<()> {
        wait(self.start_truncate(index.0, None)?).await
    }

    /// Drops the entries behind `last`, as [`Log::truncate_from`] does from the index after it; all of them
    /// without it. `last` itself need not be readable.
    ///
    /// # Errors
    /// As [`Log::truncate_from`]; with a [`ReadError::Damaged`](crate::ReadError::Damaged) inside when the cut lies amid entries that
    /// cannot be read, and nothing was changed then.
    ///
    /// # Panics
    /// As [`Log::truncate_from`].
    pub async fn truncate_after(&self, last: Option<LogPosition>) -> io::Result<()> {
        wait(self.start_truncate(index_after(last), last)?).await
    }

    fn start_truncate(&self, index: u64, last: Option<LogPosition>) -> io::Result<oneshot::Receiver<io::Result<()>>> {
        let core = &self.core;
        let (done, receiver) = oneshot::channel();
        core.examine_before(index);
        let mut state = core.lock();
        state.writable()?;
        assert!(index >= index_after(state.purged), "entry {index} was purged and cannot be truncated");
        if index >= index_after(state.last) {
            core.enqueue(&mut state, Op::Barrier(Box::new(move |result| drop(done.send(result)))));
            return Ok(receiver);
        }
        let begin = core.place_of(&state, index).map_err(io::Error::from)?;
        let last = match index.checked_sub(1) {
            Some(before) if before >= index_after(state.purged) => match last {
                Some(last) => Some(last),
                None => {
                    let (_, header) = core.locate(&state, before)?;
                    Some(LogPosition { term: header.term, index: header.index })
                }
            },
            _ => state.purged,
        };

        let mut removed = Vec::new();
        while let Some(later) = state.segments.back()
            && later.base_index() >= index
        {
            removed.push(Arc::clone(&later.segment));
            state.segments.pop_back();
        }
        let survivor = state.segments.back_mut().map(|tail| {
            if tail.next_index > index {
                tail.cut(&begin, last.map_or(0, |last| last.term.0));
            }
            (Arc::clone(&tail.segment), tail.end)
        });
        state.recent.keep_below(index);
        // Lost files held committed entries, which are not truncated.
        state.damage.keep(0, index);
        state.last = last;
        state.flushed =
            state.flushed.filter(|flushed| flushed.index.0 < index).or(last.filter(|_| state.flushed.is_some()));
        state.next_offset = Offset(begin.offset);
        state.chain = begin.chain;
        state.tail_open = false;
        state.cuts.push_back(index);
        let done = Done::new(done);
        let op = match survivor {
            Some((segment, sealed_at)) => {
                Op::Truncate { segment, sealed_at, removed, keep: last, chain: begin.chain, done }
            }
            None => core.restart(&mut state, (removed, Vec::new()), Vec::new(), done),
        };
        core.enqueue(&mut state, op);
        Ok(receiver)
    }

    /// Drops the entries up to `position` from the front, and deletes the segments that hold
    /// nothing else. Durable on return. Beyond the end, the log restarts empty behind
    /// `position` with the offsets where they were; see [`Log::reset`] for other offsets.
    ///
    /// # Errors
    /// The log is closed for writing, or the disk failed; the log is poisoned then. With a
    /// [`ReadError::Damaged`](crate::ReadError::Damaged) inside when `position` lies amid entries that cannot be read: the chain value
    /// behind it is not known, and nothing was changed.
    pub async fn purge_through(&self, position: LogPosition) -> io::Result<()> {
        let core = &self.core;
        let (done, receiver) = oneshot::channel();
        core.examine_before(position.index.0 + 1);
        {
            let mut state = core.lock();
            state.writable()?;
            if position.index.0 >= index_after(state.last) {
                let next_offset = state.next_offset;
                self.restart_at(&mut state, position, next_offset, Vec::new(), done);
            } else if position.index.0 < index_after(state.purged) {
                core.enqueue(&mut state, Op::Barrier(Box::new(move |result| drop(done.send(result)))));
            } else {
                self.start_purge(&mut state, position, done)?;
            }
        }
        wait(receiver).await
    }

    fn start_purge(
        &self,
        state: &mut State,
        position: LogPosition,
        done: oneshot::Sender<io::Result<()>>,
    ) -> io::Result<()> {
        let start = position.index.0 + 1;
        let begin = self.core.place_of(state, start).map_err(io::Error::from)?;
        let (start_chain, start_offset) = (begin.chain, Offset(begin.offset));
        let mut removed = Vec::new();
        while state.segments.len() > 1
            && let Some(first) = state.segments.front()
            && first.next_index <= start
        {
            removed.push(Arc::clone(&first.segment));
            state.segments.pop_front();
        }
        state.recent.keep_from(start);
        let lost = state.damage.keep(start, u64::MAX);
        state.purged = Some(position);
        state.log_start = start_offset;
        let done = Done::new(done);
        self.core.enqueue(state, Op::Purge { position, start_chain, start_offset, removed: (removed, lost), done });
        Ok(())
    }

    /// Drops every entry; the log restarts empty behind `position`, and its next record takes
    /// `next_offset`. For an installed snapshot use [`Log::install`]. Durable on return.
    ///
    /// # Errors
    /// The log is closed for writing, or the disk failed; the log is poisoned then.
    pub async fn reset(&self, position: LogPosition, next_offset: Offset) -> io::Result<()> {
        self.install(position, next_offset, Vec::new()).await
    }

    /// Saves `checkpoints` at `position`, then restarts the log empty behind it as
    /// [`Log::reset`] does. After a crash in between the old log stands and the checkpoints
    /// are gone.
    ///
    /// # Errors
    /// The log is closed for writing, or the disk failed; the log is poisoned then.
    pub async fn install(
        &self,
        position: LogPosition,
        next_offset: Offset,
        checkpoints: Vec<(CheckpointKind, Bytes)>,
    ) -> io::Result<()> {
        let (done, receiver) = oneshot::channel();
        {
            let mut state = self.core.lock();
            state.writable()?;
            self.restart_at(&mut state, position, next_offset, checkpoints, done);
        }
        wait(receiver).await
    }

    fn restart_at(
        &self,
        state: &mut State,
        position: LogPosition,
        next_offset: Offset,
        checkpoints: Vec<(CheckpointKind, Bytes)>,
        done: oneshot::Sender<io::Result<()>>,
    ) {
        let removed = state.segments.drain(..).rev().map(|segment| segment.segment).collect();
        state.recent.clear();
        let lost = state.damage.keep(0, 0);
        state.purged = Some(position);
        state.last = Some(position);
        state.next_offset = next_offset;
        state.tail_open = false;
        state.cuts.push_back(0);
        let op = self.core.restart(state, (removed, lost), checkpoints, Done::new(done));
        self.core.enqueue(state, op);
    }

    /// Makes `vote` durable, and before it everything appended so far.
    ///
    /// # Errors
    /// The log is closed for writing, or the disk failed; the log is poisoned then.
    ///
    /// # Panics
    /// A vote over 64 KiB.
    pub async fn save_vote(&self, vote: Bytes) -> io::Result<()> {
        assert!(vote.len() <= VOTE_SIZE_MAX, "a vote has a few bytes");
        let (done, receiver) = oneshot::channel();
        {
            let mut state = self.core.lock();
            state.writable()?;
            self.core.enqueue(&mut state, Op::Vote { vote, done: Done::new(done) });
        }
        wait(receiver).await
    }

    /// The last durable vote.
    #[must_use]
    pub fn vote(&self) -> Option<Bytes> {
        self.core.lock().vote.clone()
    }

    /// Notes the committed position. It reaches the disk with a later flush, or by itself
    /// within about 100 ms.
    pub fn save_committed(&self, position: LogPosition) {
        let mut state = self.core.lock();
        if state.committed.is_none_or(|committed| committed < position) {
            state.committed = Some(position);
            state.mark_dirty = true;
            self.core.engine.watch_mark(&self.core, &mut state);
        }
    }

    /// The committed position last noted, never beyond [`Log::last`] nor before [`Log::purged`].
    #[must_use]
    pub fn committed(&self) -> Option<LogPosition> {
        let state = self.core.lock();
        state.committed.max(state.purged).min(state.last)
    }
}

impl LogCore {
    /// The operation that makes the log empty behind `state.last`, with a chain of its own.
    fn restart(
        &self,
        state: &mut State,
        removed: Removed,
        checkpoints: Vec<(CheckpointKind, Bytes)>,
        done: Done,
    ) -> Op {
        state.chain = crate::store::random_number();
        state.generation += 1;
        state.log_start = state.next_offset;
        Op::Restart {
            generation: state.generation,
            purged: state.last,
            start_chain: state.chain,
            start_offset: state.next_offset,
            removed,
            checkpoints,
            done,
        }
    }
}
