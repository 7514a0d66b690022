//! Counters of partitions, read by whoever exports them. One instance may serve many.

use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};

use arqon_storage::Histogram;

/// What partitions count.
#[derive(Debug, Default)]
pub struct PartitionMetrics {
    /// From the receipt of a batch to its commit, or to its submission where only that was
    /// asked for.
    pub produce_latency: Histogram,
    /// Batches committed.
    pub batch_count: AtomicU64,
    /// Records in them.
    pub record_count: AtomicU64,
    /// Bytes of them, with headers and stamps.
    pub batch_size: AtomicU64,
    /// Batches refused because some of their records were known.
    pub duplicate_count: AtomicU64,
    /// Batches and requests pushed back.
    pub overloaded_count: AtomicU64,
    /// Jobs leased at this moment on partitions led here.
    pub leased_count: AtomicI64,
    /// Jobs handed out, first attempts and later ones.
    pub granted_count: AtomicU64,
    /// Jobs handed out again after a nack or an expiry.
    pub redelivered_count: AtomicU64,
    /// Leases that ran out.
    pub expired_count: AtomicU64,
    /// Jobs moved to a dead-letter topic.
    pub dead_count: AtomicU64,
    /// From the request of a waiting worker that got jobs to its answer.
    pub work_latency: Histogram,
}

pub(super) fn add(counter: &AtomicU64, count: usize) {
    counter.fetch_add(count as u64, Ordering::Relaxed);
}
