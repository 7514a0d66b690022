//! What the terminal and `--json` show, and the page of a run.

mod page;
mod plot;
mod timeline;

use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::{check::Verdict, history::History};

/// Anomalies shown on a terminal; all are in the JSON document.
const SHOWN_COUNT_MAX: usize = 20;

/// A line about what goes on, unless the output is for a program.
pub fn progress(quiet: bool, text: &str) {
    if !quiet {
        eprintln!("{text}");
    }
}

#[derive(Serialize)]
struct Document<'a> {
    #[serde(flatten)]
    verdict: &'a Verdict,
    history: &'a Path,
    #[serde(skip_serializing_if = "Option::is_none")]
    replay: Option<&'a str>,
}

/// The verdict as one JSON document.
#[must_use]
pub fn json(verdict: &Verdict, history: &Path, replay: Option<&str>) -> String {
    let document = Document { verdict, history, replay };
    serde_json::to_string(&document).expect("numbers and text only")
}

/// The verdict for people.
#[must_use]
pub fn text(verdict: &Verdict, history: &Path, replay: Option<&str>) -> String {
    let mut lines = vec![
        format!(
            "{} writes acknowledged, {} unknown, {} refused; {} values in {} reads",
            verdict.acked, verdict.unknown, verdict.failed, verdict.values_read, verdict.reads
        ),
        format!(
            "{} acknowledged during the faults, {} after they were healed",
            verdict.acked_during_faults, verdict.acked_after_heal
        ),
    ];
    lines.extend(
        verdict
            .faults
            .iter()
            .map(|fault| format!("{}: {} injected, {} proven", fault.kind, fault.injected, fault.proven)),
    );
    if let Some(failover) = &verdict.failover_ms {
        lines.push(format!(
            "fail-over of a partition: p50 {:.0} ms, longest {:.0} ms ({} measured)",
            failover.p50, failover.max, failover.count
        ));
    }
    if let Some(memory) = &verdict.memory_mib {
        lines.push(format!(
            "memory of a node: {:.0} MiB at first, {:.0} MiB in the end, at most {:.0} MiB",
            memory.begin, memory.end, memory.max
        ));
    }
    lines.extend(verdict.anomaly_counts.iter().map(|(kind, count)| format!("ANOMALY {kind}: {count}")));
    lines.extend(
        verdict.anomalies.iter().take(SHOWN_COUNT_MAX).map(|anomaly| format!("  {}: {}", anomaly.kind, anomaly.detail)),
    );
    lines.extend(verdict.not_run.iter().map(|why| format!("NOT RUN: {why}")));
    lines.extend(verdict.not_counted.iter().map(|why| format!("NOT COUNTED: {why}")));
    lines.push(format!("history: {}", history.display()));
    lines.extend(replay.map(|replay| format!("replay:  {replay}")));
    lines.push(if verdict.valid { "valid".to_owned() } else { "NOT VALID".to_owned() });
    lines.join("\n")
}

/// Writes what a run directory holds besides its history and the nodes' logs: `verdict.json`,
/// `latency.svg`, `rate.svg`, `memory.svg`, `timeline.txt`, and `index.html`, which puts them together. Gives the
/// path of that page.
///
/// # Errors
/// One line that names the file that cannot be written.
pub fn write(dir: &Path, history: &History, verdict: &Verdict, replay: Option<&str>) -> Result<PathBuf, String> {
    let put = |name: &str, text: &str| {
        let path = dir.join(name);
        std::fs::write(&path, text).map_err(|error| format!("cannot write {}: {error}", path.display()))?;
        Ok::<_, String>(path)
    };
    let (latency, rate, memory) = (plot::latency(history), plot::rate(history), plot::memory(history));
    let timeline = timeline::of(history, verdict);
    put("verdict.json", &json(verdict, &dir.join("history.jsonl"), replay))?;
    put("latency.svg", &latency)?;
    put("rate.svg", &rate)?;
    put("memory.svg", &memory)?;
    put("timeline.txt", &timeline)?;
    let files = page::files(dir).map_err(|error| format!("cannot list {}: {error}", dir.display()))?;
    put("index.html", &page::of(&page::Page { verdict, latency, rate, memory, timeline, replay, files }))
}

/// Text for HTML and SVG.
fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
