//! Every record is one that somebody sent, byte by byte, and no reader is told otherwise.

use std::collections::BTreeSet;

use crate::{
    history::{Fact, Place},
    invariants::Facts,
    workload::queue::{JOBS, RESULTS},
};

pub fn check(facts: &Facts) -> Vec<String> {
    let mut broken = Vec::new();
    let mut sent: BTreeSet<(&Place, u64)> = BTreeSet::new();
    for event in &facts.history {
        let (topic, partition) = (&event.place.topic, event.place.partition);
        match &event.fact {
            Fact::Sent => drop(sent.insert((&event.place, event.value))),
            Fact::ReadGarbage(offset) => broken.push(format!("{topic}/{partition}@{offset}: nobody sent these bytes")),
            Fact::ReaderFailed(reason) => broken.push(format!("{topic}/{partition}: a reader was told: {reason}")),
            _ => {}
        }
    }
    for (place, records) in &facts.finals {
        // A result repeats its job.
        let topic = if place.topic == RESULTS { JOBS } else { &place.topic };
        let source = Place { topic: topic.to_owned(), partition: place.partition };
        for (offset, value) in records {
            if value.is_none_or(|value| !sent.contains(&(&source, value))) {
                let (topic, partition) = (&place.topic, place.partition);
                broken.push(format!("{topic}/{partition}@{offset}: {value:?} was never sent there"));
            }
        }
    }
    broken
}
