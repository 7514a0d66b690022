//! `arqon-jepsen run`: a cluster of hosts, workloads, faults, and the verdict.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use tokio::{task::JoinSet, time::sleep};

use crate::{
    check::{RESUME_SECONDS_MAX, Verdict, judge},
    cluster::{Cluster, Options, Program, find_arqon, find_planted},
    disk::DiskKind,
    fault::{Choice, Fault, Nemesis, Plan, Programs, SCRIPTS, Script, parse_point},
    history::{History, Line, Writer},
    host::{Held, Machine, Need},
    memory, report,
    workload::{self, Setup, Workload},
};

/// Partitions of each topic, so that each node leads one.
const PARTITION_COUNT: u32 = 3;
/// Copies of each partition, also where there are more nodes.
const REPLICATION: u32 = 3;
/// Nodes that may be added, where members change.
const SPARE_COUNT: u32 = 1;
/// Time without faults before the first and after the last of them.
const QUIET_TIME: Duration = Duration::from_secs(2);
/// Longest time of a run.
const TIME_MAX: Duration = Duration::from_secs(7 * 24 * 3600);

/// Arguments of `run`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Examples:\n  arqon-jepsen run --faults kill,partition-halves --time 60s\n  \
    arqon-jepsen run --faults mix --workload append,queue --seed 7 --json\n  \
    arqon-jepsen run --faults upgrade,roll --arqon-before FILE --time 90s\n  arqon-jepsen run --script flipped-bits\n\n\
    --faults none is the unfaulted twin of a run, which must pass as well.")]
pub struct RunArgs {
    /// How long faults are begun, as in 30s, 5m or 1h
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = parse_time)]
    time: Duration,
    /// Faults, rows of the scorecard, `mix`, `ci` or `none`, divided by commas
    #[arg(long, value_name = "LIST", default_value = "mix")]
    faults: String,
    /// A fixed sequence of faults, with a workload and a rate of its own
    #[arg(long, value_name = "NAME", value_parser = Script::named, conflicts_with_all = ["faults", "workload", "rate", "time"])]
    script: Option<Script>,
    /// Workloads, divided by commas
    #[arg(long, value_name = "LIST", value_enum, value_delimiter = ',', default_value = "append")]
    workload: Vec<workload::Kind>,
    /// Nodes of the cluster
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = parse_nodes)]
    nodes: u32,
    /// Chooses faults, victims and times [default: random]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Operations per second over all processes of a workload
    #[arg(long, value_name = "N", default_value_t = 500, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    rate: u32,
    /// Disk of the nodes [default: one that can do what the faults want]
    #[arg(long, value_name = "KIND", value_enum)]
    disk: Option<DiskKind>,
    /// Directory of histories, logs, report and data, made when missing [default: a new one for each run]
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// The arqon program [default: the one beside this program, else built]
    #[arg(long, value_name = "FILE")]
    arqon: Option<PathBuf>,
    /// The arqon program of an earlier release, which `upgrade` begins with and goes back to
    #[arg(long, value_name = "FILE")]
    arqon_before: Option<PathBuf>,
    /// The arqon program with crash points, for `fail-point` [default: arqon-planted beside this program]
    #[arg(long, value_name = "FILE")]
    planted: Option<PathBuf>,
    /// Crash points of `fail-point`, divided by commas [default: all]
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = parse_point)]
    points: Vec<String>,
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
    let time = humantime::parse_duration(text).map_err(|error| format!("{error}; as in 250ms, 30s, 5m or 1h"))?;
    match !time.is_zero() && time <= TIME_MAX {
        true => Ok(time),
        false => Err("must be more than 0 and at most a week".to_owned()),
    }
}

/// A time as [`parse_time`] reads it.
pub(crate) fn shown_time(time: Duration) -> String {
    humantime::format_duration(time).to_string().replace(' ', "")
}

pub(crate) fn parse_nodes(text: &str) -> Result<u32, String> {
    match text {
        "3" => Ok(3),
        "5" => Ok(5),
        _ => Err("must be 3 or 5".to_owned()),
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

/// What a run is made of, once it is known what the machine can do.
struct Attempt {
    args: RunArgs,
    seed: u64,
    choice: Choice,
    /// Faults that this machine cannot make.
    not_run: Vec<String>,
    machine: Machine,
    /// What the nodes begin with.
    arqon: PathBuf,
    programs: Option<Programs>,
    data: PathBuf,
}

/// Makes a run and judges it. The data stays for a look at it when the run is not valid or fails.
///
/// # Errors
/// The line that says why there is no verdict: no program, no cluster, no history.
pub async fn run(mut args: RunArgs) -> Result<Run, String> {
    if let Some(script) = args.script {
        (args.faults, args.workload, args.rate) = (script.faults(), script.workloads.to_vec(), script.rate);
    }
    let seed = args.seed.unwrap_or_else(|| u64::from(rand::random::<u32>()));
    let replay = replay(&args, seed);
    let machine = Machine::look(args.arqon_before.is_some(), find_planted(args.planted.as_deref()));
    let (choice, not_run) = possible(&args, &machine)?;
    let dir = run_directory(args.dir.as_deref(), seed)?;
    let history_path = dir.join("history.jsonl");
    report::progress(args.json, &format!("seed {seed}, history {}", history_path.display()));
    report::progress(args.json, &format!("replay: {replay}"));
    let mut data = Data { path: dir.join("data"), keep: args.keep };
    std::fs::create_dir_all(&data.path).map_err(|error| format!("cannot make {}: {error}", data.path.display()))?;
    let own = std::env::current_exe().map_err(|error| format!("cannot tell where this program is: {error}"))?;
    // After the data in this block, so that it is given back before that is deleted.
    let held = match machine.has(Need::Network) {
        Ok(()) => Some(Held::take(&data.path, &own).map_err(|error| error.to_string())?),
        Err(why) => {
            report::progress(args.json, &format!("all nodes on this machine's loopback: {why}"));
            None
        }
    };
    let newest = find_arqon(args.arqon.clone()).await.map_err(|error| error.to_string())?;
    let is_upgrade = choice.faults.contains(&Fault::Upgrade);
    let programs = match args.arqon_before.as_deref().filter(|_| is_upgrade) {
        Some(before) => Some(two_programs(before, &newest).await?),
        None => None,
    };
    let arqon = programs.as_ref().map_or(newest, |programs| programs.before.path.clone());
    let history = Arc::new(Writer::create(&history_path).map_err(|error| error.to_string())?);
    let attempt = Attempt { args, seed, choice, not_run, machine, arqon, programs, data: data.path.clone() };
    let verdict = attempt.make(held.as_ref(), own, &history, &history_path, &dir, &replay).await;
    data.keep |= !verdict.as_ref().is_ok_and(|verdict| verdict.valid);
    drop(held);
    Ok(Run { verdict: verdict?, history: history_path, replay })
}

/// The programs of a rolling upgrade, which must tell each other apart.
async fn two_programs(before: &Path, after: &Path) -> Result<Programs, String> {
    let ask = async |path: &Path| {
        // As the kernel names the file of a process.
        let path = path.canonicalize().map_err(|error| format!("{}: {error}", path.display()))?;
        Program::ask(&path).await.map_err(|error| error.to_string())
    };
    let (before, after) = (ask(before).await?, ask(after).await?);
    if before.version == after.version {
        let (before_path, after_path) = (before.path.display(), after.path.display());
        return Err(format!("--arqon-before {before_path}: {after_path} is of the same version, {}", after.version));
    }
    Ok(Programs { before, after })
}

fn replay(args: &RunArgs, seed: u64) -> String {
    let mut text = format!("cargo run --release -p arqon-jepsen -- run --seed {seed} --nodes {}", args.nodes);
    if let Some(script) = args.script {
        text.push_str(&format!(" --script {}", script.name));
    } else {
        let workloads = args.workload.iter().map(|kind| kind.name()).collect::<Vec<_>>().join(",");
        let (time, faults, rate) = (shown_time(args.time), &args.faults, args.rate);
        text.push_str(&format!(" --time {time} --faults {faults} --workload {workloads} --rate {rate}"));
    }
    if let Some(disk) = args.disk.and_then(|disk| clap::ValueEnum::to_possible_value(&disk)) {
        text.push_str(&format!(" --disk {}", disk.get_name()));
    }
    let files = [("arqon", &args.arqon), ("arqon-before", &args.arqon_before), ("planted", &args.planted)];
    for (name, path) in files.into_iter().filter_map(|(name, path)| Some((name, path.as_ref()?))) {
        text.push_str(&format!(" --{name} {}", path.display()));
    }
    if !args.points.is_empty() {
        text.push_str(&format!(" --points {}", args.points.join(",")));
    }
    text
}

/// The faults of the list that this machine can make, and a line for each that it cannot.
fn possible(args: &RunArgs, machine: &Machine) -> Result<(Choice, Vec<String>), String> {
    let mut choice = Choice::parse(&args.faults).map_err(|why| format!("--faults: {why}"))?;
    let wanted = choice.faults.len();
    let mut missing = Vec::new();
    choice.faults.retain(|fault| match fault.possible(machine) {
        Ok(()) => true,
        Err(why) => {
            missing.push(format!("row {} not run, {fault}: {why}", fault.row()));
            false
        }
    });
    for line in &missing {
        report::progress(args.json, line);
    }
    match missing.first() {
        Some(line) if missing.len() == wanted => Err(line.clone()),
        _ => Ok((choice, missing)),
    }
}

impl Attempt {
    /// The run itself; its nodes are gone when this returns or is dropped.
    async fn make(
        &self,
        held: Option<&Held>,
        own: PathBuf,
        history: &Arc<Writer>,
        history_path: &Path,
        dir: &Path,
        replay: &str,
    ) -> Result<Verdict, String> {
        let has_clock = self.choice.faults.iter().any(|fault| fault.needs().contains(&Need::Clock));
        let changes = self.choice.faults.contains(&Fault::Membership);
        let disk = match self.args.disk {
            Some(disk) => disk,
            None => self.choice.disk(&self.machine, self.seed)?,
        };
        let options = Options {
            arqon: self.arqon.clone(),
            program: own,
            dir: self.data.clone(),
            node_count: self.args.nodes,
            spare_count: if changes { SPARE_COUNT } else { 0 },
            disk,
            claim: held.map(Held::claim),
            faketime: self.machine.faketime().filter(|_| has_clock).map(Path::to_owned),
        };
        let mut cluster = Cluster::start_on(&options).await.map_err(|error| error.to_string())?;
        let made = self.work(&mut cluster, history).await;
        // The logs are part of the report, the data is not.
        for number in cluster.nodes().into_iter().chain(cluster.spares().to_vec()) {
            if let Ok(log) = cluster.log(number) {
                // A spare that was never started has none.
                let _ = std::fs::copy(log, dir.join(format!("node-{number}.log")));
            }
        }
        made?;
        history.finish().map_err(|error| error.to_string())?;
        report::progress(self.args.json, "checking the history");
        let loaded = History::load(history_path).map_err(|error| error.to_string())?;
        let verdict = judge(&loaded);
        report::write(dir, &loaded, &verdict, Some(replay))?;
        if !verdict.valid || self.args.keep {
            cluster.keep_data().await.map_err(|error| error.to_string())?;
        }
        Ok(verdict)
    }

    async fn work(&self, cluster: &mut Cluster, history: &Arc<Writer>) -> Result<(), String> {
        let quiet = self.args.json;
        let setup = Setup {
            server: cluster.server().to_owned(),
            controls: cluster.controls(),
            token: cluster.token().to_owned(),
            token_key: cluster.token_key().to_owned(),
            tenant: cluster.tenant().to_owned(),
            nodes: cluster.nodes(),
            replication: REPLICATION,
            partition_count: PARTITION_COUNT,
            rate: self.args.rate,
            seed: self.seed,
        };
        let kinds = &self.args.workload;
        let keys: Vec<String> = kinds.iter().flat_map(|kind| setup.keys(*kind)).collect();
        let names = kinds.iter().map(|kind| kind.name().to_owned()).collect();
        history.record(Line::start(setup.nodes.clone(), keys.clone(), self.seed, names));
        for why in &self.not_run {
            history.record(Line { detail: Some(why.clone()), ..Line::nemesis("not-run") });
        }
        let mut watch = JoinSet::new();
        watch.spawn(memory::watch(cluster.running(), history.clone()));
        let mut workloads = Vec::new();
        for kind in kinds {
            let started = Workload::start(*kind, setup.clone(), history.clone()).await;
            workloads.push(started.map_err(|error| error.to_string())?);
        }
        sleep(QUIET_TIME).await;
        let what = match self.args.script {
            Some(script) => format!("script {}", script.name),
            None => format!("faults for {}", shown_time(self.args.time)),
        };
        report::progress(quiet, &format!("{} nodes run; {what}", self.args.nodes));
        let plan = Plan {
            seed: self.seed,
            choice: self.choice.clone(),
            time: self.args.time,
            replication: REPLICATION,
            topics: kinds.iter().flat_map(|kind| setup.topics(*kind)).collect(),
            keys,
            may_partition: self.machine.has(Need::Filter).is_ok(),
            programs: self.programs.clone(),
            script: self.args.script,
            planted: self.machine.planted().map(Path::to_owned),
            points: self.args.points.clone(),
            quiet,
        };
        Nemesis::new(cluster, history.clone(), plan).run().await.map_err(|error| error.to_string())?;
        report::progress(quiet, "all nodes run; waiting for writes to go on");
        // A little longer than the checker allows, so that it sees what came too late.
        let limit = Duration::from_secs(RESUME_SECONDS_MAX + 2);
        for workload in &workloads {
            workload.resume(limit).await;
        }
        sleep(QUIET_TIME).await;
        report::progress(quiet, "reading every replica to its end");
        let mut ends = JoinSet::new();
        for workload in workloads {
            ends.spawn(workload.finish());
        }
        while let Some(ended) = ends.join_next().await {
            match ended {
                Ok(finished) => finished.map_err(|error| error.to_string())?,
                Err(error) => return Err(format!("a workload ended early: {error}")),
            }
        }
        Ok(())
    }
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

/// What there is to choose from, and what of it this machine can do.
#[must_use]
pub fn list(previous: bool, planted: Option<&Path>) -> String {
    let machine = Machine::look(previous, find_planted(planted));
    let mut lines = vec!["workloads:".to_owned()];
    lines.extend(workload::Kind::ALL.iter().map(|kind| format!("     {:18} {}", kind.name(), kind.purpose())));
    lines.push("faults (row of the scorecard, name):".to_owned());
    for fault in Fault::ALL {
        let row = if fault.row() == 0 { "  ".to_owned() } else { format!("{:2}", fault.row()) };
        let not = fault.possible(&machine).err().map_or_else(String::new, |why| format!(" [NOT HERE: {why}]"));
        lines.push(format!("  {row} {:18} {}{not}", fault.name(), fault.about()));
    }
    lines.push("  20 mix                all that go together, several at a time, in parts that shift".to_owned());
    lines.push("scripts (fixed sequences of faults, for --script):".to_owned());
    lines.extend(SCRIPTS.iter().map(|script| format!("     {:18} {}", script.name, script.about)));
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_a_unit() {
        assert_eq!(parse_time("30s"), Ok(Duration::from_secs(30)));
        assert_eq!(parse_time("250ms"), Ok(Duration::from_millis(250)));
        assert_eq!(parse_time("1m30s"), Ok(Duration::from_secs(90)));
        for wrong in ["", "30", "s", "-1s", "0s", "1e99h", "8days"] {
            assert!(parse_time(wrong).is_err(), "{wrong}");
        }
        for time in [Duration::from_millis(500), Duration::from_secs(90)] {
            assert_eq!(parse_time(&shown_time(time)), Ok(time));
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
