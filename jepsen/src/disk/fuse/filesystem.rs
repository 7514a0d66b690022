//! The file system that the kernel asks: a [`Volume`], and the trouble that it is told to make.

use std::{
    ffi::OsStr,
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, SystemTime},
};

use fuser::{
    AccessFlags, BsdFileFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo,
    KernelConfig, LockOwner, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty,
    ReplyEntry, ReplyOpen, ReplyStatfs, ReplyWrite, Request, TimeOrNow, WriteFlags,
};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use serde::{Deserialize, Serialize};

use super::volume::{Attributes, CAPACITY, PAGE_SIZE, Volume};

/// How long the kernel may believe what it was told; nobody else changes anything.
const BELIEF_TIME: Duration = Duration::from_secs(60);
/// Bytes of one write, at most.
const WRITE_SIZE_MAX: u32 = 1 << 20;
/// Bits of fallocate(2).
const KEEP_SIZE: i32 = 1;
const PUNCH_HOLE: i32 = 2;
const ZERO_RANGE: i32 = 16;

/// What goes wrong from now on. The default is nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trouble {
    /// Of a hundred writes, so many fail with EIO.
    pub write_errors_percent: u8,
    /// Of a hundred fsyncs, so many fail with EIO, and what they were to save is lost.
    pub sync_errors_percent: u8,
    /// No byte fits any more; what is there can be written over.
    pub full: bool,
    /// Of a hundred reads, so many have one bit flipped.
    pub rot_percent: u8,
    /// Reads, writes and fsyncs take so many milliseconds longer, at least.
    pub delay_ms_min: u32,
    /// And at most.
    pub delay_ms_max: u32,
    /// Chooses which.
    pub seed: u64,
}

/// How often what went wrong.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    pub write_errors: u64,
    pub sync_errors: u64,
    pub full_errors: u64,
    /// Questions for the free space, answered with none.
    pub full_looks: u64,
    pub rotten_reads: u64,
    pub delays: u64,
}

/// What the threads of the file system and those of its control share.
pub struct Shared {
    state: Mutex<State>,
}

pub struct State {
    pub volume: Volume,
    pub trouble: Trouble,
    pub counters: Counters,
    /// Without power nothing is answered but errors, and nothing changes.
    pub is_off: bool,
    random: StdRng,
}

impl Shared {
    pub fn new(volume: Volume) -> Arc<Self> {
        let (trouble, counters) = (Trouble::default(), Counters::default());
        let random = StdRng::seed_from_u64(0);
        Arc::new(Self { state: Mutex::new(State { volume, trouble, counters, is_off: false, random }) })
    }

    pub fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    pub fn set_trouble(&mut self, trouble: Trouble) {
        (self.trouble, self.counters) = (trouble, Counters::default());
        self.random = StdRng::seed_from_u64(trouble.seed);
    }

    fn strikes(&mut self, percent: u8) -> bool {
        percent > 0 && self.random.random_range(0..100) < percent
    }

    fn powered(&self) -> io::Result<()> {
        if self.is_off { Err(rustix::io::Errno::IO.into()) } else { Ok(()) }
    }

    fn check_write(&mut self, number: u64, end: u64) -> io::Result<()> {
        self.powered()?;
        if self.strikes(self.trouble.write_errors_percent) {
            self.counters.write_errors += 1;
            return Err(rustix::io::Errno::IO.into());
        }
        if self.trouble.full && end > self.volume.attributes(number)?.size {
            self.counters.full_errors += 1;
            return Err(rustix::io::Errno::NOSPC.into());
        }
        Ok(())
    }

    fn sync(&mut self, number: u64) -> io::Result<()> {
        self.powered()?;
        if self.strikes(self.trouble.sync_errors_percent) {
            self.counters.sync_errors += 1;
            self.volume.fail_sync(number)?;
            return Err(rustix::io::Errno::IO.into());
        }
        self.volume.sync_file(number)
    }

    fn read(&mut self, number: u64, offset: u64, size: usize) -> io::Result<Vec<u8>> {
        self.powered()?;
        let mut bytes = self.volume.read(number, offset, size)?;
        if !bytes.is_empty() && self.strikes(self.trouble.rot_percent) {
            let bit = self.random.random_range(0..bytes.len() * 8);
            bytes[bit / 8] ^= 1 << (bit % 8);
            self.counters.rotten_reads += 1;
        }
        Ok(bytes)
    }

    fn allocate(&mut self, number: u64, offset: u64, size: u64, mode: i32) -> io::Result<()> {
        let end = offset.saturating_add(size);
        self.check_write(number, end)?;
        match mode {
            PUNCH_HOLE.. if mode & !(KEEP_SIZE | PUNCH_HOLE | ZERO_RANGE) == 0 => {
                self.volume.zero(number, offset, size)?;
            }
            0 | KEEP_SIZE => {}
            _ => return Err(rustix::io::Errno::OPNOTSUPP.into()),
        }
        if mode & KEEP_SIZE == 0 && end > self.volume.attributes(number)?.size {
            self.volume.resize(number, end)?;
        }
        Ok(())
    }
}

/// What fuser calls.
pub struct Served(pub Arc<Shared>);

impl Served {
    /// Takes as long as a slow disk does; others may go on meanwhile.
    fn wait(&self) {
        let mut state = self.0.lock();
        let Trouble { delay_ms_min, delay_ms_max, .. } = state.trouble;
        if delay_ms_max == 0 || state.is_off {
            return;
        }
        let delay = state.random.random_range(delay_ms_min.min(delay_ms_max)..=delay_ms_max);
        state.counters.delays += 1;
        drop(state);
        thread::sleep(Duration::from_millis(u64::from(delay)));
    }

    fn find(&self, directory: INodeNo, name: &OsStr) -> io::Result<FileAttr> {
        let state = self.0.lock();
        state.powered()?;
        let number = state.volume.lookup(directory.0, name)?;
        state.volume.attributes(number).map(attributes)
    }

    fn make(&self, directory: INodeNo, name: &OsStr, mode: u32, is_directory: bool) -> io::Result<FileAttr> {
        let mut state = self.0.lock();
        state.powered()?;
        if state.trouble.full {
            state.counters.full_errors += 1;
            return Err(rustix::io::Errno::NOSPC.into());
        }
        let number = state.volume.make(directory.0, name, mode & 0o7777, is_directory)?;
        state.volume.attributes(number).map(attributes)
    }

    fn set(&self, number: INodeNo, mode: Option<u32>, size: Option<u64>) -> io::Result<FileAttr> {
        let mut state = self.0.lock();
        if let Some(size) = size {
            state.check_write(number.0, size)?;
            state.volume.resize(number.0, size)?;
        }
        if let Some(mode) = mode {
            state.powered()?;
            state.volume.set_mode(number.0, mode & 0o7777)?;
        }
        state.volume.attributes(number.0).map(attributes)
    }

    /// One thing under the lock, with power.
    fn with<T>(&self, act: impl FnOnce(&mut State) -> io::Result<T>) -> io::Result<T> {
        let mut state = self.0.lock();
        state.powered()?;
        act(&mut state)
    }
}

fn attributes(of: Attributes) -> FileAttr {
    FileAttr {
        ino: INodeNo(of.number),
        size: of.size,
        blocks: of.size.div_ceil(512),
        atime: of.changed,
        mtime: of.changed,
        ctime: of.changed,
        crtime: of.changed,
        kind: kind(of.is_directory),
        perm: (of.mode & 0o7777) as u16,
        nlink: 1,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: PAGE_SIZE as u32,
        flags: 0,
    }
}

fn kind(is_directory: bool) -> FileType {
    if is_directory { FileType::Directory } else { FileType::RegularFile }
}

fn entry(result: io::Result<FileAttr>, reply: ReplyEntry) {
    match result {
        Ok(found) => reply.entry(&BELIEF_TIME, &found, Generation(0)),
        Err(error) => reply.error(error.into()),
    }
}

fn attr(result: io::Result<FileAttr>, reply: ReplyAttr) {
    match result {
        Ok(found) => reply.attr(&BELIEF_TIME, &found),
        Err(error) => reply.error(error.into()),
    }
}

fn empty(result: io::Result<()>, reply: ReplyEmpty) {
    match result {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(error.into()),
    }
}

impl Filesystem for Served {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // A smaller limit of the kernel is as good.
        let _ = config.set_max_write(WRITE_SIZE_MAX);
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        entry(self.find(parent, name), reply);
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        attr(self.with(|state| state.volume.attributes(ino.0).map(attributes)), reply);
    }

    fn setattr(
        &self,
        _: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        _: Option<u32>,
        _: Option<u32>,
        size: Option<u64>,
        _: Option<TimeOrNow>,
        _: Option<TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        attr(self.set(ino, mode, size), reply);
    }

    fn mkdir(&self, _: &Request, parent: INodeNo, name: &OsStr, mode: u32, umask: u32, reply: ReplyEntry) {
        entry(self.make(parent, name, mode & !umask, true), reply);
    }

    fn create(&self, _: &Request, parent: INodeNo, name: &OsStr, mode: u32, umask: u32, _: i32, reply: ReplyCreate) {
        let made = self.make(parent, name, mode & !umask, false);
        match made.and_then(|made| self.with(|state| state.volume.open(made.ino.0)).map(|()| made)) {
            Ok(made) => reply.created(&BELIEF_TIME, &made, Generation(0), FileHandle(made.ino.0), FopenFlags::empty()),
            Err(error) => reply.error(error.into()),
        }
    }

    fn unlink(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        empty(self.with(|state| state.volume.remove(parent.0, name, false)), reply);
    }

    fn rmdir(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        empty(self.with(|state| state.volume.remove(parent.0, name, true)), reply);
    }

    fn rename(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        newparent: INodeNo,
        newname: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        if flags.contains(RenameFlags::RENAME_EXCHANGE) || flags.contains(RenameFlags::RENAME_WHITEOUT) {
            return reply.error(Errno::EINVAL);
        }
        let keep_existing = flags.contains(RenameFlags::RENAME_NOREPLACE);
        let renamed = self.with(|state| state.volume.rename((parent.0, name), (newparent.0, newname), keep_existing));
        empty(renamed, reply);
    }

    fn link(&self, _: &Request, ino: INodeNo, newparent: INodeNo, newname: &OsStr, reply: ReplyEntry) {
        let linked = self.with(|state| {
            state.volume.link(ino.0, newparent.0, newname)?;
            state.volume.attributes(ino.0).map(attributes)
        });
        entry(linked, reply);
    }

    fn open(&self, _: &Request, ino: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        match self.with(|state| state.volume.open(ino.0)) {
            // What the kernel has of the file stays true.
            Ok(()) => reply.opened(FileHandle(ino.0), FopenFlags::FOPEN_KEEP_CACHE),
            Err(error) => reply.error(error.into()),
        }
    }

    fn release(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        self.0.lock().volume.close(ino.0);
        reply.ok();
    }

    fn read(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        self.wait();
        match self.0.lock().read(ino.0, offset, size as usize) {
            Ok(bytes) => reply.data(&bytes),
            Err(error) => reply.error(error.into()),
        }
    }

    fn write(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        self.wait();
        let mut state = self.0.lock();
        let checked = state.check_write(ino.0, offset + data.len() as u64);
        match checked.and_then(|()| state.volume.write(ino.0, offset, data)) {
            Ok(()) => reply.written(data.len() as u32),
            Err(error) => reply.error(error.into()),
        }
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fsync(&self, _: &Request, ino: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        self.wait();
        empty(self.0.lock().sync(ino.0), reply);
    }

    fn fsyncdir(&self, _: &Request, ino: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        self.wait();
        let synced = self.with(|state| {
            if state.strikes(state.trouble.sync_errors_percent) {
                state.counters.sync_errors += 1;
                return Err(rustix::io::Errno::IO.into());
            }
            state.volume.sync_directory(ino.0)
        });
        empty(synced, reply);
    }

    fn fallocate(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        self.wait();
        empty(self.0.lock().allocate(ino.0, offset, length, mode), reply);
    }

    fn readdir(&self, _: &Request, ino: INodeNo, _: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let listed = self.with(|state| {
            let names = state.volume.list(ino.0)?.into_iter();
            names
                .map(|(name, number)| Ok((name, number, state.volume.attributes(number)?.is_directory)))
                .collect::<io::Result<Vec<_>>>()
        });
        let names = match listed {
            Ok(names) => names,
            Err(error) => return reply.error(error.into()),
        };
        let dots = [(".".into(), ino.0, true), ("..".into(), ino.0, true)];
        for (index, (name, number, is_directory)) in dots.into_iter().chain(names).enumerate().skip(offset as usize) {
            if reply.add(INodeNo(number), index as u64 + 1, kind(is_directory), name) {
                break;
            }
        }
        reply.ok();
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        let mut state = self.0.lock();
        state.counters.full_looks += u64::from(state.trouble.full);
        let page = PAGE_SIZE as u64;
        let free = if state.trouble.full { 0 } else { CAPACITY.saturating_sub(state.volume.used()) / page };
        reply.statfs(CAPACITY / page, free, free, 1 << 20, 1 << 20, PAGE_SIZE as u32, 255, PAGE_SIZE as u32);
    }

    fn access(&self, _: &Request, _: INodeNo, _: AccessFlags, reply: ReplyEmpty) {
        reply.ok();
    }
}
