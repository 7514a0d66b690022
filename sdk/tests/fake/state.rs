//! What the bus in memory knows.

use std::{
    collections::{BTreeMap, HashMap},
    time::{Duration, Instant},
};

use arqon_proto::{Batch, Offset, check_records, encode_stamps, wire};
use bytes::{Bytes, BytesMut};
use wire::{ErrorCode, LeaseRef, frame::Body, list_offsets::At};

type Answer = Result<(Body, Vec<Bytes>), wire::Error>;

#[derive(Default)]
pub struct State {
    pub topics: BTreeMap<String, Topic>,
    pub addresses: Vec<String>,
    /// `NOT_LEADER` answers name the leader.
    pub names_leader: bool,
    /// Whom nodes that are cut off from the others take for the leader of everything; `None`: nobody.
    pub cut_off: HashMap<usize, Option<usize>>,
    /// Requests seen, by the name of their body.
    pub seen: HashMap<&'static str, u32>,
}

pub struct Topic {
    pub partitions: Vec<Partition>,
    pub leaders: Vec<usize>,
}

#[derive(Default)]
pub struct Partition {
    pub batches: Vec<Batch>,
    pub next: u64,
    pub log_start: u64,
    producers: HashMap<[u8; 16], ProducerState>,
    results: HashMap<Bytes, u64>,
    pub queues: HashMap<String, Queue>,
}

#[derive(Default)]
struct ProducerState {
    epoch: u32,
    next: u64,
    recent: Vec<(u64, u32, u64)>,
}

#[derive(Default)]
pub struct Queue {
    pub next: u64,
    /// Leased jobs and their attempt.
    pub leased: BTreeMap<u64, u32>,
    /// When their leases end.
    ends: HashMap<u64, Instant>,
    lease_time: Duration,
    /// Jobs given back and the attempts made.
    pub pending: BTreeMap<u64, u32>,
    pub settled: Vec<u64>,
    pub renewals: u32,
}

impl Queue {
    fn end_leases(&mut self) {
        let now = Instant::now();
        let ended: Vec<u64> = self.leased.keys().copied().filter(|offset| self.ends[offset] <= now).collect();
        for offset in ended {
            if let Some(attempt) = self.leased.remove(&offset) {
                self.pending.insert(offset, attempt);
            }
        }
    }
}

pub fn error(code: ErrorCode, message: &str, field: &str) -> wire::Error {
    wire::Error { code: code.into(), message: message.to_owned(), field: field.to_owned(), ..Default::default() }
}

impl State {
    pub fn create(&mut self, topic: &str, partition_count: usize) {
        let node_count = self.addresses.len();
        self.topics.insert(
            topic.to_owned(),
            Topic {
                partitions: (0..partition_count).map(|_| Partition::default()).collect(),
                leaders: (0..partition_count).map(|index| index % node_count).collect(),
            },
        );
    }

    pub fn topic(&mut self, topic: &str) -> &mut Topic {
        self.topics.get_mut(topic).unwrap()
    }

    pub fn partition(&mut self, topic: &str, partition: u32) -> &mut Partition {
        &mut self.topic(topic).partitions[partition as usize]
    }

    /// Payloads in order of their offsets.
    pub fn payloads(&mut self, topic: &str, partition: u32) -> Vec<Bytes> {
        let mut out = Vec::new();
        for batch in &self.partition(topic, partition).batches {
            arqon_proto::records(batch, |_, record| {
                out.push(Bytes::copy_from_slice(record.payload));
                Ok::<_, arqon_proto::DecodeError>(())
            })
            .unwrap();
        }
        out
    }

    fn led(&mut self, node: Option<usize>, topic: &str, partition: u32) -> Result<&mut Partition, wire::Error> {
        let unknown = error(ErrorCode::TargetNotFound, &format!("topic {topic} does not exist"), "topic");
        let addresses = self.addresses.clone();
        let names_leader = self.names_leader;
        let found = self.topics.get_mut(topic).ok_or(unknown.clone())?;
        let leader = *found.leaders.get(partition as usize).ok_or(unknown)?;
        if node.is_some_and(|node| node != leader) {
            let mut refused = error(ErrorCode::NotLeader, "another node leads", "");
            if names_leader {
                refused.leader_address = addresses[leader].clone();
            }
            return Err(refused);
        }
        Ok(&mut found.partitions[partition as usize])
    }

    pub fn handle(&mut self, node: Option<usize>, body: &Body, payload: &Bytes) -> Answer {
        match body {
            Body::Hello(hello) if hello.token == "wrong" => {
                Err(error(ErrorCode::AuthenticationFailed, "token is wrong", "token"))
            }
            Body::Hello(_) => {
                let welcome = wire::Welcome { version: 1, tenant: "acme".into(), ..Default::default() };
                Ok((Body::Welcome(welcome), Vec::new()))
            }
            Body::Ping(_) => Ok((Body::Pong(wire::Pong {}), Vec::new())),
            Body::DescribeTopic(asked) => self.describe(node, &asked.topic),
            Body::Produce(produce) => self.produce(node, produce, payload),
            Body::Fetch(fetch) => {
                let node = node.filter(|_| !fetch.any_replica);
                self.led(node, &fetch.topic, fetch.partition)?.fetch(fetch)
            }
            Body::ListOffsets(list) => {
                let node = node.filter(|_| !list.any_replica);
                let partition = self.led(node, &list.topic, list.partition)?;
                let offset = match list.at {
                    Some(At::Earliest(_)) => partition.log_start,
                    Some(At::TimeMs(time)) => {
                        let after = partition.batches.iter().find(|batch| batch.header.time_ms >= time);
                        after.map_or(partition.next, |batch| batch.header.base_offset.0)
                    }
                    _ => partition.next,
                };
                Ok((Body::OffsetsListed(wire::OffsetsListed { offset }), Vec::new()))
            }
            Body::Work(work) => self.led(node, &work.topic, work.partition)?.work(work),
            Body::Ack(ack) => self.led(node, &ack.topic, ack.partition)?.settle(&ack.group, &ack.leases, "ack"),
            Body::Nack(nack) => self.led(node, &nack.topic, nack.partition)?.settle(&nack.group, &nack.leases, "nack"),
            Body::Renew(renew) => {
                self.led(node, &renew.topic, renew.partition)?.settle(&renew.group, &renew.leases, "renew")
            }
            _ => Err(error(ErrorCode::ValidationError, "not a request", "body")),
        }
    }

    fn describe(&mut self, node: Option<usize>, topic: &str) -> Answer {
        *self.seen.entry("describe").or_default() += 1;
        let unknown = error(ErrorCode::TargetNotFound, &format!("topic {topic} does not exist"), "topic");
        let found = self.topics.get(topic).ok_or(unknown)?;
        let nodes: Vec<u64> = (1..=self.addresses.len() as u64).collect();
        let believed = node.and_then(|node| self.cut_off.get(&node));
        let partitions = found.leaders.iter().enumerate().map(|(partition, leader)| {
            let leader = believed.copied().unwrap_or(Some(*leader));
            wire::PartitionDescription {
                partition: partition as u32,
                leader_node: leader.map_or(0, |leader| leader as u64 + 1),
                leader_address: leader.map_or_else(String::new, |leader| self.addresses[leader].clone()),
                replica_nodes: nodes.clone(),
                replica_addresses: self.addresses.clone(),
            }
        });
        let description =
            wire::TopicDescription { topic: topic.to_owned(), partitions: partitions.collect(), ..Default::default() };
        Ok((Body::TopicDescription(description), Vec::new()))
    }

    fn produce(&mut self, node: Option<usize>, produce: &wire::Produce, payload: &Bytes) -> Answer {
        *self.seen.entry("produce").or_default() += 1;
        let partition = self.led(node, &produce.topic, produce.partition)?;
        let bad = |refused: arqon_proto::DecodeError| error(ErrorCode::ValidationError, &refused.to_string(), "batch");
        let mut bytes = payload.clone();
        let mut batch = Batch::split_from(&mut bytes).map_err(bad)?;
        check_records(&batch).map_err(bad)?;
        let mut refused = Ok(());
        arqon_proto::records(&batch, |_, record| {
            if record.payload == b"poison" {
                refused = Err(error(ErrorCode::PolicyBlocked, "poison is not allowed", "payload"));
            }
            Ok::<_, arqon_proto::DecodeError>(())
        })
        .map_err(bad)?;
        refused?;
        partition.check_sequence(&batch)?;
        partition.check_tokens(&produce.lease_tokens, &mut batch)?;
        Ok((Body::Produced(partition.append(batch, produce.durability)), Vec::new()))
    }
}

impl Partition {
    fn check_sequence(&mut self, batch: &Batch) -> Result<(), wire::Error> {
        let header = &batch.header;
        if !header.has_producer() {
            return Ok(());
        }
        let (sequence, count) = (header.base_sequence, header.record_count);
        let known = self.producers.contains_key(&header.producer_id);
        if !known && sequence > 0 {
            return Err(error(ErrorCode::UnknownProducer, "producer is not known", "producer_id"));
        }
        let next = self.next;
        let state = self.producers.entry(header.producer_id).or_default();
        if header.producer_epoch < state.epoch {
            return Err(error(ErrorCode::ProducerFenced, "a newer epoch exists", "producer_epoch"));
        }
        if header.producer_epoch > state.epoch {
            *state = ProducerState { epoch: header.producer_epoch, ..Default::default() };
        }
        if sequence > state.next {
            return Err(error(ErrorCode::OutOfOrder, "a sequence is missing", "sequence"));
        }
        if sequence < state.next {
            let offset = state.recent.iter().find(|known| known.0 == sequence).map(|known| known.2);
            let mut refused = error(ErrorCode::Duplicate, "the batch is known", "sequence");
            refused.duplicates = (0..u64::from(count))
                .map(|index| wire::Duplicate {
                    sequence: sequence + index,
                    offset: offset.map(|offset| offset + index),
                })
                .collect();
            return Err(refused);
        }
        state.next += u64::from(count);
        state.recent.push((sequence, count, next));
        if state.recent.len() > arqon_proto::limits::PRODUCER_BATCH_COUNT {
            state.recent.remove(0);
        }
        Ok(())
    }

    fn check_tokens(&mut self, tokens: &[Bytes], batch: &mut Batch) -> Result<(), wire::Error> {
        if tokens.is_empty() {
            return Ok(());
        }
        let mut refused = error(ErrorCode::Duplicate, "a result stands already", "lease_tokens");
        let mut stamps = Vec::new();
        for token in tokens {
            let text = String::from_utf8_lossy(token).into_owned();
            let (job, attempt) = text.rsplit_once('#').unwrap();
            let (topic, offset) = job.rsplit_once('@').unwrap();
            let job = Bytes::from(job.to_owned());
            let source = wire::StampSource { topic: topic.to_owned(), ..Default::default() };
            stamps.push((source, offset.parse().unwrap(), attempt.parse().unwrap()));
            if let Some(known) = self.results.get(&job) {
                let sequence = offset.parse().unwrap();
                refused.duplicates.push(wire::Duplicate { sequence, offset: Some(*known) });
            }
            self.results.entry(job).or_insert(self.next);
        }
        batch.set_stamps(encode_stamps(stamps));
        if refused.duplicates.is_empty() { Ok(()) } else { Err(refused) }
    }

    fn append(&mut self, mut batch: Batch, durability: i32) -> wire::Produced {
        batch.header.base_offset = Offset(self.next);
        batch.header.time_ms = 1_000 + self.next;
        let produced = wire::Produced { base_offset: self.next, time_ms: batch.header.time_ms, durability };
        self.next = batch.header.next_offset().0;
        self.batches.push(batch);
        produced
    }

    fn fetch(&mut self, fetch: &wire::Fetch) -> Answer {
        if fetch.offset < self.log_start || fetch.offset > self.next {
            let mut refused = error(ErrorCode::OffsetOutOfRange, "offset is not there", "offset");
            refused.log_start = self.log_start;
            return Err(refused);
        }
        let topic = if fetch.offset == self.next { "(nothing)".to_owned() } else { fetch.topic.clone() };
        let fetched =
            wire::Fetched { committed: self.next, log_start: self.log_start, topic, partition: fetch.partition };
        Ok((Body::Fetched(fetched), self.encoded(|batch| batch.header.next_offset().0 > fetch.offset, fetch.bytes_max)))
    }

    fn encoded(&self, wanted: impl Fn(&Batch) -> bool, bytes_max: u32) -> Vec<Bytes> {
        let mut out = Vec::new();
        let mut size = 0;
        for batch in self.batches.iter().filter(|batch| wanted(batch)) {
            if size > 0 && bytes_max > 0 && size + batch.header.batch_size() > bytes_max as usize {
                break;
            }
            size += batch.header.batch_size();
            let mut bytes = BytesMut::new();
            batch.encode_into(&mut bytes);
            out.push(bytes.freeze());
        }
        out
    }

    fn work(&mut self, work: &wire::Work) -> Answer {
        let queue = self.queues.entry(work.group.clone()).or_default();
        queue.lease_time = Duration::from_millis(u64::from(work.lease_ms));
        queue.end_leases();
        let mut leases = Vec::new();
        while leases.len() < work.jobs_max as usize {
            let (offset, attempt) = match queue.pending.pop_first() {
                Some((offset, attempts)) => (offset, attempts + 1),
                None if queue.next < self.next => {
                    queue.next += 1;
                    (queue.next - 1, 1)
                }
                None => break,
            };
            queue.leased.insert(offset, attempt);
            queue.ends.insert(offset, Instant::now() + queue.lease_time);
            let token = format!("{}@{offset}#{attempt}", work.topic).into();
            leases.push(wire::Lease { offset, attempt, lease_ms: work.lease_ms, token });
        }
        let granted: Vec<u64> = leases.iter().map(|lease| lease.offset).collect();
        let holds = |batch: &Batch| {
            let header = &batch.header;
            granted.iter().any(|offset| (header.base_offset.0..header.next_offset().0).contains(offset))
        };
        let leased = wire::Leased { leases, topic: work.topic.clone(), partition: work.partition };
        Ok((Body::Leased(leased), self.encoded(holds, 0)))
    }

    fn settle(&mut self, group: &str, leases: &[LeaseRef], how: &str) -> Answer {
        let queue = self.queues.entry(group.to_owned()).or_default();
        let mut settled = wire::Settled::default();
        for lease in leases {
            if queue.leased.get(&lease.offset) != Some(&lease.attempt) {
                settled.lost.push(*lease);
                continue;
            }
            match how {
                "ack" => {
                    queue.leased.remove(&lease.offset);
                    queue.settled.push(lease.offset);
                }
                "nack" => {
                    queue.leased.remove(&lease.offset);
                    queue.pending.insert(lease.offset, lease.attempt);
                }
                _ => {
                    queue.renewals += 1;
                    queue.ends.insert(lease.offset, Instant::now() + queue.lease_time);
                }
            }
        }
        Ok((Body::Settled(settled), Vec::new()))
    }

    /// Takes a lease away, as if it had run out.
    pub fn expire(&mut self, group: &str, offset: u64) {
        let queue = self.queues.get_mut(group).unwrap();
        let attempt = queue.leased.remove(&offset).unwrap();
        queue.pending.insert(offset, attempt);
    }
}
