//! Replicas of a group have the same entries, up to what each knows to be committed, and give readers
//! the same records; and there are as many as the topic asks for.

use std::collections::BTreeMap;

use crate::invariants::{Entry, Facts, REPLICA_COUNT, Records};

pub fn check(facts: &Facts) -> Vec<String> {
    let mut broken = Vec::new();
    for (group, logs) in &facts.logs {
        let mut entries: BTreeMap<u64, (Entry, u64)> = BTreeMap::new();
        for log in logs {
            if let Some(reason) = log.failed.as_ref().filter(|_| !facts.rotten.contains(&log.node)) {
                broken.push(format!("group {group} on node {}: its log cannot be read: {reason}", log.node));
            }
            for entry in log.entries.iter().filter(|entry| entry.1 <= log.committed) {
                let (other, node) = entries.entry(entry.1).or_insert((*entry, log.node));
                if other != entry {
                    broken.push(format!(
                        "group {group}, entry {}: {other:?} on node {node}, {entry:?} on node {}",
                        entry.1, log.node
                    ));
                }
            }
        }
    }
    for place in facts.finals.keys() {
        let count = facts.replicas.keys().filter(|(other, _)| other == place).count();
        let needed = facts.node_count.min(REPLICA_COUNT);
        if count < needed {
            let (topic, partition) = (&place.topic, place.partition);
            broken.push(format!("{topic}/{partition}: {count} replicas could be read, not {needed}"));
        }
    }
    for ((place, node), records) in &facts.replicas {
        let Some(leader) = facts.finals.get(place) else { continue };
        // Each drops the front of its log in its own time.
        let first = |records: &Records| records.first().map_or(0, |(offset, _)| *offset);
        let from = first(records).max(first(leader));
        let tail =
            |records: &Records| records.iter().filter(|(offset, _)| *offset >= from).copied().collect::<Records>();
        let expected = tail(leader);
        if tail(records) != expected {
            broken.push(format!(
                "{}/{}: node {node} gives {} records from {from} on, the leader {}",
                place.topic,
                place.partition,
                records.len(),
                expected.len()
            ));
        }
    }
    broken
}
