//! The same rounds through the log store itself, as a node runs it.

use std::{
    fs::File,
    io,
    path::Path,
    sync::mpsc::sync_channel,
    time::{Duration, Instant},
};

use arqon_proto::{BATCH_HEADER_SIZE, Batch, BatchKind, GroupId, Header, NodeId, RaftIndex, ReplicaId, Term};
use arqon_storage::{Backend, Identity, Log, Options, Store};
use bytes::Bytes;

use super::meter::{self, Sample};

/// The two ways in which the store writes.
pub const BACKENDS: [(&str, Backend); 2] = [("store, io_uring", Backend::Uring), ("store, plain", Backend::Plain)];

/// One log a file of the round.
pub struct Logs {
    dir: tempfile::TempDir,
    store: Store,
    logs: Vec<Log>,
    root: File,
}

impl Logs {
    pub fn open(dir: &Path, count: usize, backend: Backend) -> Result<Self, String> {
        let failed = |error: &dyn std::fmt::Display| format!("{}: {error}", dir.display());
        let dir = tempfile::tempdir_in(dir).map_err(|error| failed(&error))?;
        let identity = Identity { cluster: "rounds".to_owned(), node: NodeId(1) };
        let options = Options { backend, ..Options::default() };
        let store = Store::open(dir.path(), identity, options).map_err(|error| failed(&error))?;
        let mut logs = Vec::new();
        for number in 0..count {
            let opened = store.open_log(GroupId(number as u64 + 1), ReplicaId(1));
            logs.push(opened.map_err(|error| failed(&error))?.0);
        }
        let root = File::open(dir.path()).map_err(|error| failed(&error))?;
        Ok(Self { dir, store, logs, root })
    }

    /// Each round appends one entry of `size` bytes to every log and waits until all are durable.
    pub fn measure(&self, size: usize, time: Duration) -> Result<Sample, String> {
        let records = Bytes::from(vec![0x5a; size - BATCH_HEADER_SIZE]);
        let sample = meter::measure(&self.root, size * self.logs.len(), time, |_| {
            let (sender, durable) = sync_channel(self.logs.len());
            let begin = Instant::now();
            for log in &self.logs {
                let sender = sender.clone();
                let flushed = Box::new(move |result: io::Result<()>| drop(sender.send(result)));
                log.append(vec![entry(log, &records)], flushed).map_err(io::Error::other)?;
            }
            for _ in &self.logs {
                durable.recv().map_err(io::Error::other)??;
            }
            Ok(Some(begin.elapsed()))
        });
        sample.map_err(|error| format!("{}: {error}", self.dir.path().display()))
    }

    /// Closes and deletes everything.
    pub fn remove(self) -> Result<(), String> {
        drop(self.logs);
        drop(self.store);
        self.dir.close().map_err(|error| error.to_string())
    }
}

fn entry(log: &Log, records: &Bytes) -> Batch {
    let mut header = Header::new(BatchKind::Raft);
    header.term = Term(1);
    header.index = RaftIndex(log.last().map_or(0, |last| last.index.0 + 1));
    header.records_size = records.len() as u32;
    header.records_size_plain = header.records_size;
    Batch { header, stamps: Bytes::new(), records: records.clone() }
}
