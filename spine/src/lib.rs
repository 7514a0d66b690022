//! The broker: topics, partitions and queues over Raft groups, and the ports of a node.
//!
//! ```text
//!   clients     control plane     monitoring            other nodes
//!      |              |               |                      |
//!   session.rs    control.rs       admin.rs             arqon_raft::Host
//!      \______________|_______________/                      |
//!                 broker.rs  -- metadata/  (topics, placement, lease keys: one Raft group)
//!                     |      -- operators.rs (who is alive)
//!                 replicas.rs
//!                     |
//!                 partition/  (produce, fetch, queues: one Raft group each)
//!                     |
//!                  state/     (pure: de-duplication and queues)
//! ```
//!
//! [`Tls`] puts certificates under the first two and the last. A node is started from a [`Config`] with [`Node::start`]. Nothing here knows openraft or
//! files: that is `arqon_raft` and `arqon_storage`.

mod admin;
mod broker;
mod clock;
mod config;
mod control;
mod error;
mod groups;
mod health;
mod join;
mod members;
mod metadata;
mod metrics;
mod node;
mod operators;
mod partition;
mod recover;
mod replicas;
mod session;
mod slow;
mod state;
mod tls;
mod topics;

pub use clock::Clock;
pub use config::{
    Auth, AuthKey, Backend, CLUSTER_SECRET_SIZE_MIN, Config, ConfigError, Listen, ListenAddresses, Log, Peer, Secret,
    Storage,
};
pub use node::{Listeners, Node, StartError};
pub use recover::{Kept, LostPartition, RecoverError, UnsafeRecovery};
pub use tls::Tls;
