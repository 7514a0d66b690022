//! Readers that poll while the faults go on.

use std::{sync::Arc, time::Duration};

use arqon_sdk::{Client, Consumer, ConsumerOptions, Error, From};
use tokio::{
    task::JoinSet,
    time::{Instant, timeout_at},
};

use super::{Shared, key, told};
use crate::{
    history::{Kind, Line, Value},
    payload,
};

/// Values of one poll.
pub(super) const POLL_COUNT_MAX: usize = 500;
/// Length of one poll.
const POLL_TIME: Duration = Duration::from_millis(250);
/// Wait before a reader tries again after an error.
pub(super) const RETRY_PAUSE: Duration = Duration::from_millis(100);
/// Starts a reader at the leader of a partition and one at each of its replicas.
pub(super) fn start(shared: &Arc<Shared>, topic: &str, partition: u32, tasks: &mut JoinSet<()>) -> Result<(), Error> {
    let replicas = shared.setup.nodes.iter().map(|node| Some(*node));
    for node in [None].into_iter().chain(replicas) {
        let client = shared.setup.client("reader")?;
        tasks.spawn(run(shared.clone(), client, topic.to_owned(), partition, node));
    }
    Ok(())
}

/// Polls one partition until the workload stops: at the leader, or at the replica of `node`.
/// After an error a new process goes on where the old one stood.
async fn run(shared: Arc<Shared>, client: Client, topic: String, partition: u32, node: Option<u64>) {
    let key = key(&topic, partition);
    let mut next = 0;
    while !shared.stops() {
        let process = shared.history.new_process();
        let line = |kind| Line { node, ..Line::client(process, kind, "read", &key) };
        let from = if next == 0 { From::Earliest } else { From::Offset(next) };
        let options = ConsumerOptions {
            from,
            partitions: Some(vec![partition]),
            any_replica_of: node,
            wait: POLL_TIME,
            ..ConsumerOptions::default()
        };
        let Ok(mut consumer) = client.consumer(&topic, options).await else {
            shared.pause(RETRY_PAUSE).await;
            continue;
        };
        while !shared.stops() {
            shared.history.record(Line { offset: Some(next), ..line(Kind::Invoke) });
            let (values, error) = poll(&mut consumer, &key, Instant::now() + POLL_TIME).await;
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
async fn poll(consumer: &mut Consumer, key: &str, end: Instant) -> (Vec<(u64, Option<u64>)>, Option<String>) {
    let mut values = Vec::new();
    while values.len() < POLL_COUNT_MAX {
        match timeout_at(end, consumer.next()).await {
            Ok(Ok(Some(event))) => values.push((event.offset, payload::decode(key, &event.payload))),
            Ok(Ok(None)) | Err(_) => break,
            Ok(Err(error)) => return (values, Some(told(&error))),
        }
    }
    (values, None)
}
