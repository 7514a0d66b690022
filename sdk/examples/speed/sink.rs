//! The server that does nothing: it takes every batch, and has jobs and events without end.

use arqon_proto::{
    Batch, BatchBuilder, Compression, Header, Offset, Record, decode_frame, encode_frame, frame_size, wire,
};
use bytes::{Bytes, BytesMut};
use futures_util::{SinkExt, StreamExt};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};
use tokio_tungstenite::tungstenite::{Message, handshake::server};
use wire::frame::Body;

const FETCH_SIZE: usize = 1 << 20;
const BATCH_SIZE: usize = 128 << 10;

pub fn run(size: usize, partitions: u32) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    runtime.block_on(async {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        println!("{address}");
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            stream.set_nodelay(true).unwrap();
            let sink =
                Sink { address: address.clone(), partitions, offset: 0, granted: 0, batch: batch(size, BATCH_SIZE) };
            tokio::spawn(serve(stream, sink));
        }
    });
}

fn batch(size: usize, batch_size: usize) -> Batch {
    let mut builder = BatchBuilder::new();
    let record = Record { payload: vec![7; size].into(), ..Record::default() };
    while builder.record_count() == 0 || builder.size() + record.encoded_size() <= batch_size {
        builder.push(&record).unwrap();
    }
    builder.build(Compression::None, None)
}

struct Sink {
    address: String,
    partitions: u32,
    offset: u64,
    granted: u64,
    batch: Batch,
}

impl Sink {
    /// The frame's answer.
    fn answer(&mut self, frame: Bytes) -> Option<Vec<Bytes>> {
        let (frame, payload) = decode_frame::<wire::Frame>(frame).ok()?;
        let mut batches = Vec::new();
        let body = match frame.body? {
            Body::Hello(_) => {
                Body::Welcome(wire::Welcome { version: 1, tenant: "acme".to_owned(), ..Default::default() })
            }
            Body::Ping(_) => Body::Pong(wire::Pong {}),
            Body::DescribeTopic(describe) => Body::TopicDescription(self.description(describe.topic)),
            Body::Produce(_) => {
                let base_offset = self.offset;
                self.offset += u64::from(Header::decode(&payload).ok()?.record_count);
                Body::Produced(wire::Produced { base_offset, time_ms: 1, durability: 0 })
            }
            Body::ListOffsets(_) => Body::OffsetsListed(wire::OffsetsListed { offset: 0 }),
            Body::Fetch(fetch) => {
                let mut offset = fetch.offset;
                while batches.len() * BATCH_SIZE < FETCH_SIZE.min(fetch.bytes_max as usize) * 2 {
                    self.push_batch(offset, &mut batches);
                    offset += u64::from(self.batch.header.record_count);
                }
                Body::Fetched(wire::Fetched { committed: u64::MAX, ..Default::default() })
            }
            Body::Work(work) => {
                let end = self.granted + u64::from(work.jobs_max);
                let mut offset = self.granted - self.granted % u64::from(self.batch.header.record_count);
                while offset < end {
                    self.push_batch(offset, &mut batches);
                    offset += u64::from(self.batch.header.record_count);
                }
                let lease = |offset| wire::Lease { offset, attempt: 1, lease_ms: 30_000, token: vec![1; 64].into() };
                let leases = (self.granted..end).map(lease).collect();
                self.granted = end;
                Body::Leased(wire::Leased { leases, ..Default::default() })
            }
            Body::Ack(_) | Body::Nack(_) | Body::Renew(_) => Body::Settled(wire::Settled::default()),
            _ => return None,
        };
        let size = batches.iter().map(Bytes::len).sum();
        let head = encode_frame(&wire::Frame { request_id: frame.request_id, body: Some(body) }, size).ok()?;
        batches.insert(0, head);
        Some(batches)
    }

    fn push_batch(&mut self, offset: u64, out: &mut Vec<Bytes>) {
        self.batch.header.base_offset = Offset(offset);
        out.push(Bytes::copy_from_slice(&self.batch.header.encode()));
        out.push(self.batch.records.clone());
    }

    fn description(&self, topic: String) -> wire::TopicDescription {
        let partition = |partition| wire::PartitionDescription {
            partition,
            leader_node: 1,
            leader_address: self.address.clone(),
            replica_nodes: vec![1],
            replica_addresses: vec![self.address.clone()],
        };
        wire::TopicDescription {
            topic,
            partitions: (0..self.partitions).map(partition).collect(),
            ..Default::default()
        }
    }
}

async fn serve(mut stream: TcpStream, mut sink: Sink) -> Option<()> {
    let mut start = [0; 4];
    stream.peek(&mut start).await.ok()?;
    if &start == b"GET " {
        return serve_websocket(stream, sink).await;
    }
    let mut buffer = BytesMut::new();
    loop {
        while let Some(size) = frame_size(&buffer).ok()?.filter(|size| buffer.len() >= *size) {
            for piece in sink.answer(buffer.split_to(size).freeze())? {
                stream.write_all(&piece).await.ok()?;
            }
        }
        buffer.reserve(1 << 20);
        if stream.read_buf(&mut buffer).await.ok()? == 0 {
            return None;
        }
    }
}

async fn serve_websocket(stream: TcpStream, mut sink: Sink) -> Option<()> {
    #[expect(clippy::result_large_err, reason = "the library's signature")]
    let accept = |_: &server::Request, mut response: server::Response| {
        response.headers_mut().insert("sec-websocket-protocol", "arqonbus.v1".parse().unwrap());
        Ok(response)
    };
    let mut socket = tokio_tungstenite::accept_hdr_async(stream, accept).await.ok()?;
    while let Some(Ok(message)) = socket.next().await {
        let Message::Binary(frame) = message else { continue };
        let answer = sink.answer(frame)?.concat();
        socket.send(Message::Binary(answer.into())).await.ok()?;
    }
    None
}
