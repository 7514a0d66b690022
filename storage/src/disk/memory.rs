//! A disk in memory that loses what was not synced, as a power cut does.
//!
//! Files keep the bytes of their last sync and the list of writes since; directories keep the
//! names of their last sync and the list of changes since. [`MemoryDisk::cut`] decides by a
//! seed, for each unsynced write and each unsynced change of a name on its own, whether it
//! reached the disk, did not, or (writes only) reached it in some 512-byte sectors. A flush of
//! the disk makes only those block writes durable that replaced durable bytes: where a file
//! grew, the flush says nothing about its new blocks.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use bytes::Bytes;

use super::{BLOCK_SIZE, BlockFile, Disk, DiskSpace, File, blocks};
use arqon_proto::planted::{self, Bug};

const SECTOR_SIZE: usize = 512;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Node {
    File(usize),
    Dir(usize),
}

#[derive(Clone, Default)]
struct FileData {
    now: Vec<u8>,
    durable: Vec<u8>,
    unsynced: Vec<Write>,
}

#[derive(Clone)]
struct Write {
    at: u64,
    bytes: Vec<u8>,
    kind: WriteKind,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum WriteKind {
    /// Through the page cache.
    Cached,
    /// Whole blocks that make the file grow, or replace bytes that are not durable.
    Blocks,
    /// Whole blocks that replace durable bytes.
    BlocksOver,
}

impl FileData {
    fn write(&mut self, at: u64, bytes: Vec<u8>, kind: WriteKind) {
        put(&mut self.now, at, &bytes);
        self.unsynced.push(Write { at, bytes, kind });
    }

    /// Makes the writes durable for which `takes` holds, in order.
    fn settle(&mut self, takes: impl Fn(&Write) -> bool) {
        for write in std::mem::take(&mut self.unsynced) {
            if takes(&write) {
                put(&mut self.durable, write.at, &write.bytes);
            } else {
                self.unsynced.push(write);
            }
        }
    }
}

#[derive(Clone, Default)]
struct DirData {
    now: BTreeMap<String, Node>,
    durable: BTreeMap<String, Node>,
    /// Names set or removed together since the last sync.
    unsynced: Vec<Vec<(String, Option<Node>)>>,
}

#[derive(Clone, Default)]
struct Contents {
    files: Vec<FileData>,
    dirs: Vec<DirData>,
    locked: Weak<()>,
    /// Counts changes of the disk: writes, syncs and names.
    operation_count: u64,
    power_off_at: Option<u64>,
    /// Raised by a cut: handles of before it fail.
    life: u64,
    /// Bytes that all files together may have.
    capacity: Option<u64>,
    /// Writes that did not fit.
    refused_count: u64,
    /// Syncs say that they are done and do nothing.
    is_lying: bool,
}

/// A disk in memory; clones share it. Every handle has one life, which ends with a cut.
#[derive(Clone)]
pub struct MemoryDisk {
    contents: Arc<Mutex<Contents>>,
    life: u64,
    /// There while this handle or a clone of it has the lock.
    lock: Arc<OnceLock<Arc<()>>>,
}

/// What becomes of each write and change of a name that was not synced when the power goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unsynced {
    /// It is gone.
    Lost,
    /// It is there.
    Kept,
    /// Some 512-byte sectors of a write are there; a name is there or not.
    Torn,
    /// Any of these, each for itself.
    Any,
}

/// A small generator, so that a seed replays a cut exactly (splitmix64, Steele et al. 2014).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

impl Unsynced {
    fn of_write(self, random: &mut Random) -> Self {
        match self {
            Self::Any => [Self::Lost, Self::Kept, Self::Torn][(random.next() % 3) as usize],
            fate => fate,
        }
    }

    fn keeps_name(self, random: &mut Random) -> bool {
        match self {
            Self::Lost => false,
            Self::Kept => true,
            Self::Torn | Self::Any => random.next().is_multiple_of(2),
        }
    }
}

fn power_is_off() -> io::Error {
    io::Error::other("the power of this disk is off")
}

fn not_found(path: &str) -> io::Error {
    io::Error::new(io::ErrorKind::NotFound, format!("{path} is not there"))
}

fn put(data: &mut Vec<u8>, at: u64, bytes: &[u8]) {
    let at = usize::try_from(at).expect("files in memory are small");
    if data.len() < at + bytes.len() {
        data.resize(at + bytes.len(), 0);
    }
    data[at..at + bytes.len()].copy_from_slice(bytes);
}

/// Writes the sectors of a write that the seed lets through.
fn put_torn(data: &mut Vec<u8>, at: u64, bytes: &[u8], random: &mut Random) {
    let mut from = 0;
    while from < bytes.len() {
        let in_sector = (at as usize + from) % SECTOR_SIZE;
        let to = (from + SECTOR_SIZE - in_sector).min(bytes.len());
        if random.next().is_multiple_of(2) {
            put(data, at + from as u64, &bytes[from..to]);
        }
        from = to;
    }
}

impl Default for MemoryDisk {
    fn default() -> Self {
        let mut contents = Contents::default();
        contents.dirs.push(DirData::default());
        Self { contents: Arc::new(Mutex::new(contents)), life: 0, lock: Arc::default() }
    }
}

impl MemoryDisk {
    /// An empty disk.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    fn lock_contents(&self) -> MutexGuard<'_, Contents> {
        self.contents.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes made so far: each write, sync, and change of a name counts one.
    #[must_use]
    pub fn operation_count(&self) -> u64 {
        self.lock_contents().operation_count
    }

    /// From change number `count` on, every operation fails and changes nothing.
    pub fn power_off_at(&self, count: u64) {
        self.lock_contents().power_off_at = Some(count);
    }

    /// What the system does when a sync fails: every write that is not durable counts as written. It is
    /// read back, no later sync makes it durable, and a cut loses it.
    pub fn lose_unsynced(&self) {
        self.lock_contents().files.iter_mut().for_each(|file| file.unsynced.clear());
    }

    /// Bounds the bytes of all files together, from now on; `None`: no bound. A write that would
    /// pass it fails with `StorageFull` and changes nothing.
    pub fn set_capacity(&self, capacity: Option<u64>) {
        self.lock_contents().capacity = capacity;
    }

    /// Cuts the power and turns it on again: returns the disk as the seed says it was found.
    /// All earlier handles and open files fail from now on.
    #[must_use]
    pub fn cut(&self, seed: u64) -> Self {
        self.cut_where(Unsynced::Any, seed)
    }

    /// As [`MemoryDisk::cut`], with one fate for all that was not synced.
    #[must_use]
    pub fn cut_where(&self, unsynced: Unsynced, seed: u64) -> Self {
        let mut random = Random(seed);
        let mut contents = self.lock_contents();
        for file in &mut contents.files {
            let mut found = std::mem::take(&mut file.durable);
            for Write { at, bytes, .. } in std::mem::take(&mut file.unsynced) {
                match unsynced.of_write(&mut random) {
                    Unsynced::Lost => {}
                    Unsynced::Kept => put(&mut found, at, &bytes),
                    Unsynced::Torn | Unsynced::Any => put_torn(&mut found, at, &bytes, &mut random),
                }
            }
            file.now.clone_from(&found);
            file.durable = found;
        }
        for dir in &mut contents.dirs {
            let mut found = std::mem::take(&mut dir.durable);
            for change in std::mem::take(&mut dir.unsynced) {
                if unsynced.keeps_name(&mut random) {
                    apply(&mut found, &change);
                }
            }
            dir.now.clone_from(&found);
            dir.durable = found;
        }
        contents.life += 1;
        contents.locked = Weak::new();
        contents.power_off_at = None;
        Self { contents: Arc::clone(&self.contents), life: contents.life, lock: Arc::default() }
    }

    /// Ends the process that has this disk, at once, as SIGKILL does: all earlier handles and open
    /// files fail from now on, and what was written is there and not synced.
    #[must_use]
    pub fn kill(&self) -> Self {
        let mut contents = self.lock_contents();
        contents.life += 1;
        contents.locked = Weak::new();
        contents.power_off_at = None;
        Self { contents: Arc::clone(&self.contents), life: contents.life, lock: Arc::default() }
    }

    /// The disk as another process sees it: same files, a lock of its own.
    #[must_use]
    pub fn again(&self) -> Self {
        Self { lock: Arc::default(), ..self.clone() }
    }

    /// Another disk with the same contents, synced and unsynced.
    #[must_use]
    pub fn copy_of(disk: &Self) -> Self {
        let contents = Contents { locked: Weak::new(), ..disk.lock_contents().clone() };
        let life = contents.life;
        Self { contents: Arc::new(Mutex::new(contents)), life, lock: Arc::default() }
    }

    /// The bytes of a file now, for tests that damage them.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn bytes(&self, path: &str) -> io::Result<Vec<u8>> {
        let contents = self.lock_contents();
        let file = contents.file(path)?;
        Ok(contents.files[file].now.clone())
    }

    /// Replaces the bytes of a file, durably, without counting as an operation.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn set_bytes(&self, path: &str, bytes: &[u8]) -> io::Result<()> {
        let mut contents = self.lock_contents();
        let file = contents.file(path)?;
        contents.files[file] = FileData { now: bytes.to_vec(), durable: bytes.to_vec(), unsynced: Vec::new() };
        Ok(())
    }

    /// Changes a byte where it lies, in what was synced and in what is read, as a failing medium does. It
    /// counts as no operation, and writes that wait to be synced stay as they are.
    ///
    /// # Errors
    /// `NotFound`; `InvalidInput` behind the end of the file.
    pub fn rot(&self, path: &str, at: u64, byte: u8) -> io::Result<()> {
        let mut contents = self.lock_contents();
        let file = contents.file(path)?;
        let at = usize::try_from(at).map_err(|_| io::ErrorKind::InvalidInput)?;
        let file = &mut contents.files[file];
        *file.now.get_mut(at).ok_or(io::ErrorKind::InvalidInput)? = byte;
        if let Some(durable) = file.durable.get_mut(at) {
            *durable = byte;
        }
        Ok(())
    }

    /// From now on syncs and flushes change nothing and report success, as a bad disk's do: whoever relies on
    /// them loses what was written when the power goes.
    pub fn ignore_syncs(&self) {
        self.lock_contents().is_lying = true;
    }

    /// Writes that were refused because the disk was full.
    #[must_use]
    pub fn refused_count(&self) -> u64 {
        self.lock_contents().refused_count
    }

    fn change(&self) -> io::Result<MutexGuard<'_, Contents>> {
        let mut contents = self.lock_contents();
        contents.check(self.life)?;
        contents.operation_count += 1;
        Ok(contents)
    }

    fn change_names(&self, dir: &str, changes: Vec<(String, Option<Node>)>, contents: &mut Contents) -> io::Result<()> {
        let dir = contents.dir(dir)?;
        apply(&mut contents.dirs[dir].now, &changes);
        contents.dirs[dir].unsynced.push(changes);
        Ok(())
    }

    fn file_at(&self, file: usize) -> Arc<dyn File> {
        Arc::new(MemoryFile { disk: self.clone(), file, user: Arc::default() })
    }
}

fn apply(names: &mut BTreeMap<String, Node>, changes: &[(String, Option<Node>)]) {
    for (name, node) in changes {
        match node {
            Some(node) => names.insert(name.clone(), *node),
            None => names.remove(name),
        };
    }
}

fn split(path: &str) -> (&str, &str) {
    path.rsplit_once('/').unwrap_or(("", path))
}

impl Contents {
    /// Bytes of the files that have a name.
    fn used_size(&self) -> u64 {
        let nodes = self.dirs.iter().flat_map(|dir| dir.now.values());
        let files = nodes.filter_map(|node| if let Node::File(file) = node { Some(*file) } else { None });
        files.map(|file| self.files[file].now.len() as u64).sum()
    }

    /// Whether a file may grow to `end`.
    fn check_room(&mut self, file: usize, end: u64) -> io::Result<()> {
        let Some(capacity) = self.capacity else { return Ok(()) };
        let grows = end.saturating_sub(self.files[file].now.len() as u64);
        if grows > 0 && self.used_size() + grows > capacity {
            self.refused_count += 1;
            return Err(io::ErrorKind::StorageFull.into());
        }
        Ok(())
    }

    fn check(&self, life: u64) -> io::Result<()> {
        if life != self.life || self.power_off_at.is_some_and(|at| self.operation_count >= at) {
            return Err(power_is_off());
        }
        Ok(())
    }

    fn dir(&self, path: &str) -> io::Result<usize> {
        let mut at = 0;
        for part in path.split('/').filter(|part| !part.is_empty() && *part != ".") {
            match self.dirs[at].now.get(part) {
                Some(Node::Dir(dir)) => at = *dir,
                _ => return Err(not_found(path)),
            }
        }
        Ok(at)
    }

    fn node(&self, path: &str) -> io::Result<Node> {
        let (dir, name) = split(path);
        self.dirs[self.dir(dir)?].now.get(name).copied().ok_or_else(|| not_found(path))
    }

    fn file(&self, path: &str) -> io::Result<usize> {
        match self.node(path)? {
            Node::File(file) => Ok(file),
            Node::Dir(_) => Err(io::ErrorKind::IsADirectory.into()),
        }
    }
}

impl Disk for MemoryDisk {
    fn name(&self) -> String {
        "memory".to_owned()
    }

    fn lock(&self, _path: &str) -> io::Result<()> {
        let mut contents = self.lock_contents();
        contents.check(self.life)?;
        if contents.locked.strong_count() > 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        contents.locked = Arc::downgrade(self.lock.get_or_init(Arc::default));
        Ok(())
    }

    fn unlock(&self) {
        let mut contents = self.lock_contents();
        let own = self.lock.get().map(Arc::downgrade);
        if own.is_some_and(|own| own.ptr_eq(&contents.locked)) {
            contents.locked = Weak::new();
        }
    }

    fn open(&self, path: &str) -> io::Result<Arc<dyn File>> {
        let contents = self.lock_contents();
        contents.check(self.life)?;
        Ok(self.file_at(contents.file(path)?))
    }

    fn open_blocks(&self, path: &str) -> io::Result<Arc<dyn BlockFile>> {
        let contents = self.lock_contents();
        contents.check(self.life)?;
        Ok(Arc::new(MemoryFile { disk: self.clone(), file: contents.file(path)?, user: Arc::default() }))
    }

    fn flush(&self) -> io::Result<()> {
        let mut contents = self.change()?;
        if !contents.is_lying {
            contents.files.iter_mut().for_each(|file| file.settle(|write| write.kind == WriteKind::BlocksOver));
        }
        Ok(())
    }

    fn create(&self, path: &str) -> io::Result<Arc<dyn File>> {
        let mut contents = self.change()?;
        let (dir, name) = split(path);
        contents.files.push(FileData::default());
        let file = contents.files.len() - 1;
        self.change_names(dir, vec![(name.to_owned(), Some(Node::File(file)))], &mut contents)?;
        Ok(self.file_at(file))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let mut contents = self.change()?;
        let node = contents.node(from)?;
        let ((dir, old), (to_dir, new)) = (split(from), split(to));
        let (gone, set) = ((old.to_owned(), None), (new.to_owned(), Some(node)));
        if dir == to_dir {
            return self.change_names(dir, vec![gone, set], &mut contents);
        }
        // A power cut may leave both names, or none.
        self.change_names(to_dir, vec![set], &mut contents)?;
        self.change_names(dir, vec![gone], &mut contents)
    }

    fn remove(&self, path: &str) -> io::Result<()> {
        let mut contents = self.change()?;
        contents.file(path)?;
        let (dir, name) = split(path);
        self.change_names(dir, vec![(name.to_owned(), None)], &mut contents)
    }

    fn create_dir(&self, path: &str) -> io::Result<()> {
        let mut contents = self.change()?;
        if contents.dir(path).is_ok() {
            return Ok(());
        }
        let (dir, name) = split(path);
        contents.dirs.push(DirData::default());
        let node = Node::Dir(contents.dirs.len() - 1);
        self.change_names(dir, vec![(name.to_owned(), Some(node))], &mut contents)
    }

    fn remove_dir(&self, path: &str) -> io::Result<()> {
        let mut contents = self.change()?;
        let found = contents.dir(path)?;
        if !contents.dirs[found].now.is_empty() {
            return Err(io::ErrorKind::DirectoryNotEmpty.into());
        }
        let (dir, name) = split(path);
        self.change_names(dir, vec![(name.to_owned(), None)], &mut contents)
    }

    fn sync_dir(&self, path: &str) -> io::Result<()> {
        let mut contents = self.change()?;
        let found = contents.dir(path)?;
        if contents.is_lying || planted::has(Bug::NoDirectorySync) {
            return Ok(());
        }
        let dir = &mut contents.dirs[found];
        dir.durable.clone_from(&dir.now);
        dir.unsynced.clear();
        Ok(())
    }

    fn space(&self) -> io::Result<DiskSpace> {
        let contents = self.lock_contents();
        contents.check(self.life)?;
        let space = |total_size: u64| {
            let free_size = total_size.saturating_sub(contents.used_size());
            DiskSpace { free_size, total_size }
        };
        Ok(contents.capacity.map_or(DiskSpace::UNLIMITED, space))
    }

    fn list(&self, path: &str) -> io::Result<Vec<String>> {
        let contents = self.lock_contents();
        contents.check(self.life)?;
        let dir = contents.dir(path)?;
        Ok(contents.dirs[dir].now.keys().cloned().collect())
    }
}

struct MemoryFile {
    disk: MemoryDisk,
    file: usize,
    user: Arc<()>,
}

impl File for MemoryFile {
    fn write_at(&self, pieces: &[Bytes], at: u64) -> io::Result<()> {
        let bytes = pieces.concat();
        let mut contents = self.disk.change()?;
        contents.check_room(self.file, at + bytes.len() as u64)?;
        contents.files[self.file].write(at, bytes, WriteKind::Cached);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        let mut contents = self.disk.change()?;
        if !contents.is_lying {
            contents.files[self.file].settle(|_| true);
        }
        Ok(())
    }

    fn read_at(&self, buffer: &mut [u8], at: u64) -> io::Result<usize> {
        let contents = self.disk.lock_contents();
        contents.check(self.disk.life)?;
        let data = &contents.files[self.file].now;
        let from = usize::try_from(at).unwrap_or(usize::MAX).min(data.len());
        let size = buffer.len().min(data.len() - from);
        buffer[..size].copy_from_slice(&data[from..from + size]);
        Ok(size)
    }

    fn size(&self) -> io::Result<u64> {
        let contents = self.disk.lock_contents();
        contents.check(self.disk.life)?;
        Ok(contents.files[self.file].now.len() as u64)
    }

    fn view(&self, at: u64, size: usize, _capacity: u64) -> io::Result<Bytes> {
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
        let from = blocks::round_down(at);
        let mut bytes = vec![0; size.next_multiple_of(BLOCK_SIZE)];
        let read = self.read_at(&mut bytes, from)?;
        bytes.truncate(read);
        Ok(Some((from, bytes.into())))
    }
}

impl BlockFile for MemoryFile {
    fn write(&self, blocks: &[u8], at: u64) -> io::Result<()> {
        let (size, end) = (blocks.len(), at + blocks.len() as u64);
        assert!(size.is_multiple_of(BLOCK_SIZE) && at.is_multiple_of(BLOCK_SIZE as u64), "whole blocks only");
        assert!((blocks.as_ptr() as usize).is_multiple_of(BLOCK_SIZE), "blocks are aligned in memory");
        let mut contents = self.disk.change()?;
        contents.check_room(self.file, end)?;
        let file = &mut contents.files[self.file];
        let dirty = file.unsynced.iter().filter(|write| write.kind == WriteKind::Cached);
        let mut overlaps = dirty.map(|write| write.at < end && at < write.at + write.bytes.len() as u64);
        assert!(!overlaps.any(|overlaps| overlaps), "blocks were written over a dirty page");
        let over = end <= file.durable.len() as u64;
        file.write(at, blocks.to_vec(), if over { WriteKind::BlocksOver } else { WriteKind::Blocks });
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        File::sync(self)
    }

    fn flushed_with_disk(&self) -> bool {
        true
    }
}
