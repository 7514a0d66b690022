//! The few operations that the log needs of a disk.
//!
//! Paths are relative to the data directory, with `/` between parts. Every operation may be
//! called from any thread. What counts as durable: the bytes of a file after [`File::sync`],
//! the names in a directory after [`Disk::sync_dir`] of it, and, where [`BlockFile::flushed_with_disk`]
//! says so, blocks after [`Disk::flush`].

pub(crate) mod blocks;
pub(crate) mod faulty;
pub(crate) mod memory;
pub(crate) mod real;
pub(crate) mod ring;

use std::io;
use std::ops::Range;
use std::os::fd::RawFd;
use std::sync::{Arc, Weak};

use arqon_proto::planted;
use bytes::Bytes;
use rustix::io::Errno;

pub use crate::layout::BLOCK_SIZE;

/// Sizes of the file system of a data directory, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskSpace {
    /// What may still be written.
    pub free_size: u64,
    /// The whole of it.
    pub total_size: u64,
}

impl DiskSpace {
    /// A disk that never fills.
    pub const UNLIMITED: Self = Self { free_size: u64::MAX, total_size: u64::MAX };
}

/// One data directory.
pub trait Disk: Send + Sync + 'static {
    /// What error messages call this disk: a path, usually.
    fn name(&self) -> String;

    /// Takes the directory for this handle until it is dropped, or [`Disk::unlock`].
    ///
    /// # Errors
    /// `WouldBlock` when another handle has it.
    fn lock(&self, path: &str) -> io::Result<()>;

    /// Gives the directory back to whoever locks it next. Nothing is changed through this handle from then on.
    fn unlock(&self);

    /// Opens a file that exists, for reading and writing.
    ///
    /// # Errors
    /// `NotFound`, or a failure of the disk.
    fn open(&self, path: &str) -> io::Result<Arc<dyn File>>;

    /// Creates a file, or empties the one that is there.
    ///
    /// # Errors
    /// A failure of the disk.
    fn create(&self, path: &str) -> io::Result<Arc<dyn File>>;

    /// Opens a file that exists for writes of whole blocks, past the page cache where the disk can.
    ///
    /// # Errors
    /// `NotFound`, or a failure of the disk.
    fn open_blocks(&self, path: &str) -> io::Result<Arc<dyn BlockFile>> {
        Ok(Arc::new(Buffered(self.open(path)?)))
    }

    /// Makes durable what [`BlockFile::write`] has written over durable bytes, in every file
    /// that is [flushed with the disk](BlockFile::flushed_with_disk). Only writes that were
    /// complete before the call count.
    ///
    /// # Errors
    /// `Unsupported`, or a failure of the disk, which must not be tried again.
    fn flush(&self) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Renames a file or directory, replacing a file of the new name. A file may change its directory:
    /// each of the two names is durable with its own directory.
    ///
    /// # Errors
    /// A failure of the disk.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;

    /// Removes a file.
    ///
    /// # Errors
    /// `NotFound`, or a failure of the disk.
    fn remove(&self, path: &str) -> io::Result<()>;

    /// Creates a directory; fine when it is there.
    ///
    /// # Errors
    /// A failure of the disk.
    fn create_dir(&self, path: &str) -> io::Result<()>;

    /// Removes an empty directory.
    ///
    /// # Errors
    /// A failure of the disk.
    fn remove_dir(&self, path: &str) -> io::Result<()>;

    /// Makes the names in a directory durable.
    ///
    /// # Errors
    /// A failure of the disk.
    fn sync_dir(&self, path: &str) -> io::Result<()>;

    /// What is free here and how much there is, as far as this process may use it. A disk without
    /// a limit says [`DiskSpace::UNLIMITED`].
    ///
    /// # Errors
    /// A failure of the disk.
    fn space(&self) -> io::Result<DiskSpace> {
        Ok(DiskSpace::UNLIMITED)
    }

    /// The names in a directory, sorted.
    ///
    /// # Errors
    /// `NotFound`, or a failure of the disk.
    fn list(&self, path: &str) -> io::Result<Vec<String>>;
}

/// One open file.
pub trait File: Send + Sync {
    /// Writes all `pieces` one after the other from byte `at`; the file grows as needed.
    ///
    /// # Errors
    /// A failure of the disk; an unknown part may have been written.
    fn write_at(&self, pieces: &[Bytes], at: u64) -> io::Result<()>;

    /// Makes all bytes written so far, and the size, durable (fdatasync).
    ///
    /// # Errors
    /// A failure of the disk. It must not be tried again: the system may have dropped the
    /// bytes and report success the second time.
    fn sync(&self) -> io::Result<()>;

    /// Reads into `buffer` from byte `at`, as far as the file goes; says how many bytes.
    ///
    /// # Errors
    /// A failure of the disk.
    fn read_at(&self, buffer: &mut [u8], at: u64) -> io::Result<usize>;

    /// Size in bytes.
    ///
    /// # Errors
    /// A failure of the disk.
    fn size(&self) -> io::Result<u64>;

    /// `size` bytes from byte `at`, without copying where the disk can. `capacity` is the size
    /// that the file will never pass. The bytes must never be written again.
    ///
    /// # Errors
    /// `UnexpectedEof` when the file is shorter, or a failure of the disk.
    fn view(&self, at: u64, size: usize, capacity: u64) -> io::Result<Bytes>;

    /// Is there as long as this handle, or bytes of a [`view`](Self::view) that are not a copy.
    fn users(&self) -> Weak<()>;

    /// At most `size` bytes around byte `at`, read at once and past the page cache, and the byte
    /// at which they begin. `None` when the disk cannot do that, or has no buffer for it now.
    ///
    /// # Errors
    /// A failure of the disk.
    fn read_past_cache(&self, _at: u64, _size: usize) -> io::Result<Option<(u64, Bytes)>> {
        Ok(None)
    }
}

/// One open file that takes whole blocks of [`BLOCK_SIZE`].
pub trait BlockFile: Send + Sync {
    /// Writes `blocks` from byte `at`; the file grows as needed. `at`, the size and the address
    /// of `blocks` are multiples of [`BLOCK_SIZE`]. No [`File::write_at`] that touches the same
    /// blocks may be unsynced: a dirty page would hide these bytes from readers or overwrite them.
    ///
    /// # Errors
    /// A failure of the disk; an unknown part may have been written.
    fn write(&self, blocks: &[u8], at: u64) -> io::Result<()>;

    /// As [`File::sync`], for everything written to the file through any handle.
    ///
    /// # Errors
    /// As [`File::sync`].
    fn sync(&self) -> io::Result<()>;

    /// Whether [`Disk::flush`] makes durable what was written here over durable bytes.
    /// Otherwise, and for all other bytes, only a sync of the file does.
    fn flushed_with_disk(&self) -> bool {
        false
    }

    /// The descriptor, where io_uring may use it.
    fn descriptor(&self) -> Option<RawFd> {
        None
    }
}

/// Blocks through the ordinary writes of a file.
struct Buffered(Arc<dyn File>);

impl BlockFile for Buffered {
    fn write(&self, blocks: &[u8], at: u64) -> io::Result<()> {
        self.0.write_at(&[Bytes::copy_from_slice(blocks)], at)
    }

    fn sync(&self) -> io::Result<()> {
        self.0.sync()
    }
}

/// Whether an error of a read says that the device cannot give these bytes, whoever asks and however often:
/// then they are damaged, as bytes that fail their checks are.
pub(crate) fn is_unreadable(error: &io::Error) -> bool {
    const ERRORS: [Errno; 4] = [Errno::IO, Errno::NODATA, Errno::ILSEQ, Errno::BADMSG];
    error.raw_os_error().is_some_and(|code| ERRORS.iter().any(|errno| errno.raw_os_error() == code))
}

/// Reads into `buffer` from byte `at`, as [`File::read_at`]. Of a block that the device cannot read, the bytes are zero
/// where `is_needless` says so.
///
/// # Errors
/// A failure of the disk; bytes that the device cannot read, which are needed.
pub(crate) fn read_around(
    file: &dyn File,
    buffer: &mut [u8],
    at: u64,
    mut is_needless: impl FnMut(Range<u64>) -> bool,
) -> io::Result<usize> {
    match file.read_at(buffer, at) {
        Err(error) if is_unreadable(&error) => {}
        read => return read,
    }
    let whole = usize::try_from(file.size()?.saturating_sub(at)).unwrap_or(usize::MAX).min(buffer.len());
    let mut from = 0;
    while from < whole {
        let begin = at + from as u64;
        let block_end = blocks::round_down(begin) + BLOCK_SIZE as u64;
        let to = usize::try_from(block_end - at).unwrap_or(usize::MAX).min(whole);
        match file.read_at(&mut buffer[from..to], begin) {
            Err(error) if is_unreadable(&error) && is_needless(begin..at + to as u64) => buffer[from..to].fill(0),
            read => drop(read?),
        }
        from = to;
    }
    Ok(whole)
}

/// Joins a directory and a name.
pub(crate) fn join(dir: &str, name: &str) -> String {
    format!("{dir}/{name}")
}

/// Replaces a small file as a whole: after this returns it is durable, before it the old one stands.
/// `points` are crash points: the new file is durable beside the old one; it has the name, which is not durable yet.
pub(crate) fn replace(disk: &dyn Disk, dir: &str, name: &str, bytes: Vec<u8>, points: Points) -> io::Result<()> {
    let (path, fresh) = (join(dir, name), join(dir, &format!("{name}.tmp")));
    let file = disk.create(&fresh)?;
    file.write_at(&[Bytes::from(bytes)], 0)?;
    file.sync()?;
    planted::crash_point(points[0]);
    disk.rename(&fresh, &path)?;
    planted::crash_point(points[1]);
    disk.sync_dir(dir)
}

/// Crash points of [`replace`].
pub(crate) type Points = [&'static str; 2];
pub(crate) const MANIFEST_POINTS: Points = ["manifest-written", "manifest-named"];
pub(crate) const VOTE_POINTS: Points = ["vote-written", "vote-named"];
pub(crate) const CHECKPOINT_POINTS: Points = ["checkpoint-written", "checkpoint-named"];
/// Of the files of the data directory itself.
pub(crate) const STORE_POINTS: Points = ["node-file-written", "node-file-named"];

/// The whole of a small file, at most `size_max` bytes.
pub(crate) fn read_all(disk: &dyn Disk, path: &str, size_max: usize) -> io::Result<Vec<u8>> {
    let file = disk.open(path)?;
    let size = usize::try_from(file.size()?).unwrap_or(usize::MAX);
    if size > size_max {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("{path} has {size} bytes, at most {size_max} make sense"),
        ));
    }
    let mut bytes = vec![0; size];
    let read = file.read_at(&mut bytes, 0)?;
    bytes.truncate(read);
    Ok(bytes)
}
