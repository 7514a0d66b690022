//! A small NATS client on a blocking socket: one thread, coalesced writes, nothing per message
//! that could be done per write. It is faster than the general clients and is used for that.

use std::{
    io::{ErrorKind, Read, Write},
    net::TcpStream,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use super::wire::{self, FRAME_HEAD_SIZE_MAX, Message, Op, Unframer};

/// Time without any byte from a server after which a round has failed.
const SILENCE_MAX: Duration = Duration::from_secs(30);
/// Bytes of one read.
const READ_SIZE: usize = 256 << 10;
/// A `flush` is due when so many bytes are queued.
pub const WRITE_SIZE: usize = 256 << 10;
/// The subscription that answers come by.
const INBOX_SID: u32 = 1;

/// How to speak to a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// The protocol on a TCP stream.
    Tcp,
    /// The same in WebSocket frames.
    WebSocket,
}

/// What `take` found in the bytes received so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Taken {
    /// Messages handed to the closure.
    pub messages: usize,
    /// A PONG was among the rest.
    pub pong: bool,
}

/// One connection.
pub struct Connection {
    stream: TcpStream,
    received: Received,
    /// What goes out with the next `flush`, behind room for a frame's head.
    out: Vec<u8>,
    unframer: Option<Unframer>,
    raw: Vec<u8>,
    inbox: String,
    request_count: u64,
}

/// Bytes received and not yet understood.
#[derive(Default)]
struct Received {
    bytes: Vec<u8>,
    begin: usize,
}

impl Received {
    fn compact(&mut self) {
        if self.begin == self.bytes.len() {
            self.bytes.clear();
            self.begin = 0;
        } else if self.begin >= READ_SIZE {
            self.bytes.drain(..self.begin);
            self.begin = 0;
        }
    }
}

fn failed(what: &str) -> impl Fn(std::io::Error) -> String + '_ {
    move |error| format!("NATS: cannot {what}: {error}")
}

impl Connection {
    /// Connects to `address` and subscribes to an inbox of its own.
    ///
    /// # Errors
    /// Nobody listens there, or it is no NATS server.
    pub fn open(address: &str, transport: Transport) -> Result<Self, String> {
        let stream = TcpStream::connect(address).map_err(failed(&format!("connect to {address}")))?;
        stream.set_nodelay(true).map_err(failed("set TCP_NODELAY"))?;
        let timeout = stream.set_read_timeout(Some(SILENCE_MAX)).and(stream.set_write_timeout(Some(SILENCE_MAX)));
        timeout.map_err(failed("set timeouts"))?;
        let mut connection = Self {
            stream,
            received: Received::default(),
            out: vec![0; FRAME_HEAD_SIZE_MAX],
            unframer: None,
            raw: vec![0; READ_SIZE],
            inbox: format!("_INBOX.{:08x}", rand::random::<u32>()),
            request_count: 0,
        };
        if transport == Transport::WebSocket {
            connection.upgrade(address)?;
        }
        let hello = format!(
            "CONNECT {{\"verbose\":false,\"pedantic\":false,\"lang\":\"rust\",\"version\":\"0\",\"protocol\":1,\
             \"echo\":false,\"headers\":true,\"no_responders\":true}}\r\nSUB {}.> {INBOX_SID}\r\n",
            connection.inbox
        );
        connection.out.extend_from_slice(hello.as_bytes());
        connection.ping()?;
        Ok(connection)
    }

    fn upgrade(&mut self, address: &str) -> Result<(), String> {
        // The key only proves that the server understood; it is this program's own server.
        let request = format!(
            "GET / HTTP/1.1\r\nHost: {address}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
             Sec-WebSocket-Key: YXJxb24tYmVuY2gtbmF0cw==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        );
        self.stream.write_all(request.as_bytes()).map_err(failed("write"))?;
        let mut answer = Vec::new();
        let end = loop {
            if let Some(end) = answer.windows(4).position(|part| part == b"\r\n\r\n") {
                break end + 4;
            }
            let size = self.stream.read(&mut self.raw).map_err(failed("read"))?;
            if size == 0 || answer.len() > READ_SIZE {
                return Err(format!("NATS: {address} refused the WebSocket"));
            }
            answer.extend_from_slice(&self.raw[..size]);
        };
        if !answer.starts_with(b"HTTP/1.1 101") {
            return Err(format!("NATS: {address} refused the WebSocket"));
        }
        let mut unframer = Unframer::default();
        unframer.push(&answer[end..], &mut self.received.bytes)?;
        self.unframer = Some(unframer);
        Ok(())
    }

    /// The subject below which answers come.
    pub fn inbox(&self) -> &str {
        &self.inbox
    }

    /// What is to go out with the next [`Connection::flush`].
    pub fn out(&mut self) -> &mut Vec<u8> {
        &mut self.out
    }

    /// Bytes in [`Connection::out`].
    pub fn queued(&self) -> usize {
        self.out.len() - FRAME_HEAD_SIZE_MAX
    }

    /// Sends what is queued.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn flush(&mut self) -> Result<(), String> {
        let size = self.queued();
        if size == 0 {
            return Ok(());
        }
        let begin = match self.unframer {
            None => FRAME_HEAD_SIZE_MAX,
            Some(_) => {
                let (head, head_size) = wire::frame_head(size);
                let begin = FRAME_HEAD_SIZE_MAX - head_size;
                self.out[begin..FRAME_HEAD_SIZE_MAX].copy_from_slice(&head[..head_size]);
                begin
            }
        };
        self.stream.write_all(&self.out[begin..]).map_err(failed("write"))?;
        self.out.truncate(FRAME_HEAD_SIZE_MAX);
        Ok(())
    }

    /// Waits for bytes. `Ok(false)`: none came within `wait`.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn receive_within(&mut self, wait: Duration) -> Result<bool, String> {
        let wait = wait.max(Duration::from_micros(1));
        self.stream.set_read_timeout(Some(wait)).map_err(failed("set a timeout"))?;
        let received = self.read();
        self.stream.set_read_timeout(Some(SILENCE_MAX)).map_err(failed("set a timeout"))?;
        received
    }

    /// Takes what has come already, without waiting. `Ok(false)`: nothing has.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn receive_now(&mut self) -> Result<bool, String> {
        self.stream.set_nonblocking(true).map_err(failed("set non-blocking"))?;
        let received = self.read();
        self.stream.set_nonblocking(false).map_err(failed("set blocking"))?;
        received
    }

    /// Waits for bytes.
    ///
    /// # Errors
    /// The connection is lost, or is silent for 30 s.
    pub fn receive(&mut self) -> Result<(), String> {
        if self.read()? {
            return Ok(());
        }
        Err(format!("NATS: nothing came for {} s", SILENCE_MAX.as_secs()))
    }

    fn read(&mut self) -> Result<bool, String> {
        self.received.compact();
        let size = match self.stream.read(&mut self.raw) {
            Ok(0) => return Err("NATS: the server closed the connection".into()),
            Ok(size) => size,
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => return Ok(false),
            Err(error) => return Err(failed("read")(error)),
        };
        match &mut self.unframer {
            None => self.received.bytes.extend_from_slice(&self.raw[..size]),
            Some(unframer) => unframer.push(&self.raw[..size], &mut self.received.bytes)?,
        }
        Ok(true)
    }

    /// Hands every message that is complete to `act`, which may queue what is to be sent.
    ///
    /// # Errors
    /// What `act` says, or a refusal of the server.
    pub fn take(
        &mut self,
        mut act: impl FnMut(Message<'_>, &mut Vec<u8>) -> Result<(), String>,
    ) -> Result<Taken, String> {
        let mut taken = Taken::default();
        let Received { bytes, begin } = &mut self.received;
        while let Some((op, size)) = wire::parse(&bytes[*begin..])? {
            match op {
                Op::Message(message) => {
                    taken.messages += 1;
                    act(message, &mut self.out)?;
                }
                Op::Ping => self.out.extend_from_slice(b"PONG\r\n"),
                Op::Pong => taken.pong = true,
                Op::Info(_) | Op::Fine => {}
                Op::Refused(reason) => return Err(format!("NATS refuses: {}", String::from_utf8_lossy(reason))),
            }
            *begin += size;
        }
        Ok(taken)
    }

    /// Sends what is queued and waits until the server has seen it.
    ///
    /// # Errors
    /// As [`Connection::take`].
    pub fn ping(&mut self) -> Result<(), String> {
        self.out.extend_from_slice(b"PING\r\n");
        self.flush()?;
        loop {
            self.receive()?;
            if self.take(|_, _| Ok(()))?.pong {
                return Ok(());
            }
        }
    }

    /// Asks `subject` and waits for the answer.
    ///
    /// # Errors
    /// No answer, or one that is no JSON.
    pub fn request(&mut self, subject: &str, body: &Value) -> Result<Value, String> {
        self.request_count += 1;
        let reply = format!("{}.r{}", self.inbox, self.request_count);
        let body = if body.is_null() { String::new() } else { body.to_string() };
        wire::push_publish(&mut self.out, subject.as_bytes(), reply.as_bytes(), body.len());
        self.out.extend_from_slice(body.as_bytes());
        self.out.extend_from_slice(b"\r\n");
        self.flush()?;
        let begin = Instant::now();
        let mut answer = None;
        while answer.is_none() {
            if begin.elapsed() > SILENCE_MAX {
                return Err(format!("NATS: no answer to {subject}"));
            }
            self.receive()?;
            self.take(|message, _| {
                if message.subject == reply.as_bytes() {
                    answer = Some(match message.headers.is_empty() {
                        true => serde_json::from_slice(message.payload).map_err(|error| error.to_string()),
                        false => Err(status_of(message.headers).to_owned()),
                    });
                }
                Ok(())
            })?;
            self.flush()?;
        }
        answer.unwrap_or(Ok(Value::Null)).map_err(|error| format!("NATS: {subject}: {error}"))
    }

    /// A request to the API of JetStream.
    ///
    /// # Errors
    /// As [`Connection::request`], or the error in the answer.
    pub fn api(&mut self, subject: &str, body: &Value) -> Result<Value, String> {
        let answer = self.request(&format!("$JS.API.{subject}"), body)?;
        match answer["error"]["description"].as_str() {
            Some(description) => Err(format!("NATS: {subject}: {description}")),
            None => Ok(answer),
        }
    }

    /// Makes a stream of the one subject `name`, on disk and not compressed; the server that leads it.
    ///
    /// # Errors
    /// As [`Connection::api`].
    pub fn create_stream(&mut self, name: &str, replicas: usize, method: &str) -> Result<String, String> {
        let config = json!({
            "name": name, "subjects": [name], "retention": "limits", "storage": "file", "discard": "old",
            "num_replicas": replicas, "compression": "none", "max_msgs": -1, "max_bytes": -1, "max_age": 0,
            "allow_atomic": method == "atomic", "allow_batched": method == "fast-ingest",
        });
        let begin = Instant::now();
        // Servers that have just come together may not place a stream yet.
        let mut answer = self.api(&format!("STREAM.CREATE.{name}"), &config);
        while answer.is_err() && begin.elapsed() < Duration::from_secs(10) {
            std::thread::sleep(Duration::from_millis(200));
            answer = self.api(&format!("STREAM.CREATE.{name}"), &config);
        }
        let mut answer = answer?;
        while replicas > 1 && answer["cluster"]["leader"].as_str().is_none_or(str::is_empty) {
            if begin.elapsed() > SILENCE_MAX {
                return Err(format!("NATS: stream {name} has no leader"));
            }
            std::thread::sleep(Duration::from_millis(50));
            answer = self.api(&format!("STREAM.INFO.{name}"), &Value::Null)?;
        }
        Ok(answer["cluster"]["leader"].as_str().unwrap_or_default().to_owned())
    }

    /// Deletes a stream and its data.
    ///
    /// # Errors
    /// As [`Connection::api`].
    pub fn delete_stream(&mut self, name: &str) -> Result<(), String> {
        self.api(&format!("STREAM.DELETE.{name}"), &Value::Null).map(|_| ())
    }

    /// Messages in a stream.
    ///
    /// # Errors
    /// As [`Connection::api`].
    pub fn stream_messages(&mut self, name: &str) -> Result<u64, String> {
        let answer = self.api(&format!("STREAM.INFO.{name}"), &Value::Null)?;
        Ok(answer["state"]["messages"].as_u64().unwrap_or_default())
    }
}

/// The status line of a header block, without its version.
pub fn status_of(headers: &[u8]) -> &str {
    let line = headers.split(|byte| *byte == b'\r').next().unwrap_or_default();
    let line = std::str::from_utf8(line).unwrap_or_default();
    line.strip_prefix("NATS/1.0").unwrap_or(line).trim()
}
