//! Answers onto a stream: all that wait go out together, records without being copied.

use std::{io, io::IoSlice, sync::Arc, time::Duration};

use arqon_proto::{Batch, Gather, encode_frame, wire};
use bytes::Bytes;
use tokio::{
    io::{AsyncWrite, AsyncWriteExt},
    sync::mpsc,
    time::{Instant, timeout},
};
use wire::frame::Body;

use super::{
    budget::{Budget, Room},
    requests::Outstanding,
};
use crate::metrics::Metrics;

/// How often a client that takes no bytes is looked at.
const WRITE_TICK: Duration = Duration::from_secs(1);
/// How long the end of a session may take to be told.
const SHUTDOWN_PATIENCE: Duration = Duration::from_secs(30);
/// Answers written together.
const GATHER_COUNT_MAX: usize = 128;
/// Answers are written when there are so many bytes of them, and then more are gathered.
const GATHER_SIZE: usize = 1 << 20;
/// Memory of small pieces that is kept for the next answers, in bytes.
const GATHER_KEPT_SIZE_MAX: usize = 64 << 10;
/// Slices of one write.
const SLICE_COUNT_MAX: usize = 256;

/// The sending half of a connection, with or without TLS.
pub(super) type Writer = Box<dyn AsyncWrite + Send + Unpin>;

/// One answer, with what it holds until it is sent.
pub(super) struct Outgoing {
    head: Bytes,
    batches: Vec<Batch>,
    held: Held,
}

type Held = (Option<Room>, Option<Outstanding>);

impl Outgoing {
    /// An answer without batches.
    pub(super) fn head(head: Bytes) -> Self {
        Self { head, batches: Vec::new(), held: (None, None) }
    }

    /// An answer with its batches; `held` is given back when it has been sent.
    pub(super) fn new(head: Bytes, batches: Vec<Batch>, held: Held) -> Self {
        Self { head, batches, held }
    }
}

// Waits for an operation until the client has stalled.
async fn patiently<T>(budget: &Budget, operation: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    tokio::pin!(operation);
    let began = Instant::now();
    loop {
        match timeout(WRITE_TICK, &mut operation).await {
            Ok(ended) => return ended,
            Err(_) if began.elapsed() > budget.sending_stall_max() => return Err(io::ErrorKind::TimedOut.into()),
            Err(_) => {}
        }
    }
}

async fn write(gather: &Gather, stream: &mut Writer, budget: &Budget) -> io::Result<()> {
    let mut slices = gather.slices();
    let mut rest = slices.as_mut_slice();
    while !rest.is_empty() {
        let count = rest.len().min(SLICE_COUNT_MAX);
        let written = patiently(budget, stream.write_vectored(&rest[..count])).await?;
        if written == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        IoSlice::advance_slices(&mut rest, written);
    }
    // TLS may hold back what the socket had no room for.
    patiently(budget, stream.flush()).await
}

/// Writes answers until all senders are gone or the client is.
pub(super) async fn run(
    mut stream: Writer,
    mut queue: mpsc::Receiver<Outgoing>,
    metrics: Arc<Metrics>,
    budget: Arc<Budget>,
) {
    let mut waiting = Vec::with_capacity(GATHER_COUNT_MAX);
    let mut gather = Gather::default();
    let mut held = Vec::new();
    while queue.recv_many(&mut waiting, GATHER_COUNT_MAX).await > 0 {
        let mut answers = waiting.drain(..).peekable();
        while let Some(answer) = answers.next() {
            gather.copy(&answer.head);
            // Small batches are copied: each goes at once, or there would be two of it.
            answer.batches.into_iter().for_each(|batch| gather.batch(&batch));
            held.push(answer.held);
            if gather.size() < GATHER_SIZE && answers.peek().is_some() {
                continue;
            }
            if let Err(error) = write(&gather, &mut stream, &budget).await {
                tracing::debug!(%error, "client does not take its answers");
                return;
            }
            metrics.sent_size.inc_by(gather.size() as u64);
            if gather.size() > GATHER_KEPT_SIZE_MAX {
                gather = Gather::default();
            } else {
                gather.clear();
            }
            // Frees the room that the answers took.
            held.clear();
        }
    }
    // The other side sees an orderly end; if it is gone already there is nothing to tell.
    timeout(SHUTDOWN_PATIENCE, stream.shutdown()).await.ok();
}

/// Writes one error to a client that has no session.
pub(super) async fn write_error(stream: &mut Writer, request_id: u64, error: wire::Error) -> io::Result<()> {
    let frame = wire::Frame { request_id, body: Some(Body::Error(error)) };
    let head = encode_frame(&frame, 0).map_err(io::Error::other)?;
    stream.write_all(&head).await?;
    stream.shutdown().await
}
