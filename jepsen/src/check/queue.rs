//! Queues: one job, one result.
//!
//! | anomaly | |
//! |---|---|
//! | `no-result` | a job that stands in the log, or was acknowledged, has no result after the drain |
//! | `two-results` | a job has two of them |
//! | `result-without-job` | a result answers no job of its partition |
//! | `redelivered` | an acknowledged job was handed out again: with a later attempt than the one whose acknowledgement was confirmed |
//! | `lease-twice` | two workers were told of the same attempt of a job: a lease without a fence |
//!
//! That a lost result is a `lost-write` on the results topic, and replicas that differ a
//! `lost-on-node`, the other checkers tell.

use std::collections::{HashMap, HashSet};

use super::{Anomaly, Key, order::Order};
use crate::history::{History, KeyHistory, Take};

/// The jobs whose results are written to the key `results`, as the bus itself names them.
pub(super) fn jobs_of(results: &str) -> Option<String> {
    let (topic, partition) = results.rsplit_once('/')?;
    Some(format!("{}.jobs/{partition}", topic.strip_suffix(".results")?))
}

/// The results of the jobs of a key.
fn results_of(jobs: &str) -> Option<String> {
    let (topic, partition) = jobs.rsplit_once('/')?;
    Some(format!("{}.results/{partition}", topic.strip_suffix(".jobs")?))
}

pub(super) fn check(history: &History) -> Vec<Anomaly> {
    let mut found = Vec::new();
    for (name, jobs) in &history.keys {
        let Some(results_name) = results_of(name) else { continue };
        let none = KeyHistory::default();
        let results = history.keys.get(&results_name).unwrap_or(&none);
        let (jobs_order, results_order) = (Order::of(jobs), Order::of(results));
        let jobs_key = Key::new(name, jobs, history, &jobs_order);
        let results_key = Key::new(&results_name, results, history, &results_order);
        found.extend(one_result(&jobs_key, &results_key));
        found.extend(leases(name, jobs));
    }
    found
}

fn one_result(jobs: &Key<'_>, results: &Key<'_>) -> Vec<Anomaly> {
    let places = results.order.places();
    let mut found = Vec::new();
    let mut known: HashSet<u64> = HashSet::with_capacity(jobs.order.entries.len());
    for (offset, value) in jobs.order.entries.iter().filter(|(_, value)| known.insert(*value)) {
        let from = places.partition_point(|(known, _)| known < value);
        let of_job = places[from..].iter().take_while(|(known, _)| known == value).collect::<Vec<_>>();
        // A result that was read once and is not in the closing read is a lost write and told as that.
        let detail = match of_job.as_slice() {
            [] => format!("job {value} of {} at offset {offset} has no result in {}", jobs.name, results.name),
            [_] => continue,
            [first, second, ..] => format!(
                "job {value} of {} at offset {offset} has results at offsets {} and {} of {}",
                jobs.name, first.1, second.1, results.name
            ),
        };
        let kind = if of_job.is_empty() { "no-result" } else { "two-results" };
        if !jobs.is_excused(*offset) {
            found.push(Anomaly::new(kind, jobs.name, detail).at(*value, *offset));
        }
    }
    for (value, offset) in places.iter().filter(|(value, _)| !known.contains(value)) {
        let detail = format!("the result at offset {offset} of {} answers job {value}, which is none", results.name);
        found.push(Anomaly::new("result-without-job", results.name, detail).at(*value, *offset));
    }
    found
}

fn leases(name: &str, jobs: &KeyHistory) -> Vec<Anomaly> {
    let mut found = Vec::new();
    // The attempt of each job whose acknowledgement was confirmed first.
    let mut acked: HashMap<u64, (u64, u64)> = HashMap::new();
    for ack in &jobs.acks {
        if let Some(time) = ack.confirmed {
            let first = acked.entry(ack.offset).or_insert((ack.attempt, time));
            *first = (*first).min((ack.attempt, time));
        }
    }
    let mut taken: HashMap<(u64, u64), Take> = HashMap::with_capacity(jobs.takes.len());
    for take in &jobs.takes {
        let Take { process, offset, attempt, .. } = *take;
        let tell = |kind, detail| {
            let anomaly = Anomaly::new(kind, name, detail);
            Anomaly { value: take.value, offset: Some(offset), ..anomaly }
        };
        // A lower attempt may have been on its way to its worker for long.
        if let Some((settled, time)) = acked.get(&offset)
            && attempt > *settled
        {
            let detail = format!(
                "the job at offset {offset} of {name} was handed to process {process} as attempt {attempt}; attempt \
                 {settled} had been acknowledged, confirmed at {time} ns"
            );
            found.push(tell("redelivered", detail));
        }
        if let Some(other) = taken.insert((offset, attempt), *take) {
            let detail = format!(
                "attempt {attempt} of the job at offset {offset} of {name} was handed to process {} and to process \
                 {process}",
                other.process
            );
            found.push(tell("lease-twice", detail));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::{super::story, *};
    use crate::history::{Ack, Append, Outcome};

    fn take(process: u64, offset: u64, attempt: u64) -> Take {
        Take { process, value: Some(11 + offset), offset, attempt, time: 0 }
    }

    fn ack(offset: u64, attempt: u64, confirmed: Option<u64>) -> Ack {
        Ack { process: 1, offset, attempt, confirmed }
    }

    /// Two jobs; one was done at the first, the other at the second attempt.
    fn good() -> History {
        let mut history = History { nodes: vec![1, 2], ..History::default() };
        let values = [(0, 11), (1, 12)];
        let jobs = KeyHistory {
            appends: vec![story::acked(11, 0, 0, 1), story::acked(12, 1, 0, 1)],
            reads: vec![story::drain(1, &values), story::drain(2, &values)],
            takes: vec![take(1, 0, 1), take(2, 1, 1), take(3, 1, 2)],
            acks: vec![ack(0, 1, Some(50)), ack(1, 2, Some(90))],
            ..KeyHistory::default()
        };
        let results = KeyHistory {
            appends: vec![
                story::acked(11, 0, 40, 45),
                story::append(12, 60, Outcome::Unknown),
                Append { process: 3, ..story::acked(12, 1, 70, 80) },
            ],
            reads: vec![story::drain(1, &values), story::drain(2, &values)],
            ..KeyHistory::default()
        };
        history.keys.insert("q.jobs/0".into(), jobs);
        history.keys.insert("q.results/0".into(), results);
        history
    }

    fn kinds(change: impl FnOnce(&mut History)) -> Vec<&'static str> {
        let mut history = good();
        change(&mut history);
        check(&history).iter().map(|anomaly| anomaly.kind).collect()
    }

    fn read_results(history: &mut History, values: &[(u64, u64)]) {
        let results = history.keys.get_mut("q.results/0").unwrap();
        results.reads = vec![story::drain(1, values), story::drain(2, values)];
        results.appends.retain(|append| append.value == 11);
    }

    #[test]
    fn a_good_queue_has_no_anomaly_with_any_checker() {
        assert_eq!(kinds(|_| ()), [""; 0]);
        let history = good();
        for (name, key) in &history.keys {
            let order = Order::of(key);
            let key = Key::new(name, key, &history, &order);
            for check in super::super::KEY_CHECKS {
                assert_eq!(check(&key), [], "{name}");
            }
        }
    }

    #[test]
    fn a_job_has_one_result() {
        assert_eq!(kinds(|history| read_results(history, &[(0, 11)])), ["no-result"]);
        assert_eq!(kinds(|history| read_results(history, &[(0, 11), (1, 12), (2, 12)])), ["two-results"]);
        assert_eq!(kinds(|history| read_results(history, &[(0, 11), (1, 12), (2, 99)])), ["result-without-job"]);
    }

    #[test]
    fn a_job_that_is_acknowledged_is_not_handed_out_again() {
        let jobs = |history: &mut History, take| history.keys.get_mut("q.jobs/0").unwrap().takes.push(take);
        assert_eq!(kinds(|history| jobs(history, take(4, 0, 2))), ["redelivered"]);
        let unconfirmed = |history: &mut History| {
            let key = history.keys.get_mut("q.jobs/0").unwrap();
            key.acks[0].confirmed = None;
            key.takes.push(take(4, 0, 2));
        };
        assert_eq!(kinds(unconfirmed), [""; 0], "an acknowledgement without an answer may not have taken effect");
    }

    #[test]
    fn an_attempt_has_one_worker() {
        let twice = |history: &mut History| history.keys.get_mut("q.jobs/0").unwrap().takes.push(take(4, 1, 2));
        assert_eq!(kinds(twice), ["lease-twice"]);
    }

    #[test]
    fn jobs_and_results_find_each_other() {
        assert_eq!(jobs_of("a.b.results/3").as_deref(), Some("a.b.jobs/3"));
        assert_eq!(results_of("a.b.jobs/3").as_deref(), Some("a.b.results/3"));
        assert_eq!((jobs_of("t/0"), results_of("t/0")), (None, None));
    }
}
