//! One local replica of one partition, and all that its clients may ask of it.
//!
//! ```text
//!   sessions --> Partition --submit--> submission task --propose--> Raft --apply--> state/
//!                    |   \                   ^
//!                  fetch  '--work, ack--> queue task (acts while this replica leads)
//!                    |                       |--> dead letters --> Services (other partitions)
//!                    v
//!             the log, up to what is readable
//!
//!   produce.rs    check a batch, its tokens, its answer      error.rs      wire errors
//!   submit.rs     one task: check, admit, propose, in order  deadlines.rs  what is due when
//!   fetch.rs      reads and long-polls, with ahead.rs        grants.rs     which jobs to whom
//!   queue/        requests of workers, merged into entries   dead.rs       jobs without attempts left
//!   retention.rs  what expires, and trims that are asked for  holders.rs   who keeps it from expiring
//!   full.rs       when new records are refused                settings.rs  what a running topic may change
//! ```
//!
//! Only this module waits and reads clocks; what a command means is decided in `state/`.

mod ahead;
mod dead;
mod deadlines;
mod error;
mod fetch;
mod full;
mod grants;
mod holders;
mod metrics;
mod produce;
mod queue;
mod retention;
mod settings;
mod submit;
#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex, atomic::AtomicUsize};

use arqon_proto::{Batch, GroupId, LeaseKey, NodeId, Offset, PartitionId, Term, TopicClass, wire};
use arqon_raft::{Group, GroupSpec, Host, OpenError, Status};
use futures_util::future::BoxFuture;
use tokio::{
    sync::{mpsc, watch},
    task::JoinHandle,
};

use crate::state::PartitionMachine;

pub use ahead::Ahead;
pub use metrics::PartitionMetrics;
pub use produce::Submitted;
pub use retention::TrimBefore;

use full::Fullness;
use settings::Settings;

/// Batches and control entries that wait for the submission task.
const SUBMISSION_COUNT_MAX: usize = 4_096;
/// Requests of workers that wait for the queue task.
const REQUEST_COUNT_MAX: usize = 4_096;
/// What a client is told to wait after OVERLOADED, in milliseconds.
const RETRY_AFTER_MS: u32 = 50;

/// What a partition needs of its node. Methods neither block nor wait, futures apart.
pub trait Services: Send + Sync + 'static {
    /// The cluster's lease keys, oldest first: the last one signs, all verify.
    fn lease_keys(&self) -> Arc<[LeaseKey]>;

    /// `host:port` at which clients reach `node`, when it is known.
    fn node_client_address(&self, node: NodeId) -> Option<String>;

    /// Partitions of a topic, when it exists.
    fn partition_count(&self, tenant: &str, topic: &str) -> Option<u32>;

    /// Produces to a partition that may be led by any node. `request` names topic and
    /// partition and carries the lease tokens.
    fn produce_routed(
        &self,
        tenant: String,
        request: wire::Produce,
        batch: Batch,
    ) -> BoxFuture<'static, Result<wire::Produced, wire::Error>>;

    /// The wall clock in ms since 1970.
    fn now_ms(&self) -> u64;

    /// What the node has read ahead for readers of old data.
    fn ahead(&self) -> &Ahead;

    /// Why no new records may be written to a partition whose replicas are on `nodes`, when their
    /// disks are nearly full: one line.
    fn storage_refusal(&self, nodes: &[NodeId]) -> Option<String>;

    /// Whether the wall clock may be trusted to say how old records are.
    fn clock_is_sound(&self) -> bool;
}

/// A registered operator, as its registration says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Operator {
    /// Its id.
    pub id: String,
    /// Its version, stamped into the results.
    pub version: String,
}

/// What the handle and the tasks of one replica share.
pub(crate) struct Replica {
    group: Group,
    status: watch::Receiver<Status>,
    machine: PartitionMachine,
    /// As it was when the replica was opened: name and class stay, for the rest see `settings`.
    topic: Arc<wire::TopicConfig>,
    settings: watch::Sender<Settings>,
    fullness: Fullness,
    class: TopicClass,
    partition: PartitionId,
    services: Arc<dyn Services>,
    metrics: Arc<PartitionMetrics>,
    queued_size: AtomicUsize,
}

impl Replica {
    /// The term in which this replica leads and takes writes.
    fn leading_term(&self) -> Option<Term> {
        let status = self.status.borrow();
        (status.is_leader && status.ready && status.stopped.is_none()).then_some(status.term)
    }

    /// The term in which this replica leads, or the error that sends a client to the leader.
    fn require_leader(&self) -> Result<Term, wire::Error> {
        self.leading_term().ok_or_else(|| self.not_leader())
    }
}

/// Handle of one local replica; clones are the same replica.
#[derive(Clone)]
pub struct Partition {
    replica: Arc<Replica>,
    submissions: mpsc::Sender<submit::Submission>,
    requests: mpsc::Sender<queue::Request>,
    closing: Arc<watch::Sender<bool>>,
    tasks: Arc<Mutex<Vec<JoinHandle<()>>>>,
}

impl Partition {
    /// Opens the replica in `host` (creating it when it is new) and starts its tasks.
    ///
    /// # Errors
    /// What the host refuses: a quarantined log, a failing disk.
    pub async fn open(
        host: &Host,
        spec: GroupSpec,
        topic: Arc<wire::TopicConfig>,
        partition: PartitionId,
        services: Arc<dyn Services>,
        metrics: Arc<PartitionMetrics>,
    ) -> Result<Self, OpenError> {
        let machine = PartitionMachine::default();
        let group = host.open(spec, Box::new(machine.clone())).await?;
        let class = class_of(&topic);
        let (status, queued_size) = (group.watch(), AtomicUsize::new(0));
        let settings = watch::Sender::new(Settings::from(&*topic));
        let fullness = Fullness::default();
        let replica = Arc::new(Replica {
            group,
            status,
            machine,
            topic,
            settings,
            fullness,
            class,
            partition,
            services,
            metrics,
            queued_size,
        });
        let (submissions, submitted) = mpsc::channel(SUBMISSION_COUNT_MAX);
        let (requests, requested) = mpsc::channel(REQUEST_COUNT_MAX);
        let (closing, closed) = watch::channel(false);
        let mut tasks = vec![
            tokio::spawn(submit::run(replica.clone(), submitted, closed.clone())),
            tokio::spawn(retention::run(replica.clone(), submissions.downgrade(), closed.clone())),
        ];
        if class == TopicClass::Jobs {
            // The task holds a weak handle of the channel, or it would keep itself alive.
            let queue = queue::run(replica.clone(), submissions.downgrade(), requested, closed);
            tasks.push(tokio::spawn(queue));
        }
        let tasks = Arc::new(Mutex::new(tasks));
        Ok(Self { replica, submissions, requests, closing: Arc::new(closing), tasks })
    }

    /// The Raft group of the replica.
    #[must_use]
    pub fn group(&self) -> &Group {
        &self.replica.group
    }

    /// The Raft group's id.
    #[must_use]
    pub fn group_id(&self) -> GroupId {
        self.replica.group.id()
    }

    /// Topic as configured when the replica was opened.
    #[must_use]
    pub fn topic(&self) -> &Arc<wire::TopicConfig> {
        &self.replica.topic
    }

    /// Which partition of its topic.
    #[must_use]
    pub fn partition(&self) -> PartitionId {
        self.replica.partition
    }

    /// Positions and queues of this replica, whether it leads or not.
    #[must_use]
    pub fn status(&self) -> wire::PartitionStatus {
        let replica = &self.replica;
        let status = replica.group.status();
        let committed = replica.group.readable().borrow().next_offset;
        let (log, log_start) = (replica.group.log(), replica.log_start());
        let shared = replica.machine.lock();
        let queues = shared.state.queues().map(|(group, queue)| wire::QueueStatus {
            group: group.to_owned(),
            floor: queue.floor(),
            next: queue.next(),
            leased: queue.leases().len() as u64,
            pending: queue.pending().len() as u64,
        });
        wire::PartitionStatus {
            partition: replica.partition.0,
            log_start: log_start.0,
            log_end: log.next_offset().0,
            committed: committed.0,
            term: status.term.0,
            leader: status.is_leader,
            queues: queues.collect(),
            size: log.size_from(Offset(0)),
            holders: Vec::new(),
            refuses: String::new(),
        }
    }

    /// As [`Self::status`], and who holds retention, and whether new records are refused.
    #[must_use]
    pub fn full_status(&self) -> wire::PartitionStatus {
        let status = self.status();
        let refuses = self.replica.refusal().map(|refused| refused.message).unwrap_or_default();
        wire::PartitionStatus { holders: self.replica.holder_statuses(status.committed), refuses, ..status }
    }

    /// Stops the replica's tasks; requests that wait are answered NOT_LEADER or
    /// UNKNOWN_OUTCOME. The Raft group goes on until the host closes it.
    pub async fn shutdown(&self) {
        self.closing.send_replace(true);
        let tasks = std::mem::take(&mut *self.tasks.lock().expect("nothing panics while holding the list"));
        for task in tasks {
            // A task that panicked has said so itself.
            let _ = task.await;
        }
    }
}

impl std::fmt::Debug for Partition {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Partition({} {})", self.replica.topic.name, self.replica.partition)
    }
}

/// The class that the topic was created with, or else the one that its name asks for.
fn class_of(topic: &wire::TopicConfig) -> TopicClass {
    use TopicClass::{Dead, Events, Jobs, Results, Streams, System};
    let named = [Events, Jobs, Results, Streams, Dead, System].into_iter().find(|class| class.name() == topic.class);
    named.unwrap_or_else(|| TopicClass::of(&topic.name))
}
