//! lost-on-node: a value that stands in the log and is missing on one replica, at the front
//! (prefix), in between (middle) or at the end (tail).

use super::{Anomaly, Key};

pub(super) fn check(key: &Key<'_>) -> Vec<Anomaly> {
    if key.last_reads().all(|read| read.node.is_none()) {
        return Vec::new();
    }
    key.nodes.iter().flat_map(|node| on_node(key, *node)).collect()
}

fn on_node(key: &Key<'_>, node: u64) -> Vec<Anomaly> {
    let reads = key.last_reads().filter(|read| read.node == Some(node));
    let mut have: Vec<(u64, Option<u64>)> = reads.flat_map(|read| read.values.iter()).collect();
    have.sort_unstable();
    let bounds = have.first().zip(have.last()).map(|((first, _), (last, _))| (*first, *last));
    let mut found = Vec::new();
    let mut next = 0;
    for entries in key.order.entries.chunk_by(|one, other| one.0 == other.0) {
        let offset = entries[0].0;
        while have.get(next).is_some_and(|(known, _)| *known < offset) {
            next += 1;
        }
        let here = &have[next..];
        let here = &here[..here.partition_point(|(known, _)| *known == offset)];
        // Two values at one offset: the other checker tells it once, not for each node.
        if key.is_excused(offset) || (entries.len() > 1 && !here.is_empty()) {
            continue;
        }
        for (_, value) in entries.iter().filter(|(_, value)| !here.contains(&(offset, Some(*value)))) {
            let part = match bounds {
                None => "prefix",
                Some((first, _)) if offset < first => "prefix",
                Some((_, last)) if offset > last => "tail",
                Some(_) => "middle",
            };
            let detail = format!(
                "value {value} of {} at offset {offset} is missing on node {node} ({part}; that node shows {})",
                key.name,
                bounds.map_or("nothing".to_owned(), |(first, last)| format!("offsets {first} to {last}"))
            );
            found.push(Anomaly::new(kind(part), key.name, detail).at(*value, offset).on(node));
        }
    }
    found
}

fn kind(part: &str) -> &'static str {
    match part {
        "prefix" => "lost-on-node-prefix",
        "tail" => "lost-on-node-tail",
        _ => "lost-on-node-middle",
    }
}

#[cfg(test)]
mod tests {
    use super::{super::story, *};
    use crate::history::KeyHistory;

    fn with_node_2(values: &[(u64, u64)]) -> Vec<(&'static str, Option<u64>, Option<u64>)> {
        let all = [(0, 11), (1, 12), (2, 13)];
        let history = KeyHistory {
            appends: all.iter().map(|(offset, value)| story::acked(*value, *offset, 0, 1)).collect(),
            reads: vec![story::drain(1, &all), story::drain(2, values)],
            ..KeyHistory::default()
        };
        let found = story::run(check, &history);
        assert!(found.iter().all(|anomaly| anomaly.node == Some(2)));
        found.iter().map(|anomaly| (anomaly.kind, anomaly.value, anomaly.offset)).collect()
    }

    #[test]
    fn each_part_of_a_replica_that_is_missing_is_told_apart() {
        assert_eq!(with_node_2(&[(0, 11), (1, 12), (2, 13)]), []);
        assert_eq!(with_node_2(&[(1, 12), (2, 13)]), [("lost-on-node-prefix", Some(11), Some(0))]);
        assert_eq!(with_node_2(&[(0, 11), (2, 13)]), [("lost-on-node-middle", Some(12), Some(1))]);
        assert_eq!(with_node_2(&[(0, 11), (1, 12)]), [("lost-on-node-tail", Some(13), Some(2))]);
        assert_eq!(with_node_2(&[]).len(), 3, "an empty replica misses everything");
    }

    #[test]
    fn a_node_without_a_final_read_misses_everything() {
        let mut history = story::good();
        history.reads.retain(|read| read.node != Some(2));
        assert_eq!(story::run(check, &history).len(), 2);
    }
}
