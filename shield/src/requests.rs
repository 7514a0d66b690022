//! The requests of one session: checked, passed on with the client's own token, answered.
//!
//! What is bounded: requests without an answer, bytes of batches received, bytes of answers not
//! sent. A client that uses up the first two is not read from until there is room again; answers
//! wait for the client's credit and for room in the send queue.

use std::{sync::Arc, time::Instant};

use arqon_proto::{Header, Session, wire};
use arqon_sdk::{Client, Error};
use bytes::Bytes;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    task::JoinSet,
};
use wire::{ErrorCode, frame::Body};

use crate::{
    permission,
    rates::SessionRate,
    server::Shared,
    session::{Out, message},
};

/// One fetch brings at most this many bytes, or one batch; the client asks again for more.
const FETCH_SIZE_MAX: u32 = 1 << 20;
/// Credit counts up to this size.
const CREDIT_SIZE_MAX: usize = 64 << 20;
/// What a client that meets an outage is asked to wait.
const OUTAGE_RETRY_MS: u32 = 500;

/// The requests of one session.
pub(crate) struct Requests {
    desk: Arc<Desk>,
    session: Session,
    rate: SessionRate,
    outstanding: Arc<Semaphore>,
    received: Arc<Semaphore>,
    /// Requests on their way; they end with the session. A batch that was handed to the client of
    /// the Spine is written all the same.
    tasks: JoinSet<()>,
}

/// What answers need.
struct Desk {
    shared: Arc<Shared>,
    client: Client,
    out: mpsc::Sender<Out>,
    sending: Arc<Semaphore>,
    credit: Option<Credit>,
}

struct Credit {
    available: Semaphore,
    /// What the client gave at first; a larger batch takes all of it.
    window: usize,
}

/// One request until its answer is sent.
struct Ticket {
    request_id: u64,
    place: OwnedSemaphorePermit,
    started: Instant,
    is_timed: bool,
}

type Answer = Result<(Body, Bytes), wire::Error>;

impl Requests {
    pub(crate) fn new(
        shared: Arc<Shared>,
        token: String,
        session: Session,
        hello: &wire::Hello,
        out: mpsc::Sender<Out>,
    ) -> Result<Self, Error> {
        let limits = &shared.config.limits;
        let window = usize::try_from(hello.credit_bytes).unwrap_or(CREDIT_SIZE_MAX).min(CREDIT_SIZE_MAX);
        let name: String = hello.client.chars().filter(|c| !c.is_control()).take(100).collect();
        let mut options = shared.config.options(&token, &name);
        options.ca = shared.tls.ca.clone();
        let client = Client::lazy(options)?;
        let rate = shared.rates.session(&session.tenant);
        let outstanding = Arc::new(Semaphore::new(limits.requests));
        let received = Arc::new(Semaphore::new(limits.receive_size));
        let desk = Arc::new(Desk {
            client,
            out,
            sending: Arc::new(Semaphore::new(limits.send_size)),
            credit: (window > 0).then(|| Credit { available: Semaphore::new(window), window }),
            shared,
        });
        Ok(Self { desk, session, rate, outstanding, received, tasks: JoinSet::new() })
    }

    /// Takes one request in. Writes are in line when this returns; everything else runs beside
    /// the session. False: the client is gone.
    pub(crate) async fn take(&mut self, request_id: u64, body: Body, payload: Bytes) -> bool {
        while self.tasks.try_join_next().is_some() {}
        match body {
            Body::Ping(_) => return self.desk.say(request_id, Body::Pong(wire::Pong {})).await,
            Body::Pong(_) => return true,
            Body::Credit(credit) => {
                self.desk.add_credit(credit.bytes);
                return true;
            }
            _ => {}
        }
        if let Err(refused) = self.check(&body, &payload) {
            return self.desk.refuse(request_id, refused).await;
        }
        let place = match self.outstanding.clone().try_acquire_owned() {
            Ok(place) => place,
            // Its credit must be read, so it cannot be kept waiting.
            Err(_) if self.desk.credit.is_some() => {
                let refused =
                    overloaded(format!("{} requests are outstanding", self.desk.shared.config.limits.requests));
                return self.desk.refuse(request_id, refused).await;
            }
            Err(_) => match self.outstanding.clone().acquire_owned().await {
                Ok(place) => place,
                Err(_) => return false,
            },
        };
        let is_timed = !matches!(body, Body::Fetch(_) | Body::Work(_));
        let ticket = Ticket { request_id, place, started: Instant::now(), is_timed };
        match body {
            Body::Produce(produce) => return self.take_produce(ticket, produce, payload).await,
            Body::Fetch(fetch) => {
                let desk = self.desk.clone();
                self.tasks.spawn(async move { desk.fetch(ticket, fetch).await });
            }
            other => {
                let desk = self.desk.clone();
                self.tasks.spawn(async move {
                    let answer = desk.client.request(other, Vec::new()).await.map_err(|error| to_wire(&error));
                    desk.answer(ticket, answer).await;
                });
            }
        }
        true
    }

    /// Rate, permission and shape.
    fn check(&self, body: &Body, payload: &Bytes) -> Result<(), wire::Error> {
        let is_produce = matches!(body, Body::Produce(_));
        let record_count = if is_produce { Header::decode(payload).map_or(0, |header| header.record_count) } else { 0 };
        if let Err(wait) = self.rate.take(record_count.saturating_add(1)) {
            self.desk.shared.metrics.rate_limited.inc();
            let refused = error(ErrorCode::RateLimitExceeded, "too many messages".to_owned(), "");
            let retry_after_ms = u32::try_from(wait.as_millis()).unwrap_or(u32::MAX).saturating_add(1);
            return Err(wire::Error { retry_after_ms, ..refused });
        }
        permission::check(&self.session, body)?;
        if !is_produce && !payload.is_empty() {
            let text = "only Produce comes with a batch".to_owned();
            return Err(error(ErrorCode::ValidationError, text, "body"));
        }
        Ok(())
    }

    async fn take_produce(&mut self, ticket: Ticket, produce: wire::Produce, batch: Bytes) -> bool {
        let size = batch.len().min(self.desk.shared.config.limits.receive_size) as u32;
        let Ok(received) = self.received.clone().acquire_many_owned(size).await else { return false };
        let desk = self.desk.clone();
        match desk.client.submit(produce, batch).await {
            Ok(submitted) => {
                self.tasks.spawn(async move {
                    let outcome = submitted.outcome().await;
                    drop(received);
                    let answer = outcome.map(|produced| (Body::Produced(produced), Bytes::new()));
                    desk.answer(ticket, answer.map_err(|error| to_wire(&error))).await;
                });
                true
            }
            Err(error) => self.desk.answer(ticket, Err(to_wire(&error))).await,
        }
    }
}

impl Desk {
    async fn say(&self, request_id: u64, body: Body) -> bool {
        self.out.send(Out::small(answer_frame(request_id, body, &Bytes::new()))).await.is_ok()
    }

    async fn refuse(&self, request_id: u64, refused: wire::Error) -> bool {
        self.shared.metrics.error_answer(refused.code());
        self.say(request_id, Body::Error(refused)).await
    }

    async fn fetch(&self, ticket: Ticket, mut fetch: wire::Fetch) {
        fetch.bytes_max = if fetch.bytes_max == 0 { FETCH_SIZE_MAX } else { fetch.bytes_max.min(FETCH_SIZE_MAX) };
        let mut answer = self.pass(Body::Fetch(fetch.clone())).await;
        let size = answer.as_ref().map_or(0, |(_, payload)| payload.len());
        if !self.has_room(size) {
            // What waits for room must not hold memory meanwhile: it is fetched again.
            drop(answer);
            self.wait_for_room(size).await;
            answer = self.pass(Body::Fetch(wire::Fetch { wait_ms: 0, bytes_max: size as u32, ..fetch })).await;
        }
        self.answer(ticket, answer).await;
    }

    async fn pass(&self, body: Body) -> Answer {
        self.client.request(body, Vec::new()).await.map_err(|error| to_wire(&error))
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
        has_credit && self.sending.available_permits() >= size.min(self.shared.config.limits.send_size)
    }

    async fn wait_for_room(&self, size: usize) {
        // Others may be faster afterwards; then the answer waits once more, with its bytes.
        if let Some(credit) = &self.credit {
            drop(credit.available.acquire_many(size.min(credit.window) as u32).await);
        }
        drop(self.sending.acquire_many(size.min(self.shared.config.limits.send_size) as u32).await);
    }

    /// Sends an answer when there is credit and room for its batches. False: the client is gone.
    async fn answer(&self, ticket: Ticket, answer: Answer) -> bool {
        if ticket.is_timed {
            self.shared.metrics.answered(ticket.started.elapsed());
        }
        let (body, payload) = match answer {
            Ok(answer) => answer,
            Err(refused) => {
                self.shared.metrics.error_answer(refused.code());
                (Body::Error(refused), Bytes::new())
            }
        };
        let mut room = None;
        if !payload.is_empty() {
            if let Some(credit) = &self.credit {
                match credit.available.acquire_many(payload.len().min(credit.window) as u32).await {
                    Ok(spent) => spent.forget(),
                    Err(_) => return false,
                }
            }
            let size = payload.len().min(self.shared.config.limits.send_size);
            room = self.sending.clone().acquire_many_owned(size as u32).await.ok();
        }
        let message = answer_frame(ticket.request_id, body, &payload);
        self.out.send(Out::Frame { message, room: [room, Some(ticket.place)] }).await.is_ok()
    }
}

/// The message of an answer, or of the error that it does not fit.
pub(crate) fn answer_frame(request_id: u64, body: Body, payload: &Bytes) -> Bytes {
    message(request_id, body, payload).unwrap_or_else(|cause| {
        let text = format!("the answer does not fit a frame: {cause}");
        let refused = Body::Error(error(ErrorCode::InternalError, text, ""));
        message(request_id, refused, &Bytes::new()).unwrap_or_default()
    })
}

pub(crate) fn error(code: ErrorCode, message: String, field: &str) -> wire::Error {
    wire::Error { code: code.into(), message, field: field.to_owned(), ..Default::default() }
}

fn overloaded(message: String) -> wire::Error {
    wire::Error { retry_after_ms: OUTAGE_RETRY_MS, ..error(ErrorCode::Overloaded, message, "") }
}

/// The wire's error for what the client of the Spine met. Everything that certainly was not done
/// and may be done later is `OVERLOADED`; addresses inside the cluster are not told.
fn to_wire(met: &Error) -> wire::Error {
    match met {
        Error::Server { code, message, field, details } => wire::Error {
            message: message.clone(),
            field: field.clone(),
            code: (*code).into(),
            leader_address: String::new(),
            ..details.as_ref().clone()
        },
        Error::LeaseLost => error(ErrorCode::LeaseLost, met.to_string(), ""),
        Error::Invalid { field, .. } => error(ErrorCode::ValidationError, met.to_string(), field),
        Error::BadData { .. } | Error::Gap { .. } => {
            tracing::error!(error = %met, "the Spine sent what cannot be");
            error(ErrorCode::InternalError, "the Spine sent what cannot be".to_owned(), "")
        }
        Error::Unreachable { .. } | Error::Lost { .. } | Error::TimedOut { .. } | Error::Closed => {
            tracing::debug!(error = %met, "the Spine did not answer");
            overloaded("the Spine did not answer in time".to_owned())
        }
    }
}
