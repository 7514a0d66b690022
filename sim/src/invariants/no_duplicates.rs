//! No value stands at two offsets: producers number what they send. One that was seen before its place was trimmed
//! away counts too.

use std::collections::BTreeMap;

use crate::{
    history::{Fact, Place},
    invariants::Facts,
};

pub fn check(facts: &Facts) -> Vec<String> {
    let mut broken = Vec::new();
    let mut seen: BTreeMap<(&Place, u64), u64> = BTreeMap::new();
    let told = facts.history.iter().filter_map(|event| match event.fact {
        Fact::Acked(offset) | Fact::Read(offset) => Some((&event.place, event.value, offset)),
        _ => None,
    });
    let finals = facts.finals.iter().flat_map(|(place, records)| {
        records.iter().filter_map(move |(offset, value)| value.map(|value| (place, value, *offset)))
    });
    for (place, value, offset) in told.chain(finals) {
        let before = *seen.entry((place, value)).or_insert(offset);
        if before != offset {
            let (topic, partition) = (&place.topic, place.partition);
            broken.push(format!("{topic}/{partition}: value {value} stands at offsets {before} and {offset}"));
        }
    }
    broken
}
