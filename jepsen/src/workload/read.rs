//! Readers that poll while the faults go on, and the closing read of every replica.

use std::{sync::Arc, time::Duration};

use arqon_sdk::{Client, Consumer, ConsumerOptions, Error, From};
use tokio::{
    task::{JoinError, JoinSet},
    time::{Instant, sleep, timeout_at},
};

use super::{Setup, Shared, told};
use crate::{
    check::CONVERGE_SECONDS_MAX,
    history::{Kind, Line, Value, Writer},
    payload,
};

/// Values of one poll.
const POLL_COUNT_MAX: usize = 500;
/// Length of one poll.
const POLL_TIME: Duration = Duration::from_millis(250);
/// Wait before a reader tries again after an error.
const RETRY_PAUSE: Duration = Duration::from_millis(100);
/// First process number of the closing read; those of the workload stay far below.
const DRAIN_PROCESS: u64 = 1_000_000_000;

/// Polls one partition until the workload stops: at the leader, or at the replica of `node`.
/// After an error a new process goes on where the old one stood.
pub(super) async fn run(shared: Arc<Shared>, client: Client, partition: u32, node: Option<u64>) {
    let key = shared.setup.key(partition);
    let mut next = 0;
    while !shared.stops() {
        let process = shared.new_process();
        let line = |kind| Line { node, ..Line::client(process, kind, "read", &key) };
        let from = if next == 0 { From::Earliest } else { From::Offset(next) };
        let options = ConsumerOptions {
            from,
            partitions: Some(vec![partition]),
            any_replica_of: node,
            wait: POLL_TIME,
            ..ConsumerOptions::default()
        };
        let Ok(mut consumer) = client.consumer(&shared.setup.topic, options).await else {
            shared.pause(RETRY_PAUSE).await;
            continue;
        };
        while !shared.stops() {
            shared.history.record(Line { offset: Some(next), ..line(Kind::Invoke) });
            let (values, error) = poll(&mut consumer, partition, Instant::now() + POLL_TIME).await;
            let begin = next;
            next = values.last().map_or(next, |(offset, _)| offset + 1);
            if let Some(error) = error {
                // What came before the error is kept by a process that goes on after it.
                next = begin;
                shared.history.record(Line { error: Some(error), ..line(Kind::Info) });
                break;
            }
            shared.history.record(Line { offset: Some(begin), value: Some(Value::Many(values)), ..line(Kind::Ok) });
        }
        shared.pause(RETRY_PAUSE).await;
    }
}

/// Values that come before `end`; the first error ends the poll.
async fn poll(consumer: &mut Consumer, partition: u32, end: Instant) -> (Vec<(u64, Option<u64>)>, Option<String>) {
    let mut values = Vec::new();
    while values.len() < POLL_COUNT_MAX {
        match timeout_at(end, consumer.next()).await {
            Ok(Ok(Some(event))) => values.push((event.offset, payload::decode(partition, &event.payload))),
            Ok(Ok(None)) | Err(_) => break,
            Ok(Err(error)) => return (values, Some(told(&error))),
        }
    }
    (values, None)
}

/// Reads every replica of every partition to its end and records it as the closing read.
/// `ends` are the offsets after the highest acknowledged ones. A replica that does not get there
/// in time has no closing line with `tail`, which the checkers take as it is.
///
/// # Errors
/// Options that the SDK refuses.
pub async fn drain_all(setup: &Setup, history: &Arc<Writer>, ends: &[u64]) -> Result<(), Error> {
    let deadline = Instant::now() + Duration::from_secs(CONVERGE_SECONDS_MAX);
    // What was unknown may stand behind the last acknowledged append: the leaders tell.
    let mut drains = JoinSet::new();
    for (partition, end) in (0..setup.partition_count).zip(ends) {
        let client = setup.client("drain")?;
        drains.spawn(drain(Drain::new(setup, history, partition, None, *end), client, deadline));
    }
    let mut ends = ends.to_vec();
    while let Some(drained) = drains.join_next().await {
        let (partition, end) = drained.unwrap_or_else(panic_on);
        ends[partition as usize] = ends[partition as usize].max(end);
    }
    for (partition, end) in (0..setup.partition_count).zip(&ends) {
        for node in &setup.nodes {
            let client = setup.client("drain")?;
            drains.spawn(drain(Drain::new(setup, history, partition, Some(*node), *end), client, deadline));
        }
    }
    while let Some(drained) = drains.join_next().await {
        drained.unwrap_or_else(panic_on);
    }
    Ok(())
}

fn panic_on<T>(error: JoinError) -> T {
    std::panic::resume_unwind(error.into_panic())
}

/// One partition read to its end, on one node or at the leader.
struct Drain {
    topic: String,
    key: String,
    history: Arc<Writer>,
    partition: u32,
    node: Option<u64>,
    process: u64,
    /// The offset to reach.
    end: u64,
    next: u64,
}

impl Drain {
    fn new(setup: &Setup, history: &Arc<Writer>, partition: u32, node: Option<u64>, end: u64) -> Self {
        let process = DRAIN_PROCESS + u64::from(partition) * 1_000 + node.unwrap_or(0);
        let (topic, key) = (setup.topic.clone(), setup.key(partition));
        Self { topic, key, history: history.clone(), partition, node, process, end, next: 0 }
    }

    fn line(&self, kind: Kind) -> Line {
        Line { node: self.node, last: Some(true), ..Line::client(self.process, kind, "read", &self.key) }
    }

    /// Records an error that no waiting explains; it counts even when a later try succeeds.
    fn refused(&self, error: &Error) {
        self.history.record(Line { offset: Some(self.next), ..self.line(Kind::Invoke) });
        self.history.record(Line { error: Some(told(error)), ..self.line(Kind::Fail) });
    }

    /// Reads from `next` to what is the end now.
    async fn read(&mut self, client: &Client) -> Result<(), Error> {
        let options = ConsumerOptions {
            from: if self.next == 0 { From::Earliest } else { From::Offset(self.next) },
            partitions: Some(vec![self.partition]),
            any_replica_of: self.node,
            stop_at_end: true,
            ..ConsumerOptions::default()
        };
        let mut consumer = client.consumer(&self.topic, options).await?;
        loop {
            let mut values = Vec::new();
            let mut result = Ok(false);
            while values.len() < POLL_COUNT_MAX {
                match consumer.next().await {
                    Ok(Some(event)) => values.push((event.offset, payload::decode(self.partition, &event.payload))),
                    Ok(None) => {
                        result = Ok(true);
                        break;
                    }
                    Err(error) => {
                        result = Err(error);
                        break;
                    }
                }
            }
            if let Some((last, _)) = values.last() {
                let begin = self.next;
                self.next = last + 1;
                self.history.record(Line { offset: Some(begin), ..self.line(Kind::Invoke) });
                let value = Some(Value::Many(values));
                self.history.record(Line { offset: Some(begin), value, ..self.line(Kind::Ok) });
            }
            if result? {
                return Ok(());
            }
        }
    }
}

/// Reads until the end is reached or the time is over; gives where it ended.
async fn drain(mut drain: Drain, client: Client, deadline: Instant) -> (u32, u64) {
    let mut failed = None;
    loop {
        match timeout_at(deadline, drain.read(&client)).await {
            Ok(Ok(())) if drain.next >= drain.end => break,
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                if !error.is_transient() {
                    drain.refused(&error);
                }
                failed = Some(told(&error));
            }
            Err(_) => {}
        }
        if Instant::now() >= deadline {
            break;
        }
        sleep(RETRY_PAUSE).await;
    }
    let reached = drain.next >= drain.end;
    drain.history.record(Line { offset: Some(drain.next), ..drain.line(Kind::Invoke) });
    let closing = if reached {
        let value = Some(Value::Many(Vec::new()));
        Line { value, hw: Some(drain.next), tail: Some(true), ..drain.line(Kind::Ok) }
    } else {
        let error = failed.unwrap_or_else(|| format!("stays at {} of {}", drain.next, drain.end));
        Line { error: Some(error), ..drain.line(Kind::Fail) }
    };
    drain.history.record(closing);
    (drain.partition, drain.next)
}
