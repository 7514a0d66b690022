//! Reading from a stream: pull consumers, with and without acknowledgements.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use super::{
    client::{Connection, Transport, status_of},
    server::Servers,
    wire::{self, Message},
};
use crate::{
    load::{LATE_MAX, Latencies, Measured, Received},
    payload::Payloads,
};

/// A request for messages is renewed when this part of it has come.
const PULL_PARTS: u64 = 2;
/// Time that a request for messages stands.
const PULL_TIME: Duration = Duration::from_secs(20);
/// Time without a message after which a round has failed.
const SILENCE_MAX: Duration = Duration::from_secs(20);
/// How often the sender of `consume` looks what is due.
const SEND_PAUSE: Duration = Duration::from_millis(1);

/// Makes a consumer of a stream; gives its name and the server that leads it.
fn create_consumer(control: &mut Connection, stream: &str, config: Value) -> Result<(String, String), String> {
    let name = config["name"].as_str().unwrap_or_default().to_owned();
    let body = json!({ "stream_name": stream, "action": "create", "config": config });
    let mut answer = control.api(&format!("CONSUMER.CREATE.{stream}.{name}"), &body)?;
    let begin = Instant::now();
    while answer.get("cluster").is_some()
        && answer["cluster"]["leader"].as_str().is_none_or(str::is_empty)
        && begin.elapsed() < SILENCE_MAX
    {
        std::thread::sleep(Duration::from_millis(20));
        answer = control.api(&format!("CONSUMER.INFO.{stream}.{name}"), &Value::Null)?;
    }
    Ok((name, answer["cluster"]["leader"].as_str().unwrap_or_default().to_owned()))
}

fn consumer_config(ack: &str, replicas: usize) -> Value {
    let name = format!("c{:08x}", rand::random::<u32>());
    json!({
        "name": name, "ack_policy": ack, "deliver_policy": "all", "replay_policy": "instant",
        "num_replicas": replicas, "inactive_threshold": 60_000_000_000u64,
    })
}

/// Requests for messages, renewed before they run dry.
struct Pull {
    subject: String,
    reply: String,
    batch: u64,
    /// Messages asked for that have not come.
    open: u64,
}

impl Pull {
    fn new(connection: &Connection, stream: &str, consumer: &str, batch: u64) -> Self {
        let subject = format!("$JS.API.CONSUMER.MSG.NEXT.{stream}.{consumer}");
        Self { subject, reply: format!("{}.m", connection.inbox()), batch, open: 0 }
    }

    /// Asks for more when few are open.
    fn top_up(&mut self, out: &mut Vec<u8>) {
        while self.open <= self.batch / PULL_PARTS {
            let body = format!("{{\"batch\":{},\"expires\":{}}}", self.batch, PULL_TIME.as_nanos());
            wire::push_publish(out, self.subject.as_bytes(), self.reply.as_bytes(), body.len());
            out.extend_from_slice(body.as_bytes());
            out.extend_from_slice(b"\r\n");
            self.open += self.batch;
        }
    }

    /// Whether this is a message of the stream. A status ends the request that it answers to.
    fn came(&mut self, message: &Message<'_>) -> Result<bool, String> {
        if message.reply.starts_with(b"$JS.ACK.") {
            self.open = self.open.saturating_sub(1);
            return Ok(true);
        }
        if message.headers.is_empty() {
            return Ok(false);
        }
        let status = status_of(message.headers);
        match status.get(..3) {
            Some("100") => {}
            // Timed out: the header says how many it did not give.
            Some("408") => self.open = 0,
            _ => return Err(format!("NATS ends a pull: {status}")),
        }
        Ok(false)
    }
}

/// The stream sequence in `$JS.ACK.STREAM.CONSUMER.DELIVERED.SEQUENCE...`.
fn stream_sequence(reply: &[u8]) -> Option<u64> {
    wire::decimal(reply.split(|byte| *byte == b'.').nth(5)?)
}

fn place(reply: &[u8]) -> String {
    format!("stream sequence {}", stream_sequence(reply).unwrap_or_default())
}

/// Reads the `count` messages of a stream from its start and checks every byte, again and again
/// until `time` is over; each pass has a consumer of its own, without acknowledgements.
///
/// # Errors
/// A message that is missing, changed, doubled or out of order.
pub fn fetch(
    servers: &Servers,
    stream: &str,
    payloads: &Payloads,
    count: u64,
    batch: u64,
    time: Duration,
) -> Result<Measured, String> {
    let begin = Instant::now();
    let (mut messages, mut seconds) = (0, 0.0);
    let mut control = servers.connect("", Transport::Tcp)?;
    while messages == 0 || begin.elapsed() < time {
        let mut received = Received::new(count);
        let pass = Instant::now();
        let (consumer, leader) = create_consumer(&mut control, stream, consumer_config("none", 1))?;
        let mut connection = servers.connect(&leader, Transport::Tcp)?;
        let mut pull = Pull::new(&connection, stream, &consumer, batch);
        while received.count() < count {
            pull.top_up(connection.out());
            connection.flush()?;
            connection.receive()?;
            connection.take(|message, out| {
                if pull.came(&message)? {
                    received.take_payload(payloads, message.payload, 0, || place(message.reply))?;
                    pull.top_up(out);
                }
                Ok(())
            })?;
        }
        seconds += pass.elapsed().as_secs_f64();
        messages += count;
        control.api(&format!("CONSUMER.DELETE.{stream}.{consumer}"), &Value::Null)?;
    }
    Ok(Measured { messages, seconds, ..Measured::default() })
}

/// Takes messages for at most `time` and acknowledges each; what counts is what the server
/// confirmed. The latency is that of the confirmation.
///
/// # Errors
/// A changed payload, or an acknowledgement that is not confirmed.
pub fn queue(
    servers: &Servers,
    stream: &str,
    payloads: &Payloads,
    count: u64,
    window: u64,
    time: Duration,
) -> Result<Measured, String> {
    let mut control = servers.connect("", Transport::Tcp)?;
    let mut config = consumer_config("explicit", servers.count());
    config["max_ack_pending"] = json!(window);
    config["ack_wait"] = json!(30_000_000_000u64);
    config["durable_name"] = config["name"].clone();
    let (consumer, leader) = create_consumer(&mut control, stream, config)?;
    let mut connection = servers.connect(&leader, Transport::Tcp)?;
    let mut pull = Pull::new(&connection, stream, &consumer, window);
    let confirmation = format!("{}.a.", connection.inbox()).into_bytes();
    let mut latencies = Latencies::new();
    let mut received = Received::in_any_order(count);
    let mut acked_at: Vec<Option<Instant>> = vec![None; count as usize];
    let (mut sent, mut confirmed) = (0u64, 0u64);
    let begin = Instant::now();
    loop {
        let is_over = begin.elapsed() >= time || received.count() >= count;
        if is_over && sent == confirmed {
            break;
        }
        if !is_over {
            pull.top_up(connection.out());
        }
        connection.flush()?;
        connection.receive()?;
        connection.take(|message, out| {
            if message.subject.starts_with(&confirmation) {
                let index = wire::last_number(message.subject).and_then(|index| acked_at.get_mut(index as usize));
                let at = index.and_then(Option::take).ok_or("NATS confirms what was not acknowledged")?;
                if !message.headers.is_empty() {
                    return Err(format!("NATS does not confirm: {}", status_of(message.headers)));
                }
                latencies.record(at.elapsed());
                confirmed += 1;
            } else if pull.came(&message)? && begin.elapsed() < time {
                let index = received.take_payload(payloads, message.payload, 0, || place(message.reply))?;
                let mut reply = confirmation.clone();
                wire::push_decimal(&mut reply, index);
                wire::push_publish(out, message.reply, &reply, 4);
                out.extend_from_slice(b"+ACK\r\n");
                acked_at[index as usize] = Some(Instant::now());
                sent += 1;
            }
            Ok(())
        })?;
    }
    let seconds = begin.elapsed().as_secs_f64();
    control.api(&format!("CONSUMER.DELETE.{stream}.{consumer}"), &Value::Null)?;
    Ok(latencies.measured(confirmed, seconds))
}

/// One message on its way from `send` to the consumer's hand, `rate` of them a second.
pub struct Consume<'a> {
    /// Stream and subject.
    pub stream: &'a str,
    /// The stream's leader, where the sender connects.
    pub leader: &'a str,
    /// Payloads.
    pub payloads: &'a Payloads,
    /// Messages a second.
    pub rate: u32,
    /// Length of the round.
    pub time: Duration,
}

/// Sends at a fixed rate to a waiting consumer.
///
/// # Errors
/// A message that is missing, changed or not acknowledged.
pub fn consume(servers: &Servers, work: &Consume<'_>) -> Result<Measured, String> {
    let count = (work.time.as_secs_f64() * f64::from(work.rate)) as u64;
    let sent_at: Arc<Vec<AtomicU64>> = Arc::new((0..count).map(|_| AtomicU64::new(0)).collect());
    let mut control = servers.connect("", Transport::Tcp)?;
    let (consumer, leader) = create_consumer(&mut control, work.stream, consumer_config("none", 1))?;
    let mut connection = servers.connect(&leader, Transport::Tcp)?;
    let mut pull = Pull::new(&connection, work.stream, &consumer, 1_000);
    pull.top_up(connection.out());
    connection.flush()?;
    // The request is there before the first message.
    connection.ping()?;
    let mut sender = servers.connect(work.leader, Transport::Tcp)?;
    let mut received = Received::new(count);
    let mut latencies = Latencies::new();
    let begin = Instant::now();
    std::thread::scope(|scope| {
        let sending = scope.spawn(|| send_at_rate(&mut sender, work, &sent_at, begin));
        while received.count() < count {
            connection.receive()?;
            let now = begin.elapsed();
            connection.take(|message, out| {
                if !pull.came(&message)? {
                    return Ok(());
                }
                let index = received.take_payload(work.payloads, message.payload, 0, || place(message.reply))?;
                let sent_at = Duration::from_nanos(sent_at[index as usize].load(Ordering::Acquire));
                latencies.record(now.saturating_sub(sent_at));
                pull.top_up(out);
                Ok(())
            })?;
            connection.flush()?;
        }
        sending.join().unwrap_or_else(|_| Err("the sender of a round stopped".into()))
    })?;
    Ok(latencies.measured(count, begin.elapsed().as_secs_f64()))
}

/// Sends what is due each millisecond, notes when, and wants every message acknowledged.
fn send_at_rate(
    connection: &mut Connection,
    work: &Consume<'_>,
    sent_at: &[AtomicU64],
    begin: Instant,
) -> Result<(), String> {
    let reply = format!("{}.s", connection.inbox()).into_bytes();
    let (mut index, mut acked) = (0, 0);
    while acked < sent_at.len() {
        let due = ((begin.elapsed().as_secs_f64() * f64::from(work.rate)) as usize).min(sent_at.len());
        while index < due {
            let planned = Duration::from_secs_f64(index as f64 / f64::from(work.rate));
            let now = begin.elapsed();
            // A stalled server must not look fast because nothing was sent meanwhile.
            let from = if now > planned + LATE_MAX { planned } else { now };
            sent_at[index].store(from.as_nanos() as u64, Ordering::Release);
            let out = connection.out();
            wire::push_publish(out, work.stream.as_bytes(), &reply, work.payloads.size());
            work.payloads.append(index as u64, out);
            out.extend_from_slice(b"\r\n");
            index += 1;
        }
        connection.flush()?;
        let wait = if index == sent_at.len() { SILENCE_MAX } else { SEND_PAUSE };
        let tick = Instant::now();
        if connection.receive_within(wait)? {
            connection.take(|message, _| {
                if !message.payload.starts_with(b"{\"stream\"") {
                    return Err(format!("NATS did not take a message: {}", String::from_utf8_lossy(message.payload)));
                }
                acked += 1;
                Ok(())
            })?;
            if index < sent_at.len() {
                std::thread::sleep(SEND_PAUSE.saturating_sub(tick.elapsed()));
            }
        } else if index == sent_at.len() {
            return Err(format!("NATS acknowledged {acked} of {index} messages"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_place_of_a_message_is_in_its_reply() {
        assert_eq!(stream_sequence(b"$JS.ACK.bench.c1.1.77.5.1790000000000000000.9"), Some(77));
        assert_eq!(stream_sequence(b"_INBOX.a"), None);
    }
}
