//! What the whole cluster agrees on: nodes, topics with their placement, and lease keys.
//!
//! ```text
//!   state.rs   MetadataState: command -> outcome, pure
//!   group.rs   its Raft group on every node: submit, follow, and the leader's duties
//! ```

mod group;
mod state;

pub(crate) use group::{COMMITTED_KIND, FORWARD_KIND, MetadataGroup, Published};
pub use state::{MetadataState, Topic};
