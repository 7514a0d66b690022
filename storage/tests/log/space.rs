//! A disk that fills.

use std::io::ErrorKind;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::support::*;
use arqon_proto::RaftIndex;
use arqon_storage::{DiskSpace, FaultyDisk, Log, MemoryDisk, Options, SpaceState, Store};

const CAPACITY: u64 = 4 << 20;

/// A quarter of the disk is reserved.
fn open_on(disk: &MemoryDisk) -> (Store, Log) {
    let options = Options { reserve_percent_max: 25, segment_size_max: 256 << 10, ..small_options() };
    let (store, log, _) = crate::support::open_on(Arc::new(disk.again()), options).unwrap();
    (store, log)
}

/// Waits until the store says so.
fn reaches(store: &Store, state: SpaceState) {
    let begin = Instant::now();
    while store.space().state != state {
        assert!(begin.elapsed() < Duration::from_secs(30), "{:?}", store.space());
        std::thread::yield_now();
    }
}

/// The story: whoever asks before each append stops writing before the disk does. What was admitted
/// already still fits, and the log goes on when the user has made room.
#[test]
fn a_writer_that_heeds_the_reserve_never_meets_a_full_disk() {
    let disk = MemoryDisk::new();
    disk.set_capacity(Some(CAPACITY));
    let (store, log) = open_on(&disk);
    assert_eq!((store.space().state, store.space().total_size), (SpaceState::Enough, CAPACITY));
    let mut waiting = Vec::new();
    while store.space().state == SpaceState::Enough {
        waiting.push(append(&log, vec![data(1, next_index(&log), 1, 10_000, 0)]));
    }
    // Half of what a hard reserve leaves was admitted by others at the same moment.
    for _ in 0..40 {
        waiting.push(append(&log, vec![data(1, next_index(&log), 1, 10_000, 0)]));
    }
    let count = waiting.len() as u64;
    for flushed in waiting {
        flushed.recv().unwrap().unwrap();
    }
    assert!(count > 200, "only {count} entries fitted");
    let space = store.space();
    assert!(space.state == SpaceState::Low && space.free_size > space.reserve_size / 4, "{space:?}");
    assert!(space.takes_entries(true), "a follower takes what its leader admitted");

    disk.set_capacity(Some(2 * CAPACITY));
    reaches(&store, SpaceState::Enough);
    append_many(&log, 1, 3, 10_000);
    disk.set_capacity(Some(CAPACITY));
    reaches(&store, SpaceState::Low);
    drop((store, log));
    let (_store, log) = open_on(&disk);
    assert_eq!(next_index(&log), count + 3);
}

#[test]
fn purging_brings_the_space_back_without_a_restart() {
    let disk = MemoryDisk::new();
    disk.set_capacity(Some(CAPACITY));
    let (store, log) = open_on(&disk);
    while store.space().state == SpaceState::Enough {
        append_many(&log, 1, 1, 10_000);
    }
    let boundary = log.last_segment_boundary(RaftIndex(next_index(&log) / 2)).unwrap();
    block_on(log.purge_through(boundary)).unwrap();
    reaches(&store, SpaceState::Enough);
    append_many(&log, 1, 3, 10_000);
}

/// No zeroes are written ahead where data may need their place.
#[test]
fn nothing_is_filled_ahead_while_space_is_low() {
    let memory = MemoryDisk::new();
    let disk = FaultyDisk::new(Arc::new(memory.again()));
    disk.set_space(Some(DiskSpace { free_size: 1 << 20, total_size: 1 << 30 }));
    let store = Store::open_on(Arc::new(disk.clone()), identity(), small_options()).unwrap();
    let (log, _) = store.open_log(GROUP, REPLICA).unwrap();
    // Each flush would ask for zeroes.
    for _ in 0..100 {
        append_many(&log, 1, 1, 700);
    }
    let filled = || store.metrics().filled_size.load(std::sync::atomic::Ordering::Relaxed);
    assert_eq!((store.space().state, filled()), (SpaceState::Full, 0));
    disk.set_space(None);
    reaches(&store, SpaceState::Enough);
    let begin = Instant::now();
    while filled() == 0 {
        assert!(begin.elapsed() < Duration::from_secs(30), "zeroes are not written ahead again");
        append_many(&log, 1, 1, 700);
    }
}

/// The story: another program takes the last block between two looks at the disk. The write that
/// fails closes the log; what was flushed before stands, and a restart with room goes on.
#[test]
fn a_disk_that_is_full_all_the_same_loses_nothing_acknowledged() {
    let disk = MemoryDisk::new();
    let (store, log) = open_on(&disk);
    append_many(&log, 1, 5, 10_000);
    disk.set_capacity(Some(1));
    let error = loop {
        if let Err(error) = append(&log, vec![data(1, next_index(&log), 1, 10_000, 0)]).recv().unwrap() {
            break error;
        }
    };
    assert_eq!(error.kind(), ErrorKind::StorageFull, "{error}");
    let flushed = log.flushed().unwrap();
    assert!(log.poisoned().unwrap().contains("writing"), "{:?}", log.poisoned());
    drop((store, log));
    disk.set_capacity(None);
    let (_store, log) = open_on(&disk);
    assert!(log.last() >= Some(flushed));
    append_many(&log, 1, 3, 10_000);
}
