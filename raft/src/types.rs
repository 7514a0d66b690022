//! The types that openraft is instantiated with, and their wire forms.

use std::collections::BTreeSet;

use arqon_proto::{Batch, BatchKind, Offset, RaftIndex, Term, wire};
use arqon_storage::LogPosition;
use bytes::Bytes;
use openraft::{EntryPayload, impls::leader_id_std};
use prost::Message;
use tokio::sync::{OwnedSemaphorePermit, oneshot};

/// Where a replica lives. Addresses come from the host's directory, so that a node may move
/// without a membership change.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct ReplicaAt {
    pub node: u64,
}

/// What became of a proposal, as the state machine answered it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Applied {
    /// Position of the entry.
    pub position: LogPosition,
    /// Offset of its first record (for control entries: of the next data record).
    pub base_offset: Offset,
    /// Time of the batch in ms since 1970.
    pub time_ms: u64,
    /// The state machine's own answer.
    pub outcome: Bytes,
}

/// One Raft group: a log of batches, standard Raft leader ids (one leader a term).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct TypeConfig;

impl openraft::RaftTypeConfig for TypeConfig {
    type D = Batch;
    type R = Option<Applied>;
    type NodeId = u64;
    type Node = ReplicaAt;
    type Term = u64;
    type LeaderId = leader_id_std::LeaderId<u64, u64>;
    type Vote = openraft::impls::Vote<Self::LeaderId>;
    type Payload = EntryPayload<Batch, u64, ReplicaAt>;
    type Entry = openraft::Entry<<Self::LeaderId as openraft::vote::RaftLeaderId>::Committed, Self::Payload>;
    type AsyncRuntime = openraft::impls::TokioRuntime;
    type Responder<T>
        = Reply<T>
    where
        T: openraft::OptionalSend + 'static;
    type Batch<T>
        = openraft::impls::InlineBatch<T>
    where
        T: openraft::OptionalSend + 'static;
    type ErrorSource = openraft::impls::BoxedErrorSource;
}

/// Where the outcome of a proposal goes. Carries the proposal's share of the bytes that may wait
/// to be committed, which openraft gives back with the outcome, whoever still listens.
pub(crate) struct Reply<T> {
    pub outcome: oneshot::Sender<T>,
    pub share: OwnedSemaphorePermit,
}

impl<T: Send + 'static> openraft::raft::responder::Responder<TypeConfig, T> for Reply<T> {
    fn on_complete(self, result: T) {
        drop(self.share);
        // Whoever proposed may have gone.
        drop(self.outcome.send(result));
    }
}

pub(crate) type LogId = openraft::alias::LogIdOf<TypeConfig>;
pub(crate) type CommittedLeaderId = openraft::alias::CommittedLeaderIdOf<TypeConfig>;
pub(crate) type Vote = openraft::alias::VoteOf<TypeConfig>;
pub(crate) type Entry = openraft::alias::EntryOf<TypeConfig>;
pub(crate) type Membership = openraft::Membership<u64, ReplicaAt>;
pub(crate) type StoredMembership = openraft::alias::StoredMembershipOf<TypeConfig>;
pub(crate) type SnapshotMeta = openraft::alias::SnapshotMetaOf<TypeConfig>;
pub(crate) type Snapshot = openraft::alias::SnapshotOf<TypeConfig, Bytes>;

pub(crate) fn log_id(position: LogPosition) -> LogId {
    LogId::new(CommittedLeaderId::new(position.term.0), position.index.0)
}

pub(crate) fn position(id: &LogId) -> LogPosition {
    LogPosition { term: Term(id.committed_leader_id().term), index: RaftIndex(id.index()) }
}

pub(crate) fn wire_log_id(id: &LogId) -> wire::LogId {
    wire::LogId { term: id.committed_leader_id().term, index: id.index() }
}

pub(crate) fn from_wire_log_id(id: wire::LogId) -> LogId {
    LogId::new(CommittedLeaderId::new(id.term), id.index)
}

pub(crate) fn wire_vote(vote: &Vote) -> wire::Vote {
    wire::Vote { term: vote.leader_id.term, voted_for: Some(vote.leader_id.voted_for), committed: vote.committed }
}

/// A vote from the wire or the disk; `None` when it names nobody.
pub(crate) fn from_wire_vote(vote: &wire::Vote) -> Option<Vote> {
    let leader_id = leader_id_std::LeaderId { term: vote.term, voted_for: vote.voted_for? };
    Some(Vote { leader_id, committed: vote.committed })
}

pub(crate) fn wire_membership(membership: &Membership) -> wire::Membership {
    let configs = membership.get_joint_config().iter();
    wire::Membership {
        configs: configs.map(|set| wire::ReplicaSet { replicas: set.iter().copied().collect() }).collect(),
        nodes: membership
            .nodes()
            .map(|(replica, at)| wire::ReplicaNode { replica: *replica, node: at.node, peer_address: String::new() })
            .collect(),
    }
}

/// A membership from the wire or the disk; `None` when its sets and nodes contradict.
pub(crate) fn from_wire_membership(membership: wire::Membership) -> Option<Membership> {
    let configs: Vec<BTreeSet<u64>> =
        membership.configs.into_iter().map(|set| set.replicas.into_iter().collect()).collect();
    let nodes: std::collections::BTreeMap<u64, ReplicaAt> =
        membership.nodes.into_iter().map(|at| (at.replica, ReplicaAt { node: at.node })).collect();
    if configs.is_empty() && nodes.is_empty() {
        return Some(Membership::default());
    }
    Membership::new(configs, nodes).ok()
}

/// The batch that stands for an entry in the log: data and control batches as they are, the
/// rest as kind `raft`.
pub(crate) fn into_batch(entry: Entry) -> Batch {
    let at = position(&entry.log_id);
    let internal = |entry| {
        let record = wire::RaftRecord { entry: Some(entry) };
        Batch::internal(BatchKind::Raft, record.encode_to_vec().into())
    };
    let mut batch = match entry.payload {
        EntryPayload::Normal(batch) => batch,
        EntryPayload::Blank => internal(wire::raft_record::Entry::Blank(true)),
        EntryPayload::Membership(m) => internal(wire::raft_record::Entry::Membership(wire_membership(&m))),
    };
    batch.header.term = at.term;
    batch.header.index = at.index;
    batch
}

/// The entry that a batch of the log stands for.
///
/// # Errors
/// A Raft batch whose message is malformed; the text says which.
pub(crate) fn into_entry(batch: Batch) -> Result<Entry, String> {
    let at = LogPosition { term: batch.header.term, index: batch.header.index };
    let log_id = log_id(at);
    if batch.header.kind != BatchKind::Raft {
        return Ok(Entry { log_id, payload: EntryPayload::Normal(batch) });
    }
    let malformed = || format!("raft entry {}-{} is malformed", at.term, at.index);
    let record = wire::RaftRecord::decode(batch.records).map_err(|_| malformed())?;
    let payload = match record.entry.ok_or_else(malformed)? {
        wire::raft_record::Entry::Blank(_) => EntryPayload::Blank,
        wire::raft_record::Entry::Membership(m) => {
            EntryPayload::Membership(from_wire_membership(m).ok_or_else(malformed)?)
        }
    };
    Ok(Entry { log_id, payload })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_survive_the_log_format() {
        let nodes: std::collections::BTreeMap<u64, ReplicaAt> =
            (1..=4).map(|n| (n, ReplicaAt { node: n + 10 })).collect();
        let joint = vec![BTreeSet::from([1, 2, 3]), BTreeSet::from([2, 3, 4])];
        let membership = Membership::new(joint, nodes).unwrap();
        for payload in [EntryPayload::Blank, EntryPayload::Membership(membership)] {
            let id = LogId::new(CommittedLeaderId::new(7), 9);
            let entry = Entry { log_id: id, payload: payload.clone() };
            let back = into_entry(into_batch(entry)).unwrap();
            assert_eq!((back.log_id, back.payload), (id, payload));
        }
    }

    #[test]
    fn votes_survive_the_wire() {
        for committed in [false, true] {
            let vote = Vote { leader_id: leader_id_std::LeaderId { term: 3, voted_for: 8 }, committed };
            assert_eq!(from_wire_vote(&wire_vote(&vote)), Some(vote));
        }
        assert_eq!(from_wire_vote(&wire::Vote { term: 3, voted_for: None, committed: false }), None);
    }
}
