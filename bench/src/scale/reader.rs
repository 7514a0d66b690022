//! What a consumer of old data does to a publisher's latency.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use arqon_sdk::{Client, ConsumerOptions, From};
use tokio::time::Instant;

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

pub async fn measure(bench: &Bench<'_>) -> Result<Vec<Line>, String> {
    bench.note(&format!("{CASE}: {NODE_COUNT} nodes, {PARTITION_COUNT} partitions, {RATE} messages a second"));
    let (cluster, data) = bench.cluster(NODE_COUNT).await?;
    cluster.create_topic(TOPIC, PARTITION_COUNT).await.map_err(text)?;
    let publisher = client(&cluster).await?;
    let reader = client(&cluster).await?;
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
        let reading = tokio::spawn(read_old(reader.clone(), Arc::clone(&size)));
        let begin = Instant::now();
        let measured = steady(&publisher, TOPIC, &payloads, RATE, time).await?;
        read_rates.push(size.load(Ordering::Relaxed) as f64 / 1e6 / begin.elapsed().as_secs_f64());
        if reading.is_finished() {
            reading.await.map_err(text)??;
        } else {
            reading.abort();
        }
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

/// Reads the topic from its start, as fast as it comes, for ever.
async fn read_old(client: Client, size: Arc<AtomicU64>) -> Result<(), String> {
    loop {
        let options = ConsumerOptions { from: From::Earliest, stop_at_end: true, ..ConsumerOptions::default() };
        let mut consumer = client.consumer(TOPIC, options).await.map_err(text)?;
        while let Some(event) = consumer.next().await.map_err(text)? {
            size.fetch_add(event.payload.len() as u64, Ordering::Relaxed);
        }
    }
}
