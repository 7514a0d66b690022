//! Shared by the tests of the log: disks to run on, entries to append, a way to wait.

use std::future::Future;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};

use arqon_proto::{Batch, BatchKind, GroupId, Header, NodeId, Offset, RaftIndex, ReplicaId, Term};
use arqon_storage::{
    Backend, Damage, Disk, Identity, Log, LogPosition, MemoryDisk, OpenError, Options, ReadError, RealDisk, Recovery,
    Store,
};
use bytes::Bytes;

pub const GROUP: GroupId = GroupId(7);
pub const REPLICA: ReplicaId = ReplicaId(3);
/// Byte at which the batches of a segment begin.
pub const DATA_AT: usize = 12_288;

pub fn identity() -> Identity {
    Identity { cluster: "test".to_owned(), node: NodeId(1) }
}

/// Small segments, so that rolls happen often.
pub fn small_options() -> Options {
    Options {
        backend: Backend::Plain,
        segment_size_first: 16 << 10,
        segment_size_max: 32 << 10,
        index_step: 512,
        recent_size_max: 2 << 10,
        fill_size: 4 << 10,
        scrub_rate_max: 0,
        mark_delay_ms: 5,
        thread_count: 2,
        ..Options::default()
    }
}

/// The same with one thread, which does one thing after the other.
pub fn one_thread() -> Options {
    Options { thread_count: 1, ..small_options() }
}

/// Opens the one log of the tests.
pub fn open_on(disk: Arc<dyn Disk>, options: Options) -> Result<(Store, Log, Recovery), OpenError> {
    let store = Store::open_on(disk, identity(), options)?;
    let (log, recovery) = store.open_log(GROUP, REPLICA)?;
    Ok((store, log, recovery))
}

/// As a process does that starts again: the lock of the one before is gone.
pub fn try_open(disk: &MemoryDisk) -> Result<(Store, Log, Recovery), OpenError> {
    open_on(Arc::new(disk.again()), one_thread())
}

pub fn open(disk: &MemoryDisk) -> (Store, Log, Recovery) {
    try_open(disk).unwrap()
}

pub fn close(store: Store, log: Log) {
    block_on(store.close());
    drop(log);
}

/// A closed log without saved indexes.
pub fn closed_log(entries: impl Iterator<Item = Batch>, committed: LogPosition) -> MemoryDisk {
    let disk = MemoryDisk::new();
    let (store, log, _) = open(&disk);
    append_flushed(&log, entries.collect());
    log.save_committed(committed);
    close(store, log);
    for path in files(&disk, ".idx") {
        disk.remove(&path).unwrap();
        disk.sync_dir(&log_dir()).unwrap();
    }
    disk
}

/// What was lost, as a peer would send it: without the fields that differ between replicas.
pub fn from_peer(damage: &Damage, entry: impl Fn(u64) -> Batch) -> Vec<Batch> {
    (damage.first.0..=damage.last.0).map(entry).collect()
}

/// A disk that can be opened again and again.
pub enum Place {
    Memory(MemoryDisk),
    Real(tempfile::TempDir),
}

pub struct Fixture {
    pub place: Place,
    pub options: Options,
}

impl Fixture {
    pub fn memory() -> Self {
        Self { place: Place::Memory(MemoryDisk::new()), options: small_options() }
    }

    pub fn real(backend: Backend) -> Self {
        let place = Place::Real(tempfile::tempdir().unwrap());
        Self { place, options: Options { backend, ..small_options() } }
    }

    /// On files, through the page cache.
    pub fn cached(backend: Backend) -> Self {
        let mut fixture = Self::real(backend);
        fixture.options.direct_writes = false;
        fixture
    }

    /// In memory, on files with plain calls and with io_uring where it is allowed, past the page
    /// cache and through it.
    pub fn all() -> Vec<Self> {
        let uring = Self::real(Backend::Uring);
        let mut all = vec![Self::memory(), Self::real(Backend::Plain), Self::cached(Backend::Auto)];
        match uring.try_store() {
            Ok(_) => all.push(uring),
            Err(error) => eprintln!("io_uring is not tested: {error}"),
        }
        all
    }

    pub fn disk(&self) -> Arc<dyn Disk> {
        match &self.place {
            // A process that starts again: the lock of the one before is gone.
            Place::Memory(disk) => Arc::new(disk.again()),
            Place::Real(dir) => {
                let disk = RealDisk::create(dir.path()).unwrap();
                Arc::new(disk.with_direct_writes(self.options.direct_writes))
            }
        }
    }

    pub fn try_store(&self) -> Result<Store, arqon_storage::OpenError> {
        Store::open_on(self.disk(), identity(), self.options.clone())
    }

    pub fn store(&self) -> Store {
        self.try_store().unwrap()
    }

    pub fn open(&self) -> (Store, Log, Recovery) {
        open_on(self.disk(), self.options.clone()).unwrap()
    }
}

/// Runs a future of the log to its end.
pub fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(future)
}

/// A data batch with `count` records; its bytes say what it is.
pub fn data(term: u64, index: u64, count: u32, size: usize, time_ms: u64) -> Batch {
    let text = format!("entry {term}-{index} ");
    let records: Vec<u8> = text.bytes().cycle().take(size).collect();
    let mut header = Header::new(BatchKind::Data);
    header.records_size = records.len() as u32;
    header.records_size_plain = records.len() as u32;
    header.record_count = count;
    header.records_crc = crc32fast::hash(&records);
    header.time_ms = time_ms;
    header.term = Term(term);
    header.index = RaftIndex(index);
    Batch { header, stamps: Bytes::new(), records: records.into() }
}

/// A control batch, which takes no offset.
pub fn control(term: u64, index: u64, text: &str) -> Batch {
    let mut batch = Batch::internal(BatchKind::Control, Bytes::copy_from_slice(text.as_bytes()));
    batch.header.term = Term(term);
    batch.header.index = RaftIndex(index);
    batch
}

/// Appends and returns where the result of the flush will arrive.
pub fn append(log: &Log, batches: Vec<Batch>) -> Receiver<io::Result<()>> {
    let (sender, receiver) = channel();
    log.append(batches, Box::new(move |result| drop(sender.send(result)))).unwrap();
    receiver
}

/// Appends and waits until it is durable.
pub fn append_flushed(log: &Log, batches: Vec<Batch>) {
    append(log, batches).recv().unwrap().unwrap();
}

/// Appends one-record entries of `size` bytes from the end of the log on.
pub fn append_many(log: &Log, term: u64, count: u64, size: usize) {
    let start = next_index(log);
    append_flushed(log, (start..start + count).map(|index| data(term, index, 1, size, 1_000 + index)).collect());
}

pub fn next_index(log: &Log) -> u64 {
    log.last().map_or(0, |last| last.index.0 + 1)
}

pub fn position(term: u64, index: u64) -> LogPosition {
    LogPosition::new(term, index)
}

/// Every entry from `start` on, read in steps of `size_max` bytes.
pub fn read_entries(log: &Log, start: u64, size_max: usize) -> Vec<Batch> {
    try_read_entries(log, start, size_max).unwrap()
}

/// The same where some may be damaged.
pub fn try_read_entries(log: &Log, start: u64, size_max: usize) -> Result<Vec<Batch>, ReadError> {
    let mut all: Vec<Batch> = Vec::new();
    loop {
        let next = all.last().map_or(start, |batch| batch.header.index.0 + 1);
        let batches = log.entries(RaftIndex(next)..RaftIndex(u64::MAX), size_max)?;
        if batches.is_empty() {
            return Ok(all);
        }
        for (at, batch) in batches.iter().enumerate() {
            assert_eq!(batch.header.index.0, next + at as u64);
        }
        all.extend(batches);
    }
}

/// Every record's batch from offset `from` on.
pub fn read_data(log: &Log, from: u64, size_max: usize) -> Vec<Batch> {
    let mut all: Vec<Batch> = Vec::new();
    loop {
        let next = all.last().map_or(from, |batch: &Batch| batch.header.next_offset().0);
        let batches = log.read_data(Offset(next), RaftIndex(u64::MAX), size_max).unwrap();
        if batches.is_empty() {
            return all;
        }
        all.extend(batches);
    }
}

/// What a test compares: the parts of an entry that the caller decided.
pub fn essence(batch: &Batch) -> (u64, u64, u32, Bytes) {
    (batch.header.term.0, batch.header.index.0, batch.header.record_count, batch.records.clone())
}

pub fn log_dir() -> String {
    format!("logs/{GROUP}-{REPLICA}")
}

/// Paths of the files of the log that end so, oldest first.
pub fn files(disk: &MemoryDisk, suffix: &str) -> Vec<String> {
    let mut names = disk.list(&log_dir()).unwrap();
    names.retain(|name| name.ends_with(suffix));
    names.sort();
    names.iter().map(|name| format!("{}/{name}", log_dir())).collect()
}

/// The first index of a segment, by its path.
pub fn segment_base(path: &str) -> u64 {
    path[path.len() - 24..path.len() - 4].parse().unwrap()
}
