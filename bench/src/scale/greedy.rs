//! Memory of the nodes at full load, with clients that take all they can get.
//!
//! | client | does | tempts the node to |
//! |---|---|---|
//! | publisher | many messages of 1 KiB over all partitions | keep what is not committed, and recent entries |
//! | big publisher | payloads of 512 KiB | the same, by bytes |
//! | newcomer | every batch under another producer id | remember producers |
//! | deaf reader | asks for everything from the start, reads no answer | queue answers |
//! | patient reader | thousands of long polls on each connection | keep requests |
//! | half a frame | sends most of a frame of 16 MiB and stops | buffer frames |

use std::time::Duration;

use arqon_jepsen::Cluster;
use arqon_proto::{BatchBuilder, Compression, ProducerStamp, Record, limits, wire};
use arqon_sdk::{Client, From, NewEvent, ProducerOptions};
use bytes::{Bytes, BytesMut};
use tokio::{
    task::JoinSet,
    time::{Instant, sleep, timeout},
};
use wire::frame::Body;

use super::{
    Bench,
    cgroup::Cgroup,
    client,
    hello::Deaf,
    process::{is_running, rss_anon_mib},
    publish::{Load, Spread, windowed},
    table::{Line, Lines, Target},
    text,
};
use crate::payload::Payloads;

const NODE_COUNT: u32 = 3;
const PARTITION_COUNT: u32 = 100;
const TOPIC: &str = "scale.greedy";
/// A topic without any message: long polls wait there.
const QUIET_TOPIC: &str = "scale.quiet";
const PUBLISHER_COUNT: usize = 4;
const BIG_PUBLISHER_COUNT: usize = 2;
const BIG_SIZE: usize = 512 << 10;
const NEWCOMER_COUNT: usize = 8;
/// Deaf readers and half frames, on each node.
const DEAF_COUNT: usize = 64;
const PATIENT_COUNT: usize = 16;
const HALF_FRAME_COUNT: usize = 48;
/// Time for a greedy client to push its bytes.
const PUSH_TIME_MAX: Duration = Duration::from_secs(10);
/// Length of a load with one kind of greedy client, and with all of them.
const SINGLE_SECONDS: u64 = 10;
const ALL_SECONDS: u64 = 30;
const RSS_MIB_MAX: f64 = 512.0;
const CGROUP_SIZE: u64 = 768 << 20;
/// Bytes of payload that are written at most, so that the disk does not fill.
const PAYLOAD_SIZE_MAX: u64 = 4 << 30;

/// Each kind of greedy client beside the publishers, on fresh nodes; then all of them at once.
pub async fn measure(bench: &Bench<'_>) -> Result<Vec<Line>, String> {
    let mut lines = Lines::default();
    let none = under_load(bench, &[], bench.args.time(SINGLE_SECONDS), None).await?;
    lines.push(none.memory_line("greedy", "RssAnon of a node, publishers only"));
    for kind in Kind::ALL {
        let single = under_load(bench, &[kind], bench.args.time(SINGLE_SECONDS), None).await?;
        lines.push(single.memory_line("greedy", &format!("RssAnon of a node, and {}", kind.name())));
    }
    let all = under_load(bench, &Kind::ALL, bench.args.time(ALL_SECONDS), None).await?;
    lines.extend(all.lines("greedy"));
    Ok(lines.into_lines())
}

/// What a load did to the nodes.
struct Outcome {
    /// `RssAnon` of the largest node at its largest, in MiB.
    largest_mib: f64,
    /// Messages in the log in each second.
    rate: f64,
    ended_count: usize,
    serves: Result<(), String>,
}

impl Outcome {
    fn memory_line(&self, case: &str, figure: &str) -> Line {
        Line::new(case, figure, self.largest_mib, "MiB").target(Target::AtMost(RSS_MIB_MAX))
    }

    fn lines(self, case: &str) -> Vec<Line> {
        vec![
            self.memory_line(case, "RssAnon of a node, all of them"),
            Line::new(case, "in the log afterwards", self.rate, "msg/s").remark("1 KiB, 512 KiB and single small ones"),
            Line::new(case, "nodes that ended", self.ended_count as f64, "").target(Target::AtMost(0.0)),
            Line::new(case, "serves afterwards", f64::from(u8::from(self.serves.is_ok())), "")
                .target(Target::AtLeast(1.0))
                .remark(self.serves.err().unwrap_or_default()),
        ]
    }
}

/// The load for `time` on fresh nodes, which are in `groups` where there are any.
async fn under_load(
    bench: &Bench<'_>,
    kinds: &[Kind],
    time: Duration,
    groups: Option<&[Cgroup]>,
) -> Result<Outcome, String> {
    bench.note(&format!("greedy: {NODE_COUNT} nodes, {PARTITION_COUNT} partitions, publishers and {kinds:?}"));
    let (cluster, _data) = bench.cluster(NODE_COUNT).await?;
    let pids = cluster.pids();
    for (group, pid) in groups.unwrap_or_default().iter().zip(&pids) {
        group.add(*pid)?;
    }
    cluster.create_topic(TOPIC, PARTITION_COUNT).await.map_err(text)?;
    cluster.create_topic(QUIET_TOPIC, 1).await.map_err(text)?;

    let mut work = JoinSet::new();
    publishers(&mut work, &cluster, bench.args.seed, time).await?;
    if kinds.contains(&Kind::Newcomer) {
        for number in 0..NEWCOMER_COUNT {
            work.spawn(newcomer(client(&cluster).await?, number as u64));
        }
    }
    greedy_clients(&mut work, &cluster, kinds, time);

    let mut peaks = vec![0.0_f64; pids.len()];
    let begin = Instant::now();
    let mut ended_count = 0;
    while begin.elapsed() < time {
        sleep(Duration::from_millis(100)).await;
        ended_count = pids.iter().filter(|pid| !is_running(**pid)).count();
        if ended_count > 0 {
            break;
        }
        for (peak, now) in peaks.iter_mut().zip(rss_anon_mib(&pids)?) {
            *peak = peak.max(now);
        }
    }
    let seconds = begin.elapsed().as_secs_f64();
    work.shutdown().await;
    // Still serves a client that behaves.
    let (serves, rate) = match ended_count {
        0 => match timeout(Duration::from_secs(30), one_more(&cluster)).await {
            Ok(Ok(count)) => (Ok(()), count as f64 / seconds),
            Ok(Err(error)) => (Err(error), 0.0),
            Err(_) => (Err("no answer in 30 s".to_owned()), 0.0),
        },
        _ => (Err("a node has ended".to_owned()), 0.0),
    };
    let largest_mib = peaks.into_iter().fold(0.0, f64::max);
    Ok(Outcome { largest_mib, rate, ended_count, serves })
}

/// All kinds of clients at once, each node in a cgroup of 768 MiB.
pub async fn measure_in_cgroup(bench: &Bench<'_>) -> Result<Vec<Line>, String> {
    let name = |node| format!("arqon-bench-{}-{node}", std::process::id());
    let groups: Result<Vec<Cgroup>, String> =
        (1..=NODE_COUNT).map(|node| Cgroup::create(&name(node), CGROUP_SIZE)).collect();
    let groups = match groups {
        Ok(groups) => groups,
        Err(reason) => return Ok(vec![Line::not_measured("cgroup", "nodes inside 768 MiB", reason)]),
    };
    let outcome = under_load(bench, &Kind::ALL, bench.args.time(ALL_SECONDS), Some(&groups)).await?;
    let mut lines = outcome.lines("cgroup");
    let mut kill_count = 0;
    for group in &groups {
        kill_count += group.oom_kill_count()?;
    }
    lines.push(Line::new("cgroup", "killed for memory", kill_count as f64, "").target(Target::AtMost(0.0)));
    let peak = groups.iter().filter_map(Cgroup::peak_mib).fold(0.0, f64::max);
    lines.push(Line::new("cgroup", "charged to a group, most", peak, "MiB").remark("page cache included"));
    Ok(lines)
}

/// Publishes one message; gives how many there are in the topic.
async fn one_more(cluster: &Cluster) -> Result<u64, String> {
    let client = client(cluster).await?;
    let producer = client.producer(TOPIC, ProducerOptions::default()).await.map_err(text)?;
    producer.publish(NewEvent::new("one more")).await.map_err(text)?;
    let mut count = 0;
    for partition in 0..PARTITION_COUNT {
        count += client.list_offsets(TOPIC, partition, From::Latest).await.map_err(text)?;
    }
    Ok(count)
}

/// Clients that publish all they can, whatever becomes of single messages.
async fn publishers(work: &mut JoinSet<()>, cluster: &Cluster, seed: u64, time: Duration) -> Result<(), String> {
    let small = [(1024, 8_192); PUBLISHER_COUNT];
    let big = [(BIG_SIZE, 64); BIG_PUBLISHER_COUNT];
    let share = PAYLOAD_SIZE_MAX / (small.len() + big.len()) as u64;
    for (size, window) in small.into_iter().chain(big) {
        let client = client(cluster).await?;
        work.spawn(async move {
            let payloads = Payloads::new(seed, size);
            let load = Load {
                spread: Spread::Keyed,
                window,
                linger: Duration::from_millis(5),
                time,
                count_max: share / size as u64,
            };
            // Refusals are part of the game.
            let _ = windowed(&client, TOPIC, &payloads, load).await;
        });
    }
    Ok(())
}

/// Publishes for ever, each batch under another producer id.
async fn newcomer(client: Client, number: u64) {
    let record = Record { id: [7; 16], payload: Bytes::from_static(b"new here"), ..Record::default() };
    for count in 0_u64.. {
        let mut id = [0; 16];
        id[..8].copy_from_slice(&number.to_le_bytes());
        id[8..].copy_from_slice(&count.to_le_bytes());
        let mut builder = BatchBuilder::new();
        if builder.push(&record).is_err() {
            return;
        }
        let stamp = ProducerStamp { id, epoch: 1, base_sequence: 0 };
        let batch = builder.build(Compression::None, Some(stamp));
        let mut bytes = BytesMut::from(&batch.header.encode()[..]);
        bytes.extend_from_slice(&batch.records);
        let partition = (count % u64::from(PARTITION_COUNT)) as u32;
        let produce = wire::Produce { topic: TOPIC.to_owned(), partition, ..wire::Produce::default() };
        // Not waiting for the outcome, only for room.
        match client.submit(produce, bytes.freeze()).await {
            Ok(submitted) => drop(tokio::spawn(submitted.outcome())),
            Err(_) => sleep(Duration::from_millis(50)).await,
        }
    }
}

/// Clients that break no rule but want everything; each goes on until it is aborted.
fn greedy_clients(work: &mut JoinSet<()>, cluster: &Cluster, kinds: &[Kind], time: Duration) {
    for server in cluster.server().split(',') {
        for kind in kinds.iter().copied() {
            for number in 0..kind.connection_count() {
                let (server, token) = (server.to_owned(), cluster.token().to_owned());
                work.spawn(async move {
                    let until = Instant::now() + time;
                    while Instant::now() < until {
                        // A server that shows it the door is visited again.
                        if let Err(_refused) = kind.visit(&server, &token, number as u32).await {
                            sleep(Duration::from_millis(200)).await;
                        }
                    }
                });
            }
        }
    }
}

/// See the table above.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Newcomer,
    Deaf,
    Patient,
    HalfFrame,
}

impl Kind {
    const ALL: [Self; 4] = [Self::Newcomer, Self::Deaf, Self::Patient, Self::HalfFrame];

    fn name(self) -> &'static str {
        match self {
            Self::Newcomer => "newcomers",
            Self::Deaf => "deaf readers",
            Self::Patient => "patient readers",
            Self::HalfFrame => "half frames",
        }
    }

    /// Connections on each node.
    fn connection_count(self) -> usize {
        match self {
            // They publish through the SDK.
            Self::Newcomer => 0,
            Self::Deaf => DEAF_COUNT,
            Self::Patient => PATIENT_COUNT,
            Self::HalfFrame => HALF_FRAME_COUNT,
        }
    }

    async fn visit(self, server: &str, token: &str, number: u32) -> Result<(), String> {
        let mut connection = Deaf::connect(server, token).await?;
        let fetch = |topic: &str, partition: u32, wait_ms: u32| {
            Body::Fetch(wire::Fetch {
                topic: topic.to_owned(),
                partition,
                wait_ms,
                any_replica: true,
                ..wire::Fetch::default()
            })
        };
        let mut bytes = BytesMut::new();
        match self {
            Self::Newcomer => {}
            Self::Deaf => {
                for partition in 0..PARTITION_COUNT {
                    let body = fetch(TOPIC, (partition + number) % PARTITION_COUNT, 0);
                    bytes.extend_from_slice(&connection.request(body, 0)?);
                }
            }
            Self::Patient => {
                for _ in 0..limits::CONNECTION_REQUEST_COUNT_MAX {
                    let body = fetch(QUIET_TOPIC, 0, limits::POLL_WAIT_MS_MAX);
                    bytes.extend_from_slice(&connection.request(body, 0)?);
                }
            }
            Self::HalfFrame => {
                let produce = wire::Produce { topic: TOPIC.to_owned(), ..wire::Produce::default() };
                let body_size = limits::FRAME_SIZE_MAX - 4096;
                bytes.extend_from_slice(&connection.request(Body::Produce(produce), body_size)?);
                bytes.resize(body_size, 0x5a);
            }
        }
        connection.write(&bytes, PUSH_TIME_MAX).await;
        drop(bytes);
        connection.ended().await;
        Ok(())
    }
}
