//! Workers that wait for jobs, in one line per group.

use std::collections::BTreeMap;

use tokio::time::Instant;

use super::requests::Waiting;
use crate::partition::deadlines::Deadlines;

/// The workers of one group by ticket, first come first.
pub(in crate::partition) type Line = BTreeMap<u64, Waiting>;

/// All lines of a partition.
#[derive(Default)]
pub(super) struct Lines {
    pub(super) by_group: BTreeMap<String, Line>,
    pub(super) polls: Deadlines<u64>,
    pub(super) group_of: BTreeMap<u64, String>,
    next_ticket: u64,
}

impl Lines {
    /// Workers in all lines.
    pub(super) fn count(&self) -> usize {
        self.group_of.len()
    }

    /// When the first wait is over.
    pub(super) fn first_deadline(&self) -> Option<Instant> {
        self.polls.first()
    }

    pub(super) fn join(&mut self, group: String, waiting: Waiting) {
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        self.polls.set(ticket, waiting.deadline);
        self.group_of.insert(ticket, group.clone());
        self.by_group.entry(group).or_default().insert(ticket, waiting);
    }

    /// Takes out those whose wait is over at `now`.
    pub(super) fn leave_due(&mut self, now: Instant) -> Vec<Waiting> {
        let due: Vec<_> = self.polls.due(now).collect();
        due.into_iter().filter_map(|ticket| self.leave(ticket)).collect()
    }

    fn leave(&mut self, ticket: u64) -> Option<Waiting> {
        self.polls.remove(ticket);
        let group = self.group_of.remove(&ticket)?;
        let line = self.by_group.get_mut(&group)?;
        let waiting = line.remove(&ticket);
        if line.is_empty() {
            self.by_group.remove(&group);
        }
        waiting
    }

    /// Empties all lines.
    pub(super) fn take_all(&mut self) -> impl Iterator<Item = Waiting> + use<> {
        std::mem::take(self).by_group.into_values().flatten().map(|(_, waiting)| waiting)
    }
}
