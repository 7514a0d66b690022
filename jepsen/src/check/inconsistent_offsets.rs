//! inconsistent-offsets: two values at one offset, whether two replicas, two polls or a poll
//! and an acknowledgement say so.

use super::{Anomaly, Key};

pub(super) fn check(key: &Key<'_>) -> Vec<Anomaly> {
    let disputed = key.order.at.iter().filter(|(_, values)| values.len() > 1);
    let tell = |(offset, values): (&u64, &Vec<u64>)| {
        let tellers = values.iter().map(|value| format!("{value} ({})", teller(key, *offset, *value)));
        let tellers = tellers.collect::<Vec<_>>().join(", ");
        let detail = format!("offset {offset} of {} holds {tellers}", key.name);
        Anomaly::new("inconsistent-offsets", key.name, detail).at(values[1], *offset)
    };
    disputed.map(tell).collect()
}

/// Who says that `value` stands at `offset`.
fn teller(key: &Key<'_>, offset: u64, value: u64) -> String {
    let read = key.reads.iter().find(|read| read.values.contains(&(offset, Some(value))));
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
