//! A fault that is under way.

use tokio::time::Instant;

use super::{Fault, upgrade::Upgrade};

/// What ends it.
#[derive(Clone, Debug)]
pub enum Undo {
    /// Start the nodes.
    Start,
    /// SIGCONT.
    Continue,
    /// Let all packets through.
    Packets,
    /// Let them through at full speed.
    Speed,
    /// Make a sound disk of it, and start the node anew where its log closed itself.
    Disk,
    /// Its next step.
    Upgrade(Upgrade),
    /// Nothing; it is over.
    Nothing,
}

/// A fault that is under way.
#[derive(Clone, Debug)]
pub struct Active {
    pub fault: Fault,
    /// The node of the history's lines; 0 for no single one.
    pub label: u64,
    /// Nodes that must be left alone meanwhile.
    pub nodes: Vec<u64>,
    pub until: Instant,
    pub undo: Undo,
}
