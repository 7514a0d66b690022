//! One node with much log: how long until it serves again, after a clean stop and after SIGKILL.

use std::{path::Path, sync::Arc, time::Duration};

use arqon_jepsen::Cluster;
use arqon_sdk::{Client, NewEvent, ProducerOptions};
use tokio::{
    task::JoinSet,
    time::{Instant, sleep},
};

use super::{
    Bench, client,
    process::{allocated_size, drop_page_cache, terminate},
    publish::{Load, Spread, windowed},
    table::{Line, Target},
    text,
};
use crate::{payload::Payloads, report::median};

const TOPIC: &str = "scale.restart";
const NODE: u64 = 1;
/// Payload of one message of the log.
const SIZE: usize = 16 << 10;
/// Messages in flight.
const WINDOW: usize = 1_024;
/// The log is never filled for longer.
const FILL_TIME_MAX: Duration = Duration::from_secs(600);
/// How long a publisher runs before the node is killed under it.
const UNDER_LOAD_TIME: Duration = Duration::from_millis(1_500);

/// Seconds of one restart.
#[derive(Default)]
struct Times {
    stopped: Vec<f64>,
    ready: Vec<f64>,
    served: Vec<f64>,
}

pub async fn measure(bench: &Bench<'_>, partitions: u32) -> Result<Vec<Line>, String> {
    let case = format!("restart-{partitions}");
    let size = bench.args.log_size();
    bench.note(&format!("{case}: 1 node, {partitions} partitions, {:.1} GB of log", size as f64 / 1e9));
    let (mut cluster, data) = bench.cluster(1).await?;
    cluster.create_topic(TOPIC, partitions).await.map_err(text)?;
    let payloads = Arc::new(Payloads::new(bench.args.seed, SIZE));
    let count_max = size / SIZE as u64;
    let load = load(FILL_TIME_MAX, count_max);
    let filled = windowed(&client(&cluster).await?, TOPIC, &payloads, load).await?.whole()?;
    if filled.messages < count_max {
        return Err(format!("{case}: only {} of {count_max} messages in {FILL_TIME_MAX:?}", filled.messages));
    }
    let on_disk = allocated_size(data.path())? as f64 / 1e9;
    let mut lines = vec![Line::new(&case, "log on the disk", on_disk, "GB")];

    let (mut clean, mut killed) = (Times::default(), Times::default());
    for _ in 0..if bench.args.quick { 1 } else { bench.args.restarts } {
        let pid = cluster.pids().first().copied().ok_or("the node does not run")?;
        clean.stopped.push(terminate(pid).await?.as_secs_f64());
        // Reaps it; there is nothing left to kill.
        cluster.kill(NODE).await.map_err(text)?;
        restart(&mut cluster, data.path(), partitions, &mut clean).await?;

        let publisher = under_load(client(&cluster).await?, Arc::clone(&payloads));
        sleep(UNDER_LOAD_TIME).await;
        cluster.kill(NODE).await.map_err(text)?;
        publisher.abort();
        restart(&mut cluster, data.path(), partitions, &mut killed).await?;
    }
    lines.push(Line::new(&case, "SIGTERM to end", median(&clean.stopped), "s"));
    for (how, times, limit) in [("SIGTERM", clean, 3.0), ("SIGKILL under load", killed, 10.0)] {
        lines.push(Line::new(&case, format!("{how}, start to ready"), median(&times.ready), "s"));
        let worst = times.served.iter().copied().fold(0.0, f64::max);
        lines.push(
            Line::new(&case, format!("{how}, start to all served"), median(&times.served), "s")
                .target(Target::AtMost(limit))
                .remark(format!("a produce in every partition; files not in the page cache; worst {worst:.2} s")),
        );
    }
    Ok(lines)
}

fn load(time: Duration, count_max: u64) -> Load {
    Load { spread: Spread::InTurn, window: WINDOW, linger: Duration::from_millis(1), time, count_max }
}

/// A publisher that runs until it is aborted; the loss of its node is what it is there for.
fn under_load(client: Client, payloads: Arc<Payloads>) -> tokio::task::JoinHandle<()> {
    tokio::spawn(async move {
        let _ = windowed(&client, TOPIC, &payloads, load(FILL_TIME_MAX, u64::MAX)).await;
    })
}

/// Starts the node with cold files and publishes to every partition.
async fn restart(cluster: &mut Cluster, data: &Path, partitions: u32, times: &mut Times) -> Result<(), String> {
    let dir = data.to_owned();
    tokio::task::spawn_blocking(move || drop_page_cache(&dir)).await.map_err(text)??;
    let begin = Instant::now();
    cluster.restart(NODE).await.map_err(text)?;
    times.ready.push(begin.elapsed().as_secs_f64());
    let client = client(cluster).await?;
    let mut produces = JoinSet::new();
    for partition in 0..partitions {
        let client = client.clone();
        produces.spawn(async move {
            let options = ProducerOptions { partition: Some(partition), ..ProducerOptions::default() };
            let producer = client.producer(TOPIC, options).await.map_err(text)?;
            producer.publish(NewEvent::new("after the restart")).await.map(|_| ()).map_err(text)
        });
    }
    while let Some(outcome) = produces.join_next().await {
        outcome.map_err(text)??;
    }
    times.served.push(begin.elapsed().as_secs_f64());
    Ok(())
}
