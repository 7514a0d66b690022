//! What falls due in a queue. Times are this leader's own: a new leader gives each outstanding
//! lease and delay its full length again.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use tokio::time::Instant;

use super::Lead;
use crate::partition::deadlines::{Deadlines, RangeDeadlines};

/// One group's times, by the monotonic clock of this leader.
#[derive(Debug, Default)]
pub(super) struct Clock {
    pub(super) leases: RangeDeadlines,
    pub(super) delays: Deadlines<u64>,
    /// Pending jobs that may be handed out now.
    pub(super) ready: BTreeSet<u64>,
    /// Pending jobs without attempts left, with the attempts made.
    pub(super) dead: BTreeMap<u64, u32>,
}

impl Clock {
    /// A job waits for its next attempt, or has had its last.
    pub(super) fn wait(&mut self, offset: u64, attempt: u32, delay_ms: u32, attempts_max: u32, now: Instant) {
        if attempt >= attempts_max {
            self.dead.insert(offset, attempt);
        } else {
            self.delays.set(offset, now + millis(delay_ms));
        }
    }
}

impl Lead<'_> {
    /// Gives each outstanding lease and delay its full length from now.
    pub(super) fn start_clocks(&mut self, now: Instant) {
        let replica = self.replica.clone();
        let shared = replica.machine.lock();
        for (group, queue) in shared.state.queues() {
            let clock = self.clocks.entry(group.to_owned()).or_default();
            for (first, end, lease) in queue.leases().iter() {
                clock.leases.set(first, end, now + millis(lease.holder.lease_ms));
            }
            for (offset, pending) in queue.pending() {
                clock.wait(*offset, pending.attempt, pending.delay_ms, replica.attempts_max(), now);
            }
        }
        drop(shared);
        self.count_leased();
    }

    pub(super) fn end_delays(&mut self, now: Instant) {
        for clock in self.clocks.values_mut() {
            while let Some(offset) = clock.delays.pop_due(now) {
                clock.ready.insert(offset);
            }
        }
    }

    pub(super) fn end_leases_of(&mut self, operator_id: &str) {
        let now = Instant::now();
        let shared = self.replica.machine.lock();
        for (group, queue) in shared.state.queues() {
            let Some(clock) = self.clocks.get_mut(group) else { continue };
            let own = queue.leases().iter().filter(|(.., lease)| lease.holder.operator_id == operator_id);
            own.for_each(|(first, end, _)| clock.leases.set(first, end, now));
        }
    }
}

pub(super) fn millis(ms: u32) -> Duration {
    Duration::from_millis(u64::from(ms))
}
