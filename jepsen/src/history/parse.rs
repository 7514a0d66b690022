//! Reads a history and holds it to the rules of the format.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    fs::File,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
};

use super::{
    Access, Ack, Append, Change, ChangeKind, Error, FailedRead, Fault, History, KeyHistory, Kind, Line, Listing,
    Memory, NEMESIS, Outcome, Process, Read, Take, Value, WORKLOAD,
};

impl History {
    /// Reads the history at `path`.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::Malformed`] naming the line.
    pub fn load(path: &Path) -> Result<Self, Error> {
        let io = |source| Error::Io { path: path.to_owned(), source };
        let file = BufReader::with_capacity(1 << 20, File::open(path).map_err(io)?);
        Self::read(file).map_err(|error| match error {
            Error::Io { source, .. } => io(source),
            other => other,
        })
    }

    /// Reads a history from lines.
    ///
    /// # Errors
    /// As [`History::load`].
    pub fn read(mut lines: impl BufRead) -> Result<Self, Error> {
        let mut parser = Parser::default();
        let (mut text, mut number) = (Vec::new(), 0);
        loop {
            text.clear();
            let size =
                lines.read_until(b'\n', &mut text).map_err(|source| Error::Io { path: PathBuf::new(), source })?;
            if size == 0 {
                return Ok(parser.finish());
            }
            number += 1;
            if text.trim_ascii().is_empty() {
                continue;
            }
            let malformed = |problem| Error::Malformed { line: number, problem };
            let line: Line = serde_json::from_slice(&text).map_err(|error| malformed(error.to_string()))?;
            parser.take(line).map_err(malformed)?;
        }
    }
}

/// What a process is waiting for.
enum Open {
    Append { key: usize, index: usize },
    Result { key: usize, index: usize },
    Ack { key: usize, index: usize },
    Read { key: usize, invoked: u64 },
    Take { key: usize },
    Change { topic: String, index: usize },
    List { invoked: u64 },
    Access { key: String },
}

#[derive(Default)]
struct Parser {
    history: History,
    keys: Vec<(String, KeyHistory)>,
    key_index: HashMap<String, usize>,
    /// Values appended, by key.
    written: Vec<HashSet<u64>>,
    open: HashMap<u64, Open>,
    retired: HashSet<u64>,
}

impl Parser {
    fn finish(mut self) -> History {
        self.history.keys = self.keys.into_iter().collect();
        // A history of others need not say which nodes there are, nor which reads are the closing ones.
        if self.history.nodes.is_empty() {
            self.history.keys.values_mut().for_each(|key| find_closing(&mut key.reads));
            let reads = self.history.keys.values().flat_map(|key| &key.reads);
            let nodes: BTreeSet<u64> = reads.filter_map(|read| read.node).collect();
            self.history.nodes = nodes.into_iter().collect();
        }
        for key in self.history.keys.values_mut() {
            key.appends.shrink_to_fit();
            key.reads.shrink_to_fit();
        }
        self.history
    }

    fn key(&mut self, name: &str) -> usize {
        if let Some(index) = self.key_index.get(name) {
            return *index;
        }
        let index = self.keys.len();
        self.keys.push((name.to_owned(), KeyHistory::default()));
        self.written.push(HashSet::new());
        self.key_index.insert(name.to_owned(), index);
        index
    }

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
            Process::Name(name) if name == WORKLOAD => self.workload(line),
            Process::Name(name) => {
                Err(format!("process {name:?} is neither a number nor \"{NEMESIS}\" nor \"{WORKLOAD}\""))
            }
            Process::Number(process) => self.client(*process, line),
        }
    }

    fn workload(&mut self, line: Line) -> Result<(), String> {
        if line.f != "replicas" {
            return Err(format!("f {:?} of the workload is unknown", line.f));
        }
        let key = self.key(&line.key.ok_or("key is missing")?);
        self.keys[key].1.replicas = Some(line.nodes);
        Ok(())
    }

    fn nemesis(&mut self, line: Line) {
        match line.f.as_str() {
            "start" => self.start(line),
            "end" => {
                let is_it = |fault: &&mut Fault| {
                    fault.ended.is_none() && Some(&fault.f) == line.of.as_ref() && fault.node == line.node
                };
                if let Some(fault) = self.history.faults.iter_mut().rev().find(is_it) {
                    fault.ended = Some(line.time);
                }
            }
            "heal" => {
                if !line.nodes.is_empty() {
                    self.history.left = self.history.nodes.clone();
                    self.history.left.retain(|node| !line.nodes.contains(node));
                }
                self.fault(line);
            }
            "not-run" => self.history.not_run.extend(line.detail),
            "memory" => {
                if let (Some(node), Some(Value::One(bytes))) = (line.node, line.value) {
                    self.history.memory.push(Memory { node, bytes, time: line.time });
                }
            }
            _ => self.fault(line),
        }
    }

    fn start(&mut self, line: Line) {
        self.history.nodes = line.nodes;
        self.history.seed = line.seed;
        self.history.workloads = line.workloads;
        for key in line.keys {
            self.key(&key);
        }
    }

    fn fault(&mut self, line: Line) {
        let begun = |fault: &&mut Fault| {
            line.kind != Kind::Invoke && fault.open && fault.f == line.f && fault.node == line.node
        };
        if let Some(fault) = self.history.faults.iter_mut().rev().find(begun) {
            fault.open = false;
            fault.proven = line.proven.unwrap_or(false);
            fault.keys.extend(line.keys);
            fault.detail = line.detail.or(fault.detail.take());
            return;
        }
        self.history.faults.push(Fault {
            open: line.kind == Kind::Invoke,
            f: line.f,
            node: line.node,
            leads: line.leads,
            keys: line.keys,
            detail: line.detail.or(line.error),
            proven: line.proven.unwrap_or(false),
            time: line.time,
            ended: None,
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
        let name = || line.key.as_deref().ok_or("key is missing".to_owned());
        let open = match line.f.as_str() {
            "append" => self.append(process, &line, name()?)?,
            "result" => self.result(process, &line, name()?)?,
            "read" => Open::Read { key: self.key(name()?), invoked: line.time },
            "take" => Open::Take { key: self.key(name()?) },
            "ack" => {
                let key = self.key(name()?);
                let offset = line.offset.ok_or("offset of an ack is missing")?;
                let attempt = line.attempt.ok_or("attempt of an ack is missing")?;
                let acks = &mut self.keys[key].1.acks;
                acks.push(Ack { process, offset, attempt, confirmed: None });
                Open::Ack { key, index: acks.len() - 1 }
            }
            "create" | "alter" | "delete" => self.change(process, &line, name()?)?,
            "access" => Open::Access { key: name()?.to_owned() },
            "list" => Open::List { invoked: line.time },
            other => return Err(format!("f {other:?} is unknown")),
        };
        self.history.ops += 1;
        self.open.insert(process, open);
        Ok(())
    }

    fn append(&mut self, process: u64, line: &Line, name: &str) -> Result<Open, String> {
        let Some(Value::One(value)) = line.value else { return Err("value of an append is no number".into()) };
        let key = self.key(name);
        if !self.written[key].insert(value) {
            return Err(format!("value {value} is appended to {name} a second time"));
        }
        Ok(Open::Append { key, index: self.begin_append(key, process, line, value) })
    }

    fn result(&mut self, process: u64, line: &Line, name: &str) -> Result<Open, String> {
        let Some(Value::One(value)) = line.value else { return Err("value of a result is no number".into()) };
        let key = self.key(name);
        Ok(Open::Result { key, index: self.begin_append(key, process, line, value) })
    }

    fn begin_append(&mut self, key: usize, process: u64, line: &Line, value: u64) -> usize {
        let appends = &mut self.keys[key].1.appends;
        appends.push(Append {
            process,
            producer: line.producer.unwrap_or(process),
            sequence: line.sequence.unwrap_or(self.history.ops),
            value,
            invoked: line.time,
            outcome: Outcome::Unknown,
        });
        appends.len() - 1
    }

    fn change(&mut self, process: u64, line: &Line, name: &str) -> Result<Open, String> {
        let kind = match (line.f.as_str(), &line.value) {
            ("create", _) => ChangeKind::Create,
            ("delete", _) => ChangeKind::Delete,
            (_, Some(Value::One(retention_ms))) => ChangeKind::Alter(*retention_ms),
            _ => return Err("value of an alter is no number".into()),
        };
        let changes = &mut self.history.topics.entry(name.to_owned()).or_default().changes;
        changes.push(Change { process, kind, invoked: line.time, answered: None, outcome: Outcome::Unknown });
        Ok(Open::Change { topic: name.to_owned(), index: changes.len() - 1 })
    }

    fn complete(&mut self, process: u64, line: Line) -> Result<(), String> {
        if line.kind == Kind::Info {
            self.retired.insert(process);
        }
        let key = match &line.key {
            Some(name) if !matches!(line.f.as_str(), "create" | "alter" | "delete" | "access") => Some(self.key(name)),
            _ => None,
        };
        match (self.open.remove(&process), line.f.as_str()) {
            (Some(Open::Append { key: asked, index }), "append") if key == Some(asked) => {
                self.appended(asked, index, &line)
            }
            (Some(Open::Result { key: asked, index }), "result") if key == Some(asked) => {
                // That another result stands says nothing about this one.
                if line.kind == Kind::Ok && line.duplicate == Some(true) {
                    return Ok(());
                }
                self.appended(asked, index, &line)
            }
            (Some(Open::Ack { key: asked, index }), "ack") if key == Some(asked) => {
                self.keys[asked].1.acks[index].confirmed = (line.kind == Kind::Ok).then_some(line.time);
                Ok(())
            }
            (Some(Open::Read { key: asked, invoked }), "read") if key == Some(asked) => {
                self.read_completed(process, asked, invoked, line)
            }
            (Some(Open::Take { key: asked }), "take") if key == Some(asked) => self.taken(process, asked, &line),
            (Some(Open::Change { topic, index }), "create" | "alter" | "delete")
                if line.key.as_ref() == Some(&topic) =>
            {
                self.changed(&topic, index, &line)
            }
            (Some(Open::Access { key }), "access") => {
                if line.kind != Kind::Info {
                    self.history.accesses.push(Access {
                        process,
                        key,
                        token: line.token.ok_or("token of an access is missing")?,
                        verb: line.verb.unwrap_or_default(),
                        accepted: line.kind == Kind::Ok,
                        time: line.time,
                    });
                }
                Ok(())
            }
            (Some(Open::List { invoked }), "list") => {
                self.listed(process, invoked, line);
                Ok(())
            }
            // A history of others may hold completions alone for reads.
            (None, "read") => {
                self.history.ops += 1;
                let key = key.ok_or("key is missing")?;
                let time = line.time;
                self.read_completed(process, key, time, line)
            }
            // One request for jobs may bring several.
            (None, "take") => {
                let key = key.ok_or("key is missing")?;
                self.taken(process, key, &line)
            }
            (Some(_), _) | (None, _) => Err(format!("process {process} completes what it did not invoke")),
        }
    }

    fn appended(&mut self, key: usize, index: usize, line: &Line) -> Result<(), String> {
        let append = &mut self.keys[key].1.appends[index];
        if line.value != Some(Value::One(append.value)) {
            return Err(format!("process {} appends another value than it invoked", append.process));
        }
        append.outcome = outcome(line)?;
        Ok(())
    }

    fn taken(&mut self, process: u64, key: usize, line: &Line) -> Result<(), String> {
        // No job, or no answer: nothing is known that could be held against anybody.
        if line.kind != Kind::Ok || line.offset.is_none() {
            return Ok(());
        }
        let value = match line.value {
            Some(Value::One(value)) => Some(value),
            None => None,
            Some(Value::Many(_)) => return Err("value of a take is no number".into()),
        };
        let offset = line.offset.ok_or("offset of a take is missing")?;
        let attempt = line.attempt.ok_or("attempt of a take is missing")?;
        self.keys[key].1.takes.push(Take { process, value, offset, attempt, time: line.time });
        Ok(())
    }

    fn changed(&mut self, topic: &str, index: usize, line: &Line) -> Result<(), String> {
        let changes = &mut self.history.topics.get_mut(topic).ok_or("topic is unknown")?.changes;
        let change = changes.get_mut(index).ok_or("the change is unknown")?;
        change.answered = (line.kind != Kind::Info).then_some(line.time);
        change.outcome = match line.kind {
            Kind::Ok => Outcome::Ok { offset: 0, time: line.time },
            Kind::Fail => Outcome::Fail,
            Kind::Info | Kind::Invoke => Outcome::Unknown,
        };
        Ok(())
    }

    fn listed(&mut self, process: u64, invoked: u64, line: Line) {
        // A node that did not answer has told nothing.
        if line.kind == Kind::Ok {
            self.history.listings.push(Listing {
                process,
                node: line.node,
                last: line.last.unwrap_or(false),
                invoked,
                time: line.time,
                topics: line.topics.unwrap_or_default().into_iter().collect(),
            });
        }
    }

    fn read_completed(&mut self, process: u64, key: usize, invoked: u64, line: Line) -> Result<(), String> {
        let of_key = &mut self.keys[key].1;
        let (node, offset, last) = (line.node, line.offset, line.last.unwrap_or(false));
        match line.value {
            _ if line.kind != Kind::Ok => {
                let error = line.error.unwrap_or_default();
                of_key.failed_reads.push(FailedRead { process, node, last, offset, error });
            }
            Some(Value::Many(values)) => of_key.reads.push(Read {
                process,
                node,
                last,
                tail: line.tail.unwrap_or(false),
                invoked,
                time: line.time,
                offset,
                hw: line.hw,
                log_start: line.log_start,
                values: values.into_iter().collect(),
            }),
            _ => return Err("value of a read is no list of pairs".into()),
        }
        Ok(())
    }
}

/// Where no read is marked as part of the closing one: of each node, and of the leader, the last that holds everything.
fn find_closing(reads: &mut [Read]) {
    if reads.iter().any(|read| read.last) {
        return;
    }
    let mut done = HashSet::new();
    for read in reads.iter_mut().rev().filter(|read| read.tail && read.offset.is_none_or(|offset| offset == 0)) {
        read.last = done.insert(read.node);
    }
}

fn outcome(line: &Line) -> Result<Outcome, String> {
    Ok(match line.kind {
        Kind::Ok => {
            let offset = line.offset.ok_or("offset of an acknowledged append is missing")?;
            Outcome::Ok { offset, time: line.time }
        }
        Kind::Fail => Outcome::Fail,
        Kind::Info | Kind::Invoke => Outcome::Unknown,
    })
}
