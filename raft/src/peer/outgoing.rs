//! One connection to a peer: requests out, answers in, matched by request id.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError, atomic::AtomicU64, atomic::Ordering::Relaxed},
    time::Duration,
};

use arqon_proto::{NodeId, limits, wire::PeerFrame, wire::peer_frame::Body as Message};
use bytes::Bytes;
use tokio::{
    net::TcpStream,
    sync::{Notify, Semaphore, mpsc, oneshot, watch},
    time::{Instant, timeout},
};

use super::{
    Failure, PeerTls, Secret,
    framed::{Body, FrameReader, FrameWriter},
    secure,
};

/// Requests waiting to be written; further ones wait.
const QUEUE_COUNT_MAX: usize = 1024;
/// Bytes of bodies written and not yet answered, per connection.
const IN_FLIGHT_SIZE_MAX: usize = 32 << 20;
/// From here on, answers that nobody waits for any more are swept out on every request.
const WAITING_COUNT_SWEEP: usize = 4096;
const BACKOFF_MS_MIN: u64 = 25;

type Answer = Result<(Message, Bytes), Failure>;

struct Request {
    frame: PeerFrame,
    body: Body,
    reply: oneshot::Sender<Answer>,
}

/// Where and as whom to connect.
pub(crate) struct Target {
    pub node: NodeId,
    pub bulk: bool,
    pub own_node: NodeId,
    pub secret: Secret,
    pub tls: Option<PeerTls>,
    pub address: watch::Receiver<String>,
}

/// Handle of a connection task; the task ends when the last handle is dropped.
pub(crate) struct Outgoing {
    queue: mpsc::Sender<Request>,
    in_flight: Arc<Semaphore>,
    next_id: AtomicU64,
    reset: Arc<Notify>,
    connected: watch::Receiver<bool>,
}

/// An answer on its way. Holds its share of the bytes in flight.
pub(crate) struct Pending {
    reply: oneshot::Receiver<Answer>,
    _permit: tokio::sync::OwnedSemaphorePermit,
}

impl Pending {
    pub(crate) async fn answer(self, patience: Duration) -> Answer {
        match timeout(patience, self.reply).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) => Err(Failure::Unreachable("connection was closed".into())),
            Err(_) => Err(Failure::TimedOut),
        }
    }
}

impl Outgoing {
    pub(crate) fn start(target: Target) -> Self {
        let (queue, requests) = mpsc::channel(QUEUE_COUNT_MAX);
        let (connected_tx, connected) = watch::channel(false);
        let reset = Arc::new(Notify::new());
        tokio::spawn(run(target, requests, connected_tx, reset.clone()));
        let in_flight = Arc::new(Semaphore::new(IN_FLIGHT_SIZE_MAX));
        Self { queue, in_flight, next_id: AtomicU64::new(1), reset, connected }
    }

    /// Queues a request; calls that were awaited in order are sent in order.
    pub(crate) async fn submit(&self, mut frame: PeerFrame, body: Body) -> Result<Pending, Failure> {
        let size = u32::try_from(body.size().clamp(1, IN_FLIGHT_SIZE_MAX)).unwrap_or(u32::MAX);
        let closed = || Failure::Unreachable("transport is stopped".into());
        let permit = self.in_flight.clone().acquire_many_owned(size).await.map_err(|_| closed())?;
        frame.request_id = self.next_id.fetch_add(1, Relaxed);
        let (reply, answer) = oneshot::channel();
        self.queue.send(Request { frame, body, reply }).await.map_err(|_| closed())?;
        Ok(Pending { reply: answer, _permit: permit })
    }

    /// Sends a request and waits for its answer.
    pub(crate) async fn call(&self, frame: PeerFrame, body: Body, patience: Duration) -> Answer {
        let started = Instant::now();
        let pending = timeout(patience, self.submit(frame, body)).await.map_err(|_| Failure::TimedOut)??;
        pending.answer(patience.saturating_sub(started.elapsed())).await
    }

    /// Drops the connection with everything queued on it, and dials again.
    pub(crate) fn reset(&self) {
        self.reset.notify_one();
    }

    pub(crate) fn is_connected(&self) -> bool {
        *self.connected.borrow()
    }
}

async fn run(
    mut target: Target,
    mut requests: mpsc::Receiver<Request>,
    connected: watch::Sender<bool>,
    reset: Arc<Notify>,
) {
    let mut backoff_ms = BACKOFF_MS_MIN;
    let mut last_reason = String::new();
    loop {
        let patience = Duration::from_millis(limits::HANDSHAKE_MS_MAX);
        let reason = match timeout(patience, dial(&target)).await {
            Ok(Ok(link)) => {
                tracing::debug!(node = target.node.0, bulk = target.bulk, version = link.version, "peer connected");
                backoff_ms = BACKOFF_MS_MIN;
                last_reason.clear();
                connected.send_replace(true);
                let end = converse(link, &mut requests, &reset).await;
                connected.send_replace(false);
                match end {
                    Some(reason) => reason,
                    None => return,
                }
            }
            Ok(Err(error)) => error.to_string(),
            Err(_) => "handshake timed out".into(),
        };
        if reason != last_reason {
            tracing::info!(node = target.node.0, bulk = target.bulk, %reason, "peer not connected");
            last_reason.clone_from(&reason);
        }
        // Fail fast while the peer is away: a request that waits is worth less than an error.
        let wake = Instant::now() + Duration::from_millis(backoff_ms);
        backoff_ms = (backoff_ms * 2).min(limits::REDIAL_MS_MAX);
        loop {
            tokio::select! {
                request = requests.recv() => match request {
                    Some(request) => drop(request.reply.send(Err(Failure::Unreachable(reason.clone())))),
                    None => return,
                },
                () = tokio::time::sleep_until(wake) => break,
                changed = target.address.changed() => if changed.is_ok() { break } else { return },
            }
        }
    }
}

struct Link {
    version: u32,
    reader: FrameReader<secure::Reader>,
    writer: FrameWriter<secure::Writer>,
}

async fn dial(target: &Target) -> std::io::Result<Link> {
    let address = target.address.borrow().clone();
    if address.is_empty() {
        return Err(std::io::Error::other("its address is not known"));
    }
    let stream = TcpStream::connect(&address).await?;
    let (reader, writer) = secure::connect(stream, &address, target.tls.as_ref()).await?;
    let mut reader = FrameReader::new(reader);
    let mut writer = FrameWriter::new(writer);
    let version = target.secret.dial(&mut reader, &mut writer, target.own_node, target.node, target.bulk).await?;
    Ok(Link { version, reader, writer })
}

#[derive(Default)]
struct Waiting(Mutex<HashMap<u64, oneshot::Sender<Answer>>>);

impl Waiting {
    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<u64, oneshot::Sender<Answer>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn insert(&self, id: u64, reply: oneshot::Sender<Answer>) {
        let mut waiting = self.lock();
        if waiting.len() >= WAITING_COUNT_SWEEP {
            waiting.retain(|_, reply| !reply.is_closed());
        }
        waiting.insert(id, reply);
    }
}

/// Runs one connection until it breaks (the reason) or all handles are gone (`None`).
async fn converse(link: Link, requests: &mut mpsc::Receiver<Request>, reset: &Notify) -> Option<String> {
    let waiting = Arc::new(Waiting::default());
    let Link { mut reader, mut writer, .. } = link;
    let reading = async {
        loop {
            match reader.next().await {
                Ok(Some((frame, body))) => answer(&waiting, frame, body),
                Ok(None) => return "connection closed by the peer".to_owned(),
                Err(error) => return error.to_string(),
            }
        }
    };
    let writing = async {
        loop {
            let request = match requests.try_recv() {
                Ok(request) => request,
                Err(mpsc::error::TryRecvError::Disconnected) => return None,
                Err(mpsc::error::TryRecvError::Empty) => {
                    if let Err(error) = writer.flush().await {
                        return Some(error.to_string());
                    }
                    requests.recv().await?
                }
            };
            if request.reply.is_closed() {
                continue;
            }
            waiting.insert(request.frame.request_id, request.reply);
            let mut written = writer.push(&request.frame, &request.body);
            if writer.is_full() {
                written = written.and(writer.flush().await);
            }
            if let Err(error) = written {
                return Some(error.to_string());
            }
        }
    };
    let end = tokio::select! {
        reason = reading => Some(reason),
        end = writing => end,
        () = reset.notified() => Some("connection reset after a time-out".into()),
    };
    let reason = end.clone().unwrap_or_else(|| "transport is stopped".into());
    for (_, reply) in waiting.lock().drain() {
        // A caller that gave up does not care.
        drop(reply.send(Err(Failure::Unreachable(reason.clone()))));
    }
    end
}

fn answer(waiting: &Waiting, frame: PeerFrame, body: Bytes) {
    let Some(reply) = waiting.lock().remove(&frame.request_id) else { return };
    let answer = match frame.body {
        Some(Message::Error(error)) => Err(Failure::Refused { code: error.code(), message: error.message }),
        Some(message) => Ok((message, body)),
        None => Err(Failure::Protocol("an empty frame")),
    };
    drop(reply.send(answer));
}
