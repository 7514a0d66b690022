//! Jobs, workers that die in the middle, and one result each.
//!
//! The workers speak the wire's requests themselves, so that every step is recorded: a job is
//! handed out (`take`), its result is written (`result`), the job is acknowledged (`ack`). The
//! seed says which worker forgets a job, dies with it, sleeps over its lease and goes on all the
//! same, gives it back, or dies between the result and the acknowledgement.

use std::{
    collections::HashSet,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use arqon_proto::{Batch, BatchBuilder, Compression, DecodeError, RecordParts};
use arqon_sdk::{Client, Error, frame::Body, wire};
use bytes::{Bytes, BytesMut};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use tokio::{
    task::JoinSet,
    time::{Instant, sleep},
};

use super::{
    JOBS_TOPIC, RESULTS_TOPIC, Shared, append,
    drain::{drain_all, read_leaders},
    finish, key, read, told,
};
use crate::{
    check::CONVERGE_SECONDS_MAX,
    history::{Kind, Line, Value},
    payload,
};

/// Jobs that may wait for a result before no more are submitted.
pub(super) const WAITING_COUNT_MAX: u64 = 500;
/// Workers per partition.
const WORKER_COUNT: u32 = 4;
/// Jobs of one request.
const TAKE_COUNT_MAX: u32 = 4;
/// Length of a lease.
const LEASE_TIME: Duration = Duration::from_secs(2);
/// Wait of one request for jobs.
const TAKE_WAIT_MS: u32 = 200;
/// The queue group.
const GROUP: &str = "jepsen";

/// What becomes of a job that a worker took.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Complete,
    /// Never settled; the worker goes on.
    Forget,
    /// The worker's connections close.
    Die,
    /// Completed after the lease has run out.
    Oversleep,
    GiveBack,
    /// The result is written and the worker dies before the acknowledgement.
    DieAfterResult,
}

impl Fate {
    fn choose(random: &mut StdRng) -> Self {
        match random.random_range(0..100) {
            0..3 => Self::Forget,
            3..5 => Self::Die,
            5..6 => Self::Oversleep,
            6..9 => Self::GiveBack,
            9..13 => Self::DieAfterResult,
            _ => Self::Complete,
        }
    }
}

/// The workers, which go on after the last job is submitted.
pub(super) struct Workers {
    tasks: JoinSet<()>,
    desk: Arc<Desk>,
}

/// What the workers share.
struct Desk {
    shared: Arc<Shared>,
    stop: AtomicBool,
    /// Per partition: jobs whose result stands.
    settled: Vec<Mutex<HashSet<u64>>>,
}

impl Desk {
    fn settle(&self, partition: u32, value: u64) {
        let mut settled = self.settled[partition as usize].lock().unwrap_or_else(PoisonError::into_inner);
        if settled.insert(value) {
            self.shared.settled_count.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn settled_count(&self, partition: usize) -> u64 {
        self.settled[partition].lock().unwrap_or_else(PoisonError::into_inner).len() as u64
    }
}

/// Starts submitters, workers, and readers of the results.
pub(super) fn start(shared: &Arc<Shared>, tasks: &mut JoinSet<()>) -> Result<Workers, Error> {
    let partition_count = shared.setup.partition_count;
    let settled = (0..partition_count).map(|_| Mutex::default()).collect();
    let desk = Arc::new(Desk { shared: shared.clone(), stop: AtomicBool::new(false), settled });
    let mut workers = JoinSet::new();
    for partition in 0..partition_count {
        append::producers(shared, partition, 1, tasks)?;
        read::start(shared, RESULTS_TOPIC, partition, tasks)?;
        for index in 0..WORKER_COUNT {
            let seed = shared.setup.seed ^ (u64::from(partition) << 32) ^ (u64::from(index) << 20);
            let worker = Worker {
                desk: desk.clone(),
                random: StdRng::seed_from_u64(seed),
                partition,
                name: format!("worker-{partition}-{index}"),
                process: shared.history.new_process(),
                client: shared.setup.client("worker")?,
            };
            workers.spawn(worker.run());
        }
    }
    Ok(Workers { tasks: workers, desk })
}

impl Workers {
    /// Waits until every job has a result, or the time is over; then the closing read of jobs and results.
    pub(super) async fn finish(mut self, shared: &Arc<Shared>, ends: &[u64]) -> Result<(), super::Error> {
        let deadline = Instant::now() + Duration::from_secs(CONVERGE_SECONDS_MAX);
        let jobs = read_leaders(shared, JOBS_TOPIC, ends, deadline, false).await?;
        let done = || jobs.iter().enumerate().all(|(index, jobs)| self.desk.settled_count(index) >= jobs.count);
        while !done() && Instant::now() < deadline {
            sleep(Duration::from_millis(50)).await;
        }
        self.desk.stop.store(true, Ordering::Release);
        finish(&mut self.tasks).await;
        let ends: Vec<u64> = jobs.iter().map(|jobs| jobs.end).collect();
        drain_all(shared, JOBS_TOPIC, &ends).await?;
        drain_all(shared, RESULTS_TOPIC, &vec![0; ends.len()]).await
    }
}

/// A job that is handed out.
struct Job {
    offset: u64,
    attempt: u32,
    token: Bytes,
    value: Option<u64>,
}

struct Worker {
    desk: Arc<Desk>,
    random: StdRng,
    partition: u32,
    name: String,
    process: u64,
    client: Client,
}

impl Worker {
    async fn run(mut self) {
        while !self.desk.stop.load(Ordering::Acquire) {
            for job in self.take().await {
                let fate = Fate::choose(&mut self.random);
                if fate == Fate::Oversleep {
                    sleep(LEASE_TIME + Duration::from_millis(500)).await;
                }
                if !self.work(&job, fate).await {
                    self.die();
                    break;
                }
            }
        }
    }

    /// Another worker in its place: new connections, a new process, the same random choices.
    fn die(&mut self) {
        self.process = self.desk.shared.history.new_process();
        // The options were accepted once; should they not be now, the old connections go on.
        if let Ok(client) = self.desk.shared.setup.client("worker") {
            self.client = client;
        }
    }

    /// Does what fate says with a job; `false` when the worker is dead.
    async fn work(&mut self, job: &Job, fate: Fate) -> bool {
        // Bytes that are no job get no result; the checkers tell of them.
        let Some(value) = job.value else { return true };
        match fate {
            Fate::Forget => return true,
            Fate::Die => return false,
            Fate::GiveBack => {
                let delay_ms = self.random.random_range(0..500);
                let leases = vec![wire::LeaseRef { offset: job.offset, attempt: job.attempt }];
                let nack = wire::Nack {
                    topic: JOBS_TOPIC.to_owned(),
                    partition: self.partition,
                    group: GROUP.to_owned(),
                    leases,
                    delay_ms,
                };
                // When it is not heard, the lease runs out all the same.
                let _ = self.client.request(Body::Nack(nack), Vec::new()).await;
                return true;
            }
            Fate::Complete | Fate::Oversleep | Fate::DieAfterResult => {}
        }
        let stands = self.result(job, value).await;
        if fate == Fate::DieAfterResult {
            return false;
        }
        if stands {
            self.ack(job, value).await;
        }
        true
    }

    fn line(&self, kind: Kind, f: &str, topic: &str) -> Line {
        Line::client(self.process, kind, f, &key(topic, self.partition))
    }

    fn record(&self, line: Line) {
        self.desk.shared.history.record(line);
    }

    /// An outcome that is not known: the process is retired.
    fn unknown(&mut self, line: Line, error: String) {
        self.record(Line { kind: Kind::Info, error: Some(error), ..line });
        self.process = self.desk.shared.history.new_process();
    }

    async fn take(&mut self) -> Vec<Job> {
        let work = wire::Work {
            topic: JOBS_TOPIC.to_owned(),
            partition: self.partition,
            group: GROUP.to_owned(),
            worker: self.name.clone(),
            jobs_max: self.random.random_range(1..=TAKE_COUNT_MAX),
            wait_ms: TAKE_WAIT_MS,
            lease_ms: LEASE_TIME.as_millis() as u32,
            ..Default::default()
        };
        let line = self.line(Kind::Invoke, "take", JOBS_TOPIC);
        self.record(line.clone());
        let jobs = match self.client.request(Body::Work(work), Vec::new()).await {
            Ok((Body::Leased(leased), bytes)) => jobs(&key(JOBS_TOPIC, self.partition), leased, bytes),
            Ok(_) => Err("BAD_DATA: the answer to a request for jobs is none".to_owned()),
            Err(error) => Err(told(&error)),
        };
        match jobs {
            Ok(jobs) if jobs.is_empty() => {
                self.record(Line { kind: Kind::Ok, ..line });
                jobs
            }
            Ok(jobs) => {
                for job in &jobs {
                    self.record(Line {
                        kind: Kind::Ok,
                        value: job.value.map(Value::One),
                        offset: Some(job.offset),
                        attempt: Some(u64::from(job.attempt)),
                        ..line.clone()
                    });
                }
                jobs
            }
            Err(error) => {
                self.unknown(line, error);
                sleep(Duration::from_millis(100)).await;
                Vec::new()
            }
        }
    }

    /// Writes the result; whether one stands now.
    async fn result(&mut self, job: &Job, value: u64) -> bool {
        let line = Line {
            value: Some(Value::One(value)),
            attempt: Some(u64::from(job.attempt)),
            ..self.line(Kind::Invoke, "result", RESULTS_TOPIC)
        };
        self.record(line.clone());
        let payload = payload::encode(&key(RESULTS_TOPIC, self.partition), value);
        let mut builder = BatchBuilder::new();
        let event_type = arqon_sdk::EventType::JobResult as u8;
        let (id, key, headers) = (self.random.random(), &[][..], &[][..]);
        let _fits = builder.append(&RecordParts {
            id,
            event_type,
            schema: "",
            key,
            headers,
            extension: &[],
            payload: &payload,
        });
        let mut batch = BytesMut::new();
        builder.build(Compression::None, None).encode_into(&mut batch);
        let produce = wire::Produce {
            topic: RESULTS_TOPIC.to_owned(),
            partition: self.partition,
            lease_tokens: vec![job.token.clone()],
            ..Default::default()
        };
        match self.client.request(Body::Produce(produce), vec![batch.freeze()]).await {
            Ok((Body::Produced(produced), _)) => {
                self.record(Line { kind: Kind::Ok, offset: Some(produced.base_offset), ..line });
            }
            Err(Error::Server { code: wire::ErrorCode::Duplicate, .. }) => {
                self.record(Line { kind: Kind::Ok, duplicate: Some(true), ..line });
            }
            Ok(_) => {
                self.unknown(line, "BAD_DATA: the answer to a result is none".to_owned());
                return false;
            }
            // A lease that is lost is no proof that an earlier try was not written.
            Err(error) => {
                self.unknown(line, told(&error));
                return false;
            }
        }
        self.desk.settle(self.partition, value);
        true
    }

    async fn ack(&mut self, job: &Job, value: u64) {
        let line = Line {
            value: Some(Value::One(value)),
            offset: Some(job.offset),
            attempt: Some(u64::from(job.attempt)),
            ..self.line(Kind::Invoke, "ack", JOBS_TOPIC)
        };
        self.record(line.clone());
        let ack = wire::Ack {
            topic: JOBS_TOPIC.to_owned(),
            partition: self.partition,
            group: GROUP.to_owned(),
            leases: vec![wire::LeaseRef { offset: job.offset, attempt: job.attempt }],
        };
        match self.client.request(Body::Ack(ack), Vec::new()).await {
            Ok((Body::Settled(settled), _)) if settled.lost.is_empty() => {
                self.record(Line { kind: Kind::Ok, ..line });
            }
            // Also when an earlier try of the same request took effect and its answer was lost.
            Ok((Body::Settled(_), _)) => self.unknown(line, "LEASE_LOST: settled or given away".to_owned()),
            Ok(_) => self.unknown(line, "BAD_DATA: the answer to an acknowledgement is none".to_owned()),
            Err(error) => self.unknown(line, told(&error)),
        }
    }
}

/// The jobs of an answer, with their values.
fn jobs(key: &str, leased: wire::Leased, mut bytes: Bytes) -> Result<Vec<Job>, String> {
    let mut values = std::collections::HashMap::new();
    while !bytes.is_empty() {
        let batch = Batch::split_from(&mut bytes).map_err(|error| format!("BAD_DATA: {error}"))?;
        arqon_proto::records::<DecodeError>(&batch, |index, record| {
            let offset = batch.header.base_offset.0 + u64::from(index);
            values.insert(offset, payload::decode(key, record.payload));
            Ok(())
        })
        .map_err(|error| format!("BAD_DATA: {error}"))?;
    }
    let job = |lease: wire::Lease| {
        let wire::Lease { offset, attempt, token, .. } = lease;
        let value = values.get(&offset).copied().ok_or(format!("BAD_DATA: the job at offset {offset} is missing"))?;
        Ok(Job { offset, attempt, token, value })
    };
    leased.leases.into_iter().map(job).collect()
}
