//! `arqon-jepsen smoke`: three node processes, appends and reads, one SIGKILL per second.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use tokio::time::sleep;

use crate::{
    check::{RESUME_SECONDS_MAX, Verdict, judge},
    cluster::{Cluster, find_arqon},
    history::{History, Line, Writer},
    nemesis::{self, Plan},
    report,
    workload::{Setup, Workload, drain_all},
};

/// Nodes of the cluster.
const NODE_COUNT: u32 = 3;
/// Partitions of the topic, so that each node leads one.
const PARTITION_COUNT: u32 = 3;
/// The topic of the workload.
const TOPIC: &str = "jepsen.append";
/// Time without faults before the first and after the last of them.
const QUIET_TIME: Duration = Duration::from_secs(2);

/// Arguments of `smoke`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Example:\n  arqon-jepsen smoke --time 60s --seed 7 --json\n\n\
    With --kills-per-second 0 it is the unfaulted twin of the run, which must pass as well.")]
pub struct SmokeArgs {
    /// How long nodes are killed, as in 30s, 5m or 1h
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = parse_time)]
    time: Duration,
    /// Chooses victims and pauses [default: random]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Kills begun per second; the next one waits until all nodes are ready
    #[arg(long, value_name = "RATE", default_value_t = 1.0, value_parser = parse_rate)]
    kills_per_second: f64,
    /// Appends per second over all processes
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    rate: u32,
    /// Directory of history, logs and data, made when missing [default: a new one for each run]
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// The arqon program [default: the one beside this program, else built]
    #[arg(long, value_name = "FILE")]
    arqon: Option<PathBuf>,
    /// Keep the nodes' data even if the run is valid
    #[arg(long)]
    keep: bool,
    /// Print the verdict as one JSON document
    #[arg(long)]
    pub json: bool,
}

/// Parses `250ms`, `30s`, `5m` or `1h`.
///
/// # Errors
/// One line that says what is wrong.
pub fn parse_time(text: &str) -> Result<Duration, String> {
    let split = text.find(|letter: char| !letter.is_ascii_digit() && letter != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let seconds = match unit {
        "ms" => 0.001,
        "s" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        _ => return Err("needs a unit, as in 250ms, 30s, 5m or 1h".to_owned()),
    };
    let number: f64 = number.parse().map_err(|_| "is not a number with a unit, as in 30s".to_owned())?;
    match Duration::try_from_secs_f64(number * seconds) {
        Ok(time) if !time.is_zero() && time <= Duration::from_secs(7 * 24 * 3600) => Ok(time),
        _ => Err("must be more than 0 and at most a week".to_owned()),
    }
}

fn parse_rate(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(rate) if (0.0..=20.0).contains(&rate) => Ok(rate),
        _ => Err("must be a number from 0 to 20".to_owned()),
    }
}

/// The verdict of a run and where its history is.
pub struct Run {
    /// What the checkers found.
    pub verdict: Verdict,
    /// The history on disk.
    pub history: PathBuf,
    /// The command that makes the same choices again.
    pub replay: String,
}

/// The nodes' data, deleted on drop, so that an interrupted run leaves none, unless kept.
struct Data {
    path: PathBuf,
    keep: bool,
}

impl Drop for Data {
    fn drop(&mut self) {
        if !self.keep {
            // What cannot be deleted is left over; the verdict stands.
            let _ = std::fs::remove_dir_all(&self.path);
        }
    }
}

/// Makes a run and judges it. The data stays for a look at it when the run is not valid or fails.
///
/// # Errors
/// The line that says why there is no verdict: no program, no cluster, no history.
pub async fn smoke(args: SmokeArgs) -> Result<Run, String> {
    let seed = args.seed.unwrap_or_else(|| u64::from(rand::random::<u32>()));
    let replay = format!(
        "cargo run --release -p arqon-jepsen -- smoke --seed {seed} --time {}s --kills-per-second {} --rate {}",
        args.time.as_secs_f64(),
        args.kills_per_second,
        args.rate
    );
    let dir = run_directory(args.dir.as_deref(), seed)?;
    let history_path = dir.join("history.jsonl");
    report::progress(args.json, &format!("seed {seed}, history {}", history_path.display()));
    report::progress(args.json, &format!("replay: {replay}"));

    let arqon = find_arqon(args.arqon.clone()).await.map_err(|error| error.to_string())?;
    let history = Arc::new(Writer::create(&history_path).map_err(|error| error.to_string())?);
    let mut data = Data { path: dir.join("data"), keep: args.keep };
    let plan = Plan { seed, kills_per_second: args.kills_per_second, time: args.time };
    let verdict = attempt(arqon, &data.path, &history, &history_path, plan, &args).await;
    data.keep |= !verdict.as_ref().is_ok_and(|verdict| verdict.valid);
    Ok(Run { verdict: verdict?, history: history_path, replay })
}

/// The run itself; its nodes are gone when it returns or is dropped.
async fn attempt(
    arqon: PathBuf,
    data: &Path,
    history: &Arc<Writer>,
    history_path: &Path,
    plan: Plan,
    args: &SmokeArgs,
) -> Result<Verdict, String> {
    let mut cluster = Cluster::start(arqon, data, NODE_COUNT).await.map_err(|error| error.to_string())?;
    run(&mut cluster, history, plan, args.rate, args.json).await?;
    history.finish().map_err(|error| error.to_string())?;
    report::progress(args.json, "checking the history");
    Ok(judge(&History::load(history_path).map_err(|error| error.to_string())?))
}

async fn run(cluster: &mut Cluster, history: &Arc<Writer>, plan: Plan, rate: u32, quiet: bool) -> Result<(), String> {
    cluster.create_topic(TOPIC, PARTITION_COUNT).await.map_err(|error| error.to_string())?;
    let setup = Setup {
        server: cluster.server().to_owned(),
        token: cluster.token().to_owned(),
        topic: TOPIC.to_owned(),
        partition_count: PARTITION_COUNT,
        nodes: cluster.nodes(),
        rate,
    };
    history.record(Line {
        nodes: setup.nodes.clone(),
        keys: (0..PARTITION_COUNT).map(|partition| setup.key(partition)).collect(),
        seed: Some(plan.seed),
        ..Line::nemesis("start")
    });
    let workload = Workload::start(setup.clone(), history.clone()).map_err(|error| error.to_string())?;
    sleep(QUIET_TIME).await;
    let seconds = plan.time.as_secs_f64();
    let kills = plan.kills_per_second;
    report::progress(quiet, &format!("{NODE_COUNT} nodes run; up to {kills} kills per second for {seconds} s"));
    nemesis::run(cluster, history, TOPIC, plan).await.map_err(|error| error.to_string())?;
    report::progress(quiet, "all nodes run; waiting for writes to go on");
    // A little longer than the checker allows, so that it sees what came too late.
    workload.resume(Duration::from_secs(RESUME_SECONDS_MAX + 2)).await;
    sleep(QUIET_TIME).await;
    let ends = workload.stop().await;
    report::progress(quiet, "reading every replica to its end");
    drain_all(&setup, history, &ends).await.map_err(|error| error.to_string())
}

fn run_directory(given: Option<&Path>, seed: u64) -> Result<PathBuf, String> {
    let fresh = || std::env::temp_dir().join(format!("arqon-jepsen-{seed}-{}", std::process::id()));
    let dir = given.map_or_else(fresh, Path::to_owned);
    if dir.join("data").exists() {
        return Err(format!("--dir {}: holds the data of an earlier run", dir.display()));
    }
    std::fs::create_dir_all(&dir).map_err(|error| format!("cannot make {}: {error}", dir.display()))?;
    // Commands elsewhere can then read the path that is printed.
    std::path::absolute(&dir).map_err(|error| format!("{}: {error}", dir.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_a_unit() {
        assert_eq!(parse_time("30s"), Ok(Duration::from_secs(30)));
        assert_eq!(parse_time("250ms"), Ok(Duration::from_millis(250)));
        assert_eq!(parse_time("1.5m"), Ok(Duration::from_secs(90)));
        for wrong in ["", "30", "s", "-1s", "0s", "1e99h", "30 s"] {
            assert!(parse_time(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_data_of_an_earlier_run_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(run_directory(Some(dir.path()), 1).unwrap(), dir.path());
        std::fs::create_dir(dir.path().join("data")).unwrap();
        assert!(run_directory(Some(dir.path()), 1).unwrap_err().contains("earlier run"));
    }
}
