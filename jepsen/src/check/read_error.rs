//! read-error: a reader was told something that no fault of a minority may cause. That nobody
//! answered is no anomaly; a gap, damaged bytes or a vanished range is one.

use super::{Anomaly, Key};

/// The codes of errors that no reader may see.
const FORBIDDEN: [&str; 4] = ["OFFSET_GAP", "BAD_DATA", "DAMAGED", "OFFSET_OUT_OF_RANGE"];

pub(super) fn check(key: &Key<'_>) -> Vec<Anomaly> {
    let code = |error: &str| error.split(':').next().unwrap_or_default().to_owned();
    let forbidden = key.failed_reads.iter().filter(|read| FORBIDDEN.contains(&code(&read.error).as_str()));
    forbidden
        .map(|read| {
            let on = read.node.map_or(String::new(), |node| format!(" on node {node}"));
            let detail = format!("process {} reading {}{on}: {}", read.process, key.name, read.error);
            Anomaly { node: read.node, ..Anomaly::new("read-error", key.name, detail) }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::{super::story, *};
    use crate::history::FailedRead;

    #[test]
    fn a_gap_is_an_anomaly_and_a_time_out_is_none() {
        let mut history = story::good();
        let failed = |error: &str| FailedRead { process: 7, node: Some(2), error: error.to_owned() };
        history.failed_reads = vec![failed("TIMED_OUT: fetch"), failed("OFFSET_GAP: expected 4, found 6")];
        let found = story::run(check, &history);
        assert_eq!(found.len(), 1);
        assert_eq!((found[0].kind, found[0].node), ("read-error", Some(2)));
        assert!(found[0].detail.contains("expected 4, found 6"));
    }
}
