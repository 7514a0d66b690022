//! Every job that was acknowledged has one result in the end, no job has two, and what a worker was told is
//! completed has its result.

use std::collections::BTreeMap;

use crate::{
    history::{Fact, Place},
    invariants::Facts,
    workload::queue::{JOBS, RESULTS},
};

pub fn check(facts: &Facts) -> Vec<String> {
    let mut broken = Vec::new();
    let mut counts: BTreeMap<u64, usize> = BTreeMap::new();
    let results = facts.finals.iter().filter(|(place, _)| place.topic == RESULTS);
    for value in results.flat_map(|(_, records)| records.iter().filter_map(|(_, value)| *value)) {
        *counts.entry(value).or_default() += 1;
    }
    for (value, count) in counts.iter().filter(|(_, count)| **count > 1) {
        broken.push(format!("job {value} has {count} results"));
    }
    let is_judged = |place: &Place| {
        // Results that could not be read are not missing; that they could not is another rule.
        facts.finals.contains_key(&Place { topic: RESULTS.to_owned(), partition: place.partition })
    };
    for event in facts.history.iter().filter(|event| event.place.topic == JOBS && is_judged(&event.place)) {
        let what = match event.fact {
            Fact::Acked(_) => "acknowledged",
            Fact::Completed(_) => "completed",
            _ => continue,
        };
        if !counts.contains_key(&event.value) {
            broken.push(format!("job {} was {what} and has no result", event.value));
        }
    }
    broken
}
