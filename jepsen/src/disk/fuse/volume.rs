//! What a disk holds, and what it would hold if the power went now.
//!
//! ```text
//!   file       bytes in STORE/NUMBER, as a reader sees them
//!              undo: what stood in a page (4 KiB) at the last fsync of the file, for each page changed since
//!   directory  names as a reader sees them
//!              changes: made since the last fsync of the directory, in their order
//! ```
//!
//! A cut decides by a seed, page by page, whether a change since the last fsync is kept, lost, or torn (its
//! sectors of 512 bytes one by one), and for each directory how many of its changes are kept: always the
//! first ones. A rename is one change. An fsync of a file says nothing about its name, as in POSIX.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    ffi::{OsStr, OsString},
    fs::{self, File},
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    time::SystemTime,
};

use rand::{RngExt, SeedableRng, rngs::StdRng};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

/// Bytes that are lost or kept together, or torn.
pub const PAGE_SIZE: usize = 4096;
/// Bytes that a disk writes as a whole.
const SECTOR_SIZE: usize = 512;
/// The number of the root directory.
pub const ROOT: u64 = 1;
/// What the disk says it holds, in bytes.
pub const CAPACITY: u64 = 8 << 30;

/// What stood in a page before; `None` for zeroes.
type Page = Option<Box<[u8]>>;
type Names = BTreeMap<OsString, u64>;

/// A regular file.
struct Content {
    file: File,
    size: u64,
    /// The size at the last fsync.
    synced_size: u64,
    undo: BTreeMap<u64, Page>,
    /// Pages whose fsync failed: a reader sees the new bytes, and no later fsync writes them.
    doomed: BTreeMap<u64, Page>,
    opened: u64,
}

enum Body {
    File(Content),
    Directory(Names),
}

struct Node {
    body: Body,
    mode: u32,
    changed: SystemTime,
}

/// A change of names, which is kept or lost as a whole.
struct Change {
    directories: Vec<u64>,
    /// In this directory this name now means this, or nothing.
    entries: Vec<(u64, OsString, Option<u64>)>,
}

/// What is asked most often about a file or directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attributes {
    pub number: u64,
    pub size: u64,
    pub is_directory: bool,
    pub mode: u32,
    pub changed: SystemTime,
}

/// What a cut took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lost {
    /// Bytes that differ from what a reader saw before.
    pub bytes: u64,
    /// Pages of which some sectors were kept and others lost.
    pub torn: u64,
    /// Creations, renames and deletions.
    pub names: u64,
}

/// Files and directories, as they are and as they would be.
pub struct Volume {
    store: PathBuf,
    nodes: HashMap<u64, Node>,
    /// The names that a cut cannot take.
    synced: HashMap<u64, Names>,
    changes: Vec<Change>,
    next: u64,
}

fn missing() -> io::Error {
    Errno::NOENT.into()
}

fn pages(offset: u64, size: u64) -> std::ops::Range<u64> {
    offset / PAGE_SIZE as u64..(offset + size).div_ceil(PAGE_SIZE as u64)
}

impl Content {
    /// The page as it is; shorter reads at the end are filled up with zeroes.
    fn page(&self, page: u64) -> io::Result<Page> {
        if page * PAGE_SIZE as u64 >= self.size {
            return Ok(None);
        }
        let mut bytes = vec![0; PAGE_SIZE].into_boxed_slice();
        read_up_to(&self.file, &mut bytes, page * PAGE_SIZE as u64)?;
        Ok(bytes.iter().any(|byte| *byte != 0).then_some(bytes))
    }

    /// Remembers what stands in these pages, once between two fsyncs.
    fn remember(&mut self, range: std::ops::Range<u64>) -> io::Result<()> {
        for page in range {
            if let Some(before) = self.doomed.remove(&page) {
                self.undo.insert(page, before);
            } else if !self.undo.contains_key(&page) {
                let before = self.page(page)?;
                self.undo.insert(page, before);
            }
        }
        Ok(())
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.remember(pages(offset, bytes.len() as u64))?;
        self.file.write_all_at(bytes, offset)?;
        self.size = self.size.max(offset + bytes.len() as u64);
        Ok(())
    }

    fn resize(&mut self, size: u64) -> io::Result<()> {
        if size < self.size {
            self.remember(pages(size, self.size - size))?;
        }
        self.file.set_len(size)?;
        self.size = size;
        Ok(())
    }

    fn cut(&mut self, random: &mut StdRng, lost: &mut Lost) -> io::Result<()> {
        let size = if random.random_bool(0.5) { self.size } else { self.synced_size };
        lost.bytes += self.size.saturating_sub(size);
        self.file.set_len(self.size.max(size))?;
        let fates: Vec<(u64, Page, f64)> = std::mem::take(&mut self.undo)
            .into_iter()
            .map(|(page, before)| (page, before, random.random_range(0.0..1.0)))
            .chain(std::mem::take(&mut self.doomed).into_iter().map(|(page, before)| (page, before, 1.0)))
            .collect();
        for (page, before, fate) in fates {
            // A third each: kept, torn, lost.
            if fate < 0.33 {
                continue;
            }
            let is_torn = fate < 0.66;
            lost.torn += u64::from(is_torn);
            let at = page * PAGE_SIZE as u64;
            let mut now = vec![0; PAGE_SIZE];
            read_up_to(&self.file, &mut now, at)?;
            let zeroes = vec![0; PAGE_SIZE];
            let before = before.as_deref().unwrap_or(&zeroes);
            for sector in (0..PAGE_SIZE).step_by(SECTOR_SIZE) {
                if is_torn && random.random_bool(0.5) {
                    continue;
                }
                let range = sector..sector + SECTOR_SIZE;
                lost.bytes +=
                    now[range.clone()].iter().zip(&before[range.clone()]).filter(|(a, b)| a != b).count() as u64;
                now[range.clone()].copy_from_slice(&before[range]);
            }
            self.file.write_all_at(&now, at)?;
        }
        self.file.set_len(size)?;
        (self.size, self.synced_size, self.opened) = (size, size, 0);
        Ok(())
    }
}

fn read_up_to(file: &File, bytes: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut done = 0;
    while done < bytes.len() {
        match file.read_at(&mut bytes[done..], offset + done as u64)? {
            0 => break,
            count => done += count,
        }
    }
    Ok(done)
}

impl Volume {
    /// An empty disk whose bytes lie in `store`, a directory of its own.
    ///
    /// # Errors
    /// The directory cannot be made.
    pub fn create(store: &Path) -> io::Result<Self> {
        fs::create_dir_all(store)?;
        let root = Node { body: Body::Directory(Names::new()), mode: 0o755, changed: SystemTime::now() };
        Ok(Self {
            store: store.to_owned(),
            nodes: HashMap::from([(ROOT, root)]),
            synced: HashMap::from([(ROOT, Names::new())]),
            changes: Vec::new(),
            next: ROOT + 1,
        })
    }

    fn node(&self, number: u64) -> io::Result<&Node> {
        self.nodes.get(&number).ok_or_else(missing)
    }

    fn names(&self, number: u64) -> io::Result<&Names> {
        match &self.node(number)?.body {
            Body::Directory(names) => Ok(names),
            Body::File(_) => Err(Errno::NOTDIR.into()),
        }
    }

    fn content(&mut self, number: u64) -> io::Result<&mut Content> {
        let node = self.nodes.get_mut(&number).ok_or_else(missing)?;
        match &mut node.body {
            Body::File(content) => Ok(content),
            Body::Directory(_) => Err(Errno::ISDIR.into()),
        }
    }

    /// Number of what `name` in a directory is.
    ///
    /// # Errors
    /// There is no such name.
    pub fn lookup(&self, directory: u64, name: &OsStr) -> io::Result<u64> {
        self.names(directory)?.get(name).copied().ok_or_else(missing)
    }

    /// Attributes of a file or directory.
    ///
    /// # Errors
    /// It is gone.
    pub fn attributes(&self, number: u64) -> io::Result<Attributes> {
        let node = self.node(number)?;
        let (size, is_directory) = match &node.body {
            Body::File(content) => (content.size, false),
            Body::Directory(_) => (PAGE_SIZE as u64, true),
        };
        Ok(Attributes { number, size, is_directory, mode: node.mode, changed: node.changed })
    }

    /// Names and numbers in a directory.
    ///
    /// # Errors
    /// It is none.
    pub fn list(&self, directory: u64) -> io::Result<Vec<(OsString, u64)>> {
        Ok(self.names(directory)?.iter().map(|(name, number)| (name.clone(), *number)).collect())
    }

    /// Bytes of all files.
    #[must_use]
    pub fn used(&self) -> u64 {
        let sizes = self.nodes.values().map(|node| if let Body::File(content) = &node.body { content.size } else { 0 });
        sizes.sum()
    }

    /// A new file or directory; its name is not safe before an fsync of `directory`.
    ///
    /// # Errors
    /// The name is there already, or the store refuses.
    pub fn make(&mut self, directory: u64, name: &OsStr, mode: u32, is_directory: bool) -> io::Result<u64> {
        if self.names(directory)?.contains_key(name) {
            return Err(Errno::EXIST.into());
        }
        let number = self.next;
        let body = if is_directory {
            self.synced.insert(number, Names::new());
            Body::Directory(Names::new())
        } else {
            let path = self.store.join(number.to_string());
            let file = File::options().read(true).write(true).create_new(true).open(path)?;
            let (undo, doomed) = (BTreeMap::new(), BTreeMap::new());
            Body::File(Content { file, size: 0, synced_size: 0, undo, doomed, opened: 0 })
        };
        self.next += 1;
        self.nodes.insert(number, Node { body, mode, changed: SystemTime::now() });
        self.change(vec![(directory, name.to_owned(), Some(number))]);
        Ok(number)
    }

    /// Takes a name away.
    ///
    /// # Errors
    /// It is not there, or a directory that is not empty.
    pub fn remove(&mut self, directory: u64, name: &OsStr, is_directory: bool) -> io::Result<()> {
        let number = self.lookup(directory, name)?;
        match (&self.node(number)?.body, is_directory) {
            (Body::Directory(_), false) => return Err(Errno::ISDIR.into()),
            (Body::File(_), true) => return Err(Errno::NOTDIR.into()),
            (Body::Directory(names), true) if !names.is_empty() => {
                return Err(Errno::NOTEMPTY.into());
            }
            _ => {}
        }
        self.change(vec![(directory, name.to_owned(), None)]);
        Ok(())
    }

    /// Gives a thing another name; what had that name loses it.
    ///
    /// # Errors
    /// The name is not there, or the new one is there and must not be.
    pub fn rename(&mut self, from: (u64, &OsStr), to: (u64, &OsStr), keep_existing: bool) -> io::Result<()> {
        let number = self.lookup(from.0, from.1)?;
        match self.lookup(to.0, to.1) {
            Ok(_) if keep_existing => return Err(Errno::EXIST.into()),
            Ok(there) if there == number => return Ok(()),
            _ => {}
        }
        self.change(vec![(from.0, from.1.to_owned(), None), (to.0, to.1.to_owned(), Some(number))]);
        Ok(())
    }

    /// A second name for a file.
    ///
    /// # Errors
    /// The name is there already.
    pub fn link(&mut self, number: u64, directory: u64, name: &OsStr) -> io::Result<()> {
        self.node(number)?;
        if self.names(directory)?.contains_key(name) {
            return Err(Errno::EXIST.into());
        }
        self.change(vec![(directory, name.to_owned(), Some(number))]);
        Ok(())
    }

    fn change(&mut self, entries: Vec<(u64, OsString, Option<u64>)>) {
        let directories = entries.iter().map(|(directory, ..)| *directory).collect();
        for (directory, name, number) in &entries {
            if let Some(Node { body: Body::Directory(names), changed, .. }) = self.nodes.get_mut(directory) {
                apply(names, name, *number);
                *changed = SystemTime::now();
            }
        }
        self.changes.push(Change { directories, entries });
    }

    /// Up to `size` bytes from `offset` on.
    ///
    /// # Errors
    /// No such file, or the store refuses.
    pub fn read(&mut self, number: u64, offset: u64, size: usize) -> io::Result<Vec<u8>> {
        let content = self.content(number)?;
        let size = (size as u64).min(content.size.saturating_sub(offset)) as usize;
        let mut bytes = vec![0; size];
        read_up_to(&content.file, &mut bytes, offset)?;
        Ok(bytes)
    }

    /// Writes bytes, which are not safe before an fsync of the file.
    ///
    /// # Errors
    /// No such file, or the store refuses.
    pub fn write(&mut self, number: u64, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.content(number)?.write(offset, bytes)?;
        self.touch(number);
        Ok(())
    }

    /// Cuts a file off, or fills it up with zeroes.
    ///
    /// # Errors
    /// No such file, or the store refuses.
    pub fn resize(&mut self, number: u64, size: u64) -> io::Result<()> {
        self.content(number)?.resize(size)?;
        self.touch(number);
        Ok(())
    }

    /// Zeroes in a range, without a change of the size.
    ///
    /// # Errors
    /// No such file, or the store refuses.
    pub fn zero(&mut self, number: u64, offset: u64, size: u64) -> io::Result<()> {
        let content = self.content(number)?;
        let mut at = offset;
        let end = offset.saturating_add(size).min(content.size);
        let zeroes = vec![0; 1 << 20];
        while at < end {
            let count = (end - at).min(zeroes.len() as u64) as usize;
            content.write(at, &zeroes[..count])?;
            at += count as u64;
        }
        Ok(())
    }

    fn touch(&mut self, number: u64) {
        if let Some(node) = self.nodes.get_mut(&number) {
            node.changed = SystemTime::now();
        }
    }

    /// Sets the permission bits; they are never lost.
    ///
    /// # Errors
    /// It is gone.
    pub fn set_mode(&mut self, number: u64, mode: u32) -> io::Result<()> {
        self.nodes.get_mut(&number).ok_or_else(missing)?.mode = mode;
        Ok(())
    }

    /// An open file keeps its bytes without a name.
    ///
    /// # Errors
    /// No such file.
    pub fn open(&mut self, number: u64) -> io::Result<()> {
        self.content(number)?.opened += 1;
        Ok(())
    }

    /// The end of [`Volume::open`].
    pub fn close(&mut self, number: u64) {
        if let Ok(content) = self.content(number) {
            content.opened = content.opened.saturating_sub(1);
        }
    }

    /// The bytes and the size of a file are safe from now on.
    ///
    /// # Errors
    /// No such file.
    pub fn sync_file(&mut self, number: u64) -> io::Result<()> {
        let content = self.content(number)?;
        content.undo.clear();
        content.synced_size = content.size;
        Ok(())
    }

    /// What an fsync does that fails: the changes will never be safe, unless they are written once more.
    ///
    /// # Errors
    /// No such file.
    pub fn fail_sync(&mut self, number: u64) -> io::Result<()> {
        let content = self.content(number)?;
        let mut undo = std::mem::take(&mut content.undo);
        content.doomed.append(&mut undo);
        Ok(())
    }

    /// The names in a directory are safe from now on, and so is what they depend on.
    ///
    /// # Errors
    /// It is no directory.
    pub fn sync_directory(&mut self, directory: u64) -> io::Result<()> {
        self.names(directory)?;
        let mut needed = BTreeSet::from([directory]);
        let mut kept = Vec::new();
        for change in std::mem::take(&mut self.changes).into_iter().rev() {
            let is_needed = change.directories.iter().any(|directory| needed.contains(directory));
            if is_needed {
                needed.extend(&change.directories);
            }
            kept.push((change, is_needed));
        }
        for (change, is_needed) in kept.into_iter().rev() {
            if is_needed { self.make_safe(&change) } else { self.changes.push(change) }
        }
        self.forget_unnamed()
    }

    fn make_safe(&mut self, change: &Change) {
        for (directory, name, number) in &change.entries {
            if let Some(names) = self.synced.get_mut(directory) {
                apply(names, name, *number);
            }
        }
    }

    /// Deletes what no name means any more, now or after a cut, and nobody has open.
    fn forget_unnamed(&mut self) -> io::Result<()> {
        let mut named = BTreeSet::from([ROOT]);
        for node in self.nodes.values() {
            if let Body::Directory(names) = &node.body {
                named.extend(names.values());
            }
        }
        named.extend(self.synced.values().flat_map(BTreeMap::values));
        named.extend(self.changes.iter().flat_map(|change| &change.entries).filter_map(|(_, _, number)| *number));
        let unnamed = |(number, node): (&u64, &Node)| {
            let is_open = matches!(&node.body, Body::File(content) if content.opened > 0);
            (!is_open && !named.contains(number)).then_some(*number)
        };
        let gone: Vec<u64> = self.nodes.iter().filter_map(unnamed).collect();
        for number in gone {
            self.synced.remove(&number);
            if let Some(Node { body: Body::File(_), .. }) = self.nodes.remove(&number) {
                fs::remove_file(self.store.join(number.to_string()))?;
            }
        }
        Ok(())
    }

    /// The power goes: what was not safe is kept, lost or torn, as `seed` says. Nothing may be open.
    ///
    /// # Errors
    /// The store refuses.
    pub fn cut(&mut self, seed: u64) -> io::Result<Lost> {
        let mut random = StdRng::seed_from_u64(seed);
        let mut lost = Lost::default();
        // By number, so that a seed means the same every time.
        let mut numbers: Vec<u64> = self.nodes.keys().copied().collect();
        numbers.sort_unstable();
        for number in numbers {
            if let Ok(content) = self.content(number) {
                content.cut(&mut random, &mut lost)?;
            }
        }
        let mut ended: BTreeSet<u64> = BTreeSet::new();
        for change in std::mem::take(&mut self.changes) {
            let follows = change.directories.iter().any(|directory| ended.contains(directory));
            if follows || random.random_bool(0.3) {
                ended.extend(&change.directories);
                lost.names += 1;
            } else {
                self.make_safe(&change);
            }
        }
        for (number, names) in &self.synced {
            if let Some(Node { body: Body::Directory(now), .. }) = self.nodes.get_mut(number) {
                now.clone_from(names);
            }
        }
        self.forget_unnamed()?;
        Ok(lost)
    }
}

fn apply(names: &mut Names, name: &OsStr, number: Option<u64>) {
    match number {
        Some(number) => names.insert(name.to_owned(), number),
        None => names.remove(name),
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> &OsStr {
        OsStr::new(text)
    }

    fn volume() -> (tempfile::TempDir, Volume) {
        let dir = tempfile::tempdir().unwrap();
        let volume = Volume::create(&dir.path().join("store")).unwrap();
        (dir, volume)
    }

    #[test]
    fn what_was_synced_survives_every_cut() {
        for seed in 0..50 {
            let (_dir, mut volume) = volume();
            let file = volume.make(ROOT, name("a"), 0o644, false).unwrap();
            volume.write(file, 0, &[1; 10_000]).unwrap();
            volume.sync_file(file).unwrap();
            volume.sync_directory(ROOT).unwrap();
            volume.write(file, 20_000, &[2; 5_000]).unwrap();
            volume.cut(seed).unwrap();
            let file = volume.lookup(ROOT, name("a")).unwrap();
            assert_eq!(volume.read(file, 0, 10_000).unwrap(), vec![1; 10_000], "seed {seed}");
        }
    }

    #[test]
    fn what_was_not_synced_is_kept_lost_or_torn_and_the_bytes_before_come_back() {
        let (mut kept, mut lost, mut torn) = (0, 0, 0);
        for seed in 0..60 {
            let (_dir, mut volume) = volume();
            let file = volume.make(ROOT, name("a"), 0o644, false).unwrap();
            volume.write(file, 0, &[1; PAGE_SIZE]).unwrap();
            volume.sync_file(file).unwrap();
            volume.sync_directory(ROOT).unwrap();
            volume.write(file, 0, &[2; PAGE_SIZE]).unwrap();
            let told = volume.cut(seed).unwrap();
            let bytes = volume.read(file, 0, PAGE_SIZE).unwrap();
            let ones = bytes.iter().filter(|byte| **byte == 1).count();
            assert_eq!(told.bytes, ones as u64);
            assert!(ones % SECTOR_SIZE == 0 && bytes.iter().all(|byte| [1, 2].contains(byte)), "seed {seed}");
            match ones {
                0 => kept += 1,
                PAGE_SIZE => lost += 1,
                _ => torn += 1,
            }
        }
        assert!(kept > 5 && lost > 5 && torn > 5, "{kept} kept, {lost} lost, {torn} torn");
    }

    #[test]
    fn a_seed_cuts_the_same_every_time() {
        let cut = |seed| {
            let (_dir, mut volume) = volume();
            let files: Vec<u64> =
                (0..20).map(|n| volume.make(ROOT, name(&format!("f{n}")), 0o644, false).unwrap()).collect();
            volume.sync_directory(ROOT).unwrap();
            for file in &files {
                volume.write(*file, 0, &[7; 9_000]).unwrap();
            }
            let lost = volume.cut(seed).unwrap();
            (lost, files.iter().map(|file| volume.read(*file, 0, 9_000).unwrap()).collect::<Vec<_>>())
        };
        assert!(cut(3) == cut(3));
        assert!(cut(3) != cut(4));
    }

    #[test]
    fn names_are_lost_without_a_sync_of_their_directory_in_their_order_and_a_rename_as_a_whole() {
        let mut seen = BTreeSet::new();
        for seed in 0..60 {
            let (_dir, mut volume) = volume();
            let old = volume.make(ROOT, name("a"), 0o644, false).unwrap();
            volume.sync_directory(ROOT).unwrap();
            let new = volume.make(ROOT, name("a.tmp"), 0o644, false).unwrap();
            volume.write(new, 0, b"new").unwrap();
            // The bytes are safe, the name is not.
            volume.sync_file(new).unwrap();
            volume.rename((ROOT, name("a.tmp")), (ROOT, name("a")), false).unwrap();
            volume.cut(seed).unwrap();
            let a = volume.lookup(ROOT, name("a")).unwrap();
            let tmp = volume.lookup(ROOT, name("a.tmp")).ok();
            assert!((a, tmp) == (old, None) || (a, tmp) == (old, Some(new)) || (a, tmp) == (new, None), "{a} {tmp:?}");
            seen.insert((a, tmp));
        }
        assert_eq!(seen.len(), 3, "{seen:?}");
    }

    #[test]
    fn a_directory_sync_keeps_names_and_what_they_depend_on() {
        for seed in 0..30 {
            let (_dir, mut volume) = volume();
            let first = volume.make(ROOT, name("one"), 0o755, true).unwrap();
            let second = volume.make(ROOT, name("two"), 0o755, true).unwrap();
            volume.sync_directory(ROOT).unwrap();
            let file = volume.make(first, name("a"), 0o644, false).unwrap();
            volume.rename((first, name("a")), (second, name("b")), false).unwrap();
            volume.sync_directory(second).unwrap();
            volume.cut(seed).unwrap();
            assert_eq!(volume.lookup(second, name("b")).unwrap(), file);
            assert!(volume.lookup(first, name("a")).is_err());
        }
    }

    #[test]
    fn after_a_failed_sync_no_later_sync_saves_the_bytes_but_a_second_write_does() {
        for seed in 0..30 {
            let (_dir, mut volume) = volume();
            let file = volume.make(ROOT, name("a"), 0o644, false).unwrap();
            volume.write(file, 0, &[1; 2 * PAGE_SIZE]).unwrap();
            volume.sync_file(file).unwrap();
            volume.sync_directory(ROOT).unwrap();
            volume.write(file, 0, &[2; 2 * PAGE_SIZE]).unwrap();
            volume.fail_sync(file).unwrap();
            volume.write(file, 0, &[3; PAGE_SIZE]).unwrap();
            volume.sync_file(file).unwrap();
            assert_eq!(volume.read(file, PAGE_SIZE as u64, 1).unwrap(), [2], "a reader sees the page cache");
            volume.cut(seed).unwrap();
            assert_eq!(volume.read(file, 0, PAGE_SIZE).unwrap(), vec![3; PAGE_SIZE]);
            assert_eq!(volume.read(file, PAGE_SIZE as u64, PAGE_SIZE).unwrap(), vec![1; PAGE_SIZE]);
        }
    }

    #[test]
    fn a_deleted_file_keeps_its_bytes_while_it_is_open_or_a_cut_may_bring_its_name_back() {
        let (dir, mut volume) = volume();
        let file = volume.make(ROOT, name("a"), 0o644, false).unwrap();
        volume.sync_directory(ROOT).unwrap();
        let stored = dir.path().join("store").join(file.to_string());
        volume.open(file).unwrap();
        volume.remove(ROOT, name("a"), false).unwrap();
        assert!(stored.exists());
        volume.sync_directory(ROOT).unwrap();
        assert!(stored.exists() && volume.read(file, 0, 1).unwrap().is_empty(), "it is open");
        volume.close(file);
        volume.sync_directory(ROOT).unwrap();
        assert!(!stored.exists());
    }

    #[test]
    fn a_file_that_was_cut_off_may_come_back_to_its_length() {
        let mut sizes = BTreeSet::new();
        for seed in 0..20 {
            let (_dir, mut volume) = volume();
            let file = volume.make(ROOT, name("a"), 0o644, false).unwrap();
            volume.write(file, 0, &[1; 9_000]).unwrap();
            volume.sync_file(file).unwrap();
            volume.sync_directory(ROOT).unwrap();
            volume.resize(file, 100).unwrap();
            volume.cut(seed).unwrap();
            let bytes = volume.read(file, 0, 10_000).unwrap();
            assert!(bytes[..100].iter().all(|byte| *byte == 1));
            sizes.insert(bytes.len());
        }
        assert_eq!(sizes, BTreeSet::from([100, 9_000]));
    }
}
