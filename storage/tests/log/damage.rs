//! Bytes that changed on disk, and disks that fail.

use std::io::ErrorKind;
use std::sync::Arc;

use crate::support::*;
use arqon_proto::{Offset, RaftIndex};
use arqon_storage::{
    BatchInspection, CheckpointKind, Disk, FaultyDisk, MemoryDisk, OpenError, Operation, ReadError, Store, inspect_on,
};
use bytes::Bytes;

/// A closed log of two segments with a vote and a checkpoint.
fn closed(entry_count: u64, size: usize) -> MemoryDisk {
    let disk = MemoryDisk::new();
    let (store, log, _) = open(&disk);
    append_many(&log, 1, entry_count, size);
    block_on(log.save_vote(Bytes::from("the vote"))).unwrap();
    block_on(log.save_checkpoint(CheckpointKind::Newest, position(1, 2), Bytes::from("the state"))).unwrap();
    block_on(store.close());
    disk
}

/// The story: one bit of a stopped node's file flips. Either the log refuses to open, or every
/// entry is there and each is right or reported damaged.
#[test]
fn a_flipped_bit_below_the_mark_is_never_silent() {
    let disk = closed(6, 900);
    let all = files(&disk, "");
    assert!(all.len() >= 5, "two segments, manifest, vote, checkpoint: {all:?}");
    let (mut refused_count, mut damaged_count) = (0, 0);
    for path in all {
        let whole = disk.bytes(&path).unwrap();
        for at in (0..whole.len()).filter(|at| whole[*at] != 0 || at % 256 == 0) {
            let mut bytes = whole.clone();
            bytes[at] ^= 1 << (at % 8);
            let copy = MemoryDisk::copy_of(&disk);
            copy.set_bytes(&path, &bytes).unwrap();
            let (_store, log, _) = match try_open(&copy) {
                Ok(opened) => opened,
                Err(OpenError::Quarantined { reason, .. }) => {
                    assert!(!reason.is_empty());
                    assert_eq!(copy.bytes(&path).unwrap(), bytes, "quarantine changed {path}");
                    refused_count += 1;
                    continue;
                }
                Err(error) => panic!("{path} byte {at}: {error}"),
            };
            assert_eq!(log.last(), Some(position(1, 5)), "{path} byte {at}");
            assert_eq!(log.vote().unwrap(), "the vote", "{path} byte {at}");
            for index in 0..6 {
                match log.entries(RaftIndex(index)..RaftIndex(index + 1), 1) {
                    Ok(batches) => {
                        assert_eq!(essence(&batches[0]), essence(&data(1, index, 1, 900, 0)), "{path} byte {at}")
                    }
                    Err(ReadError::Damaged { first, last, index: at_index, .. }) => {
                        assert_eq!((first.0, last.0, at_index.0), (index, index, index));
                        damaged_count += 1;
                    }
                    Err(error) => panic!("{path} byte {at}: {error}"),
                }
            }
            match log.load_checkpoint(CheckpointKind::Newest, position(1, 2)) {
                Ok(bytes) => assert_eq!(bytes, "the state"),
                Err(error) => assert_eq!(error.kind(), ErrorKind::InvalidData),
            }
        }
    }
    assert!(refused_count > 100 && damaged_count > 100, "{refused_count} refused, {damaged_count} damaged");
}

#[test]
fn reading_goes_on_behind_damaged_records() {
    let disk = closed(6, 900);
    let path = &files(&disk, ".seg")[0];
    let mut bytes = disk.bytes(path).unwrap();
    bytes[DATA_AT + 1_028 + 500] ^= 1;
    disk.set_bytes(path, &bytes).unwrap();
    let (store, log, _) = open(&disk);
    assert_eq!(log.read_data(Offset(0), RaftIndex(5), usize::MAX).unwrap().len(), 1, "what stands before is served");
    let error = log.read_data(Offset(1), RaftIndex(5), usize::MAX).unwrap_err();
    assert!(matches!(&error, ReadError::Damaged { first: Offset(1), last: Offset(1), .. }), "{error}");
    assert_eq!(log.read_data(Offset(2), RaftIndex(5), usize::MAX).unwrap().len(), 4);
    let met_count = store.metrics().damaged_read_count.load(std::sync::atomic::Ordering::Relaxed);
    assert_eq!(met_count, 2, "both reads that came to it count");

    let log = inspect_on(&disk.again()).unwrap().logs.remove(0);
    let lines: Vec<_> = log.segments[0].batches().collect();
    assert!(
        matches!(&lines[1], BatchInspection::DamagedRecords { at, .. } if *at == (DATA_AT + 1_028) as u64),
        "{lines:?}"
    );
    assert_eq!(log.marked_next_index, Some(6));
}

#[test]
fn missing_and_shortened_files_are_noticed() {
    let disk = closed(9, 900);
    for path in files(&disk, "").into_iter().filter(|path| !path.contains("checkpoint")) {
        let copy = MemoryDisk::copy_of(&disk);
        copy.remove(&path).unwrap();
        let error =
            open_on(Arc::new(copy), one_thread()).err().unwrap_or_else(|| panic!("{path} is gone and nobody noticed"));
        assert!(matches!(error, OpenError::Quarantined { .. }), "{path}: {error}");
        let whole = disk.bytes(&path).unwrap();
        let used = whole.iter().rposition(|byte| *byte != 0).unwrap();
        for size in [0, used / 2, used] {
            let copy = MemoryDisk::copy_of(&disk);
            copy.set_bytes(&path, &whole[..size]).unwrap();
            let error = open_on(Arc::new(copy), one_thread())
                .err()
                .unwrap_or_else(|| panic!("{path} cut to {size} and nobody noticed"));
            assert!(matches!(error, OpenError::Quarantined { .. }), "{path}: {error}");
        }
        let copy = MemoryDisk::copy_of(&disk);
        copy.set_bytes(&path, &vec![0; whole.len()]).unwrap();
        assert!(open_on(Arc::new(copy), one_thread()).is_err(), "{path} is all zeroes and nobody noticed");
    }
}

#[test]
fn a_newer_format_is_refused_and_not_touched() {
    let disk = closed(3, 100);
    for path in files(&disk, "").into_iter().filter(|path| !path.contains("checkpoint")).chain(["identity".to_owned()])
    {
        let copy = MemoryDisk::copy_of(&disk);
        let mut bytes = disk.bytes(&path).unwrap();
        bytes[8] = 2;
        let size = u32::from_le_bytes(bytes[12..16].try_into().unwrap()) as usize;
        let crc = crc32fast::hash(&bytes[..16 + size]);
        bytes[16 + size..20 + size].copy_from_slice(&crc.to_le_bytes());
        copy.set_bytes(&path, &bytes).unwrap();
        let error = try_open(&copy).err().unwrap();
        assert!(matches!(error, OpenError::NewerFormat { version: 2, .. }), "{path}: {error}");
        assert!(error.to_string().contains("newer program"), "{error}");
        assert_eq!(copy.bytes(&path).unwrap(), bytes);
    }
}

#[test]
fn a_stale_file_of_another_placement_is_quarantined() {
    let (disk, other) = (closed(5, 900), closed(5, 900));
    let path = files(&disk, ".seg").remove(0);
    disk.set_bytes(&path, &other.bytes(&path).unwrap()).unwrap();
    assert!(matches!(open_on(Arc::new(disk), one_thread()), Err(OpenError::Quarantined { .. })));
}

/// The story: the disk begins to fail at some operation. Nothing is acknowledged after that, the
/// log takes no more writes, what was flushed is still read, and the next start brings it back.
#[test]
fn a_failing_disk_poisons_the_log_and_loses_nothing_acknowledged() {
    let errors = [
        (Operation::Write, ErrorKind::StorageFull),
        (Operation::Sync, ErrorKind::Other),
        (Operation::Name, ErrorKind::StorageFull),
        (Operation::SyncDir, ErrorKind::Other),
    ];
    for (operation, kind) in errors {
        for skip in 0..6 {
            let memory = MemoryDisk::new();
            let disk = FaultyDisk::new(Arc::new(memory.again()));
            let (store, log, _) = open_on(Arc::new(disk.clone()), one_thread()).unwrap();
            append_many(&log, 1, 5, 700);
            disk.fail(operation, skip, kind);
            let mut acknowledged = 5;
            let mut failed = false;
            for _ in 0..200 {
                let (sender, receiver) = std::sync::mpsc::channel();
                let batch = data(1, next_index(&log), 1, 700, 0);
                if log.append(vec![batch], Box::new(move |result| drop(sender.send(result)))).is_err() {
                    break;
                }
                match receiver.recv().unwrap() {
                    Ok(()) => {
                        assert!(!failed, "acknowledged after a failure");
                        acknowledged += 1;
                    }
                    Err(_) => failed = true,
                }
            }
            let story = format!("{operation:?} after {skip}");
            assert!(disk.failed_count() > 0 && log.poisoned().is_some(), "{story}: the fault did not take place");
            assert!(block_on(log.save_vote(Bytes::from("v"))).is_err(), "{story}: a vote on a poisoned log");
            assert_eq!(log.flushed(), Some(position(1, acknowledged - 1)), "{story}");
            assert_eq!(
                log.entries(RaftIndex(0)..RaftIndex(acknowledged), usize::MAX).unwrap().len() as u64,
                acknowledged
            );
            disk.heal();
            drop((store, log, disk));

            let (_store, log, _) = open_on(Arc::new(FaultyDisk::new(Arc::new(memory.again()))), one_thread()).unwrap();
            assert!(next_index(&log) >= acknowledged, "{story}: acknowledged entries are lost");
            append_many(&log, 1, 3, 100);
        }
    }
}

/// The story: fsync failed, so the kernel calls the lost pages clean; the process starts again
/// and the page cache still shows them. They must be written anew before anybody counts on them. With a
/// marker of the failure they go to fresh blocks; where the disk took no marker, what was never
/// marked durable is written again all the same.
#[test]
fn after_a_failed_sync_nothing_is_believed_that_it_left() {
    for marker in [true, false] {
        let memory = MemoryDisk::new();
        let disk = FaultyDisk::new(Arc::new(memory.again()));
        let (store, log, _) = open_on(Arc::new(disk.clone()), one_thread()).unwrap();
        append_many(&log, 1, 2, 100);
        disk.fail(Operation::Sync, 0, ErrorKind::Other);
        if !marker {
            disk.fail_too(Operation::Name, 0, ErrorKind::ReadOnlyFilesystem);
        }
        let waiting = append(&log, vec![data(1, 2, 1, 100, 0)]);
        let error = waiting.recv().unwrap().unwrap_err();
        assert!(error.to_string().contains("flush of the disk: injected failure of Sync"), "{error}");
        let reason = log.poisoned().unwrap();
        assert!(reason.contains(".seg") && reason.contains("flush of the disk"), "{reason}");
        drop((store, log, disk));
        assert_eq!(files(&memory, "rewrite").len(), usize::from(marker));
        memory.lose_unsynced();

        let store = Store::open_on(Arc::new(memory.again()), identity(), small_options()).unwrap();
        let (log, recovery) = store.open_log(GROUP, REPLICA).unwrap();
        assert_eq!((recovery.rewritten, recovery.unmarked_count), (marker, 1));
        let kept = next_index(&log);
        assert_eq!(kept, 3, "the page cache shows the entry");
        drop((store, log));
        for seed in 0..20 {
            let after = MemoryDisk::copy_of(&memory).cut(seed);
            let (_store, log, _) = open_on(Arc::new(after), one_thread()).unwrap();
            assert_eq!(next_index(&log), kept, "the tail that was answered for is not durable");
        }
    }
}

#[test]
fn inspection_needs_no_lock_and_changes_nothing() {
    let fixture = Fixture::real(arqon_storage::Backend::Plain);
    let (_store, log, _) = fixture.open();
    append_many(&log, 1, 30, 700);
    let Place::Real(dir) = &fixture.place else { unreachable!() };
    let found = arqon_storage::inspect(dir.path()).unwrap();
    assert_eq!(found.identity.unwrap().0, "test");
    let log = &found.logs[0];
    assert_eq!((log.group, log.replica, log.damage.len(), log.marked_next_index), (GROUP, REPLICA, 0, Some(30)));
    let batches = log.segments.iter().flat_map(|segment| segment.batches());
    let whole = batches.filter(|batch| matches!(batch, BatchInspection::Whole { .. })).count();
    assert_eq!(whole, 30);
    assert!(arqon_storage::inspect(&dir.path().join("absent")).is_err());
}

/// The story: after a truncation the log went on in a new segment; then the marks were lost that tell of
/// both. That the new segment begins where it does tells it too.
#[test]
fn truncated_entries_stay_gone_when_the_marks_that_tell_of_it_are_lost() {
    let disk = MemoryDisk::new();
    let (store, log, _) = open(&disk);
    append_many(&log, 1, 3, 300);
    block_on(log.truncate_from(RaftIndex(1))).unwrap();
    append_many(&log, 2, 1, 300);
    drop(log);
    block_on(store.close());
    for path in files(&disk, ".seg") {
        let mut bytes = disk.bytes(&path).unwrap();
        let sequence = |at: usize| u64::from_le_bytes(bytes[at + 16..at + 24].try_into().unwrap());
        let newest = if sequence(4_096) > sequence(8_192) { 4_096 } else { 8_192 };
        bytes[newest..newest + 4_096].fill(0);
        disk.set_bytes(&path, &bytes).unwrap();
    }
    let (_store, log, _) = open(&disk);
    let found: Vec<_> = read_entries(&log, 0, usize::MAX).iter().map(essence).collect();
    assert_eq!(found, [essence(&data(1, 0, 1, 300, 0)), essence(&data(2, 1, 1, 300, 0))]);
}
