//! Memory from which whole blocks are written.

use std::io;
use std::sync::OnceLock;

use memmap2::{Mmap, MmapMut};

use crate::layout::BLOCK_SIZE;

/// Most zeroes written at once.
const ZEROES_SIZE: usize = 1 << 20;

/// Whole blocks, page-aligned and zero at first. Takes no memory before it is used.
///
/// # Errors
/// The system has no memory.
pub(crate) fn buffer(size: usize) -> io::Result<MmapMut> {
    assert!(size > 0 && size.is_multiple_of(BLOCK_SIZE), "a buffer of blocks has whole blocks");
    MmapMut::map_anon(size)
}

/// Up to `size` zeroes in whole blocks, as many as may be written at once. Never written to, so
/// that all of it is the one zero page of the system.
///
/// # Errors
/// The system has no memory.
pub(crate) fn zeroes(size: u64) -> io::Result<&'static [u8]> {
    static ZEROES: OnceLock<Mmap> = OnceLock::new();
    let zeroes = match ZEROES.get() {
        Some(zeroes) => zeroes,
        None => {
            let fresh = buffer(ZEROES_SIZE)?.make_read_only()?;
            ZEROES.get_or_init(|| fresh)
        }
    };
    Ok(&zeroes[..usize::try_from(size).unwrap_or(usize::MAX).min(ZEROES_SIZE)])
}

/// The first block boundary at or after `at`.
pub(crate) fn round_up(at: u64) -> u64 {
    at.next_multiple_of(BLOCK_SIZE as u64)
}

/// The last block boundary at or before `at`.
pub(crate) fn round_down(at: u64) -> u64 {
    at - at % BLOCK_SIZE as u64
}
