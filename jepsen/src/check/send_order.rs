//! send-order: acknowledged sends of one producer stand out of order. real-time-order: an
//! append that began after another was acknowledged stands before it.

use super::{Anomaly, Key};
use crate::history::Append;

pub(super) fn check(key: &Key<'_>) -> Vec<Anomaly> {
    let mut found = by_producer(key);
    found.extend(by_time(key));
    found
}

fn by_producer(key: &Key<'_>) -> Vec<Anomaly> {
    let mut sends: Vec<(&Append, u64)> =
        key.appends.iter().filter_map(|append| append.acked().map(|(offset, _)| (append, offset))).collect();
    sends.sort_by_key(|(append, _)| (append.producer, append.sequence));
    let mut found = Vec::new();
    for pair in sends.windows(2) {
        let ((first, first_offset), (second, second_offset)) = (pair[0], pair[1]);
        if first.producer == second.producer && second_offset <= first_offset {
            let detail = format!(
                "producer {} sent value {} (offset {first_offset}) and then value {} (offset {second_offset}) to {}",
                first.producer, first.value, second.value, key.name
            );
            found.push(Anomaly::new("send-order", key.name, detail).at(second.value, second_offset));
        }
    }
    found
}

fn by_time(key: &Key<'_>) -> Vec<Anomaly> {
    let acked = || key.appends.iter().filter_map(|append| append.acked().map(|(offset, time)| (append, offset, time)));
    let mut by_begin: Vec<_> = acked().collect();
    by_begin.sort_by_key(|(append, _, _)| append.invoked);
    let mut by_end: Vec<_> = acked().collect();
    by_end.sort_by_key(|(_, _, time)| *time);
    let mut ended = by_end.into_iter().peekable();
    let mut highest: Option<(u64, u64)> = None;
    let mut found = Vec::new();
    for (append, offset, _) in by_begin {
        while let Some((done, done_offset, _)) = ended.next_if(|(_, _, time)| *time < append.invoked) {
            highest = highest.max(Some((done_offset, done.value)));
        }
        if let Some((before_offset, before)) = highest
            && offset < before_offset
        {
            let detail = format!(
                "value {} of {} was sent after value {before} had been acknowledged at offset {before_offset}, \
                 and stands before it at offset {offset}",
                append.value, key.name
            );
            found.push(Anomaly::new("real-time-order", key.name, detail).at(append.value, offset));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::{super::story, *};
    use crate::history::KeyHistory;

    fn kinds(appends: Vec<Append>) -> Vec<&'static str> {
        let history = KeyHistory { appends, ..KeyHistory::default() };
        story::run(check, &history).iter().map(|anomaly| anomaly.kind).collect()
    }

    fn send(sequence: u64, offset: u64, invoked: u64, time: u64) -> Append {
        Append { producer: 5, sequence, ..story::acked(10 + sequence, offset, invoked, time) }
    }

    #[test]
    fn pipelined_sends_of_one_producer_keep_their_order() {
        assert_eq!(kinds(vec![send(0, 4, 0, 100), send(1, 5, 1, 90)]), [""; 0]);
        assert_eq!(kinds(vec![send(0, 5, 0, 100), send(1, 4, 1, 90)]), ["send-order"]);
    }

    #[test]
    fn concurrent_sends_of_two_producers_may_stand_in_any_order() {
        assert_eq!(kinds(vec![story::acked(1, 5, 0, 100), story::acked(2, 4, 50, 90)]), [""; 0]);
    }

    #[test]
    fn a_later_send_does_not_stand_before_an_acknowledged_one() {
        assert_eq!(kinds(vec![story::acked(1, 5, 0, 100), story::acked(2, 4, 101, 200)]), ["real-time-order"]);
    }
}
