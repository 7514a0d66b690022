//! The bytes of every file but the batches themselves.
//!
//! ```text
//!   any sealed block, little-endian:
//!     0  4  magic "ARQS"
//!     4  4  what it is: IDEN MANI VOTE CKPT SEGM MARK
//!     8  4  format version (1)
//!    12  4  size n of the payload
//!    16  n  payload
//!  16+n  4  CRC-32 of bytes 0..16+n
//!
//!   segment file
//!        0  block SEGM          written once, before the file gets its name
//!     4096  block MARK, slot 0  ┐ the durable mark, written in turn
//!     8192  block MARK, slot 1  ┘
//!    12288  batches, each continuing the chain of the one before; then zeroes
//! ```
//!
//! Header and slots stand in blocks of their own, so that a torn write of one slot leaves the
//! other slot and the header as they were.

use arqon_proto::{DecodeError, GroupId, NodeId, Offset, RaftIndex, ReplicaId, Term};

use crate::position::LogPosition;

/// Where the batches of a segment begin.
pub(crate) const SEGMENT_DATA_AT: u64 = 12_288;
/// Where the two slots of the durable mark stand.
pub(crate) const MARK_AT: [u64; 2] = [4_096, 8_192];
/// Size of the part of a segment that holds the header, and of each slot, in bytes; the unit in
/// which batches are written.
pub const BLOCK_SIZE: usize = 4_096;
/// The one version that this program reads and writes.
pub(crate) const VERSION: u32 = 1;

/// Bytes of a sealed block before its payload.
pub(crate) const PREFIX_SIZE: usize = 16;
const MAGIC: [u8; 4] = *b"ARQS";
/// No log has more entries, records, terms or marks than this.
pub(crate) const COUNT_MAX: u64 = i64::MAX as u64;

pub(crate) const IDENTITY_FILE: &str = "identity";
/// Below which id every replica placed here has had a log.
pub(crate) const PLACED_FILE: &str = "placed";
pub(crate) const LOCK_FILE: &str = "lock";
pub(crate) const LOGS_DIR: &str = "logs";
/// Files of purged segments; see [`pool`](crate::pool).
pub(crate) const POOL_DIR: &str = "pool";
pub(crate) const MANIFEST_FILE: &str = "manifest";
pub(crate) const VOTE_FILE: &str = "vote";
/// There after a failed fsync: what the page cache says is not to be believed.
pub(crate) const REWRITE_FILE: &str = "rewrite";

/// What a sealed block is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum What {
    Identity,
    Manifest,
    Vote,
    Checkpoint,
    Segment,
    Mark,
    Index,
    Placed,
}

impl What {
    const fn tag(self) -> [u8; 4] {
        match self {
            Self::Identity => *b"IDEN",
            Self::Manifest => *b"MANI",
            Self::Vote => *b"VOTE",
            Self::Checkpoint => *b"CKPT",
            Self::Segment => *b"SEGM",
            Self::Mark => *b"MARK",
            Self::Index => *b"INDX",
            Self::Placed => *b"PLAC",
        }
    }

    const fn name(self) -> &'static str {
        match self {
            Self::Identity => "identity",
            Self::Manifest => "manifest",
            Self::Vote => "vote",
            Self::Checkpoint => "checkpoint",
            Self::Segment => "segment header",
            Self::Mark => "durable mark",
            Self::Index => "segment index",
            Self::Placed => "placed replicas",
        }
    }
}

/// Wraps `payload` with magic, version, size and CRC.
pub(crate) fn seal(what: What, payload: &[u8]) -> Vec<u8> {
    let size = u32::try_from(payload.len()).expect("callers bound their payloads far below 4 GiB");
    let mut out = Vec::with_capacity(PREFIX_SIZE + payload.len() + 4);
    out.extend_from_slice(&MAGIC);
    out.extend_from_slice(&what.tag());
    out.extend_from_slice(&VERSION.to_le_bytes());
    out.extend_from_slice(&size.to_le_bytes());
    out.extend_from_slice(payload);
    let crc = crc32fast::hash(&out);
    out.extend_from_slice(&crc.to_le_bytes());
    out
}

/// The payload of a sealed block at the front of `bytes`.
pub(crate) fn unseal(what: What, bytes: &[u8]) -> Result<&[u8], DecodeError> {
    let name = what.name();
    let cut_short = |need| DecodeError::Truncated { what: name, need, have: bytes.len() };
    let prefix = bytes.first_chunk::<PREFIX_SIZE>().ok_or_else(|| cut_short(PREFIX_SIZE))?;
    if prefix[..4] != MAGIC || prefix[4..8] != what.tag() {
        return Err(DecodeError::Magic { what: name });
    }
    let number = |at: usize| u32::from_le_bytes([prefix[at], prefix[at + 1], prefix[at + 2], prefix[at + 3]]);
    let end = PREFIX_SIZE + number(12) as usize;
    let crc = bytes.get(end..end + 4).ok_or_else(|| cut_short(end + 4))?;
    // The CRC comes before the version: only a block that is whole can claim to be newer.
    if crc32fast::hash(&bytes[..end]).to_le_bytes() != crc {
        return Err(DecodeError::Crc { what: name });
    }
    if number(8) != VERSION {
        return Err(DecodeError::Version { what: name, version: number(8) });
    }
    Ok(&bytes[PREFIX_SIZE..end])
}

/// Whether what begins so says that it is of a version which this program does not know. Only the CRC
/// over all of it tells whether that is true.
pub(crate) fn claims_newer(prefix: &[u8; PREFIX_SIZE]) -> bool {
    prefix[8..12] != VERSION.to_le_bytes()
}

#[derive(Default)]
struct Writer(Vec<u8>);

impl Writer {
    fn number(mut self, value: u64) -> Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    fn position(self, position: Option<LogPosition>) -> Self {
        let (there, at) = (u64::from(position.is_some()), position.unwrap_or_default());
        self.number(there).number(at.term.0).number(at.index.0)
    }
}

struct Reader<'a> {
    what: &'static str,
    size: usize,
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    fn new(what: What, payload: &'a [u8]) -> Self {
        Self { what: what.name(), size: payload.len(), rest: payload }
    }

    fn number(&mut self) -> Result<u64, DecodeError> {
        let Some((first, rest)) = self.rest.split_first_chunk::<8>() else {
            return Err(DecodeError::Truncated { what: self.what, need: self.size + 8, have: self.size });
        };
        self.rest = rest;
        Ok(u64::from_le_bytes(*first))
    }

    /// A number that counts something, so that one more of it is a number too.
    fn count(&mut self) -> Result<u64, DecodeError> {
        let value = self.number()?;
        if value > COUNT_MAX { Err(DecodeError::Value { field: self.what, value }) } else { Ok(value) }
    }

    fn position(&mut self) -> Result<Option<LogPosition>, DecodeError> {
        let (there, term, index) = (self.number()?, self.count()?, self.count()?);
        Ok((there != 0).then_some(LogPosition { term: Term(term), index: RaftIndex(index) }))
    }

    fn end(self) -> Result<(), DecodeError> {
        if self.rest.is_empty() {
            return Ok(());
        }
        Err(DecodeError::Value { field: "size of a sealed block", value: self.size as u64 })
    }
}

/// Whose directory this is.
pub(crate) fn encode_identity(cluster: &str, node: NodeId) -> Vec<u8> {
    let mut payload = Writer::default().number(node.0).0;
    payload.extend_from_slice(cluster.as_bytes());
    seal(What::Identity, &payload)
}

pub(crate) fn decode_identity(bytes: &[u8]) -> Result<(String, NodeId), DecodeError> {
    let mut reader = Reader::new(What::Identity, unseal(What::Identity, bytes)?);
    let node = NodeId(reader.number()?);
    let cluster = std::str::from_utf8(reader.rest).map_err(|_| DecodeError::Text { field: "cluster" })?;
    Ok((cluster.to_owned(), node))
}

/// The ends of a log. Replaced as a whole, by rename.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Manifest {
    pub group: GroupId,
    pub replica: ReplicaId,
    /// Random per placement.
    pub incarnation: u64,
    /// Raised when the log restarts empty; segments of a lower one are stale.
    pub generation: u64,
    /// Last entry dropped from the front.
    pub purged: Option<LogPosition>,
    /// Chain value that the entry after `purged` carries.
    pub start_chain: u64,
    /// Offset that the first data record after `purged` takes.
    pub start_offset: Offset,
    /// First index of the newest segment that must be there.
    pub tail: Option<RaftIndex>,
}

impl Manifest {
    pub fn encode(&self) -> Vec<u8> {
        let payload = Writer::default()
            .number(self.group.0)
            .number(self.replica.0)
            .number(self.incarnation)
            .number(self.generation)
            .position(self.purged)
            .number(self.start_chain)
            .number(self.start_offset.0)
            .number(u64::from(self.tail.is_some()))
            .number(self.tail.unwrap_or_default().0);
        seal(What::Manifest, &payload.0)
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut reader = Reader::new(What::Manifest, unseal(What::Manifest, bytes)?);
        let group = GroupId(reader.number()?);
        let replica = ReplicaId(reader.number()?);
        let incarnation = reader.number()?;
        let generation = reader.count()?;
        let purged = reader.position()?;
        let start_chain = reader.number()?;
        let start_offset = Offset(reader.count()?);
        let (there, base) = (reader.number()?, reader.count()?);
        let tail = (there != 0).then_some(RaftIndex(base));
        reader.end()?;
        Ok(Self { group, replica, incarnation, generation, purged, start_chain, start_offset, tail })
    }
}

/// What a segment says about itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SegmentHeader {
    pub group: GroupId,
    pub replica: ReplicaId,
    pub incarnation: u64,
    pub generation: u64,
    pub base_index: RaftIndex,
    pub base_offset: Offset,
    /// Chain value that its first entry carries.
    pub chain: u64,
    /// Term of the entry before its first one.
    pub term_before: Term,
    /// Newest batch time before its first entry, ms since 1970.
    pub time_before_ms: u64,
    /// Size that the file never passes; also the size of its map.
    pub capacity: u64,
}

impl SegmentHeader {
    pub fn encode(&self) -> Vec<u8> {
        let payload = Writer::default()
            .number(self.group.0)
            .number(self.replica.0)
            .number(self.incarnation)
            .number(self.generation)
            .number(self.base_index.0)
            .number(self.base_offset.0)
            .number(self.chain)
            .number(self.term_before.0)
            .number(self.time_before_ms)
            .number(self.capacity);
        seal(What::Segment, &payload.0)
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut reader = Reader::new(What::Segment, unseal(What::Segment, bytes)?);
        let header = Self {
            group: GroupId(reader.number()?),
            replica: ReplicaId(reader.number()?),
            incarnation: reader.number()?,
            generation: reader.count()?,
            base_index: RaftIndex(reader.count()?),
            base_offset: Offset(reader.count()?),
            chain: reader.number()?,
            term_before: Term(reader.count()?),
            time_before_ms: reader.number()?,
            capacity: reader.number()?,
        };
        reader.end()?;
        // The capacity becomes the size of a map.
        if header.capacity < SEGMENT_DATA_AT || header.capacity > 1 << 40 {
            return Err(DecodeError::Value { field: "segment capacity", value: header.capacity });
        }
        Ok(header)
    }

    /// Sorts by index and, as a name, by base offset.
    pub fn file_name(&self) -> String {
        format!("{:020}-{:020}.seg", self.base_offset.0, self.base_index.0)
    }
}

/// Base offset and base index of a segment's file name, as [`SegmentHeader::file_name`] makes it.
pub(crate) fn parse_file_name(name: &str) -> Option<(Offset, RaftIndex)> {
    let (offset, index) = name.strip_suffix(".seg")?.split_once('-')?;
    Some((Offset(offset.parse().ok()?), RaftIndex(index.parse().ok()?)))
}

/// The durable mark: everything below `next_index` was flushed when it was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Mark {
    /// Counts marks of the log; the highest one counts.
    pub sequence: u64,
    /// Index after the last flushed entry.
    pub next_index: u64,
    /// Chain value that the entry at `next_index` carries.
    pub chain: u64,
    /// Where the batches of this segment end, when later bytes in it do not count.
    pub sealed_at: Option<u64>,
    /// Newest committed position known.
    pub committed: Option<LogPosition>,
}

impl Mark {
    pub fn encode(&self) -> Vec<u8> {
        let payload = Writer::default()
            .number(self.sequence)
            .number(self.next_index)
            .number(self.chain)
            .number(self.sealed_at.unwrap_or(0))
            .position(self.committed);
        seal(What::Mark, &payload.0)
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut reader = Reader::new(What::Mark, unseal(What::Mark, bytes)?);
        let (sequence, next_index, chain) = (reader.count()?, reader.count()?, reader.number()?);
        let sealed_at = Some(reader.number()?).filter(|at| *at != 0);
        let committed = reader.position()?;
        reader.end()?;
        Ok(Self { sequence, next_index, chain, sealed_at, committed })
    }
}

/// Directory of one log below [`LOGS_DIR`].
pub(crate) fn log_dir(group: GroupId, replica: ReplicaId) -> String {
    format!("{LOGS_DIR}/{}-{}", group.0, replica.0)
}

/// Group and replica of a directory name made by [`log_dir`].
pub(crate) fn parse_log_dir(name: &str) -> Option<(GroupId, ReplicaId)> {
    let (group, replica) = name.split_once('-')?;
    Some((GroupId(group.parse().ok()?), ReplicaId(replica.parse().ok()?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest() -> Manifest {
        Manifest {
            group: GroupId(7),
            replica: ReplicaId(3),
            incarnation: 99,
            generation: 2,
            purged: Some(LogPosition::new(4, 17)),
            start_chain: 5,
            start_offset: Offset(120),
            tail: Some(RaftIndex(18)),
        }
    }

    #[test]
    fn blocks_read_back_as_written() {
        let manifest = manifest();
        assert_eq!(Manifest::decode(&manifest.encode()), Ok(manifest));
        let mark = Mark { sequence: 3, next_index: 9, chain: 1, sealed_at: Some(20_000), committed: None };
        assert_eq!(Mark::decode(&mark.encode()), Ok(mark));
        assert_eq!(decode_identity(&encode_identity("alpha", NodeId(2))), Ok(("alpha".to_owned(), NodeId(2))));
    }

    #[test]
    fn any_flipped_bit_is_refused() {
        let whole = manifest().encode();
        for bit in 0..whole.len() * 8 {
            let mut bytes = whole.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(Manifest::decode(&bytes).is_err(), "bit {bit}");
        }
        for size in 0..whole.len() {
            assert!(Manifest::decode(&whole[..size]).is_err(), "size {size}");
        }
    }

    #[test]
    fn numbers_that_cannot_be_are_refused() {
        let at_the_limit = Manifest { purged: Some(LogPosition::new(4, COUNT_MAX)), ..manifest() };
        assert!(Manifest::decode(&at_the_limit.encode()).is_ok());
        let above = Manifest { purged: Some(LogPosition::new(4, COUNT_MAX + 1)), ..manifest() };
        assert!(matches!(Manifest::decode(&above.encode()), Err(DecodeError::Value { .. })));
        let mark = Mark { sequence: u64::MAX, next_index: 9, chain: 1, sealed_at: None, committed: None };
        assert!(matches!(Mark::decode(&mark.encode()), Err(DecodeError::Value { .. })));
    }

    #[test]
    fn a_newer_version_is_told_apart_from_damage() {
        let mut bytes = manifest().encode();
        bytes[8] = 2;
        let end = bytes.len() - 4;
        let crc = crc32fast::hash(&bytes[..end]);
        bytes[end..].copy_from_slice(&crc.to_le_bytes());
        assert!(matches!(Manifest::decode(&bytes), Err(DecodeError::Version { version: 2, .. })));
    }
}
