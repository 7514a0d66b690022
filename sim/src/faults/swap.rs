//! A majority that is exchanged: acknowledgements count on a node that ends and comes back, while another is cut off;
//! then that node loses power, and with the one that was cut off it goes on without the rest.
//!
//! The disk of the node that came back is slow: what it wrote before it ended and did not sync then is on the disk by
//! the time of the power cut only if the node synced it before it said that it has it.

use std::time::Duration;

use super::{
    Faults, Kind, SECOND_NS, Step,
    ends::{End, NEXT_OPERATIONS},
};
use crate::{cluster::Cluster, system, trace, world::World};

/// The node that ends is back within this time: before anybody else is elected, so that its leader goes on where it was.
const BACK_SOON_NS_MAX: u64 = SECOND_NS / 3;
/// What a step to its disk takes from then on, at most.
const SLOW: Duration = Duration::from_secs(8);

/// Who has which part.
#[derive(Clone, Debug)]
pub(super) struct Swap {
    /// Ends in a write, comes back, and loses power.
    victim: usize,
    /// Cut off in the end, in place of those that were cut off before.
    last: Vec<usize>,
}

impl Faults {
    /// Cuts a minority off, and has another node end. One exchange at a time.
    pub(super) fn begin_swap(&mut self, world: &World, cluster: &Cluster) {
        let mut order: Vec<usize> = cluster.members.iter().copied().collect();
        for at in (1..order.len()).rev() {
            order.swap(at, self.random.of(0..at as u64 + 1) as usize);
        }
        let minority = (order.len() - 1) / 2;
        let (away, rest) = order.split_at(minority);
        let victim = rest[0];
        if self.swapping.is_some() || minority == 0 || !world.is_up(cluster.machines[victim].host()) {
            return;
        }
        self.swapping = Some(victim);
        isolate(away, cluster);
        self.fall_for(victim, End::Process, NEXT_OPERATIONS, BACK_SOON_NS_MAX, cluster);
        let last = rest[1..].iter().copied().take(minority).collect();
        self.later(2 * SECOND_NS..4 * SECOND_NS, Step::Swap(Swap { victim, last }));
    }

    /// A machine has been started.
    pub(super) fn slow_down_if_swapping(&self, index: usize, cluster: &Cluster) {
        if self.swapping == Some(index) {
            cluster.machines[index].set_slow(SLOW);
        }
    }

    /// Lets the minority back, when the victim has lost power and others are cut off.
    pub(super) fn swap(&mut self, swap: &Swap, world: &mut World, cluster: &mut Cluster) {
        self.swapping = None;
        if world.is_up(cluster.machines[swap.victim].host()) {
            trace::say(&format!("the majority is exchanged: node {} loses power", swap.victim + 1));
            self.injected.push(Kind::MajoritySwap);
        }
        self.end_now(swap.victim, End::Power, world, cluster);
        system::with_network(|network| network.links.heal());
        isolate(&swap.last, cluster);
        self.later(3 * SECOND_NS..10 * SECOND_NS, Step::HealLinks);
    }
}

/// Cuts nodes off from the other nodes. Clients reach them.
fn isolate(nodes: &[usize], cluster: &Cluster) {
    let inside: Vec<_> = nodes.iter().map(|index| cluster.machines[*index].host()).collect();
    system::with_network(|network| {
        for a in cluster.hosts() {
            for b in cluster.hosts() {
                if inside.contains(&a) != inside.contains(&b) {
                    network.links.change(a, b, |link| link.is_cut = true);
                }
            }
        }
    });
}
