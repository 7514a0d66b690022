//! The search for the first header behind a break of the chain that belongs to the log.

use std::collections::HashSet;
use std::io;

use arqon_proto::{BATCH_HEADER_SIZE, Header};

use crate::damage::{Cursor, Goal};
use crate::disk::{File, is_unreadable, read_around};
use crate::segment::Walk;

/// Bytes read at once in search of a header.
const SCAN_SIZE: usize = 1 << 20;
/// What a batch header begins with.
const HEADER_MAGIC: &[u8] = b"ARQB";

/// Whether the chain leads from the header at `from` to `goal`. Adds the headers on the way to `met`: a walk
/// that comes to one of them from elsewhere ends where this one does.
fn leads(file: &dyn File, from: Cursor, end: u64, goal: &Goal, met: &mut HashSet<u64>) -> io::Result<bool> {
    let mut walk = Walk::growing(file, from.at, end);
    let mut cursor = from;
    while cursor.index < goal.index {
        if met.contains(&cursor.at) {
            return Ok(false);
        }
        let bytes = match walk.bytes() {
            Err(error) if is_unreadable(&error) => None,
            bytes => bytes?,
        };
        let Some(bytes) = bytes else { return Ok(false) };
        let Ok(header) = Header::decode(&bytes) else { return Ok(false) };
        let Some(next) = cursor.after(&bytes, &header).filter(|next| next.at <= end) else { return Ok(false) };
        // Not before: one that this walk does not continue with may be the one in search.
        met.insert(cursor.at);
        cursor = next;
        walk.at = next.at;
    }
    Ok(goal.is_met_by(&cursor))
}

/// The first header behind the break at `from` that belongs to the log: the chain leads from it to
/// `goal`. Looks at every byte up to `end`, and at the header of each batch at most once more: a second break
/// behind the first one must not cost a walk to it from every header in between.
pub(crate) fn resync(file: &dyn File, from: &Cursor, end: u64, goal: &Goal) -> io::Result<Option<Cursor>> {
    let end = goal.at.map_or(end, |at| at.min(end));
    let mut window = vec![0; SCAN_SIZE];
    let mut window_at = from.at + 1;
    let mut met = HashSet::new();
    while window_at + BATCH_HEADER_SIZE as u64 <= end {
        let size = usize::try_from(end - window_at).unwrap_or(usize::MAX).min(SCAN_SIZE);
        let read = read_around(file, &mut window[..size], window_at, |_| true)?;
        if read < BATCH_HEADER_SIZE {
            return Ok(None);
        }
        let starts = window[..read].windows(BATCH_HEADER_SIZE).enumerate();
        for (at, bytes) in starts.filter(|(_, bytes)| bytes.starts_with(HEADER_MAGIC)) {
            let Ok(header) = Header::decode(bytes) else { continue };
            let (index, offset, chain, term) = (header.index.0, header.base_offset.0, header.chain, header.term.0);
            let candidate = Cursor { at: window_at + at as u64, index, offset, chain, term };
            let is_behind = index > from.index && offset >= from.offset && term >= from.term;
            if is_behind && index < goal.index && leads(file, candidate, end, goal, &mut met)? {
                return Ok(Some(candidate));
            }
        }
        window_at += (read - BATCH_HEADER_SIZE + 1) as u64;
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use arqon_proto::{BatchKind, RaftIndex, Term};
    use bytes::Bytes;

    use super::*;

    /// Counts what is read.
    #[derive(Default)]
    struct Counted {
        bytes: Vec<u8>,
        read_size: AtomicUsize,
    }

    impl File for Counted {
        fn write_at(&self, _pieces: &[Bytes], _at: u64) -> io::Result<()> {
            Err(io::ErrorKind::Unsupported.into())
        }

        fn sync(&self) -> io::Result<()> {
            Ok(())
        }

        fn read_at(&self, buffer: &mut [u8], at: u64) -> io::Result<usize> {
            let rest = self.bytes.get(at as usize..).unwrap_or_default();
            let size = rest.len().min(buffer.len());
            buffer[..size].copy_from_slice(&rest[..size]);
            self.read_size.fetch_add(size, Ordering::Relaxed);
            Ok(size)
        }

        fn size(&self) -> io::Result<u64> {
            Ok(self.bytes.len() as u64)
        }

        fn view(&self, _at: u64, _size: usize, _capacity: u64) -> io::Result<Bytes> {
            Err(io::ErrorKind::Unsupported.into())
        }

        fn users(&self) -> std::sync::Weak<()> {
            std::sync::Weak::new()
        }
    }

    /// Headers without records, chained from 0; gives the goal behind the last one.
    fn headers(count: u64) -> (Vec<u8>, Goal) {
        let (mut bytes, mut chain) = (Vec::new(), 0);
        for index in 0..count {
            let mut header = Header::new(BatchKind::Raft);
            (header.index, header.term, header.chain) = (RaftIndex(index), Term(1), chain);
            let encoded = header.encode();
            chain = Header::chain_value(&encoded);
            bytes.extend_from_slice(&encoded);
        }
        let at = bytes.len() as u64;
        (bytes, Goal { at: Some(at), index: count, offset: Some(0), chain })
    }

    /// From every header between two bad ones the chain leads to the second one and no further.
    #[test]
    fn a_second_bad_header_does_not_cost_a_walk_from_every_one_before_it() {
        let count = 20_000;
        let (mut bytes, goal) = headers(count);
        for bad in [3, count - 5] {
            bytes[bad as usize * BATCH_HEADER_SIZE + 40] ^= 1;
        }
        let size = bytes.len();
        let file = Counted { bytes, ..Counted::default() };
        let from = Cursor { at: 3 * BATCH_HEADER_SIZE as u64, index: 3, offset: 0, chain: 0, term: 1 };
        let found = resync(&file, &from, size as u64, &goal).unwrap().unwrap();
        assert_eq!(found.index, count - 4);
        let read_size = file.read_size.load(Ordering::Relaxed);
        assert!(read_size < 4 * size, "{read_size} bytes were read of {size}");
    }

    /// What looks like a header, in records or in old bytes of a file, may end where one of the log begins.
    #[test]
    fn a_header_that_leads_to_one_of_the_log_does_not_hide_it() {
        let (mut bytes, goal) = headers(20);
        bytes[3 * BATCH_HEADER_SIZE..4 * BATCH_HEADER_SIZE].fill(0);
        let place = &mut bytes[4 * BATCH_HEADER_SIZE..5 * BATCH_HEADER_SIZE];
        let mut forged = Header::decode(place).unwrap();
        forged.chain ^= 1;
        place.copy_from_slice(&forged.encode());
        let size = bytes.len() as u64;
        let file = Counted { bytes, ..Counted::default() };
        let from = Cursor { at: 3 * BATCH_HEADER_SIZE as u64, index: 3, offset: 0, chain: 0, term: 1 };
        let found = resync(&file, &from, size, &goal).unwrap().unwrap();
        assert_eq!((found.index, found.at), (5, 5 * BATCH_HEADER_SIZE as u64));
    }

    /// Anybody may publish records that look like headers.
    #[test]
    fn headers_that_lead_nowhere_cost_little_each() {
        let count = 20_000;
        let (mut bytes, goal) = headers(count);
        for (at, header) in bytes.chunks_exact_mut(BATCH_HEADER_SIZE).enumerate().skip(4) {
            let mut forged = Header::decode(header).unwrap();
            forged.chain = at as u64;
            header.copy_from_slice(&forged.encode());
        }
        let size = bytes.len();
        let file = Counted { bytes, ..Counted::default() };
        let from = Cursor { at: 3 * BATCH_HEADER_SIZE as u64, index: 3, offset: 0, chain: 0, term: 1 };
        assert_eq!(resync(&file, &from, size as u64, &goal).unwrap(), None);
        let read_size = file.read_size.load(Ordering::Relaxed);
        assert!(read_size < 8 * size, "{read_size} bytes were read of {size}");
    }
}
