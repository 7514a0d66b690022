//! Faults of the network between the nodes. Clients reach every node all the time, which is worse for the
//! cluster than if they did not.

use rand::{RngExt, seq::SliceRandom};
use tokio::time::Instant;

use super::{
    Fault,
    active::{Active, Undo},
    nemesis::Nemesis,
};
use crate::{
    cluster::Error,
    host::{Network, PacketDrop},
};

/// How long the network is bad, in milliseconds.
const BAD_MS: (u64, u64) = (500, 10_000);
/// A link that is slow, in kbit/s, and how long packets may wait there, in milliseconds.
const SLOW_KBIT: (u32, u32) = (500, 8_000);
const SLOW_MS: (u32, u32) = (20, 500);

/// Everybody in `at` misses everybody in `from`.
fn between(at: &[u64], from: &[u64]) -> Vec<PacketDrop> {
    let pairs = at.iter().flat_map(|at| from.iter().map(move |from| (*at, *from)));
    pairs.filter(|(at, from)| at != from).map(|(at, from)| PacketDrop { at, from, percent: 100 }).collect()
}

fn both_ways(one: &[u64], other: &[u64]) -> Vec<PacketDrop> {
    [between(one, other), between(other, one)].concat()
}

/// Who misses whom, for nodes in an order by chance; `forward` chooses between the two ways round.
fn partition(fault: Fault, nodes: &[u64], forward: bool) -> Vec<PacketDrop> {
    let half = nodes.len() / 2;
    let (one, rest) = nodes.split_at(half);
    match fault {
        Fault::PartitionOneWay if forward => between(&nodes[..1], &nodes[1..]),
        Fault::PartitionOneWay => between(&nodes[1..], &nodes[..1]),
        // The first of the larger half is the bridge.
        Fault::PartitionBridge => both_ways(one, &rest[1..]),
        Fault::PartitionRing => {
            let misses = |(index, node): (usize, &u64)| {
                let next = nodes[(index + 1) % nodes.len()];
                let others: Vec<u64> = nodes.iter().copied().filter(|other| *other != next).collect();
                between(&[*node], &others)
            };
            nodes.iter().enumerate().flat_map(misses).collect()
        }
        _ => both_ways(one, rest),
    }
}

impl Nemesis<'_> {
    fn network(&self) -> Result<&Network, Error> {
        self.cluster.network().ok_or_else(|| Error::new("the nodes have no network of their own"))
    }

    pub(super) async fn drop_packets(&mut self, fault: Fault) -> Result<Option<Active>, Error> {
        let mut nodes = self.cluster.nodes();
        nodes.shuffle(&mut self.random);
        let drops = if fault == Fault::Loss {
            let percent = self.random.random_range(1..=20);
            between(&nodes, &nodes).into_iter().map(|drop| PacketDrop { percent, ..drop }).collect()
        } else {
            partition(fault, &nodes, self.random.random_bool(0.5))
        };
        self.begins(fault, 0, &nodes).await;
        self.network()?.drop_packets(&drops).await?;
        let until = Instant::now() + self.time(BAD_MS.0, BAD_MS.1);
        Ok(Some(Active { fault, label: 0, nodes: Vec::new(), until, undo: Undo::Packets }))
    }

    pub(super) async fn let_packets_through(&mut self, active: &Active) -> Result<(), Error> {
        let count = self.network()?.drop_nothing().await?;
        self.struck(active.fault, active.label, count > 0, format!("{count} packets dropped"));
        Ok(())
    }

    pub(super) async fn slow_links(&mut self) -> Result<Option<Active>, Error> {
        let fault = Fault::Delay;
        let nodes = self.cluster.nodes();
        self.begins(fault, 0, &nodes).await;
        for node in &nodes {
            let kbit = self.random.random_range(SLOW_KBIT.0..=SLOW_KBIT.1);
            let delay = self.random.random_range(SLOW_MS.0..=SLOW_MS.1);
            self.network()?.slow(*node, kbit, delay).await?;
        }
        let until = Instant::now() + self.time(BAD_MS.0, BAD_MS.1);
        Ok(Some(Active { fault, label: 0, nodes: Vec::new(), until, undo: Undo::Speed }))
    }

    pub(super) async fn full_speed(&mut self, active: &Active) -> Result<(), Error> {
        let mut count = 0;
        for node in self.cluster.nodes() {
            count += self.network()?.full_speed(node).await?;
        }
        self.struck(active.fault, active.label, count > 0, format!("packets had to wait {count} times"));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pairs(fault: Fault, nodes: &[u64], forward: bool) -> Vec<(u64, u64)> {
        let mut pairs: Vec<_> = partition(fault, nodes, forward).iter().map(|drop| (drop.at, drop.from)).collect();
        pairs.sort_unstable();
        pairs
    }

    #[test]
    fn partitions_cut_what_their_names_say() {
        let nodes = [1, 2, 3];
        assert_eq!(pairs(Fault::PartitionHalves, &nodes, true), [(1, 2), (1, 3), (2, 1), (3, 1)]);
        assert_eq!(pairs(Fault::PartitionOneWay, &nodes, true), [(1, 2), (1, 3)]);
        assert_eq!(pairs(Fault::PartitionOneWay, &nodes, false), [(2, 1), (3, 1)]);
        // 2 hears both, they do not hear each other.
        assert_eq!(pairs(Fault::PartitionBridge, &nodes, true), [(1, 3), (3, 1)]);
        // Each hears the next one only.
        assert_eq!(pairs(Fault::PartitionRing, &nodes, true), [(1, 3), (2, 1), (3, 2)]);
        assert_eq!(pairs(Fault::PartitionHalves, &[1, 2, 3, 4, 5], true).len(), 12);
    }
}
