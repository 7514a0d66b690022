//! What the terminal and `--json` show.

use std::path::Path;

use serde::Serialize;

use crate::check::Verdict;

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
            "{} appends acknowledged, {} unknown, {} refused; {} values in {} reads",
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
    lines.extend(verdict.anomaly_counts.iter().map(|(kind, count)| format!("ANOMALY {kind}: {count}")));
    lines.extend(
        verdict.anomalies.iter().take(SHOWN_COUNT_MAX).map(|anomaly| format!("  {}: {}", anomaly.kind, anomaly.detail)),
    );
    lines.extend(verdict.not_counted.iter().map(|why| format!("NOT COUNTED: {why}")));
    lines.push(format!("history: {}", history.display()));
    lines.extend(replay.map(|replay| format!("replay:  {replay}")));
    lines.push(if verdict.valid { "valid".to_owned() } else { "NOT VALID".to_owned() });
    lines.join("\n")
}
