//! Producers: unique values, one producer id for several processes, in the order of sending.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use arqon_sdk::{Client, Delivery, Error, NewEvent, Producer, ProducerOptions, wire::ErrorCode};
use tokio::{sync::Mutex, task::JoinSet, time::Instant};

use super::{Shared, finish, read, tail, told};
use crate::{
    history::{Kind, Line, Value},
    payload,
};

/// Producers per partition.
const PRODUCER_COUNT: usize = 2;
/// Processes that share one producer.
const PROCESS_COUNT: usize = 8;
/// Wait before a producer is opened again when no node answers.
const REOPEN_PAUSE: Duration = Duration::from_millis(100);

/// One producer with its processes, until the first outcome that is not `ok`.
struct Generation {
    shared: Arc<Shared>,
    producer: Producer,
    number: u64,
    partition: u32,
    /// Sequence of the next send; held while sending, so that sequences are the order of sends.
    sequence: Mutex<u64>,
    retired: AtomicBool,
}

/// Starts producers and readers of each partition.
pub(super) fn start(shared: &Arc<Shared>, tasks: &mut JoinSet<()>) -> Result<(), Error> {
    for partition in 0..shared.setup.partition_count {
        producers(shared, partition, PRODUCER_COUNT, tasks)?;
        read::start(shared, &shared.topic, partition, tasks)?;
        tail::start(shared, partition, tasks)?;
    }
    Ok(())
}

/// Starts `count` producers of the workload's topic on one partition.
pub(super) fn producers(
    shared: &Arc<Shared>,
    partition: u32,
    count: usize,
    tasks: &mut JoinSet<()>,
) -> Result<(), Error> {
    let interval = shared.interval(shared.setup.partition_count as usize * count * PROCESS_COUNT);
    for _ in 0..count {
        let client = shared.setup.client("producer")?;
        tasks.spawn(run(shared.clone(), client, partition, interval));
    }
    Ok(())
}

/// Keeps one producer on `partition` alive until the workload stops.
async fn run(shared: Arc<Shared>, client: Client, partition: u32, interval: Duration) {
    while !shared.stops() {
        let options = ProducerOptions { partition: Some(partition), ..ProducerOptions::default() };
        let Ok(producer) = client.producer(&shared.topic, options).await else {
            // Nothing was asked of the log, so the history has nothing to tell.
            shared.pause(REOPEN_PAUSE).await;
            continue;
        };
        let generation = Arc::new(Generation {
            number: shared.next_producer.fetch_add(1, Ordering::Relaxed),
            shared: shared.clone(),
            producer,
            partition,
            sequence: Mutex::new(0),
            retired: AtomicBool::new(false),
        });
        let mut processes = JoinSet::new();
        for _ in 0..PROCESS_COUNT {
            processes.spawn(process(generation.clone(), interval));
        }
        finish(&mut processes).await;
    }
}

async fn process(generation: Arc<Generation>, interval: Duration) {
    let shared = &generation.shared;
    let number = shared.history.new_process();
    let mut next = Instant::now();
    while !shared.stops() && !generation.retired.load(Ordering::Acquire) {
        if shared.is_backed_up() {
            shared.pause(REOPEN_PAUSE).await;
            continue;
        }
        if generation.append(number).await != Kind::Ok {
            generation.retired.store(true, Ordering::Release);
        }
        // After a stall the rate goes on as before; it does not catch up.
        next = (next + interval).max(Instant::now());
        shared.pause(next - Instant::now()).await;
    }
}

impl Generation {
    /// One append from invocation to outcome, both recorded.
    async fn append(&self, process: u64) -> Kind {
        let shared = &self.shared;
        let value = shared.new_value();
        let healed = shared.is_healed();
        let key = shared.key(self.partition);
        let (sent, line) = self.send(process, value, &key).await;
        let outcome = match sent {
            Ok(delivery) => delivery.await,
            Err(error) => Err(error),
        };
        let (kind, offset, error) = match outcome {
            Ok(receipt) => (Kind::Ok, Some(receipt.offset), None),
            Err(error) => (kind_of(&error), None, Some(told(&error))),
        };
        shared.history.record(Line { kind, offset, error, ..line });
        if let Some(offset) = offset {
            shared.acked(self.partition, offset, healed);
        }
        kind
    }

    async fn send(&self, process: u64, value: u64, key: &str) -> (Result<Delivery, Error>, Line) {
        let mut sequence = self.sequence.lock().await;
        let line = Line {
            value: Some(Value::One(value)),
            producer: Some(self.number),
            sequence: Some(*sequence),
            ..Line::client(process, Kind::Invoke, "append", key)
        };
        self.shared.history.record(line.clone());
        *sequence += 1;
        let event = NewEvent::new(payload::encode(key, value));
        (self.producer.send(event).await.map_err(Error::from), line)
    }
}

/// `fail` only where the answer says that nothing was written; everything else is unknown.
pub(super) fn kind_of(error: &Error) -> Kind {
    if matches!(error, Error::Invalid { .. }) {
        return Kind::Fail;
    }
    match error.code() {
        Some(
            ErrorCode::ValidationError
            | ErrorCode::AuthenticationFailed
            | ErrorCode::AuthorizationDenied
            | ErrorCode::PolicyBlocked
            | ErrorCode::TargetNotFound
            | ErrorCode::TopicFull,
        ) => Kind::Fail,
        _ => Kind::Info,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use arqon_sdk::wire;

    #[test]
    fn what_may_have_been_written_is_never_a_failure() {
        let server = |code: ErrorCode| Error::from(wire::Error { code: code.into(), ..Default::default() });
        let timed_out = Error::TimedOut { what: "produce".into(), reason: "no answer".into() };
        let lost = Error::Lost { server: "a:1".into(), reason: "reset".into() };
        for error in [
            timed_out,
            lost,
            Error::Closed,
            server(ErrorCode::UnknownOutcome),
            server(ErrorCode::Duplicate),
            server(ErrorCode::NotLeader),
            server(ErrorCode::InternalError),
            server(ErrorCode::StorageFull),
        ] {
            assert_eq!(kind_of(&error), Kind::Info, "{error}");
        }
        assert_eq!(kind_of(&server(ErrorCode::ValidationError)), Kind::Fail);
    }
}
