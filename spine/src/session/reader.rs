//! Frames off a stream.

use std::{sync::Arc, time::Duration};

use arqon_proto::{DecodeError, FrameBuffer, decode_frame, frame_size, wire};
use bytes::Bytes;
use tokio::{
    io::{AsyncRead, AsyncReadExt},
    sync::OwnedSemaphorePermit,
    time::{Instant, timeout},
};

use super::budget::Budget;
use crate::error::invalid;

/// A frame that comes slower than this, in bytes per second, is not waited for.
const RATE_MIN: u64 = 256 << 10;
/// A frame may be that late.
const LATE_MAX: Duration = Duration::from_secs(30);
/// How often the progress of a frame is looked at when nothing comes.
const PROGRESS_TICK: Duration = Duration::from_secs(1);

/// Why there is no next frame.
#[derive(Debug)]
pub(super) enum ReadError {
    /// The connection ended, between frames or within one.
    Closed,
    /// Nothing came.
    Silent,
    /// The rest of a frame does not come, or too slowly.
    Stalled,
    /// Bytes that are no frame, or one over its limit.
    Malformed(DecodeError),
}

impl ReadError {
    pub(super) fn into_wire(self) -> wire::Error {
        match self {
            Self::Closed => invalid("frame", "the connection ended"),
            Self::Silent => invalid("frame", "nothing came in time"),
            Self::Stalled => invalid("frame", "the rest of the frame did not come in time"),
            Self::Malformed(cause) => invalid("frame", cause.to_string()),
        }
    }
}

/// The receiving half of a connection, with or without TLS.
pub(super) type Reader = Box<dyn AsyncRead + Send + Unpin>;

/// One frame.
pub(super) struct Received {
    pub frame: wire::Frame,
    pub body: Bytes,
    /// Bytes of all of it.
    pub size: usize,
    /// The memory of a large frame, to be held until it is counted elsewhere.
    pub memory: Option<OwnedSemaphorePermit>,
}

pub(super) struct FrameReader {
    stream: Reader,
    buffer: FrameBuffer,
    budget: Arc<Budget>,
}

impl FrameReader {
    pub(super) fn new(stream: Reader, budget: Arc<Budget>) -> Self {
        Self { stream, buffer: FrameBuffer::default(), budget }
    }

    /// The next frame. Waits before a large one until there is memory for it.
    ///
    /// # Errors
    /// [`ReadError`]; a frame over `size_max` bytes is refused before it is received. After
    /// [`ReadError::Silent`], when no byte came for `silence_max`, it may be called again.
    pub(super) async fn next(&mut self, size_max: usize, silence_max: Duration) -> Result<Received, ReadError> {
        let mut memory = None;
        let mut progress = Progress::begin();
        loop {
            let size = frame_size(self.buffer.pending()).map_err(ReadError::Malformed)?;
            if let Some(size) = size.filter(|size| (FrameBuffer::SMALL_SIZE_MAX + 1..=size_max).contains(size))
                && memory.is_none()
            {
                memory = self.budget.frame(size).await;
                progress = Progress::begin();
            }
            if let Some(bytes) = self.buffer.next(size_max).map_err(ReadError::Malformed)? {
                let size = bytes.len();
                let (frame, body) = decode_frame(bytes).map_err(ReadError::Malformed)?;
                return Ok(Received { frame, body, size, memory });
            }
            let is_partial = !self.buffer.pending().is_empty();
            let patience = if is_partial { PROGRESS_TICK } else { silence_max };
            match timeout(patience, self.stream.read_buf(&mut self.buffer.room())).await {
                Ok(Ok(0) | Err(_)) => return Err(ReadError::Closed),
                Ok(Ok(count)) => progress.grow(count),
                Err(_) if !is_partial => {
                    // A client that rests needs no more than a fresh one.
                    self.buffer = FrameBuffer::default();
                    return Err(ReadError::Silent);
                }
                Err(_) => {}
            }
            if is_partial && progress.is_stalled(self.budget.frame_stall_max()) {
                return Err(ReadError::Stalled);
            }
        }
    }
}

// How a frame gets on.
struct Progress {
    began: Instant,
    grew: Instant,
    size: u64,
}

impl Progress {
    fn begin() -> Self {
        let now = Instant::now();
        Self { began: now, grew: now, size: 0 }
    }

    fn grow(&mut self, count: usize) {
        self.grew = Instant::now();
        // The first bytes may come after any time.
        if self.size == 0 {
            self.began = self.grew;
        }
        self.size += count as u64;
    }

    fn is_stalled(&self, stall_max: Duration) -> bool {
        let time_max = LATE_MAX + Duration::from_millis(self.size * 1_000 / RATE_MIN);
        self.grew.elapsed() > stall_max || self.began.elapsed() > time_max
    }
}
