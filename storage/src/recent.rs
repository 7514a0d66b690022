//! Recent entries in memory: those of one log, and what all logs of a store keep together.
//!
//! While the bound of the store is kept, a log keeps up to its own. Beyond it every log is cut to
//! the same share: as much as lets all of them fit. A log that holds less than that keeps it all, so
//! that many idle logs cost the busy ones little. Entries not flushed yet are never dropped.

use std::collections::VecDeque;
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use arqon_proto::Batch;

use crate::metrics::{self, Metrics};
use crate::segment::Segment;

/// What a log may keep in any case, in bytes, unless its own bound is lower.
const SHARE_MIN: usize = 64 << 10;
/// Shares are found anew when this part of the bound was appended since the last time.
const TRIM_PART: u64 = 8;
/// Places for entries that are kept however few there are.
const PLACE_COUNT_MIN: usize = 64;

/// One entry kept in memory, and where it stands on disk.
pub(crate) struct Recent {
    pub batch: Batch,
    pub segment: Arc<Segment>,
    pub at: u64,
}

impl Recent {
    /// About what it takes in memory: places grow by doubling, and the bytes of a small entry
    /// are an allocation of their own.
    fn size(&self) -> usize {
        self.batch.header.batch_size() + 2 * size_of::<Self>()
    }
}

/// What the logs of a store keep together. The sum is `recent_size` of the metrics.
#[derive(Default)]
pub(crate) struct RecentTotal {
    metrics: Arc<Metrics>,
    log_size_max: usize,
    size_max: usize,
    /// What one log may keep while the sum is over its bound.
    share: AtomicUsize,
    /// Bytes kept since the store was opened, dropped or not.
    kept_size: AtomicU64,
    /// When `kept_size` is here, shares may be found anew.
    trim_at: AtomicU64,
}

impl RecentTotal {
    pub fn new(metrics: Arc<Metrics>, log_size_max: usize, size_max: usize) -> Self {
        Self { metrics, log_size_max, size_max, share: AtomicUsize::new(usize::MAX), ..Self::default() }
    }

    fn over(&self) -> bool {
        self.metrics.recent_size.load(Ordering::Relaxed) > self.size_max as u64
    }

    /// What one log may keep now.
    fn limit(&self) -> usize {
        if self.over() { self.log_size_max.min(self.share.load(Ordering::Relaxed)) } else { self.log_size_max }
    }

    /// Whether the caller should cut all logs to a new share. Says so to one thread at a time.
    pub fn begin_trim(&self) -> bool {
        let (kept, at) = (self.kept_size.load(Ordering::Relaxed), self.trim_at.load(Ordering::Relaxed));
        let next = kept + self.size_max as u64 / TRIM_PART;
        self.over()
            && kept >= at
            && self.trim_at.compare_exchange(at, next, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }

    /// Finds the share for logs that keep `sizes`.
    pub fn share_among(&self, sizes: Vec<usize>) {
        self.share.store(share_of(sizes, self.size_max).max(SHARE_MIN), Ordering::Relaxed);
    }
}

/// The largest share with which `sizes`, each cut to it, are no more than `total`.
fn share_of(mut sizes: Vec<usize>, total: usize) -> usize {
    sizes.sort_unstable();
    let (mut left, mut count) = (total, sizes.len());
    for size in sizes {
        let share = left / count;
        if size > share {
            return share;
        }
        left -= size;
        count -= 1;
    }
    usize::MAX
}

/// The recent entries of one log, oldest first.
#[derive(Default)]
pub(crate) struct RecentEntries {
    entries: VecDeque<Recent>,
    size: usize,
    total: Arc<RecentTotal>,
}

impl RecentEntries {
    pub fn new(total: Arc<RecentTotal>) -> Self {
        Self { entries: VecDeque::new(), size: 0, total }
    }

    /// About what they take in memory, in bytes.
    pub fn size(&self) -> usize {
        self.size
    }

    pub fn push(&mut self, recent: Recent) {
        let size = recent.size();
        self.size += size;
        metrics::add(&self.total.metrics.recent_size, size);
        metrics::add(&self.total.kept_size, size);
        self.entries.push_back(recent);
    }

    fn dropped(&mut self, recent: Option<Recent>) {
        let size = recent.as_ref().map_or(0, Recent::size);
        self.size -= size;
        metrics::subtract(&self.total.metrics.recent_size, size);
    }

    /// Drops the oldest entries beyond the limit, but none from index `flushed_end` on.
    pub fn evict(&mut self, flushed_end: u64) {
        while let Some(oldest) = self.entries.front()
            && oldest.batch.header.index.0 < flushed_end
            && self.size > self.total.limit()
        {
            let oldest = self.entries.pop_front();
            self.dropped(oldest);
        }
        if self.entries.capacity() / 4 > self.entries.len().max(PLACE_COUNT_MIN) {
            self.entries.shrink_to(2 * self.entries.len());
        }
    }

    /// Drops the entries below index `start`.
    pub fn keep_from(&mut self, start: u64) {
        while self.entries.front().is_some_and(|oldest| oldest.batch.header.index.0 < start) {
            let oldest = self.entries.pop_front();
            self.dropped(oldest);
        }
    }

    /// Drops the entries from index `end` on.
    pub fn keep_below(&mut self, end: u64) {
        while self.entries.back().is_some_and(|newest| newest.batch.header.index.0 >= end) {
            let newest = self.entries.pop_back();
            self.dropped(newest);
        }
    }

    pub fn clear(&mut self) {
        self.entries.clear();
        metrics::subtract(&self.total.metrics.recent_size, std::mem::take(&mut self.size));
    }
}

impl Deref for RecentEntries {
    type Target = VecDeque<Recent>;

    fn deref(&self) -> &Self::Target {
        &self.entries
    }
}

impl Drop for RecentEntries {
    fn drop(&mut self) {
        self.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_the_largest_that_fits() {
        assert_eq!(share_of(vec![], 100), usize::MAX);
        assert_eq!(share_of(vec![50, 50], 100), usize::MAX);
        assert_eq!(share_of(vec![90, 30], 100), 70);
        assert_eq!(share_of(vec![1, 60, 2, 300, 60], 100), 32);
        assert_eq!(share_of(vec![40; 10], 100), 10);
    }
}
