//! Payloads that cannot be compressed, differ from each other and can be checked on read.

use rand::{RngExt, SeedableRng, rngs::StdRng};

/// Shortest payload, in bytes: an index and something to check.
pub const SIZE_MIN: usize = 16;
/// Bytes of the index at the front.
const INDEX_SIZE: usize = 8;
/// Random bytes that payloads are cut from.
const POOL_SIZE: usize = 1 << 20;

/// Makes and checks payloads of one size.
///
/// ```text
///   0  8  index of the message, little-endian
///   8  .  random bytes of the pool, from a place that follows from the index
/// ```
pub struct Payloads {
    size: usize,
    pool: Vec<u8>,
}

impl Payloads {
    /// Payloads of `size` bytes, at least [`SIZE_MIN`], from `seed`.
    pub fn new(seed: u64, size: usize) -> Self {
        assert!(size >= SIZE_MIN, "payload size {size} is below {SIZE_MIN}");
        let mut pool = vec![0; POOL_SIZE + size];
        StdRng::seed_from_u64(seed).fill(&mut pool[..]);
        Self { size, pool }
    }

    fn random(&self, index: u64) -> &[u8] {
        // A step that shares no factor with the pool's size visits every place.
        let begin = (index.wrapping_mul(7_919) % POOL_SIZE as u64) as usize;
        &self.pool[begin..begin + self.size - INDEX_SIZE]
    }

    /// Bytes of each payload.
    pub fn size(&self) -> usize {
        self.size
    }

    /// The payload of message `index`.
    pub fn make(&self, index: u64) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.size);
        self.append(index, &mut out);
        out
    }

    /// Appends the payload of message `index`.
    pub fn append(&self, index: u64, out: &mut Vec<u8>) {
        out.extend_from_slice(&index.to_le_bytes());
        out.extend_from_slice(self.random(index));
    }

    /// The index of a payload, unless a byte of it is not as made.
    pub fn check(&self, payload: &[u8]) -> Option<u64> {
        let (index, random) = payload.split_first_chunk::<INDEX_SIZE>()?;
        let index = u64::from_le_bytes(*index);
        (random == self.random(index)).then_some(index)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_payload_tells_its_index_and_any_change() {
        let payloads = Payloads::new(1, 128);
        for index in [0, 1, 4_711, u64::MAX] {
            let mut payload = payloads.make(index);
            assert_eq!(payload.len(), 128);
            assert_eq!(payloads.check(&payload), Some(index));
            payload[127] ^= 1;
            assert_eq!(payloads.check(&payload), None);
            assert_eq!(payloads.check(&payload[..127]), None);
        }
        assert_ne!(payloads.make(1)[8..], payloads.make(2)[8..]);
        assert_eq!(Payloads::new(2, 128).check(&payloads.make(5)), None, "another seed, other bytes");
    }
}
