//! A broker on a simulated machine: the real node over a disk in memory.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use arqon_proto::{NodeId, wire::NodeInfo};
use arqon_spine::{Clock, Config, Listeners, Node};
use arqon_storage::{Backend, Disk, FaultyDisk, Identity, MemoryDisk, Options, Store};
use tokio::{
    sync::Notify,
    time::{sleep, timeout},
};

use crate::{network::HostState, random::Random, system::HostId, world::World};

/// A store without threads is stepped at least this often.
const STEP_INTERVAL: Duration = Duration::from_millis(50);
/// How long one step to the disk takes on a sound disk, in ns.
const STEP_NS: (u64, u64) = (80_000, 600_000);

/// What the world and the program on the machine share.
#[derive(Default)]
pub struct Shared {
    node: Mutex<Option<Node>>,
    /// Why the node did not start.
    failed: Mutex<Option<String>>,
    stop: Notify,
    has_stopped: AtomicBool,
    /// What a step to the disk takes in addition, at most, in ns.
    slow_ns: AtomicU64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One broker, its disk and what was done to it.
pub struct Machine {
    /// Number of the node; also of the host.
    pub number: u8,
    config: Config,
    options: Options,
    memory: MemoryDisk,
    disk: FaultyDisk,
    shared: Arc<Shared>,
    random: Random,
    failed_count: u64,
    boot_count: u64,
    /// It was asked to end since it was started.
    is_stopping: bool,
    /// Its disks only claim to sync.
    is_lying: bool,
}

impl Machine {
    /// A machine with an empty disk that does not run.
    #[must_use]
    pub fn new(number: u8, config: Config, options: Options, random: Random) -> Self {
        let memory = MemoryDisk::new();
        let disk = FaultyDisk::new(Arc::new(memory.clone()));
        let shared = Arc::default();
        let (failed_count, boot_count) = (0, 0);
        let (is_stopping, is_lying) = (false, false);
        Self { number, config, options, memory, disk, shared, random, failed_count, boot_count, is_stopping, is_lying }
    }

    /// From now on its disks only claim to sync.
    pub fn lie(&mut self) {
        self.is_lying = true;
        self.memory.ignore_syncs();
    }

    /// How the cluster is told of it.
    #[must_use]
    pub fn info(&self) -> NodeInfo {
        let listen = self.config.listen.clone();
        NodeInfo {
            node: u64::from(self.number),
            client_address: listen.client,
            peer_address: listen.peer,
            control_address: listen.control,
            ..NodeInfo::default()
        }
    }

    /// How often it was started.
    #[must_use]
    pub fn boot_count(&self) -> u64 {
        self.boot_count
    }

    /// Its place in the network.
    #[must_use]
    pub fn host(&self) -> HostId {
        HostId(self.number)
    }

    /// The disk below all faults.
    #[must_use]
    pub fn memory(&self) -> &MemoryDisk {
        &self.memory
    }

    /// Operations of the disk that fail.
    #[must_use]
    pub fn disk(&self) -> &FaultyDisk {
        &self.disk
    }

    /// Lets each step to the disk take up to so much longer.
    pub fn set_slow(&self, slow: Duration) {
        self.shared.slow_ns.store(slow.as_nanos() as u64, Relaxed);
    }

    /// Why the node did not start, if so.
    #[must_use]
    pub fn failed(&self) -> Option<String> {
        lock(&self.shared.failed).clone()
    }

    /// Whether the node says that it is ready.
    #[must_use]
    pub fn not_ready(&self) -> Option<String> {
        let node = lock(&self.shared.node);
        node.as_ref().map_or_else(|| Some("it is not started".to_owned()), Node::not_ready)
    }

    /// Starts the broker.
    pub fn boot(&mut self, world: &mut World) {
        self.shared = Arc::default();
        self.boot_count += 1;
        self.is_stopping = false;
        let disk: Arc<dyn Disk> = Arc::new(self.disk.clone());
        let (config, options) = (self.config.clone(), self.options.clone());
        let program = run(config, options, disk, self.shared.clone(), self.random.fork());
        world.boot(self.host(), program);
    }

    /// Ends the broker at once, with what its disk has not yet synced.
    pub fn kill(&mut self, world: &mut World) {
        self.replace_disk(self.memory.kill());
        world.stop(self.host(), HostState::Dead);
        drop(lock(&self.shared.node).take());
    }

    /// Cuts the power; writes that were not synced are lost, torn or there.
    pub fn cut(&mut self, world: &mut World) {
        let seed = self.random.next();
        self.replace_disk(self.memory.cut(seed));
        world.stop(self.host(), HostState::Off);
        drop(lock(&self.shared.node).take());
    }

    /// Switches it off and gives it an empty disk.
    pub fn wipe(&mut self, world: &mut World) {
        self.kill(world);
        self.replace_disk(MemoryDisk::new());
        if self.is_lying {
            self.memory.ignore_syncs();
        }
    }

    fn replace_disk(&mut self, memory: MemoryDisk) {
        self.disk = FaultyDisk::new(Arc::new(memory.clone()));
        self.memory = memory;
        self.failed_count = self.memory.refused_count();
    }

    /// Whether an operation of the disk failed on purpose since this was last asked, or its space was short.
    pub fn take_has_failed(&mut self) -> bool {
        let count = self.disk.failed_count() + self.memory.refused_count();
        std::mem::replace(&mut self.failed_count, count) != count
    }

    /// Asks the broker to end cleanly.
    pub fn ask_to_stop(&mut self, world: &mut World) {
        self.is_stopping = true;
        self.shared.stop.notify_one();
        world.wake(self.host());
    }

    /// Whether it was asked to.
    #[must_use]
    pub fn is_stopping(&self) -> bool {
        self.is_stopping
    }

    /// Whether it has.
    #[must_use]
    pub fn has_stopped(&self) -> bool {
        self.shared.has_stopped.load(Relaxed)
    }

    /// Opens what is on the disk of a machine that does not run.
    ///
    /// # Errors
    /// The store does not open.
    pub fn open_store(&mut self) -> Result<Store, arqon_storage::OpenError> {
        self.replace_disk(self.memory.kill());
        let disk: Arc<dyn Disk> = Arc::new(self.disk.clone());
        Store::open_on(disk, identity(&self.config), self.options.clone())
    }
}

fn identity(config: &Config) -> Identity {
    Identity { cluster: config.cluster.clone(), node: NodeId(config.node) }
}

/// Small files, so that a short run sees segments end and be dropped, and no threads.
#[must_use]
pub fn small_options(random: &mut Random) -> Options {
    let segment_size_first = *random.pick(&[16 << 10, 64 << 10, 256 << 10]);
    Options {
        backend: Backend::Plain,
        thread_count: 0,
        segment_size_first,
        segment_size_max: segment_size_first * 2,
        fill_size: 4 << 10,
        index_step: 4 << 10,
        ..Options::default()
    }
}

async fn run(config: Config, options: Options, disk: Arc<dyn Disk>, shared: Arc<Shared>, random: Random) {
    let fail = |error: &dyn std::fmt::Display| {
        tracing::warn!("the node does not start: {error}");
        *lock(&shared.failed) = Some(error.to_string());
    };
    let store = match Store::open_on(disk, identity(&config), options) {
        Ok(store) => store,
        Err(error) => return fail(&error),
    };
    let stepping = tokio::spawn(step(store.clone(), shared.clone(), random));
    let addresses = match config.listen_addresses() {
        Ok(addresses) => addresses,
        Err(error) => return fail(&error),
    };
    let started = match Listeners::bind(&addresses) {
        Ok(listeners) => Node::start_over(config, listeners, Clock::default(), store).await,
        Err(error) => Err(error),
    };
    match started {
        Ok(node) => *lock(&shared.node) = Some(node),
        Err(error) => return fail(&error),
    }
    shared.stop.notified().await;
    let node = lock(&shared.node).take();
    if let Some(node) = node {
        node.shutdown().await;
    }
    stepping.abort();
    shared.has_stopped.store(true, Relaxed);
}

/// Does the work of a store's threads, each step in its time.
async fn step(store: Store, shared: Arc<Shared>, mut random: Random) {
    loop {
        // A step that comes with time alone needs no announcement.
        drop(timeout(STEP_INTERVAL, store.step_announced()).await);
        loop {
            let slow_ns = shared.slow_ns.load(Relaxed);
            let extra_ns = if slow_ns > 0 { random.of(slow_ns / 2..slow_ns) } else { 0 };
            // The clock of the runtime counts in ms: most steps take one of them, some are at once.
            let pause_ns = random.of(STEP_NS.0..STEP_NS.1) + extra_ns;
            if pause_ns > STEP_NS.1 / 3 {
                sleep(Duration::from_nanos(pause_ns)).await;
            }
            if !store.step() {
                break;
            }
        }
    }
}
