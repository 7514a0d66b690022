//! openraft's log storage over one [`arqon_storage::Log`].
//!
//! The segment log does the work; this file turns entries into batches and keeps openraft's
//! contract: `append` returns once entries are readable and reports the flush later, a vote is
//! a barrier, `read_committed` never passes the log's end, reads are bounded in bytes.

use std::{
    fmt::Debug,
    io,
    ops::{Bound, RangeBounds},
    sync::{Arc, Mutex, PoisonError},
};

use arqon_proto::{Offset, RaftIndex, limits, wire};
use arqon_storage::{CheckpointKind, Log, LogPosition};
use bytes::Bytes;
use futures_util::{Stream, stream};
use openraft::storage::{IOFlushed, LogState, RaftLogReader, RaftLogStorage};
use prost::Message;

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

/// The log of one group as openraft sees it; also its own reader.
#[derive(Clone)]
pub(crate) struct LogStore {
    log: Log,
    installed: InstalledSlot,
}

impl LogStore {
    pub(crate) fn new(log: Log, installed: InstalledSlot) -> Self {
        Self { log, installed }
    }

    /// The index range that `range` asks for, cut to what the log holds.
    fn clamp(&self, range: &impl RangeBounds<u64>) -> std::ops::Range<RaftIndex> {
        let start = match range.start_bound() {
            Bound::Included(start) => *start,
            Bound::Excluded(start) => start + 1,
            Bound::Unbounded => 0,
        };
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

    /// Entries from `start`, at most `size_max` bytes of them, at least one.
    fn read(&self, range: std::ops::Range<RaftIndex>, size_max: usize) -> io::Result<Vec<Entry>> {
        if range.is_empty() {
            return Ok(Vec::new());
        }
        let batches = self.log.entries(range, size_max).map_err(io::Error::other)?;
        batches.into_iter().map(|batch| into_entry(batch).map_err(io::Error::other)).collect()
    }
}

impl RaftLogReader<TypeConfig> for LogStore {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + Send>(
        &mut self,
        range: RB,
    ) -> Result<Vec<Entry>, io::Error> {
        let mut range = self.clamp(&range);
        let mut out = Vec::new();
        while !range.is_empty() {
            let part = self.read(range.clone(), limits::APPEND_SIZE_MAX)?;
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
        self.read(self.clamp(&(start..end)), limits::APPEND_SIZE_MAX)
    }

    /// Reads lazily, a bounded part at a time, so that applying a long log needs little memory.
    async fn entries_stream<RB>(&mut self, range: RB) -> impl Stream<Item = Result<Entry, io::Error>> + Send
    where
        RB: RangeBounds<u64> + Clone + Debug + Send,
    {
        let store = self.clone();
        let state = (self.clamp(&range), Vec::new().into_iter());
        stream::unfold(state, move |(mut range, mut part)| {
            let store = store.clone();
            async move {
                if let Some(entry) = part.next() {
                    return Some((Ok(entry), (range, part)));
                }
                if range.is_empty() {
                    return None;
                }
                match store.read(range.clone(), limits::APPEND_SIZE_MAX) {
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
                        Some((Err(error), (range, part)))
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
        let batches = entries.into_iter().map(into_batch).collect();
        let flushed = Box::new(move |result: io::Result<()>| callback.io_completed(result));
        self.log.append(batches, flushed).map_err(io::Error::other)
    }

    async fn truncate_after(&mut self, last: Option<LogId>) -> Result<(), io::Error> {
        let from = last.map_or(RaftIndex(0), |last| RaftIndex(last.index() + 1));
        self.log.truncate_from(from).await
    }

    async fn purge(&mut self, through: LogId) -> Result<(), io::Error> {
        let through = position(&through);
        let installed = self.installed.lock().unwrap_or_else(PoisonError::into_inner).take();
        match installed {
            Some(snapshot) if snapshot.position == through => {
                let checkpoints = vec![(CheckpointKind::Retention, snapshot.checkpoint)];
                self.log.install(through, snapshot.next_offset, checkpoints).await
            }
            _ => self.log.purge_through(through).await,
        }
    }
}
