//! Processes that end, and power that goes.

use super::{Faults, Kind, SECOND_NS, Step};
use crate::{
    cluster::Cluster,
    system::{HostId, now_ns},
    trace,
    world::World,
};

/// What becomes of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// Its process ends. What it wrote is in the page cache, which stays.
    Process,
    /// It loses power, and what was not synced with it.
    Power,
}

/// A machine that is about to end.
#[derive(Clone, Copy, Debug)]
pub(super) struct Fall {
    how: End,
    /// The number of disk operations at which it does.
    at_operation: u64,
    /// It starts again after up to this time, in ns.
    back_ns_max: u64,
}

/// Operations of the disk after which a machine that is about to end does so: a few groups are written.
pub(super) const SOON_OPERATIONS: u64 = 40;
/// As many in half of the cases: it ends within the next group or before the one after it.
pub(super) const NEXT_OPERATIONS: u64 = 4;
/// The same for a machine that has just been started: its logs are opened meanwhile.
const AFTER_START_OPERATIONS: u64 = 400;
/// How often, of a hundred times, the power goes soon after a node was started, where power goes at all.
const AFTER_START_PERCENT: u64 = 20;
/// How often, of a hundred times, the power of all goes after many processes have ended.
const AFTER_MANY_PERCENT: u64 = 60;
const AFTER_MANY_NS: std::ops::Range<u64> = SECOND_NS..6 * SECOND_NS;
/// How long a machine is away as a rule, at most.
pub(super) const BACK_NS_MAX: u64 = 7 * SECOND_NS;
/// A node that is asked to end has so long.
const STOP_NS: u64 = 10 * SECOND_NS;
const STOP_LOOK_NS: std::ops::Range<u64> = SECOND_NS / 20..SECOND_NS / 10;

impl Faults {
    /// Ends machines whose disk has come to the operation at which they end. To be called after each machine that
    /// ran, before anything that it sent can arrive. Says whether one has ended, so that another step may be next.
    pub fn look(&mut self, world: &mut World, cluster: &mut Cluster, host: HostId) -> bool {
        let index = usize::from(host.0).wrapping_sub(1);
        let Some(Some(fall)) = self.falling.get(index) else { return false };
        let ends = cluster.machines[index].memory().operation_count() >= fall.at_operation;
        if ends {
            self.end(index, world, cluster);
        }
        ends
    }

    /// The machine ends after up to so many more operations of the disk, or a little later.
    pub(super) fn fall(&mut self, index: usize, how: End, operations_max: u64, cluster: &Cluster) {
        self.fall_for(index, how, operations_max, BACK_NS_MAX, cluster);
    }

    /// The same, and the machine is back after up to this time, in ns.
    pub(super) fn fall_for(
        &mut self,
        index: usize,
        how: End,
        operations_max: u64,
        back_ns_max: u64,
        cluster: &Cluster,
    ) {
        let memory = cluster.machines[index].memory();
        let operations_max = if self.random.percent(50) { NEXT_OPERATIONS } else { operations_max };
        let at_operation = memory.operation_count() + self.random.of(0..operations_max);
        memory.power_off_at(at_operation);
        self.falling[index] = Some(Fall { how, at_operation, back_ns_max });
        self.later(SECOND_NS / 5..2 * SECOND_NS, Step::End(index));
    }

    /// Ends a machine that is about to.
    pub(super) fn end(&mut self, index: usize, world: &mut World, cluster: &mut Cluster) {
        let Some(fall) = self.falling[index].take() else { return };
        if !world.is_up(cluster.machines[index].host()) {
            return;
        }
        match fall.how {
            End::Process => {
                trace::say(&format!("the process of node {} ends", index + 1));
                cluster.machines[index].kill(world);
                self.injected.push(Kind::Kill);
            }
            End::Power => {
                trace::say(&format!("node {} loses power", index + 1));
                cluster.machines[index].cut(world);
                self.injected.push(Kind::Power);
            }
        }
        self.later(SECOND_NS / 20..fall.back_ns_max, Step::Boot(index));
    }

    pub(super) fn end_now(&mut self, index: usize, how: End, world: &mut World, cluster: &mut Cluster) {
        self.falling[index] = Some(Fall { how, at_operation: 0, back_ns_max: BACK_NS_MAX });
        self.end(index, world, cluster);
    }

    pub(super) fn kill_one(&mut self, index: usize, world: &mut World, cluster: &mut Cluster) {
        if self.random.percent(50) {
            self.end_now(index, End::Process, world, cluster);
        } else {
            self.fall(index, End::Process, SOON_OPERATIONS, cluster);
        }
    }

    /// Whether so many run that a majority ends.
    pub(super) fn kill_many(&mut self, world: &World, cluster: &Cluster) -> bool {
        let mut up = up(world, cluster);
        let majority = cluster.members.len() / 2 + 1;
        if up.len() < majority {
            return false;
        }
        while up.len() > majority && self.random.percent(50) {
            up.remove(self.random.of(0..up.len() as u64) as usize);
        }
        for index in up {
            self.fall(index, End::Process, SOON_OPERATIONS, cluster);
        }
        if self.random.percent(AFTER_MANY_PERCENT) {
            self.later(AFTER_MANY_NS, Step::Begin(Kind::PowerOfAll));
        }
        true
    }

    /// Whether any runs.
    pub(super) fn cut_all(&mut self, world: &mut World, cluster: &mut Cluster) -> bool {
        let up = up(world, cluster);
        let is_any = !up.is_empty();
        for index in up {
            if self.random.percent(50) {
                self.end_now(index, End::Power, world, cluster);
            } else {
                self.fall(index, End::Power, SOON_OPERATIONS, cluster);
            }
        }
        is_any
    }

    pub(super) fn boot(&mut self, index: usize, world: &mut World, cluster: &mut Cluster) {
        if world.is_up(cluster.machines[index].host()) || !cluster.members.contains(&index) {
            return;
        }
        trace::say(&format!("node {} starts", index + 1));
        cluster.machines[index].boot(world);
        self.slow_down_if_swapping(index, cluster);
        let may_lose_power = self.kinds.contains(&Kind::Power) || self.kinds.contains(&Kind::PowerOfAll);
        if may_lose_power && self.random.percent(AFTER_START_PERCENT) {
            self.fall(index, End::Power, AFTER_START_OPERATIONS, cluster);
        }
    }

    pub(super) fn restart(&mut self, index: usize, world: &mut World, cluster: &mut Cluster) {
        let machine = &mut cluster.machines[index];
        machine.ask_to_stop(world);
        let step = Step::Restart(index, machine.boot_count(), now_ns() + STOP_NS);
        self.later(STOP_LOOK_NS, step);
    }

    /// Starts a node again that has ended, or that takes too long to end.
    pub(super) fn look_at_restart(
        &mut self,
        index: usize,
        boot_count: u64,
        until_ns: u64,
        world: &mut World,
        cluster: &mut Cluster,
    ) {
        let machine = &mut cluster.machines[index];
        if machine.boot_count() != boot_count || !world.is_up(machine.host()) {
            return;
        }
        if !machine.has_stopped() && now_ns() < until_ns {
            return self.later(STOP_LOOK_NS, Step::Restart(index, boot_count, until_ns));
        }
        if machine.has_stopped() {
            self.injected.push(Kind::Restart);
        }
        machine.kill(world);
        self.falling[index] = None;
        self.later(SECOND_NS / 10..2 * SECOND_NS, Step::Boot(index));
    }
}

/// The members that run.
fn up(world: &World, cluster: &Cluster) -> Vec<usize> {
    cluster.members.iter().copied().filter(|index| world.is_up(cluster.machines[*index].host())).collect()
}
