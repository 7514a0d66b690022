//! Job results: at most one a job. The scope is the queue that granted the job, the sequence
//! the job's offset; what lies below the queue's floor is settled and therefore known.

use std::collections::BTreeMap;

use arqon_proto::planted::{self, Bug};
use arqon_proto::{
    DecodeError,
    wire::{JobScopeState, StampSource, Stamps},
};

use super::{Refused, in_flight::FlightResults, offsets::Offsets};

/// Queues (group of a jobs partition, or a replay of it) that may write to one partition.
const SCOPE_COUNT_MAX: usize = 4_096;

/// The queue that granted a job.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct JobScope {
    topic: String,
    partition: u32,
    group: String,
    replay_id: String,
}

impl From<&StampSource> for JobScope {
    fn from(source: &StampSource) -> Self {
        Self {
            topic: source.topic.clone(),
            partition: source.partition,
            group: source.group.clone(),
            replay_id: source.replay_id.clone(),
        }
    }
}

/// The scopes of all queues whose results are in this partition.
#[derive(Debug, Default)]
pub(super) struct Results {
    scopes: BTreeMap<JobScope, Offsets>,
}

/// Each source of `stamps` with the job offsets under it.
pub(super) fn by_source(stamps: &Stamps) -> Vec<(&StampSource, Vec<u64>)> {
    let mut out: Vec<_> = stamps.sources.iter().map(|source| (source, Vec::new())).collect();
    for stamp in &stamps.stamps {
        out[stamp.source as usize].1.push(stamp.offset);
    }
    out
}

impl Results {
    /// Whether the leader may propose results with these stamps.
    pub(super) fn check(&self, stamps: &Stamps, in_flight: &FlightResults) -> Result<(), Refused> {
        if planted::has(Bug::UnfencedLease) {
            return Ok(());
        }
        let mut known = Vec::new();
        let mut new_scope_count = 0;
        for (source, offsets) in by_source(stamps) {
            let scope = JobScope::from(source);
            let applied = self.scopes.get(&scope);
            let flight = in_flight.get(&scope);
            new_scope_count += usize::from(applied.is_none() && flight.is_none());
            for offset in offsets {
                if applied.is_some_and(|applied| applied.contains(offset)) {
                    known.push(arqon_proto::wire::Duplicate { sequence: offset, offset: None });
                } else if flight.is_some_and(|flight| flight.contains(offset)) {
                    return Err(Refused::InFlight);
                }
            }
        }
        if !known.is_empty() {
            return Err(Refused::Duplicate(known));
        }
        if new_scope_count > 0 && self.scopes.len() + in_flight.len() + new_scope_count > SCOPE_COUNT_MAX {
            return Err(Refused::TooManyScopes);
        }
        Ok(())
    }

    /// Remembers committed results.
    ///
    /// # Panics
    /// On a second result of one job.
    pub(super) fn record(&mut self, stamps: &Stamps) {
        // Floors are raised after all records, as the leader's check saw them.
        for (source, offsets) in by_source(stamps) {
            let scope = self.scopes.entry(JobScope::from(source)).or_default();
            for offset in offsets {
                let is_new = scope.insert(offset);
                assert!(
                    is_new || planted::has(Bug::UnfencedLease),
                    "a second result of job {} of {} was committed",
                    offset,
                    source.topic
                );
            }
        }
        for source in &stamps.sources {
            if let Some(scope) = self.scopes.get_mut(&JobScope::from(source)) {
                scope.raise(source.acked_floor);
            }
        }
    }

    pub(super) fn encode(&self) -> Vec<JobScopeState> {
        let scopes = self.scopes.iter();
        scopes
            .map(|(scope, known)| JobScopeState {
                topic: scope.topic.clone(),
                partition: scope.partition,
                group: scope.group.clone(),
                replay_id: scope.replay_id.clone(),
                floor: known.floor(),
                above: known.encode_above(),
            })
            .collect()
    }

    pub(super) fn decode(states: Vec<JobScopeState>) -> Result<Self, DecodeError> {
        let mut scopes = BTreeMap::new();
        for state in states {
            let known = Offsets::decode(state.floor, &state.above, "job scope")?;
            let scope = JobScope {
                topic: state.topic,
                partition: state.partition,
                group: state.group,
                replay_id: state.replay_id,
            };
            if scopes.insert(scope, known).is_some() {
                return Err(DecodeError::Value { field: "job scope given twice", value: scopes.len() as u64 });
            }
        }
        Ok(Self { scopes })
    }
}
