//! The log against a `Vec`: any order of calls, restarts, power cuts and failures of the disk gives what
//! the `Vec` gives.
//!
//! What is not certain is a set of `Vec`s: a change that failed took place or not, and of the entries
//! that nobody was told to be flushed a power cut leaves some first ones. The log must be one of them.

use std::io;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::Receiver;

use crate::support::*;
use arqon_proto::{Batch, Offset, RaftIndex};
use arqon_storage::{
    Backend, CheckpointKind, FaultyDisk, Log, LogPosition, MemoryDisk, Operation, Options, ReadError, Store,
};
use bytes::Bytes;
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::{RngSeed, TestRunner};

/// A change of the log.
#[derive(Clone, Debug)]
enum Change {
    Append { count: u64, size: usize, wait: bool, new_term: bool },
    Truncate { back: u64 },
    Purge { part: f64 },
    Install { ahead: u64 },
    Vote(u8),
    Checkpoint { retention: bool, part: f64 },
}

#[derive(Clone, Debug)]
enum Call {
    Change(Change),
    /// The same while the disk begins to fail, after `skip` operations that do not; then the process
    /// ends, and with `cut` the power goes too.
    Fail {
        change: Change,
        operation: Operation,
        skip: u64,
        cut: Option<u64>,
    },
    Committed {
        part: f64,
    },
    ReadEntries {
        part: f64,
        size_max: usize,
    },
    ReadData {
        part: f64,
        size_max: usize,
    },
    Reopen {
        close: bool,
    },
    /// The process is killed: what was written is there, synced or not.
    Kill,
    /// The power goes: what was not synced is there, torn or gone, by the seed.
    Cut {
        seed: u64,
    },
}

fn changes() -> impl Strategy<Value = Change> {
    prop_oneof![
        6 => (1..40_u64, 0..2_500_usize, any::<bool>(), any::<bool>())
            .prop_map(|(count, size, wait, new_term)| Change::Append { count, size, wait, new_term }),
        2 => (0..60_u64).prop_map(|back| Change::Truncate { back }),
        1 => (0.0..1.0).prop_map(|part| Change::Purge { part }),
        1 => (0..20_u64).prop_map(|ahead| Change::Install { ahead }),
        1 => any::<u8>().prop_map(Change::Vote),
        1 => (any::<bool>(), 0.0..1.0).prop_map(|(retention, part)| Change::Checkpoint { retention, part }),
    ]
}

fn operations() -> impl Strategy<Value = Operation> {
    prop_oneof![Just(Operation::Write), Just(Operation::Sync), Just(Operation::Name), Just(Operation::SyncDir)]
}

fn calls() -> impl Strategy<Value = Vec<Call>> {
    let call = prop_oneof![
        12 => changes().prop_map(Call::Change),
        1 => (changes(), operations(), 0..6_u64, proptest::option::of(any::<u64>()))
            .prop_map(|(change, operation, skip, cut)| Call::Fail { change, operation, skip, cut }),
        1 => (0.0..1.1).prop_map(|part| Call::Committed { part }),
        3 => (0.0..1.1, 0..20_000_usize).prop_map(|(part, size_max)| Call::ReadEntries { part, size_max }),
        3 => (0.0..1.1, 0..20_000_usize).prop_map(|(part, size_max)| Call::ReadData { part, size_max }),
        2 => any::<bool>().prop_map(|close| Call::Reopen { close }),
        2 => Just(Call::Kill),
        2 => any::<u64>().prop_map(|seed| Call::Cut { seed }),
    ];
    prop::collection::vec(call, 1..40)
}

/// The log as a `Vec`.
#[derive(Clone, Default)]
struct Model {
    purged: Option<LogPosition>,
    log_start: u64,
    next_offset: u64,
    entries: Vec<Batch>,
    /// Index before which everything is known to be durable.
    flushed: u64,
    vote: Option<Bytes>,
    /// The newest of each kind, which must be there.
    checkpoints: Vec<(CheckpointKind, LogPosition)>,
}

/// What a checkpoint holds.
fn state_at(position: LogPosition) -> Bytes {
    Bytes::from(format!("the state at {position}"))
}

impl Model {
    fn first(&self) -> u64 {
        self.purged.map_or(0, |purged| purged.index.0 + 1)
    }

    fn next(&self) -> u64 {
        self.first() + self.entries.len() as u64
    }

    fn last(&self) -> Option<LogPosition> {
        self.entries.last().map(position_of).or(self.purged)
    }

    fn part(&self, part: f64) -> u64 {
        self.first() + (self.entries.len() as f64 * part) as u64
    }

    fn append(&mut self, term: u64, count: u64, size: usize) -> Vec<Batch> {
        let start = self.next();
        let batches: Vec<Batch> = (start..start + count)
            .map(|index| {
                if index % 4 == 3 {
                    control(term, index, "control")
                } else {
                    data(term, index, 1 + index as u32 % 5, size, index)
                }
            })
            .collect();
        for batch in &batches {
            let mut batch = batch.clone();
            batch.header.base_offset = Offset(self.next_offset);
            self.next_offset = batch.header.next_offset().0;
            self.entries.push(batch);
        }
        batches
    }

    fn truncate(&mut self, index: u64) {
        let at = (index - self.first()) as usize;
        if let Some(batch) = self.entries.get(at) {
            self.next_offset = batch.header.base_offset.0;
            self.entries.truncate(at);
        }
        self.flushed = self.flushed.min(index);
    }

    fn purge(&mut self, position: LogPosition) {
        let count = (position.index.0 + 1 - self.first()) as usize;
        self.log_start = self.entries.get(count).map_or(self.next_offset, |batch| batch.header.base_offset.0);
        self.entries.drain(..count);
        self.purged = Some(position);
    }

    fn save_checkpoint(&mut self, kind: CheckpointKind, position: LogPosition) {
        let known = self.checkpoints.iter().find(|(other, _)| *other == kind);
        if known.is_none_or(|(_, newest)| *newest <= position) {
            self.checkpoints.retain(|(other, _)| *other != kind);
            self.checkpoints.push((kind, position));
        }
    }

    /// First index that no checkpoint covers: a state machine never applies what may be dropped.
    fn uncovered(&self) -> u64 {
        self.checkpoints.iter().map(|(_, at)| at.index.0 + 1).max().unwrap_or(0).max(self.first())
    }

    /// The model that `log` is: this one, or with fewer of the entries that were not known to be flushed.
    fn found(&self, log: &Log) -> Result<Self, String> {
        let mut model = self.clone();
        let next = next_index(log);
        if (self.flushed.max(self.first())..=self.next()).contains(&next) {
            model.truncate(next);
        }
        let place = |model: &Self| (model.purged, model.last(), model.log_start, model.next_offset, model.vote.clone());
        let found = (log.purged(), log.last(), log.log_start().0, log.next_offset().0, log.vote());
        if place(&model) != found {
            return Err(format!("it is {found:?}, and not {:?} (flushed to {})", place(&model), self.flushed));
        }
        let entries = try_read_entries(log, model.first(), usize::MAX).map_err(|error| error.to_string())?;
        if entries.len() != model.entries.len() {
            return Err(format!("{} entries are read of {}", entries.len(), model.entries.len()));
        }
        for (found, expected) in entries.iter().zip(&model.entries) {
            if essence(found) != essence(expected) || found.header.base_offset != expected.header.base_offset {
                return Err(format!("{found:?} is read for {expected:?}"));
            }
        }
        let checkpoints = log.checkpoints();
        for (kind, at) in &checkpoints {
            let state = log.load_checkpoint(*kind, *at).map_err(|error| format!("checkpoint at {at}: {error}"))?;
            if state != state_at(*at) || Some(*at) > log.last() {
                return Err(format!("checkpoint at {at} holds {state:?}, the log ends at {:?}", log.last()));
            }
        }
        match model.checkpoints.iter().find(|saved| !checkpoints.contains(saved)) {
            Some((kind, at)) => Err(format!("the {kind:?} checkpoint at {at} is lost: {checkpoints:?}")),
            None => Ok(model),
        }
    }

    fn check(&self, log: &Log) {
        let exact = Self { flushed: self.next(), ..self.clone() };
        exact.found(log).unwrap_or_else(|reason| panic!("{reason}"));
    }

    fn check_entries(&self, log: &Log, start: u64, size_max: usize) {
        let found = log.entries(RaftIndex(start)..RaftIndex(self.next()), size_max).unwrap();
        let rest = &self.entries[((start - self.first()) as usize).min(self.entries.len())..];
        let mut size = 0;
        let fits = |batch: &&Batch| {
            size += batch.header.batch_size();
            size <= size_max
        };
        let expected = rest.iter().take_while(fits).count().max(1).min(rest.len());
        assert_eq!(found.len(), expected);
        found.iter().zip(rest).for_each(|(found, expected)| assert_eq!(essence(found), essence(expected)));
    }

    fn check_data(&self, log: &Log, from: u64, through: u64, size_max: usize) {
        let found = log.read_data(Offset(from), RaftIndex(through), size_max);
        if from < self.log_start {
            assert!(matches!(found, Err(ReadError::OutOfRange { log_start }) if log_start.0 == self.log_start));
            return;
        }
        let reaching = self.entries.iter().filter(|batch| batch.header.record_count > 0);
        let reaching = reaching.filter(|batch| batch.header.next_offset().0 > from && batch.header.index.0 <= through);
        let mut size = 0;
        let mut expected = Vec::new();
        for batch in reaching {
            size += batch.header.batch_size();
            if !expected.is_empty() && size > size_max {
                break;
            }
            expected.push(essence(batch));
        }
        assert_eq!(found.unwrap().iter().map(essence).collect::<Vec<_>>(), expected);
    }
}

fn position_of(batch: &Batch) -> LogPosition {
    LogPosition { term: batch.header.term, index: batch.header.index }
}

/// How a run of the process ends.
enum End {
    Drop,
    Kill,
    Cut(u64),
}

/// How much was tried, over all runs of this test.
static CUT_COUNT: AtomicU64 = AtomicU64::new(0);
static FAILURE_COUNT: AtomicU64 = AtomicU64::new(0);
static RECYCLED_COUNT: AtomicU64 = AtomicU64::new(0);

/// A log, the model of it, and what is needed to start it again.
struct Machine<'a> {
    fixture: &'a Fixture,
    /// The disk in memory, as the last cut left it.
    memory: Option<MemoryDisk>,
    /// The disk as this start has it, where it can be made to fail.
    faults: Option<FaultyDisk>,
    opened: Option<(Store, Log)>,
    model: Model,
    term: u64,
    /// Index after the highest one at which a checkpoint was asked for; a state machine never goes back.
    checkpoint_end: u64,
    /// Appends whose result nobody has asked for: the index after each.
    waiting: Vec<(u64, Receiver<io::Result<()>>)>,
}

impl<'a> Machine<'a> {
    fn start(fixture: &'a Fixture) -> Self {
        let memory = match &fixture.place {
            Place::Memory(disk) => Some(disk.clone()),
            Place::Real(_) => None,
        };
        let (model, waiting) = (Model::default(), Vec::new());
        let mut machine =
            Self { fixture, memory, faults: None, opened: None, model, term: 1, checkpoint_end: 0, waiting };
        machine.open();
        machine
    }

    fn open(&mut self) {
        self.faults = self.memory.as_ref().map(|disk| FaultyDisk::new(Arc::new(disk.again())));
        let disk = self.faults.clone().map_or_else(|| self.fixture.disk(), |disk| Arc::new(disk) as _);
        let store = Store::open_on(disk, identity(), self.fixture.options.clone()).unwrap();
        let (log, _) = store.open_log(GROUP, REPLICA).unwrap();
        assert_eq!(log.flushed(), log.last());
        self.opened = Some((store, log));
    }

    fn count_recycled(&self) {
        let metrics = self.opened.as_ref().map(|(store, _)| store.metrics());
        let count = metrics.map_or(0, |metrics| metrics.recycled_count.load(Ordering::Relaxed));
        RECYCLED_COUNT.fetch_add(count, Ordering::Relaxed);
    }

    fn log(&self) -> Log {
        self.opened.as_ref().unwrap().1.clone()
    }

    /// Makes a change of the log and of the model; says how the log answered.
    fn change(&mut self, change: &Change) -> io::Result<()> {
        let log = self.log();
        let model = &mut self.model;
        match *change {
            Change::Append { count, size, wait, new_term } => {
                self.term += u64::from(new_term);
                let batches = model.append(self.term, count, size);
                let (sender, receiver) = std::sync::mpsc::channel();
                log.append(batches, Box::new(move |result| drop(sender.send(result))))?;
                if !wait {
                    self.waiting.push((model.next(), receiver));
                    return Ok(());
                }
                receiver.recv().unwrap()?;
                assert!(log.flushed() >= model.last());
                model.flushed = model.next();
            }
            Change::Truncate { back } => {
                // What a checkpoint was asked for is committed, whether the checkpoint was saved or not.
                let applied = model.uncovered().max(self.checkpoint_end);
                let index = model.next().saturating_sub(back).max(applied).min(model.next());
                model.truncate(index);
                // A flush of entries that are gone says nothing of those that take their place.
                self.waiting.retain(|(next, _)| *next <= index);
                self.term += 1;
                block_on(log.truncate_from(RaftIndex(index)))?;
            }
            Change::Purge { part } => {
                let at = (model.part(part) - model.first()) as usize;
                let Some(position) = model.entries.get(at).map(position_of) else { return Ok(()) };
                model.purge(position);
                block_on(log.purge_through(position))?;
            }
            Change::Install { ahead } => {
                self.term += 1;
                let position = LogPosition::new(self.term, model.next() + ahead);
                let offset = model.next_offset + ahead;
                let (vote, checkpoints) = (model.vote.clone(), model.checkpoints.clone());
                *model = Model { vote, checkpoints, flushed: position.index.0 + 1, ..Model::default() };
                (model.purged, model.log_start, model.next_offset) = (Some(position), offset, offset);
                model.save_checkpoint(CheckpointKind::Newest, position);
                self.checkpoint_end = position.index.0 + 1;
                self.waiting.clear();
                let checkpoints = vec![(CheckpointKind::Newest, state_at(position))];
                block_on(log.install(position, Offset(offset), checkpoints))?;
            }
            Change::Vote(vote) => {
                model.vote = Some(Bytes::from(vec![vote; 3]));
                block_on(log.save_vote(Bytes::from(vec![vote; 3])))?;
                // It is written after everything that was appended before it.
                model.flushed = model.next();
            }
            Change::Checkpoint { retention, part } => {
                let kind = if retention { CheckpointKind::Retention } else { CheckpointKind::Newest };
                let at = (model.part(part) - model.first()) as usize;
                let Some(position) = model.entries.get(at).map(position_of) else { return Ok(()) };
                if position.index.0 + 1 < self.checkpoint_end {
                    return Ok(());
                }
                self.checkpoint_end = position.index.0 + 1;
                let saved = block_on(log.save_checkpoint(kind, position, state_at(position)));
                if saved.is_ok() {
                    model.save_checkpoint(kind, position);
                    model.flushed = model.flushed.max(position.index.0 + 1);
                }
                // The log goes on without a checkpoint that failed.
                saved.or_else(|error| if log.poisoned().is_some() { Err(error) } else { Ok(()) })?;
            }
        }
        Ok(())
    }

    /// Takes note of what was flushed, ends the process or cuts the power, and starts again: the log
    /// must be one of `models`.
    fn restart(&mut self, mut models: Vec<Model>, end: End) {
        let after = self.memory.as_ref().and_then(|disk| match end {
            End::Drop => None,
            End::Kill => Some(disk.kill()),
            End::Cut(seed) => Some(disk.cut(seed)),
        });
        self.count_recycled();
        self.opened = None;
        for (next, receiver) in std::mem::take(&mut self.waiting) {
            if receiver.recv().is_ok_and(|result| result.is_ok()) {
                models.iter_mut().for_each(|model| model.flushed = model.flushed.max(next.min(model.next())));
            }
        }
        if let Some(disk) = after {
            CUT_COUNT.fetch_add(1, Ordering::Relaxed);
            self.memory = Some(disk);
        }
        self.open();
        let log = self.log();
        let mut reasons = Vec::new();
        let fits = |model: &Model| model.found(&log).map_err(|reason| reasons.push(reason)).ok();
        let found = models.iter().find_map(fits);
        self.model = found.unwrap_or_else(|| panic!("the log is none of what it may be: {reasons:?}"));
        self.model.flushed = self.model.next();
    }

    fn call(&mut self, call: &Call) {
        let log = self.log();
        match call {
            Call::Change(change) => self.change(change).unwrap(),
            Call::Fail { change, operation, skip, cut } => {
                let Some(faults) = self.faults.clone() else { return self.change(change).unwrap() };
                let before = self.model.clone();
                faults.fail(*operation, *skip, io::ErrorKind::Other);
                let result = self.change(change);
                let models = match result {
                    Ok(()) => vec![self.model.clone()],
                    Err(_) => vec![self.model.clone(), before],
                };
                FAILURE_COUNT.fetch_add(u64::from(faults.failed_count() > 0), Ordering::Relaxed);
                // The lock of a directory goes with the last handle of its disk.
                drop((log, faults));
                self.restart(models, cut.map_or(End::Drop, End::Cut));
            }
            Call::Committed { part } => {
                log.save_committed(LogPosition::new(self.term, self.model.part(*part)));
                assert!(log.committed() <= log.last() && log.committed() >= log.purged());
            }
            Call::ReadEntries { part, size_max } => self.model.check_entries(&log, self.model.part(*part), *size_max),
            Call::ReadData { part, size_max } => {
                let model = &self.model;
                let span = model.next_offset - model.log_start;
                let from = (model.log_start + (span as f64 * part) as u64).saturating_sub(1);
                model.check_data(&log, from, model.part(1.0 - part / 3.0), *size_max);
            }
            Call::Reopen { close } => {
                drop(log);
                let (store, log) = self.opened.take().unwrap();
                if *close {
                    block_on(store.close());
                } else {
                    drop(store);
                }
                drop(log);
                // All that was appended is written before the threads of a store end.
                self.model.flushed = self.model.next();
                self.restart(vec![self.model.clone()], End::Drop);
            }
            Call::Kill => {
                drop(log);
                self.restart(vec![self.model.clone()], End::Kill);
            }
            Call::Cut { seed } => {
                drop(log);
                self.restart(vec![self.model.clone()], End::Cut(*seed));
            }
        }
    }
}

fn run(fixture: &Fixture, calls: Vec<Call>) {
    let mut machine = Machine::start(fixture);
    for call in calls {
        machine.call(&call);
        machine.model.check(&machine.log());
    }
    machine.count_recycled();
    machine.opened = None;
    machine.waiting.into_iter().for_each(|(_, receiver)| receiver.recv().unwrap().unwrap());
}

/// Seed of the random runs where `MODEL_SEED` names none. It is always the same, so that nobody meets by chance a fault
/// that is not of the change under test.
const SEED: u64 = 1;

fn number_of<T: FromStr>(name: &str, otherwise: T) -> T {
    match std::env::var(name) {
        Ok(text) => text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")),
        Err(_) => otherwise,
    }
}

/// Random runs for the test of this name. A seed gives the same calls each time; only the order in which the threads of
/// a store come to them is left to chance.
fn run_some(test: &str, cases: u32, fixture: impl Fn() -> Fixture) {
    let seed = number_of("MODEL_SEED", SEED);
    let rng_seed = RngSeed::Fixed(seed);
    let config = ProptestConfig { cases, rng_seed, failure_persistence: None, ..ProptestConfig::default() };
    let result = TestRunner::new(config).run(&calls(), |calls| {
        run(&fixture(), calls);
        Ok(())
    });
    if let Err(error) = result {
        let command = format!("cargo test --release -p arqon-storage --test log -- --exact model::{test}");
        panic!("{error}\nreplay with: MODEL_SEED={seed} MODEL_CASES={cases} {command}");
    }
    println!("{cases} runs, MODEL_SEED={seed}");
}

#[test]
fn on_the_disk_in_memory() {
    run_some("on_the_disk_in_memory", number_of("MODEL_CASES", 1_000), Fixture::memory);
}

/// What the runs above add up to: chance must not leave the hard parts out.
#[test]
fn power_cuts_and_failures_are_among_what_is_tried() {
    let mut runner = TestRunner::deterministic();
    for _ in 0..150 {
        let calls = calls().new_tree(&mut runner).unwrap().current();
        run(&Fixture::memory(), calls);
    }
    let (cuts, failures) = (CUT_COUNT.load(Ordering::Relaxed), FAILURE_COUNT.load(Ordering::Relaxed));
    println!("{cuts} kills and power cuts, {failures} failures of the disk");
    assert!(cuts > 20 && failures > 10, "{cuts} kills and power cuts, {failures} failures of the disk");
    let recycled = RECYCLED_COUNT.load(Ordering::Relaxed);
    println!("{recycled} segments in files of purged ones");
    assert!(recycled > 3, "{recycled} segments in files of purged ones");
}

/// Random runs on files, which take longer than those in memory.
const FILES_CASES: u32 = 15;

#[test]
fn on_files() {
    run_some("on_files", FILES_CASES, || Fixture::real(Backend::Plain));
}

#[test]
fn on_files_with_io_uring_where_it_is_allowed() {
    run_some("on_files_with_io_uring_where_it_is_allowed", FILES_CASES, || {
        let fixture = Fixture::real(Backend::Auto);
        Fixture { options: Options { segment_size_first: 20 << 10, ..fixture.options }, ..fixture }
    });
}

/// The story: the first write to a new segment fails and the power goes; the log is cut at the segment's
/// beginning, and the next append begins it anew, under the same name. Then a purge drops what is empty.
#[test]
fn a_segment_that_was_begun_anew_is_not_removed_in_place_of_the_empty_one() {
    let append = |count, size, wait| Change::Append { count, size, wait, new_term: false };
    for seed in 0..300 {
        let fixture = Fixture::memory();
        let mut machine = Machine::start(&fixture);
        let calls = [
            Call::Change(append(11, 0, false)),
            Call::Change(Change::Install { ahead: 0 }),
            Call::Fail { change: append(1, 385, false), operation: Operation::Sync, skip: 2, cut: Some(seed) },
            Call::Change(append(11, 2_049, true)),
            Call::Change(Change::Purge { part: 0.34 }),
            Call::Reopen { close: true },
        ];
        calls.iter().for_each(|call| machine.call(call));
        machine.model.check(&machine.log());
    }
}

/// The story: a cut falls between two segments, the names of those behind it are being removed, and the power goes.
/// A segment that is still there continues the chain; it was dropped all the same.
#[test]
fn a_truncation_that_fails_half_way_leaves_all_or_nothing() {
    for seed in 0..300 {
        let fixture = Fixture::memory();
        let mut machine = Machine::start(&fixture);
        let calls = [
            Call::Change(Change::Append { count: 36, size: 1_911, wait: true, new_term: true }),
            Call::Fail {
                change: Change::Truncate { back: 34 },
                operation: Operation::SyncDir,
                skip: 1,
                cut: Some(seed),
            },
        ];
        calls.iter().for_each(|call| machine.call(call));
        machine.model.check(&machine.log());
    }
}

/// The story: a checkpoint is written and named, and then the file of the one before cannot be removed. The new one
/// stands, and whoever saved it is told so.
#[test]
fn a_checkpoint_stands_although_the_file_of_the_earlier_one_stays() {
    let fixture = Fixture::memory();
    let mut machine = Machine::start(&fixture);
    let append = |count| Call::Change(Change::Append { count, size: 0, wait: true, new_term: false });
    let checkpoint = |part| Change::Checkpoint { retention: true, part };
    let fail = Call::Fail { change: checkpoint(0.5), operation: Operation::Name, skip: 2, cut: None };
    let install = Call::Change(Change::Install { ahead: 0 });
    for call in [append(1), Call::Change(checkpoint(0.0)), append(2), fail, install] {
        machine.call(&call);
        machine.model.check(&machine.log());
    }
}
