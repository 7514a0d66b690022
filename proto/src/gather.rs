//! Frames on their way out, for vectored writes.

use std::{io::IoSlice, ops::Range};

use bytes::{BufMut, Bytes, BytesMut};

use crate::Batch;

/// Pieces below this size are cheaper to copy than to name, in bytes.
const COPY_SIZE_MAX: usize = 2 << 10;

/// Bytes in their order: small ones copied together, large ones where they are.
#[derive(Debug, Default)]
pub struct Gather {
    copied: BytesMut,
    pieces: Vec<Piece>,
    size: usize,
}

#[derive(Debug)]
enum Piece {
    Copied(Range<usize>),
    Shared(Bytes),
}

impl Gather {
    /// Adds a copy of `bytes`.
    pub fn copy(&mut self, bytes: &[u8]) {
        let start = self.copied.len();
        self.copied.put_slice(bytes);
        self.size += bytes.len();
        match self.pieces.last_mut() {
            Some(Piece::Copied(range)) => range.end = self.copied.len(),
            _ => self.pieces.push(Piece::Copied(start..self.copied.len())),
        }
    }

    /// Adds `bytes` as they are; few of them are copied.
    pub fn share(&mut self, bytes: &Bytes) {
        if bytes.len() <= COPY_SIZE_MAX {
            self.copy(bytes);
        } else {
            self.size += bytes.len();
            self.pieces.push(Piece::Shared(bytes.clone()));
        }
    }

    /// Adds a batch as it stands on the wire.
    pub fn batch(&mut self, batch: &Batch) {
        self.copy(&batch.header.encode());
        self.share(&batch.stamps);
        self.share(&batch.records);
    }

    /// Bytes gathered.
    #[must_use]
    pub fn size(&self) -> usize {
        self.size
    }

    /// Whether nothing was gathered.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.size == 0
    }

    /// What was gathered, in order.
    #[must_use]
    pub fn slices(&self) -> Vec<IoSlice<'_>> {
        let bytes = self.pieces.iter().map(|piece| match piece {
            Piece::Copied(range) => &self.copied[range.clone()],
            Piece::Shared(bytes) => bytes,
        });
        bytes.map(IoSlice::new).collect()
    }

    /// Forgets what was gathered and keeps the memory of small pieces.
    pub fn clear(&mut self) {
        self.copied.clear();
        self.pieces.clear();
        self.size = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_keep_their_order_and_large_ones_their_place() {
        let (small, large) = (Bytes::from(vec![1; 100]), Bytes::from(vec![2; 10_000]));
        let mut gather = Gather::default();
        for _ in 0..2 {
            gather.copy(b"head");
            gather.share(&small);
            gather.share(&large);
            gather.copy(b"tail");
            let slices = gather.slices();
            let bytes: Vec<u8> = slices.iter().flat_map(|slice| slice.iter().copied()).collect();
            assert_eq!(bytes, [b"head", &small[..], &large, b"tail"].concat());
            assert_eq!((slices.len(), gather.size()), (3, 10_108));
            assert_eq!(slices[1].as_ptr(), large.as_ptr());
            gather.clear();
            assert!(gather.is_empty() && gather.slices().is_empty());
        }
    }
}
