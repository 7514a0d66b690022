//! read-error: a reader was told something that the faults injected do not explain. That nobody
//! answered is no anomaly; a gap, bytes that are not what they should be, or a vanished range is one.
//!
//! | told | while files are being damaged | in the closing read | record bad on all replicas |
//! |---|---|---|---|
//! | `DAMAGED` | allowed: it is what a reader must be told until the repair | an anomaly | expected |
//! | `OFFSET_GAP`, `BAD_DATA`, `OFFSET_OUT_OF_RANGE` | an anomaly | an anomaly | an anomaly |
//!
//! no-read-error: a record was made bad on all replicas, and nobody was told.

use std::ops::RangeInclusive;

use super::{Anomaly, Key};
use crate::history::{Fault, KeyHistory};

/// The codes of errors that no reader may see.
const FORBIDDEN: [&str; 3] = ["OFFSET_GAP", "BAD_DATA", "OFFSET_OUT_OF_RANGE"];
/// The fault that makes the same record bad on every replica of its `keys`.
pub(super) const BAD_RECORD_ALL: &str = "bad-record-all";
/// Faults that damage what is stored.
const DAMAGING: [&str; 3] = ["bit-flip", "file-damage", BAD_RECORD_ALL];

/// The offsets that a `DAMAGED` error names.
pub(crate) fn damaged_offsets(error: &str) -> Option<(u64, u64)> {
    let (_, named) = error.strip_prefix("DAMAGED")?.split_once("offsets ")?;
    let mut words = named.split_whitespace();
    let first = words.next()?.parse().ok()?;
    let last = match words.next() {
        Some("to") => words.next()?.parse().ok()?,
        _ => first,
    };
    (first <= last).then_some((first, last))
}

/// The offsets of `name` that may be missing everywhere: damaged on all replicas, and told.
pub(super) fn excused(name: &str, key: &KeyHistory, faults: &[Fault]) -> Vec<RangeInclusive<u64>> {
    if !is_bad_everywhere(name, faults) {
        return Vec::new();
    }
    let told = key.failed_reads.iter().filter_map(|read| damaged_offsets(&read.error));
    told.map(|(first, last)| first..=last).collect()
}

fn is_bad_everywhere(name: &str, faults: &[Fault]) -> bool {
    faults.iter().any(|fault| fault.f == BAD_RECORD_ALL && fault.proven && fault.keys.iter().any(|key| key == name))
}

pub(super) fn check(key: &Key<'_>) -> Vec<Anomaly> {
    let everywhere = is_bad_everywhere(key.name, key.faults);
    let damaging = key.faults.iter().any(|fault| DAMAGING.contains(&fault.f.as_str()));
    let mut found = Vec::new();
    for read in key.failed_reads {
        let code = read.error.split(':').next().unwrap_or_default();
        let forbidden = match code {
            "DAMAGED" => !everywhere && (read.last || !damaging),
            code => FORBIDDEN.contains(&code),
        };
        if forbidden {
            let on = read.node.map_or(String::new(), |node| format!(" on node {node}"));
            let detail = format!("process {} reading {}{on}: {}", read.process, key.name, read.error);
            found.push(Anomaly { node: read.node, ..Anomaly::new("read-error", key.name, detail) });
        }
    }
    if everywhere && key.excused.is_empty() {
        let detail = format!("a record of {} is bad on all replicas, and no reader was told that it is", key.name);
        found.push(Anomaly::new("no-read-error", key.name, detail));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::{super::story, *};
    use crate::{
        check::{KEY_CHECKS, order::Order},
        history::{FailedRead, History},
    };

    fn failed(error: &str, last: bool) -> FailedRead {
        FailedRead { process: 7, node: Some(2), last, offset: None, error: error.to_owned() }
    }

    fn fault(f: &str) -> Fault {
        Fault { f: f.into(), keys: vec!["t/0".into()], proven: true, ..Fault::default() }
    }

    const DAMAGED: &str = "DAMAGED: offsets 0 to 0 of t/0 do not match their checksum on this node";

    fn kinds(key: &KeyHistory, faults: Vec<Fault>) -> Vec<&'static str> {
        let order = Order::of(key);
        let history = History { nodes: vec![1, 2], faults, ..History::default() };
        let key = Key::new("t/0", key, &history, &order);
        KEY_CHECKS.iter().flat_map(|check| check(&key)).map(|anomaly| anomaly.kind).collect()
    }

    #[test]
    fn a_gap_is_an_anomaly_and_a_time_out_is_none() {
        let mut history = story::good();
        let failed = |error: &str| failed(error, false);
        history.failed_reads = vec![failed("TIMED_OUT: fetch"), failed("OFFSET_GAP: expected 4, found 6")];
        let found = story::run(check, &history);
        assert_eq!(found.len(), 1);
        assert_eq!((found[0].kind, found[0].node), ("read-error", Some(2)));
        assert!(found[0].detail.contains("expected 4, found 6"));
    }

    #[test]
    fn damage_may_be_told_while_files_are_damaged_and_not_after() {
        let mut history = story::good();
        history.failed_reads = vec![failed(DAMAGED, false)];
        assert_eq!(kinds(&history, vec![]), ["read-error"]);
        assert_eq!(kinds(&history, vec![fault("bit-flip")]), [""; 0]);
        history.failed_reads = vec![failed(DAMAGED, true)];
        assert_eq!(kinds(&history, vec![fault("bit-flip")]), ["read-error"]);
    }

    #[test]
    fn what_is_bad_everywhere_must_be_told_and_is_then_not_lost() {
        let mut history = story::good();
        for read in history.reads.iter_mut().filter(|read| read.last) {
            read.values = [(1, Some(17))].into_iter().collect();
        }
        let silent = kinds(&history, vec![fault(BAD_RECORD_ALL)]);
        assert!(silent.contains(&"lost-write") && silent.contains(&"no-read-error"), "{silent:?}");
        history.failed_reads = vec![failed(DAMAGED, true)];
        assert_eq!(kinds(&history, vec![fault(BAD_RECORD_ALL)]), [""; 0]);
        // The record next to it is no part of the excuse.
        history.reads.retain(|read| !read.last);
        history.reads.extend([story::drain(1, &[]), story::drain(2, &[])]);
        assert!(kinds(&history, vec![fault(BAD_RECORD_ALL)]).contains(&"lost-write"));
    }

    #[test]
    fn the_offsets_of_an_error_are_read() {
        assert_eq!(damaged_offsets("DAMAGED: offsets 4 to 9 of t/0 do not match"), Some((4, 9)));
        for other in ["DAMAGED: t/0", "OFFSET_GAP: offsets 4 to 9", "DAMAGED: offsets 9 to 4", "DAMAGED: offsets x"] {
            assert_eq!(damaged_offsets(other), None, "{other}");
        }
    }
}
