//! The nemesis: which fault when, from a seed.

use std::{collections::BTreeMap, path::PathBuf, sync::Arc, time::Duration};

use rand::{RngExt, SeedableRng, rngs::StdRng, seq::IndexedRandom};
use tokio::time::{Instant, sleep, sleep_until};

use super::{
    Choice, Fault,
    active::{Active, Undo},
    damage::OldChunk,
    script::{Script, Way},
    upgrade::Programs,
};
use crate::{
    cluster::{Cluster, Error},
    history::{Kind, Line, Writer},
    report,
};

/// Time between the end of a fault and the next one, in milliseconds, at most.
const PAUSE_MS_MAX: u64 = 1_000;
/// Faults that are tried beyond the time, at most.
const LATE_COUNT_MAX: usize = 8;
/// How likely a fault that is not proven yet comes before the others.
const UNPROVEN_CHANCE: f64 = 0.5;
/// How long a mix keeps to its present part of the faults.
const SHIFT_TIME: Duration = Duration::from_secs(20);

/// What to do for how long.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Chooses everything that is chosen here.
    pub seed: u64,
    /// Which faults.
    pub choice: Choice,
    /// How long to begin new ones.
    pub time: Duration,
    /// Copies of each partition.
    pub replication: u32,
    /// Topics of the workloads.
    pub topics: Vec<String>,
    /// Keys of the workloads.
    pub keys: Vec<String>,
    /// Whether packets can be dropped.
    pub may_partition: bool,
    /// What rolling upgrades go from and to.
    pub programs: Option<Programs>,
    /// Makes these faults, one after the other, in place of those of `choice` by chance.
    pub script: Option<Script>,
    /// The program with crash points.
    pub planted: Option<PathBuf>,
    /// Crash points to choose from; none: all.
    pub points: Vec<String>,
    /// Without lines on the terminal.
    pub quiet: bool,
}

/// Makes faults on a cluster and records them.
pub struct Nemesis<'a> {
    pub(super) cluster: &'a mut Cluster,
    pub(super) history: Arc<Writer>,
    pub(super) random: StdRng,
    pub(super) plan: Plan,
    /// Nodes whose files may be damaged: a minority of every partition's, the same ones all the time.
    pub(super) damaged: Vec<u64>,
    /// A part of a file as it was at an earlier fault.
    pub(super) old: Option<OldChunk>,
    /// The topic that the last crash point was reached with: it stays until the next one, so that the node has to
    /// open what it left of it.
    pub(super) scratch: Option<String>,
    /// How the fault that is begun is to be made.
    pub(super) way: Way,
    /// Of each kind that struck, how often it is proven.
    proven: BTreeMap<Fault, u64>,
    pub(super) active: Vec<Active>,
    /// What the mix draws from at the moment, and until when.
    part: (Vec<Fault>, Instant),
}

impl<'a> Nemesis<'a> {
    /// A nemesis that has not begun.
    #[must_use]
    pub fn new(cluster: &'a mut Cluster, history: Arc<Writer>, plan: Plan) -> Self {
        let mut random = StdRng::seed_from_u64(plan.seed);
        let nodes = cluster.nodes();
        // Two nodes of five may have two copies of three.
        let damaged = nodes.sample(&mut random, plan.replication.saturating_sub(1) as usize / 2).copied().collect();
        let part = (Vec::new(), Instant::now());
        Self {
            cluster,
            history,
            random,
            plan,
            damaged,
            old: None,
            scratch: None,
            way: Way::Any,
            proven: BTreeMap::new(),
            active: Vec::new(),
            part,
        }
    }

    /// Makes faults until the time is over, then heals everything, which the history calls `heal`. A node that does
    /// not come back, or ends without a fault, ends the faults and is recorded as `not-ready`.
    ///
    /// # Errors
    /// A fault that could not be made or healed.
    pub async fn run(&mut self) -> Result<(), Error> {
        let has_faults = !self.plan.choice.faults.is_empty();
        let is_well = match self.plan.script {
            Some(script) => self.follow(&script).await?,
            None => self.make_by_chance().await?,
        };
        self.end_all().await?;
        let is_well = is_well && self.settle().await;
        self.prove_all(is_well).await?;
        if has_faults {
            self.history.record(Line { nodes: self.cluster.nodes(), ..Line::nemesis("heal") });
        }
        Ok(())
    }

    /// The faults of a script; whether all nodes were well before the last one.
    async fn follow(&mut self, script: &Script) -> Result<bool, Error> {
        for step in script.sequence() {
            sleep(step.after).await;
            self.way = step.way;
            self.begin(step.fault).await?;
            if let Some(until) = self.active.iter().map(|active| active.until).max() {
                sleep_until(until).await;
            }
            self.end_all().await?;
            if !self.settle().await {
                return Ok(false);
            }
        }
        self.way = Way::Any;
        Ok(true)
    }

    /// Faults by chance until the time is over; whether all nodes were well before the last one.
    async fn make_by_chance(&mut self) -> Result<bool, Error> {
        let end = Instant::now() + self.plan.time;
        let mut next = Instant::now();
        let mut is_well = true;
        while is_well && Instant::now() < end {
            if self.plan.choice.faults.is_empty() {
                sleep_until(end).await;
                break;
            }
            self.end_due(Instant::now()).await?;
            if self.active.is_empty() {
                is_well = self.settle().await;
            }
            if is_well && self.active.len() < self.plan.choice.width && Instant::now() >= next {
                if let Some(fault) = self.draw() {
                    self.begin(fault).await?;
                }
                next = Instant::now() + Duration::from_millis(self.random.random_range(100..=PAUSE_MS_MAX));
            }
            let due = self.active.iter().map(|active| active.until).min().unwrap_or(end);
            let wake = if self.active.len() < self.plan.choice.width { due.min(next) } else { due };
            sleep_until(wake.min(end)).await;
        }
        Ok(is_well)
    }

    async fn end_all(&mut self) -> Result<(), Error> {
        self.end_due(Instant::now() + Duration::from_secs(1_000_000)).await
    }

    /// Tries what struck without a proof a few times more, since a run does not count otherwise: damage to
    /// bytes that nobody reads again, for example, proves nothing.
    async fn prove_all(&mut self, mut is_well: bool) -> Result<(), Error> {
        for _ in 0..LATE_COUNT_MAX {
            let unproven = |(fault, count): (&Fault, &u64)| (*count == 0).then_some(*fault);
            let Some(fault) = self.proven.iter().find_map(unproven).filter(|_| is_well) else { break };
            self.begin(fault).await?;
            if let Some(until) = self.active.iter().map(|active| active.until).max() {
                sleep_until(until).await;
            }
            self.end_all().await?;
            is_well = self.settle().await;
        }
        Ok(())
    }

    /// The next fault, unless none of this time's goes with what is under way.
    fn draw(&mut self) -> Option<Fault> {
        if self.plan.choice.width > 1 && Instant::now() >= self.part.1 {
            let all = &self.plan.choice.faults;
            let count = self.random.random_range(2..=all.len().clamp(2, 6));
            self.part = (all.sample(&mut self.random, count).copied().collect(), Instant::now() + SHIFT_TIME);
            let names = self.part.0.iter().map(|fault| fault.name()).collect::<Vec<_>>().join(", ");
            report::progress(self.plan.quiet, &format!("  from now on: {names}"));
        }
        let pool = if self.plan.choice.width > 1 { &self.part.0 } else { &self.plan.choice.faults };
        let busy: Vec<u64> = self.active.iter().flat_map(|active| active.nodes.iter().copied()).collect();
        let has_network = self.active.iter().any(|active| active.fault.is_network());
        let fits = |fault: &&Fault| {
            let is_there = self.active.iter().any(|active| active.fault == **fault);
            let is_alone = fault.is_alone() && !self.active.is_empty();
            let is_second_network = fault.is_network() && has_network;
            !(is_there || is_alone || is_second_network)
        };
        let mut fitting: Vec<Fault> = pool.iter().filter(fits).copied().collect();
        let is_proven = |fault: &Fault| self.proven.get(fault).is_some_and(|count| *count > 0);
        if self.random.random_bool(UNPROVEN_CHANCE) && fitting.iter().any(|fault| !is_proven(fault)) {
            fitting.retain(|fault| !is_proven(fault));
        }
        let is_free = busy.len() < self.cluster.nodes().len();
        fitting.choose(&mut self.random).copied().filter(|fault| is_free || fault.is_network())
    }

    async fn begin(&mut self, fault: Fault) -> Result<(), Error> {
        let begun = match fault {
            Fault::Kill => self.kill().await,
            Fault::Pause | Fault::PauseLeader => self.pause(fault).await,
            Fault::Roll => self.roll().await,
            Fault::Upgrade => self.upgrade().await,
            Fault::ClockJump | Fault::ClockStrobe => self.clock(fault).await,
            Fault::PartitionHalves
            | Fault::PartitionOneWay
            | Fault::PartitionBridge
            | Fault::PartitionRing
            | Fault::Loss => self.drop_packets(fault).await,
            Fault::Delay => self.slow_links().await,
            Fault::PowerCutAll | Fault::PowerCutOne => self.power_cut(fault).await,
            Fault::MajoritySwap => self.majority_swap().await,
            Fault::DiskFull | Fault::EioWrite | Fault::EioFsync | Fault::SlowDisk => self.disk_trouble(fault).await,
            Fault::BitFlip | Fault::FileDamage => self.damage(fault).await,
            Fault::BadRecordAll => self.damage_everywhere().await,
            Fault::Membership => self.change_members().await,
            Fault::FailPoint => self.fail_point().await,
        };
        if let Some(active) = begun? {
            self.active.push(active);
        }
        Ok(())
    }

    /// Ends what is to end by `time`.
    async fn end_due(&mut self, time: Instant) -> Result<(), Error> {
        while let Some(index) = self.active.iter().position(|active| active.until <= time) {
            let active = self.active.swap_remove(index);
            match active.undo.clone() {
                Undo::Upgrade(upgrade) => {
                    if let Some(goes_on) = self.upgrade_on(upgrade).await? {
                        self.active.push(goes_on);
                        continue;
                    }
                }
                Undo::Start => self.start_again(&active).await?,
                Undo::Continue => self.go_on(&active).await?,
                Undo::Packets => self.let_packets_through(&active).await?,
                Undo::Speed => self.full_speed(&active).await?,
                Undo::Disk => self.make_sound(&active).await?,
                Undo::Nothing => {}
            }
            self.history.record(Line::ended(active.fault.name(), active.label));
        }
        Ok(())
    }

    /// Waits until every node is ready; false when one is not.
    pub(super) async fn settle(&mut self) -> bool {
        if let Some((node, story)) = self.cluster.ended_by_itself() {
            self.not_ready(node, story);
            return false;
        }
        for node in self.cluster.nodes() {
            if let Err(error) = self.cluster.ready(node).await {
                self.not_ready(node, error.to_string());
                return false;
            }
        }
        true
    }

    pub(super) fn not_ready(&self, node: u64, story: String) {
        report::progress(self.plan.quiet, &format!("  node {node}: {story}"));
        self.history.record(Line { node: Some(node), error: Some(story), ..Line::nemesis("not-ready") });
    }

    /// A node that no fault has at the moment, among `of`.
    pub(super) fn pick(&mut self, of: &[u64]) -> Option<u64> {
        let busy: Vec<u64> = self.active.iter().flat_map(|active| active.nodes.iter().copied()).collect();
        let free: Vec<u64> = of.iter().copied().filter(|node| !busy.contains(node)).collect();
        free.choose(&mut self.random).copied()
    }

    /// A number of milliseconds, so that short ones are as likely as long ones.
    pub(super) fn time(&mut self, min_ms: u64, max_ms: u64) -> Duration {
        let (min, max) = (min_ms.max(1) as f64, max_ms.max(min_ms).max(1) as f64);
        let exponent = self.random.random_range(0.0..=1.0);
        Duration::from_millis((min * (max / min).powf(exponent)) as u64)
    }

    /// Records that a fault begins on `nodes`, with what they lead.
    pub(super) async fn begins(&self, fault: Fault, label: u64, nodes: &[u64]) {
        let mut leads = Vec::new();
        for topic in &self.plan.topics {
            // Unknown leaders only cost a measurement of the fail-over.
            let leaders = self.cluster.leaders(topic, label).await.unwrap_or_default();
            let led = leaders.iter().filter(|(_, leader)| nodes.contains(leader));
            leads.extend(led.map(|(partition, _)| format!("{topic}/{partition}")));
        }
        let text = nodes.iter().map(u64::to_string).collect::<Vec<_>>().join(", ");
        report::progress(self.plan.quiet, &format!("  {fault} on {text}"));
        self.history.record(Line { leads, nodes: nodes.to_vec(), ..Line::fault(fault.name(), label) });
    }

    /// Records whether it is proven that a fault struck, and by what.
    pub(super) fn struck(&mut self, fault: Fault, label: u64, is_proven: bool, detail: String) {
        *self.proven.entry(fault).or_default() += u64::from(is_proven);
        let told = if is_proven { "" } else { ", NOT PROVEN" };
        report::progress(self.plan.quiet, &format!("  {fault}: {detail}{told}"));
        self.history.record(Line {
            kind: Kind::Info,
            proven: Some(is_proven),
            detail: Some(detail),
            ..Line::fault(fault.name(), label)
        });
    }

    /// One that needs no end.
    pub(super) fn over(fault: Fault, label: u64) -> Active {
        Active { fault, label, nodes: Vec::new(), until: Instant::now(), undo: Undo::Nothing }
    }
}
