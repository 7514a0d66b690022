//! The queues of a jobs partition while this replica leads: what workers ask is collected, and
//! at most one control entry is in flight with all that had come by then.
//!
//! ```text
//!   requests --> waiting, settling, deleting ---build---> one entry --commit--> answers, clocks
//!   clocks: leases that run out, delays that end ---^                  (then the next one)
//!
//!   requests.rs  what workers ask                  entry.rs    one entry out of what waits
//!   lines.rs     workers that wait, by group       outcome.rs  what its outcome changes
//!   clock.rs     leases and delays that fall due   burials.rs  jobs without attempts left
//! ```
//!
//! Only this task proposes queue commands in its term. What it reads of the state between two
//! entries is therefore exact, and no job can be granted twice.

mod burials;
mod clock;
mod entry;
mod lines;
mod outcome;
mod requests;

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use arqon_proto::{Term, wire};
use arqon_raft::{Applied, ProposeError};
use futures_util::future::BoxFuture;
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::Instant,
};

use self::{
    burials::Burials,
    clock::Clock,
    entry::Flight,
    lines::Lines,
    requests::{DeleteGroup, Settle},
};
use super::{
    Replica,
    error::{overloaded, unknown_outcome},
    submit::Submission,
};

pub(super) use lines::Line;
pub(super) use requests::{Request, Waiting};

/// Workers that may wait for jobs at once.
const WAITING_COUNT_MAX: usize = 10_000;
/// How much longer a poll may take when the entry in flight keeps it from a look at the queue.
const POLL_GRACE: Duration = Duration::from_secs(1);
/// Pause after a control entry was pushed back.
const RETRY_PAUSE: Duration = Duration::from_millis(50);

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

/// The queues in one term of this leader.
struct Lead<'a> {
    replica: &'a Arc<Replica>,
    submissions: mpsc::Sender<Submission>,
    term: Term,
    clocks: BTreeMap<String, Clock>,
    lines: Lines,
    settling: VecDeque<Settle>,
    deleting: VecDeque<DeleteGroup>,
    flight: Option<Flight>,
    retry_at: Option<Instant>,
    burials: Burials,
    leased_count: i64,
}

impl<'a> Lead<'a> {
    fn new(replica: &'a Arc<Replica>, submissions: mpsc::Sender<Submission>, term: Term) -> Self {
        Self {
            replica,
            submissions,
            term,
            clocks: BTreeMap::new(),
            lines: Lines::default(),
            settling: VecDeque::new(),
            deleting: VecDeque::new(),
            flight: None,
            retry_at: None,
            burials: Burials::default(),
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
            self.burials.start(self.replica, &self.clocks, now);
            if self.flight.is_none() {
                if self.retry_at.is_none_or(|at| at <= now) {
                    self.build(now).await;
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
                results = next(self.burials.running.as_mut()) => self.burials.ended(results),
                changed = status.changed() => {
                    if changed.is_err() {
                        return End::Closed;
                    }
                    status.borrow_and_update();
                }
                // New jobs matter only to those who wait and only once an entry can be built.
                _ = readable.changed(), if is_idle && self.lines.count() > 0 => {}
                () = tokio::time::sleep_until(wake.unwrap_or(now)), if wake.is_some() => {}
            }
        }
    }

    fn take(&mut self, request: Request) {
        match request {
            Request::Work { waiting, .. } if self.lines.count() >= WAITING_COUNT_MAX => {
                waiting.refuse(overloaded(format_args!("too many workers wait for {}", self.replica.name())));
            }
            Request::Work { group, waiting } => self.lines.join(group, waiting),
            Request::Settle(settle) => self.settling.push_back(settle),
            Request::DeleteGroup(delete) => self.deleting.push_back(delete),
            Request::ExpireOperator { operator_id } => self.end_leases_of(&operator_id),
        }
    }

    /// Answers those whose wait is over.
    fn end_polls(&mut self, now: Instant) {
        for waiting in self.lines.leave_due(now) {
            let _ = waiting.reply.send(Ok((self.replica.leased(Vec::new()), Vec::new())));
        }
    }

    fn next_wake(&self, now: Instant) -> Option<Instant> {
        let dead_retry = self.burials.retry_at(now);
        if self.flight.is_some() {
            let overdue = self.lines.first_deadline().map(|at| at + POLL_GRACE);
            return [dead_retry, overdue].into_iter().flatten().min();
        }
        let retry = self.retry_at.filter(|at| *at > now);
        // While entries are pushed back there is no point in looking at what is due.
        let clocks = self.clocks.values().filter(|_| retry.is_none());
        let due = clocks.flat_map(|clock| [clock.leases.first(), clock.delays.first()]).flatten().min();
        [dead_retry, retry, due, self.lines.first_deadline()].into_iter().flatten().min()
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
        for delete in self.deleting.drain(..) {
            let _ = delete.reply.send(Err(error.clone()));
        }
        for waiting in self.lines.take_all() {
            waiting.refuse(error.clone());
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
