//! The requests of one session: checked against its token, carried out, answered.

use std::sync::Arc;

use arqon_proto::{Batch, OPERATOR_TOPIC, Session, Verb, encode_frame, limits, wire};
use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use wire::{ErrorCode, frame::Body};

use super::{
    budget::{Budget, Room, Share, Turn},
    reader::Received,
    writer::Outgoing,
};
use crate::{
    broker::{Broker, authorize, authorize_describe},
    error::{error, invalid},
    partition::{Operator, Partition, Submitted},
};

/// Credit that a client may pile up, in bytes.
const CREDIT_SIZE_MAX: usize = 1 << 30;
const RETRY_AFTER_MS: u32 = 20;

/// What a write to a partition costs beside its bytes, in bytes.
const REQUEST_OVERHEAD_SIZE: usize = 1_536;
/// Other requests and answers without batches are only counted beyond this size, in bytes.
const SMALL_SIZE_MAX: usize = 4 << 10;
/// The size of a decoded request is at most this many times its size on the wire.
const DECODED_FACTOR: usize = 8;

type Answer = Result<Reply, wire::Error>;

struct Reply {
    body: Body,
    batches: Vec<Batch>,
    /// Where it was taken already.
    paid: Option<Paid>,
}

impl Reply {
    fn plain(body: Body) -> Self {
        Self { body, batches: Vec::new(), paid: None }
    }
}

/// Room and credit for one answer.
struct Paid {
    room: Option<Room>,
    credit: Option<OwnedSemaphorePermit>,
}

/// The requests of one session.
pub(super) struct Requests {
    shared: Arc<Shared>,
}

struct Shared {
    broker: Arc<Broker>,
    session: Session,
    answers: mpsc::Sender<Outgoing>,
    outstanding: Arc<Semaphore>,
    share: Share,
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
    available: Arc<Semaphore>,
    // A larger answer goes out when all of this is there, or it never would.
    window: usize,
}

// What an answer to a request is sent with.
struct Ticket {
    request_id: u64,
    outstanding: Outstanding,
}

/// The places of one request, until it is answered.
pub(super) struct Outstanding {
    _request: OwnedSemaphorePermit,
    /// Of a request that may wait in the node.
    _wait: Option<Room>,
}

impl Requests {
    /// For a client that gave `credit_bytes` of credit; 0 stands for no such limit.
    pub(super) fn new(
        broker: Arc<Broker>,
        budget: Arc<Budget>,
        session: Session,
        credit_bytes: u64,
        answers: mpsc::Sender<Outgoing>,
    ) -> Self {
        let window = usize::try_from(credit_bytes).unwrap_or(CREDIT_SIZE_MAX).min(CREDIT_SIZE_MAX);
        let credit = (window > 0).then(|| Credit { available: Arc::new(Semaphore::new(window)), window });
        let shared = Shared {
            broker,
            session,
            answers,
            outstanding: Arc::new(Semaphore::new(limits::CONNECTION_REQUEST_COUNT_MAX)),
            share: Share::new(budget),
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
    pub(super) async fn take(&self, received: Received) -> bool {
        let shared = &self.shared;
        let Received { frame: wire::Frame { request_id, body: request }, body, size, memory } = received;
        let Some(request) = request else { return true };
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
        let outstanding = match shared.place(matches!(request, Body::Fetch(_) | Body::Work(_))) {
            Ok(outstanding) => outstanding,
            Err(refused) => return self.send(request_id, Body::Error(refused)).await,
        };
        let ticket = Ticket { request_id, outstanding };
        match request {
            Body::Produce(request) => {
                let received = shared.share.received(size + REQUEST_OVERHEAD_SIZE).await;
                drop(memory);
                return shared.clone().take_produce(ticket, request, body, received).await;
            }
            _ if !body.is_empty() => {
                let refused = invalid("body", "only Produce comes with a batch");
                return shared.answer(ticket, Err(refused)).await;
            }
            _ => {}
        }
        let decoded_size = if size > SMALL_SIZE_MAX { request.encoded_len() * DECODED_FACTOR } else { 0 };
        let received = if decoded_size > 0 { shared.share.received(decoded_size).await } else { None };
        drop(memory);
        let shared = shared.clone();
        tokio::spawn(async move {
            let mut ended = shared.ended.subscribe();
            tokio::select! {
                () = async {
                    let answer = shared.handle(request).await;
                    drop(received);
                    Box::pin(shared.answer(ticket, answer)).await;
                } => {}
                // Long-polls do not outlive their session.
                _ = ended.wait_for(|ended| *ended) => {}
            }
        });
        true
    }
}

impl Shared {
    /// The places of one more request.
    fn place(&self, may_wait: bool) -> Result<Outstanding, wire::Error> {
        let overloaded =
            |message| wire::Error { retry_after_ms: RETRY_AFTER_MS, ..error(ErrorCode::Overloaded, message) };
        let Ok(request) = self.outstanding.clone().try_acquire_owned() else {
            let count = limits::CONNECTION_REQUEST_COUNT_MAX;
            return Err(overloaded(format!("{count} requests are outstanding already")));
        };
        let wait = if may_wait {
            let place = self.share.try_wait();
            Some(place.ok_or_else(|| overloaded("too many fetches and requests for jobs wait already".to_owned()))?)
        } else {
            None
        };
        Ok(Outstanding { _request: request, _wait: wait })
    }

    async fn send_small(&self, request_id: u64, body: Body) -> bool {
        let frame = wire::Frame { request_id, body: Some(body) };
        match encode_frame(&frame, 0) {
            Ok(head) => self.answers.send(Outgoing::head(head)).await.is_ok(),
            Err(_) => false,
        }
    }

    async fn take_produce(
        self: Arc<Self>,
        ticket: Ticket,
        request: wire::Produce,
        body: Bytes,
        received: Option<Room>,
    ) -> bool {
        self.broker.metrics.received_size.inc_by(body.len() as u64);
        match self.submit(request, body) {
            Ok(submitted) => {
                tokio::spawn(async move {
                    let answer = submitted.outcome().await.map(|produced| Reply::plain(Body::Produced(produced)));
                    drop(received);
                    // Tens of thousands may wait for their outcome: what comes after it has a box.
                    Box::pin(self.answer(ticket, answer)).await;
                });
                true
            }
            Err(refused) => {
                drop(received);
                self.answer(ticket, Err(refused)).await
            }
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

    // What waits long and is there in thousands, a fetch at the end of a log, is kept small: all
    // else has a box of its own.
    async fn handle(&self, request: Body) -> Answer {
        match request {
            Body::Fetch(request) => self.fetch(request).await,
            other => Box::pin(self.handle_other(other)).await,
        }
    }

    async fn handle_other(&self, request: Body) -> Answer {
        match request {
            Body::Work(request) => self.work(request).await,
            Body::ListOffsets(request) => {
                authorize(&self.session, Verb::Subscribe, &request.topic)?;
                let partition = self.broker.partition(&self.session, &request.topic, request.partition)?;
                partition.list_offsets(request).await.map(Body::OffsetsListed).map(Reply::plain)
            }
            Body::Ack(request) => {
                authorize(&self.session, Verb::Subscribe, &request.topic)?;
                let partition = self.broker.partition(&self.session, &request.topic, request.partition)?;
                partition.ack(request).await.map(Body::Settled).map(Reply::plain)
            }
            Body::Nack(request) => {
                authorize(&self.session, Verb::Subscribe, &request.topic)?;
                let partition = self.broker.partition(&self.session, &request.topic, request.partition)?;
                partition.nack(request).await.map(Body::Settled).map(Reply::plain)
            }
            Body::Renew(request) => {
                authorize(&self.session, Verb::Subscribe, &request.topic)?;
                let partition = self.broker.partition(&self.session, &request.topic, request.partition)?;
                partition.renew(request).await.map(Body::Settled).map(Reply::plain)
            }
            Body::DescribeTopic(request) => {
                authorize_describe(&self.session, &request.topic)?;
                let topic = self.broker.topic(&self.session, &request.topic)?;
                drop(self.share.turn().await);
                Ok(Reply::plain(Body::TopicDescription(self.broker.describe(&topic))))
            }
            _ => Err(invalid("body", "a client does not send this")),
        }
    }

    async fn fetch(&self, request: wire::Fetch) -> Answer {
        authorize(&self.session, Verb::Subscribe, &request.topic)?;
        let partition = self.broker.partition(&self.session, &request.topic, request.partition)?;
        if self.share.try_turn().is_none() {
            // Another answer waits for room: this one is not even read before its turn.
            let turn = self.share.turn().await;
            let (fetched, batches) = self.fetch_now(&partition, &request).await?;
            if !batches.is_empty() || request.wait_ms == 0 {
                return Box::pin(self.pay_for(&turn, &partition, &request, fetched, batches)).await;
            }
        }
        let (fetched, batches) = partition.fetch(self.sized(&request)).await?;
        if batches.is_empty() {
            return Ok(Reply::plain(Body::Fetched(fetched)));
        }
        if let Some(turn) = self.share.try_turn() {
            return Box::pin(self.pay_for(&turn, &partition, &request, fetched, batches)).await;
        }
        drop(batches);
        let turn = self.share.turn().await;
        let (fetched, batches) = self.fetch_now(&partition, &request).await?;
        Box::pin(self.pay_for(&turn, &partition, &request, fetched, batches)).await
    }

    async fn fetch_now(
        &self,
        partition: &Partition,
        request: &wire::Fetch,
    ) -> Result<(wire::Fetched, Vec<Batch>), wire::Error> {
        let now = wire::Fetch { wait_ms: 0, ..self.sized(request) };
        Box::pin(partition.fetch(now)).await
    }

    // No larger than what there may be room for.
    fn sized(&self, request: &wire::Fetch) -> wire::Fetch {
        let size = match request.bytes_max as usize {
            0 => limits::FETCH_SIZE_MAX,
            size => size,
        };
        wire::Fetch { bytes_max: size.min(self.share.answer_size_max()) as u32, ..request.clone() }
    }

    // What waits for room or credit must not hold memory meanwhile: it is read again when there is
    // some.
    async fn pay_for(
        &self,
        turn: &Turn<'_>,
        partition: &Partition,
        request: &wire::Fetch,
        fetched: wire::Fetched,
        batches: Vec<Batch>,
    ) -> Answer {
        let (size, memory_size) = (size_of(&batches), memory_size_of(&batches));
        if let Some(paid) = self.try_pay(turn, size, memory_size) {
            return Ok(Reply { body: Body::Fetched(fetched), batches, paid: Some(paid) });
        }
        drop(batches);
        let paid = self.pay(turn, size, memory_size).await;
        let again = wire::Fetch { wait_ms: 0, bytes_max: size as u32, ..request.clone() };
        let (fetched, batches) = partition.fetch(again).await?;
        Ok(Reply { body: Body::Fetched(fetched), batches, paid: Some(paid) })
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
        // A client that does not read gets no more jobs.
        drop(self.share.turn().await);
        let (leased, batches) = partition.work(request, operator).await?;
        Ok(Reply { body: Body::Leased(leased), batches, paid: None })
    }

    fn add_credit(&self, bytes: u64) {
        if let Some(credit) = &self.credit {
            let room = CREDIT_SIZE_MAX.saturating_sub(credit.available.available_permits());
            credit.available.add_permits(usize::try_from(bytes).unwrap_or(room).min(room));
        }
    }

    fn try_pay(&self, turn: &Turn<'_>, size: usize, memory_size: usize) -> Option<Paid> {
        let credit = match &self.credit {
            Some(credit) => Some(credit.available.clone().try_acquire_many_owned(size.min(credit.window) as u32).ok()?),
            None => None,
        };
        Some(Paid { room: Some(self.share.try_room(turn, memory_size)?), credit })
    }

    // Waits for `size` bytes of credit, then for room in memory.
    async fn pay(&self, turn: &Turn<'_>, size: usize, memory_size: usize) -> Paid {
        let credit = match &self.credit {
            Some(credit) => credit.available.clone().acquire_many_owned(size.min(credit.window) as u32).await.ok(),
            None => None,
        };
        Paid { room: self.share.room(turn, memory_size).await, credit }
    }

    // Sends an answer, when there is credit and room for its batches. False: the client is gone.
    async fn answer(&self, ticket: Ticket, answer: Answer) -> bool {
        let Reply { body, batches, paid } = answer.unwrap_or_else(|refused| {
            self.broker.metrics.refused(refused.code());
            Reply::plain(Body::Error(refused))
        });
        let size = size_of(&batches);
        let frame = wire::Frame { request_id: ticket.request_id, body: Some(body) };
        let head = match encode_frame(&frame, size) {
            Ok(head) => head,
            Err(cause) => {
                let refused = error(ErrorCode::InternalError, format!("the answer does not fit a frame: {cause}"));
                return self.send_small(ticket.request_id, Body::Error(refused)).await;
            }
        };
        drop(frame);
        let paid = match paid {
            Some(paid) => paid,
            None if size > 0 || head.len() > SMALL_SIZE_MAX => {
                let turn = self.share.turn().await;
                self.pay(&turn, size, memory_size_of(&batches) + head.len()).await
            }
            None => Paid { room: None, credit: None },
        };
        if let Some(mut credit) = paid.credit {
            // Less may have been there when it was read again.
            let surplus = credit.num_permits().saturating_sub(size);
            drop(credit.split(surplus));
            credit.forget();
        }
        self.answers.send(Outgoing::new(head, batches, (paid.room, Some(ticket.outstanding)))).await.is_ok()
    }
}

fn size_of(batches: &[Batch]) -> usize {
    batches.iter().map(|batch| batch.header.batch_size()).sum()
}

fn memory_size_of(batches: &[Batch]) -> usize {
    size_of(batches) + size_of_val(batches)
}
