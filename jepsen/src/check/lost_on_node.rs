//! lost-on-node: a value that stands in the log and is missing on one replica, at the front
//! (prefix), in between (middle) or at the end (tail).

use std::collections::BTreeMap;

use super::{Anomaly, Key};

pub(super) fn check(key: &Key<'_>) -> Vec<Anomaly> {
    let mut of_nodes: BTreeMap<u64, BTreeMap<u64, Option<u64>>> =
        key.nodes.iter().map(|node| (*node, BTreeMap::new())).collect();
    for read in key.last_reads() {
        if let Some(node) = read.node {
            of_nodes.entry(node).or_default().extend(read.values.iter().copied());
        }
    }
    if key.last_reads().all(|read| read.node.is_none()) {
        return Vec::new();
    }
    let mut found = Vec::new();
    for (node, have) in &of_nodes {
        let bounds = have.first_key_value().zip(have.last_key_value()).map(|((first, _), (last, _))| (*first, *last));
        for (offset, values) in &key.order.at {
            for value in values.iter().filter(|value| have.get(offset) != Some(&Some(**value))) {
                // Two values at one offset: the other checker tells it once, not for each node.
                if values.len() > 1 && have.contains_key(offset) {
                    continue;
                }
                let part = match bounds {
                    None => "prefix",
                    Some((first, _)) if *offset < first => "prefix",
                    Some((_, last)) if *offset > last => "tail",
                    Some(_) => "middle",
                };
                let detail = format!(
                    "value {value} of {} at offset {offset} is missing on node {node} ({part}; that node shows {})",
                    key.name,
                    bounds.map_or("nothing".to_owned(), |(first, last)| format!("offsets {first} to {last}"))
                );
                found.push(Anomaly::new(kind(part), key.name, detail).at(*value, *offset).on(*node));
            }
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
            failed_reads: Vec::new(),
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
