//! What a consumer of old data does to a publisher's latency.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use arqon_sdk::{Client, ConsumerOptions, From, Options};
use tokio::{sync::oneshot, time::Instant};

use super::{
    Bench, client,
    process::drop_page_cache,
    publish::{Load, Spread, steady, windowed},
    table::{Line, Target},
    text,
};
use crate::{cpu, load::Measured, payload::Payloads, report::median};

const CASE: &str = "reader";
const TOPIC: &str = "scale.reader";
const NODE_COUNT: u32 = 3;
const PARTITION_COUNT: u32 = 10;
/// Payload of one message.
const SIZE: usize = 1024;
/// Messages per second of the publisher that is watched.
const RATE: u32 = 5_000;
/// Bytes of payload written before: many times what nodes keep in memory.
const OLD_SIZE: u64 = 3 << 30;
const ROUND_COUNT: usize = 5;
/// How far the reader stands back, as `nice` counts it.
const READER_NICENESS: i32 = 19;

pub async fn measure(bench: &Bench<'_>) -> Result<Vec<Line>, String> {
    bench.note(&format!("{CASE}: {NODE_COUNT} nodes, {PARTITION_COUNT} partitions, {RATE} messages a second"));
    let (cluster, data) = bench.cluster(NODE_COUNT).await?;
    cluster.create_topic(TOPIC, PARTITION_COUNT).await.map_err(text)?;
    let publisher = client(&cluster).await?;
    let (servers, token) = (cluster.server().to_owned(), cluster.token().to_owned());
    let old_size = if bench.args.quick { OLD_SIZE / 6 } else { OLD_SIZE };
    let load = Load {
        spread: Spread::InTurn,
        window: 4_096,
        linger: Duration::from_millis(1),
        time: Duration::from_secs(300),
        count_max: old_size / SIZE as u64,
    };
    let payloads = Payloads::new(bench.args.seed, SIZE);
    windowed(&publisher, TOPIC, &payloads, load).await?.whole()?;

    let (mut alone, mut beside, mut read_rates, mut read_cpu) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for _ in 0..if bench.args.quick { 1 } else { ROUND_COUNT } {
        let time = bench.args.time(5);
        alone.push(steady(&publisher, TOPIC, &payloads, RATE, time).await?);
        let dir = data.path().to_owned();
        tokio::task::spawn_blocking(move || drop_page_cache(&dir)).await.map_err(text)??;
        let pids = cluster.pids();
        let used = cpu::seconds(&pids)?;
        let size = Arc::new(AtomicU64::new(0));
        let reading = Reading::start(servers.clone(), token.clone(), Arc::clone(&size))?;
        let begin = Instant::now();
        let measured = steady(&publisher, TOPIC, &payloads, RATE, time).await?;
        read_rates.push(size.load(Ordering::Relaxed) as f64 / 1e6 / begin.elapsed().as_secs_f64());
        reading.stop()?;
        read_cpu.push((cpu::seconds(&pids)? - used) / begin.elapsed().as_secs_f64());
        beside.push(measured);
    }
    let of = |rounds: &[Measured], figure: fn(&Measured) -> f64| median(&rounds.iter().map(figure).collect::<Vec<_>>());
    let (p99_alone, p99_beside) = (of(&alone, |one| one.p99_us), of(&beside, |one| one.p99_us));
    Ok(vec![
        Line::new(CASE, "publish alone, p50", of(&alone, |one| one.p50_us) / 1e3, "ms"),
        Line::new(CASE, "publish alone, p99", p99_alone / 1e3, "ms"),
        Line::new(CASE, "publish beside the reader, p50", of(&beside, |one| one.p50_us) / 1e3, "ms"),
        Line::new(CASE, "publish beside the reader, p99", p99_beside / 1e3, "ms"),
        Line::new(CASE, "old data read meanwhile", median(&read_rates), "MB/s")
            .remark("from the start again and again, files not in the page cache at first"),
        Line::new(CASE, "CPU of the nodes meanwhile", median(&read_cpu), "cores"),
        Line::new(CASE, "p99 beside the reader over alone", p99_beside / p99_alone.max(1.0), "x")
            .target(Target::AtMost(2.0)),
    ])
}

/// A reader on a thread of its own, which takes the processors that others leave: it stands for a
/// machine of its own, and what is measured is what the nodes do for it.
struct Reading {
    stop: oneshot::Sender<()>,
    thread: JoinHandle<Result<(), String>>,
}

impl Reading {
    fn start(servers: String, token: String, size: Arc<AtomicU64>) -> Result<Self, String> {
        let (stop, stopped) = oneshot::channel();
        let read = move || {
            rustix::process::setpriority_process(None, READER_NICENESS).map_err(text)?;
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(text)?;
            runtime.block_on(async move {
                tokio::select! {
                    ended = read_old(&servers, token, size) => ended,
                    _ = stopped => Ok(()),
                }
            })
        };
        let thread = thread::Builder::new().name("reader".to_owned()).spawn(read).map_err(text)?;
        Ok(Self { stop, thread })
    }

    fn stop(self) -> Result<(), String> {
        // It may have ended, with an error.
        let _ended = self.stop.send(());
        self.thread.join().map_err(|_| "the reader panicked".to_owned())?
    }
}

/// Reads the topic from its start, as fast as it comes, for ever.
async fn read_old(servers: &str, token: String, size: Arc<AtomicU64>) -> Result<(), String> {
    let client = Client::connect(Options::new(servers.split(','), token)).await.map_err(text)?;
    loop {
        let options = ConsumerOptions { from: From::Earliest, stop_at_end: true, ..ConsumerOptions::default() };
        let mut consumer = client.consumer(TOPIC, options).await.map_err(text)?;
        while let Some(event) = consumer.next().await.map_err(text)? {
            size.fetch_add(event.payload.len() as u64, Ordering::Relaxed);
        }
    }
}
