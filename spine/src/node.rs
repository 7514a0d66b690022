//! A broker node: everything above, started and stopped in the right order.

use std::{
    collections::HashMap,
    io,
    net::{SocketAddr, TcpListener},
    sync::{Arc, Mutex, atomic::AtomicBool},
    time::Duration,
};

use arqon_proto::{OPERATOR_TOPIC, SYSTEM_TENANT, Verifier, wire};
use arqon_raft::{Host, HostOptions};
use arqon_storage::{Identity, Store};
use futures_util::future::BoxFuture;
use tokio::{
    sync::watch,
    task::JoinHandle,
    time::{Instant, MissedTickBehavior, interval, sleep, timeout},
};
use tonic::transport::Server;

use crate::{
    admin,
    broker::{Broker, BrokerServices},
    clock::Clock,
    config::{Config, ConfigError, ListenAddresses},
    control,
    health::Health,
    join::open_metadata,
    metrics::Metrics,
    operators::{self, OperatorKey, Operators, Seen},
    partition::{Ahead, Partition},
    replicas::Replicas,
    session,
    tls::{Ports, Tls},
};

/// How long each step of a shutdown may take.
const SHUTDOWN_PATIENCE: Duration = Duration::from_secs(10);
const CLOSED_LOOK_INTERVAL: Duration = Duration::from_secs(1);
const EXPIRY_INTERVAL: Duration = Duration::from_secs(1);
/// A tick that is this late says that the node itself stood still.
const PAUSE_MIN: Duration = Duration::from_secs(3);
const FOLLOW_WAIT_MS: u32 = 5_000;
const FOLLOW_RETRY_DELAY: Duration = Duration::from_millis(200);

/// Why a node does not start: one line.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The configuration is wrong.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// An address cannot be listened on.
    #[error("listen.{key}: cannot listen on {address}: {source}")]
    Listen {
        /// Which port.
        key: &'static str,
        /// The address.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// The data directory cannot be used.
    #[error("data: {0}")]
    Storage(#[from] arqon_storage::OpenError),
    /// The metadata replica cannot be opened.
    #[error("data: {0}")]
    Metadata(#[from] arqon_raft::OpenError),
    /// The metadata replica may not be trusted, and the configuration names nobody who has another one.
    #[error(
        "data: {0}; name the other nodes of its cluster as [[peers]] and it is copied from them; a cluster of this node alone has no other copy but a backup of the data directory"
    )]
    MetadataLost(#[source] arqon_raft::OpenError),
    /// Logs of partitions are here and that of the metadata is not, and nobody is configured who has it.
    #[error(
        "data: the log of the metadata is missing beside other data; name the other nodes of its cluster as [[peers]] and it is copied from them; a cluster of this node alone has no other copy but a backup of the data directory"
    )]
    MetadataMissing,
    /// The data directory is empty, and the configuration names nobody who could tell whose it is.
    #[error(
        "bootstrap: the data directory is empty and the configuration names no other node: name those of its cluster as [[peers]], or set bootstrap = true to form a new cluster of this node alone"
    )]
    Alone,
    /// This node was to form a cluster, and another one is at work in a cluster of the same name.
    #[error(
        "bootstrap: node {node} has called under the name and secret of this cluster, so one stands or is being formed: name its nodes as [[peers]] and leave bootstrap out"
    )]
    ClusterStands {
        /// The node that called.
        node: u64,
    },
    /// The threads that read old data cannot be started.
    #[error("cannot start a thread: {0}")]
    Thread(#[source] io::Error),
}

impl StartError {
    /// Whether it is the disk that refused: another try may find it well again.
    #[must_use]
    pub fn is_of_disk(&self) -> bool {
        use arqon_storage::OpenError;
        match self {
            Self::Storage(OpenError::Io { .. }) => true,
            Self::Metadata(arqon_raft::OpenError::Io { source, .. }) => {
                let opened = source.get_ref().and_then(|inner| inner.downcast_ref());
                source.raw_os_error().is_some() || matches!(opened, Some(OpenError::Io { .. }))
            }
            _ => false,
        }
    }
}

/// Ports that are bound already, so that a cluster can be configured with ports that the
/// system chose.
#[derive(Debug)]
pub struct Listeners {
    client: TcpListener,
    peer: TcpListener,
    control: TcpListener,
    admin: TcpListener,
}

impl Listeners {
    /// Binds all four ports.
    ///
    /// # Errors
    /// [`StartError::Listen`] naming key and address.
    pub fn bind(addresses: &ListenAddresses) -> Result<Self, StartError> {
        let bind = |key, address: SocketAddr| {
            let bound = std_listener(address);
            bound.map_err(|source| StartError::Listen { key, address, source })
        };
        Ok(Self {
            client: bind("client", addresses.client)?,
            peer: bind("peer", addresses.peer)?,
            control: bind("control", addresses.control)?,
            admin: bind("admin", addresses.admin)?,
        })
    }

    /// The addresses, with the real ports.
    ///
    /// # Errors
    /// The system does not know them.
    pub fn addresses(&self) -> io::Result<ListenAddresses> {
        Ok(ListenAddresses {
            client: self.client.local_addr()?,
            peer: self.peer.local_addr()?,
            control: self.control.local_addr()?,
            admin: self.admin.local_addr()?,
        })
    }
}

fn std_listener(address: SocketAddr) -> io::Result<TcpListener> {
    let listener = TcpListener::bind(address)?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// A running node.
pub struct Node {
    broker: Arc<Broker>,
    addresses: ListenAddresses,
    edges: Vec<JoinHandle<()>>,
    tasks: Vec<JoinHandle<()>>,
}

/// What a configuration names files of: read before anything is made.
struct Keys {
    secret: Vec<u8>,
    verifier: Verifier,
    tls: Option<Ports>,
}

impl Keys {
    fn read(config: &Config) -> Result<Self, StartError> {
        config.check()?;
        let tls = config.tls.as_ref().map(Tls::load).transpose()?;
        Ok(Self { secret: config.secret()?, verifier: config.verifier()?, tls })
    }
}

impl Node {
    /// Starts a node. It listens when this returns; it serves as soon as the cluster has
    /// leaders (`/readyz`).
    ///
    /// # Errors
    /// [`StartError`]; nothing is left running.
    pub async fn start(config: Config) -> Result<Self, StartError> {
        config.check()?;
        let listeners = Listeners::bind(&config.listen_addresses()?)?;
        Self::start_on(config, listeners).await
    }

    /// Starts a node on ports that are bound already.
    ///
    /// # Errors
    /// As [`Node::start`].
    pub async fn start_on(config: Config, listeners: Listeners) -> Result<Self, StartError> {
        Self::start_by(config, listeners, Clock::default()).await
    }

    /// Starts a node that goes by `clock`, on ports that are bound already.
    ///
    /// # Errors
    /// As [`Node::start`].
    pub async fn start_by(config: Config, listeners: Listeners, clock: Clock) -> Result<Self, StartError> {
        let keys = Keys::read(&config)?;
        let identity = Identity { cluster: config.cluster.clone(), node: config.node_id() };
        let store = Store::open(&config.data, identity, config.storage.options())?;
        Self::start_with(config, keys, listeners, clock, store).await
    }

    /// Starts a node over a data directory that is open, on ports that are bound already. With a store
    /// without threads, the node starts none either.
    ///
    /// # Errors
    /// As [`Node::start`].
    pub async fn start_over(
        config: Config,
        listeners: Listeners,
        clock: Clock,
        store: Store,
    ) -> Result<Self, StartError> {
        let keys = Keys::read(&config)?;
        Self::start_with(config, keys, listeners, clock, store).await
    }

    fn start_with(
        config: Config,
        Keys { secret, verifier, tls }: Keys,
        listeners: Listeners,
        clock: Clock,
        store: Store,
    ) -> BoxFuture<'static, Result<Self, StartError>> {
        Box::pin(async move {
            let (client_tls, peer_tls, control_server) = match tls {
                Some(tls) => (Some(tls.client), Some(tls.peer), tls.control),
                None => (None, None, Server::builder()),
            };
            let listen = config.listen_addresses()?;
            let refused = |source| StartError::Listen { key: "client", address: listen.client, source };
            let addresses = listeners.addresses().map_err(refused)?;
            let [client, peer, control_port, admin_port] =
                [listeners.client, listeners.peer, listeners.control, listeners.admin]
                    .map(tokio::net::TcpListener::from_std);
            let (client, peer, control_port, admin_port) = (
                client.map_err(refused)?,
                peer.map_err(refused)?,
                control_port.map_err(refused)?,
                admin_port.map_err(refused)?,
            );

            let ahead = Ahead::start(store.has_threads()).map_err(StartError::Thread)?;
            let node = config.node_id();
            tracing::info!(node = node.0, cluster = config.cluster, backend = store.backend_name(), "node starts");

            let nodes = config.nodes(&addresses);
            let cluster = config.cluster.clone();
            let options = HostOptions { node, cluster, secret, tls: peer_tls, peer_listener: peer };
            let host = Host::start(options, store.clone());
            host.set_peers(nodes.iter().map(|info| (info.node.into(), info.peer_address.clone())));
            let metadata = match open_metadata(&host, &store, node, &nodes, config.bootstrap).await {
                Ok(metadata) => metadata,
                Err(error) => {
                    host.shutdown().await;
                    return Err(error);
                }
            };
            let metrics = Arc::new(Metrics::default());
            let replicas = Arc::new(Replicas::new(node, host.clone(), store.clone(), metrics.partitions.clone()));
            let broker = Arc::new(Broker {
                node,
                cluster: config.cluster,
                program: config.program,
                configured: nodes,
                host,
                store: store.clone(),
                metadata,
                replicas,
                operators: Operators::default(),
                verifier,
                health: Arc::new(Health::new(node, clock, store.clone())),
                metrics,
                stopping: watch::Sender::new(false),
                leaders: Mutex::new(HashMap::new()),
                moves: Mutex::default(),
                slow: AtomicBool::default(),
            });
            answer_forwards(&broker);
            let tasks = start_tasks(&broker, ahead);
            let edges = vec![
                tokio::spawn(session::serve(broker.clone(), client, client_tls)),
                tokio::spawn(control::serve(broker.clone(), control_port, control_server)),
                tokio::spawn(admin::serve(broker.clone(), admin_port)),
            ];
            Ok(Self { broker, addresses, edges, tasks })
        })
    }

    /// Where the node listens, with the real ports.
    #[must_use]
    pub fn addresses(&self) -> ListenAddresses {
        self.addresses
    }

    /// Why the node should get no clients now; `None` when it is ready.
    #[must_use]
    pub fn not_ready(&self) -> Option<String> {
        self.broker.not_ready()
    }

    /// Waits until a failed write or sync has closed a log of this node, which only another start opens again, and
    /// says what: one line. Everything else goes on.
    pub async fn closed(&self) -> String {
        let mut looks = interval(CLOSED_LOOK_INTERVAL);
        loop {
            looks.tick().await;
            if let Some(reason) = self.broker.closed() {
                return reason;
            }
        }
    }

    /// Stops accepting, lets sessions drain, hands leadership over, flushes and closes the
    /// data directory.
    pub fn shutdown(self) -> BoxFuture<'static, ()> {
        Box::pin(async move {
            let Self { broker, edges, tasks, .. } = self;
            broker.stopping.send_replace(true);
            join(edges, "clients").await;
            for task in &tasks {
                task.abort();
            }
            join(tasks, "tasks").await;
            if timeout(SHUTDOWN_PATIENCE, broker.replicas.shutdown()).await.is_err() {
                tracing::warn!("partitions did not stop in time");
            }
            if timeout(SHUTDOWN_PATIENCE, broker.host.shutdown()).await.is_err() {
                tracing::warn!("groups did not stop in time");
            }
            tracing::info!(node = broker.node.0, "node stopped");
        })
    }
}

async fn join(tasks: Vec<JoinHandle<()>>, what: &str) {
    for mut task in tasks {
        match timeout(SHUTDOWN_PATIENCE, &mut task).await {
            Ok(Err(error)) if error.is_panic() => tracing::error!(%error, what, "a task has panicked"),
            Ok(_) => {}
            Err(_) => {
                tracing::warn!(what, "did not stop in time");
                task.abort();
            }
        }
    }
}

fn answer_forwards(broker: &Arc<Broker>) {
    let weak = Arc::downgrade(broker);
    broker.host.on_forward(Arc::new(move |_, kind, body| {
        let weak = weak.clone();
        Box::pin(async move {
            match weak.upgrade() {
                Some(broker) => broker.handle_forward(kind, body).await,
                None => Err("the node is shutting down".to_owned()),
            }
        })
    }));
}

fn start_tasks(broker: &Arc<Broker>, ahead: Ahead) -> Vec<JoinHandle<()>> {
    let services = Arc::new(BrokerServices::new(broker, ahead));
    let replicas = broker.replicas.clone().run(broker.metadata.clone(), services, broker.stopping.subscribe());
    vec![
        tokio::spawn(broker.metadata.clone().run_duties(broker.configured.clone())),
        tokio::spawn(replicas),
        tokio::spawn(broker.clone().run_leader_watch()),
        tokio::spawn(broker.clone().run_balance()),
        tokio::spawn(broker.clone().run_members()),
        tokio::spawn(broker.clone().run_replacements()),
        tokio::spawn(broker.clone().run_slow_watch()),
        tokio::spawn(follow_nodes(broker.clone())),
        tokio::spawn(broker.clone().run_health()),
        tokio::spawn(follow_operators(broker.clone())),
        tokio::spawn(expire_operators(broker.clone())),
    ]
}

/// Tells the transport where nodes are that were added to the cluster.
async fn follow_nodes(broker: Arc<Broker>) {
    let mut published = broker.metadata.watch();
    let mut known: Arc<[wire::NodeInfo]> = broker.configured.as_slice().into();
    loop {
        let nodes = published.borrow_and_update().nodes.clone();
        if nodes != known {
            broker.host.set_peers(nodes.iter().map(|info| (info.node.into(), info.peer_address.clone())));
            known = nodes;
        }
        if published.changed().await.is_err() {
            return;
        }
    }
}

/// Reads the operators' topic from the local replica, from its start and for ever.
async fn follow_operators(broker: Arc<Broker>) {
    let mut next = 0;
    // Records up to here were there before: they count by their age.
    let mut past_end = None;
    loop {
        let Some(partition) = operators_partition(&broker) else {
            sleep(FOLLOW_RETRY_DELAY).await;
            continue;
        };
        let request = wire::Fetch {
            topic: OPERATOR_TOPIC.to_owned(),
            offset: next,
            wait_ms: FOLLOW_WAIT_MS,
            any_replica: true,
            ..Default::default()
        };
        let (fetched, batches) = match partition.fetch(request).await {
            Ok(answer) => answer,
            Err(refused) if refused.code() == wire::ErrorCode::OffsetOutOfRange && refused.log_start > next => {
                next = refused.log_start;
                continue;
            }
            Err(refused) => {
                tracing::debug!(refused = refused.message, "operators' topic not read");
                sleep(FOLLOW_RETRY_DELAY).await;
                continue;
            }
        };
        let past_end = *past_end.get_or_insert(fetched.committed);
        for batch in &batches {
            let is_past = batch.header.base_offset.0 < past_end;
            let left = broker.operators.follow(batch, seen(batch.header.time_ms, broker.health.now_ms(), is_past));
            take_leases_back(&broker, left).await;
            next = next.max(batch.header.next_offset().0);
        }
    }
}

fn operators_partition(broker: &Broker) -> Option<Partition> {
    let published = broker.metadata.published();
    let topic = published.state.topic(SYSTEM_TENANT, OPERATOR_TOPIC)?;
    broker.replicas.get(topic.partitions.first()?.group.into())
}

fn seen(time_ms: u64, now_ms: u64, is_past: bool) -> Seen {
    let age = if is_past { Duration::from_millis(now_ms.saturating_sub(time_ms)) } else { Duration::ZERO };
    let now = Instant::now();
    // The clock may not reach back further than the machine has been up.
    Seen { at: now.checked_sub(age.min(operators::EXPIRY)).unwrap_or(now), is_fresh: age < operators::EXPIRY, time_ms }
}

async fn expire_operators(broker: Arc<Broker>) {
    let mut ticks = interval(EXPIRY_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut last = Instant::now();
    loop {
        ticks.tick().await;
        let now = Instant::now();
        let pause = now.saturating_duration_since(last);
        if pause > PAUSE_MIN {
            broker.operators.forgive(pause);
        }
        last = now;
        let expired = broker.operators.expire(now);
        for (tenant, id) in &expired {
            tracing::info!(tenant, operator = id, "operator expired");
        }
        take_leases_back(&broker, expired).await;
    }
}

async fn take_leases_back(broker: &Broker, operators: Vec<OperatorKey>) {
    for (tenant, id) in operators {
        for partition in broker.replicas.open() {
            if partition.topic().tenant == tenant {
                partition.expire_operator(&id).await;
            }
        }
    }
}
