//! What a partition derives from its log: who has written what, and which job is where.
//!
//! ```text
//!   producers.rs   contiguous sequences per producer          (de-duplication)
//!   results.rs     one result a job, by the job's offset      (de-duplication)
//!   queue.rs       next, floor, leases and pending per group  (work queues)
//!   ranges.rs      values of ranges of offsets, offsets.rs  a set of them
//!   in_flight.rs   what the leader has proposed and not yet seen applied
//!   machine.rs     the four together, as Raft's state machine
//! ```
//!
//! Nothing here has a clock, randomness or I/O: replicas that applied the same entries have
//! byte-equal checkpoints. Whatever depends on time (expiry of producers) goes by batch times.

mod in_flight;
mod machine;
mod offsets;
mod producers;
mod queue;
mod ranges;
mod results;
mod scopes;
#[cfg(test)]
mod tests;

use arqon_proto::planted::{self, Bug};
use arqon_proto::{Batch, BatchKind, DecodeError, decode_stamps, wire};
use bytes::Bytes;
use prost::Message;

pub(crate) use in_flight::{Admission, InFlight};
pub(crate) use machine::PartitionMachine;
pub(crate) use queue::{Holder, Queue, push_range, ranges_of};
pub(crate) use ranges::Ranges;

use producers::Producers;
use queue::Queues;
use results::Results;

/// Why the leader refuses a batch.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Refused {
    /// Some sequences are in the log already; the list names them all.
    Duplicate(Vec<wire::Duplicate>),
    /// Some sequences are proposed and not yet committed: the caller waits for that.
    InFlight,
    /// The scope is not known (any more) and the sequence is above 0.
    UnknownProducer,
    /// A newer epoch has written.
    Fenced {
        /// The newest epoch.
        epoch: u32,
    },
    /// The first sequence leaves a gap.
    OutOfOrder {
        /// The sequence that would fit.
        expected: u64,
    },
    /// The sequences run over the largest number.
    SequenceOverflow,
    /// The partition remembers as many job scopes as it may.
    TooManyScopes,
}

/// What became of the commands of one control entry.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct QueueOutcome {
    /// One per command, in order.
    #[prost(message, repeated, tag = "1")]
    pub commands: Vec<CommandOutcome>,
}

/// The part of one command that had no effect.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct CommandOutcome {
    /// Leases that were not (or no longer) as the command said.
    #[prost(message, repeated, tag = "1")]
    pub lost: Vec<wire::OffsetRange>,
}

/// Number of the field `producers` of `wire::PartitionState`.
const PRODUCERS_TAG: u32 = 1;

/// The commands of a control entry, all of which this program knows.
fn control_record(batch: &Batch) -> Result<wire::ControlRecord, DecodeError> {
    let record = wire::ControlRecord::decode(batch.records.clone())
        .expect("a leader encoded the control record and the log checked its bytes");
    match record.queue.iter().all(|command| command.command.is_some()) {
        true => Ok(record),
        false => Err(DecodeError::Unknown { what: "queue command" }),
    }
}

/// The derived state of one partition.
#[derive(Debug, Default)]
pub(crate) struct PartitionState {
    producers: Producers,
    results: Results,
    queues: Queues,
    last_time_ms: u64,
    log_start: Option<wire::LogStart>,
}

impl PartitionState {
    /// Applies one committed entry.
    ///
    /// # Errors
    /// A command for a queue that only a newer program knows; nothing has changed.
    ///
    /// # Panics
    /// On a record that is known already, or on an entry that no leader wrote: the log checked
    /// the bytes, so that is a broken rule of the program.
    pub(crate) fn apply(&mut self, batch: &Batch) -> Result<Bytes, DecodeError> {
        let record = match batch.header.kind {
            BatchKind::Control => Some(control_record(batch)?),
            BatchKind::Data | BatchKind::Raft => None,
        };
        self.last_time_ms = self.last_time_ms.max(batch.header.time_ms);
        Ok(match (batch.header.kind, record) {
            (BatchKind::Data, _) => {
                self.apply_data(batch);
                Bytes::new()
            }
            (_, Some(record)) => {
                // The log start never goes back, whatever a leader of an older state asks for.
                if let Some(start) = record.log_start
                    && self.log_start.is_none_or(|known| known.index < start.index)
                {
                    self.log_start = Some(start);
                }
                self.queues.apply(&record).encode_to_vec().into()
            }
            (_, None) => Bytes::new(),
        })
    }

    fn apply_data(&mut self, batch: &Batch) {
        let header = &batch.header;
        if header.has_producer() {
            self.producers.record(header);
        }
        self.producers.expire(header.time_ms);
        let stamps = decode_stamps(&batch.stamps, header.record_count)
            .expect("a leader encoded the stamps and the log checked their bytes");
        if let Some(stamps) = stamps {
            self.results.record(&stamps);
        }
    }

    /// Time of the newest batch in ms since 1970.
    pub(crate) fn last_time_ms(&self) -> u64 {
        self.last_time_ms
    }

    /// Up to where the log is to be trimmed, once retention has said so.
    pub(crate) fn log_start(&self) -> Option<wire::LogStart> {
        self.log_start
    }

    /// The queue of `group`, once it had its first grant.
    pub(crate) fn queue(&self, group: &str) -> Option<&Queue> {
        self.queues.get(group)
    }

    /// All queues by group name, in order.
    pub(crate) fn queues(&self) -> impl Iterator<Item = (&str, &Queue)> {
        self.queues.iter()
    }

    /// The state as bytes, equal on every replica at the same position.
    pub(crate) fn checkpoint(&self) -> Bytes {
        let state = wire::PartitionState {
            producers: Vec::new(),
            job_scopes: self.results.encode(),
            queues: self.queues.encode(),
            last_time_ms: self.last_time_ms,
            log_start: self.log_start,
        };
        let mut out = state.encode_to_vec();
        if !planted::has(Bug::SequencesNotInCheckpoint) {
            self.producers.encode(PRODUCERS_TAG, &mut out);
        }
        out.into()
    }

    /// The state that `checkpoint` wrote; no bytes stand for an empty log.
    ///
    /// # Errors
    /// Bytes that no `checkpoint` made.
    pub(crate) fn restore(bytes: &[u8]) -> Result<Self, DecodeError> {
        let state =
            wire::PartitionState::decode(bytes).map_err(|_| DecodeError::Protobuf { what: "partition state" })?;
        Ok(Self {
            producers: Producers::decode(state.producers)?,
            results: Results::decode(state.job_scopes)?,
            queues: Queues::decode(state.queues)?,
            last_time_ms: state.last_time_ms,
            log_start: state.log_start,
        })
    }
}
