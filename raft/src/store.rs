//! openraft's log storage over one [`arqon_storage::Log`].
//!
//! The segment log does the work; this file turns entries into batches and keeps openraft's
//! contract: `append` returns once entries are readable and reports the flush later, a vote is
//! a barrier, `read_committed` never passes the log's end, reads are bounded in bytes.

use std::{
    fmt::Debug,
    io,
    ops::{Bound, RangeBounds, RangeInclusive},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use arqon_proto::{Batch, BatchKind, Offset, RaftIndex, limits, wire};
use arqon_storage::{CheckpointKind, Log, LogPosition, ReadError};
use bytes::Bytes;
use futures_util::{Stream, stream};
use openraft::storage::{IOFlushed, LogState, RaftLogReader, RaftLogStorage};
use prost::Message;
use tokio::sync::oneshot;

use crate::repair::{REPAIR_PATIENCE, Repairs};
use crate::types::{
    Entry, LogId, TypeConfig, Vote, from_wire_vote, into_batch, into_entry, log_id, position, wire_vote,
};

/// A snapshot that the state machine has taken over and whose position the log must jump to.
pub(crate) struct Installed {
    pub position: LogPosition,
    pub next_offset: Offset,
    pub checkpoint: Bytes,
}

/// Hands an installed snapshot from the state machine to the purge that openraft runs after it.
pub(crate) type InstalledSlot = Arc<Mutex<Option<Installed>>>;

/// Tells the one proposer of a term that its entry stands in the local log.
#[derive(Default)]
pub(crate) struct Appended(Mutex<Option<(u64, oneshot::Sender<()>)>>);

impl Appended {
    /// Resolves when the next proposal in `term` is appended. Nobody else appends data or control
    /// entries in the term in which this replica leads.
    pub(crate) fn expect(&self, term: u64) -> oneshot::Receiver<()> {
        let (sender, receiver) = oneshot::channel();
        *self.lock() = Some((term, sender));
        receiver
    }

    fn is_expected(&self, term: u64) -> bool {
        self.lock().as_ref().is_some_and(|(expected, _)| *expected == term)
    }

    fn tell(&self, term: u64) {
        if let Some((_, sender)) = self.lock().take_if(|(expected, _)| *expected == term) {
            // The proposer may have gone; the entry stands.
            let _ = sender.send(());
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<(u64, oneshot::Sender<()>)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The log of one group as openraft sees it; also its own reader.
#[derive(Clone)]
pub(crate) struct LogStore {
    log: Log,
    installed: InstalledSlot,
    appended: Arc<Appended>,
    /// Whether the group began with this replica alone.
    alone: bool,
    repairs: Arc<Repairs>,
}

impl LogStore {
    pub(crate) fn new(log: Log, installed: InstalledSlot, alone: bool, repairs: Arc<Repairs>) -> Self {
        Self { log, installed, appended: Arc::default(), alone, repairs }
    }

    /// Tells of what this store appends.
    pub(crate) fn appended(&self) -> Arc<Appended> {
        self.appended.clone()
    }

    /// The index range that `range` asks for, cut to what the log holds.
    fn clamp(&self, range: &impl RangeBounds<u64>) -> std::ops::Range<RaftIndex> {
        let start = start_of(range).unwrap_or(0);
        let end = match range.end_bound() {
            Bound::Included(end) => end + 1,
            Bound::Excluded(end) => *end,
            Bound::Unbounded => u64::MAX,
        };
        let first = self.log.purged().map_or(0, |purged| purged.index.0 + 1);
        let next = self.log.last().map_or(0, |last| last.index.0 + 1);
        let start = start.max(first);
        RaftIndex(start)..RaftIndex(end.min(next).max(start))
    }

    /// Whether the entry at `position`, which is committed, stands in the log.
    async fn holds(&self, position: LogPosition) -> io::Result<bool> {
        let read = || self.log.entries(position.index..position.index.next(), 0);
        match self.repaired(read(), Some(REPAIR_PATIENCE), read).await {
            Ok(found) => Ok(found.first().is_some_and(|batch| batch.header.term == position.term)),
            Err(ReadError::Purged { .. }) => Ok(false),
            // What is committed here too is the same entry.
            Err(ReadError::Damaged { .. }) if self.log.committed() >= Some(position) => Ok(true),
            Err(error) => Err(io::Error::other(error)),
        }
    }

    /// What `change` gives, which is made again when damage that is in its way is repaired.
    async fn cut<F: Future<Output = io::Result<()>>>(&self, change: impl Fn() -> F) -> io::Result<()> {
        let mut result = change().await;
        while let Err(error) = &result
            && let Some(ReadError::Damaged { index, .. }) = error.get_ref().and_then(|error| error.downcast_ref())
            && self.repairs.repaired(&self.log, *index, Some(REPAIR_PATIENCE)).await
        {
            result = change().await;
        }
        result
    }

    /// Entries from `start`, at most `size_max` bytes of them, at least one.
    fn read(&self, range: std::ops::Range<RaftIndex>, size_max: usize) -> Result<Vec<Entry>, ReadError> {
        if range.is_empty() {
            return Ok(Vec::new());
        }
        let batches = self.log.entries(range, size_max)?;
        let entries = batches.into_iter().map(|batch| into_entry(batch).map_err(io::Error::other));
        Ok(entries.collect::<io::Result<_>>()?)
    }

    /// The same when what is damaged is repaired, which `patience` says how long to wait for.
    async fn read_repaired(
        &self,
        range: std::ops::Range<RaftIndex>,
        patience: Option<Duration>,
    ) -> Result<Vec<Entry>, ReadError> {
        let read = self.read(range.clone(), limits::APPEND_SIZE_MAX);
        self.repaired(read, patience, || self.read(range.clone(), limits::APPEND_SIZE_MAX)).await
    }

    /// What was read, or what is read when the damage that was met is repaired.
    async fn repaired<T>(
        &self,
        mut read: Result<T, ReadError>,
        patience: Option<Duration>,
        again: impl Fn() -> Result<T, ReadError>,
    ) -> Result<T, ReadError> {
        while let Err(ReadError::Damaged { index, .. }) = &read {
            let index = *index;
            let repaired = self.repairs.repaired(&self.log, index, patience).await;
            // It may also have been repaired between the read and the wait.
            let next = again();
            if !repaired && matches!(next, Err(ReadError::Damaged { index: met, .. }) if met == index) {
                return next;
            }
            read = next;
        }
        read
    }
}

/// The first index that `range` names.
fn start_of(range: &impl RangeBounds<u64>) -> Option<u64> {
    match range.start_bound() {
        Bound::Included(start) => Some(*start),
        Bound::Excluded(start) => Some(start + 1),
        Bound::Unbounded => None,
    }
}

impl RaftLogReader<TypeConfig> for LogStore {
    // openraft would read entries from all over the log, the more the more terms there were.
    async fn get_key_log_ids(&mut self, range: RangeInclusive<LogId>) -> Result<Vec<LogId>, io::Error> {
        let (first, last) = range.into_inner();
        let read = || self.log.term_ends(RaftIndex(first.index())..=RaftIndex(last.index()));
        let ends = self.repaired(read(), Some(REPAIR_PATIENCE), read).await.map_err(io::Error::other)?;
        Ok(ends.into_iter().map(log_id).collect())
    }

    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + Send>(
        &mut self,
        range: RB,
    ) -> Result<Vec<Entry>, io::Error> {
        let mut range = self.clamp(&range);
        let mut out = Vec::new();
        while !range.is_empty() {
            let read = self.read_repaired(range.clone(), Some(REPAIR_PATIENCE)).await;
            let part = read.map_err(io::Error::other)?;
            if part.is_empty() {
                return Err(io::Error::other(format!("log has a hole at index {}", range.start)));
            }
            range.start = RaftIndex(range.start.0 + part.len() as u64);
            out.extend(part);
        }
        Ok(out)
    }

    async fn read_vote(&mut self) -> Result<Option<Vote>, io::Error> {
        let Some(bytes) = self.log.vote() else { return Ok(None) };
        let vote = wire::Vote::decode(bytes).map_err(|_| io::Error::other("stored vote is malformed"))?;
        Ok(Some(from_wire_vote(&vote).ok_or_else(|| io::Error::other("stored vote names nobody"))?))
    }

    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> Result<Vec<Entry>, io::Error> {
        match self.read_repaired(self.clamp(&(start..end)), Some(REPAIR_PATIENCE)).await {
            Ok(entries) => Ok(entries),
            // An error would end the group. openraft takes nothing for a heartbeat and asks again; the
            // follower waits, and this replica gives leadership away if another can have it.
            Err(ReadError::Damaged { .. }) => Ok(Vec::new()),
            Err(error) => Err(io::Error::other(error)),
        }
    }

    /// Reads lazily, a bounded part at a time, so that applying a long log needs little memory.
    async fn entries_stream<RB>(&mut self, range: RB) -> impl Stream<Item = Result<Entry, io::Error>> + Send
    where
        RB: RangeBounds<u64> + Clone + Debug + Send,
    {
        let store = self.clone();
        let mut entries = self.clamp(&range);
        // Whoever applies them would pass over those that were purged: refused where they are read.
        entries.start = start_of(&range).map_or(entries.start, RaftIndex).min(entries.start);
        let state = (entries, Vec::new().into_iter());
        stream::unfold(state, move |(mut range, mut part)| {
            let store = store.clone();
            async move {
                if let Some(entry) = part.next() {
                    return Some((Ok(entry), (range, part)));
                }
                if range.is_empty() {
                    return None;
                }
                // Votes and appends go on meanwhile; what is applied would not without this entry.
                match store.read_repaired(range.clone(), None).await {
                    Ok(entries) if entries.is_empty() => {
                        let hole = io::Error::other(format!("log has a hole at index {}", range.start));
                        range.end = range.start;
                        Some((Err(hole), (range, part)))
                    }
                    Ok(entries) => {
                        range.start = RaftIndex(range.start.0 + entries.len() as u64);
                        part = entries.into_iter();
                        part.next().map(|entry| (Ok(entry), (range, part)))
                    }
                    Err(error) => {
                        range.end = range.start;
                        Some((Err(io::Error::other(error)), (range, part)))
                    }
                }
            }
        })
    }
}

impl RaftLogStorage<TypeConfig> for LogStore {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> Result<LogState<TypeConfig>, io::Error> {
        Ok(LogState { last_purged_log_id: self.log.purged().map(log_id), last_log_id: self.log.last().map(log_id) })
    }

    async fn get_log_reader(&mut self) -> Self::LogReader {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> Result<(), io::Error> {
        self.log.save_vote(wire_vote(vote).encode_to_vec().into()).await
    }

    async fn save_committed(&mut self, committed: Option<LogId>) -> Result<(), io::Error> {
        if let Some(committed) = committed {
            self.log.save_committed(position(&committed));
        }
        Ok(())
    }

    async fn read_committed(&mut self) -> Result<Option<LogId>, io::Error> {
        // Past the end, openraft would refuse to start: the log may have lost an unflushed tail
        // that a majority had committed.
        // What is purged says nothing new: the state machine's checkpoint covers it.
        let committed = self.log.committed().min(self.log.last());
        Ok(committed.filter(|committed| Some(*committed) > self.log.purged()).map(log_id))
    }

    async fn append<I>(&mut self, entries: I, callback: IOFlushed<TypeConfig>) -> Result<(), io::Error>
    where
        I: IntoIterator<Item = Entry> + Send,
        I::IntoIter: Send,
    {
        let batches: Vec<Batch> = entries.into_iter().map(into_batch).collect();
        let proposed = batches.iter().rfind(|batch| batch.header.kind != BatchKind::Raft);
        let proposed_term = proposed.map(|batch| batch.header.term.0);
        let flushed = Box::new(move |result: io::Result<()>| callback.io_completed(result));
        // A leader has yet to send the entries to the others, which takes longer than the disk.
        let sends_next = !self.alone && proposed_term.is_some_and(|term| self.appended.is_expected(term));
        let turn = if sends_next {
            self.log.append(batches, flushed).map(|()| None)
        } else {
            self.log.append_or_turn(batches, flushed)
        };
        let turn = turn.map_err(io::Error::other)?;
        proposed_term.into_iter().for_each(|term| self.appended.tell(term));
        if let Some(turn) = turn {
            turn.run();
        }
        Ok(())
    }

    async fn truncate_after(&mut self, last: Option<LogId>) -> Result<(), io::Error> {
        let last = last.as_ref().map(position);
        self.cut(|| self.log.truncate_after(last)).await
    }

    async fn purge(&mut self, through: LogId) -> Result<(), io::Error> {
        let through = position(&through);
        let installed = self.installed.lock().unwrap_or_else(PoisonError::into_inner).take();
        match installed {
            // Entries that follow the snapshot's position stay: they may be all that a majority has.
            Some(snapshot) if snapshot.position == through && self.holds(through).await? => {
                self.log.save_checkpoint(CheckpointKind::Retention, through, snapshot.checkpoint).await?;
                self.cut(|| self.log.purge_through(through)).await
            }
            Some(snapshot) if snapshot.position == through => {
                let checkpoints = vec![(CheckpointKind::Retention, snapshot.checkpoint)];
                self.log.install(through, snapshot.next_offset, checkpoints).await
            }
            _ => self.cut(|| self.log.purge_through(through)).await,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

    use arqon_proto::{BatchBuilder, Compression, GroupId, NodeId, Record, ReplicaId, Term};
    use arqon_storage::{Identity, MemoryDisk, Options, Store};
    use openraft::{EntryPayload, async_runtime::oneshot::Oneshot, impls::TokioRuntime};

    use super::*;
    use crate::types::CommittedLeaderId;

    fn open(disk: &MemoryDisk) -> (Store, LogStore) {
        let identity = Identity { cluster: "test".into(), node: NodeId(1) };
        let store = Store::open_on(Arc::new(disk.clone()), identity, Options::default()).unwrap();
        let (log, _) = store.open_log(GroupId(1), ReplicaId(1)).unwrap();
        (store, LogStore::new(log, InstalledSlot::default(), true, Arc::default()))
    }

    fn entry(index: u64, payload_size: usize) -> Entry {
        let mut builder = BatchBuilder::new();
        builder.push(&Record { payload: vec![1; payload_size].into(), ..Default::default() }).unwrap();
        let batch = builder.build(Compression::None, None);
        Entry { log_id: LogId::new(CommittedLeaderId::new(1), index), payload: EntryPayload::Normal(batch) }
    }

    /// Appends and gives the answer that openraft waits for.
    async fn append(store: &mut LogStore, entries: Vec<Entry>) -> impl Future<Output = io::Result<()>> + use<> {
        type Channel = <TokioRuntime as openraft::AsyncRuntime>::Oneshot;
        let (flushed, answer) = <Channel as Oneshot>::channel();
        RaftLogStorage::append(store, entries, IOFlushed::signal(flushed)).await.unwrap();
        async { answer.await.unwrap() }
    }

    /// Returning before would let openraft's watermark of flushed entries pass over appends that
    /// are still on their way.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_vote_is_a_barrier_behind_everything_appended_before() {
        let (_guard, mut store) = open(&MemoryDisk::new());
        let flushed = Arc::new(AtomicUsize::new(0));
        for round in 0..50 {
            for at in 0..4 {
                let batch = into_batch(entry(round * 4 + at, 5_000));
                let flushed = flushed.clone();
                let count = move |result: io::Result<()>| {
                    result.unwrap();
                    flushed.fetch_add(1, SeqCst);
                };
                store.log.append(vec![batch], Box::new(count)).unwrap();
            }
            let vote = Vote::new(round + 1, 7);
            store.save_vote(&vote).await.unwrap();
            assert_eq!(flushed.load(SeqCst) as u64, (round + 1) * 4);
            assert_eq!(store.read_vote().await.unwrap(), Some(vote));
        }
    }

    #[tokio::test]
    async fn entries_are_readable_before_they_are_flushed_and_flushes_are_reported_in_order() {
        let (_guard, mut store) = open(&MemoryDisk::new());
        let mut answers = Vec::new();
        for index in 0..20 {
            answers.push(append(&mut store, vec![entry(index, 100)]).await);
            let read = store.try_get_log_entries(index..=index).await.unwrap();
            assert_eq!(read[0].log_id.index(), index);
        }
        // The last one durable means that all are.
        answers.pop().unwrap().await.unwrap();
        assert_eq!(store.log.flushed().unwrap().index, RaftIndex(19));
    }

    #[tokio::test]
    async fn reads_are_bounded_in_bytes_and_never_empty() {
        let (_guard, mut store) = open(&MemoryDisk::new());
        let sizes = [300 << 10, 300 << 10, 300 << 10, 300 << 10, 1 << 20, 10];
        let entries = (0..).zip(sizes).map(|(index, size)| entry(index, size)).collect();
        append(&mut store, entries).await.await.unwrap();
        let counts = async |store: &mut LogStore| {
            let (mut start, mut counts) = (0, Vec::new());
            while start < 6 {
                let part = store.limited_get_log_entries(start, 6).await.unwrap();
                assert_eq!(part[0].log_id.index(), start);
                start += part.len() as u64;
                counts.push(part.len());
            }
            counts
        };
        assert_eq!(counts(&mut store).await, [3, 1, 1, 1]);
        // Whoever asks for all gets all.
        assert_eq!(store.try_get_log_entries(..).await.unwrap().len(), 6);
    }

    /// openraft refuses to start when the committed position lies past the log.
    #[tokio::test]
    async fn the_committed_position_never_passes_the_end_of_the_log() {
        let disk = MemoryDisk::new();
        let (guard, mut store) = open(&disk.again());
        append(&mut store, (0..6).map(|index| entry(index, 10)).collect()).await.await.unwrap();
        store.save_committed(Some(LogId::new(CommittedLeaderId::new(1), 5))).await.unwrap();
        assert_eq!(store.read_committed().await.unwrap().unwrap().index(), 5);
        store.truncate_after(Some(LogId::new(CommittedLeaderId::new(1), 2))).await.unwrap();
        assert_eq!(store.read_committed().await.unwrap().unwrap().index(), 2);
        drop(store);
        guard.close().await;
        let (_guard, mut store) = open(&disk.again());
        assert_eq!(store.read_committed().await.unwrap().unwrap().index(), 2);
    }

    /// openraft installs a snapshot also where entries behind it stand in the log already, and goes
    /// on to count on them: they may be what made a majority.
    #[tokio::test]
    async fn a_snapshot_drops_what_follows_it_only_where_the_log_disagrees() {
        let (_guard, mut store) = open(&MemoryDisk::new());
        append(&mut store, (0..6).map(|index| entry(index, 10)).collect()).await.await.unwrap();
        for (term, index, kept) in [(1, 2, 3), (2, 4, 0)] {
            let position = LogPosition { term: Term(term), index: RaftIndex(index) };
            let checkpoint = Bytes::from_static(b"state");
            let installed = Installed { position, next_offset: Offset(index + 1), checkpoint };
            *store.installed.lock().unwrap() = Some(installed);
            store.purge(log_id(position)).await.unwrap();
            assert_eq!(store.log.purged(), Some(position));
            assert_eq!(store.try_get_log_entries(..).await.unwrap().len(), kept);
            assert_eq!(store.log.log_start(), Offset(index + 1));
            assert!(store.log.checkpoints().contains(&(CheckpointKind::Retention, position)));
        }
    }
}
