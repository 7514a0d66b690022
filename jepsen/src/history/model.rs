//! What a history says, once it is read: operations by key.

use std::collections::BTreeMap;

/// How an append ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Acknowledged at this offset.
    Ok {
        /// Offset of the acknowledgement.
        offset: u64,
        /// When the acknowledgement came, in nanoseconds.
        time: u64,
    },
    /// Surely not written.
    Fail,
    /// Unknown, or still outstanding at the end.
    Unknown,
}

/// One append; of a results topic, one try to write the result of a job.
#[derive(Clone, Debug)]
pub struct Append {
    pub process: u64,
    pub producer: u64,
    pub sequence: u64,
    pub value: u64,
    pub invoked: u64,
    pub outcome: Outcome,
}

impl Append {
    /// Offset and time of the acknowledgement, if there was one.
    #[must_use]
    pub fn acked(&self) -> Option<(u64, u64)> {
        match self.outcome {
            Outcome::Ok { offset, time } => Some((offset, time)),
            Outcome::Fail | Outcome::Unknown => None,
        }
    }
}

/// Offsets and values of a read, 16 bytes each; a value is `None` for bytes that are none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Values(Box<[(u64, u64)]>);

/// Stands for bytes that are no value; workloads count their values from 1.
const NO_VALUE: u64 = u64::MAX;

impl Values {
    /// Offsets with values, in the order of the answer.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = (u64, Option<u64>)> + Clone + '_ {
        self.0.iter().map(|(offset, value)| (*offset, (*value != NO_VALUE).then_some(*value)))
    }

    /// Number of values.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl FromIterator<(u64, Option<u64>)> for Values {
    fn from_iter<I: IntoIterator<Item = (u64, Option<u64>)>>(values: I) -> Self {
        Self(values.into_iter().map(|(offset, value)| (offset, value.unwrap_or(NO_VALUE))).collect())
    }
}

/// One successful read.
#[derive(Clone, Debug, Default)]
pub struct Read {
    pub process: u64,
    /// The node whose replica answered; `None` for the leader.
    pub node: Option<u64>,
    /// Part of the closing full read.
    pub last: bool,
    /// It holds everything up to `hw`.
    pub tail: bool,
    pub invoked: u64,
    pub time: u64,
    /// Where it begins.
    pub offset: Option<u64>,
    /// The end of the log as the answer tells it.
    pub hw: Option<u64>,
    pub log_start: Option<u64>,
    pub values: Values,
}

/// One read that ended with an error.
#[derive(Clone, Debug)]
pub struct FailedRead {
    pub process: u64,
    pub node: Option<u64>,
    /// Part of the closing full read.
    pub last: bool,
    pub offset: Option<u64>,
    /// The error's code, a colon, and its text.
    pub error: String,
}

/// A job that a worker was told of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Take {
    pub process: u64,
    pub value: Option<u64>,
    pub offset: u64,
    pub attempt: u64,
    pub time: u64,
}

/// A worker's acknowledgement of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ack {
    pub process: u64,
    pub offset: u64,
    pub attempt: u64,
    /// It was confirmed, at this time.
    pub confirmed: Option<u64>,
}

/// What happened to one key (one partition).
#[derive(Debug, Default)]
pub struct KeyHistory {
    pub appends: Vec<Append>,
    pub reads: Vec<Read>,
    pub failed_reads: Vec<FailedRead>,
    pub takes: Vec<Take>,
    pub acks: Vec<Ack>,
    /// The nodes that must hold it at the end; `None`: all.
    pub replicas: Option<Vec<u64>>,
}

/// What is asked of the metadata.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChangeKind {
    Create,
    /// Sets the retention to this time, in ms.
    Alter(u64),
    Delete,
}

/// One change of a topic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change {
    pub process: u64,
    pub kind: ChangeKind,
    pub invoked: u64,
    /// When it was answered; `None` while it is unknown.
    pub answered: Option<u64>,
    pub outcome: Outcome,
}

/// The changes of one topic, by the time of their invocation.
#[derive(Debug, Default)]
pub struct TopicHistory {
    pub changes: Vec<Change>,
}

/// What one node listed.
#[derive(Clone, Debug)]
pub struct Listing {
    pub process: u64,
    pub node: Option<u64>,
    pub last: bool,
    pub invoked: u64,
    pub time: u64,
    /// Names and retention in ms.
    pub topics: BTreeMap<String, u64>,
}

/// A token that was tried.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Access {
    pub process: u64,
    pub key: String,
    /// What is wrong with it, or `good`.
    pub token: String,
    /// What it was tried on.
    pub verb: String,
    pub accepted: bool,
    pub time: u64,
}

/// One thing that the nemesis did.
#[derive(Clone, Debug, Default)]
pub struct Fault {
    pub f: String,
    pub node: Option<u64>,
    pub leads: Vec<String>,
    pub keys: Vec<String>,
    pub detail: Option<String>,
    pub proven: bool,
    /// Whether it struck is not in the history (yet).
    pub open: bool,
    pub time: u64,
    /// When it was over, where the history tells.
    pub ended: Option<u64>,
}

/// What a node had in memory, beyond files that it maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    pub node: u64,
    pub bytes: u64,
    pub time: u64,
}

/// A whole history, by key.
#[derive(Debug, Default)]
pub struct History {
    pub keys: BTreeMap<String, KeyHistory>,
    pub topics: BTreeMap<String, TopicHistory>,
    pub listings: Vec<Listing>,
    pub accesses: Vec<Access>,
    pub faults: Vec<Fault>,
    /// What was asked for and this machine cannot do.
    pub not_run: Vec<String>,
    /// In the order of their times.
    pub memory: Vec<Memory>,
    pub nodes: Vec<u64>,
    /// Those of them that were no members of the cluster any more when all faults were healed.
    pub left: Vec<u64>,
    pub seed: Option<u64>,
    pub workloads: Vec<String>,
    /// Operations invoked.
    pub ops: u64,
    /// Time of the last line.
    pub end: u64,
}
