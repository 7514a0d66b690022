//! The requests of one session: checked against its token, carried out, answered.

use std::sync::Arc;

use arqon_proto::{Batch, OPERATOR_TOPIC, Session, Verb, encode_frame, limits, wire};
use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use wire::{ErrorCode, frame::Body};

use super::writer::Outgoing;
use crate::{
    broker::{Broker, authorize, authorize_describe},
    error::{error, invalid},
    partition::{Operator, Submitted},
};

/// Batches received and not answered yet, per connection, in bytes. More is not read.
const RECEIVED_SIZE_MAX: usize = 64 << 20;
/// Batches in answers that were not sent yet, per connection, in bytes.
const SENDING_SIZE_MAX: usize = 16 << 20;
/// Credit that a client may pile up, in bytes.
const CREDIT_SIZE_MAX: usize = 1 << 30;
const RETRY_AFTER_MS: u32 = 20;

type Answer = Result<(Body, Vec<Batch>), wire::Error>;

/// The requests of one session.
pub(super) struct Requests {
    shared: Arc<Shared>,
}

struct Shared {
    broker: Arc<Broker>,
    session: Session,
    answers: mpsc::Sender<Outgoing>,
    outstanding: Arc<Semaphore>,
    received: Arc<Semaphore>,
    sending: Arc<Semaphore>,
    credit: Option<Credit>,
    ended: watch::Sender<bool>,
}

impl Drop for Requests {
    fn drop(&mut self) {
        self.shared.ended.send_replace(true);
    }
}

// How many bytes of answers the client is ready for.
struct Credit {
    available: Semaphore,
    // A larger answer goes out when all of this is there, or it never would.
    window: usize,
}

// What an answer to a request is sent with.
struct Ticket {
    request_id: u64,
    outstanding: OwnedSemaphorePermit,
}

impl Requests {
    /// For a client that gave `credit_bytes` of credit; 0 stands for no such limit.
    pub(super) fn new(
        broker: Arc<Broker>,
        session: Session,
        credit_bytes: u64,
        answers: mpsc::Sender<Outgoing>,
    ) -> Self {
        let window = usize::try_from(credit_bytes).unwrap_or(CREDIT_SIZE_MAX).min(CREDIT_SIZE_MAX);
        let credit = (window > 0).then(|| Credit { available: Semaphore::new(window), window });
        let shared = Shared {
            broker,
            session,
            answers,
            outstanding: Arc::new(Semaphore::new(limits::CONNECTION_REQUEST_COUNT_MAX)),
            received: Arc::new(Semaphore::new(RECEIVED_SIZE_MAX)),
            sending: Arc::new(Semaphore::new(SENDING_SIZE_MAX)),
            credit,
            ended: watch::Sender::new(false),
        };
        Self { shared: Arc::new(shared) }
    }

    /// Sends a frame that needs no room. False: the client is gone.
    pub(super) async fn send(&self, request_id: u64, body: Body) -> bool {
        self.shared.send_small(request_id, body).await
    }

    /// Takes one request in. Writes to a partition are in line when this returns; everything
    /// else runs beside the session. False: the client is gone.
    pub(super) async fn take(&self, request_id: u64, request: Body, body: Bytes) -> bool {
        let shared = &self.shared;
        shared.broker.metrics.requests.inc();
        match request {
            Body::Ping(_) => return self.send(request_id, Body::Pong(wire::Pong {})).await,
            Body::Pong(_) => return true,
            Body::Credit(credit) => {
                shared.add_credit(credit.bytes);
                return true;
            }
            _ => {}
        }
        let Ok(outstanding) = shared.outstanding.clone().try_acquire_owned() else {
            let message = format!("{} requests are outstanding already", limits::CONNECTION_REQUEST_COUNT_MAX);
            let refused = wire::Error { retry_after_ms: RETRY_AFTER_MS, ..error(ErrorCode::Overloaded, message) };
            return self.send(request_id, Body::Error(refused)).await;
        };
        let ticket = Ticket { request_id, outstanding };
        match request {
            Body::Produce(request) => return shared.clone().take_produce(ticket, request, body).await,
            _ if !body.is_empty() => {
                let refused = invalid("body", "only Produce comes with a batch");
                return shared.answer(ticket, Err(refused)).await;
            }
            _ => {}
        }
        let shared = shared.clone();
        tokio::spawn(async move {
            let mut ended = shared.ended.subscribe();
            tokio::select! {
                () = async { shared.answer(ticket, shared.handle(request).await).await; } => {}
                // Long-polls do not outlive their session.
                _ = ended.wait_for(|ended| *ended) => {}
            }
        });
        true
    }
}

impl Shared {
    async fn send_small(&self, request_id: u64, body: Body) -> bool {
        let frame = wire::Frame { request_id, body: Some(body) };
        match encode_frame(&frame, 0) {
            Ok(head) => self.answers.send(Outgoing::head(head)).await.is_ok(),
            Err(_) => false,
        }
    }

    async fn take_produce(self: Arc<Self>, ticket: Ticket, request: wire::Produce, body: Bytes) -> bool {
        let size = u32::try_from(body.len()).unwrap_or(u32::MAX).min(RECEIVED_SIZE_MAX as u32);
        self.broker.metrics.received_size.inc_by(u64::from(size));
        let Ok(received) = self.received.clone().acquire_many_owned(size).await else { return false };
        match self.submit(request, body) {
            Ok(submitted) => {
                tokio::spawn(async move {
                    let answer = submitted.outcome().await.map(|produced| (Body::Produced(produced), Vec::new()));
                    drop(received);
                    self.answer(ticket, answer).await;
                });
                true
            }
            Err(refused) => self.answer(ticket, Err(refused)).await,
        }
    }

    fn submit(&self, request: wire::Produce, mut body: Bytes) -> Result<Submitted, wire::Error> {
        // A lease token is the right to write its job's result; the partition checks it.
        if request.lease_tokens.is_empty() {
            authorize(&self.session, Verb::Publish, &request.topic)?;
        }
        let partition = self.broker.partition(&self.session, &request.topic, request.partition)?;
        let mut batch = Batch::split_from(&mut body).map_err(|cause| invalid("batch", cause.to_string()))?;
        if !body.is_empty() {
            return Err(invalid("batch", "a produce carries exactly one batch"));
        }
        if request.topic == OPERATOR_TOPIC {
            authorize(&self.session, Verb::Publish, &request.topic)?;
            batch = self.broker.operators.rewrite(&self.session, &batch)?;
        }
        partition.submit(request, batch)
    }

    async fn handle(&self, request: Body) -> Answer {
        let plain = |body: Body| (body, Vec::new());
        match request {
            Body::Fetch(request) => self.fetch(request).await,
            Body::Work(request) => self.work(request).await,
            Body::ListOffsets(request) => {
                authorize(&self.session, Verb::Subscribe, &request.topic)?;
                let partition = self.broker.partition(&self.session, &request.topic, request.partition)?;
                partition.list_offsets(request).await.map(Body::OffsetsListed).map(plain)
            }
            Body::Ack(request) => {
                authorize(&self.session, Verb::Subscribe, &request.topic)?;
                let partition = self.broker.partition(&self.session, &request.topic, request.partition)?;
                partition.ack(request).await.map(Body::Settled).map(plain)
            }
            Body::Nack(request) => {
                authorize(&self.session, Verb::Subscribe, &request.topic)?;
                let partition = self.broker.partition(&self.session, &request.topic, request.partition)?;
                partition.nack(request).await.map(Body::Settled).map(plain)
            }
            Body::Renew(request) => {
                authorize(&self.session, Verb::Subscribe, &request.topic)?;
                let partition = self.broker.partition(&self.session, &request.topic, request.partition)?;
                partition.renew(request).await.map(Body::Settled).map(plain)
            }
            Body::DescribeTopic(request) => {
                authorize_describe(&self.session, &request.topic)?;
                let topic = self.broker.topic(&self.session, &request.topic)?;
                Ok(plain(Body::TopicDescription(self.broker.describe(&topic))))
            }
            _ => Err(invalid("body", "a client does not send this")),
        }
    }

    async fn fetch(&self, request: wire::Fetch) -> Answer {
        authorize(&self.session, Verb::Subscribe, &request.topic)?;
        let partition = self.broker.partition(&self.session, &request.topic, request.partition)?;
        let (fetched, batches) = partition.fetch(request.clone()).await?;
        if self.has_room(size_of(&batches)) {
            return Ok((Body::Fetched(fetched), batches));
        }
        // What waits for room or credit must not hold memory meanwhile: it is read again when
        // there is some.
        let size = size_of(&batches);
        drop(batches);
        self.wait_for_room(size).await;
        let again = wire::Fetch { wait_ms: 0, bytes_max: size as u32, ..request };
        let (fetched, batches) = partition.fetch(again).await?;
        Ok((Body::Fetched(fetched), batches))
    }

    async fn work(&self, request: wire::Work) -> Answer {
        authorize(&self.session, Verb::Subscribe, &request.topic)?;
        // First: a node that starts knows no operators either.
        let partition = self.broker.partition(&self.session, &request.topic, request.partition)?;
        let operator = if request.operator_id.is_empty() {
            None
        } else {
            let registration = self.broker.operators.admit(&self.session, &request.operator_id)?;
            Some(Operator { id: registration.operator_id, version: registration.version })
        };
        let (leased, batches) = partition.work(request, operator).await?;
        Ok((Body::Leased(leased), batches))
    }

    fn add_credit(&self, bytes: u64) {
        if let Some(credit) = &self.credit {
            let room = CREDIT_SIZE_MAX.saturating_sub(credit.available.available_permits());
            credit.available.add_permits(usize::try_from(bytes).unwrap_or(room).min(room));
        }
    }

    fn has_room(&self, size: usize) -> bool {
        let has_credit =
            self.credit.as_ref().is_none_or(|credit| credit.available.available_permits() >= size.min(credit.window));
        has_credit && self.sending.available_permits() >= size.min(SENDING_SIZE_MAX)
    }

    async fn wait_for_room(&self, size: usize) {
        // Permits are given back at once: others may be faster, and then this answer waits in
        // `answer`, where as many as the sending limit allows may be held.
        if let Some(credit) = &self.credit {
            drop(credit.available.acquire_many(size.min(credit.window) as u32).await);
        }
        drop(self.sending.acquire_many(size.min(SENDING_SIZE_MAX) as u32).await);
    }

    // Sends an answer, when there is credit and room for its batches. False: the client is gone.
    async fn answer(&self, ticket: Ticket, answer: Answer) -> bool {
        let (body, batches) = answer.unwrap_or_else(|refused| {
            self.broker.metrics.refused(refused.code());
            (Body::Error(refused), Vec::new())
        });
        let size = size_of(&batches);
        let mut sending = None;
        if size > 0 {
            if let Some(credit) = &self.credit {
                let Ok(spent) = credit.available.acquire_many(size.min(credit.window) as u32).await else {
                    return false;
                };
                spent.forget();
            }
            sending = self.sending.clone().acquire_many_owned(size.min(SENDING_SIZE_MAX) as u32).await.ok();
        }
        let frame = wire::Frame { request_id: ticket.request_id, body: Some(body) };
        let head = match encode_frame(&frame, size) {
            Ok(head) => head,
            Err(cause) => {
                let refused = error(ErrorCode::InternalError, format!("the answer does not fit a frame: {cause}"));
                return self.send_small(ticket.request_id, Body::Error(refused)).await;
            }
        };
        self.answers.send(Outgoing::new(head, batches, [sending, Some(ticket.outstanding)])).await.is_ok()
    }
}

fn size_of(batches: &[Batch]) -> usize {
    batches.iter().map(|batch| batch.header.batch_size()).sum()
}
