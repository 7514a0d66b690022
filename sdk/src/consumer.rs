//! The plain consumer: reads partitions from a position on, without a group.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use arqon_proto::{DecodeError, wire};
use bytes::Bytes;
use futures_util::future::{FutureExt, join};
use tokio::{sync::mpsc, task::AbortHandle};

use crate::{
    Error, Event,
    client::{fetch_bytes, list_offsets, offset_after, split_batches},
    event::{Events, Origin},
    router::Router,
};

/// A position in a partition.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum From {
    /// The first record that is still there.
    #[default]
    Earliest,
    /// After the last record.
    Latest,
    /// This offset.
    Offset(u64),
    /// The first record appended at or after this time, in ms since 1970.
    Time(u64),
}

/// What a [`Consumer`] reads.
#[derive(Clone, Debug)]
pub struct ConsumerOptions {
    /// Where to start, in each partition.
    pub from: From,
    /// The partitions to read; all when `None`.
    pub partitions: Option<Vec<u32>>,
    /// Read what the replica on this node has applied, instead of asking the leader (TCP only).
    pub any_replica_of: Option<u64>,
    /// End at what was the end of each partition at the start.
    pub stop_at_end: bool,
    /// Bytes of one fetch; two per partition are kept ahead of the reader.
    pub bytes_max: u32,
    /// Longest wait of one fetch at the end of a partition.
    pub wait: Duration,
}

impl Default for ConsumerOptions {
    /// All partitions from the earliest record on, without end, in fetches of 1 MiB that wait
    /// up to 5 s.
    fn default() -> Self {
        Self {
            from: From::Earliest,
            partitions: None,
            any_replica_of: None,
            stop_at_end: false,
            bytes_max: 1 << 20,
            wait: Duration::from_secs(5),
        }
    }
}

/// Reads the events of one topic: in order within each partition, none skipped, none twice.
/// A lost server is waited for and reading goes on where it stopped.
///
/// ```no_run
/// # async fn example(client: arqon_sdk::Client) -> Result<(), arqon_sdk::Error> {
/// use arqon_sdk::{ConsumerOptions, From};
/// let options = ConsumerOptions { from: From::Latest, ..Default::default() };
/// let mut consumer = client.consumer("genesis.results", options).await?;
/// while let Some(event) = consumer.next().await? {
///     println!("{}/{}: {}", event.partition, event.offset, event.schema);
/// }
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct Consumer {
    ready: VecDeque<Chunk>,
    chunks: mpsc::Receiver<Result<Vec<Chunk>, Error>>,
    failed: Option<Error>,
    stop_at_end: bool,
    tasks: Vec<AbortHandle>,
}

impl Consumer {
    pub(crate) async fn open(
        router: Arc<Router>,
        description: &wire::TopicDescription,
        options: ConsumerOptions,
    ) -> Result<Self, Error> {
        let topic: Arc<str> = description.topic.as_str().into();
        let partitions = chosen_partitions(description, options.partitions.as_deref())?;
        if options.any_replica_of.is_some() && router.is_websocket() {
            return Err(Error::invalid("any_replica_of", "needs TCP servers, not a Shield"));
        }
        let tenant = router.tenant();
        // One chunk for all: each partition's task holds the next one ready.
        let (sender, chunks) = mpsc::channel(1);
        let mut consumer =
            Self { ready: VecDeque::new(), chunks, failed: None, stop_at_end: options.stop_at_end, tasks: Vec::new() };
        let mut readers = Vec::with_capacity(partitions.len());
        for partition in partitions {
            let node = options.any_replica_of;
            let next = list_offsets(&router, &topic, partition, options.from, node).await?;
            let end = match options.stop_at_end {
                true => Some(list_offsets(&router, &topic, partition, From::Latest, node).await?),
                false => None,
            };
            let (router, sender) = (router.clone(), sender.clone());
            let origin = Origin { topic: topic.clone(), tenant: tenant.clone(), partition };
            let bytes_max = options.bytes_max;
            let wait_ms = (options.wait.as_millis()).min(u128::from(arqon_proto::limits::POLL_WAIT_MS_MAX)) as u32;
            readers.push(Reader { router, origin, node, next, end, bytes_max, wait_ms, sender });
        }
        consumer.tasks = readers.into_iter().map(|reader| tokio::spawn(reader.run()).abort_handle()).collect();
        Ok(consumer)
    }

    /// The next event; `None` at the end, which only comes with `stop_at_end`. May be dropped
    /// and called again without losing an event.
    ///
    /// # Errors
    /// A transient error ([`Error::is_transient`]) when a partition could not be read for the
    /// options' request time: the consumer goes on trying, call again. Any other error ends the
    /// consumer and is repeated: `OFFSET_OUT_OF_RANGE` (with the log's start) when records were
    /// deleted before they were read, [`Error::Gap`], `DAMAGED`, no permission.
    pub async fn next(&mut self) -> Result<Option<Event>, Error> {
        loop {
            while let Some(chunk) = self.ready.front_mut() {
                match chunk.next() {
                    Ok(Some(event)) => return Ok(Some(event)),
                    Ok(None) => _ = self.ready.pop_front(),
                    Err(error) => {
                        self.ready.clear();
                        self.failed = Some(error);
                    }
                }
            }
            if let Some(error) = &self.failed {
                return Err(error.clone());
            }
            match self.chunks.recv().await {
                Some(Ok(chunks)) => self.ready = chunks.into(),
                Some(Err(error)) if error.is_transient() => return Err(error),
                Some(Err(error)) => self.failed = Some(error),
                None if self.stop_at_end => return Ok(None),
                None => self.failed = Some(Error::Closed),
            }
        }
    }
}

impl Drop for Consumer {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

fn chosen_partitions(description: &wire::TopicDescription, wanted: Option<&[u32]>) -> Result<Vec<u32>, Error> {
    let known: Vec<u32> = description.partitions.iter().map(|partition| partition.partition).collect();
    let Some(wanted) = wanted else { return Ok(known) };
    let mut chosen = wanted.to_vec();
    chosen.sort_unstable();
    chosen.dedup();
    if chosen.is_empty() {
        return Err(Error::invalid("partitions", "names no partition"));
    }
    match chosen.iter().find(|partition| !known.contains(partition)) {
        Some(unknown) => {
            Err(Error::invalid("partitions", format!("has {unknown}, the topic has {} from 0", known.len())))
        }
        None => Ok(chosen),
    }
}

/// The events of one batch, from offset `from` on.
#[derive(Debug)]
struct Chunk {
    events: Events,
    from: u64,
}

impl Chunk {
    fn next(&mut self) -> Result<Option<Event>, Error> {
        let from = self.from;
        self.events.next(|offset| offset >= from).map_err(|source| bad_data(self.events.origin(), source))
    }
}

fn bad_data(origin: &Origin, source: DecodeError) -> Error {
    Error::BadData { server: format!("the leader of {}/{}", origin.topic, origin.partition), source }
}

/// Reads one partition; while the consumer is busy with one fetch the next is under way.
struct Reader {
    router: Arc<Router>,
    origin: Origin,
    node: Option<u64>,
    next: u64,
    end: Option<u64>,
    bytes_max: u32,
    wait_ms: u32,
    sender: mpsc::Sender<Result<Vec<Chunk>, Error>>,
}

impl Reader {
    async fn run(mut self) {
        let mut fetched = None;
        while let Some(offset) = self.wanted(self.next) {
            let answer = match fetched.take() {
                Some(answer) => answer,
                None => self.fetch(offset).await,
            };
            // Asked for before the bytes are looked at, so that the server is not idle meanwhile.
            let after = answer.as_ref().ok().and_then(|payload| offset_after(payload));
            let mut ahead = after.and_then(|after| self.wanted(after)).map(|after| self.fetch(after).boxed());
            let early = ahead.as_mut().and_then(|ahead| ahead.now_or_never());
            let chunks = answer.and_then(|payload| self.read(payload));
            let next = chunks.as_ref().ok().map(|(_, next)| *next);
            let chunks = match chunks {
                Ok((chunks, _)) if chunks.is_empty() => None,
                chunks => Some(chunks.map(|(chunks, _)| chunks)),
            };
            let ends = chunks.as_ref().is_some_and(|chunks| chunks.as_ref().is_err_and(|error| !error.is_transient()));
            let sent = async {
                match chunks {
                    Some(chunks) => self.sender.send(chunks).await.is_ok(),
                    None => true,
                }
            };
            let (is_heard, later) = match (ahead, early) {
                (Some(ahead), None) if !ends => join(sent, ahead.map(Some)).await,
                (_, early) => (sent.await, early),
            };
            if ends || !is_heard {
                break;
            }
            fetched = later;
            self.next = next.unwrap_or(self.next);
        }
    }

    /// `offset`, unless reading ends there.
    fn wanted(&self, offset: u64) -> Option<u64> {
        self.end.is_none_or(|end| offset < end).then_some(offset)
    }

    async fn fetch(&self, offset: u64) -> Result<Bytes, Error> {
        let fetch = wire::Fetch {
            topic: self.origin.topic.to_string(),
            partition: self.origin.partition,
            offset,
            bytes_max: self.bytes_max,
            wait_ms: self.wait_ms,
            any_replica: self.node.is_some(),
            linearizable: false,
        };
        fetch_bytes(&self.router, fetch, self.node).await.map(|(_, payload)| payload)
    }

    /// The events of an answer, and the offset after them.
    fn read(&self, payload: Bytes) -> Result<(Vec<Chunk>, u64), Error> {
        let what = format!("fetch from {}/{}", self.origin.topic, self.origin.partition);
        let mut chunks = Vec::new();
        let mut next = self.next;
        for batch in split_batches(payload, &what)? {
            let (base, after) = (batch.header.base_offset.0, batch.header.next_offset().0);
            if base > next {
                return Err(self.gap(next, base));
            }
            if after <= next {
                continue;
            }
            let mut events =
                Events::new(self.origin.clone(), &batch).map_err(|source| bad_data(&self.origin, source))?;
            if let Some(end) = self.end {
                events.end_at(end);
            }
            chunks.push(Chunk { events, from: next });
            next = after;
        }
        Ok((chunks, next))
    }

    fn gap(&self, expected: u64, found: u64) -> Error {
        let Origin { topic, partition, .. } = &self.origin;
        Error::Gap { topic: topic.to_string(), partition: *partition, expected, found }
    }
}
