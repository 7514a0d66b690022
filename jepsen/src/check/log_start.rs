//! log-start-back: the log start that a reader was told is lower than the one that a reader of the
//! same replica was told before. What was dropped cannot be there again.

use std::collections::HashMap;

use super::{Anomaly, Key};

pub(super) fn check(key: &Key<'_>) -> Vec<Anomaly> {
    let mut reads: Vec<_> = key.reads.iter().filter_map(|read| read.log_start.map(|start| (read, start))).collect();
    reads.sort_by_key(|(read, _)| read.time);
    // Per replica, and for the leader: the highest log starts, by the time when they were told.
    let mut told: HashMap<Option<u64>, Vec<(u64, u64)>> = HashMap::new();
    let mut found = Vec::new();
    for (read, start) in reads {
        let of_node = told.entry(read.node).or_default();
        let before = of_node.partition_point(|(time, _)| *time < read.invoked);
        if let Some((time, highest)) = before.checked_sub(1).map(|index| of_node[index])
            && start < highest
        {
            let on = read.node.map_or(String::new(), |node| format!(" on node {node}"));
            let detail = format!(
                "process {} was told that {} starts at offset {start}{on}; at {time} ns it started at {highest}",
                read.process, key.name
            );
            let anomaly = Anomaly::new("log-start-back", key.name, detail);
            found.push(Anomaly { offset: Some(start), node: read.node, ..anomaly });
        }
        if of_node.last().is_none_or(|(_, highest)| start > *highest) {
            of_node.push((read.time, start));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::{super::story, *};
    use crate::history::{KeyHistory, Read};

    fn count(starts: &[(Option<u64>, u64, u64, u64)]) -> usize {
        let read = |(node, invoked, time, start): &(Option<u64>, u64, u64, u64)| Read {
            node: *node,
            invoked: *invoked,
            time: *time,
            log_start: Some(*start),
            ..Read::default()
        };
        let history = KeyHistory { reads: starts.iter().map(read).collect(), ..KeyHistory::default() };
        story::run(check, &history).len()
    }

    #[test]
    fn a_log_start_does_not_go_back_on_one_replica() {
        assert_eq!(count(&[(None, 0, 10, 0), (None, 20, 30, 5), (None, 40, 50, 5)]), 0);
        assert_eq!(count(&[(None, 20, 30, 5), (None, 40, 50, 4)]), 1);
        assert_eq!(count(&[(Some(1), 20, 30, 5), (Some(2), 40, 50, 4)]), 0, "another replica may lag");
        assert_eq!(count(&[(None, 20, 60, 5), (None, 40, 50, 4)]), 0, "reads at the same time");
    }
}
