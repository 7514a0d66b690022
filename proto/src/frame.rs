//! Frames: what travels on TCP between clients, nodes and peers, and as one binary message
//! on WebSocket.
//!
//! ```text
//!     0  4  size of the rest of the frame, little-endian
//!     4  4  size of the header, little-endian
//!     8  h  header: protobuf `Frame` (clients) or `PeerFrame` (nodes)
//!   8+h  .  body: raw record batches, or nothing
//! ```

use bytes::{Buf, BufMut, Bytes, BytesMut};
use prost::Message;

use crate::{DecodeError, limits};

/// Bytes before the header.
const FRAME_PREFIX_SIZE: usize = 8;

/// Size of the whole frame that starts with `prefix` (at least 4 bytes), once known.
///
/// # Errors
/// A size over [`limits::FRAME_SIZE_MAX`] or too small to hold the header's size.
pub fn frame_size(prefix: &[u8]) -> Result<Option<usize>, DecodeError> {
    let Some(size) = prefix.first_chunk::<4>() else {
        return Ok(None);
    };
    let size = u32::from_le_bytes(*size) as usize + 4;
    if size > limits::FRAME_SIZE_MAX {
        return Err(DecodeError::TooLarge { field: "frame", size, limit: limits::FRAME_SIZE_MAX });
    }
    if size < FRAME_PREFIX_SIZE {
        return Err(DecodeError::Value { field: "frame size", value: size as u64 });
    }
    Ok(Some(size))
}

/// Prefix and header of a frame whose body has `body_size` bytes; the body follows as it is.
///
/// # Errors
/// A header or frame over its limit.
pub fn encode_frame(header: &impl Message, body_size: usize) -> Result<Bytes, DecodeError> {
    let header_size = header.encoded_len();
    if header_size > limits::FRAME_HEADER_SIZE_MAX {
        return Err(DecodeError::TooLarge {
            field: "frame header",
            size: header_size,
            limit: limits::FRAME_HEADER_SIZE_MAX,
        });
    }
    let size = FRAME_PREFIX_SIZE + header_size + body_size;
    if size > limits::FRAME_SIZE_MAX {
        return Err(DecodeError::TooLarge { field: "frame", size, limit: limits::FRAME_SIZE_MAX });
    }
    let mut out = BytesMut::with_capacity(FRAME_PREFIX_SIZE + header_size);
    out.put_u32_le((size - 4) as u32);
    out.put_u32_le(header_size as u32);
    header.encode(&mut out).expect("the buffer grows");
    Ok(out.freeze())
}

/// Splits one whole frame into its header and body.
///
/// # Errors
/// Sizes that do not add up to the bytes given, or a header that is not protobuf.
pub fn decode_frame<M: Message + Default>(mut frame: Bytes) -> Result<(M, Bytes), DecodeError> {
    let have = frame.len();
    if frame_size(&frame)? != Some(have) {
        return Err(DecodeError::Truncated { what: "frame", need: FRAME_PREFIX_SIZE, have });
    }
    frame.advance(4);
    let header_size = frame.get_u32_le() as usize;
    if header_size > limits::FRAME_HEADER_SIZE_MAX {
        return Err(DecodeError::TooLarge {
            field: "frame header",
            size: header_size,
            limit: limits::FRAME_HEADER_SIZE_MAX,
        });
    }
    if header_size > frame.len() {
        return Err(DecodeError::Truncated { what: "frame header", need: header_size, have: frame.len() });
    }
    let header = M::decode(frame.split_to(header_size)).map_err(|_| DecodeError::Protobuf { what: "frame header" })?;
    Ok((header, frame))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::{Frame, Ping, frame::Body};

    #[test]
    fn a_frame_survives_the_trip_and_a_cut_one_is_refused() {
        let frame = Frame { request_id: 7, body: Some(Body::Ping(Ping {})) };
        let mut bytes = encode_frame(&frame, 3).unwrap().to_vec();
        bytes.extend_from_slice(b"abc");
        let whole = Bytes::from(bytes);
        assert_eq!(frame_size(&whole[..4]).unwrap(), Some(whole.len()));
        let (decoded, body) = decode_frame::<Frame>(whole.clone()).unwrap();
        assert_eq!((decoded, &body[..]), (frame, &b"abc"[..]));
        for end in 0..whole.len() {
            assert!(decode_frame::<Frame>(whole.slice(..end)).is_err(), "cut at {end}");
        }
    }

    #[test]
    fn sizes_over_the_limit_are_refused_before_anything_is_allocated() {
        assert!(frame_size(&u32::MAX.to_le_bytes()).is_err());
        assert!(frame_size(&0u32.to_le_bytes()).is_err());
        assert!(encode_frame(&Frame::default(), limits::FRAME_SIZE_MAX).is_err());
    }
}
