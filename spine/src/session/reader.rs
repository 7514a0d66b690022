//! Frames off a stream.

use arqon_proto::{DecodeError, FrameBuffer, decode_frame, wire};
use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncReadExt};

use crate::error::invalid;

/// Why there is no next frame.
#[derive(Debug)]
pub(super) enum ReadError {
    /// The connection ended, between frames or within one.
    Closed,
    /// Bytes that are no frame, or one over its limit.
    Malformed(DecodeError),
}

impl ReadError {
    pub(super) fn into_wire(self) -> wire::Error {
        match self {
            Self::Closed => invalid("frame", "the connection ended"),
            Self::Malformed(cause) => invalid("frame", cause.to_string()),
        }
    }
}

/// The receiving half of a connection, with or without TLS.
pub(super) type Reader = Box<dyn AsyncRead + Send + Unpin>;

pub(super) struct FrameReader {
    stream: Reader,
    buffer: FrameBuffer,
}

impl FrameReader {
    pub(super) fn new(stream: Reader) -> Self {
        Self { stream, buffer: FrameBuffer::default() }
    }

    /// The next frame and its body. May be cancelled: what was read is kept.
    ///
    /// # Errors
    /// [`ReadError`]; a frame over `size_max` bytes is refused before it is received.
    pub(super) async fn next(&mut self, size_max: usize) -> Result<(wire::Frame, Bytes), ReadError> {
        loop {
            if let Some(frame) = self.buffer.next(size_max).map_err(ReadError::Malformed)? {
                return decode_frame(frame).map_err(ReadError::Malformed);
            }
            match self.stream.read_buf(&mut self.buffer.room()).await {
                Ok(0) | Err(_) => return Err(ReadError::Closed),
                Ok(_) => {}
            }
        }
    }
}
