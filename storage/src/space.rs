//! How much the disk still takes, so that writes stop before it is full.
//!
//! ```text
//!   0          hard reserve         soft reserve                    total
//!   ├───────────────┼────────────────────┼───────────────────────────┤ free
//!        Full       │        Low         │          Enough
//!   no data from    │ no new data, no    │
//!   a leader        │ zeroes ahead       │
//! ```
//!
//! The system is asked every 200 ms while something is written, and when a segment is created. In
//! between, what the store has written since, and what waits in its queues, counts as gone: so the
//! state is never behind the store's own writes, and only what other programs write shows late.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::disk::{Disk, DiskSpace};
use crate::metrics::Metrics;
use crate::options::Options;

/// The system is asked this often while something is written or the disk is nearly full.
pub(crate) const BUSY_INTERVAL: Duration = Duration::from_millis(200);
/// And this often otherwise, because of what other programs write.
pub(crate) const IDLE_INTERVAL: Duration = Duration::from_secs(1);

/// The hard reserve is this part of the soft one.
const HARD_PART: u64 = 4;
/// Files are kept for later while this many soft reserves are free.
const POOL_PART: u64 = 2;
/// The last part of the hard reserve takes nothing from a leader at all: a replica's own votes,
/// marks and manifests need it.
const BOTTOM_PART: u64 = 2;

/// What the disk of a store still takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SpaceState {
    /// Everything.
    Enough,
    /// What was accepted already. New data is to be refused, reads and trims go on.
    Low,
    /// Only what a log needs to go on and to be trimmed: followers refuse data too.
    Full,
}

/// The space of a store's disk; sizes in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Space {
    /// What may still be written, without what waits in the queues of the store.
    pub free_size: u64,
    /// The whole disk.
    pub total_size: u64,
    /// Below this much free, new data is to be refused.
    pub reserve_size: u64,
    /// What follows from these.
    pub state: SpaceState,
}

impl Space {
    fn of(disk: DiskSpace, gone_size: u64, options: &Options) -> Self {
        let share = disk.total_size / 100 * options.reserve_percent_max.min(100);
        let (free_size, reserve_size) = (disk.free_size.saturating_sub(gone_size), options.reserve_size_max.min(share));
        let state = match free_size {
            free if free >= reserve_size => SpaceState::Enough,
            free if free >= reserve_size / HARD_PART => SpaceState::Low,
            _ => SpaceState::Full,
        };
        Self { free_size, total_size: disk.total_size, reserve_size, state }
    }

    /// Whether files may be kept for later, whose space somebody else may need.
    pub(crate) fn takes_spares(&self) -> bool {
        self.free_size >= self.reserve_size.saturating_mul(POOL_PART)
    }

    /// Whether a follower should take entries of a leader: all of them unless the disk is full, and
    /// then only those without data, which are small and may be what frees space.
    #[must_use]
    pub fn takes_entries(&self, have_data: bool) -> bool {
        let bottom = self.reserve_size / HARD_PART / BOTTOM_PART;
        self.state != SpaceState::Full || !have_data && self.free_size >= bottom
    }
}

/// What the system said last, and how much the store had written then.
pub(crate) struct SpaceWatch {
    metrics: Arc<Metrics>,
    free_size: AtomicU64,
    total_size: AtomicU64,
    used_before: AtomicU64,
}

impl SpaceWatch {
    pub fn new(metrics: Arc<Metrics>) -> Self {
        let unlimited = || AtomicU64::new(u64::MAX);
        Self { metrics, free_size: unlimited(), total_size: unlimited(), used_before: AtomicU64::new(0) }
    }

    /// Bytes that the store has taken from the disk, or will.
    fn used_size(&self) -> u64 {
        let Metrics { written_size, queue_size, filled_size, .. } = self.metrics.as_ref();
        [written_size, queue_size, filled_size].into_iter().map(|size| size.load(Ordering::Relaxed)).sum()
    }

    /// Whether something was written since the system was asked.
    pub fn is_stale(&self) -> bool {
        self.used_size() != self.used_before.load(Ordering::Relaxed)
    }

    /// Asks the system. Without an answer, the last one stands.
    pub fn refresh(&self, disk: &dyn Disk) {
        // What waits now is not in the answer; what is written before the answer counts twice.
        let Metrics { written_size, filled_size, .. } = self.metrics.as_ref();
        let used = written_size.load(Ordering::Relaxed) + filled_size.load(Ordering::Relaxed);
        match disk.space() {
            Ok(space) => {
                self.free_size.store(space.free_size, Ordering::Relaxed);
                self.total_size.store(space.total_size, Ordering::Relaxed);
                self.used_before.store(used, Ordering::Relaxed);
            }
            Err(error) => tracing::debug!("{} does not say what is free: {error}", disk.name()),
        }
    }

    pub fn now(&self, options: &Options) -> Space {
        let gone_size = self.used_size().saturating_sub(self.used_before.load(Ordering::Relaxed));
        let free_size = self.free_size.load(Ordering::Relaxed);
        let total_size = self.total_size.load(Ordering::Relaxed);
        Space::of(DiskSpace { free_size, total_size }, gone_size, options)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space(free_size: u64, total_size: u64, gone_size: u64) -> Space {
        Space::of(DiskSpace { free_size, total_size }, gone_size, &Options::default())
    }

    #[test]
    fn the_reserve_is_a_share_of_a_small_disk_and_bounded_on_a_large_one() {
        assert_eq!(space(1 << 40, 1 << 40, 0).reserve_size, 512 << 20);
        assert_eq!(space(0, 2_000_000, 0).reserve_size, 100_000);
        assert_eq!(space(u64::MAX, u64::MAX, 5).state, SpaceState::Enough);
    }

    #[test]
    fn what_waits_to_be_written_counts_as_gone() {
        let states =
            [(0, SpaceState::Enough), (1, SpaceState::Low), (75_000, SpaceState::Low), (75_001, SpaceState::Full)];
        for (gone_size, state) in states {
            assert_eq!(space(100_000, 2_000_000, gone_size).state, state, "{gone_size}");
        }
    }

    #[test]
    fn a_full_disk_takes_small_entries_to_the_last_part_of_the_reserve() {
        let takes = |free_size| {
            let space = space(free_size, 2_000_000, 0);
            (space.takes_entries(true), space.takes_entries(false))
        };
        assert_eq!(takes(25_000), (true, true));
        assert_eq!(takes(24_999), (false, true));
        assert_eq!(takes(12_499), (false, false));
    }
}
