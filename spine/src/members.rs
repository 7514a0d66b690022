//! Makes the members of Raft groups what the metadata says.
//!
//! ```text
//!   leader of a partition        its voters are not those wanted: one step after the other (arqon_raft)
//!                                they are, and a move was under way: FinishMove
//!   leader of the metadata       its own voters: one replica on every node, once the node has been seen: one that
//!                                votes and is lost before that would be taken for a new one, and vote again
//!                                a replica is quarantined somewhere: ReplaceReplica, one at a time
//!                                a partition has too few copies: ExtendPartition, one at a time
//! ```
//!
//! Everything goes by the metadata and the group's log as they are now, so whoever leads next goes on.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, PoisonError},
    time::Duration,
};

use arqon_proto::{GroupId, NodeId, ReplicaId, wire};
use arqon_raft::{Group, MembersStep, WantedMembers};
use bytes::{Buf, BufMut, Bytes, BytesMut};
use futures_util::{StreamExt, stream};
use prost::Message;
use tokio::time::{sleep, timeout};
use wire::{ErrorCode, metadata_command::Command};

use crate::{
    broker::{Broker, Report},
    error::{error, invalid, not_found, not_leader},
    metadata::{MetadataState, Topic, metadata_replica, wanted_replicas},
};

/// The kind under which the leader of a partition is asked to hand over.
pub(crate) const TRANSFER_KIND: &str = "transfer-leader";

/// The phase of a change whose new replica has not answered.
const WAITS: &str = "waits for the new replica";
/// How long a removal waits for the node to be no voter any more.
const LEAVE_PATIENCE: Duration = Duration::from_secs(20);
/// How often a change is looked at while there is one, and while there is none.
const BUSY_INTERVAL: Duration = Duration::from_millis(200);
const IDLE_INTERVAL: Duration = Duration::from_secs(1);
/// Partitions led here whose replicas change at the same time: each copies a log.
const CHANGE_COUNT_MAX: usize = 4;
const REPLACE_INTERVAL: Duration = Duration::from_secs(2);
/// How long a transfer of leadership may take.
const TRANSFER_PATIENCE: Duration = Duration::from_secs(5);

/// A replica that may not be trusted any more.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub(crate) struct LostReplica {
    /// Its group.
    #[prost(uint64, tag = "1")]
    pub group: u64,
    /// Its number.
    #[prost(uint64, tag = "2")]
    pub replica: u64,
}

/// How far a change of replicas is.
#[derive(Clone, PartialEq, Eq, Message)]
pub(crate) struct Progress {
    /// The group.
    #[prost(uint64, tag = "1")]
    pub group: u64,
    /// One line.
    #[prost(string, tag = "2")]
    pub phase: String,
    /// Entries that the new replica farthest behind lacks.
    #[prost(uint64, tag = "3")]
    pub behind: u64,
}

/// A group led here whose members are to change.
struct Change {
    group: Group,
    wanted: WantedMembers,
    /// What the metadata is told when it is done.
    finish: Option<wire::FinishMoveCommand>,
}

impl Broker {
    /// Changes members until stopped.
    pub(crate) async fn run_members(self: Arc<Self>) {
        let mut stopping = self.stopping.subscribe();
        let mut published = self.metadata.watch();
        loop {
            let mut state = published.borrow_and_update().clone();
            let mut changes = self.changes(&state.state);
            let interval = if changes.is_empty() { IDLE_INTERVAL } else { BUSY_INTERVAL };
            let round = async {
                if !changes.is_empty() {
                    // What was wanted before is not brought back: its replica may be gone.
                    if !self.metadata.refresh().await {
                        return sleep(interval).await;
                    }
                    state = published.borrow_and_update().clone();
                    changes = self.changes(&state.state);
                }
                self.forget_moves(&state.state);
                stream::iter(changes).for_each_concurrent(CHANGE_COUNT_MAX, |change| self.step(change)).await;
                sleep(interval).await;
            };
            tokio::select! {
                () = round => {}
                _ = stopping.wait_for(|stopping| *stopping) => return,
            }
        }
    }

    fn changes(&self, state: &MetadataState) -> Vec<Change> {
        if self.metadata.is_starting() {
            return Vec::new();
        }
        let nodes = state.nodes().iter().map(|info| NodeId(info.node));
        let reachable: BTreeSet<NodeId> = nodes.filter(|node| self.host.peer_reachable(*node)).collect();
        let is_reachable = |wanted: &BTreeMap<ReplicaId, NodeId>, group: &Group| {
            let voters = group.voters();
            let mut new = wanted.iter().filter(|(replica, _)| !voters.contains_key(replica));
            new.all(|(_, node)| reachable.contains(node))
        };
        let mut changes = Vec::new();
        let metadata = self.metadata.group();
        if metadata.is_ready() {
            let voters = metadata.voters();
            let all = state.nodes().iter().map(|info| (ReplicaId(metadata_replica(info)), NodeId(info.node)));
            // One that is away keeps nobody else from becoming a voter.
            let replicas: BTreeMap<_, _> =
                all.filter(|(replica, node)| voters.contains_key(replica) || reachable.contains(node)).collect();
            if !metadata.has_members(&replicas) {
                let seen = state.nodes().iter().filter(|info| info.seen);
                let eligible = seen.map(|info| ReplicaId(metadata_replica(info))).collect();
                let wanted = WantedMembers { replicas, eligible, reachable: reachable.clone(), one_by_one: true };
                changes.push(Change { group: metadata.clone(), wanted, finish: None });
            }
        }
        let waiting: Vec<u64> = self
            .moves
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .values()
            .filter(|progress| progress.phase == WAITS)
            .map(|progress| progress.group)
            .collect();
        let mut copying_count = 0;
        for placement in state.topics().flat_map(|topic| &topic.partitions) {
            let Some(partition) = self.replicas.get(GroupId(placement.group)) else { continue };
            let group = partition.group();
            if !group.is_ready() {
                continue;
            }
            let wanted: BTreeMap<_, _> =
                wanted_replicas(placement).iter().map(|at| (ReplicaId(at.replica), NodeId(at.node))).collect();
            let is_moving = !placement.target.is_empty();
            // Those that wait for a replica that does not answer keep no others from their turn.
            let is_waiting = waiting.contains(&placement.group);
            if (is_waiting || copying_count < CHANGE_COUNT_MAX)
                && (is_moving || !group.has_members(&wanted))
                && is_reachable(&wanted, group)
            {
                copying_count += usize::from(!is_waiting);
                let target = placement.target.iter().map(|at| at.replica).collect();
                let finish = is_moving.then_some(wire::FinishMoveCommand { group: placement.group, target });
                let eligible = wanted.keys().copied().collect();
                let wanted =
                    WantedMembers { replicas: wanted, eligible, reachable: reachable.clone(), one_by_one: false };
                changes.push(Change { group: group.clone(), wanted, finish });
            }
        }
        changes
    }

    async fn step(&self, change: Change) {
        let Change { group, wanted, finish } = change;
        let id = group.id();
        let (phase, behind) = match group.step_members(&wanted).await {
            Ok(MembersStep::Done) => {
                if let Some(finish) = finish {
                    let command = Command::FinishMove(finish);
                    if let Err(refused) = self.metadata.submit(command).await {
                        tracing::debug!(group = id.0, refused = refused.message, "move not finished");
                    } else {
                        tracing::info!(group = id.0, "replicas have changed");
                    }
                }
                ("ends".to_owned(), 0)
            }
            Ok(MembersStep::CatchingUp { behind: u64::MAX }) => (WAITS.to_owned(), 0),
            Ok(MembersStep::CatchingUp { behind }) => ("copies the log".to_owned(), behind),
            Ok(MembersStep::HandedOver) => ("hands leadership over".to_owned(), 0),
            Ok(MembersStep::Changed) => ("changes the voters".to_owned(), 0),
            Err(cause) => (cause.to_string(), 0),
        };
        let progress = Progress { group: id.0, phase, behind };
        self.moves.lock().unwrap_or_else(PoisonError::into_inner).insert(id, progress);
    }

    // What is settled, or led elsewhere by now, is not told any more.
    fn forget_moves(&self, state: &MetadataState) {
        let mut moves = self.moves.lock().unwrap_or_else(PoisonError::into_inner);
        moves.retain(|group, _| {
            let is_moving = |at: &wire::PartitionPlacement| at.group == group.0 && !at.target.is_empty();
            let moving = state.topics().flat_map(|topic| &topic.partitions).any(is_moving);
            moving && self.replicas.get(*group).is_some_and(|partition| partition.group().is_ready())
        });
    }

    /// On the leader of the metadata: gives quarantined replicas successors, and partitions the copies that
    /// they lack, until stopped.
    pub(crate) async fn run_replacements(self: Arc<Self>) {
        let mut stopping = self.stopping.subscribe();
        loop {
            tokio::select! {
                () = sleep(REPLACE_INTERVAL) => {}
                _ = stopping.wait_for(|stopping| *stopping) => return,
            }
            if !self.metadata.group().is_ready() || self.metadata.is_starting() {
                continue;
            }
            let published = self.metadata.published();
            if let Some(group) = published.state.to_extend() {
                let command = Command::ExtendPartition(wire::ExtendPartitionCommand { group });
                if let Err(refused) = self.metadata.submit(command).await {
                    tracing::debug!(refused = refused.message, "partition not extended");
                }
            }
            let reports = self.reports().await;
            if let Some(lost) = to_replace(&published.state, &reports) {
                tracing::warn!(group = lost.group, replica = lost.replica, "replacing a quarantined replica");
                let command = wire::ReplaceReplicaCommand { group: lost.group, replica: lost.replica };
                if let Err(refused) = self.metadata.submit(Command::ReplaceReplica(command)).await {
                    tracing::debug!(refused = refused.message, "replica not replaced");
                }
            }
        }
    }

    /// Makes `to` the node where leadership of the partition belongs, and gives it there.
    ///
    /// # Errors
    /// TARGET_NOT_FOUND, VALIDATION_ERROR naming `to`, or NOT_LEADER when it did not take over in time.
    pub(crate) async fn move_leader(&self, topic: &Topic, partition: u32, to: NodeId) -> Result<(), wire::Error> {
        let name = format!("{}/{partition}", topic.config.name);
        let placement = topic.partitions.get(partition as usize).ok_or_else(|| not_found("partition", &name))?;
        if !self.host.peer_reachable(to) {
            return Err(invalid("to", format!("node {to} cannot be reached")));
        }
        let command = wire::PreferLeaderCommand { group: placement.group, node: to.0 };
        self.metadata.submit(Command::PreferLeader(command)).await?;
        self.metadata.refresh().await;
        let mut request = BytesMut::new();
        request.put_u64_le(placement.group);
        request.put_u64_le(to.0);
        let request = request.freeze();
        let moved = async {
            loop {
                let leader = self.reports().await.into_iter().find(|(_, report)| report.led.contains(&placement.group));
                match leader {
                    Some((leader, _)) if leader == to => return,
                    // Refused while the heir lacks entries: asked again.
                    Some((leader, _)) => drop(self.host.forward(leader, TRANSFER_KIND, request.clone()).await),
                    None => {}
                }
                sleep(BUSY_INTERVAL).await;
            }
        };
        let late = || format!("node {to} has not taken {name} over yet; it will when it has caught up");
        timeout(TRANSFER_PATIENCE, moved).await.map_err(|_| wire::Error { message: late(), ..not_leader(None) })
    }

    pub(crate) async fn handle_transfer(&self, mut body: &[u8]) -> Result<Bytes, String> {
        let malformed = || "a malformed request".to_owned();
        let group = body.try_get_u64_le().map_err(|_| malformed())?;
        let to = NodeId(body.try_get_u64_le().map_err(|_| malformed())?);
        let partition = self.replicas.get(GroupId(group)).ok_or("no replica here")?;
        if !partition.group().is_caught_up(to) {
            return Err(format!("node {to} has not caught up"));
        }
        partition.group().transfer_leader(to).await.map_err(|cause| cause.to_string())?;
        Ok(Bytes::new())
    }

    /// The changes of replicas under way, as far as `reports` tell.
    pub(crate) fn move_statuses<'a>(
        topics: impl Iterator<Item = &'a Arc<Topic>>,
        reports: &[(NodeId, Report)],
    ) -> Vec<wire::MoveStatus> {
        let mut statuses = Vec::new();
        for topic in topics {
            for (partition, at) in topic.partitions.iter().enumerate().filter(|(_, at)| !at.target.is_empty()) {
                let nodes = |list: &[wire::ReplicaNode], other: &[wire::ReplicaNode]| {
                    let is_new = |at: &&wire::ReplicaNode| other.iter().all(|known| known.replica != at.replica);
                    list.iter().filter(is_new).map(|at| at.node).collect()
                };
                // Those that were to come, and may have come, go as well.
                let were_wanted = [at.replicas.as_slice(), &at.extra].concat();
                let mut told = reports.iter().flat_map(|(_, report)| &report.moves);
                let progress = told.find(|progress| progress.group == at.group).cloned().unwrap_or_default();
                statuses.push(wire::MoveStatus {
                    tenant: topic.config.tenant.clone(),
                    topic: topic.config.name.clone(),
                    partition: partition as u32,
                    from: nodes(&were_wanted, &at.target),
                    to: nodes(&at.target, &at.replicas),
                    phase: progress.phase,
                    behind: progress.behind,
                });
            }
        }
        statuses
    }

    /// The group of a partition that a request names.
    ///
    /// # Errors
    /// TARGET_NOT_FOUND naming it.
    pub(crate) fn group_of(&self, tenant: &str, topic: &str, partition: u32) -> Result<(Arc<Topic>, u64), wire::Error> {
        self.require_started()?;
        let published = self.metadata.published();
        let topic = published.state.topic(tenant, topic).cloned().ok_or_else(|| not_found("topic", topic))?;
        let placement = topic.partitions.get(partition as usize);
        let group = placement
            .map(|at| at.group)
            .ok_or_else(|| not_found("partition", &format!("{}/{partition}", topic.config.name)))?;
        Ok((topic, group))
    }

    /// Carries out a change of the cluster.
    ///
    /// # Errors
    /// What the metadata refuses.
    pub(crate) async fn change_cluster(&self, command: Command) -> Result<(), wire::Error> {
        if let Command::RemoveNode(wire::RemoveNodeCommand { node }) = &command
            && *node == self.node.0
        {
            let message = format!("node {node} cannot remove itself: ask another node with --server");
            return Err(wire::Error { field: "node".into(), ..error(ErrorCode::ValidationError, message) });
        }
        let removed = match &command {
            Command::RemoveNode(wire::RemoveNodeCommand { node }) => Some(NodeId(*node)),
            _ => None,
        };
        self.metadata.submit(command).await?;
        // Whoever asks this node next sees it.
        self.metadata.refresh().await;
        if let Some(node) = removed
            && timeout(LEAVE_PATIENCE, self.left(node)).await.is_err()
        {
            let message = format!(
                "node {node} is no longer in the list of nodes, but its vote still counts for the metadata, as long as no majority \
                 agrees to go on without it: keep it running, and see to the nodes that are away"
            );
            return Err(wire::Error { field: "node".into(), ..error(ErrorCode::UnknownOutcome, message) });
        }
        Ok(())
    }

    /// Until the vote of `node` counts no more for the metadata: only then may it be stopped without a thought, since of
    /// two nodes both are needed to agree on one.
    async fn left(&self, node: NodeId) {
        while self.metadata.group().voters().values().any(|voter| *voter == node) {
            sleep(BUSY_INTERVAL).await;
        }
    }
}

/// One quarantined replica that can be replaced now: its group has a leader, which needs a majority of
/// the others.
fn to_replace(state: &MetadataState, reports: &[(NodeId, Report)]) -> Option<LostReplica> {
    let is_led = |group: u64| reports.iter().any(|(_, report)| report.led.contains(&group));
    let placement =
        |lost: &LostReplica| state.topics().flat_map(|topic| &topic.partitions).find(|at| at.group == lost.group);
    let is_wanted = |lost: &LostReplica| {
        placement(lost).is_some_and(|at| wanted_replicas(at).iter().any(|at| at.replica == lost.replica))
    };
    let mut lost = reports.iter().flat_map(|(_, report)| &report.quarantined).copied();
    lost.find(|lost| is_wanted(lost) && is_led(lost.group))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> MetadataState {
        let mut state = MetadataState::default();
        let nodes = (1..=3).map(|node| wire::NodeInfo { node, ..Default::default() }).collect();
        let config = wire::TopicConfig {
            tenant: "acme".into(),
            name: "a".into(),
            partitions: 2,
            retention_ms: 1,
            ..Default::default()
        };
        let create = wire::CreateTopicCommand { config: Some(config), ..Default::default() };
        for command in [Command::FormCluster(wire::FormClusterCommand { nodes }), Command::CreateTopic(create)] {
            state.apply(wire::MetadataCommand { command: Some(command) }).unwrap();
        }
        state
    }

    #[test]
    fn a_quarantined_replica_is_replaced_once_and_only_beside_a_leader() {
        let mut state = state();
        let partitions = state.topic("acme", "a").unwrap().partitions.clone();
        let lost = |at: &wire::PartitionPlacement| LostReplica { group: at.group, replica: at.replicas[0].replica };
        let report =
            |led: Vec<u64>| Report { led, quarantined: partitions.iter().map(lost).collect(), ..Report::default() };
        assert_eq!(to_replace(&state, &[(NodeId(1), report(vec![]))]), None);
        let second = lost(&partitions[1]);
        let reports = [(NodeId(1), report(vec![second.group]))];
        assert_eq!(to_replace(&state, &reports), Some(second));
        let command = wire::ReplaceReplicaCommand { group: second.group, replica: second.replica };
        state.apply(wire::MetadataCommand { command: Some(Command::ReplaceReplica(command)) }).unwrap();
        assert_eq!(to_replace(&state, &reports), None);
        let all = [(NodeId(1), report(partitions.iter().map(|at| at.group).collect()))];
        assert_eq!(to_replace(&state, &all), Some(lost(&partitions[0])));
    }
}
