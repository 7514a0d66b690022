//! Who keeps retention from passing an offset.

use arqon_proto::{Offset, wire};

use super::Replica;

/// Someone who still needs records of this partition, whatever their age and size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Holder {
    pub kind: Kind,
    /// Of the kind.
    pub name: String,
    /// Everything before it is not needed.
    pub floor: Offset,
}

/// What holds. Circuit edges and replays have their places here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// A queue group, which needs every job from its first unsettled one on.
    Queue,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Queue => "queue",
        }
    }
}

impl std::fmt::Display for Holder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.kind {
            Kind::Queue => {
                write!(f, "queue group {:?}, which has settled its jobs to offset {}", self.name, self.floor)
            }
        }
    }
}

impl Holder {
    /// How an operator who does not need the holder any more gets rid of it.
    pub(super) fn remedy(&self, topic: &str) -> String {
        match self.kind {
            Kind::Queue => format!("`arqon group delete {topic} {}` gives the group up", self.name),
        }
    }
}

impl Replica {
    /// All that hold something here, by name.
    pub(super) fn holders(&self) -> Vec<Holder> {
        let shared = self.machine.lock();
        let queue = |(group, queue): (&str, &crate::state::Queue)| Holder {
            kind: Kind::Queue,
            name: group.to_owned(),
            floor: Offset(queue.floor()),
        };
        shared.state.queues().map(queue).collect()
    }

    /// The one with the lowest floor.
    pub(super) fn first_holder(&self) -> Option<Holder> {
        self.holders().into_iter().min_by_key(|holder| holder.floor)
    }

    /// Retention must not pass this offset.
    pub(super) fn retention_floor(&self) -> Offset {
        self.first_holder().map_or(Offset(u64::MAX), |holder| holder.floor)
    }

    pub(super) fn holder_statuses(&self, committed: u64) -> Vec<wire::RetentionHolder> {
        let log = self.group.log();
        let status = |holder: Holder| wire::RetentionHolder {
            kind: holder.kind.name().to_owned(),
            floor: holder.floor.0,
            records: committed.saturating_sub(holder.floor.0),
            size: if holder.floor.0 < committed { log.size_from(holder.floor) } else { 0 },
            name: holder.name,
        };
        self.holders().into_iter().map(status).collect()
    }
}
