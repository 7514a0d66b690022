//! unseen: an acknowledged value above everything that was read, although the closing read
//! goes to the end.

use super::{Anomaly, Key};

pub(super) fn check(key: &Key<'_>) -> Vec<Anomaly> {
    let highest = key.highest_read();
    let mut found: Vec<Anomaly> = key
        .appends
        .iter()
        .filter_map(|append| append.acked().map(|(offset, time)| (append.value, offset, time)))
        .filter(|(value, offset, _)| !key.seen.contains(value) && highest.is_none_or(|highest| *offset > highest))
        .filter(|(_, offset, _)| !key.is_excused(*offset))
        .map(|(value, offset, time)| {
            let end = highest.map_or("nothing".to_owned(), |highest| format!("nothing above offset {highest}"));
            let detail = format!(
                "value {value} of {} at offset {offset} was acknowledged at {time} ns, and the final read shows {end}",
                key.name
            );
            Anomaly::new("unseen", key.name, detail).at(value, offset)
        })
        .collect();
    found.sort_by_key(|anomaly| anomaly.offset);
    found
}

#[cfg(test)]
mod tests {
    use super::{super::story, *};

    #[test]
    fn an_acknowledged_tail_that_nobody_reads_is_unseen_and_not_lost() {
        let mut history = story::good();
        history.reads.retain(|read| read.last);
        for read in &mut history.reads {
            read.values = read.values.iter().take(1).collect();
        }
        let found = story::run(check, &history);
        assert_eq!(found.len(), 1);
        assert_eq!((found[0].kind, found[0].value, found[0].offset), ("unseen", Some(17), Some(1)));
        assert_eq!(story::run(super::super::lost_write::check, &history), []);
    }

    #[test]
    fn without_any_read_every_acknowledged_value_is_unseen() {
        let mut history = story::good();
        history.reads.clear();
        assert_eq!(story::run(check, &history).len(), 2);
    }
}
