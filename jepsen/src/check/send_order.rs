//! send-order: what one producer sent stands out of order. Sequences count, not answers: also a
//! send whose outcome was unknown must stand, if it does, where its sequence says; so must what
//! is left of a producer's earlier epoch.

use super::{Anomaly, Key};

pub(super) fn check(key: &Key<'_>) -> Vec<Anomaly> {
    // Results are written by whoever holds the lease: there is no order of sending.
    if key.jobs.is_some() {
        return Vec::new();
    }
    let mut sequences: Vec<(u64, u64, u64)> =
        key.appends.iter().map(|append| (append.value, append.producer, append.sequence)).collect();
    sequences.sort_unstable();
    // By producer, sequence and then offset: of a value that stands twice, each place counts.
    let mut sends: Vec<(u64, u64, u64, u64)> = Vec::with_capacity(key.order.entries.len());
    for (offset, value) in &key.order.entries {
        if let Ok(index) = sequences.binary_search_by_key(value, |known| known.0) {
            let (_, producer, sequence) = sequences[index];
            sends.push((producer, sequence, *offset, *value));
        }
    }
    sends.sort_unstable();
    let mut found = Vec::new();
    for pair in sends.windows(2) {
        let ((producer, one, first_offset, first), (other, two, second_offset, second)) = (pair[0], pair[1]);
        if producer == other && one < two && second_offset <= first_offset {
            let detail = format!(
                "producer {producer} sent value {first} (offset {first_offset}) and then value {second} \
                 (offset {second_offset}) to {}",
                key.name
            );
            found.push(Anomaly::new("send-order", key.name, detail).at(second, second_offset));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::{super::story, *};
    use crate::history::{Append, KeyHistory, Outcome};

    fn kinds(appends: Vec<Append>, read: &[(u64, u64)]) -> Vec<&'static str> {
        let history = KeyHistory { appends, reads: vec![story::poll(1, read)], ..KeyHistory::default() };
        story::run(check, &history).iter().map(|anomaly| anomaly.kind).collect()
    }

    fn send(sequence: u64, offset: u64, invoked: u64, time: u64) -> Append {
        Append { producer: 5, sequence, ..story::acked(10 + sequence, offset, invoked, time) }
    }

    #[test]
    fn pipelined_sends_of_one_producer_keep_their_order() {
        assert_eq!(kinds(vec![send(0, 4, 0, 100), send(1, 5, 1, 90)], &[]), [""; 0]);
        assert_eq!(kinds(vec![send(0, 5, 0, 100), send(1, 4, 1, 90)], &[]), ["send-order"]);
    }

    #[test]
    fn concurrent_sends_of_two_producers_may_stand_in_any_order() {
        assert_eq!(kinds(vec![story::acked(1, 5, 0, 100), story::acked(2, 4, 50, 90)], &[]), [""; 0]);
    }

    #[test]
    fn a_send_of_unknown_outcome_stands_before_the_next_one_or_nowhere() {
        let unknown = Append { outcome: Outcome::Unknown, ..send(0, 0, 0, 0) };
        let sends = vec![unknown, send(1, 4, 5, 90)];
        assert_eq!(kinds(sends.clone(), &[]), [""; 0]);
        assert_eq!(kinds(sends.clone(), &[(3, 10), (4, 11)]), [""; 0]);
        assert_eq!(kinds(sends, &[(4, 11), (5, 10)]), ["send-order"]);
    }
}
