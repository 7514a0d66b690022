//! Lanes: finished batches of one partition, handed in from anywhere, sent in that order.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use arqon_proto::{Header, wire};
use bytes::Bytes;
use tokio::{
    sync::{mpsc, oneshot},
    time::{Instant, timeout},
};

use crate::{
    Error,
    flight::{Flight, Item, Payload},
    limits,
    router::Router,
};

/// The lanes of one client, made when needed and gone when idle.
#[derive(Default)]
pub(crate) struct Lanes {
    open: Mutex<HashMap<(String, u32), mpsc::Sender<Item>>>,
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
        let key = (produce.topic.clone(), produce.partition);
        let mut item = Item {
            produce,
            payload: Payload::Encoded { bytes, safe },
            deadline: Instant::now() + router.options.request_timeout,
            done: Box::new(|outcome| {
                // The caller may have gone; the batch stands where it stands.
                let _ = sender.send(outcome);
            }),
        };
        loop {
            match self.lane(router, &key).send(item).await {
                Ok(()) => break,
                // It ended for want of work just now.
                Err(mpsc::error::SendError(refused)) => item = refused,
            }
        }
        Ok(Submitted { receiver })
    }

    fn lane(&self, router: &Arc<Router>, key: &(String, u32)) -> mpsc::Sender<Item> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(lane) = open.get(key).filter(|lane| !lane.is_closed()) {
            return lane.clone();
        }
        open.retain(|_, lane| !lane.is_closed());
        let (sender, items) = mpsc::channel(limits::LANE_QUEUE);
        let flight = Flight::new(router.clone(), &key.0, key.1, limits::LANE_WINDOW, None);
        tokio::spawn(run(flight, items));
        open.insert(key.clone(), sender.clone());
        sender
    }
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

async fn run(mut flight: Flight, mut items: mpsc::Receiver<Item>) {
    loop {
        tokio::select! {
            item = timeout(limits::LANE_IDLE, items.recv()), if flight.has_room() => match item {
                Ok(Some(item)) => _ = flight.push(item),
                Ok(None) => break,
                Err(_) if flight.is_empty() => items.close(),
                Err(_) => {}
            },
            () = flight.step() => {}
        }
    }
    while !flight.is_empty() {
        flight.step().await;
    }
}
