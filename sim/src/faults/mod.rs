//! What goes wrong in a run, drawn from its seed: a plan of faults, and what each does to the world.

mod damage;
mod ends;
mod links;
mod members;
mod swap;

use std::{collections::BTreeSet, time::Duration};

use arqon_storage::Operation;

use self::{
    ends::{End, Fall, SOON_OPERATIONS},
    members::{Change, MEMBERS_LOOK_NS},
    swap::Swap,
};
use crate::{
    cluster::Cluster,
    invariants::REPLICA_COUNT,
    random::Random,
    system::{self, now_ns, set_skew_ms},
    trace,
    world::World,
};

/// Kinds of faults. A run has some of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// The process of a node ends, perhaps in the middle of a write; what was written is there, synced or not.
    Kill,
    /// The processes of a majority, or of all, end in the middle of writes. Often the power of all goes soon after
    /// they are back.
    KillOfMany,
    /// A node ends cleanly and starts again.
    Restart,
    /// The power goes, perhaps in the middle of a write; what was not synced is lost, torn or there.
    Power,
    /// The power of all machines goes at once.
    PowerOfAll,
    /// A minority is cut off, another node ends in a write, comes back and then loses power; now the minority is
    /// back, and others are cut off.
    MajoritySwap,
    /// Some nodes do not reach the others.
    Partition,
    /// One direction between two nodes is cut.
    OneWay,
    /// Packets are lost and late.
    Loss,
    /// Connections break.
    Reset,
    /// A process stands still.
    Pause,
    /// Every step to a disk takes long.
    SlowDisk,
    /// Writes, or syncs, of a disk fail.
    FailingDisk,
    /// A disk is full.
    FullDisk,
    /// A wall clock jumps.
    Clock,
    /// Bytes on the disks of a minority change.
    Rot,
    /// A file on the disk of a minority is cut, zeroed or gone when the node starts.
    Files,
    /// A node is added to the cluster, or is emptied and leaves it.
    Members,
}

/// All kinds.
pub const KINDS: [Kind; 18] = [
    Kind::Kill,
    Kind::KillOfMany,
    Kind::Restart,
    Kind::Power,
    Kind::PowerOfAll,
    Kind::MajoritySwap,
    Kind::Partition,
    Kind::OneWay,
    Kind::Loss,
    Kind::Reset,
    Kind::Pause,
    Kind::SlowDisk,
    Kind::FailingDisk,
    Kind::FullDisk,
    Kind::Clock,
    Kind::Rot,
    Kind::Files,
    Kind::Members,
];

const SECOND_NS: u64 = 1_000_000_000;
/// How long one mix of faults lasts, where the seed says that they shift.
const MIX_NS: std::ops::Range<u64> = 4 * SECOND_NS..12 * SECOND_NS;
/// How often, of a hundred times, they do.
const SHIFT_PERCENT: u64 = 50;

/// What is to be done to the world at a time.
#[derive(Clone, Debug)]
enum Step {
    Begin(Kind),
    Boot(usize),
    /// A machine ends now, if its disk has not come to the operation at which it does.
    End(usize),
    /// Looks whether the machine has ended cleanly that was started for this time; it may take until then, in ns.
    Restart(usize, u64, u64),
    /// Looks how far a change of members is.
    Members,
    /// The second part of an exchange of the majority.
    Swap(Swap),
    HealLinks,
    HealDisk(usize),
}

/// The faults of one run, and how often each took place.
pub struct Faults {
    kinds: Vec<Kind>,
    random: Random,
    /// What comes, by time.
    steps: Vec<(u64, Step)>,
    /// Mixes of kinds may follow one another.
    shifts: bool,
    /// Machines that are about to end.
    falling: Vec<Option<Fall>>,
    /// Who came back and is to lose power, while a majority is being exchanged.
    swapping: Option<usize>,
    /// The change of members that is under way.
    change: Option<Change>,
    /// Machines that were ever made to rot: the same minority for a whole run.
    rotting: BTreeSet<usize>,
    /// Those of them whose bytes were changed.
    pub rotten: BTreeSet<usize>,
    /// Each time that a fault took place.
    pub injected: Vec<Kind>,
    mean_pause_ns: u64,
}

impl Faults {
    /// Draws the kinds of a run. `capacity` is how many nodes there can be.
    #[must_use]
    pub fn new(node_count: usize, capacity: usize, only: Option<&[Kind]>, mut random: Random) -> Self {
        let kinds = only.map_or_else(|| draw(&mut random), <[Kind]>::to_vec);
        let shifts = only.is_none() && random.percent(SHIFT_PERCENT);
        let mean_pause_ns = random.of(1..6) * SECOND_NS;
        // Of the replicas of a group, wherever they are.
        let minority = (node_count.min(REPLICA_COUNT) - 1) / 2;
        let mut rotting = BTreeSet::new();
        while rotting.len() < minority {
            rotting.insert(random.of(0..node_count as u64) as usize);
        }
        Self {
            kinds,
            random,
            steps: Vec::new(),
            shifts,
            falling: vec![None; capacity],
            swapping: None,
            change: None,
            rotting,
            rotten: BTreeSet::new(),
            injected: Vec::new(),
            mean_pause_ns,
        }
    }

    /// The kinds with which this run begins.
    #[must_use]
    pub fn kinds(&self) -> &[Kind] {
        &self.kinds
    }

    /// Plans the faults from one time to another, in ns.
    pub fn plan(&mut self, from_ns: u64, to_ns: u64) {
        let mut at_ns = from_ns;
        let mut mix = self.kinds.clone();
        let mut shift_ns = if self.shifts { from_ns + self.random.of(MIX_NS) } else { u64::MAX };
        loop {
            at_ns += self.random.of(self.mean_pause_ns / 4..self.mean_pause_ns * 2);
            if at_ns >= to_ns {
                break;
            }
            if at_ns >= shift_ns {
                mix = draw(&mut self.random);
                shift_ns = at_ns + self.random.of(MIX_NS);
                trace::say(&format!("faults from {} ms on: {mix:?}", at_ns / 1_000_000));
            }
            let kind = *self.random.pick(&mix);
            self.steps.push((at_ns, Step::Begin(kind)));
        }
    }

    /// When the next step is to be taken, in ns.
    #[must_use]
    pub fn next_ns(&self) -> Option<u64> {
        self.steps.iter().map(|(at_ns, _)| *at_ns).min()
    }

    fn later(&mut self, delay_ns: std::ops::Range<u64>, step: Step) {
        let at_ns = now_ns() + self.random.of(delay_ns);
        self.steps.push((at_ns, step));
    }

    /// A member of the cluster.
    fn machine(&mut self, cluster: &Cluster) -> usize {
        let members: Vec<usize> = cluster.members.iter().copied().collect();
        *self.random.pick(&members)
    }

    /// A member other than `index`, unless that is the only one.
    fn another(&mut self, index: usize, cluster: &Cluster) -> usize {
        let others: Vec<usize> = cluster.members.iter().copied().filter(|other| *other != index).collect();
        if others.is_empty() { index } else { *self.random.pick(&others) }
    }

    /// Takes the steps whose time has come.
    pub fn act(&mut self, world: &mut World, cluster: &mut Cluster) {
        while let Some(at) = self.steps.iter().position(|(at_ns, _)| *at_ns <= now_ns()) {
            let (_, step) = self.steps.remove(at);
            match step {
                Step::Begin(kind) => self.begin(kind, world, cluster),
                Step::Boot(index) => self.boot(index, world, cluster),
                Step::End(index) => self.end(index, world, cluster),
                Step::Restart(index, boot_count, until_ns) => {
                    self.look_at_restart(index, boot_count, until_ns, world, cluster);
                }
                Step::Members => {
                    if !self.settle_members(world, cluster) {
                        self.later(MEMBERS_LOOK_NS, Step::Members);
                    }
                }
                Step::Swap(swap) => self.swap(&swap, world, cluster),
                Step::HealLinks => {
                    trace::say("the network is sound again");
                    system::with_network(|network| network.links.heal());
                }
                Step::HealDisk(index) => self.heal_disk(index, world, cluster),
            }
        }
    }

    fn begin(&mut self, kind: Kind, world: &mut World, cluster: &mut Cluster) {
        let index = self.machine(cluster);
        let host = cluster.machines[index].host();
        let is_up = world.is_up(host);
        trace::say(&format!("fault {kind:?}, node {} where it concerns one", index + 1));
        match kind {
            // Those that end are counted when they do.
            Kind::Kill if is_up => return self.kill_one(index, world, cluster),
            Kind::Power if is_up => return self.fall(index, End::Power, SOON_OPERATIONS, cluster),
            Kind::KillOfMany if !self.kill_many(world, cluster) => return,
            Kind::PowerOfAll if !self.cut_all(world, cluster) => return,
            Kind::KillOfMany | Kind::PowerOfAll => {}
            Kind::MajoritySwap => return self.begin_swap(world, cluster),
            Kind::Restart if is_up => return self.restart(index, world, cluster),
            Kind::Members => return self.change_members(world, cluster),
            Kind::Partition => self.partition(index, cluster),
            Kind::OneWay => self.one_way(index, cluster),
            Kind::Loss => self.loss(cluster),
            Kind::Reset if !self.reset(index, cluster) => return,
            Kind::Reset => {}
            Kind::Pause if is_up => {
                let until_ns = now_ns() + self.random.of(SECOND_NS / 2..15 * SECOND_NS);
                world.pause(host, until_ns);
            }
            Kind::SlowDisk => {
                let slow = Duration::from_millis(self.random.of(20..1_500));
                cluster.machines[index].set_slow(slow);
                self.later(SECOND_NS..10 * SECOND_NS, Step::HealDisk(index));
            }
            Kind::FailingDisk if is_up => {
                let operation =
                    *self.random.pick(&[Operation::Write, Operation::Sync, Operation::SyncDir, Operation::Name]);
                cluster.machines[index].disk().fail(operation, self.random.of(0..10), std::io::ErrorKind::Other);
                if operation == Operation::Sync {
                    cluster.machines[index].memory().lose_unsynced();
                }
                self.later(SECOND_NS..8 * SECOND_NS, Step::HealDisk(index));
            }
            Kind::FullDisk => {
                let used_size = damage::used_size(index, cluster);
                let spare = self.random.of(0..64) << 10;
                cluster.machines[index].memory().set_capacity(Some(used_size + spare));
                self.later(SECOND_NS..10 * SECOND_NS, Step::HealDisk(index));
            }
            Kind::Clock => {
                let skew_ms = self.random.of(0..7_200_000) as i64 - 3_600_000;
                set_skew_ms(host, if self.random.percent(30) { 0 } else { skew_ms });
            }
            Kind::Rot => return self.rot(world, cluster),
            Kind::Files => return self.spoil(world, cluster),
            _ => return,
        }
        self.injected.push(kind);
    }

    /// Makes a disk sound. A node that met an error has closed logs for writing: it is started again, as an
    /// operator would.
    fn heal_disk(&mut self, index: usize, world: &mut World, cluster: &mut Cluster) {
        let machine = &mut cluster.machines[index];
        machine.set_slow(Duration::ZERO);
        machine.memory().set_capacity(None);
        machine.disk().heal();
        let has_failed = machine.take_has_failed() || machine.failed().is_some();
        if has_failed && world.is_up(machine.host()) {
            trace::say(&format!("node {} starts again over a sound disk", index + 1));
            machine.kill(world);
            self.falling[index] = None;
            machine.boot(world);
        }
    }

    /// Ends all faults: everything runs, on sound disks, links and clocks.
    pub fn heal(&mut self, world: &mut World, cluster: &mut Cluster) {
        trace::say("all faults end");
        system::with_network(|network| network.links.heal());
        for index in 0..cluster.machines.len() {
            self.end(index, world, cluster);
            set_skew_ms(cluster.machines[index].host(), 0);
            world.pause(cluster.machines[index].host(), 0);
            self.heal_disk(index, world, cluster);
            // Nobody looks any more whether it has ended.
            if cluster.machines[index].is_stopping() {
                cluster.machines[index].kill(world);
            }
        }
        self.steps.clear();
        cluster.boot_all(world);
    }
}

/// Some of all kinds.
fn draw(random: &mut Random) -> Vec<Kind> {
    let mut kinds = KINDS.to_vec();
    let wanted = random.of(1..5) as usize;
    while kinds.len() > wanted {
        kinds.remove(random.of(0..kinds.len() as u64) as usize);
    }
    kinds
}
