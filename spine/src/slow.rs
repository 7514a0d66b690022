//! A node whose disk is slow gives leadership away: followers with a good disk commit without it.
//!
//! Every second counts as slow when the 99th percentile of its flushes took over 500 ms, or when
//! entries wait and none was flushed. Ten such seconds in a row make the node slow; it is well again after
//! thirty seconds in a row that were not. A second without anything to flush shows nothing of the disk: it ends no
//! row of slow ones, so that few but slow writes are noticed too.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use arqon_storage::Metrics;
use tokio::time::sleep;

use crate::broker::Broker;

const SLOW_MIN: Duration = Duration::from_millis(500);
const SLOW_SECOND_COUNT: u32 = 10;
const WELL_SECOND_COUNT: u32 = 30;
const INTERVAL: Duration = Duration::from_secs(1);

/// Flushes so far, and what waits now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Flushes {
    count: u64,
    slow_count: u64,
    is_waiting: bool,
}

impl Flushes {
    fn of(metrics: &Metrics) -> Self {
        let buckets = metrics.flush_latency.buckets();
        let slow = buckets.iter().filter(|(limit_us, _)| u128::from(*limit_us) > SLOW_MIN.as_micros());
        Self {
            count: buckets.iter().map(|(_, count)| count).sum(),
            slow_count: slow.map(|(_, count)| count).sum(),
            is_waiting: metrics.queue_depth.load(Ordering::Relaxed) > 0,
        }
    }
}

/// Judges one second after the other.
#[derive(Debug, Default)]
struct Judge {
    before: Flushes,
    slow_seconds: u32,
    well_seconds: u32,
    is_slow: bool,
}

impl Judge {
    /// Whether the disk counts as slow after a second that ended with `now`.
    fn next(&mut self, now: Flushes) -> bool {
        let count = now.count.saturating_sub(self.before.count);
        let slow_count = now.slow_count.saturating_sub(self.before.slow_count);
        // What waits now waited before, too: otherwise it may have come just now.
        let is_stuck = count == 0 && now.is_waiting && self.before.is_waiting;
        self.before = now;
        if is_stuck || slow_count * 100 > count {
            (self.slow_seconds, self.well_seconds) = (self.slow_seconds + 1, 0);
        } else {
            self.well_seconds += 1;
            if count > 0 || self.well_seconds >= WELL_SECOND_COUNT {
                self.slow_seconds = 0;
            }
        }
        if self.slow_seconds >= SLOW_SECOND_COUNT {
            self.is_slow = true;
        } else if self.well_seconds >= WELL_SECOND_COUNT {
            self.is_slow = false;
        }
        self.is_slow
    }
}

impl Broker {
    /// Watches the disk and gives leadership away while it is slow, until stopped.
    pub(crate) async fn run_slow_watch(self: Arc<Self>) {
        let mut stopping = self.stopping.subscribe();
        let metrics = self.store.metrics();
        let mut judge = Judge { before: Flushes::of(&metrics), ..Judge::default() };
        loop {
            tokio::select! {
                () = sleep(INTERVAL) => {}
                _ = stopping.wait_for(|stopping| *stopping) => return,
            }
            let is_slow = judge.next(Flushes::of(&metrics));
            if self.slow.swap(is_slow, Ordering::Relaxed) != is_slow {
                tracing::warn!(is_slow, "the disk of this node takes over 500 ms for a flush: others lead meanwhile");
            }
            if is_slow {
                self.hand_over().await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(judge: &mut Judge, total: u32, count: u64, slow_count: u64, is_waiting: bool) -> bool {
        let mut is_slow = judge.is_slow;
        for _ in 0..total {
            let Flushes { count: before, slow_count: slow_before, .. } = judge.before;
            let now = Flushes { count: before + count, slow_count: slow_before + slow_count, is_waiting };
            is_slow = judge.next(now);
        }
        is_slow
    }

    #[test]
    fn ten_slow_seconds_make_a_node_slow_and_thirty_good_ones_well() {
        let mut judge = Judge::default();
        assert!(!seconds(&mut judge, 9, 20, 1, true));
        assert!(!seconds(&mut judge, 1, 200, 2, true), "one in a hundred is the percentile itself");
        assert!(!seconds(&mut judge, 9, 20, 1, true), "they count in a row only");
        assert!(seconds(&mut judge, 1, 20, 1, true));
        assert!(seconds(&mut judge, 29, 20, 0, true));
        assert!(!seconds(&mut judge, 1, 20, 0, true));
    }

    #[test]
    fn a_disk_that_flushes_nothing_while_entries_wait_is_slow_and_an_idle_one_is_not() {
        let mut judge = Judge::default();
        assert!(!seconds(&mut judge, 100, 0, 0, false));
        assert!(!seconds(&mut judge, 10, 0, 0, true), "what waits may have come just now");
        assert!(seconds(&mut judge, 1, 0, 0, true));
    }

    #[test]
    fn few_but_slow_flushes_make_a_node_slow_and_rest_makes_it_well() {
        let mut judge = Judge::default();
        for write in 1..=SLOW_SECOND_COUNT {
            assert_eq!(seconds(&mut judge, 1, 1, 1, false), write == SLOW_SECOND_COUNT, "write {write}");
            assert_eq!(seconds(&mut judge, 2, 0, 0, false), write == SLOW_SECOND_COUNT);
        }
        assert!(seconds(&mut judge, WELL_SECOND_COUNT - 3, 0, 0, false));
        assert!(!seconds(&mut judge, 1, 0, 0, false));
        assert!(!seconds(&mut judge, SLOW_SECOND_COUNT - 1, 1, 1, false), "what was slow before the rest is forgotten");
    }
}
