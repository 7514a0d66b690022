//! Changes of the cluster's members under load, while a node is killed or cut off.

use std::{fs, time::Duration};

use rand::{RngExt, seq::IndexedRandom};
use tokio::time::{Instant, sleep};

use super::{Fault, active::Active, nemesis::Nemesis};
use crate::{cluster::Error, history::Line, host::PacketDrop};

/// Time for a change to be done once nothing disturbs it.
const DONE_TIME_MAX: Duration = Duration::from_secs(60);
const LOOK_PAUSE: Duration = Duration::from_millis(200);
/// How soon a change is disturbed, and for how long, in milliseconds.
const SOON_MS_MAX: u64 = 400;
const DISTURB_MS: (u64, u64) = (300, 3_000);

/// A change that is decided.
enum Change {
    /// A replica of a partition goes from one node to another.
    Move { topic: String, partition: u32, from: u64, to: u64 },
    /// Leadership of a partition goes to a node.
    Lead { topic: String, partition: u32, to: u64 },
    /// A node is emptied, leaves, and may come again with an empty disk.
    Leave { node: u64 },
}

impl Nemesis<'_> {
    pub(super) async fn change_members(&mut self) -> Result<Option<Active>, Error> {
        let fault = Fault::Membership;
        let nodes = self.cluster.nodes();
        self.begins(fault, 0, &nodes).await;
        let mut told = Vec::new();
        for spare in self.cluster.spares().to_vec() {
            self.add(spare).await?;
            told.push(format!("node {spare} added"));
        }
        let Some((change, what)) = self.decide().await? else {
            self.struck(fault, 0, !told.is_empty(), told.join("; "));
            return Ok(Some(Self::over(fault, 0)));
        };
        told.push(what);
        told.push(self.disturb().await?);
        let is_done = self.wait_done(&change).await;
        told.push(if is_done { "done".to_owned() } else { self.why_not_done().await });
        if let Change::Leave { node } = change {
            if is_done { self.remove(node).await? } else { self.keep(node).await }
        }
        self.struck(fault, 0, is_done, told.join("; "));
        Ok(Some(Self::over(fault, 0)))
    }

    /// Starts a spare node and has it added.
    async fn add(&mut self, node: u64) -> Result<(), Error> {
        self.cluster.begin(node)?;
        let end = Instant::now() + DONE_TIME_MAX;
        while let Err(error) = self.cluster.add_node(node).await {
            if Instant::now() > end {
                return Err(error);
            }
            sleep(LOOK_PAUSE).await;
        }
        self.cluster.joined(node);
        self.cluster.ready(node).await
    }

    /// Chooses a change and has it decided; `None` where there is nothing to change.
    async fn decide(&mut self) -> Result<Option<(Change, String)>, Error> {
        let Some(topic) = self.plan.topics.choose(&mut self.random).cloned() else { return Ok(None) };
        let partitions = self.cluster.partitions(&topic, 0).await.unwrap_or_default();
        let Some(chosen) = partitions.choose(&mut self.random) else { return Ok(None) };
        let partition = chosen.partition;
        let nodes = self.cluster.nodes();
        let away: Vec<u64> = nodes.iter().copied().filter(|node| !chosen.replica_nodes.contains(node)).collect();
        let from = chosen.replica_nodes.choose(&mut self.random).copied();
        match (self.random.random_range(0..3), from, away.choose(&mut self.random)) {
            (0, ..) => {
                let others: Vec<u64> =
                    chosen.replica_nodes.iter().copied().filter(|node| *node != chosen.leader_node).collect();
                let Some(to) = others.choose(&mut self.random).copied() else { return Ok(None) };
                let asked = self.cluster.transfer_leader(&topic, partition, to).await;
                let what = format!("leadership of {topic}/{partition} to node {to}{}", refusal(&asked));
                Ok(Some((Change::Lead { topic, partition, to }, what)))
            }
            (1, ..) if nodes.len() > 3 => {
                let Some(node) = nodes.choose(&mut self.random).copied() else { return Ok(None) };
                let asked = self.cluster.drain_node(node, false).await;
                Ok(Some((Change::Leave { node }, format!("node {node} is to leave{}", refusal(&asked)))))
            }
            (_, Some(from), Some(to)) => {
                let to = *to;
                let asked = self.cluster.move_partition(&topic, partition, from, to).await;
                let what = format!("{topic}/{partition} from node {from} to node {to}{}", refusal(&asked));
                Ok(Some((Change::Move { topic, partition, from, to }, what)))
            }
            _ => Ok(None),
        }
    }

    /// Kills a node, or cuts one off, and sets it right again.
    async fn disturb(&mut self) -> Result<String, Error> {
        let soon = Duration::from_millis(self.random.random_range(0..=SOON_MS_MAX));
        sleep(soon).await;
        let nodes = self.cluster.nodes();
        let Some(node) = nodes.choose(&mut self.random).copied() else { return Ok(String::new()) };
        let time = self.time(DISTURB_MS.0, DISTURB_MS.1);
        let network = self.cluster.network().filter(|_| self.plan.may_partition);
        if let Some(network) = network.filter(|_| soon.as_millis().is_multiple_of(2)) {
            let cut = |other| [(node, other), (other, node)].map(|(at, from)| PacketDrop { at, from, percent: 100 });
            let drops: Vec<PacketDrop> = nodes.iter().copied().filter(|other| *other != node).flat_map(cut).collect();
            network.drop_packets(&drops).await?;
            sleep(time).await;
            let count = network.drop_nothing().await?;
            return Ok(format!("node {node} cut off meanwhile, {count} packets dropped"));
        }
        self.cluster.kill(node).await?;
        sleep(time).await;
        self.history.record(Line { node: Some(node), ..Line::nemesis("restart") });
        self.cluster.begin(node)?;
        Ok(format!("node {node} killed meanwhile"))
    }

    async fn wait_done(&self, change: &Change) -> bool {
        let end = Instant::now() + DONE_TIME_MAX;
        while Instant::now() < end {
            if self.is_done(change).await {
                return true;
            }
            sleep(LOOK_PAUSE).await;
        }
        false
    }

    /// What the cluster says of a change that takes too long.
    async fn why_not_done(&self) -> String {
        let status = self.cluster.status(0).await.unwrap_or_default();
        let nodes = status.nodes.iter().map(|node| {
            let info = node.info.clone().unwrap_or_default();
            let (number, leaving) = (info.node, if info.leaving { " leaving" } else { "" });
            let voter = if node.voter { " voter" } else { "" };
            format!("node {number}{leaving}{voter}, {} replicas, problems {:?}", node.replica_count, node.problems)
        });
        let moves = status.moves.iter().map(|change| {
            let (topic, partition) = (&change.topic, change.partition);
            format!(
                "move of {topic}/{partition} from {:?} to {:?}: {:?}, {} behind",
                change.from, change.to, change.phase, change.behind
            )
        });
        let seconds = DONE_TIME_MAX.as_secs();
        format!("not done after {seconds} s: {}", nodes.chain(moves).collect::<Vec<_>>().join(", "))
    }

    async fn is_done(&self, change: &Change) -> bool {
        match change {
            Change::Move { topic, partition, from, to } => {
                let partitions = self.cluster.partitions(topic, 0).await.unwrap_or_default();
                let has = |part: &arqon_proto::wire::PartitionDescription| {
                    part.partition == *partition
                        && part.replica_nodes.contains(to)
                        && !part.replica_nodes.contains(from)
                };
                partitions.iter().any(has)
            }
            Change::Lead { topic, partition, to } => {
                let leaders = self.cluster.leaders(topic, 0).await.unwrap_or_default();
                leaders.contains(&(*partition, *to))
            }
            Change::Leave { node } => {
                let Ok(status) = self.cluster.status(*node).await else { return false };
                let is_empty = |other: &arqon_proto::wire::NodeStatus| {
                    let is_it = other.info.as_ref().is_some_and(|info| info.node == *node && info.leaving);
                    // It stays a voter of the metadata group until it is removed.
                    is_it && other.reachable && other.replica_count == 0
                };
                status.nodes.iter().any(is_empty)
            }
        }
    }

    /// A node that is empty leaves; its disk is emptied, so that it can come again as a new one.
    async fn remove(&mut self, node: u64) -> Result<(), Error> {
        let end = Instant::now() + DONE_TIME_MAX;
        while let Err(error) = self.cluster.remove_node(node).await {
            if Instant::now() > end {
                return Err(error);
            }
            sleep(LOOK_PAUSE).await;
        }
        if self.cluster.runs(node) {
            self.cluster.stop(node).await?;
        }
        let data = self.cluster.data(node)?;
        fs::remove_dir_all(&data).map_err(|error| Error::new(format!("cannot empty {}: {error}", data.display())))?;
        self.cluster.left(node);
        Ok(())
    }

    /// A node that could not be emptied stays.
    async fn keep(&mut self, node: u64) {
        // If this is refused as well, the closing look at all replicas tells.
        let _ = self.cluster.drain_node(node, true).await;
    }
}

fn refusal(asked: &Result<(), Error>) -> String {
    asked.as_ref().err().map_or_else(String::new, |error| format!(" (refused: {error})"))
}
