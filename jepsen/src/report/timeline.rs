//! The timeline of a run: faults, their proofs and ends, and where writes stood still.

use std::fmt::Write;

use crate::{
    check::Verdict,
    history::{History, Outcome},
};

/// A stretch without any acknowledged write that is worth a line, in nanoseconds.
const STANDSTILL_NANOS: u64 = 1_000_000_000;

/// One line per event, in the order of time.
pub(super) fn of(history: &History, verdict: &Verdict) -> String {
    let mut lines: Vec<(u64, String)> = Vec::new();
    for fault in &history.faults {
        let on = fault.node.filter(|node| *node != 0).map_or(String::new(), |node| format!(" node {node}"));
        let leads =
            if fault.leads.is_empty() { String::new() } else { format!(", which leads {}", fault.leads.join(" ")) };
        let detail = fault.detail.as_ref().map_or(String::new(), |detail| format!(" ({detail})"));
        let proof = match (fault.open, fault.proven) {
            _ if !crate::check::harms(&fault.f) => "",
            (true, _) => ", not known to have struck",
            (false, true) => ", proven",
            (false, false) => ", not proven",
        };
        lines.push((fault.time, format!("{}{on}{leads}{proof}{detail}", fault.f)));
        if let Some(ended) = fault.ended {
            lines.push((ended, format!("end of {}{on}", fault.f)));
        }
    }
    for (from, to) in standstills(history) {
        let seconds = (to - from) as f64 / 1e9;
        lines.push((from, format!("no write is acknowledged for {seconds:.1} s")));
    }
    lines.sort();
    let mut text = String::new();
    for (time, line) in lines {
        // Writing to a String does not fail.
        let _ = writeln!(text, "{:>10.3} s  {line}", time as f64 / 1e9);
    }
    let _ = writeln!(
        text,
        "{:>10.3} s  end of the history, {} anomalies",
        history.end as f64 / 1e9,
        verdict.anomaly_total()
    );
    text
}

/// Times between two acknowledgements that lie far apart.
fn standstills(history: &History) -> Vec<(u64, u64)> {
    let appends = history.keys.values().flat_map(|key| &key.appends).map(|append| append.outcome);
    let changes = history.topics.values().flat_map(|topic| &topic.changes).map(|change| change.outcome);
    let mut times: Vec<u64> = appends
        .chain(changes)
        .filter_map(|outcome| match outcome {
            Outcome::Ok { time, .. } => Some(time),
            Outcome::Fail | Outcome::Unknown => None,
        })
        .collect();
    times.sort_unstable();
    let apart = times.windows(2).filter(|pair| pair[1] - pair[0] > STANDSTILL_NANOS);
    apart.map(|pair| (pair[0], pair[1])).collect()
}
