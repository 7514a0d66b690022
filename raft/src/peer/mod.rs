//! The transport between nodes: frames on TCP, two connections per pair and direction.
//!
//! ```text
//!   network.rs (openraft's view: one client per group and target)
//!        │ submit(frame, body) ──► reply, by request id
//!   outgoing.rs   control connection: votes, heartbeats, forwarded requests
//!                 bulk connection:    appends (pipelined, per session), snapshots
//!        │ TCP, after handshake.rs has proven the cluster secret both ways
//!   incoming.rs ──► the group's Raft
//! ```

pub(crate) mod framed;
mod handshake;
pub(crate) mod incoming;
pub(crate) mod outgoing;
mod secure;

use arqon_proto::wire;

pub(crate) use handshake::Secret;
pub use secure::PeerTls;

/// Why a request to a peer has no answer.
#[derive(Clone, Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// No connection, or it broke; the request may have been carried out.
    #[error("node is unreachable: {0}")]
    Unreachable(String),
    /// The peer answered that it cannot.
    #[error("peer refused: {message}")]
    Refused {
        /// Its reason, for machines.
        code: wire::peer_error::Code,
        /// Its reason, for people.
        message: String,
    },
    /// No answer in time.
    #[error("no answer in time")]
    TimedOut,
    /// The answer makes no sense.
    #[error("peer answered with {0}")]
    Protocol(&'static str),
}
