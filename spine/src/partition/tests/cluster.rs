//! A small cluster: every node has a replica of every partition.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use arqon_proto::{
    Batch, BatchBuilder, Compression, DecodeError, GroupId, LeaseKey, NodeId, PartitionId, ProducerStamp, Record,
    ReplicaId, TopicClass, records, wire, wire::ErrorCode,
};
use arqon_raft::{GroupSpec, Host, HostOptions};
use arqon_storage::{Identity, Options, Store};
use futures_util::future::{BoxFuture, select_all};
use tokio::net::TcpListener;

use crate::partition::{Ahead, Partition, PartitionMetrics, Services};

pub const JOBS: &str = "a.jobs";
pub const RESULTS: &str = "a.results";
pub const DEAD: &str = "a.jobs.dead";
pub const EVENTS: &str = "a.events";
pub const TENANT: &str = "acme";
pub const PATIENCE: Duration = Duration::from_secs(60);

/// What all nodes of the test share, and the way between them.
pub struct Shared {
    pub partitions: Mutex<HashMap<String, Vec<(NodeId, Partition)>>>,
    pub now_ms: AtomicU64,
    /// Topics whose next routed writes fail after they were done, as when an answer is lost.
    pub lost_answer_count: AtomicU64,
    pub ahead: Ahead,
    /// Whether disks are nearly full.
    pub is_low: AtomicBool,
    /// Whether clocks are wrong.
    pub is_clock_off: AtomicBool,
}

impl Shared {
    pub async fn leader(&self, topic: &str) -> Partition {
        let replicas = self.partitions.lock().unwrap()[topic].clone();
        let leads = replicas.into_iter().map(|(_, partition)| {
            Box::pin(async move {
                let mut status = partition.group().watch();
                loop {
                    status.borrow_and_update();
                    if partition.replica.leading_term().is_some() {
                        return partition;
                    }
                    // A stopped replica never leads.
                    if status.changed().await.is_err() {
                        std::future::pending::<()>().await;
                    }
                }
            })
        });
        tokio::time::timeout(PATIENCE, select_all(leads)).await.expect("a leader in time").0
    }
}

impl Services for Shared {
    fn lease_keys(&self) -> Arc<[LeaseKey]> {
        keys()
    }

    fn node_client_address(&self, node: NodeId) -> Option<String> {
        Some(format!("node-{node}:7700"))
    }

    fn partition_count(&self, _tenant: &str, topic: &str) -> Option<u32> {
        self.partitions.lock().unwrap().contains_key(topic).then_some(1)
    }

    fn produce_routed(
        &self,
        tenant: String,
        request: wire::Produce,
        batch: Batch,
    ) -> BoxFuture<'static, Result<wire::Produced, wire::Error>> {
        assert_eq!(tenant, TENANT);
        let replicas = self.partitions.lock().unwrap()[&request.topic].clone();
        let is_lost = self
            .lost_answer_count
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |count| count.checked_sub(1))
            .is_ok();
        Box::pin(async move {
            let leader = replicas.iter().find(|(_, partition)| partition.replica.leading_term().is_some());
            let Some((_, leader)) = leader else {
                return Err(wire::Error { code: ErrorCode::NotLeader.into(), ..Default::default() });
            };
            let produced = leader.produce(request, batch).await;
            if is_lost {
                return Err(wire::Error { code: ErrorCode::UnknownOutcome.into(), ..Default::default() });
            }
            produced
        })
    }

    fn now_ms(&self) -> u64 {
        self.now_ms.load(Ordering::Relaxed)
    }

    fn ahead(&self) -> &Ahead {
        &self.ahead
    }

    fn storage_refusal(&self, nodes: &[NodeId]) -> Option<String> {
        assert!(!nodes.is_empty(), "a leader knows its voters");
        self.is_low.load(Ordering::Relaxed).then(|| "the disk is nearly full".to_owned())
    }

    fn clock_is_sound(&self) -> bool {
        !self.is_clock_off.load(Ordering::Relaxed)
    }
}

pub fn keys() -> Arc<[LeaseKey]> {
    Arc::new([LeaseKey::new(1, &[1; 32]), LeaseKey::new(2, &[2; 32])])
}

pub struct Cluster {
    pub shared: Arc<Shared>,
    pub hosts: Vec<Host>,
    pub metrics: Arc<PartitionMetrics>,
    dirs: Vec<tempfile::TempDir>,
}

impl Cluster {
    pub async fn start(node_count: u64) -> Self {
        let shared = Arc::new(Shared {
            partitions: Mutex::default(),
            now_ms: AtomicU64::new(1_000_000),
            lost_answer_count: AtomicU64::new(0),
            ahead: Ahead::start(true).unwrap(),
            is_low: AtomicBool::new(false),
            is_clock_off: AtomicBool::new(false),
        });
        let dirs = (0..node_count).map(|_| tempfile::tempdir().unwrap()).collect();
        let mut cluster = Self { shared, hosts: Vec::new(), metrics: Arc::default(), dirs };
        cluster.open().await;
        cluster
    }

    async fn open(&mut self) {
        let nodes: Vec<_> = (1..=self.dirs.len() as u64).map(NodeId).collect();
        let mut addresses = Vec::new();
        for (node, dir) in nodes.iter().zip(&self.dirs) {
            let peer_listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            addresses.push((*node, peer_listener.local_addr().unwrap().to_string()));
            let identity = Identity { cluster: "test".into(), node: *node };
            let store = Store::open(dir.path(), identity, Options::default()).unwrap();
            let secret = vec![7; 32];
            self.hosts.push(Host::start(
                HostOptions { node: *node, cluster: "test".into(), secret, tls: None, peer_listener },
                store,
            ));
        }
        for host in &self.hosts {
            host.set_peers(addresses.clone());
        }
        for (group, name) in (1..).zip([JOBS, RESULTS, DEAD, EVENTS]) {
            let replica_of = |node: NodeId| ReplicaId(group * 10 + node.0);
            let initial: Vec<_> = nodes.iter().map(|node| (replica_of(*node), *node)).collect();
            for (node, host) in nodes.iter().zip(&self.hosts) {
                let spec = GroupSpec {
                    group: GroupId(group),
                    replica: replica_of(*node),
                    initial: initial.clone(),
                    may_create: true,
                    first: node.0 == 1,
                    followers_act: false,
                    owner: "test".to_owned(),
                };
                let topic = Arc::new(topic(name));
                let services = self.shared.clone();
                let metrics = self.metrics.clone();
                let partition = Partition::open(host, spec, topic, PartitionId(0), services, metrics).await.unwrap();
                self.shared.partitions.lock().unwrap().entry(name.into()).or_default().push((*node, partition));
            }
        }
    }

    pub async fn leader(&self, topic: &str) -> Partition {
        self.shared.leader(topic).await
    }

    pub fn replicas(&self, topic: &str) -> Vec<Partition> {
        self.shared.partitions.lock().unwrap()[topic].iter().map(|(_, partition)| partition.clone()).collect()
    }

    /// Stops everything and opens it again from the disks.
    pub async fn restart(&mut self) {
        let partitions = std::mem::take(&mut *self.shared.partitions.lock().unwrap());
        for (_, partition) in partitions.into_values().flatten() {
            partition.shutdown().await;
        }
        for host in self.hosts.drain(..) {
            host.shutdown().await;
        }
        self.open().await;
    }
}

pub fn topic(name: &str) -> wire::TopicConfig {
    let class = TopicClass::of(name);
    wire::TopicConfig {
        tenant: TENANT.into(),
        name: name.into(),
        class: class.name().into(),
        partitions: 1,
        attempts_max: 2,
        retention_bytes: 1 << 20,
        results_topic: if class == TopicClass::Jobs { RESULTS.into() } else { String::new() },
        ..Default::default()
    }
}

pub fn batch_of(payloads: impl IntoIterator<Item = String>, producer: Option<(u8, u64)>) -> Batch {
    let mut builder = BatchBuilder::new();
    for payload in payloads {
        builder.push(&Record { payload: payload.into(), ..Default::default() }).unwrap();
    }
    let stamp = producer.map(|(id, base_sequence)| ProducerStamp { id: [id; 16], epoch: 0, base_sequence });
    builder.build(Compression::Lz4, stamp)
}

pub fn produce_to(topic: &str) -> wire::Produce {
    wire::Produce { topic: topic.into(), ..Default::default() }
}

pub fn with_tokens(topic: &str, tokens: impl IntoIterator<Item = bytes::Bytes>) -> wire::Produce {
    wire::Produce { lease_tokens: tokens.into_iter().collect(), ..produce_to(topic) }
}

/// Payloads of the batches as text, with their offsets.
pub fn payloads(batches: &[Batch]) -> Vec<(u64, String)> {
    let mut out = Vec::new();
    for batch in batches {
        records(batch, |index, record| {
            let offset = batch.header.base_offset.0 + u64::from(index);
            out.push((offset, String::from_utf8(record.payload.to_vec()).unwrap()));
            Ok::<_, DecodeError>(())
        })
        .unwrap();
    }
    out
}

/// Everything readable of a partition's leader.
pub async fn drain(partition: &Partition) -> Vec<Batch> {
    let mut out: Vec<Batch> = Vec::new();
    loop {
        let offset = out.last().map_or(0, |batch| batch.header.next_offset().0);
        let request = wire::Fetch { offset, linearizable: true, ..Default::default() };
        let (_, batches) = partition.fetch(request).await.unwrap();
        if batches.is_empty() {
            return out;
        }
        out.extend(batches);
    }
}

pub fn code<T: std::fmt::Debug>(result: Result<T, wire::Error>) -> ErrorCode {
    result.unwrap_err().code()
}
