//! lost-write: an acknowledged (or read) value at or below the highest position that any poll
//! saw, which the closing read does not show. What every replica has lost to damage that was
//! injected into all of them, and says so, is no lost write.

use std::collections::BTreeMap;

use super::{Anomaly, Key};

pub(super) fn check(key: &Key<'_>) -> Vec<Anomaly> {
    let Some(highest) = key.highest_read() else { return Vec::new() };
    // By offset, so that the report reads in the order of the log.
    let mut lost = BTreeMap::new();
    for read in key.reads.iter().filter(|read| !read.last) {
        for (offset, value) in read.values.iter() {
            if let Some(value) = value
                && !key.seen.contains(&value)
            {
                let process = read.process;
                lost.insert((offset, value), format!("was read by process {process} and is not in the final read"));
            }
        }
    }
    for append in key.appends {
        if let Some((offset, time)) = append.acked()
            && offset <= highest
            && !key.seen.contains(&append.value)
        {
            let story = format!("was acknowledged at {time} ns, reads went up to offset {highest}, none shows it");
            lost.entry((offset, append.value)).or_insert(story);
        }
    }
    let tell = |((offset, value), story): ((u64, u64), String)| {
        let detail = format!("value {value} of {} at offset {offset} {story}", key.name);
        Anomaly::new("lost-write", key.name, detail).at(value, offset)
    };
    lost.into_iter().filter(|((offset, _), _)| !key.is_excused(*offset)).map(tell).collect()
}

#[cfg(test)]
mod tests {
    use super::{super::story, *};

    #[test]
    fn a_hole_below_what_was_read_is_a_lost_write() {
        let mut history = story::good();
        for read in &mut history.reads {
            read.values = read.values.iter().filter(|(offset, _)| *offset != 0).collect();
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
            read.values = read.values.iter().take(1).collect();
        }
        let found = story::run(check, &history);
        assert_eq!(found.iter().map(|anomaly| anomaly.value).collect::<Vec<_>>(), [Some(17)]);
    }
}
