//! The servers of all sides, and the work that each of them does in its turn.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use arqon_sdk::ProducerOptions;

use super::{
    Plan, Report,
    cases::{Case, Setting, Work},
    client::Transport,
    measure::{self, Before, Ground, HalfRound},
    ours::{self, Ours},
    publish, read,
    report::{Figures, Try},
    server::{Program, Servers, Sync},
};
use crate::{
    load::{self, Measured, Pace},
    payload::Payloads,
};

/// Bytes that this bus's producer may hold, so that the window is what limits it.
const BUFFER_SIZE: usize = 256 << 20;
/// What an acknowledgement of this bus promises; every one is checked.
const OWN_DURABILITY: &str = "fsync on a majority";
/// Window of the sender that fills the topics to be read.
const PREPARE_WINDOW: usize = 4_096;

/// Does what blocks aside.
///
/// # Errors
/// What `work` says.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, String> + Send + 'static,
) -> Result<T, String> {
    tokio::task::spawn_blocking(work).await.map_err(|error| error.to_string())?
}

/// What clients do, whichever side has its turn.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// How long and how often.
    pub plan: Plan,
    /// How long a message may wait for company on this bus.
    pub linger: Duration,
    /// Messages per second of publish-to-consume.
    pub rate: u32,
    /// Seed of the payloads.
    pub seed: u64,
}

/// All servers of one number of nodes.
pub struct Stage {
    load: Load,
    dir: PathBuf,
    ours: Vec<Ours>,
    nats: Vec<Arc<Servers>>,
    serial: AtomicU64,
}

/// Whose turn it is.
#[derive(Clone)]
pub enum Side<'a> {
    /// This bus.
    Ours(&'a Ours),
    /// NATS, in one of its ways to sync.
    Nats(Arc<Servers>),
}

impl Side<'_> {
    fn name(&self) -> String {
        match self {
            Self::Ours(ours) => ours.name().to_owned(),
            Self::Nats(servers) => format!("nats {}", servers.sync.name()),
        }
    }

    fn pids(&self) -> Vec<u32> {
        match self {
            Self::Ours(ours) => ours.pids(),
            Self::Nats(servers) => servers.pids(),
        }
    }

    fn grounds(&self) -> Vec<Ground> {
        let roots = match self {
            Self::Ours(ours) => ours.logs(),
            Self::Nats(servers) => servers.streams(),
        };
        roots.into_iter().map(Ground::new).collect()
    }

    fn settings(&self, case: &Case) -> Vec<Setting> {
        match self {
            Self::Ours(_) => case.own_settings(),
            Self::Nats(_) => case.nats_settings(),
        }
    }

    fn durability(&self) -> &'static str {
        match self {
            Self::Ours(ours) if ours.logs().len() == 1 => "fsync",
            Self::Ours(_) => OWN_DURABILITY,
            Self::Nats(servers) => servers.sync.durability(servers.count()),
        }
    }

    fn client(&self, case: &Case, setting: &Setting) -> String {
        match (self, case.work) {
            (Self::Ours(_), _) => setting.text(),
            (Self::Nats(_), Work::PublishWebSocket) => format!("raw client over WebSocket, {}", setting.text()),
            (Self::Nats(_), _) => format!("raw client, {}", setting.text()),
        }
    }

    async fn create(&self, topic: &str, method: &'static str) -> Result<String, String> {
        match self {
            Self::Ours(ours) => ours.create_topic(topic).await.map(|()| String::new()),
            Self::Nats(servers) => {
                let (servers, topic) = (servers.clone(), topic.to_owned());
                blocking(move || servers.connect("", Transport::Tcp)?.create_stream(&topic, servers.count(), method))
                    .await
            }
        }
    }

    async fn delete(&self, topic: &str) -> Result<(), String> {
        match self {
            Self::Ours(ours) => ours.delete_topic(topic).await,
            Self::Nats(servers) => {
                let (servers, topic) = (servers.clone(), topic.to_owned());
                blocking(move || servers.connect("", Transport::Tcp)?.delete_stream(&topic)).await
            }
        }
    }
}

/// A topic that is there for all rounds of a case.
struct Prepared {
    topic: String,
    count: u64,
}

/// What one side made of a case.
pub struct Outcome {
    /// The medians.
    pub figures: Figures,
    /// What they are of; those of the same number were measured one right after the other.
    pub rounds: Vec<HalfRound>,
}

/// One half-round's work.
struct Turn<'a> {
    case: &'a Case,
    setting: Setting,
    payloads: Arc<Payloads>,
    time: Duration,
    prepared: Option<&'a Prepared>,
}

impl Stage {
    /// Starts the nodes of each of `programs` (name and file), and, where `nats` is one, the servers of NATS that `cases` ask for.
    ///
    /// # Errors
    /// What does not start.
    pub async fn start(
        load: Load,
        programs: &[(&'static str, PathBuf)],
        nats: Option<&Program>,
        dir: &Path,
        cases: &[&Case],
    ) -> Result<Self, String> {
        let nodes = cases[0].nodes;
        eprintln!("starting {nodes} nodes of each side");
        let with_shield = cases.iter().any(|case| case.work == Work::PublishWebSocket);
        let mut ours = Vec::new();
        for (name, program) in programs {
            let own_dir = dir.join(name);
            std::fs::create_dir_all(&own_dir).map_err(|error| format!("{}: {error}", own_dir.display()))?;
            ours.push(Ours::start(name, program.clone(), &own_dir, nodes, with_shield).await?);
        }
        let mut servers = Vec::new();
        for sync in [Sync::Default, Sync::Always] {
            let is_asked = cases.iter().any(|case| case.against.iter().any(|(other, _)| *other == sync));
            if let Some(program) = nats.filter(|_| is_asked) {
                let (program, dir) = (program.clone(), dir.join(sync.name()));
                servers.push(Arc::new(blocking(move || Servers::start(&program, &dir, nodes, sync)).await?));
            }
        }
        Ok(Self { load, dir: dir.to_owned(), ours, nats: servers, serial: AtomicU64::new(0) })
    }

    /// Who takes part in a case: this bus first.
    pub fn sides(&self, case: &Case) -> Vec<Side<'_>> {
        let is_needed = |servers: &&Arc<Servers>| case.against.iter().any(|(sync, _)| *sync == servers.sync);
        let nats = self.nats.iter().filter(is_needed).cloned().map(Side::Nats);
        self.ours.iter().map(Side::Ours).chain(nats).collect()
    }

    fn fresh_topic(&self, work: Work) -> String {
        let serial = self.serial.fetch_add(1, Ordering::Relaxed);
        // A stream's name must have no dots, a queue's topic must have one.
        if work == Work::Queue { format!("bench{serial}.jobs") } else { format!("bench{serial}") }
    }

    /// All rounds of one case, and the medians of each of `sides`, in their order. Each round begins with another side, so
    /// that none is always the one that finds the disk as the last round left it. With `is_same_setting` all sides
    /// work with the setting that is best for the first.
    ///
    /// # Errors
    /// What failed; a wrong read among it.
    pub async fn case(
        &self,
        case: &Case,
        sides: &[Side<'_>],
        is_same_setting: bool,
        report: &mut Report,
    ) -> Result<Vec<Outcome>, String> {
        let payloads = Arc::new(Payloads::new(self.load.seed, case.size));
        let (mut prepared, mut best) = (Vec::new(), Vec::new());
        for side in sides {
            prepared.push(self.prepare(side, case, &payloads).await?);
            let prepared = prepared.last().and_then(Option::as_ref);
            let chosen = match best.first() {
                Some(first) if is_same_setting => *first,
                _ => self.best_setting(side, case, &payloads, prepared, report).await?,
            };
            best.push(chosen);
        }
        let mut rounds: Vec<Vec<HalfRound>> = vec![Vec::new(); sides.len()];
        for round in 0..self.load.plan.rounds {
            for turn in 0..sides.len() {
                let index = (round as usize + turn) % sides.len();
                let side = &sides[index];
                let turn = Turn {
                    case,
                    setting: best[index],
                    payloads: payloads.clone(),
                    time: self.load.plan.round_time,
                    prepared: prepared[index].as_ref(),
                };
                let half = self.turn(side, &turn).await?;
                let rate = half.measured.messages as f64 / half.measured.seconds;
                let (p50, p99) = (half.measured.p50_us, half.measured.p99_us);
                let (number, of, name) = (round + 1, self.load.plan.rounds, side.name());
                eprintln!(
                    "{} round {number}/{of} {name}: {rate:.0} msg/s, p50 {p50:.0} us, p99 {p99:.0} us",
                    case.name
                );
                report.idle_cpu = report.idle_cpu.max(half.idle_seconds / half.measured.seconds);
                rounds[index].push(half);
            }
        }
        for (side, prepared) in sides.iter().zip(&prepared) {
            if let Some(prepared) = prepared {
                side.delete(&prepared.topic).await?;
            }
        }
        measure::settle(&self.dir).await?;
        let outcomes = sides.iter().zip(&best).zip(rounds).map(|((side, setting), rounds)| {
            let figures = Figures::new(case, side.durability(), side.client(case, setting), &rounds);
            Outcome { figures, rounds }
        });
        Ok(outcomes.collect())
    }

    /// Fills the topic that a reading case needs.
    async fn prepare(
        &self,
        side: &Side<'_>,
        case: &Case,
        payloads: &Arc<Payloads>,
    ) -> Result<Option<Prepared>, String> {
        if !matches!(case.work, Work::Fetch | Work::Queue) {
            return Ok(None);
        }
        let topic = match side {
            Side::Ours(_) => self.fresh_topic(case.work),
            Side::Nats(_) => self.fresh_topic(Work::Fetch),
        };
        let count = self.load.plan.prepared_size / case.size as u64;
        eprintln!("{} {}: writing {count} messages to be read", case.name, side.name());
        let turn = Turn {
            case: &Case { work: Work::Publish, ..*case },
            setting: match side {
                Side::Ours(_) => Setting { method: "sdk", window: PREPARE_WINDOW, batch_size: 256 << 10 },
                Side::Nats(_) => Setting { method: "windowed", window: PREPARE_WINDOW, batch_size: 0 },
            },
            payloads: payloads.clone(),
            time: Duration::MAX,
            prepared: None,
        };
        let grounds = side.grounds();
        let leader = side.create(&topic, turn.setting.method).await?;
        let written = self.publish(side, &turn, &topic, &leader, count).await?;
        measure::check_disk(&grounds, count * case.size as u64).await?;
        measure::settle(&self.dir).await?;
        Ok(Some(Prepared { topic, count: written.messages }))
    }

    /// The setting that is fastest in a short try.
    async fn best_setting(
        &self,
        side: &Side<'_>,
        case: &Case,
        payloads: &Arc<Payloads>,
        prepared: Option<&Prepared>,
        report: &mut Report,
    ) -> Result<Setting, String> {
        let mut best: Option<(f64, Setting)> = None;
        let settings = side.settings(case);
        for setting in &settings {
            if settings.len() > 1 {
                let (payloads, time) = (payloads.clone(), self.load.plan.try_time);
                let turn = Turn { case, setting: *setting, payloads, time, prepared };
                let measured = self.turn(side, &turn).await?.measured;
                let found = Try::new(case, &side.name(), setting, &measured);
                eprintln!(
                    "{} try {}, {}: {:.0} msg/s, p50 {:.0} us, p99 {:.0} us",
                    case.name, found.side, found.setting, found.msgs_per_s, found.p50_us, found.p99_us
                );
                let worth = if case.is_about_latency() { -found.p50_us } else { found.msgs_per_s };
                report.tries.push(found);
                if best.is_none_or(|(other, _)| worth > other) {
                    best = Some((worth, *setting));
                }
            } else {
                best = Some((0.0, *setting));
            }
        }
        best.map(|(_, setting)| setting).ok_or_else(|| "there is no setting to try".to_owned())
    }

    /// One half-round on a topic of its own, or on the prepared one.
    async fn turn(&self, side: &Side<'_>, turn: &Turn<'_>) -> Result<HalfRound, String> {
        let busy = side.pids();
        let all = self.ours.iter().flat_map(Ours::pids).chain(self.nats.iter().flat_map(|servers| servers.pids()));
        let idle: Vec<u32> = all.filter(|pid| !busy.contains(pid)).collect();
        if let Some(prepared) = turn.prepared {
            let before = Before::new(&busy, &idle)?;
            return before.after(self.read(side, turn, prepared).await?);
        }
        let topic = self.fresh_topic(turn.case.work);
        let grounds = side.grounds();
        let leader = side.create(&topic, turn.setting.method).await?;
        let before = Before::new(&busy, &idle)?;
        let count_max = self.load.plan.size_max / turn.case.size as u64;
        let measured = match turn.case.work {
            Work::Consume => self.consume(side, turn, &topic, &leader).await?,
            _ => self.publish(side, turn, &topic, &leader, count_max).await?,
        };
        let mut half = before.after(measured)?;
        half.disk_size = measure::check_disk(&grounds, measured.messages * turn.case.size as u64).await?;
        side.delete(&topic).await?;
        measure::settle(&self.dir).await?;
        Ok(half)
    }

    async fn publish(
        &self,
        side: &Side<'_>,
        turn: &Turn<'_>,
        topic: &str,
        leader: &str,
        count_max: u64,
    ) -> Result<Measured, String> {
        let (case, setting, time) = (turn.case, turn.setting, turn.time);
        let through_web = case.work == Work::PublishWebSocket;
        match side {
            Side::Ours(ours) if case.work == Work::OneAtATime => {
                load::publish_one_at_a_time(ours.client(false), topic, &turn.payloads, time).await
            }
            Side::Ours(ours) => {
                let options = ProducerOptions {
                    linger: self.load.linger,
                    batch_size: setting.batch_size,
                    buffer_size: BUFFER_SIZE,
                    ..ProducerOptions::default()
                };
                let work = load::Publish { payloads: &turn.payloads, options, window: setting.window, time, count_max };
                load::publish(ours.client(through_web), topic, &work).await
            }
            Side::Nats(servers) => {
                let (servers, payloads) = (servers.clone(), turn.payloads.clone());
                let (subject, leader) = (topic.to_owned(), leader.to_owned());
                let transport = if through_web { Transport::WebSocket } else { Transport::Tcp };
                blocking(move || {
                    let mut connection = servers.connect(&leader, transport)?;
                    let window = setting.window as u64;
                    let job = publish::Job { subject: &subject, payloads: &payloads, window, time, count_max };
                    let measured = publish::publish(&mut connection, setting.method, &job)?;
                    let stored = servers.connect(&leader, Transport::Tcp)?.stream_messages(&subject)?;
                    if stored != measured.messages {
                        return Err(format!("NATS has {stored} of {} acknowledged messages", measured.messages));
                    }
                    Ok(measured)
                })
                .await
            }
        }
    }

    async fn consume(&self, side: &Side<'_>, turn: &Turn<'_>, topic: &str, leader: &str) -> Result<Measured, String> {
        let (rate, time) = (self.load.rate, turn.time);
        match side {
            Side::Ours(ours) => {
                let pace = Pace { window: PREPARE_WINDOW, linger: self.load.linger, time };
                load::publish_to_consume(ours.client(false), topic, &turn.payloads, rate, pace).await
            }
            Side::Nats(servers) => {
                let (servers, payloads) = (servers.clone(), turn.payloads.clone());
                let (stream, leader) = (topic.to_owned(), leader.to_owned());
                blocking(move || {
                    let (stream, leader) = (&stream, &leader);
                    let work = read::Consume { stream, leader, payloads: &payloads, rate, time };
                    read::consume(&servers, &work)
                })
                .await
            }
        }
    }

    async fn read(&self, side: &Side<'_>, turn: &Turn<'_>, prepared: &Prepared) -> Result<Measured, String> {
        let (time, setting, count) = (turn.time, turn.setting, prepared.count);
        let is_queue = turn.case.work == Work::Queue;
        match side {
            Side::Ours(ours) if is_queue => {
                ours::queue(ours.client(false), &prepared.topic, &turn.payloads, count, setting, time).await
            }
            Side::Ours(ours) => {
                ours::fetch(ours.client(false), &prepared.topic, &turn.payloads, count, setting, time).await
            }
            Side::Nats(servers) => {
                let (servers, payloads) = (servers.clone(), turn.payloads.clone());
                let (stream, window) = (prepared.topic.clone(), setting.window as u64);
                blocking(move || match is_queue {
                    true => read::queue(&servers, &stream, &payloads, count, window, time),
                    false => read::fetch(&servers, &stream, &payloads, count, window, time),
                })
                .await
            }
        }
    }
}
