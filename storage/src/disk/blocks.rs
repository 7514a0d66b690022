//! Memory from which whole blocks are written.

use std::io;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use bytes::Bytes;
use memmap2::{Mmap, MmapMut};

use crate::layout::BLOCK_SIZE;

/// Most zeroes written at once.
const ZEROES_SIZE: usize = 1 << 20;

/// Bytes of one read past the page cache, at most: 1 MiB of batches, and the way to the first of
/// them from a point of the index.
pub(crate) const READ_SIZE_MAX: usize = (1 << 20) + (128 << 10);
/// Buffers for such reads, of the whole process; in use until the last slice of them is gone.
const READ_BUFFER_COUNT_MAX: usize = 64;

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

/// The buffers for reads, used over and over: memory that is touched for the first time costs
/// more than the read.
#[derive(Default)]
struct ReadBuffers {
    free: Vec<MmapMut>,
    made_count: usize,
}

fn read_buffers() -> MutexGuard<'static, ReadBuffers> {
    static BUFFERS: Mutex<ReadBuffers> = Mutex::new(ReadBuffers { free: Vec::new(), made_count: 0 });
    BUFFERS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A buffer that goes back when it is dropped.
pub(crate) struct ReadBuffer(Option<MmapMut>);

impl ReadBuffer {
    /// A buffer of [`READ_SIZE_MAX`] bytes; `None` when all are in use.
    pub fn take() -> Option<Self> {
        let mut buffers = read_buffers();
        if let Some(buffer) = buffers.free.pop() {
            return Some(Self(Some(buffer)));
        }
        if buffers.made_count == READ_BUFFER_COUNT_MAX {
            return None;
        }
        let fresh = buffer(READ_SIZE_MAX).ok()?;
        buffers.made_count += 1;
        Some(Self(Some(fresh)))
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        self.0.as_deref_mut().unwrap_or_default()
    }

    /// Its first `size` bytes; it goes back when the last slice of them is gone.
    pub fn into_bytes(self, size: usize) -> Bytes {
        Bytes::from_owner(self).slice(..size)
    }
}

impl AsRef<[u8]> for ReadBuffer {
    fn as_ref(&self) -> &[u8] {
        self.0.as_deref().unwrap_or_default()
    }
}

impl Drop for ReadBuffer {
    fn drop(&mut self) {
        read_buffers().free.extend(self.0.take());
    }
}
