//! What the leader has proposed in its term and not yet seen applied, so that a pipelined
//! batch is judged as if the ones before it were committed.

use std::collections::{HashMap, HashSet};

use arqon_proto::{Batch, BatchKind, Header, Offset, Term, decode_stamps, wire::Stamps};

use super::{
    PartitionState, Refused,
    results::{JobScope, by_source},
};

/// A producer's batches in flight.
#[derive(Clone, Debug)]
pub(super) struct FlightProducer {
    pub epoch: u32,
    /// First sequence of this epoch that is in flight.
    pub first_sequence: u64,
    /// The sequence that fits next.
    pub next_sequence: u64,
    batch_count: usize,
}

/// Results in flight of one queue.
#[derive(Debug, Default)]
pub(super) struct FlightScope {
    floor: u64,
    offsets: HashSet<u64>,
}

impl FlightScope {
    /// Whether a batch in flight makes `offset` known once it is applied.
    pub(super) fn contains(&self, offset: u64) -> bool {
        offset < self.floor || self.offsets.contains(&offset)
    }
}

pub(super) type FlightResults = HashMap<JobScope, FlightScope>;

/// Everything in flight of one term. Entries of older terms are either applied or gone once
/// the leader is ready in a newer one.
#[derive(Debug, Default)]
pub(crate) struct InFlight {
    term: Term,
    last_time_ms: u64,
    next_offset: u64,
    producers: HashMap<[u8; 16], FlightProducer>,
    results: FlightResults,
}

/// Leave to propose one batch.
#[derive(Debug)]
pub(crate) struct Admission {
    /// The time to write into the batch, ms since 1970.
    pub time_ms: u64,
    /// The offset that its first record gets if this node stays leader.
    pub base_offset: Offset,
    // What the producer's entry was before, to be put back if the batch is not proposed.
    before: Option<FlightProducer>,
}

impl InFlight {
    /// Starts `term` with nothing in flight; no effect when it has been started.
    pub(crate) fn begin(&mut self, term: Term, next_offset: Offset) {
        if self.term != term {
            *self = Self { term, next_offset: next_offset.0, ..Self::default() };
        }
    }

    /// A time for the next entry: the clock's, but never before that of an entry before it.
    pub(crate) fn time_ms(&mut self, state: &PartitionState, now_ms: u64) -> u64 {
        self.last_time_ms = self.last_time_ms.max(state.last_time_ms()).max(now_ms);
        self.last_time_ms
    }

    /// Whether the batch may be proposed after all that is in flight. Changes nothing.
    ///
    /// # Errors
    /// [`Refused`].
    pub(crate) fn check(
        &self,
        state: &PartitionState,
        header: &Header,
        stamps: Option<&Stamps>,
    ) -> Result<(), Refused> {
        if header.has_producer() {
            state.producers.check(header, self.producers.get(&header.producer_id))?;
        }
        stamps.map_or(Ok(()), |stamps| state.results.check(stamps, &self.results))
    }

    /// As `check`, and counts the batch as in flight.
    ///
    /// # Errors
    /// [`Refused`].
    pub(crate) fn admit(
        &mut self,
        state: &PartitionState,
        header: &Header,
        stamps: Option<&Stamps>,
        now_ms: u64,
    ) -> Result<Admission, Refused> {
        self.check(state, header, stamps)?;
        let mut before = None;
        if header.has_producer() {
            before = self.producers.get(&header.producer_id).cloned();
            let next_sequence = header.base_sequence + u64::from(header.record_count);
            let flight = self.producers.entry(header.producer_id).or_insert_with(|| FlightProducer {
                epoch: header.producer_epoch,
                first_sequence: header.base_sequence,
                next_sequence,
                batch_count: 0,
            });
            if flight.epoch != header.producer_epoch {
                flight.epoch = header.producer_epoch;
                flight.first_sequence = header.base_sequence;
            }
            flight.next_sequence = next_sequence;
            flight.batch_count += 1;
        }
        if let Some(stamps) = stamps {
            for (source, offsets) in by_source(stamps) {
                let scope = self.results.entry(JobScope::from(source)).or_default();
                scope.floor = scope.floor.max(source.acked_floor);
                scope.offsets.extend(offsets);
            }
        }
        let base_offset = Offset(self.next_offset);
        self.next_offset += u64::from(header.record_count);
        Ok(Admission { time_ms: self.time_ms(state, now_ms), base_offset, before })
    }

    /// Takes back the batch admitted last, which was surely not proposed.
    pub(crate) fn withdraw(&mut self, header: &Header, stamps: Option<&Stamps>, admission: Admission) {
        self.next_offset -= u64::from(header.record_count);
        if let Some(before) = admission.before
            && let Some(flight) = self.producers.get_mut(&header.producer_id)
        {
            // Earlier batches may have been applied meanwhile: their count stands.
            *flight = FlightProducer { batch_count: flight.batch_count, ..before };
        }
        self.settle(header, stamps);
    }

    /// An entry was applied: what it held is no longer in flight.
    pub(super) fn applied(&mut self, batch: &Batch) {
        let header = &batch.header;
        if header.term > self.term {
            // Another leader writes; whatever was still in flight here is gone.
            self.producers.clear();
            self.results.clear();
        }
        if header.term != self.term || header.kind != BatchKind::Data {
            return;
        }
        if let Some(flight) = self.producers.get_mut(&header.producer_id)
            && flight.epoch == header.producer_epoch
        {
            flight.first_sequence = header.base_sequence + u64::from(header.record_count);
        }
        // `PartitionState::apply` has read them before, so they decode.
        let stamps = decode_stamps(&batch.stamps, header.record_count).ok().flatten();
        self.settle(header, stamps.as_ref());
    }

    fn settle(&mut self, header: &Header, stamps: Option<&Stamps>) {
        if let Some(flight) = self.producers.get_mut(&header.producer_id) {
            flight.batch_count -= 1;
            if flight.batch_count == 0 {
                self.producers.remove(&header.producer_id);
            }
        }
        for (source, offsets) in stamps.map(by_source).unwrap_or_default() {
            let scope = JobScope::from(source);
            if let Some(flight) = self.results.get_mut(&scope) {
                offsets.iter().for_each(|offset| {
                    flight.offsets.remove(offset);
                });
                if flight.offsets.is_empty() {
                    self.results.remove(&scope);
                }
            }
        }
    }
}
