//! phantom-read: a read shows what nobody wrote, or bytes that are no value of the workload.

use std::collections::HashSet;

use super::{Anomaly, Key};

pub(super) fn check(key: &Key<'_>) -> Vec<Anomaly> {
    let written: HashSet<u64> = key.appends.iter().map(|append| append.value).collect();
    let mut told = HashSet::new();
    let mut found = Vec::new();
    for read in key.reads {
        for (offset, value) in read.values.iter() {
            if value.is_some_and(|value| written.contains(&value)) || !told.insert((offset, value)) {
                continue;
            }
            let by = match read.node {
                Some(node) => format!("process {} on node {node}", read.process),
                None => format!("process {}", read.process),
            };
            let detail = match value {
                Some(value) => format!("{by} read value {value} of {} at offset {offset}; nobody wrote it", key.name),
                None => format!("{by} read bytes of {} at offset {offset} that are no value", key.name),
            };
            let anomaly = Anomaly::new("phantom-read", key.name, detail);
            found.push(Anomaly { value, offset: Some(offset), ..anomaly });
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::{super::story, *};

    #[test]
    fn values_from_nowhere_and_changed_bytes_are_found() {
        let mut history = story::good();
        history.reads[0].values = [(0, Some(99))].into_iter().collect();
        history.reads[1].values = [(1, None)].into_iter().collect();
        let found = story::run(check, &history);
        assert_eq!(found.iter().map(|anomaly| anomaly.value).collect::<Vec<_>>(), [Some(99), None]);
        assert!(found.iter().all(|anomaly| anomaly.kind == "phantom-read"));
    }
}
