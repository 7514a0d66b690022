//! What the run loop needs of the bus, and the SDK as such. Tests have a scripted one.

use std::time::Duration;

use arqon_proto::{OPERATOR_TOPIC, limits};
use arqon_sdk::{Client, Error, Event, Job, NewEvent, Producer, ProducerOptions, Worker, WorkerOptions};
use tokio::sync::OnceCell;

use super::options::RunOptions;

/// The queue that jobs are leased from.
pub(crate) trait Queue: Send + 'static {
    type Lease: Lease;

    /// The next job; waits until there is one.
    fn next(&mut self) -> impl Future<Output = Result<Self::Lease, Error>> + Send;

    /// Takes no more jobs, and gives back those that were not handed out, until `next`.
    fn pause(&mut self);
}

/// One leased job. Dropping it gives the job back.
pub(crate) trait Lease: Send + Sync + 'static {
    fn job(&self) -> &Event;
    fn attempt(&self) -> u32;

    /// Returns when another worker may have the job.
    fn lost(&self) -> impl Future<Output = ()> + Send;

    /// Publishes the result with the lease's token and settles the job. A result that stands
    /// already counts as success.
    fn complete(&self, results_topic: &str, result: NewEvent) -> impl Future<Output = Result<(), Error>> + Send;

    /// Gives the job back; nobody gets it before `delay` has passed.
    fn give_back(&self, delay: Duration) -> impl Future<Output = Result<(), Error>> + Send;
}

/// The rest of the bus.
pub(crate) trait Bus: Send + Sync + 'static {
    /// Writes one event to the topic of operators.
    fn announce(&self, event: NewEvent) -> impl Future<Output = Result<(), Error>> + Send;

    /// Fails when the topic does not exist or may not be used.
    fn check_topic(&self, topic: &str) -> impl Future<Output = Result<(), Error>> + Send;
}

/// The bus through the SDK.
pub(crate) struct SdkBus {
    client: Client,
    announcements: OnceCell<Producer>,
}

impl SdkBus {
    pub(crate) fn new(client: Client) -> Self {
        Self { client, announcements: OnceCell::new() }
    }
}

impl Bus for SdkBus {
    async fn announce(&self, event: NewEvent) -> Result<(), Error> {
        let open = || self.client.producer(OPERATOR_TOPIC, ProducerOptions::default());
        let producer = self.announcements.get_or_try_init(open).await?;
        producer.publish(event).await.map(|_| ())
    }

    async fn check_topic(&self, topic: &str) -> Result<(), Error> {
        self.client.describe_topic(topic).await.map(|_| ())
    }
}

/// The queue through the SDK. A worker takes jobs by itself as long as it lives, so that it
/// lives only while jobs are wanted.
pub(crate) struct SdkQueue {
    client: Client,
    topic: String,
    options: WorkerOptions,
    worker: Option<Worker>,
}

impl SdkQueue {
    pub(crate) fn new(client: Client, operator_id: &str, options: &RunOptions) -> Self {
        let worker = WorkerOptions {
            group: options.group.clone(),
            worker: operator_id.to_owned(),
            operator_id: Some(operator_id.to_owned()),
            parallelism: options.parallelism as usize,
            lease: options.lease,
            ..WorkerOptions::default()
        };
        Self { client, topic: options.jobs_topic.clone(), options: worker, worker: None }
    }
}

impl Queue for SdkQueue {
    type Lease = Job;

    async fn next(&mut self) -> Result<Job, Error> {
        let worker = match &mut self.worker {
            Some(worker) => worker,
            empty => empty.insert(self.client.worker(&self.topic, self.options.clone()).await?),
        };
        match worker.next().await {
            Ok(Some(job)) => Ok(job),
            // Nobody else holds the worker to stop it.
            Ok(None) => Err(Error::Closed),
            Err(error) => {
                if !error.is_transient() {
                    self.worker = None;
                }
                Err(error)
            }
        }
    }

    fn pause(&mut self) {
        self.worker = None;
    }
}

impl Lease for Job {
    fn job(&self) -> &Event {
        &self.event
    }

    fn attempt(&self) -> u32 {
        self.attempt
    }

    async fn lost(&self) {
        Job::lost(self).await;
    }

    async fn complete(&self, results_topic: &str, result: NewEvent) -> Result<(), Error> {
        Job::complete(self, results_topic, result).await.map(|_| ())
    }

    async fn give_back(&self, delay: Duration) -> Result<(), Error> {
        self.nack(delay.min(Duration::from_millis(u64::from(limits::NACK_DELAY_MS_MAX)))).await
    }
}
