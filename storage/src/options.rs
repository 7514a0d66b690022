//! What the opener of a data directory decides.

use arqon_proto::{NodeId, limits};

/// How segments are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Backend {
    /// io_uring where the kernel allows it, otherwise as [`Backend::Plain`].
    #[default]
    Auto,
    /// io_uring, or an error at open.
    Uring,
    /// pwrite and fdatasync on a small pool of threads.
    Plain,
}

/// Whose data a directory holds. A directory of another cluster or node is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Name of the cluster.
    pub cluster: String,
    /// The broker.
    pub node: NodeId,
}

/// Settings of a [`Store`](crate::Store). Sizes in bytes, times in milliseconds.
#[derive(Clone, Debug)]
pub struct Options {
    /// How segments are written.
    pub backend: Backend,
    /// Batches are written, and many at once read, past the page cache where the file system can
    /// do that.
    pub direct_writes: bool,
    /// Capacity of a log's first segment; each next one has twice the one before.
    pub segment_size_first: u64,
    /// Capacity at which segments stop growing.
    pub segment_size_max: u64,
    /// Bytes of a segment between two points of its sparse index.
    pub index_step: u64,
    /// Recent entries that each log keeps in memory. Entries not flushed yet stay beyond it.
    pub recent_size_max: usize,
    /// Recent entries that all logs keep together, but for those not flushed yet. Beyond it each log
    /// keeps the same share, of 64 KiB at least; it may be passed by an eighth for a moment.
    pub recent_total_max: usize,
    /// Appended and not yet flushed, per log; an append beyond it is refused.
    pub pending_size_max: usize,
    /// One flush group of one log: one write and one fdatasync.
    pub flush_size_max: usize,
    /// Zeroes written at the creation of a segment, and the first step of filling ahead; the steps
    /// of a busy log grow.
    pub fill_size: u64,
    /// Zeroes written ahead per second, over all logs; beyond it appends extend their file.
    pub fill_rate_max: u64,
    /// Bytes of files of purged segments that are kept for new ones, of all logs together; 0: none. They go
    /// before the store is [`Low`](crate::SpaceState::Low).
    pub pool_size_max: u64,
    /// Below this much free on the disk, or [`Self::reserve_percent_max`] of it if that is less, the
    /// store is [`Low`](crate::SpaceState::Low), and [`Full`](crate::SpaceState::Full) below a quarter of
    /// that. 0: never.
    pub reserve_size_max: u64,
    /// See [`Self::reserve_size_max`]; in percent of the disk.
    pub reserve_percent_max: u64,
    /// Bytes per second that are read to find damage in segments that take no more batches, of all logs
    /// together. 0: none.
    pub scrub_rate_max: u64,
    /// Within about this time the durable mark is synced.
    pub mark_delay_ms: u64,
    /// Threads that write, sync and create files. 0: the store starts no threads at all, not for other
    /// chores either, and whoever opened it calls [`Store::step`](crate::Store::step).
    pub thread_count: usize,
}

/// See [`Options::index_step`].
pub(crate) const INDEX_STEP: u64 = 64 << 10;

impl Default for Options {
    fn default() -> Self {
        Self {
            backend: Backend::Auto,
            direct_writes: true,
            segment_size_first: 1 << 20,
            segment_size_max: 64 << 20,
            index_step: INDEX_STEP,
            recent_size_max: limits::RECENT_SIZE_MAX,
            recent_total_max: limits::RECENT_TOTAL_MAX,
            pending_size_max: 4 * limits::UNCOMMITTED_SIZE_MAX,
            flush_size_max: 8 << 20,
            fill_size: 256 << 10,
            fill_rate_max: 512 << 20,
            pool_size_max: limits::SEGMENT_POOL_SIZE_MAX,
            reserve_size_max: limits::DISK_RESERVE_SIZE_MAX,
            reserve_percent_max: limits::DISK_RESERVE_PERCENT_MAX,
            scrub_rate_max: limits::SCRUB_RATE_MAX,
            mark_delay_ms: 100,
            thread_count: 4,
        }
    }
}
