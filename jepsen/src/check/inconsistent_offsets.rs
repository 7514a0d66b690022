//! inconsistent-offsets: two values at one offset, whether two replicas, two polls or a poll
//! and an acknowledgement say so.

use super::{Anomaly, Key};

/// Anomalies that are told with who saw which value.
const STORY_COUNT_MAX: usize = 20;

pub(super) fn check(key: &Key<'_>) -> Vec<Anomaly> {
    let disputed = key.order.entries.chunk_by(|one, other| one.0 == other.0).filter(|entries| entries.len() > 1);
    let tell = |(index, entries): (usize, &[(u64, u64)])| {
        let offset = entries[0].0;
        // Who says what takes a walk through all reads; the first ones suffice.
        let named = |value: &u64| match index {
            0..STORY_COUNT_MAX => format!("{value} ({})", teller(key, offset, *value)),
            _ => value.to_string(),
        };
        let tellers = entries.iter().map(|(_, value)| named(value)).collect::<Vec<_>>().join(", ");
        let detail = format!("offset {offset} of {} holds {tellers}", key.name);
        Anomaly::new("inconsistent-offsets", key.name, detail).at(entries[1].1, offset)
    };
    disputed.enumerate().map(tell).collect()
}

/// Who says that `value` stands at `offset`.
fn teller(key: &Key<'_>, offset: u64, value: u64) -> String {
    let read = key.reads.iter().find(|read| read.values.iter().any(|known| known == (offset, Some(value))));
    match read {
        Some(read) => match read.node {
            Some(node) => format!("read on node {node}"),
            None => format!("read by process {}", read.process),
        },
        None => "acknowledged".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::{super::story, *};

    #[test]
    fn replicas_that_disagree_are_named() {
        let mut history = story::good();
        history.reads.pop();
        history.reads.push(story::drain(2, &[(0, 11), (1, 19)]));
        let found = story::run(check, &history);
        assert_eq!(found.len(), 1);
        assert_eq!((found[0].kind, found[0].offset), ("inconsistent-offsets", Some(1)));
        assert!(found[0].detail.contains("19 (read on node 2)"), "{}", found[0].detail);
    }

    #[test]
    fn two_acknowledgements_of_one_offset_disagree() {
        let mut history = story::good();
        history.appends.push(story::acked(23, 1, 50, 60));
        assert_eq!(story::run(check, &history).len(), 1);
    }
}
