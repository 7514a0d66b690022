//! Answers onto a stream: all that wait go out together, records without being copied.

use std::{io, io::IoSlice, sync::Arc, time::Duration};

use arqon_proto::{Batch, Gather, encode_frame, wire};
use bytes::Bytes;
use tokio::{
    io::{AsyncWrite, AsyncWriteExt},
    sync::{OwnedSemaphorePermit, mpsc},
    time::timeout,
};
use wire::frame::Body;

use crate::metrics::Metrics;

/// A client that takes no bytes for this time is dropped.
const WRITE_PATIENCE: Duration = Duration::from_secs(30);
/// Answers written together.
const GATHER_COUNT_MAX: usize = 128;
/// Slices of one write.
const SLICE_COUNT_MAX: usize = 256;

/// The sending half of a connection, with or without TLS.
pub(super) type Writer = Box<dyn AsyncWrite + Send + Unpin>;

/// One answer, with what it holds until it is sent.
pub(super) struct Outgoing {
    head: Bytes,
    batches: Vec<Batch>,
    _held: [Option<OwnedSemaphorePermit>; 2],
}

impl Outgoing {
    /// An answer without batches.
    pub(super) fn head(head: Bytes) -> Self {
        Self { head, batches: Vec::new(), _held: [None, None] }
    }

    /// An answer with its batches; `held` is given back when it has been sent.
    pub(super) fn new(head: Bytes, batches: Vec<Batch>, held: [Option<OwnedSemaphorePermit>; 2]) -> Self {
        Self { head, batches, _held: held }
    }
}

async fn write(gather: &Gather, stream: &mut Writer) -> io::Result<()> {
    let mut slices = gather.slices();
    let mut rest = slices.as_mut_slice();
    while !rest.is_empty() {
        let count = rest.len().min(SLICE_COUNT_MAX);
        let written = match timeout(WRITE_PATIENCE, stream.write_vectored(&rest[..count])).await {
            Ok(written) => written?,
            Err(_) => return Err(io::ErrorKind::TimedOut.into()),
        };
        if written == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        IoSlice::advance_slices(&mut rest, written);
    }
    // TLS may hold back what the socket had no room for.
    timeout(WRITE_PATIENCE, stream.flush()).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
}

/// Writes answers until all senders are gone or the client is.
pub(super) async fn run(mut stream: Writer, mut queue: mpsc::Receiver<Outgoing>, metrics: Arc<Metrics>) {
    let mut waiting = Vec::with_capacity(GATHER_COUNT_MAX);
    let mut gather = Gather::default();
    while queue.recv_many(&mut waiting, GATHER_COUNT_MAX).await > 0 {
        for answer in &waiting {
            gather.copy(&answer.head);
            answer.batches.iter().for_each(|batch| gather.batch(batch));
        }
        if let Err(error) = write(&gather, &mut stream).await {
            tracing::debug!(%error, "client does not take its answers");
            return;
        }
        metrics.sent_size.inc_by(gather.size() as u64);
        // Frees the room that the answers took.
        waiting.clear();
        gather.clear();
    }
    // The other side sees an orderly end; if it is gone already there is nothing to tell.
    timeout(WRITE_PATIENCE, stream.shutdown()).await.ok();
}

/// Writes one error to a client that has no session.
pub(super) async fn write_error(stream: &mut Writer, request_id: u64, error: wire::Error) -> io::Result<()> {
    let frame = wire::Frame { request_id, body: Some(Body::Error(error)) };
    let head = encode_frame(&frame, 0).map_err(io::Error::other)?;
    stream.write_all(&head).await?;
    stream.shutdown().await
}
