//! The batching, idempotent producer.

use std::{
    collections::VecDeque,
    fmt,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use arqon_proto::{BatchBuilder, Compression, RecordParts, wire};
use tokio::{
    sync::{Semaphore, SemaphorePermit},
    time::Instant,
};
use uuid::Uuid;
use wire::Durability;
use xxhash_rust::xxh3::xxh3_64;

use crate::{
    Delivery, Error, NewEvent, Receipt, SendError,
    flight::{Flight, Item, Payload, Stamping},
    lane::tick,
    limits,
    line::{Leaves, LineHandle, Supply},
    outcome::{Outcome, Resolver},
    router::Router,
    spare::Spare,
};

/// How a [`Producer`] batches and what it promises.
#[derive(Clone, Debug)]
pub struct ProducerOptions {
    /// How long an event may wait for company while other batches are under way; 5 ms at most.
    /// When nothing is under way, an event leaves at once, and while one batch of its partition is,
    /// the next leaves as soon as the task that sends gives way.
    pub linger: Duration,
    /// A batch takes no more events when they reach this size in bytes. It leaves earlier, with
    /// 256 KiB, unless as many are under way as may be.
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
    /// Linger 1 ms, batches of up to 1 MiB, no compression, majority-fsync, 5 in flight, a buffer
    /// of 32 MiB, any partition, a random id.
    fn default() -> Self {
        Self {
            linger: Duration::from_millis(1),
            batch_size: 1 << 20,
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

/// Writes events to one topic; cheap to clone, all clones share buffers and order.
///
/// Events of one partition stand in the log in the order of `send`. Each carries a producer id
/// and a sequence, so that an event that is sent again (after a lost connection or a change of
/// leader) still stands there once. With a key, the partition is `xxh3_64(key) % partitions`;
/// without, each partition in turn gets what is sent in the time of a linger, or a full batch.
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
    partitions: Vec<OnceLock<LineHandle<Building>>>,
    shared: Arc<Shared>,
}

/// What the partitions of one producer share.
struct Shared {
    topic: Arc<str>,
    options: ProducerOptions,
    producer_id: [u8; 16],
    request_timeout: Duration,
    partition_count: u32,
    turn: Turn,
    /// Bytes of events that may still be taken.
    room: Semaphore,
    /// Batches that have left and are not resolved.
    under_way: AtomicUsize,
    spare: Arc<Spare>,
}

/// Whose turn it is to get the events without a key.
struct Turn {
    partition_count: u32,
    partition: AtomicU32,
    began: Instant,
    /// When it moved last, in microseconds after `began`.
    moved_us: AtomicU64,
    /// It stays with a partition for this long, so that what is sent together goes together.
    stay: Duration,
}

impl Turn {
    fn new(partition_count: u32, stay: Duration) -> Self {
        let partition = AtomicU32::new(rand::random_range(0..partition_count));
        Self { partition_count, partition, began: Instant::now(), moved_us: AtomicU64::new(0), stay }
    }

    fn partition(&self) -> u32 {
        self.partition.load(Ordering::Relaxed)
    }

    /// A batch to `partition` takes no more events; `is_full` says that it had its share of them.
    fn batch_closed(&self, partition: u32, is_full: bool) {
        let now = self.began.elapsed();
        if !is_full && now < Duration::from_micros(self.moved_us.load(Ordering::Relaxed)) + self.stay {
            return;
        }
        let next = (partition + 1) % self.partition_count;
        if self.partition.compare_exchange(partition, next, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
            self.moved_us.store(now.as_micros() as u64, Ordering::Relaxed);
        }
    }
}

impl Shared {
    fn new(topic: &str, partition_count: u32, request_timeout: Duration, options: ProducerOptions) -> Self {
        Self {
            topic: topic.into(),
            producer_id: options.producer_id.unwrap_or_else(|| Uuid::new_v4().into_bytes()),
            request_timeout,
            partition_count,
            turn: Turn::new(partition_count, options.linger),
            room: Semaphore::new(options.buffer_size),
            under_way: AtomicUsize::new(0),
            spare: Arc::default(),
            options,
        }
    }
}

impl fmt::Debug for Producer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Producer").field("topic", &self.inner.shared.topic).finish_non_exhaustive()
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
        let shared = Shared::new(topic, partition_count, router.options.request_timeout, options);
        let partitions = (0..partition_count).map(|_| OnceLock::new()).collect();
        Ok(Self { inner: Arc::new(Inner { router, partitions, shared: Arc::new(shared) }) })
    }

    /// The id under which this producer's events are de-duplicated.
    #[must_use]
    pub fn producer_id(&self) -> [u8; 16] {
        self.inner.shared.producer_id
    }

    /// Takes an event; waits for buffer room only. The receipt comes with the [`Delivery`].
    ///
    /// # Errors
    /// [`SendError`] with the event when it breaks a limit or the producer is closed.
    pub async fn send(&self, event: NewEvent) -> Result<Delivery, SendError> {
        match self.queue(&event).await {
            Ok(delivery) => Ok(delivery),
            Err(error) => Err(SendError { error, event: Box::new(event) }),
        }
    }

    async fn queue(&self, event: &NewEvent) -> Result<Delivery, Error> {
        let room = &self.inner.shared.room;
        let taken = event.checked(|record| {
            let size = record.encoded_size();
            match room.try_acquire_many(size as u32) {
                Ok(permit) => Ok(self.add(event, &record, permit)),
                Err(_) => Err(size),
            }
        })?;
        match taken {
            Ok(delivery) => delivery,
            Err(size) => {
                let permit = room.acquire_many(size as u32).await.map_err(|_| Error::Closed)?;
                event.checked(|record| self.add(event, &record, permit)).flatten()
            }
        }
    }

    /// Puts a checked record into its partition's batch, for which `permit` has made room.
    fn add(&self, event: &NewEvent, record: &RecordParts<'_>, permit: SemaphorePermit<'_>) -> Result<Delivery, Error> {
        let shared = &self.inner.shared;
        let partition = match shared.options.partition {
            Some(partition) => partition,
            None if record.key.is_empty() => shared.turn.partition(),
            None => partition_of(record.key, shared.partition_count),
        };
        let delivery = self.line(partition).add(|building| building.add(record, event.id))?;
        // It is given back when the batch is resolved.
        permit.forget();
        Ok(delivery)
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
        self.finish(false).await
    }

    /// Takes no more events, then as [`Producer::flush`].
    ///
    /// # Errors
    /// As [`Producer::flush`].
    pub async fn close(&self) -> Result<(), Error> {
        self.finish(true).await
    }

    async fn finish(&self, closes: bool) -> Result<(), Error> {
        if closes {
            self.inner.shared.room.close();
        }
        let lines = self.inner.partitions.iter().filter_map(OnceLock::get);
        let outcomes: Vec<_> =
            lines.flat_map(|line| line.add(|building| (building.flush(closes), Leaves::Now))).collect();
        for outcome in outcomes {
            // What became of the events is told to those who hold their deliveries.
            if let Err(Error::Closed) = Delivery::new(outcome, 0).await {
                return Err(Error::Closed);
            }
        }
        Ok(())
    }

    fn line(&self, partition: u32) -> &LineHandle<Building> {
        let Inner { router, partitions, shared } = &*self.inner;
        partitions[partition as usize].get_or_init(|| {
            let stamping = Stamping { id: shared.producer_id, epoch: shared.options.producer_epoch };
            let window = shared.options.in_flight_max;
            LineHandle::open(Building::new(shared.clone(), partition), tick(router), |hear| {
                Flight::new(router.clone(), &shared.topic, partition, window, Some(stamping), hear)
            })
        })
    }
}

/// The partition of a key: `xxh3_64(key) % partition_count`.
#[must_use]
pub fn partition_of(key: &[u8], partition_count: u32) -> u32 {
    (xxh3_64(key) % u64::from(partition_count.max(1))) as u32
}

/// The batches of one partition that have not left.
struct Building {
    shared: Arc<Shared>,
    partition: u32,
    /// The one that events are added to.
    open: Option<Open>,
    /// Those that are full.
    full: VecDeque<Open>,
    /// Outcomes that may not be known yet, oldest first.
    unresolved: VecDeque<Arc<Outcome>>,
    /// Batches under way when one was last asked for, with that one.
    under_way: usize,
    closed: bool,
}

struct Open {
    shared: Arc<Shared>,
    partition: u32,
    builder: BatchBuilder,
    resolver: Resolver,
    /// The id of the first record that brings none; those after it count up.
    first_id: u128,
    linger_end: Instant,
    /// Leaves as soon as it can, whatever its size and age.
    leaves: bool,
}

impl Building {
    fn new(shared: Arc<Shared>, partition: u32) -> Self {
        let (full, unresolved) = (VecDeque::new(), VecDeque::new());
        Self { shared, partition, open: None, full, unresolved, under_way: 0, closed: false }
    }

    /// Adds a checked record; also says when something should leave.
    fn add(&mut self, record: &RecordParts<'_>, id: Option<[u8; 16]>) -> (Result<Delivery, Error>, Leaves) {
        if self.closed {
            return (Err(Error::Closed), Leaves::Later);
        }
        let mut leaves = false;
        if self.open.as_ref().is_some_and(|open| open.builder.size() >= self.shared.options.batch_size) {
            leaves = true;
            self.seal();
        }
        let delivery = match self.open().append(record, id) {
            Some(delivery) => delivery,
            None => {
                leaves = true;
                self.seal();
                let first = self.open().append(record, id);
                first.expect("the first record of a batch always fits")
            }
        };
        let soft_size = self.shared.options.batch_size.min(limits::BATCH_SIZE);
        let open = self.open();
        if !open.leaves && open.builder.size() >= soft_size {
            open.leaves = true;
            leaves = true;
        }
        let leaves = match self.under_way {
            _ if leaves => Leaves::Now,
            under_way if !self.may_be_eager(under_way) => Leaves::Later,
            0 => Leaves::Now,
            _ => Leaves::Soon,
        };
        (Ok(delivery), leaves)
    }

    /// Whether a batch may leave without waiting for company, beside so many of its partition.
    fn may_be_eager(&self, under_way: usize) -> bool {
        under_way < limits::EAGER_DEPTH && self.shared.under_way.load(Ordering::Relaxed) < limits::EAGER_COUNT_MAX
    }

    fn open(&mut self) -> &mut Open {
        self.open.get_or_insert_with(|| {
            while self.unresolved.front().is_some_and(|oldest| oldest.is_known()) {
                self.unresolved.pop_front();
            }
            let outcome = Outcome::new(self.shared.topic.clone(), self.partition);
            self.unresolved.push_back(outcome.clone());
            Open {
                shared: self.shared.clone(),
                partition: self.partition,
                builder: BatchBuilder::in_buffer(self.shared.spare.take()),
                resolver: Resolver(outcome),
                // Room to count up through a batch without a carry.
                first_id: Uuid::now_v7().as_u128() & !(arqon_proto::limits::BATCH_RECORD_COUNT_MAX as u128 - 1),
                linger_end: Instant::now() + self.shared.options.linger,
                leaves: false,
            }
        })
    }

    /// Closes the batch under construction.
    fn seal(&mut self) {
        if let Some(open) = self.take_open(true) {
            self.full.push_back(open);
        }
    }

    fn take_open(&mut self, is_full: bool) -> Option<Open> {
        let open = self.open.take()?;
        self.shared.turn.batch_closed(self.partition, is_full);
        Some(open)
    }

    /// Lets everything leave; gives the outcomes to wait for.
    fn flush(&mut self, closes: bool) -> Vec<Arc<Outcome>> {
        self.closed |= closes;
        if let Some(open) = &mut self.open {
            open.leaves = true;
        }
        self.unresolved.iter().filter(|outcome| !outcome.is_known()).cloned().collect()
    }
}

impl Supply for Building {
    type Batch = Open;

    fn next(&mut self, under_way: usize) -> Option<Open> {
        let is_eager = self.may_be_eager(under_way);
        let next = self.full.pop_front().or_else(|| {
            let open = self.open.as_ref()?;
            let leaves = open.leaves || is_eager || open.linger_end <= Instant::now();
            let is_full = open.builder.size() >= self.shared.options.batch_size.min(limits::BATCH_SIZE);
            if leaves { self.take_open(is_full) } else { None }
        });
        self.under_way = under_way + usize::from(next.is_some());
        if next.is_some() {
            self.shared.under_way.fetch_add(1, Ordering::Relaxed);
        }
        next
    }

    fn finish(open: Open) -> Item {
        let Open { shared, partition, builder, resolver, .. } = open;
        let size = builder.size();
        let batch = builder.build(shared.options.compression, None);
        Item {
            produce: wire::Produce {
                topic: shared.topic.to_string(),
                partition,
                durability: shared.options.durability.into(),
                lease_tokens: Vec::new(),
            },
            payload: Payload::Batch(batch),
            deadline: Instant::now() + shared.request_timeout,
            spare: Some(shared.spare.clone()),
            done: Box::new(move |outcome| {
                shared.under_way.fetch_sub(1, Ordering::Relaxed);
                shared.room.add_permits(size);
                resolver.0.resolve(outcome);
            }),
        }
    }

    fn due(&self) -> Option<Instant> {
        self.open.as_ref().map(|open| open.linger_end)
    }

    fn is_empty(&self) -> bool {
        self.open.is_none() && self.full.is_empty()
    }
}

impl Open {
    /// Adds a record if it fits.
    fn append(&mut self, record: &RecordParts<'_>, id: Option<[u8; 16]>) -> Option<Delivery> {
        let index = self.builder.record_count();
        let id = id.unwrap_or_else(|| (self.first_id + u128::from(index)).to_be_bytes());
        let fits = self.builder.append(&RecordParts { id, ..*record });
        fits.then(|| Delivery::new(self.resolver.0.clone(), index))
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

    #[test]
    fn a_second_batch_leaves_with_what_was_sent_meanwhile_and_the_third_lingers() {
        let options = ProducerOptions { linger: limits::LINGER_MAX, ..Default::default() };
        let mut building = Building::new(Arc::new(Shared::new("t", 1, Duration::MAX, options)), 0);
        let send = |building: &mut Building| {
            let event = NewEvent::new("x");
            let (delivery, leaves) = event.checked(|record| building.add(&record, event.id)).unwrap();
            delivery.unwrap();
            leaves
        };
        let size = |batch: Option<Open>| batch.map(|open| open.builder.record_count());
        assert!(send(&mut building) == Leaves::Now);
        assert_eq!(size(building.next(0)), Some(1));
        assert!((0..4).all(|_| send(&mut building) == Leaves::Soon));
        assert_eq!(size(building.next(1)), Some(4));
        assert!(send(&mut building) == Leaves::Later);
        assert_eq!(size(building.next(2)), None);
        // One of the two was answered.
        assert_eq!(size(building.next(1)), Some(1));
    }

    #[test]
    fn the_turn_moves_after_a_linger_or_a_full_batch() {
        let hour = Turn::new(3, Duration::from_secs(3_600));
        let first = hour.partition();
        hour.batch_closed(first, false);
        assert_eq!(hour.partition(), first, "sent together, kept together");
        hour.batch_closed(first, true);
        assert_eq!(hour.partition(), (first + 1) % 3);
        hour.batch_closed(first, true);
        assert_eq!(hour.partition(), (first + 1) % 3, "it was another's turn");

        let none = Turn::new(3, Duration::ZERO);
        let partitions: Vec<_> = (0..3)
            .map(|_| {
                let partition = none.partition();
                none.batch_closed(partition, false);
                partition
            })
            .collect();
        assert!((0..3).all(|partition| partitions.contains(&partition)), "{partitions:?}");
    }
}
