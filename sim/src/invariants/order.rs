//! What one producer sent stands in the order of sending, as far as it was acknowledged.

use std::collections::BTreeMap;

use crate::{
    history::{Fact, Place},
    invariants::Facts,
};

pub fn check(facts: &Facts) -> Vec<String> {
    let mut acked: BTreeMap<(u64, &Place), BTreeMap<u64, u64>> = BTreeMap::new();
    for event in &facts.history {
        if let Fact::Acked(offset) = event.fact {
            acked.entry((event.client, &event.place)).or_default().insert(event.value, offset);
        }
    }
    let mut broken = Vec::new();
    for ((client, place), offsets) in acked {
        let pairs = offsets.iter().zip(offsets.iter().skip(1));
        for ((first, at), (second, then)) in pairs.filter(|((_, at), (_, then))| then <= at) {
            let (topic, partition) = (&place.topic, place.partition);
            broken.push(format!(
                "{topic}/{partition}: client {client} sent {first} before {second}, which stand at {at} and {then}"
            ));
        }
    }
    broken
}
