//! A log whose files hold any bytes.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::{Arc, OnceLock};

use arqon_proto::{Batch, BatchKind, GroupId, Header, NodeId, Offset, RaftIndex, ReplicaId, Term};
use arqon_storage::{
    Backend, CheckpointKind, Disk, Identity, Log, LogPosition, MemoryDisk, OpenError, Options, ReadError, Store,
    inspect_on,
};
use bytes::Bytes;

use super::Source;

const GROUP: GroupId = GroupId(7);
const REPLICA: ReplicaId = ReplicaId(3);
const ENTRY_COUNT: u64 = 90;
/// Where the batches of a segment begin.
const DATA_AT: usize = 12_288;

type Files = BTreeMap<String, Vec<u8>>;

/// A log as it was left, and its entries.
struct Base {
    files: Files,
    entries: Vec<Batch>,
}

fn entry(term: u64, index: u64) -> Batch {
    let size = 40 + index as usize * 7 % 90;
    let records: Bytes = format!("entry {term}-{index} ").bytes().cycle().take(size).collect();
    if index % 5 == 3 {
        let mut batch = Batch::internal(BatchKind::Control, records);
        (batch.header.term, batch.header.index) = (Term(term), RaftIndex(index));
        return batch;
    }
    let mut header = Header::new(BatchKind::Data);
    header.records_crc = crc32fast::hash(&records);
    header.records_size = records.len() as u32;
    header.records_size_plain = records.len() as u32;
    header.record_count = 1 + index as u32 % 3;
    header.time_ms = 1_000 + index;
    (header.term, header.index) = (Term(term), RaftIndex(index));
    Batch { header, stamps: Bytes::new(), records }
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime without drivers starts");
    runtime.block_on(future)
}

fn open(disk: &MemoryDisk) -> Result<(Store, Log), OpenError> {
    let options = Options {
        backend: Backend::Plain,
        segment_size_first: 20 << 10,
        segment_size_max: 20 << 10,
        index_step: 64,
        recent_size_max: 0,
        fill_size: 0,
        // What it finds, and readers do not, is listed at a time of its own: two reads of the same files would differ.
        scrub_rate_max: 0,
        thread_count: 1,
        ..Options::default()
    };
    let identity = Identity { cluster: "fuzz".to_owned(), node: NodeId(1) };
    let store = Store::open_on(Arc::new(disk.again()), identity, options)?;
    let (log, _) = store.open_log(GROUP, REPLICA)?;
    Ok((store, log))
}

fn append(log: &Log, term: u64, count: u64) {
    let next = log.last().map_or(0, |last| last.index.0 + 1);
    let (sender, receiver) = std::sync::mpsc::channel();
    let entries = (next..next + count).map(|index| entry(term, index)).collect();
    let on_flushed = Box::new(move |result: std::io::Result<()>| drop(sender.send(result)));
    log.append(entries, on_flushed).expect("the log takes entries");
    receiver.recv().expect("a callback runs").expect("the entries are flushed");
}

fn files_of(disk: &MemoryDisk, dir: &str, into: &mut Files) {
    for name in disk.list(dir).expect("a directory is listed") {
        let path = if dir == "." { name } else { format!("{dir}/{name}") };
        match disk.bytes(&path) {
            Ok(bytes) => drop(into.insert(path, bytes)),
            Err(_) => files_of(disk, &path, into),
        }
    }
}

fn base() -> &'static Base {
    static BASE: OnceLock<Base> = OnceLock::new();
    BASE.get_or_init(|| {
        let disk = MemoryDisk::new();
        let (store, log) = open(&disk).expect("an empty disk opens");
        append(&log, 1, 50);
        block_on(log.truncate_from(RaftIndex(45))).expect("a truncation works");
        append(&log, 2, ENTRY_COUNT - 45);
        block_on(log.save_vote(Bytes::from("the vote"))).expect("a vote is saved");
        let at = LogPosition::new(2, 60);
        let state = Bytes::from("the state");
        block_on(log.save_checkpoint(CheckpointKind::Newest, at, state)).expect("a checkpoint is saved");
        block_on(log.purge_through(LogPosition::new(1, 3))).expect("a purge works");
        let entries = log.entries(RaftIndex(4)..RaftIndex(ENTRY_COUNT), usize::MAX).expect("entries are read");
        assert_eq!(entries.len() as u64, ENTRY_COUNT - 4);
        drop(log);
        block_on(store.close());
        let mut files = Files::new();
        files_of(&disk, ".", &mut files);
        Base { files, entries }
    })
}

fn disk_of(files: &Files) -> MemoryDisk {
    let disk = MemoryDisk::new();
    for (path, bytes) in files {
        for (at, _) in path.match_indices('/') {
            disk.create_dir(&path[..at]).expect("a directory is created");
        }
        disk.create(path).expect("a file is created");
        disk.set_bytes(path, bytes).expect("its bytes are set");
    }
    disk
}

/// Puts a right checksum to the sealed block at byte `at`, whose payload is cut to what is there.
fn seal_again(bytes: &mut [u8], at: usize) {
    let Some(block) = bytes.get_mut(at..).filter(|block| block.len() >= 20) else { return };
    let size = u32::from_le_bytes([block[12], block[13], block[14], block[15]]) as usize;
    let size = size.min(block.len() - 20);
    block[12..16].copy_from_slice(&(size as u32).to_le_bytes());
    let crc = crc32fast::hash(&block[..16 + size]);
    block[16 + size..20 + size].copy_from_slice(&crc.to_le_bytes());
}

/// Makes the header at byte `at` a whole one.
fn sign_again(bytes: &mut [u8], at: usize) {
    let Some(header) = bytes.get_mut(at..).and_then(|rest| rest.first_chunk_mut::<128>()) else { return };
    let crc = crc32fast::hash(&header[..124]);
    header[124..].copy_from_slice(&crc.to_le_bytes());
}

/// Byte of batch `number` of a segment.
fn batch_at(bytes: &[u8], number: usize) -> usize {
    let mut at = DATA_AT;
    for _ in 0..number {
        let Some(Ok(header)) = bytes.get(at..).map(Header::decode) else { break };
        at += header.batch_size();
    }
    at
}

/// Changes files as the bytes say: up to eight times a file, a place in it, and what is written there.
fn change(files: &mut Files, source: &mut Source<'_>) {
    let paths: Vec<_> = files.keys().cloned().collect();
    for _ in 0..8 {
        if source.is_empty() {
            return;
        }
        let path = &paths[usize::from(source.byte()) % paths.len()];
        let Some(bytes) = files.get_mut(path) else { continue };
        let (how, place) = (source.byte(), source.number());
        let block = if path.ends_with(".seg") { [0, 4_096, 8_192][place % 3] } else { 0 };
        let size = usize::from(source.byte());
        match how % 7 {
            // Anywhere.
            0 => write(bytes, place, source.take(size)),
            // In a sealed block, whole afterwards.
            1 => {
                write(bytes, block + 8 + place % 120, source.take(size.min(40)));
                seal_again(bytes, block);
            }
            // In the header of a batch, whole afterwards.
            2 => {
                let at = batch_at(bytes, place % 40);
                write(bytes, at + 4 + place / 40 % 120, source.take(size.min(16)));
                sign_again(bytes, at);
            }
            3 => bytes.truncate(place),
            4 => bytes.resize(bytes.len() + size, source.byte()),
            5 => drop(files.remove(path)),
            // The payload of a sealed block as a whole.
            _ => {
                bytes.truncate(block + 16);
                bytes.extend_from_slice(source.take(size));
                bytes.extend_from_slice(&[0; 4]);
                let payload_size = (bytes.len() - (block + 16).min(bytes.len())).saturating_sub(4) as u32;
                write(bytes, block + 12, &payload_size.to_le_bytes());
                seal_again(bytes, block);
            }
        }
    }
}

fn write(bytes: &mut [u8], at: usize, what: &[u8]) {
    let from = at.min(bytes.len());
    let size = what.len().min(bytes.len() - from);
    bytes[from..from + size].copy_from_slice(&what[..size]);
}

/// All that can be read of a log: for each entry its batch, or that it is damaged.
fn read(log: &Log) -> Vec<Option<Batch>> {
    let first = log.purged().map_or(0, |purged| purged.index.0.wrapping_add(1));
    let next = log.last().map_or(0, |last| last.index.0.wrapping_add(1));
    let mut found = Vec::new();
    // A damaged manifest may say anything; a log of these files has few entries.
    for index in first..next.min(first.saturating_add(2 * ENTRY_COUNT)) {
        match log.entries(RaftIndex(index)..RaftIndex(index + 1), 1) {
            Ok(batches) => {
                assert_eq!(batches.len(), 1, "entry {index} of {first}..{next}, {:?} {:?}", log.purged(), log.last());
                assert_eq!(batches[0].header.index.0, index);
                assert_eq!(batches[0].check_crcs(), Ok(()));
                found.extend(batches.into_iter().map(Some));
            }
            // The second one is an index that leads nowhere.
            Err(ReadError::Damaged { .. } | ReadError::Io(_)) => found.push(None),
            Err(error) => panic!("entry {index}: {error}"),
        }
    }
    let through = RaftIndex(next);
    let _ = log.read_data(log.log_start(), through, 10_000);
    let _ = log.offset_at_time(1_040, through);
    let _ = log.term_ends(RaftIndex(first)..=RaftIndex(next.saturating_sub(1)));
    for (kind, at) in log.checkpoints() {
        let _ = log.load_checkpoint(kind, at);
    }
    found
}

/// Any bytes in any files of a log: opening and reading never panics, an inspection neither; a
/// refusal changes nothing; and what opened opens again with the same entries.
pub fn recovery(data: &[u8]) {
    let mut files = base().files.clone();
    change(&mut files, &mut Source(data));
    let disk = disk_of(&files);
    inspect(&disk);
    let (store, log) = match open(&disk) {
        Ok(opened) => opened,
        Err(_) => {
            let mut after = Files::new();
            files_of(&disk, ".", &mut after);
            assert_eq!(after, files, "it was refused and something was changed");
            return;
        }
    };
    let (found, place) = (read(&log), (log.purged(), log.last(), log.vote()));
    drop((log, store));
    let (_store, log) = open(&disk).expect("what opened once opens again");
    assert_eq!((log.purged(), log.last(), log.vote()), place);
    let again = read(&log);
    for (index, (found, again)) in found.iter().zip(&again).enumerate() {
        assert_eq!(found, again, "entry {index} after the log start is read otherwise the second time");
    }
    assert_eq!(found.len(), again.len());
}

fn inspect(disk: &MemoryDisk) {
    let Ok(inspection) = inspect_on(disk) else { return };
    for log in &inspection.logs {
        let check = log.check(|_, _| ControlFlow::Continue(()));
        check.faults.iter().for_each(|fault| drop(fault.to_string()));
    }
}

/// Any bytes as the saved index of a segment: with or without a right checksum, the log opens with all of
/// its entries, and none is read as another.
pub fn index(data: &[u8]) {
    let base = base();
    let mut source = Source(data);
    let sealed = source.byte() % 2 == 1;
    let paths: Vec<_> = base.files.keys().filter(|path| path.ends_with(".idx")).collect();
    let path = paths[usize::from(source.byte()) % paths.len()];
    let mut files = base.files.clone();
    let mut bytes = source.0.to_vec();
    if sealed {
        // The points of the right index, changed from some byte on.
        let right = &base.files[path];
        let at = 16 + source.number() % (right.len() - 20);
        bytes = right.clone();
        let size = source.0.len().min(right.len() - 4 - at);
        bytes[at..at + size].copy_from_slice(&source.0[..size]);
        seal_again(&mut bytes, 0);
    }
    files.insert(path.clone(), bytes);
    let (_store, log) = open(&disk_of(&files)).unwrap_or_else(|error| panic!("for want of an index: {error}"));
    assert_eq!(log.last().map(|last| last.index.0), Some(ENTRY_COUNT - 1));
    for (found, right) in read(&log).iter().zip(&base.entries) {
        assert!(found.as_ref().is_none_or(|found| found == right), "{found:?} for {right:?}");
        assert!(sealed || found.is_some(), "an index that is no index damaged {right:?}");
    }
    assert_eq!(log.log_start(), Offset(base.entries[0].header.base_offset.0));
}
