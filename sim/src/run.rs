//! One run: a cluster starts, clients work while faults come and go, all faults end, and what must hold
//! is checked.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use arqon_proto::wire;
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep, timeout_at};

use crate::{
    cluster::{Access, Cluster},
    faults::{Faults, Kind},
    history::{Fact, History, Place},
    invariants::{self, Facts},
    logs,
    machine::Machine,
    network::{HostState, Network},
    random::Random,
    system::{self, HostId, now_ns},
    trace,
    workload::{
        self, Pace, Stop, append,
        metadata::{self, SharedFront, TRIMMED},
        queue::{self, JOBS, RESULTS},
        repeat::{self, Repeats},
        tail,
    },
    world::World,
};

const SECOND_NS: u64 = 1_000_000_000;
/// A new cluster has leaders and takes topics within this time.
const SETUP_NS: u64 = 30 * SECOND_NS;
/// When all faults are over, writes resume within this time...
const RESUME_PATIENCE: Duration = Duration::from_secs(10);
/// ... and everything else comes to its end within this one.
const CONVERGE_PATIENCE: Duration = Duration::from_secs(60);
const STOP_NS: u64 = 40 * SECOND_NS;
const WORKER_COUNT: u8 = 2;
/// A worker ends after up to this time, while there are faults.
const WORKER_LIFE_NS: u64 = 12 * SECOND_NS;
/// How often, of a hundred runs, producers have little to send.
const QUIET_PERCENT: u64 = 25;
const LOG_TOPIC: &str = "sim.log";
/// Broken rules of one run that are told.
const BROKEN_COUNT_MAX: usize = 20;
/// Values of the last producers begin with this client number.
const LAST_CLIENT: u64 = 900;

/// What a run is made from.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Everything else follows from it.
    pub seed: u64,
    /// How long faults come and go.
    pub length: Duration,
    /// Brokers; drawn from the seed when absent.
    pub node_count: Option<u8>,
    /// Only these faults; drawn from the seed when absent.
    pub kinds: Option<Vec<Kind>>,
    /// The disks lie: a sync makes nothing durable. Whoever looks for lost writes must find some.
    pub lying_disks: bool,
}

/// How a run went.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Report {
    /// Its seed.
    pub seed: u64,
    /// Hash of everything that happened: equal for equal runs.
    pub hash: u64,
    /// Events in it.
    pub event_count: u64,
    /// Simulated time in ms.
    pub simulated_ms: u64,
    /// Time of the processor in ms.
    pub cpu_ms: u64,
    /// Faults that took place.
    pub faults: BTreeMap<String, u64>,
    /// Values that were acknowledged.
    pub acked_count: u64,
    /// Jobs that workers completed.
    pub completed_count: u64,
    /// Packets that arrived.
    pub delivered_count: u64,
    /// When the faults were over, the last partition took a write again after so long, in ms.
    pub resumed_ms: u64,
    /// Rules that do not hold, and how.
    pub broken: Vec<(String, String)>,
}

static PANIC_COUNT: AtomicU64 = AtomicU64::new(0);
static FIRST_PANIC: Mutex<String> = Mutex::new(String::new());

fn note_panics() {
    std::panic::set_hook(Box::new(|panic| {
        let text = panic.to_string().replace('\n', " ");
        eprintln!("host {} panicked: {text}", system::host().0);
        if PANIC_COUNT.fetch_add(1, Relaxed) == 0 {
            *FIRST_PANIC.lock().unwrap_or_else(PoisonError::into_inner) = text;
        }
    }));
}

/// A machine with a worker, which now and then ends with the jobs that it holds.
struct Worker {
    host: HostId,
    life_count: u64,
    dies_ns: u64,
}

impl Worker {
    fn new(host: HostId) -> Self {
        Self { host, life_count: 0, dies_ns: u64::MAX }
    }
}

struct Run {
    world: World,
    cluster: Cluster,
    faults: Faults,
    history: History,
    clients: HostId,
    workers: Vec<Worker>,
    front: SharedFront,
    repeats: Repeats,
    random: Random,
    places: Vec<Place>,
    facts: Facts,
    resumed_ms: u64,
}

/// Runs a seed. The calling thread belongs to the simulation from then on, and the process should end
/// afterwards: one process, one run.
///
/// # Panics
/// No folder for a key file can be made, or the simulation itself is wrong.
#[must_use]
pub fn run(settings: &Settings) -> Report {
    note_panics();
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let mut random = Random::new(settings.seed);
    system::activate(random.next(), Network::new(random.fork()));
    let drawn = if random.percent(25) { 5 } else { 3 };
    let node_count = settings.node_count.unwrap_or(drawn);
    let mut cluster = Cluster::new(node_count, folder.path(), &mut random).expect("a cluster can be set up");
    if settings.lying_disks {
        cluster.machines.iter_mut().for_each(Machine::lie);
    }
    let capacity = cluster.machines.len();
    let faults = Faults::new(usize::from(node_count), capacity, settings.kinds.as_deref(), random.fork());
    trace::say(&format!("seed {}, {} nodes, faults {:?}", settings.seed, node_count, faults.kinds()));
    let mut run = Run {
        world: World::default(),
        clients: cluster.clients(),
        workers: (0..WORKER_COUNT).map(|number| Worker::new(cluster.worker(number))).collect(),
        cluster,
        faults,
        history: History::default(),
        front: SharedFront::default(),
        repeats: Repeats::default(),
        random,
        places: Vec::new(),
        facts: Facts::default(),
        resumed_ms: 0,
    };
    if run.set_up() {
        run.work(settings.length);
        run.read_logs();
    }
    run.report(settings.seed)
}

impl Run {
    /// Lets time pass until a flag is set; false when it is not in time.
    fn wait_for(&mut self, flag: &Arc<AtomicBool>, until_ns: u64) -> bool {
        let (world, cluster, faults) = (&mut self.world, &mut self.cluster, &mut self.faults);
        world.run_until(until_ns, &mut |world, host| {
            faults.look(world, cluster, host);
            flag.load(Relaxed)
        });
        flag.load(Relaxed)
    }

    /// Runs something on the machine of the clients until it is done; false when it is not in time.
    fn perform(&mut self, until_ns: u64, work: impl Future<Output = ()> + Send + 'static) -> bool {
        let done = Arc::new(AtomicBool::new(false));
        let flag = done.clone();
        self.world.spawn(self.clients, async move {
            work.await;
            flag.store(true, Relaxed);
        });
        self.wait_for(&done, until_ns)
    }

    fn late(&mut self, what: impl Into<String>) {
        self.facts.late.push(what.into());
    }

    fn set_up(&mut self) -> bool {
        // Where no node runs yet a system does: who connects is refused, and need not wait.
        for machine in &self.cluster.machines {
            self.world.stop(machine.host(), HostState::Dead);
        }
        self.cluster.boot_all(&mut self.world);
        self.world.boot(self.clients, async {});
        let partitions = self.random.of(1..4) as u32;
        for topic in [LOG_TOPIC, JOBS, RESULTS] {
            self.places.extend((0..partitions).map(|partition| Place { topic: topic.to_owned(), partition }));
        }
        self.places.push(Place { topic: TRIMMED.to_owned(), partition: 0 });
        let access = self.cluster.access.clone();
        let in_time = self.perform(now_ns() + SETUP_NS, async move {
            for (name, partitions) in [(LOG_TOPIC, partitions), (JOBS, partitions), (RESULTS, partitions), (TRIMMED, 1)]
            {
                let name = name.to_owned();
                let config = wire::TopicConfig { name, partitions, retention_ms: 24 * 3_600_000, ..Default::default() };
                workload::create_topic(&access, config).await;
            }
        });
        if !in_time {
            let states: Vec<_> = self.cluster.machines.iter().map(|m| (m.failed(), m.not_ready())).collect();
            self.late(format!("a new cluster does not take topics: {states:?}"));
        }
        in_time
    }

    /// The main part: clients and faults, then the end of both.
    fn work(&mut self, length: Duration) {
        let (producers, workers) = (Stop::default(), Stop::default());
        self.start_clients(&producers, &workers);
        let end_ns = now_ns() + length.as_nanos() as u64;
        self.faults.plan(now_ns(), end_ns);
        while now_ns() < end_ns {
            let deaths = self.workers.iter().map(|worker| worker.dies_ns);
            let next_ns = deaths.chain(self.faults.next_ns()).min().unwrap_or(end_ns);
            let until_ns = next_ns.clamp(now_ns(), end_ns);
            let (world, cluster, faults) = (&mut self.world, &mut self.cluster, &mut self.faults);
            world.run_until(until_ns, &mut |world, host| faults.look(world, cluster, host));
            faults.act(world, cluster);
            self.renew_workers(&workers);
        }
        self.faults.heal(&mut self.world, &mut self.cluster);
        self.check_resumption();
        producers.set();
        self.finish_members();
        self.send_again();
        self.drain();
        workers.set();
        self.read_finals();
        self.stop_nodes();
    }

    fn start_clients(&mut self, producers: &Stop, workers: &Stop) {
        let mut client = 0;
        let pace = if self.random.percent(QUIET_PERCENT) { Pace::Quiet } else { Pace::Busy };
        for place in self.places.clone() {
            let (access, history) = (&self.cluster.access, &self.history);
            if place.topic != RESULTS {
                client += 1;
                let (access, history) = (access.clone(), history.clone());
                let (whose, random) = ((client, place.clone()), self.random.fork());
                let program = append::produce(access, history, producers.clone(), whose, pace, random);
                self.world.spawn(self.clients, program);
            }
            if place.topic == LOG_TOPIC || place.topic == TRIMMED {
                client += 1;
                let (access, history) = (access.clone(), history.clone());
                let (repeats, random) = (self.repeats.clone(), self.random.fork());
                let whose = (client, place.clone());
                let program = repeat::repeat(access, history, producers.clone(), repeats, whose, pace, random);
                self.world.spawn(self.clients, program);
            }
            if place.topic == LOG_TOPIC {
                client += 1;
                let (access, history) = (access.clone(), history.clone());
                let program =
                    tail::watch(access, history, producers.clone(), client, place.clone(), self.random.fork());
                self.world.spawn(self.clients, program);
            }
            client += 1;
            let program = append::follow(access.clone(), history.clone(), workers.clone(), client, place);
            self.world.spawn(self.clients, program);
        }
        self.workers.iter_mut().for_each(|worker| worker.dies_ns = 0);
        self.renew_workers(workers);
        let random = self.random.fork();
        let (access, places) = (self.cluster.access.clone(), self.places.clone());
        let node_count = self.cluster.machines.len() as u64;
        let churn = metadata::churn(access.clone(), producers.clone(), places, node_count, random);
        self.world.spawn(self.clients, churn);
        let random = self.random.fork();
        self.world.spawn(self.clients, metadata::trim(access, producers.clone(), self.front.clone(), random));
    }

    /// Ends workers whose time has come, and puts others in their places.
    fn renew_workers(&mut self, stop: &Stop) {
        for worker in self.workers.iter_mut().filter(|worker| worker.dies_ns <= now_ns()) {
            trace::say(&format!("worker on host {} ends, another begins", worker.host.0));
            self.world.stop(worker.host, HostState::Dead);
            worker.life_count += 1;
            worker.dies_ns = now_ns() + self.random.of(SECOND_NS / 2..WORKER_LIFE_NS);
            let client = u64::from(worker.host.0) * 1_000 + worker.life_count;
            let (access, history) = (self.cluster.access.clone(), self.history.clone());
            self.world.boot(worker.host, queue::work(access, history, stop.clone(), client, self.random.fork()));
        }
    }

    /// Every partition takes a write of a new producer soon.
    fn check_resumption(&mut self) {
        let begin_ns = now_ns();
        let until_ns = begin_ns + CONVERGE_PATIENCE.as_nanos() as u64;
        let places: Vec<Place> = self.places.iter().filter(|place| place.topic != RESULTS).cloned().collect();
        for (number, place) in (LAST_CLIENT..).zip(places) {
            let access = self.cluster.access_now(self.faults.joining());
            let history = self.history.clone();
            let name = format!("{}/{}", place.topic, place.partition);
            let in_time = self.perform(until_ns, async move { write_one(&access, &history, number, &place).await });
            let took_ns = now_ns() - begin_ns;
            if !in_time {
                self.late(format!("{name} takes no writes {} s after all faults ended", took_ns / SECOND_NS));
            } else if took_ns > RESUME_PATIENCE.as_nanos() as u64 {
                self.late(format!("{name} took a write only {} ms after all faults ended", took_ns / 1_000_000));
            }
        }
        self.resumed_ms = (now_ns() - begin_ns) / 1_000_000;
        let read: Vec<Place> = self.places.iter().filter(|place| place.topic == LOG_TOPIC).cloned().collect();
        let (access, history) = (self.cluster.access_now(self.faults.joining()), self.history.clone());
        let in_time = self.perform(until_ns, async move {
            for place in &read {
                tail::until_told(&access, &history, LAST_CLIENT, place).await;
            }
        });
        if !in_time {
            self.late("linearizable reads of the tail are not answered in time");
        }
    }

    /// Waits until a node that was to join or to leave has done so.
    fn finish_members(&mut self) {
        let until_ns = now_ns() + CONVERGE_PATIENCE.as_nanos() as u64;
        while !self.faults.settle_members(&mut self.world, &mut self.cluster) && now_ns() < until_ns {
            self.world.run_until(now_ns() + SECOND_NS / 10, &mut |_, _| false);
        }
        if let Some(change) = self.faults.change_under_way() {
            self.late(format!("{change}, and that is not over in time"));
        }
    }

    /// Sends batches once more that were acknowledged long ago.
    fn send_again(&mut self) {
        let until_ns = now_ns() + CONVERGE_PATIENCE.as_nanos() as u64;
        let (access, history, repeats) = (self.cluster.access.clone(), self.history.clone(), self.repeats.clone());
        if !self.perform(until_ns, async move { repeats.send_all(&access, &history).await }) {
            self.late("batches that are sent again get no answer in time");
        }
    }

    /// Waits until every acknowledged job has its result.
    fn drain(&mut self) {
        let until_ns = now_ns() + CONVERGE_PATIENCE.as_nanos() as u64;
        let (access, history) = (self.cluster.access.clone(), self.history.clone());
        let places: Vec<Place> = self.places.iter().filter(|place| place.topic == RESULTS).cloned().collect();
        let in_time = self.perform(until_ns, async move {
            // What is under way at the producers comes to its end.
            sleep(Duration::from_secs(2)).await;
            loop {
                let mut results = Vec::new();
                for place in &places {
                    results.extend(append::read_all(&access, place, None).await.unwrap_or_default());
                }
                let results: BTreeSet<u64> = results.into_iter().filter_map(|(_, value)| value).collect();
                let is_over = history.lock().iter().all(|event| {
                    let is_job = event.place.topic == JOBS && matches!(event.fact, Fact::Acked(_));
                    !is_job || results.contains(&event.value)
                });
                if is_over {
                    return;
                }
                sleep(Duration::from_secs(1)).await;
            }
        });
        if !in_time {
            self.late("the queue is not empty in time");
        }
    }

    /// Reads every partition to its end, from its leader and from each node.
    fn read_finals(&mut self) {
        let until_ns = now_ns() + CONVERGE_PATIENCE.as_nanos() as u64;
        let found: Arc<Mutex<Facts>> = Arc::default();
        let (access, places) = (self.cluster.access.clone(), self.places.clone());
        let nodes: Vec<u64> = self.cluster.members.iter().map(|index| *index as u64 + 1).collect();
        let out = found.clone();
        let in_time = self.perform(until_ns, async move {
            for place in &places {
                let records = until_read(&access, place, None).await.unwrap_or_default();
                out.lock().unwrap_or_else(PoisonError::into_inner).finals.insert(place.clone(), records.clone());
                for node in nodes.iter().copied() {
                    let Some(replica) =
                        caught_up(&access, place, node, records.last().map(|(offset, _)| *offset)).await
                    else {
                        continue;
                    };
                    let mut facts = out.lock().unwrap_or_else(PoisonError::into_inner);
                    facts.replicas.insert((place.clone(), node), replica);
                }
            }
        });
        let mut found = std::mem::take(&mut *found.lock().unwrap_or_else(PoisonError::into_inner));
        if !in_time {
            let read: Vec<_> =
                found.replicas.keys().map(|(place, node)| (&place.topic, place.partition, node)).collect();
            self.late(format!("not every replica can be read to its end in time, only {read:?}"));
        }
        self.facts.finals = std::mem::take(&mut found.finals);
        self.facts.replicas = std::mem::take(&mut found.replicas);
    }

    fn stop_nodes(&mut self) {
        let members: Vec<usize> = self.cluster.members.iter().copied().collect();
        for index in &members {
            self.cluster.machines[*index].ask_to_stop(&mut self.world);
        }
        let until_ns = now_ns() + STOP_NS;
        while now_ns() < until_ns && !members.iter().all(|index| self.cluster.machines[*index].has_stopped()) {
            self.world.run_until(now_ns() + SECOND_NS / 10, &mut |_, _| false);
        }
        for index in members {
            if !self.cluster.machines[index].has_stopped() {
                self.late(format!("node {} does not stop in time", index + 1));
            }
            self.cluster.machines[index].kill(&mut self.world);
        }
    }

    fn read_logs(&mut self) {
        let wants_values = self.places.iter().any(|place| !self.facts.finals.contains_key(place));
        let (logs, refused) = logs::read(&mut self.cluster, wants_values);
        self.facts.logs = logs;
        self.facts.late.extend(refused);
    }

    fn report(mut self, seed: u64) -> Report {
        self.facts.history = self.history.lock().clone();
        self.facts.node_count = self.cluster.members.len();
        let front = self.front.lock().unwrap_or_else(PoisonError::into_inner).clone();
        self.facts.fronts.insert(Place { topic: TRIMMED.to_owned(), partition: 0 }, front);
        self.facts.rotten = self.faults.rotten.iter().map(|index| *index as u64 + 1).collect();
        let mut broken: Vec<(String, String)> =
            invariants::check_all(&self.facts).into_iter().map(|(name, what)| (name.to_owned(), what)).collect();
        if PANIC_COUNT.load(Relaxed) > 0 {
            let text = FIRST_PANIC.lock().unwrap_or_else(PoisonError::into_inner).clone();
            broken.insert(0, ("no-panic".to_owned(), text));
        }
        broken.truncate(BROKEN_COUNT_MAX);
        for (name, what) in &broken {
            trace::say(&format!("broken: {name}: {what}"));
        }
        let mut faults = BTreeMap::new();
        for kind in &self.faults.injected {
            *faults.entry(format!("{kind:?}")).or_default() += 1;
        }
        let count =
            |is_it: fn(&Fact) -> bool| self.facts.history.iter().filter(|event| is_it(&event.fact)).count() as u64;
        let (hash, event_count) = trace::summary();
        Report {
            seed,
            hash,
            event_count,
            simulated_ms: now_ns() / 1_000_000,
            cpu_ms: cpu_ms(),
            faults,
            acked_count: count(|fact| matches!(fact, Fact::Acked(_))),
            completed_count: count(|fact| matches!(fact, Fact::Completed(_))),
            delivered_count: system::with_network(|network| network.delivered_count),
            resumed_ms: self.resumed_ms,
            broken,
        }
    }
}

/// Writes one value, however often that takes.
async fn write_one(access: &Access, history: &History, client: u64, place: &Place) {
    let options = arqon_sdk::ProducerOptions { partition: Some(place.partition), ..Default::default() };
    for number in 1.. {
        let connection = access.client();
        let value = client << 32 | number;
        if let Ok(producer) = connection.producer(&place.topic, options.clone()).await {
            history.note(client, place, value, Fact::Sent);
            let payload = crate::history::encode(value, 100);
            match producer.publish(arqon_sdk::NewEvent::new(payload)).await {
                Ok(receipt) => return history.note(client, place, value, Fact::Acked(receipt.offset)),
                Err(error) => history.note(client, place, value, Fact::Unknown(error.to_string())),
            }
        }
        sleep(Duration::from_millis(100)).await;
    }
}

async fn until_read(access: &Access, place: &Place, node: Option<u64>) -> Option<invariants::Records> {
    loop {
        match append::read_all(access, place, node).await {
            Ok(records) => return Some(records),
            // The one field of these options that the bus may not be able to satisfy: no replica is there.
            Err(arqon_sdk::Error::Invalid { field, .. }) if field == "any_replica_of" => return None,
            Err(error) => tracing::info!("{}/{} on {node:?} is not read: {error}", place.topic, place.partition),
        }
        sleep(Duration::from_millis(300)).await;
    }
}

/// Reads a replica until it has what the leader had, or for a while; none when there is none on that node.
async fn caught_up(access: &Access, place: &Place, node: u64, last: Option<u64>) -> Option<invariants::Records> {
    let deadline = Instant::now() + CONVERGE_PATIENCE / 4;
    let mut records = Some(Vec::new());
    let reading = async {
        loop {
            records = until_read(access, place, Some(node)).await;
            if records.as_ref().is_none_or(|records| records.last().map(|(offset, _)| *offset) >= last) {
                return;
            }
            sleep(Duration::from_millis(300)).await;
        }
    };
    // Who is late shows in the comparison.
    drop(timeout_at(deadline, reading).await);
    records
}

fn cpu_ms() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: there is room for a time.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &raw mut time) };
    time.tv_sec as u64 * 1_000 + time.tv_nsec as u64 / 1_000_000
}
