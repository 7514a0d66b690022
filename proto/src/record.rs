//! Records inside a batch, and building a batch from them.
//!
//! ```text
//!   one record, little-endian:
//!     0  4  size of the rest of the record
//!     4  1  event type (the numbers of `EventType` in event.proto)
//!     5  1  flags, 0
//!     6  2  schema size
//!     8  2  key size
//!    10  2  header count
//!    12  4  extension size: protobuf fields of `Event` that the writer did not know
//!    16 16  id (UUIDv7)
//!    32  .  schema | key | headers | extension | payload (what is left)
//!
//!   one header: 2 name size | 4 value size | name | value
//! ```
//!
//! The trace context is the header `traceparent`. Offsets, sequences and times of records
//! follow from the batch header; causes stand in the stamps.

use std::borrow::Cow;

use bytes::{Bytes, BytesMut};

use crate::{Batch, BatchKind, Compression, DecodeError, Header, check_schema, limits};

const FIXED_SIZE: usize = 32;
const HEADER_PREFIX_SIZE: usize = 6;
const ZSTD_LEVEL: i32 = 1;

/// What an event is for; the numbers of `arqonbus.v1.EventType`.
pub type EventType = crate::wire::EventType;

/// An event to be written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Record {
    /// UUIDv7, 16 bytes.
    pub id: [u8; 16],
    /// Number of an [`EventType`].
    pub event_type: u8,
    /// Schema name or empty.
    pub schema: String,
    /// Partitioning key or empty.
    pub key: Bytes,
    /// Names and values, in order.
    pub headers: Vec<(String, String)>,
    /// Unknown protobuf fields of `Event`, kept as they are.
    pub extension: Bytes,
    /// The payload, opaque to the bus.
    pub payload: Bytes,
}

impl Record {
    /// The fields, borrowed.
    #[must_use]
    pub fn parts(&self) -> RecordParts<'_> {
        RecordParts {
            id: self.id,
            event_type: self.event_type,
            schema: &self.schema,
            key: &self.key,
            headers: &self.headers,
            extension: &self.extension,
            payload: &self.payload,
        }
    }

    /// Size of the encoded record in bytes.
    #[must_use]
    pub fn encoded_size(&self) -> usize {
        self.parts().encoded_size()
    }

    /// Checks every limit on an event.
    ///
    /// # Errors
    /// The first field over its limit, or a schema name that is not one.
    pub fn check(&self) -> Result<(), DecodeError> {
        self.parts().check()
    }
}

/// The fields of an event to be written, borrowed from wherever they are; see [`Record`].
#[derive(Clone, Copy, Debug)]
pub struct RecordParts<'a> {
    /// UUIDv7, 16 bytes.
    pub id: [u8; 16],
    /// Number of an [`EventType`].
    pub event_type: u8,
    /// Schema name or empty.
    pub schema: &'a str,
    /// Partitioning key or empty.
    pub key: &'a [u8],
    /// Names and values, in order.
    pub headers: &'a [(String, String)],
    /// Unknown protobuf fields of `Event`, kept as they are.
    pub extension: &'a [u8],
    /// The payload, opaque to the bus.
    pub payload: &'a [u8],
}

impl RecordParts<'_> {
    /// Size of the encoded record in bytes.
    #[must_use]
    pub fn encoded_size(&self) -> usize {
        let headers: usize = self.headers.iter().map(|(n, v)| HEADER_PREFIX_SIZE + n.len() + v.len()).sum();
        FIXED_SIZE + self.schema.len() + self.key.len() + headers + self.extension.len() + self.payload.len()
    }

    /// As [`Record::check`].
    ///
    /// # Errors
    /// As [`Record::check`].
    pub fn check(&self) -> Result<(), DecodeError> {
        at_most("payload", self.payload.len(), limits::PAYLOAD_SIZE_MAX)?;
        at_most("key", self.key.len(), limits::KEY_SIZE_MAX)?;
        at_most("headers", self.headers.len(), limits::HEADER_COUNT_MAX)?;
        for (name, value) in self.headers {
            at_most("header name", name.len(), limits::HEADER_NAME_SIZE_MAX)?;
            at_most("header value", value.len(), limits::HEADER_VALUE_SIZE_MAX)?;
        }
        check_schema(self.schema).map_err(|_| DecodeError::Text { field: "schema" })?;
        at_most("event", self.encoded_size(), limits::RECORD_SIZE_MAX)
    }
}

fn at_most(field: &'static str, size: usize, limit: usize) -> Result<(), DecodeError> {
    if size > limit { Err(DecodeError::TooLarge { field, size, limit }) } else { Ok(()) }
}

/// One record of a decompressed records section.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecordRef<'a> {
    /// UUIDv7.
    pub id: [u8; 16],
    /// Number of an [`EventType`].
    pub event_type: u8,
    /// Schema name or empty.
    pub schema: &'a str,
    /// Partitioning key or empty.
    pub key: &'a [u8],
    headers: &'a [u8],
    /// Unknown protobuf fields of `Event`.
    pub extension: &'a [u8],
    /// The payload.
    pub payload: &'a [u8],
}

impl<'a> RecordRef<'a> {
    /// Names and values of the headers, in order.
    pub fn headers(&self) -> impl Iterator<Item = (&'a str, &'a str)> {
        let mut rest = self.headers;
        std::iter::from_fn(move || {
            let (name, value, tail) = split_header(rest)?;
            rest = tail;
            Some((name, value))
        })
    }

    /// Value of the header `name`.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&'a str> {
        self.headers().find(|(n, _)| *n == name).map(|(_, value)| value)
    }

    /// A copy that owns its bytes.
    #[must_use]
    pub fn to_record(&self) -> Record {
        Record {
            id: self.id,
            event_type: self.event_type,
            schema: self.schema.to_owned(),
            key: Bytes::copy_from_slice(self.key),
            headers: self.headers().map(|(n, v)| (n.to_owned(), v.to_owned())).collect(),
            extension: Bytes::copy_from_slice(self.extension),
            payload: Bytes::copy_from_slice(self.payload),
        }
    }
}

fn split_header(bytes: &[u8]) -> Option<(&str, &str, &[u8])> {
    let prefix = bytes.first_chunk::<HEADER_PREFIX_SIZE>()?;
    let name_size = usize::from(u16::from_le_bytes([prefix[0], prefix[1]]));
    let value_size = u32::from_le_bytes([prefix[2], prefix[3], prefix[4], prefix[5]]) as usize;
    let (name, rest) = bytes[HEADER_PREFIX_SIZE..].split_at_checked(name_size)?;
    let (value, rest) = rest.split_at_checked(value_size)?;
    Some((std::str::from_utf8(name).ok()?, std::str::from_utf8(value).ok()?, rest))
}

fn encode_record(record: &RecordParts<'_>, size: usize, out: &mut BytesMut) {
    out.reserve(size);
    let mut fixed = [0u8; FIXED_SIZE];
    fixed[0..4].copy_from_slice(&((size - 4) as u32).to_le_bytes());
    fixed[4] = record.event_type;
    fixed[6..8].copy_from_slice(&(record.schema.len() as u16).to_le_bytes());
    fixed[8..10].copy_from_slice(&(record.key.len() as u16).to_le_bytes());
    fixed[10..12].copy_from_slice(&(record.headers.len() as u16).to_le_bytes());
    fixed[12..16].copy_from_slice(&(record.extension.len() as u32).to_le_bytes());
    fixed[16..32].copy_from_slice(&record.id);
    out.extend_from_slice(&fixed);
    out.extend_from_slice(record.schema.as_bytes());
    out.extend_from_slice(record.key);
    for (name, value) in record.headers {
        out.extend_from_slice(&(name.len() as u16).to_le_bytes());
        out.extend_from_slice(&(value.len() as u32).to_le_bytes());
        out.extend_from_slice(name.as_bytes());
        out.extend_from_slice(value.as_bytes());
    }
    out.extend_from_slice(record.extension);
    out.extend_from_slice(record.payload);
}

/// Reads the record at the front of `bytes` and gives the rest.
fn decode_record(bytes: &[u8]) -> Result<(RecordRef<'_>, &[u8]), DecodeError> {
    let cut = |need| DecodeError::Truncated { what: "record", need, have: bytes.len() };
    let fixed = bytes.first_chunk::<FIXED_SIZE>().ok_or(cut(FIXED_SIZE))?;
    let u16_at = |at: usize| usize::from(u16::from_le_bytes([fixed[at], fixed[at + 1]]));
    let u32_at = |at: usize| u32::from_le_bytes([fixed[at], fixed[at + 1], fixed[at + 2], fixed[at + 3]]) as usize;
    let size = u32_at(0).saturating_add(4);
    at_most("event", size, limits::RECORD_SIZE_MAX)?;
    if size < FIXED_SIZE || size > bytes.len() {
        return Err(cut(size));
    }
    if fixed[4] > EventType::Control as u8 {
        return Err(DecodeError::Value { field: "event type", value: u64::from(fixed[4]) });
    }
    if fixed[5] != 0 {
        return Err(DecodeError::Value { field: "record flags", value: u64::from(fixed[5]) });
    }
    let (schema_size, key_size, header_count, extension_size) = (u16_at(6), u16_at(8), u16_at(10), u32_at(12));
    let take = |from: &mut &'_ [u8], n: usize| -> Result<usize, DecodeError> {
        if from.len() < n { Err(cut(FIXED_SIZE + n)) } else { Ok(n) }
    };
    let mut rest = &bytes[FIXED_SIZE..size];
    let (schema, tail) = rest.split_at(take(&mut rest, schema_size)?);
    rest = tail;
    let (key, tail) = rest.split_at(take(&mut rest, key_size)?);
    rest = tail;
    let headers_start = rest;
    for _ in 0..header_count {
        let (_, _, tail) = split_header(rest).ok_or(DecodeError::Text { field: "header" })?;
        rest = tail;
    }
    let headers = &headers_start[..headers_start.len() - rest.len()];
    let (extension, payload) = rest.split_at(take(&mut rest, extension_size)?);
    let mut id = [0; 16];
    id.copy_from_slice(&fixed[16..32]);
    let schema = std::str::from_utf8(schema).map_err(|_| DecodeError::Text { field: "schema" })?;
    Ok((RecordRef { id, event_type: fixed[4], schema, key, headers, extension, payload }, &bytes[size..]))
}

/// The records section of a data batch, decompressed within its limits.
fn plain<'a>(header: &Header, stored: &'a [u8]) -> Result<Cow<'a, [u8]>, DecodeError> {
    let size = header.records_size_plain as usize;
    at_most("records", size, limits::BATCH_RECORDS_SIZE_MAX)?;
    let broken = DecodeError::Compression { plain: size };
    if header.compression == Compression::None {
        return if size == stored.len() { Ok(Cow::Borrowed(stored)) } else { Err(broken) };
    }
    if size > stored.len().saturating_mul(limits::COMPRESSION_RATIO_MAX) {
        return Err(broken);
    }
    let out = match header.compression {
        Compression::Lz4 => lz4_flex::block::decompress(stored, size).map_err(|_| broken.clone())?,
        _ => zstd::bulk::decompress(stored, size).map_err(|_| broken.clone())?,
    };
    if out.len() == size { Ok(Cow::Owned(out)) } else { Err(broken) }
}

/// Calls `visit` with every record of a data batch, in order.
///
/// # Errors
/// Records that do not decompress, are malformed, or are not as many as the header says; or
/// the first error that `visit` gives. Records before the error have been visited.
pub fn records<E: From<DecodeError>>(
    batch: &Batch,
    mut visit: impl FnMut(u32, RecordRef<'_>) -> Result<(), E>,
) -> Result<(), E> {
    let plain = plain(&batch.header, &batch.records)?;
    let mut rest: &[u8] = &plain;
    for index in 0..batch.header.record_count {
        let (record, tail) = decode_record(rest)?;
        visit(index, record)?;
        rest = tail;
    }
    if rest.is_empty() {
        Ok(())
    } else {
        Err(DecodeError::Value { field: "record count", value: u64::from(batch.header.record_count) }.into())
    }
}

/// The records of a data batch one by one, when the caller asks for them.
#[derive(Clone, Debug)]
pub struct RecordCursor {
    plain: Bytes,
    position: usize,
    left: u32,
}

impl RecordCursor {
    /// At the first record of `batch`; shares its bytes unless they are compressed.
    ///
    /// # Errors
    /// Records that do not decompress within their limits.
    pub fn new(batch: &Batch) -> Result<Self, DecodeError> {
        let plain = match plain(&batch.header, &batch.records)? {
            Cow::Borrowed(_) => batch.records.clone(),
            Cow::Owned(plain) => plain.into(),
        };
        Ok(Self { plain, position: 0, left: batch.header.record_count })
    }

    /// The next record, and the bytes that it and its parts are slices of; `None` after the last.
    ///
    /// # Errors
    /// A malformed record, or bytes after the last one; the cursor stays where it is.
    pub fn read(&mut self) -> Result<Option<(RecordRef<'_>, &Bytes)>, DecodeError> {
        let rest = &self.plain[self.position..];
        if self.left == 0 {
            let nothing_follows = rest.is_empty();
            return if nothing_follows {
                Ok(None)
            } else {
                Err(DecodeError::Value { field: "record count", value: 0 })
            };
        }
        let (record, tail) = decode_record(rest)?;
        self.position = self.plain.len() - tail.len();
        self.left -= 1;
        Ok(Some((record, &self.plain)))
    }

    /// Passes over the next record without looking at more than its size.
    ///
    /// # Errors
    /// A size that cannot be.
    pub fn skip(&mut self) -> Result<(), DecodeError> {
        let rest = &self.plain[self.position..];
        let cut = DecodeError::Truncated { what: "record", need: FIXED_SIZE, have: rest.len() };
        let size = rest.first_chunk::<4>().map(|size| (u32::from_le_bytes(*size) as usize).saturating_add(4));
        let size = size.filter(|size| (FIXED_SIZE..=rest.len()).contains(size)).ok_or(cut)?;
        self.position += size;
        self.left = self.left.saturating_sub(1);
        Ok(())
    }
}

/// What a leader checks of a client's batch before it may enter the log: kind, counts, and
/// every record against the limits on events. A matching CRC proves transport, not truth.
///
/// # Errors
/// The first rule that is broken.
pub fn check_records(batch: &Batch) -> Result<(), DecodeError> {
    let h = &batch.header;
    if h.kind != BatchKind::Data {
        return Err(DecodeError::Value { field: "batch kind", value: 0 });
    }
    let count = h.record_count as usize;
    if count == 0 || count > limits::BATCH_RECORD_COUNT_MAX {
        return Err(DecodeError::Value { field: "record count", value: count as u64 });
    }
    records(batch, |_, record| {
        at_most("payload", record.payload.len(), limits::PAYLOAD_SIZE_MAX)?;
        at_most("key", record.key.len(), limits::KEY_SIZE_MAX)?;
        let mut header_count = 0;
        for (name, value) in record.headers() {
            header_count += 1;
            at_most("header name", name.len(), limits::HEADER_NAME_SIZE_MAX)?;
            at_most("header value", value.len(), limits::HEADER_VALUE_SIZE_MAX)?;
        }
        at_most("headers", header_count, limits::HEADER_COUNT_MAX)?;
        check_schema(record.schema).map_err(|_| DecodeError::Text { field: "schema" })
    })
}

/// Who writes a batch, for de-duplication.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProducerStamp {
    /// A UUID that the producer keeps over reconnects.
    pub id: [u8; 16],
    /// Raised when a producer takes over from an earlier one of the same id.
    pub epoch: u32,
    /// Sequence of the first record of the batch, per partition, from 0.
    pub base_sequence: u64,
}

/// Collects records into one data batch.
#[derive(Debug, Default)]
pub struct BatchBuilder {
    plain: BytesMut,
    count: u32,
}

impl BatchBuilder {
    /// An empty batch.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Number of records so far.
    #[must_use]
    pub fn record_count(&self) -> u32 {
        self.count
    }

    /// Size of the records so far, before compression, in bytes.
    #[must_use]
    pub fn size(&self) -> usize {
        self.plain.len()
    }

    /// An empty batch that is built in `buffer`, whose memory is used again.
    #[must_use]
    pub fn in_buffer(mut buffer: BytesMut) -> Self {
        buffer.clear();
        Self { plain: buffer, count: 0 }
    }

    /// Whether `record` still fits.
    #[must_use]
    pub fn fits(&self, record: &Record) -> bool {
        self.has_room(record.encoded_size())
    }

    /// Whether a record of `size` bytes still fits.
    fn has_room(&self, size: usize) -> bool {
        // Room is left for the header and for a stamp per record.
        const ROOM: usize = limits::BATCH_SIZE_MAX - (64 << 10);
        let stamps = (self.count as usize + 1) * 24;
        (self.count as usize) < limits::BATCH_RECORD_COUNT_MAX && self.plain.len() + size + stamps <= ROOM
    }

    /// Adds a record.
    ///
    /// # Errors
    /// The record breaks a limit on events, or does not fit any more; nothing was added.
    pub fn push(&mut self, record: &Record) -> Result<(), DecodeError> {
        let parts = record.parts();
        parts.check()?;
        if !self.append(&parts) {
            let size = self.plain.len() + parts.encoded_size();
            return Err(DecodeError::TooLarge { field: "batch", size, limit: limits::BATCH_SIZE_MAX });
        }
        Ok(())
    }

    /// Adds a record that has passed [`RecordParts::check`]; `false` when it does not fit any
    /// more. The first always fits.
    pub fn append(&mut self, record: &RecordParts<'_>) -> bool {
        let size = record.encoded_size();
        assert!(size <= limits::RECORD_SIZE_MAX, "a record is checked before it is added");
        if self.count > 0 && !self.has_room(size) {
            return false;
        }
        encode_record(record, size, &mut self.plain);
        self.count += 1;
        true
    }

    /// The finished batch; compression is kept only where it saves space.
    #[must_use]
    pub fn build(self, compression: Compression, producer: Option<ProducerStamp>) -> Batch {
        let plain = self.plain.freeze();
        let packed = match compression {
            Compression::None => None,
            Compression::Lz4 => Some(lz4_flex::block::compress(&plain)),
            // Compressing into memory fails only when memory does; the batch is then sent as it is.
            Compression::Zstd => zstd::bulk::compress(&plain, ZSTD_LEVEL).ok(),
        };
        let worth = |packed: &Vec<u8>| {
            packed.len() < plain.len() && plain.len() <= packed.len() * limits::COMPRESSION_RATIO_MAX
        };
        let (compression, records) = match packed.filter(worth) {
            Some(packed) => (compression, Bytes::from(packed)),
            None => (Compression::None, plain.clone()),
        };
        let mut header = Header::new(BatchKind::Data);
        header.compression = compression;
        header.records_size = records.len() as u32;
        header.records_size_plain = plain.len() as u32;
        header.record_count = self.count;
        header.records_crc = crc32fast::hash(&records);
        if let Some(producer) = producer {
            header.producer_id = producer.id;
            header.producer_epoch = producer.epoch;
            header.base_sequence = producer.base_sequence;
        }
        Batch { header, stamps: Bytes::new(), records }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_record() -> impl Strategy<Value = Record> {
        (
            any::<[u8; 16]>(),
            0u8..7,
            prop::option::of("[a-z]{1,8}\\.[a-z]{1,8}\\.v[0-9]{1,2}"),
            prop::collection::vec(any::<u8>(), 0..40),
            prop::collection::vec(("[a-z-]{1,12}", ".{0,20}"), 0..4),
            prop::collection::vec(any::<u8>(), 0..20),
            prop::collection::vec(any::<u8>(), 0..300),
        )
            .prop_map(|(id, event_type, schema, key, headers, extension, payload)| Record {
                id,
                event_type,
                schema: schema.unwrap_or_default(),
                key: key.into(),
                headers,
                extension: extension.into(),
                payload: payload.into(),
            })
    }

    fn read_back(batch: &Batch) -> Result<Vec<Record>, DecodeError> {
        let mut out = Vec::new();
        records(batch, |_, record| {
            out.push(record.to_record());
            Ok::<_, DecodeError>(())
        })?;
        Ok(out)
    }

    proptest! {
        #[test]
        fn what_was_pushed_is_read_back(
            wanted in prop::collection::vec(any_record(), 1..20),
            compression in prop::sample::select(vec![Compression::None, Compression::Lz4, Compression::Zstd]),
        ) {
            let mut builder = BatchBuilder::new();
            for record in &wanted {
                builder.push(record).unwrap();
            }
            let batch = builder.build(compression, None);
            check_records(&batch).unwrap();
            let mut bytes = BytesMut::new();
            batch.encode_into(&mut bytes);
            let mut bytes = bytes.freeze();
            let decoded = Batch::split_from(&mut bytes).unwrap();
            prop_assert!(bytes.is_empty());
            prop_assert_eq!(read_back(&decoded).unwrap(), wanted);
        }

        #[test]
        fn one_flipped_bit_is_always_noticed(records in prop::collection::vec(any_record(), 1..4), at: prop::sample::Index, bit in 0u8..8) {
            let mut builder = BatchBuilder::new();
            for record in &records {
                builder.push(record).unwrap();
            }
            let mut bytes = BytesMut::new();
            builder.build(Compression::None, None).encode_into(&mut bytes);
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
            prop_assert!(Batch::split_from(&mut bytes.freeze()).is_err());
        }

        #[test]
        fn junk_with_a_valid_checksum_is_an_error_not_a_panic(junk in prop::collection::vec(any::<u8>(), 0..200), count in 0u32..5, kind in 0u8..3) {
            let mut header = Header::new(BatchKind::Data);
            header.compression = [Compression::None, Compression::Lz4, Compression::Zstd][usize::from(kind)];
            header.records_size = junk.len() as u32;
            header.records_size_plain = junk.len() as u32;
            header.record_count = count;
            let batch = Batch { header, stamps: Bytes::new(), records: junk.into() };
            let _ = check_records(&batch);
        }
    }

    #[test]
    fn a_cursor_gives_the_same_records_and_notices_the_same_lies() {
        for compression in [Compression::None, Compression::Lz4] {
            let mut builder = BatchBuilder::new();
            for number in 0..5u8 {
                builder.push(&Record { payload: vec![number; 100].into(), ..Default::default() }).unwrap();
            }
            let mut batch = builder.build(compression, None);
            let mut cursor = RecordCursor::new(&batch).unwrap();
            for number in 0..5u8 {
                if number % 2 == 1 {
                    cursor.skip().unwrap();
                    continue;
                }
                let (record, bytes) = cursor.read().unwrap().unwrap();
                assert_eq!(bytes.slice_ref(record.payload), vec![number; 100]);
            }
            assert!(cursor.read().unwrap().is_none() && cursor.skip().is_err());
            batch.header.record_count = 4;
            let mut cursor = RecordCursor::new(&batch).unwrap();
            (0..4).for_each(|_| cursor.skip().unwrap());
            assert!(cursor.read().is_err());
        }
    }

    #[test]
    fn a_lying_header_is_refused() {
        let mut builder = BatchBuilder::new();
        builder.push(&Record { payload: vec![0; 100_000].into(), ..Default::default() }).unwrap();
        let honest = builder.build(Compression::Zstd, None);
        let mut bomb = honest.clone();
        bomb.header.records_size_plain = u32::MAX;
        assert!(matches!(check_records(&bomb), Err(DecodeError::TooLarge { field: "records", .. })));
        let mut miscounted = honest;
        miscounted.header.record_count = 2;
        assert!(check_records(&miscounted).is_err());
    }

    #[test]
    fn limits_name_the_field() {
        let big = Record { payload: vec![0; limits::PAYLOAD_SIZE_MAX + 1].into(), ..Default::default() };
        let error = BatchBuilder::new().push(&big).unwrap_err().to_string();
        assert!(error.starts_with("payload has 1048577 bytes, the limit is 1048576"), "{error}");
        let schema = Record { schema: "no version".into(), ..Default::default() };
        assert!(matches!(schema.check(), Err(DecodeError::Text { field: "schema" })));
    }
}
