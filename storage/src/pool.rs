//! Files of purged segments that wait to become new ones, so that a log which drops as much as it takes
//! neither writes zeroes ahead nor asks the file system for blocks.
//!
//! ```text
//!   purge: no user, not cut, full size ──> DIR/pool/N.spare ──> roll of a log of the same owner
//!             │ otherwise                      │ too many, too little space, next start
//!             └──> removed                     └──> removed
//! ```
//!
//! Old bytes in such a file are never taken for entries: see ADR 13.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arqon_proto::{GroupId, ReplicaId};

use crate::disk::{Disk, join};
use crate::layout::POOL_DIR;
use crate::metrics::Metrics;

const SUFFIX: &str = ".spare";

/// Whose bytes stand in a file: it is passed on to logs of the same owner only.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Owner {
    /// One log.
    Log(GroupId, ReplicaId),
    /// All logs that were told this name.
    Named(Arc<str>),
}

/// A file that may become a segment.
#[derive(Debug)]
pub(crate) struct Spare {
    /// Path below the data directory.
    pub path: String,
    /// Blocks up to here are allocated and were written; in bytes.
    pub durable_end: u64,
    owner: Owner,
}

#[derive(Default)]
struct Files {
    /// Oldest first.
    spares: VecDeque<Spare>,
    size: u64,
    next_number: u64,
}

/// The spare files of one data directory.
pub(crate) struct FilePool {
    files: Mutex<Files>,
    metrics: Arc<Metrics>,
    size_max: u64,
    /// Only files of segments of this capacity are kept.
    capacity: u64,
}

impl FilePool {
    pub fn new(metrics: Arc<Metrics>, size_max: u64, capacity: u64) -> Self {
        Self { files: Mutex::default(), metrics, size_max, capacity }
    }

    fn lock(&self) -> MutexGuard<'_, Files> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note_size(&self, files: &Files) {
        self.metrics.pool_size.store(files.size, Ordering::Relaxed);
    }

    /// Whether a file of a segment of `capacity` bytes is of use here.
    pub fn takes(&self, capacity: u64) -> bool {
        capacity == self.capacity && capacity <= self.size_max
    }

    /// A path that no file of this run has had.
    pub fn next_path(&self) -> String {
        let mut files = self.lock();
        files.next_number += 1;
        join(POOL_DIR, &format!("{}{SUFFIX}", files.next_number))
    }

    /// Offers a file that has a path of this pool and durably no other one. Says which files have to be removed
    /// instead: the oldest ones, when there are too many.
    pub fn put(&self, path: String, durable_end: u64, owner: Owner) -> Vec<Spare> {
        let mut files = self.lock();
        files.size += durable_end;
        files.spares.push_back(Spare { path, durable_end, owner });
        let mut gone = Vec::new();
        while files.size > self.size_max
            && let Some(oldest) = files.spares.pop_front()
        {
            files.size -= oldest.durable_end;
            gone.push(oldest);
        }
        self.note_size(&files);
        gone
    }

    /// A file for a segment of `capacity` bytes of `owner`.
    pub fn take(&self, owner: &Owner, capacity: u64) -> Option<Spare> {
        if !self.takes(capacity) {
            return None;
        }
        let mut files = self.lock();
        let newest = files.spares.iter().rposition(|spare| spare.owner == *owner)?;
        let spare = files.spares.remove(newest)?;
        files.size -= spare.durable_end;
        self.note_size(&files);
        Some(spare)
    }

    /// Removes the files of `owner`, or all.
    pub fn clear(&self, disk: &dyn Disk, owner: Option<&Owner>) -> bool {
        let gone: Vec<Spare> = {
            let mut files = self.lock();
            let (gone, kept): (Vec<_>, Vec<_>) = std::mem::take(&mut files.spares)
                .into_iter()
                .partition(|spare| owner.is_none_or(|owner| spare.owner == *owner));
            files.spares = kept.into();
            files.size = files.spares.iter().map(|spare| spare.durable_end).sum();
            self.note_size(&files);
            gone
        };
        remove(disk, &gone);
        !gone.is_empty()
    }
}

/// Removes files that left the pool. What cannot be removed stays until the next start.
pub(crate) fn remove(disk: &dyn Disk, spares: &[Spare]) {
    for spare in spares {
        if let Err(error) = disk.remove(&spare.path) {
            tracing::warn!("{} cannot be removed: {error}", join(&disk.name(), &spare.path));
        }
    }
}

/// Makes the directory and drops what an earlier run left in it: nothing says any more whose bytes those are,
/// nor whether their blocks are durable.
pub(crate) fn prepare(disk: &dyn Disk) -> io::Result<()> {
    disk.create_dir(POOL_DIR)?;
    for name in disk.list(POOL_DIR)?.iter().filter(|name| name.ends_with(SUFFIX)) {
        disk.remove(&join(POOL_DIR, name))?;
    }
    disk.sync_dir(POOL_DIR)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 1 << 20;

    fn named(name: &str) -> Owner {
        Owner::Named(name.into())
    }

    #[test]
    fn a_file_goes_to_its_owner_only_and_the_oldest_make_room() {
        let metrics = Arc::<Metrics>::default();
        let pool = FilePool::new(Arc::clone(&metrics), 2 * SIZE, SIZE);
        let [first, second, third] = [0; 3].map(|_| pool.next_path());
        assert!(pool.put(first.clone(), SIZE, named("alpha")).is_empty());
        assert!(pool.put(second.clone(), SIZE, named("beta")).is_empty());
        let log = Owner::Log(GroupId(1), ReplicaId(1));
        assert!(pool.take(&log, SIZE).is_none() && pool.take(&named("gamma"), SIZE).is_none());
        assert!(pool.take(&named("alpha"), SIZE / 2).is_none(), "a smaller segment would waste it");
        let gone = pool.put(third.clone(), SIZE, named("beta"));
        assert_eq!(gone.iter().map(|spare| &spare.path).collect::<Vec<_>>(), [&first]);
        assert_eq!(metrics.pool_size.load(Ordering::Relaxed), 2 * SIZE);
        assert_eq!(pool.take(&named("beta"), SIZE).map(|spare| spare.path), Some(third));
        assert_eq!(pool.take(&named("beta"), SIZE).map(|spare| spare.path), Some(second));
        assert!(pool.take(&named("beta"), SIZE).is_none());
        assert_eq!(metrics.pool_size.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn a_pool_of_no_size_takes_nothing() {
        assert!(!FilePool::new(Arc::default(), 0, SIZE).takes(SIZE));
    }
}
