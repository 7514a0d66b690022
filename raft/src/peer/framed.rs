//! Reading and writing frames on a TCP stream.

use std::io;

use arqon_proto::{Batch, decode_frame, encode_frame, frame_size, wire::PeerFrame};
use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

const READ_BUFFER_SIZE: usize = 256 << 10;

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

/// Splits a stream into frames; bodies share the read buffer's memory.
pub(crate) struct FrameReader<R> {
    stream: R,
    buffer: BytesMut,
}

impl<R: AsyncRead + Unpin> FrameReader<R> {
    pub(crate) fn new(stream: R) -> Self {
        Self { stream, buffer: BytesMut::with_capacity(READ_BUFFER_SIZE) }
    }

    /// The next frame; `None` when the peer closed between two frames.
    pub(crate) async fn next(&mut self) -> io::Result<Option<(PeerFrame, Bytes)>> {
        loop {
            let size = frame_size(&self.buffer).map_err(io::Error::other)?;
            if let Some(size) = size
                && self.buffer.len() >= size
            {
                let frame = self.buffer.split_to(size).freeze();
                return decode_frame(frame).map(Some).map_err(io::Error::other);
            }
            let missing = size.map_or(READ_BUFFER_SIZE, |size| size - self.buffer.len());
            self.buffer.reserve(missing.max(READ_BUFFER_SIZE));
            if self.stream.read_buf(&mut self.buffer).await? == 0 {
                return if self.buffer.is_empty() { Ok(None) } else { Err(io::ErrorKind::UnexpectedEof.into()) };
            }
        }
    }
}

/// Writes one frame into `stream`; the caller flushes.
pub(crate) async fn write_frame<W: AsyncWrite + Unpin>(
    stream: &mut W,
    frame: &PeerFrame,
    body: &Body,
) -> io::Result<()> {
    let head = encode_frame(frame, body.size()).map_err(io::Error::other)?;
    stream.write_all(&head).await?;
    match body {
        Body::Bytes(bytes) => stream.write_all(bytes).await?,
        Body::Batches(batches) => {
            for batch in batches {
                stream.write_all(&batch.header.encode()).await?;
                stream.write_all(&batch.stamps).await?;
                stream.write_all(&batch.records).await?;
            }
        }
    }
    Ok(())
}
