//! The batching, idempotent producer.

use std::{
    collections::VecDeque,
    fmt,
    future::Future,
    pin::Pin,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use arqon_proto::{BatchBuilder, Compression, Record, wire};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot},
    time::{Instant, sleep_until},
};
use uuid::Uuid;
use wire::Durability;
use xxhash_rust::xxh3::xxh3_64;

use crate::{
    Error, NewEvent, SendError,
    flight::{Flight, Item, Payload, Stamping},
    limits,
    router::Router,
};

const INBOX_SIZE: usize = 512;

/// How a [`Producer`] batches and what it promises.
#[derive(Clone, Debug)]
pub struct ProducerOptions {
    /// How long an event may wait for company while other batches are under way; 5 ms at most.
    /// When nothing is under way, a batch leaves at once.
    pub linger: Duration,
    /// A batch leaves when its events reach this size in bytes.
    pub batch_size: usize,
    /// How batches are compressed.
    pub compression: Compression,
    /// When an event counts as written.
    pub durability: Durability,
    /// Batches without an answer per partition, 1 to 5.
    pub in_flight_max: usize,
    /// Bytes of events that wait for their receipt; `send` waits for room above it.
    pub buffer_size: usize,
    /// Always write to this partition, whatever the key.
    pub partition: Option<u32>,
    /// Id of the producer for de-duplication; random when `None`.
    pub producer_id: Option<[u8; 16]>,
    /// Raise it when taking over a `producer_id` from an earlier program.
    pub producer_epoch: u32,
}

impl Default for ProducerOptions {
    /// Linger 1 ms, batches of 256 KiB, no compression, majority-fsync, 5 in flight, a buffer
    /// of 32 MiB, any partition, a random id.
    fn default() -> Self {
        Self {
            linger: Duration::from_millis(1),
            batch_size: 256 << 10,
            compression: Compression::None,
            durability: Durability::MajorityFsync,
            in_flight_max: limits::IN_FLIGHT_COUNT_MAX,
            buffer_size: 32 << 20,
            partition: None,
            producer_id: None,
            producer_epoch: 0,
        }
    }
}

impl ProducerOptions {
    fn check(&self, partition_count: u32) -> Result<(), Error> {
        if self.linger > limits::LINGER_MAX {
            return Err(Error::invalid("linger", format!("is over {} ms", limits::LINGER_MAX.as_millis())));
        }
        let batch_size_max = arqon_proto::limits::BATCH_SIZE_MAX / 2;
        if self.batch_size == 0 || self.batch_size > batch_size_max {
            return Err(Error::invalid("batch_size", format!("must be 1 to {batch_size_max} bytes")));
        }
        if self.in_flight_max == 0 || self.in_flight_max > limits::IN_FLIGHT_COUNT_MAX {
            return Err(Error::invalid("in_flight_max", format!("must be 1 to {}", limits::IN_FLIGHT_COUNT_MAX)));
        }
        let buffer_size_min = arqon_proto::limits::RECORD_SIZE_MAX;
        if self.buffer_size < buffer_size_min || self.buffer_size > Semaphore::MAX_PERMITS.min(u32::MAX as usize) {
            return Err(Error::invalid("buffer_size", format!("must be {buffer_size_min} to {} bytes", u32::MAX)));
        }
        match self.partition {
            Some(partition) if partition >= partition_count => {
                Err(Error::invalid("partition", format!("{partition} does not exist, the topic has {partition_count}")))
            }
            _ => Ok(()),
        }
    }
}

/// Where an event stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Receipt {
    /// Topic.
    pub topic: Arc<str>,
    /// Partition.
    pub partition: u32,
    /// Offset in the partition; provisional when `durability` is `LeaderReceived`.
    pub offset: u64,
    /// Append time in ms since 1970; 0 when the answer was lost and the event was found written.
    pub time_ms: u64,
    /// What the acknowledgement promises.
    pub durability: Durability,
}

/// The receipt of a sent event, to be awaited. Dropping it does not take the event back.
#[derive(Debug)]
pub struct Delivery {
    receiver: oneshot::Receiver<Result<Receipt, Error>>,
}

impl Future for Delivery {
    type Output = Result<Receipt, Error>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.receiver).poll(context).map(|outcome| outcome.unwrap_or(Err(Error::Closed)))
    }
}

/// Writes events to one topic; cheap to clone, all clones share buffers and order.
///
/// Events of one partition stand in the log in the order of `send`. Each carries a producer id
/// and a sequence, so that an event that is sent again (after a lost connection or a change of
/// leader) still stands there once. With a key, the partition is `xxh3_64(key) % partitions`;
/// without, one partition is used batch by batch in turn.
///
/// ```no_run
/// # async fn example(client: arqon_sdk::Client) -> Result<(), arqon_sdk::Error> {
/// use arqon_sdk::{NewEvent, ProducerOptions};
/// let producer = client.producer("greetings", ProducerOptions::default()).await?;
/// let first = producer.send(NewEvent::new("hello")).await?;
/// let second = producer.send(NewEvent::new("world")).await?;
/// println!("at {} and {}", first.await?.offset, second.await?.offset);
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct Producer {
    inner: Arc<Inner>,
}

struct Inner {
    router: Arc<Router>,
    topic: Arc<str>,
    options: ProducerOptions,
    producer_id: [u8; 16],
    partitions: Vec<OnceLock<mpsc::Sender<Command>>>,
    turn: Arc<AtomicU32>,
    room: Arc<Semaphore>,
    closed: AtomicBool,
}

struct Queued {
    record: Record,
    room: OwnedSemaphorePermit,
    reply: oneshot::Sender<Result<Receipt, Error>>,
}

enum Command {
    Event(Queued),
    Flush(oneshot::Sender<()>),
}

impl fmt::Debug for Producer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Producer").field("topic", &self.inner.topic).finish_non_exhaustive()
    }
}

impl Producer {
    pub(crate) fn open(
        router: Arc<Router>,
        description: &wire::TopicDescription,
        options: ProducerOptions,
    ) -> Result<Self, Error> {
        let topic = description.topic.as_str();
        let partition_count = description.partitions.len() as u32;
        if partition_count == 0 {
            return Err(Error::invalid("topic", format!("{topic} has no partitions")));
        }
        options.check(partition_count)?;
        let inner = Inner {
            router,
            topic: topic.into(),
            producer_id: options.producer_id.unwrap_or_else(|| Uuid::new_v4().into_bytes()),
            partitions: (0..partition_count).map(|_| OnceLock::new()).collect(),
            turn: Arc::new(AtomicU32::new(rand::random_range(0..partition_count))),
            room: Arc::new(Semaphore::new(options.buffer_size)),
            closed: AtomicBool::new(false),
            options,
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// The id under which this producer's events are de-duplicated.
    #[must_use]
    pub fn producer_id(&self) -> [u8; 16] {
        self.inner.producer_id
    }

    /// Takes an event; waits for buffer room only. The receipt comes with the [`Delivery`].
    ///
    /// # Errors
    /// [`SendError`] with the event when it breaks a limit or the producer is closed.
    pub async fn send(&self, mut event: NewEvent) -> Result<Delivery, SendError> {
        match self.queue(&mut event).await {
            Ok(delivery) => Ok(delivery),
            Err(error) => Err(SendError { error, event: Box::new(event) }),
        }
    }

    async fn queue(&self, event: &mut NewEvent) -> Result<Delivery, Error> {
        let inner = &self.inner;
        let record = event.record()?;
        let size = record.encoded_size() as u32;
        let room = inner.room.clone().acquire_many_owned(size).await.map_err(|_| Error::Closed)?;
        if inner.closed.load(Ordering::Acquire) {
            return Err(Error::Closed);
        }
        let count = inner.partitions.len() as u32;
        let partition = match inner.options.partition {
            Some(partition) => partition,
            None if record.key.is_empty() => inner.turn.load(Ordering::Relaxed) % count,
            None => partition_of(&record.key, count),
        };
        let (reply, receiver) = oneshot::channel();
        let command = Command::Event(Queued { record, room, reply });
        self.partition(partition).send(command).await.map_err(|_| Error::Closed)?;
        Ok(Delivery { receiver })
    }

    /// Sends an event and waits until it is written.
    ///
    /// # Errors
    /// What [`Producer::send`] or the server refuses; `UNKNOWN_OUTCOME` when it may or may not be
    /// written at the end of the request's time.
    pub async fn publish(&self, event: NewEvent) -> Result<Receipt, Error> {
        self.send(event).await?.await
    }

    /// Sends everything taken so far without lingering and waits until each event is written or
    /// refused; the outcomes are in the deliveries.
    ///
    /// # Errors
    /// [`Error::Closed`] when the runtime is shutting down.
    pub async fn flush(&self) -> Result<(), Error> {
        let mut waits = Vec::new();
        for sender in self.inner.partitions.iter().filter_map(OnceLock::get) {
            let (done, wait) = oneshot::channel();
            sender.send(Command::Flush(done)).await.map_err(|_| Error::Closed)?;
            waits.push(wait);
        }
        for wait in waits {
            wait.await.map_err(|_| Error::Closed)?;
        }
        Ok(())
    }

    /// Takes no more events, then as [`Producer::flush`].
    ///
    /// # Errors
    /// As [`Producer::flush`].
    pub async fn close(&self) -> Result<(), Error> {
        self.inner.closed.store(true, Ordering::Release);
        self.flush().await
    }

    fn partition(&self, partition: u32) -> &mpsc::Sender<Command> {
        let inner = &self.inner;
        inner.partitions[partition as usize].get_or_init(|| {
            let (sender, commands) = mpsc::channel(limits::EVENT_QUEUE);
            let stamping = Stamping { id: inner.producer_id, epoch: inner.options.producer_epoch };
            let task = PartitionTask {
                flight: Flight::new(
                    inner.router.clone(),
                    &inner.topic,
                    partition,
                    inner.options.in_flight_max,
                    Some(stamping),
                ),
                router: inner.router.clone(),
                topic: inner.topic.clone(),
                partition,
                partition_count: inner.partitions.len() as u32,
                options: inner.options.clone(),
                turn: inner.turn.clone(),
                inbox: VecDeque::new(),
                building: None,
                flushes: Vec::new(),
            };
            tokio::spawn(task.run(commands));
            sender
        })
    }
}

/// The partition of a key: `xxh3_64(key) % partition_count`.
#[must_use]
pub fn partition_of(key: &[u8], partition_count: u32) -> u32 {
    (xxh3_64(key) % u64::from(partition_count.max(1))) as u32
}

/// Builds and sends the batches of one partition.
struct PartitionTask {
    flight: Flight,
    router: Arc<Router>,
    topic: Arc<str>,
    partition: u32,
    partition_count: u32,
    options: ProducerOptions,
    turn: Arc<AtomicU32>,
    inbox: VecDeque<Command>,
    building: Option<Building>,
    /// Flushes that wait for the batch of this number.
    flushes: Vec<(u64, oneshot::Sender<()>)>,
}

struct Building {
    builder: BatchBuilder,
    replies: Vec<oneshot::Sender<Result<Receipt, Error>>>,
    room: OwnedSemaphorePermit,
    linger_end: Instant,
    flush: Vec<oneshot::Sender<()>>,
}

impl PartitionTask {
    async fn run(mut self, mut commands: mpsc::Receiver<Command>) {
        let mut received = Vec::with_capacity(INBOX_SIZE);
        let mut open = true;
        while open || !self.inbox.is_empty() || self.building.is_some() || !self.flight.is_empty() {
            let linger_end = self.building.as_ref().map(|building| building.linger_end);
            tokio::select! {
                count = commands.recv_many(&mut received, INBOX_SIZE), if open && self.inbox.is_empty() => {
                    open = count > 0;
                    self.inbox.extend(received.drain(..));
                }
                () = self.flight.step() => {}
                () = until(linger_end), if self.flight.has_room() => self.seal(),
            }
            self.work(!open);
        }
    }

    /// Moves events into batches and batches into the flight, as far as there is room.
    fn work(&mut self, closing: bool) {
        while let Some(command) = self.inbox.pop_front() {
            match command {
                Command::Event(queued) => {
                    let full = self.building.as_ref().is_some_and(|building| {
                        building.builder.size() >= self.options.batch_size || !building.builder.fits(&queued.record)
                    });
                    if full && !self.flight.has_room() {
                        self.inbox.push_front(Command::Event(queued));
                        break;
                    }
                    if full {
                        self.seal();
                    }
                    self.add(queued);
                }
                Command::Flush(done) => match &mut self.building {
                    Some(building) => building.flush.push(done),
                    None => self.flushes.push((self.flight.last_id(), done)),
                },
            }
        }
        if let Some(building) = &self.building {
            let ready = closing
                || self.flight.is_empty()
                || !building.flush.is_empty()
                || building.builder.size() >= self.options.batch_size;
            if ready && self.flight.has_room() {
                self.seal();
            }
        }
        let flight = &self.flight;
        for (_, done) in self.flushes.extract_if(.., |(id, _)| flight.is_resolved(*id)) {
            // Whoever asked may have stopped waiting.
            let _ = done.send(());
        }
    }

    fn add(&mut self, queued: Queued) {
        let building = match &mut self.building {
            Some(building) => {
                building.room.merge(queued.room);
                building
            }
            None => self.building.insert(Building {
                builder: BatchBuilder::new(),
                replies: Vec::new(),
                room: queued.room,
                linger_end: Instant::now() + self.options.linger,
                flush: Vec::new(),
            }),
        };
        match building.builder.push(&queued.record) {
            Ok(()) => building.replies.push(queued.reply),
            Err(error) => {
                let _ = queued.reply.send(Err(Error::invalid("event", error.to_string())));
            }
        }
    }

    fn seal(&mut self) {
        let Some(building) = self.building.take() else { return };
        let _ = self.turn.compare_exchange(
            self.partition,
            (self.partition + 1) % self.partition_count,
            Ordering::Relaxed,
            Ordering::Relaxed,
        );
        let mut end = self.flight.last_id();
        if building.builder.record_count() > 0 {
            let (topic, partition, room) = (self.topic.clone(), self.partition, building.room);
            let replies = building.replies;
            end = self.flight.push(Item {
                produce: wire::Produce {
                    topic: self.topic.to_string(),
                    partition,
                    durability: self.options.durability.into(),
                    lease_tokens: Vec::new(),
                },
                payload: Payload::Batch(building.builder.build(self.options.compression, None)),
                deadline: Instant::now() + self.router.options.request_timeout,
                done: Box::new(move |outcome| {
                    for (index, reply) in replies.into_iter().enumerate() {
                        let receipt = outcome.as_ref().map_err(Error::clone).map(|produced| Receipt {
                            topic: topic.clone(),
                            partition,
                            offset: produced.base_offset + index as u64,
                            time_ms: produced.time_ms,
                            durability: produced.durability(),
                        });
                        // The delivery may have been dropped: nobody wants to know.
                        let _ = reply.send(receipt);
                    }
                    drop(room);
                }),
            });
        }
        self.flushes.extend(building.flush.into_iter().map(|done| (end, done)));
    }
}

async fn until(end: Option<Instant>) {
    match end {
        Some(end) => sleep_until(end).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_out_of_bounds_are_refused_by_name() {
        let refused = |change: fn(&mut ProducerOptions)| {
            let mut options = ProducerOptions::default();
            change(&mut options);
            options.check(4).unwrap_err().to_string()
        };
        assert!(refused(|o| o.linger = Duration::from_secs(1)).starts_with("linger "));
        assert!(refused(|o| o.batch_size = 0).starts_with("batch_size "));
        assert!(refused(|o| o.in_flight_max = 6).starts_with("in_flight_max "));
        assert!(refused(|o| o.buffer_size = 1).starts_with("buffer_size "));
        assert!(refused(|o| o.partition = Some(4)).starts_with("partition "));
        ProducerOptions::default().check(4).unwrap();
    }

    #[test]
    fn keys_go_where_the_documents_say() {
        // Other clients compute the same: these values are part of the protocol.
        let partitions: Vec<u32> = ["", "a", "job-1", "job-2"].map(|key| partition_of(key.as_bytes(), 12)).to_vec();
        assert_eq!(partitions, ["", "a", "job-1", "job-2"].map(|key| (xxh3_64(key.as_bytes()) % 12) as u32));
        assert_eq!(xxh3_64(b""), 0x2d06_8005_38d3_94c2);
    }
}
