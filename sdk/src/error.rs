//! What can go wrong, as one line that names the thing at fault.

use std::time::Duration;

use arqon_proto::{DecodeError, code_name, wire};
use wire::ErrorCode;

/// Why an operation failed. Every message is one line.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// A server answered with an error.
    #[error("{}: {message}", code_name(*.code))]
    Server {
        /// The wire's error code.
        code: ErrorCode,
        /// What happened, one line.
        message: String,
        /// The field or name at fault, or empty.
        field: String,
        /// The rest of the answer: retry time, leader, duplicates, log start.
        details: Box<wire::Error>,
    },
    /// No server could be reached.
    #[error("cannot reach {servers}: {reason}")]
    Unreachable {
        /// The servers tried.
        servers: String,
        /// Why each one failed.
        reason: String,
    },
    /// The connection ended while a request was under way; it may or may not have taken effect.
    #[error("lost the connection to {server}: {reason}")]
    Lost {
        /// Address of the server.
        server: String,
        /// Why.
        reason: String,
    },
    /// No success within the time allowed.
    #[error("{what} timed out: {reason}")]
    TimedOut {
        /// What was tried.
        what: String,
        /// What stood in the way last.
        reason: String,
    },
    /// The client, producer or worker was closed.
    #[error("closed")]
    Closed,
    /// The lease of this job ran out or was taken away: another worker may have the job. Also
    /// answered when an earlier settlement took effect and only its answer was lost.
    #[error("the lease of this job is lost")]
    LeaseLost,
    /// An argument or option is refused before anything is sent.
    #[error("{field} {reason}")]
    Invalid {
        /// The argument or option.
        field: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The next record of a partition is not the one that must follow: something was skipped.
    #[error("{topic}/{partition}: expected offset {expected}, the server sent {found}")]
    Gap {
        /// Topic.
        topic: String,
        /// Partition.
        partition: u32,
        /// Offset that had to come.
        expected: u64,
        /// Offset that came.
        found: u64,
    },
    /// A server sent bytes that are not what they should be.
    #[error("{server} sent bad data: {source}")]
    BadData {
        /// Where the bytes came from.
        server: String,
        /// What is wrong with them.
        source: DecodeError,
    },
}

impl Error {
    /// A stable, upper-case name: the wire's code for answers of servers (`NOT_LEADER`), else
    /// `UNREACHABLE`, `CONNECTION_LOST`, `TIMED_OUT`, `CLOSED`, `LEASE_LOST`, `INVALID`,
    /// `OFFSET_GAP` or `BAD_DATA`.
    #[must_use]
    pub fn code_name(&self) -> &'static str {
        match self {
            Self::Server { code, .. } => code_name(*code),
            Self::Unreachable { .. } => "UNREACHABLE",
            Self::Lost { .. } => "CONNECTION_LOST",
            Self::TimedOut { .. } => "TIMED_OUT",
            Self::Closed => "CLOSED",
            Self::LeaseLost => "LEASE_LOST",
            Self::Invalid { .. } => "INVALID",
            Self::Gap { .. } => "OFFSET_GAP",
            Self::BadData { .. } => "BAD_DATA",
        }
    }

    /// The wire's code, when a server gave one.
    #[must_use]
    pub fn code(&self) -> Option<ErrorCode> {
        match self {
            Self::Server { code, .. } => Some(*code),
            Self::LeaseLost => Some(ErrorCode::LeaseLost),
            _ => None,
        }
    }

    /// Whether the same request may succeed later without anybody changing anything.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Server { code, .. } => matches!(
                code,
                ErrorCode::NotLeader | ErrorCode::Overloaded | ErrorCode::RateLimitExceeded | ErrorCode::UnknownOutcome
            ),
            Self::Unreachable { .. } | Self::Lost { .. } | Self::TimedOut { .. } => true,
            _ => false,
        }
    }

    /// How long the server asked to wait before the next try.
    #[must_use]
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Server { details, .. } if details.retry_after_ms > 0 => {
                Some(Duration::from_millis(u64::from(details.retry_after_ms)))
            }
            _ => None,
        }
    }

    pub(crate) fn invalid(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Invalid { field: field.into(), reason: reason.into() }
    }

    /// A server error made on this side, where the wire's code says it best.
    pub(crate) fn server(code: ErrorCode, message: impl Into<String>) -> Self {
        wire::Error { code: code.into(), message: message.into(), ..Default::default() }.into()
    }

    /// An answer of a kind that the request cannot have.
    pub(crate) fn unexpected(server: &str) -> Self {
        Self::BadData { server: server.to_owned(), source: DecodeError::Protobuf { what: "answer" } }
    }
}

impl From<wire::Error> for Error {
    fn from(mut error: wire::Error) -> Self {
        let message = std::mem::take(&mut error.message).replace(['\n', '\r'], " ");
        Self::Server { code: error.code(), message, field: std::mem::take(&mut error.field), details: Box::new(error) }
    }
}

/// A refused event: why, and the event itself.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{error}")]
pub struct SendError {
    /// Why it was not taken.
    pub error: Error,
    /// The event as it was given.
    pub event: Box<crate::NewEvent>,
}

impl From<SendError> for Error {
    fn from(refused: SendError) -> Self {
        refused.error
    }
}
