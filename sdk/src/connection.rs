//! One connection: pipelined requests, answers by request id, keepalive.
//!
//! ```text
//!   start() -> queue -> writer task -> carrier -> server
//!   Response <- pending requests <- reader task <- carrier
//! ```
//!
//! The two tasks end together; every request without an answer then learns that the
//! connection is lost.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use arqon_proto::{decode_frame, encode_frame, wire};
use bytes::Bytes;
use tokio::{
    sync::{Notify, mpsc, oneshot},
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
    outgoing: mpsc::UnboundedSender<Outgoing>,
    outgoing_size: AtomicUsize,
    room: Notify,
    opened: Instant,
    last_received_ms: AtomicU64,
}

#[derive(Default)]
struct Pending {
    next_id: u64,
    requests: HashMap<u64, oneshot::Sender<Result<Answer, Error>>>,
    lost: Option<Error>,
}

struct Outgoing {
    pieces: Vec<Bytes>,
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
    pub(crate) async fn open(address: &Address, options: &Options, tls: Option<&TlsConnector>) -> Result<Self, Error> {
        let (reader, writer, welcome) = dial(address, options, tls).await?;
        let (outgoing, queue) = mpsc::unbounded_channel();
        let shared = Arc::new(Shared {
            address: address.clone(),
            pending: Mutex::default(),
            outgoing,
            outgoing_size: AtomicUsize::new(0),
            room: Notify::new(),
            opened: Instant::now(),
            last_received_ms: AtomicU64::new(0),
        });
        let tasks = [
            tokio::spawn(read(shared.clone(), reader)).abort_handle(),
            tokio::spawn(write(shared.clone(), writer, queue, options.keepalive)).abort_handle(),
        ];
        tracing::debug!(server = %address, "connected");
        Ok(Self { address: address.clone(), welcome, shared, tasks })
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

    /// Queues a request without waiting. Requests leave in the order of these calls.
    pub(crate) fn start(&self, body: Body, payload: &[Bytes]) -> Result<Response, StartError> {
        let shared = &self.shared;
        let mut pending = shared.lock();
        if let Some(lost) = &pending.lost {
            return Err(StartError::Failed(lost.clone()));
        }
        if shared.is_full(&pending) {
            return Err(StartError::Full);
        }
        pending.next_id += 1;
        let id = pending.next_id;
        let outgoing = encode(id, body, payload).map_err(StartError::Failed)?;
        let (sender, receiver) = oneshot::channel();
        pending.requests.insert(id, sender);
        shared.queue(outgoing);
        drop(pending);
        Ok(Response { id, receiver, shared: shared.clone() })
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

    fn queue(&self, outgoing: Outgoing) {
        self.outgoing_size.fetch_add(outgoing.size, Ordering::Relaxed);
        // The writer ends only with the connection, and then every request is answered as lost.
        let _ = self.outgoing.send(outgoing);
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
        for sender in requests.into_values() {
            let _ = sender.send(Err(error.clone()));
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
            (Some(body), Some(sender)) => {
                // Nobody waits any more when the request timed out meanwhile.
                let _ = sender.send(Ok((body, payload)));
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

async fn write(
    shared: Arc<Shared>,
    mut writer: FrameWriter,
    mut queue: mpsc::UnboundedReceiver<Outgoing>,
    keepalive: Duration,
) {
    let reason = loop {
        if shared.lock().lost.is_some() {
            break String::new();
        }
        let Ok(first) = timeout(keepalive, queue.recv()).await else {
            let silence = shared.silence();
            if silence >= keepalive * 3 {
                break format!("silent for {} s", silence.as_secs());
            }
            if silence >= keepalive {
                match encode(0, Body::Ping(wire::Ping {}), &[]) {
                    Ok(ping) => shared.queue(ping),
                    Err(error) => break error.to_string(),
                }
            }
            continue;
        };
        let Some(first) = first else {
            break "it was closed on this side".to_owned();
        };
        let mut size = first.size;
        let mut frames = vec![first.pieces];
        while size < limits::WRITE_SIZE_MAX {
            let Ok(next) = queue.try_recv() else { break };
            size += next.size;
            frames.push(next.pieces);
        }
        let written = timeout(keepalive * 3, writer.write(frames)).await;
        shared.outgoing_size.fetch_sub(size, Ordering::Relaxed);
        shared.room.notify_waiters();
        match written {
            Ok(Ok(())) => {}
            Ok(Err(reason)) => break reason,
            Err(_) => break "the server does not read".to_owned(),
        }
        // A steady stream of requests must not hide that no answer ever comes.
        if shared.silence() >= keepalive * 3 && !shared.lock().requests.is_empty() {
            break "the server does not answer".to_owned();
        }
    };
    shared.lose(&reason);
    let _ = timeout(keepalive, writer.close()).await;
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
