//! aborted-read: a poll saw a value whose writer was told that it is surely not written.

use std::collections::HashSet;

use super::{Anomaly, Key};
use crate::history::Outcome;

pub(super) fn check(key: &Key<'_>) -> Vec<Anomaly> {
    let failed = key.appends.iter().filter(|append| append.outcome == Outcome::Fail).map(|append| append.value);
    let failed: HashSet<u64> = failed.collect();
    let mut told = HashSet::new();
    let mut found = Vec::new();
    if failed.is_empty() {
        return found;
    }
    for read in key.reads {
        for (offset, value) in read.values.iter() {
            if let Some(value) = value
                && failed.contains(&value)
                && told.insert(value)
            {
                let detail = format!(
                    "value {value} of {} was refused as surely not written, and process {} read it at offset {offset}",
                    key.name, read.process
                );
                found.push(Anomaly::new("aborted-read", key.name, detail).at(value, offset));
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::{super::story, *};

    #[test]
    fn a_refused_value_that_is_read_is_told_once() {
        let mut history = story::good();
        history.appends[1].outcome = Outcome::Fail;
        let found = story::run(check, &history);
        assert_eq!(found.len(), 1);
        assert_eq!((found[0].kind, found[0].value, found[0].offset), ("aborted-read", Some(17), Some(1)));
    }
}
