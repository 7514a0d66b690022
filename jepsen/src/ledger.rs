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
    /// The commit that the harness was built from; with `+` when files differed from it.
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
            entries.push(entry.map_err(|error| format!("ledger {} line {}: {error}", path.display(), index + 1))?);
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

/// The commit of the working copy that this program was built in.
#[must_use]
pub fn commit() -> String {
    let git = |arguments: &[&str]| {
        let output = Command::new("git").arg("-C").arg(env!("CARGO_MANIFEST_DIR")).args(arguments).output().ok()?;
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let Some(head) = git(&["rev-parse", "--short=12", "HEAD"]) else { return "unknown".to_owned() };
    match git(&["status", "--porcelain", "--untracked-files=no"]) {
        Some(changes) if changes.is_empty() => head,
        _ => format!("{head}+"),
    }
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
        std::fs::write(&path, "{}\n{\"seed\":\n").unwrap();
        assert!(read(&path).unwrap_err().contains("ledger.jsonl line 2"));
    }

    #[test]
    fn a_verdict_as_run_prints_it_is_an_entry() {
        let verdict = crate::check::judge(&crate::history::History::default());
        let text = crate::report::json(&verdict, Path::new("h"), None);
        let entry: Entry = serde_json::from_str(&text).unwrap();
        assert!(!entry.valid && entry.not_counted == ["no write was acknowledged"]);
    }
}
