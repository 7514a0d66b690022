//! Hosts that do not reach each other, or not as they should.

use super::{Faults, SECOND_NS, Step};
use crate::{
    cluster::Cluster,
    network::Link,
    system::{self, HostId},
    trace,
};

/// How often, of a hundred times, the clients' host is among those whose links change.
const CLIENTS_PERCENT: u64 = 30;

impl Faults {
    /// The hosts whose links change: all nodes, and now and then the clients, who then do not hear what became of
    /// their requests.
    fn hosts(&mut self, cluster: &Cluster) -> Vec<HostId> {
        let mut hosts = cluster.hosts();
        if self.random.percent(CLIENTS_PERCENT) {
            hosts.push(cluster.clients());
        }
        hosts
    }

    pub(super) fn partition(&mut self, index: usize, cluster: &Cluster) {
        let other = cluster.machines[self.another(index, cluster)].host();
        let hosts = self.hosts(cluster);
        // Some node is on each side.
        let side: Vec<bool> = hosts
            .iter()
            .map(|host| {
                let is_drawn = self.random.percent(50);
                *host == cluster.machines[index].host() || (*host != other && is_drawn)
            })
            .collect();
        system::with_network(|network| {
            for (a, in_a) in hosts.iter().zip(&side) {
                for (b, in_b) in hosts.iter().zip(&side) {
                    if in_a != in_b {
                        network.links.change(*a, *b, |link| link.is_cut = true);
                    }
                }
            }
        });
        self.later(SECOND_NS / 2..12 * SECOND_NS, Step::HealLinks);
    }

    pub(super) fn one_way(&mut self, index: usize, cluster: &Cluster) {
        let node = cluster.machines[index].host();
        let others: Vec<HostId> = self.hosts(cluster).into_iter().filter(|host| *host != node).collect();
        let other = if others.is_empty() { node } else { *self.random.pick(&others) };
        let (from, to) = if self.random.percent(50) { (node, other) } else { (other, node) };
        system::with_network(|network| network.links.change(from, to, |link| link.is_cut = true));
        self.later(SECOND_NS / 2..12 * SECOND_NS, Step::HealLinks);
    }

    pub(super) fn loss(&mut self, cluster: &Cluster) {
        let hosts = self.hosts(cluster);
        for from in &hosts {
            for to in &hosts {
                let link = Link {
                    is_cut: false,
                    loss_percent: self.random.of(0..20),
                    delay_ns: (100_000, self.random.of(1_000_000..200_000_000)),
                };
                system::with_network(|network| network.links.change(*from, *to, |old| *old = link));
            }
        }
        self.later(SECOND_NS..10 * SECOND_NS, Step::HealLinks);
    }

    /// Says whether there was a connection to break.
    pub(super) fn reset(&mut self, index: usize, cluster: &Cluster) -> bool {
        let mut hosts = cluster.hosts();
        hosts.push(cluster.clients());
        let count = self.random.of(1..6) as usize;
        let pair = (cluster.machines[index].host(), *self.random.pick(&hosts));
        let count = system::with_network(|network| network.break_connections(pair, count));
        trace::say(&format!("{count} connections break between {} and {}", pair.0.0, pair.1.0));
        count > 0
    }
}
