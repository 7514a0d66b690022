//! Files of purged segments that become new ones.

use std::io::ErrorKind;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::support::*;
use arqon_proto::{Batch, BatchKind, GroupId, Header, Offset, RaftIndex, ReplicaId, Term};
use arqon_storage::{
    Backend, BatchInspection, Disk, DiskSpace, FaultyDisk, Log, MemoryDisk, Operation, Options, SpaceState, Store,
    inspect_on,
};

const SEGMENT_SIZE: u64 = 32 << 10;
const PATIENCE: Duration = Duration::from_secs(30);
const BLOCK_SIZE: u64 = 4_096;
const HEADER_SIZE: usize = 128;

/// Every segment may be used again.
fn options() -> Options {
    Options { segment_size_first: SEGMENT_SIZE, ..small_options() }
}

/// All disks and backends.
fn fixtures() -> Vec<Fixture> {
    let mut all = Fixture::all();
    all.iter_mut().for_each(|fixture| fixture.options.segment_size_first = SEGMENT_SIZE);
    all
}

fn open_on(disk: &MemoryDisk) -> (Store, Log) {
    let (store, log, _) = crate::support::open_on(Arc::new(disk.again()), options()).unwrap();
    (store, log)
}

/// Does `work` as long as `goes_on` says, within reason.
fn repeat_while(mut goes_on: impl FnMut() -> bool, mut work: impl FnMut()) {
    let begin = Instant::now();
    while goes_on() {
        assert!(begin.elapsed() < PATIENCE, "it does not come to an end");
        work();
    }
}

fn recycled_count(store: &Store) -> u64 {
    store.metrics().recycled_count.load(Ordering::Relaxed)
}

fn pool_size(store: &Store) -> u64 {
    store.metrics().pool_size.load(Ordering::Relaxed)
}

/// Purges all full segments.
fn purge(log: &Log) {
    if let Some(boundary) = log.last_segment_boundary(RaftIndex(next_index(log))) {
        block_on(log.purge_through(boundary)).unwrap();
    }
}

/// Appends and purges until `count` files wait in the pool. A file whose index is being saved is removed
/// instead, so how much that takes is not certain.
fn fill_pool(store: &Store, log: &Log, count: u64) {
    let is_short = || pool_size(store) < count * SEGMENT_SIZE;
    repeat_while(is_short, || {
        append_many(log, 1, 60, 900);
        purge(log);
    });
}

fn first_index(log: &Log) -> u64 {
    log.purged().map_or(0, |purged| purged.index.0 + 1)
}

/// Path of the newest segment, and the byte after its last batch.
fn tail_of(disk: &dyn Disk) -> (String, u64) {
    let inspection = inspect_on(disk).unwrap();
    let segment = inspection.logs[0].segments.last().unwrap();
    let mut end = DATA_AT as u64;
    for batch in segment.batches() {
        if let BatchInspection::Whole { at, batch } = batch {
            end = at + batch.header.batch_size() as u64;
        }
    }
    (segment.path.clone(), end)
}

/// The story: a log with retention by size runs on and on. Its files go round, and whatever the size of an
/// entry, so wherever the last one ends in its block, a start finds that end and no torn tail.
#[test]
fn a_log_goes_round_in_its_files_and_each_start_finds_its_end() {
    for fixture in fixtures() {
        // The first sizes end an entry at a block's end and right before it.
        for size in
            [BLOCK_SIZE as usize - HEADER_SIZE, BLOCK_SIZE as usize - HEADER_SIZE - 64, 1_024 - HEADER_SIZE, 700]
        {
            let (store, log, _) = fixture.open();
            fill_pool(&store, &log, 2);
            let before = recycled_count(&store);
            repeat_while(|| recycled_count(&store) < before + 2, || append_many(&log, 1, 1, size));
            append_many(&log, 1, 1, size);
            let kept = read_entries(&log, first_index(&log), 10_000);
            let last = log.last();
            drop((log, store));
            let (store, log, recovery) = fixture.open();
            assert_eq!((recovery.cut, log.last()), (None, last), "entries of {size} bytes");
            assert_eq!(read_entries(&log, first_index(&log), 10_000), kept);
            // It goes on in that file, and is found again.
            append_many(&log, 1, 3, size);
            block_on(store.close());
            drop(log);
            let (_store, log, recovery) = fixture.open();
            assert_eq!((recovery.cut, next_index(&log)), (None, last.unwrap().index.0 + 4), "entries of {size} bytes");
        }
    }
}

/// The story: a consumer is slow and has bytes of a segment that retention drops meanwhile.
#[test]
fn bytes_that_somebody_still_has_never_change() {
    for fixture in fixtures() {
        let (store, log, _) = fixture.open();
        append_many(&log, 1, 100, 900);
        // One entry at a time: larger reads are copies.
        let read = |index: u64| log.entries(RaftIndex(index)..RaftIndex(index + 1), 1).unwrap().remove(0);
        let held: Vec<Batch> = (0..20).map(read).collect();
        let copies: Vec<Vec<u8>> = held.iter().map(|batch| batch.records.to_vec()).collect();
        purge(&log);
        // More than can wait, so that each file that waits is taken.
        append_many(&log, 1, 200, 900);
        assert!(recycled_count(&store) > 0);
        for (batch, copy) in held.iter().zip(&copies) {
            assert_eq!(batch.records, *copy, "entry {}", batch.header.index);
        }
    }
}

#[test]
fn a_file_that_is_mapped_or_of_an_earlier_run_is_removed() {
    let fixture = Fixture { options: options(), ..Fixture::real(Backend::Plain) };
    let (store, log, _) = fixture.open();
    append_many(&log, 1, 60, 900);
    let held = read_entries(&log, 0, 1);
    purge(&log);
    assert_eq!(pool_size(&store), 0, "all of it is held");
    drop(held);
    fill_pool(&store, &log, 1);
    append_many(&log, 1, 60, 900);
    drop((log, store));

    let (store, log, _) = fixture.open();
    purge(&log);
    assert_eq!(pool_size(&store), 0, "nothing is known of the blocks");
    fill_pool(&store, &log, 1);
}

/// The story: a whole segment is truncated, so that the next one begins with the same entry and continues
/// the same chain. In the old file the truncated entries would pass for its own.
#[test]
fn a_segment_of_which_entries_were_cut_off_is_never_used_again() {
    let disk = MemoryDisk::new();
    let (store, log) = open_on(&disk);
    append_many(&log, 1, 70, 900);
    let boundary = log.last_segment_boundary(RaftIndex(40)).unwrap();
    block_on(log.truncate_from(boundary.index.next())).unwrap();
    assert_eq!(pool_size(&store), 0, "truncated whole");

    block_on(log.truncate_from(RaftIndex(10))).unwrap();
    append_many(&log, 2, 25, 900);
    block_on(log.purge_through(position(1, 9))).unwrap();
    assert_eq!(pool_size(&store), 0, "truncated in part, and purged later");
    assert_eq!(recycled_count(&store), 0);
}

/// Every field right but the chain: what an old record at the very place would be.
fn forged(index: u64, offset: u64, term: u64, chain: u64) -> Vec<u8> {
    let batch = data(term, index, 1, 900, 1_000 + index);
    let header = Header { base_offset: Offset(offset), chain, term: Term(term), ..batch.header };
    [header.encode().as_slice(), &batch.records].concat()
}

/// The story: the last write to a recycled file is torn, and behind the last whole entry stands an old one of the
/// same group, term, index and offset, whose checksums are right.
#[test]
fn an_old_record_at_the_very_place_is_not_taken_for_the_next_one() {
    for seed in 0..64 {
        let disk = MemoryDisk::new();
        let (store, log) = open_on(&disk);
        fill_pool(&store, &log, 1);
        let before = recycled_count(&store);
        repeat_while(|| recycled_count(&store) == before, || append_many(&log, 1, 1, 900));
        append_many(&log, 1, seed % 5, 900);
        let kept = read_entries(&log, first_index(&log), 10_000);
        let (next, offset, term) = (next_index(&log), log.next_offset().0, 1);
        let last_chain = Header::chain_value(&kept.last().unwrap().header.encode());
        block_on(store.close());
        drop(log);
        let (path, end) = tail_of(&disk);
        let mut bytes = disk.bytes(&path).unwrap();
        let chain = if seed < 32 { last_chain ^ (1 << seed) } else { seed };
        let old = [forged(next, offset, term, chain), forged(next + 1, offset + 1, term, chain)].concat();
        let at = usize::try_from(end).unwrap();
        bytes[at..at + old.len()].copy_from_slice(&old);
        disk.set_bytes(&path, &bytes).unwrap();

        let inspection = inspect_on(&disk).unwrap();
        let check = inspection.logs[0].check(|_, _| ControlFlow::Continue(()));
        assert!(check.faults.iter().all(|fault| !fault.is_damage), "{:?}", check.faults);
        let (_store, log) = open_on(&disk);
        assert_eq!(next_index(&log), next, "chain {chain:x}");
        assert_eq!(read_entries(&log, first_index(&log), 10_000), kept);
        assert!(log.damaged().is_empty());
        append_many(&log, 2, 3, 900);
    }
}

/// The same with the right chain is taken: the test above would see it.
#[test]
fn a_record_that_continues_the_chain_is_taken() {
    let disk = MemoryDisk::new();
    let (store, log) = open_on(&disk);
    append_many(&log, 1, 3, 900);
    let chain = Header::chain_value(&read_entries(&log, 0, 10_000).last().unwrap().header.encode());
    block_on(store.close());
    drop(log);
    let (path, end) = tail_of(&disk);
    let mut bytes = disk.bytes(&path).unwrap();
    let record = forged(3, 3, 1, chain);
    let at = usize::try_from(end).unwrap();
    bytes.resize(bytes.len().max(at + record.len()), 0);
    bytes[at..at + record.len()].copy_from_slice(&record);
    disk.set_bytes(&path, &bytes).unwrap();
    let (_store, log) = open_on(&disk);
    assert_eq!(next_index(&log), 4);
}

/// The story: a new segment is begun in an old file, and the power goes before or while its header is written,
/// or the disk fails there. The log ends where it ended, and the file is gone or whole.
#[test]
fn a_roll_into_an_old_file_that_is_not_finished_leaves_the_log_as_it_was() {
    for operation in [Operation::Write, Operation::Sync, Operation::Name, Operation::SyncDir] {
        for (skip, seed) in (0..6).flat_map(|skip| (0..8).map(move |seed| (skip, seed))) {
            let memory = MemoryDisk::new();
            let disk = FaultyDisk::new(Arc::new(memory.again()));
            let store = Store::open_on(Arc::new(disk.clone()), identity(), options()).unwrap();
            let (log, _) = store.open_log(GROUP, REPLICA).unwrap();
            fill_pool(&store, &log, 1);
            // Up to the last one that fits.
            let pool = pool_size(&store);
            let has_room = || pool_size(&store) == pool && tail_of(&memory).1 + 1_028 <= SEGMENT_SIZE;
            repeat_while(has_room, || append_many(&log, 1, 1, 900));
            let acknowledged = next_index(&log);
            let kept = read_entries(&log, first_index(&log), 10_000);
            disk.fail(operation, skip, ErrorKind::Other);
            let result = append(&log, vec![data(1, acknowledged, 1, 900, 5_000)]).recv().unwrap();
            drop((log, store));
            let (_store, log) = open_on(&memory.cut(seed));
            let found = read_entries(&log, first_index(&log), 10_000);
            assert_eq!(found[..kept.len()], kept, "{operation:?} {skip} {seed}");
            assert!(found.len() <= kept.len() + 1);
            assert!(result.is_err() || found.len() == kept.len() + 1, "{operation:?} {skip} {seed}");
        }
    }
}

#[test]
fn files_pass_between_logs_of_one_owner_and_to_nobody_else() {
    let disk = MemoryDisk::new();
    let (store, log) = open_on(&disk);
    let open = |group: u64| store.open_log(GroupId(group), ReplicaId(1)).unwrap().0;
    let (same, other, nobody) = (open(20), open(21), open(22));
    log.set_owner("alpha");
    same.set_owner("alpha");
    other.set_owner("beta");
    fill_pool(&store, &log, 2);
    let before = recycled_count(&store);
    append_many(&other, 1, 1, 900);
    append_many(&nobody, 1, 1, 900);
    assert_eq!(recycled_count(&store), before, "the bytes of an owner stay with it");
    append_many(&same, 1, 1, 900);
    assert_eq!(recycled_count(&store), before + 1);
    assert_eq!(read_entries(&same, 0, 10_000).len(), 1);

    // A log that is deleted leaves nothing.
    let size = pool_size(&store);
    append_many(&same, 1, 60, 900);
    let size = size.min(pool_size(&store));
    store.delete_log(GroupId(20), ReplicaId(1)).unwrap();
    assert_eq!(pool_size(&store), size);
    fill_pool(&store, &nobody, 1);
    let with_its_own = pool_size(&store);
    drop(nobody);
    store.delete_log(GroupId(22), ReplicaId(1)).unwrap();
    assert!(pool_size(&store) < with_its_own, "only it could have used them");
}

#[test]
fn a_start_drops_the_files_and_an_inspection_passes_them_over() {
    let disk = MemoryDisk::new();
    let (store, log) = open_on(&disk);
    fill_pool(&store, &log, 2);
    block_on(store.close());
    drop(log);
    assert!(disk.list("pool").unwrap().len() >= 2);
    let inspection = inspect_on(&disk).unwrap();
    assert_eq!(inspection.logs.len(), 1);
    let check = inspection.logs[0].check(|_, _| ControlFlow::Continue(()));
    assert!(check.faults.is_empty() && inspection.logs[0].damage.is_empty(), "{:?}", check.faults);
    let (store, _log) = open_on(&disk);
    assert_eq!((disk.list("pool").unwrap(), pool_size(&store)), (Vec::new(), 0));
}

#[test]
fn a_disk_that_fills_gets_the_files_back_before_anything_is_refused() {
    let memory = MemoryDisk::new();
    let disk = FaultyDisk::new(Arc::new(memory.again()));
    let options = Options { reserve_size_max: 1 << 20, reserve_percent_max: 10, ..options() };
    let total_size = 100 << 20;
    disk.set_space(Some(DiskSpace { free_size: total_size, total_size }));
    let store = Store::open_on(Arc::new(disk.clone()), identity(), options).unwrap();
    let (log, _) = store.open_log(GROUP, REPLICA).unwrap();
    fill_pool(&store, &log, 2);
    // More than the reserve is free, less than twice as much.
    disk.set_space(Some(DiskSpace { free_size: (2 << 20) - 1, total_size }));
    repeat_while(|| pool_size(&store) > 0, std::thread::yield_now);
    assert_eq!(store.space().state, SpaceState::Enough);
    repeat_while(|| !memory.list("pool").unwrap().is_empty(), std::thread::yield_now);
    append_many(&log, 1, 60, 900);
    purge(&log);
    assert_eq!(pool_size(&store), 0, "and takes none");
}

#[test]
fn the_kind_of_an_entry_makes_no_difference() {
    let disk = MemoryDisk::new();
    let (store, log) = open_on(&disk);
    fill_pool(&store, &log, 1);
    let (before, start) = (recycled_count(&store), next_index(&log));
    repeat_while(
        || recycled_count(&store) == before,
        || append_flushed(&log, vec![control(1, next_index(&log), &"control ".repeat(100))]),
    );
    drop((log, store));
    let (_store, log) = open_on(&disk);
    let entries = read_entries(&log, start, 10_000);
    assert!(entries.iter().all(|batch| batch.header.kind == BatchKind::Control));
    assert_eq!(read_data(&log, log.log_start().0, 10_000).last().unwrap().header.index.0, start - 1);
}
