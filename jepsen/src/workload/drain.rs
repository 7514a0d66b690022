//! The closing read: every replica of every partition to its end.

use std::{collections::BTreeMap, ops::RangeInclusive, sync::Arc, time::Duration};

use arqon_sdk::{Client, ConsumerOptions, Error, From, wire::ErrorCode};
use tokio::{
    task::{JoinError, JoinSet},
    time::{Instant, sleep, timeout_at},
};

use super::{
    Shared, key,
    read::{POLL_COUNT_MAX, RETRY_PAUSE},
    told,
};
use crate::{
    check::{CONVERGE_SECONDS_MAX, damaged_offsets},
    history::{Kind, Line, Value, Writer},
    payload,
};

/// How long damage on a replica may wait for its repair before the closing read passes over it.
const REPAIR_TIME_MAX: Duration = Duration::from_secs(30);
/// Time for a try to find out who holds which partition.
const DESCRIBE_TIME_MAX: Duration = Duration::from_secs(10);

/// Reads every replica of every partition to its end and records it as the closing read.
/// `ends` are the offsets after the highest acknowledged ones. A replica that does not get there
/// in time has no closing line with `tail`, which the checkers take as it is.
///
/// # Errors
/// Options that the SDK refuses.
pub(super) async fn drain_all(shared: &Arc<Shared>, topic: &str, ends: &[u64]) -> Result<(), super::Error> {
    let deadline = Instant::now() + Duration::from_secs(CONVERGE_SECONDS_MAX);
    let extents = read_leaders(shared, topic, ends, deadline, true).await?;
    let replicas = replicas(shared, topic).await?;
    let mut drains = JoinSet::new();
    for (partition, extent) in (0..).zip(&extents) {
        // Where nobody tells who holds it, every node must.
        let nodes = replicas.get(&partition).unwrap_or(&shared.setup.nodes);
        shared.history.record(Line::replicas(&key(topic, partition), nodes.clone()));
        for node in nodes {
            let client = shared.setup.client("drain")?;
            // What the leader could not get repaired in time need not be waited for once more.
            let skipped = extent.skipped.clone();
            let reader = Drain { skipped, ..Drain::new(shared, topic, partition, Some(*node), extent.end) };
            drains.spawn(drain(reader, client, deadline));
        }
    }
    while let Some(drained) = drains.join_next().await {
        drained.unwrap_or_else(panic_on);
    }
    Ok(())
}

/// What was read of a partition at its leader.
#[derive(Clone, Debug)]
pub(super) struct Extent {
    /// The offset after the last record.
    pub(super) end: u64,
    /// Number of records.
    pub(super) count: u64,
    /// Offsets that stayed damaged.
    skipped: Vec<RangeInclusive<u64>>,
}

/// Reads every partition at its leader; gives where each one ends. What was unknown may stand
/// behind the last acknowledged append: the leaders tell. `last`: as part of the closing read.
///
/// # Errors
/// Options that the SDK refuses.
pub(super) async fn read_leaders(
    shared: &Arc<Shared>,
    topic: &str,
    ends: &[u64],
    deadline: Instant,
    last: bool,
) -> Result<Vec<Extent>, super::Error> {
    let mut drains = JoinSet::new();
    for (partition, end) in (0..).zip(ends) {
        let client = shared.setup.client("drain")?;
        let reader = Drain { last, ..Drain::new(shared, topic, partition, None, *end) };
        drains.spawn(drain(reader, client, deadline));
    }
    let mut extents: Vec<Extent> = ends.iter().map(|end| Extent { end: *end, count: 0, skipped: Vec::new() }).collect();
    while let Some(drained) = drains.join_next().await {
        let (partition, extent) = drained.unwrap_or_else(panic_on);
        let known = &mut extents[partition as usize];
        *known = Extent { end: known.end.max(extent.end), ..extent };
    }
    Ok(extents)
}

/// The nodes that hold each partition now: changes of members may have moved them.
async fn replicas(shared: &Shared, topic: &str) -> Result<BTreeMap<u32, Vec<u64>>, super::Error> {
    let client = shared.setup.client("drain")?;
    let deadline = Instant::now() + DESCRIBE_TIME_MAX;
    loop {
        match client.describe_topic(topic).await {
            Ok(description) => {
                let of = |part: arqon_sdk::wire::PartitionDescription| (part.partition, part.replica_nodes);
                return Ok(description.partitions.into_iter().map(of).collect());
            }
            Err(_) if Instant::now() < deadline => sleep(RETRY_PAUSE).await,
            Err(_) => return Ok(BTreeMap::new()),
        }
    }
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
    /// Whether it is part of the closing read.
    last: bool,
    /// The offset to reach.
    end: u64,
    next: u64,
    /// Records read.
    count: u64,
    /// Offsets that stayed damaged, here or at the leader.
    skipped: Vec<RangeInclusive<u64>>,
}

impl Drain {
    fn new(shared: &Shared, topic: &str, partition: u32, node: Option<u64>, end: u64) -> Self {
        let history = shared.history.clone();
        let process = history.new_process();
        let (topic, key) = (topic.to_owned(), key(topic, partition));
        Self { topic, key, history, partition, node, process, last: true, end, next: 0, count: 0, skipped: Vec::new() }
    }

    fn line(&self, kind: Kind) -> Line {
        let last = self.last.then_some(true);
        Line { node: self.node, last, ..Line::client(self.process, kind, "read", &self.key) }
    }

    /// Records an error that no waiting explains; it counts even when a later try succeeds.
    fn refused(&mut self, error: &Error) {
        self.history.record(Line { offset: Some(self.next), ..self.line(Kind::Invoke) });
        self.history.record(Line { error: Some(told(error)), ..self.line(Kind::Fail) });
    }

    /// Whether all from `next` up to `last` stayed damaged elsewhere, so that there is nobody to repair it.
    fn is_known(&self, last: u64) -> bool {
        self.skipped.iter().any(|range| range.contains(&self.next) && range.contains(&last))
    }

    /// Goes on after `last`, which is damaged for good.
    fn skip(&mut self, last: u64) {
        self.skipped.push(self.next..=last);
        self.next = last + 1;
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
                    Ok(Some(event)) => values.push((event.offset, payload::decode(&self.key, &event.payload))),
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
                self.count += values.len() as u64;
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
async fn drain(mut drain: Drain, client: Client, deadline: Instant) -> (u32, Extent) {
    let mut failed = None;
    // The damage met last, and since when it stands in the way.
    let mut damage: Option<(u64, Instant)> = None;
    loop {
        match timeout_at(deadline, drain.read(&client)).await {
            Ok(Ok(())) if drain.next >= drain.end => break,
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                let told = told(&error);
                if error.code() == Some(ErrorCode::Damaged)
                    && let Some((_, last)) = damaged_offsets(&told)
                {
                    let since = damage.filter(|(met, _)| *met == last).map_or_else(Instant::now, |(_, since)| since);
                    damage = Some((last, since));
                    if drain.is_known(last) || since.elapsed() > REPAIR_TIME_MAX {
                        // Nobody has it: the rest of the log is judged without it.
                        drain.refused(&error);
                        drain.skip(last);
                        damage = None;
                        continue;
                    }
                } else if !error.is_transient() {
                    drain.refused(&error);
                }
                failed = Some(told);
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
        Line { offset: Some(drain.next), value, hw: Some(drain.next), tail: Some(true), ..drain.line(Kind::Ok) }
    } else {
        let error = failed.unwrap_or_else(|| format!("stays at {} of {}", drain.next, drain.end));
        Line { error: Some(error), ..drain.line(Kind::Fail) }
    };
    drain.history.record(closing);
    (drain.partition, Extent { end: drain.next, count: drain.count, skipped: drain.skipped })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_stayed_damaged_at_the_leader_is_skipped_at_once_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let history = Arc::new(Writer::create(&dir.path().join("history.jsonl")).unwrap());
        let mut drain = Drain {
            topic: "t".to_owned(),
            key: key("t", 0),
            history,
            partition: 0,
            node: Some(2),
            process: 1,
            last: true,
            end: 20,
            next: 4,
            count: 0,
            skipped: vec![4..=9],
        };
        assert!(drain.is_known(9) && drain.is_known(6));
        assert!(!drain.is_known(10), "more than the leader lacked");
        drain.skip(9);
        assert_eq!(drain.next, 10);
        assert!(!drain.is_known(12), "another range, which may be repaired");
    }
}
