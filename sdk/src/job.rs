//! One leased job, to be settled exactly once.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use arqon_proto::{limits, wire};
use bytes::{Bytes, BytesMut};
use tokio::sync::{OwnedSemaphorePermit, oneshot};
use wire::{Durability, ErrorCode, frame::Body};

use crate::{
    Error, Event, NewEvent,
    leases::{Lease, Settle, Settlement},
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
    lease: Arc<Lease>,
    desk: Arc<Desk>,
    settled: AtomicBool,
    place: Option<OwnedSemaphorePermit>,
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
    pub(crate) fn new(
        event: Event,
        token: Bytes,
        lease: Arc<Lease>,
        desk: Arc<Desk>,
        place: OwnedSemaphorePermit,
    ) -> Self {
        let attempt = lease.attempt;
        Self { event, attempt, token, lease, desk, settled: AtomicBool::new(false), place: Some(place) }
    }

    /// The token of the lease, which goes with the job's result.
    #[must_use]
    pub fn lease_token(&self) -> &Bytes {
        &self.token
    }

    /// Whether the server said that the lease is lost: another worker may have the job now.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        self.lease.is_lost()
    }

    /// Returns when the lease is lost; to be raced against long work.
    pub async fn lost(&self) {
        self.lease.wait_lost().await;
    }

    /// Writes the job's result to `results_topic`, in the partition of the job, and acknowledges
    /// the job. The bus sets the result's cause. When a result of an earlier attempt stands
    /// already, that one counts and the job is done.
    ///
    /// # Errors
    /// The result breaks a limit or the write fails: the job is still held and may be completed
    /// with another result. [`Error::LeaseLost`] when it was settled before.
    pub async fn complete(&self, results_topic: &str, result: NewEvent) -> Result<Completed, Error> {
        if self.settled.load(Ordering::Acquire) {
            return Err(Error::LeaseLost);
        }
        arqon_proto::check_topic(results_topic).map_err(crate::client::invalid_name)?;
        let mut batch = BytesMut::new();
        result.batch()?.encode_into(&mut batch);
        let produce = wire::Produce {
            topic: results_topic.to_owned(),
            partition: self.lease.partition,
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
                self.settled.store(true, Ordering::Release);
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
        if self.settled.load(Ordering::Acquire) {
            return Err(Error::LeaseLost);
        }
        let (reply, outcome) = oneshot::channel();
        self.desk.settle(Settle {
            partition: self.lease.partition,
            lease: self.reference(),
            settlement,
            reply: Some(reply),
            place: None,
        });
        let outcome = outcome.await.unwrap_or(Err(Error::Closed));
        if matches!(outcome, Ok(()) | Err(Error::LeaseLost)) {
            self.settled.store(true, Ordering::Release);
        }
        outcome
    }

    fn reference(&self) -> wire::LeaseRef {
        wire::LeaseRef { offset: self.lease.offset, attempt: self.lease.attempt }
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        self.desk.leases.remove(&self.lease);
        if !self.settled.load(Ordering::Acquire) && !self.lease.is_lost() {
            self.desk.settle(Settle {
                partition: self.lease.partition,
                lease: self.reference(),
                settlement: Settlement::Nack { delay_ms: 0 },
                reply: None,
                place: self.place.take(),
            });
        }
    }
}
