//! Where an entry stands in a Raft log.

use std::fmt;

use arqon_proto::{RaftIndex, Term};

/// Term and index of one entry. Ordered by term, then index.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LogPosition {
    /// Term in which the entry was proposed.
    pub term: Term,
    /// Its index.
    pub index: RaftIndex,
}

impl LogPosition {
    /// The position of (`term`, `index`).
    #[must_use]
    pub const fn new(term: u64, index: u64) -> Self {
        Self { term: Term(term), index: RaftIndex(index) }
    }
}

impl fmt::Display for LogPosition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.term, self.index)
    }
}

/// Index of the entry after `position`; 0 when there is none.
pub(crate) fn index_after(position: Option<LogPosition>) -> u64 {
    position.map_or(0, |position| position.index.0 + 1)
}
