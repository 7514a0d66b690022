//! Damage to committed entries: the log opens around it, says so, and takes the entries back.

use std::io::ErrorKind;
use std::sync::Arc;

use crate::support::*;
use arqon_proto::{Batch, Offset, RaftIndex};
use arqon_storage::{Disk, FaultyDisk, Log, MemoryDisk, OpenError, Operation, Options, ReadError, Store};
use bytes::Bytes;

const COUNT: u64 = 60;
const SIZE: usize = 700;
/// The last entries are flushed and not known to be committed.
const COMMITTED: u64 = 55;
const ENTRY_SIZE: usize = SIZE + 128;

/// Terms change now and then, and every seventh entry takes no offset.
fn entry(index: u64) -> Batch {
    let term = 1 + index / 20;
    if index % 7 == 3 { control(term, index, &"c".repeat(SIZE)) } else { data(term, index, 1, SIZE, 1_000 + index) }
}

/// A closed log of several segments without saved indexes.
fn closed() -> MemoryDisk {
    closed_log((0..COUNT).map(entry), position(1 + COMMITTED / 20, COMMITTED))
}

/// Every entry is as it was written, or reported as damaged; says which ones are.
fn check(log: &Log, story: &str) -> Vec<u64> {
    assert_eq!(log.last().map(|last| last.index.0), Some(COUNT - 1), "{story}");
    let mut damaged = Vec::new();
    for index in 0..COUNT {
        match log.entries(RaftIndex(index)..RaftIndex(index + 1), 1) {
            Ok(found) => assert_eq!(essence(&found[0]), essence(&entry(index)), "{story}: entry {index}"),
            Err(ReadError::Damaged { .. }) => damaged.push(index),
            Err(error) => panic!("{story}: entry {index}: {error}"),
        }
    }
    // By offsets: the same records, and each one that is not served is named.
    let mut next = 0;
    while next < log.next_offset().0 {
        match log.read_data(Offset(next), RaftIndex(u64::MAX), 2_000) {
            Ok(found) => {
                assert_eq!(found[0].header.base_offset, Offset(next), "{story}: a gap");
                for batch in &found {
                    assert_eq!(essence(batch), essence(&entry(batch.header.index.0)), "{story}");
                }
                next = found.last().unwrap().header.next_offset().0;
            }
            Err(ReadError::Damaged { first, last, .. }) => {
                assert!(first.0 <= next && last.0 >= next, "{story}: offset {next} is not in {first} to {last}");
                next = last.0 + 1;
            }
            Err(error) => panic!("{story}: offset {next}: {error}"),
        }
    }
    damaged
}

fn repair_all(log: &Log, story: &str) {
    for damage in log.damaged() {
        block_on(log.repair(&damage, from_peer(&damage, entry))).unwrap_or_else(|error| panic!("{story}: {error}"));
    }
    assert_eq!(log.damaged(), [], "{story}");
    assert_eq!(check(log, story), Vec::<u64>::new(), "{story}");
}

/// Opens damaged bytes, repairs them, and looks again after a restart. False when quarantined.
fn is_repaired(disk: &MemoryDisk, story: &str) -> bool {
    let (store, log, _) = match try_open(disk) {
        Ok(opened) => opened,
        Err(OpenError::Quarantined { .. }) => return false,
        Err(error) => panic!("{story}: {error}"),
    };
    let damaged = check(&log, story);
    let listed: Vec<u64> = log.damaged().iter().flat_map(|damage| damage.first.0..=damage.last.0).collect();
    assert!(damaged.iter().all(|index| listed.contains(index)), "{story}: {damaged:?} and not {listed:?}");
    repair_all(&log, story);
    append_flushed(&log, vec![data(9, COUNT, 1, SIZE, 0)]);
    close(store, log);
    let (_store, log, recovery) = open(disk);
    assert_eq!((recovery.damaged.len(), recovery.cut), (0, None), "{story}");
    let all = read_entries(&log, 0, 1 << 20);
    let same = all.iter().take(COUNT as usize).map(essence).eq((0..COUNT).map(|index| essence(&entry(index))));
    assert!(same && all.len() as u64 == COUNT + 1, "{story}: after a restart");
    true
}

/// The story: a bit of a stopped node's segment flips. Up to the committed position the log opens and
/// comes back to the last bit with what a peer has; above it, its promise to the leader is broken.
#[test]
fn a_flipped_bit_in_committed_entries_is_repaired_and_one_above_is_quarantined() {
    let disk = closed();
    let segments = files(&disk, ".seg");
    assert!(segments.len() >= 3, "{segments:?}");
    let (mut repaired, mut refused) = (0, 0);
    for path in &segments {
        let whole = disk.bytes(path).unwrap();
        let used = whole.iter().rposition(|byte| *byte != 0).unwrap();
        let front = (0..DATA_AT).step_by(61).filter(|at| whole[*at] != 0);
        for at in front.chain((DATA_AT..used).step_by(37)) {
            let copy = MemoryDisk::copy_of(&disk);
            let mut bytes = whole.clone();
            bytes[at] ^= 1 << (at % 8);
            copy.set_bytes(path, &bytes).unwrap();
            let story = format!("{path} byte {at}");
            if is_repaired(&copy, &story) {
                repaired += 1;
                continue;
            }
            refused += 1;
            let of_tail = path == segments.last().unwrap();
            let entry = segment_base(path) + (at.saturating_sub(DATA_AT) / ENTRY_SIZE) as u64;
            assert!(of_tail && (at < DATA_AT || entry > COMMITTED), "{story}: entry {entry} is quarantined");
            assert_eq!(copy.bytes(path).unwrap(), bytes, "{story}: quarantine changed it");
        }
    }
    assert!(repaired > 800 && refused > 10, "{repaired} repaired, {refused} refused");
}

/// Only the entry whose header is bad is lost, not what follows it.
#[test]
fn what_stands_behind_a_bad_header_is_served() {
    let disk = closed();
    let path = &files(&disk, ".seg")[0];
    let mut bytes = disk.bytes(path).unwrap();
    bytes[DATA_AT + ENTRY_SIZE + 9] ^= 4;
    disk.set_bytes(path, &bytes).unwrap();
    let (_store, log, recovery) = open(&disk);
    let damage = &recovery.damaged[0];
    assert_eq!((damage.first.0, damage.last.0, damage.first_offset.0, damage.next_offset.0), (1, 1, 1, 2));
    assert!(damage.place.contains(&format!("byte {}", DATA_AT + ENTRY_SIZE)), "{damage:?}");
    assert_eq!(check(&log, "one header"), [1]);
    let told = log.read_data(Offset(1), RaftIndex(9), 1).unwrap_err();
    assert!(matches!(told, ReadError::Damaged { first: Offset(1), last: Offset(1), .. }), "{told}");
}

/// Damage that a reader meets stands between two points of the index, which are far apart: what stands
/// between it and the next point is served all the same.
#[test]
fn what_stands_behind_damage_that_a_reader_met_is_served() {
    for header in [false, true] {
        let disk = closed();
        let options = || Options { index_step: 1 << 20, recent_size_max: 1, ..small_options() };
        let store = Store::open_on(Arc::new(disk.again()), identity(), options()).unwrap();
        let (log, _) = store.open_log(GROUP, REPLICA).unwrap();
        let path = &files(&disk, ".seg")[1];
        let mut bytes = disk.bytes(path).unwrap();
        bytes[DATA_AT + 4 * ENTRY_SIZE + if header { 20 } else { 200 }] ^= 1;
        disk.set_bytes(path, &bytes).unwrap();
        let lost = segment_base(path) + 4;
        assert_eq!(check(&log, "damaged in use"), [lost]);
        assert_eq!(check(&log, "and known"), [lost]);
        repair_all(&log, "in use");
        let time = log.offset_at_time(1_000 + lost, RaftIndex(COUNT - 1)).unwrap();
        assert_eq!(log.read_data(time, RaftIndex(COUNT), 1).unwrap()[0].header.index.0, lost);
    }
}

/// Whole files: gone, emptied, of another log, cut short, or an old state of them.
#[test]
fn lost_segments_before_the_newest_one_are_brought_back() {
    let disk = closed();
    let segments = files(&disk, ".seg");
    let (last, before) = segments.split_last().unwrap();
    let other = closed();
    for (number, path) in before.iter().enumerate() {
        let whole = disk.bytes(path).unwrap();
        let used = whole.iter().rposition(|byte| *byte != 0).unwrap();
        let mut stories: Vec<(&str, Option<Vec<u8>>)> = vec![
            ("is gone", None),
            ("is empty", Some(Vec::new())),
            ("is of another log", Some(other.bytes(path).unwrap())),
            ("is a copy of another one", Some(disk.bytes(last).unwrap())),
            ("is zeroed", Some(vec![0; whole.len()])),
            ("has its header only", Some(whole[..DATA_AT].to_vec())),
            ("is cut in the middle", Some(whole[..DATA_AT + used / 4].to_vec())),
        ];
        let mut hole = whole.clone();
        hole[DATA_AT + 1_500..DATA_AT + 2_500].fill(0);
        stories.push(("has a hole", Some(hole.clone())));
        hole[4_096..DATA_AT].fill(0);
        stories.push(("has a hole and no marks", Some(hole)));
        for (story, bytes) in stories {
            let copy = MemoryDisk::copy_of(&disk);
            match bytes {
                Some(bytes) => copy.set_bytes(path, &bytes).unwrap(),
                None => {
                    copy.remove(path).unwrap();
                    copy.sync_dir(&log_dir()).unwrap();
                }
            }
            assert!(is_repaired(&copy, &format!("segment {number} {story}")), "segment {number} {story}: quarantined");
        }
    }
    // All of them at once make one hole.
    for path in before {
        disk.remove(path).unwrap();
    }
    assert!(is_repaired(&disk, "all but the newest are gone"));
}

/// A lost segment may begin with entries that were purged.
#[test]
fn a_lost_segment_that_was_purged_in_part_comes_back_in_part() {
    let disk = closed();
    let (store, log, _) = open(&disk);
    let path = files(&disk, ".seg").swap_remove(1);
    let last = segment_base(&path) + 2;
    block_on(log.purge_through(position(1 + last / 20, last))).unwrap();
    close(store, log);
    disk.set_bytes(&path, b"nothing of use").unwrap();
    let (store, log, recovery) = open(&disk);
    let damage = &recovery.damaged[0];
    assert_eq!((recovery.damaged.len(), damage.first.0), (1, last + 1));
    block_on(log.repair(damage, from_peer(damage, entry))).unwrap();
    close(store, log);
    let (_store, log, recovery) = open(&disk);
    assert_eq!((recovery.damaged.len(), recovery.removed_segment_count), (0, 0));
    let kept = read_entries(&log, last + 1, 1 << 20);
    assert!(kept.iter().map(essence).eq((last + 1..COUNT).map(|index| essence(&entry(index)))));
    assert!(disk.bytes(&path).is_err(), "what was lost is gone");
}

#[test]
fn without_its_newest_segment_a_log_is_quarantined() {
    let disk = closed();
    let last = files(&disk, ".seg").pop().unwrap();
    disk.remove(&last).unwrap();
    let error = try_open(&disk).err().unwrap();
    assert!(matches!(error, OpenError::Quarantined { .. }), "{error}");
}

/// Entries that are not bit by bit those that were lost change nothing.
#[test]
fn entries_that_do_not_fit_are_refused() {
    let disk = closed();
    let path = &files(&disk, ".seg")[1];
    let mut bytes = disk.bytes(path).unwrap();
    bytes[DATA_AT + 3 * ENTRY_SIZE + 20] ^= 4;
    disk.set_bytes(path, &bytes).unwrap();
    let (_store, log, recovery) = open(&disk);
    let damage = &recovery.damaged[0];
    let right = from_peer(damage, entry);
    let mut other = data(right[0].header.term.0, damage.first.0, 1, SIZE, 77);
    other.header.record_count = right[0].header.record_count;
    let mut torn = right.clone();
    torn[0].records = Bytes::from_static(b"short");
    let wrong =
        [Vec::new(), vec![other], vec![entry(damage.first.0 + 1)], torn, [right.clone(), right.clone()].concat()];
    for batches in wrong {
        let error = block_on(log.repair(damage, batches)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidData, "{error}");
        assert_eq!(disk.bytes(path).unwrap(), bytes);
        assert_eq!(log.damaged().len(), 1);
    }
    block_on(log.repair(damage, right)).unwrap();
    assert_eq!(check(&log, "repaired"), Vec::<u64>::new());
}

/// The story: damage in the segment that is being written, met by a reader, repaired between appends.
/// A batch that was read before stays as it was, and nothing of what was appended is lost.
#[test]
fn the_segment_that_is_being_written_is_repaired_in_use() {
    for fixture in Fixture::all() {
        let (store, log, _) = fixture.open();
        let count = |log: &Log| next_index(log);
        append_many(&log, 1, 8, SIZE);
        let early = log.entries(RaftIndex(3)..RaftIndex(4), 1).unwrap();
        // More than is kept in memory, and all in the first segment.
        let name = fixture.disk().list(&log_dir()).unwrap().into_iter().find(|name| name.ends_with(".seg")).unwrap();
        let file = fixture.disk().open(&format!("{}/{name}", log_dir())).unwrap();
        let at = (DATA_AT + 2 * ENTRY_SIZE + 300) as u64;
        file.write_at(&[Bytes::from_static(b"rot")], at).unwrap();
        file.sync().unwrap();
        let error = log.entries(RaftIndex(2)..RaftIndex(3), 1).unwrap_err();
        assert!(matches!(error, ReadError::Damaged { first: Offset(2), last: Offset(2), .. }), "{error}");
        let damage = log.damaged().pop().expect("what a reader met is listed");

        let waiting: Vec<_> = (0..4).map(|_| append(&log, vec![data(1, next_index(&log), 1, 300, 1_000)])).collect();
        block_on(log.repair(&damage, vec![data(1, 2, 1, SIZE, 1_002)])).unwrap();
        waiting.into_iter().for_each(|flushed| flushed.recv().unwrap().unwrap());
        append_many(&log, 1, 30, SIZE);
        let end = count(&log);
        assert_eq!(essence(&early[0]), essence(&data(1, 3, 1, SIZE, 0)));
        drop(log);
        block_on(store.close());
        let (_store, log, recovery) = fixture.open();
        assert_eq!((count(&log), recovery.damaged.len(), log.damaged().len()), (end, 0, 0));
        assert_eq!(read_entries(&log, 0, 4_000).len() as u64, end);
    }
}

/// The story: the power goes at some operation of a repair. After it the damage is there as before or it
/// is gone; an entry is never wrong, and the repair can be made again.
#[test]
fn a_power_cut_in_a_repair_leaves_the_old_or_the_new() {
    let whole = closed();
    let segments = files(&whole, ".seg");
    let mut bytes = whole.bytes(&segments[1]).unwrap();
    bytes[DATA_AT + 2 * ENTRY_SIZE + 20] ^= 4;
    let inside = MemoryDisk::copy_of(&whole);
    inside.set_bytes(&segments[1], &bytes).unwrap();
    let between = MemoryDisk::copy_of(&whole);
    between.set_bytes(&segments[0], &[]).unwrap();
    let (mut cuts, mut repaired) = (0, 0);
    for (story, damaged) in [("inside a segment", inside), ("a whole segment", between)] {
        for step in 0.. {
            let disk = MemoryDisk::copy_of(&damaged);
            let (store, log, recovery) = open(&disk);
            let damage = &recovery.damaged[0];
            let before = disk.operation_count();
            disk.power_off_at(before + step);
            let result = block_on(log.repair(damage, from_peer(damage, entry)));
            let off = disk.operation_count() >= before + step;
            drop((store, log));
            for seed in 0..8 {
                let found = MemoryDisk::copy_of(&disk).cut(seed);
                let (_store, log, _) = open(&found);
                let left = log.damaged().len();
                assert!(left <= 1 && (result.is_err() || left == 0), "{story}, step {step}: {left} left");
                repair_all(&log, &format!("{story}, step {step}, seed {seed}"));
                (cuts, repaired) = (cuts + 1, repaired + usize::from(left == 0));
            }
            if !off {
                break;
            }
        }
    }
    assert!(cuts > 100 && repaired > 10 && repaired < cuts, "{repaired} of {cuts} cuts found the new file");
}

/// A disk that fails during a repair leaves the log as it was, and in use.
#[test]
fn a_failed_repair_changes_nothing() {
    let memory = closed();
    let path = &files(&memory, ".seg")[0];
    let mut bytes = memory.bytes(path).unwrap();
    bytes[DATA_AT + 20] ^= 4;
    memory.set_bytes(path, &bytes).unwrap();
    let disk = FaultyDisk::new(Arc::new(memory.again()));
    let (_store, log, recovery) = open_on(Arc::new(disk.clone()), one_thread()).unwrap();
    let damage = &recovery.damaged[0];
    for operation in [Operation::Write, Operation::Sync, Operation::Name] {
        disk.fail(operation, 0, ErrorKind::StorageFull);
        assert!(block_on(log.repair(damage, from_peer(damage, entry))).is_err());
        disk.heal();
        assert_eq!((log.poisoned(), log.damaged().len()), (None, 1), "{operation:?}");
        assert_eq!(memory.bytes(path).unwrap(), bytes);
    }
    repair_all(&log, "healed");
    append_flushed(&log, vec![data(9, COUNT, 1, SIZE, 0)]);
}

/// Damage that is purged or counted twice is off the list, and what is known is bounded.
#[test]
fn purged_damage_is_forgotten() {
    let disk = closed();
    let segments = files(&disk, ".seg");
    disk.remove(&segments[0]).unwrap();
    let (store, log, _) = open(&disk);
    let listed = || store.metrics().damage_count.load(std::sync::atomic::Ordering::Relaxed);
    assert_eq!((log.damaged().len(), listed()), (1, 1));
    let last = segment_base(&segments[1]) - 1;
    block_on(log.purge_through(position(1 + last / 20, last))).unwrap();
    assert_eq!((log.damaged().len(), listed()), (0, 0));
    assert_eq!(log.log_start(), log.read_data(log.log_start(), RaftIndex(u64::MAX), 1).unwrap()[0].header.base_offset);
}

/// Damage that nobody reads is found in a round of the scrubber, at the rate that it was given, and with
/// no log held open.
#[test]
fn the_scrubber_finds_what_nobody_reads() {
    let disk = closed();
    let segments = files(&disk, ".seg");
    for (path, at) in [(&segments[0], 2 * ENTRY_SIZE + 400), (&segments[1], 5 * ENTRY_SIZE + 130)] {
        let mut bytes = disk.bytes(path).unwrap();
        bytes[DATA_AT + at] ^= 1;
        disk.set_bytes(path, &bytes).unwrap();
    }
    let lost: Vec<u64> = vec![2, segment_base(&segments[1]) + 5];
    let options = Options { scrub_rate_max: 1 << 30, ..small_options() };
    let store = Store::open_on(Arc::new(disk.again()), identity(), options).unwrap();
    let (log, recovery) = store.open_log(GROUP, REPLICA).unwrap();
    assert_eq!(recovery.damaged, [], "records are not looked at to open a log");
    let begin = std::time::Instant::now();
    while log.damaged().len() < 2 {
        assert!(begin.elapsed() < std::time::Duration::from_secs(30), "{:?}", log.damaged());
        std::thread::yield_now();
    }
    let found: Vec<_> = log.damaged().iter().map(|damage| (damage.first.0, damage.last.0)).collect();
    assert_eq!(found, lost.iter().map(|index| (*index, *index)).collect::<Vec<_>>());
    assert!(store.metrics().scrubbed_size.load(std::sync::atomic::Ordering::Relaxed) > 0);
    repair_all(&log, "what the scrubber found");
    close(store, log);
    assert_eq!(open(&disk).2.damaged, []);
}
