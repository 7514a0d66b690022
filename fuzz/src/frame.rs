//! Frames, whole and in pieces.

use arqon_proto::{FrameBuffer, decode_frame, encode_frame, frame_size, limits, wire};
use bytes::{Buf, BufMut, Bytes, BytesMut};

use super::Source;

/// Largest frame that the reader here takes, so that large ones are met too.
const SIZE_MAX: usize = 100_000;

/// Any bytes as a stream of frames: a frame that comes in pieces is the same as one that is whole, and a
/// size over the limit is refused before anything is kept for it.
pub fn frame(data: &[u8]) {
    let mut source = Source(data);
    let piece = 1 + usize::from(source.byte());
    decode(source.0);

    let mut whole = Vec::new();
    let mut rest = source.0;
    let refused = loop {
        match frame_size(rest) {
            Err(_) => break true,
            Ok(Some(size)) if size > SIZE_MAX => break true,
            Ok(Some(size)) if size <= rest.len() => {
                whole.push(Bytes::copy_from_slice(&rest[..size]));
                rest = &rest[size..];
            }
            Ok(_) => break false,
        }
    };

    let mut buffer = FrameBuffer::default();
    let mut found = Vec::new();
    let mut pieces = source.0;
    let ended = 'stream: loop {
        loop {
            match buffer.next(SIZE_MAX) {
                Ok(Some(frame)) => found.push(frame),
                Ok(None) => break,
                Err(_) => break 'stream true,
            }
        }
        if pieces.is_empty() {
            break false;
        }
        let mut room = buffer.room();
        let size = room.remaining_mut().min(piece).min(pieces.len());
        assert!(size > 0, "a buffer that asks for more has room for it");
        room.put_slice(&pieces[..size]);
        pieces = &pieces[size..];
    };
    assert_eq!(found, whole);
    assert_eq!(ended, refused);
    if !ended {
        assert_eq!(buffer.pending(), rest);
    }
    found.iter().for_each(|frame| decode(frame));
}

fn decode(bytes: &[u8]) {
    let bytes = Bytes::copy_from_slice(bytes);
    if let Ok((header, body)) = decode_frame::<wire::Frame>(bytes.clone()) {
        assert!(bytes.len() <= limits::FRAME_SIZE_MAX);
        let mut again =
            BytesMut::from(encode_frame(&header, body.len()).expect("a header that came in goes out").chunk());
        again.extend_from_slice(&body);
        assert_eq!(decode_frame::<wire::Frame>(again.freeze()), Ok((header, body)));
    }
    let _ = decode_frame::<wire::PeerFrame>(bytes);
}
