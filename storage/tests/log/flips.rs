//! Damage to every byte of every file of a small log, one at a time.
//!
//! The story of each case: a node stands still, and meanwhile something happens to one of its files:
//! a bit flips, the file is cut, zeroed in places or altogether, goes missing, or an old copy of it
//! comes back. Then the node is started. Whatever happened, it must not serve one wrong byte, must not
//! panic, and must not forget in silence what it had promised; and if it starts, it must go on for good.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::support::*;
use arqon_proto::{Batch, GroupId, Offset, RaftIndex, ReplicaId};
use arqon_storage::{
    Backend, CheckpointKind, Disk, Log, LogPosition, MemoryDisk, OpenError, Options, ReadError, RealDisk, Store,
    inspect_on,
};
use bytes::Bytes;

/// Every file of a data directory by its path.
type Files = BTreeMap<String, Vec<u8>>;

const SECTOR_SIZE: usize = 512;
const BLOCK_SIZE: usize = 4_096;
const CHECKPOINTS: [(CheckpointKind, u64); 3] =
    [(CheckpointKind::Newest, 20), (CheckpointKind::Newest, 60), (CheckpointKind::Retention, 30)];

fn options(backend: Backend) -> Options {
    Options {
        backend,
        thread_count: 1,
        segment_size_first: 20 << 10,
        segment_size_max: 20 << 10,
        // A point for every entry, so that segments of this size have a saved index.
        index_step: 64,
        ..small_options()
    }
}

fn open_on(disk: Arc<dyn Disk>, backend: Backend) -> Result<(Store, Log), OpenError> {
    let (store, log, _) = crate::support::open_on(disk, options(backend))?;
    Ok((store, log))
}

fn files_of(disk: &dyn Disk, dir: &str, into: &mut Files) {
    for name in disk.list(dir).unwrap() {
        let path = if dir == "." { name } else { format!("{dir}/{name}") };
        if disk.list(&path).is_ok() {
            files_of(disk, &path, into);
            continue;
        }
        let file = disk.open(&path).unwrap();
        let mut bytes = vec![0; usize::try_from(file.size().unwrap()).unwrap()];
        assert_eq!(file.read_at(&mut bytes, 0).unwrap(), bytes.len());
        into.insert(path, bytes);
    }
}

fn all_files(disk: &dyn Disk) -> Files {
    let mut files = Files::new();
    files_of(disk, ".", &mut files);
    files.remove("lock");
    // Dropped by every start, whatever stands in them.
    files.retain(|path, _| !path.starts_with("pool/"));
    files
}

fn put_files(disk: &dyn Disk, files: &Files) {
    for (path, bytes) in files {
        for (at, _) in path.match_indices('/') {
            disk.create_dir(&path[..at]).unwrap();
        }
        let file = disk.create(path).unwrap();
        file.write_at(&[Bytes::copy_from_slice(bytes)], 0).unwrap();
        file.sync().unwrap();
    }
}

fn memory_of(files: &Files) -> MemoryDisk {
    let disk = MemoryDisk::new();
    put_files(&disk, files);
    disk
}

fn kind_of(path: &str) -> &'static str {
    let name = path.rsplit('/').next().unwrap();
    match name {
        "identity" | "manifest" | "vote" => {
            ["identity", "manifest", "vote"].into_iter().find(|kind| *kind == name).unwrap()
        }
        _ if name.ends_with(".seg") => "segment",
        _ if name.ends_with(".idx") => "index",
        _ if name.starts_with("checkpoint-") => "checkpoint",
        _ => panic!("a file of a type that this test does not know: {path}"),
    }
}

/// Files that hold nothing which the others do not.
fn is_derived(path: &str) -> bool {
    ["index", "checkpoint"].contains(&kind_of(path))
}

/// A log as it must be found.
struct Expected {
    entries: BTreeMap<u64, Batch>,
    purged: Option<LogPosition>,
    vote: Bytes,
    committed: Option<LogPosition>,
    /// Everything below this index is known to be durable, by the files themselves.
    marked: u64,
}

/// A directory with every type of file, and what stands in it.
struct Story {
    name: &'static str,
    files: Files,
    expected: Expected,
    /// The same directory at earlier moments.
    past: Vec<Files>,
}

fn state_at(index: u64) -> Bytes {
    Bytes::from(format!("the state at {index}"))
}

/// Entries of both kinds in two terms, `count` of them from the end of the log on.
fn more(log: &Log, term: u64, count: u64) -> Vec<Batch> {
    let next = next_index(log);
    let entry = |index| match index % 5 {
        3 => control(term, index, &format!("control {index}")),
        _ => data(term, index, 1 + index as u32 % 3, 40 + index as usize % 90, 1_000 + index),
    };
    (next..next + count).map(entry).collect()
}

/// Leaves the files of at least three segments of another log, full of its entries, for those that come.
fn leave_files(store: &Store, log: &Log) {
    let (other, _) = store.open_log(GroupId(99), REPLICA).unwrap();
    [log, &other].into_iter().for_each(|log| log.set_owner("alpha"));
    let pool_size = || store.metrics().pool_size.load(Ordering::Relaxed);
    while pool_size() < 3 * (20 << 10) {
        append_flushed(&other, more(&other, 1, 200));
        if let Some(boundary) = other.last_segment_boundary(RaftIndex(next_index(&other))) {
            block_on(other.purge_through(boundary)).unwrap();
        }
    }
    drop(other);
    store.delete_log(GroupId(99), REPLICA).unwrap();
}

/// Runs a log through everything that leaves a trace in its files, which were another one's before or not.
fn run(recycled: bool) -> (MemoryDisk, Store, Log, Vec<Files>) {
    let disk = MemoryDisk::new();
    let mut past = Vec::new();
    let (store, log) = open_on(Arc::new(disk.again()), Backend::Plain).unwrap();
    if recycled {
        leave_files(&store, &log);
    }
    let before = store.metrics().recycled_count.load(Ordering::Relaxed);
    past.push(all_files(&disk));
    append_flushed(&log, more(&log, 1, 25));
    block_on(log.save_vote(Bytes::from("vote 1"))).unwrap();
    log.save_committed(position(1, 10));
    past.push(all_files(&disk));
    append_flushed(&log, more(&log, 1, 45));
    block_on(log.truncate_from(RaftIndex(62))).unwrap();
    past.push(all_files(&disk));
    append_flushed(&log, more(&log, 2, 30));
    for (kind, index) in CHECKPOINTS {
        block_on(log.save_checkpoint(kind, position(1, index), state_at(index))).unwrap();
    }
    block_on(log.save_vote(Bytes::from("vote 2"))).unwrap();
    past.push(all_files(&disk));
    block_on(log.purge_through(position(1, 5))).unwrap();
    log.save_committed(position(1, 50));
    past.push(all_files(&disk));
    append_flushed(&log, more(&log, 2, 4));
    let taken = store.metrics().recycled_count.load(Ordering::Relaxed) - before;
    assert_eq!(taken, if recycled { 3 } else { 0 }, "segments in files of another log");
    (disk, store, log, past)
}

fn story(name: &'static str, files: Files, past: Vec<Files>) -> Story {
    let disk = memory_of(&files);
    assert!(!damage_shows(&disk), "{name}: an inspection finds damage where there is none");
    let inspection = inspect_on(&disk).unwrap();
    let marked = inspection.logs[0].marked_next_index.unwrap();
    let (store, log) = open_on(Arc::new(disk.again()), Backend::Plain).unwrap();
    let purged = log.purged();
    let start = purged.map_or(0, |purged| purged.index.0 + 1);
    let read = read_entries(&log, start, usize::MAX);
    let entries = read.into_iter().map(|batch| (batch.header.index.0, batch)).collect();
    let expected = Expected { entries, purged, vote: log.vote().unwrap(), committed: log.committed(), marked };
    drop((store, log));
    for kind in ["identity", "manifest", "vote", "segment", "index", "checkpoint"] {
        assert!(files.keys().any(|path| kind_of(path) == kind), "{name}: no {kind} in {:?}", files.keys());
    }
    assert!(files.keys().filter(|path| kind_of(path) == "segment").count() >= 3, "{:?}", files.keys());
    Story { name, files, expected, past }
}

/// The same run, stopped and cut off.
fn stories() -> [Story; 3] {
    let (disk, store, log, past) = run(false);
    let cut = cut(&disk, next_index(&log), past.clone());
    drop(log);
    block_on(store.close());
    let stop = story("a clean stop", all_files(&disk), past);
    let (disk, store, log, past) = run(true);
    drop(log);
    block_on(store.close());
    [stop, cut, story("a clean stop, in files of another log", all_files(&disk), past)]
}

/// Power was cut: whole entries stand above the mark, and behind them a torn one.
fn cut(disk: &MemoryDisk, acknowledged: u64, past: Vec<Files>) -> Story {
    for seed in 0..200 {
        let found = MemoryDisk::copy_of(disk).cut(seed);
        let marked = inspect_on(&found).unwrap().logs[0].marked_next_index.unwrap();
        if marked >= acknowledged {
            continue;
        }
        let mut files = all_files(&found);
        let (_, tail) = files.iter_mut().rfind(|(path, _)| kind_of(path) == "segment").unwrap();
        let end = tail.iter().rposition(|byte| *byte != 0).unwrap();
        tail[end - 10..=end].fill(0);
        let story = story("a power cut", files, past);
        let last = *story.expected.entries.keys().last().unwrap();
        assert_eq!(last + 2, acknowledged, "one entry is torn");
        assert!(story.expected.marked <= last, "some are above the mark");
        return story;
    }
    panic!("no cut lost the newest mark");
}

/// What became of a case, from nothing to much.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Verdict {
    /// Everything is there.
    Whole,
    /// It was opened; some entries are told to be damaged, the rest is right.
    Damaged,
    /// A file of an earlier time stands for itself: everything that it says is right.
    WentBack,
    /// The directory or the log was not opened, for a reason that was told.
    Refused,
}

/// What a reader was given for one entry.
fn read_one(log: &Log, index: u64, expected: &Expected) -> Result<bool, String> {
    match log.entries(RaftIndex(index)..RaftIndex(index + 1), 1) {
        Ok(found) if found.len() == 1 => {
            let known = expected.entries.get(&index).ok_or_else(|| format!("entry {index} was never there"))?;
            if found[0] != *known {
                return Err(format!("entry {index} reads {:?} and was {known:?}", found[0]));
            }
            Ok(true)
        }
        Ok(found) => Err(format!("entry {index} gives {} entries", found.len())),
        Err(ReadError::Damaged { .. }) => Ok(false),
        Err(error) => Err(format!("entry {index}: {error}")),
    }
}

/// Reads all records by offset, stepping over what is told to be damaged.
fn read_by_offset(log: &Log, expected: &Expected) -> Result<(), String> {
    let mut next = log.log_start().0;
    while next < log.next_offset().0 {
        match log.read_data(Offset(next), RaftIndex(u64::MAX - 1), 700) {
            Ok(found) if found.is_empty() => return Err(format!("nothing at offset {next}, and no error")),
            Ok(found) => {
                for batch in found {
                    if expected.entries.get(&batch.header.index.0) != Some(&batch) {
                        return Err(format!("offset {next} gives {batch:?}"));
                    }
                    next = batch.header.next_offset().0;
                }
            }
            Err(ReadError::Damaged { last, .. }) => next = next.max(last.0) + 1,
            Err(error) => return Err(format!("offset {next}: {error}")),
        }
    }
    Ok(())
}

/// The other ways to ask must give the right answer or none.
fn ask_around(log: &Log, expected: &Expected, next: u64) -> Result<(), String> {
    let last = RaftIndex(next.saturating_sub(1));
    for time in [0, 1_030, 1_070, 5_000] {
        let known =
            expected.entries.values().filter(|batch| batch.header.record_count > 0 && batch.header.index <= last);
        let mut known = known.filter(|batch| batch.header.time_ms >= time);
        let right = known.next().map(|batch| batch.header.base_offset);
        match log.offset_at_time(time, last) {
            Ok(found) if right.is_none_or(|right| right == found) => {}
            Ok(found) => return Err(format!("time {time} is at {right:?}, not at {found}")),
            Err(ReadError::Damaged { .. }) => {}
            Err(error) => return Err(format!("time {time}: {error}")),
        }
    }
    let first = expected.entries.keys().next().copied().unwrap_or(0);
    let mut right: Vec<LogPosition> = Vec::new();
    for batch in expected.entries.values().filter(|batch| batch.header.index <= last) {
        let at = LogPosition { term: batch.header.term, index: batch.header.index };
        match right.last_mut() {
            Some(before) if before.term == at.term => *before = at,
            _ => right.push(at),
        }
    }
    match log.term_ends(RaftIndex(first)..=last) {
        Ok(found) if found == right => Ok(()),
        Ok(found) => Err(format!("terms end at {found:?}, not at {right:?}")),
        Err(ReadError::Damaged { .. }) => Ok(()),
        Err(error) => Err(format!("ends of terms: {error}")),
    }
}

/// Appends, starts again, and finds everything as it was.
fn go_on(
    disk: Arc<dyn Disk>,
    again: Arc<dyn Disk>,
    backend: Backend,
    opened: (Store, Log),
    readable: &[u64],
    next: u64,
) -> Result<(), String> {
    let (store, log) = opened;
    let term = log.last().map_or(3, |last| last.term.0 + 1);
    append(&log, more(&log, term, 3)).recv().map_err(|error| error.to_string())?.map_err(|error| error.to_string())?;
    let read = |log: &Log, index: u64| {
        log.entries(RaftIndex(index)..RaftIndex(index + 1), 1).map_err(|error| error.to_string())
    };
    let mut before = Vec::new();
    for index in readable.iter().copied().chain(next..next + 3) {
        before.push((index, read(&log, index)?));
    }
    drop((log, store, disk));
    let (_store, log) = open_on(again, backend).map_err(|error| format!("after more appends: {error}"))?;
    if log.poisoned().is_some() || next_index(&log) != next + 3 {
        return Err(format!("after more appends the log ends at {}, not at {}", next_index(&log), next + 3));
    }
    for (index, batches) in before {
        if read(&log, index)? != batches {
            return Err(format!("entry {index} is another after more appends"));
        }
    }
    Ok(())
}

/// Whether an inspection from outside finds damage.
fn damage_shows(disk: &dyn Disk) -> bool {
    let Ok(inspection) = inspect_on(disk) else { return true };
    let damaged = |log: &arqon_storage::LogInspection| {
        let check = log.check(|_, _| std::ops::ControlFlow::Continue(()));
        !log.damage.is_empty() || check.faults.iter().any(|fault| fault.is_damage)
    };
    inspection.identity.is_err() || inspection.logs.iter().any(damaged)
}

/// One kind of damage to one file.
#[derive(Clone)]
struct Case {
    path: String,
    what: String,
    /// The file as it became, or that it is gone.
    bytes: Option<Vec<u8>>,
    /// It is a whole copy of an earlier time.
    old: bool,
    /// Whether life after it is tried too, if the log opens.
    goes_on: bool,
}

impl Case {
    fn new(path: &str, what: String, bytes: Option<Vec<u8>>) -> Self {
        Self { path: path.to_owned(), what, bytes, old: false, goes_on: true }
    }
}

/// Where the files of a case are put.
enum Where {
    Memory,
    Real(Backend),
}

impl Where {
    fn put(&self, files: &Files) -> (Arc<dyn Disk>, Arc<dyn Disk>, Option<tempfile::TempDir>) {
        match self {
            Self::Memory => {
                let disk = memory_of(files);
                (Arc::new(disk.again()), Arc::new(disk.again()), None)
            }
            Self::Real(_) => {
                let dir = tempfile::tempdir().unwrap();
                let disk = || Arc::new(RealDisk::create(dir.path()).unwrap().with_direct_writes(true));
                put_files(disk().as_ref(), files);
                (disk(), disk(), Some(dir))
            }
        }
    }

    fn backend(&self) -> Backend {
        match self {
            Self::Memory => Backend::Plain,
            Self::Real(backend) => *backend,
        }
    }
}

impl Story {
    /// Opens what became of the files and says how it went, or which promise was broken.
    fn judge(&self, place: &Where, case: Case) -> Result<Verdict, String> {
        let Case { path, bytes, old, goes_on, .. } = case;
        let mut files = self.files.clone();
        match bytes {
            Some(bytes) => files.insert(path, bytes),
            None => files.remove(&path),
        };
        let expected = &self.expected;
        let (disk, again, _dir) = place.put(&files);
        let shows = damage_shows(again.as_ref());
        let (store, log) = match open_on(Arc::clone(&disk), place.backend()) {
            Ok(opened) => opened,
            Err(OpenError::InUse { .. } | OpenError::LogOpen { .. } | OpenError::NoUring { .. }) => {
                return Err("it was not even looked at".to_owned());
            }
            Err(OpenError::NewerFormat { what, .. }) => return Err(format!("{what} was taken for a newer program's")),
            Err(error) => {
                if all_files(again.as_ref()) != files {
                    return Err(format!("it was refused ({error}) and changed all the same"));
                }
                if !shows && !old {
                    return Err(format!("it was refused ({error}) and an inspection finds nothing"));
                }
                return Ok(Verdict::Refused);
            }
        };
        let next = next_index(&log);
        let mut verdict = Verdict::Whole;
        let past = |condition: bool, what: &str| match (condition, old) {
            (true, _) => Ok(Verdict::Whole),
            (false, true) => Ok(Verdict::WentBack),
            (false, false) => Err(what.to_owned()),
        };
        verdict = verdict.max(past(log.purged() == expected.purged, "the log start moved")?);
        verdict = verdict.max(past(log.vote().as_ref() == Some(&expected.vote), "it has another vote")?);
        verdict = verdict
            .max(past(next >= expected.marked, &format!("it ends at {next}, {} were durable", expected.marked))?);
        if log.committed() > log.last() || log.committed() > expected.committed || log.flushed() != log.last() {
            return Err(format!("committed {:?}, flushed {:?}, last {:?}", log.committed(), log.flushed(), log.last()));
        }
        let mut readable = Vec::new();
        let start = log.purged().map_or(0, |purged| purged.index.0 + 1);
        for index in start.max(expected.purged.map_or(0, |purged| purged.index.0 + 1))..next {
            if read_one(&log, index, expected)? {
                readable.push(index);
            } else {
                verdict = verdict.max(Verdict::Damaged);
            }
        }
        if verdict == Verdict::Damaged && !shows {
            return Err("entries are damaged and an inspection finds nothing".to_owned());
        }
        if start == expected.purged.map_or(0, |purged| purged.index.0 + 1) {
            read_by_offset(&log, expected)?;
            ask_around(&log, expected, next)?;
        }
        for (kind, at) in log.checkpoints() {
            match log.load_checkpoint(kind, at) {
                Ok(bytes) if bytes == state_at(at.index.0) => {}
                Ok(bytes) => return Err(format!("checkpoint at {at} reads {bytes:?}")),
                Err(error) if error.kind() == std::io::ErrorKind::InvalidData => {}
                Err(error) => return Err(format!("checkpoint at {at}: {error}")),
            }
        }
        if goes_on {
            go_on(disk, again, place.backend(), (store, log), &readable, next)?;
        }
        Ok(verdict)
    }
}

/// Verdicts by type of file.
type Tally = BTreeMap<(&'static str, Verdict), usize>;

/// Judges all cases on the processors there are, and says what became of how many.
fn judge_all(story: &Story, place: &Where, count: usize, case: impl Fn(usize) -> Case + Sync) -> Tally {
    let next = AtomicUsize::new(0);
    let work = || {
        let mut tally = Tally::new();
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= count {
                return tally;
            }
            let case = case(number);
            let told = format!("{}, {}: {}", story.name, case.path, case.what);
            let (kind, derived) = (kind_of(&case.path), is_derived(&case.path));
            let verdict = story.judge(place, case).unwrap_or_else(|broken| panic!("{told}: {broken}"));
            if derived {
                assert_eq!(verdict, Verdict::Whole, "{told}: nothing hangs on this file");
            }
            *tally.entry((kind, verdict)).or_default() += 1;
        }
    };
    let thread_count = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..thread_count).map(|_| scope.spawn(work)).collect();
        let mut sum = Tally::new();
        for thread in threads {
            let tally = thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            for (key, count) in tally {
                *sum.entry(key).or_default() += count;
            }
        }
        sum
    })
}

fn print(what: &str, story: &Story, tally: &Tally) {
    println!("{what} of {}: {} cases", story.name, tally.values().sum::<usize>());
    for ((kind, verdict), count) in tally {
        println!("  {kind:10} {verdict:?}: {count}");
    }
}

/// One bit of each byte of `files`; `step` leaves bytes out.
fn flip_all(story: &Story, files: &Files, place: &Where, step: usize) -> Tally {
    let bytes: Vec<_> = files.iter().flat_map(|(path, bytes)| (0..bytes.len()).map(move |at| (path, at))).collect();
    let bit_count: usize = std::env::var("FLIP_BITS").map_or(1, |bits| bits.parse().unwrap());
    judge_all(story, place, bytes.len() / step * bit_count, |number| {
        let (path, at) = bytes[number / bit_count * step];
        // Over neighbouring bytes every bit has its turn.
        let bit = if bit_count == 1 { (at + at / 8) % 8 } else { number % bit_count };
        let mut bytes = files[path].clone();
        // Few of the many bytes that mean nothing stand for the rest of them.
        let goes_on = bytes[at] != 0 || at % 64 == 0;
        bytes[at] ^= 1 << bit;
        Case { goes_on, ..Case::new(path, format!("bit {bit} of byte {at} flipped"), Some(bytes)) }
    })
}

fn sum(tally: &Tally, verdict: Verdict) -> usize {
    tally.iter().filter(|((_, other), _)| *other == verdict).map(|(_, count)| count).sum()
}

#[test]
fn a_bit_flipped_at_any_byte_of_any_file_is_never_served_and_loses_nothing_in_silence() {
    let [stopped, cut, recycled] = stories();
    // What the power cut left as the clean stop does is flipped once.
    let others = cut.files.iter().filter(|(path, bytes)| stopped.files.get(*path) != Some(bytes));
    let others = others.map(|(path, bytes)| (path.clone(), bytes.clone())).collect();
    for (story, files) in [(&stopped, &stopped.files), (&cut, &others), (&recycled, &recycled.files)] {
        let tally = flip_all(story, files, &Where::Memory, 1);
        print("one bit flipped at every byte", story, &tally);
        for path in files.keys().filter(|path| !is_derived(path)) {
            assert!(tally.contains_key(&(kind_of(path), Verdict::Refused)), "no flip in {path} was noticed");
        }
        assert!(sum(&tally, Verdict::Damaged) + sum(&tally, Verdict::Refused) > 1_000, "few were noticed: {tally:?}");
    }
}

/// The same on files, where entries are read from maps, past the page cache and through io_uring.
/// The file that says which replicas have had a log here: its number, or that it is damaged.
#[test]
fn a_bit_flipped_in_the_placed_file_or_a_part_of_it_never_gives_another_number() {
    let disk = MemoryDisk::new();
    let open = |disk: &MemoryDisk| Store::open_on(Arc::new(disk.again()), identity(), small_options());
    let store = open(&disk).unwrap();
    assert_eq!(store.placed().unwrap(), ReplicaId(0));
    store.set_placed(ReplicaId(0x0102_0304_0506)).unwrap();
    drop(store);
    let whole = disk.bytes("placed").unwrap();
    let flips = (0..whole.len() * 8).map(|bit| {
        let mut bytes = whole.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        bytes
    });
    for bytes in flips.chain((0..whole.len()).map(|size| whole[..size].to_vec())) {
        disk.set_bytes("placed", &bytes).unwrap();
        let store = open(&disk).unwrap();
        assert_eq!(store.placed().unwrap_err().kind(), std::io::ErrorKind::InvalidData, "{bytes:?}");
        // Whoever knows better writes it anew.
        store.set_placed(ReplicaId(7)).unwrap();
        assert_eq!(store.placed().unwrap(), ReplicaId(7));
    }
}

#[test]
fn flipped_bits_are_found_on_files_too() {
    let [stopped, _, recycled] = stories();
    for (story, backend) in [(stopped, Backend::Plain), (recycled, Backend::Auto)] {
        let tally = flip_all(&story, &story.files, &Where::Real(backend), 67);
        print(&format!("one bit flipped at every 67th byte on files ({backend:?})"), &story, &tally);
        assert!(sum(&tally, Verdict::Damaged) + sum(&tally, Verdict::Refused) > 100, "{tally:?}");
    }
}

/// Every sector's border as a new end, and blocks and sectors of zeroes.
#[test]
fn files_cut_short_and_zeroed_in_places_are_noticed() {
    for story in stories() {
        let mut cases = Vec::new();
        for (path, bytes) in &story.files {
            let ends = (0..bytes.len()).step_by(SECTOR_SIZE).chain([1, bytes.len().saturating_sub(1)]);
            for end in ends.filter(|end| *end < bytes.len()) {
                cases.push(Case::new(path, format!("cut to {end} bytes"), Some(bytes[..end].to_vec())));
            }
            for size in [SECTOR_SIZE, BLOCK_SIZE, bytes.len()] {
                for at in (0..bytes.len()).step_by(size.max(1)) {
                    let mut zeroed = bytes.clone();
                    zeroed[at..(at + size).min(bytes.len())].fill(0);
                    cases.push(Case::new(path, format!("{size} bytes from {at} on zeroed"), Some(zeroed)));
                }
            }
        }
        let tally = judge_all(&story, &Where::Memory, cases.len(), |number| cases[number].clone());
        print("files cut short or zeroed", &story, &tally);
        assert!(sum(&tally, Verdict::Damaged) + sum(&tally, Verdict::Refused) > 100, "few were noticed: {tally:?}");
    }
}

#[test]
fn a_missing_file_is_noticed_unless_it_is_derived() {
    for story in stories() {
        let cases: Vec<_> = story.files.keys().map(|path| Case::new(path, "is gone".to_owned(), None)).collect();
        let tally = judge_all(&story, &Where::Memory, cases.len(), |number| cases[number].clone());
        print("one file gone", &story, &tally);
        for kind in ["identity", "manifest", "vote", "segment"] {
            assert!(!tally.contains_key(&(kind, Verdict::Whole)), "a {kind} was gone and nobody noticed");
        }
    }
}

/// Old copies of a file as a whole, and of single blocks and sectors of it. A vote, a manifest or the
/// newest segment of an earlier time can be whole and fit: then it speaks for itself, and what
/// it says is right. Everything else must show.
#[test]
fn old_copies_of_files_and_blocks_are_noticed_or_right() {
    for story in stories() {
        let mut cases = Vec::new();
        for (age, past) in story.past.iter().enumerate() {
            for (path, old) in past {
                let Some(now) = story.files.get(path).filter(|now| *now != old) else { continue };
                let what = format!("as it was at moment {age}");
                cases.push(Case { old: true, ..Case::new(path, what, Some(old.clone())) });
                let size_both = now.len().min(old.len());
                for size in [SECTOR_SIZE, BLOCK_SIZE] {
                    for at in (0..size_both).step_by(size) {
                        let end = (at + size).min(size_both);
                        if now[at..end] == old[at..end] {
                            continue;
                        }
                        let mut bytes = now.clone();
                        bytes[at..end].copy_from_slice(&old[at..end]);
                        let what = format!("bytes {at}..{end} as at moment {age}");
                        // A file that is one block is as old as the block.
                        let old = at == 0 && end == size_both;
                        cases.push(Case { old, ..Case::new(path, what, Some(bytes)) });
                    }
                }
            }
        }
        let tally = judge_all(&story, &Where::Memory, cases.len(), |number| cases[number].clone());
        print("old copies of files and blocks", &story, &tally);
        assert!(sum(&tally, Verdict::Refused) + sum(&tally, Verdict::Damaged) > 5, "{tally:?}");
    }
}
