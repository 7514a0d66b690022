//! Three nodes and N partitions: what is published, and what it costs to do nothing.

use std::time::Duration;

use arqon_jepsen::Cluster;
use tokio::time::{Instant, sleep};

use super::{
    Bench, client,
    process::rss_anon_mib,
    publish::{Load, Spread, windowed},
    table::{Line, Lines, Target},
    text,
};
use crate::{cpu, load::Measured, payload::Payloads};

const NODE_COUNT: u32 = 3;
const TOPIC: &str = "scale.growth";
/// Payload of one message.
const SIZE: usize = 1024;
/// Windows that are tried; the best one whose p99 is allowed counts.
const WINDOWS: [usize; 6] = [256, 1_024, 2_048, 4_096, 8_192, 16_384];
/// How long a message may wait for company.
const LINGER: Duration = Duration::from_millis(5);
/// No throughput counts that is bought with more waiting than this.
const P99_MS_MAX: f64 = 50.0;
/// Bytes of payload that one round writes at most, so that disks do not fill up.
const ROUND_SIZE_MAX: u64 = 1 << 30;
/// Time for all partitions to have a leader.
const LEADERS_TIME_MAX: Duration = Duration::from_secs(60);

/// One throughput round.
struct Try {
    window: usize,
    measured: Measured,
    cpu_seconds: f64,
}

impl Try {
    fn msgs_per_s(&self) -> f64 {
        self.measured.messages as f64 / self.measured.seconds
    }

    fn p99_ms(&self) -> f64 {
        self.measured.p99_us / 1e3
    }
}

pub async fn measure(bench: &Bench<'_>, partitions: u32) -> Result<Vec<Line>, String> {
    let case = format!("growth-{partitions}");
    bench.note(&format!("{case}: {NODE_COUNT} nodes, {partitions} partitions"));
    let replicas = f64::from(partitions * NODE_COUNT);
    let (cluster, _data) = bench.cluster(NODE_COUNT).await?;
    let pids = cluster.pids();
    let sum = |memory: Vec<f64>| memory.iter().sum::<f64>();
    let before = sum(rss_anon_mib(&pids)?);

    let begin = Instant::now();
    cluster.create_topic(TOPIC, partitions).await.map_err(text)?;
    wait_for_leaders(&cluster).await?;
    let created = begin.elapsed().as_secs_f64();
    let mut lines = Lines::default();
    lines.push(Line::new(&case, "topic created, all have leaders", created, "s"));

    // What creating it left to do is not idleness.
    sleep(bench.args.time(4)).await;
    let used = cpu::seconds(&pids)?;
    let idle = bench.args.time(20);
    sleep(idle).await;
    let idle_cores = (cpu::seconds(&pids)? - used) / idle.as_secs_f64();
    let mut line = Line::new(&case, "CPU at rest, all nodes", idle_cores, "cores");
    if partitions == 1_000 {
        line = line.target(Target::Stretch(0.75, 0.3));
    }
    lines.push(line.remark(format!("over {} s", idle.as_secs())));
    let memory = |after: f64| (after - before) / replicas;
    lines.push(of_replica(&case, "memory of a replica at rest", memory(sum(rss_anon_mib(&pids)?)), partitions));

    let client = client(&cluster).await?;
    let payloads = Payloads::new(bench.args.seed, SIZE);
    let leaders = cluster.leaders(TOPIC, 0).await.map_err(text)?;
    let (mut failed_count, mut first_failure) = (0, None);
    for (name, spread) in [("keyed", Spread::Keyed), ("in turn", Spread::InTurn)] {
        let mut tries = Vec::new();
        for window in WINDOWS {
            let count_max = ROUND_SIZE_MAX / SIZE as u64;
            let load = Load { spread, window, linger: LINGER, time: bench.args.time(6), count_max };
            let used = cpu::seconds(&pids)?;
            let published = windowed(&client, TOPIC, &payloads, load).await?;
            failed_count += published.failed_count;
            first_failure = first_failure.or(published.first_failure);
            tries.push(Try { window, measured: published.measured, cpu_seconds: cpu::seconds(&pids)? - used });
        }
        lines.extend(throughput(&case, name, &tries));
    }
    lines.push(
        Line::new(&case, "messages not acknowledged", failed_count as f64, "")
            .target(Target::AtMost(0.0))
            .remark(first_failure.unwrap_or_default()),
    );
    let moved = cluster.leaders(TOPIC, 0).await.map_err(text)?;
    let moved = moved.iter().filter(|leader| !leaders.contains(leader)).count();
    lines.push(Line::new(&case, "partitions with another leader after", moved as f64, "").target(Target::AtMost(0.0)));
    // Recent entries are kept in memory on purpose, up to a limit for each partition.
    let loaded = memory(sum(rss_anon_mib(&pids)?));
    lines.push(of_replica(&case, "memory of a replica after the load", loaded, partitions));
    let each = rss_anon_mib(&pids)?.into_iter().fold(0.0, f64::max);
    let line = Line::new(&case, "RssAnon of the largest node", each, "MiB");
    lines.push(if partitions <= 100 { line.target(Target::AtMost(512.0)) } else { line });
    Ok(lines.into_lines())
}

/// With few partitions the node itself would be divided among them, so there is no target.
fn of_replica(case: &str, figure: &str, mib: f64, partitions: u32) -> Line {
    let line = Line::new(case, figure, mib, "MiB").remark("RssAnon");
    if partitions >= 1_000 { line.target(Target::AtMost(1.5)) } else { line }
}

fn throughput(case: &str, spread: &str, tries: &[Try]) -> Vec<Line> {
    let tried = tries.iter().map(|one| format!("{}: {:.0}/s {:.0} ms", one.window, one.msgs_per_s(), one.p99_ms()));
    let tried = tried.collect::<Vec<_>>().join(", ");
    let allowed = tries.iter().filter(|one| one.p99_ms() <= P99_MS_MAX);
    let best = allowed.max_by(|a, b| a.msgs_per_s().total_cmp(&b.msgs_per_s()));
    let quickest = || tries.iter().min_by(|a, b| a.p99_ms().total_cmp(&b.p99_ms()));
    let Some(best) = best.or_else(quickest) else { return Vec::new() };
    let per_million = best.cpu_seconds * 1e6 / best.measured.messages.max(1) as f64;
    vec![
        Line::new(case, throughput_name(spread), best.msgs_per_s(), "msg/s")
            .remark(format!("1 KiB, window {}, linger 5 ms; tried {tried}", best.window)),
        Line::new(case, format!("publish {spread}, p50"), best.measured.p50_us / 1e3, "ms"),
        Line::new(case, format!("publish {spread}, p99"), best.p99_ms(), "ms").target(Target::AtMost(P99_MS_MAX)),
        Line::new(case, format!("publish {spread}, CPU of the nodes"), per_million, "s/million"),
    ]
}

fn throughput_name(spread: &str) -> String {
    format!("publish {spread}")
}

/// Throughput at 1,000 partitions over that at 10, where both were measured.
pub fn ratios(lines: &[Line]) -> Vec<Line> {
    let value = |case: &str, figure: &str| {
        lines.iter().find(|line| line.case == case && line.figure == figure).and_then(|line| line.value)
    };
    let ratio = |spread: &&str| {
        let figure = throughput_name(spread);
        let ratio = value("growth-1000", &figure)? / value("growth-10", &figure)?;
        let line = Line::new("growth", format!("publish {spread}, 1,000 over 10"), ratio, "x");
        Some(line.target(Target::AtLeast(0.5)))
    };
    ["keyed", "in turn"].iter().filter_map(ratio).collect()
}

/// Returns when every partition has a leader.
pub async fn wait_for_leaders(cluster: &Cluster) -> Result<(), String> {
    let deadline = Instant::now() + LEADERS_TIME_MAX;
    loop {
        let missing = match cluster.leaders(TOPIC, 0).await {
            Ok(leaders) if leaders.iter().all(|(_, leader)| *leader != 0) => return Ok(()),
            Ok(leaders) => leaders.iter().filter(|(_, leader)| *leader == 0).count().to_string(),
            Err(error) => error.to_string(),
        };
        if Instant::now() > deadline {
            return Err(format!("no leaders after {} s: {missing}", LEADERS_TIME_MAX.as_secs()));
        }
        sleep(Duration::from_millis(20)).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tried(window: usize, messages: u64, p99_us: f64) -> Try {
        let measured = Measured { messages, seconds: 1.0, p50_us: p99_us / 2.0, p99_us };
        Try { window, measured, cpu_seconds: 1.0 }
    }

    #[test]
    fn the_fastest_window_that_does_not_wait_too_long_counts() {
        let tries = [tried(1_024, 1_000, 5e3), tried(4_096, 3_000, 40e3), tried(16_384, 9_000, 60e3)];
        let lines = throughput("growth-10", "keyed", &tries);
        assert_eq!((lines[0].value, lines[2].met), (Some(3_000.0), Some(true)));
        let slow = throughput("growth-1000", "keyed", &[tried(1_024, 1_800, 90e3), tried(4_096, 2_000, 95e3)]);
        assert_eq!((slow[0].value, slow[2].met), (Some(1_800.0), Some(false)));
        let both: Vec<Line> = lines.into_iter().chain(slow).collect();
        assert_eq!(ratios(&both)[0].value, Some(0.6));
        assert_eq!(ratios(&both).len(), 1);
    }
}
