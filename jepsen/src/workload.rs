//! Workloads: what clients do while faults go on, and the closing read of every replica.
//!
//! ```text
//!   append     producers of the SDK with several processes each ─┐
//!   producers  sequences set by hand, sent again on purpose      ├─ polls at the leader and at every
//!   queue      jobs, workers that die, results                  ─┤  replica, linearizable reads of the
//!   metadata   topics created, altered, deleted, listed          │  tail (append, producers)
//!                                                                └─ drain: every replica to its end
//! ```
//!
//! Each is one module and one [`Kind`]. Consumer groups and circuits will be two more: a kind,
//! their keys and topics, and their tasks in [`Workload::start`].

mod append;
mod control;
mod drain;
mod metadata;
mod producers;
mod queue;
mod read;
mod tail;
mod tokens;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use arqon_sdk::{Client, Options};
use tokio::{
    sync::Notify,
    task::JoinSet,
    time::{Instant, sleep, timeout},
};

use crate::history::Writer;
use control::Control;

/// Time for one operation of a client, retries included.
const REQUEST_SECONDS_MAX: u64 = 10;
/// How often it is looked whether writes have resumed.
const LOOK_PAUSE: Duration = Duration::from_millis(20);

/// Why a workload cannot run: one line.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Error(String);

impl std::convert::From<arqon_sdk::Error> for Error {
    fn from(error: arqon_sdk::Error) -> Self {
        Self(told(&error))
    }
}

/// What clients do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub enum Kind {
    /// Unique values, appended and read.
    Append,
    /// Producers with sequences that send again what may be written already.
    Producers,
    /// Jobs, workers that die, results.
    Queue,
    /// Topics created, altered, deleted and listed.
    Metadata,
    /// Tokens that must open nothing.
    Tokens,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Append, Self::Producers, Self::Queue, Self::Metadata, Self::Tokens];

    /// The name, as in a command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Append => "append",
            Self::Producers => "producers",
            Self::Queue => "queue",
            Self::Metadata => "metadata",
            Self::Tokens => "tokens",
        }
    }

    /// What it does, in a line.
    #[must_use]
    pub fn purpose(self) -> &'static str {
        match self {
            Self::Append => "unique values, appended and read at the leader and at every replica",
            Self::Producers => "producers with sequences that send again what may be written already",
            Self::Queue => "jobs, workers that die in the middle, one result each",
            Self::Metadata => "topics created, altered, deleted and listed under load",
            Self::Tokens => "tokens that are expired, forged or of others, tried on everything",
        }
    }
}

/// The topic of [`Kind::Append`].
const APPEND_TOPIC: &str = "jepsen.append";
/// The topic of [`Kind::Producers`].
const PRODUCERS_TOPIC: &str = "jepsen.producers";
/// The topics of [`Kind::Queue`].
const JOBS_TOPIC: &str = "jepsen.queue.jobs";
const RESULTS_TOPIC: &str = "jepsen.queue.results";
/// The topic of [`Kind::Tokens`].
const TOKENS_TOPIC: &str = "jepsen.tokens";

/// What the workloads write to and how fast.
#[derive(Clone, Debug)]
pub struct Setup {
    /// Addresses of the nodes for clients, divided by commas.
    pub server: String,
    /// Addresses of the nodes' control planes, `host:port`, in the order of `nodes`.
    pub controls: Vec<String>,
    /// The token to show.
    pub token: String,
    /// The private key in PEM that signs tokens, for [`Kind::Tokens`].
    pub token_key: std::path::PathBuf,
    /// The tenant that the token is for.
    pub tenant: String,
    /// Numbers of the nodes.
    pub nodes: Vec<u64>,
    /// Replicas of each partition.
    pub replication: u32,
    /// Partitions of each topic.
    pub partition_count: u32,
    /// Appends per second that are aimed at, over all processes of a workload.
    pub rate: u32,
    /// Chooses what dies and what is sent again.
    pub seed: u64,
}

impl Setup {
    /// The topics of a workload that hold data.
    #[must_use]
    pub fn topics(&self, kind: Kind) -> Vec<String> {
        let topics: &[&str] = match kind {
            Kind::Append => &[APPEND_TOPIC],
            Kind::Producers => &[PRODUCERS_TOPIC],
            Kind::Queue => &[JOBS_TOPIC, RESULTS_TOPIC],
            Kind::Metadata => &[],
            Kind::Tokens => &[TOKENS_TOPIC],
        };
        topics.iter().map(|topic| (*topic).to_owned()).collect()
    }

    /// The keys of a workload in the history.
    #[must_use]
    pub fn keys(&self, kind: Kind) -> Vec<String> {
        let of_topic = |topic: String| (0..self.partition_count).map(move |partition| key(&topic, partition));
        self.topics(kind).into_iter().flat_map(of_topic).collect()
    }

    /// A client that tries for a while and then says that it does not know.
    ///
    /// # Errors
    /// Options that the SDK refuses.
    fn client(&self, name: &str) -> Result<Client, arqon_sdk::Error> {
        self.client_with(name, &self.token)
    }

    /// As [`Setup::client`], with another token.
    fn client_with(&self, name: &str, token: &str) -> Result<Client, arqon_sdk::Error> {
        let mut options = Options::new([self.server.as_str()], token);
        options.client_name = format!("arqon-jepsen/{name}");
        options.request_timeout = Duration::from_secs(REQUEST_SECONDS_MAX);
        options.attempt_timeout = Duration::from_secs(3);
        options.connect_timeout = Duration::from_secs(2);
        options.backoff_max = Duration::from_millis(500);
        Client::lazy(options)
    }
}

/// The key of a partition in the history.
fn key(topic: &str, partition: u32) -> String {
    format!("{topic}/{partition}")
}

/// What all processes of a workload share.
struct Shared {
    setup: Setup,
    /// The topic that the progress below is about.
    topic: String,
    history: Arc<Writer>,
    stop: AtomicBool,
    stopped: Notify,
    healed: AtomicBool,
    next_producer: AtomicU64,
    next_value: AtomicU64,
    /// Per partition: the offset after the highest acknowledged one.
    ends: Vec<AtomicU64>,
    /// Per partition: appends begun after the heal and acknowledged.
    acked_after_heal: Vec<AtomicU64>,
    /// Appends acknowledged.
    acked_count: AtomicU64,
    /// Jobs whose result stands.
    settled_count: AtomicU64,
    /// Jobs that may wait before no more are submitted.
    waiting_count_max: u64,
}

impl Shared {
    fn new(kind: Kind, setup: Setup, topic: &str, history: Arc<Writer>) -> Arc<Self> {
        let counters = || (0..setup.partition_count).map(|_| AtomicU64::new(0)).collect();
        Arc::new(Self {
            topic: topic.to_owned(),
            history,
            stop: AtomicBool::new(false),
            stopped: Notify::new(),
            healed: AtomicBool::new(false),
            next_producer: AtomicU64::new(0),
            next_value: AtomicU64::new(1),
            ends: counters(),
            acked_after_heal: counters(),
            acked_count: AtomicU64::new(0),
            settled_count: AtomicU64::new(0),
            waiting_count_max: if kind == Kind::Queue { queue::WAITING_COUNT_MAX } else { u64::MAX },
            setup,
        })
    }

    fn key(&self, partition: u32) -> String {
        key(&self.topic, partition)
    }

    fn new_value(&self) -> u64 {
        self.next_value.fetch_add(1, Ordering::Relaxed)
    }

    fn is_healed(&self) -> bool {
        self.healed.load(Ordering::Acquire)
    }

    /// Notes an acknowledgement, and whether its append began after the heal.
    fn acked(&self, partition: u32, offset: u64, healed: bool) {
        self.ends[partition as usize].fetch_max(offset + 1, Ordering::AcqRel);
        self.acked_after_heal[partition as usize].fetch_add(u64::from(healed), Ordering::Relaxed);
        self.acked_count.fetch_add(1, Ordering::Relaxed);
    }

    /// Whether as many jobs wait as may.
    fn is_backed_up(&self) -> bool {
        let settled = self.settled_count.load(Ordering::Relaxed);
        self.acked_count.load(Ordering::Relaxed).saturating_sub(settled) > self.waiting_count_max
    }

    fn stops(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    /// Waits for `pause`, less when the workload stops.
    async fn pause(&self, pause: Duration) {
        let stopped = self.stopped.notified();
        if !self.stops() {
            // Either end of the wait is as good.
            let _ = timeout(pause, stopped).await;
        }
    }

    /// Time between two operations of one of `process_count` processes, so that all together reach the rate.
    fn interval(&self, process_count: usize) -> Duration {
        Duration::from_secs_f64(process_count as f64 / f64::from(self.setup.rate.max(1)))
    }
}

/// An error as the history has it: the code, a colon, the text.
fn told(error: &arqon_sdk::Error) -> String {
    match error {
        // Its text begins with the code.
        arqon_sdk::Error::Server { .. } => error.to_string(),
        _ => format!("{}: {error}", error.code_name()),
    }
}

/// Waits for all tasks; a panic in one is a panic here, as its operations would be missing.
async fn finish<T: 'static>(tasks: &mut JoinSet<T>) {
    while let Some(ended) = tasks.join_next().await {
        if let Err(error) = ended
            && error.is_panic()
        {
            std::panic::resume_unwind(error.into_panic());
        }
    }
}

/// A running workload. Dropping it ends it at once.
pub struct Workload {
    kind: Kind,
    shared: Arc<Shared>,
    /// Submitters and readers, which end first.
    tasks: JoinSet<()>,
    queue: Option<queue::Workers>,
}

impl Workload {
    /// Creates the topics and starts all processes.
    ///
    /// # Errors
    /// The topics cannot be created, or the SDK refuses an option.
    pub async fn start(kind: Kind, setup: Setup, history: Arc<Writer>) -> Result<Self, Error> {
        let control = Control::new(&setup);
        for topic in setup.topics(kind) {
            control.create_at_start(&topic).await?;
        }
        let topic = setup.topics(kind).into_iter().next().unwrap_or_default();
        let shared = Shared::new(kind, setup, &topic, history);
        let mut tasks = JoinSet::new();
        let mut queue = None;
        match kind {
            Kind::Append => append::start(&shared, &mut tasks)?,
            Kind::Producers => producers::start(&shared, &mut tasks)?,
            Kind::Queue => queue = Some(queue::start(&shared, &mut tasks)?),
            Kind::Metadata => metadata::start(&shared, &control, &mut tasks),
            Kind::Tokens => tokens::start(&shared, &mut tasks)?,
        }
        Ok(Self { kind, shared, tasks, queue })
    }

    /// From now on appends count as made after the faults. Waits until each partition has
    /// acknowledged one, or `limit` is over; which, the history tells.
    pub async fn resume(&self, limit: Duration) {
        self.shared.healed.store(true, Ordering::Release);
        let deadline = Instant::now() + limit;
        let missing = || self.shared.acked_after_heal.iter().any(|count| count.load(Ordering::Relaxed) == 0);
        while missing() && Instant::now() < deadline {
            sleep(LOOK_PAUSE).await;
        }
    }

    /// Begins no further operation, waits for those under way and for the jobs that wait, and
    /// reads every replica to its end.
    ///
    /// # Errors
    /// The closing read cannot begin. A replica that is not read to its end is no error: the
    /// history shows it.
    pub async fn finish(mut self) -> Result<(), Error> {
        self.shared.stop.store(true, Ordering::Release);
        self.shared.stopped.notify_waiters();
        // Each task ends by the time-outs of its operations.
        finish(&mut self.tasks).await;
        let shared = &self.shared;
        let ends: Vec<u64> = shared.ends.iter().map(|end| end.load(Ordering::Acquire)).collect();
        match self.queue {
            Some(workers) => workers.finish(shared, &ends).await,
            None if self.kind == Kind::Metadata => {
                metadata::finish(shared).await;
                Ok(())
            }
            None => drain::drain_all(shared, &shared.topic, &ends).await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use arqon_sdk::{Error, wire};

    #[test]
    fn errors_begin_with_their_code_once() {
        let damaged: Error =
            wire::Error { code: wire::ErrorCode::Damaged.into(), message: "t/0 at 5".to_owned(), ..Default::default() }
                .into();
        assert_eq!(told(&damaged), "DAMAGED: t/0 at 5");
        assert_eq!(told(&Error::Closed), "CLOSED: closed");
    }
}
