//! Frames off a stream. Bodies share the buffer that they were received in.

use arqon_proto::{DecodeError, FRAME_PREFIX_SIZE, decode_frame, frame_size, wire};
use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt};

use crate::error::invalid;

/// Room that is made for one read, in bytes.
const READ_SIZE: usize = 64 << 10;

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
    buffer: BytesMut,
}

impl FrameReader {
    pub(super) fn new(stream: Reader) -> Self {
        Self { stream, buffer: BytesMut::new() }
    }

    /// The next frame and its body. May be cancelled: what was read is kept.
    ///
    /// # Errors
    /// [`ReadError`]; a frame over `size_max` bytes is refused before it is received.
    pub(super) async fn next(&mut self, size_max: usize) -> Result<(wire::Frame, Bytes), ReadError> {
        loop {
            let missing = match frame_size(&self.buffer).map_err(ReadError::Malformed)? {
                Some(size) if size > size_max => {
                    return Err(ReadError::Malformed(DecodeError::TooLarge { field: "frame", size, limit: size_max }));
                }
                Some(size) if self.buffer.len() >= size => {
                    let frame = self.buffer.split_to(size).freeze();
                    return decode_frame(frame).map_err(ReadError::Malformed);
                }
                Some(size) => size - self.buffer.len(),
                None => FRAME_PREFIX_SIZE,
            };
            // A small frame comes with others; a large one gets just the room that it needs.
            self.buffer.reserve(missing.max(READ_SIZE));
            match self.stream.read_buf(&mut self.buffer).await {
                Ok(0) | Err(_) => return Err(ReadError::Closed),
                Ok(_) => {}
            }
        }
    }
}
