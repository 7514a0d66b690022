//! Goes on with what is left when a majority of nodes is lost for good. Run on a stopped node.
//!
//! ```text
//!   group of the metadata                 the keeper becomes its only member
//!   partition, most voters are left       nothing: its leader replaces the lost ones later
//!   partition, most voters are lost       one survivor becomes its only member
//!   partition, no replica is left         begins anew, empty, on the keeper
//! ```
//!
//! The keeper's metadata says so in a command, which stands in its log and in its state. Every survivor
//! decides alike who goes on with which partition: the keeper if it has a replica, or else the survivor
//! with the lowest number. The others' replicas are dropped when the nodes run again, and made anew.

use std::{collections::BTreeSet, io, path::PathBuf};

use arqon_proto::{Batch, BatchKind, GroupId, NodeId, Offset, ReplicaId, wire};
use arqon_raft::OfflineReplica;
use arqon_storage::{Identity, OpenError, Options, Store};
use futures_util::future::BoxFuture;
use prost::Message;
use wire::metadata_command::Command;

use crate::{
    clock,
    config::Config,
    metadata::{MetadataReader, MetadataState, replica_on, wanted_replicas},
    state::PartitionMachine,
};

/// Whether most voters of a group are on lost nodes.
fn is_lost(replica: &OfflineReplica, lost: &BTreeSet<u64>) -> bool {
    let left = replica.voters().values().filter(|node| !lost.contains(&node.0)).count();
    left <= replica.voters().len() / 2
}

/// Why there is no recovery: one line.
#[derive(Debug, thiserror::Error)]
pub enum RecoverError {
    /// An argument is wrong.
    #[error("{flag}: {problem}")]
    Argument {
        /// Which one.
        flag: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// The data directory cannot be used: a node runs on it, for example.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The disk failed. Groups recovered so far stay so; run it again.
    #[error("{}: {source}", path.display())]
    Io {
        /// The data directory.
        path: PathBuf,
        /// The failure.
        source: io::Error,
    },
}

/// What becomes of one partition that has lost its majority.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LostPartition {
    /// Its tenant.
    pub tenant: String,
    /// Its topic.
    pub topic: String,
    /// Which partition.
    pub partition: u32,
    /// Its Raft group.
    pub group: GroupId,
    /// Node that goes on with it.
    pub keeper: NodeId,
    /// Its replica there, if the keeper is this node.
    pub replica: Option<ReplicaId>,
    /// What its replica here has, if the keeper is this node.
    pub kept: Option<Kept>,
    /// No replica is left: all its events are lost.
    pub is_empty: bool,
}

/// What a survivor has of a partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kept {
    /// First offset.
    pub start: Offset,
    /// Every record below is known to be committed; those from here to the end are kept, acknowledged or not.
    pub certain: Offset,
    /// Offset after the last record: what was acknowledged at or beyond it is lost.
    pub end: Offset,
}

/// A recovery that was worked out and not carried out; holds the data directory.
pub struct UnsafeRecovery {
    path: PathBuf,
    store: Store,
    node: NodeId,
    keeper: NodeId,
    lost: BTreeSet<u64>,
    metadata: OfflineReplica,
    partitions: Vec<LostPartition>,
    here: Vec<(LostPartition, OfflineReplica)>,
}

impl UnsafeRecovery {
    /// Works out what is left on the node of `config` when the nodes `lost` are gone for good. `keeper` is
    /// the survivor whose metadata counts, the same in the runs on all survivors; this node by default.
    ///
    /// # Errors
    /// [`RecoverError`]; nothing was changed.
    pub fn plan(config: &Config, lost: BTreeSet<u64>, keeper: Option<u64>) -> Result<Self, RecoverError> {
        let refuse = |flag, problem: String| RecoverError::Argument { flag, problem };
        let (node, path) = (config.node_id(), config.data.clone());
        let keeper = NodeId(keeper.unwrap_or(node.0));
        let identity = Identity { cluster: config.cluster.clone(), node };
        let store = Store::open(&config.data, identity, Options::default())?;
        let logs = store.logs().map_err(|source| RecoverError::Io { path: path.clone(), source })?;
        let replica = logs.iter().rfind(|(group, _)| *group == GroupId::METADATA).map(|(_, replica)| *replica);
        let Some(replica) = replica else {
            return Err(refuse("--config", "the data directory has no metadata".to_owned()));
        };
        let (reader, state) = MetadataReader::new();
        let metadata = OfflineReplica::open(&store, GroupId::METADATA, replica, Box::new(reader))?;
        let state = state.borrow().clone();
        let known: BTreeSet<u64> = state.nodes().iter().map(|info| info.node).collect();
        if let Some(unknown) = lost.iter().find(|node| !known.contains(node)) {
            return Err(refuse("--lost", format!("node {unknown} is not in the cluster, which has {known:?}")));
        }
        if lost.contains(&node.0) {
            return Err(refuse("--lost", format!("node {node} is this one")));
        }
        if lost.contains(&keeper.0) || !known.contains(&keeper.0) {
            return Err(refuse("--keep", format!("node {keeper} is not a survivor")));
        }
        if !is_lost(&metadata, &lost) {
            let problem = "most nodes are left: start them; `arqon cluster decommission` replaces the others";
            return Err(refuse("--lost", problem.to_owned()));
        }
        let mut recovery = Self { path, store, node, keeper, lost, metadata, partitions: Vec::new(), here: Vec::new() };
        recovery.look_at_partitions(&state)?;
        Ok(recovery)
    }

    fn look_at_partitions(&mut self, state: &MetadataState) -> Result<(), RecoverError> {
        for topic in state.topics() {
            for (index, placement) in topic.partitions.iter().enumerate() {
                let is_left = |at: &&wire::ReplicaNode| !self.lost.contains(&at.node);
                let is_majority = |list: &[wire::ReplicaNode]| list.iter().filter(is_left).count() > list.len() / 2;
                let here = self.open_here(placement)?;
                // The log knows best who votes; the metadata does where there is none.
                let has_majority = match &here {
                    Some(replica) => !is_lost(replica, &self.lost),
                    None => is_majority(&placement.replicas) && is_majority(wanted_replicas(placement)),
                };
                if has_majority {
                    continue;
                }
                let known = placement.replicas.iter().chain(&placement.target).chain(&placement.extra);
                let mut left: BTreeSet<u64> = known.filter(is_left).map(|at| at.node).collect();
                if here.is_none() {
                    left.remove(&self.node.0);
                }
                let keeper = if left.contains(&self.keeper.0) { Some(self.keeper.0) } else { left.first().copied() };
                let mut lost = LostPartition {
                    tenant: topic.config.tenant.clone(),
                    topic: topic.config.name.clone(),
                    partition: index as u32,
                    group: GroupId(placement.group),
                    keeper: NodeId(keeper.unwrap_or(self.keeper.0)),
                    replica: None,
                    kept: None,
                    is_empty: keeper.is_none(),
                };
                if keeper == Some(self.node.0)
                    && let Some(replica) = here
                {
                    lost.replica = Some(replica.replica());
                    let (start, end) = replica.offsets();
                    let certain = replica.committed_offset().map_err(|source| self.failed(source))?;
                    lost.kept = Some(Kept { start, certain, end });
                    self.here.push((lost.clone(), replica));
                }
                self.partitions.push(lost);
            }
        }
        Ok(())
    }

    /// The replica of a partition on this node; none when its log is gone or may not be trusted.
    fn open_here(&self, placement: &wire::PartitionPlacement) -> Result<Option<OfflineReplica>, RecoverError> {
        let group = GroupId(placement.group);
        let Some(replica) = replica_on(placement, self.node.0).map(ReplicaId) else { return Ok(None) };
        if !self.store.has_log(group, replica).map_err(|source| self.failed(source))? {
            return Ok(None);
        }
        match OfflineReplica::open(&self.store, group, replica, Box::new(PartitionMachine::default())) {
            Ok(replica) if replica.voters().is_empty() => Ok(None),
            Ok(replica) => Ok(Some(replica)),
            Err(OpenError::Quarantined { reason, .. }) => {
                tracing::warn!(group = group.0, reason, "a replica here may not be trusted and does not count");
                Ok(None)
            }
            Err(error) => Err(error.into()),
        }
    }

    fn failed(&self, source: io::Error) -> RecoverError {
        RecoverError::Io { path: self.path.clone(), source }
    }

    /// The partitions that have lost their majority.
    #[must_use]
    pub fn partitions(&self) -> &[LostPartition] {
        &self.partitions
    }

    /// Whether this node's metadata counts; another survivor copies it when it starts.
    #[must_use]
    pub fn is_keeper(&self) -> bool {
        self.keeper == self.node
    }

    /// Carries it out.
    ///
    /// # Errors
    /// The disk failed; it may be run again.
    pub fn carry_out(self) -> BoxFuture<'static, Result<(), RecoverError>> {
        Box::pin(async move {
            let path = self.path.clone();
            let failed = |source| RecoverError::Io { path: path.clone(), source };
            for (_, replica) in &self.here {
                replica.become_only_member(self.node, Vec::new()).await.map_err(failed)?;
            }
            if self.is_keeper() {
                let group = |lost: &LostPartition| wire::UnsafeGroup {
                    group: lost.group.0,
                    kept_offset: lost.kept.map_or(0, |kept| kept.end.0),
                    empty: lost.is_empty,
                    node: lost.keeper.0,
                    replica: lost.replica.map_or(0, |replica| replica.0),
                };
                let command = wire::UnsafeRecoveryCommand {
                    lost: self.lost.iter().copied().collect(),
                    time_ms: clock::now_ms(),
                    groups: self.partitions.iter().map(group).collect(),
                };
                let command = wire::MetadataCommand { command: Some(Command::UnsafeRecovery(command)) };
                let mut batch = Batch::internal(BatchKind::Control, command.encode_to_vec().into());
                batch.header.time_ms = clock::now_ms();
                self.metadata.become_only_member(self.node, vec![batch]).await.map_err(failed)?;
            } else {
                let replica = self.metadata.replica();
                drop(self.metadata);
                self.store.delete_log(GroupId::METADATA, replica).map_err(failed)?;
            }
            drop(self.here);
            self.store.close().await;
            Ok(())
        })
    }
}
