//! The clients: each function is one round of one case, and gives what it measured.

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use arqon_sdk::{
    Client, Consumer, ConsumerOptions, Delivery, Durability, From, NewEvent, Producer, ProducerOptions, Receipt,
};
use futures_util::FutureExt;
use hdrhistogram::Histogram;
use tokio::{
    sync::mpsc,
    time::{Instant, MissedTickBehavior, interval, timeout},
};

use crate::payload::Payloads;

/// Most bytes of payload that one round publishes, so that disks do not fill up.
const ROUND_SIZE_MAX: u64 = 1 << 30;
/// Time without any message after which a reading round has failed.
const SILENCE_MAX: Duration = Duration::from_secs(30);
/// A publisher looks for acknowledgements after so many messages.
const LOOK_COUNT: u64 = 64;
/// A sender that is later than this has been held up, and the hold-up counts as latency.
pub const LATE_MAX: Duration = Duration::from_millis(2);

/// What one round measured.
#[derive(Clone, Copy, Debug, Default)]
pub struct Measured {
    /// Messages acknowledged, or read and checked.
    pub messages: u64,
    /// Time that they took, in seconds.
    pub seconds: f64,
    /// Median latency in microseconds; 0 where none is measured.
    pub p50_us: f64,
    /// 99th percentile in microseconds.
    pub p99_us: f64,
}

/// How the producer batches.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// Messages without an acknowledgement, at most.
    pub window: usize,
    /// See `ProducerOptions::linger`.
    pub linger: Duration,
    /// Length of a round.
    pub time: Duration,
}

/// Latencies from 1 us to 60 s, to three digits.
pub struct Latencies(Histogram<u64>);

impl Latencies {
    /// None yet.
    pub fn new() -> Self {
        Self(Histogram::new_with_bounds(1, 60_000_000, 3).expect("the bounds are in order"))
    }

    /// One more.
    pub fn record(&mut self, latency: Duration) {
        self.record_many(latency, 1);
    }

    /// `count` more, all the same.
    pub fn record_many(&mut self, latency: Duration, count: u64) {
        self.0.saturating_record_n((latency.as_micros() as u64).max(1), count);
    }

    /// With `messages` in `seconds`.
    pub fn measured(&self, messages: u64, seconds: f64) -> Measured {
        let at = |quantile| self.0.value_at_quantile(quantile) as f64;
        Measured { messages, seconds, p50_us: at(0.5), p99_us: at(0.99) }
    }
}

async fn producer(client: &Client, topic: &str, linger: Duration) -> Result<Producer, String> {
    let options = ProducerOptions { linger, ..ProducerOptions::default() };
    client.producer(topic, options).await.map_err(|error| error.to_string())
}

/// The receipt, which must promise what the report says.
///
/// # Errors
/// The message was not written, or less is promised.
pub async fn acknowledged(delivery: Delivery) -> Result<(), String> {
    promised(&delivery.await.map_err(|error| format!("publish: {error}"))?)
}

/// # Errors
/// Less is promised than that the message is on the disks of a majority.
pub fn promised(receipt: &Receipt) -> Result<(), String> {
    match receipt.durability {
        Durability::MajorityFsync => Ok(()),
        other => Err(format!("an acknowledgement promises {other:?} instead of majority-fsync")),
    }
}

/// What a publisher does in one round.
#[derive(Clone)]
pub struct Publish<'a> {
    /// Payloads.
    pub payloads: &'a Payloads,
    /// How the producer batches.
    pub options: ProducerOptions,
    /// Messages without an acknowledgement, at most.
    pub window: usize,
    /// Length of the round.
    pub time: Duration,
    /// Most messages.
    pub count_max: u64,
}

impl<'a> Publish<'a> {
    /// At `pace`, up to what a round may write.
    pub fn at(pace: Pace, payloads: &'a Payloads, size: usize) -> Self {
        let options = ProducerOptions { linger: pace.linger, ..ProducerOptions::default() };
        Self { payloads, options, window: pace.window, time: pace.time, count_max: ROUND_SIZE_MAX / size as u64 }
    }
}

/// Publishes with `work.window` messages in flight; the latency is that of the acknowledgement.
///
/// # Errors
/// A message that was not acknowledged by a majority's disks.
pub async fn publish(client: &Client, topic: &str, work: &Publish<'_>) -> Result<Measured, String> {
    let producer = client.producer(topic, work.options.clone()).await.map_err(|error| error.to_string())?;
    let mut latencies = Latencies::new();
    let mut waiting: VecDeque<(Instant, Delivery)> = VecDeque::with_capacity(work.window);
    let begin = Instant::now();
    let mut index = 0;
    while index < work.count_max {
        let now = Instant::now();
        if now - begin >= work.time {
            break;
        }
        let event = NewEvent::new(work.payloads.make(index));
        let delivery = producer.send(event).await.map_err(|error| error.to_string())?;
        waiting.push_back((now, delivery));
        index += 1;
        if waiting.len() >= work.window
            && let Some((sent_at, delivery)) = waiting.pop_front()
        {
            acknowledged(delivery).await?;
            latencies.record(sent_at.elapsed());
        }
        if index % LOOK_COUNT == 0 {
            take_ready(&mut waiting, &mut latencies)?;
        }
    }
    for (sent_at, delivery) in waiting {
        acknowledged(delivery).await?;
        latencies.record(sent_at.elapsed());
    }
    Ok(latencies.measured(index, begin.elapsed().as_secs_f64()))
}

/// The acknowledgements that are there already.
fn take_ready(waiting: &mut VecDeque<(Instant, Delivery)>, latencies: &mut Latencies) -> Result<(), String> {
    while let Some((sent_at, delivery)) = waiting.front_mut() {
        let Some(outcome) = delivery.now_or_never() else { break };
        promised(&outcome.map_err(|error| format!("publish: {error}"))?)?;
        latencies.record(sent_at.elapsed());
        waiting.pop_front();
    }
    Ok(())
}

/// Publishes one message after the other, each acknowledged before the next.
///
/// # Errors
/// The first message that was not acknowledged.
pub async fn publish_one_at_a_time(
    client: &Client,
    topic: &str,
    payloads: &Payloads,
    time: Duration,
) -> Result<Measured, String> {
    let producer = producer(client, topic, Duration::ZERO).await?;
    let mut latencies = Latencies::new();
    let begin = Instant::now();
    let mut count = 0;
    while begin.elapsed() < time {
        let sent = Instant::now();
        let event = NewEvent::new(payloads.make(count));
        acknowledged(producer.send(event).await.map_err(|error| error.to_string())?).await?;
        latencies.record(sent.elapsed());
        count += 1;
    }
    Ok(latencies.measured(count, begin.elapsed().as_secs_f64()))
}

async fn consumer(client: &Client, topic: &str, from: From, stop_at_end: bool) -> Result<Consumer, String> {
    let options = ConsumerOptions { from, stop_at_end, ..ConsumerOptions::default() };
    client.consumer(topic, options).await.map_err(|error| error.to_string())
}

/// Checks that each message comes once, whole, and in the order of its partition.
pub struct Received {
    seen: Vec<bool>,
    /// Per partition: the index read last.
    last: Vec<Option<u64>>,
    count: u64,
    is_ordered: bool,
}

impl Received {
    /// Of messages 0 to `count`, in the order of their partition.
    pub fn new(count: u64) -> Self {
        Self { seen: vec![false; count as usize], last: Vec::new(), count: 0, is_ordered: true }
    }

    /// Of messages 0 to `count`, as they come: a queue promises each once, but no order to
    /// workers that ask for several parts at a time.
    pub fn in_any_order(count: u64) -> Self {
        Self { is_ordered: false, ..Self::new(count) }
    }

    /// Messages so far.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// One event; gives its index.
    ///
    /// # Errors
    /// As [`Received::take_payload`].
    pub fn take(&mut self, payloads: &Payloads, event: &arqon_sdk::Event) -> Result<u64, String> {
        let place = || format!("partition {} offset {}", event.partition, event.offset);
        self.take_payload(payloads, &event.payload, event.partition, place)
    }

    /// One payload that came from `place`; gives its index.
    ///
    /// # Errors
    /// It is not as published, comes again, or comes after a later one of its partition.
    pub fn take_payload(
        &mut self,
        payloads: &Payloads,
        payload: &[u8],
        partition: u32,
        place: impl Fn() -> String,
    ) -> Result<u64, String> {
        let Some(index) = payloads.check(payload) else {
            return Err(format!("{}: the payload is not what was published", place()));
        };
        match self.seen.get_mut(index as usize) {
            None => return Err(format!("{}: message {index} was never published", place())),
            Some(true) => return Err(format!("{}: message {index} comes twice", place())),
            Some(seen) => *seen = true,
        }
        let partition = partition as usize;
        if self.last.len() <= partition {
            self.last.resize(partition + 1, None);
        }
        if let Some(last) = self.last[partition].replace(index)
            && last > index
            && self.is_ordered
        {
            return Err(format!("{}: message {index} comes after {last}", place()));
        }
        self.count += 1;
        Ok(index)
    }
}

/// Reads the `count` messages of a topic from the start and checks every byte. A fetch asks for
/// `bytes_max` bytes; 0 for what the client chooses.
///
/// # Errors
/// A message that is missing, changed, doubled or out of order.
pub async fn fetch(
    client: &Client,
    topic: &str,
    payloads: &Payloads,
    count: u64,
    bytes_max: u32,
) -> Result<Measured, String> {
    let mut received = Received::new(count);
    let begin = Instant::now();
    let default = ConsumerOptions::default();
    let bytes_max = if bytes_max == 0 { default.bytes_max } else { bytes_max };
    let options = ConsumerOptions { from: From::Earliest, stop_at_end: true, bytes_max, ..default };
    let mut consumer = client.consumer(topic, options).await.map_err(|error| error.to_string())?;
    while let Some(event) = consumer.next().await.map_err(|error| format!("fetch: {error}"))? {
        received.take(payloads, &event)?;
    }
    let seconds = begin.elapsed().as_secs_f64();
    if received.count != count {
        return Err(format!("fetch: {} of {count} acknowledged messages were read", received.count));
    }
    Ok(Measured { messages: count, seconds, ..Measured::default() })
}

/// Publishes `rate` messages per second while a consumer reads them; the latency is from the
/// call of `send` to the event in the consumer's hand.
///
/// # Errors
/// A message that is not acknowledged, or missing, changed, doubled or out of order.
pub async fn publish_to_consume(
    client: &Client,
    topic: &str,
    payloads: &Arc<Payloads>,
    rate: u32,
    pace: Pace,
) -> Result<Measured, String> {
    let count = (f64::from(rate) * pace.time.as_secs_f64()) as u64;
    let mut consumer = consumer(client, topic, From::Latest, false).await?;
    let producer = producer(client, topic, pace.linger).await?;
    let begin = Instant::now();
    let sent: Arc<Vec<AtomicU64>> = Arc::new((0..count).map(|_| AtomicU64::new(0)).collect());
    let sending = tokio::spawn(send_at_rate(producer, payloads.clone(), sent.clone(), rate, begin, pace.window));
    let mut received = Received::new(count);
    let mut latencies = Latencies::new();
    while received.count < count {
        let next = timeout(SILENCE_MAX, consumer.next()).await;
        let next = next.map_err(|_| format!("{} of {count} messages came, then none for 30 s", received.count))?;
        let Some(event) = next.map_err(|error| format!("consume: {error}"))? else {
            return Err("the consumer ended before the messages did".to_owned());
        };
        let index = received.take(payloads, &event)?;
        let sent_at = Duration::from_nanos(sent[index as usize].load(Ordering::Acquire));
        latencies.record(begin.elapsed().saturating_sub(sent_at));
    }
    let seconds = begin.elapsed().as_secs_f64();
    sending.await.map_err(|error| error.to_string())??;
    Ok(latencies.measured(count, seconds))
}

/// Sends what is due each millisecond and notes when.
async fn send_at_rate(
    producer: Producer,
    payloads: Arc<Payloads>,
    sent: Arc<Vec<AtomicU64>>,
    rate: u32,
    begin: Instant,
    window: usize,
) -> Result<(), String> {
    let (sender, mut deliveries) = mpsc::channel::<Delivery>(window);
    let acks = tokio::spawn(async move {
        while let Some(delivery) = deliveries.recv().await {
            acknowledged(delivery).await?;
        }
        Ok::<_, String>(())
    });
    let mut ticks = interval(Duration::from_millis(1));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let mut index = 0;
    'send: while index < sent.len() {
        ticks.tick().await;
        let due = ((begin.elapsed().as_secs_f64() * f64::from(rate)) as usize).min(sent.len());
        while index < due {
            let planned = Duration::from_secs_f64(index as f64 / f64::from(rate));
            let now = begin.elapsed();
            // A stalled bus must not look fast because nothing was sent meanwhile.
            let from = if now > planned + LATE_MAX { planned } else { now };
            sent[index].store(from.as_nanos() as u64, Ordering::Release);
            let event = NewEvent::new(payloads.make(index as u64));
            let delivery = producer.send(event).await.map_err(|error| error.to_string())?;
            if sender.send(delivery).await.is_err() {
                break 'send;
            }
            index += 1;
        }
    }
    drop(sender);
    acks.await.map_err(|error| error.to_string())?
}

#[cfg(test)]
mod tests {
    use super::*;
    use arqon_sdk::Event;

    fn event(payload: Vec<u8>, offset: u64) -> Event {
        Event { payload: payload.into(), offset, ..Event::default() }
    }

    #[test]
    fn a_wrong_read_fails_the_round_and_names_the_place() {
        let payloads = Payloads::new(1, 64);
        let mut received = Received::new(3);
        assert_eq!(received.take(&payloads, &event(payloads.make(1), 0)), Ok(1));
        for (payload, problem) in [
            (payloads.make(1), "message 1 comes twice"),
            (payloads.make(0), "message 0 comes after 1"),
            (payloads.make(3), "message 3 was never published"),
            (vec![0; 64], "not what was published"),
        ] {
            let error = received.take(&payloads, &event(payload, 7)).unwrap_err();
            assert!(error.starts_with("partition 0 offset 7") && error.contains(problem), "{error}");
        }
    }
}
