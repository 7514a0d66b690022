//! A data directory written by the first version of every file format must open for ever, and one of a
//! later version must be refused and left as it is.
//!
//! A new format gets a directory of its own beside `data-v1`; `ARQON_WRITE_FIXTURES=1` writes one
//! that does not exist yet and never changes one that does.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::support::*;
use arqon_proto::{Batch, GroupId, Offset, RaftIndex, ReplicaId};
use arqon_storage::{
    Backend, CheckpointKind, Disk, Log, MemoryDisk, OpenError, Options, RealDisk, Store, inspect, inspect_on,
};
use bytes::Bytes;

/// Where the slots of a segment's mark stand.
const SLOTS_AT: [usize; 2] = [4_096, 8_192];

/// The logs of the directory, one for each thing that can have happened to one.
const SEALED: GroupId = GroupId(1);
const TORN: GroupId = GroupId(2);
const TRUNCATED: GroupId = GroupId(3);
const PURGED: GroupId = GroupId(4);
const INSTALLED: GroupId = GroupId(5);
const EMPTY: GroupId = GroupId(6);
const SYNC_FAILED: GroupId = GroupId(7);
const GROUPS: [GroupId; 7] = [SEALED, TORN, TRUNCATED, PURGED, INSTALLED, EMPTY, SYNC_FAILED];
const REPLICA_OF_ALL: ReplicaId = ReplicaId(11);

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fixtures/data-v1")
}

fn options(backend: Backend) -> Options {
    let size = 20 << 10;
    Options { backend, segment_size_first: size, segment_size_max: size, index_step: 64, ..small_options() }
}

fn store_on(disk: Arc<dyn Disk>, backend: Backend) -> Result<Store, OpenError> {
    Store::open_on(disk, identity(), options(backend))
}

fn state_at(index: u64) -> Bytes {
    Bytes::from(format!("the state at {index}"))
}

/// The entry that stands at `index`: both kinds, one to three records, growing times.
fn entry(term: u64, index: u64) -> Batch {
    match index % 5 {
        3 => control(term, index, &format!("control {index}")),
        _ => data(term, index, 1 + index as u32 % 3, 40 + index as usize % 90, 1_000 + index),
    }
}

fn append_entries(log: &Log, term: u64, count: u64) {
    let next = next_index(log);
    append_flushed(log, (next..next + count).map(|index| entry(term, index)).collect());
}

/// The program that wrote the directory.
fn write(disk: &MemoryDisk) {
    let store = store_on(Arc::new(disk.again()), Backend::Plain).unwrap();
    let logs = GROUPS.map(|group| store.open_log(group, REPLICA_OF_ALL).unwrap().0);
    for log in logs.iter().filter(|log| log.group() != EMPTY) {
        append_entries(log, 1, 50);
        block_on(log.save_vote(Bytes::from("vote of term 2"))).unwrap();
        append_entries(log, 2, 30);
        // A committed position is one more mark; the torn log keeps one of before its last entries.
        if log.group() != TORN {
            log.save_committed(position(2, 70));
        }
    }
    let [sealed, _, truncated, purged, installed, ..] = &logs;
    for (kind, index) in [(CheckpointKind::Newest, 20), (CheckpointKind::Newest, 60), (CheckpointKind::Retention, 30)] {
        let position = position(if index < 50 { 1 } else { 2 }, index);
        block_on(sealed.save_checkpoint(kind, position, state_at(index))).unwrap();
    }
    block_on(truncated.truncate_from(RaftIndex(75))).unwrap();
    append_entries(truncated, 3, 5);
    block_on(purged.purge_through(position(1, 45))).unwrap();
    let checkpoint = vec![(CheckpointKind::Newest, state_at(500))];
    block_on(installed.install(position(4, 500), Offset(900), checkpoint)).unwrap();
    append_entries(installed, 4, 10);
    store.set_placed(ReplicaId(12)).unwrap();
    block_on(store.close());
}

/// What no program leaves on purpose: a torn tail, and the sign of a failed sync.
fn damage(disk: &MemoryDisk) {
    let dir = format!("logs/{TORN}-{REPLICA_OF_ALL}");
    let tail = disk.list(&dir).unwrap().into_iter().rfind(|name| name.ends_with(".seg")).unwrap();
    let path = format!("{dir}/{tail}");
    let mut bytes = disk.bytes(&path).unwrap();
    let end = bytes.iter().rposition(|byte| *byte != 0).unwrap();
    bytes[end - 10..=end].fill(0);
    // The newest mark covers the entry that is torn; the one before it does not.
    let sequence = |slot: usize| u64::from_le_bytes(bytes[slot + 16..slot + 24].try_into().unwrap());
    let newest = if sequence(SLOTS_AT[0]) > sequence(SLOTS_AT[1]) { SLOTS_AT[0] } else { SLOTS_AT[1] };
    bytes[newest..newest + 4_096].fill(0);
    disk.set_bytes(&path, &bytes).unwrap();
    disk.create(&format!("logs/{SYNC_FAILED}-{REPLICA_OF_ALL}/rewrite")).unwrap();
}

fn files_below(dir: &Path, into: &mut Vec<(String, Vec<u8>)>, root: &Path) {
    let mut paths: Vec<_> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    for path in paths {
        if path.is_dir() {
            files_below(&path, into, root);
        } else {
            let name = path.strip_prefix(root).unwrap().to_str().unwrap().to_owned();
            into.push((name, fs::read(&path).unwrap()));
        }
    }
}

/// The files of the fixture, written first where they are asked for.
fn fixture() -> Vec<(String, Vec<u8>)> {
    let folder = folder();
    if !folder.exists() && std::env::var_os("ARQON_WRITE_FIXTURES").is_some() {
        let disk = MemoryDisk::new();
        write(&disk);
        damage(&disk);
        for path in paths_on(&disk, ".") {
            let to = folder.join(&path);
            fs::create_dir_all(to.parent().unwrap()).unwrap();
            fs::write(to, disk.bytes(&path).unwrap()).unwrap();
        }
    }
    let mut files = Vec::new();
    files_below(&folder, &mut files, &folder);
    files
}

fn paths_on(disk: &MemoryDisk, dir: &str) -> Vec<String> {
    let mut paths = Vec::new();
    for name in disk.list(dir).unwrap() {
        let path = if dir == "." { name } else { format!("{dir}/{name}") };
        match disk.list(&path) {
            Ok(_) => paths.extend(paths_on(disk, &path)),
            Err(_) => paths.push(path),
        }
    }
    paths
}

fn put(disk: &dyn Disk, files: &[(String, Vec<u8>)]) {
    for (path, bytes) in files {
        for (at, _) in path.match_indices('/') {
            disk.create_dir(&path[..at]).unwrap();
        }
        let file = disk.create(path).unwrap();
        file.write_at(&[Bytes::copy_from_slice(bytes)], 0).unwrap();
        file.sync().unwrap();
    }
}

/// Reads a whole log and compares it with what the program wrote: terms by their ends.
fn assert_entries(log: &Log, first: u64, offset: u64, term_ends: &[(u64, u64)]) {
    let found = read_entries(log, first, usize::MAX);
    let mut expected = Vec::new();
    for (term, end) in term_ends {
        let next = first + expected.len() as u64;
        expected.extend((next..*end).map(|index| entry(*term, index)));
    }
    let group = log.group();
    assert_eq!(found.len(), expected.len(), "group {group}");
    let mut next_offset = Offset(offset);
    for (found, expected) in found.iter().zip(&expected) {
        assert_eq!(essence(found), essence(expected), "group {group}");
        assert_eq!((found.header.time_ms, found.header.kind), (expected.header.time_ms, expected.header.kind));
        assert_eq!(found.header.base_offset, next_offset, "group {group}");
        next_offset = found.header.next_offset();
    }
    assert_eq!((log.log_start(), log.next_offset()), (Offset(offset), next_offset), "group {group}");
}

/// Offset of the first record at or after `index`.
fn offset_at(index: u64) -> u64 {
    (0..index).map(|index| u64::from(entry(1, index).header.record_count)).sum()
}

fn assert_opens(disk: Arc<dyn Disk>, backend: Backend) {
    let store = store_on(disk, backend).unwrap();
    assert_eq!(store.logs().unwrap().len(), 7);
    assert_eq!(store.placed().unwrap(), ReplicaId(12));
    let mut logs = Vec::new();
    let mut open = |group| {
        let (log, recovery) = store.open_log(group, REPLICA_OF_ALL).unwrap();
        logs.push(log.clone());
        (log, recovery)
    };

    let (log, recovery) = open(SEALED);
    assert_eq!((recovery.cut, recovery.unmarked_count, recovery.removed_segment_count), (None, 0, 0));
    assert_entries(&log, 0, 0, &[(1, 50), (2, 80)]);
    assert_eq!((log.vote().unwrap(), log.committed()), (Bytes::from("vote of term 2"), Some(position(2, 70))));
    let checkpoints = log.checkpoints();
    assert_eq!(checkpoints.len(), 3, "{checkpoints:?}");
    for (kind, at) in checkpoints {
        assert_eq!(log.load_checkpoint(kind, at).unwrap(), state_at(at.index.0));
    }

    let (log, recovery) = open(TORN);
    assert_eq!(recovery.cut.unwrap().index, RaftIndex(79));
    assert_entries(&log, 0, 0, &[(1, 50), (2, 79)]);

    let (log, _) = open(TRUNCATED);
    assert_entries(&log, 0, 0, &[(1, 50), (2, 75), (3, 80)]);

    let (log, _) = open(PURGED);
    assert_eq!(log.purged(), Some(position(1, 45)));
    assert_entries(&log, 46, offset_at(46), &[(1, 50), (2, 80)]);

    let (log, _) = open(INSTALLED);
    assert_eq!(log.purged(), Some(position(4, 500)));
    assert_entries(&log, 501, 900, &[(4, 511)]);
    assert_eq!(log.load_checkpoint(CheckpointKind::Newest, position(4, 500)).unwrap(), state_at(500));

    let (log, recovery) = open(EMPTY);
    assert_eq!((recovery.created, log.last(), log.vote()), (false, None, None));

    let (log, recovery) = open(SYNC_FAILED);
    assert!(recovery.rewritten);
    assert_entries(&log, 0, 0, &[(1, 50), (2, 80)]);

    // What an old program wrote is gone on with.
    for log in logs {
        append_entries(&log, 9, 40);
    }
    block_on(store.close());
}

#[test]
fn a_directory_of_version_1_opens_for_ever() {
    let files = fixture();
    for suffix in ["identity", "placed", "manifest", "vote", ".seg", ".idx", "rewrite"] {
        assert!(files.iter().any(|(path, _)| path.ends_with(suffix)), "the fixture has no {suffix}");
    }
    let disk = MemoryDisk::new();
    put(&disk, &files);
    let inspection = inspect_on(&disk).unwrap();
    for log in &inspection.logs {
        let check = log.check(|_, _| std::ops::ControlFlow::Continue(()));
        assert_eq!((log.damage.len(), check.faults.iter().filter(|fault| fault.is_damage).count()), (0, 0));
        assert_eq!(check.faults.len(), usize::from(log.group == TORN), "{:?}", check.faults);
    }
    assert_opens(Arc::new(disk), Backend::Plain);
    for backend in [Backend::Plain, Backend::Auto] {
        let dir = tempfile::tempdir().unwrap();
        let disk = || Arc::new(RealDisk::create(dir.path()).unwrap().with_direct_writes(true));
        put(disk().as_ref(), &files);
        assert_eq!(inspect(dir.path()).unwrap().logs.len(), 7);
        assert_opens(disk(), backend);
    }
}

/// Makes the sealed block at byte `at` one of version 2, whole and with its checksum.
fn raise_block(bytes: &mut [u8], at: usize) {
    let block = &mut bytes[at..];
    block[8] = 2;
    let end = 16 + u32::from_le_bytes(block[12..16].try_into().unwrap()) as usize;
    let crc = crc32fast::hash(&block[..end]);
    block[end..end + 4].copy_from_slice(&crc.to_le_bytes());
}

/// The same for the header of the batch at byte `at`.
fn raise_batch(bytes: &mut [u8], at: usize) {
    bytes[at + 4] = 2;
    let crc = crc32fast::hash(&bytes[at..at + 124]);
    bytes[at + 124..at + 128].copy_from_slice(&crc.to_le_bytes());
}

/// The story: a newer program has written one of the files, and the older one is started again.
#[test]
fn a_newer_version_of_any_file_is_refused_by_name_and_nothing_is_touched() {
    let files = fixture();
    let mut raised: Vec<(String, Vec<u8>, &str)> = Vec::new();
    for (path, bytes) in &files {
        let mut raise = |at: usize, what| {
            let mut bytes = bytes.clone();
            raise_block(&mut bytes, at);
            raised.push((path.clone(), bytes, what));
        };
        let name = path.rsplit('/').next().unwrap();
        // Nobody needs the bytes of this one, and segments that are gone need no index.
        if name == "rewrite" {
            continue;
        }
        raise(0, "the block in front");
        if !name.ends_with(".seg") {
            continue;
        }
        for at in SLOTS_AT.into_iter().filter(|at| bytes[*at] != 0) {
            raise(at, "a mark");
        }
        let is_indexed = files.iter().any(|(other, _)| *other == path.replace(".seg", ".idx"));
        if !is_indexed && bytes[DATA_AT] != 0 {
            let mut bytes = bytes.clone();
            raise_batch(&mut bytes, DATA_AT);
            raised.push((path.clone(), bytes, "its first batch"));
        }
    }
    assert!(raised.len() > 40, "{}", raised.len());
    let mut batch_count = 0;
    for (path, bytes, what) in raised {
        batch_count += usize::from(what == "its first batch");
        let story = format!("{what} of {path}");
        let disk = MemoryDisk::new();
        put(&disk, &files);
        disk.set_bytes(&path, &bytes).unwrap();
        let before: Vec<_> = paths_on(&disk, ".").into_iter().map(|path| (disk.bytes(&path).unwrap(), path)).collect();
        let opened = store_on(Arc::new(disk.again()), Backend::Plain).and_then(|store| {
            let (group, replica) =
                path.strip_prefix("logs/").unwrap().split('/').next().unwrap().split_once('-').unwrap();
            let (group, replica) = (group.parse().unwrap(), replica.parse().unwrap());
            store.open_log(GroupId(group), ReplicaId(replica)).map(drop)
        });
        let error = opened.err().unwrap_or_else(|| panic!("{story} is of version 2 and nobody noticed"));
        assert!(matches!(error, OpenError::NewerFormat { version: 2, .. }), "{story}: {error}");
        let name = path.rsplit('/').next().unwrap();
        assert!(error.to_string().contains(name) && error.to_string().contains("version 2"), "{story}: {error}");
        let after: Vec<_> = paths_on(&disk, ".").into_iter().map(|path| (disk.bytes(&path).unwrap(), path)).collect();
        assert!(after == before, "{story}: it was refused and something was changed");
    }
    assert!(batch_count > 0, "no batch was of a newer version");
}
