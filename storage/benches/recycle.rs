//! What retention by size costs the disk, with files of purged segments used again and without.
//!
//! ```text
//!   cargo bench -p arqon-storage --bench recycle -- DIR [ROUNDS]
//! ```
//!
//! Each round runs every case both ways, one after the other, in a directory of its own below DIR; printed are
//! medians over the rounds. Own bytes are those of this process; bytes of the device are those of the whole disk
//! meanwhile, journal and other programs included.

#![expect(clippy::unwrap_used, reason = "a measurement ends at the first thing that fails")]

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use arqon_proto::{BATCH_HEADER_SIZE, Batch, BatchKind, GroupId, Header, NodeId, RaftIndex, ReplicaId, Term};
use arqon_storage::{Identity, Log, Options, Store};
use bytes::Bytes;

/// One way to load the store.
struct Case {
    name: &'static str,
    log_count: usize,
    entry_size: usize,
    /// Entries of each log that wait for the disk.
    depth: usize,
    segment_size: u64,
    /// Bytes of each log that are measured, after twice its retention.
    size: u64,
}

const CASES: [Case; 3] = [
    Case {
        name: "1 log, 4,000 B, one at a time",
        log_count: 1,
        entry_size: 4_000,
        depth: 1,
        segment_size: 4 << 20,
        size: 16 << 20,
    },
    Case {
        name: "1 log, 65,000 B, 16 wait",
        log_count: 1,
        entry_size: 65_000,
        depth: 16,
        segment_size: 32 << 20,
        size: 256 << 20,
    },
    Case {
        name: "16 logs, 4,000 B, 4 wait",
        log_count: 16,
        entry_size: 4_000,
        depth: 4,
        segment_size: 2 << 20,
        size: 8 << 20,
    },
];
/// Full segments that retention keeps.
const KEPT_COUNT: u64 = 2;

/// What one run gave.
#[derive(Clone, Copy, Default)]
struct Sample {
    mb_per_s: f64,
    p50_us: f64,
    p99_us: f64,
    /// Bytes written by this process for a byte appended; without the journal of the file system.
    own: f64,
    /// Bytes written to the device for a byte appended, by whomever.
    device: f64,
    recycled: f64,
}

/// Bytes written to the device of `dir` so far.
fn device_written(dir: &Path) -> u64 {
    let device = std::fs::metadata(dir).unwrap().dev();
    let (major, minor) = (device >> 8 & 0xfff, device & 0xff | device >> 12 & 0xf_ff00);
    let stat = std::fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/stat")).unwrap();
    stat.split_whitespace().nth(6).unwrap().parse::<u64>().unwrap() * 512
}

/// Bytes that this process has given to a disk so far.
fn own_written() -> u64 {
    let io = std::fs::read_to_string("/proc/self/io").unwrap();
    let line = io.lines().find_map(|line| line.strip_prefix("write_bytes: ")).unwrap();
    line.parse().unwrap()
}

struct Load {
    log: Log,
    records: Bytes,
    waiting: std::collections::VecDeque<(Instant, Receiver<Duration>)>,
    written: u64,
    purged_at: u64,
}

impl Load {
    fn append(&mut self) {
        let mut header = Header::new(BatchKind::Raft);
        header.term = Term(1);
        header.index = RaftIndex(self.log.last().map_or(0, |last| last.index.0 + 1));
        header.records_size = self.records.len() as u32;
        header.records_size_plain = header.records_size;
        header.records_crc = crc32fast::hash(&self.records);
        let batch = Batch { header, stamps: Bytes::new(), records: self.records.clone() };
        let (sender, durable) = channel();
        let begin = Instant::now();
        let told = Box::new(move |result: std::io::Result<()>| {
            result.unwrap();
            let _ = sender.send(begin.elapsed());
        });
        self.log.append(vec![batch], told).unwrap();
        self.waiting.push_back((begin, durable));
        self.written += (self.records.len() + BATCH_HEADER_SIZE) as u64;
    }

    /// Drops what is beyond the retention, about once a segment.
    fn retain(&mut self, segment_size: u64) {
        if self.written - self.purged_at < segment_size {
            return;
        }
        self.purged_at = self.written;
        let entry_size = (self.records.len() + BATCH_HEADER_SIZE) as u64;
        let kept = KEPT_COUNT * segment_size / entry_size;
        let last = self.log.last().unwrap().index.0;
        if let Some(boundary) = self.log.last_segment_boundary(RaftIndex(last.saturating_sub(kept))) {
            let purge = self.log.purge_through(boundary);
            tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(purge).unwrap();
        }
    }
}

fn run(dir: &Path, case: &Case, recycles: bool) -> Sample {
    let dir = tempfile::tempdir_in(dir).unwrap();
    let options = Options {
        segment_size_first: case.segment_size,
        segment_size_max: case.segment_size,
        pool_size_max: if recycles { Options::default().pool_size_max } else { 0 },
        scrub_rate_max: 0,
        ..Options::default()
    };
    let identity = Identity { cluster: "bench".to_owned(), node: NodeId(1) };
    let store = Store::open(dir.path(), identity, options).unwrap();
    // Bytes that no device makes smaller.
    let noise = (0_u64..).map(|number| number.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29) as u8);
    let records: Bytes = noise.take(case.entry_size - BATCH_HEADER_SIZE).collect();
    let open = |number: usize| {
        let (log, _) = store.open_log(GroupId(number as u64 + 1), ReplicaId(1)).unwrap();
        log.set_owner("bench");
        Load { log, records: records.clone(), waiting: Default::default(), written: 0, purged_at: 0 }
    };
    let mut loads: Vec<Load> = (0..case.log_count).map(open).collect();
    let warm_size = 2 * (KEPT_COUNT + 1) * case.segment_size;
    let mut begin = None;
    let mut latencies = Vec::new();
    while loads[0].written < warm_size + case.size {
        if begin.is_none() && loads[0].written >= warm_size {
            let recycled = store.metrics().recycled_count.load(Ordering::Relaxed);
            begin = Some((Instant::now(), [own_written(), device_written(dir.path())], recycled));
        }
        for load in &mut loads {
            load.append();
            while load.waiting.len() >= case.depth
                && let Some((_, durable)) = load.waiting.pop_front()
            {
                let latency = durable.recv().unwrap();
                if begin.is_some() {
                    latencies.push(latency.as_secs_f64() * 1e6);
                }
            }
            load.retain(case.segment_size);
        }
    }
    for (_, durable) in loads.iter_mut().flat_map(|load| load.waiting.drain(..)) {
        durable.recv().unwrap();
    }
    let (begin, [own, device], recycled) = begin.unwrap();
    let elapsed = begin.elapsed();
    let (own, device) = (own_written() - own, device_written(dir.path()) - device);
    let size = (case.size * case.log_count as u64) as f64;
    latencies.sort_by(f64::total_cmp);
    let at = |part: f64| latencies[(latencies.len() as f64 * part) as usize];
    Sample {
        mb_per_s: size / 1e6 / elapsed.as_secs_f64(),
        p50_us: at(0.5),
        p99_us: at(0.99),
        own: own as f64 / size,
        device: device as f64 / size,
        recycled: (store.metrics().recycled_count.load(Ordering::Relaxed) - recycled) as f64,
    }
}

fn median(samples: &[Sample], figure: impl Fn(&Sample) -> f64) -> f64 {
    let mut figures: Vec<f64> = samples.iter().map(figure).collect();
    figures.sort_by(f64::total_cmp);
    figures[figures.len() / 2]
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with("--")).collect();
    let Some(dir) = arguments.first() else {
        println!("nothing measured: name a directory on the disk to measure");
        return;
    };
    let rounds: usize = arguments.get(1).map_or(5, |rounds| rounds.parse().unwrap());
    for case in &CASES {
        let mut samples = [Vec::new(), Vec::new()];
        for round in 0..rounds {
            for way in [round % 2, 1 - round % 2] {
                samples[way].push(run(Path::new(dir), case, way == 1));
            }
        }
        for (samples, way) in samples.iter().zip(["new files", "used again"]) {
            println!(
                "{:28} {way:10} {:7.1} MB/s  p50 {:6.0} us  p99 {:7.0} us  bytes a byte: own {:.2}, device {:.2}  {} recycled",
                case.name,
                median(samples, |sample| sample.mb_per_s),
                median(samples, |sample| sample.p50_us),
                median(samples, |sample| sample.p99_us),
                median(samples, |sample| sample.own),
                median(samples, |sample| sample.device),
                median(samples, |sample| sample.recycled),
            );
        }
    }
}
