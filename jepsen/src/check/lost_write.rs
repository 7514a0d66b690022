//! lost-write: an acknowledged (or read) value at or below the highest position that any poll
//! saw, which the closing read does not show.

use std::collections::{BTreeMap, HashSet};

use super::{Anomaly, Key};

pub(super) fn check(key: &Key<'_>) -> Vec<Anomaly> {
    let offsets = key.reads.iter().flat_map(|read| &read.values).map(|(offset, _)| *offset);
    let Some(highest) = offsets.max() else { return Vec::new() };
    let seen = seen(key);
    // By offset, so that the report reads in the order of the log.
    let mut lost = BTreeMap::new();
    for read in key.reads {
        for (offset, value) in &read.values {
            if let Some(value) = value
                && !seen.contains(value)
            {
                let process = read.process;
                lost.insert((*offset, *value), format!("was read by process {process} and is not in the final read"));
            }
        }
    }
    for append in key.appends {
        if let Some((offset, time)) = append.acked()
            && offset <= highest
            && !seen.contains(&append.value)
        {
            let story = format!("was acknowledged at {time} ns, reads went up to offset {highest}, none shows it");
            lost.entry((offset, append.value)).or_insert(story);
        }
    }
    let tell = |((offset, value), story): ((u64, u64), String)| {
        let detail = format!("value {value} of {} at offset {offset} {story}", key.name);
        Anomaly::new("lost-write", key.name, detail).at(value, offset)
    };
    lost.into_iter().map(tell).collect()
}

/// The values of the closing read; of all reads where there is no closing read.
pub(super) fn seen(key: &Key<'_>) -> HashSet<u64> {
    let closed = key.last_reads().next().is_some();
    let reads = key.reads.iter().filter(|read| read.last || !closed);
    reads.flat_map(|read| &read.values).filter_map(|(_, value)| *value).collect()
}

#[cfg(test)]
mod tests {
    use super::{super::story, *};

    #[test]
    fn a_hole_below_what_was_read_is_a_lost_write() {
        let mut history = story::good();
        for read in &mut history.reads {
            read.values.retain(|(offset, _)| *offset != 0);
        }
        let found = story::run(check, &history);
        assert_eq!(found.len(), 1);
        assert_eq!((found[0].kind, found[0].value, found[0].offset), ("lost-write", Some(11), Some(0)));
        assert!(found[0].detail.contains("value 11 of t/0 at offset 0"), "{}", found[0].detail);
    }

    #[test]
    fn what_a_poll_saw_and_the_final_read_does_not_is_lost_even_at_the_end() {
        let mut history = story::good();
        for read in history.reads.iter_mut().filter(|read| read.last) {
            read.values.truncate(1);
        }
        let found = story::run(check, &history);
        assert_eq!(found.iter().map(|anomaly| anomaly.value).collect::<Vec<_>>(), [Some(17)]);
    }
}
