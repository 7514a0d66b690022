//! duplicate: one value at two offsets.

use super::{Anomaly, Key};

pub(super) fn check(key: &Key<'_>) -> Vec<Anomaly> {
    // A job with two results has a name of its own.
    if key.jobs.is_some() {
        return Vec::new();
    }
    let places = key.order.places();
    let twice = places.chunk_by(|one, other| one.0 == other.0).filter(|places| places.len() > 1);
    twice
        .map(|places| {
            let value = places[0].0;
            let offsets: Vec<u64> = places.iter().map(|(_, offset)| *offset).collect();
            let detail = format!("value {value} of {} stands at offsets {offsets:?}", key.name);
            Anomaly::new("duplicate", key.name, detail).at(value, offsets[1])
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::{super::story, *};

    #[test]
    fn a_value_that_is_read_at_two_offsets_is_a_duplicate() {
        let mut history = story::good();
        history.reads.push(story::drain(1, &[(2, 11)]));
        let found = story::run(check, &history);
        assert_eq!(found.len(), 1);
        assert_eq!((found[0].kind, found[0].value, found[0].offset), ("duplicate", Some(11), Some(2)));
    }

    #[test]
    fn an_acknowledgement_that_names_another_offset_than_the_log_is_one_too() {
        let mut history = story::good();
        history.appends.push(story::acked(23, 2, 50, 60));
        history.reads.push(story::drain(1, &[(3, 23)]));
        assert_eq!(story::run(check, &history)[0].value, Some(23));
    }
}
