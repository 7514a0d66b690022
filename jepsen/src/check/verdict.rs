//! The verdict on a whole history: anomalies, what the faults were, and whether the run counts.

use std::collections::BTreeMap;

use serde::Serialize;

use super::{APPEND_CHECKS, Anomaly, Key, Order, liveness};
use crate::history::{History, Outcome};

/// Anomalies that are told in full, per kind; the rest is counted.
const TOLD_COUNT_MAX: usize = 50;

/// How often a fault was injected, and how often it is proven that it struck.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FaultCount {
    /// Which fault, for example `kill`.
    pub kind: String,
    /// Times it was tried.
    pub injected: u64,
    /// Times it struck for sure.
    pub proven: u64,
}

/// Time from a kill to the next acknowledged write on the partitions that the victim led.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct FailoverMs {
    /// The median.
    pub p50: f64,
    /// The longest.
    pub max: f64,
    /// Number of fail-overs measured.
    pub count: usize,
}

/// What a history shows.
#[derive(Clone, Debug, Serialize)]
pub struct Verdict {
    /// No anomaly, and the run counts.
    pub valid: bool,
    /// Why the run proves nothing; empty when it counts.
    pub not_counted: Vec<String>,
    /// Operations invoked.
    pub ops: u64,
    /// Appends acknowledged.
    pub acked: u64,
    /// Appends refused as surely not written.
    pub failed: u64,
    /// Appends whose outcome is unknown.
    pub unknown: u64,
    /// Appends acknowledged between the first fault and the heal.
    pub acked_during_faults: u64,
    /// Appends begun and acknowledged after the heal.
    pub acked_after_heal: u64,
    /// Reads that were answered.
    pub reads: u64,
    /// Values in them.
    pub values_read: u64,
    /// The faults.
    pub faults: Vec<FaultCount>,
    /// Anomalies by kind, all of them.
    pub anomaly_counts: BTreeMap<&'static str, u64>,
    /// The anomalies, at most 50 of each kind.
    pub anomalies: Vec<Anomaly>,
    /// How long a partition stood still when its leader was killed; absent without a kill of a leader.
    pub failover_ms: Option<FailoverMs>,
    /// The seed that the history names.
    pub seed: Option<u64>,
}

/// Judges `history` by every checker.
#[must_use]
pub fn judge(history: &History) -> Verdict {
    let mut all = Vec::new();
    for (name, key) in &history.keys {
        let order = Order::of(key);
        let key = Key::new(name, key, &history.nodes, &order);
        for check in APPEND_CHECKS {
            all.extend(check(&key));
        }
    }
    all.extend(liveness::check(history));

    let mut anomaly_counts = BTreeMap::new();
    let mut anomalies = Vec::new();
    for anomaly in all {
        let count: &mut u64 = anomaly_counts.entry(anomaly.kind).or_default();
        *count += 1;
        if *count <= TOLD_COUNT_MAX as u64 {
            anomalies.push(anomaly);
        }
    }
    let count = |wanted: fn(&Outcome) -> bool| {
        let appends = history.keys.values().flat_map(|key| &key.appends);
        appends.filter(|append| wanted(&append.outcome)).count() as u64
    };
    let (acked_during_faults, acked_after_heal) = acked_around_faults(history);
    let mut verdict = Verdict {
        valid: false,
        not_counted: Vec::new(),
        ops: history.ops,
        acked: count(|outcome| matches!(outcome, Outcome::Ok { .. })),
        failed: count(|outcome| *outcome == Outcome::Fail),
        unknown: count(|outcome| *outcome == Outcome::Unknown),
        acked_during_faults,
        acked_after_heal,
        reads: history.keys.values().map(|key| key.reads.len() as u64).sum(),
        values_read: history.keys.values().flat_map(|key| &key.reads).map(|read| read.values.len() as u64).sum(),
        faults: fault_counts(history),
        anomaly_counts,
        anomalies,
        failover_ms: failover(history),
        seed: history.seed,
    };
    verdict.not_counted = why_not_counted(history, &verdict);
    verdict.valid = verdict.anomaly_counts.is_empty() && verdict.not_counted.is_empty();
    verdict
}

fn why_not_counted(history: &History, verdict: &Verdict) -> Vec<String> {
    let mut why = Vec::new();
    if verdict.acked == 0 {
        why.push("no append was acknowledged".to_owned());
    }
    for (name, key) in &history.keys {
        if !key.reads.iter().any(|read| read.last) {
            why.push(format!("{name} has no final read"));
        }
    }
    for fault in &verdict.faults {
        if fault.proven == 0 {
            why.push(format!("no {} is proven of {} injected", fault.kind, fault.injected));
        }
    }
    if !verdict.faults.is_empty() {
        if verdict.acked_during_faults == 0 {
            why.push("no append was acknowledged during the faults".to_owned());
        }
        if verdict.acked_after_heal == 0 {
            why.push("no append was acknowledged after the faults were healed".to_owned());
        }
    }
    why
}

/// Only what harms; starting a node again and healing are its end.
fn harms(f: &str) -> bool {
    !matches!(f, "restart" | "heal" | "not-ready")
}

fn fault_counts(history: &History) -> Vec<FaultCount> {
    let mut counts: BTreeMap<&str, (u64, u64)> = BTreeMap::new();
    for fault in history.faults.iter().filter(|fault| harms(&fault.f)) {
        let (injected, proven) = counts.entry(&fault.f).or_default();
        *injected += 1;
        *proven += u64::from(fault.proven);
    }
    let tell = |(kind, (injected, proven)): (&str, _)| FaultCount { kind: kind.to_owned(), injected, proven };
    counts.into_iter().map(tell).collect()
}

fn acked_around_faults(history: &History) -> (u64, u64) {
    let Some(first) = history.faults.iter().find(|fault| harms(&fault.f)).map(|fault| fault.time) else {
        return (0, 0);
    };
    let healed = liveness::heal_time(history).unwrap_or(u64::MAX);
    let (mut during, mut after) = (0, 0);
    for append in history.keys.values().flat_map(|key| &key.appends) {
        let Some((_, time)) = append.acked() else { continue };
        during += u64::from(append.invoked >= first && time < healed);
        after += u64::from(append.invoked >= healed);
    }
    (during, after)
}

fn failover(history: &History) -> Option<FailoverMs> {
    let mut times: Vec<f64> = Vec::new();
    for kill in history.faults.iter().filter(|fault| fault.f == "kill") {
        for key in kill.leads.iter().filter_map(|key| history.keys.get(key)) {
            if let Some(time) = liveness::first_ack_after(key, kill.time) {
                times.push((time - kill.time) as f64 / 1e6);
            }
        }
    }
    times.sort_by(f64::total_cmp);
    let max = *times.last()?;
    Some(FailoverMs { p50: times[times.len() / 2], max, count: times.len() })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One key, one node, a kill of its leader at 100, a heal at 300.
    const RUN: &str = r#"
{"process":"nemesis","type":"info","f":"start","nodes":[1],"keys":["t/0"],"seed":7,"time":0}
{"process":"nemesis","type":"invoke","f":"kill","node":1,"leads":["t/0"],"time":100}
{"process":"nemesis","type":"info","f":"kill","node":1,"proven":true,"time":110}
{"process":1,"type":"invoke","f":"append","key":"t/0","value":1,"time":150}
{"process":1,"type":"ok","f":"append","key":"t/0","value":1,"offset":0,"time":2000100}
{"process":"nemesis","type":"info","f":"restart","node":1,"time":2000200}
{"process":"nemesis","type":"info","f":"heal","time":2000300}
{"process":1,"type":"invoke","f":"append","key":"t/0","value":2,"time":2000400}
{"process":1,"type":"ok","f":"append","key":"t/0","value":2,"offset":1,"time":2000500}
{"process":9,"type":"invoke","f":"read","key":"t/0","node":1,"final":true,"time":2000600}
{"process":9,"type":"ok","f":"read","key":"t/0","node":1,"final":true,"tail":true,"value":[[0,1],[1,2]],"time":2000700}
"#;

    fn judged(text: &str) -> Verdict {
        judge(&History::read(text.as_bytes()).unwrap())
    }

    #[test]
    fn a_good_run_is_valid_and_measured() {
        let verdict = judged(RUN);
        assert!(verdict.valid, "{verdict:?}");
        assert_eq!((verdict.ops, verdict.acked, verdict.acked_during_faults, verdict.acked_after_heal), (3, 2, 1, 1));
        assert_eq!(verdict.faults, [FaultCount { kind: "kill".into(), injected: 1, proven: 1 }]);
        assert_eq!(verdict.failover_ms, Some(FailoverMs { p50: 2.0, max: 2.0, count: 1 }));
        assert_eq!(verdict.seed, Some(7));
    }

    #[test]
    fn a_run_that_proves_nothing_is_not_valid_and_says_why() {
        let quiet = RUN.replace(
            "\"invoke\",\"f\":\"append\",\"key\":\"t/0\",\"value\":2",
            "\"invoke\",\"f\":\"append\",\"key\":\"t/0\",\"value\":3",
        );
        assert!(History::read(quiet.as_bytes()).is_err(), "an answer for another value is malformed");
        for (from, to, why) in [
            ("\"proven\":true,", "", "no kill is proven of 1 injected"),
            ("\"final\":true,", "", "t/0 has no final read"),
            ("\"time\":2000300", "\"time\":2000300,\"f2\":0", ""),
        ] {
            let verdict = judged(&RUN.replace(from, to));
            assert_eq!(verdict.not_counted.first().map(String::as_str).unwrap_or(""), why);
            assert_eq!(verdict.valid, why.is_empty());
        }
    }

    #[test]
    fn a_lost_value_makes_the_run_invalid_and_is_named() {
        let verdict = judged(&RUN.replace("[[0,1],[1,2]]", "[[1,2]]"));
        assert!(!verdict.valid);
        let lost = verdict.anomalies.iter().find(|anomaly| anomaly.kind == "lost-write").unwrap();
        assert_eq!((lost.key.as_str(), lost.value, lost.offset), ("t/0", Some(1), Some(0)));
    }
}
