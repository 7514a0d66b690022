//! The ledger: one JSON line per run, appended and never changed.

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Write},
    path::Path,
    process::Command,
};

use serde::{Deserialize, Serialize};

use crate::check::{FailoverMs, FaultCount, MemoryMib};

/// Where the ledger is unless told otherwise.
pub const DEFAULT_PATH: &str = "jepsen-ledger.jsonl";

/// What is kept of a run. The part after `faults_asked` is its verdict's JSON.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Entry {
    /// When it ended, in seconds since 1970.
    pub unix_seconds: u64,
    /// The commit that the nodes' program was built from; with `+` when sources differed from it.
    pub commit: String,
    /// The list of faults that was asked for.
    pub faults_asked: String,
    pub seed: Option<u64>,
    pub nodes: usize,
    pub workloads: Vec<String>,
    pub seconds: f64,
    pub ops: u64,
    pub acked: u64,
    pub unknown: u64,
    pub failed: u64,
    pub acked_during_faults: u64,
    pub acked_after_heal: u64,
    pub valid: bool,
    pub not_counted: Vec<String>,
    pub not_run: Vec<String>,
    pub faults: Vec<FaultCount>,
    pub anomaly_counts: BTreeMap<String, u64>,
    pub failover_ms: Option<FailoverMs>,
    pub memory_mib: Option<MemoryMib>,
}

/// All entries of the ledger at `path`; none when it does not exist.
///
/// # Errors
/// One line that names the file, and the line in it that is none.
pub fn read(path: &Path) -> Result<Vec<Entry>, String> {
    let told = |error: std::io::Error| format!("ledger {}: {error}", path.display());
    let file = match std::fs::File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(told(error)),
    };
    let mut entries = Vec::new();
    for (index, line) in BufReader::new(file).lines().enumerate() {
        let line = line.map_err(told)?;
        if !line.trim().is_empty() {
            let entry = serde_json::from_str(&line);
            let wrong = |why: &dyn std::fmt::Display| format!("ledger {} line {}: {why}", path.display(), index + 1);
            let entry: Entry = entry.map_err(|error| wrong(&error))?;
            if entry.commit.is_empty() {
                return Err(wrong(&"commit is missing"));
            }
            entries.push(entry);
        }
    }
    Ok(entries)
}

/// Adds an entry and brings it to the disk.
///
/// # Errors
/// One line that names the file.
pub fn append(path: &Path, entry: &Entry) -> Result<(), String> {
    let told = |error: std::io::Error| format!("ledger {}: {error}", path.display());
    let mut line = serde_json::to_vec(entry).expect("numbers and text only");
    line.push(b'\n');
    let mut file = std::fs::OpenOptions::new().create(true).append(true).open(path).map_err(told)?;
    // In one write, so that two runs that append at once do not mix their lines.
    file.write_all(&line).and_then(|()| file.sync_all()).map_err(told)
}

/// The commit that a program was built from, by what it tells as its version (`0.1.0-5f0c1c2ad3b4`); with `+` when that
/// is checked out here and sources differ from it.
#[must_use]
pub fn commit(version: &str) -> String {
    let commit = version.rsplit_once('-').map_or("unknown", |(_, commit)| commit);
    let git = |arguments: &[&str]| {
        let output = Command::new("git").arg("-C").arg(env!("CARGO_MANIFEST_DIR")).args(arguments).output().ok()?;
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let is_here = git(&["rev-parse", "--short=12", "HEAD"]).is_some_and(|head| head == commit);
    let sources =
        ["status", "--porcelain", "--untracked-files=no", "--", ":/*.rs", ":/*.toml", ":/*.lock", ":/*.proto"];
    let differs = is_here && git(&sources).is_none_or(|changes| !changes.is_empty());
    format!("{commit}{}", if differs { "+" } else { "" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_added_and_read_and_a_bad_line_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ledger.jsonl");
        assert!(read(&path).unwrap().is_empty(), "no ledger is an empty one");
        for seed in 1..=2 {
            append(&path, &Entry { seed: Some(seed), commit: "c".into(), ..Entry::default() }).unwrap();
        }
        let seeds: Vec<_> = read(&path).unwrap().iter().map(|entry| entry.seed).collect();
        assert_eq!(seeds, [Some(1), Some(2)]);
        std::fs::write(&path, "{\"commit\":\"c\"}\n{\"seed\":\n").unwrap();
        assert!(read(&path).unwrap_err().contains("ledger.jsonl line 2"));
        std::fs::write(&path, "{\"process\":3,\"type\":\"invoke\"}\n").unwrap();
        assert!(read(&path).unwrap_err().contains("line 1: commit is missing"));
    }

    #[test]
    fn a_verdict_as_run_prints_it_is_an_entry() {
        let verdict = crate::check::judge(&crate::history::History::default());
        let text = crate::report::json(&verdict, Path::new("h"), None);
        let entry: Entry = serde_json::from_str(&text).unwrap();
        assert!(!entry.valid && entry.not_counted == ["no write was acknowledged"]);
    }
}
