//! `arqon demo`: jobs in, results out, with parts killed on the way.
//!
//! ```text
//!   pictures -> client -> Shield -> genesis.jobs -> HTTP shim -> genesis worker
//!                                   three nodes         |
//!                client <- Shield <- genesis.results <--+
//!
//!   results seen:  0 ------- 1/3 ------- 1/2 ------- 2/3 ------- all
//!   faults:               node killed  shim killed  node back
//! ```
//!
//! Before each kill the worker is held (SIGSTOP) for a moment until the control plane shows
//! leased jobs, so that something is surely lost with the process.

mod pictures;
mod queue;
mod summary;
mod traffic;
mod verdict;

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use arqon_proto::wire;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use rustix::process::Signal;

use self::pictures::Pictures;
use self::queue::{Held, Queue};
use self::summary::Summary;
use self::traffic::Traffic;
use self::verdict::Verdict;
use crate::cluster::{LocalCluster, write_secret};
use crate::connect::{self, Control};
use crate::process::Process;
use crate::publish::durability_name;
use crate::signals::StopSignals;
use crate::{Failure, health, output};

const NODE_COUNT: u16 = 3;
const PARTITION_COUNT: u32 = 3;
const JOBS_TOPIC: &str = "genesis.jobs";
const RESULTS_TOPIC: &str = "genesis.results";
/// Short, so that the jobs of the killed shim come back soon.
const LEASE_MS: u32 = 2_000;
const READY_TIMEOUT: Duration = Duration::from_secs(30);
const LEASED_TIMEOUT: Duration = Duration::from_secs(30);
const SETTLED_TIMEOUT: Duration = Duration::from_secs(60);
const RETENTION: Duration = Duration::from_secs(24 * 3_600);

/// Arguments of `arqon demo`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Examples:\n  arqon demo\n  arqon demo --jobs 2000 --input ./pictures --json\n\n\
    Starts three nodes, a Shield, an HTTP worker and its shim on free loopback ports; publishes the jobs over\n\
    WebSocket; kills a node and the shim with SIGKILL while jobs are leased, and starts them again. Then reads\n\
    the results from every replica. Exit code 0 only if each job has exactly one result, and a true one.")]
pub struct DemoArgs {
    /// Number of jobs
    #[arg(long, value_name = "N", default_value_t = 500, value_parser = clap::value_parser!(u32).range(3..=1_000_000))]
    jobs: u32,
    /// Make the jobs from the PNG files in DIR [default: the pictures in this program]
    #[arg(long, value_name = "DIR")]
    input: Option<PathBuf>,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

/// Runs the demo.
///
/// # Errors
/// An input that is no picture, a process that does not start, or a job without its one true
/// result.
pub async fn demo(args: DemoArgs) -> Result<(), Failure> {
    let pictures = Arc::new(Pictures::load(args.input.as_deref())?);
    let folder = tempfile::Builder::new().prefix("arqon-demo-").tempdir().map_err(Failure::failed)?;
    let mut signals = StopSignals::listen()?;
    let story = Story::new(&args);
    let result = tokio::select! {
        result = run(args.jobs as usize, pictures, folder.path(), &story) => result,
        () = signals.wait() => return Err(Failure::failed("interrupted")),
    };
    story.end();
    let kept = |failure: Failure, folder: tempfile::TempDir| {
        Failure::failed(format!("{failure}; logs and data are kept in {}", folder.keep().display()))
    };
    let summary = match result {
        Ok(summary) => summary,
        Err(failure) => return Err(kept(failure, folder)),
    };
    if args.json {
        output::json(&summary.document())?
    } else {
        output::line(summary.text())?
    }
    if summary.passed() {
        return Ok(());
    }
    Err(kept(Failure::failed("not every job has its one true result"), folder))
}

/// Tells on standard error how the run goes.
struct Story {
    bar: ProgressBar,
    told: bool,
}

impl Story {
    fn new(args: &DemoArgs) -> Self {
        let target =
            if std::io::stderr().is_terminal() { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let bar = ProgressBar::with_draw_target(Some(u64::from(args.jobs)), target);
        let style = ProgressStyle::with_template("{elapsed_precise} [{bar:40}] {pos}/{len} results");
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("=> "));
        Self { bar, told: !args.json }
    }

    fn tell(&self, text: impl std::fmt::Display) {
        if !self.bar.is_hidden() {
            self.bar.println(text.to_string());
        } else if self.told {
            eprintln!("{text}");
        }
    }

    fn end(&self) {
        self.bar.finish_and_clear();
    }
}

/// The processes and clients of one run.
struct Stage {
    cluster: LocalCluster,
    worker: Process,
    shim: Process,
    shim_config: PathBuf,
    traffic: Traffic,
    queue: Queue,
}

/// How many jobs are published, and how many results seen, before each step.
#[derive(Debug, PartialEq, Eq)]
struct Plan {
    jobs: usize,
    /// Published at once; the rest follows after the kills, which each need fresh jobs.
    first: usize,
    /// Published after the node's kill.
    second: usize,
    node_kill: usize,
    shim_kill: usize,
    node_back: usize,
}

impl Plan {
    /// At least three jobs: one for each kill, and one that shows the new leader.
    fn new(jobs: usize) -> Self {
        let first = (jobs / 2).min(jobs.saturating_sub(3));
        let second = (jobs * 3 / 4).clamp((first + 2).min(jobs), jobs.saturating_sub(1).max(1));
        Self {
            jobs,
            first,
            second,
            node_kill: (jobs / 3).min(first),
            shim_kill: (jobs / 2).min(second),
            node_back: jobs * 2 / 3,
        }
    }
}

async fn run(jobs: usize, pictures: Arc<Pictures>, folder: &Path, story: &Story) -> Result<Summary, Failure> {
    let start = Instant::now();
    let plan = Plan::new(jobs);
    let mut stage = set_up(&plan, pictures.clone(), folder, story).await?;
    let bar = tokio::spawn(show_progress(story.bar.clone(), stage.traffic.seen()));

    stage.traffic.publish_to(plan.first).await?;
    stage.traffic.wait_seen(plan.node_kill).await?;
    let (node_held, failover) = kill_node(&mut stage, story).await?;
    stage.traffic.publish_to(plan.second).await?;

    stage.traffic.wait_seen(plan.shim_kill).await?;
    let shim_held = kill_shim(&mut stage, story).await?;
    stage.traffic.publish_to(plan.jobs).await?;

    stage.traffic.wait_seen(plan.node_back).await?;
    stage.cluster.restart_node(node_held.node)?;
    stage.cluster.node_ready(node_held.node).await?;
    story.tell(format_args!("node {} is back", node_held.node));

    stage.traffic.wait_seen(plan.jobs).await?;
    stage.queue.wait_settled(PARTITION_COUNT, SETTLED_TIMEOUT).await?;
    bar.abort();
    let verdict = judge(&stage, &pictures, story).await?;
    let summary = Summary {
        jobs: stage.traffic.published(),
        verdict,
        durability: durability_name(stage.traffic.durability()),
        node_killed: node_held.node,
        leased_at_node_kill: node_held.leased,
        failover_ms: failover.as_secs_f64() * 1e3,
        leased_at_shim_kill: shim_held.leased,
        publish_ms: stage.traffic.publish_ms(),
        job_ms: stage.traffic.job_ms(),
        seconds: start.elapsed().as_secs_f64(),
    };
    tear_down(stage).await?;
    Ok(summary)
}

async fn show_progress(bar: ProgressBar, mut seen: tokio::sync::watch::Receiver<usize>) {
    while seen.changed().await.is_ok() {
        bar.set_position(*seen.borrow_and_update() as u64);
    }
}

async fn set_up(plan: &Plan, pictures: Arc<Pictures>, folder: &Path, story: &Story) -> Result<Stage, Failure> {
    let cluster = LocalCluster::start(&folder.join("bus"), NODE_COUNT, false).await?;
    let layout = cluster.layout();
    let pids = cluster.pids().iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    story.tell(format_args!("three nodes and a Shield run (processes {pids})"));

    let mut worker = Process::spawn(
        "genesis-worker",
        &["genesis-worker", "--listen", "127.0.0.1:0", "--json"],
        &layout.log("genesis-worker"),
    )?;
    let listening = worker.ready(READY_TIMEOUT).await?;
    let url = listening["listening"].as_str().unwrap_or_default();
    let controls: Vec<&str> = layout.addresses().iter().map(|node| node.control.as_str()).collect();
    create_topic(&controls.join(","), layout.token()).await?;

    let token = layout.mint(
        "genesis-shim",
        "operator",
        &["subscribe:genesis.jobs", "publish:genesis.results", "execute:genesis"],
    )?;
    write_secret(&folder.join("shim.token"), token.as_bytes())?;
    let shim_config = folder.join("http-shim.toml");
    std::fs::write(&shim_config, shim_toml(&layout.servers(), url)).map_err(Failure::failed)?;
    let shim = spawn_shim(&cluster, &shim_config).await?;
    story.tell(format_args!("an HTTP worker runs at {url} behind its shim"));

    let token = layout.mint("demo-client", "client", &["publish:genesis.jobs", "subscribe:genesis.*"])?;
    let client = connect::client(layout.shield(), &token).await?;
    let topics = (JOBS_TOPIC, RESULTS_TOPIC);
    let kinds = pictures.count();
    let traffic = Traffic::start(&client, topics, PARTITION_COUNT, plan.jobs, pictures).await?;
    story.tell(format_args!("publishing {} jobs from {kinds} pictures over {}", plan.jobs, layout.shield()));
    let queue = Queue::new(JOBS_TOPIC, layout.addresses(), layout.token());
    Ok(Stage { cluster, worker, shim, shim_config, traffic, queue })
}

async fn create_topic(controls: &str, token: &str) -> Result<(), Failure> {
    let mut control = Control::connect(controls, token).await?;
    let config = wire::TopicConfig {
        name: JOBS_TOPIC.to_owned(),
        partitions: PARTITION_COUNT,
        replication: u32::from(NODE_COUNT),
        retention_ms: RETENTION.as_millis() as u64,
        results_topic: RESULTS_TOPIC.to_owned(),
        ..Default::default()
    };
    let request = control.request(wire::CreateTopicRequest { config: Some(config) });
    control.client().create_topic(request).await?;
    Ok(())
}

fn shim_toml(servers: &str, url: &str) -> String {
    let servers: Vec<&str> = servers.split(',').collect();
    format!(
        "servers = {servers:?}\ntoken_file = \"shim.token\"\noperator_id = \"genesis-distiller-1\"\n\
         operator_type = \"genesis\"\nversion = \"{}\"\njobs_topic = \"{JOBS_TOPIC}\"\n\
         url = \"{url}/distill\"\nlease_ms = {LEASE_MS}\nadmin_listen = \"127.0.0.1:0\"\n",
        env!("CARGO_PKG_VERSION")
    )
}

async fn spawn_shim(cluster: &LocalCluster, config: &Path) -> Result<Process, Failure> {
    let path = config.display().to_string();
    let mut shim =
        Process::spawn("http-shim", &["operator", "http", "--config", &path], &cluster.layout().log("http-shim"))?;
    let ready = shim.ready(READY_TIMEOUT).await?;
    // Registered and in touch with the worker: held before that, it would wait for the worker's
    // answer and lease nothing.
    let admin = ready["admin"].as_str().unwrap_or_default();
    health::wait_ready(admin, READY_TIMEOUT).await.map_err(Failure::failed)?;
    Ok(shim)
}

/// Holds the worker, publishes a job, and says where jobs are leased now.
async fn hold(stage: &mut Stage, partition: u32) -> Result<Held, Failure> {
    stage.worker.signal(Signal::STOP)?;
    let held = async {
        stage.traffic.publish_one(partition).await?;
        stage.queue.wait_leased(LEASED_TIMEOUT).await
    };
    let held = held.await;
    if held.is_err() {
        stage.worker.signal(Signal::CONT)?;
    }
    held
}

/// Kills the leader of the partition with most leased jobs; the time until that partition
/// acknowledges the next job.
async fn kill_node(stage: &mut Stage, story: &Story) -> Result<(Held, Duration), Failure> {
    let held = hold(stage, 0).await?;
    let start = Instant::now();
    stage.cluster.kill_node(held.node).await?;
    stage.worker.signal(Signal::CONT)?;
    let Held { node, partition, leased } = held;
    story.tell(format_args!("killed node {node}: it led {JOBS_TOPIC}/{partition}, jobs leased there: {leased}"));
    stage.traffic.publish_one(partition).await?;
    let failover = start.elapsed();
    story.tell(format_args!("{JOBS_TOPIC}/{partition} acknowledges again after {} ms", failover.as_millis()));
    Ok((held, failover))
}

/// Kills the shim while it waits for the worker, and starts it again.
async fn kill_shim(stage: &mut Stage, story: &Story) -> Result<Held, Failure> {
    let held = hold(stage, 1).await?;
    stage.shim.kill().await?;
    stage.worker.signal(Signal::CONT)?;
    let Held { partition, leased, .. } = held;
    story.tell(format_args!("killed the shim: jobs leased on {JOBS_TOPIC}/{partition}: {leased}"));
    stage.shim = spawn_shim(&stage.cluster, &stage.shim_config).await?;
    story.tell("the shim is back");
    Ok(held)
}

async fn judge(stage: &Stage, pictures: &Pictures, story: &Story) -> Result<Verdict, Failure> {
    story.tell("reading the results from every replica");
    let layout = stage.cluster.layout();
    let client = connect::client(&layout.servers(), layout.token()).await?;
    let mut replicas = Vec::new();
    for node in 1..=u64::from(NODE_COUNT) {
        replicas.push(verdict::drain(&client, RESULTS_TOPIC, PARTITION_COUNT, node).await?);
    }
    Ok(Verdict::of(&replicas, stage.traffic.published(), pictures))
}

async fn tear_down(mut stage: Stage) -> Result<(), Failure> {
    drop(stage.traffic);
    stage.shim.stop().await?;
    stage.worker.stop().await?;
    stage.cluster.stop().await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_step_has_the_jobs_that_it_needs() {
        for jobs in (3..200).chain([500, 1_000_000]) {
            let plan = Plan::new(jobs);
            // One for the node's kill and one to show the new leader; then one for the shim's.
            assert!(plan.first + 2 <= plan.second.max(plan.first + 2), "{plan:?}");
            assert!(plan.second < jobs, "{plan:?}");
            assert!(plan.first + 2 < jobs || jobs == 3, "{plan:?}");
            assert!(plan.node_kill <= plan.first, "{plan:?}");
            assert!(plan.shim_kill <= plan.second.max(plan.first + 2), "{plan:?}");
        }
        let plan = Plan::new(500);
        assert_eq!((plan.node_kill, plan.shim_kill, plan.node_back), (166, 250, 333));
    }
}
