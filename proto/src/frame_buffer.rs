//! Cutting a stream of bytes into frames, without I/O of its own.
//!
//! ```text
//!   stream ──► room() ──► front (reused) ──copied──► frames up to 64 KiB
//!                     └─► large (of its size) ─────► larger frames, received in place
//! ```
//!
//! A frame owns no more memory than its bytes: what keeps one small batch for long (the ring of
//! recent entries, a client that does not read) must not keep a whole receive buffer with it.

use bytes::{Buf, BufMut, Bytes, BytesMut, buf::Limit};

use crate::{DecodeError, frame_size};

/// Room of a fresh connection in bytes; a busy one gets more.
const ROOM_SIZE_MIN: usize = 4 << 10;

/// Received bytes that are not frames yet.
///
/// ```
/// # use arqon_proto::{FrameBuffer, encode_frame, wire::Frame};
/// # use bytes::BufMut;
/// # let sent = encode_frame(&Frame { request_id: 1, body: None }, 0)?;
/// let mut buffer = FrameBuffer::default();
/// assert_eq!(buffer.next(1 << 20)?, None);
/// buffer.room().put_slice(&sent); // or `stream.read_buf(&mut buffer.room()).await?`
/// assert_eq!(buffer.next(1 << 20)?, Some(sent));
/// # Ok::<_, arqon_proto::DecodeError>(())
/// ```
#[derive(Debug)]
pub struct FrameBuffer {
    front: BytesMut,
    room_size: usize,
    large: Option<Large>,
}

#[derive(Debug)]
struct Large {
    bytes: BytesMut,
    size: usize,
}

impl Default for FrameBuffer {
    fn default() -> Self {
        Self { front: BytesMut::new(), room_size: ROOM_SIZE_MIN, large: None }
    }
}

impl FrameBuffer {
    /// Frames up to this size, in bytes, are copied out of the room of a busy connection, which has
    /// the same size; larger ones get memory of their own when their first bytes are there.
    pub const SMALL_SIZE_MAX: usize = 64 << 10;

    /// The next whole frame. `None` when more bytes must come first, into [`Self::room`].
    ///
    /// # Errors
    /// A frame over `size_max` bytes or over the protocol's limit, as soon as its size is known.
    pub fn next(&mut self, size_max: usize) -> Result<Option<Bytes>, DecodeError> {
        if let Some(large) = self.large.take_if(|large| large.bytes.len() == large.size) {
            return Ok(Some(large.bytes.freeze()));
        }
        if self.large.is_some() {
            return Ok(None);
        }
        let Some(size) = frame_size(&self.front)? else { return Ok(None) };
        if size > size_max {
            return Err(DecodeError::TooLarge { field: "frame", size, limit: size_max });
        }
        if self.front.len() >= size {
            let frame = Bytes::copy_from_slice(&self.front[..size]);
            self.front.advance(size);
            return Ok(Some(frame));
        }
        if size > Self::SMALL_SIZE_MAX {
            let mut bytes = BytesMut::with_capacity(size);
            bytes.put_slice(&self.front);
            self.front.clear();
            self.large = Some(Large { bytes, size });
        }
        Ok(None)
    }

    /// Where received bytes go; has room after [`Self::next`] gave `None`.
    pub fn room(&mut self) -> Limit<&mut BytesMut> {
        if let Some(large) = &mut self.large {
            let missing = large.size - large.bytes.len();
            return (&mut large.bytes).limit(missing);
        }
        // A connection that fills its room has more to say.
        if self.front.len() >= self.room_size / 2 {
            self.room_size = (self.room_size * 4).min(Self::SMALL_SIZE_MAX);
        }
        let missing = self.room_size.max(self.front.len() + ROOM_SIZE_MIN) - self.front.len();
        self.front.reserve(missing);
        (&mut self.front).limit(missing)
    }

    /// Bytes received that no frame has taken yet.
    #[must_use]
    pub fn pending(&self) -> &[u8] {
        self.large.as_ref().map_or(&self.front, |large| &large.bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        encode_frame, limits,
        wire::{Frame, Ping, frame::Body},
    };

    fn frame(request_id: u64, body_size: usize) -> Vec<u8> {
        let head = encode_frame(&Frame { request_id, body: Some(Body::Ping(Ping {})) }, body_size).unwrap();
        let mut bytes = head.to_vec();
        bytes.extend((0..body_size).map(|at| (at % 251) as u8));
        bytes
    }

    /// Feeds `bytes` as a socket would, at most `step` at a time, and gives the frames.
    fn cut(bytes: &[u8], step: usize) -> Vec<Bytes> {
        let (mut buffer, mut rest, mut frames) = (FrameBuffer::default(), bytes, Vec::new());
        loop {
            match buffer.next(limits::FRAME_SIZE_MAX).unwrap() {
                Some(frame) => frames.push(frame),
                None if rest.is_empty() => break,
                None => {
                    let mut room = buffer.room();
                    let count = step.min(rest.len()).min(room.remaining_mut());
                    assert!(count > 0, "there is always room for more");
                    room.put_slice(&rest[..count]);
                    rest = &rest[count..];
                }
            }
        }
        assert!(buffer.pending().is_empty());
        frames
    }

    #[test]
    fn frames_of_all_sizes_come_out_whole_however_they_arrive() {
        let sizes = [0, 1, 4_000, 5_000, 70_000, 3, 65_530, 65_536, 300_000, 0, 200];
        let frames: Vec<_> = sizes.iter().zip(1..).map(|(size, id)| frame(id, *size)).collect();
        let stream = frames.concat();
        for step in [1, 7, 4_096, 100_000, usize::MAX] {
            assert_eq!(cut(&stream, step), frames, "{step} bytes at a time");
        }
    }

    /// A small batch that stays in memory must not keep the bytes of its neighbours.
    #[test]
    fn a_frame_owns_its_bytes_alone() {
        let stream = [frame(1, 100), frame(2, 100)].concat();
        for frame in cut(&stream, usize::MAX) {
            let size = frame.len();
            let owned = frame.try_into_mut().expect("nothing else shares its memory");
            assert!(owned.capacity() <= size + 64, "{} bytes for a frame of {size}", owned.capacity());
        }
    }

    #[test]
    fn a_frame_over_the_limit_is_refused_by_its_first_bytes() {
        let mut buffer = FrameBuffer::default();
        assert_eq!(buffer.next(1_000), Ok(None));
        buffer.room().put_slice(&frame(1, 1_000)[..8]);
        assert!(matches!(buffer.next(1_000), Err(DecodeError::TooLarge { field: "frame", limit: 1_000, .. })));
    }
}
