//! Bytes per second and latency of a log alone, beside plain writes to the same disk in the same run.
//!
//! ```text
//! cargo run --release -p arqon-storage --example append -- [DIR] [--size MIB] [--plain] [--cached]
//! ```
//!
//! For each row: one writer keeps `depth` entries in flight until the bytes are written; the raw
//! rows write and sync the same bytes to one file, in groups, past the page cache and through it.
//! The rows of many logs append one entry to each, and wait for all.

use std::fs;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::mpsc::sync_channel;
use std::time::{Duration, Instant};

use arqon_proto::{BATCH_HEADER_SIZE, Batch, BatchKind, GroupId, Header, NodeId, Offset, RaftIndex, ReplicaId, Term};
use arqon_storage::{Backend, Identity, Log, Options, Store};
use bytes::Bytes;

struct Args {
    dir: PathBuf,
    size: usize,
    options: Options,
}

fn args() -> Result<Args, String> {
    let mut args = Args { dir: std::env::temp_dir(), size: 512 << 20, options: Options::default() };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        match word.as_str() {
            "--plain" => args.options.backend = Backend::Plain,
            "--cached" => args.options.direct_writes = false,
            "--size" => {
                let size = words.next().and_then(|word| word.parse::<usize>().ok());
                args.size = size.ok_or("--size takes a number of MiB")? << 20;
            }
            dir => args.dir = dir.into(),
        }
    }
    Ok(args)
}

/// User and system time of this process and its threads.
fn cpu() -> Duration {
    // Fields 14 and 15 of proc_pid_stat(5), in hundredths of a second; the name in field 2 has no blank.
    let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let ticks: u64 = stat.split(' ').skip(13).take(2).filter_map(|field| field.parse::<u64>().ok()).sum();
    Duration::from_millis(ticks * 10)
}

/// Prints one row: what was done, and the latencies of its steps.
fn row(name: &str, bytes: usize, begin: (Instant, Duration), mut latencies: Vec<Duration>) {
    let (time, cpu) = (begin.0.elapsed(), cpu() - begin.1);
    latencies.sort_unstable();
    let at = |part: f64| latencies.get((latencies.len() as f64 * part) as usize).copied().unwrap_or_default();
    println!(
        "{name:<44} {:>8.1} MB/s  p50 {:>6} us  p99 {:>6} us  CPU {:>5.2} s/GB",
        bytes as f64 / time.as_secs_f64() / 1e6,
        at(0.5).as_micros(),
        at(0.99).as_micros(),
        cpu.as_secs_f64() / (bytes as f64 / 1e9),
    );
}

fn raw(dir: &Path, group: usize, size: usize, direct: bool) -> io::Result<()> {
    let path = dir.join("raw");
    // O_DIRECT of open(2).
    let flags = if direct { 0o40_000 } else { 0 };
    let file = fs::File::options().write(true).create(true).truncate(true).custom_flags(flags).open(&path)?;
    let memory = vec![0x5a_u8; group + 4096];
    let skip = memory.as_ptr().align_offset(4096);
    let bytes = &memory[skip..skip + group];
    let (begin, mut latencies) = ((Instant::now(), cpu()), Vec::new());
    for at in (0..size as u64).step_by(group) {
        let start = Instant::now();
        file.write_all_at(bytes, at)?;
        file.sync_data()?;
        latencies.push(start.elapsed());
    }
    let name = format!("raw {} KiB, {}", group >> 10, if direct { "direct" } else { "cached" });
    row(&name, size, begin, latencies);
    fs::remove_file(path)
}

fn entry(index: u64, records: &Bytes) -> Batch {
    let mut header = Header::new(BatchKind::Data);
    header.term = Term(1);
    header.index = RaftIndex(index);
    header.record_count = 1;
    header.records_crc = crc32fast::hash(records);
    header.records_size = u32::try_from(records.len()).unwrap_or(u32::MAX);
    header.records_size_plain = header.records_size;
    Batch { header, stamps: Bytes::new(), records: records.clone() }
}

fn append(log: &Log, name: &str, entry_size: usize, depth: usize, size: usize) -> io::Result<()> {
    let records = Bytes::from(vec![0x5a; entry_size - BATCH_HEADER_SIZE]);
    let (sender, flushed) = sync_channel(depth);
    let mut next = log.last().map_or(0, |last| last.index.0 + 1);
    let (begin, mut latencies) = ((Instant::now(), cpu()), Vec::new());
    let count = size / entry_size;
    let (mut sent, mut waiting) = (0, std::collections::VecDeque::new());
    while latencies.len() < count {
        while sent < count && waiting.len() < depth {
            let sender = sender.clone();
            let callback = Box::new(move |result: io::Result<()>| drop(sender.send(result)));
            log.append(vec![entry(next, &records)], callback).map_err(io::Error::other)?;
            waiting.push_back(Instant::now());
            (sent, next) = (sent + 1, next + 1);
        }
        flushed.recv().map_err(io::Error::other)??;
        latencies.extend(waiting.pop_front().map(|start| start.elapsed()));
    }
    row(name, count * entry_size, begin, latencies);
    Ok(())
}

/// Each round appends one entry to every log and waits until all are durable.
fn rounds(logs: &[Log], entry_size: usize, count: usize) -> io::Result<()> {
    let records = Bytes::from(vec![0x5a; entry_size - BATCH_HEADER_SIZE]);
    let (begin, mut latencies) = ((Instant::now(), cpu()), Vec::new());
    for round in 0..count {
        let start = Instant::now();
        let (sender, flushed) = sync_channel(logs.len());
        for log in logs {
            let sender = sender.clone();
            let callback = Box::new(move |result: io::Result<()>| drop(sender.send(result)));
            log.append(vec![entry(round as u64, &records)], callback).map_err(io::Error::other)?;
        }
        for _ in logs {
            flushed.recv().map_err(io::Error::other)??;
        }
        latencies.push(start.elapsed());
    }
    let name = format!("{} logs, an entry of {} KiB to each", logs.len(), entry_size >> 10);
    row(&name, entry_size * count * logs.len(), begin, latencies);
    Ok(())
}

/// Reads everything from the start: most of it was never in the page cache.
fn read(log: &Log) -> io::Result<()> {
    let (begin, mut latencies) = ((Instant::now(), cpu()), Vec::new());
    let (mut from, mut size) = (0, 0);
    loop {
        let start = Instant::now();
        let batches = log.read_data(Offset(from), RaftIndex(u64::MAX), 1 << 20).map_err(io::Error::other)?;
        let Some(last) = batches.last() else { break };
        from = last.header.next_offset().0;
        for batch in &batches {
            // What a consumer does at least: look at every byte.
            assert_eq!(crc32fast::hash(&batch.records), batch.header.records_crc, "the records are what was written");
            size += batch.header.batch_size();
        }
        latencies.push(start.elapsed());
    }
    row("read from the start, 1 MiB a time", size, begin, latencies);
    Ok(())
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args = args()?;
    let dir = args.dir.join(format!("arqon-append-{}", std::process::id()));
    fs::create_dir_all(&dir)?;
    raw(&dir, 4 << 10, 16 << 20, true)?;
    raw(&dir, 4 << 10, 16 << 20, false)?;
    raw(&dir, 1 << 20, args.size, true)?;
    raw(&dir, 1 << 20, args.size, false)?;
    let identity = Identity { cluster: "append".to_owned(), node: NodeId(1) };
    let store = Store::open(&dir.join("store"), identity, args.options)?;
    let log = |group| store.open_log(GroupId(group), ReplicaId(1)).map(|(log, _)| log);
    append(&log(1)?, "log, entries of 4 KiB, 1 in flight", 4 << 10, 1, 16 << 20)?;
    append(&log(2)?, "log, entries of 1 KiB, 256 in flight", 1 << 10, 256, args.size / 4)?;
    append(&log(3)?, "log, entries of 64 KiB, 16 in flight", 64 << 10, 16, args.size)?;
    let large = log(4)?;
    append(&large, "log, entries of 1 MiB, 4 in flight", 1 << 20, 4, args.size)?;
    read(&large)?;
    for (base, log_count, round_count) in [(1_000, 10, 1_000), (2_000, 100, 300), (3_000, 1_000, 50)] {
        let logs: Result<Vec<_>, _> = (0..log_count).map(|number| log(base + number)).collect();
        rounds(&logs?, 4 << 10, round_count)?;
    }
    let metrics = store.metrics();
    let count = |counter: &std::sync::atomic::AtomicU64| counter.load(std::sync::atomic::Ordering::Relaxed);
    println!(
        "{}: {} flushes, {} MB written, {} MB of zeroes ahead, {} segments",
        store.backend_name(),
        count(&metrics.flush_count),
        count(&metrics.written_size) / 1_000_000,
        count(&metrics.filled_size) / 1_000_000,
        count(&metrics.roll_count)
    );
    drop((large, store));
    fs::remove_dir_all(dir)?;
    Ok(())
}
