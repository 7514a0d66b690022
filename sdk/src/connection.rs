//! One connection: pipelined requests, answers by request id, keepalive.
//!
//! ```text
//!   start() -> outbox -> whoever finds the carrier free, else the writer task -> server
//!   reply   <- pending requests <- reader task <- carrier
//! ```
//!
//! A request is written by the thread that starts it, as far as the server takes it; the writer
//! task goes on where that stopped. Reader and writer end together; every request without an
//! answer then learns that the connection is lost.

use std::{
    collections::{HashMap, VecDeque},
    future::poll_fn,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    task::{Context, Poll, Waker},
    time::Duration,
};

use arqon_proto::{decode_frame, encode_frame, wire};
use bytes::Bytes;
use futures_util::future::BoxFuture;
use tokio::{
    sync::{Notify, oneshot},
    task::AbortHandle,
    time::{Instant, timeout, timeout_at},
};
use tokio_rustls::TlsConnector;
use wire::frame::Body;

use crate::{
    Error, Options,
    carrier::{FrameReader, FrameWriter, dial},
    limits,
    options::Address,
};

/// An answer: the body of its header, and the raw batches after it.
pub(crate) type Answer = (Body, Bytes);

/// An open connection to one server. Dropping it ends it.
pub(crate) struct Connection {
    address: Address,
    welcome: wire::Welcome,
    shared: Arc<Shared>,
    tasks: [AbortHandle; 2],
}

struct Shared {
    address: Address,
    pending: Mutex<Pending>,
    outbox: Mutex<Outbox>,
    outgoing_size: AtomicUsize,
    room: Notify,
    opened: Instant,
    last_received_ms: AtomicU64,
}

#[derive(Default)]
struct Pending {
    next_id: u64,
    requests: HashMap<u64, Reply>,
    lost: Option<Error>,
}

/// Where the answer to a request goes.
pub(crate) enum Reply {
    /// To somebody who waits for it.
    Waiter(oneshot::Sender<Result<Answer, Error>>),
    /// Into a call that must not block.
    Call(Box<dyn FnOnce(Result<Answer, Error>) + Send>),
}

impl Reply {
    fn give(self, answer: Result<Answer, Error>) {
        match self {
            // Nobody waits any more when the request timed out meanwhile.
            Self::Waiter(sender) => _ = sender.send(answer),
            Self::Call(call) => call(answer),
        }
    }
}

struct Outgoing {
    pieces: Vec<Bytes>,
    size: usize,
}

/// What is to be written, and the carrier when nobody writes.
struct Outbox {
    queue: VecDeque<Outgoing>,
    carrier: Option<Writing>,
    /// Wakes the writer task, once it has run.
    waker: Option<Waker>,
    /// Since when the server takes no bytes; the writer task goes on when it does.
    stalled: Option<Instant>,
    /// The writer task came while somebody else was writing.
    task_came: bool,
    /// The connection has ended.
    over: Option<String>,
    /// Nobody will write again.
    closed: bool,
}

impl Outbox {
    /// From here on nobody writes; gives the carrier unless somebody has it.
    fn close(&mut self) -> Option<Writing> {
        self.closed = true;
        self.carrier.take()
    }

    fn wake_task(&self) {
        if let Some(waker) = &self.waker {
            waker.wake_by_ref();
        }
    }

    /// Takes the carrier back; with `stalled` its task is woken as soon as the server takes bytes.
    fn put_back(&mut self, writing: Writing, stalled: Option<Instant>) {
        self.carrier = (!self.closed).then_some(writing);
        self.stalled = stalled;
        let task_came = std::mem::take(&mut self.task_came);
        if self.over.is_some() || (task_came && stalled.is_some()) {
            self.wake_task();
        }
    }
}

struct Writing {
    writer: FrameWriter,
    /// Bytes that it was given and that are not with the system yet.
    size: usize,
}

/// Why a request was not taken.
pub(crate) enum StartError {
    /// The queue is full; wait for [`Connection::room`].
    Full,
    /// It can never be sent, or the connection is gone.
    Failed(Error),
}

impl Connection {
    /// Dials `address`, shakes hands and starts the connection's tasks.
    pub(crate) fn open<'a>(
        address: &'a Address,
        options: &'a Options,
        tls: Option<&'a TlsConnector>,
    ) -> BoxFuture<'a, Result<Self, Error>> {
        Box::pin(async move {
            let (reader, writer, welcome) = dial(address, options, tls).await?;
            let outbox = Outbox {
                queue: VecDeque::new(),
                carrier: Some(Writing { writer, size: 0 }),
                waker: None,
                stalled: None,
                task_came: false,
                over: None,
                closed: false,
            };
            let shared = Arc::new(Shared {
                address: address.clone(),
                pending: Mutex::default(),
                outbox: Mutex::new(outbox),
                outgoing_size: AtomicUsize::new(0),
                room: Notify::new(),
                opened: Instant::now(),
                last_received_ms: AtomicU64::new(0),
            });
            let tasks = [
                tokio::spawn(read(shared.clone(), reader)).abort_handle(),
                tokio::spawn(write(shared.clone(), options.keepalive)).abort_handle(),
            ];
            tracing::debug!(server = %address, "connected");
            Ok(Self { address: address.clone(), welcome, shared, tasks })
        })
    }

    pub(crate) fn address(&self) -> &Address {
        &self.address
    }

    pub(crate) fn welcome(&self) -> &wire::Welcome {
        &self.welcome
    }

    pub(crate) fn is_alive(&self) -> bool {
        self.shared.lock().lost.is_none()
    }

    /// Sends a request without waiting, or queues it. Requests leave in the order of these calls.
    pub(crate) fn start(&self, body: Body, payload: &[Bytes]) -> Result<Response, StartError> {
        let (sender, receiver) = oneshot::channel();
        let id = self.start_for(Reply::Waiter(sender), body, payload)?;
        Ok(Response { id, receiver, shared: self.shared.clone() })
    }

    /// As [`Connection::start`], with a `reply` that is given the answer. Gives the request's id.
    pub(crate) fn start_for(&self, reply: Reply, body: Body, payload: &[Bytes]) -> Result<u64, StartError> {
        let shared = &self.shared;
        let mut pending = shared.lock();
        if let Some(lost) = &pending.lost {
            return Err(StartError::Failed(lost.clone()));
        }
        if shared.is_full(&pending) {
            return Err(StartError::Full);
        }
        let id = pending.next_id + 1;
        let outgoing = encode(id, body, payload).map_err(StartError::Failed)?;
        pending.next_id = id;
        pending.requests.insert(id, reply);
        drop(pending);
        shared.queue(outgoing);
        Ok(id)
    }

    /// Nobody wants the answer to request `id` any more.
    pub(crate) fn forget(&self, id: u64) {
        self.shared.lock().requests.remove(&id);
    }

    /// What a request without an answer in time is answered.
    pub(crate) fn no_answer(&self) -> Error {
        self.shared.no_answer()
    }

    /// Returns when [`Connection::start`] may have room again, or the connection is lost.
    pub(crate) async fn room(&self) {
        loop {
            let notified = self.shared.room.notified();
            tokio::pin!(notified);
            notified.as_mut().enable();
            let is_full = {
                let pending = self.shared.lock();
                pending.lost.is_none() && self.shared.is_full(&pending)
            };
            if !is_full {
                return;
            }
            notified.await;
        }
    }

    /// Sends a request and waits for its answer until `deadline`.
    pub(crate) async fn exchange(&self, body: Body, payload: &[Bytes], deadline: Instant) -> Result<Answer, Error> {
        loop {
            match self.start(body.clone(), payload) {
                Ok(response) => return response.wait(deadline).await,
                Err(StartError::Failed(error)) => return Err(error),
                Err(StartError::Full) => {
                    timeout_at(deadline, self.room()).await.map_err(|_| self.shared.no_answer())?;
                }
            }
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.shared.lose("it was closed on this side");
        for task in &self.tasks {
            task.abort();
        }
        drop(self.shared.lock_outbox().close());
    }
}

fn encode(id: u64, body: Body, payload: &[Bytes]) -> Result<Outgoing, Error> {
    let body_size = payload.iter().map(Bytes::len).sum();
    let frame = wire::Frame { request_id: id, body: Some(body) };
    let head = encode_frame(&frame, body_size).map_err(|error| Error::invalid("request", error.to_string()))?;
    let size = head.len() + body_size;
    let mut pieces = Vec::with_capacity(1 + payload.len());
    pieces.push(head);
    pieces.extend_from_slice(payload);
    Ok(Outgoing { pieces, size })
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_full(&self, pending: &Pending) -> bool {
        pending.requests.len() >= limits::REQUEST_COUNT_MAX
            || self.outgoing_size.load(Ordering::Relaxed) >= limits::OUTGOING_SIZE_MAX
    }

    fn lock_outbox(&self) -> MutexGuard<'_, Outbox> {
        self.outbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues a frame, and writes it unless somebody else writes or the server takes no bytes.
    fn queue(&self, outgoing: Outgoing) {
        self.outgoing_size.fetch_add(outgoing.size, Ordering::Relaxed);
        let mut outbox = self.lock_outbox();
        outbox.queue.push_back(outgoing);
        if outbox.stalled.is_some() {
            return;
        }
        let Some(waker) = outbox.waker.clone() else { return };
        let Some(writing) = outbox.carrier.take() else { return };
        drop(outbox);
        self.write_queued(writing, &mut Context::from_waker(&waker));
    }

    /// Writes until the queue is empty or the server takes no more; the writer task, which
    /// `context` wakes, then goes on.
    fn write_queued(&self, mut writing: Writing, context: &mut Context<'_>) {
        loop {
            let mut outbox = self.lock_outbox();
            while writing.size < limits::WRITE_SIZE_MAX {
                let Some(next) = outbox.queue.pop_front() else { break };
                writing.size += next.size;
                writing.writer.push(next.pieces);
            }
            if writing.size == 0 {
                return outbox.put_back(writing, None);
            }
            drop(outbox);
            match writing.writer.poll_write(context) {
                Poll::Ready(Ok(())) => {
                    self.outgoing_size.fetch_sub(writing.size, Ordering::Relaxed);
                    writing.size = 0;
                    self.room.notify_waiters();
                    self.lock_outbox().stalled = None;
                }
                Poll::Ready(Err(reason)) => {
                    let mut outbox = self.lock_outbox();
                    outbox.over.get_or_insert(reason);
                    return outbox.put_back(writing, None);
                }
                Poll::Pending => {
                    let mut outbox = self.lock_outbox();
                    let since = outbox.stalled.unwrap_or_else(Instant::now);
                    return outbox.put_back(writing, Some(since));
                }
            }
        }
    }

    /// The writer task's part; ready with the reason when the connection must end.
    fn poll_writing(&self, context: &mut Context<'_>) -> Poll<String> {
        let mut outbox = self.lock_outbox();
        outbox.waker = Some(context.waker().clone());
        if outbox.over.is_none() {
            let Some(writing) = outbox.carrier.take() else {
                outbox.task_came = true;
                return Poll::Pending;
            };
            drop(outbox);
            self.write_queued(writing, context);
            outbox = self.lock_outbox();
        }
        outbox.over.clone().map_or(Poll::Pending, Poll::Ready)
    }

    fn lose(&self, reason: &str) {
        let error = Error::Lost { server: self.address.to_string(), reason: reason.to_owned() };
        let requests = {
            let mut pending = self.lock();
            if pending.lost.is_some() {
                return;
            }
            pending.lost = Some(error.clone());
            std::mem::take(&mut pending.requests)
        };
        tracing::debug!(server = %self.address, reason, "connection lost");
        {
            let mut outbox = self.lock_outbox();
            outbox.over.get_or_insert_with(|| reason.to_owned());
            outbox.wake_task();
        }
        for reply in requests.into_values() {
            reply.give(Err(error.clone()));
        }
        self.room.notify_waiters();
    }

    fn silence(&self) -> Duration {
        let last = Duration::from_millis(self.last_received_ms.load(Ordering::Relaxed));
        self.opened.elapsed().saturating_sub(last)
    }

    fn no_answer(&self) -> Error {
        Error::Lost { server: self.address.to_string(), reason: "no answer in time".to_owned() }
    }

    fn received(&self, frame: Bytes) -> Result<(), String> {
        self.last_received_ms.store(self.opened.elapsed().as_millis() as u64, Ordering::Relaxed);
        let (frame, payload) = decode_frame::<wire::Frame>(frame).map_err(|error| error.to_string())?;
        let request = self.lock().requests.remove(&frame.request_id);
        match (frame.body, request) {
            (Some(Body::Ping(_)), _) => {
                let pong =
                    encode(frame.request_id, Body::Pong(wire::Pong {}), &[]).map_err(|error| error.to_string())?;
                self.queue(pong);
            }
            (Some(Body::Error(error)), None) if frame.request_id == 0 => {
                return Err(Error::from(error).to_string());
            }
            (Some(body), Some(reply)) => {
                reply.give(Ok((body, payload)));
                self.room.notify_waiters();
            }
            (Some(_), None) => {}
            (None, _) => return Err("the server sent a frame without a body".to_owned()),
        }
        Ok(())
    }
}

async fn read(shared: Arc<Shared>, mut reader: FrameReader) {
    let reason = loop {
        match reader.next().await.and_then(|frame| shared.received(frame)) {
            Ok(()) => {}
            Err(reason) => break reason,
        }
    };
    shared.lose(&reason);
}

async fn write(shared: Arc<Shared>, keepalive: Duration) {
    let mut last_ping = Duration::ZERO;
    let reason = loop {
        if let Ok(reason) = timeout(keepalive / 2, poll_fn(|context| shared.poll_writing(context))).await {
            break reason;
        }
        let stalled = shared.lock_outbox().stalled;
        if stalled.is_some_and(|since| since.elapsed() >= keepalive * 3) {
            break "the server does not read".to_owned();
        }
        let silence = shared.silence();
        if silence >= keepalive * 3 {
            break match shared.lock().requests.is_empty() {
                true => format!("silent for {} s", silence.as_secs()),
                false => "the server does not answer".to_owned(),
            };
        }
        if silence >= keepalive && shared.opened.elapsed() - last_ping >= keepalive {
            last_ping = shared.opened.elapsed();
            match encode(0, Body::Ping(wire::Ping {}), &[]) {
                Ok(ping) => shared.queue(ping),
                Err(error) => break error.to_string(),
            }
        }
    };
    shared.lose(&reason);
    let carrier = shared.lock_outbox().close();
    if let Some(mut writing) = carrier {
        let _ = timeout(keepalive, writing.writer.close()).await;
    }
}

/// An answer on its way. Dropping it forgets the request.
pub(crate) struct Response {
    id: u64,
    receiver: oneshot::Receiver<Result<Answer, Error>>,
    shared: Arc<Shared>,
}

impl Response {
    /// Waits for the answer.
    ///
    /// # Errors
    /// [`Error::Lost`] when the connection ended or `deadline` passed: the outcome is unknown.
    pub(crate) async fn wait(mut self, deadline: Instant) -> Result<Answer, Error> {
        match timeout_at(deadline, &mut self.receiver).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) | Err(_) => Err(self.shared.no_answer()),
        }
    }
}

impl Drop for Response {
    fn drop(&mut self) {
        self.shared.lock().requests.remove(&self.id);
    }
}
