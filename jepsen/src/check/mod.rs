//! The judge: every anomaly is a file here, every file has a bad history that it must find.
//!
//! Definitions follow the kafka workload of jepsen-io/jepsen (`tests/kafka.clj`). A checker is
//! a pure function of one key's history; what spans keys is in [`liveness`] and [`verdict`].

mod aborted_read;
mod duplicate;
mod inconsistent_offsets;
mod liveness;
mod lost_on_node;
mod lost_write;
mod order;
mod phantom_read;
mod poll_order;
mod read_error;
mod send_order;
mod unseen;
mod verdict;

use serde::Serialize;

use crate::history::{Append, FailedRead, KeyHistory, Read};
use order::Order;

pub use liveness::{CONVERGE_SECONDS_MAX, RESUME_SECONDS_MAX};
pub use verdict::{Verdict, judge};

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
    nodes: &'a [u64],
    order: &'a Order,
}

impl<'a> Key<'a> {
    fn new(name: &'a str, history: &'a KeyHistory, nodes: &'a [u64], order: &'a Order) -> Self {
        let KeyHistory { appends, reads, failed_reads } = history;
        Self { name, appends, reads, failed_reads, nodes, order }
    }

    /// The closing full read, of all nodes.
    fn last_reads(&self) -> impl Iterator<Item = &Read> {
        self.reads.iter().filter(|read| read.last)
    }
}

/// A checker of one key.
type Check = fn(&Key<'_>) -> Vec<Anomaly>;

/// The checkers of the append workload.
const APPEND_CHECKS: [Check; 10] = [
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
];

/// Small histories for the checkers' tests.
#[cfg(test)]
mod story {
    use super::{Anomaly, Check, Key, order::Order};
    use crate::history::{Append, KeyHistory, Outcome, Read};

    pub(super) fn acked(value: u64, offset: u64, invoked: u64, time: u64) -> Append {
        append(value, invoked, Outcome::Ok { offset, time })
    }

    /// An append of a process of its own.
    pub(super) fn append(value: u64, invoked: u64, outcome: Outcome) -> Append {
        Append { process: value, producer: 1_000 + value, sequence: 0, value, invoked, outcome }
    }

    pub(super) fn poll(process: u64, values: &[(u64, u64)]) -> Read {
        let values = values.iter().map(|(offset, value)| (*offset, Some(*value))).collect();
        Read { process, node: None, last: false, tail: false, time: 0, values }
    }

    /// A part of the closing read, up to the end of node's replica.
    pub(super) fn drain(node: u64, values: &[(u64, u64)]) -> Read {
        Read { node: Some(node), last: true, tail: true, ..poll(900 + node, values) }
    }

    pub(super) fn run(check: Check, history: &KeyHistory) -> Vec<Anomaly> {
        let order = Order::of(history);
        check(&Key::new("t/0", history, &[1, 2], &order))
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
            failed_reads: Vec::new(),
        }
    }

    #[test]
    fn a_good_history_has_no_anomaly() {
        for check in super::APPEND_CHECKS {
            assert_eq!(run(check, &good()), []);
        }
    }

    #[test]
    fn offsets_may_have_gaps_as_long_as_no_value_is_passed_over() {
        let history = KeyHistory {
            appends: vec![acked(11, 0, 0, 10), acked(17, 5, 20, 30)],
            reads: vec![poll(50, &[(0, 11), (5, 17)]), drain(1, &[(0, 11), (5, 17)]), drain(2, &[(0, 11), (5, 17)])],
            failed_reads: Vec::new(),
        };
        for check in super::APPEND_CHECKS {
            assert_eq!(run(check, &history), []);
        }
    }

    #[test]
    fn an_unknown_append_may_be_there_or_not() {
        let mut history = good();
        for read in history.reads.iter_mut().filter(|read| read.last) {
            read.values.push((2, Some(19)));
        }
        for check in super::APPEND_CHECKS {
            assert_eq!(run(check, &history), []);
        }
    }
}
