//! What became of a batch, shared by the receipts of all its events.

use std::{
    fmt,
    future::Future,
    pin::Pin,
    sync::{Arc, Mutex, OnceLock, PoisonError},
    task::{Context, Poll, Waker},
};

use arqon_proto::wire;
use wire::Durability;

use crate::Error;

/// Where an event stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Receipt {
    /// Topic.
    pub topic: Arc<str>,
    /// Partition.
    pub partition: u32,
    /// Offset in the partition; provisional when `durability` is `LeaderReceived`.
    pub offset: u64,
    /// Append time in ms since 1970; 0 when the answer was lost and the event was found written.
    pub time_ms: u64,
    /// What the acknowledgement promises.
    pub durability: Durability,
}

/// The outcome of one batch, once it is known.
pub(crate) struct Outcome {
    topic: Arc<str>,
    partition: u32,
    result: OnceLock<Result<wire::Produced, Error>>,
    /// Whom to wake; at most one entry per event.
    waiting: Mutex<Vec<Waker>>,
}

impl Outcome {
    pub(crate) fn new(topic: Arc<str>, partition: u32) -> Arc<Self> {
        Arc::new(Self { topic, partition, result: OnceLock::new(), waiting: Mutex::default() })
    }

    pub(crate) fn is_known(&self) -> bool {
        self.result.get().is_some()
    }

    /// The first result counts.
    pub(crate) fn resolve(&self, result: Result<wire::Produced, Error>) {
        let _already_resolved = self.result.set(result);
        let waiting = std::mem::take(&mut *self.waiting.lock().unwrap_or_else(PoisonError::into_inner));
        for waker in waiting {
            waker.wake();
        }
    }
}

/// Resolves a batch, as closed when it is dropped.
pub(crate) struct Resolver(pub(crate) Arc<Outcome>);

impl Drop for Resolver {
    fn drop(&mut self) {
        if !self.0.is_known() {
            self.0.resolve(Err(Error::Closed));
        }
    }
}

/// The receipt of a sent event, to be awaited. Dropping it does not take the event back.
pub struct Delivery {
    outcome: Arc<Outcome>,
    /// Which event of the batch.
    index: u32,
    /// Where this one's waker stands.
    place: Option<u32>,
}

impl fmt::Debug for Delivery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let outcome = &self.outcome;
        let is_known = outcome.is_known();
        write!(
            f,
            "Delivery({}/{}, event {} of its batch, known: {is_known})",
            outcome.topic, outcome.partition, self.index
        )
    }
}

impl Delivery {
    pub(crate) fn new(outcome: Arc<Outcome>, index: u32) -> Self {
        Self { outcome, index, place: None }
    }

    fn receipt(&self, result: &Result<wire::Produced, Error>) -> Result<Receipt, Error> {
        let produced = result.as_ref().map_err(Error::clone)?;
        Ok(Receipt {
            topic: self.outcome.topic.clone(),
            partition: self.outcome.partition,
            offset: produced.base_offset + u64::from(self.index),
            time_ms: produced.time_ms,
            durability: produced.durability(),
        })
    }
}

impl Future for Delivery {
    type Output = Result<Receipt, Error>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        if let Some(result) = self.outcome.result.get() {
            return Poll::Ready(self.receipt(result));
        }
        let outcome = self.outcome.clone();
        let mut waiting = outcome.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        // It may have come before the lock was had.
        if let Some(result) = outcome.result.get() {
            return Poll::Ready(self.receipt(result));
        }
        match self.place.and_then(|place| waiting.get_mut(place as usize)) {
            Some(known) => known.clone_from(context.waker()),
            None => {
                self.place = Some(waiting.len() as u32);
                waiting.push(context.waker().clone());
            }
        }
        Poll::Pending
    }
}
