//! Histories: what clients asked and what they were told, as JSON lines.
//!
//! ```text
//! {"process":3,"type":"invoke","f":"append","key":"t/0","value":17,"time":100}
//! {"process":3,"type":"ok","f":"append","key":"t/0","value":17,"offset":5,"time":140}
//! {"process":4,"type":"ok","f":"read","key":"t/0","offset":0,"value":[[0,11],[5,17]],"hw":6,"tail":true,"time":190}
//! {"process":"nemesis","type":"invoke","f":"kill","node":2,"leads":["t/0"],"time":200}
//! {"process":"nemesis","type":"info","f":"kill","node":2,"proven":true,"time":205}
//! ```
//!
//! `time` is nanoseconds of one monotonic clock. A process has one operation outstanding.
//! `fail` means surely no effect, `info` means unknown; a process is retired after `info`.
//! Values are unique per key. `null` in place of a read value: bytes that no workload wrote.
//! Beyond the plain format, an append may name its `producer` and its `sequence` there (the
//! order of sending when several processes share one pipelined producer), and a read the
//! `node` whose replica answered and `final` when it is part of the closing full read.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fs::File,
    io::{BufRead, BufReader, BufWriter, Write},
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use serde::{Deserialize, Serialize};

/// The process name of fault injection.
pub const NEMESIS: &str = "nemesis";

/// Who did it: a client process, or the nemesis.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Process {
    /// A client.
    Number(u64),
    /// [`NEMESIS`].
    Name(String),
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
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Value {
    /// The value of an append.
    One(u64),
    /// Offsets and values of a read; `None` for bytes that are no value.
    Many(Vec<(u64, Option<u64>)>),
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
        Ok(Self { path: path.to_owned(), begin: Instant::now(), inner: Mutex::new(WriterInner { out, error: None }) })
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

/// One append.
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

/// One successful read.
#[derive(Clone, Debug)]
pub struct Read {
    pub process: u64,
    pub node: Option<u64>,
    pub last: bool,
    pub tail: bool,
    pub time: u64,
    pub values: Vec<(u64, Option<u64>)>,
}

/// One read that ended with an error.
#[derive(Clone, Debug)]
pub struct FailedRead {
    pub process: u64,
    pub node: Option<u64>,
    /// The error's code, a colon, and its text.
    pub error: String,
}

/// What happened to one key (one partition).
#[derive(Debug, Default)]
pub struct KeyHistory {
    pub appends: Vec<Append>,
    pub reads: Vec<Read>,
    pub failed_reads: Vec<FailedRead>,
}

/// One thing that the nemesis did.
#[derive(Clone, Debug)]
pub struct Fault {
    pub f: String,
    pub node: Option<u64>,
    pub leads: Vec<String>,
    pub proven: bool,
    /// Its end is not in the history (yet).
    pub open: bool,
    pub time: u64,
}

/// A whole history, by key.
#[derive(Debug, Default)]
pub struct History {
    pub keys: BTreeMap<String, KeyHistory>,
    pub faults: Vec<Fault>,
    pub nodes: Vec<u64>,
    pub seed: Option<u64>,
    /// Operations invoked.
    pub ops: u64,
    /// Time of the last line.
    pub end: u64,
}

/// What a process is waiting for.
enum Open {
    Append { key: String, index: usize },
    Read { key: String },
}

/// Reads a history and holds it to the rules of the format.
#[derive(Default)]
struct Parser {
    history: History,
    open: HashMap<u64, Open>,
    retired: HashSet<u64>,
    written: HashSet<(String, u64)>,
}

impl History {
    /// Reads the history at `path`.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::Malformed`] naming the line.
    pub fn load(path: &Path) -> Result<Self, Error> {
        let io = |source| Error::Io { path: path.to_owned(), source };
        Self::read(BufReader::new(File::open(path).map_err(io)?)).map_err(|error| match error {
            Error::Io { source, .. } => io(source),
            other => other,
        })
    }

    /// Reads a history from lines.
    ///
    /// # Errors
    /// As [`History::load`].
    pub fn read(lines: impl BufRead) -> Result<Self, Error> {
        let mut parser = Parser::default();
        for (index, line) in lines.lines().enumerate() {
            let text = line.map_err(|source| Error::Io { path: PathBuf::new(), source })?;
            if text.trim().is_empty() {
                continue;
            }
            let malformed = |problem| Error::Malformed { line: index + 1, problem };
            let line: Line = serde_json::from_str(&text).map_err(|error| malformed(error.to_string()))?;
            parser.take(line).map_err(malformed)?;
        }
        Ok(parser.history)
    }
}

impl Parser {
    fn take(&mut self, line: Line) -> Result<(), String> {
        if line.time < self.history.end {
            return Err(format!("time {} is before {}, the time of an earlier line", line.time, self.history.end));
        }
        self.history.end = line.time;
        match &line.process {
            Process::Name(name) if name == NEMESIS => {
                self.nemesis(line);
                Ok(())
            }
            Process::Name(name) => Err(format!("process {name:?} is neither a number nor \"{NEMESIS}\"")),
            Process::Number(process) => self.client(*process, line),
        }
    }

    fn nemesis(&mut self, line: Line) {
        if line.f == "start" {
            self.history.nodes = line.nodes;
            self.history.seed = line.seed;
            for key in line.keys {
                self.history.keys.entry(key).or_default();
            }
            return;
        }
        let begun = |fault: &&mut Fault| {
            line.kind != Kind::Invoke && fault.open && fault.f == line.f && fault.node == line.node
        };
        if let Some(fault) = self.history.faults.iter_mut().rev().find(begun) {
            fault.open = false;
            fault.proven = line.proven.unwrap_or(false);
            return;
        }
        self.history.faults.push(Fault {
            open: line.kind == Kind::Invoke,
            f: line.f,
            node: line.node,
            leads: line.leads,
            proven: line.proven.unwrap_or(false),
            time: line.time,
        });
    }

    fn client(&mut self, process: u64, line: Line) -> Result<(), String> {
        if self.retired.contains(&process) {
            return Err(format!("process {process} acts after its info"));
        }
        match line.kind {
            Kind::Invoke => self.invoke(process, line),
            Kind::Ok | Kind::Fail | Kind::Info => self.complete(process, line),
        }
    }

    fn invoke(&mut self, process: u64, line: Line) -> Result<(), String> {
        if self.open.contains_key(&process) {
            return Err(format!("process {process} has an operation outstanding already"));
        }
        let key = line.key.ok_or("key is missing")?;
        let of_key = self.history.keys.entry(key.clone()).or_default();
        let open = match line.f.as_str() {
            "append" => {
                let Some(Value::One(value)) = line.value else { return Err("value of an append is no number".into()) };
                if !self.written.insert((key.clone(), value)) {
                    return Err(format!("value {value} is appended to {key} a second time"));
                }
                of_key.appends.push(Append {
                    process,
                    producer: line.producer.unwrap_or(process),
                    sequence: line.sequence.unwrap_or(self.history.ops),
                    value,
                    invoked: line.time,
                    outcome: Outcome::Unknown,
                });
                Open::Append { key, index: of_key.appends.len() - 1 }
            }
            "read" => Open::Read { key },
            other => return Err(format!("f {other:?} is unknown")),
        };
        self.history.ops += 1;
        self.open.insert(process, open);
        Ok(())
    }

    fn complete(&mut self, process: u64, line: Line) -> Result<(), String> {
        let key = line.key.clone().ok_or("key is missing")?;
        if line.kind == Kind::Info {
            self.retired.insert(process);
        }
        match (self.open.remove(&process), line.f.as_str()) {
            (Some(Open::Append { key: asked, index }), "append") if asked == key => {
                let append = &mut self.history.keys.get_mut(&key).ok_or("key is unknown")?.appends[index];
                if line.value != Some(Value::One(append.value)) {
                    return Err(format!("process {process} appends another value than it invoked"));
                }
                append.outcome = match line.kind {
                    Kind::Ok => {
                        let offset = line.offset.ok_or("offset of an acknowledged append is missing")?;
                        Outcome::Ok { offset, time: line.time }
                    }
                    Kind::Fail => Outcome::Fail,
                    Kind::Info | Kind::Invoke => Outcome::Unknown,
                };
                Ok(())
            }
            (Some(Open::Read { key: asked }), "read") if asked == key => self.read_completed(process, key, line),
            // A history of others may hold completions alone for reads.
            (None, "read") => {
                self.history.ops += 1;
                self.read_completed(process, key, line)
            }
            _ => Err(format!("process {process} completes what it did not invoke")),
        }
    }

    fn read_completed(&mut self, process: u64, key: String, line: Line) -> Result<(), String> {
        let of_key = self.history.keys.entry(key).or_default();
        if line.kind != Kind::Ok {
            let error = line.error.unwrap_or_default();
            of_key.failed_reads.push(FailedRead { process, node: line.node, error });
            return Ok(());
        }
        let Some(Value::Many(values)) = line.value else { return Err("value of a read is no list of pairs".into()) };
        of_key.reads.push(Read {
            process,
            node: line.node,
            last: line.last.unwrap_or(false),
            tail: line.tail.unwrap_or(false),
            time: line.time,
            values,
        });
        Ok(())
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
        assert_eq!(key.reads[0].values, [(0, Some(11)), (5, Some(17))]);
        assert!(key.reads[0].tail && !key.reads[0].last);
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
        let start = Line { nodes: vec![1, 2], keys: vec!["t/0".into()], seed: Some(4), ..Line::nemesis("start") };
        writer.record(start);
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
        assert_eq!(history.keys["t/0"].reads[0].values, [(0, Some(7)), (1, None)]);
        assert!(History::load(&dir.path().join("none")).unwrap_err().to_string().contains("none"));
    }
}
