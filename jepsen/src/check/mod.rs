//! The judge: every anomaly is a file here, every file has a bad history that it must find.
//!
//! Definitions follow the kafka workload of jepsen-io/jepsen (`tests/kafka.clj`). A checker is
//! a pure function of one key's history; what spans keys is in [`queue`], [`metadata`],
//! [`liveness`] and [`verdict`].

mod aborted_read;
mod duplicate;
mod inconsistent_offsets;
mod linear;
mod liveness;
mod log_start;
mod lost_on_node;
mod lost_write;
mod metadata;
mod order;
mod phantom_read;
mod poll_order;
mod queue;
mod read_error;
mod send_order;
mod tokens;
mod unseen;
mod verdict;
mod wing_gong;

use std::{collections::HashSet, ops::RangeInclusive};

use serde::Serialize;

use crate::history::{Append, FailedRead, Fault, History, KeyHistory, Read};
use order::Order;

pub use liveness::{CONVERGE_SECONDS_MAX, RESUME_SECONDS_MAX};
pub(crate) use read_error::damaged_offsets;
pub(crate) use verdict::harms;
pub use verdict::{FailoverMs, FaultCount, MemoryMib, Verdict, judge};

/// One broken promise, with the value, key and offset it is about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Anomaly {
    /// Which promise, for example `lost-write`.
    pub kind: &'static str,
    /// The partition, as `topic/partition`.
    pub key: String,
    /// The value concerned.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub value: Option<u64>,
    /// Its offset.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub offset: Option<u64>,
    /// The node whose replica shows it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node: Option<u64>,
    /// The whole story in one line.
    pub detail: String,
}

impl Anomaly {
    fn new(kind: &'static str, key: &str, detail: String) -> Self {
        Self { kind, key: key.to_owned(), value: None, offset: None, node: None, detail }
    }

    fn at(self, value: u64, offset: u64) -> Self {
        Self { value: Some(value), offset: Some(offset), ..self }
    }

    fn on(self, node: u64) -> Self {
        Self { node: Some(node), ..self }
    }
}

/// What a checker sees: one key, and the order of its values.
struct Key<'a> {
    name: &'a str,
    appends: &'a [Append],
    reads: &'a [Read],
    failed_reads: &'a [FailedRead],
    /// The nodes that must hold it at the end.
    nodes: &'a [u64],
    faults: &'a [Fault],
    order: &'a Order,
    /// Of a results topic: the jobs.
    jobs: Option<&'a KeyHistory>,
    /// The values of the closing read; of all reads where there is no closing read.
    seen: HashSet<u64>,
    /// Offsets that are damaged on all replicas, by injection, and that readers were told of.
    excused: Vec<RangeInclusive<u64>>,
}

impl<'a> Key<'a> {
    fn new(name: &'a str, key: &'a KeyHistory, history: &'a History, order: &'a Order) -> Self {
        let closed = key.reads.iter().any(|read| read.last);
        let closing = key.reads.iter().filter(|read| read.last || !closed);
        let jobs = queue::jobs_of(name).and_then(|jobs| history.keys.get(&jobs));
        Self {
            name,
            appends: &key.appends,
            reads: &key.reads,
            failed_reads: &key.failed_reads,
            nodes: key.replicas.as_deref().unwrap_or(&history.nodes),
            faults: &history.faults,
            order,
            jobs,
            seen: closing.flat_map(|read| read.values.iter()).filter_map(|(_, value)| value).collect(),
            excused: read_error::excused(name, key, &history.faults),
        }
    }

    /// The closing full read, of all nodes.
    fn last_reads(&self) -> impl Iterator<Item = &Read> {
        self.reads.iter().filter(|read| read.last)
    }

    /// The highest offset that any read showed.
    fn highest_read(&self) -> Option<u64> {
        self.reads.iter().filter_map(|read| read.values.iter().map(|(offset, _)| offset).max()).max()
    }

    fn is_excused(&self, offset: u64) -> bool {
        self.excused.iter().any(|range| range.contains(&offset))
    }
}

/// A checker of one key.
type Check = fn(&Key<'_>) -> Vec<Anomaly>;

/// The checkers of every key.
const KEY_CHECKS: [Check; 13] = [
    lost_write::check,
    unseen::check,
    lost_on_node::check,
    duplicate::check,
    inconsistent_offsets::check,
    aborted_read::check,
    phantom_read::check,
    poll_order::check,
    read_error::check,
    send_order::check,
    linear::check,
    wing_gong::check,
    log_start::check,
];

/// Small histories for the checkers' tests.
#[cfg(test)]
mod story {
    use super::{Anomaly, Check, Key, order::Order};
    use crate::history::{Append, History, KeyHistory, Outcome, Read};

    pub(super) fn acked(value: u64, offset: u64, invoked: u64, time: u64) -> Append {
        append(value, invoked, Outcome::Ok { offset, time })
    }

    /// An append of a process of its own.
    pub(super) fn append(value: u64, invoked: u64, outcome: Outcome) -> Append {
        Append { process: value, producer: 1_000 + value, sequence: 0, value, invoked, outcome }
    }

    pub(super) fn poll(process: u64, values: &[(u64, u64)]) -> Read {
        let values = values.iter().map(|(offset, value)| (*offset, Some(*value))).collect();
        Read { process, invoked: 1_000, time: 1_000, values, ..Read::default() }
    }

    /// A part of the closing read, up to the end of node's replica.
    pub(super) fn drain(node: u64, values: &[(u64, u64)]) -> Read {
        Read { node: Some(node), last: true, tail: true, ..poll(900 + node, values) }
    }

    pub(super) fn run(check: Check, history: &KeyHistory) -> Vec<Anomaly> {
        let order = Order::of(history);
        let whole = History { nodes: vec![1, 2], ..History::default() };
        check(&Key::new("t/0", history, &whole, &order))
    }

    /// Two acknowledged values, polled once and read from both nodes at the end.
    pub(super) fn good() -> KeyHistory {
        KeyHistory {
            appends: vec![acked(11, 0, 0, 10), acked(17, 1, 20, 30), append(19, 40, Outcome::Unknown)],
            reads: vec![
                poll(50, &[(0, 11)]),
                poll(50, &[(1, 17)]),
                drain(1, &[(0, 11), (1, 17)]),
                drain(2, &[(0, 11), (1, 17)]),
            ],
            ..KeyHistory::default()
        }
    }

    #[test]
    fn a_good_history_has_no_anomaly() {
        for check in super::KEY_CHECKS {
            assert_eq!(run(check, &good()), []);
        }
    }

    #[test]
    fn offsets_may_have_gaps_as_long_as_no_value_is_passed_over() {
        let history = KeyHistory {
            appends: vec![acked(11, 0, 0, 10), acked(17, 5, 20, 30)],
            reads: vec![poll(50, &[(0, 11), (5, 17)]), drain(1, &[(0, 11), (5, 17)]), drain(2, &[(0, 11), (5, 17)])],
            ..KeyHistory::default()
        };
        for check in super::KEY_CHECKS {
            assert_eq!(run(check, &history), []);
        }
    }

    #[test]
    fn an_unknown_append_may_be_there_or_not() {
        let mut history = good();
        for read in history.reads.iter_mut().filter(|read| read.last) {
            read.values = read.values.iter().chain([(2, Some(19))]).collect();
        }
        for check in super::KEY_CHECKS {
            assert_eq!(run(check, &history), []);
        }
    }
}
