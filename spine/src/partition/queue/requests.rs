//! What workers ask of a queue, checked before it gets into line.

use std::{sync::Arc, time::Duration};

use arqon_proto::{Batch, check_tenant, limits, wire};
use tokio::{sync::oneshot, time::Instant};

use crate::{
    partition::{
        Operator, Partition,
        error::{invalid, overloaded, unknown_outcome},
        metrics::add,
    },
    state::Holder,
};

/// Leases that one ack, nack or renewal may name.
const SETTLE_COUNT_MAX: usize = 10_000;

pub(in crate::partition) type WorkReply = Result<(wire::Leased, Vec<Batch>), wire::Error>;

/// A worker that wants jobs.
pub(in crate::partition) struct Waiting {
    pub holder: Arc<Holder>,
    pub job_count_max: usize,
    pub(super) since: Instant,
    pub(super) deadline: Instant,
    pub(super) reply: oneshot::Sender<WorkReply>,
}

impl Waiting {
    /// Whether somebody still waits for the answer.
    pub(in crate::partition) fn is_wanted(&self) -> bool {
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
pub(in crate::partition) enum Request {
    Work { group: String, waiting: Waiting },
    Settle(Settle),
    DeleteGroup(DeleteGroup),
    ExpireOperator { operator_id: String },
}

pub(in crate::partition) struct DeleteGroup {
    pub(super) group: String,
    pub(super) force: bool,
    pub(super) only_check: bool,
    /// Whether there is, or was, such a group.
    pub(super) reply: oneshot::Sender<Result<bool, wire::Error>>,
}

pub(in crate::partition) struct Settle {
    pub(super) kind: SettleKind,
    pub(super) group: String,
    pub(super) leases: Vec<wire::LeaseRef>,
    pub(super) reply: oneshot::Sender<Result<wire::Settled, wire::Error>>,
}

impl Request {
    pub(super) fn refuse(self, cause: wire::Error) {
        match self {
            Self::Work { waiting, .. } => waiting.refuse(cause),
            Self::Settle(settle) => drop(settle.reply.send(Err(cause))),
            Self::DeleteGroup(delete) => drop(delete.reply.send(Err(cause))),
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

    /// Forgets what a group has settled, leased and pending; says whether there was such a group. Without `force`
    /// only while no worker holds a lease or waits for jobs. With `only_check` nothing is done.
    ///
    /// # Errors
    /// NOT_LEADER; VALIDATION_ERROR on a topic that holds no jobs, or naming `group` while it is in use;
    /// OVERLOADED; UNKNOWN_OUTCOME.
    pub async fn delete_group(&self, group: &str, force: bool, only_check: bool) -> Result<bool, wire::Error> {
        self.require_queue()?;
        let (reply, answer) = oneshot::channel();
        let delete = DeleteGroup { group: group.to_owned(), force, only_check, reply };
        self.ask(Request::DeleteGroup(delete))?;
        answer.await.unwrap_or_else(|_| Err(unknown_outcome("the partition is shutting down")))
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
