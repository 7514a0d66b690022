//! The replicas on this node: opened and removed as the metadata says.
//!
//! ```text
//!   placed here, not open            -> open it
//!   open, its topic gone             -> stop it and remove its data
//!   data without a topic, group id below next_group -> remove it: it was deleted meanwhile
//!   data without a topic, group id from next_group  -> leave it: the metadata here is behind
//! ```

use std::{
    collections::HashMap,
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use arqon_proto::{GroupId, NodeId, PartitionId, ReplicaId, wire};
use arqon_raft::{GroupSpec, Host, OpenError};
use arqon_storage::Store;
use futures_util::{StreamExt, stream};
use tokio::{sync::watch, time::sleep};

use crate::{
    metadata::{MetadataState, Published},
    partition::{Partition, PartitionMetrics, Services},
};

/// Replicas opened at the same time.
const OPEN_COUNT_MAX: usize = 8;
/// After this time a replica that did not open is tried again.
const OPEN_RETRY_DELAY: Duration = Duration::from_secs(5);

/// One replica that belongs on this node.
#[derive(Clone)]
pub(crate) enum Local {
    /// It works.
    Open(Partition),
    /// It cannot be opened, and why.
    Failed {
        /// The replica.
        replica: ReplicaId,
        /// One line.
        reason: String,
        /// Whether another try may help.
        retry: bool,
    },
}

/// The replicas on this node, by group.
pub(crate) struct Replicas {
    node: NodeId,
    host: Host,
    store: Store,
    metrics: Arc<PartitionMetrics>,
    local: RwLock<HashMap<GroupId, Local>>,
}

struct Wanted {
    spec: GroupSpec,
    topic: Arc<wire::TopicConfig>,
    partition: PartitionId,
}

impl Replicas {
    /// None yet.
    pub(crate) fn new(node: NodeId, host: Host, store: Store, metrics: Arc<PartitionMetrics>) -> Self {
        Self { node, host, store, metrics, local: RwLock::default() }
    }

    /// The replica of `group` here, if it is open.
    pub(crate) fn get(&self, group: GroupId) -> Option<Partition> {
        match self.local.read().unwrap_or_else(PoisonError::into_inner).get(&group) {
            Some(Local::Open(partition)) => Some(partition.clone()),
            _ => None,
        }
    }

    /// All that are open.
    pub(crate) fn open(&self) -> Vec<Partition> {
        let local = self.local.read().unwrap_or_else(PoisonError::into_inner);
        let mut open: Vec<_> = local
            .values()
            .filter_map(|local| match local {
                Local::Open(partition) => Some(partition.clone()),
                Local::Failed { .. } => None,
            })
            .collect();
        open.sort_by_key(|partition| partition.group_id().0);
        open
    }

    /// One line for each replica here that does not work.
    pub(crate) fn problems(&self) -> Vec<String> {
        let local = self.local.read().unwrap_or_else(PoisonError::into_inner);
        let mut problems: Vec<_> = local
            .values()
            .filter_map(|local| match local {
                Local::Failed { reason, .. } => Some(reason.clone()),
                Local::Open(partition) => partition.group().stopped().map(|reason| {
                    format!("{}/{} has stopped: {reason}", partition.topic().name, partition.partition())
                }),
            })
            .collect();
        problems.sort();
        problems
    }

    /// Whether every replica that `state` places here is open.
    pub(crate) fn complete(&self, state: &MetadataState) -> bool {
        let local = self.local.read().unwrap_or_else(PoisonError::into_inner);
        self.wanted(state).keys().all(|group| matches!(local.get(group), Some(Local::Open(_))))
    }

    fn wanted(&self, state: &MetadataState) -> HashMap<GroupId, Wanted> {
        let mut wanted = HashMap::new();
        for topic in state.topics() {
            for (index, placement) in topic.partitions.iter().enumerate() {
                let Some(own) = placement.replicas.iter().find(|at| at.node == self.node.0) else { continue };
                let group = GroupId(placement.group);
                let spec = GroupSpec {
                    group,
                    replica: ReplicaId(own.replica),
                    initial: placement.replicas.iter().map(|at| (ReplicaId(at.replica), NodeId(at.node))).collect(),
                    first: placement.replicas.first().is_some_and(|at| at.node == self.node.0),
                    followers_act: false,
                };
                let partition = PartitionId(index as u32);
                wanted.insert(group, Wanted { spec, topic: topic.config.clone(), partition });
            }
        }
        wanted
    }

    /// Follows the metadata until `stopping`.
    pub(crate) async fn run(
        self: Arc<Self>,
        mut published: watch::Receiver<Arc<Published>>,
        services: Arc<dyn Services>,
        mut stopping: watch::Receiver<bool>,
    ) {
        loop {
            let current = published.borrow_and_update().clone();
            self.reconcile(&current.state, &services).await;
            let failed = self.retry_wanted();
            tokio::select! {
                changed = published.changed() => if changed.is_err() { return },
                () = sleep(OPEN_RETRY_DELAY), if failed => {}
                _ = stopping.wait_for(|stopping| *stopping) => return,
            }
        }
    }

    fn retry_wanted(&self) -> bool {
        let local = self.local.read().unwrap_or_else(PoisonError::into_inner);
        local.values().any(|local| matches!(local, Local::Failed { retry: true, .. }))
    }

    async fn reconcile(&self, state: &MetadataState, services: &Arc<dyn Services>) {
        let mut wanted = self.wanted(state);
        self.remove_unwanted(state, &wanted).await;
        {
            let local = self.local.read().unwrap_or_else(PoisonError::into_inner);
            wanted.retain(|group, _| {
                !matches!(local.get(group), Some(Local::Open(_) | Local::Failed { retry: false, .. }))
            });
        }
        // In the same order on all nodes: a group can have a leader when most of them have opened it.
        let mut wanted: Vec<_> = wanted.into_values().collect();
        wanted.sort_unstable_by_key(|wanted| wanted.spec.group);
        stream::iter(wanted)
            .for_each_concurrent(OPEN_COUNT_MAX, |wanted| self.open_one(wanted, services.clone()))
            .await;
    }

    async fn open_one(&self, wanted: Wanted, services: Arc<dyn Services>) {
        let Wanted { spec, topic, partition } = wanted;
        let (group, replica) = (spec.group, spec.replica);
        let name = format!("{}/{partition}", topic.name);
        let opened = Partition::open(&self.host, spec, topic, partition, services, self.metrics.clone()).await;
        let local = match opened {
            Ok(partition) => {
                tracing::debug!(partition = name, group = group.0, "replica open");
                Local::Open(partition)
            }
            Err(error) => {
                let reason = format!("{name}: {error}");
                let retry = !matches!(error, OpenError::Quarantined { .. });
                tracing::error!(error = reason, retry, "replica does not open");
                Local::Failed { replica, reason, retry }
            }
        };
        self.local.write().unwrap_or_else(PoisonError::into_inner).insert(group, local);
    }

    async fn remove_unwanted(&self, state: &MetadataState, wanted: &HashMap<GroupId, Wanted>) {
        let is_gone = |group: &GroupId| group.0 < state.next_group() && !wanted.contains_key(group);
        let gone: Vec<(GroupId, Local)> = {
            let mut local = self.local.write().unwrap_or_else(PoisonError::into_inner);
            local.extract_if(|group, _| is_gone(group)).collect()
        };
        for (group, local) in gone {
            let replica = match local {
                Local::Open(partition) => {
                    partition.shutdown().await;
                    partition.group().replica()
                }
                Local::Failed { replica, .. } => replica,
            };
            if let Err(error) = self.host.delete(group, replica).await {
                tracing::warn!(group = group.0, %error, "data of a deleted topic stays on the disk");
            }
        }
        let on_disk = match self.store.logs() {
            Ok(logs) => logs,
            Err(error) => {
                tracing::warn!(%error, "the data directory cannot be listed");
                return;
            }
        };
        for (group, replica) in on_disk {
            let is_ours = wanted.get(&group).is_some_and(|wanted| wanted.spec.replica == replica);
            if group == GroupId::METADATA || group.0 >= state.next_group() || is_ours {
                continue;
            }
            if let Err(error) = self.store.delete_log(group, replica) {
                tracing::warn!(group = group.0, %error, "data of a deleted topic stays on the disk");
            }
        }
    }

    /// Stops the tasks of all partitions; their groups stop with the host.
    pub(crate) async fn shutdown(&self) {
        let open = self.open();
        stream::iter(open)
            .for_each_concurrent(OPEN_COUNT_MAX, |partition| async move { partition.shutdown().await })
            .await;
        self.local.write().unwrap_or_else(PoisonError::into_inner).clear();
    }
}
