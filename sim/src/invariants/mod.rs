//! What must hold after every run, whatever went wrong in it: a file for each.

mod acked_is_never_lost;
mod log_start_never_back;
mod no_duplicates;
mod nothing_invented;
mod offsets_consistent;
mod one_result_per_job;
mod order;
mod reads_are_fresh;
mod replicas_agree;
mod writes_resume;

use std::collections::{BTreeMap, BTreeSet};

use crate::{
    history::{Event, Place},
    workload::metadata::Front,
};

/// Copies of a partition, where there are as many nodes.
pub const REPLICA_COUNT: usize = 3;

/// What a final read of one partition gave: offsets, and values where the payload is sound.
pub type Records = Vec<(u64, Option<u64>)>;

/// One entry: term, index, first offset, and a hash of its contents.
pub type Entry = (u64, u64, u64, u64);

/// One replica's log as it lies on the disk after the end.
#[derive(Clone, Debug, Default)]
pub struct ReplicaLog {
    /// Node that has it.
    pub node: u64,
    /// Index of the last entry that it knows to be committed; 0: none.
    pub committed: u64,
    /// What it has.
    pub entries: Vec<Entry>,
    /// Offsets and values of its records; only when a partition could not be read in the end.
    pub values: Vec<(u64, u64)>,
    /// Why it could not be read to its end, if so.
    pub failed: Option<String>,
}

/// All that is known about a run after its end.
#[derive(Default)]
pub struct Facts {
    /// What clients saw, in order.
    pub history: Vec<Event>,
    /// Final reads of the leaders, by partition.
    pub finals: BTreeMap<Place, Records>,
    /// Final reads of each replica, by partition and node.
    pub replicas: BTreeMap<(Place, u64), Records>,
    /// The logs on the disks, by group.
    pub logs: BTreeMap<u64, Vec<ReplicaLog>>,
    /// What is known of the fronts of trimmed logs.
    pub fronts: BTreeMap<Place, Front>,
    /// Members of the cluster in the end.
    pub node_count: usize,
    /// Nodes whose disks lost bytes that were synced: what cannot be read there is no surprise.
    pub rotten: BTreeSet<u64>,
    /// What did not come to its end in time after all faults were over.
    pub late: Vec<String>,
}

/// A rule and its name.
type Invariant = (&'static str, fn(&Facts) -> Vec<String>);

const INVARIANTS: [Invariant; 10] = [
    ("acked-is-never-lost", acked_is_never_lost::check),
    // Early: what could not be read in the end may break other rules too.
    ("writes-resume", writes_resume::check),
    ("log-start-never-back", log_start_never_back::check),
    ("no-duplicates", no_duplicates::check),
    ("nothing-invented", nothing_invented::check),
    ("offsets-consistent", offsets_consistent::check),
    ("one-result-per-job", one_result_per_job::check),
    ("order", order::check),
    ("reads-are-fresh", reads_are_fresh::check),
    ("replicas-agree", replicas_agree::check),
];

/// What does not hold: the name of each rule, and what breaks it.
#[must_use]
pub fn check_all(facts: &Facts) -> Vec<(&'static str, String)> {
    let broken = INVARIANTS.iter().flat_map(|(name, check)| check(facts).into_iter().map(|what| (*name, what)));
    broken.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::history::Fact;

    pub fn place() -> Place {
        Place { topic: "sim.log".to_owned(), partition: 0 }
    }

    fn event(client: u64, value: u64, fact: Fact) -> Event {
        Event { at_ns: 0, client, place: place(), value, fact }
    }

    /// A good run: one producer, one reader, three replicas.
    pub fn sound() -> Facts {
        let mut facts = Facts::default();
        for value in 1..=3 {
            facts.history.push(event(1, value, Fact::Sent));
            facts.history.push(event(1, value, Fact::Acked(value - 1)));
            facts.history.push(event(2, value, Fact::Read(value - 1)));
        }
        let records: Records = (0..3).map(|offset| (offset, Some(offset + 1))).collect();
        facts.finals.insert(place(), records.clone());
        for node in 1..=3 {
            facts.replicas.insert((place(), node), records.clone());
            let entries = (1..=3).map(|index| (1, index, index - 1, 7)).collect();
            facts.logs.entry(1).or_default().push(ReplicaLog { node, committed: 3, entries, ..ReplicaLog::default() });
        }
        facts.fronts.insert(place(), Front { starts: vec![0, 0, 1], asked_before: 0 });
        facts.node_count = 3;
        facts
    }

    /// The rules that a change of the good run breaks.
    fn broken(change: impl FnOnce(&mut Facts)) -> Vec<&'static str> {
        let mut facts = sound();
        change(&mut facts);
        let mut names: Vec<_> = check_all(&facts).into_iter().map(|(name, _)| name).collect();
        names.dedup();
        names
    }

    #[test]
    fn a_good_run_breaks_nothing() {
        assert!(broken(|_| {}).is_empty());
    }

    #[test]
    fn a_value_that_is_gone_is_seen() {
        let names = broken(|facts| {
            facts.finals.insert(place(), vec![(0, Some(1)), (1, Some(2))]);
            facts.replicas.values_mut().for_each(|records| records.truncate(2));
        });
        assert_eq!(names, ["acked-is-never-lost"]);
    }

    #[test]
    fn what_was_not_to_be_trimmed_is_gone_and_that_is_seen() {
        let trimmed = |asked_before| {
            broken(|facts| {
                let all = std::iter::once(facts.finals.entry(place()).or_default());
                all.chain(facts.replicas.values_mut()).for_each(|records| drop(records.drain(..2)));
                facts.fronts.insert(place(), Front { starts: vec![0, 2], asked_before });
            })
        };
        assert!(trimmed(2).is_empty());
        assert_eq!(trimmed(1), ["acked-is-never-lost"]);
    }

    #[test]
    fn a_value_on_too_few_disks_of_an_unreadable_partition_is_seen() {
        let on_disks = |counts: [usize; 3]| {
            broken(|facts| {
                facts.finals.clear();
                facts.replicas.clear();
                for (log, count) in facts.logs.entry(1).or_default().iter_mut().zip(counts) {
                    log.values = (0..3).map(|offset| (offset, offset + 1)).take(count).collect();
                }
            })
        };
        assert!(on_disks([3, 0, 3]).is_empty());
        assert_eq!(on_disks([3, 2, 2]), ["acked-is-never-lost"]);
    }

    #[test]
    fn a_read_of_the_end_that_misses_what_was_known_is_seen() {
        let with_tail = |begun_ns, end| {
            broken(|facts| facts.history.push(Event { at_ns: 9, ..event(7, 0, Fact::Tail(begun_ns, end)) }))
        };
        assert!(with_tail(9, 3).is_empty());
        assert!(with_tail(0, 2).is_empty(), "what was learned while it was under way may be missing");
        assert_eq!(with_tail(9, 2), ["reads-are-fresh"]);
    }

    #[test]
    fn a_value_that_came_again_behind_a_trim_is_seen() {
        let names = broken(|facts| {
            facts.finals.insert(place(), vec![(3, Some(1))]);
            facts.replicas.values_mut().for_each(|records| *records = vec![(3, Some(1))]);
            facts.fronts.insert(place(), Front { starts: vec![0, 3], asked_before: 3 });
        });
        assert_eq!(names, ["no-duplicates"]);
    }

    #[test]
    fn a_value_at_two_offsets_is_seen() {
        let names = broken(|facts| {
            let all = std::iter::once(facts.finals.entry(place()).or_default());
            all.chain(facts.replicas.values_mut()).for_each(|records| records.push((3, Some(1))));
        });
        assert_eq!(names, ["no-duplicates"]);
    }

    #[test]
    fn two_values_at_one_offset_and_a_gap_are_seen() {
        assert_eq!(
            broken(|facts| facts.history.push(event(3, 2, Fact::Read(0)))),
            ["acked-is-never-lost", "no-duplicates", "offsets-consistent"]
        );
        assert_eq!(broken(|facts| drop(facts.history.remove(5))), ["offsets-consistent"]);
    }

    #[test]
    fn what_nobody_sent_is_seen() {
        assert_eq!(broken(|facts| drop(facts.history.remove(0))), ["nothing-invented"]);
        assert_eq!(broken(|facts| facts.history.push(event(2, 0, Fact::ReadGarbage(1)))), ["nothing-invented"]);
    }

    #[test]
    fn sends_out_of_order_are_seen() {
        let names = broken(|facts| {
            for event in &mut facts.history {
                event.fact = match event.fact {
                    Fact::Acked(offset) => Fact::Acked(2 - offset),
                    Fact::Read(_) => Fact::Sent,
                    ref other => other.clone(),
                };
            }
            let all = std::iter::once(facts.finals.entry(place()).or_default());
            all.chain(facts.replicas.values_mut())
                .for_each(|records| *records = vec![(0, Some(3)), (1, Some(2)), (2, Some(1))]);
        });
        assert_eq!(names, ["order"]);
    }

    #[test]
    fn replicas_that_differ_are_seen() {
        let differs = |facts: &mut Facts| {
            if let Some(log) = facts.logs.get_mut(&1).and_then(|logs| logs.last_mut()) {
                log.entries[1].3 = 8;
            }
        };
        assert_eq!(broken(differs), ["replicas-agree"]);
        let beyond_commit = |facts: &mut Facts| {
            differs(facts);
            if let Some(log) = facts.logs.get_mut(&1).and_then(|logs| logs.last_mut()) {
                log.committed = 1;
            }
        };
        assert!(broken(beyond_commit).is_empty());
        let shorter = |facts: &mut Facts| {
            facts.replicas.entry((place(), 2)).or_default().pop();
        };
        assert_eq!(broken(shorter), ["replicas-agree"]);
        assert_eq!(broken(|facts| drop(facts.replicas.remove(&(place(), 2)))), ["replicas-agree"]);
        assert!(
            broken(|facts| {
                facts.replicas.remove(&(place(), 2));
                facts.node_count = 2;
            })
            .is_empty()
        );
    }

    #[test]
    fn jobs_without_a_result_or_with_two_are_seen() {
        let with_results = |results: &[u64]| {
            let results: Records = (0..).zip(results.iter().copied().map(Some)).collect();
            broken(|facts| {
                let job = Place { topic: "sim.jobs".to_owned(), partition: 0 };
                for fact in [Fact::Sent, Fact::Acked(0)] {
                    facts.history.push(Event { place: job.clone(), ..event(5, 9, fact) });
                }
                let place = Place { topic: "sim.results".to_owned(), partition: 0 };
                (1..=3).for_each(|node| drop(facts.replicas.insert((place.clone(), node), results.clone())));
                facts.finals.insert(place, results);
                let records: Records = vec![(0, Some(9))];
                (1..=3).for_each(|node| drop(facts.replicas.insert((job.clone(), node), records.clone())));
                facts.finals.insert(job, records);
            })
        };
        assert!(with_results(&[9]).is_empty());
        assert_eq!(with_results(&[]), ["one-result-per-job"]);
        assert_eq!(with_results(&[9, 9]), ["no-duplicates", "one-result-per-job"]);
    }

    #[test]
    fn a_log_start_that_goes_back_and_lateness_are_seen() {
        assert_eq!(broken(|facts| facts.fronts.entry(place()).or_default().starts.push(0)), ["log-start-never-back"]);
        assert_eq!(broken(|facts| facts.late.push("late".to_owned())), ["writes-resume"]);
    }
}
