//! What the whole cluster agrees on: nodes, topics with their placement, and lease keys.
//!
//! ```text
//!   state.rs   MetadataState: command -> outcome, pure
//!   members.rs the commands that change nodes and where replicas are
//!   group.rs   its Raft group on every node: submit, follow, and the leader's duties
//! ```

mod group;
mod members;
mod state;

pub(crate) use group::{COMMITTED_KIND, FORWARD_KIND, MetadataGroup, MetadataReader, Place, Published};
pub use members::{metadata_replica, replica_on, wanted_replicas};
pub use state::{MetadataState, Topic};
