//! The metadata's Raft group: one replica on every node of the cluster.

use std::{sync::Arc, time::Duration};

use arqon_proto::{
    Batch, BatchKind, DecodeError, GroupId, LEASE_KEY_SIZE, LeaseKey, NodeId, RaftIndex, ReplicaId, SYSTEM_TENANT, wire,
};
use arqon_raft::{ForwardError, Group, GroupSpec, Host, OpenError, ProposeError, StateMachine};
use bytes::{Buf, BufMut, Bytes, BytesMut};
use prost::Message;
use ring::rand::{SecureRandom, SystemRandom};
use tokio::{
    sync::watch,
    time::{Instant, sleep, timeout},
};
use wire::{ErrorCode, metadata_command::Command};

use super::MetadataState;
use crate::{clock, error::error};

/// The kind under which commands are forwarded to the leader's node.
pub(crate) const FORWARD_KIND: &str = "metadata";
/// The kind under which a starting node asks the leader's node what it must have applied.
pub(crate) const COMMITTED_KIND: &str = "metadata-committed";
/// How long a command may take, elections included.
const SUBMIT_PATIENCE: Duration = Duration::from_secs(10);
const REFRESH_PATIENCE: Duration = Duration::from_secs(5);
const RETRY_DELAY: Duration = Duration::from_millis(50);
/// A new lease key takes over after this time under one leader.
const LEASE_KEY_LIFETIME: Duration = Duration::from_secs(24 * 3600);

/// Bytes of entries looked at in one go for the first command of a cluster.
const FRESH_READ_SIZE: usize = 64 << 10;

const OUTCOME_OK: u8 = 0;
const OUTCOME_REFUSED: u8 = 1;

/// The applied state, and what is derived from it once for all readers.
#[derive(Default)]
pub(crate) struct Published {
    /// The state.
    pub state: MetadataState,
    /// Its lease keys, the newest last.
    pub lease_keys: Arc<[LeaseKey]>,
    /// The nodes of the cluster by number; where this node is configured to reach one elsewhere than
    /// the cluster knows, with those addresses. Before the cluster is formed, those configured.
    pub nodes: Arc<[wire::NodeInfo]>,
}

struct Machine {
    state: MetadataState,
    configured: Arc<[wire::NodeInfo]>,
    published: watch::Sender<Arc<Published>>,
}

impl Machine {
    fn publish(&self) {
        let lease_keys = self.state.lease_keys().into();
        let nodes = self.nodes();
        self.published.send_replace(Arc::new(Published { state: self.state.clone(), lease_keys, nodes }));
    }

    fn nodes(&self) -> Arc<[wire::NodeInfo]> {
        if self.state.nodes().is_empty() {
            return self.configured.clone();
        }
        let reached = |known: &wire::NodeInfo| match self.configured.iter().find(|info| info.node == known.node) {
            Some(configured) => wire::NodeInfo {
                metadata_replica: known.metadata_replica,
                leaving: known.leaving,
                seen: known.seen,
                ..configured.clone()
            },
            None => known.clone(),
        };
        self.state.nodes().iter().map(reached).collect()
    }
}

impl StateMachine for Machine {
    fn apply(&mut self, batch: &Batch) -> Result<Bytes, DecodeError> {
        if batch.header.kind != BatchKind::Control {
            return Ok(Bytes::new());
        }
        let outcome = match wire::MetadataCommand::decode(batch.records.clone()) {
            Ok(command) => self.state.apply(known(command)?),
            // Every replica sees the same bytes and refuses them alike.
            Err(_) => Err(error(ErrorCode::ValidationError, "the command is not valid protobuf")),
        };
        if outcome.is_ok() {
            self.publish();
        }
        Ok(encode_outcome(outcome.map(|_| ())))
    }

    fn checkpoint(&self) -> Bytes {
        self.state.encode()
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), DecodeError> {
        self.state = MetadataState::decode(state)?;
        self.publish();
        Ok(())
    }

    fn fresh(&self) -> Box<dyn StateMachine> {
        let (configured, published) = (self.configured.clone(), watch::Sender::default());
        Box::new(Self { state: MetadataState::default(), configured, published })
    }
}

/// Applies a metadata log outside of its group, for whoever holds the other end.
pub(crate) struct MetadataReader(watch::Sender<MetadataState>);

impl MetadataReader {
    /// A reader, and what it has read.
    pub(crate) fn new() -> (Self, watch::Receiver<MetadataState>) {
        let (sender, state) = watch::channel(MetadataState::default());
        (Self(sender), state)
    }
}

impl StateMachine for MetadataReader {
    fn apply(&mut self, batch: &Batch) -> Result<Bytes, DecodeError> {
        if batch.header.kind == BatchKind::Control
            && let Ok(command) = wire::MetadataCommand::decode(batch.records.clone())
        {
            // What is refused changes nothing.
            let command = known(command)?;
            self.0.send_modify(|state| drop(state.apply(command)));
        }
        Ok(Bytes::new())
    }

    fn checkpoint(&self) -> Bytes {
        self.0.borrow().encode()
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), DecodeError> {
        self.0.send_replace(MetadataState::decode(state)?);
        Ok(())
    }

    fn fresh(&self) -> Box<dyn StateMachine> {
        Box::new(Self::new().0)
    }
}

/// A command that this program knows.
fn known(command: wire::MetadataCommand) -> Result<wire::MetadataCommand, DecodeError> {
    match command.command {
        Some(_) => Ok(command),
        None => Err(DecodeError::Unknown { what: "metadata command" }),
    }
}

fn encode_outcome(outcome: Result<(), wire::Error>) -> Bytes {
    let mut out = BytesMut::new();
    match outcome {
        Ok(()) => out.put_u8(OUTCOME_OK),
        Err(refused) => {
            out.put_u8(OUTCOME_REFUSED);
            out.extend_from_slice(&refused.encode_to_vec());
        }
    }
    out.freeze()
}

fn decode_outcome(outcome: &[u8]) -> Result<(), wire::Error> {
    match outcome.split_first() {
        Some((&OUTCOME_OK, _)) => Ok(()),
        Some((&OUTCOME_REFUSED, refused)) => Err(wire::Error::decode(refused)
            .unwrap_or_else(|_| error(ErrorCode::InternalError, "the metadata leader's answer is malformed"))),
        _ => Err(error(ErrorCode::InternalError, "the metadata leader's answer is malformed")),
    }
}

/// Which replica of the metadata group a node opens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    /// Its Raft id.
    pub replica: ReplicaId,
    /// Whether the node may be one of those that form the cluster.
    pub forms: bool,
}

/// Handle of the local replica.
#[derive(Clone)]
pub(crate) struct MetadataGroup {
    node: NodeId,
    host: Host,
    group: Group,
    published: watch::Receiver<Arc<Published>>,
    forms: bool,
    /// Whether everything is applied here that was committed when this node started.
    caught_up: Arc<watch::Sender<bool>>,
}

impl MetadataGroup {
    /// Opens the local replica. If `forms`, the configured nodes are the first voters of a new cluster.
    pub(crate) async fn open(
        host: &Host,
        node: NodeId,
        nodes: &[wire::NodeInfo],
        Place { replica, forms }: Place,
    ) -> Result<Self, OpenError> {
        let first = Published { nodes: nodes.into(), ..Published::default() };
        let (sender, published) = watch::channel(Arc::new(first));
        let machine = Machine { state: MetadataState::default(), configured: nodes.into(), published: sender };
        let initial = nodes.iter().filter(|_| forms).map(|info| (ReplicaId(info.node), NodeId(info.node))).collect();
        let spec = GroupSpec {
            group: GroupId::METADATA,
            replica,
            first: nodes.iter().map(|info| info.node).min() == Some(node.0),
            initial,
            // Whether it may begin with an empty log was decided with its place.
            may_create: true,
            followers_act: true,
            owner: SYSTEM_TENANT.to_owned(),
        };
        let group = host.open(spec, Box::new(machine)).await?;
        Ok(Self { node, forms, host: host.clone(), group, published, caught_up: Arc::default() })
    }

    /// The Raft group.
    pub(crate) fn group(&self) -> &Group {
        &self.group
    }

    /// Whether this replica may have been made to form a cluster and no command of one stands in its log.
    pub(crate) fn is_fresh(&self) -> bool {
        if !self.forms || !self.published.borrow().state.nodes().is_empty() {
            return false;
        }
        // Each start of a node that waits for others leaves an entry or two of its elections.
        let log = self.group.log();
        let end = log.last().map_or(0, |last| last.index.0 + 1);
        let mut next = 0;
        while next < end {
            match log.entries(RaftIndex(next)..RaftIndex(end), FRESH_READ_SIZE) {
                Ok(entries) if !entries.is_empty() => {
                    if entries.iter().any(|entry| entry.header.kind != BatchKind::Raft) {
                        return false;
                    }
                    next += entries.len() as u64;
                }
                _ => return false,
            }
        }
        true
    }

    /// All groups of this node.
    pub(crate) fn host(&self) -> &Host {
        &self.host
    }

    /// What has been applied here.
    pub(crate) fn published(&self) -> Arc<Published> {
        self.published.borrow().clone()
    }

    /// Whether a topic that is not in [`MetadataGroup::published`] may exist all the same: since
    /// its start this node has not caught up, or the cluster is not formed.
    pub(crate) fn is_starting(&self) -> bool {
        !*self.caught_up.borrow() || self.published.borrow().state.nodes().is_empty()
    }

    /// Resolves when this node has caught up after its start.
    pub(crate) async fn caught_up(&self) {
        let mut status = self.caught_up.subscribe();
        // The sender is in this handle.
        let _ = status.wait_for(|caught_up| *caught_up).await;
        let mut published = self.watch();
        let _ = published.wait_for(|published| !published.state.nodes().is_empty()).await;
    }

    /// Follows what is applied here.
    pub(crate) fn watch(&self) -> watch::Receiver<Arc<Published>> {
        self.published.clone()
    }

    /// Carries a command out, on whichever node leads, within ten seconds.
    ///
    /// # Errors
    /// What the state machine refuses; OVERLOADED when no leader was found in time, and
    /// UNKNOWN_OUTCOME when one was but did not answer.
    pub(crate) async fn submit(&self, command: Command) -> Result<(), wire::Error> {
        let done_before = refused_when_done(&command);
        let bytes = Bytes::from(wire::MetadataCommand { command: Some(command) }.encode_to_vec());
        let deadline = Instant::now() + SUBMIT_PATIENCE;
        let mut may_be_done = false;
        loop {
            let answer = self.attempt(bytes.clone()).await;
            match answer {
                Err(refused) if refused.code() == ErrorCode::NotLeader => {}
                Err(refused) if refused.code() == ErrorCode::UnknownOutcome => may_be_done = true,
                // Carried out before its answer got lost.
                Err(refused) if may_be_done && done_before == Some(refused.code()) => return Ok(()),
                answer => return answer,
            }
            if Instant::now() >= deadline {
                return Err(if may_be_done {
                    error(
                        ErrorCode::UnknownOutcome,
                        "the metadata leader did not answer: the change may or may not be made",
                    )
                } else {
                    error(ErrorCode::Overloaded, "the cluster has no metadata leader now")
                });
            }
            sleep(RETRY_DELAY).await;
        }
    }

    async fn attempt(&self, command: Bytes) -> Result<(), wire::Error> {
        let status = self.group.status();
        let leader = status.leader.filter(|leader| *leader != self.node);
        match leader {
            Some(leader) if !status.is_leader => match self.host.forward(leader, FORWARD_KIND, command).await {
                Ok(outcome) => decode_outcome(&outcome),
                Err(ForwardError::Refused(reason)) => Err(error(ErrorCode::NotLeader, reason)),
                Err(ForwardError::Unreachable { reason, .. }) => Err(error(ErrorCode::UnknownOutcome, reason)),
            },
            _ => self.propose(command).await,
        }
    }

    /// Carries out a command that another node forwarded; only if this node leads.
    pub(crate) async fn handle_forward(&self, command: Bytes) -> Bytes {
        encode_outcome(self.propose(command).await)
    }

    async fn propose(&self, command: Bytes) -> Result<(), wire::Error> {
        let status = self.group.status();
        if !status.ready {
            return Err(error(ErrorCode::NotLeader, "this node does not lead the metadata group"));
        }
        if command.len() > arqon_proto::limits::RECORD_SIZE_MAX {
            return Err(error(ErrorCode::ValidationError, "the metadata command is too large"));
        }
        // A newer node may have forwarded it, and what this leader does not know must not get into the log.
        let is_known = |command: wire::MetadataCommand| command.command.is_some();
        if !wire::MetadataCommand::decode(command.clone()).is_ok_and(is_known) {
            let message = "the command is newer than the program of the metadata leader's node";
            return Err(error(ErrorCode::ValidationError, message));
        }
        let mut batch = Batch::internal(BatchKind::Control, command);
        batch.header.time_ms = clock::now_ms();
        let proposal = self.group.propose(status.term, batch).await.map_err(propose_error)?;
        let applied = proposal.await.map_err(propose_error)?;
        // A leader that has committed an entry of its term has applied all that came before.
        self.caught_up.send_replace(true);
        decode_outcome(&applied.outcome)
    }

    /// The last committed entry, for another node that catches up; only if this node leads.
    ///
    /// # Errors
    /// Why this node cannot say, one line.
    pub(crate) async fn handle_committed(&self) -> Result<Bytes, String> {
        let index = self.committed().await.map_err(|cause| cause.to_string())?;
        Ok(Bytes::copy_from_slice(&index.0.to_le_bytes()))
    }

    async fn committed(&self) -> Result<RaftIndex, ProposeError> {
        self.group.confirm_leader().await?;
        // A leader that a majority confirmed has applied an entry of its own term.
        Ok(self.group.readable().borrow().index.unwrap_or_default())
    }

    // What the leader has committed, as far as one can be asked now.
    async fn ask_committed(&self) -> Option<RaftIndex> {
        let status = self.group.status();
        if status.is_leader {
            return self.committed().await.ok();
        }
        let mut answer = self.host.forward(status.leader?, COMMITTED_KIND, Bytes::new()).await.ok()?;
        answer.try_get_u64_le().ok().map(RaftIndex)
    }

    /// Waits until everything is applied here that is committed now; false when nobody can tell what that is.
    pub(crate) async fn refresh(&self) -> bool {
        let Some(committed) = self.ask_committed().await else { return false };
        let mut readable = self.group.readable();
        let applied = readable.wait_for(|readable| readable.index >= Some(committed));
        timeout(REFRESH_PATIENCE, applied).await.is_ok_and(|applied| applied.is_ok())
    }

    // Returns when everything is applied here that was committed at some time after the start.
    async fn catch_up(&self) {
        let committed = loop {
            match self.ask_committed().await {
                Some(committed) => break committed,
                None => sleep(RETRY_DELAY).await,
            }
        };
        let mut readable = self.group.readable();
        if readable.wait_for(|readable| readable.index >= Some(committed)).await.is_ok() {
            self.caught_up.send_replace(true);
        }
    }

    /// Tells the cluster that this replica takes part, so that it is missed if it gets lost.
    async fn be_seen(&self) {
        let mut published = self.watch();
        loop {
            let (node, metadata_replica) = (self.node.0, self.group.replica().0);
            let is_missing = |info: &wire::NodeInfo| info.node == node && !info.seen;
            let current = published.borrow_and_update().clone();
            if current.state.nodes().iter().any(is_missing) {
                let command = Command::NodeSeen(wire::NodeSeenCommand { node, metadata_replica });
                if self.submit(command).await.is_err() {
                    sleep(RETRY_DELAY).await;
                    continue;
                }
            } else if !current.state.nodes().is_empty() {
                return;
            }
            if published.changed().await.is_err() {
                return;
            }
        }
    }

    /// Catches up with the cluster and, on the leader, does what it does of itself: forms the
    /// cluster, and keeps lease keys fresh. Runs until the group stops.
    pub(crate) async fn run_duties(self, nodes: Vec<wire::NodeInfo>) {
        let caught_up = async {
            self.catch_up().await;
            self.be_seen().await;
            std::future::pending().await
        };
        tokio::select! {
            () = self.follow_leadership(&nodes) => {}
            () = caught_up => {}
        }
    }

    async fn follow_leadership(&self, nodes: &[wire::NodeInfo]) {
        let mut status = self.group.watch();
        while status.wait_for(|status| status.ready).await.is_ok() {
            let lost = tokio::select! {
                () = self.lead(nodes) => continue,
                lost = status.wait_for(|status| !status.ready) => lost,
            };
            if lost.is_err() {
                return;
            }
        }
    }

    // Returns when something went wrong and should be tried again.
    async fn lead(&self, nodes: &[wire::NodeInfo]) {
        let mut key_due = Instant::now() + LEASE_KEY_LIFETIME;
        loop {
            let published = self.published();
            let command = if published.state.nodes().is_empty() {
                // Each of them has opened its replica then, and none is taken for a lost one later.
                if !nodes.iter().all(|info| info.node == self.node.0 || self.group.is_caught_up(NodeId(info.node))) {
                    sleep(RETRY_DELAY).await;
                    continue;
                }
                Command::FormCluster(wire::FormClusterCommand { nodes: nodes.to_vec() })
            } else if published.lease_keys.is_empty() || Instant::now() >= key_due {
                match new_lease_key(&published.state) {
                    Ok(command) => command,
                    Err(reason) => {
                        tracing::error!(reason, "no new lease key");
                        sleep(Duration::from_secs(1)).await;
                        return;
                    }
                }
            } else {
                tokio::time::sleep_until(key_due).await;
                continue;
            };
            let is_key = matches!(command, Command::AddLeaseKey(_));
            match self.submit(command).await {
                Ok(()) if is_key => key_due = Instant::now() + LEASE_KEY_LIFETIME,
                Ok(()) => tracing::info!(nodes = nodes.len(), "cluster formed"),
                // Another leader was faster; its change is applied here soon.
                Err(refused) => {
                    tracing::debug!(refused = refused.message, "metadata duty not done");
                    let mut published = self.watch();
                    timeout(Duration::from_secs(1), published.changed()).await.ok();
                    return;
                }
            }
        }
    }
}

/// How a command is refused that was carried out already.
fn refused_when_done(command: &Command) -> Option<ErrorCode> {
    match command {
        Command::DeleteTopic(_) | Command::RemoveNode(_) => Some(ErrorCode::TargetNotFound),
        Command::MovePartition(_) => Some(ErrorCode::AlreadyExists),
        _ => None,
    }
}

fn new_lease_key(state: &MetadataState) -> Result<Command, &'static str> {
    let mut secret = [0; LEASE_KEY_SIZE];
    SystemRandom::new().fill(&mut secret).map_err(|_| "the system gives no randomness")?;
    let secret = Bytes::copy_from_slice(&secret);
    Ok(Command::AddLeaseKey(wire::AddLeaseKeyCommand { key_id: state.next_lease_key_id(), secret }))
}

fn propose_error(cause: ProposeError) -> wire::Error {
    match cause {
        ProposeError::NotLeader { .. } => error(ErrorCode::NotLeader, cause.to_string()),
        ProposeError::UnknownOutcome(_) => error(ErrorCode::UnknownOutcome, cause.to_string()),
        ProposeError::Overloaded => error(ErrorCode::Overloaded, cause.to_string()),
        ProposeError::Stopped(_) => error(ErrorCode::InternalError, cause.to_string()),
    }
}
