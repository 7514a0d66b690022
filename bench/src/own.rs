//! `arqon-bench self`: every case at every size on every cluster, in rounds.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use arqon_jepsen::{Cluster, find_arqon, parse_time};
use arqon_sdk::{Client, Options};

use crate::{
    cpu,
    disk::Gauge,
    load::{self, Measured, Pace, Publish},
    payload::{self, Payloads},
    report::{Case, Report, Round},
};

/// Payload bytes up to which sizes are accepted: what an event may hold.
const SIZE_MAX: usize = 1 << 20;
/// Length of the round that warms a new cluster up and is not counted.
const WARM_UP_TIME: Duration = Duration::from_millis(500);

/// Arguments of `self`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Example:\n  arqon-bench self --nodes 3 --sizes 1024 --time 30s --json\n\n\
    docs/bench/README.md says what each figure means.")]
pub struct OwnArgs {
    /// Nodes of the cluster [default: 1, then 3]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=7))]
    nodes: Option<u32>,
    /// Payload sizes in bytes
    #[arg(long, value_name = "BYTES,...", value_delimiter = ',', default_value = "128,1024,16384", value_parser = parse_size)]
    sizes: Vec<usize>,
    /// Time of each case, divided over the rounds
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = parse_time)]
    time: Duration,
    /// Rounds of each case; the medians are reported
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=99))]
    rounds: u32,
    /// Messages in flight when publishing
    #[arg(long, value_name = "N", default_value_t = 4096, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    window: u32,
    /// How long a message may wait for company; at most 5ms
    #[arg(long, value_name = "TIME", default_value = "1ms", value_parser = parse_time)]
    linger: Duration,
    /// Messages per second of publish-to-consume
    #[arg(long, value_name = "N", default_value_t = 5000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    rate: u32,
    /// Partitions of each topic
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=100))]
    partitions: u32,
    /// Seed of the payloads
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Directory on the disk to measure, made when missing [default: a temporary one]
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// The arqon program [default: the one beside this program, else built]
    #[arg(long, value_name = "FILE")]
    arqon: Option<PathBuf>,
    /// Print one JSON document
    #[arg(long)]
    pub json: bool,
}

fn parse_size(text: &str) -> Result<usize, String> {
    match text.trim().parse() {
        Ok(size) if (payload::SIZE_MIN..=SIZE_MAX).contains(&size) => Ok(size),
        _ => Err(format!("must be {} to {SIZE_MAX} bytes", payload::SIZE_MIN)),
    }
}

/// Measures everything that `args` ask for.
///
/// # Errors
/// The line that says what failed; figures of a run with a wrong read are never shown.
pub async fn run(args: OwnArgs) -> Result<Report, String> {
    let arqon = find_arqon(args.arqon.clone()).await.map_err(|error| error.to_string())?;
    let temporary = temporary_directory(args.dir.as_deref())?;
    let mut gauge = Gauge::new(temporary.path())?;
    if gauge.is_tmpfs() {
        note(&args, "warning: the directory lies in memory (tmpfs), no figure is about a disk; see --dir");
    }
    let mut measurements = Vec::new();
    for node_count in args.nodes.map_or(vec![1, 3], |count| vec![count]) {
        let data = temporary.path().join(format!("nodes-{node_count}"));
        let cluster = Cluster::start(arqon.clone(), &data, node_count).await.map_err(|error| error.to_string())?;
        let bench = Bench::new(&args, &cluster).await?;
        bench.warm_up().await?;
        for size in &args.sizes {
            note(&args, &format!("{node_count} nodes, {size} bytes"));
            gauge = measured(gauge).await?;
            measurements.push((node_count, *size, bench.of_size(*size).await?));
        }
        drop(cluster);
        // The next cluster needs the room; what is left over goes with the temporary directory.
        let _ = std::fs::remove_dir_all(&data);
    }
    // Once more, so that there are rounds at both ends and, by the cases above, in between.
    let disk = measured(gauge).await?.disk();
    let cases = measurements.iter().flat_map(|(node_count, size, of_size)| {
        of_size.iter().map(|(name, rounds)| Case::new(name, *size, *node_count, rounds, &disk))
    });
    Ok(Report::new(cases.collect(), disk, args.window, args.linger, args.rounds))
}

/// Rounds of each case of one size, by the case's name.
type OfSize = [(&'static str, Vec<Round>); 4];

/// One round of the disk, on a thread that may block.
async fn measured(mut gauge: Gauge) -> Result<Gauge, String> {
    let measuring = tokio::task::spawn_blocking(move || gauge.measure().map(|()| gauge));
    measuring.await.map_err(|error| error.to_string())?
}

/// A fresh directory below `dir`, which is made when missing, or where the system puts such things.
pub fn temporary_directory(dir: Option<&Path>) -> Result<tempfile::TempDir, String> {
    let mut builder = tempfile::Builder::new();
    let made = match dir {
        Some(dir) => {
            std::fs::create_dir_all(dir).map_err(|error| format!("--dir {}: {error}", dir.display()))?;
            builder.prefix("arqon-bench-").tempdir_in(dir)
        }
        None => builder.prefix("arqon-bench-").tempdir(),
    };
    made.map_err(|error| format!("cannot make a temporary directory: {error}"))
}

fn note(args: &OwnArgs, text: &str) {
    if !args.json {
        eprintln!("{text}");
    }
}

/// The cases of one cluster.
struct Bench<'a> {
    args: &'a OwnArgs,
    cluster: &'a Cluster,
    client: Client,
    pace: Pace,
}

impl<'a> Bench<'a> {
    async fn new(args: &'a OwnArgs, cluster: &'a Cluster) -> Result<Self, String> {
        let mut options = Options::new([cluster.server()], cluster.token());
        options.client_name = "arqon-bench".to_owned();
        let client = Client::connect(options).await.map_err(|error| error.to_string())?;
        let pace = Pace { window: args.window as usize, linger: args.linger, time: args.time / args.rounds };
        Ok(Self { args, cluster, client, pace })
    }

    async fn warm_up(&self) -> Result<(), String> {
        let warm = Arc::new(Payloads::new(self.args.seed, 1024));
        let pace = Pace { time: WARM_UP_TIME, ..self.pace };
        let work = Publish::at(pace, &warm, 1024);
        let publish = async |topic: &str| load::publish(&self.client, topic, &work).await;
        self.with_topic("warm-up", publish).await.map(|_| ())
    }

    async fn of_size(&self, size: usize) -> Result<OfSize, String> {
        let payloads = Arc::new(Payloads::new(self.args.seed, size));
        let (mut publish, mut fetch, mut single, mut consume) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for round in 0..self.args.rounds {
            let name = |case: &str| format!("{case}-{size}-{round}");
            let work = Publish::at(self.pace, &payloads, size);
            let (written, read) = self
                .with_topic(&name("publish"), async |topic: &str| {
                    let written = self.measured(load::publish(&self.client, topic, &work)).await?;
                    let count = written.measured.messages;
                    let read = self.measured(load::fetch(&self.client, topic, &payloads, count, 0)).await?;
                    Ok((written, read))
                })
                .await?;
            publish.push(written);
            fetch.push(read);
            let one = async |topic: &str| {
                let time = self.pace.time;
                self.measured(load::publish_one_at_a_time(&self.client, topic, &payloads, time)).await
            };
            single.push(self.with_topic(&name("single"), one).await?);
            let through = async |topic: &str| {
                let rate = self.args.rate;
                self.measured(load::publish_to_consume(&self.client, topic, &payloads, rate, self.pace)).await
            };
            consume.push(self.with_topic(&name("consume"), through).await?);
        }
        Ok([("publish", publish), ("publish-one-at-a-time", single), ("fetch", fetch), ("publish-to-consume", consume)])
    }

    /// Runs `work` on a fresh topic, which is deleted afterwards so that disks do not fill up.
    async fn with_topic<T>(&self, name: &str, work: impl AsyncFnOnce(&str) -> Result<T, String>) -> Result<T, String> {
        let topic = format!("bench.{name}");
        self.cluster.create_topic(&topic, self.args.partitions).await.map_err(|error| error.to_string())?;
        let result = work(&topic).await.map_err(|error| format!("{topic}: {error}"))?;
        self.cluster.delete_topic(&topic).await.map_err(|error| error.to_string())?;
        Ok(result)
    }

    async fn measured(&self, work: impl Future<Output = Result<Measured, String>>) -> Result<Round, String> {
        let pids = self.cluster.pids();
        let before = cpu::seconds(&pids)?;
        let measured = work.await?;
        Ok(Round { measured, cpu_seconds: cpu::seconds(&pids)? - before })
    }
}
