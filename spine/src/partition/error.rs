//! The errors of a partition as the wire names them.

use std::fmt::Display;

use arqon_proto::{DecodeError, wire, wire::ErrorCode};
use arqon_raft::ProposeError;
use arqon_storage::ReadError;

use super::{RETRY_AFTER_MS, Replica};
use crate::state::Refused;

pub(super) fn error(code: ErrorCode, message: impl Display) -> wire::Error {
    wire::Error { code: code.into(), message: message.to_string(), ..Default::default() }
}

/// VALIDATION_ERROR on `field`.
pub(super) fn invalid(field: &str, message: impl Display) -> wire::Error {
    wire::Error { field: field.to_owned(), ..error(ErrorCode::ValidationError, message) }
}

pub(super) fn bad_batch(cause: &DecodeError) -> wire::Error {
    invalid("batch", cause)
}

pub(super) fn overloaded(what: impl Display) -> wire::Error {
    wire::Error { retry_after_ms: RETRY_AFTER_MS, ..error(ErrorCode::Overloaded, what) }
}

pub(super) fn unknown_outcome(why: impl Display) -> wire::Error {
    error(ErrorCode::UnknownOutcome, format_args!("may or may not be written: {why}"))
}

impl Replica {
    /// `topic/partition`, as error messages name it.
    pub(super) fn name(&self) -> String {
        format!("{}/{}", self.topic.name, self.partition)
    }

    pub(super) fn not_leader(&self) -> wire::Error {
        let status = self.status.borrow();
        let address = status.leader.and_then(|node| self.services.node_client_address(node));
        let message = match (&status.stopped, status.is_leader, &address) {
            (Some(reason), ..) => format!("the replica of {} on this node has stopped: {reason}", self.name()),
            (None, true, _) => format!("the leader of {} is not ready yet", self.name()),
            (None, false, Some(address)) => format!("the leader of {} is at {address}", self.name()),
            (None, false, None) => format!("{} has no known leader", self.name()),
        };
        // Nobody else to go to: the client asks again.
        let retry_after_ms = if address.is_none() || status.is_leader { RETRY_AFTER_MS } else { 0 };
        wire::Error {
            leader_address: address.unwrap_or_default(),
            retry_after_ms,
            ..error(ErrorCode::NotLeader, message)
        }
    }

    /// The answer to a proposal that `cause` kept from its outcome. `is_submitted`: it may be
    /// in the log of somebody.
    pub(super) fn propose_error(&self, cause: &ProposeError, is_submitted: bool) -> wire::Error {
        match cause {
            ProposeError::NotLeader { .. } => self.not_leader(),
            ProposeError::Overloaded => {
                overloaded(format_args!("{} has too many bytes waiting to be committed", self.name()))
            }
            ProposeError::UnknownOutcome(why) => unknown_outcome(why),
            ProposeError::Stopped(why) if is_submitted => unknown_outcome(why),
            ProposeError::Stopped(_) => self.not_leader(),
        }
    }

    pub(super) fn read_error(&self, cause: ReadError) -> wire::Error {
        match cause {
            ReadError::OutOfRange { log_start } => wire::Error {
                log_start: log_start.0,
                ..error(
                    ErrorCode::OffsetOutOfRange,
                    format_args!("{} starts at offset {log_start}, what came before has been trimmed", self.name()),
                )
            },
            ReadError::Damaged { first, last, .. } => wire::Error {
                field: self.name(),
                ..error(
                    ErrorCode::Damaged,
                    format_args!(
                        "offsets {first} to {last} of {} do not match their checksum on this node",
                        self.name()
                    ),
                )
            },
            other => error(ErrorCode::InternalError, format_args!("reading {} failed: {other}", self.name())),
        }
    }

    /// The answer to a refused batch; `Refused::InFlight` has to be waited for instead.
    pub(super) fn refused(&self, cause: Refused) -> wire::Error {
        match cause {
            Refused::Duplicate(duplicates) => wire::Error {
                message: format!("{} of the batch's records are in {} already", duplicates.len(), self.name()),
                code: ErrorCode::Duplicate.into(),
                duplicates,
                ..Default::default()
            },
            Refused::InFlight => overloaded("the same records are being written"),
            Refused::UnknownProducer => error(
                ErrorCode::UnknownProducer,
                format_args!("the producer is not known to {} (any more) and its sequence is above 0", self.name()),
            ),
            Refused::Fenced { epoch } => error(
                ErrorCode::ProducerFenced,
                format_args!("the producer has written to {} with the newer epoch {epoch}", self.name()),
            ),
            Refused::OutOfOrder { expected } => {
                error(ErrorCode::OutOfOrder, format_args!("the next sequence for {} is {expected}", self.name()))
            }
            Refused::SequenceOverflow => invalid("base_sequence", "the batch's sequences run over the largest number"),
            Refused::TooManyScopes => overloaded(format_args!("{} takes results of no more queue groups", self.name())),
        }
    }
}
