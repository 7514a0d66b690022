//! The log against a `Vec`: any order of calls and restarts gives what the `Vec` gives.

use crate::support::*;
use arqon_proto::{Batch, Offset, RaftIndex};
use arqon_storage::{Backend, Log, LogPosition, Options, ReadError};
use bytes::Bytes;
use proptest::prelude::*;

#[derive(Clone, Debug)]
enum Call {
    Append { count: u64, size: usize, wait: bool, new_term: bool },
    Truncate { back: u64 },
    Purge { part: f64 },
    Install { ahead: u64 },
    Vote(u8),
    Committed { part: f64 },
    ReadEntries { part: f64, size_max: usize },
    ReadData { part: f64, size_max: usize },
    Reopen { close: bool },
}

fn calls() -> impl Strategy<Value = Vec<Call>> {
    let call = prop_oneof![
        6 => (1..40_u64, 0..2_500_usize, any::<bool>(), any::<bool>())
            .prop_map(|(count, size, wait, new_term)| Call::Append { count, size, wait, new_term }),
        2 => (0..60_u64).prop_map(|back| Call::Truncate { back }),
        1 => (0.0..1.0).prop_map(|part| Call::Purge { part }),
        1 => (0..20_u64).prop_map(|ahead| Call::Install { ahead }),
        1 => any::<u8>().prop_map(Call::Vote),
        1 => (0.0..1.1).prop_map(|part| Call::Committed { part }),
        3 => (0.0..1.1, 0..20_000_usize).prop_map(|(part, size_max)| Call::ReadEntries { part, size_max }),
        3 => (0.0..1.1, 0..20_000_usize).prop_map(|(part, size_max)| Call::ReadData { part, size_max }),
        2 => any::<bool>().prop_map(|close| Call::Reopen { close }),
    ];
    prop::collection::vec(call, 1..40)
}

/// The log as a `Vec`.
#[derive(Default)]
struct Model {
    purged: Option<LogPosition>,
    log_start: u64,
    next_offset: u64,
    term: u64,
    entries: Vec<Batch>,
    vote: Option<Bytes>,
}

impl Model {
    fn first(&self) -> u64 {
        self.purged.map_or(0, |purged| purged.index.0 + 1)
    }

    fn next(&self) -> u64 {
        self.first() + self.entries.len() as u64
    }

    fn last(&self) -> Option<LogPosition> {
        let last = self.entries.last();
        last.map(|batch| LogPosition { term: batch.header.term, index: batch.header.index }).or(self.purged)
    }

    fn part(&self, part: f64) -> u64 {
        self.first() + (self.entries.len() as f64 * part) as u64
    }

    fn append(&mut self, count: u64, size: usize) -> Vec<Batch> {
        let start = self.next();
        let batches: Vec<Batch> = (start..start + count)
            .map(|index| {
                if index % 4 == 3 {
                    control(self.term, index, "control")
                } else {
                    data(self.term, index, 1 + index as u32 % 5, size, index)
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
    }

    fn purge(&mut self, position: LogPosition) {
        let count = (position.index.0 + 1 - self.first()) as usize;
        self.log_start = self.entries.get(count).map_or(self.next_offset, |batch| batch.header.base_offset.0);
        self.entries.drain(..count);
        self.purged = Some(position);
    }

    fn check(&self, log: &Log) {
        assert_eq!((log.purged(), log.last()), (self.purged, self.last()));
        assert_eq!((log.log_start().0, log.next_offset().0), (self.log_start, self.next_offset));
        assert_eq!(log.vote(), self.vote);
        let same = |found: &Batch, expected: &Batch| {
            assert_eq!(essence(found), essence(expected));
            assert_eq!(found.header.base_offset, expected.header.base_offset);
        };
        let found = read_entries(log, self.first(), usize::MAX);
        assert_eq!(found.len(), self.entries.len());
        found.iter().zip(&self.entries).for_each(|(found, expected)| same(found, expected));
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

fn run(fixture: &Fixture, calls: Vec<Call>) {
    let (mut store, mut log, _) = fixture.open();
    let mut model = Model { term: 1, ..Model::default() };
    let mut waiting = Vec::new();
    for call in calls {
        match call {
            Call::Append { count, size, wait, new_term } => {
                model.term += u64::from(new_term);
                let receiver = append(&log, model.append(count, size));
                if wait {
                    receiver.recv().unwrap().unwrap();
                    assert_eq!(log.flushed(), model.last());
                } else {
                    waiting.push(receiver);
                }
            }
            Call::Truncate { back } => {
                let index = model.next().saturating_sub(back).max(model.first());
                model.truncate(index);
                model.term += 1;
                block_on(log.truncate_from(RaftIndex(index))).unwrap();
            }
            Call::Purge { part } => {
                let at = (model.part(part) - model.first()) as usize;
                let Some(batch) = model.entries.get(at) else { continue };
                let position = LogPosition { term: batch.header.term, index: batch.header.index };
                model.purge(position);
                block_on(log.purge_through(position)).unwrap();
            }
            Call::Install { ahead } => {
                model.term += 1;
                let position = LogPosition::new(model.term, model.next() + ahead);
                let offset = model.next_offset + ahead;
                model = Model {
                    purged: Some(position),
                    log_start: offset,
                    next_offset: offset,
                    entries: Vec::new(),
                    ..model
                };
                block_on(log.install(position, Offset(offset), Vec::new())).unwrap();
            }
            Call::Vote(vote) => {
                model.vote = Some(Bytes::from(vec![vote; 3]));
                block_on(log.save_vote(Bytes::from(vec![vote; 3]))).unwrap();
            }
            Call::Committed { part } => {
                log.save_committed(LogPosition::new(model.term, model.part(part)));
                assert!(log.committed() <= log.last() && log.committed() >= log.purged());
            }
            Call::ReadEntries { part, size_max } => model.check_entries(&log, model.part(part), size_max),
            Call::ReadData { part, size_max } => {
                let span = model.next_offset - model.log_start;
                let from = (model.log_start + (span as f64 * part) as u64).saturating_sub(1);
                model.check_data(&log, from, model.part(1.0 - part / 3.0), size_max);
            }
            Call::Reopen { close } => {
                if close {
                    block_on(store.close());
                } else {
                    drop(store);
                }
                drop(log);
                (store, log, _) = fixture.open();
                assert_eq!(log.flushed(), log.last());
            }
        }
        model.check(&log);
    }
    drop((store, log));
    waiting.into_iter().for_each(|receiver| receiver.recv().unwrap().unwrap());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn on_the_disk_in_memory(calls in calls()) {
        run(&Fixture::memory(), calls);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 15, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn on_files(calls in calls()) {
        run(&Fixture::real(Backend::Plain), calls);
    }

    #[test]
    fn on_files_with_io_uring_where_it_is_allowed(calls in calls()) {
        let mut fixture = Fixture::real(Backend::Auto);
        fixture.options = Options { segment_size_first: 20 << 10, ..fixture.options };
        run(&fixture, calls);
    }
}
