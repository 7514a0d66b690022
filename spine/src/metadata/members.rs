//! The commands that change nodes and where replicas are.
//!
//! ```text
//!   replicas [1 2 3]  target []        extra []     settled
//!        │ move, drain, add, replace
//!        ▼
//!   replicas [1 2 3]  target [1 2 9]   extra []     the leader makes 9 a learner, waits, changes the voters
//!        │                │ cancel
//!        │                ▼
//!        │            target [1 2 3]   extra [9]    9 may vote by now: it stays until it does not
//!        ▼ finish
//!   replicas [1 2 9]  target []        extra []
//! ```
//!
//! A replica's data stays as long as any list has it: until the leader has seen it out of the group's members
//! by a committed entry. Replica ids are never used twice: one that lost what it had promised gets a new id, and
//! so counts as another.

use std::sync::Arc;

use arqon_proto::{OPERATOR_TOPIC, SYSTEM_TENANT, wire};

use super::{MetadataState, Topic};
use crate::error::{error, invalid, not_found};

/// Groups and replicas that lost nodes may have known of, at most.
const UNKNOWN_COUNT_MAX: u64 = 1 << 32;
/// Nodes of a cluster: all of them vote in the metadata group.
const NODE_COUNT_MAX: usize = 32;

/// The replica of the metadata group on a node.
#[must_use]
pub fn metadata_replica(info: &wire::NodeInfo) -> u64 {
    // Those that formed the cluster have the number of their node.
    if info.metadata_replica == 0 { info.node } else { info.metadata_replica }
}

/// The replicas that a partition is to have.
#[must_use]
pub fn wanted_replicas(placement: &wire::PartitionPlacement) -> &[wire::ReplicaNode] {
    if placement.target.is_empty() { &placement.replicas } else { &placement.target }
}

/// The replica of a partition that belongs on `node`: of a lost one and the one that takes its
/// place, the latter.
#[must_use]
pub fn replica_on(placement: &wire::PartitionPlacement, node: u64) -> Option<u64> {
    known_on(placement, node).map(|at| at.replica)
}

fn known_on(placement: &wire::PartitionPlacement, node: u64) -> Option<&wire::ReplicaNode> {
    // A lost one stands in `replicas` alone.
    let mut all = placement.target.iter().chain(&placement.extra).chain(&placement.replicas);
    all.find(|at| at.node == node)
}

/// Changes what is wanted. Replicas that were to come and may have come stay known, but for those that
/// are `lost`.
fn retarget(placement: &mut wire::PartitionPlacement, target: Vec<wire::ReplicaNode>, lost: Option<u64>) {
    let before = std::mem::replace(&mut placement.target, target);
    placement.extra.extend(before);
    let is_known = |at: &wire::ReplicaNode| {
        let mut others = placement.target.iter().chain(&placement.replicas);
        others.any(|other| other.replica == at.replica) || lost == Some(at.replica)
    };
    placement.extra.retain(|at| !is_known(at));
}

impl MetadataState {
    /// The number of a node's replica of the metadata group; `None` when it is no member.
    #[must_use]
    pub fn metadata_replica_of(&self, node: u64) -> Option<u64> {
        self.nodes().iter().find(|info| info.node == node).map(metadata_replica)
    }

    /// Every replica below this number has existed.
    #[must_use]
    pub fn next_replica(&self) -> u64 {
        self.next_replica
    }

    fn node(&self, field: &str, node: u64) -> Result<&wire::NodeInfo, wire::Error> {
        let known = self.nodes.iter().find(|info| info.node == node);
        known.ok_or_else(|| wire::Error { field: field.to_owned(), ..not_found("node", &node.to_string()) })
    }

    fn placement(&mut self, group: u64) -> Result<&mut wire::PartitionPlacement, wire::Error> {
        let topics = self.topics.values_mut().flat_map(|topics| topics.values_mut());
        let topic = topics.into_iter().find(|topic| topic.partitions.iter().any(|at| at.group == group));
        let topic = topic.ok_or_else(|| not_found("partition", &format!("of group {group}")))?;
        let mut partitions = Arc::make_mut(topic).partitions.iter_mut();
        Ok(partitions.find(|at| at.group == group).expect("the topic was chosen by this group"))
    }

    fn placements(&mut self) -> impl Iterator<Item = &mut wire::PartitionPlacement> {
        let topics = self.topics.values_mut().flat_map(|topics| topics.values_mut());
        topics.flat_map(|topic| &mut Arc::make_mut(topic).partitions)
    }

    pub(super) fn add_node(&mut self, info: Option<wire::NodeInfo>) -> Result<(), wire::Error> {
        let info = info.ok_or_else(|| invalid("node", "the node is not described"))?;
        if info.node == 0 {
            return Err(invalid("node", "nodes are numbered from 1"));
        }
        let addresses = [
            ("client_address", &info.client_address),
            ("peer_address", &info.peer_address),
            ("control_address", &info.control_address),
        ];
        if let Some((field, address)) = addresses.into_iter().find(|(_, address)| !is_address(address)) {
            return Err(invalid(field, format!("{field}: {address:?} is not HOST:PORT")));
        }
        if self.nodes.is_empty() {
            return Err(error(wire::ErrorCode::Overloaded, "the cluster is not formed yet"));
        }
        if let Some(known) = self.nodes.iter().find(|known| known.node == info.node) {
            let own = [&known.client_address, &known.peer_address, &known.control_address];
            // Asked again, since the answer got lost.
            if own.into_iter().eq(addresses.into_iter().map(|(_, address)| address)) {
                return Ok(());
            }
            let message = format!("node {} is in the cluster already, with other addresses", info.node);
            return Err(wire::Error { field: "node".into(), ..error(wire::ErrorCode::AlreadyExists, message) });
        }
        if self.nodes.len() >= NODE_COUNT_MAX {
            return Err(invalid("node", format!("a cluster has at most {NODE_COUNT_MAX} nodes")));
        }
        let metadata_replica = self.take_metadata_replica(info.node);
        let at = wire::ReplicaNode {
            replica: self.take_replica(),
            node: info.node,
            peer_address: info.peer_address.clone(),
        };
        self.nodes.push(wire::NodeInfo { metadata_replica, leaving: false, seen: false, ..info });
        self.nodes.sort_by_key(|info| info.node);
        for placement in self.everywhere() {
            let mut target = wanted_replicas(placement).to_vec();
            target.push(at.clone());
            retarget(placement, target, None);
        }
        Ok(())
    }

    /// Partitions of which every node has a replica.
    fn everywhere(&mut self) -> impl Iterator<Item = &mut wire::PartitionPlacement> {
        let topic = self.topics.get_mut(SYSTEM_TENANT).and_then(|topics| topics.get_mut(OPERATOR_TOPIC));
        topic.into_iter().flat_map(|topic| &mut Arc::make_mut(topic).partitions)
    }

    fn take_replica(&mut self) -> u64 {
        self.next_replica += 1;
        self.next_replica - 1
    }

    /// A number for the node's replica of the metadata group. It is not that of the node: only replicas that
    /// form a cluster have that, and are told apart by it.
    fn take_metadata_replica(&mut self, node: u64) -> u64 {
        match self.take_replica() {
            replica if replica == node => self.take_replica(),
            replica => replica,
        }
    }

    pub(super) fn remove_node(&mut self, node: u64) -> Result<(), wire::Error> {
        self.node("node", node)?;
        let all = self.topics().flat_map(|topic| &topic.partitions);
        let count = all.filter(|at| known_on(at, node).is_some()).count();
        if count > 0 {
            return Err(invalid("node", format!("node {node} has {count} replicas; decommission it first")));
        }
        if self.nodes.len() == 1 {
            return Err(invalid("node", format!("node {node} is the only one")));
        }
        self.nodes.retain(|info| info.node != node);
        Ok(())
    }

    pub(super) fn drain_node(&mut self, command: &wire::DrainNodeCommand) -> Result<(), wire::Error> {
        let node = command.node;
        self.node("node", node)?;
        if command.cancel {
            self.set_leaving(node, false);
            for placement in self.placements() {
                let has = |list: &[wire::ReplicaNode]| list.iter().any(|at| at.node == node);
                if has(&placement.replicas) && !placement.target.is_empty() && !has(&placement.target) {
                    take_back(placement);
                }
            }
            self.extend_everywhere(node);
            return Ok(());
        }
        let staying: Vec<u64> =
            self.nodes.iter().filter(|info| !info.leaving && info.node != node).map(|info| info.node).collect();
        let settled = |topic: &&Arc<Topic>| topic.config.tenant != SYSTEM_TENANT;
        let too_many = |topic: &&Arc<Topic>| {
            let is_there = |at: &wire::PartitionPlacement| wanted_replicas(at).iter().any(|at| at.node == node);
            let copies = topic.partitions.iter().filter(|at| is_there(at)).map(|at| wanted_replicas(at).len()).max();
            copies.is_some_and(|copies| copies > staying.len())
        };
        if let Some(topic) = self.topics().filter(settled).find(too_many) {
            let message = format!(
                "topic {:?} has {} copies and {} nodes would be left; add a node first",
                topic.config.name,
                topic.config.replication,
                staying.len()
            );
            return Err(invalid("node", message));
        }
        if staying.is_empty() {
            return Err(invalid("node", format!("node {node} is the only one that is not leaving")));
        }
        self.set_leaving(node, true);
        for placement in self.everywhere() {
            let target: Vec<_> = wanted_replicas(placement).iter().filter(|at| at.node != node).cloned().collect();
            retarget(placement, target, None);
        }
        self.move_all_from(node);
        Ok(())
    }

    /// Gives the node what every node has a replica of, where it has none.
    fn extend_everywhere(&mut self, node: u64) {
        let mut next_replica = self.next_replica;
        for placement in self.everywhere() {
            let mut target = wanted_replicas(placement).to_vec();
            if target.iter().all(|at| at.node != node) {
                target.push(replica_for(placement, node, "", &mut next_replica));
                retarget(placement, target, None);
            }
        }
        self.next_replica = next_replica;
    }

    fn set_leaving(&mut self, node: u64, leaving: bool) {
        self.nodes.iter_mut().filter(|info| info.node == node).for_each(|info| info.leaving = leaving);
    }

    /// Every replica on `node` gets a successor on the node that has the fewest of those that stay.
    fn move_all_from(&mut self, node: u64) {
        let mut load = self.load();
        let (addresses, mut next_replica) = (self.nodes.clone(), self.next_replica);
        for placement in self.placements() {
            let mut target = wanted_replicas(placement).to_vec();
            let Some(at) = target.iter().position(|at| at.node == node) else { continue };
            let free = load.iter_mut().filter(|(_, other)| target.iter().all(|at| at.node != *other));
            let Some(least) = free.min() else { continue };
            least.0 += 1;
            let info = addresses.iter().find(|info| info.node == least.1);
            let peer_address = info.map(|info| info.peer_address.clone()).unwrap_or_default();
            target[at] = replica_for(placement, least.1, &peer_address, &mut next_replica);
            retarget(placement, target, None);
        }
        self.next_replica = next_replica;
    }

    pub(super) fn rejoin_node(&mut self, command: &wire::RejoinNodeCommand) -> Result<(), wire::Error> {
        let known = metadata_replica(self.node("node", command.node)?);
        if known != command.metadata_replica {
            let message = format!("node {} has replica {known} of the metadata by now", command.node);
            return Err(error(wire::ErrorCode::AlreadyExists, message));
        }
        let replica = self.take_metadata_replica(command.node);
        self.nodes
            .iter_mut()
            .filter(|info| info.node == command.node)
            .for_each(|info| (info.metadata_replica, info.seen) = (replica, false));
        if !command.all {
            return Ok(());
        }
        let mut next_replica = self.next_replica;
        for placement in self.placements() {
            placement.extra.retain(|at| at.node != command.node);
            let mut target = wanted_replicas(placement).to_vec();
            let Some(at) = target.iter_mut().find(|at| at.node == command.node) else { continue };
            let lost = at.replica;
            at.replica = next_replica;
            next_replica += 1;
            retarget(placement, target, Some(lost));
        }
        self.next_replica = next_replica;
        Ok(())
    }

    pub(super) fn node_seen(&mut self, command: &wire::NodeSeenCommand) -> Result<(), wire::Error> {
        let is_it = |info: &&mut wire::NodeInfo| {
            info.node == command.node && metadata_replica(info) == command.metadata_replica
        };
        self.nodes.iter_mut().filter(is_it).for_each(|info| info.seen = true);
        Ok(())
    }

    pub(super) fn move_partition(&mut self, command: &wire::MovePartitionCommand) -> Result<(), wire::Error> {
        let to = self.node("to", command.to)?.clone();
        if to.leaving {
            return Err(invalid("to", format!("node {} is leaving the cluster", command.to)));
        }
        let replica = self.next_replica;
        let placement = self.placement(command.group)?;
        if !placement.target.is_empty() {
            let message = "the partition is being moved already; wait, or cancel that";
            return Err(error(wire::ErrorCode::AlreadyExists, message));
        }
        let Some(at) = placement.replicas.iter().position(|at| at.node == command.from) else {
            return Err(invalid("from", format!("the partition has no replica on node {}", command.from)));
        };
        if known_on(placement, command.to).is_some() {
            return Err(invalid("to", format!("the partition has a replica on node {} already", command.to)));
        }
        placement.target = placement.replicas.clone();
        placement.target[at] = wire::ReplicaNode { replica, node: to.node, peer_address: to.peer_address };
        self.next_replica += 1;
        Ok(())
    }

    pub(super) fn cancel_move(&mut self, group: u64) -> Result<(), wire::Error> {
        let placement = self.placement(group)?;
        if placement.target.is_empty() {
            return Err(invalid("cancel", "the partition is not being moved"));
        }
        take_back(placement);
        Ok(())
    }

    pub(super) fn replace_replica(&mut self, command: &wire::ReplaceReplicaCommand) -> Result<(), wire::Error> {
        let replica = self.next_replica;
        let placement = self.placement(command.group)?;
        let mut target = wanted_replicas(placement).to_vec();
        let Some(at) = target.iter_mut().find(|at| at.replica == command.replica) else {
            return Err(not_found("replica", &format!("{} of group {}", command.replica, command.group)));
        };
        at.replica = replica;
        retarget(placement, target, Some(command.replica));
        self.next_replica += 1;
        Ok(())
    }

    pub(super) fn finish_move(&mut self, command: &wire::FinishMoveCommand) -> Result<(), wire::Error> {
        let placement = self.placement(command.group)?;
        if placement.target.is_empty()
            || !placement.target.iter().map(|at| at.replica).eq(command.target.iter().copied())
        {
            return Err(error(wire::ErrorCode::AlreadyExists, "the partition has another target by now"));
        }
        placement.replicas = std::mem::take(&mut placement.target);
        placement.extra.clear();
        placement.changed = true;
        Ok(())
    }

    pub(super) fn extend_partition(&mut self, group: u64) -> Result<(), wire::Error> {
        let topic = self.topics().find(|topic| topic.partitions.iter().any(|at| at.group == group));
        let wanted = topic.map_or(0, |topic| topic.config.replication as usize);
        let load = self.load();
        let (nodes, replica) = (self.nodes.clone(), self.next_replica);
        let placement = self.placement(group)?;
        if !placement.target.is_empty() || placement.replicas.len() >= wanted {
            return Err(error(wire::ErrorCode::AlreadyExists, "the partition has its copies, or is getting them"));
        }
        let is_free = |node: &u64| placement.replicas.iter().all(|at| at.node != *node);
        let least = load.iter().filter(|(_, node)| is_free(node)).min();
        let Some(info) = least.and_then(|(_, node)| nodes.iter().find(|info| info.node == *node)) else {
            return Err(invalid("group", "no node is left for another copy"));
        };
        let peer_address = info.peer_address.clone();
        placement.target = placement.replicas.clone();
        placement.target.push(wire::ReplicaNode { replica, node: info.node, peer_address });
        self.next_replica += 1;
        Ok(())
    }

    /// A partition that has fewer copies than its topic asks for, and could have more.
    #[must_use]
    pub fn to_extend(&self) -> Option<u64> {
        let node_count = self.nodes.iter().filter(|info| !info.leaving).count();
        let settled = self.topics().filter(|topic| topic.config.tenant != SYSTEM_TENANT);
        settled.into_iter().find_map(|topic| {
            let wanted = (topic.config.replication as usize).min(node_count);
            let lacks = |at: &&wire::PartitionPlacement| at.target.is_empty() && at.replicas.len() < wanted;
            topic.partitions.iter().find(lacks).map(|at| at.group)
        })
    }

    /// Replicas on each node that is not leaving.
    fn load(&self) -> Vec<(u64, u64)> {
        let staying = self.nodes.iter().filter(|info| !info.leaving);
        let all = || self.topics().flat_map(|topic| &topic.partitions).flat_map(wanted_replicas);
        staying.map(|info| (all().filter(|at| at.node == info.node).count() as u64, info.node)).collect()
    }

    /// The lost nodes are gone, and every partition has the replicas that are left.
    pub(super) fn recover_unsafely(&mut self, command: wire::UnsafeRecoveryCommand) -> Result<(), wire::Error> {
        self.nodes.retain(|info| !command.lost.contains(&info.node));
        // The lost nodes may have given numbers away that nobody here has heard of.
        self.next_group += UNKNOWN_COUNT_MAX;
        let mut next_replica = self.next_replica + UNKNOWN_COUNT_MAX;
        for placement in self.placements() {
            let known = command.groups.iter().find(|known| known.group == placement.group);
            if let Some(known) = known.filter(|known| known.empty) {
                // A group of its own begins here.
                let at = wire::ReplicaNode { replica: next_replica, node: known.node, ..Default::default() };
                next_replica += 1;
                (placement.replicas, placement.changed) = (vec![at], false);
            } else if let Some(known) = known {
                let named = wire::ReplicaNode { replica: known.replica, node: known.node, ..Default::default() };
                let kept = if known.replica == 0 { known_on(placement, known.node).cloned() } else { Some(named) };
                (placement.replicas, placement.changed) = (kept.into_iter().collect(), true);
            } else {
                let mut target = wanted_replicas(placement).to_vec();
                target.retain(|at| !command.lost.contains(&at.node));
                retarget(placement, target, None);
                continue;
            }
            placement.target.clear();
            placement.extra.clear();
        }
        self.next_replica = next_replica;
        self.unsafe_recoveries.push(command);
        Ok(())
    }

    /// The recoveries from a lost majority, oldest first.
    #[must_use]
    pub fn unsafe_recoveries(&self) -> &[wire::UnsafeRecoveryCommand] {
        &self.unsafe_recoveries
    }

    pub(super) fn prefer_leader(&mut self, command: &wire::PreferLeaderCommand) -> Result<(), wire::Error> {
        let placement = self.placement(command.group)?;
        if !placement.target.is_empty() {
            return Err(error(wire::ErrorCode::AlreadyExists, "the partition is being moved; wait, or cancel that"));
        }
        let Some(at) = placement.replicas.iter().position(|at| at.node == command.node) else {
            return Err(invalid("to", format!("the partition has no replica on node {}", command.node)));
        };
        placement.replicas[..=at].rotate_right(1);
        Ok(())
    }
}

/// Takes a change back: what was there is wanted again. A lost replica is not: the one in its place stays.
fn take_back(placement: &mut wire::PartitionPlacement) {
    let in_place = |at: &wire::ReplicaNode| {
        let mut successors = placement.target.iter().chain(&placement.extra);
        let successor = successors.find(|new| new.node == at.node);
        successor.unwrap_or(at).clone()
    };
    let target = placement.replicas.iter().map(in_place).collect();
    retarget(placement, target, None);
}

/// The replica that a partition gets on a node: the one that is there, which may still vote, or a new one.
fn replica_for(
    placement: &wire::PartitionPlacement,
    node: u64,
    peer_address: &str,
    next_replica: &mut u64,
) -> wire::ReplicaNode {
    // If it is lost its node quarantines it, and it is replaced.
    if let Some(at) = known_on(placement, node) {
        return at.clone();
    }
    *next_replica += 1;
    wire::ReplicaNode { replica: *next_replica - 1, node, peer_address: peer_address.to_owned() }
}

fn is_address(text: &str) -> bool {
    text.rsplit_once(':').is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port > 0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use wire::metadata_command::Command;

    fn run(state: &mut MetadataState, command: Command) -> Result<(), wire::Error> {
        state.apply(wire::MetadataCommand { command: Some(command) }).map(drop)
    }

    fn info(node: u64) -> wire::NodeInfo {
        let address = |port: u64| format!("node-{node}:{port}");
        wire::NodeInfo {
            node,
            client_address: address(1),
            peer_address: address(2),
            control_address: address(3),
            ..Default::default()
        }
    }

    fn formed(node_count: u64, partitions: u32) -> MetadataState {
        let mut state = MetadataState::default();
        let nodes = (1..=node_count).map(info).collect();
        run(&mut state, Command::FormCluster(wire::FormClusterCommand { nodes })).unwrap();
        let config = wire::TopicConfig {
            tenant: "acme".into(),
            name: "a".into(),
            partitions,
            retention_ms: 1,
            replication: node_count.min(3) as u32,
            ..Default::default()
        };
        let command = wire::CreateTopicCommand { config: Some(config), ..Default::default() };
        run(&mut state, Command::CreateTopic(command)).unwrap();
        state
    }

    fn add(state: &mut MetadataState, node: u64) {
        run(state, Command::AddNode(wire::AddNodeCommand { info: Some(info(node)) })).unwrap();
    }

    fn drain(state: &mut MetadataState, node: u64, cancel: bool) -> Result<(), wire::Error> {
        run(state, Command::DrainNode(wire::DrainNodeCommand { node, cancel }))
    }

    /// What the leaders of all partitions do in time.
    fn finish(state: &mut MetadataState) {
        let moving: Vec<_> = state.topics().flat_map(|topic| &topic.partitions).cloned().collect();
        for at in moving.into_iter().filter(|at| !at.target.is_empty()) {
            let target = at.target.iter().map(|at| at.replica).collect();
            run(state, Command::FinishMove(wire::FinishMoveCommand { group: at.group, target })).unwrap();
        }
    }

    fn placements(state: &MetadataState) -> Vec<wire::PartitionPlacement> {
        state.topic("acme", "a").unwrap().partitions.clone()
    }

    fn nodes_of(list: &[wire::ReplicaNode]) -> Vec<u64> {
        list.iter().map(|at| at.node).collect()
    }

    #[test]
    fn an_added_node_gets_its_metadata_replica_and_the_operators_topic_and_may_be_added_twice() {
        let mut state = formed(3, 1);
        let next = state.next_replica();
        add(&mut state, 7);
        let before = state.clone();
        add(&mut state, 7);
        assert_eq!(state, before);
        assert_eq!(state.metadata_replica_of(7), Some(next));
        assert_eq!(state.metadata_replica_of(2), Some(2));
        let operators = &state.topic(SYSTEM_TENANT, OPERATOR_TOPIC).unwrap().partitions[0];
        assert_eq!(nodes_of(&operators.target).len(), 4);
        let other = wire::NodeInfo { peer_address: "elsewhere:1".into(), ..info(7) };
        let refused = run(&mut state, Command::AddNode(wire::AddNodeCommand { info: Some(other) })).unwrap_err();
        assert_eq!((refused.code(), refused.field.as_str()), (wire::ErrorCode::AlreadyExists, "node"));
        let bad = wire::NodeInfo { peer_address: "7701".into(), ..info(8) };
        let refused = run(&mut state, Command::AddNode(wire::AddNodeCommand { info: Some(bad) })).unwrap_err();
        assert_eq!(refused.field, "peer_address");
    }

    /// By its number a replica is taken for one of those that form a cluster.
    #[test]
    fn the_metadata_replica_of_an_added_node_never_has_the_number_of_the_node() {
        let mut state = formed(3, 1);
        let node = state.next_replica();
        add(&mut state, node);
        let added = state.metadata_replica_of(node).unwrap();
        assert_ne!(added, node);
        // The same where it comes back.
        let node = state.next_replica() + 2;
        add(&mut state, node);
        let before = state.metadata_replica_of(node).unwrap();
        while state.next_replica() < node {
            state.take_replica();
        }
        let rejoin = wire::RejoinNodeCommand { node, metadata_replica: before, all: false };
        run(&mut state, Command::RejoinNode(rejoin)).unwrap();
        assert!(state.metadata_replica_of(node).is_some_and(|replica| replica > node));
    }

    #[test]
    fn a_drained_node_ends_with_nothing_and_the_others_share_it() {
        let mut state = formed(3, 12);
        let refused = drain(&mut state, 2, false).unwrap_err();
        assert!(refused.message.contains("\"a\" has 3 copies and 2 nodes"), "{}", refused.message);
        add(&mut state, 4);
        add(&mut state, 5);
        finish(&mut state);
        drain(&mut state, 2, false).unwrap();
        let refused = run(&mut state, Command::RemoveNode(wire::RemoveNodeCommand { node: 2 })).unwrap_err();
        assert!(refused.message.contains("decommission it first"), "{}", refused.message);
        finish(&mut state);
        let mut count = [0_i32; 6];
        let mut replicas = std::collections::HashSet::new();
        for at in placements(&state) {
            let mut nodes = nodes_of(&at.replicas);
            nodes.iter().for_each(|node| count[*node as usize] += 1);
            nodes.dedup();
            assert_eq!(nodes.len(), 3);
            assert!(at.replicas.iter().all(|at| replicas.insert(at.replica)) && at.changed);
        }
        assert_eq!((count[2], count[4] + count[5]), (0, 12));
        assert!(count[4].abs_diff(count[5]) <= 1, "{count:?}");
        run(&mut state, Command::RemoveNode(wire::RemoveNodeCommand { node: 2 })).unwrap();
        assert_eq!(state.metadata_replica_of(2), None);
        let all = state.topics().flat_map(|topic| topic.partitions.clone());
        assert!(all.flat_map(|at| at.replicas).all(|at| at.node != 2));
    }

    #[test]
    fn a_cancelled_drain_leaves_everything_where_it_was() {
        let mut state = formed(3, 6);
        add(&mut state, 4);
        finish(&mut state);
        let before = placements(&state);
        drain(&mut state, 1, false).unwrap();
        let moving = placements(&state);
        drain(&mut state, 1, true).unwrap();
        // What was on its way may vote by now: it is kept until the leader says that it does not.
        for (new, old) in placements(&state).iter().zip(&moving).filter(|(_, old)| !old.target.is_empty()) {
            let came = old.target.iter().filter(|at| old.replicas.iter().all(|known| known.replica != at.replica));
            assert_eq!(new.extra, came.cloned().collect::<Vec<_>>());
        }
        finish(&mut state);
        let now = placements(&state);
        assert!(now.iter().zip(&before).all(|(now, before)| now.replicas == before.replicas && now.extra.is_empty()));
        let operators = &state.topic(SYSTEM_TENANT, OPERATOR_TOPIC).unwrap().partitions[0];
        assert_eq!(operators.replicas.len(), 4, "every node reads it");
        assert!(state.nodes().iter().all(|info| !info.leaving));
    }

    #[test]
    fn a_move_needs_a_node_without_a_replica_and_ends_once() {
        let mut state = formed(3, 1);
        add(&mut state, 4);
        finish(&mut state);
        let group = placements(&state)[0].group;
        let mut go = |from, to| {
            run(&mut state, Command::MovePartition(wire::MovePartitionCommand { group, from, to })).map_err(|e| e.field)
        };
        assert_eq!(go(1, 3), Err("to".to_owned()));
        assert_eq!(go(4, 4), Err("from".to_owned()));
        assert_eq!(go(1, 9), Err("to".to_owned()));
        assert_eq!(go(1, 4), Ok(()));
        assert!(go(2, 4).is_err());
        let at = placements(&state)[0].clone();
        assert_eq!(replica_on(&at, 1), at.replicas.iter().find(|at| at.node == 1).map(|at| at.replica));
        run(&mut state, Command::CancelMove(wire::CancelMoveCommand { group })).unwrap();
        let late = wire::FinishMoveCommand { group, target: at.target.iter().map(|at| at.replica).collect() };
        assert!(run(&mut state, Command::FinishMove(late)).is_err());
        assert_eq!(replica_on(&placements(&state)[0], 4), replica_on(&at, 4), "its data stays until it is no member");
        finish(&mut state);
        assert_eq!(placements(&state)[0].replicas, at.replicas);
        assert_eq!(replica_on(&placements(&state)[0], 4), None);
    }

    #[test]
    fn lost_replicas_come_back_under_new_ids_on_the_same_node() {
        let mut state = formed(3, 4);
        let before = placements(&state);
        let rejoin =
            |metadata_replica, all| Command::RejoinNode(wire::RejoinNodeCommand { node: 2, metadata_replica, all });
        run(&mut state, rejoin(2, true)).unwrap();
        let fresh = state.metadata_replica_of(2).unwrap();
        assert!(run(&mut state, rejoin(2, true)).is_err(), "a request that comes twice does nothing more");
        for (old, new) in before.iter().zip(placements(&state)) {
            assert_eq!(nodes_of(&old.replicas), nodes_of(&new.target));
            assert_ne!(replica_on(old, 2), replica_on(&new, 2));
            assert_eq!(replica_on(old, 1), replica_on(&new, 1));
        }
        run(&mut state, rejoin(fresh, false)).unwrap();
        let group = before[0].group;
        let lost = replica_on(&placements(&state)[0], 2).unwrap();
        let replace = Command::ReplaceReplica(wire::ReplaceReplicaCommand { group, replica: lost });
        run(&mut state, replace.clone()).unwrap();
        assert!(run(&mut state, replace).is_err());
        let successor = replica_on(&placements(&state)[0], 2).unwrap();
        assert!(successor > lost);
        // Neither a cancel nor a decommission brings a lost one back.
        run(&mut state, Command::CancelMove(wire::CancelMoveCommand { group })).unwrap();
        assert_eq!(replica_on(&placements(&state)[0], 2), Some(successor));
        add(&mut state, 4);
        drain(&mut state, 2, false).unwrap();
        let all = placements(&state);
        assert_eq!(replica_on(&all[0], 2), Some(successor));
        assert!(all.iter().all(|at| at.extra.iter().all(|at| at.replica != lost)));
        let back = MetadataState::decode(&state.encode()).unwrap();
        assert_eq!(back, state);
    }

    /// What a node has may vote until the leader says otherwise: no command may put another in its place.
    #[test]
    fn a_replica_that_may_vote_keeps_its_place_whatever_is_wanted_next() {
        let mut state = formed(3, 1);
        add(&mut state, 4);
        finish(&mut state);
        let group = placements(&state)[0].group;
        let healthy = replica_on(&placements(&state)[0], 3);
        run(&mut state, Command::MovePartition(wire::MovePartitionCommand { group, from: 3, to: 4 })).unwrap();
        drain(&mut state, 4, false).unwrap();
        assert_eq!(replica_on(&placements(&state)[0], 3), healthy, "the decommission goes back to what is there");

        let mut state = formed(3, 1);
        add(&mut state, 4);
        finish(&mut state);
        let lost = replica_on(&placements(&state)[0], 3).unwrap();
        run(&mut state, Command::ReplaceReplica(wire::ReplaceReplicaCommand { group, replica: lost })).unwrap();
        let successor = replica_on(&placements(&state)[0], 3);
        drain(&mut state, 3, false).unwrap();
        assert_eq!(replica_on(&placements(&state)[0], 3), successor);
        drain(&mut state, 3, true).unwrap();
        assert_eq!(replica_on(&placements(&state)[0], 3), successor, "the lost one does not come back");
    }

    #[test]
    fn the_preferred_leader_is_the_first_of_the_replicas() {
        let mut state = formed(3, 1);
        let at = placements(&state)[0].clone();
        let node = at.replicas[2].node;
        run(&mut state, Command::PreferLeader(wire::PreferLeaderCommand { group: at.group, node })).unwrap();
        let now = placements(&state)[0].replicas.clone();
        assert_eq!(nodes_of(&now), [2, 0, 1].map(|place: usize| at.replicas[place].node));
        assert!(
            run(&mut state, Command::PreferLeader(wire::PreferLeaderCommand { group: at.group, node: 9 })).is_err()
        );
    }
}
