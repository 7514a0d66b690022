//! Lanes: finished batches of one partition, handed in from anywhere, sent in that order.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use arqon_proto::{Header, wire};
use bytes::Bytes;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, oneshot},
    time::Instant,
};

use crate::{
    Error,
    flight::{Flight, Item, Payload},
    limits,
    line::{Leaves, LineHandle, Supply},
    router::Router,
};

/// The lanes of one client, made when needed; the idle ones go when another is made.
#[derive(Default)]
pub(crate) struct Lanes {
    open: Mutex<HashMap<(String, u32), Arc<Lane>>>,
}

struct Lane {
    line: LineHandle<Queue>,
    /// Places in the queue.
    places: Arc<Semaphore>,
}

/// Finished batches that wait for their turn, each with its place.
#[derive(Default)]
struct Queue {
    items: VecDeque<(Item, OwnedSemaphorePermit)>,
}

impl Supply for Queue {
    type Batch = Item;

    fn next(&mut self, _under_way: usize) -> Option<Item> {
        self.items.pop_front().map(|(item, _place)| item)
    }

    fn finish(item: Item) -> Item {
        item
    }

    fn due(&self) -> Option<Instant> {
        None
    }

    fn is_empty(&self) -> bool {
        self.items.is_empty()
    }
}

impl Lanes {
    /// Puts one encoded batch behind all those given before it.
    pub(crate) async fn submit(
        &self,
        router: &Arc<Router>,
        produce: wire::Produce,
        bytes: Bytes,
    ) -> Result<Submitted, Error> {
        let header = Header::decode(&bytes).map_err(|error| Error::invalid("batch", error.to_string()))?;
        let safe = header.has_producer() || !produce.lease_tokens.is_empty();
        let (sender, receiver) = oneshot::channel();
        let lane = self.lane(router, &produce);
        let item = Item {
            produce,
            payload: Payload::Encoded { bytes, safe },
            deadline: Instant::now() + router.options.request_timeout,
            done: Box::new(|outcome| {
                // The caller may have gone; the batch stands where it stands.
                let _ = sender.send(outcome);
            }),
            spare: None,
        };
        let place = lane.places.clone().acquire_owned().await.map_err(|_| Error::Closed)?;
        lane.line.add(|queue| {
            queue.items.push_back((item, place));
            ((), Leaves::Now)
        });
        Ok(Submitted { receiver })
    }

    fn lane(&self, router: &Arc<Router>, produce: &wire::Produce) -> Arc<Lane> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (produce.topic.clone(), produce.partition);
        if let Some(lane) = open.get(&key) {
            return lane.clone();
        }
        open.retain(|_, lane| Arc::strong_count(lane) > 1 || !lane.line.is_empty());
        let line = LineHandle::open(Queue::default(), tick(router), |hear| {
            Flight::new(router.clone(), &key.0, key.1, limits::LANE_WINDOW, None, hear)
        });
        let lane = Arc::new(Lane { line, places: Arc::new(Semaphore::new(limits::LANE_QUEUE)) });
        open.insert(key, lane.clone());
        lane
    }
}

/// How often a line's driver looks for time-outs.
pub(crate) fn tick(router: &Router) -> Duration {
    let shortest = router.options.attempt_timeout.min(router.options.request_timeout);
    (shortest / 4).min(limits::TICK_MAX)
}

/// A batch in line for its partition. Dropping it does not take the batch back.
#[derive(Debug)]
pub struct Submitted {
    receiver: oneshot::Receiver<Result<wire::Produced, Error>>,
}

impl Submitted {
    /// Waits until the batch is written or given up.
    ///
    /// # Errors
    /// As [`crate::Client::request`] of a produce.
    pub async fn outcome(self) -> Result<wire::Produced, Error> {
        self.receiver.await.unwrap_or(Err(Error::Closed))
    }
}
