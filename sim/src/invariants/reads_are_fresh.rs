//! A linearizable read of the end of a log shows everything that was known to stand there before it began.

use std::collections::BTreeMap;

use crate::{
    history::{Fact, Place},
    invariants::Facts,
};

pub fn check(facts: &Facts) -> Vec<String> {
    // Ends that somebody knew of, by the time from which on; both only rise.
    let mut known: BTreeMap<&Place, Vec<(u64, u64)>> = BTreeMap::new();
    for event in &facts.history {
        let end = match event.fact {
            Fact::Acked(offset) | Fact::Read(offset) => offset + 1,
            Fact::Tail(_, end) => end,
            _ => continue,
        };
        let ends = known.entry(&event.place).or_default();
        if ends.last().is_none_or(|(_, last)| *last < end) {
            ends.push((event.at_ns, end));
        }
    }
    let mut broken = Vec::new();
    for event in &facts.history {
        let Fact::Tail(begun_ns, end) = event.fact else { continue };
        let Some(ends) = known.get(&event.place) else { continue };
        let before = ends.partition_point(|(at_ns, _)| *at_ns < begun_ns);
        if let Some((at_ns, expected)) = before.checked_sub(1).map(|at| ends[at]).filter(|(_, known)| *known > end) {
            broken.push(format!(
                "{}/{}: a linearizable read begun at {} ms ended before offset {end}, and at {} ms the log was known to \
                 reach {expected}",
                event.place.topic,
                event.place.partition,
                begun_ns / 1_000_000,
                at_ns / 1_000_000
            ));
        }
    }
    broken
}
