//! This bus: its nodes, its Shield, and its clients through the SDK.

use std::{
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use arqon_jepsen::Cluster;
use arqon_sdk::{Client, Job, Options, WorkerOptions};
use futures_util::{StreamExt, stream::FuturesUnordered};
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::{Child, Command},
    time::{Instant, timeout},
};

use super::cases::Setting;
use crate::{
    load::{self, Latencies, Measured, Received},
    payload::Payloads,
};

/// Time for the Shield to say that it is ready.
const SHIELD_TIME_MAX: Duration = Duration::from_secs(20);
/// Time without a job after which a round has failed.
const SILENCE_MAX: Duration = Duration::from_secs(20);

/// Nodes, with a client connected.
pub struct Ours {
    name: &'static str,
    cluster: Cluster,
    arqon: PathBuf,
    data: PathBuf,
    client: Client,
    shield: Option<Shield>,
}

struct Shield {
    child: Child,
    client: Client,
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

impl Ours {
    /// Starts `nodes` nodes with their data below `dir`, and a Shield when one is needed; tables call them `name`.
    ///
    /// # Errors
    /// What does not start.
    pub async fn start(
        name: &'static str,
        arqon: PathBuf,
        dir: &Path,
        nodes: usize,
        with_shield: bool,
    ) -> Result<Self, String> {
        let cluster = Cluster::start(arqon.clone(), dir, nodes as u32).await.map_err(text)?;
        let data = newest_cluster(dir)?;
        let client = connect(cluster.server(), cluster.token()).await?;
        let shield = match with_shield {
            true => Some(Shield::start(&arqon, &data, &cluster).await?),
            false => None,
        };
        Ok(Self { name, cluster, arqon, data, client, shield })
    }

    /// What tables call it.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Process ids of the nodes and the Shield.
    pub fn pids(&self) -> Vec<u32> {
        let mut pids = self.cluster.pids();
        pids.extend(self.shield.as_ref().and_then(|shield| shield.child.id()));
        pids
    }

    /// Where each node keeps its logs.
    pub fn logs(&self) -> Vec<PathBuf> {
        self.cluster.nodes().iter().map(|number| self.data.join(format!("node-{number}/logs"))).collect()
    }

    /// The client; through the Shield if so asked and if there is one.
    pub fn client(&self, through_shield: bool) -> &Client {
        match &self.shield {
            Some(shield) if through_shield => &shield.client,
            _ => &self.client,
        }
    }

    /// Makes a topic of one partition.
    ///
    /// # Errors
    /// What the control plane says.
    pub async fn create_topic(&self, topic: &str) -> Result<(), String> {
        if !topic.ends_with(".jobs") {
            return self.cluster.create_topic(topic, 1).await.map_err(text);
        }
        let first = self.cluster.server().split(',').next().unwrap_or_default();
        let mut command = Command::new(&self.arqon);
        command.args(["topic", "create", topic]).env("ARQON_SERVER", first).env("ARQON_TOKEN", self.cluster.token());
        let output = command.stdin(Stdio::null()).kill_on_drop(true).output().await.map_err(text)?;
        if output.status.success() {
            return Ok(());
        }
        Err(format!("cannot create topic {topic}: {}", String::from_utf8_lossy(&output.stderr).trim()))
    }

    /// Deletes a topic and its data.
    ///
    /// # Errors
    /// What the control plane says.
    pub async fn delete_topic(&self, topic: &str) -> Result<(), String> {
        self.cluster.delete_topic(topic).await.map_err(text)
    }
}

async fn connect(server: &str, token: &str) -> Result<Client, String> {
    let mut options = Options::new([server], token);
    options.client_name = "arqon-bench".to_owned();
    Client::connect(options).await.map_err(text)
}

impl Shield {
    /// A Shield as `arqon up` configures it, but without limits on the rate of messages.
    async fn start(arqon: &Path, data: &Path, cluster: &Cluster) -> Result<Self, String> {
        let given = data.join("shield.toml");
        let config = data.join("shield-bench.toml");
        let mut settings = std::fs::read_to_string(&given).map_err(|error| format!("{}: {error}", given.display()))?;
        settings.push_str("\n[limits]\n");
        for limit in ["connection_rate", "connection_burst", "tenant_rate", "tenant_burst"] {
            settings.push_str(&format!("{limit} = {}\n", u32::MAX));
        }
        std::fs::write(&config, settings).map_err(|error| format!("{}: {error}", config.display()))?;
        let mut command = Command::new(arqon);
        command.args(["--parent-pid", &std::process::id().to_string(), "shield", "--config"]).arg(&config);
        let log = std::fs::File::create(data.join("shield-bench.log")).map_err(text)?;
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log).process_group(0).kill_on_drop(true);
        let mut child = command.spawn().map_err(|error| format!("cannot start the Shield: {error}"))?;
        let stdout = child.stdout.take().ok_or("the Shield has no output")?;
        let mut lines = BufReader::new(stdout).lines();
        let line = timeout(SHIELD_TIME_MAX, lines.next_line()).await.map_err(|_| "the Shield does not get ready")?;
        let line = line.map_err(text)?.ok_or("the Shield ended while starting")?;
        let ready: serde_json::Value = serde_json::from_str(&line).map_err(text)?;
        let url = ready["shield"].as_str().ok_or("the Shield does not say where it listens")?;
        Ok(Self { child, client: connect(url, cluster.token()).await? })
    }
}

/// The cluster's directory: `Cluster` numbers its tries.
fn newest_cluster(dir: &Path) -> Result<PathBuf, String> {
    let entries = std::fs::read_dir(dir).map_err(|error| format!("{}: {error}", dir.display()))?;
    let clusters = entries.filter_map(|entry| entry.ok().map(|entry| entry.path()));
    let newest = clusters.filter(|path| path.join("node-1.toml").is_file()).max();
    newest.ok_or_else(|| format!("{} holds no cluster", dir.display()))
}

/// Reads the `count` messages of a topic from the start and checks every byte, again and again
/// until `time` is over.
///
/// # Errors
/// A message that is missing, changed, doubled or out of order.
pub async fn fetch(
    client: &Client,
    topic: &str,
    payloads: &Payloads,
    count: u64,
    setting: Setting,
    time: Duration,
) -> Result<Measured, String> {
    let begin = Instant::now();
    let mut all = Measured::default();
    while all.messages == 0 || begin.elapsed() < time {
        let pass = load::fetch(client, topic, payloads, count, setting.batch_size as u32).await?;
        all.messages += pass.messages;
        all.seconds += pass.seconds;
    }
    Ok(all)
}

/// Takes jobs for at most `time` and acknowledges each without a result; what counts is what was
/// confirmed. The latency is that of the confirmation, of every job in it.
///
/// # Errors
/// A changed payload, or an acknowledgement that is not confirmed.
pub async fn queue(
    client: &Client,
    topic: &str,
    payloads: &Payloads,
    count: u64,
    setting: Setting,
    time: Duration,
) -> Result<Measured, String> {
    let group = format!("g{:08x}", rand::random::<u32>());
    let options = WorkerOptions { group, parallelism: setting.window, ..WorkerOptions::default() };
    let mut worker = client.worker(topic, options).await.map_err(text)?;
    let mut latencies = Latencies::new();
    let mut received = Received::in_any_order(count);
    let mut acks = FuturesUnordered::new();
    let mut confirmed = 0;
    let begin = Instant::now();
    let mut taking = true;
    while taking || !acks.is_empty() {
        tokio::select! {
            jobs = timeout(SILENCE_MAX, worker.next_many(setting.window)), if taking => {
                let jobs = jobs.map_err(|_| format!("no job came after {}", received.count()))?.map_err(text)?;
                let jobs = jobs.ok_or("the worker ended before the jobs did")?;
                for job in &jobs {
                    received.take(payloads, &job.event)?;
                }
                acks.push(acknowledge(jobs, Instant::now()));
            }
            Some(acknowledged) = acks.next() => {
                let (count, latency) = acknowledged?;
                latencies.record_many(latency, count);
                confirmed += count;
            }
        }
        taking = taking && received.count() < count && begin.elapsed() < time;
    }
    let seconds = begin.elapsed().as_secs_f64();
    worker.stop(SILENCE_MAX).await;
    Ok(latencies.measured(confirmed, seconds))
}

/// How many jobs were acknowledged, each confirmed, and how long that took from `begin` on.
async fn acknowledge(jobs: Vec<Job>, begin: Instant) -> Result<(u64, Duration), String> {
    let count = jobs.len() as u64;
    match Job::ack_all(jobs).await.first() {
        Some((job, error)) => Err(format!("acknowledge {job:?}: {error}")),
        None => Ok((count, begin.elapsed())),
    }
}
