//! Many logs of one store: opened side by side, and what they keep in memory together.

use std::io::{self, ErrorKind};
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};

use arqon_proto::{GroupId, Offset, RaftIndex, ReplicaId};
use arqon_storage::{BlockFile, Disk, FaultyDisk, File, Log, OpenError, Operation, Store};

use crate::support::*;

const LOG_COUNT: u64 = 32;
const ENTRY_SIZE: usize = 16 << 10;
const TOTAL: usize = 4 << 20;

fn open_logs(store: &Store, count: u64) -> Vec<Log> {
    (0..count).map(|group| store.open_log(group.into(), 1.into()).unwrap().0).collect()
}

fn recent_size(store: &Store) -> usize {
    store.metrics().recent_size.load(Ordering::Relaxed) as usize
}

/// Appends to one log only, without looking at another meanwhile.
fn fill(log: &Log, count: u64) {
    for _ in 0..count {
        append_many(log, 1, 1, ENTRY_SIZE);
    }
}

#[test]
fn recent_entries_of_all_logs_stay_within_one_bound() {
    let mut fixture = Fixture::memory();
    fixture.options.recent_size_max = 1 << 20;
    fixture.options.recent_total_max = TOTAL;
    let store = fixture.store();
    let logs = open_logs(&store, LOG_COUNT);
    let metrics = store.metrics();
    // The bound, an eighth of it, and what two threads may add before they look.
    let limit = TOTAL + TOTAL / 2;

    fill(&logs[0], 80);
    let alone = recent_size(&store);
    assert!((900 << 10..=(1 << 20) + 2 * ENTRY_SIZE).contains(&alone), "a log alone keeps {alone}");
    // One after the other: those before are idle and must give way.
    for log in &logs[1..] {
        fill(log, 80);
        assert!(recent_size(&store) <= limit, "{} after log {}", recent_size(&store), log.group());
    }
    // All at once.
    for _ in 0..40 {
        let waiting: Vec<_> =
            logs.iter().map(|log| append(log, vec![data(1, next_index(log), 1, ENTRY_SIZE, 1_000)])).collect();
        waiting.into_iter().for_each(|receiver| receiver.recv().unwrap().unwrap());
        assert!(recent_size(&store) <= limit, "{}", recent_size(&store));
    }
    assert!(recent_size(&store) > TOTAL / 2, "memory that may be used is not: {}", recent_size(&store));

    for log in &logs {
        let entries = read_entries(log, 0, 100_000);
        assert_eq!(entries.len(), 120);
        for (index, entry) in entries.iter().enumerate() {
            assert_eq!(essence(entry), essence(&data(1, index as u64, 1, ENTRY_SIZE, 0)));
        }
        assert_eq!(read_data(log, 0, 100_000).len(), 120);
    }
    drop((logs, store));
    assert_eq!(metrics.recent_size.load(Ordering::Relaxed), 0, "logs that are closed still count");
}

#[test]
fn truncations_purges_and_resets_give_recent_entries_back() {
    let mut fixture = Fixture::memory();
    fixture.options.recent_size_max = 1 << 20;
    let (store, log, _) = fixture.open();
    fill(&log, 20);
    let full = recent_size(&store);
    block_on(log.truncate_from(RaftIndex(15))).unwrap();
    assert_eq!(recent_size(&store), full * 15 / 20);
    block_on(log.purge_through(position(1, 4))).unwrap();
    assert_eq!(recent_size(&store), full * 10 / 20);
    block_on(log.reset(position(1, 100), Offset(100))).unwrap();
    assert_eq!(recent_size(&store), 0);
}

#[test]
fn entries_that_are_not_on_the_disk_are_kept_whatever_the_bound() {
    let mut fixture = Fixture::memory();
    fixture.options.recent_total_max = 128 << 10;
    fixture.options.recent_size_max = 1 << 20;
    let disk = Arc::new(FaultyDisk::new(fixture.disk()));
    let store = Store::open_on(disk.clone(), identity(), fixture.options.clone()).unwrap();
    let logs = open_logs(&store, 4);
    fill(&logs[0], 2);
    disk.fail(Operation::Write, 0, ErrorKind::StorageFull);
    let lost: Vec<_> = (2..20).map(|index| data(1, index, 1, ENTRY_SIZE, 0)).collect();
    append(&logs[0], lost).recv().unwrap().unwrap_err();
    disk.heal();
    logs[1..].iter().for_each(|log| fill(log, 40));
    assert!(recent_size(&store) < (18 + 3 * 8) * ENTRY_SIZE, "the others keep {}", recent_size(&store));
    let entries = read_entries(&logs[0], 2, 100_000);
    assert_eq!(entries.len(), 18);
    for (at, entry) in entries.iter().enumerate() {
        assert_eq!(essence(entry), essence(&data(1, at as u64 + 2, 1, ENTRY_SIZE, 0)));
    }
}

/// Stops whoever opens the manifest of one log, until it is told to go on.
struct SlowDisk {
    disk: Arc<dyn Disk>,
    slow: String,
    reached: Sender<()>,
    go_on: Mutex<Receiver<io::Result<()>>>,
}

impl Disk for SlowDisk {
    fn name(&self) -> String {
        self.disk.name()
    }
    fn lock(&self, path: &str) -> io::Result<()> {
        self.disk.lock(path)
    }
    fn unlock(&self) {
        self.disk.unlock();
    }
    fn open(&self, path: &str) -> io::Result<Arc<dyn File>> {
        if path == self.slow {
            self.reached.send(()).unwrap();
            self.go_on.lock().unwrap().recv().unwrap()?;
        }
        self.disk.open(path)
    }
    fn open_blocks(&self, path: &str) -> io::Result<Arc<dyn BlockFile>> {
        self.disk.open_blocks(path)
    }
    fn flush(&self) -> io::Result<()> {
        self.disk.flush()
    }
    fn create(&self, path: &str) -> io::Result<Arc<dyn File>> {
        self.disk.create(path)
    }
    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.disk.rename(from, to)
    }
    fn remove(&self, path: &str) -> io::Result<()> {
        self.disk.remove(path)
    }
    fn create_dir(&self, path: &str) -> io::Result<()> {
        self.disk.create_dir(path)
    }
    fn remove_dir(&self, path: &str) -> io::Result<()> {
        self.disk.remove_dir(path)
    }
    fn sync_dir(&self, path: &str) -> io::Result<()> {
        self.disk.sync_dir(path)
    }
    fn list(&self, path: &str) -> io::Result<Vec<String>> {
        self.disk.list(path)
    }
}

#[test]
fn a_log_that_is_slow_to_open_keeps_no_other_waiting() {
    let fixture = Fixture::memory();
    {
        let store = fixture.store();
        open_logs(&store, 3).iter().for_each(|log| append_many(log, 1, 3, 100));
        block_on(store.close());
    }
    let (reached, at_manifest) = channel();
    let (go, go_on) = channel();
    let slow = format!("logs/{}-{}/manifest", GroupId(1), ReplicaId(1));
    let disk = SlowDisk { disk: fixture.disk(), slow, reached, go_on: Mutex::new(go_on) };
    let store = Store::open_on(Arc::new(disk), identity(), fixture.options.clone()).unwrap();
    let open = |group: u64| store.open_log(group.into(), 1.into());
    std::thread::scope(|scope| {
        // It fails the first time, and its place is free then.
        let opening = scope.spawn(|| open(1));
        at_manifest.recv().unwrap();
        assert!(matches!(open(1), Err(OpenError::LogOpen { .. })), "one log was opened twice");
        assert_eq!(read_entries(&open(0).unwrap().0, 0, usize::MAX).len(), 3);
        go.send(Err(io::Error::other("broken"))).unwrap();
        assert!(opening.join().unwrap().is_err());

        let opening = scope.spawn(|| open(1));
        at_manifest.recv().unwrap();
        // A log that is being opened is deleted when it is open.
        let deleting = scope.spawn(|| store.delete_log(1.into(), 1.into()));
        assert_eq!(read_entries(&open(2).unwrap().0, 0, usize::MAX).len(), 3);
        go.send(Ok(())).unwrap();
        // The settling of a log opens its manifest once more.
        at_manifest.recv().unwrap();
        go.send(Ok(())).unwrap();
        let (log, _) = opening.join().unwrap().unwrap();
        deleting.join().unwrap().unwrap();
        assert!(log.append(vec![], Box::new(drop)).is_err(), "a deleted log takes entries");
    });
    assert_eq!(store.logs().unwrap().len(), 2);
}
