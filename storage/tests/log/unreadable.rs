//! What the device cannot read, and cuts beside what cannot be read.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::support::*;
use arqon_proto::{Batch, Offset, RaftIndex};
use arqon_storage::{Disk, FaultyDisk, Log, MemoryDisk, Options, ReadError, RealDisk, Store};
use bytes::Bytes;

const COUNT: u64 = 60;
const COMMITTED: u64 = 55;
const SIZE: usize = 700;
const ENTRY_SIZE: u64 = SIZE as u64 + 128;
/// Byte at which the batches of a segment begin.
const BATCHES_AT: u64 = DATA_AT as u64;

fn entry(index: u64) -> Batch {
    data(1 + index / 20, index, 1, SIZE, 1_000 + index)
}

fn place(index: u64) -> arqon_storage::LogPosition {
    position(1 + index / 20, index)
}

/// A closed log of several segments without saved indexes.
fn closed() -> MemoryDisk {
    closed_log((0..COUNT).map(entry), place(COMMITTED))
}

/// The segment of an entry, and the byte at which it begins there.
fn find(disk: &MemoryDisk, index: u64) -> (String, u64) {
    let path = files(disk, ".seg").into_iter().rfind(|path| segment_base(path) <= index).unwrap();
    let at = BATCHES_AT + (index - segment_base(&path)) * ENTRY_SIZE;
    (path, at)
}

fn flip(disk: &MemoryDisk, index: u64, at: u64) {
    let (path, begin) = find(disk, index);
    let mut bytes = disk.bytes(&path).unwrap();
    bytes[(begin + at) as usize] ^= 4;
    disk.set_bytes(&path, &bytes).unwrap();
}

fn flip_header(disk: &MemoryDisk, index: u64) {
    flip(disk, index, 40);
}

/// Entries of `range` that are read as they were written; the others must be told to be damaged.
fn readable(log: &Log, range: Range<u64>) -> Vec<u64> {
    let read = |index: &u64| match log.entries(RaftIndex(*index)..RaftIndex(index + 1), 1) {
        Ok(found) => {
            assert_eq!(essence(&found[0]), essence(&entry(*index)));
            true
        }
        Err(ReadError::Damaged { .. }) => false,
        Err(error) => panic!("entry {index}: {error}"),
    };
    range.filter(read).collect()
}

/// Repairs until nothing is damaged; a repair may meet more.
fn repair_all(log: &Log) {
    let begin = Instant::now();
    while let Some(damage) = log.damaged().first() {
        let repaired = block_on(log.repair(damage, from_peer(damage, entry)));
        assert!(repaired.is_ok() || begin.elapsed() < Duration::from_secs(20), "{damage:?}: {repaired:?}");
    }
}

fn is_damage(error: &io::Error) -> bool {
    error.get_ref().is_some_and(|error| matches!(error.downcast_ref(), Some(ReadError::Damaged { .. })))
}

/// The story: a sector goes bad under a log in use. Its entries are told to be damaged, all others are served, and
/// what a peer has is written to other sectors.
#[test]
fn a_bad_sector_is_damage_and_is_written_anew() {
    for (sectors, opened_before) in [(vec![1], true), (vec![1], false), (vec![0, 3, 4], true), (vec![1, 4], false)] {
        let memory = closed();
        let disk = FaultyDisk::new(Arc::new(memory.again()));
        let path = files(&memory, ".seg").remove(1);
        let spoil = || {
            for sector in &sectors {
                let at = BATCHES_AT + sector * 4_096;
                disk.make_unreadable(&path, at..at + 4_096);
            }
        };
        if !opened_before {
            spoil();
        }
        let (store, log, recovery) = open_on(Arc::new(disk.clone()), one_thread()).unwrap();
        assert_eq!(recovery.damaged.is_empty(), opened_before, "{sectors:?}");
        if opened_before {
            spoil();
        }
        let is_touched = |index: &u64| {
            let (of, at) = find(&memory, *index);
            let meets =
                |sector: &u64| at < BATCHES_AT + (sector + 1) * 4_096 && at + ENTRY_SIZE > BATCHES_AT + sector * 4_096;
            of == path && sectors.iter().any(meets)
        };
        let lost: Vec<u64> = (0..COUNT).filter(is_touched).collect();
        assert!(lost.len() >= 5 * sectors.len() - 1, "{lost:?}");
        let read = readable(&log, 0..COUNT);
        let unread: Vec<u64> = (0..COUNT).filter(|index| !read.contains(index)).collect();
        if opened_before {
            assert_eq!(unread, lost, "{sectors:?}");
        } else {
            // With one place behind it that is known, everything between the first break and the last is in doubt.
            assert!(lost.iter().all(|index| unread.contains(index)), "{unread:?} and not {lost:?}");
            assert!(unread.iter().all(|index| (lost[0]..=lost[lost.len() - 1]).contains(index)), "{unread:?}");
        }
        repair_all(&log);
        assert_eq!(readable(&log, 0..COUNT).len() as u64, COUNT, "{sectors:?}");
        close(store, log);
        drop(disk);
        let (_store, log, recovery) = open(&memory);
        assert_eq!((recovery.damaged.len(), recovery.cut), (0, None));
        assert_eq!(readable(&log, 0..COUNT).len() as u64, COUNT, "{sectors:?}");
    }
}

/// Nobody reads the sector but the scrubber.
#[test]
fn the_scrubber_finds_a_bad_sector() {
    let memory = closed();
    let disk = FaultyDisk::new(Arc::new(memory.again()));
    disk.make_unreadable(&files(&memory, ".seg")[1], BATCHES_AT + 8_192..BATCHES_AT + 12_288);
    let options = Options { scrub_rate_max: 1 << 30, ..one_thread() };
    let store = Store::open_on(Arc::new(disk), identity(), options).unwrap();
    let (log, _) = store.open_log(GROUP, REPLICA).unwrap();
    let begin = Instant::now();
    while log.damaged().is_empty() {
        assert!(begin.elapsed() < Duration::from_secs(30));
        std::thread::yield_now();
    }
    repair_all(&log);
    assert_eq!(readable(&log, 0..COUNT).len() as u64, COUNT);
    close(store, log);
}

/// The header of a segment cannot be read: as if the file were lost. That of the newest one is tried again.
#[test]
fn a_segment_whose_front_cannot_be_read_is_written_anew() {
    let memory = closed();
    let segments = files(&memory, ".seg");
    let disk = FaultyDisk::new(Arc::new(memory.again()));
    disk.make_unreadable(&segments[1], 0..4_096);
    let (store, log, recovery) = open_on(Arc::new(disk), one_thread()).unwrap();
    assert_eq!(recovery.damaged.len(), 1, "{recovery:?}");
    repair_all(&log);
    assert_eq!(readable(&log, 0..COUNT).len() as u64, COUNT);
    close(store, log);

    let disk = FaultyDisk::new(Arc::new(memory.again()));
    disk.make_unreadable(segments.last().unwrap(), 0..4_096);
    let store = Store::open_on(Arc::new(disk), identity(), one_thread()).unwrap();
    let error = store.open_log(GROUP, REPLICA).err().expect("it cannot be opened");
    assert!(matches!(error, arqon_storage::OpenError::Io { .. }), "{error}");
}

/// A page that the device cannot give must be an error, not the end of the process. A file that somebody cut
/// short behaves alike.
#[test]
fn a_view_of_what_is_not_there_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let disk = RealDisk::create(dir.path()).unwrap();
    let file = disk.create("file").unwrap();
    file.write_at(&[Bytes::from(vec![7; 64 << 10])], 0).unwrap();
    assert_eq!(file.view(8_200, 100, 1 << 20).unwrap(), vec![7; 100]);
    let other = std::fs::File::options().write(true).open(dir.path().join("file")).unwrap();
    other.set_len(4_096).unwrap();
    assert_eq!(file.view(40_000, 100, 1 << 20).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    assert_eq!(file.view(100, 100, 1 << 20).unwrap(), vec![7; 100]);
}

/// The log start is set on both sides of damage, known of or not, without reading it.
#[test]
fn a_purge_beside_damage_needs_none_of_its_bytes() {
    for opened_before in [false, true] {
        for through in [19, 20] {
            let memory = closed();
            let opened = opened_before.then(|| open(&memory));
            flip_header(&memory, 20);
            let (store, log, _) = opened.unwrap_or_else(|| open(&memory));
            block_on(log.purge_through(place(through))).unwrap();
            assert_eq!(log.log_start(), Offset(through + 1));
            assert_eq!(readable(&log, through + 1..COUNT), (21..COUNT).collect::<Vec<_>>());
            close(store, log);
            let (_store, log, recovery) = open(&memory);
            assert_eq!((log.purged(), recovery.damaged.len() as u64), (Some(place(through)), 20 - through));
            repair_all(&log);
            assert_eq!(readable(&log, through + 1..COUNT), (through + 1..COUNT).collect::<Vec<_>>());
        }
    }
}

/// Amid lost entries the chain value is not known: the log is as it was, and the purge is made when they are back.
#[test]
fn a_purge_amid_damage_waits_for_its_repair() {
    let memory = closed();
    [20, 21].into_iter().for_each(|index| flip_header(&memory, index));
    let (store, log, recovery) = open(&memory);
    assert_eq!(recovery.damaged.len(), 1);
    let error = block_on(log.purge_through(place(20))).unwrap_err();
    assert!(is_damage(&error), "{error}");
    assert_eq!((log.poisoned(), log.purged()), (None, None));
    repair_all(&log);
    block_on(log.purge_through(place(20))).unwrap();
    assert_eq!(readable(&log, 21..COUNT), (21..COUNT).collect::<Vec<_>>());
    close(store, log);
}

/// The entry before a cut, or the first one that it drops, cannot be read.
#[test]
fn a_truncation_beside_damage_needs_none_of_its_bytes() {
    for (damaged, last) in [(55, 55), (57, 56), (57, 57), (58, 55)] {
        let memory = closed();
        let (store, log, _) = open(&memory);
        flip_header(&memory, damaged);
        block_on(log.truncate_after(Some(place(last)))).unwrap_or_else(|error| panic!("{damaged} {last}: {error}"));
        assert_eq!((log.last(), log.next_offset()), (Some(place(last)), Offset(last + 1)));
        append_flushed(&log, (last + 1..COUNT).map(entry).collect());
        let kept: Vec<u64> = (0..COUNT).filter(|index| *index != damaged || damaged > last).collect();
        assert_eq!(readable(&log, 0..COUNT), kept, "{damaged} {last}");
        repair_all(&log);
        assert_eq!(readable(&log, 0..COUNT).len() as u64, COUNT);
        close(store, log);
        let (_store, log, recovery) = open(&memory);
        assert_eq!((recovery.damaged.len(), recovery.cut), (0, None), "{damaged} {last}");
        assert_eq!(readable(&log, 0..COUNT).len() as u64, COUNT);
    }
}

/// The last entry goes bad, and then more are appended behind it.
#[test]
fn what_is_appended_behind_a_damaged_end_is_served() {
    let memory = closed();
    let options = Options { index_step: 64 << 10, recent_size_max: 1, ..one_thread() };
    let store = Store::open_on(Arc::new(memory.again()), identity(), options).unwrap();
    let (log, _) = store.open_log(GROUP, REPLICA).unwrap();
    flip_header(&memory, COUNT - 1);
    assert!(readable(&log, COUNT - 1..COUNT).is_empty());
    let end = COUNT + 8;
    (COUNT..end).for_each(|index| append_flushed(&log, vec![entry(index)]));
    assert_eq!(readable(&log, 0..end), (0..end).filter(|index| *index != COUNT - 1).collect::<Vec<_>>());
    repair_all(&log);
    assert_eq!(readable(&log, 0..end).len() as u64, end);
    close(store, log);
}

/// The log start lies behind damage that no point of the saved index separates from it.
#[test]
fn what_stands_behind_damage_before_the_log_start_is_served() {
    let memory = MemoryDisk::new();
    let large = Options {
        segment_size_first: 256 << 10,
        segment_size_max: 256 << 10,
        index_step: 4 << 10,
        recent_size_max: 1,
        ..one_thread()
    };
    let open = || {
        let store = Store::open_on(Arc::new(memory.again()), identity(), large.clone()).unwrap();
        let (log, _) = store.open_log(GROUP, REPLICA).unwrap();
        (store, log)
    };
    let (store, log) = open();
    let end = 700;
    append_flushed(&log, (0..end).map(entry).collect());
    log.save_committed(place(end - 1));
    // The point before is some entries away.
    block_on(log.purge_through(place(12))).unwrap();
    close(store, log);
    assert!(!files(&memory, ".idx").is_empty());
    flip_header(&memory, 12);
    let (store, log) = open();
    assert_eq!(log.damaged(), []);
    assert_eq!(readable(&log, 13..end), (13..end).collect::<Vec<_>>());
    close(store, log);
}

/// A file without a header stood where a segment is lost; then the log drops all that it held.
#[test]
fn lost_files_go_with_what_they_held() {
    for resets in [false, true] {
        let memory = closed();
        let lost = files(&memory, ".seg").remove(1);
        let spoilt = vec![1; 20_000];
        memory.set_bytes(&lost, &spoilt).unwrap();
        let (store, log, recovery) = open(&memory);
        assert_eq!(recovery.damaged.len(), 1);
        let through = if resets { position(9, 200) } else { place(COMMITTED) };
        if resets {
            block_on(log.reset(through, Offset(300))).unwrap();
        } else {
            block_on(log.purge_through(through)).unwrap();
        }
        assert!(!files(&memory, ".seg").contains(&lost), "it stays");
        close(store, log);
        // As after a crash before it was removed.
        let file = memory.create(&lost).unwrap();
        file.write_at(&[Bytes::from(spoilt)], 0).unwrap();
        file.sync().unwrap();
        memory.sync_dir(&log_dir()).unwrap();
        let (store, log, _) = open(&memory);
        assert_eq!(log.purged(), Some(through));
        assert!(!files(&memory, ".seg").contains(&lost), "it came back");
        close(store, log);
    }
}
