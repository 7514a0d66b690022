//! The verdict on a whole history: anomalies, what the faults were, and whether the run counts.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{Anomaly, KEY_CHECKS, Key, Order, liveness, metadata, queue, tokens};
use crate::history::{Fault, History, Outcome};

/// Anomalies that are told in full, per kind; the rest is counted.
const TOLD_COUNT_MAX: usize = 50;

/// Time after a fault in which a standstill is put down to it when its end is not told, in nanoseconds.
const FAILOVER_NANOS_MAX: u64 = 10_000_000_000;

/// How often a fault was injected, and how often it is proven that it struck.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FaultCount {
    /// Which fault, for example `kill`.
    pub kind: String,
    /// Times it was tried.
    pub injected: u64,
    /// Times it struck for sure.
    pub proven: u64,
}

/// How long the partitions that the victim of a fault led stood still, without an acknowledged write.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FailoverMs {
    /// The median.
    pub p50: f64,
    /// The longest.
    pub max: f64,
    /// Number of fail-overs measured.
    pub count: usize,
}

/// What the nodes had in memory, beyond files that they map, in MiB.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MemoryMib {
    /// The median of all nodes over the first fifth of the looks.
    pub begin: f64,
    /// The same over the last fifth.
    pub end: f64,
    /// The most that any node had.
    pub max: f64,
}

/// What a history shows.
#[derive(Clone, Debug, Serialize)]
pub struct Verdict {
    /// No anomaly, and the run counts.
    pub valid: bool,
    /// Why the run proves nothing; empty when it counts.
    pub not_counted: Vec<String>,
    /// Faults that were asked for and that the machine cannot make.
    pub not_run: Vec<String>,
    /// Operations invoked.
    pub ops: u64,
    /// Writes acknowledged: appends, results, changes of topics.
    pub acked: u64,
    /// Writes refused as surely without effect.
    pub failed: u64,
    /// Writes whose outcome is unknown.
    pub unknown: u64,
    /// Writes acknowledged between the first fault and the heal.
    pub acked_during_faults: u64,
    /// Writes begun and acknowledged after the heal.
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
    /// How long a partition stood still when its leader was struck; absent when no leader was.
    pub failover_ms: Option<FailoverMs>,
    /// What the nodes had in memory; absent when nobody looked.
    pub memory_mib: Option<MemoryMib>,
    /// The seed that the history names.
    pub seed: Option<u64>,
    /// What the clients did.
    pub workloads: Vec<String>,
    /// Number of nodes.
    pub nodes: usize,
    /// How long the history is.
    pub seconds: f64,
}

impl Verdict {
    /// Number of anomalies of all kinds.
    #[must_use]
    pub fn anomaly_total(&self) -> u64 {
        self.anomaly_counts.values().sum()
    }
}

/// A write of any kind.
struct Write {
    invoked: u64,
    outcome: Outcome,
}

/// Appends, results, and changes of topics.
fn writes(history: &History) -> impl Iterator<Item = Write> + '_ {
    let appends = history.keys.values().flat_map(|key| &key.appends);
    let appends = appends.map(|append| Write { invoked: append.invoked, outcome: append.outcome });
    let changes = history.topics.values().flat_map(|topic| &topic.changes);
    appends.chain(changes.map(|change| Write { invoked: change.invoked, outcome: change.outcome }))
}

/// Judges `history` by every checker.
#[must_use]
pub fn judge(history: &History) -> Verdict {
    let mut all = Vec::new();
    for (name, key) in &history.keys {
        let order = Order::of(key);
        let key = Key::new(name, key, history, &order);
        for check in KEY_CHECKS {
            all.extend(check(&key));
        }
    }
    all.extend(queue::check(history));
    all.extend(metadata::check(history));
    all.extend(tokens::check(history));
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
    let count = |wanted: fn(&Outcome) -> bool| writes(history).filter(|write| wanted(&write.outcome)).count() as u64;
    let (acked_during_faults, acked_after_heal) = acked_around_faults(history);
    let mut verdict = Verdict {
        valid: false,
        not_counted: Vec::new(),
        not_run: history.not_run.clone(),
        ops: history.ops,
        acked: count(|outcome| matches!(outcome, Outcome::Ok { .. })),
        failed: count(|outcome| *outcome == Outcome::Fail),
        unknown: count(|outcome| *outcome == Outcome::Unknown),
        acked_during_faults,
        acked_after_heal,
        reads: history.keys.values().map(|key| key.reads.len() as u64).sum::<u64>() + history.listings.len() as u64,
        values_read: history.keys.values().flat_map(|key| &key.reads).map(|read| read.values.len() as u64).sum(),
        faults: fault_counts(history),
        anomaly_counts,
        anomalies,
        failover_ms: failover(history),
        memory_mib: memory(history),
        seed: history.seed,
        workloads: history.workloads.clone(),
        nodes: history.nodes.len(),
        seconds: history.end as f64 / 1e9,
    };
    verdict.not_counted = why_not_counted(history, &verdict);
    verdict.valid = verdict.anomaly_counts.is_empty() && verdict.not_counted.is_empty();
    verdict
}

fn why_not_counted(history: &History, verdict: &Verdict) -> Vec<String> {
    let mut why = Vec::new();
    if verdict.acked == 0 {
        why.push("no write was acknowledged".to_owned());
    }
    for (name, key) in &history.keys {
        if !key.reads.iter().any(|read| read.last) {
            why.push(format!("{name} has no final read"));
        }
    }
    why.extend(tokens::why_not_counted(history));
    if !history.topics.is_empty() && !history.listings.iter().any(|listing| listing.last) {
        why.push("the topics were not listed at the end".to_owned());
    }
    for fault in &verdict.faults {
        if fault.proven == 0 {
            why.push(format!("no {} is proven of {} injected", fault.kind, fault.injected));
        }
    }
    if !verdict.faults.is_empty() {
        if verdict.acked_during_faults == 0 {
            why.push("no write was acknowledged during the faults".to_owned());
        }
        if verdict.acked_after_heal == 0 {
            why.push("no write was acknowledged after the faults were healed".to_owned());
        }
    }
    why
}

/// Only what harms; starting a node again and healing are its end.
pub(crate) fn harms(f: &str) -> bool {
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
    for write in writes(history) {
        let Outcome::Ok { time, .. } = write.outcome else { continue };
        during += u64::from(write.invoked >= first && time < healed);
        after += u64::from(write.invoked >= healed);
    }
    (during, after)
}

fn failover(history: &History) -> Option<FailoverMs> {
    let mut acks: BTreeMap<&str, Vec<u64>> = BTreeMap::new();
    let mut times: Vec<f64> = Vec::new();
    for fault in history.faults.iter().filter(|fault| harms(&fault.f)) {
        for (name, key) in fault.leads.iter().filter_map(|name| history.keys.get_key_value(name)) {
            let acks = acks.entry(name).or_insert_with(|| {
                let mut acks: Vec<u64> =
                    key.appends.iter().filter_map(|append| append.acked().map(|(_, time)| time)).collect();
                acks.sort_unstable();
                acks
            });
            times.extend(standstill(acks, fault).map(|nanos| nanos as f64 / 1e6));
        }
    }
    times.sort_by(f64::total_cmp);
    let max = *times.last()?;
    Some(FailoverMs { p50: times[times.len() / 2], max, count: times.len() })
}

fn memory(history: &History) -> Option<MemoryMib> {
    let mib: Vec<f64> = history.memory.iter().map(|look| look.bytes as f64 / f64::from(1 << 20)).collect();
    let fifth = mib.len().div_ceil(5);
    let median = |part: &[f64]| {
        let mut part = part.to_vec();
        part.sort_by(f64::total_cmp);
        part.get(part.len() / 2).copied()
    };
    let max = mib.iter().copied().max_by(f64::total_cmp)?;
    Some(MemoryMib { begin: median(&mib[..fifth])?, end: median(&mib[mib.len() - fifth..])?, max })
}

/// The longest time without an acknowledgement that began while a fault went on. Not the first one after
/// its begin: between the begin and the blow there may still be some.
fn standstill(acks: &[u64], fault: &Fault) -> Option<u64> {
    let until = fault.ended.unwrap_or(fault.time + FAILOVER_NANOS_MAX);
    let first = acks.partition_point(|time| *time < fault.time);
    let begins = [fault.time].into_iter().chain(acks[first..].iter().copied());
    let gaps = begins.zip(&acks[first..]).take_while(|(begin, _)| *begin <= until);
    gaps.map(|(begin, end)| end - begin).max()
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

    /// Its first append, and the same one by a process that never hears of it.
    const FIRST: &str = r#"{"process":1,"type":"invoke","f":"append","key":"t/0","value":1,"time":150}
{"process":1,"type":"ok","f":"append","key":"t/0","value":1,"offset":0,"time":2000100}"#;
    const UNANSWERED: &str = r#"{"process":2,"type":"invoke","f":"append","key":"t/0","value":1,"time":150}
{"process":2,"type":"info","f":"append","key":"t/0","value":1,"time":2000100}"#;

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
    fn memory_that_grows_shows() {
        let looks = (0..10).map(|at| {
            format!(
                "{{\"process\":\"nemesis\",\"type\":\"info\",\"f\":\"memory\",\"node\":1,\"value\":{},\"time\":{}}}\n",
                (10 + at) << 20,
                3_000_000 + at
            )
        });
        let verdict = judged(&(RUN.to_owned() + &looks.collect::<String>()));
        assert!(verdict.valid, "{verdict:?}");
        assert_eq!(verdict.memory_mib, Some(MemoryMib { begin: 11.0, end: 19.0, max: 19.0 }));
        assert_eq!(judged(RUN).memory_mib, None);
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
            (FIRST, UNANSWERED, "no write was acknowledged during the faults"),
            (
                "\"ok\",\"f\":\"append\",\"key\":\"t/0\",\"value\":2,\"offset\":1",
                "\"info\",\"f\":\"append\",\"key\":\"t/0\",\"value\":2",
                "no write was acknowledged after the faults were healed",
            ),
        ] {
            assert_ne!(RUN.replace(from, to), RUN, "{why}");
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

    #[test]
    fn a_standstill_counts_from_the_blow_and_not_from_the_announcement() {
        let fault = |ended| Fault { time: 100, ended, ..Fault::default() };
        let acks = [90, 110, 120, 900, 910, 5_000];
        assert_eq!(standstill(&acks, &fault(Some(500))), Some(780));
        assert_eq!(standstill(&acks, &fault(None)), Some(4_090), "its end is not told");
        assert_eq!(standstill(&acks[..1], &fault(None)), None, "nothing came any more: liveness tells");
    }
}
