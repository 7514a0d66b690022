//! Linearizability of one partition, in linear time after sorting, for histories of any length.
//!
//! The object is a log: an append adds its value at the end and answers where it stands, a read of
//! the tail answers the end of the log, `hw`, and the values before it. A history is linearizable
//! when each operation can be given a point in time between its invocation and its completion
//! such that the operations, in the order of these points, do what the answers say.
//!
//! In general that is a search. Here the answers fix the order:
//!
//! - Appends stand in the order of their offsets. (Two at one offset, or one at two, are other
//!   anomalies; the first of them counts here.)
//! - A read that answered `hw` comes after every append below `hw` and before every one at or
//!   above it. Reads with the same answer change nothing and may come in any order.
//!
//! So the operations form a chain of groups, and what is left is to choose points that do not
//! decrease along the chain. *Claim:* they exist exactly if no operation begins after one of a
//! later group has ended. *Proof.* If X stands in an earlier group than Y and begins after Y has
//! ended, X's point would have to be before Y's and after it: there are none. Otherwise give each
//! operation the latest invocation among those of its own and of all earlier groups that belong
//! before it, that is the maximum of its own invocation and of those of all earlier groups. Points
//! then never decrease from group to group; each is at or after the operation's invocation; and
//! each is at or before its end, since the maximum is an invocation of its own or of an operation
//! of an earlier group, which by assumption does not begin after it has ended. ∎
//!
//! Three details. An append whose outcome is unknown and which nobody saw may never have taken
//! effect and is left out; one that somebody saw has ended when it was seen first. So has every
//! append: who sees a value knows that it stands. And the values of a read are compared with the
//! log directly: everything from `offset` up to `hw`, nothing else.
//!
//! One pass from the end of the chain with the earliest end so far finds every violation. What it
//! finds has a name by the two operations:
//!
//! | begins too late | has ended before | anomaly |
//! |---|---|---|
//! | a read | an append that it does not show | `stale-read` |
//! | a read | a read that shows more | `tail-went-back` |
//! | an append | an append that stands behind it | `real-time-order` |
//! | an append | a read that shows it | `future-read` |
//!
//! `tail-hole`: a read of the tail lacks a value below its `hw`, or has one that is not in the log.

use super::{Anomaly, Key};

/// One operation of the chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Step {
    /// Twice the offset, and one more for an append: a read comes before the append at its `hw`.
    pub(super) place: u64,
    pub(super) invoked: u64,
    /// `u64::MAX` while it is not known to have ended.
    pub(super) ended: u64,
    /// Of an append its value, of a read its index in the history.
    pub(super) id: u64,
}

impl Step {
    pub(super) fn is_append(&self) -> bool {
        self.place % 2 == 1
    }

    /// The offset of an append; the `hw` of a read.
    pub(super) fn offset(&self) -> u64 {
        self.place / 2
    }
}

/// The operations of a key in the order that their answers fix.
pub(super) fn chain(key: &Key<'_>) -> Vec<Step> {
    // When each value was seen first, in the order of the entries.
    let entries = &key.order.entries;
    let mut seen = vec![u64::MAX; entries.len()];
    for read in key.reads {
        let mut hint = 0;
        for (offset, value) in read.values.iter() {
            let Some(value) = value else { continue };
            let index = match entries.get(hint) == Some(&(offset, value)) {
                true => hint,
                false => match entries.binary_search(&(offset, value)) {
                    Ok(index) => index,
                    Err(_) => continue,
                },
            };
            seen[index] = seen[index].min(read.time);
            hint = index + 1;
        }
    }
    let mut invoked: Vec<(u64, u64, u64)> = Vec::with_capacity(key.appends.len());
    for append in key.appends {
        let ended = append.acked().map_or(u64::MAX, |(_, time)| time);
        invoked.push((append.value, append.invoked, ended));
    }
    invoked.sort_unstable();
    let mut steps = Vec::with_capacity(entries.len());
    for (index, (offset, value)) in entries.iter().enumerate() {
        if index > 0 && entries[index - 1].0 == *offset {
            continue;
        }
        let at = invoked.partition_point(|(known, _, _)| known < value);
        let Some((_, begun, ended)) = invoked.get(at).filter(|(known, _, _)| known == value) else { continue };
        steps.push(Step { place: offset * 2 + 1, invoked: *begun, ended: (*ended).min(seen[index]), id: *value });
    }
    for (index, read) in key.reads.iter().enumerate() {
        if let Some(hw) = read.hw.filter(|_| read.tail && read.node.is_none()) {
            steps.push(Step { place: hw * 2, invoked: read.invoked, ended: read.time, id: index as u64 });
        }
    }
    steps.sort_unstable_by_key(|step| (step.place, step.invoked));
    steps
}

/// Pairs of steps, the first of which stands before the second and begins after its end.
pub(super) fn violations(chain: &[Step]) -> Vec<(Step, Step)> {
    let mut found = Vec::new();
    // Of all later groups: what ended first; of equals the nearest, which tells most.
    let mut earliest: Option<Step> = None;
    for group in chain.chunk_by(|one, other| one.place == other.place).rev() {
        if let Some(later) = earliest {
            found.extend(group.iter().filter(|step| step.invoked > later.ended).map(|step| (*step, later)));
        }
        let first = group.iter().min_by_key(|step| step.ended).copied();
        earliest = [first, earliest].into_iter().flatten().min_by_key(|step| step.ended);
    }
    found.reverse();
    found
}

pub(super) fn check(key: &Key<'_>) -> Vec<Anomaly> {
    // Results are tried by many workers: what matters is in the queue's checker.
    if key.jobs.is_some() {
        return Vec::new();
    }
    let mut found: Vec<Anomaly> =
        violations(&chain(key)).into_iter().map(|(late, early)| tell(key, late, early)).collect();
    found.extend(holes(key));
    found
}

fn tell(key: &Key<'_>, late: Step, early: Step) -> Anomaly {
    let process = |step: Step| key.reads.get(step.id as usize).map_or(0, |read| read.process);
    let (name, begun, ended) = (key.name, late.invoked, early.ended);
    match (late.is_append(), early.is_append()) {
        (false, true) => {
            let detail = format!(
                "process {} began to read the tail of {name} at {begun} ns and was told that it ends at offset {}; \
                 value {} at offset {} was known to stand at {ended} ns",
                process(late),
                late.offset(),
                early.id,
                early.offset()
            );
            Anomaly::new("stale-read", name, detail).at(early.id, early.offset())
        }
        (false, false) => {
            let detail = format!(
                "process {} began to read the tail of {name} at {begun} ns and was told that it ends at offset {}; \
                 process {} had been told {} at {ended} ns",
                process(late),
                late.offset(),
                process(early),
                early.offset()
            );
            Anomaly { offset: Some(late.offset()), ..Anomaly::new("tail-went-back", name, detail) }
        }
        (true, true) => {
            let detail = format!(
                "value {} of {name} was sent after value {} had been acknowledged at offset {}, and stands before \
                 it at offset {}",
                late.id,
                early.id,
                early.offset(),
                late.offset()
            );
            Anomaly::new("real-time-order", name, detail).at(late.id, late.offset())
        }
        (true, false) => {
            let detail = format!(
                "value {} of {name} at offset {} was sent at {begun} ns, after process {} had read the tail up to \
                 offset {}",
                late.id,
                late.offset(),
                process(early),
                early.offset()
            );
            Anomaly::new("future-read", name, detail).at(late.id, late.offset())
        }
    }
}

/// What reads of the tail lack of the log from their offset to their `hw`.
fn holes(key: &Key<'_>) -> Vec<Anomaly> {
    let entries = &key.order.entries;
    let mut found = Vec::new();
    for read in key.reads.iter().filter(|read| read.tail && read.node.is_none()) {
        let (Some(offset), Some(hw)) = (read.offset, read.hw) else { continue };
        let from = entries.partition_point(|(known, _)| *known < offset);
        let to = entries.partition_point(|(known, _)| *known < hw).max(from);
        let shown = read.values.iter().filter_map(|(offset, value)| value.map(|value| (offset, value)));
        // Equal in nearly every read: no need to look closer.
        if shown.clone().eq(entries[from..to].iter().copied()) {
            continue;
        }
        let mut shown: Vec<_> = shown.collect();
        shown.sort_unstable();
        let lacking = |entry: &&(u64, u64)| shown.binary_search(entry).is_err() && !key.is_excused(entry.0);
        for (offset, value) in entries[from..to].iter().filter(lacking) {
            let detail = format!(
                "process {} read the tail of {} from offset {:?} to {hw}; value {value} at offset {offset} is not in it",
                read.process,
                key.name,
                read.offset.unwrap_or_default()
            );
            found.push(Anomaly::new("tail-hole", key.name, detail).at(*value, *offset));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::{super::story, *};
    use crate::history::{Append, KeyHistory, Outcome, Read};

    fn tail(process: u64, offset: u64, hw: u64, invoked: u64, time: u64, values: &[(u64, u64)]) -> Read {
        Read { tail: true, offset: Some(offset), hw: Some(hw), invoked, time, ..story::poll(process, values) }
    }

    fn kinds(appends: Vec<Append>, reads: Vec<Read>) -> Vec<&'static str> {
        let history = KeyHistory { appends, reads, ..KeyHistory::default() };
        story::run(check, &history).iter().map(|anomaly| anomaly.kind).collect()
    }

    #[test]
    fn a_later_send_does_not_stand_before_an_acknowledged_one() {
        let concurrent = vec![story::acked(1, 5, 0, 100), story::acked(2, 4, 50, 200)];
        assert_eq!(kinds(concurrent, vec![]), [""; 0]);
        let later = vec![story::acked(1, 5, 0, 100), story::acked(2, 4, 101, 200)];
        assert_eq!(kinds(later, vec![]), ["real-time-order"]);
    }

    #[test]
    fn a_read_of_the_tail_shows_what_was_acknowledged_before_it_began() {
        let appends = || vec![story::acked(1, 0, 0, 10), story::acked(2, 1, 20, 30)];
        assert_eq!(kinds(appends(), vec![tail(9, 0, 2, 31, 40, &[(0, 1), (1, 2)])]), [""; 0]);
        assert_eq!(kinds(appends(), vec![tail(9, 0, 1, 29, 40, &[(0, 1)])]), [""; 0], "it began before");
        assert_eq!(kinds(appends(), vec![tail(9, 0, 1, 31, 40, &[(0, 1)])]), ["stale-read"]);
        assert_eq!(kinds(appends(), vec![tail(9, 0, 2, 31, 40, &[(1, 2)])]), ["tail-hole"]);
    }

    #[test]
    fn what_was_read_once_is_read_by_all_who_begin_later() {
        let unknown =
            || vec![story::acked(1, 0, 0, 10), Append { process: 2, ..story::append(2, 20, Outcome::Unknown) }];
        let (both, one) = ([(0, 1), (1, 2)], [(0, 1)]);
        let reads = vec![tail(8, 0, 2, 30, 40, &both), tail(9, 0, 1, 41, 50, &one)];
        // Once as the end of the log, once as the value, which was known to stand.
        assert_eq!(kinds(unknown(), reads), ["stale-read"]);
        let reads = vec![tail(8, 0, 3, 30, 40, &one), tail(9, 0, 2, 41, 50, &one)];
        assert_eq!(kinds(vec![story::acked(1, 0, 0, 10)], reads), ["tail-went-back"]);
        let polled = vec![story::poll(7, &both), tail(9, 0, 1, 1_001, 1_050, &one)];
        assert_eq!(kinds(unknown(), polled), ["stale-read"], "a poll is enough to know");
    }

    #[test]
    fn nobody_reads_what_is_not_sent_yet() {
        let appends = vec![story::acked(1, 0, 0, 10), story::acked(2, 1, 60, 70)];
        let reads = vec![tail(9, 0, 2, 20, 30, &[(0, 1), (1, 2)])];
        assert_eq!(kinds(appends, reads), ["future-read"]);
    }
}
