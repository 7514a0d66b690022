//! The saved index of a segment: it makes opening short and says nothing that the segment does not.

use crate::support::*;
use arqon_proto::{Offset, RaftIndex};
use arqon_storage::{CheckpointKind, Disk, MemoryDisk, OpenError, ReadError};
use bytes::Bytes;

const ENTRY_COUNT: u64 = 150;
const SIZE: usize = 400;

/// A closed log of several segments, whose tail was indexed with a checkpoint.
fn closed() -> MemoryDisk {
    let disk = MemoryDisk::new();
    let (store, log, _) = open(&disk);
    append_many(&log, 1, ENTRY_COUNT, SIZE);
    let state = Bytes::from("the state");
    block_on(log.save_checkpoint(CheckpointKind::Newest, position(1, ENTRY_COUNT - 1), state)).unwrap();
    drop(log);
    block_on(store.close());
    disk
}

fn assert_whole(disk: &MemoryDisk, what: &str) {
    let (store, log, _) = try_open(disk).unwrap_or_else(|error| panic!("{what}: {error}"));
    let entries = read_entries(&log, 0, 1 << 20);
    assert_eq!(entries.len() as u64, ENTRY_COUNT, "{what}");
    for index in 0..ENTRY_COUNT {
        assert_eq!(essence(&entries[index as usize]), essence(&data(1, index, 1, SIZE, 0)), "{what}");
        let one = log.read_data(Offset(index), RaftIndex(u64::MAX), 1).unwrap();
        assert_eq!(one[0].header.base_offset, Offset(index), "{what}");
        assert_eq!(log.offset_at_time(1_000 + index, RaftIndex(ENTRY_COUNT - 1)).unwrap(), Offset(index), "{what}");
    }
    drop(log);
    block_on(store.close());
}

#[test]
fn what_lies_before_the_last_point_is_not_looked_at_to_open_a_log() {
    let disk = closed();
    let (segments, indexes) = (files(&disk, ".seg"), files(&disk, ".idx"));
    assert!(indexes.len() >= 3, "{indexes:?} of {segments:?}");
    assert_whole(&disk, "with its indexes");
    for index in &indexes {
        let segment = index.replace(".idx", ".seg");
        let mut bytes = disk.bytes(&segment).unwrap();
        // The header of the second entry.
        bytes[DATA_AT + 128 + SIZE + 40] ^= 1;
        let damaged = MemoryDisk::copy_of(&disk);
        damaged.set_bytes(&segment, &bytes).unwrap();
        let (store, log, _) = try_open(&damaged).unwrap_or_else(|error| panic!("{segment}: {error}"));
        assert_eq!(log.last(), Some(position(1, ENTRY_COUNT - 1)));
        let first: u64 = segment[segment.len() - 24..segment.len() - 4].parse().unwrap();
        assert_eq!(log.entries(RaftIndex(first)..RaftIndex(first + 1), 1).unwrap().len(), 1);
        let error = log.entries(RaftIndex(first + 1)..RaftIndex(first + 2), 1).unwrap_err();
        assert!(matches!(error, ReadError::Damaged { .. }), "{error}");
        drop((log, store));

        damaged.remove(index).unwrap();
        let error = try_open(&damaged).err().unwrap();
        assert!(matches!(error, OpenError::Quarantined { .. }), "{error}");
    }
}

#[test]
fn an_index_that_does_not_fit_changes_nothing() {
    let disk = closed();
    let indexes = files(&disk, ".idx");
    for (number, path) in indexes.iter().enumerate() {
        let whole = disk.bytes(path).unwrap();
        let other = disk.bytes(&indexes[(number + 1) % indexes.len()]).unwrap();
        let cut = whole[..whole.len() / 2].to_vec();
        let mut flipped = whole.clone();
        flipped[whole.len() / 2] ^= 8;
        for (what, bytes) in [("another segment's", other), ("cut", cut), ("flipped", flipped), ("empty", Vec::new())] {
            let copy = MemoryDisk::copy_of(&disk);
            copy.set_bytes(path, &bytes).unwrap();
            assert_whole(&copy, what);
        }
        let copy = MemoryDisk::copy_of(&disk);
        copy.remove(path).unwrap();
        assert_whole(&copy, "none");
    }
}

/// The index of entries that were truncated must not be believed of those that took their place.
#[test]
fn an_index_of_truncated_entries_is_not_believed() {
    let disk = MemoryDisk::new();
    let (store, log, _) = open(&disk);
    append_many(&log, 1, ENTRY_COUNT, SIZE);
    drop(log);
    block_on(store.close());
    let stale: Vec<_> = files(&disk, ".idx").iter().map(|path| disk.bytes(path).unwrap()).collect();
    assert!(stale.len() >= 2);

    let (store, log, _) = open(&disk);
    block_on(log.truncate_from(RaftIndex(0))).unwrap();
    // The same sizes, so that every entry begins where a stale point says; other offsets.
    let entries = (0..ENTRY_COUNT).map(|index| data(2, index, 3, SIZE, 2_000 + index)).collect();
    append_flushed(&log, entries);
    drop(log);
    block_on(store.close());
    for path in files(&disk, ".idx") {
        for bytes in &stale {
            let copy = MemoryDisk::copy_of(&disk);
            copy.set_bytes(&path, bytes).unwrap();
            let (_store, log, _) = open(&copy);
            for index in 0..ENTRY_COUNT {
                let one = log.read_data(Offset(3 * index + 1), RaftIndex(u64::MAX), 1).unwrap();
                assert_eq!(essence(&one[0]), essence(&data(2, index, 3, SIZE, 0)));
            }
        }
    }
}

#[test]
fn a_log_start_within_an_indexed_segment_is_met() {
    let disk = closed();
    for keep_from in [1, 20, 40, 77, ENTRY_COUNT - 1] {
        let copy = MemoryDisk::copy_of(&disk);
        let (store, log, _) = open(&copy);
        block_on(log.purge_through(position(1, keep_from - 1))).unwrap();
        drop(log);
        block_on(store.close());
        let (_store, log, _) = open(&copy);
        assert_eq!(log.log_start(), Offset(keep_from));
        let entries = read_entries(&log, keep_from, 1 << 20);
        assert_eq!(entries.len() as u64, ENTRY_COUNT - keep_from);
        let indexes = files(&copy, ".idx");
        let segments = files(&copy, ".seg");
        let orphan = indexes.iter().find(|index| !segments.contains(&index.replace(".idx", ".seg")));
        assert_eq!(orphan, None, "indexes go with their segments");
    }
}

/// A checkpoint may save the index with an entry that is still on its way to the disk. When only the
/// header of that one arrives, the entry before it is the last one, in its own term.
#[test]
fn an_indexed_entry_that_is_torn_leaves_the_one_before_it_whole() {
    let disk = MemoryDisk::new();
    let (store, log, _) = open(&disk);
    append_many(&log, 1, 60, SIZE);
    append_many(&log, 2, 10, SIZE);
    drop(log);
    block_on(store.close());
    let later = MemoryDisk::copy_of(&disk);
    let (store, log, _) = open(&later);
    append_many(&log, 2, 1, SIZE);
    let state = Bytes::from("the state");
    block_on(log.save_checkpoint(CheckpointKind::Newest, position(1, 3), state)).unwrap();
    drop(log);
    block_on(store.close());

    let segment = files(&disk, ".seg").pop().unwrap();
    let (mut bytes, arrived) = (disk.bytes(&segment).unwrap(), later.bytes(&segment).unwrap());
    let base: u64 = segment[segment.len() - 24..segment.len() - 4].parse().unwrap();
    assert!(base < 60, "the segment began in the first term");
    let at = DATA_AT + (70 - base) as usize * (128 + SIZE);
    bytes.resize(bytes.len().max(at + 128 + SIZE), 0);
    bytes[at..at + 128].copy_from_slice(&arrived[at..at + 128]);
    disk.set_bytes(&segment, &bytes).unwrap();
    let index = segment.replace(".seg", ".idx");
    let saved = later.bytes(&index).unwrap();
    if disk.bytes(&index).is_err() {
        drop(disk.create(&index).unwrap());
    }
    disk.set_bytes(&index, &saved).unwrap();

    let (_store, log, _) = open(&disk);
    assert_eq!(log.last(), Some(position(2, 69)));
    append_many(&log, 3, 5, SIZE);
    assert_eq!(read_entries(&log, 0, 1 << 20).len(), 75);
}

#[test]
fn the_ends_of_terms_are_found_wherever_they_lie() {
    let disk = MemoryDisk::new();
    let (store, log, _) = open(&disk);
    let terms = [(1, 1), (2, 40), (3, 1), (4, 1), (7, 60), (8, 3), (9, 20)];
    let mut ends = Vec::new();
    for (term, count) in terms {
        append_many(&log, term, count, SIZE);
        ends.push(position(term, next_index(&log) - 1));
    }
    let last = next_index(&log) - 1;
    let term_ends = |log: &arqon_storage::Log, first, last| log.term_ends(RaftIndex(first)..=RaftIndex(last)).unwrap();
    assert_eq!(term_ends(&log, 0, last), ends);
    drop(log);
    block_on(store.close());
    let (_store, log, _) = open(&disk);
    assert_eq!(term_ends(&log, 0, last), ends);
    for first in 0..=last {
        assert_eq!(
            term_ends(&log, first, last),
            ends.iter().copied().filter(|end| end.index.0 >= first).collect::<Vec<_>>()
        );
    }
    assert_eq!(term_ends(&log, 0, 41), [position(1, 0), position(2, 40), position(3, 41)]);
    assert_eq!(term_ends(&log, 5, 20), [position(2, 20)]);

    // Those on their way to the disk have terms too, in segments that may not be there yet.
    let mut waiting = Vec::new();
    for term in 10..60 {
        let first = next_index(&log);
        waiting.push(append(&log, (first..first + 3).map(|index| data(term, index, 1, SIZE, 3_000)).collect()));
        ends.push(position(term, first + 2));
        assert_eq!(term_ends(&log, 0, first + 2), ends);
    }
    waiting.into_iter().for_each(|flushed| flushed.recv().unwrap().unwrap());
}
