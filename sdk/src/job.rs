//! One leased job, to be settled exactly once.

use std::{fmt, sync::Arc, time::Duration};

use arqon_proto::{limits, wire};
use bytes::{Bytes, BytesMut};
use futures_util::future::join_all;
use tokio::sync::oneshot;
use wire::{Durability, ErrorCode, frame::Body};

use crate::{
    Error, Event, NewEvent,
    leases::{Grant, Settle, Settlement},
    worker::Desk,
};

/// A job that this worker holds. Its lease is renewed while the value lives; dropping it
/// unsettled gives the job back at once.
pub struct Job {
    /// The job itself.
    pub event: Event,
    /// Which attempt this is, from 1.
    pub attempt: u32,
    token: Bytes,
    grant: Arc<Grant>,
    /// Which lease of the grant.
    index: u32,
    desk: Arc<Desk>,
}

/// How a job's result came to stand.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Completed {
    /// Offset of the one result in the job's partition of the results topic, where known.
    pub offset: Option<u64>,
    /// Another attempt's result stood already; the one given here was not written.
    pub duplicate: bool,
}

impl fmt::Debug for Job {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let event = &self.event;
        write!(f, "Job({}/{}@{} attempt {})", event.topic, event.partition, event.offset, self.attempt)
    }
}

impl Job {
    /// Takes one of the desk's places.
    pub(crate) fn new(event: Event, token: Bytes, grant: Arc<Grant>, index: u32, desk: Arc<Desk>) -> Self {
        let attempt = grant.reference(index).attempt;
        Self { event, attempt, token, grant, index, desk }
    }

    /// The token of the lease, which goes with the job's result.
    #[must_use]
    pub fn lease_token(&self) -> &Bytes {
        &self.token
    }

    /// Whether the server said that the lease is lost: another worker may have the job now.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        self.grant.is_lost(self.index)
    }

    /// Returns when the lease is lost; to be raced against long work.
    pub async fn lost(&self) {
        self.grant.wait_lost(self.index).await;
    }

    /// Writes the job's result to `results_topic`, in the partition of the job, and acknowledges
    /// the job. The bus sets the result's cause. When a result of an earlier attempt stands
    /// already, that one counts and the job is done.
    ///
    /// # Errors
    /// The result breaks a limit or the write fails: the job is still held and may be completed
    /// with another result. [`Error::LeaseLost`] when it was settled before.
    pub async fn complete(&self, results_topic: &str, result: NewEvent) -> Result<Completed, Error> {
        if self.grant.is_over(self.index) {
            return Err(Error::LeaseLost);
        }
        arqon_proto::check_topic(results_topic).map_err(crate::client::invalid_name)?;
        let mut batch = BytesMut::new();
        result.batch()?.encode_into(&mut batch);
        let produce = wire::Produce {
            topic: results_topic.to_owned(),
            partition: self.grant.partition,
            durability: Durability::MajorityFsync.into(),
            lease_tokens: vec![self.token.clone()],
        };
        let completed = match self.desk.client.request(Body::Produce(produce), vec![batch.freeze()]).await {
            Ok((Body::Produced(produced), _)) => Completed { offset: Some(produced.base_offset), duplicate: false },
            Ok(_) => return Err(Error::unexpected("the leader")),
            Err(Error::Server { code: ErrorCode::Duplicate, details, .. }) => {
                Completed { offset: details.duplicates.first().and_then(|known| known.offset), duplicate: true }
            }
            Err(Error::Server { code: ErrorCode::LeaseLost, .. }) => return Err(Error::LeaseLost),
            Err(error) => return Err(error),
        };
        match self.settle(Settlement::Ack).await {
            Ok(()) => {}
            // The result stands: whoever gets the job again will find it done.
            Err(error) => {
                self.grant.end(self.index);
                tracing::debug!(job = ?self, %error, "the result stands, its acknowledgement does not");
            }
        }
        Ok(completed)
    }

    /// Marks the job as done without a result.
    ///
    /// # Errors
    /// [`Error::LeaseLost`], no permission, or no answer in time.
    pub async fn ack(&self) -> Result<(), Error> {
        self.settle(Settlement::Ack).await
    }

    /// Marks all `jobs` as done without results, in as few requests as possible. Gives those that
    /// are not, with the reason, as [`Job::ack`] does; none when every acknowledgement is confirmed.
    pub async fn ack_all(jobs: Vec<Self>) -> Vec<(Self, Error)> {
        let (mut refused, mut held) = (Vec::new(), jobs);
        if held.iter().any(|job| job.grant.is_over(job.index)) {
            let (over, rest): (Vec<_>, Vec<_>) = held.into_iter().partition(|job| job.grant.is_over(job.index));
            refused = over.into_iter().map(|job| (job, Error::LeaseLost)).collect();
            held = rest;
        }
        let is_alike = |one: &Self, other: &Self| {
            Arc::ptr_eq(&one.desk, &other.desk) && one.grant.partition == other.grant.partition
        };
        let settling = held.chunk_by(is_alike).map(|jobs| settle(jobs, Settlement::Ack));
        let outcomes: Vec<_> = join_all(settling).await.into_iter().flatten().collect();
        if outcomes.iter().all(Result::is_ok) {
            free(held);
            return refused;
        }
        for (job, outcome) in held.into_iter().zip(outcomes) {
            if let Err(error) = outcome {
                refused.push((job, error));
            }
        }
        refused
    }

    /// Gives the job back, to be handed out again after `delay`; 24 hours at most.
    ///
    /// # Errors
    /// As [`Job::ack`], or [`Error::Invalid`] for the delay.
    pub async fn nack(&self, delay: Duration) -> Result<(), Error> {
        let delay_ms = u32::try_from(delay.as_millis()).ok().filter(|delay_ms| *delay_ms <= limits::NACK_DELAY_MS_MAX);
        let Some(delay_ms) = delay_ms else {
            return Err(Error::invalid("delay", format!("is over {} ms", limits::NACK_DELAY_MS_MAX)));
        };
        self.settle(Settlement::Nack { delay_ms }).await
    }

    async fn settle(&self, settlement: Settlement) -> Result<(), Error> {
        if self.grant.is_over(self.index) {
            return Err(Error::LeaseLost);
        }
        settle(std::slice::from_ref(self), settlement).await.pop().unwrap_or(Err(Error::Closed))
    }
}

/// Settles jobs of one worker and partition; gives the outcome of each.
async fn settle(jobs: &[Job], settlement: Settlement) -> Vec<Result<(), Error>> {
    let Some(first) = jobs.first() else { return Vec::new() };
    let (reply, outcome) = oneshot::channel();
    first.desk.settle(Settle {
        partition: first.grant.partition,
        leases: jobs.iter().map(|job| job.grant.reference(job.index)).collect(),
        settlement,
        reply: Some(reply),
        frees_places: false,
    });
    let outcome = outcome.await.unwrap_or(Err(Error::Closed));
    let of_job = |job: &Job| {
        let outcome = match &outcome {
            Ok(lost) if lost.contains(job.grant.reference(job.index)) => Err(Error::LeaseLost),
            Ok(_) => Ok(()),
            Err(error) => Err(error.clone()),
        };
        if matches!(outcome, Ok(()) | Err(Error::LeaseLost)) {
            job.grant.end(job.index);
        }
        outcome
    };
    jobs.iter().map(of_job).collect()
}

/// Drops settled jobs and gives their places back together, so that the next request for jobs can
/// ask for as many.
fn free(jobs: Vec<Job>) {
    let mut desks: Vec<(Arc<Desk>, usize)> = Vec::new();
    for job in &jobs {
        job.grant.free(job.index);
        match desks.last_mut() {
            Some((desk, count)) if Arc::ptr_eq(desk, &job.desk) => *count += 1,
            _ => desks.push((job.desk.clone(), 1)),
        }
    }
    drop(jobs);
    desks.into_iter().for_each(|(desk, count)| desk.places.add_permits(count));
}

impl Drop for Job {
    fn drop(&mut self) {
        if self.grant.is_freed(self.index) {
            return;
        }
        let gives_back = !self.grant.is_over(self.index) && !self.grant.is_lost(self.index);
        self.grant.end(self.index);
        if gives_back {
            self.desk.settle(Settle {
                partition: self.grant.partition,
                leases: vec![self.grant.reference(self.index)],
                settlement: Settlement::Nack { delay_ms: 0 },
                reply: None,
                frees_places: true,
            });
        } else {
            self.desk.places.add_permits(1);
        }
    }
}
