//! `arqon-jepsen controls`: bugs planted on purpose, and who catches them.
//!
//! A checker that never found anything may be blind. So the program is built with known bugs in it
//! (`planted/`), one of which an environment variable chooses, and the runs that should catch it
//! are made with one seed after the other, until one does or the time is over. It counts as caught only when
//! the same program passes with the same seed and no bug.

use std::{
    fmt::Write,
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use tokio::{process::Command, time::timeout};

use crate::child::{self, Ask};

/// The variable that chooses the bug.
const BUG_VARIABLE: &str = "ARQON_PLANTED";
/// How long faults are begun in one run.
const RUN_TIME: Duration = Duration::from_secs(40);

/// Time that a simulated run which has begun may take beyond the time of all of them.
const REST_TIME_MAX: Duration = Duration::from_secs(120);
/// Runs without a verdict, one after the other, after which no other seed is tried.
const FAILED_COUNT_MAX: u32 = 2;

/// Something that may catch a bug.
#[derive(Clone, Copy, Debug)]
enum Attempt {
    /// Black-box runs with these faults, workloads and further arguments.
    Runs { faults: &'static str, workloads: &'static [&'static str], more: &'static [&'static str] },
    /// The simulation with these further arguments; without any, its seeds draw their own faults.
    Simulation(&'static [&'static str]),
}

/// A planted bug.
#[derive(Clone, Copy, Debug)]
struct Control {
    /// As the program knows it.
    bug: &'static str,
    /// What is broken.
    about: &'static str,
    /// Who should catch it, in this order; none: pending.
    attempts: &'static [Attempt],
    /// Why it is pending.
    pending: &'static str,
}

const fn runs(faults: &'static str, workloads: &'static [&'static str]) -> Attempt {
    Attempt::Runs { faults, workloads, more: &[] }
}

const fn bug(bug: &'static str, about: &'static str, attempts: &'static [Attempt]) -> Control {
    Control { bug, about, attempts, pending: "" }
}

const fn pending(bug: &'static str, about: &'static str, why: &'static str) -> Control {
    Control { bug, about, attempts: &[], pending: why }
}

/// Which faults and which workload catch which bug.
const CONTROLS: &[Control] = &[
    bug(
        "ack-before-flush",
        "acknowledged without a flush of the disk",
        &[runs("power-cut-all", &["append"]), Attempt::Simulation(&[])],
    ),
    bug(
        "cut-at-damage",
        "recovery takes damage for the end of the log",
        &[runs("bit-flip,file-damage", &["append"]), Attempt::Simulation(&[])],
    ),
    bug(
        "vote-not-saved",
        "a vote is kept in memory alone",
        &[Attempt::Simulation(&[]), runs("power-cut-all,power-cut-one,partition-halves", &["append"])],
    ),
    bug(
        "read-without-checksum",
        "bytes of a segment are not compared with their checksums",
        &[runs("bit-flip", &["append"]), Attempt::Simulation(&[])],
    ),
    bug(
        "no-directory-sync",
        "directories are never synced",
        &[
            Attempt::Runs { faults: "power-cut-all", workloads: &["append", "metadata"], more: &["--disk", "fuse"] },
            Attempt::Simulation(&[]),
        ],
    ),
    bug(
        "leader-restore",
        "a leader that restarts inside its lease goes on without an election",
        &[runs("kill,power-cut-one,pause-leader", &["append"]), Attempt::Simulation(&[])],
    ),
    bug(
        "sequences-not-in-checkpoint",
        "checkpoints forget the producers' sequences",
        &[runs("roll,kill", &["producers"]), Attempt::Simulation(&[])],
    ),
    bug(
        "stale-leader-read",
        "a linearizable read asks no majority",
        &[runs("partition-halves,partition-one-way,pause-leader", &["append"]), Attempt::Simulation(&[])],
    ),
    bug(
        "unfenced-lease",
        "who held a lease once may settle the job again",
        &[runs("kill,pause-leader", &["queue"]), Attempt::Simulation(&[])],
    ),
    bug(
        "recovered-tail-not-synced",
        "what recovery found is taken as durable",
        // What it takes is a matter of milliseconds, for which a restart of a process is too slow.
        &[Attempt::Simulation(&["--faults", "MajoritySwap", "--nodes", "3"])],
    ),
    bug("expiry-ignored", "access tokens are good for ever", &[runs("none", &["tokens"])]),
    pending("offset-before-output", "a circuit commits its offset before its output", "circuits do not exist yet"),
    pending("policy-fails-open", "a policy that fails lets everything pass", "policies do not exist yet"),
];

/// Arguments of `controls`.
#[derive(Clone, Debug, clap::Args)]
#[command(
    after_help = "Example:\n  arqon-jepsen controls --planted target/release/arqon-planted --bugs ack-before-flush"
)]
pub struct ControlsArgs {
    /// The arqon program with planted bugs; never one that is released
    #[arg(long, value_name = "FILE")]
    planted: PathBuf,
    /// The simulation with planted bugs [default: its part is not run]
    #[arg(long, value_name = "FILE")]
    sim: Option<PathBuf>,
    /// Only these bugs, divided by commas [default: all]
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    bugs: Vec<String>,
    /// Time for each bug, as in 10m
    #[arg(long, value_name = "TIME", default_value = "10m", value_parser = crate::parse_time)]
    time_max: Duration,
    /// Seed of the first run; the others count on from it
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Directory of the runs
    #[arg(long, value_name = "DIR", default_value = "jepsen-controls")]
    dir: PathBuf,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

/// What became of a planted bug.
#[derive(Clone, Debug, Serialize)]
pub struct Caught {
    bug: &'static str,
    about: &'static str,
    /// `caught`, `missed` or `pending`.
    outcome: &'static str,
    /// `runs` with their faults, or `simulation`.
    #[serde(skip_serializing_if = "Option::is_none")]
    by: Option<String>,
    /// Time from the first run on, in seconds.
    seconds: f64,
    /// Runs made.
    runs: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    seed: Option<u64>,
    /// The anomalies that gave it away; or why it is pending, or what stood in the way.
    told: String,
}

/// The table of all bugs, and whether each whose part exists was caught.
///
/// # Errors
/// One line: there is no such program, or no such bug.
pub async fn controls(args: &ControlsArgs) -> Result<(String, bool), String> {
    let programs = [(Some(&args.planted), "planted"), (args.sim.as_ref(), "planted/sim")];
    for (program, package) in programs.into_iter().filter_map(|(program, package)| Some((program?, package))) {
        if !program.is_file() {
            return Err(format!(
                "{}: no such file; build it: CARGO_TARGET_DIR=target cargo build --release --manifest-path {package}/Cargo.toml",
                program.display()
            ));
        }
    }
    if let Some(unknown) = args.bugs.iter().find(|name| CONTROLS.iter().all(|control| control.bug != **name)) {
        let names: Vec<&str> = CONTROLS.iter().map(|control| control.bug).collect();
        return Err(format!("--bugs {unknown}: no such bug; there are {}", names.join(", ")));
    }
    let own = std::env::current_exe().map_err(|error| format!("cannot tell where this program is: {error}"))?;
    let mut results = Vec::new();
    for control in
        CONTROLS.iter().filter(|control| args.bugs.is_empty() || args.bugs.iter().any(|bug| bug == control.bug))
    {
        let caught = catch(control, args, &own).await;
        eprintln!("{}: {} {}", caught.bug, caught.outcome, caught.told);
        results.push(caught);
    }
    let all = results.iter().all(|caught| caught.outcome != "missed");
    let shown = match args.json {
        true => serde_json::to_string(&results).expect("numbers and text only"),
        false => table(&results),
    };
    Ok((shown, all))
}

async fn catch(control: &Control, args: &ControlsArgs, own: &Path) -> Caught {
    let mut result = Caught {
        bug: control.bug,
        about: control.about,
        outcome: "missed",
        by: None,
        seconds: 0.0,
        runs: 0,
        seed: None,
        told: String::new(),
    };
    if control.attempts.is_empty() {
        return Caught { outcome: "pending", told: control.pending.to_owned(), ..result };
    }
    let begin = Instant::now();
    let mut problems = Vec::new();
    let possible: Vec<&Attempt> = control
        .attempts
        .iter()
        .filter(|attempt| args.sim.is_some() || !matches!(attempt, Attempt::Simulation(_)))
        .collect();
    for (index, attempt) in possible.iter().enumerate() {
        // Each one gets its part of what is left.
        let left = args.time_max.saturating_sub(begin.elapsed()) / (possible.len() - index) as u32;
        let found = match attempt {
            Attempt::Runs { faults, workloads, more } => {
                let ask = Ask {
                    program: own.to_owned(),
                    faults: (*faults).to_owned(),
                    workloads: workloads.iter().map(|name| (*name).to_owned()).collect(),
                    nodes: 3,
                    seed: args.seed,
                    time: RUN_TIME,
                    dir: args.dir.join(control.bug),
                    arqon: Some(args.planted.clone()),
                    more: more.iter().map(Into::into).collect(),
                    environment: vec![(BUG_VARIABLE.to_owned(), control.bug.to_owned())],
                };
                by_runs(ask, left, &mut result.runs).await
            }
            Attempt::Simulation(more) => by_simulation(args, control.bug, more, left, &mut result.runs).await,
        };
        result.seconds = begin.elapsed().as_secs_f64();
        match found {
            Ok(Some((by, seed, told))) => {
                return Caught { outcome: "caught", by: Some(by), seed, told, ..result };
            }
            Ok(None) => {}
            Err(problem) => problems.push(problem),
        }
    }
    Caught { told: problems.join("; "), ..result }
}

/// Who caught it, with which seed, and by what.
type Found = Option<(String, Option<u64>, String)>;

/// One run after the other, with one seed after the other.
async fn by_runs(ask: Ask, limit: Duration, count: &mut u64) -> Result<Found, String> {
    let begin = Instant::now();
    let (mut failed, mut doubt) = (0, None);
    let dir = ask.dir.clone();
    for index in 0.. {
        if begin.elapsed() >= limit {
            break;
        }
        let seed = ask.seed + index;
        let one = Ask { seed, dir: dir.join(format!("{}-{seed}", ask.faults.replace(',', "+"))), ..ask.clone() };
        let Ok(entry) = timeout(limit.saturating_sub(begin.elapsed()), child::run(&one)).await else {
            let over = || format!("the time was over in the middle of the run with seed {seed}");
            return Err(doubt.unwrap_or_else(over));
        };
        *count += 1;
        if !entry.anomaly_counts.is_empty() {
            let sound = Ask { dir: one.dir.with_extension("without"), environment: Vec::new(), ..one };
            let twin = child::run(&sound).await;
            if !twin.valid {
                doubt = Some(format!("seed {seed} fails without the bug as well, or does not count"));
                continue;
            }
            let kinds: Vec<String> =
                entry.anomaly_counts.iter().map(|(kind, count)| format!("{kind} ({count})")).collect();
            let by = format!("runs of {} with {}", ask.workloads.join("+"), ask.faults);
            return Ok(Some((by, Some(seed), kinds.join(", "))));
        }
        match entry.not_counted.iter().find(|why| why.starts_with("no verdict")) {
            Some(why) if failed + 1 >= FAILED_COUNT_MAX => return Err(why.clone()),
            Some(_) => failed += 1,
            None => failed = 0,
        }
    }
    doubt.map_or(Ok(None), Err)
}

/// What is read of the report of a simulated run.
#[derive(Debug, Deserialize)]
struct Simulated {
    seed: u64,
    /// Rules that do not hold, and how.
    broken: Vec<(String, String)>,
}

/// The rule that a simulated run breaks when it gives no report: that may have other reasons than a bug.
const NO_REPORT: &str = "run-ends";

async fn by_simulation(
    args: &ControlsArgs,
    bug: &str,
    more: &[&str],
    limit: Duration,
    count: &mut u64,
) -> Result<Found, String> {
    let Some(program) = &args.sim else { return Ok(None) };
    let begin = Instant::now();
    let (mut from, mut doubt) = (args.seed, None);
    while begin.elapsed() < limit {
        let left = limit.saturating_sub(begin.elapsed()).as_secs().max(1);
        let seeds = ["--stop-at-first".to_owned(), format!("--time={left}s"), format!("--from={from}")];
        let reports = simulate(program, more, &seeds, Some(bug), left).await?;
        *count += reports.len() as u64;
        let Some(found) = reports.iter().filter(|report| !report.broken.is_empty()).min_by_key(|report| report.seed)
        else {
            break;
        };
        let seed = found.seed;
        from = seed + 1;
        let Some((rule, what)) = found.broken.iter().find(|(rule, _)| rule != NO_REPORT) else {
            doubt = Some(format!("seed {seed} gives no report: {}", found.broken[0].1));
            continue;
        };
        let twin = simulate(program, more, &[format!("--from={seed}"), "--seeds=1".to_owned()], None, left).await?;
        if twin.iter().any(|report| report.broken.is_empty()) {
            return Ok(Some(("simulation".to_owned(), Some(seed), format!("{rule}: {what}"))));
        }
        doubt = Some(format!("seed {seed} fails without the bug as well"));
    }
    doubt.map_or(Ok(None), Err)
}

/// The reports of the simulation, which is given `seconds` and a while.
async fn simulate(
    program: &Path,
    more: &[&str],
    seeds: &[String],
    bug: Option<&str>,
    seconds: u64,
) -> Result<Vec<Simulated>, String> {
    let mut command = Command::new(program);
    command.args(["run", "--json"]).args(more).args(seeds).envs(bug.map(|bug| (BUG_VARIABLE, bug)));
    command.stdin(Stdio::null()).kill_on_drop(true);
    let patience = Duration::from_secs(seconds) + REST_TIME_MAX;
    let output = match timeout(patience, command.output()).await {
        Ok(Ok(output)) => output,
        Ok(Err(error)) => return Err(format!("cannot run {}: {error}", program.display())),
        Err(_) => return Err(format!("the simulation did not end within {} s", patience.as_secs())),
    };
    let text = String::from_utf8_lossy(&output.stdout);
    let reports: Result<Vec<Simulated>, _> = text.lines().map(serde_json::from_str).collect();
    match reports {
        Ok(reports) if !reports.is_empty() => Ok(reports),
        _ => Err(format!("the simulation failed: {}", String::from_utf8_lossy(&output.stderr).trim())),
    }
}

/// The results for people.
fn table(results: &[Caught]) -> String {
    let mut out =
        String::from("| planted bug | what is broken | outcome | by | after | told |\n|---|---|---|---|---|---|\n");
    for caught in results {
        let after = match caught.outcome {
            "pending" => String::new(),
            _ => format!("{:.0} s, {} runs", caught.seconds, caught.runs),
        };
        let seed = caught.seed.map_or(String::new(), |seed| format!(", seed {seed}"));
        // Writing to a String does not fail.
        let _ = writeln!(
            out,
            "| {} | {} | {} | {}{seed} | {after} | {} |",
            caught.bug,
            caught.about,
            caught.outcome,
            caught.by.as_deref().unwrap_or_default(),
            caught.told.replace('|', "/").replace('\n', " ")
        );
    }
    out.truncate(out.trim_end().len());
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::child::tests::program;

    fn args(dir: &Path) -> ControlsArgs {
        ControlsArgs {
            planted: dir.join("program"),
            sim: None,
            bugs: Vec::new(),
            time_max: Duration::from_secs(20),
            seed: 1,
            dir: dir.join("runs"),
            json: false,
        }
    }

    fn control(bug: &str) -> &'static Control {
        CONTROLS.iter().find(|control| control.bug == bug).unwrap()
    }

    #[tokio::test]
    async fn seeds_are_tried_until_one_shows_an_anomaly() {
        let dir = tempfile::tempdir().unwrap();
        let script = r#"
while [ "$1" != --seed ]; do shift; done
if [ "$ARQON_PLANTED" = ack-before-flush ]; then
  if [ "$2" = 3 ]; then bad='"lost-write":4'; fi
elif [ "$2" != 3 ]; then
  exit 1
fi
echo "{\"valid\":true,\"seed\":$2,\"anomaly_counts\":{$bad}}""#;
        let own = program(dir.path(), script);
        let caught = catch(control("ack-before-flush"), &args(dir.path()), &own).await;
        assert_eq!((caught.outcome, caught.runs, caught.seed), ("caught", 3, Some(3)));
        assert_eq!(caught.told, "lost-write (4)");
        let row = table(&[caught]);
        assert!(row.contains("| runs of append with power-cut-all, seed 3 |"), "{row}");
    }

    #[tokio::test]
    async fn what_nobody_sees_in_time_is_missed_and_what_cannot_be_run_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let blind = program(dir.path(), r#"echo '{"valid":true}'"#);
        let short = ControlsArgs { time_max: Duration::from_millis(300), ..args(dir.path()) };
        assert_eq!(catch(control("unfenced-lease"), &short, &blind).await.outcome, "missed");
        let other = tempfile::tempdir().unwrap();
        let broken = program(other.path(), "echo 'error: row 1 not run' >&2; exit 1");
        let caught = catch(control("ack-before-flush"), &args(other.path()), &broken).await;
        assert_eq!((caught.outcome, caught.runs), ("missed", 2));
        assert!(caught.told.contains("row 1 not run"), "{}", caught.told);
        let pending = catch(control("policy-fails-open"), &args(other.path()), &broken).await;
        assert_eq!((pending.outcome, pending.runs), ("pending", 0));
    }

    #[tokio::test]
    async fn what_fails_without_the_bug_as_well_is_not_caught() {
        let dir = tempfile::tempdir().unwrap();
        let own = program(dir.path(), r#"echo '{"valid":false,"anomaly_counts":{"lost-write":4}}'"#);
        let short = ControlsArgs { time_max: Duration::from_millis(300), ..args(dir.path()) };
        let caught = catch(control("unfenced-lease"), &short, &own).await;
        assert_eq!(caught.outcome, "missed");
        assert!(caught.told.contains("without the bug as well"), "{}", caught.told);
    }

    #[tokio::test]
    async fn the_simulation_may_catch_it_as_well() {
        let dir = tempfile::tempdir().unwrap();
        // Seed 9 fails in any case, 10 gives no report, 11 breaks a rule by the bug.
        let sim = program(
            dir.path(),
            r#"
case "$*" in
*--seeds=1*) case "$*" in *--from=9*) broken='["order","x"]' ;; esac; seed=0 ;;
*--from=10*) seed=10 broken='["run-ends","x"]' ;;
*--from=11*) seed=11 broken='["replicas-agree","they do not"]' ;;
*) seed=9 broken='["order","x"]' ;;
esac
echo "{\"seed\":$seed,\"broken\":[$broken]}"
[ -z "$broken" ]"#,
        );
        let args = ControlsArgs { sim: Some(sim.clone()), ..args(dir.path()) };
        let caught = catch(control("vote-not-saved"), &args, &sim).await;
        assert_eq!((caught.outcome, caught.by.as_deref()), ("caught", Some("simulation")));
        assert_eq!((caught.seed, caught.runs, caught.told.as_str()), (Some(11), 3, "replicas-agree: they do not"));
    }

    #[tokio::test]
    async fn a_name_that_is_no_bug_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        program(dir.path(), "exit 0");
        let args = ControlsArgs { bugs: vec!["typo".into()], ..args(dir.path()) };
        assert!(controls(&args).await.unwrap_err().contains("--bugs typo: no such bug; there are ack-before-flush"));
    }
}
