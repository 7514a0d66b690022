//! The scorecard: which promise is tested against which fault, how often it is to be, and how
//! often it was. Generated from the ledger, never typed.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write,
    path::PathBuf,
};

use crate::ledger::{self, Entry};

/// What a target counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Measure {
    /// Faults that are proven to have struck.
    Faults,
    /// Writes acknowledged in runs with such a fault.
    Acked,
    /// Hours of such runs.
    Hours,
}

impl Measure {
    fn unit(self) -> &'static str {
        match self {
            Self::Faults => "faults",
            Self::Acked => "acknowledged writes",
            Self::Hours => "hours",
        }
    }
}

/// Which runs count for a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counts {
    /// Those with faults of these names, as the history has them.
    Kinds(&'static [&'static str]),
    /// Those that mix at least [`MIXED_COUNT_MIN`] kinds.
    Mixed,
    /// None yet: the part that it needs, or that tests it, is named.
    Pending(&'static str),
}

/// Kinds of proven faults that make a mixed run.
const MIXED_COUNT_MIN: usize = 3;

/// One row of the scorecard.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// Its number.
    pub number: u32,
    /// What goes wrong.
    pub fault: &'static str,
    /// What must hold all the same.
    pub promise: &'static str,
    /// What counts for it.
    pub counts: Counts,
    /// How much a release needs, all runs together.
    pub target: &'static [(Measure, u64)],
}

const NOTHING_LOST: &str = "nothing acknowledged is lost, doubled or out of order";

/// All rows. The names of faults are those of `list`.
pub const ROWS: &[Row] = &[
    row(
        1,
        "power cut, unsynced writes lost, sectors torn",
        NOTHING_LOST,
        &["power-cut-all", "power-cut-one"],
        &[(Measure::Faults, 500), (Measure::Acked, 5_000_000)],
    ),
    row(
        2,
        "minority paused or cut off, one power cut, majority swapped",
        NOTHING_LOST,
        &["majority-swap"],
        &[(Measure::Faults, 300)],
    ),
    row(
        3,
        "one bit flipped on a minority",
        "damage is found, told and repaired",
        &["bit-flip"],
        &[(Measure::Faults, 2_000)],
    ),
    row(
        4,
        "file truncated, deleted, zeroed, an old chunk restored",
        "damage is found, told and repaired",
        &["file-damage"],
        &[(Measure::Faults, 500)],
    ),
    row(
        5,
        "the same record bad on all replicas",
        "a clear error, never wrong data",
        &["bad-record-all"],
        &[(Measure::Faults, 100)],
    ),
    row(
        6,
        "disk full, EIO on write, EIO on fsync",
        "no acknowledgement after the failure",
        &["disk-full", "eio-write", "eio-fsync"],
        &[(Measure::Faults, 300)],
    ),
    row(7, "slow disk, 50 ms to 5 s", NOTHING_LOST, &["slow-disk"], &[(Measure::Faults, 200)]),
    row(
        8,
        "partitions: halves, one-way, bridge, ring",
        NOTHING_LOST,
        &["partition-halves", "partition-one-way", "partition-bridge", "partition-ring"],
        &[(Measure::Faults, 1_000)],
    ),
    row(9, "packet loss 1 to 20 %, delay", NOTHING_LOST, &["loss", "delay"], &[(Measure::Faults, 300)]),
    row(
        10,
        "leader paused 1 to 60 s",
        "no stale leader is believed",
        &["pause-leader", "pause"],
        &[(Measure::Faults, 500)],
    ),
    row(
        11,
        "kill inside roll, retention, snapshot, truncation, repair, checkpoint, vote, recovery",
        NOTHING_LOST,
        &["fail-point"],
        &[(Measure::Faults, 1_000)],
    ),
    row(12, "membership change under load, partition, kill", NOTHING_LOST, &["membership"], &[(Measure::Faults, 300)]),
    row(13, "rolling restart, upgrade", "no error after a retry", &["roll", "upgrade"], &[(Measure::Faults, 100)]),
    row(
        14,
        "clock jumps of an hour, strobing",
        "nothing expires early",
        &["clock-jump", "clock-strobe"],
        &[(Measure::Faults, 300)],
    ),
    pending(
        15,
        "consumer groups rebalanced, queue workers killed",
        "one job, one result",
        "consumer groups do not exist yet; workers are killed in every run of the workload queue",
    ),
    pending(16, "circuits: kill between output and cursor", "each edge once", "circuits do not exist yet"),
    pending(17, "edge: slow, tiny, oversized and bad frames, floods", "others are unharmed", "tests of the Shield"),
    pending(
        18,
        "tokens: expired, forged, revoked, of other tenants",
        "none is accepted",
        "the workload tokens tries every kind; counted by the tests of spine/ and shield/",
    ),
    pending(19, "policy loops, traps, grows, is missing", "fails closed", "policies do not exist yet"),
    Row {
        number: 20,
        fault: "everything mixed",
        promise: NOTHING_LOST,
        counts: Counts::Mixed,
        target: &[(Measure::Hours, 24), (Measure::Faults, 10_000), (Measure::Acked, 50_000_000)],
    },
];

const fn row(
    number: u32,
    fault: &'static str,
    promise: &'static str,
    kinds: &'static [&'static str],
    target: &'static [(Measure, u64)],
) -> Row {
    Row { number, fault, promise, counts: Counts::Kinds(kinds), target }
}

const fn pending(number: u32, fault: &'static str, promise: &'static str, why: &'static str) -> Row {
    Row { number, fault, promise, counts: Counts::Pending(why), target: &[] }
}

/// What was run for one row.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tally {
    /// Runs that count, and those that showed an anomaly.
    pub runs: u64,
    /// Faults proven in them.
    pub faults: u64,
    /// Writes acknowledged in them.
    pub acked: u64,
    /// Hours of them.
    pub hours: f64,
    /// Anomalies by kind.
    pub anomalies: BTreeMap<String, u64>,
    /// Seeds of the runs with anomalies.
    pub seeds: Vec<u64>,
}

impl Tally {
    fn of(&self, measure: Measure) -> f64 {
        match measure {
            Measure::Faults => self.faults as f64,
            Measure::Acked => self.acked as f64,
            Measure::Hours => self.hours,
        }
    }
}

impl Row {
    /// The faults of `entry` that count for this row; `None` when the run has nothing to do with it.
    fn faults_in(&self, entry: &Entry) -> Option<u64> {
        let proven = |counted: &dyn Fn(&str) -> bool| {
            entry.faults.iter().filter(|fault| counted(&fault.kind)).map(|fault| fault.proven).sum::<u64>()
        };
        let faults = match self.counts {
            Counts::Kinds(kinds) => proven(&|kind| kinds.contains(&kind)),
            Counts::Mixed if entry.faults.iter().filter(|fault| fault.proven > 0).count() >= MIXED_COUNT_MIN => {
                proven(&|_| true)
            }
            Counts::Mixed | Counts::Pending(_) => 0,
        };
        (faults > 0).then_some(faults)
    }

    /// What `entries` make of this row.
    #[must_use]
    pub fn tally(&self, entries: &[Entry]) -> Tally {
        let twins = twins(entries);
        let mut tally = Tally::default();
        for entry in entries {
            let Some(faults) = self.faults_in(entry) else { continue };
            // An anomaly is one, whether the run counts or not.
            let counts = entry.not_counted.is_empty() && has_twin(entry, &twins);
            if !counts && entry.anomaly_counts.is_empty() {
                continue;
            }
            tally.runs += 1;
            if !entry.anomaly_counts.is_empty() {
                tally.seeds.extend(entry.seed);
            }
            for (kind, count) in &entry.anomaly_counts {
                *tally.anomalies.entry(kind.clone()).or_default() += count;
            }
            if counts {
                tally.faults += faults;
                tally.acked += entry.acked;
                tally.hours += entry.seconds / 3_600.0;
            }
        }
        tally
    }

    /// How much of the target is reached, from 0 on; the least of its parts.
    #[must_use]
    pub fn share(&self, tally: &Tally) -> f64 {
        let shares = self.target.iter().map(|(measure, wanted)| tally.of(*measure) / *wanted as f64);
        shares.fold(f64::INFINITY, f64::min)
    }
}

/// Commit, number of nodes and workload of each valid run without faults.
type Twins<'a> = BTreeSet<(&'a str, usize, &'a str)>;

fn twins(entries: &[Entry]) -> Twins<'_> {
    let unfaulted = entries.iter().filter(|entry| entry.valid && entry.faults.is_empty());
    unfaulted
        .flat_map(|entry| entry.workloads.iter().map(|kind| (entry.commit.as_str(), entry.nodes, kind.as_str())))
        .collect()
}

fn has_twin(entry: &Entry, twins: &Twins<'_>) -> bool {
    entry.workloads.iter().all(|kind| twins.contains(&(entry.commit.as_str(), entry.nodes, kind.as_str())))
}

/// Whether a valid run without faults of these workloads stands in the ledger.
#[must_use]
pub fn is_proven_quiet(entries: &[Entry], commit: &str, nodes: usize, workloads: &[String]) -> bool {
    let twins = twins(entries);
    workloads.iter().all(|kind| twins.contains(&(commit, nodes, kind.as_str())))
}

/// The scorecard as a table in Markdown.
#[must_use]
pub fn markdown(entries: &[Entry]) -> String {
    let mut out = String::from(
        "| # | fault | promise | runs | faults proven | acknowledged writes | hours | target | reached | outcome |\n\
         |---|---|---|---|---|---|---|---|---|---|\n",
    );
    for row in ROWS {
        let tally = row.tally(entries);
        let target: Vec<String> =
            row.target.iter().map(|(measure, wanted)| format!("{} {}", grouped(*wanted), measure.unit())).collect();
        let reached = if row.target.is_empty() { String::new() } else { format!("{:.1} %", row.share(&tally) * 100.0) };
        // Writing to a String does not fail.
        let _ = writeln!(
            out,
            "| {} | {} | {} | {} | {} | {} | {:.2} | {} | {reached} | {} |",
            row.number,
            row.fault,
            row.promise,
            grouped(tally.runs),
            grouped(tally.faults),
            grouped(tally.acked),
            tally.hours,
            target.join(", "),
            outcome(row, &tally)
        );
    }
    let _ = writeln!(out, "\n{}", summary(entries));
    out
}

fn outcome(row: &Row, tally: &Tally) -> String {
    match row.counts {
        Counts::Pending(why) => return format!("pending: {why}"),
        _ if tally.runs == 0 => return "not run".to_owned(),
        _ if tally.anomalies.is_empty() => return "no anomaly".to_owned(),
        Counts::Kinds(_) | Counts::Mixed => {}
    }
    let kinds: Vec<String> = tally.anomalies.iter().map(|(kind, count)| format!("{kind} ({count})")).collect();
    let seeds: Vec<String> = tally.seeds.iter().map(u64::to_string).collect();
    format!("**{}**, seeds {}", kinds.join(", "), seeds.join(", "))
}

fn summary(entries: &[Entry]) -> String {
    let twins = twins(entries);
    let counts = |entry: &&Entry| entry.not_counted.is_empty() && has_twin(entry, &twins);
    let counted = entries.iter().filter(counts).count();
    let commits: BTreeSet<&str> = entries.iter().map(|entry| entry.commit.as_str()).collect();
    let proven: u64 = entries.iter().flat_map(|entry| &entry.faults).map(|fault| fault.proven).sum();
    format!(
        "{} runs at {} commits, {} of which count; {} faults proven, {} writes acknowledged, {:.2} hours.",
        grouped(entries.len() as u64),
        commits.len(),
        grouped(counted as u64),
        grouped(proven),
        grouped(entries.iter().map(|entry| entry.acked).sum()),
        entries.iter().map(|entry| entry.seconds).sum::<f64>() / 3_600.0
    )
}

/// A number with its thousands apart.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// Arguments of `scorecard`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Example:\n  arqon-jepsen scorecard --ledger ledger.jsonl --commit 3fb1")]
pub struct ScorecardArgs {
    /// The ledger that `soak` writes
    #[arg(long, value_name = "FILE", default_value = ledger::DEFAULT_PATH)]
    ledger: PathBuf,
    /// Only runs of the commits that begin so; may be given several times [default: all]
    #[arg(long, value_name = "COMMIT")]
    commit: Vec<String>,
}

/// The scorecard of a ledger.
///
/// # Errors
/// One line: the ledger cannot be read.
pub fn scorecard(args: &ScorecardArgs) -> Result<String, String> {
    if !args.ledger.is_file() {
        return Err(format!("--ledger {}: no such file", args.ledger.display()));
    }
    let mut entries = ledger::read(&args.ledger)?;
    if let Some(unknown) =
        args.commit.iter().find(|begin| !entries.iter().any(|entry| entry.commit.starts_with(begin.as_str())))
    {
        return Err(format!("--commit {unknown}: no run in {} is of such a commit", args.ledger.display()));
    }
    entries.retain(|entry| args.commit.is_empty() || args.commit.iter().any(|begin| entry.commit.starts_with(begin)));
    Ok(markdown(&entries))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{check::FaultCount, fault::Fault};

    fn entry(faults: &[(&str, u64)]) -> Entry {
        let fault = |(kind, proven): &(&str, u64)| FaultCount {
            kind: (*kind).to_owned(),
            injected: proven + 1,
            proven: *proven,
        };
        Entry {
            commit: "c1".into(),
            seed: Some(7),
            nodes: 3,
            workloads: vec!["append".into()],
            valid: true,
            acked: 1_500,
            seconds: 1_800.0,
            faults: faults.iter().map(fault).collect(),
            ..Entry::default()
        }
    }

    fn tally(number: u32, entries: &[Entry]) -> Tally {
        ROWS.iter().find(|row| row.number == number).unwrap().tally(entries)
    }

    #[test]
    fn only_proven_faults_of_runs_with_a_twin_count() {
        let run = entry(&[("loss", 4), ("delay", 2), ("kill", 9)]);
        assert_eq!(tally(9, std::slice::from_ref(&run)), Tally::default(), "no unfaulted twin");
        let entries = [entry(&[]), run.clone()];
        let loss = tally(9, &entries);
        assert_eq!((loss.runs, loss.faults, loss.acked), (1, 6, 1_500));
        assert!((loss.hours - 0.5).abs() < 1e-9);
        assert_eq!(tally(20, &entries).faults, 15, "three kinds are a mix");
        assert_eq!(tally(8, &entries), Tally::default());
        let other = Entry { commit: "c2".into(), ..run.clone() };
        assert_eq!(tally(9, &[entry(&[]), other]), Tally::default(), "the twin of another commit");
        let silent = Entry { not_counted: vec!["no write was acknowledged during the faults".into()], ..run };
        assert_eq!(tally(9, &[entry(&[]), silent]), Tally::default());
    }

    /// A fault that no row counts would be made for nothing, and a row that names none could never be reached.
    #[test]
    fn every_fault_counts_for_its_row_and_for_no_other() {
        for row in ROWS {
            let of_row: Vec<&str> =
                Fault::ALL.iter().filter(|fault| fault.row() == row.number).map(|fault| fault.name()).collect();
            match row.counts {
                Counts::Kinds(kinds) => assert_eq!(kinds, of_row, "row {}", row.number),
                Counts::Mixed | Counts::Pending(_) => assert_eq!(of_row, [""; 0], "row {}", row.number),
            }
        }
        let has_row = |fault: &&Fault| ROWS.iter().any(|row| row.number == fault.row());
        let without: Vec<&Fault> = Fault::ALL.iter().filter(|fault| !has_row(fault)).collect();
        assert_eq!(without, [&Fault::Kill], "it is part of row 20 alone");
    }

    #[test]
    fn an_anomaly_shows_even_of_a_run_that_does_not_count() {
        let anomaly_counts = [("lost-write".to_owned(), 3)].into();
        let run = Entry { valid: false, anomaly_counts, ..entry(&[("loss", 4)]) };
        let found = tally(9, std::slice::from_ref(&run));
        assert_eq!((found.faults, found.runs, found.seeds.as_slice()), (0, 1, &[7][..]));
        assert!(markdown(&[run]).contains("**lost-write (3)**, seeds 7"));
    }

    #[test]
    fn the_table_has_every_row_once_and_says_what_was_not_run() {
        let table = markdown(&[entry(&[]), entry(&[("power-cut-all", 50)])]);
        for number in 1..=20 {
            assert_eq!(table.matches(&format!("\n| {number} |")).count(), 1, "row {number}");
        }
        // 50 of 500 cuts, but 1,500 of 5,000,000 acknowledged writes.
        assert!(
            table
                .contains("| 1 | 50 | 1,500 | 0.50 | 500 faults, 5,000,000 acknowledged writes | 0.0 % | no anomaly |")
        );
        assert!(table.contains("| 0.0 % | not run |") && table.contains("pending: circuits do not exist yet"));
        assert!(table.contains("2 runs at 1 commits, 2 of which count"));
    }
}
