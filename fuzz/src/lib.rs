//! What must hold for any bytes whatever, from a disk or from a network.
//!
//! Each target takes bytes and panics when a rule is broken. Two callers have them: libFuzzer through
//! `fuzz_targets/`, for hours (`fuzz/run`), and a seeded mutator in `storage/tests/fuzz/`, for
//! seconds with every run of the tests.
//!
//! A checksum stops nearly every mutation at the door. So each target takes its bytes as they are, and
//! once more with the checksums made right: what stands behind the door is then looked at too.

mod batch;
mod frame;
mod log;

pub use batch::{batch, records, stamps};
pub use frame::frame;
pub use log::{index, recovery};

/// A target: it panics when the bytes break a rule.
pub type Target = fn(&[u8]);

/// Every target by its name, which is also that of its corpus.
pub const TARGETS: [(&str, Target); 6] = [
    ("batch", batch),
    ("records", records),
    ("stamps", stamps),
    ("frame", frame),
    ("recovery", recovery),
    ("index", index),
];

/// Takes bytes off the front, zeroes when there are none left.
struct Source<'a>(&'a [u8]);

impl<'a> Source<'a> {
    fn byte(&mut self) -> u8 {
        self.take(1).first().copied().unwrap_or(0)
    }

    fn number(&mut self) -> usize {
        usize::from(u16::from_le_bytes([self.byte(), self.byte()]))
    }

    /// At most `size` bytes.
    fn take(&mut self, size: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(size.min(self.0.len()));
        self.0 = rest;
        taken
    }

    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}
