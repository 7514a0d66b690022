//! Many Raft groups on one node, each with its segment log as the Raft log.
//!
//! ```text
//!     Spine ── propose ──► Group ──► openraft ──► store.rs ──► arqon_storage::Log
//!       ▲                              │  ▲
//!       │ StateMachine::apply          │  └── incoming.rs ◄── peers
//!       └── machine.rs ◄───────────────┤
//!                                      ├── network.rs ──► outgoing.rs ──► peers
//!                                      ├── pulse.rs: heartbeats and election timers of all groups
//!                                      └── repair.rs: damaged entries come back from peers
//! ```
//!
//! openraft appears nowhere outside this crate. Its version is pinned, and the settings that
//! safety rests on are asserted in `config.rs`.

mod aside;
mod config;
mod group;
mod hold;
mod host;
mod machine;
mod members;
mod network;
mod offline;
mod peer;
mod pulse;
mod repair;
mod rpc;
mod store;
mod types;

#[cfg(test)]
mod suite;

pub use group::{Group, Proposal, ProposeError, Status};
pub use host::{ForwardError, ForwardHandler, GroupSpec, Host, HostOptions, OpenError};
pub use machine::{Readable, StateMachine};
pub use members::{MembersStep, WantedMembers};
pub use offline::OfflineReplica;
pub use peer::PeerTls;
pub use repair::DamageSummary;
pub use types::Applied;
