//! Batches, their records and their stamps.

use arqon_proto::{
    BATCH_HEADER_SIZE, Batch, BatchBuilder, Compression, DecodeError, Header, LeaseKey, ProducerStamp, Record,
    RecordCursor, check_records, decode_stamps, limits, records as visit_records,
};
use bytes::{Bytes, BytesMut};

use super::Source;

/// Any bytes as a batch: what decodes is encoded to the same bytes, and no byte is read twice or left out.
pub fn batch(data: &[u8]) {
    decode(data);
    decode(&with_checksums(data));
    if let Ok(header) = Header::decode(data) {
        assert_eq!(Header::decode(&header.encode()), Ok(header));
    }
    let keys = [LeaseKey::new(1, &[7; 32])];
    assert!(LeaseKey::verify(&keys, data).is_err(), "a lease was accepted that nobody has signed");
}

fn decode(data: &[u8]) {
    let mut rest = Bytes::copy_from_slice(data);
    while let Ok(batch) = Batch::split_from(&mut rest) {
        assert_eq!(batch.check_crcs(), Ok(()));
        let mut again = BytesMut::new();
        batch.encode_into(&mut again);
        assert_eq!(again.len(), batch.header.batch_size());
        assert_eq!(Batch::split_from(&mut again.freeze()).as_ref(), Ok(&batch));
        read(&batch);
    }
    // A refusal takes nothing.
    let before = rest.clone();
    let _ = Batch::split_from(&mut rest);
    assert_eq!(rest, before);
}

/// Reads the records of a batch in every way; all must agree.
fn read(batch: &Batch) {
    let (mut count, mut size) = (0, 0);
    let visited = visit_records(batch, |number, record| {
        assert_eq!(number, count);
        count += 1;
        let record = record.to_record();
        size += record.encoded_size();
        assert!(record.headers.iter().all(|(name, value)| name.len() + value.len() <= record.encoded_size()));
        Ok::<_, DecodeError>(())
    });
    assert!(size <= limits::BATCH_RECORDS_SIZE_MAX, "records of {size} bytes came out of a batch");
    if visited.is_ok() {
        assert_eq!((count, size), (batch.header.record_count, batch.header.records_size_plain as usize));
    }
    if check_records(batch).is_ok() {
        assert_eq!(visited, Ok(()));
    }
    let Ok(mut cursor) = RecordCursor::new(batch) else {
        assert!(visited.is_err(), "records are visited that a cursor does not open");
        return;
    };
    let mut skipper = cursor.clone();
    let mut read_count = 0;
    let ended = loop {
        match cursor.read() {
            Ok(Some(_)) => read_count += 1,
            Ok(None) => break Ok(()),
            Err(error) => break Err(error),
        }
        assert_eq!(skipper.skip(), Ok(()));
    };
    assert_eq!((read_count, ended.is_ok()), (count, visited.is_ok()), "a cursor reads other records than a visit");
    let _ = decode_stamps(&batch.stamps, batch.header.record_count);
}

/// The same bytes with magic, version, sizes and checksums of a batch that is all of them.
fn with_checksums(data: &[u8]) -> Vec<u8> {
    let mut bytes = data.to_vec();
    if bytes.len() < BATCH_HEADER_SIZE {
        return bytes;
    }
    bytes[..5].copy_from_slice(b"ARQB\x01");
    bytes[5] = 1 + bytes[5] % 3;
    bytes[6] %= 3;
    let size = bytes.len() as u32;
    bytes[8..12].copy_from_slice(&size.to_le_bytes());
    let stamps_size = u32::from_le_bytes([bytes[12], bytes[13], 0, 0]) % (size - BATCH_HEADER_SIZE as u32 + 1);
    bytes[12..16].copy_from_slice(&stamps_size.to_le_bytes());
    let (stamps, records) = bytes[BATCH_HEADER_SIZE..].split_at(stamps_size as usize);
    let stamps_crc = if stamps.is_empty() { 0 } else { crc32fast::hash(stamps) };
    let records_crc = crc32fast::hash(records);
    bytes[24..28].copy_from_slice(&records_crc.to_le_bytes());
    bytes[28..32].copy_from_slice(&stamps_crc.to_le_bytes());
    let crc = crc32fast::hash(&bytes[..124]);
    bytes[124..128].copy_from_slice(&crc.to_le_bytes());
    bytes
}

fn compression(number: u8) -> Compression {
    [Compression::None, Compression::Lz4, Compression::Zstd][usize::from(number) % 3]
}

/// Records made from the bytes come out of a batch as they went in. And the bytes as a records section,
/// stored plain or compressed, whatever the header says of them.
pub fn records(data: &[u8]) {
    let mut source = Source(data);
    let how = compression(source.byte());
    let mut builder = BatchBuilder::new();
    let mut given = Vec::new();
    while !source.is_empty() && given.len() < 100 {
        let mut id = [0; 16];
        id.fill_with(|| source.byte());
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let size = |source: &mut Source<'_>| usize::from(source.byte());
        let record = Record {
            id,
            event_type: source.byte() % 7,
            schema: {
                let size = size(&mut source) % 16;
                text(source.take(size))
            },
            key: {
                let size = size(&mut source);
                Bytes::copy_from_slice(source.take(size))
            },
            headers: (0..source.byte() % 4)
                .map(|_| {
                    let size = size(&mut source) % 32;
                    (text(source.take(size)), text(source.take(size)))
                })
                .collect(),
            extension: {
                let size = size(&mut source);
                Bytes::copy_from_slice(source.take(size))
            },
            payload: {
                let size = source.number();
                Bytes::copy_from_slice(source.take(size))
            },
        };
        if builder.push(&record).is_ok() {
            given.push(record);
        }
    }
    if !given.is_empty() {
        let producer = ProducerStamp { id: [1; 16], epoch: 1, base_sequence: 9 };
        let batch = builder.build(how, Some(producer));
        let mut bytes = BytesMut::new();
        batch.encode_into(&mut bytes);
        let found = Batch::split_from(&mut bytes.freeze()).expect("what was built decodes");
        assert_eq!(found, batch);
        assert_eq!(check_records(&found), Ok(()));
        let mut read = Vec::new();
        visit_records(&found, |_, record| {
            read.push(record.to_record());
            Ok::<_, DecodeError>(())
        })
        .expect("what was built is read");
        assert_eq!(read, given);
    }

    let mut source = Source(data);
    let mut batch = Batch::internal(arqon_proto::BatchKind::Control, Bytes::new());
    batch.header.kind = arqon_proto::BatchKind::Data;
    batch.header.compression = compression(source.byte());
    batch.header.record_count = source.number() as u32;
    batch.header.records_size_plain = source.number() as u32 * (1 + u32::from(source.byte()) * 16);
    batch.records = Bytes::copy_from_slice(source.0);
    batch.header.records_size = batch.records.len() as u32;
    read(&batch);
}

/// Any bytes as the stamps of a batch: what decodes has a source for every record.
pub fn stamps(data: &[u8]) {
    let mut source = Source(data);
    let count = u32::from(source.byte());
    if let Ok(Some(stamps)) = decode_stamps(&Bytes::copy_from_slice(source.0), count) {
        let views: Vec<_> = stamps.iter().map(|stamp| (stamp.source.clone(), stamp.offset, stamp.attempt)).collect();
        assert_eq!(views.len(), count as usize);
        let again = arqon_proto::encode_stamps(views.iter().cloned());
        let found = decode_stamps(&again, count).expect("what was encoded decodes");
        let found = found
            .map(|stamps| stamps.iter().map(|stamp| (stamp.source.clone(), stamp.offset, stamp.attempt)).collect());
        assert_eq!(found, (count > 0).then_some(views));
    }
}
