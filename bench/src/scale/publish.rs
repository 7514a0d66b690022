//! Publishers of the growing cases: a window of messages over many partitions, or a steady rate.

use std::{sync::Arc, time::Duration};

use arqon_sdk::{Client, Delivery, NewEvent, ProducerOptions};
use futures_util::{StreamExt, stream::FuturesUnordered};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    task::JoinHandle,
    time::{Instant, MissedTickBehavior, interval},
};

use crate::{
    load::{LATE_MAX, Latencies, Measured, promised},
    payload::Payloads,
};

/// Messages between two ticks of a steady rate are sent at once.
const TICK: Duration = Duration::from_millis(1);
/// A steady publisher has at most what is due in this time under way.
const STEADY_SECONDS_MAX: usize = 30;

/// Which partition a message goes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spread {
    /// By a key, another one each time: all partitions at once.
    Keyed,
    /// Without a key: batch by batch in turn.
    InTurn,
}

/// How to publish with a window.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    pub spread: Spread,
    /// Messages without an acknowledgement, at most.
    pub window: usize,
    pub linger: Duration,
    pub time: Duration,
    /// No more than so many messages.
    pub count_max: u64,
}

/// What a publisher saw.
#[derive(Debug)]
pub struct Published {
    /// The acknowledged messages.
    pub measured: Measured,
    /// Messages that were refused, or whose outcome the client could not find out.
    pub failed_count: u64,
    /// What became of the first of them.
    pub first_failure: Option<String>,
}

impl Published {
    /// # Errors
    /// The first message that was not acknowledged.
    pub fn whole(self) -> Result<Measured, String> {
        self.first_failure.map_or(Ok(self.measured), Err)
    }
}

/// Publishes with `load.window` messages in flight; latency is that of the acknowledgement. A message
/// that fails leaves its place in the window.
///
/// # Errors
/// The client can publish nothing more, or an acknowledgement promises too little.
pub async fn windowed(client: &Client, topic: &str, payloads: &Payloads, load: Load) -> Result<Published, String> {
    let options = ProducerOptions { linger: load.linger, buffer_size: 256 << 20, ..ProducerOptions::default() };
    let producer = client.producer(topic, options).await.map_err(super::text)?;
    let window = Arc::new(Semaphore::new(load.window));
    let (sender, acks) = collector();
    let begin = Instant::now();
    for index in 0..load.count_max {
        let now = Instant::now();
        if now - begin >= load.time {
            break;
        }
        let place = tokio::select! {
            place = Arc::clone(&window).acquire_owned() => place.map_err(super::text)?,
            // The other end tells what failed.
            () = sender.closed() => break,
        };
        let mut event = NewEvent::new(payloads.make(index));
        if load.spread == Spread::Keyed {
            event = event.key(index.to_le_bytes().to_vec());
        }
        let begin = Instant::now();
        let delivery = producer.send(event).await.map_err(super::text)?;
        if sender.send(Sent { begin, delivery, place }).is_err() {
            break;
        }
    }
    drop(sender);
    let acks = acks.await.map_err(super::text)??;
    Ok(acks.published(begin.elapsed().as_secs_f64()))
}

/// Publishes `rate` messages a second; latency is that of the acknowledgement, from the time at
/// which a message was due where the sender was held up.
///
/// # Errors
/// The first message that was not acknowledged.
pub async fn steady(
    client: &Client,
    topic: &str,
    payloads: &Payloads,
    rate: u32,
    time: Duration,
) -> Result<Measured, String> {
    let producer = client.producer(topic, ProducerOptions::default()).await.map_err(super::text)?;
    let window = Arc::new(Semaphore::new(rate as usize * STEADY_SECONDS_MAX));
    let (sender, acks) = collector();
    let begin = Instant::now();
    let mut ticks = interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
    let mut index = 0;
    while begin.elapsed() < time {
        ticks.tick().await;
        let due_count = (begin.elapsed().as_secs_f64() * f64::from(rate)) as u64;
        while index < due_count {
            let due = begin + Duration::from_secs_f64(index as f64 / f64::from(rate));
            let now = Instant::now();
            let from = if now.saturating_duration_since(due) > LATE_MAX { due } else { now };
            let place = Arc::clone(&window).acquire_owned().await.map_err(super::text)?;
            let delivery = producer.send(NewEvent::new(payloads.make(index))).await.map_err(super::text)?;
            if sender.send(Sent { begin: from, delivery, place }).is_err() {
                break;
            }
            index += 1;
        }
        if sender.is_closed() {
            break;
        }
    }
    drop(sender);
    let acks = acks.await.map_err(super::text)??;
    acks.published(begin.elapsed().as_secs_f64()).whole()
}

/// A message on its way, and its place in the window.
struct Sent {
    begin: Instant,
    delivery: Delivery,
    place: OwnedSemaphorePermit,
}

/// Acknowledgements so far.
struct Acks {
    latencies: Latencies,
    count: u64,
    failed_count: u64,
    first_failure: Option<String>,
}

impl Acks {
    fn published(self, seconds: f64) -> Published {
        let measured = self.latencies.measured(self.count, seconds);
        Published { measured, failed_count: self.failed_count, first_failure: self.first_failure }
    }
}

/// Awaits deliveries in the order in which they come: partitions do not wait for each other.
fn collector() -> (mpsc::UnboundedSender<Sent>, JoinHandle<Result<Acks, String>>) {
    // Bounded by the window, since each message holds a place of it.
    let (sender, mut sent) = mpsc::unbounded_channel::<Sent>();
    let collecting = tokio::spawn(async move {
        let mut acks = Acks { latencies: Latencies::new(), count: 0, failed_count: 0, first_failure: None };
        let mut waiting = FuturesUnordered::new();
        let mut open = true;
        while open || !waiting.is_empty() {
            tokio::select! {
                next = sent.recv(), if open => match next {
                    Some(Sent { begin, delivery, place }) => {
                        waiting.push(async move { (delivery.await, begin.elapsed(), place) });
                    }
                    None => open = false,
                },
                Some((outcome, latency, place)) = waiting.next(), if !waiting.is_empty() => {
                    drop(place);
                    match outcome {
                        Ok(receipt) => {
                            promised(&receipt)?;
                            acks.latencies.record(latency);
                            acks.count += 1;
                        }
                        Err(error) => {
                            acks.failed_count += 1;
                            acks.first_failure.get_or_insert_with(|| {
                                format!("after {} ms: {error}", latency.as_millis())
                            });
                        }
                    }
                }
            }
        }
        Ok(acks)
    });
    (sender, collecting)
}
