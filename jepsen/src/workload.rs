//! The append workload: producers that write unique values, readers that poll, and the closing
//! read of every replica. Other workloads stand beside it as modules of their own.
//!
//! ```text
//!   producer (one id, one partition) ─┬─ process: append, wait, append, ...
//!                                     ├─ process
//!                                     └─ process      together they keep a pipeline full
//!   reader   (one partition, the leader or one node's replica): poll, poll, ...
//! ```
//!
//! After an unknown outcome the producer and all its processes are replaced by new ones.

mod append;
mod read;

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

pub use read::drain_all;

/// Time for one operation of a client, retries included.
const REQUEST_SECONDS_MAX: u64 = 10;
/// Producers per partition.
const PRODUCER_COUNT: usize = 2;
/// Processes that share one producer.
const PROCESS_COUNT: usize = 8;
/// How often it is looked whether writes have resumed.
const LOOK_PAUSE: Duration = Duration::from_millis(20);

/// What the workload writes to and how fast.
#[derive(Clone, Debug)]
pub struct Setup {
    /// Addresses of the nodes, divided by commas.
    pub server: String,
    /// The token to show.
    pub token: String,
    /// The topic.
    pub topic: String,
    /// Its partitions.
    pub partition_count: u32,
    /// Numbers of the nodes.
    pub nodes: Vec<u64>,
    /// Appends per second that are aimed at, over all processes.
    pub rate: u32,
}

impl Setup {
    /// The key of a partition in the history.
    #[must_use]
    pub fn key(&self, partition: u32) -> String {
        format!("{}/{partition}", self.topic)
    }

    /// A client that tries for a while and then says that it does not know.
    ///
    /// # Errors
    /// Options that the SDK refuses.
    fn client(&self, name: &str) -> Result<Client, arqon_sdk::Error> {
        let mut options = Options::new([self.server.as_str()], self.token.as_str());
        options.client_name = format!("arqon-jepsen/{name}");
        options.request_timeout = Duration::from_secs(REQUEST_SECONDS_MAX);
        options.attempt_timeout = Duration::from_secs(3);
        options.connect_timeout = Duration::from_secs(2);
        options.backoff_max = Duration::from_millis(500);
        Client::lazy(options)
    }

    fn process_count(&self) -> usize {
        self.partition_count as usize * PRODUCER_COUNT * PROCESS_COUNT
    }
}

/// What all processes share.
struct Shared {
    setup: Setup,
    history: Arc<Writer>,
    stop: AtomicBool,
    stopped: Notify,
    healed: AtomicBool,
    next_process: AtomicU64,
    next_producer: AtomicU64,
    next_value: AtomicU64,
    /// Per partition: the offset after the highest acknowledged one.
    ends: Vec<AtomicU64>,
    /// Per partition: appends begun after the heal and acknowledged.
    acked_after_heal: Vec<AtomicU64>,
}

impl Shared {
    fn new_process(&self) -> u64 {
        self.next_process.fetch_add(1, Ordering::Relaxed)
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
async fn finish(tasks: &mut JoinSet<()>) {
    while let Some(ended) = tasks.join_next().await {
        if let Err(error) = ended
            && error.is_panic()
        {
            std::panic::resume_unwind(error.into_panic());
        }
    }
}

/// The running workload.
pub struct Workload {
    shared: Arc<Shared>,
    tasks: JoinSet<()>,
}

impl Workload {
    /// Starts all producers and readers.
    ///
    /// # Errors
    /// Options that the SDK refuses.
    pub fn start(setup: Setup, history: Arc<Writer>) -> Result<Self, arqon_sdk::Error> {
        let counters = || (0..setup.partition_count).map(|_| AtomicU64::new(0)).collect();
        let shared = Arc::new(Shared {
            history,
            stop: AtomicBool::new(false),
            stopped: Notify::new(),
            healed: AtomicBool::new(false),
            next_process: AtomicU64::new(0),
            next_producer: AtomicU64::new(0),
            next_value: AtomicU64::new(1),
            ends: counters(),
            acked_after_heal: counters(),
            setup,
        });
        let mut tasks = JoinSet::new();
        for partition in 0..shared.setup.partition_count {
            for _ in 0..PRODUCER_COUNT {
                let client = shared.setup.client("producer")?;
                tasks.spawn(append::run(shared.clone(), client, partition));
            }
            let replicas = shared.setup.nodes.iter().map(|node| Some(*node));
            for node in [None].into_iter().chain(replicas) {
                let client = shared.setup.client("reader")?;
                tasks.spawn(read::run(shared.clone(), client, partition, node));
            }
        }
        Ok(Self { shared, tasks })
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

    /// Begins no further operation and waits for those under way. Gives the offset after the
    /// highest acknowledged one of each partition.
    pub async fn stop(mut self) -> Vec<u64> {
        self.shared.stop.store(true, Ordering::Release);
        self.shared.stopped.notify_waiters();
        // Each task ends by the time-outs of its operations.
        finish(&mut self.tasks).await;
        self.shared.ends.iter().map(|end| end.load(Ordering::Acquire)).collect()
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
