//! A disk that fails where a test says so.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;

use super::{BlockFile, Disk, DiskSpace, File};

/// The operations that can be made to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// A write to a file.
    Write,
    /// A sync of a file, or a flush of the disk.
    Sync,
    /// A read or view of a file.
    Read,
    /// A file created, renamed or removed.
    Name,
    /// A sync of a directory.
    SyncDir,
}

#[derive(Default)]
struct Plan {
    counts: [AtomicU64; 5],
    fault: Mutex<Option<(Operation, u64, io::ErrorKind)>>,
    failed_count: AtomicU64,
    space: Mutex<Option<DiskSpace>>,
}

impl Plan {
    fn check(&self, operation: Operation) -> io::Result<()> {
        let count = self.counts[operation as usize].fetch_add(1, Ordering::SeqCst);
        let fault = *self.fault.lock().unwrap_or_else(PoisonError::into_inner);
        match fault {
            Some((kind, at, error)) if kind == operation && count >= at => {
                self.failed_count.fetch_add(1, Ordering::SeqCst);
                Err(io::Error::new(error, format!("injected failure of {operation:?} {count}")))
            }
            _ => Ok(()),
        }
    }
}

/// Passes everything to another disk, but for the operations that are to fail.
#[derive(Clone)]
pub struct FaultyDisk {
    disk: Arc<dyn Disk>,
    plan: Arc<Plan>,
}

impl FaultyDisk {
    /// Wraps `disk`; nothing fails yet.
    #[must_use]
    pub fn new(disk: Arc<dyn Disk>) -> Self {
        Self { disk, plan: Arc::default() }
    }

    /// From now on the operations of this kind fail, after `skip` more that do not.
    pub fn fail(&self, operation: Operation, skip: u64, error: io::ErrorKind) {
        let now = self.plan.counts[operation as usize].load(Ordering::SeqCst);
        *self.plan.fault.lock().unwrap_or_else(PoisonError::into_inner) = Some((operation, now + skip, error));
    }

    /// Nothing fails any more.
    pub fn heal(&self) {
        *self.plan.fault.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// What the disk says of its space from now on; `None`: the truth. Writes go on all the same.
    pub fn set_space(&self, space: Option<DiskSpace>) {
        *self.plan.space.lock().unwrap_or_else(PoisonError::into_inner) = space;
    }

    /// How many operations were made to fail: the proof that a fault took place.
    #[must_use]
    pub fn failed_count(&self) -> u64 {
        self.plan.failed_count.load(Ordering::SeqCst)
    }

    fn wrap(&self, file: Arc<dyn File>) -> Arc<dyn File> {
        Arc::new(FaultyFile { file, plan: Arc::clone(&self.plan) })
    }
}

impl Disk for FaultyDisk {
    fn name(&self) -> String {
        self.disk.name()
    }

    fn lock(&self, path: &str) -> io::Result<()> {
        self.disk.lock(path)
    }

    fn open(&self, path: &str) -> io::Result<Arc<dyn File>> {
        Ok(self.wrap(self.disk.open(path)?))
    }

    fn open_blocks(&self, path: &str) -> io::Result<Arc<dyn BlockFile>> {
        Ok(Arc::new(FaultyBlockFile { file: self.disk.open_blocks(path)?, plan: Arc::clone(&self.plan) }))
    }

    fn flush(&self) -> io::Result<()> {
        self.plan.check(Operation::Sync)?;
        self.disk.flush()
    }

    fn create(&self, path: &str) -> io::Result<Arc<dyn File>> {
        self.plan.check(Operation::Name)?;
        Ok(self.wrap(self.disk.create(path)?))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.plan.check(Operation::Name)?;
        self.disk.rename(from, to)
    }

    fn remove(&self, path: &str) -> io::Result<()> {
        self.plan.check(Operation::Name)?;
        self.disk.remove(path)
    }

    fn create_dir(&self, path: &str) -> io::Result<()> {
        self.plan.check(Operation::Name)?;
        self.disk.create_dir(path)
    }

    fn remove_dir(&self, path: &str) -> io::Result<()> {
        self.plan.check(Operation::Name)?;
        self.disk.remove_dir(path)
    }

    fn sync_dir(&self, path: &str) -> io::Result<()> {
        self.plan.check(Operation::SyncDir)?;
        self.disk.sync_dir(path)
    }

    fn space(&self) -> io::Result<DiskSpace> {
        let said = *self.plan.space.lock().unwrap_or_else(PoisonError::into_inner);
        said.map_or_else(|| self.disk.space(), Ok)
    }

    fn list(&self, path: &str) -> io::Result<Vec<String>> {
        self.disk.list(path)
    }
}

struct FaultyFile {
    file: Arc<dyn File>,
    plan: Arc<Plan>,
}

impl File for FaultyFile {
    fn write_at(&self, pieces: &[Bytes], at: u64) -> io::Result<()> {
        self.plan.check(Operation::Write)?;
        self.file.write_at(pieces, at)
    }

    fn sync(&self) -> io::Result<()> {
        self.plan.check(Operation::Sync)?;
        self.file.sync()
    }

    fn read_at(&self, buffer: &mut [u8], at: u64) -> io::Result<usize> {
        self.plan.check(Operation::Read)?;
        self.file.read_at(buffer, at)
    }

    fn size(&self) -> io::Result<u64> {
        self.file.size()
    }

    fn view(&self, at: u64, size: usize, capacity: u64) -> io::Result<Bytes> {
        self.plan.check(Operation::Read)?;
        self.file.view(at, size, capacity)
    }

    fn read_past_cache(&self, at: u64, size: usize) -> io::Result<Option<(u64, Bytes)>> {
        self.plan.check(Operation::Read)?;
        self.file.read_past_cache(at, size)
    }
}

struct FaultyBlockFile {
    file: Arc<dyn BlockFile>,
    plan: Arc<Plan>,
}

impl BlockFile for FaultyBlockFile {
    fn write(&self, blocks: &[u8], at: u64) -> io::Result<()> {
        self.plan.check(Operation::Write)?;
        self.file.write(blocks, at)
    }

    fn sync(&self) -> io::Result<()> {
        self.plan.check(Operation::Sync)?;
        self.file.sync()
    }

    fn flushed_with_disk(&self) -> bool {
        self.file.flushed_with_disk()
    }
}
