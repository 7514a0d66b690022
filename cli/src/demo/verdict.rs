//! What the replicas hold at the end, and what that makes of the run.
//!
//! Nothing here trusts a counter of a client: each replica of the results topic is read from
//! its first record to the end, on its own node, and each result is redrawn.

use std::collections::BTreeSet;
use std::time::Duration;

use arqon_sdk::{Client, ConsumerOptions, Event, From};
use genesis_worker::DistillAnswer;
use serde::Deserialize;
use tokio::time::{Instant, sleep};

use super::pictures::{Pictures, job_id, job_index};
use crate::Failure;

const CATCH_UP_TIMEOUT: Duration = Duration::from_secs(60);
const CATCH_UP_PAUSE: Duration = Duration::from_millis(100);
/// Errors told in full; the rest are only counted.
const ERROR_COUNT_MAX: usize = 20;

/// The results as one node holds them.
#[derive(Debug, Default)]
pub struct Replica {
    /// The node.
    pub node: u64,
    /// All partitions, in order.
    pub results: Vec<StoredResult>,
}

/// One record of a results topic.
#[derive(Clone, Debug, PartialEq)]
pub struct StoredResult {
    /// Partition and offset.
    pub place: (u32, u64),
    /// Id of the event.
    pub id: Vec<u8>,
    /// Payload.
    pub payload: Vec<u8>,
    /// Attempt of the job that made it.
    pub attempt: u32,
    /// Offset of the job, in the partition of the same number.
    pub job_offset: Option<u64>,
}

impl StoredResult {
    fn new(event: &Event) -> Self {
        Self {
            place: (event.partition, event.offset),
            id: event.id.to_vec(),
            payload: event.payload.to_vec(),
            attempt: event.cause.as_ref().map_or(0, |cause| cause.attempt),
            job_offset: event.cause.as_ref().map(|cause| cause.offset),
        }
    }
}

/// Reads `topic` on node `node`, from the first record to what the leaders hold.
///
/// # Errors
/// A partition cannot be read, or the node does not catch up.
pub async fn drain(client: &Client, topic: &str, partition_count: u32, node: u64) -> Result<Replica, Failure> {
    let mut results = Vec::new();
    for partition in 0..partition_count {
        let end = client.list_offsets(topic, partition, From::Latest).await?;
        let deadline = Instant::now() + CATCH_UP_TIMEOUT;
        loop {
            let found = drain_partition(client, topic, partition, node).await?;
            let reached = found.last().map_or(0, |last| last.place.1 + 1);
            if reached >= end {
                results.extend(found);
                break;
            }
            if Instant::now() >= deadline {
                let place = format!("{topic}/{partition} on node {node}");
                return Err(Failure::failed(format!("{place} holds {reached} of {end} results and does not catch up")));
            }
            sleep(CATCH_UP_PAUSE).await;
        }
    }
    Ok(Replica { node, results })
}

async fn drain_partition(
    client: &Client,
    topic: &str,
    partition: u32,
    node: u64,
) -> Result<Vec<StoredResult>, Failure> {
    let options = ConsumerOptions {
        from: From::Earliest,
        partitions: Some(vec![partition]),
        any_replica_of: Some(node),
        stop_at_end: true,
        ..ConsumerOptions::default()
    };
    let mut consumer = client.consumer(topic, options).await?;
    let mut found = Vec::new();
    while let Some(event) = consumer.next().await? {
        found.push(StoredResult::new(&event));
    }
    Ok(found)
}

/// What the replicas show.
#[derive(Debug, Default, PartialEq)]
pub struct Verdict {
    /// Jobs that have a result on every replica.
    pub results: usize,
    /// Jobs without a result on some replica.
    pub lost: usize,
    /// Results beyond the first of their job, on the replica that has most.
    pub duplicates: usize,
    /// Jobs whose result a later attempt made.
    pub redelivered: usize,
    /// Jobs whose result is an error or draws another picture.
    pub failed: usize,
    /// Whether all replicas hold the same bytes.
    pub replicas_agree: bool,
    /// What was found wrong, one line each; at most 20.
    pub errors: Vec<String>,
}

impl Verdict {
    /// Judges `replicas` for the jobs from 0 to `job_count`.
    #[must_use]
    pub fn of(replicas: &[Replica], job_count: usize, pictures: &Pictures) -> Self {
        let mut verdict = Self { replicas_agree: true, ..Self::default() };
        let mut lost = BTreeSet::new();
        for replica in replicas {
            verdict.count_replica(replica, job_count, &mut lost);
        }
        if replicas.is_empty() {
            lost.extend(0..job_count);
        }
        verdict.lost = lost.len();
        verdict.results = job_count - lost.len();
        for index in lost {
            verdict.error(format!("{} has no result on every replica", job_id(index)));
        }
        if let Some((first, others)) = replicas.split_first() {
            for other in others {
                verdict.compare(first, other);
            }
            verdict.check_results(first, job_count, pictures);
        }
        verdict
    }

    fn error(&mut self, text: String) {
        if self.errors.len() < ERROR_COUNT_MAX {
            self.errors.push(text);
        }
    }

    fn count_replica(&mut self, replica: &Replica, job_count: usize, lost: &mut BTreeSet<usize>) {
        let mut seen = vec![false; job_count];
        let mut duplicates = 0;
        for result in &replica.results {
            let index = result.job_index().filter(|index| *index < job_count);
            match index.map(|index| std::mem::replace(&mut seen[index], true)) {
                Some(false) => {}
                // A result of no job is one too many as well.
                Some(true) | None => {
                    duplicates += 1;
                    let (partition, offset) = result.place;
                    self.error(format!("node {}: {partition}/{offset} is one result too many", replica.node));
                }
            }
        }
        self.duplicates = self.duplicates.max(duplicates);
        lost.extend(seen.iter().enumerate().filter(|(_, seen)| !**seen).map(|(index, _)| index));
    }

    fn compare(&mut self, first: &Replica, other: &Replica) {
        if first.results == other.results {
            return;
        }
        self.replicas_agree = false;
        let place = first.results.iter().zip(&other.results).find(|(a, b)| a != b).map(|(a, _)| a.place);
        let place =
            place.map_or_else(|| "their ends".to_owned(), |(partition, offset)| format!("{partition}/{offset}"));
        self.error(format!("nodes {} and {} differ at {place}", first.node, other.node));
    }

    fn check_results(&mut self, replica: &Replica, job_count: usize, pictures: &Pictures) {
        let (mut failed, mut redelivered) = (BTreeSet::new(), BTreeSet::new());
        for result in &replica.results {
            let Some(index) = result.job_index().filter(|index| *index < job_count) else { continue };
            if result.attempt > 1 {
                redelivered.insert(index);
            }
            if let Err(problem) = result.check(index, pictures) {
                failed.insert(index);
                self.error(format!("{}: {problem}", job_id(index)));
            }
        }
        self.failed = failed.len();
        self.redelivered = redelivered.len();
    }
}

#[derive(Deserialize)]
struct Identified {
    job_id: String,
    #[serde(default)]
    error: Option<String>,
}

impl StoredResult {
    fn job_index(&self) -> Option<usize> {
        let result: Identified = serde_json::from_slice(&self.payload).ok()?;
        job_index(&result.job_id)
    }

    /// Redraws the picture and compares.
    fn check(&self, index: usize, pictures: &Pictures) -> Result<(), String> {
        if let Ok(Identified { error: Some(error), .. }) = serde_json::from_slice(&self.payload) {
            return Err(error);
        }
        let answer: DistillAnswer = serde_json::from_slice(&self.payload).map_err(|error| error.to_string())?;
        answer.check(pictures.picture(index)).map(drop).map_err(|error| error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use genesis_worker::{DistillRequest, distill, draw, rms};

    use super::*;

    fn result(pictures: &Pictures, index: usize, attempt: u32) -> StoredResult {
        let request = DistillRequest::from_json(&pictures.job(index).unwrap().payload).unwrap();
        let picture = request.picture().unwrap();
        let seed = distill(&picture).unwrap();
        let error_rms = rms(&draw(&seed), &picture).unwrap();
        let answer = DistillAnswer { job_id: Some(job_id(index)), seed, error_rms };
        let place = (0, index as u64);
        let payload = serde_json::to_vec(&answer).unwrap();
        StoredResult { place, id: vec![index as u8], payload, attempt, job_offset: Some(index as u64) }
    }

    fn replicas(pictures: &Pictures) -> Vec<Replica> {
        let results: Vec<_> = (0..4).map(|index| result(pictures, index, 1 + u32::from(index == 2))).collect();
        (1..=3).map(|node| Replica { node, results: results.clone() }).collect()
    }

    #[test]
    fn a_good_run_is_good() {
        let pictures = Pictures::load(None).unwrap();
        let verdict = Verdict::of(&replicas(&pictures), 4, &pictures);
        let good = Verdict { results: 4, redelivered: 1, replicas_agree: true, ..Verdict::default() };
        assert_eq!(verdict, good);
    }

    #[test]
    fn a_result_missing_on_one_replica_is_lost() {
        let pictures = Pictures::load(None).unwrap();
        let mut replicas = replicas(&pictures);
        replicas[1].results.remove(1);
        let verdict = Verdict::of(&replicas, 4, &pictures);
        assert_eq!((verdict.results, verdict.lost, verdict.replicas_agree), (3, 1, false));
        assert!(verdict.errors.iter().any(|error| error.contains("job-000001")), "{:?}", verdict.errors);
        assert_eq!(Verdict::of(&[], 4, &pictures).lost, 4);
    }

    #[test]
    fn a_second_result_and_one_of_no_job_are_duplicates() {
        let pictures = Pictures::load(None).unwrap();
        let mut replicas = replicas(&pictures);
        let again = replicas[2].results[0].clone();
        replicas[2].results.push(again);
        let foreign = StoredResult { payload: b"{\"job_id\":\"job-000099\"}".to_vec(), ..result(&pictures, 0, 1) };
        replicas[2].results.push(foreign);
        assert_eq!(Verdict::of(&replicas, 4, &pictures).duplicates, 2);
    }

    #[test]
    fn an_error_and_another_picture_have_failed() {
        let pictures = Pictures::load(None).unwrap();
        let mut replicas = replicas(&pictures);
        for replica in &mut replicas {
            replica.results[0].payload = b"{\"job_id\":\"job-000000\",\"error\":\"no\"}".to_vec();
            let mut other = result(&pictures, 2, 1);
            let text = String::from_utf8(other.payload).unwrap();
            other.payload = text.replace("job-000002", "job-000001").into_bytes();
            replica.results[1].payload = other.payload;
        }
        let verdict = Verdict::of(&replicas, 4, &pictures);
        assert_eq!((verdict.failed, verdict.lost, verdict.duplicates), (2, 0, 0));
        assert!(verdict.errors[0].contains("job-000000: no"), "{:?}", verdict.errors);
    }

    #[test]
    fn other_bytes_on_one_replica_do_not_agree() {
        let pictures = Pictures::load(None).unwrap();
        let mut replicas = replicas(&pictures);
        replicas[2].results[3].id = vec![9];
        let verdict = Verdict::of(&replicas, 4, &pictures);
        assert!(!verdict.replicas_agree);
        assert!(verdict.errors[0].contains("nodes 1 and 3 differ at 0/3"), "{:?}", verdict.errors);
    }
}
