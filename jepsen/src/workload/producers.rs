//! Producers whose sequences are set by hand, and that send again on purpose what may be written
//! already: from another connection, while the first try is under way, and long after the answer.
//! Now and then one falls silent, and comes back after restarts and elections to send the last batch again:
//! what the bus remembers of it then comes from a checkpoint.
//!
//! Each batch stands once, wherever and however often it was sent. After an unknown outcome the
//! producer comes back with the next epoch, which must shut out what is left of the earlier one.

use std::{
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};

use arqon_proto::{BatchBuilder, Compression, ProducerStamp, RecordParts};
use arqon_sdk::{Client, Error, wire};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use tokio::{
    task::JoinSet,
    time::{Instant, timeout},
};

use super::{REQUEST_SECONDS_MAX, Shared, append::kind_of, read, tail, told};
use crate::{
    history::{Kind, Line, Value},
    payload,
};

/// Producers per partition.
const PRODUCER_COUNT: usize = 3;
/// Records of one batch.
const BATCH_COUNT_MAX: u64 = 4;
/// How often the first try is given up after some milliseconds, to be sent again at once.
const IMPATIENCE: f64 = 0.2;
/// Longest patience of such a try, in ms.
const IMPATIENT_MS_MAX: u64 = 20;
/// How often a batch that is acknowledged is sent once more.
const REPETITION: f64 = 0.05;
/// How often a producer falls silent after a batch that is acknowledged; another one takes its place.
const SILENCE: f64 = 0.02;
/// How long it is silent, in ms.
const SILENT_MS: (u64, u64) = (3_000, 30_000);
/// Silent producers of one task.
const SILENT_COUNT_MAX: usize = 16;
/// Bits of a sequence in the history that hold the sequence within its epoch.
const EPOCH_SHIFT: u32 = 40;

/// Starts producers and readers of each partition.
pub(super) fn start(shared: &Arc<Shared>, tasks: &mut JoinSet<()>) -> Result<(), Error> {
    for partition in 0..shared.setup.partition_count {
        for index in 0..PRODUCER_COUNT as u64 {
            let seed = shared.setup.seed ^ (u64::from(partition) << 32) ^ (index << 48);
            let clients = [shared.setup.client("producer-a")?, shared.setup.client("producer-b")?];
            let producer = Producer::new(shared.clone(), clients, partition, seed);
            tasks.spawn(producer.run());
        }
        read::start(shared, &shared.topic, partition, tasks)?;
        tail::start(shared, partition, tasks)?;
    }
    Ok(())
}

struct Producer {
    shared: Arc<Shared>,
    clients: [Client; 2],
    partition: u32,
    random: StdRng,
    /// The number in the history, and the id on the wire.
    number: u64,
    id: [u8; 16],
    epoch: u32,
    sequence: u64,
    processes: Vec<u64>,
    /// Last batches of producers that are silent, and when they are sent again.
    silent: Vec<(Instant, bytes::Bytes)>,
}

/// A batch, and the lines of its records in the history.
struct Sent {
    batch: bytes::Bytes,
    lines: Vec<Line>,
}

impl Producer {
    fn new(shared: Arc<Shared>, clients: [Client; 2], partition: u32, seed: u64) -> Self {
        let mut random = StdRng::seed_from_u64(seed);
        let number = shared.next_producer.fetch_add(1, Relaxed);
        let id = random.random();
        let (processes, silent) = Default::default();
        Self { shared, clients, partition, random, number, id, epoch: 0, sequence: 0, processes, silent }
    }

    /// A new producer in place of this one.
    fn begin(&mut self) {
        self.number = self.shared.next_producer.fetch_add(1, Relaxed);
        self.id = self.random.random();
        (self.epoch, self.sequence) = (0, 0);
        self.processes.clear();
    }

    async fn run(mut self) {
        let process_count = self.shared.setup.partition_count as usize * PRODUCER_COUNT;
        // A batch holds a few records, so that many make the rate.
        let interval = self.shared.interval(process_count) * (1 + BATCH_COUNT_MAX as u32) / 2;
        let mut next = Instant::now();
        while !self.shared.stops() {
            if self.batch().await != Kind::Ok {
                self.epoch += 1;
                self.sequence = 0;
                self.processes.clear();
            }
            let now = Instant::now();
            let due: Vec<_> = self.silent.extract_if(.., |(due, _)| *due <= now).collect();
            for (_, batch) in due {
                self.repeat(&batch).await;
            }
            next = (next + interval).max(Instant::now());
            self.shared.pause(next - Instant::now()).await;
        }
        for (_, batch) in std::mem::take(&mut self.silent) {
            self.repeat(&batch).await;
        }
    }

    /// Sends once more what was acknowledged. Whatever the answer: should it be written again, the readers see it
    /// twice.
    async fn repeat(&self, batch: &bytes::Bytes) {
        let _ = self.submit(1, batch, Duration::from_secs(1)).await;
    }

    /// One batch from invocation to outcome, both recorded for each record.
    async fn batch(&mut self) -> Kind {
        let count = self.random.random_range(1..=BATCH_COUNT_MAX);
        let healed = self.shared.is_healed();
        let sent = self.build(count);
        for line in &sent.lines {
            self.shared.history.record(line.clone());
        }
        let outcome = self.send(&sent.batch).await;
        self.sequence += count;
        let (kind, base, error) = match outcome {
            Ok(base) => (Kind::Ok, Some(base), None),
            Err(error) => (kind_of(&error), None, Some(told(&error))),
        };
        for (index, line) in (0..).zip(sent.lines) {
            let offset = base.map(|base| base + index);
            self.shared.history.record(Line { kind, offset, error: error.clone(), ..line });
            if let Some(offset) = offset {
                self.shared.acked(self.partition, offset, healed);
            }
        }
        if kind == Kind::Ok && self.random.random_bool(REPETITION) {
            self.repeat(&sent.batch).await;
        }
        if kind == Kind::Ok && self.silent.len() < SILENT_COUNT_MAX && self.random.random_bool(SILENCE) {
            let silent = Duration::from_millis(self.random.random_range(SILENT_MS.0..=SILENT_MS.1));
            self.silent.push((Instant::now() + silent, sent.batch));
            self.begin();
        }
        kind
    }

    fn build(&mut self, count: u64) -> Sent {
        let key = self.shared.key(self.partition);
        let mut builder = BatchBuilder::new();
        let mut lines = Vec::new();
        for index in 0..count {
            let value = self.shared.new_value();
            let payload = payload::encode(&key, value);
            let id = self.random.random();
            let _fits = builder.append(&RecordParts { id, payload: &payload, ..record() });
            if self.processes.len() <= index as usize {
                self.processes.push(self.shared.history.new_process());
            }
            lines.push(Line {
                value: Some(Value::One(value)),
                producer: Some(self.number),
                sequence: Some((u64::from(self.epoch) << EPOCH_SHIFT) + self.sequence + index),
                ..Line::client(self.processes[index as usize], Kind::Invoke, "append", &key)
            });
        }
        let stamp = ProducerStamp { id: self.id, epoch: self.epoch, base_sequence: self.sequence };
        let mut batch = bytes::BytesMut::new();
        builder.build(Compression::None, Some(stamp)).encode_into(&mut batch);
        Sent { batch: batch.freeze(), lines }
    }

    /// Sends the batch until its outcome is known or the time is over; gives its first offset.
    async fn send(&mut self, batch: &bytes::Bytes) -> Result<u64, Error> {
        let deadline = Instant::now() + Duration::from_secs(REQUEST_SECONDS_MAX);
        let mut server = self.random.random_range(0..2);
        let mut patience = match self.random.random_bool(IMPATIENCE) {
            true => Duration::from_millis(self.random.random_range(1..=IMPATIENT_MS_MAX)),
            false => Duration::from_secs(3),
        };
        loop {
            let left = deadline - Instant::now();
            let error = match self.submit(server, batch, patience.min(left)).await {
                Ok(base) => return Ok(base),
                Err(error) => error,
            };
            if kind_of(&error) == Kind::Fail || !is_unclear(&error) || Instant::now() >= deadline {
                return Err(error);
            }
            // The other connection, while the first try may still be on its way.
            server = 1 - server;
            patience = Duration::from_secs(3);
        }
    }

    /// One try; a duplicate that the bus remembers is as good as written.
    async fn submit(&self, server: usize, batch: &bytes::Bytes, patience: Duration) -> Result<u64, Error> {
        let produce =
            wire::Produce { topic: self.shared.topic.clone(), partition: self.partition, ..Default::default() };
        let tried = async { self.clients[server].submit(produce, batch.clone()).await?.outcome().await };
        match timeout(patience, tried).await {
            Ok(Ok(produced)) => Ok(produced.base_offset),
            Ok(Err(Error::Server { code: wire::ErrorCode::Duplicate, details, message, field })) => {
                match details.duplicates.first().and_then(|known| known.offset) {
                    Some(offset) => Ok(offset),
                    None => Err(Error::Server { code: wire::ErrorCode::Duplicate, details, message, field }),
                }
            }
            Ok(Err(error)) => Err(error),
            Err(_) => Err(Error::TimedOut { what: "produce".to_owned(), reason: "given up on purpose".to_owned() }),
        }
    }
}

/// Whether sending the same again can tell what became of it.
fn is_unclear(error: &Error) -> bool {
    error.is_transient() || matches!(error, Error::TimedOut { .. } | Error::Lost { .. })
}

fn record() -> RecordParts<'static> {
    RecordParts {
        id: [0; 16],
        event_type: arqon_sdk::EventType::Event as u8,
        schema: "",
        key: &[],
        headers: &[],
        extension: &[],
        payload: &[],
    }
}
