//! The queues of a jobs partition while this replica leads: what workers ask is collected, and
//! at most one control entry is in flight with all that had come by then.
//!
//! ```text
//!   requests --> waiting, settling ---build---> one entry --commit--> answers, clocks
//!   clocks: leases that run out, delays that end ---^                  (then the next one)
//! ```
//!
//! Only this task proposes queue commands in its term. What it reads of the state between two
//! entries is therefore exact, and no job can be granted twice.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use arqon_proto::{Batch, Term, check_tenant, limits, wire, wire::queue_command::Command};
use arqon_raft::{Applied, ProposeError};
use futures_util::{FutureExt, future::BoxFuture};
use prost::Message;
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::Instant,
};

use super::{
    Operator, Partition, Replica,
    dead::{self, DeadJob},
    deadlines::Deadlines,
    error::{invalid, overloaded, unknown_outcome},
    grants::{Granted, Grants},
    metrics::add,
    submit::Submission,
};
use crate::state::{Holder, Queue, QueueOutcome, ranges_of};

/// Workers that may wait for jobs at once.
const WAITING_COUNT_MAX: usize = 10_000;
/// Leases that one ack, nack or renewal may name.
const SETTLE_COUNT_MAX: usize = 10_000;
/// Ranges in one control entry, beyond which the rest goes into the next one.
const ENTRY_RANGE_COUNT_MAX: usize = 20_000;
/// How much longer a poll may take when the entry in flight keeps it from a look at the queue.
const POLL_GRACE: Duration = Duration::from_secs(1);
/// Pause after a control entry was pushed back.
const RETRY_PAUSE: Duration = Duration::from_millis(50);
/// Jobs taken to the dead-letter topic at a time.
const DEAD_COUNT_MAX: usize = 64;
/// Pause after a job could not be taken to the dead-letter topic.
const DEAD_PAUSE: Duration = Duration::from_secs(1);

pub(super) type WorkReply = Result<(wire::Leased, Vec<Batch>), wire::Error>;

/// A worker that wants jobs.
pub(super) struct Waiting {
    pub holder: Arc<Holder>,
    pub job_count_max: usize,
    since: Instant,
    deadline: Instant,
    reply: oneshot::Sender<WorkReply>,
}

impl Waiting {
    /// Whether somebody still waits for the answer.
    pub(super) fn is_wanted(&self) -> bool {
        !self.reply.is_closed()
    }

    pub(super) fn refuse(self, cause: wire::Error) {
        // Whoever stopped waiting does not need the answer.
        let _ = self.reply.send(Err(cause));
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum SettleKind {
    Ack,
    Nack { delay_ms: u32 },
    Renew,
}

/// What workers ask of the queue task.
pub(super) enum Request {
    Work { group: String, waiting: Waiting },
    Settle(Settle),
    ExpireOperator { operator_id: String },
}

pub(super) struct Settle {
    kind: SettleKind,
    group: String,
    leases: Vec<wire::LeaseRef>,
    reply: oneshot::Sender<Result<wire::Settled, wire::Error>>,
}

impl Request {
    fn refuse(self, cause: wire::Error) {
        match self {
            Self::Work { waiting, .. } => waiting.refuse(cause),
            Self::Settle(settle) => drop(settle.reply.send(Err(cause))),
            Self::ExpireOperator { .. } => {}
        }
    }
}

impl Partition {
    /// Leases jobs to a worker, waiting for some for up to `wait_ms`. The batches hold the jobs
    /// and may hold others.
    ///
    /// # Errors
    /// NOT_LEADER; VALIDATION_ERROR on a topic that holds no jobs or a bad name; OVERLOADED;
    /// DAMAGED when the next job cannot be read.
    pub async fn work(&self, request: wire::Work, operator: Option<Operator>) -> WorkReply {
        self.require_queue()?;
        check_tenant("group", &request.group).map_err(|cause| invalid("group", cause))?;
        check_tenant("worker", &request.worker).map_err(|cause| invalid("worker", cause))?;
        if request.jobs_max == 0 {
            return Err(invalid("jobs_max", "ask for one job at least"));
        }
        let lease_ms = match request.lease_ms {
            0 => limits::LEASE_MS_DEFAULT,
            lease_ms => lease_ms.clamp(limits::LEASE_MS_MIN, limits::LEASE_MS_MAX),
        };
        let (operator_id, operator_version) =
            operator.map(|operator| (operator.id, operator.version)).unwrap_or_default();
        let holder = Arc::new(Holder { worker: request.worker, operator_id, operator_version, lease_ms });
        let since = Instant::now();
        let wait_ms = request.wait_ms.min(limits::POLL_WAIT_MS_MAX);
        let (reply, answer) = oneshot::channel();
        let job_count_max = request.jobs_max.min(limits::WORK_JOB_COUNT_MAX) as usize;
        let deadline = since + Duration::from_millis(u64::from(wait_ms));
        let waiting = Waiting { holder, job_count_max, since, deadline, reply };
        self.ask(Request::Work { group: request.group, waiting })?;
        answer.await.unwrap_or_else(|_| Err(self.replica.not_leader()))
    }

    /// Settles jobs; the answer names the leases that were lost.
    ///
    /// # Errors
    /// NOT_LEADER; VALIDATION_ERROR; OVERLOADED; UNKNOWN_OUTCOME.
    pub async fn ack(&self, request: wire::Ack) -> Result<wire::Settled, wire::Error> {
        self.settle(SettleKind::Ack, request.group, request.leases).await
    }

    /// Gives jobs back, to be handed out again after `delay_ms`.
    ///
    /// # Errors
    /// As [`Partition::ack`].
    pub async fn nack(&self, request: wire::Nack) -> Result<wire::Settled, wire::Error> {
        if request.delay_ms > limits::NACK_DELAY_MS_MAX {
            let message = format_args!("{} ms is over the limit of {} ms", request.delay_ms, limits::NACK_DELAY_MS_MAX);
            return Err(invalid("delay_ms", message));
        }
        self.settle(SettleKind::Nack { delay_ms: request.delay_ms }, request.group, request.leases).await
    }

    /// Starts the leases anew with their full length.
    ///
    /// # Errors
    /// As [`Partition::ack`].
    pub async fn renew(&self, request: wire::Renew) -> Result<wire::Settled, wire::Error> {
        self.settle(SettleKind::Renew, request.group, request.leases).await
    }

    /// Takes back all leases of an operator that has expired. No effect where this replica
    /// does not lead: the leader's node sees the expiry itself.
    pub async fn expire_operator(&self, operator_id: &str) {
        if self.replica.leading_term().is_some() {
            let request = Request::ExpireOperator { operator_id: operator_id.to_owned() };
            // The task is gone only when the partition shuts down; the next leader knows the operator too.
            let _ = self.requests.send(request).await;
        }
    }

    async fn settle(
        &self,
        kind: SettleKind,
        group: String,
        leases: Vec<wire::LeaseRef>,
    ) -> Result<wire::Settled, wire::Error> {
        self.require_queue()?;
        if leases.is_empty() || leases.len() > SETTLE_COUNT_MAX {
            return Err(invalid("leases", format_args!("name between 1 and {SETTLE_COUNT_MAX} of them")));
        }
        let (reply, answer) = oneshot::channel();
        self.ask(Request::Settle(Settle { kind, group, leases, reply }))?;
        answer.await.unwrap_or_else(|_| Err(unknown_outcome("the partition is shutting down")))
    }

    fn require_queue(&self) -> Result<(), wire::Error> {
        if self.replica.class != arqon_proto::TopicClass::Jobs {
            return Err(invalid("topic", format_args!("{} is no topic of jobs", self.replica.topic.name)));
        }
        self.replica.require_leader().map(|_| ())
    }

    fn ask(&self, request: Request) -> Result<(), wire::Error> {
        self.requests.try_send(request).map_err(|_| {
            add(&self.replica.metrics.overloaded_count, 1);
            overloaded(format_args!("{} has too many requests of workers in line", self.replica.name()))
        })
    }
}

/// Runs until `closing` turns true or the partition is dropped.
pub(super) async fn run(
    replica: Arc<Replica>,
    submissions: mpsc::WeakSender<Submission>,
    mut requests: mpsc::Receiver<Request>,
    mut closing: watch::Receiver<bool>,
) {
    let mut status = replica.group.watch();
    let mut needs_barrier = None;
    let mut early = None;
    loop {
        status.borrow_and_update();
        if let Some(term) = replica.leading_term() {
            let Some(submissions) = submissions.upgrade() else { return };
            let mut lead = Lead::new(&replica, submissions, term);
            early.take().into_iter().for_each(|request| lead.take(request));
            let needs_barrier_now = needs_barrier == Some(term);
            let end = tokio::select! {
                biased;
                _ = closing.wait_for(|is_closing| *is_closing) => End::Closed,
                end = lead.run(needs_barrier_now, &mut status, &mut requests) => end,
            };
            lead.give_up();
            match end {
                End::Closed => return,
                End::NotLeader => {}
                // The lost entry may still be applied: see past it before looking at the state.
                End::Unknown => needs_barrier = Some(term),
            }
            continue;
        }
        if let Some(request) = early.take() {
            request.refuse(replica.not_leader());
        }
        tokio::select! {
            biased;
            _ = closing.wait_for(|is_closing| *is_closing) => return,
            changed = status.changed() => if changed.is_err() { return },
            request = requests.recv() => match request {
                // Leadership may show here before its change wakes this task.
                Some(request) if replica.leading_term().is_some() => early = Some(request),
                Some(request) => request.refuse(replica.not_leader()),
                None => return,
            },
        }
    }
}

enum End {
    Closed,
    NotLeader,
    Unknown,
}

/// One group's times, by the monotonic clock of this leader.
#[derive(Debug, Default)]
struct Clock {
    leases: Deadlines<u64>,
    delays: Deadlines<u64>,
    /// Pending jobs that may be handed out now.
    ready: BTreeSet<u64>,
    /// Pending jobs without attempts left, with the attempts made.
    dead: BTreeMap<u64, u32>,
}

/// Whom one command of the entry in flight belongs to.
enum Part {
    Own,
    Settle { settle: Settle, lost: Vec<wire::LeaseRef> },
    Grant { waiting: Waiting, granted: Granted },
}

/// A control entry in the making.
#[derive(Default)]
struct Entry {
    record: wire::ControlRecord,
    parts: Vec<Part>,
    range_count: usize,
}

impl Entry {
    fn put(&mut self, group: &str, command: Command, part: Part) {
        self.range_count += ranges_in(&command).len();
        self.record.queue.push(wire::QueueCommand { group: group.to_owned(), command: Some(command) });
        self.parts.push(part);
    }

    /// One more command may go over the limit by what one command holds at most.
    fn has_room(&self) -> bool {
        self.range_count < ENTRY_RANGE_COUNT_MAX
    }
}

struct Flight {
    record: wire::ControlRecord,
    parts: Vec<Part>,
    outcome: BoxFuture<'static, Result<Applied, ProposeError>>,
}

pub(super) type Line = BTreeMap<u64, Waiting>;

/// The queues in one term of this leader.
struct Lead<'a> {
    replica: &'a Arc<Replica>,
    submissions: mpsc::Sender<Submission>,
    term: Term,
    clocks: BTreeMap<String, Clock>,
    // Waiting workers by group, in the order of their tickets.
    lines: BTreeMap<String, Line>,
    polls: Deadlines<u64>,
    line_of: BTreeMap<u64, String>,
    next_ticket: u64,
    settling: VecDeque<Settle>,
    flight: Option<Flight>,
    retry_at: Option<Instant>,
    burying: Option<BoxFuture<'static, Vec<(DeadJob, bool)>>>,
    buried: Vec<DeadJob>,
    dead_retry_at: Option<Instant>,
    leased_count: i64,
}

impl<'a> Lead<'a> {
    fn new(replica: &'a Arc<Replica>, submissions: mpsc::Sender<Submission>, term: Term) -> Self {
        Self {
            replica,
            submissions,
            term,
            clocks: BTreeMap::new(),
            lines: BTreeMap::new(),
            polls: Deadlines::default(),
            line_of: BTreeMap::new(),
            next_ticket: 0,
            settling: VecDeque::new(),
            flight: None,
            retry_at: None,
            burying: None,
            buried: Vec::new(),
            dead_retry_at: None,
            leased_count: 0,
        }
    }

    async fn run(
        &mut self,
        needs_barrier: bool,
        status: &mut watch::Receiver<arqon_raft::Status>,
        requests: &mut mpsc::Receiver<Request>,
    ) -> End {
        if needs_barrier {
            // Once an empty entry is applied, everything proposed before it is or never will be.
            let barrier = self.propose(wire::ControlRecord::default());
            if barrier.await.is_err() {
                tokio::time::sleep(RETRY_PAUSE).await;
                return End::Unknown;
            }
        }
        self.start_clocks(Instant::now());
        let mut readable = self.replica.group.readable();
        loop {
            if self.replica.leading_term() != Some(self.term) {
                return End::NotLeader;
            }
            readable.borrow_and_update();
            let now = Instant::now();
            self.end_delays(now);
            self.start_burying(now);
            if self.flight.is_none() {
                if self.retry_at.is_none_or(|at| at <= now) {
                    self.build(now);
                }
                // After the entry was built: a poll without a wait has had one look at the queue.
                self.end_polls(now);
            } else if let Some(overdue) = now.checked_sub(POLL_GRACE) {
                self.end_polls(overdue);
            }
            let wake = self.next_wake(now);
            let is_idle = self.flight.is_none();
            tokio::select! {
                outcome = next(self.flight.as_mut().map(|flight| &mut flight.outcome)) => {
                    if let Some(end) = self.landed(outcome) {
                        return end;
                    }
                }
                request = requests.recv() => match request {
                    Some(request) => {
                        self.take(request);
                        while let Ok(more) = requests.try_recv() {
                            self.take(more);
                        }
                    }
                    None => return End::Closed,
                },
                results = next(self.burying.as_mut()) => self.taken_away(results),
                changed = status.changed() => {
                    if changed.is_err() {
                        return End::Closed;
                    }
                    status.borrow_and_update();
                }
                // New jobs matter only to those who wait and only once an entry can be built.
                _ = readable.changed(), if is_idle && !self.line_of.is_empty() => {}
                () = tokio::time::sleep_until(wake.unwrap_or(now)), if wake.is_some() => {}
            }
        }
    }

    /// Gives each outstanding lease and delay its full length from now.
    fn start_clocks(&mut self, now: Instant) {
        let replica = self.replica.clone();
        let shared = replica.machine.lock();
        for (group, queue) in shared.state.queues() {
            let clock = self.clocks.entry(group.to_owned()).or_default();
            for (offset, lease) in queue.leases() {
                clock.leases.set(*offset, now + millis(lease.holder.lease_ms));
            }
            for (offset, pending) in queue.pending() {
                clock.wait(*offset, pending.attempt, pending.delay_ms, attempts_max(&replica.topic), now);
            }
        }
        drop(shared);
        self.count_leased();
    }

    fn take(&mut self, request: Request) {
        match request {
            Request::Work { waiting, .. } if self.line_of.len() >= WAITING_COUNT_MAX => {
                waiting.refuse(overloaded(format_args!("too many workers wait for {}", self.replica.name())));
            }
            Request::Work { group, waiting } => self.join_line(group, waiting),
            Request::Settle(settle) => self.settling.push_back(settle),
            Request::ExpireOperator { operator_id } => self.end_leases_of(&operator_id),
        }
    }

    fn join_line(&mut self, group: String, waiting: Waiting) {
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        self.polls.set(ticket, waiting.deadline);
        self.line_of.insert(ticket, group.clone());
        self.lines.entry(group).or_default().insert(ticket, waiting);
    }

    /// Takes a waiting worker out of its line.
    fn leave_line(&mut self, ticket: u64) -> Option<Waiting> {
        self.polls.remove(ticket);
        let group = self.line_of.remove(&ticket)?;
        let line = self.lines.get_mut(&group)?;
        let waiting = line.remove(&ticket);
        if line.is_empty() {
            self.lines.remove(&group);
        }
        waiting
    }

    /// Answers those whose wait is over.
    fn end_polls(&mut self, now: Instant) {
        let due: Vec<_> = self.polls.due(now).collect();
        for ticket in due {
            if let Some(waiting) = self.leave_line(ticket) {
                let _ = waiting.reply.send(Ok((self.replica.leased(Vec::new()), Vec::new())));
            }
        }
    }

    fn end_delays(&mut self, now: Instant) {
        for clock in self.clocks.values_mut() {
            while let Some(offset) = clock.delays.pop_due(now) {
                clock.ready.insert(offset);
            }
        }
    }

    fn end_leases_of(&mut self, operator_id: &str) {
        let now = Instant::now();
        let shared = self.replica.machine.lock();
        for (group, queue) in shared.state.queues() {
            let Some(clock) = self.clocks.get_mut(group) else { continue };
            let own = queue.leases().iter().filter(|(_, lease)| lease.holder.operator_id == operator_id);
            own.for_each(|(offset, _)| clock.leases.set(*offset, now));
        }
    }

    fn next_wake(&self, now: Instant) -> Option<Instant> {
        let dead_retry = self.dead_retry_at.filter(|at| *at > now);
        if self.flight.is_some() {
            let overdue = self.polls.first().map(|at| at + POLL_GRACE);
            return [dead_retry, overdue].into_iter().flatten().min();
        }
        let retry = self.retry_at.filter(|at| *at > now);
        // While entries are pushed back there is no point in looking at what is due.
        let clocks = self.clocks.values().filter(|_| retry.is_none());
        let due = clocks.flat_map(|clock| [clock.leases.first(), clock.delays.first()]).flatten().min();
        [dead_retry, retry, due, self.polls.first()].into_iter().flatten().min()
    }

    fn start_burying(&mut self, now: Instant) {
        if self.burying.is_some() || self.dead_retry_at.is_some_and(|at| at > now) {
            return;
        }
        let is_free =
            |group: &str, offset: u64| !self.buried.iter().any(|job| job.offset == offset && job.group == group);
        let dead = self.clocks.iter().flat_map(|(group, clock)| clock.dead.iter().map(move |job| (group, job)));
        let jobs: Vec<_> = dead
            .filter(|(group, (offset, _))| is_free(group, **offset))
            .take(DEAD_COUNT_MAX)
            .map(|(group, (offset, attempt))| DeadJob { group: group.clone(), offset: *offset, attempt: *attempt })
            .collect();
        if !jobs.is_empty() {
            self.burying = Some(dead::take_away(self.replica.clone(), jobs).boxed());
        }
    }

    fn taken_away(&mut self, results: Vec<(DeadJob, bool)>) {
        self.burying = None;
        let mut is_complete = true;
        for (job, is_away) in results {
            is_complete &= is_away;
            if is_away {
                self.buried.push(job);
            }
        }
        self.dead_retry_at = if is_complete { None } else { Some(Instant::now() + DEAD_PAUSE) };
    }

    /// Puts everything that waits into one entry and proposes it, if there is anything.
    fn build(&mut self, now: Instant) {
        let mut entry = Entry::default();
        while entry.has_room()
            && let Some(settle) = self.settling.pop_front()
        {
            self.put_settle(settle, &mut entry);
        }
        self.put_expired(now, &mut entry);
        self.put_buried(&mut entry);
        self.put_grants(&mut entry);
        let Entry { record, parts, .. } = entry;
        if !parts.is_empty() {
            let outcome = self.propose(record.clone()).boxed();
            self.flight = Some(Flight { record, parts, outcome });
        }
    }

    fn put_expired(&mut self, now: Instant, entry: &mut Entry) {
        let shared = self.replica.machine.lock();
        for (group, clock) in &mut self.clocks {
            if !entry.has_room() {
                return;
            }
            let leases = shared.state.queue(group).map(Queue::leases);
            let due: Vec<_> = clock.leases.due(now).take(ENTRY_RANGE_COUNT_MAX).collect();
            let mut expired = BTreeMap::new();
            for offset in due {
                match leases.and_then(|leases| leases.get(&offset)) {
                    Some(lease) => drop(expired.insert(offset, lease.attempt)),
                    None => clock.leases.remove(offset),
                }
            }
            if !expired.is_empty() {
                let command = Command::Expire(wire::QueueExpire { ranges: ranges_of(expired) });
                entry.put(group, command, Part::Own);
            }
        }
    }

    fn put_buried(&self, entry: &mut Entry) {
        let mut buried: BTreeMap<&str, BTreeMap<u64, u32>> = BTreeMap::new();
        for job in &self.buried {
            buried.entry(&job.group).or_default().insert(job.offset, job.attempt);
        }
        for (group, jobs) in buried {
            entry.put(group, Command::Bury(wire::QueueBury { ranges: ranges_of(jobs) }), Part::Own);
        }
    }

    fn put_grants(&mut self, entry: &mut Entry) {
        if self.lines.is_empty() || !entry.has_room() {
            return;
        }
        let mut grants = Grants::new(self.replica);
        let no_clock = Clock::default();
        for (group, line) in &mut self.lines {
            let clock = self.clocks.get(group).unwrap_or(&no_clock);
            for (ticket, waiting, granted) in grants.of_group(group, line, &clock.ready) {
                self.polls.remove(ticket);
                self.line_of.remove(&ticket);
                match granted {
                    Ok(granted) => {
                        let command = Command::Grant(granted.command(&waiting.holder));
                        entry.put(group, command, Part::Grant { waiting, granted });
                    }
                    Err(cause) => waiting.refuse(cause),
                }
            }
        }
        self.lines.retain(|_, line| !line.is_empty());
    }

    /// Puts the leases that are still held into the entry; answers at once when none is.
    fn put_settle(&self, settle: Settle, entry: &mut Entry) {
        let (held, lost): (Vec<_>, Vec<_>) = {
            let shared = self.replica.machine.lock();
            let queue = shared.state.queue(&settle.group);
            let is_held =
                |lease: &wire::LeaseRef| queue.is_some_and(|queue| queue.is_leased(lease.offset, lease.attempt));
            settle.leases.iter().copied().partition(is_held)
        };
        if held.is_empty() {
            let _ = settle.reply.send(Ok(wire::Settled { lost }));
            return;
        }
        let ranges = ranges_of(held.iter().map(|lease| (lease.offset, lease.attempt)));
        let command = match settle.kind {
            SettleKind::Ack => Command::Ack(wire::QueueAck { ranges }),
            SettleKind::Nack { delay_ms } => Command::Nack(wire::QueueNack { ranges, delay_ms }),
            SettleKind::Renew => Command::Renew(wire::QueueRenew { ranges }),
        };
        let group = settle.group.clone();
        entry.put(&group, command, Part::Settle { settle, lost });
    }

    fn propose(&self, record: wire::ControlRecord) -> impl Future<Output = Result<Applied, ProposeError>> + use<> {
        let (submissions, term) = (self.submissions.clone(), self.term);
        async move {
            let stopped = || ProposeError::Stopped("the partition is shutting down".into());
            let (reply, placed) = oneshot::channel();
            let submission = Submission::Control { term, record, reply };
            submissions.send(submission).await.map_err(|_| stopped())?;
            placed.await.map_err(|_| stopped())??.await
        }
    }

    /// The entry in flight has its outcome.
    fn landed(&mut self, outcome: Result<Applied, ProposeError>) -> Option<End> {
        let flight = self.flight.take()?;
        let applied = match outcome {
            Ok(applied) => applied,
            Err(cause) => return self.failed(flight, &cause),
        };
        self.retry_at = None;
        let outcome = QueueOutcome::decode(applied.outcome).expect("the state machine of this process encoded it");
        assert_eq!(outcome.commands.len(), flight.parts.len(), "each command has its outcome");
        let now = Instant::now();
        let commands = flight.record.queue.into_iter().zip(flight.parts).zip(outcome.commands);
        for ((command, part), outcome) in commands {
            let lost: BTreeSet<_> = each(&outcome.lost).collect();
            if let Some(inner) = command.command {
                self.took_effect(&command.group, &inner, &lost, now);
            }
            self.answer(&command.group, part, lost, now);
        }
        self.count_leased();
        None
    }

    /// The entry in flight has no outcome.
    fn failed(&mut self, flight: Flight, cause: &ProposeError) -> Option<End> {
        let still_leads = self.replica.leading_term() == Some(self.term);
        // A leader that has not heard from a majority of late takes no entries for a moment.
        let is_pushed_back = match cause {
            ProposeError::Overloaded => true,
            ProposeError::NotLeader { .. } => still_leads,
            ProposeError::UnknownOutcome(_) | ProposeError::Stopped(_) => false,
        };
        let error = self.replica.propose_error(cause, true);
        for (command, part) in flight.record.queue.into_iter().zip(flight.parts) {
            match part {
                // Nothing was granted: the worker waits on.
                Part::Grant { waiting, .. } if is_pushed_back => self.join_line(command.group, waiting),
                part => part.refuse(error.clone()),
            }
        }
        if is_pushed_back {
            self.retry_at = Some(Instant::now() + RETRY_PAUSE);
            return None;
        }
        Some(if still_leads { End::Unknown } else { End::NotLeader })
    }

    /// Sets the clocks after a committed command.
    fn took_effect(&mut self, group: &str, command: &Command, lost: &BTreeSet<(u64, u32)>, now: Instant) {
        let replica = self.replica.clone();
        let metrics = &replica.metrics;
        let attempts_max = attempts_max(&replica.topic);
        let clock = self.clocks.entry(group.to_owned()).or_default();
        for (offset, attempt) in each(ranges_in(command)) {
            if lost.contains(&(offset, attempt)) {
                continue;
            }
            match command {
                Command::Grant(grant) => {
                    clock.ready.remove(&offset);
                    clock.leases.set(offset, now + millis(grant.lease_ms));
                    add(&metrics.granted_count, 1);
                    add(&metrics.redelivered_count, usize::from(attempt > 1));
                }
                Command::Ack(_) => clock.leases.remove(offset),
                Command::Nack(nack) => {
                    clock.leases.remove(offset);
                    clock.wait(offset, attempt, nack.delay_ms, attempts_max, now);
                }
                Command::Expire(_) => {
                    clock.leases.remove(offset);
                    clock.wait(offset, attempt, 0, attempts_max, now);
                    add(&metrics.expired_count, 1);
                }
                Command::Renew(_) => {
                    let shared = replica.machine.lock();
                    let lease = shared.state.queue(group).and_then(|queue| queue.leases().get(&offset));
                    // A later command of the same entry may have ended it.
                    if let Some(lease) = lease.filter(|lease| lease.attempt == attempt) {
                        clock.leases.set(offset, now + millis(lease.holder.lease_ms));
                    }
                }
                Command::Bury(_) => {
                    clock.dead.remove(&offset);
                    add(&metrics.dead_count, 1);
                }
            }
        }
        if let Command::Bury(bury) = command {
            let done: BTreeSet<_> = each(&bury.ranges).map(|(offset, _)| offset).collect();
            self.buried.retain(|job| job.group != group || !done.contains(&job.offset));
        }
    }

    fn answer(&mut self, group: &str, part: Part, lost: BTreeSet<(u64, u32)>, now: Instant) {
        match part {
            Part::Own => {}
            Part::Settle { settle, lost: mut all } => {
                all.extend(lost.into_iter().map(|(offset, attempt)| wire::LeaseRef { offset, attempt }));
                let _ = settle.reply.send(Ok(wire::Settled { lost: all }));
            }
            Part::Grant { waiting, mut granted } => {
                granted.leases.retain(|lease| !lost.contains(&(lease.offset, lease.attempt)));
                let offsets: Vec<_> = granted.leases.iter().map(|lease| lease.offset).collect();
                let reply = (self.replica.leased(granted.leases), granted.batches);
                self.replica.metrics.work_latency.record(waiting.since.elapsed());
                if waiting.reply.send(Ok(reply)).is_err() {
                    // The worker has gone: its jobs need not wait for their leases to run out.
                    let clock = self.clocks.entry(group.to_owned()).or_default();
                    offsets.into_iter().for_each(|offset| clock.leases.set(offset, now));
                }
            }
        }
    }

    fn count_leased(&mut self) {
        let shared = self.replica.machine.lock();
        let count: usize = shared.state.queues().map(|(_, queue)| queue.leases().len()).sum();
        drop(shared);
        self.set_leased_count(count as i64);
    }

    fn set_leased_count(&mut self, count: i64) {
        let change = count - self.leased_count;
        self.leased_count = count;
        self.replica.metrics.leased_count.fetch_add(change, std::sync::atomic::Ordering::Relaxed);
    }

    /// Leadership is over: whoever waits goes to the next leader.
    fn give_up(&mut self) {
        self.set_leased_count(0);
        let error = self.replica.not_leader();
        for part in self.flight.take().into_iter().flat_map(|flight| flight.parts) {
            part.refuse(unknown_outcome("another leader took over"));
        }
        for settle in self.settling.drain(..) {
            let _ = settle.reply.send(Err(error.clone()));
        }
        for (_, waiting) in std::mem::take(&mut self.lines).into_values().flatten() {
            waiting.refuse(error.clone());
        }
    }
}

impl Part {
    fn refuse(self, cause: wire::Error) {
        match self {
            Self::Own => {}
            Self::Settle { settle, .. } => drop(settle.reply.send(Err(cause))),
            Self::Grant { waiting, .. } => waiting.refuse(cause),
        }
    }
}

impl Clock {
    /// A job waits for its next attempt, or has had its last.
    fn wait(&mut self, offset: u64, attempt: u32, delay_ms: u32, attempts_max: u32, now: Instant) {
        if attempt >= attempts_max {
            self.dead.insert(offset, attempt);
        } else {
            self.delays.set(offset, now + millis(delay_ms));
        }
    }
}

impl Replica {
    pub(super) fn leased(&self, leases: Vec<wire::Lease>) -> wire::Leased {
        wire::Leased { leases, topic: self.topic.name.clone(), partition: self.partition.0 }
    }
}

/// The outcome of `future`, or nothing ever when there is none.
async fn next<T>(future: Option<&mut BoxFuture<'static, T>>) -> T {
    match future {
        Some(future) => future.await,
        None => std::future::pending().await,
    }
}

fn attempts_max(topic: &wire::TopicConfig) -> u32 {
    if topic.attempts_max == 0 { limits::ATTEMPT_COUNT_DEFAULT } else { topic.attempts_max }
}

fn millis(ms: u32) -> Duration {
    Duration::from_millis(u64::from(ms))
}

fn each(ranges: &[wire::OffsetRange]) -> impl Iterator<Item = (u64, u32)> + '_ {
    ranges.iter().flat_map(|range| (0..u64::from(range.count)).map(move |at| (range.first + at, range.attempt)))
}

fn ranges_in(command: &Command) -> &[wire::OffsetRange] {
    match command {
        Command::Grant(grant) => &grant.ranges,
        Command::Ack(ack) => &ack.ranges,
        Command::Nack(nack) => &nack.ranges,
        Command::Renew(renew) => &renew.ranges,
        Command::Expire(expire) => &expire.ranges,
        Command::Bury(bury) => &bury.ranges,
    }
}
