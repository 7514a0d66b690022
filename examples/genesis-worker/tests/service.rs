//! The worker as a process, over real sockets.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};

use genesis_worker::{BODY_SIZE_MAX, DistillAnswer, DistillRequest, Picture, REQUESTS_IN_FLIGHT_MAX, sample};
use serde_json::{Value, json};

struct Worker {
    process: Child,
    address: String,
}

impl Worker {
    fn start() -> Self {
        let mut process = Command::new(env!("CARGO_BIN_EXE_genesis-worker"))
            .args(["--listen", "127.0.0.1:0", "--json"])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let stdout = process.stdout.take().unwrap();
        BufReader::new(stdout).read_line(&mut line).unwrap();
        let announced: Value = serde_json::from_str(&line).unwrap();
        let address = announced["address"].as_str().unwrap().to_owned();
        assert_eq!(announced["listening"], format!("http://{address}"));
        Self { process, address }
    }

    fn connect(&self) -> TcpStream {
        TcpStream::connect(&self.address).unwrap()
    }

    fn send(&self, method: &str, path: &str, body: &[u8]) -> (u16, String) {
        let mut stream = self.connect();
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nhost: worker\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
            body.len()
        )
        .unwrap();
        // The server may answer and close before it has read a body that is too large.
        let _ = stream.write_all(body);
        read_answer(stream)
    }

    /// Opens a request and returns once the worker asks for its body.
    fn open(&self, body_size: usize) -> TcpStream {
        let mut stream = self.connect();
        write!(
            stream,
            "POST /distill HTTP/1.1\r\nhost: worker\r\nconnection: close\r\nexpect: 100-continue\r\ncontent-length: {body_size}\r\n\r\n"
        )
        .unwrap();
        let mut interim = [0; 25];
        stream.read_exact(&mut interim).unwrap();
        assert_eq!(&interim, b"HTTP/1.1 100 Continue\r\n\r\n");
        stream
    }

    fn distill(&self, body: &Value) -> (u16, Value) {
        let (status, text) = self.send("POST", "/distill", body.to_string().as_bytes());
        (status, serde_json::from_str(&text).unwrap())
    }

    fn terminate(&mut self) {
        let pid = self.process.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn read_answer(mut stream: TcpStream) -> (u16, String) {
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    let answer = String::from_utf8(answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
}

fn request(index: u64) -> (Value, Picture) {
    let (_, picture) = sample(7, index);
    let request = DistillRequest::for_png(Some(format!("job-{index}")), &picture.to_png().unwrap());
    (serde_json::to_value(request.unwrap()).unwrap(), picture)
}

#[test]
fn every_answer_redraws_its_picture_within_the_error_it_states() {
    let worker = Worker::start();
    for index in 0..30 {
        let (body, picture) = request(index);
        let (status, answer) = worker.distill(&body);
        assert_eq!(status, 200, "{answer}");
        let answer: DistillAnswer = serde_json::from_value(answer).unwrap();
        assert_eq!(answer.job_id, Some(format!("job-{index}")));
        answer.check(&picture).unwrap();
    }
}

#[test]
fn junk_gets_one_clear_error_and_the_worker_lives_on() {
    let worker = Worker::start();
    let (good, _) = request(0);
    let mut plain = good.clone();
    plain["imageData"] = json!("AAAA");
    let mut wrong_size = good.clone();
    wrong_size["width"] = json!(999);
    let flat = Picture::from_rgba(16, 16, &[90; 16 * 16 * 4]).unwrap();
    let flat = DistillRequest::for_png(None, &flat.to_png().unwrap()).unwrap();
    let flat = serde_json::to_value(flat).unwrap();
    for (body, status, expected) in [
        (json!("x"), 400, "body: must be a JSON object"),
        (json!({}), 400, "imageData: is missing"),
        (plain, 400, "imageData: 3 bytes are neither a PNG file nor"),
        (wrong_size, 400, "width: is 999"),
        (flat, 422, "not a checkerboard: one colour"),
    ] {
        let (found, answer) = worker.distill(&body);
        let error = answer["error"].as_str().unwrap();
        assert!(found == status && error.starts_with(expected), "{found} {error}");
        assert!(!error.contains('\n'));
    }
    let deep = "[".repeat(100_000);
    let large = vec![b'"'; BODY_SIZE_MAX + 1];
    for (method, path, body, status) in [
        ("POST", "/distill", &b"\xff\x00{"[..], 400),
        ("POST", "/distill", deep.as_bytes(), 400),
        ("POST", "/distill", &large, 413),
        ("GET", "/distill", b"", 405),
        ("GET", "/nowhere", b"", 404),
    ] {
        let (found, text) = worker.send(method, path, body);
        assert_eq!(found, status, "{text}");
        assert!(text.starts_with("{\"error\":"), "{text}");
    }
    assert_eq!(worker.send("GET", "/healthz", b"").0, 200);
    assert_eq!(worker.distill(&good).0, 200);
}

/// The shim is in the middle of a request when the worker is told to stop: the request is
/// answered, new ones are not taken, and the process ends well.
#[test]
fn an_open_request_is_answered_after_the_signal_to_stop() {
    let mut worker = Worker::start();
    let (body, picture) = request(3);
    let body = body.to_string();
    let (first, rest) = body.split_at(body.len() / 2);
    let mut stream = worker.open(body.len());
    stream.write_all(first.as_bytes()).unwrap();
    worker.terminate();
    // The listener closes once the signal is handled.
    while TcpStream::connect(&worker.address).is_ok() {
        std::thread::yield_now();
    }
    stream.write_all(rest.as_bytes()).unwrap();
    let (status, text) = read_answer(stream);
    assert_eq!(status, 200, "{text}");
    let answer: DistillAnswer = serde_json::from_str(&text).unwrap();
    answer.check(&picture).unwrap();
    assert!(worker.process.wait().unwrap().success());
}

/// Clients that open requests and send nothing fill the slots: the next one is told to come
/// again, and is served once a slot is free.
#[test]
fn requests_beyond_the_limit_are_pushed_back() {
    let worker = Worker::start();
    let (body, _) = request(0);
    let text = body.to_string();
    let mut open: Vec<_> = (0..REQUESTS_IN_FLIGHT_MAX).map(|_| worker.open(text.len())).collect();
    let (status, answer) = worker.distill(&body);
    assert_eq!(status, 503, "{answer}");
    let mut stream = open.pop().unwrap();
    stream.write_all(text.as_bytes()).unwrap();
    assert_eq!(read_answer(stream).0, 200);
    assert_eq!(worker.distill(&body).0, 200);
}

#[test]
fn a_port_in_use_is_one_line_that_names_it() {
    let worker = Worker::start();
    let output =
        Command::new(env!("CARGO_BIN_EXE_genesis-worker")).args(["--listen", &worker.address]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(error.lines().count(), 1, "{error}");
    assert!(error.contains(&worker.address), "{error}");
}
