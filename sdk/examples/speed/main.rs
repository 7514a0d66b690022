//! What the client itself costs: publish, read and work against a server that does nothing.
//!
//! ```text
//!   cargo run --release -p arqon-sdk --example speed -- publish 128 --window 4096 --seconds 5
//!   ... read 1024 | work 1024 | work-many 1024 | single 1024          (add --ws to go through WebSocket)
//! ```
//!
//! The server is a process of its own, so that the CPU time shown is that of the client alone. With
//! `--server host:port` it is a real one: ARQON_TOKEN holds its token, and it has `speed.jobs`.

#![expect(clippy::unwrap_used, reason = "a measurement stops at the first fault")]

mod sink;

use std::{
    collections::VecDeque,
    io::{BufRead, BufReader},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use arqon_sdk::{Client, ConsumerOptions, Job, NewEvent, Options, ProducerOptions, WorkerOptions};
use futures_util::{FutureExt, StreamExt, stream::FuturesUnordered};

const TOPIC: &str = "speed.jobs";

struct Arguments {
    case: String,
    size: usize,
    window: usize,
    partitions: u32,
    time: Duration,
    fetch_size: u32,
    websocket: bool,
    /// A real server with the topic `speed.jobs`, whose token is in `ARQON_TOKEN`.
    server: Option<String>,
}

fn arguments() -> Arguments {
    let mut given = std::env::args().skip(1);
    let mut arguments = Arguments {
        case: given.next().unwrap_or_else(|| "publish".to_owned()),
        size: 1024,
        window: 4096,
        partitions: 1,
        time: Duration::from_secs(5),
        fetch_size: 1 << 20,
        websocket: false,
        server: None,
    };
    while let Some(word) = given.next() {
        if word == "--server" {
            arguments.server = given.next();
            continue;
        }
        let mut number = || given.next().and_then(|text| text.parse::<usize>().ok()).unwrap();
        match word.as_str() {
            "--window" => arguments.window = number(),
            "--partitions" => arguments.partitions = number() as u32,
            "--seconds" => arguments.time = Duration::from_secs(number() as u64),
            "--fetch" => arguments.fetch_size = number() as u32,
            "--ws" => arguments.websocket = true,
            size => arguments.size = size.parse().unwrap(),
        }
    }
    arguments
}

fn main() {
    let arguments = arguments();
    if arguments.case == "sink" {
        return sink::run(arguments.size, arguments.partitions);
    }
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(measure(&arguments));
}

struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

fn start_sink(arguments: &Arguments) -> (Server, String) {
    let partitions = arguments.partitions.to_string();
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["sink", &arguments.size.to_string(), "--partitions", &partitions]).stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    (Server(child), line.trim().to_owned())
}

async fn measure(arguments: &Arguments) {
    let (_sink, address, token) = match &arguments.server {
        Some(server) => (None, server.clone(), std::env::var("ARQON_TOKEN").unwrap()),
        None => {
            let (sink, address) = start_sink(arguments);
            let address = if arguments.websocket { format!("ws://{address}") } else { address };
            (Some(sink), address, "token".to_owned())
        }
    };
    let client = Client::connect(Options::new([address], token)).await.unwrap();
    let (begin, cpu) = (Instant::now(), cpu_seconds());
    let count = match arguments.case.as_str() {
        "publish" => publish(&client, arguments).await,
        "single" => single(&client, arguments).await,
        "read" => read(&client, arguments).await,
        "work" => work(&client, arguments).await,
        "work-many" => work_many(&client, arguments).await,
        other => panic!("no case {other}"),
    };
    let (seconds, cpu) = (begin.elapsed().as_secs_f64(), cpu_seconds() - cpu);
    println!(
        "{} {} B: {:.0}/s, {:.3} us of client CPU each, {:.2} us each",
        arguments.case,
        arguments.size,
        count as f64 / seconds,
        cpu * 1e6 / count as f64,
        seconds * 1e6 / count as f64,
    );
}

/// User and system time of this process so far.
fn cpu_seconds() -> f64 {
    let text = std::fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<&str> = text.rsplit_once(") ").unwrap().1.split(' ').collect();
    let ticks: f64 = fields[11].parse::<f64>().unwrap() + fields[12].parse::<f64>().unwrap();
    ticks / 100.0
}

async fn publish(client: &Client, arguments: &Arguments) -> u64 {
    let options = ProducerOptions { buffer_size: 256 << 20, ..ProducerOptions::default() };
    let producer = client.producer(TOPIC, options).await.unwrap();
    let payload = vec![7u8; arguments.size];
    let mut waiting = VecDeque::with_capacity(arguments.window);
    let end = Instant::now() + arguments.time;
    let mut count = 0u64;
    while !count.is_multiple_of(64) || Instant::now() < end {
        waiting.push_back(producer.send(NewEvent::new(payload.clone())).await.unwrap());
        count += 1;
        if waiting.len() >= arguments.window {
            waiting.pop_front().unwrap().await.unwrap();
            while let Some(receipt) = waiting.front_mut().and_then(|next| next.now_or_never()) {
                receipt.unwrap();
                waiting.pop_front();
            }
        }
    }
    for delivery in waiting {
        delivery.await.unwrap();
    }
    count
}

async fn single(client: &Client, arguments: &Arguments) -> u64 {
    let producer = client.producer(TOPIC, ProducerOptions::default()).await.unwrap();
    let end = Instant::now() + arguments.time;
    let mut count = 0;
    while Instant::now() < end {
        producer.publish(NewEvent::new(vec![7u8; arguments.size])).await.unwrap();
        count += 1;
    }
    count
}

async fn read(client: &Client, arguments: &Arguments) -> u64 {
    let options = ConsumerOptions { bytes_max: arguments.fetch_size, ..ConsumerOptions::default() };
    let mut consumer = client.consumer(TOPIC, options).await.unwrap();
    let end = Instant::now() + arguments.time;
    let mut count = 0u64;
    while !count.is_multiple_of(64) || Instant::now() < end {
        let event = consumer.next().await.unwrap().unwrap();
        assert_eq!(event.payload.len(), arguments.size);
        count += 1;
    }
    count
}

fn worker_options(arguments: &Arguments) -> WorkerOptions {
    WorkerOptions { parallelism: arguments.window, ..WorkerOptions::default() }
}

async fn work(client: &Client, arguments: &Arguments) -> u64 {
    let mut worker = client.worker(TOPIC, worker_options(arguments)).await.unwrap();
    let end = Instant::now() + arguments.time;
    let mut acks = FuturesUnordered::new();
    let mut count = 0;
    while Instant::now() < end {
        tokio::select! {
            job = worker.next() => {
                let job = job.unwrap().unwrap();
                acks.push(async move { job.ack().await });
            }
            Some(acked) = acks.next() => {
                acked.unwrap();
                count += 1;
            }
        }
    }
    count
}

async fn work_many(client: &Client, arguments: &Arguments) -> u64 {
    let mut worker = client.worker(TOPIC, worker_options(arguments)).await.unwrap();
    let end = Instant::now() + arguments.time;
    let mut acks = FuturesUnordered::new();
    let mut count = 0;
    while Instant::now() < end {
        tokio::select! {
            jobs = worker.next_many(1_000) => {
                let jobs = jobs.unwrap().unwrap();
                acks.push(async move { (jobs.len() as u64, Job::ack_all(jobs).await.is_empty()) });
            }
            Some((acked, all)) = acks.next() => {
                assert!(all);
                count += acked;
            }
        }
    }
    count
}
