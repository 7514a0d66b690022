//! One replica without its group: read whole, and, if a majority is lost for good, made the only member.
//!
//! ```text
//!   log of the survivor    ... entry  entry | members: this replica alone | what the caller adds
//!                                           ^ term after every term that it knows
//! ```

use std::{collections::BTreeMap, io};

use arqon_proto::{Batch, GroupId, NodeId, Offset, RaftIndex, ReplicaId, Term, limits, wire};
use arqon_storage::{Log, OpenError, Store};
use futures_util::future::BoxFuture;
use openraft::EntryPayload;
use prost::Message;
use tokio::sync::{oneshot, watch};

use crate::{
    machine::{Machine, StateMachine},
    store::InstalledSlot,
    types::{
        CommittedLeaderId, Entry, LogId, Membership, ReplicaAt, Vote, from_wire_vote, into_batch, into_entry, wire_vote,
    },
};

/// A replica that is not running. Its state machine has applied the whole log, committed or not.
pub struct OfflineReplica {
    log: Log,
    replica: ReplicaId,
    voters: BTreeMap<ReplicaId, NodeId>,
}

impl OfflineReplica {
    /// Opens a replica whose log is in `store` and applies all of it to `machine`.
    ///
    /// # Errors
    /// The log is quarantined or damaged, or the disk failed. Nothing was changed.
    pub fn open(
        store: &Store,
        group: GroupId,
        replica: ReplicaId,
        machine: Box<dyn StateMachine>,
    ) -> Result<Self, OpenError> {
        let io = |source| OpenError::Io { what: format!("replica {replica} of group {group}"), source };
        let (log, _) = store.open_log(group, replica)?;
        let (readable, _) = watch::channel(crate::machine::Readable::default());
        let mut machine = Machine::open(machine, log.clone(), InstalledSlot::default(), readable).map_err(io)?;
        let end = log.last().map_or(0, |last| last.index.0 + 1);
        loop {
            let next = machine.next_index();
            if next >= end {
                break;
            }
            let batches = log.entries(RaftIndex(next)..RaftIndex(end), limits::APPEND_SIZE_MAX);
            let batches = batches.map_err(|error| io(io::Error::other(error)))?;
            if batches.is_empty() {
                return Err(io(io::Error::other(format!("log has a hole at index {next}"))));
            }
            for batch in batches {
                let entry = into_entry(batch).map_err(|reason| io(io::Error::other(reason)))?;
                machine.apply_entry(&entry).map_err(io)?;
            }
        }
        let members = machine.members();
        let node = |id: u64| Some((ReplicaId(id), NodeId(members.get_node(&id)?.node)));
        let voters = members.voter_ids().filter_map(node).collect();
        Ok(Self { log, replica, voters })
    }

    /// The replicas that vote, by the newest membership in the log.
    #[must_use]
    pub fn voters(&self) -> &BTreeMap<ReplicaId, NodeId> {
        &self.voters
    }

    /// Its Raft id.
    #[must_use]
    pub fn replica(&self) -> ReplicaId {
        self.replica
    }

    /// Offset after the last record that is known to be committed.
    ///
    /// # Errors
    /// The log cannot be read there.
    pub fn committed_offset(&self) -> io::Result<Offset> {
        let Some(committed) = self.log.committed().filter(|at| Some(*at) > self.log.purged()) else {
            return Ok(self.log.log_start());
        };
        let found = self.log.entries(committed.index..committed.index.next(), 1).map_err(io::Error::other)?;
        Ok(found.first().map_or(self.log.log_start(), |batch| batch.header.next_offset()))
    }

    /// First offset that is kept, and the offset after the last record, committed or not.
    #[must_use]
    pub fn offsets(&self) -> (Offset, Offset) {
        (self.log.log_start(), self.log.next_offset())
    }

    /// Makes this replica, on `node`, the only member, and adds `entries` behind that. What other replicas
    /// have beyond the end of this log is given up. Durable on return.
    ///
    /// # Errors
    /// The disk failed.
    pub fn become_only_member(&self, node: NodeId, entries: Vec<Batch>) -> BoxFuture<'_, io::Result<()>> {
        Box::pin(async move {
            let vote = self.log.vote().and_then(|bytes| from_wire_vote(&wire::Vote::decode(bytes).ok()?));
            let last = self.log.last();
            let known = vote.map_or(0, |vote| vote.leader_id.term).max(last.map_or(0, |last| last.term.0));
            let term = known + 1;
            let id = self.replica.0;
            self.log.save_vote(wire_vote(&Vote::new_committed(term, id)).encode_to_vec().into()).await?;
            let index = last.map_or(0, |last| last.index.0 + 1);
            let nodes = BTreeMap::from([(id, ReplicaAt { node: node.0 })]);
            let members = Membership::new(vec![[id].into()], nodes).map_err(io::Error::other)?;
            let log_id = LogId::new(CommittedLeaderId::new(term), index);
            let mut batches = vec![into_batch(Entry { log_id, payload: EntryPayload::Membership(members) })];
            for (at, mut batch) in (index + 1..).zip(entries) {
                (batch.header.term, batch.header.index) = (Term(term), RaftIndex(at));
                batches.push(batch);
            }
            let (done, flushed) = oneshot::channel();
            // Whoever waits is below.
            let on_flushed = Box::new(move |result| drop(done.send(result)));
            self.log.append(batches, on_flushed).map_err(io::Error::other)?;
            flushed.await.unwrap_or_else(|_| Err(io::Error::other("the log was closed")))
        })
    }
}
