//! All groups of a node, and the transport that they share.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    io,
    sync::{
        Arc, Mutex, PoisonError, RwLock, RwLockReadGuard,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use arqon_proto::{GroupId, NodeId, ReplicaId, limits, wire};
use arqon_storage::{Space, Store};
use bytes::Bytes;
use futures_util::{
    StreamExt,
    future::{BoxFuture, join_all},
    stream,
};
use tokio::{
    net::TcpListener,
    sync::{Semaphore, watch},
    task::JoinHandle,
    time::timeout,
};

use crate::{
    aside::aside,
    config::raft_config,
    group::Group,
    machine::{Machine, Readable, StateMachine},
    network::{Network, Peer},
    peer::{
        Failure, PeerTls, Secret,
        framed::Body,
        incoming,
        outgoing::{Outgoing, Target},
    },
    pulse::{self, Pulse},
    repair::{self, DamageSummary, Repairs},
    store::{InstalledSlot, LogStore},
    types::{ReplicaAt, TypeConfig},
};

pub(crate) type Raft = openraft::Raft<TypeConfig, Machine>;

/// Peer connections accepted at once.
const INCOMING_COUNT_MAX: usize = 1_024;
/// A replica that is not the first waits this long for another to initialise a new group.
const INITIALISE_PATIENCE: Duration = Duration::from_secs(2);
/// Followers that only keep a copy may go this long without being told of a commit.
const COMMIT_PATIENCE: Duration = Duration::from_millis(250);
/// A forwarded request may wait for a commit on the other side.
const FORWARD_PATIENCE: Duration = Duration::from_secs(15);
/// Replicas stopped at the same time.
const STOP_COUNT_MAX: usize = 64;
/// A leader that shuts down waits this long for another to take over.
const HAND_OVER_PATIENCE: Duration = Duration::from_millis(1_500);

/// What a host is made of.
pub struct HostOptions {
    /// This node.
    pub node: NodeId,
    /// Name of the cluster; peers of another are refused.
    pub cluster: String,
    /// What all nodes of the cluster know.
    pub secret: Vec<u8>,
    /// Mutual TLS of the peer port; without it the secret alone tells peers apart, which is
    /// enough on loopback only.
    pub tls: Option<PeerTls>,
    /// The bound peer port.
    pub peer_listener: TcpListener,
}

/// A replica to open.
#[derive(Clone, Debug)]
pub struct GroupSpec {
    /// The group.
    pub group: GroupId,
    /// Raft id of this placement; never used before by another.
    pub replica: ReplicaId,
    /// Voters of a new group with their nodes; every one of them is given the same set. None for a
    /// replica that joins a group: its leader makes it a member.
    pub initial: Vec<(ReplicaId, NodeId)>,
    /// Whether the replica may begin with an empty log. One that had a log has voted and
    /// acknowledged: without it, it is quarantined.
    pub may_create: bool,
    /// Whether this replica starts the group at once and so becomes its first leader.
    pub first: bool,
    /// Whether followers are told of every commit at once, because they act on what is applied.
    /// Others learn of it with the next entries, or a quarter of a second later.
    pub followers_act: bool,
    /// Whose data the entries are: files of its log become files of logs of the same owner only.
    pub owner: String,
}

/// Why a replica does not open.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Its log cannot be trusted; it answers neither votes nor appends until it is replaced.
    #[error("replica {replica} of group {group} is quarantined: {reason}")]
    Quarantined {
        /// The group.
        group: GroupId,
        /// The replica.
        replica: ReplicaId,
        /// What is wrong.
        reason: String,
    },
    /// The disk refuses.
    #[error("replica {replica} of group {group} does not open: {source}")]
    Io {
        /// The group.
        group: GroupId,
        /// The replica.
        replica: ReplicaId,
        /// Why.
        source: io::Error,
    },
    /// It is open already.
    #[error("group {0} is open already")]
    AlreadyOpen(GroupId),
}

/// Why a forwarded request has no answer.
#[derive(Debug, thiserror::Error)]
pub enum ForwardError {
    /// No answer; it may have been carried out.
    #[error("node {node}: {reason}")]
    Unreachable {
        /// The node asked.
        node: NodeId,
        /// Why.
        reason: String,
    },
    /// The node's handler answered with an error.
    #[error("{0}")]
    Refused(String),
}

/// Answers requests that other nodes forward: (from, kind, body).
pub type ForwardHandler = Arc<dyn Fn(NodeId, String, Bytes) -> BoxFuture<'static, Result<Bytes, String>> + Send + Sync>;

pub(crate) enum Replica {
    Running(Group),
    Quarantined { replica: ReplicaId, reason: String },
}

struct PeerEntry {
    address: watch::Sender<String>,
    peer: Arc<Peer>,
}

pub(crate) struct HostInner {
    pub node: NodeId,
    pub secret: Secret,
    pub tls: Option<PeerTls>,
    cluster: String,
    store: Store,
    peers: RwLock<BTreeMap<NodeId, PeerEntry>>,
    diallers: RwLock<BTreeSet<NodeId>>,
    groups: RwLock<HashMap<GroupId, Replica>>,
    forward: RwLock<Option<ForwardHandler>>,
    pub repairs: Arc<Repairs>,
    pub stopping: watch::Sender<bool>,
    /// The task that holds the peer port.
    accepting: Mutex<Option<JoinHandle<()>>>,
    started: Instant,
}

/// All groups of a node and its peer transport. Cheap to clone.
#[derive(Clone)]
pub struct Host {
    inner: Arc<HostInner>,
}

impl HostInner {
    /// The connections to a node, made when first asked for.
    pub(crate) fn peer(&self, node: NodeId) -> Arc<Peer> {
        if let Some(entry) = self.peers.read().unwrap_or_else(PoisonError::into_inner).get(&node) {
            return entry.peer.clone();
        }
        let mut peers = self.peers.write().unwrap_or_else(PoisonError::into_inner);
        peers.entry(node).or_insert_with(|| self.connect(node)).peer.clone()
    }

    fn connect(&self, node: NodeId) -> PeerEntry {
        let (address, watched) = watch::channel(String::new());
        let start = |bulk| {
            Outgoing::start(Target {
                node,
                bulk,
                own_node: self.node,
                secret: self.secret.clone(),
                tls: self.tls.clone(),
                address: watched.clone(),
            })
        };
        let peer = Peer { control: start(false), bulk: start(true), answered_ms: AtomicU64::new(0) };
        PeerEntry { address, peer: Arc::new(peer) }
    }

    /// The Raft of a local replica, or what to answer a peer that asks for it.
    pub(crate) fn raft(&self, group: GroupId, replica: u64) -> Result<Raft, wire::PeerError> {
        use wire::peer_error::Code;
        let error = |code: Code, message: String| wire::PeerError { code: code.into(), message };
        let groups = self.groups.read().unwrap_or_else(PoisonError::into_inner);
        match groups.get(&group) {
            Some(Replica::Running(running)) if running.replica().0 == replica => Ok(running.raft().clone()),
            Some(Replica::Quarantined { replica: id, reason }) if id.0 == replica => {
                Err(error(Code::Quarantined, reason.clone()))
            }
            _ => {
                Err(error(Code::NoReplica, format!("replica {replica} of group {group} is not on node {}", self.node)))
            }
        }
    }

    /// What the disk of this node still takes.
    pub(crate) fn space(&self) -> Space {
        self.store.space()
    }

    /// Ranges of damaged entries in all logs of this node.
    pub(crate) fn damage_count(&self) -> u64 {
        self.store.metrics().damage_count.load(Relaxed)
    }

    /// The other nodes.
    pub(crate) fn peer_nodes(&self) -> Vec<NodeId> {
        self.peers.read().unwrap_or_else(PoisonError::into_inner).keys().copied().collect()
    }

    /// A node has proven the cluster's secret on a connection to this one.
    pub(crate) fn dialled(&self, from: NodeId) {
        let mut diallers = self.diallers.write().unwrap_or_else(PoisonError::into_inner);
        if diallers.contains(&from) {
            return;
        }
        if diallers.len() == limits::DIALLER_COUNT_MAX {
            tracing::warn!(node = from.0, "too many nodes have dialled this one, of which no more are remembered");
            return;
        }
        diallers.insert(from);
    }

    pub(crate) async fn handle_forward(&self, from: NodeId, kind: String, body: Bytes) -> Result<Bytes, String> {
        let handler = self.forward.read().unwrap_or_else(PoisonError::into_inner).clone();
        match handler {
            Some(handler) => handler(from, kind, body).await,
            None => Err("node is starting".into()),
        }
    }

    /// Milliseconds on this host's own clock; never 0.
    pub(crate) fn now_ms(&self) -> u64 {
        self.started.elapsed().as_millis() as u64 + 1
    }

    pub(crate) fn lock_groups(&self) -> RwLockReadGuard<'_, HashMap<GroupId, Replica>> {
        self.groups.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Stops a replica for good that cannot do its work any more, and remembers why, for its peers and
    /// whoever gives it a successor.
    pub(crate) async fn give_up(&self, group: GroupId, reason: String) {
        tracing::error!(group = group.0, "the replica is given up: {reason}");
        let running = {
            let mut groups = self.groups.write().unwrap_or_else(PoisonError::into_inner);
            match groups.get(&group) {
                Some(Replica::Running(running)) => {
                    let running = running.clone();
                    let reason = reason.clone();
                    groups.insert(group, Replica::Quarantined { replica: running.replica(), reason });
                    Some(running)
                }
                // It is being opened, which ends with the reason.
                _ => None,
            }
        };
        self.repairs.give_up(group, reason);
        if let Some(running) = running {
            stop(&running).await;
        }
    }

    fn groups(&self) -> Vec<Group> {
        let groups = self.groups.read().unwrap_or_else(PoisonError::into_inner);
        groups
            .values()
            .filter_map(|replica| match replica {
                Replica::Running(group) => Some(group.clone()),
                Replica::Quarantined { .. } => None,
            })
            .collect()
    }
}

impl Host {
    /// Starts the transport; groups are opened one by one.
    #[must_use]
    pub fn start(options: HostOptions, store: Store) -> Self {
        let inner = Arc::new(HostInner {
            node: options.node,
            secret: Secret::new(&options.cluster, &options.secret),
            cluster: options.cluster,
            tls: options.tls,
            store,
            peers: RwLock::default(),
            diallers: RwLock::default(),
            groups: RwLock::default(),
            forward: RwLock::default(),
            repairs: Arc::default(),
            stopping: watch::Sender::new(false),
            accepting: Mutex::default(),
            started: Instant::now(),
        });
        let accepting = tokio::spawn(accept(inner.clone(), options.peer_listener));
        *inner.accepting.lock().unwrap_or_else(PoisonError::into_inner) = Some(accepting);
        tokio::spawn(pulse::run(inner.clone()));
        tokio::spawn(repair::run(inner.clone()));
        Self { inner }
    }

    /// Tells where the peer ports of the other nodes are.
    pub fn set_peers(&self, peers: impl IntoIterator<Item = (NodeId, String)>) {
        for (node, address) in peers.into_iter().filter(|(node, _)| *node != self.inner.node) {
            self.inner.peer(node);
            let peers = self.inner.peers.read().unwrap_or_else(PoisonError::into_inner);
            if let Some(entry) = peers.get(&node) {
                entry.address.send_if_modified(|old| {
                    let changed = *old != address;
                    *old = address;
                    changed
                });
            }
        }
    }

    /// Whether the control connection to `node` stands. A node reaches itself.
    #[must_use]
    pub fn peer_reachable(&self, node: NodeId) -> bool {
        let peers = self.inner.peers.read().unwrap_or_else(PoisonError::into_inner);
        node == self.inner.node || peers.get(&node).is_some_and(|entry| entry.peer.control.is_connected())
    }

    /// The nodes that have proven the cluster's name and secret on a connection to this one since its start,
    /// whether or not [`Host::set_peers`] named them.
    #[must_use]
    pub fn dialled_by(&self) -> BTreeSet<NodeId> {
        self.inner.diallers.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Opens or creates a replica, recovers its log and starts Raft on it.
    ///
    /// # Errors
    /// [`OpenError`]; a quarantined replica stays known, and its peers are told.
    pub fn open(&self, spec: GroupSpec, machine: Box<dyn StateMachine>) -> BoxFuture<'_, Result<Group, OpenError>> {
        Box::pin(async move {
            let (group, replica, owner) = (spec.group, spec.replica, spec.owner.clone());
            if self.inner.groups.read().unwrap_or_else(PoisonError::into_inner).contains_key(&group) {
                return Err(OpenError::AlreadyOpen(group));
            }
            let io = |source: io::Error| OpenError::Io { group, replica, source };
            // Reads and syncs files: not on a thread that others wait for.
            let store = self.inner.store.clone();
            let open_log = move || {
                if !spec.may_create && !store.has_log(group, replica).unwrap_or(true) {
                    let reason = "its log is gone".to_owned();
                    return Err(arqon_storage::OpenError::Quarantined { group, replica, reason });
                }
                store.open_log(group, replica)
            };
            let log = match aside(self.inner.store.has_threads(), open_log).await.map_err(io)? {
                Ok((log, recovery)) => {
                    tracing::debug!(group = group.0, replica = replica.0, ?recovery, "log opened");
                    log.set_owner(&owner);
                    log
                }
                Err(arqon_storage::OpenError::Quarantined { reason, .. }) => {
                    return Err(self.quarantine(group, replica, reason));
                }
                Err(error) => return Err(io(io::Error::other(error))),
            };
            let installed = InstalledSlot::default();
            let (readable_tx, readable) = watch::channel(Readable::default());
            let blank = machine.fresh();
            let machine = match Machine::open(machine, log.clone(), installed.clone(), readable_tx) {
                Ok(machine) => machine,
                // Its state is lost and cannot be made again from what is retained.
                Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                    return Err(self.quarantine(group, replica, error.to_string()));
                }
                Err(error) => return Err(io(error)),
            };
            let pulse = Arc::new(Pulse::new(&self.inner, spec.first));
            let commit_patience = if spec.followers_act { Duration::ZERO } else { COMMIT_PATIENCE };
            let network = Network { host: self.inner.clone(), group: group.0, pulse: pulse.clone(), commit_patience };
            let repairs = self.inner.repairs.clone();
            // Before openraft reads the log: it may need what is damaged.
            let mut voters = repair::voter_nodes(machine.members());
            if voters.is_empty() {
                voters.push(spec.initial.iter().map(|(_, node)| *node).collect());
            }
            let place = repairs.add(log.clone(), voters);
            let store = LogStore::new(log.clone(), installed, spec.initial.len() == 1, repairs.clone());
            let appended = store.appended();
            let raft = Raft::new(replica.0, raft_config(&self.inner.cluster), network, store, machine)
                .await
                .inspect_err(|_| repairs.remove(group))
                .map_err(|fatal| match place.given_up() {
                    Some(reason) => self.quarantine(group, replica, reason),
                    None => io(io::Error::other(fatal)),
                })?;
            let handle = Group::new(group, replica, (raft.clone(), pulse, appended, repairs), log, readable, blank);
            let running = Replica::Running(handle.clone());
            self.inner.groups.write().unwrap_or_else(PoisonError::into_inner).insert(group, running);
            if let Some(reason) = place.given_up() {
                // Just when openraft had what it needed to start.
                self.inner.give_up(group, reason.clone()).await;
                return Err(OpenError::Quarantined { group, replica, reason });
            }
            self.initialise(&spec, raft).await;
            Ok(handle)
        })
    }

    /// Remembers that the replica may not run, for its peers and the operator.
    fn quarantine(&self, group: GroupId, replica: ReplicaId, reason: String) -> OpenError {
        let quarantined = Replica::Quarantined { replica, reason: reason.clone() };
        self.inner.groups.write().unwrap_or_else(PoisonError::into_inner).insert(group, quarantined);
        OpenError::Quarantined { group, replica, reason }
    }

    /// Gives a new group its first membership. Every initial replica may do it, with the same
    /// set, so that a group starts although some of them are away.
    async fn initialise(&self, spec: &GroupSpec, raft: Raft) {
        let members: BTreeMap<u64, ReplicaAt> =
            spec.initial.iter().map(|(replica, node)| (replica.0, ReplicaAt { node: node.0 })).collect();
        if members.is_empty() || raft.is_initialized().await.unwrap_or(true) {
            return;
        }
        if spec.first {
            log_initialise(raft.initialize(members).await.err());
            return;
        }
        let mut stopping = self.inner.stopping.subscribe();
        tokio::spawn(async move {
            let waited = timeout(INITIALISE_PATIENCE, stopping.wait_for(|stopping| *stopping)).await.is_err();
            if waited && !raft.is_initialized().await.unwrap_or(true) {
                log_initialise(raft.initialize(members).await.err());
            }
        });
    }

    /// Stops a replica; its log stays.
    pub fn close(&self, group: GroupId) -> BoxFuture<'_, ()> {
        Box::pin(async move {
            let removed = self.inner.groups.write().unwrap_or_else(PoisonError::into_inner).remove(&group);
            self.inner.repairs.remove(group);
            if let Some(Replica::Running(running)) = removed {
                stop(&running).await;
            }
        })
    }

    /// Stops a replica and removes its log.
    ///
    /// # Errors
    /// The disk refuses.
    pub fn delete(&self, group: GroupId, replica: ReplicaId) -> BoxFuture<'_, io::Result<()>> {
        Box::pin(async move {
            self.close(group).await;
            self.inner.store.delete_log(group, replica)
        })
    }

    /// Replicas that may not run, with the reason: [`Self::delete`] removes what is left of one.
    #[must_use]
    pub fn quarantined(&self) -> Vec<(GroupId, String)> {
        let groups = self.inner.groups.read().unwrap_or_else(PoisonError::into_inner);
        let mut out: Vec<_> = groups
            .iter()
            .filter_map(|(group, replica)| match replica {
                Replica::Quarantined { reason, .. } => Some((*group, reason.clone())),
                Replica::Running(_) => None,
            })
            .collect();
        out.sort();
        out
    }

    /// Replicas whose logs are damaged, or were and have been repaired, by group.
    #[must_use]
    pub fn damage_summary(&self) -> Vec<DamageSummary> {
        self.inner.repairs.summary()
    }

    /// Asks another node's [`ForwardHandler`].
    ///
    /// # Errors
    /// No answer, or the handler's error.
    pub fn forward<'a>(
        &'a self,
        node: NodeId,
        kind: &'a str,
        body: Bytes,
    ) -> BoxFuture<'a, Result<Bytes, ForwardError>> {
        Box::pin(async move {
            if node == self.inner.node {
                return self.inner.handle_forward(node, kind.to_owned(), body).await.map_err(ForwardError::Refused);
            }
            let message = wire::peer_frame::Body::Forward(wire::ForwardedRequest { kind: kind.to_owned() });
            let frame = wire::PeerFrame { body: Some(message), ..Default::default() };
            let peer = self.inner.peer(node);
            let unreachable = |failure: Failure| ForwardError::Unreachable { node, reason: failure.to_string() };
            match peer.control.call(frame, Body::Bytes(body), FORWARD_PATIENCE).await.map_err(unreachable)? {
                (wire::peer_frame::Body::ForwardReply(reply), body) if reply.ok => Ok(body),
                (wire::peer_frame::Body::ForwardReply(reply), _) => Err(ForwardError::Refused(reply.error)),
                _ => Err(unreachable(Failure::Protocol("something other than a forwarded reply"))),
            }
        })
    }

    /// Sets who answers forwarded requests.
    pub fn on_forward(&self, handler: ForwardHandler) {
        *self.inner.forward.write().unwrap_or_else(PoisonError::into_inner) = Some(handler);
    }

    /// Hands leadership over where another voter can take it, stops all groups and the
    /// transport, and closes the store.
    pub fn shutdown(&self) -> BoxFuture<'_, ()> {
        Box::pin(async move {
            let groups = self.inner.groups();
            join_all(groups.iter().map(|group| hand_over(self, group))).await;
            stream::iter(&groups).for_each_concurrent(STOP_COUNT_MAX, save_state).await;
            self.inner.stopping.send_replace(true);
            // The port is free when this is over: the node may be started again at once.
            let accepting = self.inner.accepting.lock().unwrap_or_else(PoisonError::into_inner).take();
            if let Some(accepting) = accepting {
                accepting.await.ok();
            }
            self.inner.repairs.clear();
            self.inner.groups.write().unwrap_or_else(PoisonError::into_inner).clear();
            join_all(groups.iter().map(stop)).await;
            self.inner.peers.write().unwrap_or_else(PoisonError::into_inner).clear();
            *self.inner.forward.write().unwrap_or_else(PoisonError::into_inner) = None;
            drop(groups);
            self.inner.store.clone().close().await;
        })
    }
}

fn log_initialise(error: Option<impl std::fmt::Display>) {
    if let Some(error) = error {
        // Another replica was faster: the usual case, not a failure.
        tracing::debug!(%error, "group not initialised from here");
    }
}

async fn stop(group: &Group) {
    if let Err(error) = group.raft().shutdown().await {
        tracing::warn!(group = group.id().0, %error, "group did not stop cleanly");
    }
}

/// So that the next start has little to apply again.
async fn save_state(group: &Group) {
    if !group.log().damaged().is_empty() {
        // What is being applied may wait for a repair, and would be waited for here.
        return;
    }
    if let Err(error) = group.save_state().await {
        tracing::warn!(group = group.id().0, %error, "checkpoint not saved, a restart will take longer");
    }
}

async fn hand_over(host: &Host, group: &Group) {
    let status = group.status();
    let own = host.inner.node;
    let heir = status.voters.iter().copied().find(|node| *node != own && host.peer_reachable(*node));
    let (true, Some(heir)) = (status.is_leader, heir) else { return };
    let mut watch = group.watch();
    if group.transfer_leader(heir).await.is_ok() {
        // Best effort: without it the others elect after their time-out.
        timeout(HAND_OVER_PATIENCE, watch.wait_for(|status| !status.is_leader)).await.ok();
    }
}

async fn accept(host: Arc<HostInner>, listener: TcpListener) {
    let slots = Arc::new(Semaphore::new(INCOMING_COUNT_MAX));
    let mut stopping = host.stopping.subscribe();
    loop {
        let Ok(slot) = slots.clone().acquire_owned().await else { return };
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = stopping.wait_for(|stopping| *stopping) => return,
        };
        match accepted {
            Ok((stream, from)) => {
                let (host, mut stopping) = (host.clone(), host.stopping.subscribe());
                tokio::spawn(async move {
                    let end = tokio::select! {
                        end = incoming::serve(host, stream) => end,
                        _ = stopping.wait_for(|stopping| *stopping) => Ok(()),
                    };
                    if let Err(error) = end {
                        tracing::debug!(%from, %error, "peer connection ended");
                    }
                    drop(slot);
                });
            }
            // Out of descriptors, for example: wait for connections to go rather than spin.
            Err(error) => {
                tracing::warn!(%error, "cannot accept a peer");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}
