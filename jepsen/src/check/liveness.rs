//! Liveness: after the faults are healed, writes resume and the replicas converge in time.

use super::{Anomaly, queue};
use crate::history::{History, KeyHistory, Outcome};

/// Time from the heal to the next acknowledged write of each key, in seconds.
pub const RESUME_SECONDS_MAX: u64 = 10;
/// Time from the end of the writes to a full read of every replica, in seconds.
pub const CONVERGE_SECONDS_MAX: u64 = 60;

pub(super) const NANOS: u64 = 1_000_000_000;

/// When the nemesis had healed everything, in nanoseconds.
pub(super) fn heal_time(history: &History) -> Option<u64> {
    history.faults.iter().filter(|fault| fault.f == "heal").map(|fault| fault.time).next_back()
}

/// Time of the first acknowledgement of an append that began at `from` or later.
pub(super) fn first_ack_after(key: &KeyHistory, from: u64) -> Option<u64> {
    let later = key.appends.iter().filter(|append| append.invoked >= from);
    later.filter_map(|append| append.acked().map(|(_, time)| time)).min()
}

pub(super) fn check(history: &History) -> Vec<Anomaly> {
    let mut found = Vec::new();
    for fault in history.faults.iter().filter(|fault| fault.f == "not-ready") {
        let node = fault.node.unwrap_or_default();
        let detail = format!("node {node} did not become ready again after it was started");
        found.push(Anomaly::new("node-not-ready", "", detail).on(node));
    }
    for (name, key) in &history.keys {
        // Whether results go on is told by the jobs that have none.
        if let Some(healed) = heal_time(history)
            && queue::jobs_of(name).is_none()
        {
            found.extend(resumed(name, first_ack_after(key, healed), healed));
        }
        found.extend(converged(name, key, history));
    }
    if let Some(healed) = heal_time(history)
        && !history.topics.is_empty()
    {
        found.extend(resumed("metadata", first_change_after(history, healed), healed));
    }
    found
}

/// Time of the first acknowledgement of a change of topics that began at `from` or later.
fn first_change_after(history: &History, from: u64) -> Option<u64> {
    let changes = history.topics.values().flat_map(|topic| &topic.changes);
    let done = changes.filter(|change| change.invoked >= from && matches!(change.outcome, Outcome::Ok { .. }));
    done.filter_map(|change| change.answered).min()
}

fn resumed(name: &str, first: Option<u64>, healed: u64) -> Option<Anomaly> {
    let story = match first {
        Some(time) if time - healed <= RESUME_SECONDS_MAX * NANOS => return None,
        Some(time) => format!("the first one came after {} ms", (time - healed) / 1_000_000),
        None => "none came".to_owned(),
    };
    let detail = format!(
        "{name}: no write was acknowledged within {RESUME_SECONDS_MAX} s after all faults were healed; {story}"
    );
    Some(Anomaly::new("no-progress", name, detail))
}

fn converged(name: &str, key: &KeyHistory, history: &History) -> Vec<Anomaly> {
    let acked = key.appends.iter().filter_map(|append| append.acked().map(|(_, time)| time));
    // A queue's workers finish before anybody asks the replicas.
    let asked = key.reads.iter().filter(|read| read.last).map(|read| read.invoked).min();
    let stopped = acked.chain(heal_time(history)).chain(asked).max().unwrap_or(0);
    let mut found = Vec::new();
    for node in key.replicas.as_ref().unwrap_or(&history.nodes) {
        let of_node = key.reads.iter().filter(|read| read.last && read.tail && read.node == Some(*node));
        let story = match of_node.map(|read| read.time).min() {
            Some(time) if time.saturating_sub(stopped) <= CONVERGE_SECONDS_MAX * NANOS => continue,
            Some(time) => format!("it took {} ms", time.saturating_sub(stopped) / 1_000_000),
            None => "it never reached the end of the log".to_owned(),
        };
        let detail = format!("{name}: node {node} did not converge within {CONVERGE_SECONDS_MAX} s; {story}");
        found.push(Anomaly::new("no-convergence", name, detail).on(*node));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::{super::story, *};
    use crate::history::{Fault, Read};

    fn heal() -> Fault {
        Fault { f: "heal".into(), proven: true, time: NANOS, ..Fault::default() }
    }

    /// A heal at 1 s, then the acknowledgement and the end of the drain of node 1.
    fn kinds(acked_second: u64, drained_second: u64) -> Vec<&'static str> {
        let mut history = History { nodes: vec![1], ..History::default() };
        history.faults.push(heal());
        let key = history.keys.entry("t/0".into()).or_default();
        key.appends = vec![story::acked(11, 0, 2 * NANOS, acked_second * NANOS)];
        key.reads = vec![Read { time: drained_second * NANOS, invoked: 5 * NANOS, ..story::drain(1, &[(0, 11)]) }];
        check(&history).iter().map(|anomaly| anomaly.kind).collect()
    }

    #[test]
    fn writes_and_replicas_come_back_in_time_or_it_is_told() {
        assert_eq!(kinds(5, 30), [""; 0]);
        assert_eq!(kinds(12, 30), ["no-progress"]);
        assert_eq!(kinds(5, 66), ["no-convergence"]);
    }

    #[test]
    fn acknowledgements_of_appends_from_before_the_heal_do_not_count_as_progress() {
        let mut history = History::default();
        history.faults.push(heal());
        history.keys.entry("t/0".into()).or_default().appends = vec![story::acked(11, 0, 0, 2 * NANOS)];
        assert_eq!(check(&history)[0].kind, "no-progress");
    }
}
