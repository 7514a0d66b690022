//! The record batch: one layout on the wire, in Raft and on disk.
//!
//! ```text
//!   | header, 128 bytes | stamps (Spine, may be empty) | records (client) |
//!
//!   header, little-endian:
//!     0  4  magic "ARQB"
//!     4  1  format version (1)
//!     5  1  kind: 1 data, 2 control, 3 raft
//!     6  1  compression of the records: 0 none, 1 lz4 block, 2 zstd
//!     7  1  flags, 0
//!     8  4  size of the batch: header + stamps + records
//!    12  4  size of the stamps
//!    16  4  size of the records after decompression
//!    20  4  record count
//!    24  4  CRC-32 of the records as stored, made by the producer
//!    28  4  CRC-32 of the stamps, 0 when there are none
//!    32  4  reserved, 0
//!    36  4  producer epoch
//!    40 16  producer id, 0 when there is none
//!    56  8  sequence of the first record
//!    64  8  batch time, ms since 1970, set by the leader
//!    72  8  base offset: of the first record; for other kinds, of the next data record
//!    80  8  Raft term
//!    88  8  Raft index
//!    96  8  chain: value of the entry before this one        (local to a replica)
//!   104 20  reserved, 0
//!   124  4  CRC-32 of bytes 0..124                           (local to a replica)
//! ```
//!
//! A client fills the fields up to the sequence and leaves time, offset, term, index and
//! chain at 0. The leader fills time, the store the rest; the records are never re-hashed.

use bytes::{Bytes, BytesMut};
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

use crate::planted::{self, Bug};
use crate::{DecodeError, GroupId, Offset, RaftIndex, Term, limits};

/// Size of the header in bytes.
pub const BATCH_HEADER_SIZE: usize = 128;
/// The one version that this program reads and writes.
pub const FORMAT_VERSION: u8 = 1;

const MAGIC: [u8; 4] = *b"ARQB";
/// Largest sequence, offset, term and index: far beyond any log, so that counting on from one never overflows.
const POSITION_MAX: u64 = i64::MAX as u64;

/// What a batch carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BatchKind {
    /// Records of clients; the only kind that takes offsets.
    Data,
    /// One protobuf `ControlRecord` of the Spine.
    Control,
    /// A blank or membership entry of Raft.
    Raft,
}

/// How the records section is stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Compression {
    /// As they are.
    #[default]
    None,
    /// One LZ4 block; its decompressed size stands in the header.
    Lz4,
    /// One Zstandard frame.
    Zstd,
}

/// The decoded batch header; see the byte map of this module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// What the batch carries.
    pub kind: BatchKind,
    /// How the records are stored.
    pub compression: Compression,
    /// Size of the stamps section in bytes.
    pub stamps_size: u32,
    /// Size of the records section as stored, in bytes.
    pub records_size: u32,
    /// Size of the records section after decompression, in bytes.
    pub records_size_plain: u32,
    /// Number of records; 0 unless `kind` is data.
    pub record_count: u32,
    /// CRC-32 of the stored records.
    pub records_crc: u32,
    /// CRC-32 of the stamps, 0 when absent.
    pub stamps_crc: u32,
    /// Epoch of the producer.
    pub producer_epoch: u32,
    /// Producer id (a UUID), all zero when the batch is not de-duplicated by producer.
    pub producer_id: [u8; 16],
    /// Sequence of the first record; the others follow without gap.
    pub base_sequence: u64,
    /// Milliseconds since 1970; never goes back within a partition.
    pub time_ms: u64,
    /// Offset of the first record.
    pub base_offset: Offset,
    /// Raft term of the entry.
    pub term: Term,
    /// Raft index of the entry.
    pub index: RaftIndex,
    /// Chain value of the entry before this one on this replica.
    pub chain: u64,
}

impl Header {
    /// A header of `kind` with every other field at zero.
    #[must_use]
    pub fn new(kind: BatchKind) -> Self {
        Self {
            kind,
            compression: Compression::None,
            stamps_size: 0,
            records_size: 0,
            records_size_plain: 0,
            record_count: 0,
            records_crc: 0,
            stamps_crc: 0,
            producer_epoch: 0,
            producer_id: [0; 16],
            base_sequence: 0,
            time_ms: 0,
            base_offset: Offset(0),
            term: Term(0),
            index: RaftIndex(0),
            chain: 0,
        }
    }

    /// Size of the whole batch in bytes.
    #[must_use]
    pub fn batch_size(&self) -> usize {
        BATCH_HEADER_SIZE + self.stamps_size as usize + self.records_size as usize
    }

    /// Offset of the first record of the data batch after this one.
    #[must_use]
    pub fn next_offset(&self) -> Offset {
        Offset(self.base_offset.0 + u64::from(self.record_count))
    }

    /// Whether the batch is de-duplicated by its producer's sequence.
    #[must_use]
    pub fn has_producer(&self) -> bool {
        self.producer_id != [0; 16]
    }

    /// The header as bytes, with its CRC.
    #[must_use]
    pub fn encode(&self) -> [u8; BATCH_HEADER_SIZE] {
        let mut out = [0u8; BATCH_HEADER_SIZE];
        let size = u32::try_from(self.batch_size()).expect("the parts are bounded by BATCH_SIZE_MAX");
        out[0..4].copy_from_slice(&MAGIC);
        out[4] = FORMAT_VERSION;
        out[5] = match self.kind {
            BatchKind::Data => 1,
            BatchKind::Control => 2,
            BatchKind::Raft => 3,
        };
        out[6] = match self.compression {
            Compression::None => 0,
            Compression::Lz4 => 1,
            Compression::Zstd => 2,
        };
        out[8..12].copy_from_slice(&size.to_le_bytes());
        out[12..16].copy_from_slice(&self.stamps_size.to_le_bytes());
        out[16..20].copy_from_slice(&self.records_size_plain.to_le_bytes());
        out[20..24].copy_from_slice(&self.record_count.to_le_bytes());
        out[24..28].copy_from_slice(&self.records_crc.to_le_bytes());
        out[28..32].copy_from_slice(&self.stamps_crc.to_le_bytes());
        out[36..40].copy_from_slice(&self.producer_epoch.to_le_bytes());
        out[40..56].copy_from_slice(&self.producer_id);
        out[56..64].copy_from_slice(&self.base_sequence.to_le_bytes());
        out[64..72].copy_from_slice(&self.time_ms.to_le_bytes());
        out[72..80].copy_from_slice(&self.base_offset.0.to_le_bytes());
        out[80..88].copy_from_slice(&self.term.0.to_le_bytes());
        out[88..96].copy_from_slice(&self.index.0.to_le_bytes());
        out[96..104].copy_from_slice(&self.chain.to_le_bytes());
        let crc = crc32fast::hash(&out[..124]);
        out[124..].copy_from_slice(&crc.to_le_bytes());
        out
    }

    /// Reads a header from the first 128 bytes of `bytes`.
    ///
    /// # Errors
    /// Too few bytes, a wrong magic, version, CRC, kind or compression, sizes that do not
    /// add up, or a size over its limit.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let Some(b) = bytes.first_chunk::<BATCH_HEADER_SIZE>() else {
            return Err(DecodeError::Truncated { what: "batch header", need: BATCH_HEADER_SIZE, have: bytes.len() });
        };
        let u32_at = |at: usize| u32::from_le_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]]);
        let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        if b[0..4] != MAGIC {
            return Err(DecodeError::Magic { what: "batch" });
        }
        // The CRC comes before the version: only a header that is whole can claim to be newer.
        if crc32fast::hash(&b[..124]) != u32_at(124) {
            return Err(DecodeError::Crc { what: "batch header" });
        }
        if b[4] != FORMAT_VERSION {
            return Err(DecodeError::Version { what: "batch", version: u32::from(b[4]) });
        }
        let kind = match b[5] {
            1 => BatchKind::Data,
            2 => BatchKind::Control,
            3 => BatchKind::Raft,
            value => {
                return Err(DecodeError::Value { field: "batch kind", value: u64::from(value) });
            }
        };
        let compression = match b[6] {
            0 => Compression::None,
            1 => Compression::Lz4,
            2 => Compression::Zstd,
            value => {
                return Err(DecodeError::Value { field: "batch compression", value: u64::from(value) });
            }
        };
        let size = u32_at(8) as usize;
        let stamps_size = u32_at(12);
        let fixed = BATCH_HEADER_SIZE + stamps_size as usize;
        if size > limits::BATCH_SIZE_MAX || size < fixed {
            return Err(DecodeError::Value { field: "batch size", value: size as u64 });
        }
        for (field, at) in [("sequence", 56), ("base offset", 72), ("Raft term", 80), ("Raft index", 88)] {
            if u64_at(at) > POSITION_MAX {
                return Err(DecodeError::Value { field, value: u64_at(at) });
            }
        }
        let mut producer_id = [0; 16];
        producer_id.copy_from_slice(&b[40..56]);
        Ok(Self {
            kind,
            compression,
            stamps_size,
            records_size: (size - fixed) as u32,
            records_size_plain: u32_at(16),
            record_count: u32_at(20),
            records_crc: u32_at(24),
            stamps_crc: u32_at(28),
            producer_epoch: u32_at(36),
            producer_id,
            base_sequence: u64_at(56),
            time_ms: u64_at(64),
            base_offset: Offset(u64_at(72)),
            term: Term(u64_at(80)),
            index: RaftIndex(u64_at(88)),
            chain: u64_at(96),
        })
    }

    /// The chain value that the entry after this one must carry: XXH3-64 of this header's
    /// bytes, which cover the chain before it and the CRCs of stamps and records.
    #[must_use]
    pub fn chain_value(encoded: &[u8; BATCH_HEADER_SIZE]) -> u64 {
        xxh3_64(encoded)
    }
}

/// The chain value from which a replica's log starts: XXH3-64 of the group, seeded with the
/// incarnation (random per placement), so that no other log's entry can continue it.
#[must_use]
pub fn chain_start(group: GroupId, incarnation: u64) -> u64 {
    xxh3_64_with_seed(&group.0.to_le_bytes(), incarnation)
}

/// A batch in memory. Cloning copies the header and shares the bytes.
#[derive(Clone, PartialEq, Eq)]
pub struct Batch {
    /// The decoded header.
    pub header: Header,
    /// Protobuf `Stamps`, or empty.
    pub stamps: Bytes,
    /// Records as stored; for control and Raft batches one protobuf message.
    pub records: Bytes,
}

impl std::fmt::Debug for Batch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Never the payload: batches end up in log lines of libraries.
        let h = &self.header;
        write!(
            f,
            "Batch({:?} {}-{} offset {} count {} size {})",
            h.kind,
            h.term,
            h.index,
            h.base_offset,
            h.record_count,
            h.batch_size()
        )
    }
}

impl std::fmt::Display for Batch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Debug::fmt(self, f)
    }
}

impl Batch {
    /// A control or Raft batch around one encoded message.
    #[must_use]
    pub fn internal(kind: BatchKind, message: Bytes) -> Self {
        assert!(kind != BatchKind::Data, "data batches are built from records");
        assert!(message.len() + BATCH_HEADER_SIZE <= limits::BATCH_SIZE_MAX, "internal entry over the batch limit");
        let mut header = Header::new(kind);
        header.records_size = message.len() as u32;
        header.records_size_plain = message.len() as u32;
        header.records_crc = crc32fast::hash(&message);
        Self { header, stamps: Bytes::new(), records: message }
    }

    /// Puts `stamps` between header and records.
    ///
    /// # Panics
    /// When the batch would pass its size limit; callers check `batch_size` first.
    pub fn set_stamps(&mut self, stamps: Bytes) {
        self.header.stamps_size = stamps.len() as u32;
        self.header.stamps_crc = if stamps.is_empty() { 0 } else { crc32fast::hash(&stamps) };
        self.stamps = stamps;
        assert!(self.header.batch_size() <= limits::BATCH_SIZE_MAX, "stamps push the batch over its limit");
    }

    /// Splits one batch off the front of `bytes`, sharing them, and checks its CRCs.
    ///
    /// # Errors
    /// What [`Header::decode`] refuses, too few bytes, or a wrong CRC of stamps or records.
    /// `bytes` is left as it was.
    pub fn split_from(bytes: &mut Bytes) -> Result<Self, DecodeError> {
        let header = Header::decode(bytes)?;
        let size = header.batch_size();
        if bytes.len() < size {
            return Err(DecodeError::Truncated { what: "batch", need: size, have: bytes.len() });
        }
        let stamps_end = BATCH_HEADER_SIZE + header.stamps_size as usize;
        let stamps = bytes.slice(BATCH_HEADER_SIZE..stamps_end);
        let records = bytes.slice(stamps_end..size);
        let batch = Self { header, stamps, records };
        batch.check_crcs()?;
        *bytes = bytes.slice(size..);
        Ok(batch)
    }

    /// Checks the CRCs of stamps and records against the header.
    ///
    /// # Errors
    /// [`DecodeError::Crc`] naming the section.
    pub fn check_crcs(&self) -> Result<(), DecodeError> {
        if planted::has(Bug::ReadWithoutChecksum) {
            return Ok(());
        }
        let stamps_crc = if self.stamps.is_empty() { 0 } else { crc32fast::hash(&self.stamps) };
        if stamps_crc != self.header.stamps_crc {
            return Err(DecodeError::Crc { what: "batch stamps" });
        }
        if crc32fast::hash(&self.records) != self.header.records_crc {
            return Err(DecodeError::Crc { what: "batch records" });
        }
        Ok(())
    }

    /// Appends header, stamps and records to `out`.
    pub fn encode_into(&self, out: &mut BytesMut) {
        out.reserve(self.header.batch_size());
        out.extend_from_slice(&self.header.encode());
        out.extend_from_slice(&self.stamps);
        out.extend_from_slice(&self.records);
    }
}
