//! poll-skip and nonmonotonic-poll: the positions of one consumer jump over values that exist,
//! or go back, inside one poll or from one poll to the next; or a read passes over values
//! between the offset that it was asked for and its first one.

use std::{cmp::Ordering, collections::HashMap};

use super::{Anomaly, Key};
use crate::history::Read;

/// Where a process stands.
#[derive(Clone, Copy)]
struct Position {
    offset: u64,
    rank: usize,
}

pub(super) fn check(key: &Key<'_>) -> Vec<Anomaly> {
    let mut positions: HashMap<u64, Position> = HashMap::new();
    let mut found = Vec::new();
    for read in key.reads {
        let mut position = positions.get(&read.process).copied();
        found.extend(begins(key, read));
        for (offset, value) in read.values.iter() {
            let hint = position.map_or_else(|| key.order.rank_from(offset), |at| at.rank + 1);
            let before = position;
            let rank = key.order.rank(offset, hint);
            // Bytes that are no value have no place in the order; phantom-read tells of them.
            let (Some(rank), Some(value)) = (rank, value) else { continue };
            position = Some(Position { offset, rank });
            let Some(before) = before else { continue };
            let kind = match rank.cmp(&(before.rank + 1)) {
                Ordering::Equal => continue,
                Ordering::Greater if is_excused(key, before.rank + 1, rank) => continue,
                Ordering::Greater => "poll-skip",
                Ordering::Less => "nonmonotonic-poll",
            };
            let detail = format!(
                "process {} went from offset {} to offset {offset} (value {value}) of {}{}",
                read.process,
                before.offset,
                key.name,
                on(read)
            );
            found.push(Anomaly { node: read.node, ..Anomaly::new(kind, key.name, detail).at(value, offset) });
        }
        if let Some(position) = position {
            positions.insert(read.process, position);
        }
    }
    found
}

/// What a read passed over before its first value. That it stops short of the end is allowed.
fn begins(key: &Key<'_>, read: &Read) -> Option<Anomaly> {
    let (asked, (first, value)) = (read.offset?, read.values.iter().next()?);
    let rank_asked = key.order.rank_from(asked.max(read.log_start.unwrap_or(0)));
    let rank_first = key.order.rank(first, rank_asked)?;
    let value = value?;
    if rank_first <= rank_asked || is_excused(key, rank_asked, rank_first) {
        return None;
    }
    let detail = format!(
        "process {} asked for offset {asked} of {} and got offset {first} (value {value}) first; offset {} was passed over{}",
        read.process,
        key.name,
        key.order.offset(rank_asked).unwrap_or(asked),
        on(read)
    );
    Some(Anomaly { node: read.node, ..Anomaly::new("poll-skip", key.name, detail).at(value, first) })
}

fn on(read: &Read) -> String {
    read.node.map_or(String::new(), |node| format!(" on node {node}"))
}

/// Whether everything from one rank up to another is damaged on all replicas.
fn is_excused(key: &Key<'_>, from: usize, to: usize) -> bool {
    (from..to).all(|rank| key.order.offset(rank).is_some_and(|offset| key.is_excused(offset)))
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
        let found = story::run(check, &KeyHistory { appends, reads, ..KeyHistory::default() });
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

    #[test]
    fn a_read_begins_where_it_was_asked_to() {
        let all = [(0, 11), (1, 12), (2, 13)];
        let asked = |offset| crate::history::Read { offset: Some(offset), ..story::poll(7, &[(2, 13)]) };
        for (offset, kinds) in [(2, vec![]), (1, vec!["poll-skip"]), (0, vec!["poll-skip"])] {
            let history = KeyHistory {
                appends: all.iter().map(|(offset, value)| story::acked(*value, *offset, 0, 1)).collect(),
                reads: vec![story::drain(1, &all), story::drain(2, &all), asked(offset)],
                ..KeyHistory::default()
            };
            let found = story::run(check, &history);
            assert_eq!(found.iter().map(|anomaly| anomaly.kind).collect::<Vec<_>>(), kinds, "offset {offset}");
        }
    }
}
