//! poll-skip and nonmonotonic-poll: the positions of one consumer jump over values that exist,
//! or go back, inside one poll or from one poll to the next.

use std::collections::HashMap;

use super::{Anomaly, Key};

pub(super) fn check(key: &Key<'_>) -> Vec<Anomaly> {
    // Where each process stands: the offset that it read last.
    let mut positions: HashMap<u64, u64> = HashMap::new();
    let mut found = Vec::new();
    for read in key.reads {
        for (offset, value) in &read.values {
            let before = positions.insert(read.process, *offset);
            // Bytes that are no value have no place in the order; phantom-read tells of them.
            let (Some(before), Some(value)) = (before, value) else { continue };
            let (Some(rank), Some(rank_before)) = (key.order.rank.get(offset), key.order.rank.get(&before)) else {
                continue;
            };
            let kind = match rank.cmp(&(rank_before + 1)) {
                std::cmp::Ordering::Equal => continue,
                std::cmp::Ordering::Greater => "poll-skip",
                std::cmp::Ordering::Less => "nonmonotonic-poll",
            };
            let on = read.node.map_or(String::new(), |node| format!(" on node {node}"));
            let detail = format!(
                "process {} went from offset {before} to offset {offset} (value {value}) of {}{on}",
                read.process, key.name
            );
            found.push(Anomaly { node: read.node, ..Anomaly::new(kind, key.name, detail).at(*value, *offset) });
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::{super::story, *};
    use crate::history::KeyHistory;

    fn polls(polls: &[&[(u64, u64)]]) -> Vec<(&'static str, Option<u64>)> {
        let all = [(0, 11), (1, 12), (2, 13)];
        let mut reads = vec![story::drain(1, &all), story::drain(2, &all)];
        reads.extend(polls.iter().map(|values| story::poll(7, values)));
        let appends = all.iter().map(|(offset, value)| story::acked(*value, *offset, 0, 1)).collect();
        let found = story::run(check, &KeyHistory { appends, reads, failed_reads: Vec::new() });
        found.iter().map(|anomaly| (anomaly.kind, anomaly.offset)).collect()
    }

    #[test]
    fn jumps_are_found_inside_a_poll_and_between_polls() {
        assert_eq!(polls(&[&[(0, 11), (1, 12)], &[], &[(2, 13)]]), []);
        assert_eq!(polls(&[&[(0, 11), (2, 13)]]), [("poll-skip", Some(2))]);
        assert_eq!(polls(&[&[(0, 11)], &[(2, 13)]]), [("poll-skip", Some(2))]);
        assert_eq!(polls(&[&[(1, 12), (0, 11)]]), [("nonmonotonic-poll", Some(0))]);
        assert_eq!(polls(&[&[(0, 11), (1, 12)], &[(1, 12)]]), [("nonmonotonic-poll", Some(1))]);
    }

    #[test]
    fn a_consumer_may_start_anywhere() {
        assert_eq!(polls(&[&[(1, 12), (2, 13)]]), []);
    }
}
