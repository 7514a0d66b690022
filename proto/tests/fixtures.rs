//! Batches written by earlier versions of this program must open for ever.
//!
//! A new layout gets new files; `ARQON_WRITE_FIXTURES=1` writes those that do not exist yet and
//! never changes one that does.
#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::{fs, path::PathBuf};

use arqon_proto::{
    Batch, BatchBuilder, BatchKind, Compression, DecodeError, EventType, Header, LeaseKey, Offset, ProducerStamp,
    RaftIndex, Record, Term, decode_frame, decode_stamps, encode_frame, encode_stamps, records, wire,
};
use bytes::{Bytes, BytesMut};

fn record(n: u8) -> Record {
    Record {
        id: [n; 16],
        event_type: EventType::Job as u8,
        schema: "arqonbus.nvm.job.v1".into(),
        key: Bytes::from(vec![b'k', n]),
        headers: vec![("traceparent".into(), "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".into())],
        extension: Bytes::from_static(&[0xf2, 0x01, 0x01, 0x21]),
        payload: Bytes::from(vec![n; 100 + usize::from(n)]),
    }
}

fn batch(compression: Compression) -> Batch {
    let mut builder = BatchBuilder::new();
    for n in 0..3 {
        builder.push(&record(n)).unwrap();
    }
    let producer = ProducerStamp { id: *b"0123456789abcdef", epoch: 2, base_sequence: 40 };
    let mut batch = builder.build(compression, Some(producer));
    batch.header.time_ms = 1_700_000_000_123;
    batch.header.base_offset = Offset(77);
    batch.header.term = Term(5);
    batch.header.index = RaftIndex(99);
    batch.header.chain = 0x0123_4567_89ab_cdef;
    batch
}

fn source() -> wire::StampSource {
    wire::StampSource {
        topic: "nvm.jobs".into(),
        partition: 1,
        group: "nvm".into(),
        operator_id: "rig-1".into(),
        operator_version: "1.2.0".into(),
        circuit_revision: 3,
        replay_id: String::new(),
        acked_floor: 10,
    }
}

fn encoded(batch: &Batch) -> Vec<u8> {
    let mut out = BytesMut::new();
    batch.encode_into(&mut out);
    out.to_vec()
}

/// The bytes of the fixture `name`; `made` is what this program writes for it.
fn fixture(name: &str, made: &[u8]) -> Vec<u8> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(name);
    if !path.exists() && std::env::var_os("ARQON_WRITE_FIXTURES").is_some() {
        fs::write(&path, made).unwrap();
    }
    fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

#[test]
fn plain_and_stamped_batches_are_written_as_ever() {
    let plain = batch(Compression::None);
    assert_eq!(fixture("batch-v1-plain.bin", &encoded(&plain)), encoded(&plain));
    let mut stamped = plain;
    stamped.set_stamps(encode_stamps((0..3).map(|n| (source(), 20 + n, 1))));
    let bytes = fixture("batch-v1-stamped.bin", &encoded(&stamped));
    assert_eq!(bytes, encoded(&stamped));
    let read = Batch::split_from(&mut Bytes::from(bytes)).unwrap();
    let stamps = decode_stamps(&read.stamps, read.header.record_count).unwrap().unwrap();
    let causes: Vec<_> = stamps.iter().map(|stamp| (stamp.cause().topic, stamp.offset, stamp.attempt)).collect();
    assert_eq!(causes, (0..3).map(|n| ("nvm.jobs".to_owned(), 20 + n, 1)).collect::<Vec<_>>());
}

#[test]
fn compressed_batches_open() {
    for (name, compression) in [("batch-v1-lz4.bin", Compression::Lz4), ("batch-v1-zstd.bin", Compression::Zstd)] {
        let bytes = fixture(name, &encoded(&batch(compression)));
        let read = Batch::split_from(&mut Bytes::from(bytes)).unwrap();
        assert_eq!(read.header.compression, compression);
        let mut found = Vec::new();
        records(&read, |_, record| {
            found.push(record.to_record());
            Ok::<_, DecodeError>(())
        })
        .unwrap();
        assert_eq!(found, (0..3).map(record).collect::<Vec<_>>());
    }
}

#[test]
fn control_batches_chain_values_frames_and_tokens_are_written_as_ever() {
    let ranges = vec![wire::OffsetRange { first: 7, count: 2, attempt: 1 }];
    let command = wire::QueueCommand {
        group: "nvm".into(),
        command: Some(wire::queue_command::Command::Ack(wire::QueueAck { ranges })),
    };
    let message = prost::Message::encode_to_vec(&wire::ControlRecord { queue: vec![command], log_start: None });
    let mut control = Batch::internal(BatchKind::Control, message.into());
    control.header.index = RaftIndex(100);
    assert_eq!(fixture("batch-v1-control.bin", &encoded(&control)), encoded(&control));

    let chain = Header::chain_value(&control.header.encode()).to_le_bytes();
    assert_eq!(fixture("chain-v1.bin", &chain), chain);

    let fetch = wire::Fetch { topic: "nvm.results".into(), partition: 1, offset: 5, ..Default::default() };
    let frame = wire::Frame { request_id: 9, body: Some(wire::frame::Body::Fetch(fetch)) };
    let made = encode_frame(&frame, 0).unwrap();
    let bytes = fixture("frame-v1-fetch.bin", &made);
    assert_eq!(bytes, made);
    assert_eq!(decode_frame::<wire::Frame>(bytes.into()).unwrap().0, frame);

    let key = LeaseKey::new(3, &[9; 32]);
    let claims = wire::LeaseClaims {
        tenant: "lab".into(),
        topic: "nvm.jobs".into(),
        offset: 7,
        attempt: 1,
        ..Default::default()
    };
    let token = key.sign(&claims);
    assert_eq!(fixture("lease-v1.bin", &token), token);
    assert_eq!(LeaseKey::verify(&[key], &token).unwrap(), claims);
}

#[test]
fn a_batch_of_a_newer_version_is_named_not_guessed_at() {
    let mut bytes = encoded(&batch(Compression::None));
    bytes[4] = 2;
    let crc = crc32fast::hash(&bytes[..124]);
    bytes[124..128].copy_from_slice(&crc.to_le_bytes());
    let error = Batch::split_from(&mut Bytes::from(bytes)).unwrap_err();
    assert_eq!(error, DecodeError::Version { what: "batch", version: 2 });
}
