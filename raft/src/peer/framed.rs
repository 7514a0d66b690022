//! Reading and writing frames on a TCP stream.

use std::{io, io::IoSlice};

use arqon_proto::{Batch, FrameBuffer, Gather, decode_frame, encode_frame, limits, wire::PeerFrame};
use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Frames are gathered up to this size for one write, in bytes.
const WRITE_SIZE: usize = 1 << 20;
/// Slices of one write.
const SLICE_COUNT_MAX: usize = 256;

/// What follows a frame's header.
#[derive(Clone, Debug)]
pub(crate) enum Body {
    Bytes(Bytes),
    Batches(Vec<Batch>),
}

impl Body {
    pub(crate) const EMPTY: Self = Self::Bytes(Bytes::new());

    pub(crate) fn size(&self) -> usize {
        match self {
            Self::Bytes(bytes) => bytes.len(),
            Self::Batches(batches) => batches.iter().map(|batch| batch.header.batch_size()).sum(),
        }
    }
}

/// Splits a stream into frames.
pub(crate) struct FrameReader<R> {
    stream: R,
    buffer: FrameBuffer,
}

impl<R: AsyncRead + Unpin> FrameReader<R> {
    pub(crate) fn new(stream: R) -> Self {
        Self { stream, buffer: FrameBuffer::default() }
    }

    /// The next frame; `None` when the peer closed between two frames.
    pub(crate) async fn next(&mut self) -> io::Result<Option<(PeerFrame, Bytes)>> {
        loop {
            if let Some(frame) = self.buffer.next(limits::FRAME_SIZE_MAX).map_err(io::Error::other)? {
                return decode_frame(frame).map(Some).map_err(io::Error::other);
            }
            if self.stream.read_buf(&mut self.buffer.room()).await? == 0 {
                let between = self.buffer.pending().is_empty();
                return if between { Ok(None) } else { Err(io::ErrorKind::UnexpectedEof.into()) };
            }
        }
    }
}

/// Gathers frames and writes them together.
pub(crate) struct FrameWriter<W> {
    stream: W,
    gather: Gather,
}

impl<W: AsyncWrite + Unpin> FrameWriter<W> {
    pub(crate) fn new(stream: W) -> Self {
        Self { stream, gather: Gather::default() }
    }

    /// Adds a frame to what the next flush writes.
    pub(crate) fn push(&mut self, frame: &PeerFrame, body: &Body) -> io::Result<()> {
        self.gather.copy(&encode_frame(frame, body.size()).map_err(io::Error::other)?);
        match body {
            Body::Bytes(bytes) => self.gather.share(bytes),
            Body::Batches(batches) => batches.iter().for_each(|batch| self.gather.batch(batch)),
        }
        Ok(())
    }

    /// Whether what was pushed is enough for one write.
    pub(crate) fn is_full(&self) -> bool {
        self.gather.size() >= WRITE_SIZE
    }

    /// Writes what was pushed.
    pub(crate) async fn flush(&mut self) -> io::Result<()> {
        let mut slices = self.gather.slices();
        let mut rest = slices.as_mut_slice();
        while !rest.is_empty() {
            let count = rest.len().min(SLICE_COUNT_MAX);
            match self.stream.write_vectored(&rest[..count]).await? {
                0 => return Err(io::ErrorKind::WriteZero.into()),
                written => IoSlice::advance_slices(&mut rest, written),
            }
        }
        self.gather.clear();
        // TLS may hold back what the socket had no room for.
        self.stream.flush().await
    }
}
