//! Nodes that join the cluster and leave it, while everything else goes on.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering::Relaxed},
};

use super::{Faults, Kind, SECOND_NS, Step};
use crate::{cluster::Cluster, invariants::REPLICA_COUNT, trace, workload::members, world::World};

pub(super) const MEMBERS_LOOK_NS: std::ops::Range<u64> = SECOND_NS / 10..SECOND_NS / 5;

/// A node that joins or leaves.
pub(super) struct Change {
    index: usize,
    joins: bool,
    is_done: Arc<AtomicBool>,
}

impl Faults {
    /// Begins to add a node or to take one away, unless another change is under way.
    pub(super) fn change_members(&mut self, world: &mut World, cluster: &mut Cluster) {
        if self.change.is_some() {
            return;
        }
        let spares: Vec<usize> = (0..cluster.machines.len()).filter(|index| !cluster.members.contains(index)).collect();
        let may_leave = cluster.members.len() > REPLICA_COUNT;
        let joins = !spares.is_empty() && (!may_leave || self.random.percent(50));
        if !joins && !may_leave {
            return;
        }
        let index = if joins { *self.random.pick(&spares) } else { self.machine(cluster) };
        let is_done = Arc::<AtomicBool>::default();
        let (access, random, flag) = (cluster.access.clone(), self.random.fork(), is_done.clone());
        trace::say(&format!("node {} is to {} the cluster", index + 1, if joins { "join" } else { "leave" }));
        if joins {
            cluster.members.insert(index);
            cluster.machines[index].boot(world);
            let info = cluster.machines[index].info();
            world.spawn(cluster.clients(), async move {
                members::add(access, info, random).await;
                flag.store(true, Relaxed);
            });
        } else {
            let node = u64::from(cluster.machines[index].number);
            world.spawn(cluster.clients(), async move {
                members::remove(access, node, random).await;
                flag.store(true, Relaxed);
            });
        }
        self.change = Some(Change { index, joins, is_done });
        self.later(MEMBERS_LOOK_NS, Step::Members);
    }

    /// Ends a change that the cluster has carried out: who has left is switched off, and its disk emptied. Says
    /// whether none is under way.
    pub fn settle_members(&mut self, world: &mut World, cluster: &mut Cluster) -> bool {
        let Some(change) = self.change.take_if(|change| change.is_done.load(Relaxed)) else {
            return self.change.is_none();
        };
        let (index, what) = (change.index, if change.joins { "joined" } else { "left" });
        trace::say(&format!("node {} has {what} the cluster", index + 1));
        if !change.joins {
            cluster.members.remove(&index);
            cluster.machines[index].wipe(world);
            self.falling[index] = None;
            self.rotten.remove(&index);
        }
        self.injected.push(Kind::Members);
        true
    }

    /// The node that is about to join.
    #[must_use]
    pub fn joining(&self) -> Option<usize> {
        self.change.as_ref().filter(|change| change.joins).map(|change| change.index)
    }

    /// What is under way, for people.
    #[must_use]
    pub fn change_under_way(&self) -> Option<String> {
        let change = self.change.as_ref()?;
        Some(format!("node {} {} the cluster", change.index + 1, if change.joins { "joins" } else { "leaves" }))
    }
}
