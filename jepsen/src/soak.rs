//! `arqon-jepsen soak`: one run after the other for hours, each one noted in the ledger.
//!
//! The ledger is what is resumed: each run is chosen for the row of the scorecard that lacks most,
//! and every second one mixes everything. Before the first run of a commit with a workload comes
//! the unfaulted twin, without which nothing counts.

use std::{
    collections::BTreeSet,
    path::PathBuf,
    time::{Duration, Instant},
};

use clap::ValueEnum;

use crate::{
    child::{self, Ask},
    cluster::{Program, find_arqon},
    fault::Choice,
    ledger::{self, Entry},
    scorecard::{Counts, ROWS, is_proven_quiet},
    workload,
};

/// What the clients do, in turn.
const WORKLOADS: [&[&str]; 4] = [&["append", "queue"], &["producers"], &["append", "metadata"], &["queue", "tokens"]];
/// Length of a run without faults.
const TWIN_TIME: Duration = Duration::from_secs(10);
/// Runs without a verdict, one after the other, after which nothing more is tried.
const FAILED_COUNT_MAX: u32 = 5;

/// Arguments of `soak`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Example:\n  arqon-jepsen soak --hours 8 --ledger ledger.jsonl\n\n\
    Run it again to go on: what the ledger holds counts.")]
pub struct SoakArgs {
    /// How long, in hours; the last run is brought to its end
    #[arg(long, value_name = "N", value_parser = parse_hours)]
    hours: f64,
    /// Where each run is noted
    #[arg(long, value_name = "FILE", default_value = ledger::DEFAULT_PATH)]
    ledger: PathBuf,
    /// How long faults are begun in a run, as in 30s or 2m
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = crate::parse_time)]
    time: Duration,
    /// The faults of every run, as for `run` [default: what the scorecard lacks most]
    #[arg(long, value_name = "LIST", value_parser = parse_faults)]
    faults: Option<String>,
    /// The workloads of every run, divided by commas [default: all in turn]
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = parse_workload)]
    workload: Vec<String>,
    /// Nodes of each cluster: 3 or 5
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = crate::run::parse_nodes)]
    nodes: u32,
    /// Seed of the first run; the others count on from it [default: random]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Where the directories of runs with anomalies, or without a verdict, are kept
    #[arg(long, value_name = "DIR", default_value = "jepsen-runs")]
    dir: PathBuf,
    /// Keep the directories of all runs
    #[arg(long)]
    keep: bool,
    /// The arqon program [default: the one beside this program, else built]
    #[arg(long, value_name = "FILE")]
    arqon: Option<PathBuf>,
    /// The arqon program of an earlier release, for `upgrade`
    #[arg(long, value_name = "FILE")]
    arqon_before: Option<PathBuf>,
}

fn parse_hours(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(hours) if hours > 0.0 && hours <= 1_000.0 => Ok(hours),
        _ => Err("must be a number of hours, more than 0 and at most 1000".to_owned()),
    }
}

fn parse_faults(text: &str) -> Result<String, String> {
    Choice::parse(text).map(|_| text.to_owned())
}

fn parse_workload(text: &str) -> Result<String, String> {
    workload::Kind::from_str(text, false).map(|kind| kind.name().to_owned())
}

/// What a soak made of its time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Soaked {
    /// Runs made.
    pub runs: u64,
    /// Those with anomalies.
    pub invalid: u64,
}

/// Makes runs until the hours are over.
///
/// # Errors
/// One line: the ledger cannot be used, or one run after the other ends without a verdict.
pub async fn soak(args: &SoakArgs) -> Result<Soaked, String> {
    let program = std::env::current_exe().map_err(|error| format!("cannot tell where this program is: {error}"))?;
    let arqon = find_arqon(args.arqon.clone()).await.map_err(|error| error.to_string())?;
    let version = Program::ask(&arqon).await.map_err(|error| error.to_string())?.version;
    let soak = Soak::new(args, program, ledger::commit(&version))?;
    let end = Instant::now() + Duration::from_secs_f64(args.hours * 3_600.0);
    soak.run(|_| Instant::now() < end).await
}

struct Soak<'a> {
    args: &'a SoakArgs,
    program: PathBuf,
    commit: String,
    entries: Vec<Entry>,
    /// Faults that gave no verdict: what this machine cannot do.
    impossible: BTreeSet<String>,
    seed: u64,
    count: u64,
}

impl<'a> Soak<'a> {
    fn new(args: &'a SoakArgs, program: PathBuf, commit: String) -> Result<Self, String> {
        let entries = ledger::read(&args.ledger)?;
        let seed = args.seed.unwrap_or_else(|| u64::from(rand::random::<u32>()));
        let count = entries.len() as u64;
        Ok(Self { args, program, commit, entries, impossible: BTreeSet::new(), seed, count })
    }

    /// Makes runs until `goes_on`, which is asked before each of them, says no.
    async fn run(mut self, goes_on: impl Fn(Soaked) -> bool) -> Result<Soaked, String> {
        let mut soaked = Soaked::default();
        let mut failed = 0;
        while goes_on(soaked) {
            let workloads = self.workloads();
            let quiet = is_proven_quiet(&self.entries, &self.commit, self.args.nodes as usize, &workloads);
            let faults = if quiet { self.faults() } else { "none".to_owned() };
            let entry = self.one(&faults, workloads).await?;
            soaked.runs += 1;
            soaked.invalid += u64::from(!entry.anomaly_counts.is_empty());
            let told = entry.not_counted.iter().any(|why| why.starts_with("no verdict"));
            failed = if told { failed + 1 } else { 0 };
            if entry.not_counted.iter().any(|why| why.contains(" not run")) {
                self.impossible.insert(faults);
            }
            if failed >= FAILED_COUNT_MAX {
                return Err(format!(
                    "{failed} runs in a row gave no verdict; the last: {}",
                    entry.not_counted.join("; ")
                ));
            }
            self.entries.push(entry);
            self.count += 1;
        }
        Ok(soaked)
    }

    fn workloads(&self) -> Vec<String> {
        if !self.args.workload.is_empty() {
            return self.args.workload.clone();
        }
        let turn = (self.count / 2) as usize % WORKLOADS.len();
        WORKLOADS[turn].iter().map(|name| (*name).to_owned()).collect()
    }

    /// What the next run is to suffer.
    fn faults(&self) -> String {
        if let Some(faults) = &self.args.faults {
            return faults.clone();
        }
        if self.count.is_multiple_of(2) && !self.impossible.contains("mix") {
            return "mix".to_owned();
        }
        let rows = ROWS.iter().filter_map(|row| match row.counts {
            Counts::Kinds(kinds) => Some((row.share(&row.tally(&self.entries)), kinds.join(","))),
            Counts::Mixed | Counts::Pending(_) => None,
        });
        let possible = rows.filter(|(_, faults)| !self.impossible.contains(faults));
        let least = possible.min_by(|one, other| one.0.total_cmp(&other.0));
        least.map_or("mix".to_owned(), |(_, faults)| faults)
    }

    async fn one(&self, faults: &str, workloads: Vec<String>) -> Result<Entry, String> {
        let seed = self.seed.wrapping_add(self.count);
        let dir = self.args.dir.join(format!("run-{}-{seed}", self.count));
        let before = self.args.arqon_before.as_ref().map(|file| ["--arqon-before".into(), file.into()]);
        let ask = Ask {
            program: self.program.clone(),
            faults: faults.to_owned(),
            workloads,
            nodes: self.args.nodes,
            seed,
            time: if faults == "none" { TWIN_TIME } else { self.args.time },
            dir,
            arqon: self.args.arqon.clone(),
            more: before.into_iter().flatten().collect(),
            environment: Vec::new(),
        };
        let entry = Entry { commit: self.commit.clone(), ..child::run(&ask).await };
        ledger::append(&self.args.ledger, &entry)?;
        eprintln!("{}", line(&entry, seed));
        if entry.valid && !self.args.keep {
            // The ledger has what is needed; what cannot be deleted is left over.
            let _ = std::fs::remove_dir_all(&ask.dir);
        }
        Ok(entry)
    }
}

/// A run in a line.
fn line(entry: &Entry, seed: u64) -> String {
    let proven: u64 = entry.faults.iter().map(|fault| fault.proven).sum();
    let outcome = match (entry.valid, entry.anomaly_counts.is_empty()) {
        (true, _) => "valid".to_owned(),
        (false, false) => format!("ANOMALIES {:?}", entry.anomaly_counts),
        (false, true) => format!("not counted: {}", entry.not_counted.join("; ")),
    };
    format!(
        "seed {seed} {} on {}: {proven} faults proven, {} writes acknowledged, {outcome}",
        entry.faults_asked,
        entry.workloads.join("+"),
        entry.acked
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::child::tests::program;

    /// Answers every run with a verdict that says which faults were asked for, a proven one each.
    const VALID: &str = r#"
while [ "$1" != --faults ]; do shift; done; faults=$2
while [ "$1" != --workload ]; do shift; done; workloads=$(echo "$2" | sed 's/,/","/g')
if [ "$faults" = none ]; then list=; else list="{\"kind\":\"${faults%%,*}\",\"injected\":1,\"proven\":1}"; fi
echo "{\"valid\":true,\"nodes\":3,\"workloads\":[\"$workloads\"],\"acked\":5,\"seconds\":1.0,\"faults\":[$list]}""#;

    fn args(dir: &std::path::Path) -> SoakArgs {
        SoakArgs {
            hours: 1.0,
            ledger: dir.join("ledger.jsonl"),
            time: Duration::from_secs(1),
            faults: None,
            workload: Vec::new(),
            nodes: 3,
            seed: Some(100),
            dir: dir.join("runs"),
            keep: false,
            arqon: None,
            arqon_before: None,
        }
    }

    #[tokio::test]
    async fn runs_begin_with_their_twins_and_are_noted_and_resumed() {
        let dir = tempfile::tempdir().unwrap();
        let args = args(dir.path());
        let program = program(dir.path(), VALID);
        // Counted in runs: how many there are in a time depends on the machine.
        let soak = Soak::new(&args, program.clone(), "c".into()).unwrap();
        let first = soak.run(|soaked| soaked.runs < 3).await.unwrap();
        assert_eq!(first, Soaked { runs: 3, invalid: 0 });
        let noted = ledger::read(&args.ledger).unwrap();
        let are_quiet: Vec<bool> = noted.iter().map(|entry| entry.faults_asked == "none").collect();
        assert_eq!(are_quiet, [true, false, true], "the unfaulted twin of each workload comes first: {noted:?}");
        assert!(!noted[1].faults.is_empty(), "{noted:?}");
        assert_eq!(std::fs::read_dir(dir.path().join("runs")).unwrap().count(), 0, "valid runs leave nothing");
        let soak = Soak::new(&args, program, "c".into()).unwrap();
        assert_eq!(soak.run(|soaked| soaked.runs < 1).await.unwrap().runs, 1);
        let noted = ledger::read(&args.ledger).unwrap();
        assert_eq!(noted.len(), 4);
        assert_ne!(noted[3].faults_asked, "none", "the twin that the ledger holds is not made again");
    }

    #[test]
    fn the_row_that_lacks_most_is_next_and_every_second_run_mixes() {
        let dir = tempfile::tempdir().unwrap();
        let args = args(dir.path());
        let mut soak = Soak::new(&args, "unused".into(), "c".into()).unwrap();
        assert_eq!(soak.faults(), "mix");
        soak.count = 1;
        let first = soak.faults();
        assert_eq!(first, "power-cut-all,power-cut-one");
        soak.impossible.insert(first);
        assert_eq!(soak.faults(), "majority-swap", "what this machine cannot do is passed over");
    }

    #[tokio::test]
    async fn runs_without_a_verdict_end_the_soak_with_the_reason() {
        let dir = tempfile::tempdir().unwrap();
        let args = args(dir.path());
        let program = program(dir.path(), "echo 'error: no arqon' >&2; exit 1");
        let error = Soak::new(&args, program, "c".into()).unwrap().run(|_| true).await.unwrap_err();
        assert!(error.contains("gave no verdict") && error.contains("no arqon"), "{error}");
    }
}
