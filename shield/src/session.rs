//! One client's session: a reader that takes frames in order, and a writer that sends answers.

use std::{convert::Infallible, sync::Arc, time::Duration};

use arqon_proto::{CLIENT_VERSIONS, DecodeError, Session, decode_frame, encode_frame, limits, wire};
use bytes::{Bytes, BytesMut};
use futures_util::{
    SinkExt, StreamExt,
    stream::{SplitSink, SplitStream},
};
use tokio::{
    sync::{OwnedSemaphorePermit, mpsc, watch},
    time::{Instant, sleep_until, timeout},
};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{self, Message},
};
use wire::frame::Body;

use crate::{
    close::Close,
    requests::{Requests, answer_frame},
    server::{Shared, now_seconds},
    tls::Stream,
};

type Socket = WebSocketStream<Box<dyn Stream>>;

/// Answers that wait for the writer.
const ANSWER_COUNT_MAX: usize = 256;
/// The writer flushes after so many bytes at the latest.
const FLUSH_SIZE: usize = 256 << 10;
/// A token that never ends would overflow the clock.
const SESSION_TIME_MAX: Duration = Duration::from_secs(10 * 365 * 24 * 3_600);

/// What the writer sends.
pub(crate) enum Out {
    /// One frame, with the room that it takes until it is sent.
    Frame {
        message: Bytes,
        room: [Option<OwnedSemaphorePermit>; 2],
    },
    Ping,
    Close(Close),
}

impl Out {
    /// A frame that takes no room worth counting.
    pub(crate) fn small(message: Bytes) -> Self {
        Self::Frame { message, room: [None, None] }
    }
}

/// Why the reader stops.
enum End {
    /// The client is gone or has said goodbye.
    Gone,
    /// The client is told why.
    Close(Close),
}

/// Runs the session of an admitted client until either side ends it.
pub(crate) async fn run(
    shared: &Arc<Shared>,
    socket: Socket,
    token: String,
    session: Session,
    mut stopping: watch::Receiver<bool>,
) {
    let lasts = Duration::from_secs(session.expires_at.saturating_sub(now_seconds())).min(SESSION_TIME_MAX);
    let expiry = Instant::now() + lasts;
    let (sink, messages) = socket.split();
    let (out, queue) = mpsc::channel(ANSWER_COUNT_MAX);
    let mut writer = tokio::spawn(write(shared.clone(), sink, queue));
    let reader = Reader { shared: shared.clone(), messages, out: out.clone() };
    let end = tokio::select! {
        biased;
        _ = &mut writer => return,
        () = sleep_until(expiry) => End::Close(Close::Expired),
        _ = stopping.wait_for(|stopping| *stopping) => End::Close(Close::Stopping),
        end = reader.run(token, session) => end,
    };
    // The writer ends with the queue; it also answers the client's goodbye.
    let goodbye = async {
        if let End::Close(close) = end {
            shared.metrics.closed(close.reason());
            // Fails when the writer has given up on the client.
            let _ = out.send(Out::Close(close)).await;
        }
        drop(out);
        let _ = (&mut writer).await;
    };
    if timeout(shared.config.limits.write(), goodbye).await.is_err() {
        writer.abort();
    }
}

struct Reader {
    shared: Arc<Shared>,
    messages: SplitStream<Socket>,
    out: mpsc::Sender<Out>,
}

impl Reader {
    async fn run(mut self, token: String, session: Session) -> End {
        match self.serve(token, session).await {
            Err(end) => end,
        }
    }

    async fn serve(&mut self, token: String, session: Session) -> Result<Infallible, End> {
        let handshake = self.shared.config.limits.handshake();
        let (hello, version) = timeout(handshake, self.hello()).await.unwrap_or(Err(End::Close(Close::Silent)))?;
        let tenant = session.tenant.clone();
        let mut requests =
            Requests::new(self.shared.clone(), token, session, &hello, self.out.clone()).map_err(|_| End::Gone)?;
        let welcome = wire::Welcome {
            version,
            cluster: String::new(),
            node: 0,
            tenant,
            frame_size_max: self.shared.config.limits.message_size as u64,
            payload_size_max: limits::PAYLOAD_SIZE_MAX as u64,
        };
        self.say(0, Body::Welcome(welcome)).await?;
        loop {
            let (frame, payload) = self.frame().await?;
            let Some(body) = frame.body else { return Err(End::Close(Close::NotAFrame)) };
            if !requests.take(frame.request_id, body, payload).await {
                return Err(End::Gone);
            }
        }
    }

    async fn hello(&mut self) -> Result<(wire::Hello, u32), End> {
        let (frame, _) = self.frame().await?;
        let Some(Body::Hello(hello)) = frame.body else { return Err(End::Close(Close::NotAFrame)) };
        match CLIENT_VERSIONS.greet(&hello) {
            Ok(version) => Ok((hello, version)),
            Err(refused) => {
                self.say(frame.request_id, Body::Error(refused)).await?;
                Err(End::Close(Close::NotAFrame))
            }
        }
    }

    async fn say(&self, request_id: u64, body: Body) -> Result<(), End> {
        let message = answer_frame(request_id, body, &Bytes::new());
        self.out.send(Out::small(message)).await.map_err(|_| End::Gone)
    }

    /// The next frame; pings a silent client meanwhile.
    async fn frame(&mut self) -> Result<(wire::Frame, Bytes), End> {
        let mut is_pinged = false;
        loop {
            let message = match timeout(self.shared.config.limits.ping(), self.messages.next()).await {
                Ok(message) => message,
                Err(_) if is_pinged => return Err(End::Close(Close::Silent)),
                Err(_) => {
                    is_pinged = true;
                    self.out.send(Out::Ping).await.map_err(|_| End::Gone)?;
                    continue;
                }
            };
            is_pinged = false;
            match message {
                Some(Ok(Message::Binary(message))) => {
                    self.shared.metrics.received_frames.inc();
                    self.shared.metrics.received_size.inc_by(message.len() as u64);
                    return decode_frame(message).map_err(|bad| {
                        End::Close(match bad {
                            DecodeError::Protobuf { .. } => Close::BadHeader,
                            _ => Close::NotAFrame,
                        })
                    });
                }
                Some(Ok(Message::Text(_))) => return Err(End::Close(Close::Text)),
                Some(Ok(Message::Close(_))) | None => return Err(End::Gone),
                Some(Ok(_)) => {}
                Some(Err(tungstenite::Error::Capacity(_))) => return Err(End::Close(Close::TooLarge)),
                Some(Err(tungstenite::Error::Protocol(_) | tungstenite::Error::AttackAttempt)) => {
                    return Err(End::Close(Close::NotAFrame));
                }
                // Text that is not UTF-8 is text first of all.
                Some(Err(tungstenite::Error::Utf8(_))) => return Err(End::Close(Close::Text)),
                Some(Err(_)) => return Err(End::Gone),
            }
        }
    }
}

/// Sends what is queued; ends after a close, when the client takes nothing any more, or with the
/// session.
async fn write(shared: Arc<Shared>, mut sink: SplitSink<Socket, Message>, mut queue: mpsc::Receiver<Out>) {
    let patience = shared.config.limits.write();
    let metrics = &shared.metrics;
    while let Some(first) = queue.recv().await {
        let mut next = Some(first);
        let mut size = 0;
        let mut room = Vec::new();
        let mut closes = false;
        let burst = async {
            while let Some(out) = next.take() {
                let message = match out {
                    Out::Frame { message, room: taken } => {
                        metrics.sent_frames.inc();
                        metrics.sent_size.inc_by(message.len() as u64);
                        size += message.len();
                        room.push(taken);
                        Message::Binary(message)
                    }
                    Out::Ping => Message::Ping(Bytes::new()),
                    Out::Close(close) => {
                        closes = true;
                        Message::Close(Some(close.frame()))
                    }
                };
                sink.feed(message).await?;
                if !closes && size < FLUSH_SIZE {
                    next = queue.try_recv().ok();
                }
            }
            sink.flush().await
        };
        match timeout(patience, burst).await {
            Ok(Ok(())) if !closes => {}
            Ok(_) => break,
            Err(_) => {
                metrics.slow_clients.inc();
                return;
            }
        }
    }
    // Also answers a goodbye of the client. It may be gone already: there is nobody to tell.
    let _ = timeout(patience, sink.close()).await;
}

/// Puts a header and a body into one message.
///
/// # Errors
/// A header or frame over its limit.
pub(crate) fn message(request_id: u64, body: Body, payload: &Bytes) -> Result<Bytes, DecodeError> {
    let head = encode_frame(&wire::Frame { request_id, body: Some(body) }, payload.len())?;
    if payload.is_empty() {
        return Ok(head);
    }
    let mut message = BytesMut::with_capacity(head.len() + payload.len());
    message.extend_from_slice(&head);
    message.extend_from_slice(payload);
    Ok(message.freeze())
}
