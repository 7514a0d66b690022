//! Answers onto a stream: all that wait go out together, records without being copied.

use std::{io, io::IoSlice, ops::Range, sync::Arc, time::Duration};

use arqon_proto::{Batch, encode_frame, wire};
use bytes::{BufMut, Bytes, BytesMut};
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
const SLICE_COUNT_MAX: usize = 64;
/// Pieces below this size are cheaper to copy than to name, in bytes.
const COPY_SIZE_MAX: usize = 2 << 10;

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

enum Piece {
    Copied(Range<usize>),
    Shared(Bytes),
}

// Bytes in their order: small ones gathered in one buffer, large ones where they are.
#[derive(Default)]
struct Pieces {
    copied: BytesMut,
    pieces: Vec<Piece>,
}

impl Pieces {
    fn copy(&mut self, bytes: &[u8]) {
        let start = self.copied.len();
        self.copied.put_slice(bytes);
        match self.pieces.last_mut() {
            Some(Piece::Copied(range)) => range.end = self.copied.len(),
            _ => self.pieces.push(Piece::Copied(start..self.copied.len())),
        }
    }

    fn share(&mut self, bytes: &Bytes) {
        if bytes.len() <= COPY_SIZE_MAX {
            self.copy(bytes);
        } else {
            self.pieces.push(Piece::Shared(bytes.clone()));
        }
    }

    fn push(&mut self, answer: &Outgoing) {
        self.copy(&answer.head);
        for batch in &answer.batches {
            self.copy(&batch.header.encode());
            self.share(&batch.stamps);
            self.share(&batch.records);
        }
    }

    fn bytes<'a>(&'a self, piece: &'a Piece) -> &'a [u8] {
        match piece {
            Piece::Copied(range) => &self.copied[range.clone()],
            Piece::Shared(bytes) => bytes,
        }
    }

    async fn write(&self, stream: &mut Writer) -> io::Result<usize> {
        let mut slices: Vec<IoSlice<'_>> = self.pieces.iter().map(|piece| IoSlice::new(self.bytes(piece))).collect();
        let size = slices.iter().map(|slice| slice.len()).sum();
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
        match timeout(WRITE_PATIENCE, stream.flush()).await {
            Ok(flushed) => flushed.map(|()| size),
            Err(_) => Err(io::ErrorKind::TimedOut.into()),
        }
    }
}

/// Writes answers until all senders are gone or the client is.
pub(super) async fn run(mut stream: Writer, mut queue: mpsc::Receiver<Outgoing>, metrics: Arc<Metrics>) {
    let mut waiting = Vec::with_capacity(GATHER_COUNT_MAX);
    let mut pieces = Pieces::default();
    while queue.recv_many(&mut waiting, GATHER_COUNT_MAX).await > 0 {
        for answer in &waiting {
            pieces.push(answer);
        }
        match pieces.write(&mut stream).await {
            Ok(size) => metrics.sent_size.inc_by(size as u64),
            Err(error) => {
                tracing::debug!(%error, "client does not take its answers");
                return;
            }
        };
        // Frees the room that the answers took.
        waiting.clear();
        pieces.pieces.clear();
        pieces.copied.clear();
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
