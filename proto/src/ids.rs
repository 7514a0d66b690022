//! Identifiers and positions, one type each so that they cannot be mixed up.

use std::fmt;

macro_rules! number {
    ($(#[$doc:meta])* $name:ident, $inner:ty) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub $inner);

        impl $name {
            /// The value after this one.
            #[must_use]
            pub const fn next(self) -> Self {
                Self(self.0 + 1)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl From<$inner> for $name {
            fn from(value: $inner) -> Self {
                Self(value)
            }
        }
    };
}

number!(
    /// Position of a record in its partition; counts records of data batches only, from 0.
    Offset, u64
);
number!(
    /// Position of an entry in a Raft group's log; counts entries of every kind, from 0.
    RaftIndex, u64
);
number!(
    /// Raft term.
    Term, u64
);
number!(
    /// A broker, as named in its configuration.
    NodeId, u64
);
number!(
    /// One replica placement of one group: the Raft node id, never used twice.
    ReplicaId, u64
);
number!(
    /// A Raft group. Group 0 is the metadata group.
    GroupId, u64
);
number!(
    /// Index of a partition in its topic, from 0.
    PartitionId, u32
);

impl GroupId {
    /// The group whose state machine is the cluster's metadata.
    pub const METADATA: Self = Self(0);
}
