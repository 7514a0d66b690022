//! Power cuts under load: whatever was acknowledged must be there, once and in order.
//!
//! The story: three nodes take writes; the power goes on all of them, or on the leader alone,
//! while batches are written, half flushed, half replicated. What was not synced is lost or torn,
//! as the seed says. A leader that had replicated before its own sync and comes back must not
//! hand out the same positions again.
//!
//! `ARQON_SEED=N cargo test --release -p arqon-raft --test power` replays one seed.
#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod support;

use std::sync::{Arc, Mutex};

use arqon_proto::{NodeId, Offset};
use arqon_storage::{Identity, MemoryDisk, Options, Store};
use bytes::Bytes;
use support::{Node, PATIENCE, batch, open_node, payloads};
use tokio::{
    net::TcpListener,
    runtime::{Builder, Runtime},
    sync::Notify,
    time::timeout,
};

/// A node with a runtime of its own, so that it can be dropped in the middle of anything.
struct Machine {
    runtime: Runtime,
    node: Node,
}

struct Cluster {
    addresses: Vec<(NodeId, String)>,
    disks: Vec<MemoryDisk>,
    machines: Vec<Option<Machine>>,
}

type Acknowledged = Arc<Mutex<Vec<(Offset, Bytes)>>>;

impl Cluster {
    async fn start() -> Self {
        let addresses = (1..=3).map(|id| (NodeId(id), String::new())).collect();
        let disks = (0..3).map(|_| MemoryDisk::new()).collect();
        let mut cluster = Self { addresses, disks, machines: vec![None, None, None] };
        for at in 0..3 {
            cluster.power_on(at).await;
        }
        cluster
    }

    async fn power_on(&mut self, at: usize) {
        let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        // The port of the life before may still be held by what is left of it.
        let bound = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        bound.set_nonblocking(true).unwrap();
        self.addresses[at].1 = bound.local_addr().unwrap().to_string();
        for machine in self.machines.iter().flatten() {
            machine.node.host.set_peers(self.addresses.clone());
        }
        let (disk, addresses) = (self.disks[at].clone(), self.addresses.clone());
        let opening = runtime.spawn(async move {
            let id = at as u64 + 1;
            let identity = Identity { cluster: "test".into(), node: NodeId(id) };
            let store = Store::open_on(Arc::new(disk), identity, Options::default()).unwrap();
            open_node(id, &addresses, store, TcpListener::from_std(bound).unwrap(), None).await.unwrap()
        });
        let node = opening.await.unwrap();
        self.machines[at] = Some(Machine { runtime, node });
    }

    fn power_off(&mut self, at: usize, seed: u64) {
        self.disks[at] = self.disks[at].cut(seed);
        let Machine { runtime, node } = self.machines[at].take().unwrap();
        drop(node);
        runtime.shutdown_background();
    }

    async fn leader(&self) -> usize {
        let ready = self.machines.iter().enumerate().filter_map(|(at, machine)| {
            let mut watch = machine.as_ref()?.node.group.watch();
            Some(Box::pin(async move {
                watch.wait_for(|status| status.ready).await.unwrap();
                at
            }))
        });
        timeout(PATIENCE, futures_util::future::select_all(ready)).await.expect("a leader").0
    }

    /// Publishes payloads through the leader until `enough` are acknowledged in all, and goes on
    /// in the background until the leader is gone.
    async fn load(&self, round: u64, acknowledged: &Acknowledged, enough: usize) -> usize {
        let leader = self.leader().await;
        let group = self.machines[leader].as_ref().unwrap().node.group.clone();
        let (acknowledged, progress) = (acknowledged.clone(), Arc::new(Notify::new()));
        let reached = progress.clone();
        let acks = acknowledged.clone();
        tokio::spawn(async move {
            let term = group.status().term;
            for n in 0u64.. {
                let payload = [&round.to_le_bytes()[..], &n.to_le_bytes(), &vec![n as u8; (n % 700) as usize]].concat();
                let payload = Bytes::from(payload);
                let Ok(proposal) = group.propose(term, batch(payload.to_vec())).await else { return };
                let (acks, progress) = (acks.clone(), progress.clone());
                let answer = async move {
                    let Ok(applied) = proposal.await else { return };
                    acks.lock().unwrap().push((applied.base_offset, payload));
                    progress.notify_one();
                };
                // Some wait for their answer, so that the load does not run away from the disk.
                if n.is_multiple_of(16) { answer.await } else { drop(tokio::spawn(answer)) }
            }
        });
        let waiting = async {
            while acknowledged.lock().unwrap().len() < enough {
                reached.notified().await;
            }
        };
        timeout(PATIENCE, waiting).await.expect("acknowledgements in time");
        leader
    }

    /// Every replica has every acknowledged payload at its offset, and all replicas agree.
    async fn check(&self, acknowledged: &Acknowledged, seed: u64) {
        let leader = self.leader().await;
        let group = &self.machines[leader].as_ref().unwrap().node.group;
        let term = group.status().term;
        let proposal = group.propose(term, batch(b"last".to_vec())).await.unwrap();
        let last = timeout(PATIENCE, proposal).await.expect("an answer in time").unwrap();
        let expected = payloads(group);
        for (offset, payload) in acknowledged.lock().unwrap().iter() {
            let found = expected.get(offset.0 as usize);
            assert_eq!(found, Some(payload), "seed {seed}: acknowledged at offset {offset}");
        }
        for machine in self.machines.iter().flatten() {
            let mut readable = machine.node.group.readable();
            let reached = readable.wait_for(|readable| readable.index >= Some(last.position.index));
            timeout(PATIENCE, reached).await.expect("convergence in time").unwrap();
            let found = payloads(&machine.node.group);
            assert!(found[..expected.len()] == expected[..], "seed {seed}: replicas differ");
        }
    }
}

async fn run(seed: u64) {
    eprintln!("replay with: ARQON_SEED={seed} cargo test --release -p arqon-raft --test power");
    let mut cluster = Cluster::start().await;
    let acknowledged = Acknowledged::default();
    for round in 0..4 {
        let enough = acknowledged.lock().unwrap().len() + 40 + (seed as usize * 7 + round as usize * 13) % 100;
        let leader = cluster.load(round, &acknowledged, enough).await;
        let all = round % 2 == 0;
        let cut: Vec<usize> = (0..3).filter(|at| all || *at == leader).collect();
        for at in &cut {
            cluster.power_off(*at, seed * 100 + round * 10 + *at as u64);
        }
        // At once: a leader that comes back inside its old lease is the dangerous one.
        for at in cut {
            cluster.power_on(at).await;
        }
        cluster.check(&acknowledged, seed).await;
    }
    for at in 0..3 {
        cluster.power_off(at, 0);
    }
}

fn seeds(default: std::ops::Range<u64>) -> Vec<u64> {
    match std::env::var("ARQON_SEED") {
        Ok(seed) => vec![seed.parse().expect("ARQON_SEED is a number")],
        Err(_) => default.collect(),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn acknowledged_batches_survive_power_cuts() {
    for seed in seeds(0..4) {
        run(seed).await;
    }
}
