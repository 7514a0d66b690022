//! The client port: frames over TCP, with or without TLS.
//!
//! ```text
//!   accept -> handshake -> reader loop --produce--> Partition::submit, in order
//!                             |   \                       | outcome
//!                             |    '--others--> a task each
//!                             |                           v
//!                          Credit ----------> answers wait for credit and room
//!                                                         |
//!                                       writer task <-- queue, bounded
//! ```
//!
//! What is bounded: requests outstanding, bytes of frames partly received, of requests not answered
//! and of answers not sent (see `budget`: per connection and of all of them), and the time for which
//! a client may be silent, not go on with a frame, or not read.

mod budget;
mod reader;
mod requests;
mod writer;

use std::{io, sync::Arc, time::Duration};

use arqon_proto::{CLIENT_VERSIONS, Session, TOKEN_SIZE_MAX, encode_frame, limits, wire};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Semaphore, mpsc, watch},
    task::JoinSet,
    time::{Instant, sleep_until, timeout, timeout_at},
};
use tokio_rustls::TlsAcceptor;
use wire::{ErrorCode, frame::Body};

use crate::{
    broker::Broker,
    error::{error, invalid},
};
use budget::Budget;
use reader::{FrameReader, ReadError, Reader};
use requests::Requests;
use writer::{Outgoing, Writer};

/// A first frame is a token and little else, in bytes.
const HELLO_SIZE_MAX: usize = TOKEN_SIZE_MAX + (4 << 10);
/// Answers that wait for the writer.
const ANSWER_COUNT_MAX: usize = 1_024;
/// A silent client is asked for a sign of life after this time, and dropped after twice that.
const SILENCE_MAX: Duration = Duration::from_secs(30);
/// How long a session that ends may take to send what is on its way.
const DRAIN_PATIENCE: Duration = Duration::from_secs(5);
const ACCEPT_RETRY_DELAY: Duration = Duration::from_millis(100);
const HANDSHAKE_PATIENCE: Duration = Duration::from_millis(limits::HANDSHAKE_MS_MAX);
/// A token that never ends would overflow the clock.
const SESSION_LENGTH_MAX: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// Accepts clients until the node stops, then waits for their sessions to drain.
pub(crate) async fn serve(broker: Arc<Broker>, listener: TcpListener, tls: Option<TlsAcceptor>) {
    let budget = Arc::new(Budget::new());
    let slots = Arc::new(Semaphore::new(limits::CONNECTION_COUNT_MAX));
    let mut stopping = broker.stopping.subscribe();
    let mut sessions = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = sessions.join_next() => continue,
            _ = stopping.wait_for(|stopping| *stopping) => break,
        };
        let (stream, from) = match accepted {
            Ok(accepted) => accepted,
            // Out of descriptors, for example: wait for connections to go rather than spin.
            Err(error) => {
                tracing::warn!(%error, "cannot accept a client");
                tokio::time::sleep(ACCEPT_RETRY_DELAY).await;
                continue;
            }
        };
        let Ok(slot) = slots.clone().try_acquire_owned() else {
            broker.metrics.refused_connections.inc();
            // Closed without a word: words would cost what has run out.
            continue;
        };
        let (broker, budget, tls) = (broker.clone(), budget.clone(), tls.clone());
        sessions.spawn(async move {
            broker.metrics.connections.inc();
            let end = run(&broker, &budget, stream, tls.as_ref()).await;
            broker.metrics.connections.dec();
            tracing::debug!(%from, end, "client session ended");
            drop(slot);
        });
    }
    drop(listener);
    while sessions.join_next().await.is_some() {}
}

// Why the session ended is for the log alone.
async fn run(broker: &Arc<Broker>, budget: &Arc<Budget>, stream: TcpStream, tls: Option<&TlsAcceptor>) -> &'static str {
    let deadline = Instant::now() + HANDSHAKE_PATIENCE;
    let (read_half, mut write_half) = match timeout_at(deadline, halves(stream, tls)).await {
        Ok(Ok(halves)) => halves,
        Ok(Err(error)) => {
            broker.metrics.refused_handshakes.inc();
            tracing::debug!(%error, "no TLS with a client");
            return "no TLS handshake";
        }
        Err(_) => return "no handshake in time",
    };
    let mut reader = FrameReader::new(read_half, budget.clone());
    let greeted = timeout_at(deadline, handshake(broker, &mut reader)).await;
    let (session, hello, version) = match greeted {
        Ok(Ok(greeted)) => greeted,
        Ok(Err(refused)) => {
            broker.metrics.refused_handshakes.inc();
            let farewell = timeout(HANDSHAKE_PATIENCE, writer::write_error(&mut write_half, 0, refused)).await;
            return if farewell.is_ok() { "refused" } else { "refused, and it does not read" };
        }
        Err(_) => return "no handshake in time",
    };
    let (answers, queue) = mpsc::channel(ANSWER_COUNT_MAX);
    let writer = tokio::spawn(writer::run(write_half, queue, broker.metrics.clone(), budget.clone()));
    let lifetime =
        Duration::from_secs(session.expires_at.saturating_sub(broker.health.now_seconds())).min(SESSION_LENGTH_MAX);
    let ends_at = Instant::now() + lifetime;
    let welcome = welcome(broker, &session, version);
    let requests = Requests::new(broker.clone(), budget.clone(), session, hello.credit_bytes, answers.clone());
    let mut end = "the client is gone";
    if send(&answers, 0, Body::Welcome(welcome)).await {
        let (farewell, reason) = receive(&requests, &mut reader, ends_at, broker.stopping.subscribe()).await;
        end = reason;
        if let Some(refused) = farewell {
            send(&answers, 0, Body::Error(refused)).await;
        }
    }
    // The writer ends when the last answer on its way has been sent.
    drop((requests, answers));
    let abort = writer.abort_handle();
    if timeout(DRAIN_PATIENCE, writer).await.is_err() {
        abort.abort();
    }
    end
}

async fn halves(stream: TcpStream, tls: Option<&TlsAcceptor>) -> io::Result<(Reader, Writer)> {
    stream.set_nodelay(true)?;
    let Some(tls) = tls else {
        let (reader, writer) = stream.into_split();
        return Ok((Box::new(reader), Box::new(writer)));
    };
    let (reader, writer) = tokio::io::split(tls.accept(stream).await?);
    Ok((Box::new(reader), Box::new(writer)))
}

async fn send(answers: &mpsc::Sender<Outgoing>, request_id: u64, body: Body) -> bool {
    let frame = wire::Frame { request_id, body: Some(body) };
    match encode_frame(&frame, 0) {
        Ok(head) => timeout(DRAIN_PATIENCE, answers.send(Outgoing::head(head))).await.is_ok_and(|sent| sent.is_ok()),
        Err(_) => false,
    }
}

async fn handshake(broker: &Broker, reader: &mut FrameReader) -> Result<(Session, wire::Hello, u32), wire::Error> {
    let received = reader.next(HELLO_SIZE_MAX, HANDSHAKE_PATIENCE).await.map_err(ReadError::into_wire)?;
    let Some(Body::Hello(hello)) = received.frame.body else {
        return Err(error(ErrorCode::AuthenticationFailed, "the first frame must be Hello"));
    };
    let version = CLIENT_VERSIONS.greet(&hello)?;
    let session = broker.authenticate(&hello.token)?;
    Ok((session, hello, version))
}

fn welcome(broker: &Broker, session: &Session, version: u32) -> wire::Welcome {
    wire::Welcome {
        version,
        cluster: broker.cluster.clone(),
        node: broker.node.0,
        tenant: session.tenant.clone(),
        frame_size_max: limits::FRAME_SIZE_MAX as u64,
        payload_size_max: limits::PAYLOAD_SIZE_MAX as u64,
    }
}

// Reads requests until the session ends: what to tell the client last, and the log.
async fn receive(
    requests: &Requests,
    reader: &mut FrameReader,
    ends_at: Instant,
    mut stopping: watch::Receiver<bool>,
) -> (Option<wire::Error>, &'static str) {
    let expiry = sleep_until(ends_at);
    tokio::pin!(expiry);
    let mut asked = false;
    loop {
        let received = tokio::select! {
            received = reader.next(limits::FRAME_SIZE_MAX, SILENCE_MAX) => received,
            () = &mut expiry => {
                return (Some(error(ErrorCode::AuthenticationFailed, "the token has expired")), "the token has expired");
            }
            _ = stopping.wait_for(|stopping| *stopping) => return (None, "the node is shutting down"),
        };
        let received = match received {
            Ok(received) => received,
            Err(ReadError::Closed) => return (None, "the client closed it"),
            Err(ReadError::Silent) if asked => return (None, "the client is silent"),
            Err(ReadError::Silent) => {
                asked = true;
                if !requests.send(0, Body::Ping(wire::Ping {})).await {
                    return (None, "the client is gone");
                }
                continue;
            }
            Err(ReadError::Stalled) => {
                return (Some(ReadError::Stalled.into_wire()), "the client does not go on with its frame");
            }
            Err(refused) => return (Some(refused.into_wire()), "malformed frame"),
        };
        asked = false;
        let request_id = received.frame.request_id;
        if received.frame.body.is_none() {
            let refused = invalid("body", "the request is empty or newer than this server");
            if !requests.send(request_id, Body::Error(refused)).await {
                return (None, "the client is gone");
            }
            continue;
        };
        if !requests.take(received).await {
            return (None, "the client is gone");
        }
    }
}
