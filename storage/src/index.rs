//! The sparse index of a segment, and its copy on disk, which makes opening a long log short.
//!
//! ```text
//!   OFFSET-INDEX.seg   ▪━━━━━━━━▪━━━━━━━━━▪━━━━━━━━▪━━━▪      a point for about every 64 KiB
//!   OFFSET-INDEX.idx   [ point   point     point    point ]   the points, sealed
//! ```
//!
//! The file is derived and never synced. It is saved when a segment is full, and for the newest one
//! with every checkpoint. A point carries the chain value of its entry, which stands for every entry
//! before it, so a file whose last point meets the segment there was made of these very entries: a
//! point that does not is no reason for anything but to walk the whole segment.

use std::io;
use std::sync::Arc;

use arqon_proto::planted;
use arqon_proto::{DecodeError, Header};
use bytes::Bytes;

use crate::disk::{Disk, join};
use crate::layout::{COUNT_MAX, SegmentHeader, What, seal, unseal};
use crate::log::LogCore;
use crate::segment::Segment;

/// A segment with fewer points is walked as fast as its index is read.
const POINT_COUNT_MIN: usize = 16;
/// Bytes of one point on disk: its six numbers.
const POINT_SIZE: usize = 48;
const SUFFIX: &str = ".idx";

/// Where a reader may enter a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct IndexPoint {
    /// Byte of an entry's header in the segment.
    pub at: u64,
    pub index: u64,
    pub offset: u64,
    /// Newest time of a data batch before this point.
    pub time_before_ms: u64,
    /// Chain value that the entry continues.
    pub chain: u64,
    /// Term of the entry.
    pub term: u64,
}

impl IndexPoint {
    /// At the entry of `header`, which stands at byte `at`.
    pub fn of(at: u64, time_before_ms: u64, header: &Header) -> Self {
        let (index, offset) = (header.index.0, header.base_offset.0);
        Self { at, index, offset, time_before_ms, chain: header.chain, term: header.term.0 }
    }

    /// Whether the entry of `other` can come after that of this point.
    fn is_before(&self, other: &Self) -> bool {
        self.at < other.at && self.index < other.index && self.offset <= other.offset && self.term <= other.term
    }
}

/// Name of the index file of a segment.
pub(crate) fn file_name(header: &SegmentHeader) -> String {
    header.file_name().replace(".seg", SUFFIX)
}

/// Whether a file is the index of a segment that is not among those called `segments`.
pub(crate) fn is_orphan<'a>(name: &str, mut segments: impl Iterator<Item = &'a SegmentHeader>) -> bool {
    name.ends_with(SUFFIX) && segments.all(|header| file_name(header) != name)
}

fn encode(points: &[IndexPoint]) -> Vec<u8> {
    let numbers = points.iter().flat_map(|point| {
        let IndexPoint { at, index, offset, time_before_ms, chain, term } = *point;
        [at, index, offset, time_before_ms, chain, term]
    });
    let payload: Vec<u8> = numbers.flat_map(u64::to_le_bytes).collect();
    seal(What::Index, &payload)
}

pub(crate) fn decode(bytes: &[u8]) -> Result<Vec<IndexPoint>, DecodeError> {
    let payload = unseal(What::Index, bytes)?;
    let (points, []) = payload.as_chunks::<POINT_SIZE>() else {
        return Err(DecodeError::Value { field: "index size", value: payload.len() as u64 });
    };
    let point = |bytes: &[u8; POINT_SIZE]| {
        let (numbers, _) = bytes.as_chunks::<8>();
        let number = |at: usize| u64::from_le_bytes(numbers[at]);
        let (at, index, offset) = (number(0), number(1), number(2));
        IndexPoint { at, index, offset, time_before_ms: number(3), chain: number(4), term: number(5) }
    };
    let points: Vec<_> = points.iter().map(point).collect();
    if let Some(last) = points.last().filter(|last| last.index.max(last.offset).max(last.term) > COUNT_MAX) {
        return Err(DecodeError::Value { field: "index point", value: last.at });
    }
    if let Some(pair) = points.windows(2).find(|pair| !pair[0].is_before(&pair[1])) {
        return Err(DecodeError::Value { field: "index point", value: pair[1].at });
    }
    Ok(points)
}

/// Saves the index of `segment` as it stands, if that is worth a file. A failure only makes the
/// next start longer.
pub(crate) fn save(core: &LogCore, segment: &Arc<Segment>) {
    let bytes = {
        let state = core.lock();
        let known = state.segments.iter().rev().find(|known| Arc::ptr_eq(&known.segment, segment));
        match known {
            Some(known) if known.points().len() >= POINT_COUNT_MIN => encode(known.points()),
            _ => return,
        }
    };
    let name = file_name(&segment.header);
    if let Err(error) = write(core.engine.disk.as_ref(), &core.dir, &name, bytes) {
        tracing::debug!(group = core.group.0, "saving {name} failed: {error}");
    }
}

fn write(disk: &dyn Disk, dir: &str, name: &str, bytes: Vec<u8>) -> io::Result<()> {
    let (path, fresh) = (join(dir, name), join(dir, &format!("{name}.tmp")));
    disk.create(&fresh)?.write_at(&[Bytes::from(bytes)], 0)?;
    planted::crash_point("index-written");
    disk.rename(&fresh, &path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn points_survive_the_file() {
        let point = |number: u64| IndexPoint {
            at: number,
            index: number + 1,
            offset: number + 2,
            time_before_ms: number + 3,
            chain: u64::MAX - number,
            term: number / 3,
        };
        let points: Vec<_> = (0..20).map(point).collect();
        let bytes = encode(&points);
        assert_eq!(decode(&bytes).unwrap(), points);
        assert!(decode(&seal(What::Index, &[0; POINT_SIZE + 1])).is_err());
        assert!(decode(&bytes[..bytes.len() - 1]).is_err());
        assert!(decode(&encode(&[point(2), point(1)])).is_err(), "points stand in order");
    }
}
