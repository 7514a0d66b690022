//! Producers: contiguous sequences with an epoch.

use arqon_proto::planted::{self, Bug};
use arqon_proto::{DecodeError, Header, limits, wire};
use prost::encoding::message;

use super::{
    Refused,
    in_flight::FlightProducer,
    scopes::{ProducerId, Scope, Scopes},
};

/// Every producer scope that the partition remembers.
#[derive(Debug, Default)]
pub(super) struct Producers {
    scopes: Scopes,
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
            (None, None) if first == 0 || planted::has(Bug::SequencesNotInCheckpoint) => return Ok(()),
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
        let batch = wire::ProducerBatch {
            sequence: header.base_sequence,
            count: header.record_count,
            offset: header.base_offset.0,
        };
        let (first, epoch) = (header.base_sequence, header.producer_epoch);
        // A scope may have been forgotten between the leader's check and now: that is the only
        // way to a gap, and it starts a new scope here.
        let Some(scope) = self.scopes.touch(&header.producer_id) else {
            self.scopes.insert(header.producer_id, Scope::new(epoch, header.time_ms, batch));
            return;
        };
        assert!(epoch >= scope.epoch, "a fenced producer's batch at offset {} was committed", header.base_offset);
        if epoch > scope.epoch {
            scope.restart(epoch, batch);
        } else {
            assert!(
                first >= scope.next_sequence,
                "sequence {first} at offset {} is a duplicate, the next one is {}",
                header.base_offset,
                scope.next_sequence
            );
            scope.push(batch);
        }
        scope.last_time_ms = header.time_ms;
    }

    /// Forgets who has been silent for too long at `time_ms`, and the least recently used
    /// above the limit. The one used last always stays.
    pub(super) fn expire(&mut self, time_ms: u64) {
        while let Some(oldest) = self.scopes.oldest()
            && self.scopes.len() > 1
        {
            let is_silent = oldest.last_time_ms.saturating_add(limits::PRODUCER_EXPIRY_MS) <= time_ms;
            if !is_silent && self.scopes.len() <= limits::PRODUCER_COUNT_MAX {
                return;
            }
            self.scopes.remove_oldest();
        }
    }

    /// Adds field `tag` of a message, one value per scope: there may be so many that they are not
    /// held a second time as messages.
    pub(super) fn encode(&self, tag: u32, out: &mut Vec<u8>) {
        for scope in self.scopes.iter() {
            let state = wire::ProducerState {
                producer_id: scope.id().to_vec().into(),
                epoch: scope.epoch,
                next_sequence: scope.next_sequence,
                last_time_ms: scope.last_time_ms,
                batches: scope.batches().collect(),
            };
            message::encode(tag, &state, out);
        }
    }

    pub(super) fn decode(states: Vec<wire::ProducerState>) -> Result<Self, DecodeError> {
        let mut scopes = Scopes::default();
        for state in states {
            let id = ProducerId::try_from(&state.producer_id[..])
                .map_err(|_| DecodeError::Value { field: "producer id size", value: state.producer_id.len() as u64 })?;
            if scopes.get(&id).is_some() {
                return Err(DecodeError::Value { field: "producer given twice", value: state.next_sequence });
            }
            let broken = || DecodeError::Value { field: "batches of a producer", value: state.batches.len() as u64 };
            let end_of = |batch: &wire::ProducerBatch| batch.sequence.checked_add(u64::from(batch.count));
            if state.batches.iter().any(|batch| end_of(batch).is_none()) {
                return Err(broken());
            }
            let mut batches = state.batches.iter().copied();
            let mut scope = Scope::new(state.epoch, state.last_time_ms, batches.next().ok_or_else(broken)?);
            batches.for_each(|batch| scope.push(batch));
            if scope.next_sequence != state.next_sequence {
                return Err(broken());
            }
            scopes.insert(id, scope);
        }
        Ok(Self { scopes })
    }
}
