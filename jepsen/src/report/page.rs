//! The page of a run: verdict, faults, anomalies, plots, timeline, and links to its files.

use std::{fmt::Write, io, path::Path};

use super::escaped;
use crate::check::Verdict;

/// Files of a run directory that are linked.
const FILE_COUNT_MAX: usize = 500;
/// How deep logs may lie below the run directory.
const DEPTH_MAX: usize = 4;

/// What the page shows.
pub(super) struct Page<'a> {
    pub(super) verdict: &'a Verdict,
    pub(super) latency: String,
    pub(super) rate: String,
    pub(super) memory: String,
    pub(super) timeline: String,
    pub(super) replay: Option<&'a str>,
    pub(super) files: Vec<String>,
}

/// The history, logs and errors below `dir`, as paths from there.
///
/// # Errors
/// The directory cannot be listed.
pub(super) fn files(dir: &Path) -> io::Result<Vec<String>> {
    let mut found = Vec::new();
    let mut open = vec![(dir.to_owned(), 0)];
    while let Some((folder, depth)) = open.pop() {
        for entry in std::fs::read_dir(&folder)? {
            let entry = entry?;
            let path = entry.path();
            // What cannot be looked at, such as a mount that is gone, is not linked.
            let Ok(kind) = entry.file_type() else { continue };
            let ends =
                path.extension().is_some_and(|end| ["log", "err", "jsonl", "toml"].iter().any(|known| end == *known));
            if kind.is_dir() && depth < DEPTH_MAX {
                open.push((path, depth + 1));
            } else if kind.is_file() && ends && found.len() < FILE_COUNT_MAX {
                found.extend(path.strip_prefix(dir).ok().map(|path| path.display().to_string()));
            }
        }
    }
    found.sort();
    Ok(found)
}

const STYLE: &str = ":root{color-scheme:light dark}body{font:15px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;\
padding:0 1rem;background:Canvas;color:CanvasText}table{border-collapse:collapse;margin:.5rem 0}td,th{padding:.2rem .8rem;\
border:1px solid color-mix(in srgb,CanvasText 25%,transparent);text-align:left;vertical-align:top}td.n{text-align:right}\
pre{overflow-x:auto;font-size:13px}svg{width:100%;height:auto}.valid{color:#2f9e44}.invalid{color:#e03131}";

/// The whole page; nothing outside it is loaded.
pub(super) fn of(page: &Page<'_>) -> String {
    let Page { verdict, latency, rate, memory, timeline, replay, files } = page;
    let (class, word) = if verdict.valid { ("valid", "valid") } else { ("invalid", "NOT valid") };
    let workloads = escaped(&verdict.workloads.join(", "));
    let seed = verdict.seed.map_or("none".to_owned(), |seed| seed.to_string());
    let mut out = format!(
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width\">\
         <title>{word}: {workloads}, seed {seed}</title><style>{STYLE}</style>\
         <h1>Run of {workloads}: <span class=\"{class}\">{word}</span></h1>"
    );
    summary(&mut out, verdict, &seed);
    if !verdict.not_counted.is_empty() {
        out.push_str("<h2>Why the run does not count</h2><ul>");
        for why in &verdict.not_counted {
            let _ = write!(out, "<li>{}</li>", escaped(why));
        }
        out.push_str("</ul>");
    }
    if !verdict.not_run.is_empty() {
        out.push_str("<h2>What was not run</h2><ul>");
        for why in &verdict.not_run {
            let _ = write!(out, "<li>{}</li>", escaped(why));
        }
        out.push_str("</ul>");
    }
    faults(&mut out, verdict);
    anomalies(&mut out, verdict);
    let _ = write!(out, "<h2>Latency, rate and memory</h2>{latency}{rate}{memory}");
    let _ = write!(out, "<h2>Timeline</h2><pre>{}</pre>", escaped(timeline));
    out.push_str("<h2>Files</h2><ul><li><a href=\"verdict.json\">verdict.json</a></li>");
    for file in files {
        let _ = write!(out, "<li><a href=\"{0}\">{0}</a></li>", escaped(file));
    }
    out.push_str("</ul>");
    if let Some(replay) = replay {
        let _ = write!(out, "<h2>Replay</h2><pre>{}</pre>", escaped(replay));
    }
    out.push_str("</html>\n");
    out
}

fn summary(out: &mut String, verdict: &Verdict, seed: &str) {
    let failover = verdict.failover_ms.as_ref().map_or("none measured".to_owned(), |failover| {
        format!("median {:.0} ms, longest {:.0} ms, {} measured", failover.p50, failover.max, failover.count)
    });
    let memory = verdict.memory_mib.as_ref().map_or("not looked at".to_owned(), |memory| {
        format!("{:.0} MiB at first, {:.0} MiB in the end, at most {:.0} MiB", memory.begin, memory.end, memory.max)
    });
    let rows = [
        ("operations", verdict.ops.to_string()),
        ("writes acknowledged", verdict.acked.to_string()),
        ("… during faults", verdict.acked_during_faults.to_string()),
        ("… after the heal", verdict.acked_after_heal.to_string()),
        ("writes refused", verdict.failed.to_string()),
        ("writes of unknown outcome", verdict.unknown.to_string()),
        ("reads", format!("{} with {} values", verdict.reads, verdict.values_read)),
        ("fail-over", failover),
        ("memory of a node", memory),
        ("nodes", verdict.nodes.to_string()),
        ("seconds", format!("{:.1}", verdict.seconds)),
        ("seed", seed.to_owned()),
    ];
    out.push_str("<table>");
    for (name, value) in rows {
        let _ = write!(out, "<tr><th>{name}</th><td>{}</td></tr>", escaped(&value));
    }
    out.push_str("</table>");
}

fn faults(out: &mut String, verdict: &Verdict) {
    if verdict.faults.is_empty() {
        out.push_str("<p>No fault was injected: this is the unfaulted twin.</p>");
        return;
    }
    out.push_str("<h2>Faults</h2><table><tr><th>fault</th><th>injected</th><th>proven</th></tr>");
    for fault in &verdict.faults {
        let _ = write!(
            out,
            "<tr><td>{}</td><td class=\"n\">{}</td><td class=\"n\">{}</td></tr>",
            escaped(&fault.kind),
            fault.injected,
            fault.proven
        );
    }
    out.push_str("</table>");
}

fn anomalies(out: &mut String, verdict: &Verdict) {
    if verdict.anomalies.is_empty() {
        out.push_str("<p>No anomaly was found.</p>");
        return;
    }
    out.push_str("<h2>Anomalies</h2><table><tr><th>anomaly</th><th>count</th></tr>");
    for (kind, count) in &verdict.anomaly_counts {
        let _ = write!(out, "<tr><td>{kind}</td><td class=\"n\">{count}</td></tr>");
    }
    out.push_str("</table><table><tr><th>anomaly</th><th>story</th></tr>");
    for anomaly in &verdict.anomalies {
        let _ = write!(out, "<tr><td>{}</td><td>{}</td></tr>", anomaly.kind, escaped(&anomaly.detail));
    }
    out.push_str("</table>");
}

#[cfg(test)]
mod tests {
    use crate::{check::judge, history::History};

    /// A kill, an append on each side of it, a drain.
    const RUN: &str = r#"{"process":"nemesis","type":"info","f":"start","nodes":[1],"keys":["t/0"],"seed":7,"workloads":["append"],"time":0}
{"process":1,"type":"invoke","f":"append","key":"t/0","value":1,"time":50000000}
{"process":1,"type":"ok","f":"append","key":"t/0","value":1,"offset":0,"time":60000000}
{"process":"nemesis","type":"invoke","f":"kill","node":1,"leads":["t/0"],"time":100000000}
{"process":"nemesis","type":"info","f":"kill","node":1,"proven":true,"detail":"<signal 9>","time":110000000}
{"process":"nemesis","type":"info","f":"end","of":"kill","node":1,"time":900000000}
{"process":2,"type":"invoke","f":"append","key":"t/0","value":2,"time":2000000000}
{"process":2,"type":"ok","f":"append","key":"t/0","value":2,"offset":1,"time":2010000000}
{"process":9,"type":"ok","f":"read","key":"t/0","node":1,"final":true,"tail":true,"value":[[1,2]],"time":2020000000}
"#;

    #[test]
    fn the_page_of_a_run_holds_verdict_plots_timeline_and_links() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("nodes")).unwrap();
        std::fs::write(dir.path().join("nodes/node-1.log"), "").unwrap();
        std::fs::write(dir.path().join("history.jsonl"), RUN).unwrap();
        let history = History::read(RUN.as_bytes()).unwrap();
        let page = crate::report::write(dir.path(), &history, &judge(&history), Some("run --seed 7")).unwrap();
        let page = std::fs::read_to_string(page).unwrap();
        for part in [
            "NOT valid",
            "lost-write",
            "value 1 of t/0 at offset 0",
            "href=\"nodes/node-1.log\"",
            "href=\"history.jsonl\"",
            "run --seed 7",
            "&lt;signal 9&gt;",
            "no write is acknowledged for 1.9 s",
            "kill node 1, which leads t/0, proven",
            "prefers-color-scheme",
        ] {
            assert!(page.contains(part), "{part} is not in the page");
        }
        assert_eq!(page.matches("<svg ").count(), 3);
        assert!(!page.contains("src=") && !page.contains("href=\"http"), "nothing is loaded from elsewhere");
        // The window of the kill is shaded from 0.1 s to 0.9 s.
        assert!(page.contains("<title>kill node 1, 0.100 s to 0.900 s</title>"));
        let verdict = std::fs::read_to_string(dir.path().join("verdict.json")).unwrap();
        let verdict: serde_json::Value = serde_json::from_str(&verdict).unwrap();
        assert_eq!((verdict["valid"].as_bool(), verdict["seed"].as_u64()), (Some(false), Some(7)));
    }
}
