//! A disk that fails, or takes its time, where a test says so.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use bytes::Bytes;
use rustix::io::Errno;

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
    faults: Mutex<Vec<(Operation, u64, io::ErrorKind)>>,
    /// Bytes of files that the device cannot read.
    unreadable: Mutex<Vec<(String, Range<u64>)>>,
    failed_count: AtomicU64,
    delays_ms: [AtomicU64; 5],
    space: Mutex<Option<DiskSpace>>,
}

impl Plan {
    fn lock_unreadable(&self) -> MutexGuard<'_, Vec<(String, Range<u64>)>> {
        self.unreadable.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn check_read(&self, path: &str, at: u64, size: usize) -> io::Result<()> {
        self.check(Operation::Read)?;
        let end = at + size as u64;
        let meets = |bytes: &Range<u64>| bytes.start < end && at < bytes.end;
        if self.lock_unreadable().iter().any(|(name, bytes)| name == path && meets(bytes)) {
            self.failed_count.fetch_add(1, Ordering::SeqCst);
            return Err(Errno::IO.into());
        }
        Ok(())
    }

    fn check(&self, operation: Operation) -> io::Result<()> {
        let delay_ms = self.delays_ms[operation as usize].load(Ordering::SeqCst);
        if delay_ms > 0 {
            std::thread::sleep(Duration::from_millis(delay_ms));
        }
        let count = self.counts[operation as usize].fetch_add(1, Ordering::SeqCst);
        let faults = self.faults.lock().unwrap_or_else(PoisonError::into_inner);
        match faults.iter().find(|(kind, at, _)| *kind == operation && count >= *at) {
            Some((.., error)) => {
                self.failed_count.fetch_add(1, Ordering::SeqCst);
                Err(io::Error::new(*error, format!("injected failure of {operation:?} {count}")))
            }
            None => Ok(()),
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

    /// From now on only the operations of this kind fail, after `skip` more that do not.
    pub fn fail(&self, operation: Operation, skip: u64, error: io::ErrorKind) {
        self.heal();
        self.fail_too(operation, skip, error);
    }

    /// The same, beside those that fail already.
    pub fn fail_too(&self, operation: Operation, skip: u64, error: io::ErrorKind) {
        let now = self.plan.counts[operation as usize].load(Ordering::SeqCst);
        self.plan.faults.lock().unwrap_or_else(PoisonError::into_inner).push((operation, now + skip, error));
    }

    /// Reads of these bytes of a file fail as those of a bad sector do (EIO), until another file has its name.
    pub fn make_unreadable(&self, path: &str, bytes: Range<u64>) {
        self.plan.lock_unreadable().push((path.to_owned(), bytes));
    }

    /// Nothing fails any more, but reads of bad sectors.
    pub fn heal(&self) {
        self.plan.faults.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// From now on each operation of this kind takes this much longer, in ms.
    pub fn delay(&self, operation: Operation, delay_ms: u64) {
        self.plan.delays_ms[operation as usize].store(delay_ms, Ordering::SeqCst);
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

    fn wrap(&self, path: &str, file: Arc<dyn File>) -> Arc<dyn File> {
        Arc::new(FaultyFile { file, path: path.to_owned(), plan: Arc::clone(&self.plan) })
    }
}

impl Disk for FaultyDisk {
    fn name(&self) -> String {
        self.disk.name()
    }

    fn lock(&self, path: &str) -> io::Result<()> {
        self.disk.lock(path)
    }

    fn unlock(&self) {
        self.disk.unlock();
    }

    fn open(&self, path: &str) -> io::Result<Arc<dyn File>> {
        Ok(self.wrap(path, self.disk.open(path)?))
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
        Ok(self.wrap(path, self.disk.create(path)?))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.plan.check(Operation::Name)?;
        self.disk.rename(from, to)?;
        self.plan.lock_unreadable().retain(|(path, _)| path != to);
        Ok(())
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
    /// The name that it was opened by.
    path: String,
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
        self.plan.check_read(&self.path, at, buffer.len())?;
        self.file.read_at(buffer, at)
    }

    fn size(&self) -> io::Result<u64> {
        self.file.size()
    }

    fn view(&self, at: u64, size: usize, capacity: u64) -> io::Result<Bytes> {
        self.plan.check_read(&self.path, at, size)?;
        self.file.view(at, size, capacity)
    }

    fn users(&self) -> Weak<()> {
        self.file.users()
    }

    fn read_past_cache(&self, at: u64, size: usize) -> io::Result<Option<(u64, Bytes)>> {
        self.plan.check_read(&self.path, at, size)?;
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
