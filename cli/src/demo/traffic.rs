//! The client of the demo: publishes jobs through the Shield and watches results come.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use arqon_sdk::{Client, ConsumerOptions, Durability, From, Producer, ProducerOptions};
use hdrhistogram::Histogram;
use serde::Deserialize;
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::timeout;

use super::pictures::{Pictures, job_index};
use crate::Failure;

/// Jobs on their way without a receipt, at most.
const IN_FLIGHT_MAX: usize = 32;
/// The run is given up when no result comes for this long.
const STALL_TIMEOUT: Duration = Duration::from_secs(60);

/// Longest time that is told apart, in microseconds.
const TIME_US_MAX: u64 = 3_600_000_000;

/// Times in microseconds.
pub struct Times(Histogram<u64>);

impl Times {
    fn new() -> Result<Self, Failure> {
        Histogram::new_with_max(TIME_US_MAX, 3).map(Self).map_err(Failure::failed)
    }

    fn record(&mut self, time: Duration) {
        self.0.saturating_record(u64::try_from(time.as_micros()).unwrap_or(u64::MAX));
    }

    /// The time within which `quantile` (0 to 1) of all lie, in milliseconds.
    pub fn ms(&self, quantile: f64) -> f64 {
        self.0.value_at_quantile(quantile) as f64 / 1e3
    }
}

/// What publisher and watcher share.
struct Shared {
    /// When each job was sent.
    sent: Vec<Option<Instant>>,
    /// Whether a result of the job was seen.
    seen: Vec<bool>,
    job_times: Times,
}

/// A client that publishes jobs and counts the results that it sees.
pub struct Traffic {
    pictures: Arc<Pictures>,
    /// One per partition, so that the demo decides where a job goes.
    producers: Vec<Producer>,
    shared: Arc<Mutex<Shared>>,
    seen: watch::Receiver<usize>,
    watcher: JoinHandle<Result<(), Failure>>,
    publish_times: Times,
    published: usize,
    weakest: Durability,
}

fn lock(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Traffic {
    /// Opens producers of `jobs_topic` and starts to watch `results_topic`.
    ///
    /// # Errors
    /// The topics cannot be reached.
    pub async fn start(
        client: &Client,
        (jobs_topic, results_topic): (&str, &str),
        partition_count: u32,
        job_count: usize,
        pictures: Arc<Pictures>,
    ) -> Result<Self, Failure> {
        let mut producers = Vec::new();
        for partition in 0..partition_count {
            let options = ProducerOptions { partition: Some(partition), ..ProducerOptions::default() };
            producers.push(client.producer(jobs_topic, options).await?);
        }
        let consumer = client.consumer(results_topic, ConsumerOptions { from: From::Earliest, ..Default::default() });
        let mut consumer = consumer.await?;
        let shared = Shared { sent: vec![None; job_count], seen: vec![false; job_count], job_times: Times::new()? };
        let shared = Arc::new(Mutex::new(shared));
        let (count, seen) = watch::channel(0);
        let watched = shared.clone();
        let watcher = tokio::spawn(async move {
            while let Some(event) = consumer.next().await? {
                if note_result(&watched, &event.payload) {
                    count.send_modify(|count| *count += 1);
                }
            }
            Ok(())
        });
        Ok(Self {
            pictures,
            producers,
            shared,
            seen,
            watcher,
            publish_times: Times::new()?,
            published: 0,
            weakest: Durability::MajorityFsync,
        })
    }

    /// Publishes jobs until `count` are published, over all partitions in turn.
    ///
    /// # Errors
    /// A job is not acknowledged.
    pub async fn publish_to(&mut self, count: usize) -> Result<(), Failure> {
        let mut receipts = JoinSet::new();
        while self.published < count || !receipts.is_empty() {
            if self.published < count && receipts.len() < IN_FLIGHT_MAX {
                let partition = self.published % self.producers.len();
                let (start, delivery) = self.send(partition).await?;
                receipts.spawn(async move { delivery.await.map(|receipt| (receipt.durability, start.elapsed())) });
            } else if let Some(receipt) = receipts.join_next().await {
                let (durability, time) = receipt.map_err(Failure::failed)??;
                self.note_receipt(durability, time);
            }
        }
        Ok(())
    }

    /// Publishes one job to `partition` and waits until it is acknowledged.
    ///
    /// # Errors
    /// It is not acknowledged.
    pub async fn publish_one(&mut self, partition: u32) -> Result<(), Failure> {
        let (start, delivery) = self.send(partition as usize % self.producers.len()).await?;
        let receipt = delivery.await?;
        self.note_receipt(receipt.durability, start.elapsed());
        Ok(())
    }

    async fn send(&mut self, partition: usize) -> Result<(Instant, arqon_sdk::Delivery), Failure> {
        let index = self.published;
        let job = self.pictures.job(index)?;
        let start = Instant::now();
        if let Some(sent) = lock(&self.shared).sent.get_mut(index) {
            *sent = Some(start);
        }
        let delivery = self.producers[partition].send(job).await.map_err(arqon_sdk::Error::from)?;
        self.published += 1;
        Ok((start, delivery))
    }

    fn note_receipt(&mut self, durability: Durability, time: Duration) {
        self.publish_times.record(time);
        if durability != Durability::MajorityFsync {
            self.weakest = durability;
        }
    }

    /// The number of jobs whose result has been seen, to be watched.
    pub fn seen(&self) -> watch::Receiver<usize> {
        self.seen.clone()
    }

    /// Waits until `count` jobs have a result.
    ///
    /// # Errors
    /// No result came for a minute, or the results cannot be read.
    pub async fn wait_seen(&mut self, count: usize) -> Result<(), Failure> {
        while *self.seen.borrow_and_update() < count {
            match timeout(STALL_TIMEOUT, self.seen.changed()).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) => {
                    let ended = (&mut self.watcher).await.map_err(Failure::failed)?;
                    return Err(ended
                        .err()
                        .unwrap_or_else(|| Failure::failed("the results ended"))
                        .at("reading results"));
                }
                Err(_) => {
                    let (seen, seconds) = (*self.seen.borrow(), STALL_TIMEOUT.as_secs());
                    let published = self.published;
                    return Err(Failure::failed(format!(
                        "no result came for {seconds} s: {seen} of {published} jobs have one"
                    )));
                }
            }
        }
        Ok(())
    }

    /// Number of jobs published.
    pub fn published(&self) -> usize {
        self.published
    }

    /// The weakest promise that any job was acknowledged with.
    pub fn durability(&self) -> Durability {
        self.weakest
    }

    /// From sending a job to its acknowledgement: p50 and p99 in milliseconds.
    pub fn publish_ms(&self) -> (f64, f64) {
        (self.publish_times.ms(0.5), self.publish_times.ms(0.99))
    }

    /// From sending a job to seeing its result: p50 and p99 in milliseconds.
    pub fn job_ms(&self) -> (f64, f64) {
        let shared = lock(&self.shared);
        (shared.job_times.ms(0.5), shared.job_times.ms(0.99))
    }
}

impl Drop for Traffic {
    fn drop(&mut self) {
        self.watcher.abort();
    }
}

#[derive(Deserialize)]
struct Identified {
    job_id: String,
}

/// Notes a result; whether it is the first of its job.
fn note_result(shared: &Mutex<Shared>, payload: &[u8]) -> bool {
    let Ok(result) = serde_json::from_slice::<Identified>(payload) else { return false };
    let Some(index) = job_index(&result.job_id) else { return false };
    let mut shared = lock(shared);
    let (Some(seen), Some(sent)) = (shared.seen.get(index).copied(), shared.sent.get(index).copied()) else {
        return false;
    };
    if seen {
        return false;
    }
    shared.seen[index] = true;
    if let Some(sent) = sent {
        shared.job_times.record(sent.elapsed());
    }
    true
}
