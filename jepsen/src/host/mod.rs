//! Hosts: what this machine can build them of, and how it is given back.

mod claim;
mod machine;
mod network;
mod tool;

pub use claim::{Claim, Held, clean, reap};
pub use machine::{Machine, Need};
pub use network::{Drop as PacketDrop, Network};
pub(crate) use tool::run as run_tool;
