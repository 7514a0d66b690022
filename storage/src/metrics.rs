//! Counters of one store, read by whoever exports them.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

const STEPS: usize = 4;
const BUCKET_COUNT: usize = 26 * STEPS;

/// Latencies in buckets that grow by a quarter of a power of two, from 1 us to about a minute.
#[derive(Debug)]
pub struct Histogram {
    buckets: [AtomicU64; BUCKET_COUNT],
    sum_us: AtomicU64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { buckets: std::array::from_fn(|_| AtomicU64::new(0)), sum_us: AtomicU64::new(0) }
    }
}

/// Bucket of a duration: values below 4 us have their own, then four per power of two.
fn bucket_of(us: u64) -> usize {
    if us < STEPS as u64 {
        return us as usize;
    }
    let power = us.ilog2() as usize;
    let step = (us >> (power - 2)) as usize & (STEPS - 1);
    ((power - 1) * STEPS + step).min(BUCKET_COUNT - 1)
}

/// First value above the bucket, in microseconds.
fn bucket_limit_us(bucket: usize) -> u64 {
    if bucket < STEPS {
        return bucket as u64 + 1;
    }
    let power = bucket / STEPS + 1;
    ((STEPS + bucket % STEPS + 1) as u64) << (power - 2)
}

impl Histogram {
    /// Counts one duration.
    pub fn record(&self, duration: Duration) {
        let us = u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
        self.buckets[bucket_of(us)].fetch_add(1, Ordering::Relaxed);
        self.sum_us.fetch_add(us, Ordering::Relaxed);
    }

    /// Number of durations counted.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.buckets.iter().map(|bucket| bucket.load(Ordering::Relaxed)).sum()
    }

    /// Sum of all durations in microseconds.
    #[must_use]
    pub fn sum_us(&self) -> u64 {
        self.sum_us.load(Ordering::Relaxed)
    }

    /// (upper limit in microseconds, count) of every bucket that is not empty, ascending.
    #[must_use]
    pub fn buckets(&self) -> Vec<(u64, u64)> {
        let counts = self.buckets.iter().map(|bucket| bucket.load(Ordering::Relaxed));
        counts.enumerate().filter(|(_, count)| *count > 0).map(|(at, count)| (bucket_limit_us(at), count)).collect()
    }

    /// Upper limit in microseconds of the bucket that holds the quantile (0 to 1); 0 when empty.
    #[must_use]
    pub fn quantile_us(&self, quantile: f64) -> u64 {
        let rank = (self.count() as f64 * quantile.clamp(0.0, 1.0)).ceil().max(1.0) as u64;
        let mut seen = 0;
        for (limit, count) in self.buckets() {
            seen += count;
            if seen >= rank {
                return limit;
            }
        }
        0
    }
}

/// Counters and gauges of one store; all logs of it together.
#[derive(Debug, Default)]
pub struct Metrics {
    /// Entries appended.
    pub appended_count: AtomicU64,
    /// Bytes of entries written to segments.
    pub written_size: AtomicU64,
    /// Flush groups made durable.
    pub flush_count: AtomicU64,
    /// Entries waiting for their flush.
    pub queue_depth: AtomicU64,
    /// Bytes waiting for their flush.
    pub queue_size: AtomicU64,
    /// Bytes of recent entries kept in memory.
    pub recent_size: AtomicU64,
    /// Segments created.
    pub roll_count: AtomicU64,
    /// Segments created in the file of a purged one, of those created.
    pub recycled_count: AtomicU64,
    /// Bytes of files that wait for that.
    pub pool_size: AtomicU64,
    /// Zero bytes written ahead.
    pub filled_size: AtomicU64,
    /// Votes made durable.
    pub vote_count: AtomicU64,
    /// Logs closed for writing by a failed write or sync.
    pub poisoned_count: AtomicU64,
    /// Reads that met bytes which fail their checks, or damage known of.
    pub damaged_read_count: AtomicU64,
    /// Ranges of damaged entries known of now.
    pub damage_count: AtomicU64,
    /// Ranges of damaged entries found so far: at open, by reads, by the scrubber.
    pub damage_found_count: AtomicU64,
    /// Ranges of damaged entries repaired so far.
    pub repaired_count: AtomicU64,
    /// Bytes read and checked by the scrubber so far.
    pub scrubbed_size: AtomicU64,
    /// Rounds of the scrubber over all full segments so far.
    pub scrub_round_count: AtomicU64,
    /// From the start of the write of a group to the end of its fdatasync.
    pub flush_latency: Histogram,
    /// From the first append of a group to the end of its fdatasync.
    pub append_latency: Histogram,
}

pub(crate) fn add(counter: &AtomicU64, count: usize) {
    counter.fetch_add(count as u64, Ordering::Relaxed);
}

pub(crate) fn subtract(counter: &AtomicU64, count: usize) {
    counter.fetch_sub(count as u64, Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_lies_below_its_bucket_limit_and_not_below_the_one_before() {
        for us in (0..5_000).chain([1 << 20, 12_345_678]) {
            let bucket = bucket_of(us);
            assert!(us < bucket_limit_us(bucket), "{us}");
            assert!(bucket == 0 || us >= bucket_limit_us(bucket - 1), "{us}");
        }
        assert_eq!(bucket_of(u64::MAX), BUCKET_COUNT - 1);
    }

    #[test]
    fn quantiles_come_from_the_counts() {
        let histogram = Histogram::default();
        for us in 1..=100 {
            histogram.record(Duration::from_micros(us));
        }
        assert_eq!(histogram.count(), 100);
        assert_eq!(histogram.sum_us(), 5_050);
        let median = histogram.quantile_us(0.5);
        assert!((48..=64).contains(&median), "{median}");
    }
}
