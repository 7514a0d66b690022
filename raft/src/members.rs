//! Changes of a group's members, one step at a time.
//!
//! ```text
//!   wanted, not a member                     -> made a learner
//!   a wanted learner lacks entries,
//!     or may not vote yet                    -> wait
//!   the leader goes, a wanted voter is there -> leadership goes to that one; it does the rest
//!   the leader goes, no wanted voter is there-> the wanted ones become voters beside it
//!   voters other than wanted, or two sets    -> joint change to those wanted
//!   a learner that is not wanted             -> removed
//! ```
//!
//! Each step begins from what the group's log says, so whoever leads next goes on where the last
//! leader stopped, also when what is wanted has changed meanwhile.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use arqon_proto::{NodeId, ReplicaId};
use futures_util::future::BoxFuture;
use openraft::{
    ChangeMembers, ServerState,
    errors::{ClientWriteError, RaftError},
};
use tokio::time::timeout;

use crate::{
    group::{CAUGHT_UP_LAG_MAX, Group, ProposeError},
    types::{ReplicaAt, TypeConfig},
};

/// A step that is not committed by then is looked at anew.
const STEP_PATIENCE: Duration = Duration::from_secs(10);

/// Who is to be a member.
#[derive(Clone, Debug)]
pub struct WantedMembers {
    /// The replicas, with their nodes.
    pub replicas: BTreeMap<ReplicaId, NodeId>,
    /// Those that may vote once they have caught up; a voter stays one. The others are learners.
    pub eligible: BTreeSet<ReplicaId>,
    /// Nodes that can be reached now: others do not get leadership.
    pub reachable: BTreeSet<NodeId>,
    /// Whether each replica is taken in and let go by itself, as it can be. Otherwise those that go
    /// stay until all that come have caught up, so that there are never fewer copies.
    pub one_by_one: bool,
}

/// What is left of a change of members.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MembersStep {
    /// The voters are those wanted, and there is nobody else.
    Done,
    /// A new replica copies the log.
    CatchingUp {
        /// Entries that the one farthest behind lacks.
        behind: u64,
    },
    /// Leadership was given to a replica that stays.
    HandedOver,
    /// A change was committed; the next step may be taken at once.
    Changed,
}

/// Members as this replica's log has them.
struct Members {
    nodes: BTreeMap<u64, ReplicaAt>,
    voters: BTreeSet<u64>,
    is_joint: bool,
    /// Whether a majority has what is above, so that no other leader can have it otherwise.
    is_committed: bool,
    /// Entries that each other replica lacks; none for one that has not answered.
    lags: BTreeMap<u64, Option<u64>>,
}

impl Members {
    fn of(group: &Group) -> Option<Self> {
        let metrics = group.raft().metrics();
        let metrics = openraft::async_runtime::watch::WatchReceiver::borrow_watched(&metrics);
        if metrics.state != ServerState::Leader {
            return None;
        }
        let membership = metrics.membership_config.membership();
        let last_index = metrics.last_log_index.unwrap_or_default();
        let lag = |matching: Option<u64>| matching.map(|index| last_index.saturating_sub(index));
        let targets = metrics.replication.iter().flatten();
        Some(Self {
            nodes: membership.nodes().map(|(id, at)| (*id, *at)).collect(),
            voters: membership.voter_ids().collect(),
            is_joint: membership.get_joint_config().len() > 1,
            is_committed: metrics.committed_membership_config.log_id() == metrics.membership_config.log_id(),
            lags: targets.map(|(id, matching)| (*id, lag(matching.as_ref().map(|id| id.index())))).collect(),
        })
    }
}

impl Group {
    /// Whether the members of the group, as far as this replica knows, are voters on just the
    /// `wanted` replicas.
    #[must_use]
    pub fn has_members(&self, wanted: &BTreeMap<ReplicaId, NodeId>) -> bool {
        let metrics = self.raft().server_metrics();
        let metrics = openraft::async_runtime::watch::WatchReceiver::borrow_watched(&metrics);
        let membership = metrics.membership_config.membership();
        membership.get_joint_config().len() == 1
            && membership.voter_ids().count() == wanted.len()
            && membership.nodes().count() == wanted.len()
            && membership.voter_ids().all(|id| wanted.contains_key(&ReplicaId(id)))
    }

    /// The replicas that vote, with their nodes, as far as this replica knows.
    #[must_use]
    pub fn voters(&self) -> BTreeMap<ReplicaId, NodeId> {
        let metrics = self.raft().server_metrics();
        let metrics = openraft::async_runtime::watch::WatchReceiver::borrow_watched(&metrics);
        let membership = metrics.membership_config.membership();
        let node = |id: &u64| Some((ReplicaId(*id), NodeId(membership.get_node(id)?.node)));
        membership.voter_ids().filter_map(|id| node(&id)).collect()
    }

    /// Takes the next step towards voters on just the `wanted` replicas; see the table above. Called
    /// again until it is [`MembersStep::Done`], by one task at a time. Every change needs majorities
    /// of the voters before it and after it, so that a replica that is away may be replaced. When it is done,
    /// a majority has the last change: nobody else is or becomes a member without another one.
    ///
    /// # Errors
    /// `NotLeader`; `UnknownOutcome` when the step was not committed in time: look again.
    pub fn step_members<'a>(&'a self, wanted: &'a WantedMembers) -> BoxFuture<'a, Result<MembersStep, ProposeError>> {
        Box::pin(async move {
            let not_leader = || ProposeError::NotLeader { leader: self.leader() };
            if !self.is_ready() || wanted.replicas.is_empty() {
                return Err(not_leader());
            }
            let Some(members) = Members::of(self) else { return Err(not_leader()) };
            let wanted_ids: BTreeSet<u64> = wanted.replicas.keys().map(|replica| replica.0).collect();
            let mut others = wanted.replicas.iter();
            if let Some((replica, node)) = others.find(|(replica, _)| !members.nodes.contains_key(&replica.0)) {
                let at = BTreeMap::from([(replica.0, ReplicaAt { node: node.0 })]);
                return self.change(ChangeMembers::AddNodes(at)).await;
            }
            let lag = |id: &u64| members.lags.get(id).copied().flatten().unwrap_or(u64::MAX);
            let is_eligible = |id: &u64| wanted.eligible.contains(&ReplicaId(*id));
            let waits = |id: &&u64| lag(id) > CAUGHT_UP_LAG_MAX || !is_eligible(id);
            let behind = wanted_ids.difference(&members.voters).filter(waits).map(lag).max();
            let mut voters = wanted_ids.clone();
            if wanted.one_by_one {
                voters.retain(|id| members.voters.contains(id) || !waits(&id));
            }
            if members.voters != voters || members.is_joint {
                if let Some(behind) = behind.filter(|_| !wanted.one_by_one || voters.is_empty()) {
                    return Ok(MembersStep::CatchingUp { behind });
                }
                if !voters.contains(&self.replica().0) {
                    return self.leave(&members, voters, &wanted.reachable).await;
                }
                return self.change(ChangeMembers::ReplaceAllVoters(voters)).await;
            }
            let surplus: BTreeSet<u64> = members.nodes.keys().copied().filter(|id| !wanted_ids.contains(id)).collect();
            if !surplus.is_empty() {
                return self.change(ChangeMembers::RemoveNodes(surplus)).await;
            }
            match behind {
                Some(behind) => Ok(MembersStep::CatchingUp { behind }),
                None if members.is_committed => Ok(MembersStep::Done),
                None => Ok(MembersStep::Changed),
            }
        })
    }

    /// This replica leads and is not to stay.
    async fn leave(
        &self,
        members: &Members,
        mut wanted: BTreeSet<u64>,
        reachable: &BTreeSet<NodeId>,
    ) -> Result<MembersStep, ProposeError> {
        let lag = |id: &u64| members.lags.get(id).copied().flatten();
        let is_reachable = |id: &u64| members.nodes.get(id).is_some_and(|at| reachable.contains(&NodeId(at.node)));
        let staying = wanted.iter().filter(|id| members.voters.contains(id) && is_reachable(id));
        let heir = staying.filter_map(|id| Some((lag(id)?, *id))).min();
        match heir {
            Some((behind, heir)) if behind <= CAUGHT_UP_LAG_MAX => {
                self.transfer_to(heir).await.map(|()| MembersStep::HandedOver)
            }
            Some((behind, _)) => Ok(MembersStep::CatchingUp { behind }),
            None => {
                wanted.insert(self.replica().0);
                self.change(ChangeMembers::ReplaceAllVoters(wanted)).await
            }
        }
    }

    async fn change(&self, change: ChangeMembers<u64, ReplicaAt>) -> Result<MembersStep, ProposeError> {
        let unknown = |reason: String| ProposeError::UnknownOutcome(reason);
        // Voters that go leave the group whole: nobody sends them entries any more.
        match timeout(STEP_PATIENCE, self.raft().change_membership(change, false)).await {
            Err(_) => Err(unknown("the change of members is not committed yet".to_owned())),
            Ok(Ok(_)) => Ok(MembersStep::Changed),
            Ok(Err(RaftError::Fatal(fatal))) => Err(ProposeError::Stopped(fatal.to_string())),
            Ok(Err(RaftError::APIError(error))) => Err(refused(&error)),
        }
    }
}

fn refused(error: &ClientWriteError<TypeConfig>) -> ProposeError {
    match error {
        ClientWriteError::ForwardToLeader(to) => {
            ProposeError::NotLeader { leader: to.leader_node.map(|at| NodeId(at.node)) }
        }
        other => ProposeError::UnknownOutcome(other.to_string()),
    }
}
