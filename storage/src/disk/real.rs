//! Files of the operating system. Batches are written past the page cache (O_DIRECT) where the
//! file system can, and read through maps of it: the kernel takes the pages that a direct write
//! replaces out of the cache, before the write and again after it, so a map shows the bytes of
//! every write that has completed. That holds as long as no page of the range is dirty, which is
//! the rule of [`BlockFile::write`].

use std::fs;
use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};

use bytes::Bytes;
use rustix::fs::{AtFlags, FlockOperation, OFlags, StatxFlags, flock, fstatfs, statvfs, statx};

use super::blocks::{self, READ_SIZE_MAX, ReadBuffer};
use super::{BLOCK_SIZE, BlockFile, Disk, DiskSpace, File};
use arqon_proto::planted::{self, Bug};

/// Slices that one pwritev takes.
const SLICE_COUNT_MAX: usize = 512;
/// `f_type` of ext2, ext3 and ext4.
const EXT4: rustix::fs::FsWord = 0xef53;

/// A directory of the file system.
pub struct RealDisk {
    root: PathBuf,
    read_only: bool,
    direct: bool,
    /// Also the file through which the disk is flushed: it is there and never dirty.
    lock: Mutex<Option<Arc<fs::File>>>,
}

impl RealDisk {
    /// The directory `root`, which is created when it is not there. Its name is safe when this returns: everything
    /// in it could be lost with a name that is not.
    ///
    /// # Errors
    /// The directory cannot be created, or its name not be synced.
    pub fn create(root: &Path) -> io::Result<Self> {
        let missing = root.ancestors().take_while(|folder| !folder.as_os_str().is_empty() && !folder.exists());
        let missing: Vec<&Path> = missing.collect();
        fs::create_dir_all(root)?;
        for folder in &missing {
            sync_parent(folder)?;
        }
        // It may have been made by a process that ended before this. Who made it for somebody that may not read
        // its parent has to see to it himself.
        match sync_parent(root) {
            Err(error) if error.kind() != io::ErrorKind::PermissionDenied => return Err(error),
            Ok(()) | Err(_) => {}
        }
        Ok(Self { root: root.to_owned(), read_only: false, direct: true, lock: Mutex::new(None) })
    }

    /// The directory `root` as it is; every change of it fails.
    #[must_use]
    pub fn read_only(root: &Path) -> Self {
        Self { root: root.to_owned(), read_only: true, direct: false, lock: Mutex::new(None) }
    }

    /// Whether batches may be written past the page cache; they are unless this says no.
    #[must_use]
    pub fn with_direct_writes(self, direct: bool) -> Self {
        Self { direct, ..self }
    }

    fn file(&self, file: fs::File) -> Arc<dyn File> {
        let (direct, map, size_seen) = (OnceLock::new(), OnceLock::new(), AtomicU64::new(0));
        let (may_be_direct, user) = (self.direct, Arc::default());
        Arc::new(RealFile { file, direct, may_be_direct, map, user, size_seen })
    }

    fn locked(&self) -> Option<Arc<fs::File>> {
        self.lock.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether one fdatasync of the lock file flushes `file` too: see ADR 2.
    fn flushed_with_lock(&self, file: &fs::File) -> io::Result<bool> {
        let Some(lock) = self.locked() else { return Ok(false) };
        let same_disk = lock.metadata()?.dev() == file.metadata()?.dev();
        Ok(same_disk && fstatfs(file)?.f_type == EXT4)
    }

    fn change(&self, path: &str) -> io::Result<PathBuf> {
        if self.read_only {
            return Err(io::ErrorKind::ReadOnlyFilesystem.into());
        }
        Ok(self.root.join(path))
    }
}

impl Disk for RealDisk {
    fn name(&self) -> String {
        self.root.display().to_string()
    }

    fn lock(&self, path: &str) -> io::Result<()> {
        let file = fs::File::options().create(true).truncate(false).write(true).open(self.change(path)?)?;
        flock(&file, FlockOperation::NonBlockingLockExclusive)?;
        *self.lock.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(file));
        Ok(())
    }

    fn unlock(&self) {
        if let Some(file) = self.lock.lock().unwrap_or_else(PoisonError::into_inner).take() {
            // A file that is in use elsewhere keeps the lock otherwise. It cannot fail on an open file.
            let _ = flock(&*file, FlockOperation::Unlock);
        }
    }

    fn open(&self, path: &str) -> io::Result<Arc<dyn File>> {
        let file = fs::File::options().read(true).write(!self.read_only).open(self.root.join(path))?;
        Ok(self.file(file))
    }

    fn open_blocks(&self, path: &str) -> io::Result<Arc<dyn BlockFile>> {
        let path = self.change(path)?;
        if self.direct
            && let Some(file) = open_direct(&path, true)
        {
            let flushed_with_disk = self.flushed_with_lock(&file)?;
            return Ok(Arc::new(RealBlockFile { file, flushed_with_disk }));
        }
        let file = fs::File::options().read(true).write(true).open(path)?;
        Ok(Arc::new(RealBlockFile { file, flushed_with_disk: false }))
    }

    fn flush(&self) -> io::Result<()> {
        self.locked().ok_or(io::ErrorKind::Unsupported)?.sync_data()
    }

    fn create(&self, path: &str) -> io::Result<Arc<dyn File>> {
        let path = self.change(path)?;
        let file = fs::File::options().read(true).write(true).create(true).truncate(true).open(path)?;
        Ok(self.file(file))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        fs::rename(self.change(from)?, self.change(to)?)
    }

    fn remove(&self, path: &str) -> io::Result<()> {
        fs::remove_file(self.change(path)?)
    }

    fn create_dir(&self, path: &str) -> io::Result<()> {
        fs::create_dir_all(self.change(path)?)
    }

    fn remove_dir(&self, path: &str) -> io::Result<()> {
        fs::remove_dir(self.change(path)?)
    }

    fn sync_dir(&self, path: &str) -> io::Result<()> {
        if planted::has(Bug::NoDirectorySync) {
            return Ok(());
        }
        fs::File::open(self.root.join(path))?.sync_all()
    }

    fn space(&self) -> io::Result<DiskSpace> {
        let status = statvfs(&self.root)?;
        let size = |block_count: u64| block_count.saturating_mul(status.f_frsize);
        Ok(DiskSpace { free_size: size(status.f_bavail), total_size: size(status.f_blocks) })
    }

    fn list(&self, path: &str) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(self.root.join(path))? {
            names.push(entry?.file_name().to_string_lossy().into_owned());
        }
        names.sort();
        Ok(names)
    }
}

/// Opens a file past the page cache, where its file system can do that.
fn open_direct(path: &Path, write: bool) -> Option<fs::File> {
    let direct = i32::try_from(OFlags::DIRECT.bits()).ok()?;
    let file = fs::File::options().read(true).write(write).custom_flags(direct).open(path).ok()?;
    // Some file systems take the flag and go through the cache all the same.
    let status = statx(&file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN).ok()?;
    let fits = |align: u32| align > 0 && BLOCK_SIZE.is_multiple_of(align as usize);
    let aligned = fits(status.stx_dio_mem_align) && fits(status.stx_dio_offset_align);
    (status.stx_mask & StatxFlags::DIOALIGN.bits() != 0 && aligned).then_some(file)
}

fn sync_parent(folder: &Path) -> io::Result<()> {
    match folder.parent() {
        Some(parent) if parent.as_os_str().is_empty() => fs::File::open(".")?.sync_all(),
        Some(parent) => fs::File::open(parent)?.sync_all(),
        // The root of everything has no name.
        None => Ok(()),
    }
}

fn read_at(file: &fs::File, buffer: &mut [u8], at: u64) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read_at(&mut buffer[filled..], at + filled as u64) {
            Ok(0) => break,
            Ok(read) => filled += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

struct RealFile {
    file: fs::File,
    /// For reads past the page cache, from the first one on; `None` where that is refused.
    direct: OnceLock<Option<fs::File>>,
    may_be_direct: bool,
    /// The whole capacity of the file; every view counts as a user of it.
    map: OnceLock<Map>,
    user: Arc<()>,
    /// The file had this size once, and it never shrinks.
    size_seen: AtomicU64,
}

impl RealFile {
    fn direct(&self) -> Option<&fs::File> {
        let open = || {
            // Not by its name, which may belong to another file by now.
            let path = format!("/proc/self/fd/{}", self.file.as_raw_fd());
            open_direct(Path::new(&path), false).filter(|_| self.may_be_direct)
        };
        self.direct.get_or_init(open).as_ref()
    }

    fn map(&self, capacity: u64) -> io::Result<&Map> {
        if let Some(map) = self.map.get() {
            return Ok(map);
        }
        let size = usize::try_from(capacity).map_err(io::Error::other)?;
        // SAFETY: the file is never shrunk, and `view` hands out only ranges that lie inside the
        // file at that time. Such a range holds bytes that are never written again (the contract
        // of `view`: batches are written once, a cut moves to a new file), so the memory behind a
        // shared slice does not change; a file gets other bytes only when no such slice is left (see
        // `users`), through a map of its own. Memory past the end of the file is never read. Another
        // program that shrinks or rewrites a locked data directory is outside the promise.
        let map = unsafe { memmap2::MmapOptions::new().len(size).map(&self.file)? };
        let pages = Arc::new(map);
        let owner = Pages { map: Arc::clone(&pages), _user: Arc::clone(&self.user) };
        Ok(self.map.get_or_init(|| Map { bytes: Bytes::from_owner(owner), pages }))
    }
}

/// A file in memory, as the kernel reads it and as bytes.
struct Map {
    pages: Arc<memmap2::Mmap>,
    bytes: Bytes,
}

/// Counts as a user of the file until the last slice of it is gone.
struct Pages {
    map: Arc<memmap2::Mmap>,
    _user: Arc<()>,
}

impl AsRef<[u8]> for Pages {
    fn as_ref(&self) -> &[u8] {
        &self.map
    }
}

impl File for RealFile {
    fn write_at(&self, pieces: &[Bytes], mut at: u64) -> io::Result<()> {
        let mut slices: Vec<IoSlice<'_>> = pieces.iter().map(|piece| IoSlice::new(piece)).collect();
        let mut rest = &mut slices[..];
        IoSlice::advance_slices(&mut rest, 0);
        while !rest.is_empty() {
            let count = rest.len().min(SLICE_COUNT_MAX);
            let written = match rustix::io::pwritev(&self.file, &rest[..count], at) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => written,
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            };
            at += written as u64;
            IoSlice::advance_slices(&mut rest, written);
        }
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn read_at(&self, buffer: &mut [u8], at: u64) -> io::Result<usize> {
        read_at(&self.file, buffer, at)
    }

    fn size(&self) -> io::Result<u64> {
        let size = self.file.metadata()?.len();
        self.size_seen.store(size, Ordering::Relaxed);
        Ok(size)
    }

    fn view(&self, at: u64, size: usize, capacity: u64) -> io::Result<Bytes> {
        let end = at + size as u64;
        // A file that somebody cut short must give an error, not a fault of the process.
        if end > capacity || end > self.size_seen.load(Ordering::Relaxed) && end > self.size()? {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let map = self.map(capacity)?;
        let from = usize::try_from(at).map_err(io::Error::other)?;
        // The kernel reads the pages here: where it cannot, touching them would end the process (SIGBUS).
        if map.pages.advise_range(memmap2::Advice::PopulateRead, from, size).is_ok() {
            return Ok(map.bytes.slice(from..from + size));
        }
        // It says why, or serves where the kernel does not know the call.
        let mut bytes = vec![0; size];
        if self.read_at(&mut bytes, at)? < size {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(bytes.into())
    }

    fn users(&self) -> Weak<()> {
        Arc::downgrade(&self.user)
    }

    fn read_past_cache(&self, at: u64, size: usize) -> io::Result<Option<(u64, Bytes)>> {
        let Some(file) = self.direct() else { return Ok(None) };
        let Some(mut buffer) = ReadBuffer::take() else { return Ok(None) };
        let from = blocks::round_down(at);
        let size = size.next_multiple_of(BLOCK_SIZE).min(READ_SIZE_MAX);
        let read = read_once(file, &mut buffer.bytes_mut()[..size], from)?;
        Ok(Some((from, buffer.into_bytes(read))))
    }
}

/// One read past the page cache. A read that ends inside a block has met the end of the file, and
/// another one from there would be refused.
fn read_once(file: &fs::File, bytes: &mut [u8], at: u64) -> io::Result<usize> {
    loop {
        match file.read_at(bytes, at) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

struct RealBlockFile {
    file: fs::File,
    flushed_with_disk: bool,
}

impl BlockFile for RealBlockFile {
    fn write(&self, blocks: &[u8], at: u64) -> io::Result<()> {
        self.file.write_all_at(blocks, at)
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn flushed_with_disk(&self) -> bool {
        self.flushed_with_disk
    }

    fn descriptor(&self) -> Option<RawFd> {
        Some(self.file.as_raw_fd())
    }
}
