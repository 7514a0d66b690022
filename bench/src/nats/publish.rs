//! Publishing to a stream in each way that JetStream has: every message acknowledged, fast-ingest
//! batches (periodic acknowledgements) and atomic batches. Only what is acknowledged counts.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use super::{
    client::{Connection, WRITE_SIZE},
    wire::{self, Message},
};
use crate::{
    load::{Latencies, Measured},
    payload::Payloads,
};

/// Most messages of one atomic batch that a server takes.
const ATOMIC_COUNT_MAX: u64 = 1_000;
/// Least batches in flight, so that one is filled while the other is acknowledged.
const BATCHES_IN_FLIGHT: u64 = 4;
/// Acknowledgements of a fast-ingest batch per window.
const FLOW_PER_WINDOW: u64 = 4;
/// Bytes queued before they are sent although more could follow.
const BURST_SIZE: usize = WRITE_SIZE / 4;

/// The ways to publish many messages.
pub const METHODS: [&str; 3] = ["windowed", "fast-ingest", "atomic"];

/// What is published, and how long.
#[derive(Clone, Copy)]
pub struct Job<'a> {
    /// Subject, which is also the stream's name.
    pub subject: &'a str,
    /// Payloads.
    pub payloads: &'a Payloads,
    /// Messages without an acknowledgement, at most.
    pub window: u64,
    /// Length of the round.
    pub time: Duration,
    /// Most messages, so that the disk does not fill up.
    pub count_max: u64,
}

/// When what was sent, and what is acknowledged of it.
struct Progress {
    begin: Instant,
    latencies: Latencies,
    /// Of each message without an acknowledgement, the first is `acked`.
    sent_at: VecDeque<Instant>,
    sent: u64,
    acked: u64,
}

impl Progress {
    fn new() -> Self {
        Self { begin: Instant::now(), latencies: Latencies::new(), sent_at: VecDeque::new(), sent: 0, acked: 0 }
    }

    fn in_flight(&self) -> u64 {
        self.sent - self.acked
    }

    fn is_over(&self, job: &Job<'_>) -> bool {
        self.sent >= job.count_max || self.begin.elapsed() >= job.time
    }

    fn sent(&mut self, now: Instant) {
        self.sent_at.push_back(now);
        self.sent += 1;
    }

    /// All messages before number `end` are acknowledged.
    fn acked_to(&mut self, end: u64) -> Result<(), String> {
        if end > self.sent {
            return Err(format!("NATS acknowledges message {end} of {}", self.sent));
        }
        let now = Instant::now();
        while self.acked < end {
            if let Some(sent_at) = self.sent_at.pop_front() {
                self.latencies.record(now - sent_at);
            }
            self.acked += 1;
        }
        Ok(())
    }

    fn measured(&self) -> Measured {
        self.latencies.measured(self.acked, self.begin.elapsed().as_secs_f64())
    }
}

/// The sequence in an acknowledgement.
fn accepted(message: &Message<'_>) -> Result<u64, String> {
    let sequence = wire::json_number(message.payload, b"\"seq\":");
    match sequence {
        Some(sequence) if !contains(message.payload, b"\"error\"") => Ok(sequence),
        _ => Err(refusal(message)),
    }
}

fn contains(text: &[u8], part: &[u8]) -> bool {
    text.windows(part.len()).any(|window| window == part)
}

fn refusal(message: &Message<'_>) -> String {
    let payload = String::from_utf8_lossy(message.payload);
    format!("NATS did not take a message: {}{payload}", super::client::status_of(message.headers))
}

/// Publishes by one of [`METHODS`].
///
/// # Errors
/// A message that is not acknowledged.
pub fn publish(connection: &mut Connection, method: &str, job: &Job<'_>) -> Result<Measured, String> {
    match method {
        "fast-ingest" => fast_ingest(connection, job),
        "atomic" => atomic(connection, job),
        _ => windowed(connection, job),
    }
}

/// Each message is acknowledged by its own answer; they come in order, as the stream has one leader.
fn windowed(connection: &mut Connection, job: &Job<'_>) -> Result<Measured, String> {
    let mut progress = Progress::new();
    let mut reply = format!("{}.", connection.inbox()).into_bytes();
    let prefix_size = reply.len();
    // Acknowledgements that came before an earlier one.
    let mut early = std::collections::BTreeSet::new();
    loop {
        while progress.in_flight() < job.window && !progress.is_over(job) {
            reply.truncate(prefix_size);
            wire::push_decimal(&mut reply, progress.sent);
            wire::push_publish(connection.out(), job.subject.as_bytes(), &reply, job.payloads.size());
            push_payload(connection, job, progress.sent);
            progress.sent(Instant::now());
            if connection.queued() >= BURST_SIZE {
                break;
            }
        }
        let may_send = progress.in_flight() < job.window && !progress.is_over(job);
        connection.flush()?;
        if progress.in_flight() == 0 {
            return Ok(progress.measured());
        }
        if may_send && !connection.receive_now()? {
            continue;
        }
        if !may_send {
            connection.receive()?;
        }
        connection.take(|message, _| {
            accepted(&message)?;
            let index = wire::last_number(message.subject).ok_or_else(|| refusal(&message))?;
            if index == progress.acked {
                let mut end = index + 1;
                while early.remove(&end) {
                    end += 1;
                }
                return progress.acked_to(end);
            }
            early.insert(index);
            Ok(())
        })?;
    }
}

fn push_payload(connection: &mut Connection, job: &Job<'_>, index: u64) {
    job.payloads.append(index, connection.out());
    connection.out().extend_from_slice(b"\r\n");
}

/// One batch for the whole round: an answer per so many messages covers all before it.
/// Replies are `INBOX.FLOW.GAP.SEQUENCE.OPERATION.$FI`.
fn fast_ingest(connection: &mut Connection, job: &Job<'_>) -> Result<Measured, String> {
    const START: u64 = 0;
    const ADD: u64 = 1;
    const COMMIT: u64 = 2;
    let mut progress = Progress::new();
    let flow = (job.window / FLOW_PER_WINDOW).max(1);
    let mut reply = format!("{}.{:08x}.{flow}.fail.", connection.inbox(), rand::random::<u32>()).into_bytes();
    let prefix_size = reply.len();
    let mut committed = false;
    let mut started = false;
    loop {
        // Before the first answer the server has not said that it knows such batches.
        let window = if started { job.window } else { 1 };
        while progress.in_flight() < window && !committed {
            let operation = match progress.sent {
                0 => START,
                _ if progress.is_over(job) => COMMIT,
                _ => ADD,
            };
            committed = operation == COMMIT;
            reply.truncate(prefix_size);
            wire::push_decimal(&mut reply, progress.sent + 1);
            reply.push(b'.');
            wire::push_decimal(&mut reply, operation);
            reply.extend_from_slice(b".$FI");
            wire::push_publish(connection.out(), job.subject.as_bytes(), &reply, job.payloads.size());
            push_payload(connection, job, progress.sent);
            progress.sent(Instant::now());
            if connection.queued() >= BURST_SIZE {
                break;
            }
        }
        let may_send = progress.in_flight() < window && !committed;
        connection.flush()?;
        if may_send && !connection.receive_now()? {
            continue;
        }
        if !may_send {
            connection.receive()?;
        }
        let mut is_done = false;
        connection.take(|message, _| {
            let payload = message.payload;
            if contains(payload, b"\"type\":\"ack\"") {
                started = true;
                return progress.acked_to(accepted(&message)?);
            }
            // The answer to the commit has no type, but the number of messages in the batch.
            match wire::json_number(payload, b"\"count\":") {
                Some(count) if committed && !contains(payload, b"\"error\"") && count == progress.sent => {
                    is_done = true;
                    progress.acked_to(count)
                }
                _ => Err(refusal(&message)),
            }
        })?;
        if is_done {
            return Ok(progress.measured());
        }
    }
}

/// Batches of up to 1000 that are there together or not at all, several in flight.
fn atomic(connection: &mut Connection, job: &Job<'_>) -> Result<Measured, String> {
    let mut progress = Progress::new();
    let batch_count = (job.window / BATCHES_IN_FLIGHT).clamp(1, ATOMIC_COUNT_MAX);
    let mut ends = VecDeque::new();
    let mut batch = 0u64;
    let run = rand::random::<u32>();
    let mut headers = Vec::new();
    loop {
        while progress.in_flight() + batch_count <= job.window && !progress.is_over(job) {
            batch += 1;
            for number in 1..=batch_count {
                let is_last = number == batch_count;
                headers.clear();
                headers.extend_from_slice(format!("NATS/1.0\r\nNats-Batch-Id:{run:x}-{batch}\r\n").as_bytes());
                headers.extend_from_slice(b"Nats-Batch-Sequence:");
                wire::push_decimal(&mut headers, number);
                headers.extend_from_slice(if is_last { b"\r\nNats-Batch-Commit:1\r\n\r\n" } else { b"\r\n\r\n" });
                let reply = if is_last { format!("{}.{batch}", connection.inbox()) } else { String::new() };
                let subject = job.subject.as_bytes();
                wire::push_publish_headers(connection.out(), subject, reply.as_bytes(), &headers, job.payloads.size());
                push_payload(connection, job, progress.sent);
                progress.sent(Instant::now());
                if connection.queued() >= WRITE_SIZE {
                    connection.flush()?;
                }
            }
            ends.push_back(progress.sent);
        }
        connection.flush()?;
        if ends.is_empty() {
            return Ok(progress.measured());
        }
        connection.receive()?;
        connection.take(|message, _| {
            accepted(&message)?;
            let end = ends.pop_front().ok_or_else(|| refusal(&message))?;
            progress.acked_to(end)
        })?;
    }
}
