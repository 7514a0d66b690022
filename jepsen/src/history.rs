//! Histories: what clients asked and what they were told, as JSON lines.
//!
//! ```text
//! {"process":3,"type":"invoke","f":"append","key":"t/0","value":17,"time":100}
//! {"process":3,"type":"ok","f":"append","key":"t/0","value":17,"offset":5,"time":140}
//! {"process":4,"type":"ok","f":"read","key":"t/0","offset":0,"value":[[0,11],[5,17]],"hw":6,"tail":true,"time":190}
//! {"process":"nemesis","type":"invoke","f":"kill","node":2,"leads":["t/0"],"time":200}
//! {"process":"nemesis","type":"info","f":"kill","node":2,"proven":true,"time":205}
//! {"process":"nemesis","type":"info","f":"end","of":"kill","node":2,"time":900}
//! ```
//!
//! `time` is nanoseconds of one monotonic clock. A process has one operation outstanding.
//! `fail` means surely no effect, `info` means unknown; a process is retired after `info`.
//! Values are unique per key. `null` in place of a read value: bytes that no workload wrote.
//! Beyond the plain format, an append may name its `producer` and its `sequence` there (the
//! order of sending when several processes share one pipelined producer).
//!
//! A read begins at `offset` and holds every value from there up to its last one. With `tail` it
//! holds everything from `offset` up to `hw`, the end of the log. Without `node` that is a
//! linearizable read, at the leader; with `node` it is what that replica has. `final` marks the
//! closing full read; in a history without `start` the last reads from offset 0 with `tail` are that. `log_start` is the first offset that the answering replica keeps.
//!
//! Queues: the jobs are appends to `X.jobs/P`. A worker is told of a job (`take`, with value,
//! offset and attempt), writes its result (`result` to `X.results/P`, whose value is the job's;
//! `duplicate` when another result stands already) and acknowledges it (`ack`).
//!
//! Metadata: `create`, `alter` (value: retention in ms) and `delete` have the topic as `key`;
//! `list` is answered by one node with `topics`, pairs of name and retention.
//!
//! Tokens: `access` with `token` (what is wrong with it, or `good`) and `verb`; `ok` is let in, `fail` refused.
//!
//! The nemesis writes `not-run` (detail: which fault, and why not), `memory` now and then (value: bytes that are a node's own),
//! `start` (nodes, keys, seed, workloads), its faults, and `heal` (nodes: the members then). `replicas`
//! by the process "workload" names the nodes that must hold a key at the end.

mod model;
mod parse;

pub use model::{
    Access, Ack, Append, Change, ChangeKind, FailedRead, Fault, History, KeyHistory, Listing, Memory, Outcome, Read,
    Take, TopicHistory,
};

use std::{
    fmt,
    fs::File,
    io::{BufWriter, Write},
    path::{Path, PathBuf},
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use serde::{Deserialize, Deserializer, Serialize, de};

/// The process name of fault injection.
pub const NEMESIS: &str = "nemesis";
/// The process name under which a workload tells what is no operation of a client.
pub const WORKLOAD: &str = "workload";

/// Who did it: a client process, or the nemesis.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(untagged)]
pub enum Process {
    /// A client.
    Number(u64),
    /// [`NEMESIS`] or [`WORKLOAD`].
    Name(String),
}

// By hand, because serde keeps a copy of everything that is untagged, and histories are long.
impl<'de> Deserialize<'de> for Process {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = Process;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "the number or the name of a process")
            }
            fn visit_u64<E: de::Error>(self, number: u64) -> Result<Process, E> {
                Ok(Process::Number(number))
            }
            fn visit_str<E: de::Error>(self, name: &str) -> Result<Process, E> {
                Ok(Process::Name(name.to_owned()))
            }
        }
        from.deserialize_any(Visitor)
    }
}

/// Where an operation stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// It begins.
    Invoke,
    /// It took effect.
    Ok,
    /// It surely had no effect.
    Fail,
    /// It may or may not have had an effect.
    Info,
}

/// What was written or read.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Value {
    /// The value of an append.
    One(u64),
    /// Offsets and values of a read; `None` for bytes that are no value.
    Many(Vec<(u64, Option<u64>)>),
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl<'de> de::Visitor<'de> for Visitor {
            type Value = Value;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a value or pairs of offset and value")
            }
            fn visit_u64<E: de::Error>(self, value: u64) -> Result<Value, E> {
                Ok(Value::One(value))
            }
            fn visit_seq<A: de::SeqAccess<'de>>(self, mut pairs: A) -> Result<Value, A::Error> {
                let mut values = Vec::new();
                while let Some(pair) = pairs.next_element()? {
                    values.push(pair);
                }
                Ok(Value::Many(values))
            }
        }
        from.deserialize_any(Visitor)
    }
}

/// One line of a history.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Line {
    pub process: Process,
    #[serde(rename = "type")]
    pub kind: Kind,
    pub f: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub value: Option<Value>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub offset: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hw: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tail: Option<bool>,
    #[serde(default, rename = "final", skip_serializing_if = "Option::is_none")]
    pub last: Option<bool>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub producer: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sequence: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proven: Option<bool>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub leads: Vec<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub nodes: Vec<u64>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub keys: Vec<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub workloads: Vec<String>,
    /// Of `end`: which fault is over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub of: Option<String>,
    /// Of a fault: how it is proven, in words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
    /// Of a job: which attempt it is, from 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attempt: Option<u64>,
    /// Of a result: another one stands already.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub duplicate: Option<bool>,
    /// Of a read: the first offset that is kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log_start: Option<u64>,
    /// Of `access`: which token is tried.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token: Option<String>,
    /// Of `access`: on what.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verb: Option<String>,
    /// Of `list`: names of topics and their retention in ms.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub topics: Option<Vec<(String, u64)>>,
    pub time: u64,
}

impl Line {
    /// A line of a client; the time is set when it is recorded.
    #[must_use]
    pub fn client(process: u64, kind: Kind, f: &str, key: &str) -> Self {
        Self { key: Some(key.to_owned()), ..Self::empty(Process::Number(process), kind, f) }
    }

    /// A line of the nemesis: something is so from now on.
    #[must_use]
    pub fn nemesis(f: &str) -> Self {
        Self::empty(Process::Name(NEMESIS.to_owned()), Kind::Info, f)
    }

    /// A fault begins; the nemesis' line with the same `f` and `node` ends it and says whether
    /// it is proven that it struck.
    #[must_use]
    pub fn fault(f: &str, node: u64) -> Self {
        Self { kind: Kind::Invoke, node: Some(node), ..Self::nemesis(f) }
    }

    /// The first line: what is tested, and with which seed.
    #[must_use]
    pub fn start(nodes: Vec<u64>, keys: Vec<String>, seed: u64, workloads: Vec<String>) -> Self {
        Self { nodes, keys, seed: Some(seed), workloads, ..Self::nemesis("start") }
    }

    /// The fault `f` on `node` is over.
    #[must_use]
    pub fn ended(f: &str, node: u64) -> Self {
        Self { node: Some(node), of: Some(f.to_owned()), ..Self::nemesis("end") }
    }

    /// The nodes that must hold `key` at the end.
    #[must_use]
    pub fn replicas(key: &str, nodes: Vec<u64>) -> Self {
        Self {
            key: Some(key.to_owned()),
            nodes,
            ..Self::empty(Process::Name(WORKLOAD.to_owned()), Kind::Info, "replicas")
        }
    }

    fn empty(process: Process, kind: Kind, f: &str) -> Self {
        Self {
            process,
            kind,
            f: f.to_owned(),
            key: None,
            value: None,
            offset: None,
            hw: None,
            tail: None,
            last: None,
            node: None,
            producer: None,
            sequence: None,
            error: None,
            proven: None,
            leads: Vec::new(),
            nodes: Vec::new(),
            keys: Vec::new(),
            seed: None,
            workloads: Vec::new(),
            of: None,
            detail: None,
            attempt: None,
            duplicate: None,
            log_start: None,
            token: None,
            verb: None,
            topics: None,
            time: 0,
        }
    }
}

/// Why a history cannot be written, read or judged.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be read or written.
    #[error("history {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// A line that is not in the format or breaks its rules.
    #[error("history line {line}: {problem}")]
    Malformed {
        /// Number of the line, from 1.
        line: usize,
        /// What is wrong with it.
        problem: String,
    },
}

/// Appends to a history file; the lock makes file order and time order one.
pub struct Writer {
    path: PathBuf,
    begin: Instant,
    processes: AtomicU64,
    inner: Mutex<WriterInner>,
}

struct WriterInner {
    out: BufWriter<File>,
    error: Option<std::io::Error>,
}

impl Writer {
    /// Starts a new history at `path`; an older file there is replaced.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn create(path: &Path) -> Result<Self, Error> {
        let out = BufWriter::new(File::create(path).map_err(|source| Error::Io { path: path.to_owned(), source })?);
        Ok(Self {
            path: path.to_owned(),
            begin: Instant::now(),
            processes: AtomicU64::new(0),
            inner: Mutex::new(WriterInner { out, error: None }),
        })
    }

    /// A process number that no other client of this history has.
    #[must_use]
    pub fn new_process(&self) -> u64 {
        self.processes.fetch_add(1, Ordering::Relaxed)
    }

    fn lock(&self) -> MutexGuard<'_, WriterInner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes `line` with the present time. A failed write is reported by [`Writer::finish`].
    pub fn record(&self, mut line: Line) {
        let mut inner = self.lock();
        line.time = self.begin.elapsed().as_nanos() as u64;
        let written = serde_json::to_writer(&mut inner.out, &line)
            .map_err(std::io::Error::from)
            .and_then(|()| inner.out.write_all(b"\n"));
        if let Err(error) = written {
            inner.error.get_or_insert(error);
        }
    }

    /// Brings everything to the file.
    ///
    /// # Errors
    /// The first write that failed: the history is then incomplete and must not be judged.
    pub fn finish(&self) -> Result<(), Error> {
        let mut inner = self.lock();
        let result = match inner.error.take() {
            Some(error) => Err(error),
            None => inner.out.flush(),
        };
        result.map_err(|source| Error::Io { path: self.path.clone(), source })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<History, String> {
        History::read(text.as_bytes()).map_err(|error| error.to_string())
    }

    const INVOKE: &str = r#"{"process":3,"type":"invoke","f":"append","key":"t/0","value":17,"time":100}"#;
    const OK: &str = r#"{"process":3,"type":"ok","f":"append","key":"t/0","value":17,"offset":5,"time":140}"#;

    #[test]
    fn the_documented_lines_are_read() {
        let read_line = r#"{"process":4,"type":"ok","f":"read","key":"t/0","offset":0,"value":[[0,11],[5,17]],"hw":6,"tail":true,"time":190}"#;
        let history = read(&format!("{INVOKE}\n{OK}\n{read_line}\n")).unwrap();
        let key = &history.keys["t/0"];
        assert_eq!(key.appends[0].outcome, Outcome::Ok { offset: 5, time: 140 });
        assert_eq!(key.reads[0].values.iter().collect::<Vec<_>>(), [(0, Some(11)), (5, Some(17))]);
        // Without a line that starts the cluster, the last full read is the closing one.
        assert!(key.reads[0].tail && key.reads[0].last);
    }

    #[test]
    fn an_operation_that_never_ends_is_unknown_and_not_failed() {
        assert_eq!(read(INVOKE).unwrap().keys["t/0"].appends[0].outcome, Outcome::Unknown);
        let info = OK.replace("\"ok\"", "\"info\"");
        assert_eq!(read(&format!("{INVOKE}\n{info}")).unwrap().keys["t/0"].appends[0].outcome, Outcome::Unknown);
    }

    #[test]
    fn broken_rules_are_named_with_their_line() {
        let again = INVOKE.replace("\"process\":3", "\"process\":9").replace("100", "150");
        for (text, problem) in [
            (format!("{INVOKE}\n{INVOKE}"), "line 2: process 3 has an operation outstanding"),
            (OK.to_owned(), "line 1: process 3 completes what it did not invoke"),
            (format!("{INVOKE}\n{again}"), "line 2: value 17 is appended to t/0 a second time"),
            (format!("{INVOKE}\n{}", OK.replace("140", "90")), "line 2: time 90 is before 100"),
            (
                format!("{INVOKE}\n{}\n{again}", OK.replace("\"ok\"", "\"info\""))
                    .replace("\"process\":9", "\"process\":3"),
                "line 3: process 3 acts after its info",
            ),
            (format!("{INVOKE}\n{}", OK.replace("\"offset\":5,", "")), "line 2: offset"),
            ("{\"process\":1".to_owned(), "line 1: EOF"),
            (INVOKE.replace("append", "frob"), "line 1: f \"frob\" is unknown"),
        ] {
            let error = read(&text).unwrap_err();
            assert!(error.contains(problem), "{error} should say {problem}");
        }
    }

    #[test]
    fn what_is_recorded_can_be_loaded() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("history.jsonl");
        let writer = Writer::create(&path).unwrap();
        writer.record(Line::start(vec![1, 2], vec!["t/0".into()], 4, vec!["append".into()]));
        let append = Line { value: Some(Value::One(7)), ..Line::client(0, Kind::Invoke, "append", "t/0") };
        writer.record(append.clone());
        writer.record(Line { kind: Kind::Ok, offset: Some(0), ..append });
        writer.record(Line::client(1, Kind::Invoke, "read", "t/0"));
        writer.record(Line {
            value: Some(Value::Many(vec![(0, Some(7)), (1, None)])),
            last: Some(true),
            ..Line::client(1, Kind::Ok, "read", "t/0")
        });
        writer.finish().unwrap();
        let history = History::load(&path).unwrap();
        assert_eq!((history.seed, history.nodes, history.ops), (Some(4), vec![1, 2], 2));
        assert_eq!(history.keys["t/0"].reads[0].values.iter().collect::<Vec<_>>(), [(0, Some(7)), (1, None)]);
        assert!(History::load(&dir.path().join("none")).unwrap_err().to_string().contains("none"));
    }

    #[test]
    fn queues_and_metadata_are_read() {
        let text = r#"
{"process":1,"type":"invoke","f":"take","key":"q.jobs/0","time":1}
{"process":1,"type":"ok","f":"take","key":"q.jobs/0","value":7,"offset":3,"attempt":1,"time":2}
{"process":1,"type":"ok","f":"take","key":"q.jobs/0","value":8,"offset":4,"attempt":2,"time":2}
{"process":1,"type":"invoke","f":"result","key":"q.results/0","value":7,"attempt":1,"time":3}
{"process":1,"type":"ok","f":"result","key":"q.results/0","value":7,"offset":9,"time":4}
{"process":1,"type":"invoke","f":"result","key":"q.results/0","value":8,"attempt":2,"time":5}
{"process":1,"type":"ok","f":"result","key":"q.results/0","value":8,"duplicate":true,"time":6}
{"process":1,"type":"invoke","f":"ack","key":"q.jobs/0","offset":3,"attempt":1,"time":7}
{"process":1,"type":"ok","f":"ack","key":"q.jobs/0","offset":3,"attempt":1,"time":8}
{"process":2,"type":"invoke","f":"create","key":"m.1","time":9}
{"process":2,"type":"ok","f":"create","key":"m.1","time":10}
{"process":2,"type":"invoke","f":"alter","key":"m.1","value":5,"time":11}
{"process":2,"type":"info","f":"alter","key":"m.1","value":5,"error":"Unavailable: gone","time":12}
{"process":3,"type":"invoke","f":"list","node":2,"time":13}
{"process":3,"type":"ok","f":"list","node":2,"topics":[["m.1",5]],"final":true,"time":14}
{"process":"workload","type":"info","f":"replicas","key":"q.jobs/0","nodes":[1,3],"time":15}
"#;
        let history = read(text.trim_start()).unwrap();
        let jobs = &history.keys["q.jobs/0"];
        let takes: Vec<_> = jobs.takes.iter().map(|take| (take.value, take.offset, take.attempt)).collect();
        assert_eq!(takes, [(Some(7), 3, 1), (Some(8), 4, 2)]);
        assert_eq!((jobs.acks[0].confirmed, jobs.replicas.as_deref()), (Some(8), Some(&[1, 3][..])));
        let results: Vec<_> = history.keys["q.results/0"].appends.iter().map(|append| append.outcome).collect();
        assert_eq!(results, [Outcome::Ok { offset: 9, time: 4 }, Outcome::Unknown]);
        let changes: Vec<_> = history.topics["m.1"].changes.iter().map(|change| change.kind).collect();
        assert_eq!(changes, [ChangeKind::Create, ChangeKind::Alter(5)]);
        assert_eq!(history.topics["m.1"].changes[1].answered, None);
        assert!(history.listings[0].last && history.listings[0].topics["m.1"] == 5);
        assert_eq!(history.keys.keys().collect::<Vec<_>>(), ["q.jobs/0", "q.results/0"], "topics are no keys");
    }

    #[test]
    fn faults_begin_are_proven_and_end() {
        let text = r#"
{"process":"nemesis","type":"invoke","f":"kill","node":2,"leads":["t/0"],"time":1}
{"process":"nemesis","type":"info","f":"kill","node":2,"proven":true,"detail":"signal 9","time":2}
{"process":"nemesis","type":"invoke","f":"pause","node":1,"time":3}
{"process":"nemesis","type":"info","f":"end","of":"kill","node":2,"time":4}
"#;
        let history = read(text.trim_start()).unwrap();
        let faults: Vec<_> = history.faults.iter().map(|it| (it.f.as_str(), it.proven, it.open, it.ended)).collect();
        assert_eq!(faults, [("kill", true, false, Some(4)), ("pause", false, true, None)]);
        assert_eq!(history.faults[0].detail.as_deref(), Some("signal 9"));
    }
}
