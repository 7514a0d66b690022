//! The queue worker: takes jobs from all partitions in turn, never more than it may hold.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use arqon_proto::{limits as wire_limits, wire};
use bytes::Bytes;
use futures_util::{
    StreamExt,
    future::{BoxFuture, FutureExt},
    stream::FuturesUnordered,
};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch},
    time::{Instant, sleep_until, timeout},
};
use uuid::Uuid;
use wire::{ErrorCode, frame::Body};

use crate::{
    Client, Error, Job,
    client::{invalid_name, split_batches},
    event::{Events, Origin},
    leases::{Grant, Leases, Queue, Settle, renew, settle},
    limits,
};

/// Wait of a request to an empty partition while others have jobs.
const SHORT_WAIT: Duration = Duration::from_millis(50);
/// Pause after a partition could not be asked.
const ERROR_PAUSE: Duration = Duration::from_millis(500);

/// How a [`Worker`] takes jobs.
#[derive(Clone, Debug)]
pub struct WorkerOptions {
    /// The queue group: each job goes to one worker of each group.
    pub group: String,
    /// Names this worker in leases.
    pub worker: String,
    /// The registered operator on whose behalf jobs are taken.
    pub operator_id: Option<String>,
    /// Jobs held at once. With more than one, several requests for jobs may be under way, and what
    /// they bring comes in no particular order.
    pub parallelism: usize,
    /// A job that is not settled nor renewed for this long goes to another worker.
    pub lease: Duration,
    /// Longest wait of one request for jobs; also how long [`Worker::stop`] may wait for them.
    pub wait: Duration,
}

impl Default for WorkerOptions {
    /// Group `default`, a random worker name, no operator, 4 jobs at once, leases of 30 s, waits
    /// of 1 s.
    fn default() -> Self {
        Self {
            group: "default".to_owned(),
            worker: format!("worker-{}", Uuid::new_v4().simple()),
            operator_id: None,
            parallelism: 4,
            lease: Duration::from_millis(u64::from(wire_limits::LEASE_MS_DEFAULT)),
            wait: Duration::from_secs(1),
        }
    }
}

impl WorkerOptions {
    fn check(&self) -> Result<(), Error> {
        arqon_proto::check_tenant("group", &self.group).map_err(invalid_name)?;
        arqon_proto::check_tenant("worker", &self.worker).map_err(invalid_name)?;
        if let Some(operator) = &self.operator_id {
            arqon_proto::check_tenant("operator_id", operator).map_err(invalid_name)?;
        }
        if self.parallelism == 0 || self.parallelism > limits::PARALLELISM_MAX {
            return Err(Error::invalid("parallelism", format!("must be 1 to {}", limits::PARALLELISM_MAX)));
        }
        let (min, max) = (wire_limits::LEASE_MS_MIN, wire_limits::LEASE_MS_MAX);
        if !(u128::from(min)..=u128::from(max)).contains(&self.lease.as_millis()) {
            return Err(Error::invalid("lease", format!("must be {min} to {max} ms")));
        }
        if self.wait.as_millis() > u128::from(wire_limits::POLL_WAIT_MS_MAX) {
            return Err(Error::invalid("wait", format!("is over {} ms", wire_limits::POLL_WAIT_MS_MAX)));
        }
        Ok(())
    }
}

/// What the jobs of a worker share.
pub(crate) struct Desk {
    pub(crate) client: Client,
    leases: Arc<Leases>,
    /// A job takes one and gives it back when it is dropped.
    pub(crate) places: Arc<Semaphore>,
    settlements: mpsc::UnboundedSender<Settle>,
}

impl Desk {
    /// Queues a settlement; there are never more than jobs held.
    pub(crate) fn settle(&self, settle: Settle) {
        // The other end lives as long as this desk, unless the runtime is going down.
        if let Err(mpsc::error::SendError(unheard)) = self.settlements.send(settle)
            && unheard.frees_places
        {
            self.places.add_permits(unheard.leases.len());
        }
    }
}

/// Takes jobs from all partitions of a topic, in turn, up to a bound.
///
/// ```no_run
/// # async fn example(client: arqon_sdk::Client) -> Result<(), arqon_sdk::Error> {
/// use arqon_sdk::{NewEvent, WorkerOptions};
/// use std::time::Duration;
/// let options = WorkerOptions { group: "shouters".into(), parallelism: 8, ..Default::default() };
/// let mut worker = client.worker("shout.jobs", options).await?;
/// while let Some(job) = worker.next().await? {
///     let loud = job.event.payload.to_ascii_uppercase();
///     job.complete("shout.results", NewEvent::new(loud)).await?;
/// }
/// worker.stop(Duration::from_secs(10)).await;
/// # Ok(()) }
/// ```
pub struct Worker {
    jobs: mpsc::UnboundedReceiver<Result<Vec<Job>, Error>>,
    ready: std::vec::IntoIter<Job>,
    failed: Option<Error>,
    places: Arc<Semaphore>,
    parallelism: usize,
    stop: watch::Sender<bool>,
}

impl std::fmt::Debug for Worker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Worker").field("parallelism", &self.parallelism).finish_non_exhaustive()
    }
}

impl Worker {
    pub(crate) fn open(
        client: Client,
        description: &wire::TopicDescription,
        options: WorkerOptions,
    ) -> Result<Self, Error> {
        options.check()?;
        let queue = Arc::new(Queue { topic: description.topic.clone(), group: options.group.clone() });
        let (settlements, settle_queue) = mpsc::unbounded_channel();
        let places = Arc::new(Semaphore::new(options.parallelism));
        let leases = Arc::default();
        let desk = Arc::new(Desk { client: client.clone(), leases, places: places.clone(), settlements });
        tokio::spawn(settle(client.clone(), queue.clone(), Arc::downgrade(&places), settle_queue));
        tokio::spawn(renew(client, queue.clone(), Arc::downgrade(&desk.leases), options.lease));
        // At most one entry per held job, and one per partition that failed.
        let (sender, jobs) = mpsc::unbounded_channel();
        let (stop, stopped) = watch::channel(false);
        let parallelism = options.parallelism;
        let taker = Taker {
            desk,
            topic: queue.topic.as_str().into(),
            queue,
            options,
            idle: description.partitions.iter().map(|known| Turn::new(known.partition)).collect(),
            partition_count: description.partitions.len(),
            hot_count: 0,
            under_way: HashMap::new(),
            extra: HashMap::new(),
            places: places.clone(),
            polls: FuturesUnordered::new(),
            sender,
        };
        tokio::spawn(taker.run(stopped));
        Ok(Self { jobs, ready: Vec::new().into_iter(), failed: None, places, parallelism, stop })
    }

    /// The next job; `None` after [`Worker::stop`]. Waits while as many jobs as allowed are held.
    /// May be dropped and called again without losing a job.
    ///
    /// # Errors
    /// A transient error when a partition could not be asked for the options' request time: the
    /// worker goes on trying, call again. Any other error ends the worker and is repeated: no
    /// permission, an unknown topic, an operator that is not registered.
    pub async fn next(&mut self) -> Result<Option<Job>, Error> {
        Ok(if self.fill().await? { self.ready.next() } else { None })
    }

    /// The jobs that are there, at least one and at most `count_max`; otherwise as [`Worker::next`].
    /// With [`Job::ack_all`] the cheapest way through many small jobs.
    ///
    /// # Errors
    /// As [`Worker::next`], or [`Error::Invalid`] for a `count_max` of 0.
    pub async fn next_many(&mut self, count_max: usize) -> Result<Option<Vec<Job>>, Error> {
        if count_max == 0 {
            return Err(Error::invalid("count_max", "is 0"));
        }
        if !self.fill().await? {
            return Ok(None);
        }
        if self.ready.len() <= count_max {
            return Ok(Some(std::mem::take(&mut self.ready).collect()));
        }
        Ok(Some(self.ready.by_ref().take(count_max).collect()))
    }

    /// Waits until a job is ready; `false` when the worker is stopped.
    async fn fill(&mut self) -> Result<bool, Error> {
        while self.ready.len() == 0 {
            if let Some(error) = &self.failed {
                return Err(error.clone());
            }
            match self.jobs.recv().await {
                Some(Ok(jobs)) if *self.stop.borrow() => drop(jobs),
                Some(Ok(jobs)) => self.ready = jobs.into_iter(),
                Some(Err(error)) => {
                    if !error.is_transient() {
                        self.failed = Some(error.clone());
                    }
                    return Err(error);
                }
                None => return Ok(false),
            }
        }
        Ok(true)
    }

    /// Takes no more jobs, gives back those that [`Worker::next`] has not handed out, and waits up
    /// to `grace` until all others are settled or dropped. Gives the number still held then; their
    /// leases are kept alive while their values live.
    pub async fn stop(&mut self, grace: Duration) -> usize {
        self.stop.send_replace(true);
        self.jobs.close();
        self.ready = Vec::new().into_iter();
        let all = async {
            while let Some(unseen) = self.jobs.recv().await {
                drop(unseen);
            }
            // The taker and each job give their places back when they are through.
            let _ = self.places.acquire_many(self.parallelism as u32).await;
        };
        match timeout(grace, all).await {
            Ok(()) => 0,
            Err(_) => self.parallelism - self.places.available_permits().min(self.parallelism),
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.stop.send_replace(true);
    }
}

/// A partition that waits to be asked.
struct Turn {
    partition: u32,
    /// One more request beside the first, while it brings all it asks for.
    is_extra: bool,
    /// Whether it gave most of what was asked last time.
    hot: bool,
    not_before: Instant,
    failing_since: Option<Instant>,
}

impl Turn {
    fn new(partition: u32) -> Self {
        Self { partition, is_extra: false, hot: false, not_before: Instant::now(), failing_since: None }
    }
}

struct Polled {
    turn: Turn,
    asked: usize,
    places: OwnedSemaphorePermit,
    answer: Result<(Vec<wire::Lease>, Bytes), Error>,
}

/// Asks the partitions for jobs.
struct Taker {
    desk: Arc<Desk>,
    queue: Arc<Queue>,
    topic: Arc<str>,
    options: WorkerOptions,
    idle: VecDeque<Turn>,
    partition_count: usize,
    /// Partitions that gave most of what was asked last time.
    hot_count: usize,
    /// Requests without an answer, by partition.
    under_way: HashMap<u32, usize>,
    /// Turns of each partition beside the first.
    extra: HashMap<u32, usize>,
    places: Arc<Semaphore>,
    polls: FuturesUnordered<BoxFuture<'static, Polled>>,
    sender: mpsc::UnboundedSender<Result<Vec<Job>, Error>>,
}

impl Taker {
    async fn run(mut self, mut stopped: watch::Receiver<bool>) {
        loop {
            let due = self.idle.iter().map(|turn| turn.not_before).min();
            let now = Instant::now();
            let worth_asking = self.worth_asking(now);
            tokio::select! {
                biased;
                _ = stopped.wait_for(|stop| *stop) => break,
                Some(polled) = self.polls.next() => {
                    if !self.polled(polled) {
                        break;
                    }
                }
                places = self.places.clone().acquire_many_owned(worth_asking),
                    if due.is_some_and(|due| due <= now) => match places
                {
                    Ok(places) => self.poll(places, now),
                    Err(_) => break,
                },
                () = sleep_until(due.unwrap_or(now)), if due.is_some_and(|due| due > now) => {}
            }
        }
        // Jobs granted from here on would be lost until their leases end: they are given back.
        while let Some(polled) = self.polls.next().await {
            self.hand_out(polled.turn.partition, polled.places, polled.answer.unwrap_or_default());
        }
    }

    /// Most jobs of one request: with several under way, all of them together ask for all.
    fn share(&self) -> usize {
        self.options.parallelism.div_ceil(limits::WORK_COUNT_MAX).min(wire_limits::WORK_JOB_COUNT_MAX as usize)
    }

    /// Free places that make the next request worth its while. Any number will do for the first
    /// one of a partition; one more waits for company.
    fn worth_asking(&self, now: Instant) -> u32 {
        let next = self.idle.iter().find(|turn| turn.not_before <= now);
        let is_more = next.is_some_and(|turn| turn.hot && self.under_way.contains_key(&turn.partition));
        if is_more { self.share().div_ceil(2) as u32 } else { 1 }
    }

    fn poll(&mut self, mut places: OwnedSemaphorePermit, now: Instant) {
        let Some(index) = self.idle.iter().position(|turn| turn.not_before <= now) else { return };
        let Some(turn) = self.idle.remove(index) else { return };
        if turn.hot {
            // Its fair share: what is free now, divided by those that have jobs too.
            let more = self.places.available_permits() / self.hot_count.max(1);
            let more = more.min(self.share().saturating_sub(places.num_permits()));
            if let Ok(more) = self.places.clone().try_acquire_many_owned(more as u32) {
                places.merge(more);
            }
        }
        let asked = places.num_permits();
        *self.under_way.entry(turn.partition).or_default() += 1;
        let wait = if self.hot_count > 0 {
            SHORT_WAIT
        } else if self.options.parallelism >= self.partition_count {
            self.options.wait
        } else {
            // A place that waits at one partition is missing at the others.
            (self.options.wait * self.options.parallelism as u32 / self.partition_count as u32)
                .clamp(SHORT_WAIT.min(self.options.wait), SHORT_WAIT * 4)
        };
        let body = Body::Work(wire::Work {
            topic: self.queue.topic.clone(),
            partition: turn.partition,
            group: self.queue.group.clone(),
            worker: self.options.worker.clone(),
            operator_id: self.options.operator_id.clone().unwrap_or_default(),
            jobs_max: asked as u32,
            wait_ms: wait.as_millis() as u32,
            lease_ms: self.options.lease.as_millis() as u32,
        });
        let client = self.desk.client.clone();
        let poll = async move {
            let answer = match client.request(body, Vec::new()).await {
                Ok((Body::Leased(leased), payload)) => Ok((leased.leases, payload)),
                Ok(_) => Err(Error::unexpected("the leader")),
                Err(error) => Err(error),
            };
            Polled { turn, asked, places, answer }
        };
        self.polls.push(poll.boxed());
    }

    /// Acts on an answer; `false` when the worker cannot go on.
    fn polled(&mut self, polled: Polled) -> bool {
        let Polled { mut turn, asked, places, answer } = polled;
        if let Some(count) = self.under_way.get_mut(&turn.partition) {
            *count -= 1;
            if *count == 0 {
                self.under_way.remove(&turn.partition);
            }
        }
        self.hot_count -= usize::from(turn.hot && !turn.is_extra);
        turn.hot = false;
        let answer = match answer {
            Ok(answer) => answer,
            Err(error) => return self.refused(turn, error),
        };
        turn.failing_since = None;
        // The server rather ends with a batch than to give half of the next one.
        turn.hot = !answer.0.is_empty() && answer.0.len() >= asked.div_ceil(2);
        self.hand_out(turn.partition, places, answer);
        if turn.is_extra && !turn.hot {
            self.drop_extra(turn.partition);
            return true;
        }
        let extra = self.extra.entry(turn.partition).or_default();
        if turn.hot && *extra < limits::WORK_COUNT_MAX - 1 {
            *extra += 1;
            self.idle.push_back(Turn { is_extra: true, hot: true, ..Turn::new(turn.partition) });
        }
        self.hot_count += usize::from(turn.hot && !turn.is_extra);
        self.idle.push_back(turn);
        true
    }

    fn drop_extra(&mut self, partition: u32) {
        self.extra.entry(partition).and_modify(|count| *count -= 1);
    }

    fn refused(&mut self, mut turn: Turn, error: Error) -> bool {
        if turn.is_extra {
            // The first request will meet the same, and tell.
            self.drop_extra(turn.partition);
            return true;
        }
        let since = *turn.failing_since.get_or_insert_with(Instant::now);
        // An operator that has just been registered may not be known everywhere.
        let unregistered = matches!(&error, Error::Server { code: ErrorCode::TargetNotFound, field, .. }
            if self.options.operator_id.is_some() && field.starts_with("operator"));
        let patience = self.desk.client.router().options.request_timeout;
        let goes_on = error.is_transient() || (unregistered && since.elapsed() < patience);
        if !goes_on || error.is_transient() {
            tracing::debug!(topic = self.queue.topic, partition = turn.partition, %error, "no jobs could be asked for");
            // The worker may be gone; then its stop is on the way too.
            let _ = self.sender.send(Err(error));
        }
        turn.not_before = Instant::now() + ERROR_PAUSE;
        self.idle.push_back(turn);
        goes_on
    }

    /// Makes jobs of leases; each takes one of `places`.
    fn hand_out(&self, partition: u32, mut places: OwnedSemaphorePermit, answer: (Vec<wire::Lease>, Bytes)) {
        let (mut granted, payload) = answer;
        if granted.is_empty() {
            return;
        }
        granted.truncate(places.num_permits());
        granted.sort_unstable_by_key(|lease| lease.offset);
        let jobs = self.jobs(partition, granted, payload);
        if let Some(taken) = jobs.as_ref().ok().and_then(|jobs| places.split(jobs.len())) {
            // Each job gives its own back.
            taken.forget();
        }
        // After a stop nobody listens: the jobs come back here, are dropped and so given back.
        let _ = self.sender.send(jobs);
    }

    /// The jobs of `granted`, which is sorted by offset, with their events from `payload`.
    fn jobs(&self, partition: u32, granted: Vec<wire::Lease>, payload: Bytes) -> Result<Vec<Job>, Error> {
        let what = format!("a request for jobs of {}/{partition}", self.queue.topic);
        let bad_data = |source| Error::BadData { server: format!("the answer to {what}"), source };
        let references = granted.iter().map(|lease| wire::LeaseRef { offset: lease.offset, attempt: lease.attempt });
        let grant = Arc::new(Grant::new(partition, references));
        let origin = Origin { topic: self.topic.clone(), tenant: self.desk.client.router().tenant(), partition };
        let mut events = Vec::with_capacity(granted.len());
        let is_granted = |offset| granted.binary_search_by_key(&offset, |lease| lease.offset).is_ok();
        for batch in split_batches(payload, &what)? {
            let mut of_batch = Events::new(origin.clone(), &batch).map_err(bad_data)?;
            while let Some(event) = of_batch.next(is_granted).map_err(bad_data)? {
                events.push(event);
            }
        }
        let mut jobs = Vec::with_capacity(events.len());
        let mut leases = granted.into_iter().enumerate();
        for event in events {
            let Some((index, lease)) = leases.find(|(_, lease)| lease.offset == event.offset) else { break };
            jobs.push(Job::new(event, lease.token, grant.clone(), index as u32, self.desk.clone()));
        }
        if jobs.len() < grant.count() {
            // Their leases run out: nothing better can be done with jobs that did not come.
            let missing = grant.count() - jobs.len();
            tracing::warn!(topic = self.queue.topic, partition, missing, "leased jobs are missing");
        }
        self.desk.leases.add(&grant);
        Ok(jobs)
    }
}
