//! Power cuts at every change that a run makes to the disk.
//!
//! The story of each case: a replica appends, truncates, votes, purges, saves checkpoints and
//! installs a snapshot; at change number n the power goes; what was not synced is gone, there, torn, or
//! each write and name any of these by a seed; some of the time the power goes again while the
//! log is being opened. Then it is opened for good and judged.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex, Weak};

use crate::support::*;
use arqon_proto::{Batch, Offset, RaftIndex};
use arqon_storage::{BlockFile, CheckpointKind, Disk, File, Log, LogPosition, MemoryDisk, OpenError, Store, Unsynced};
use bytes::Bytes;

type Entry = (u64, u64, u32, Bytes);

/// What the run did, and what it was told.
#[derive(Default)]
struct Promises {
    /// The log in memory.
    live: BTreeMap<u64, Entry>,
    /// Flushed, and not asked to be dropped since.
    kept: BTreeMap<u64, Entry>,
    /// Every entry ever appended, by term and index.
    known: BTreeMap<(u64, u64), Entry>,
    /// Truncated by a call that returned.
    dead: BTreeSet<(u64, u64)>,
    purged: Option<LogPosition>,
    purge_asked: Option<LogPosition>,
    vote: Option<Bytes>,
    vote_asked: Option<Bytes>,
    checkpoint: Option<LogPosition>,
    waiting: Vec<(Vec<Entry>, Receiver<io::Result<()>>)>,
    acknowledged_count: usize,
}

impl Promises {
    fn append(&mut self, log: &Log, batches: Vec<Batch>) {
        let entries: Vec<Entry> = batches.iter().map(essence).collect();
        let (sender, receiver) = std::sync::mpsc::channel();
        if log.append(batches, Box::new(move |result| drop(sender.send(result)))).is_err() {
            return;
        }
        for entry in &entries {
            self.live.insert(entry.1, entry.clone());
            self.known.insert((entry.0, entry.1), entry.clone());
        }
        self.waiting.push((entries, receiver));
    }

    fn collect(&mut self) {
        for (entries, receiver) in std::mem::take(&mut self.waiting) {
            if receiver.recv().expect("every callback runs").is_err() {
                continue;
            }
            for entry in entries {
                self.acknowledged_count += 1;
                if self.live.get(&entry.1) == Some(&entry) {
                    self.kept.insert(entry.1, entry);
                }
            }
        }
    }

    fn truncate(&mut self, log: &Log, index: u64) {
        self.collect();
        let gone = self.live.split_off(&index);
        self.kept.split_off(&index);
        if block_on(log.truncate_from(RaftIndex(index))).is_ok() {
            self.dead.extend(gone.values().map(|entry| (entry.0, entry.1)));
        }
    }

    fn purge(&mut self, log: &Log, position: LogPosition) {
        self.collect();
        self.kept = self.kept.split_off(&(position.index.0 + 1));
        self.live = self.live.split_off(&(position.index.0 + 1));
        self.ask_purge(position);
        if block_on(log.purge_through(position)).is_ok() {
            self.purged = Some(position);
        }
    }

    fn install(&mut self, log: &Log, position: LogPosition) {
        self.collect();
        let gone = std::mem::take(&mut self.live);
        self.kept.clear();
        self.ask_purge(position);
        self.checkpoint = None;
        let checkpoint = vec![(CheckpointKind::Newest, Bytes::from("installed"))];
        if block_on(log.install(position, Offset(5_000), checkpoint)).is_ok() {
            self.purged = Some(position);
            self.checkpoint = Some(position);
            self.dead.extend(gone.values().map(|entry| (entry.0, entry.1)));
        }
    }

    fn save_vote(&mut self, log: &Log, vote: &'static str) {
        // After one that failed, all later ones are refused without touching the disk.
        if self.vote_asked == self.vote {
            self.vote_asked = Some(Bytes::from(vote));
        }
        if block_on(log.save_vote(Bytes::from(vote))).is_ok() {
            self.vote.clone_from(&self.vote_asked);
        }
    }

    fn ask_purge(&mut self, position: LogPosition) {
        if self.purge_asked == self.purged {
            self.purge_asked = Some(position);
        }
    }

    fn save_checkpoint(&mut self, log: &Log) {
        let Some(position) = log.last() else { return };
        // It goes where the log start goes, and its loss costs a lagging replica no more than time.
        drop(block_on(log.save_checkpoint(CheckpointKind::Retention, position, Bytes::from("state"))));
        let saved = block_on(log.save_checkpoint(CheckpointKind::Newest, position, Bytes::from("state")));
        if saved.is_ok() {
            self.checkpoint = Some(position);
        }
    }

    /// The whole run. Failures of the log are what a power cut looks like from inside.
    fn run(&mut self, log: &Log) {
        let entries = |term: u64, log: &Log, count: u64, size: usize| -> Vec<Batch> {
            let start = next_index(log);
            (start..start + count).map(|index| data(term, index, 1 + index as u32 % 3, size, index)).collect()
        };
        self.append(log, vec![control(1, 0, "members")]);
        self.collect();
        self.save_vote(log, "vote 1");
        for step in 0..6 {
            self.append(log, entries(1, log, 1 + step, 300 + 100 * step as usize));
        }
        log.save_committed(position(1, 4));
        self.collect();
        self.save_checkpoint(log);
        self.append(log, entries(1, log, 12, 900));
        self.truncate(log, 20);
        self.append(log, entries(2, log, 3, 200));
        self.append(log, entries(2, log, 20, 1_000));
        self.save_vote(log, "vote 2");
        self.truncate(log, 9);
        self.append(log, entries(3, log, 30, 700));
        self.collect();
        self.save_checkpoint(log);
        self.append(log, entries(3, log, 2, 100));
        self.save_checkpoint(log);
        self.append(log, entries(3, log, 2, 100));
        self.save_checkpoint(log);
        if let Some(entry) = self.live.get(&12).cloned() {
            self.purge(log, LogPosition::new(entry.0, 12));
        }
        self.append(log, entries(3, log, 2, 6_000));
        if let Some(entry) = self.live.get(&35).cloned() {
            self.purge(log, LogPosition::new(entry.0, 35));
        }
        self.collect();
        self.save_vote(log, "vote 3");
        self.append(log, entries(3, log, 2, 100));
        self.install(log, LogPosition::new(4, 100));
        if log.last() == Some(LogPosition::new(4, 100)) {
            self.append(log, entries(4, log, 3, 500));
            self.truncate(log, 101);
            self.append(log, entries(5, log, 25, 500));
        }
        self.collect();
        // Entries of one size: each file that becomes a segment again has old ones where the new ones go.
        for _ in 0..3 {
            self.append(log, entries(5, log, 26, 700));
            self.collect();
            if let Some(boundary) = log.last_segment_boundary(RaftIndex(next_index(log))) {
                self.purge(log, boundary);
            }
            self.append(log, entries(5, log, 1, 700));
            self.collect();
        }
    }

    /// What must hold for the log as it was found.
    fn judge(&self, log: &Log) -> Result<(), String> {
        let purged = log.purged();
        if purged != self.purged && purged != self.purge_asked {
            return Err(format!("purged is {purged:?}, told {:?}, asked {:?}", self.purged, self.purge_asked));
        }
        let start = purged.map_or(0, |purged| purged.index.0 + 1);
        let entries = try_read_entries(log, start, 3_000).map_err(|error| error.to_string())?;
        let found: BTreeMap<u64, Entry> = entries.iter().map(|batch| (batch.header.index.0, essence(batch))).collect();
        if next_index(log) != start + found.len() as u64 {
            return Err(format!("{} entries for indexes {start}..{}", found.len(), next_index(log)));
        }
        for (index, entry) in &self.kept {
            if *index >= start && found.get(index) != Some(entry) {
                return Err(format!("flushed entry {}-{index} is lost", entry.0));
            }
        }
        for (index, entry) in &found {
            let place = (entry.0, *index);
            if self.known.get(&place) != Some(entry) {
                return Err(format!("entry {}-{index} was never appended so", entry.0));
            }
            if self.dead.contains(&place) {
                return Err(format!("truncated entry {}-{index} came back", entry.0));
            }
        }
        if log.vote() != self.vote && log.vote() != self.vote_asked {
            return Err(format!("vote is {:?}, told {:?}, asked {:?}", log.vote(), self.vote, self.vote_asked));
        }
        if log.committed() > log.last() || log.flushed() != log.last() {
            return Err(format!("committed {:?}, flushed {:?}, last {:?}", log.committed(), log.flushed(), log.last()));
        }
        let checkpoints = log.checkpoints();
        if let Some(saved) = self.checkpoint
            && checkpoints.first().is_none_or(|(_, newest)| *newest < saved)
        {
            return Err(format!("checkpoint at {saved} is lost: {checkpoints:?}"));
        }
        for (kind, at) in checkpoints {
            if Some(at) > log.last() {
                return Err(format!("checkpoint at {at} is above the end"));
            }
            log.load_checkpoint(kind, at).map_err(|error| error.to_string())?;
        }
        Ok(())
    }
}

/// Which syncs the disk only pretends to do.
#[derive(Clone, Copy, PartialEq)]
enum Lie {
    None,
    /// Syncs of files; there is no flush of the disk then.
    Files,
    Names,
    /// The flush of the disk.
    Flush,
}

/// Also notes which names it was asked to change.
struct LyingDisk(MemoryDisk, Lie, Names);

/// How often what was done to which type of file.
type Names = Arc<Mutex<BTreeMap<String, usize>>>;

impl LyingDisk {
    fn note(&self, what: &str, path: &str) {
        let name = path.rsplit('/').next().unwrap_or(path);
        let kind = name.trim_start_matches(|first: char| first.is_ascii_digit() || first == '-');
        let kind = kind.split("-0").next().unwrap_or(kind);
        *self.2.lock().unwrap().entry(format!("{what} {kind}")).or_default() += 1;
    }
}

struct LyingFile(Arc<dyn File>);
struct LyingBlockFile(Arc<dyn BlockFile>);

impl Disk for LyingDisk {
    fn name(&self) -> String {
        self.0.name()
    }
    fn lock(&self, path: &str) -> io::Result<()> {
        self.0.lock(path)
    }
    fn unlock(&self) {
        self.0.unlock();
    }
    fn open(&self, path: &str) -> io::Result<Arc<dyn File>> {
        let file = self.0.open(path)?;
        Ok(if self.1 == Lie::Files { Arc::new(LyingFile(file)) } else { file })
    }
    fn create(&self, path: &str) -> io::Result<Arc<dyn File>> {
        let file = self.0.create(path)?;
        self.note("create", path);
        Ok(if self.1 == Lie::Files { Arc::new(LyingFile(file)) } else { file })
    }
    fn open_blocks(&self, path: &str) -> io::Result<Arc<dyn BlockFile>> {
        let file = self.0.open_blocks(path)?;
        Ok(if self.1 == Lie::Files { Arc::new(LyingBlockFile(file)) } else { file })
    }
    fn flush(&self) -> io::Result<()> {
        if self.1 == Lie::Flush { Ok(()) } else { self.0.flush() }
    }
    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.note("rename from", from);
        self.note("rename to", to);
        self.0.rename(from, to)
    }
    fn remove(&self, path: &str) -> io::Result<()> {
        self.note("remove", path);
        self.0.remove(path)
    }
    fn create_dir(&self, path: &str) -> io::Result<()> {
        self.0.create_dir(path)
    }
    fn remove_dir(&self, path: &str) -> io::Result<()> {
        self.0.remove_dir(path)
    }
    fn sync_dir(&self, path: &str) -> io::Result<()> {
        if self.1 == Lie::Names { Ok(()) } else { self.0.sync_dir(path) }
    }
    fn list(&self, path: &str) -> io::Result<Vec<String>> {
        self.0.list(path)
    }
}

impl File for LyingFile {
    fn users(&self) -> Weak<()> {
        self.0.users()
    }

    fn write_at(&self, pieces: &[Bytes], at: u64) -> io::Result<()> {
        self.0.write_at(pieces, at)
    }
    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
    fn read_at(&self, buffer: &mut [u8], at: u64) -> io::Result<usize> {
        self.0.read_at(buffer, at)
    }
    fn size(&self) -> io::Result<u64> {
        self.0.size()
    }
    fn view(&self, at: u64, size: usize, capacity: u64) -> io::Result<Bytes> {
        self.0.view(at, size, capacity)
    }
}

impl BlockFile for LyingBlockFile {
    fn write(&self, blocks: &[u8], at: u64) -> io::Result<()> {
        self.0.write(blocks, at)
    }
    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
}

fn open(disk: &MemoryDisk, lie: Lie, names: &Names) -> Result<(Store, Log), OpenError> {
    let options = arqon_storage::Options { thread_count: 1, ..small_options() };
    let disk = LyingDisk(disk.again(), lie, Arc::clone(names));
    let store = Store::open_on(Arc::new(disk), identity(), options)?;
    let (log, _) = store.open_log(GROUP, REPLICA)?;
    Ok((store, log))
}

/// Runs until the power goes at change `at`. Says how many changes there were.
fn run(disk: &MemoryDisk, at: Option<u64>, lie: Lie, names: &Names) -> (Promises, u64) {
    let mut promises = Promises::default();
    let (store, log) = open(disk, Lie::None, &Names::default()).expect("an empty disk opens");
    drop((store, log));
    let (store, log) = open(disk, lie, names).expect("a closed log opens");
    let before = disk.operation_count();
    if let Some(at) = at {
        disk.power_off_at(before + at);
    }
    promises.run(&log);
    drop((store, log));
    (promises, disk.operation_count() - before)
}

/// When the power goes, and what becomes of what was not synced.
#[derive(Clone, Copy, Debug)]
struct Cut {
    at: u64,
    unsynced: Unsynced,
    seed: u64,
}

/// Says how many entries were acknowledged, or what was broken.
fn judge_cut(cut: Cut, lie: Lie) -> Result<usize, String> {
    let (disk, seed) = (MemoryDisk::new(), cut.seed);
    let (promises, _) = run(&disk, Some(cut.at), lie, &Names::default());
    let mut disk = disk.cut_where(cut.unsynced, seed);
    if seed % 2 == 1 {
        disk.power_off_at(disk.operation_count() + seed / 2 % 24);
        drop(open(&disk, lie, &Names::default()));
        disk = disk.cut_where(cut.unsynced, seed ^ 0x5555);
    }
    judge_found(&promises, disk, lie, seed).map_err(|reason| format!("{cut:?}: {reason}"))?;
    Ok(promises.acknowledged_count)
}

/// Opens what the power left for good, judges it, and goes on with it.
fn judge_found(promises: &Promises, disk: MemoryDisk, lie: Lie, seed: u64) -> Result<(), String> {
    let names = Names::default();
    let (store, log) = open(&disk, lie, &names).map_err(|error| error.to_string())?;
    promises.judge(&log)?;

    // Life goes on, and what is written now stands too.
    let term = log.last().map_or(9, |last| last.term.0 + 9);
    append_many(&log, term, 12, 800);
    let first = |log: &Log| log.purged().map_or(0, |purged| purged.index.0 + 1);
    let read = |log: &Log| try_read_entries(log, first(log), usize::MAX).map_err(|error| error.to_string());
    let expected = read(&log)?;
    drop((store, log));
    let disk = disk.cut(seed + 1);
    let (_store, log) = open(&disk, lie, &names).map_err(|error| format!("again: {error}"))?;
    if read(&log)? != expected {
        return Err("what was written after it is lost".to_owned());
    }
    Ok(())
}

#[test]
fn nothing_acknowledged_is_lost_whenever_the_power_goes() {
    let names = Names::default();
    let (promises, count) = run(&MemoryDisk::new(), None, Lie::None, &names);
    assert!(promises.acknowledged_count > 100 && count > 100, "the run does too little to judge");
    let names = names.lock().unwrap();
    println!("{count} changes of the disk, among them {names:?}");
    let expected = [
        "create .seg.tmp",
        "rename to .seg",
        "rename to .idx",
        "rename to .spare",
        "rename from .spare",
        "rename to manifest",
        "rename to vote",
        "rename to checkpoint-newest",
        "rename to checkpoint-retention",
        "remove .seg",
        "remove .idx",
        "remove checkpoint-newest",
    ];
    for name in expected {
        assert!(names.contains_key(name), "the run never does this: {name}");
    }
    let seeds: u64 = std::env::var("CRASH_SEEDS").map_or(4, |seeds| seeds.parse().unwrap());
    let fates = [Unsynced::Lost, Unsynced::Kept, Unsynced::Torn].into_iter().zip(0..);
    let fates: Vec<_> = fates.chain((0..seeds).map(|seed| (Unsynced::Any, seed))).collect();
    let (mut cut_count, mut acknowledged_count) = (0, 0);
    for at in 0..count + 20 {
        for (unsynced, seed) in &fates {
            let cut = Cut { at, unsynced: *unsynced, seed: at * 1_000 + seed };
            acknowledged_count += judge_cut(cut, Lie::None).unwrap_or_else(|broken| panic!("{broken}"));
            cut_count += 1;
        }
    }
    println!("{cut_count} cuts, {acknowledged_count} entries acknowledged before them");
    assert!(acknowledged_count > 1_000, "the cuts came before anything was acknowledged");
}

/// The story: the power goes, and again at change number n of the start that follows.
#[test]
fn nothing_is_lost_when_the_power_goes_again_while_the_log_is_opened() {
    let (_, count) = run(&MemoryDisk::new(), None, Lie::None, &Names::default());
    let mut cut_count = 0;
    for (number, at) in (0..count + 10).step_by(9).enumerate() {
        let first = MemoryDisk::new();
        let (promises, _) = run(&first, Some(at), Lie::None, &Names::default());
        let fate = |number: usize| [Unsynced::Lost, Unsynced::Torn, Unsynced::Any, Unsynced::Kept][number % 4];
        let first = first.cut_where(fate(number), at);
        let whole = MemoryDisk::copy_of(&first);
        let before = whole.operation_count();
        drop(open(&whole, Lie::None, &Names::default()).expect("what a cut leaves opens"));
        for again in 0..whole.operation_count() - before {
            let disk = MemoryDisk::copy_of(&first);
            disk.power_off_at(before + again);
            drop(open(&disk, Lie::None, &Names::default()));
            let found = disk.cut_where(fate(number + 1 + again as usize), at + again);
            judge_found(&promises, found, Lie::None, at)
                .unwrap_or_else(|reason| panic!("cut at change {at}, and again at {again} of the start: {reason}"));
            cut_count += 1;
        }
    }
    println!("{cut_count} cuts while a log is opened");
    assert!(cut_count > 100, "the starts after a cut do too little to judge");
}

/// The control: on a disk that pretends to sync, these cuts must find losses.
#[test]
fn a_disk_that_pretends_to_sync_is_found_out() {
    for lie in [Lie::Files, Lie::Names, Lie::Flush] {
        let broken = (0..60).map(|at| Cut { at: at * 2, unsynced: Unsynced::Any, seed: at * 1_000 });
        let broken = broken.filter(|cut| judge_cut(*cut, lie).is_err()).count();
        assert!(broken > 0, "no cut showed that syncs are missing");
    }
}

#[test]
fn a_crash_of_the_process_alone_loses_nothing_that_was_written() {
    // The page cache stays: everything written is there, synced or not.
    let fixture = Fixture::memory();
    let (store, log, _) = fixture.open();
    append_many(&log, 1, 50, 700);
    drop((store, log));
    let (_store, log, recovery) = fixture.open();
    assert_eq!((log.last(), recovery.cut), (Some(position(1, 49)), None));
    assert_eq!(recovery.unmarked_count, 0, "the mark is written before the acknowledgement");
}
