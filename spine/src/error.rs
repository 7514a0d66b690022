//! Short ways to the wire's errors. Only the edges of the broker make them.

use arqon_proto::{NodeId, wire};

/// What a client is told to wait for a node that starts, in milliseconds.
const STARTING_RETRY_MS: u32 = 200;

/// An error with `code` and a one-line `message`.
pub(crate) fn error(code: wire::ErrorCode, message: impl Into<String>) -> wire::Error {
    wire::Error { code: code.into(), message: message.into(), ..Default::default() }
}

/// VALIDATION_ERROR about `field`.
pub(crate) fn invalid(field: &str, problem: impl Into<String>) -> wire::Error {
    wire::Error { field: field.to_owned(), ..error(wire::ErrorCode::ValidationError, problem) }
}

/// TARGET_NOT_FOUND: there is no `kind` of that `name`.
pub(crate) fn not_found(kind: &str, name: &str) -> wire::Error {
    let shown: String = name.chars().take(200).collect();
    wire::Error {
        field: shown.clone(),
        ..error(wire::ErrorCode::TargetNotFound, format!("{kind} {shown:?} does not exist"))
    }
}

/// UNKNOWN_OUTCOME: what `node` answered is no answer.
pub(crate) fn malformed(node: NodeId) -> wire::Error {
    error(wire::ErrorCode::UnknownOutcome, format!("the answer of node {node} is malformed"))
}

/// OVERLOADED: `node` cannot say yet which topics exist.
pub(crate) fn starting(node: NodeId) -> wire::Error {
    let message = format!("node {node} is starting: it does not know the cluster's topics yet");
    wire::Error { retry_after_ms: STARTING_RETRY_MS, ..error(wire::ErrorCode::Overloaded, message) }
}

/// NOT_LEADER, with the leader's client address where it is known.
pub(crate) fn not_leader(leader_address: Option<String>) -> wire::Error {
    wire::Error {
        leader_address: leader_address.unwrap_or_default(),
        ..error(wire::ErrorCode::NotLeader, "this node does not lead the partition")
    }
}
