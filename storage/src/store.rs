//! One data directory: its identity, its lock, its logs.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard};
use std::thread::JoinHandle;

use arqon_proto::planted;
use arqon_proto::{DecodeError, GroupId, Offset, ReplicaId, chain_start};
use bytes::Bytes;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::sync::oneshot;

use crate::disk::real::RealDisk;
use crate::disk::{self, Disk, join};
use crate::engine::{Engine, Place};
use crate::error::OpenError;
use crate::flush::{Done, Op, encode_vote};
use crate::layout::{
    IDENTITY_FILE, LOCK_FILE, LOGS_DIR, MANIFEST_FILE, Manifest, PLACED_FILE, POOL_DIR, VOTE_FILE, What,
    decode_identity, encode_identity, log_dir, parse_log_dir, seal, unseal,
};
use crate::log::{Log, LogCore, wait};
use crate::metrics::Metrics;
use crate::options::{Identity, Options};
use crate::pool::{self, Owner};
use crate::recovery::{Recovery, recover};
use crate::space::Space;

/// Largest identity file, in bytes.
const IDENTITY_SIZE_MAX: usize = 64 << 10;
const PLACED_SIZE_MAX: usize = 4 << 10;
/// A hard limit of open files below this is worth a line in the log: a thousand logs have a few
/// thousand files open, and every connection is one too.
const FILE_COUNT_LOW: u64 = 16 << 10;

/// An open data directory. Clones share it; it closes with the last clone and the last
/// [`Log`] of it, or with [`Store::close`].
#[derive(Clone)]
pub struct Store {
    hold: Arc<StoreHold>,
}

/// Keeps the threads running. Dropping it ends them after what is queued.
pub(crate) struct StoreHold {
    engine: Arc<Engine>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    /// Read while the directory is changed on the caller's thread; closing waits for those who do.
    is_closed: RwLock<bool>,
}

impl Drop for StoreHold {
    fn drop(&mut self) {
        self.engine.stop();
        self.join();
    }
}

impl StoreHold {
    fn join(&self) {
        let threads = std::mem::take(&mut *self.threads.lock().unwrap_or_else(PoisonError::into_inner));
        for thread in threads {
            // The last handle may be dropped by a callback, on one of these threads.
            if thread.thread().id() != std::thread::current().id() {
                let _ = thread.join();
            }
        }
    }
}

/// The place of a log that is being opened. Given back when it is dropped.
struct Opening<'a> {
    engine: &'a Engine,
    key: (GroupId, ReplicaId),
    core: Option<Arc<LogCore>>,
}

impl<'a> Opening<'a> {
    /// Takes the place, unless the log is open or being opened.
    fn begin(engine: &'a Engine, key: (GroupId, ReplicaId)) -> Option<Self> {
        let mut logs = engine.logs();
        let taken = |place: &Place| match place {
            Place::Opening => true,
            Place::Open(core) => core.upgrade().is_some_and(|core| !core.lock().closed),
        };
        if logs.get(&key).is_some_and(taken) {
            return None;
        }
        logs.insert(key, Place::Opening);
        Some(Self { engine, key, core: None })
    }
}

impl Drop for Opening<'_> {
    fn drop(&mut self) {
        self.engine.end_opening(self.key, self.core.as_ref());
    }
}

/// A number that no earlier run has used.
pub(crate) fn random_number() -> u64 {
    // Keyed from the system's randomness once per thread and different for each state.
    RandomState::new().build_hasher().finish()
}

impl Store {
    /// Opens the data directory `dir`, creating it when it is absent or empty. Lets the process
    /// open as many files as its hard limit says.
    ///
    /// # Errors
    /// The directory is in use, belongs to another cluster or node, holds other files, was
    /// written by a newer program, or the disk failed. Nothing was changed then.
    pub fn open(dir: &Path, identity: Identity, options: Options) -> Result<Self, OpenError> {
        let failed = |source| OpenError::Io { what: dir.display().to_string(), source };
        raise_file_limit();
        let disk = RealDisk::create(dir).map_err(failed)?.with_direct_writes(options.direct_writes);
        Self::open_on(Arc::new(disk), identity, options)
    }

    /// As [`Store::open`], on another disk.
    ///
    /// # Errors
    /// As [`Store::open`].
    pub fn open_on(disk: Arc<dyn Disk>, identity: Identity, options: Options) -> Result<Self, OpenError> {
        let dir = disk.name();
        let failed = |what: &str| {
            let what = join(&dir, what);
            move |source| OpenError::Io { what, source }
        };
        // Someone else's directory gets no lock file.
        let names = disk.list(".").map_err(failed("."))?;
        let ours = names.iter().any(|name| name == IDENTITY_FILE);
        let known = |name: &String| name == LOCK_FILE || name == "lost+found" || name.ends_with(".tmp");
        if !ours && let Some(found) = names.iter().find(|name| !known(name)) {
            return Err(OpenError::NotOurs { dir, found: found.clone() });
        }
        disk.lock(LOCK_FILE).map_err(|source| match source.kind() {
            io::ErrorKind::WouldBlock => OpenError::InUse { dir: dir.clone() },
            _ => failed(LOCK_FILE)(source),
        })?;
        if ours || disk.list(".").map_err(failed("."))?.iter().any(|name| name == IDENTITY_FILE) {
            check_identity(disk.as_ref(), &identity)?;
            check_placed(disk.as_ref())?;
        } else {
            let bytes = encode_identity(&identity.cluster, identity.node);
            disk::replace(disk.as_ref(), ".", IDENTITY_FILE, bytes, disk::STORE_POINTS)
                .map_err(failed(IDENTITY_FILE))?;
        }
        pool::prepare(disk.as_ref()).map_err(failed(POOL_DIR))?;
        prepare_logs_dir(disk.as_ref()).map_err(failed(LOGS_DIR))?;
        let (engine, threads) = Engine::start(disk, options)?;
        let hold = StoreHold { engine, threads: Mutex::new(threads), is_closed: RwLock::default() };
        Ok(Self { hold: Arc::new(hold) })
    }

    /// How segments are written: `io_uring` or `plain`.
    #[must_use]
    pub fn backend_name(&self) -> &'static str {
        self.hold.engine.backend_name()
    }

    /// What the disk still takes. Cheap: a few loads.
    #[must_use]
    pub fn space(&self) -> Space {
        self.hold.engine.space()
    }

    /// Whether this store does its work on threads of its own. One that was opened with
    /// [`Options::thread_count`] 0 has none: see [`Store::step`].
    #[must_use]
    pub fn has_threads(&self) -> bool {
        self.hold.engine.has_threads()
    }

    /// In a store without threads: takes one step of what waits for the disk, on this thread, and runs
    /// the callbacks that follow from it. False: nothing waits now. Some work comes with time alone, so
    /// this should be called every 100 ms at least.
    pub fn step(&self) -> bool {
        self.hold.engine.step()
    }

    /// In a store without threads: until there is something for [`Store::step`]. Otherwise for ever.
    pub async fn step_announced(&self) {
        self.hold.engine.step_announced().await;
    }

    /// Counters of all logs together.
    #[must_use]
    pub fn metrics(&self) -> Arc<Metrics> {
        Arc::clone(&self.hold.engine.metrics)
    }

    /// The logs in the directory, open or not.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn logs(&self) -> io::Result<Vec<(GroupId, ReplicaId)>> {
        let mut logs: Vec<_> =
            self.hold.engine.disk.list(LOGS_DIR)?.iter().filter_map(|name| parse_log_dir(name)).collect();
        logs.sort_unstable();
        Ok(logs)
    }

    /// Whether the directory has a log of this replica placement, in whatever state.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn has_log(&self, group: GroupId, replica: ReplicaId) -> io::Result<bool> {
        match self.hold.engine.disk.list(&log_dir(group, replica)) {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// What [`Store::set_placed`] was told last; replica 0 if nothing.
    ///
    /// # Errors
    /// `InvalidData` when the file is damaged, or the disk failed.
    pub fn placed(&self) -> io::Result<ReplicaId> {
        let disk = self.hold.engine.disk.as_ref();
        match read_placed(disk)? {
            None => Ok(ReplicaId(0)),
            Some(Ok(bound)) => Ok(bound),
            Some(Err(error)) => {
                let text = format!("{}: {error}", join(&disk.name(), PLACED_FILE));
                Err(io::Error::new(io::ErrorKind::InvalidData, text))
            }
        }
    }

    /// Remembers that every replica placed here with an id below `bound` has its log, so that one
    /// that is missing later is known to be lost. Durable on return.
    ///
    /// # Errors
    /// The disk failed.
    pub fn set_placed(&self, bound: ReplicaId) -> io::Result<()> {
        let _change = self.begin_change()?;
        let bytes = seal(What::Placed, &bound.0.to_le_bytes());
        disk::replace(self.hold.engine.disk.as_ref(), ".", PLACED_FILE, bytes, disk::STORE_POINTS)
    }

    /// Opens the log of a replica placement, creating it when it is not there. What was not
    /// synced before a crash is synced before this returns. Several threads may open logs at once.
    ///
    /// # Errors
    /// The log is open or being opened already, quarantined, of a newer format, or the disk failed.
    pub fn open_log(&self, group: GroupId, replica: ReplicaId) -> Result<(Log, Recovery), OpenError> {
        let engine = &self.hold.engine;
        let closed = |source| OpenError::Io { what: engine.disk.name(), source };
        let _change = self.begin_change().map_err(closed)?;
        let mut opening = Opening::begin(engine, (group, replica)).ok_or(OpenError::LogOpen { group, replica })?;
        let dir = log_dir(group, replica);
        let created = create_log(engine.disk.as_ref(), group, replica)
            .map_err(|source| OpenError::Io { what: join(&engine.disk.name(), &dir), source })?;
        let (state, io, recovery) = recover(engine, group, replica)?;
        let core = Arc::new(LogCore::new(group, replica, dir, Arc::clone(engine), state, io));
        opening.core = Some(Arc::clone(&core));
        drop(opening);
        Ok((Log { core, _store: Arc::clone(&self.hold) }, Recovery { created, ..recovery }))
    }

    /// Deletes a log, open or not; handles of it fail from then on. Waits for the disk. Its files are removed,
    /// and none of them becomes a segment of another log.
    ///
    /// # Errors
    /// The disk failed.
    pub fn delete_log(&self, group: GroupId, replica: ReplicaId) -> io::Result<()> {
        let _change = self.begin_change()?;
        let engine = &self.hold.engine;
        let result = self.delete_files(group, replica);
        engine.files.clear(engine.disk.as_ref(), Some(&Owner::Log(group, replica)));
        result
    }

    fn delete_files(&self, group: GroupId, replica: ReplicaId) -> io::Result<()> {
        let key = (group, replica);
        let open = self.hold.engine.logs_opened(|other| *other == key).remove(&key).and_then(|place| place.log());
        let Some(core) = open.filter(|core| !core.lock().closed) else {
            return delete_dir(self.hold.engine.disk.as_ref(), group, replica);
        };
        let (done, receiver) = std::sync::mpsc::channel();
        {
            let mut state = core.lock();
            state.closed = true;
            core.enqueue(&mut state, Op::Delete(Box::new(move |result| drop(done.send(result)))));
        }
        // Without threads, what stands before it in the queue is done here.
        while !self.has_threads() && self.step() {}
        receiver.recv().unwrap_or_else(|_| Err(io::Error::other("the store was closed")))
    }

    /// Flushes everything appended, syncs the durable marks, ends the threads and gives the directory back. Logs of this
    /// store take no writes from then on, and it opens and deletes none.
    pub async fn close(self) {
        // What has begun is done before the directory is given back, and nothing begins any more.
        *self.hold.is_closed.write().unwrap_or_else(PoisonError::into_inner) = true;
        let open: Vec<_> = {
            let mut logs = self.hold.engine.logs();
            logs.drain().filter_map(|(_, place)| place.log()).collect()
        };
        for core in &open {
            let (done, receiver) = oneshot::channel();
            {
                let mut state = core.lock();
                state.closed = true;
                if state.poisoned.is_some() {
                    continue;
                }
                core.enqueue(&mut state, Op::Mark(Some(Done::new(done))));
            }
            if let Err(error) = wait(receiver).await {
                tracing::error!(group = core.group.0, "closing the log failed: {error}");
            }
        }
        self.hold.engine.stop();
        self.hold.join();
        // Handles of logs may live a moment longer, in tasks that end; they change nothing any more.
        self.hold.engine.disk.unlock();
    }

    /// Begins a change of the directory on the thread of the caller; it is over when the guard goes.
    fn begin_change(&self) -> io::Result<RwLockReadGuard<'_, bool>> {
        let is_closed = self.hold.is_closed.read().unwrap_or_else(PoisonError::into_inner);
        if *is_closed { Err(io::Error::other("the store was closed")) } else { Ok(is_closed) }
    }
}

/// Raises the limit of open files to what the process may have: a log has a few files open.
fn raise_file_limit() {
    let limit = getrlimit(Resource::Nofile);
    if limit.current != limit.maximum {
        let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
        if let Err(error) = setrlimit(Resource::Nofile, raised) {
            tracing::warn!("raising the limit of open files from {:?} failed: {error}", limit.current);
        }
    }
    if let Some(maximum) = limit.maximum.filter(|maximum| *maximum < FILE_COUNT_LOW) {
        tracing::warn!("this process may open {maximum} files at most; a node with many partitions needs more");
    }
}

fn check_identity(disk: &dyn Disk, identity: &Identity) -> Result<(), OpenError> {
    let dir = disk.name();
    let what = join(&dir, IDENTITY_FILE);
    let bytes = disk::read_all(disk, IDENTITY_FILE, IDENTITY_SIZE_MAX)
        .map_err(|source| OpenError::Io { what: what.clone(), source })?;
    let (cluster, node) = decode_identity(&bytes).map_err(|error| match error {
        DecodeError::Version { version, .. } => OpenError::NewerFormat { what: what.clone(), version },
        error => OpenError::Identity { what: what.clone(), reason: error.to_string() },
    })?;
    if cluster != identity.cluster {
        return Err(OpenError::OtherCluster { dir, found: cluster, expected: identity.cluster.clone() });
    }
    if node != identity.node {
        return Err(OpenError::OtherNode { dir, found: node, expected: identity.node });
    }
    Ok(())
}

/// What the file says; none when there is no file.
fn read_placed(disk: &dyn Disk) -> io::Result<Option<Result<ReplicaId, DecodeError>>> {
    let bytes = match disk::read_all(disk, PLACED_FILE, PLACED_SIZE_MAX) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        bytes => bytes?,
    };
    let decode = |payload: &[u8]| {
        let short = DecodeError::Truncated { what: "placed replicas", need: 8, have: payload.len() };
        payload.try_into().map(|bound| ReplicaId(u64::from_le_bytes(bound))).map_err(|_| short)
    };
    Ok(Some(unseal(What::Placed, &bytes).and_then(decode)))
}

fn check_placed(disk: &dyn Disk) -> Result<(), OpenError> {
    let what = join(&disk.name(), PLACED_FILE);
    match read_placed(disk) {
        Ok(Some(Err(DecodeError::Version { version, .. }))) => Err(OpenError::NewerFormat { what, version }),
        // A damaged one is told to whoever asks for it.
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::InvalidData => Ok(()),
        Err(source) => Err(OpenError::Io { what, source }),
    }
}

/// Name of a log directory while it is made; it counts only under its final name.
const CREATING: &str = "creating-";
/// Name of a log directory while it is removed.
const DELETED: &str = "deleted-";

fn prepare_logs_dir(disk: &dyn Disk) -> io::Result<()> {
    disk.create_dir(LOGS_DIR)?;
    disk.sync_dir(".")?;
    for name in disk.list(LOGS_DIR)? {
        if name.starts_with(CREATING) || name.starts_with(DELETED) {
            remove_tree(disk, &join(LOGS_DIR, &name))?;
        }
    }
    disk.sync_dir(LOGS_DIR)
}

fn remove_tree(disk: &dyn Disk, dir: &str) -> io::Result<()> {
    for name in disk.list(dir)? {
        disk.remove(&join(dir, &name))?;
    }
    disk.remove_dir(dir)
}

/// Creates the directory of a log, whole or not at all; false when it is there.
fn create_log(disk: &dyn Disk, group: GroupId, replica: ReplicaId) -> io::Result<bool> {
    let dir = log_dir(group, replica);
    match disk.list(&dir) {
        Ok(_) => return Ok(false),
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        Err(_) => {}
    }
    let incarnation = random_number();
    let manifest = Manifest {
        group,
        replica,
        incarnation,
        generation: 0,
        purged: None,
        start_chain: chain_start(group, incarnation),
        start_offset: Offset(0),
        tail: None,
    };
    let fresh = format!("{LOGS_DIR}/{CREATING}{}-{}", group.0, replica.0);
    disk.create_dir(&fresh)?;
    for (name, bytes) in [(MANIFEST_FILE, manifest.encode()), (VOTE_FILE, encode_vote(None))] {
        let file = disk.create(&join(&fresh, name))?;
        file.write_at(&[Bytes::from(bytes)], 0)?;
        file.sync()?;
    }
    disk.sync_dir(&fresh)?;
    disk.rename(&fresh, &dir)?;
    planted::crash_point("log-created");
    disk.sync_dir(LOGS_DIR)?;
    Ok(true)
}

/// Removes the directory of a log; durable when it returns. Fine when it is not there.
pub(crate) fn delete_dir(disk: &dyn Disk, group: GroupId, replica: ReplicaId) -> io::Result<()> {
    let gone = format!("{LOGS_DIR}/{DELETED}{}-{}", group.0, replica.0);
    match disk.rename(&log_dir(group, replica), &gone) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        result => result?,
    }
    disk.sync_dir(LOGS_DIR)?;
    planted::crash_point("log-deleted");
    remove_tree(disk, &gone)?;
    disk.sync_dir(LOGS_DIR)
}
