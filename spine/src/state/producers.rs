//! Producers: contiguous sequences with an epoch.

use std::collections::{BTreeMap, HashMap, VecDeque};

use arqon_proto::{DecodeError, Header, limits, wire};

use super::{Refused, in_flight::FlightProducer};

type ProducerId = [u8; 16];

/// Every producer scope that the partition remembers.
#[derive(Debug, Default)]
pub(super) struct Producers {
    scopes: HashMap<ProducerId, Scope>,
    // Turn of the last use -> who. Turns restart at a restore; only their order counts.
    by_use: BTreeMap<u64, ProducerId>,
    next_turn: u64,
}

#[derive(Debug)]
struct Scope {
    epoch: u32,
    next_sequence: u64,
    last_time_ms: u64,
    turn: u64,
    // The newest is last.
    batches: VecDeque<wire::ProducerBatch>,
}

impl Scope {
    /// Offset of `sequence` where one of the remembered batches holds it.
    fn offset_of(&self, sequence: u64) -> Option<u64> {
        let held = |batch: &&wire::ProducerBatch| {
            batch.sequence <= sequence && sequence - batch.sequence < u64::from(batch.count)
        };
        self.batches.iter().rev().find(held).map(|batch| batch.offset + (sequence - batch.sequence))
    }
}

impl Producers {
    /// Whether the leader may propose the batch, seeing what is applied and what is in flight.
    pub(super) fn check(&self, header: &Header, in_flight: Option<&FlightProducer>) -> Result<(), Refused> {
        let first = header.base_sequence;
        let end = first.checked_add(u64::from(header.record_count)).ok_or(Refused::SequenceOverflow)?;
        let applied = self.scopes.get(&header.producer_id);
        let (epoch, next) = match (in_flight, applied) {
            (Some(flight), _) => (flight.epoch, flight.next_sequence),
            (None, Some(scope)) => (scope.epoch, scope.next_sequence),
            (None, None) if first == 0 => return Ok(()),
            (None, None) => return Err(Refused::UnknownProducer),
        };
        if header.producer_epoch < epoch {
            return Err(Refused::Fenced { epoch });
        }
        // A new epoch starts its own sequences.
        let (next, is_known_epoch) = if header.producer_epoch > epoch { (0, false) } else { (next, true) };
        if first > next {
            return Err(Refused::OutOfOrder { expected: next });
        }
        if first == next || !is_known_epoch {
            return Ok(());
        }
        let known_end = end.min(next);
        if in_flight.is_some_and(|flight| known_end > flight.first_sequence) {
            return Err(Refused::InFlight);
        }
        let offset_of = |sequence| applied.and_then(|scope| scope.offset_of(sequence));
        let known = (first..known_end).map(|sequence| wire::Duplicate { sequence, offset: offset_of(sequence) });
        Err(Refused::Duplicate(known.collect()))
    }

    /// Remembers a committed batch.
    ///
    /// # Panics
    /// On a sequence or an epoch that the leader had to refuse.
    pub(super) fn record(&mut self, header: &Header) {
        let turn = self.next_turn;
        self.next_turn += 1;
        let (first, epoch) = (header.base_sequence, header.producer_epoch);
        // A scope may have been forgotten between the leader's check and now: that is the only
        // way to a gap, and it starts a new scope here.
        let scope = self.scopes.entry(header.producer_id).or_insert_with(|| Scope {
            epoch,
            next_sequence: first,
            last_time_ms: 0,
            turn,
            batches: VecDeque::new(),
        });
        assert!(epoch >= scope.epoch, "a fenced producer's batch at offset {} was committed", header.base_offset);
        if epoch > scope.epoch {
            scope.epoch = epoch;
            scope.next_sequence = 0;
            scope.batches.clear();
        }
        assert!(
            first >= scope.next_sequence,
            "sequence {first} at offset {} is a duplicate, the next one is {}",
            header.base_offset,
            scope.next_sequence
        );
        scope.next_sequence = first + u64::from(header.record_count);
        scope.last_time_ms = header.time_ms;
        self.by_use.remove(&scope.turn);
        scope.turn = turn;
        self.by_use.insert(turn, header.producer_id);
        if scope.batches.len() == limits::PRODUCER_BATCH_COUNT {
            scope.batches.pop_front();
        }
        scope.batches.push_back(wire::ProducerBatch {
            sequence: first,
            count: header.record_count,
            offset: header.base_offset.0,
        });
    }

    /// Forgets who has been silent for too long at `time_ms`, and the least recently used
    /// above the limit. The one used last always stays.
    pub(super) fn expire(&mut self, time_ms: u64) {
        while self.by_use.len() > 1 {
            let Some((turn, id)) = self.by_use.first_key_value().map(|(turn, id)| (*turn, *id)) else { return };
            let is_silent = self
                .scopes
                .get(&id)
                .is_some_and(|scope| scope.last_time_ms.saturating_add(limits::PRODUCER_EXPIRY_MS) <= time_ms);
            if !is_silent && self.by_use.len() <= limits::PRODUCER_COUNT_MAX {
                return;
            }
            self.by_use.remove(&turn);
            self.scopes.remove(&id);
        }
    }

    pub(super) fn encode(&self) -> Vec<wire::ProducerState> {
        let in_order = self.by_use.values().filter_map(|id| self.scopes.get(id).map(|scope| (id, scope)));
        in_order
            .map(|(id, scope)| wire::ProducerState {
                producer_id: id.to_vec().into(),
                epoch: scope.epoch,
                next_sequence: scope.next_sequence,
                last_time_ms: scope.last_time_ms,
                batches: scope.batches.iter().copied().collect(),
            })
            .collect()
    }

    pub(super) fn decode(states: Vec<wire::ProducerState>) -> Result<Self, DecodeError> {
        let mut out = Self::default();
        for state in states {
            let id = ProducerId::try_from(&state.producer_id[..])
                .map_err(|_| DecodeError::Value { field: "producer id size", value: state.producer_id.len() as u64 })?;
            let turn = out.next_turn;
            out.next_turn += 1;
            out.by_use.insert(turn, id);
            let scope = Scope {
                epoch: state.epoch,
                next_sequence: state.next_sequence,
                last_time_ms: state.last_time_ms,
                turn,
                batches: state.batches.into(),
            };
            if out.scopes.insert(id, scope).is_some() {
                return Err(DecodeError::Value { field: "producer given twice", value: turn });
            }
        }
        Ok(out)
    }
}
