//! An offset has one value, whoever reads it and whenever, and records follow one another without a gap.

use std::collections::BTreeMap;

use crate::{
    history::{Fact, Place},
    invariants::Facts,
};

pub fn check(facts: &Facts) -> Vec<String> {
    let mut broken = Vec::new();
    let mut values: BTreeMap<(&Place, u64), u64> = BTreeMap::new();
    let mut next: BTreeMap<(u64, &Place), u64> = BTreeMap::new();
    for event in &facts.history {
        let offset = match event.fact {
            Fact::Acked(offset) => offset,
            Fact::Read(offset) => {
                let expected = next.insert((event.client, &event.place), offset + 1);
                if expected.is_some_and(|expected| expected != offset) {
                    broken.push(format!(
                        "{}/{}: reader {} got offset {offset} after {expected:?}",
                        event.place.topic, event.place.partition, event.client
                    ));
                }
                offset
            }
            _ => continue,
        };
        let before = values.insert((&event.place, offset), event.value);
        if before.is_some_and(|before| before != event.value) {
            broken.push(format!(
                "{}/{}@{offset}: was {before:?} and is {}",
                event.place.topic, event.place.partition, event.value
            ));
        }
    }
    let all = facts.finals.iter().map(|(place, records)| (place, 0, records));
    let all = all.chain(facts.replicas.iter().map(|((place, node), records)| (place, *node, records)));
    for (place, node, records) in all {
        for pair in records.windows(2).filter(|pair| pair[1].0 != pair[0].0 + 1) {
            let (topic, partition) = (&place.topic, place.partition);
            broken.push(format!("{topic}/{partition} on node {node}: offset {} comes after {}", pair[1].0, pair[0].0));
        }
    }
    broken
}
