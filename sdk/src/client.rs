//! The client: one handle to the bus.

use std::{fmt, sync::Arc};

use arqon_proto::{Batch, Header, wire};
use bytes::{Bytes, BytesMut};
use wire::{frame::Body, list_offsets::At};

use crate::{
    Consumer, ConsumerOptions, Error, From, Options, Producer, ProducerOptions, Worker, WorkerOptions,
    lane::{Lanes, Submitted},
    router::{Patience, Router, Target},
};

/// A handle to the bus; cheap to clone, all clones share connections.
///
/// ```no_run
/// # async fn example() -> Result<(), arqon_sdk::Error> {
/// use arqon_sdk::{Client, Options};
/// let client = Client::connect(Options::new(["127.0.0.1:7700,127.0.0.1:7701"], "token")).await?;
/// println!("{} partitions", client.describe_topic("genesis.jobs").await?.partitions.len());
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct Client {
    router: Arc<Router>,
    lanes: Arc<Lanes>,
}

/// What one fetch brought.
#[derive(Clone, Debug)]
pub struct Fetched {
    /// Offset after the last record that can be read.
    pub committed: u64,
    /// First offset that is still there.
    pub log_start: u64,
    /// Data batches in order; the first may begin before the offset asked for.
    pub batches: Vec<Batch>,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("options", &self.router.options).finish_non_exhaustive()
    }
}

impl Client {
    /// Connects to the first server that can be reached; each is tried once.
    ///
    /// # Errors
    /// [`Error::Invalid`] for wrong options, the server's refusal (a wrong token), or
    /// [`Error::Unreachable`] naming the servers tried and why each one failed.
    pub async fn connect(options: Options) -> Result<Self, Error> {
        let client = Self::lazy(options)?;
        client.router.any().await?;
        Ok(client)
    }

    /// A client that connects when it is first used.
    ///
    /// # Errors
    /// [`Error::Invalid`] for wrong options.
    pub fn lazy(options: Options) -> Result<Self, Error> {
        Ok(Self { router: Arc::new(Router::new(options)?), lanes: Arc::default() })
    }

    /// What a server says of itself and of this client: cluster, node, tenant, limits.
    ///
    /// # Errors
    /// As [`Client::connect`].
    pub async fn welcome(&self) -> Result<wire::Welcome, Error> {
        Ok(self.router.any().await?.welcome().clone())
    }

    /// The topic's class, limits, partitions and leaders, as a server knows them now.
    ///
    /// # Errors
    /// `TARGET_NOT_FOUND` for an unknown topic, `AUTHORIZATION_DENIED`, or no server reached.
    pub async fn describe_topic(&self, topic: &str) -> Result<wire::TopicDescription, Error> {
        arqon_proto::check_topic(topic).map_err(invalid_name)?;
        self.router.forget_topic(topic);
        Ok(self.description(topic).await?.as_ref().clone())
    }

    /// The topic from memory, or asked with retries.
    async fn description(&self, topic: &str) -> Result<Arc<wire::TopicDescription>, Error> {
        self.router.describe_patiently(topic).await
    }

    /// A batching producer for `topic`.
    ///
    /// # Errors
    /// [`Error::Invalid`] for wrong options, or as [`Client::describe_topic`].
    pub async fn producer(&self, topic: &str, options: ProducerOptions) -> Result<Producer, Error> {
        arqon_proto::check_topic(topic).map_err(invalid_name)?;
        let description = self.description(topic).await?;
        Producer::open(self.router.clone(), &description, options)
    }

    /// A consumer that reads `topic` on its own, without a group.
    ///
    /// # Errors
    /// [`Error::Invalid`] for wrong options, or as [`Client::describe_topic`].
    pub async fn consumer(&self, topic: &str, options: ConsumerOptions) -> Result<Consumer, Error> {
        arqon_proto::check_topic(topic).map_err(invalid_name)?;
        let description = self.description(topic).await?;
        Consumer::open(self.router.clone(), &description, options).await
    }

    /// A worker that takes jobs of `topic` for its group.
    ///
    /// # Errors
    /// [`Error::Invalid`] for wrong options, or as [`Client::describe_topic`].
    pub async fn worker(&self, topic: &str, options: WorkerOptions) -> Result<Worker, Error> {
        arqon_proto::check_topic(topic).map_err(invalid_name)?;
        let description = self.description(topic).await?;
        Worker::open(self.clone(), &description, options)
    }

    /// The offset at a position of a partition.
    ///
    /// # Errors
    /// Unknown topic or partition, no permission, or no answer in time.
    pub async fn list_offsets(&self, topic: &str, partition: u32, from: From) -> Result<u64, Error> {
        list_offsets(&self.router, topic, partition, from, None).await
    }

    /// One fetch, as the wire has it; goes to the leader unless `any_replica` is set.
    ///
    /// # Errors
    /// `OFFSET_OUT_OF_RANGE`, unknown topic or partition, no permission, damaged bytes, or no
    /// answer in time.
    pub async fn fetch_raw(&self, fetch: wire::Fetch) -> Result<Fetched, Error> {
        fetch_raw(&self.router, fetch, None).await
    }

    /// Sends one request of the wire's protocol and gives its answer. Finds the leader that must
    /// answer and tries again, within the options' time, where that cannot change the outcome.
    /// Produces to one partition are written in the order of the calls; `payload` is then one
    /// encoded batch.
    ///
    /// A produce that may have been written is sent again only when it carries a producer id or
    /// lease tokens, and a `DUPLICATE` that this causes is answered as `Produced` with time 0.
    ///
    /// # Errors
    /// The server's error, `UNKNOWN_OUTCOME` for a produce that may be written, or no answer in
    /// time. [`Error::Invalid`] for a body that is no request.
    pub async fn request(&self, body: Body, payload: Vec<Bytes>) -> Result<(Body, Bytes), Error> {
        let leader = |topic: &str, partition| Target::Leader { topic: topic.to_owned(), partition };
        let replica = |topic: &str, partition| Target::Replica { topic: topic.to_owned(), partition };
        let (target, wait_ms, what) = match body {
            Body::Produce(produce) => {
                let produced = self.submit(produce, joined(payload)).await?.outcome().await?;
                return Ok((Body::Produced(produced), Bytes::new()));
            }
            Body::DescribeTopic(describe) => {
                let description = self.describe_topic(&describe.topic).await?;
                return Ok((Body::TopicDescription(description), Bytes::new()));
            }
            Body::Fetch(ref f) if f.any_replica => (replica(&f.topic, f.partition), f.wait_ms, "fetch from"),
            Body::Fetch(ref f) => (leader(&f.topic, f.partition), f.wait_ms, "fetch from"),
            Body::ListOffsets(ref l) if l.any_replica => (replica(&l.topic, l.partition), 0, "list offsets of"),
            Body::ListOffsets(ref l) => (leader(&l.topic, l.partition), 0, "list offsets of"),
            Body::Work(ref w) => (leader(&w.topic, w.partition), w.wait_ms, "take jobs of"),
            Body::Ack(ref a) => (leader(&a.topic, a.partition), 0, "acknowledge jobs of"),
            Body::Nack(ref n) => (leader(&n.topic, n.partition), 0, "give back jobs of"),
            Body::Renew(ref r) => (leader(&r.topic, r.partition), 0, "renew leases of"),
            Body::Ping(_) => (Target::Any, 0, "ask"),
            _ => return Err(Error::invalid("request", "is not one that a client sends")),
        };
        let what = match &target {
            Target::Leader { topic, partition } | Target::Replica { topic, partition } => {
                format!("{what} {topic}/{partition}")
            }
            _ => what.to_owned(),
        };
        self.router.request(&target, &body, &payload, Patience::safe(wait_ms), &what).await
    }

    /// Puts one encoded batch in line for its partition; its place among other batches is settled
    /// when this returns. Waits for room in the line only.
    ///
    /// # Errors
    /// [`Error::Invalid`] when `batch` is no batch.
    pub async fn submit(&self, produce: wire::Produce, batch: Bytes) -> Result<Submitted, Error> {
        self.lanes.submit(&self.router, produce, batch).await
    }

    pub(crate) fn router(&self) -> &Arc<Router> {
        &self.router
    }
}

fn joined(mut payload: Vec<Bytes>) -> Bytes {
    if payload.len() == 1 {
        return payload.remove(0);
    }
    let mut out = BytesMut::new();
    for piece in &payload {
        out.extend_from_slice(piece);
    }
    out.freeze()
}

pub(crate) fn invalid_name(error: arqon_proto::NameError) -> Error {
    Error::invalid(error.field, format!("{:?} is not valid: {}", error.name, error.rule))
}

/// The target and the `any_replica` flag of a read.
fn read_target(topic: &str, partition: u32, node: Option<u64>, any_replica: bool) -> (Target, bool) {
    let topic = topic.to_owned();
    match node {
        Some(node) => (Target::Node { topic, partition, node }, true),
        None if any_replica => (Target::Replica { topic, partition }, true),
        None => (Target::Leader { topic, partition }, false),
    }
}

pub(crate) async fn list_offsets(
    router: &Router,
    topic: &str,
    partition: u32,
    from: From,
    node: Option<u64>,
) -> Result<u64, Error> {
    let at = match from {
        From::Earliest => At::Earliest(true),
        From::Latest => At::Latest(true),
        From::Time(time_ms) => At::TimeMs(time_ms),
        From::Offset(offset) => return Ok(offset),
    };
    let (target, any_replica) = read_target(topic, partition, node, false);
    let request = wire::ListOffsets { topic: topic.to_owned(), partition, any_replica, at: Some(at) };
    let what = format!("list offsets of {topic}/{partition}");
    match router.request(&target, &Body::ListOffsets(request), &[], Patience::safe(0), &what).await? {
        (Body::OffsetsListed(listed), _) => Ok(listed.offset),
        _ => Err(Error::unexpected(&what)),
    }
}

pub(crate) async fn fetch_raw(router: &Router, fetch: wire::Fetch, node: Option<u64>) -> Result<Fetched, Error> {
    let what = format!("fetch from {}/{}", fetch.topic, fetch.partition);
    let (fetched, payload) = fetch_bytes(router, fetch, node).await?;
    let batches = split_batches(payload, &what)?;
    Ok(Fetched { committed: fetched.committed, log_start: fetched.log_start, batches })
}

/// As [`fetch_raw`], with the batches not looked at.
pub(crate) async fn fetch_bytes(
    router: &Router,
    mut fetch: wire::Fetch,
    node: Option<u64>,
) -> Result<(wire::Fetched, Bytes), Error> {
    let (target, any_replica) = read_target(&fetch.topic, fetch.partition, node, fetch.any_replica);
    fetch.any_replica = any_replica;
    let what = format!("fetch from {}/{}", fetch.topic, fetch.partition);
    let patience = Patience::safe(fetch.wait_ms);
    match router.request(&target, &Body::Fetch(fetch), &[], patience, &what).await? {
        (Body::Fetched(fetched), payload) => Ok((fetched, payload)),
        _ => Err(Error::unexpected(&what)),
    }
}

/// The batches of an answer's body, their checksums checked.
pub(crate) fn split_batches(mut payload: Bytes, what: &str) -> Result<Vec<Batch>, Error> {
    let mut batches = Vec::new();
    while !payload.is_empty() {
        let batch = Batch::split_from(&mut payload)
            .map_err(|source| Error::BadData { server: format!("the answer to {what}"), source })?;
        batches.push(batch);
    }
    Ok(batches)
}

/// The offset after the last batch, by the headers alone; `None` where they make no sense, which
/// [`split_batches`] will tell.
pub(crate) fn offset_after(mut payload: &[u8]) -> Option<u64> {
    let mut after = None;
    while !payload.is_empty() {
        let header = Header::decode(payload).ok()?;
        payload = payload.get(header.batch_size()..)?;
        after = Some(header.next_offset().0);
    }
    after
}
