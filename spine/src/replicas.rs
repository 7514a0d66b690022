//! The replicas on this node: opened and removed as the metadata says.
//!
//! ```text
//!   placed here, its log is here          -> open it
//!   placed here, no log
//!     id below `placed`                   -> quarantine: it had one, which is lost
//!     id from `placed` on                 -> create it
//!   open, and no longer placed here       -> stop it and remove its data
//!   a log that is not placed here         -> remove it
//! ```
//!
//! Logs are created and removed only when this node has caught up with the metadata: before that, it may
//! see a replica where it was and not where it is. `placed` is written down when all is open or quarantined.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock},
    time::Duration,
};

use arqon_proto::{GroupId, NodeId, PartitionId, ReplicaId, wire};
use arqon_raft::{DamageSummary, GroupSpec, Host, OpenError};
use arqon_storage::Store;
use futures_util::{StreamExt, stream};
use tokio::{sync::watch, time::sleep};

use crate::{
    members::LostReplica,
    metadata::{MetadataGroup, MetadataState, replica_on},
    partition::{Partition, PartitionMetrics, Services},
};

/// Replicas opened at the same time.
const OPEN_COUNT_MAX: usize = 8;
/// After this time a replica that did not open is tried again.
const OPEN_RETRY_DELAY: Duration = Duration::from_secs(5);

/// The replica that belongs on this node.
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
        /// Whether it may never be trusted again; another try may help otherwise.
        quarantined: bool,
    },
}

impl Local {
    fn replica(&self) -> ReplicaId {
        match self {
            Self::Open(partition) => partition.group().replica(),
            Self::Failed { replica, .. } => *replica,
        }
    }
}

/// The replicas on this node, by group.
pub(crate) struct Replicas {
    node: NodeId,
    host: Host,
    store: Store,
    metrics: Arc<PartitionMetrics>,
    local: RwLock<HashMap<GroupId, Local>>,
    /// Every replica placed here with an id below has had a log; unknown when the file was damaged.
    placed: Mutex<Option<ReplicaId>>,
}

struct Wanted {
    spec: GroupSpec,
    topic: Arc<wire::TopicConfig>,
    partition: PartitionId,
}

impl Replicas {
    /// None yet.
    pub(crate) fn new(node: NodeId, host: Host, store: Store, metrics: Arc<PartitionMetrics>) -> Self {
        let placed = store.placed().inspect_err(|error| tracing::warn!(%error, "no log is taken for a new one")).ok();
        Self { node, host, store, metrics, local: RwLock::default(), placed: Mutex::new(placed) }
    }

    /// Replicas here that may not be trusted any more.
    pub(crate) fn quarantined(&self) -> Vec<LostReplica> {
        let local = self.local.read().unwrap_or_else(PoisonError::into_inner);
        // One that works may have been given up since it was opened.
        let given_up: HashSet<GroupId> = self.host.quarantined().into_iter().map(|(group, _)| group).collect();
        let lost = local.iter().filter(|(group, local)| match local {
            Local::Failed { quarantined, .. } => *quarantined,
            Local::Open(_) => given_up.contains(group),
        });
        lost.map(|(group, local)| LostReplica { group: group.0, replica: local.replica().0 }).collect()
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

    /// One line for each replica here that has damaged entries, or had some since its start.
    pub(crate) fn damage(&self) -> Vec<String> {
        let name = |group: GroupId| match self.get(group) {
            Some(partition) => format!("{}/{}", partition.topic().name, partition.partition()),
            None => format!("group {group}"),
        };
        let line = |damage: DamageSummary| {
            let name = name(damage.group);
            let Some(first) = damage.damaged.first() else {
                let count = damage.repaired_count;
                return (count > 0).then(|| format!("{name}: {count} damaged ranges were repaired from other nodes"));
            };
            let tried = damage.failed_count;
            let told = |problem: String| format!("; not repaired in {tried} tries: {problem}");
            let problem = damage.problem.map(told).unwrap_or_default();
            let count = damage.damaged.len();
            let (from, to) = (first.first_offset, first.next_offset);
            let place = &first.place;
            Some(format!("{name}: {count} damaged ranges, the first at offsets {from} to {to} in {place}{problem}"))
        };
        self.host.damage_summary().into_iter().filter_map(line).collect()
    }

    /// One line for each replica here that does not work.
    pub(crate) fn problems(&self) -> Vec<String> {
        let local = self.local.read().unwrap_or_else(PoisonError::into_inner);
        let given_up: HashMap<GroupId, String> = self.host.quarantined().into_iter().collect();
        let mut problems: Vec<_> = local
            .iter()
            .filter_map(|(group, local)| match local {
                Local::Failed { reason, .. } => Some(reason.clone()),
                Local::Open(partition) => {
                    let reason = given_up.get(group).cloned().or_else(|| partition.group().stopped());
                    reason.map(|reason| has_stopped(partition, &reason))
                }
            })
            .collect();
        problems.sort();
        problems
    }

    /// One line about the first replica here whose log is closed for writing.
    pub(crate) fn closed(&self) -> Option<String> {
        self.open().iter().find_map(|partition| Some(has_stopped(partition, &partition.group().closed()?)))
    }

    /// Whether every replica that `state` places here is open.
    pub(crate) fn complete(&self, state: &MetadataState) -> bool {
        self.all_placed(state, |local| matches!(local, Some(Local::Open(_))))
    }

    /// Whether every replica that `state` places here is open, or known to have lost its log for good: that one
    /// will not be made anew under its number, whatever the bound says.
    fn settled(&self, state: &MetadataState) -> bool {
        self.all_placed(state, |local| match local {
            Some(Local::Open(_)) => true,
            Some(Local::Failed { quarantined, .. }) => *quarantined,
            None => false,
        })
    }

    fn all_placed(&self, state: &MetadataState, is_so: impl Fn(Option<&Local>) -> bool) -> bool {
        let local = self.local.read().unwrap_or_else(PoisonError::into_inner);
        let mut placements = state.topics().flat_map(|topic| &topic.partitions);
        placements.all(|at| replica_on(at, self.node.0).is_none() || is_so(local.get(&GroupId(at.group))))
    }

    fn wanted(&self, state: &MetadataState) -> HashMap<GroupId, Wanted> {
        let mut wanted = HashMap::new();
        for topic in state.topics() {
            for (index, placement) in topic.partitions.iter().enumerate() {
                let Some(replica) = replica_on(placement, self.node.0) else { continue };
                let group = GroupId(placement.group);
                // One that joined later never starts a group.
                let is_first = !placement.changed && placement.replicas.iter().any(|at| at.replica == replica);
                let initial = placement.replicas.iter().filter(|_| is_first);
                let spec = GroupSpec {
                    group,
                    replica: ReplicaId(replica),
                    initial: initial.map(|at| (ReplicaId(at.replica), NodeId(at.node))).collect(),
                    may_create: false,
                    first: placement.replicas.first().is_some_and(|at| at.node == self.node.0),
                    followers_act: false,
                    owner: topic.config.tenant.clone(),
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
        metadata: MetadataGroup,
        services: Arc<dyn Services>,
        mut stopping: watch::Receiver<bool>,
    ) {
        let mut published = metadata.watch();
        loop {
            let is_starting = metadata.is_starting();
            let current = published.borrow_and_update().clone();
            // Until the cluster has seen this node, a lost disk could not be told from a new one.
            let is_seen = |info: &wire::NodeInfo| info.node == self.node.0 && info.seen;
            let caught_up = !is_starting && current.state.nodes().iter().any(is_seen);
            self.reconcile(&current.state, caught_up, &services).await;
            let failed = self.retry_wanted();
            tokio::select! {
                changed = published.changed() => if changed.is_err() { return },
                () = metadata.caught_up(), if is_starting => {}
                () = sleep(OPEN_RETRY_DELAY), if failed => {}
                _ = stopping.wait_for(|stopping| *stopping) => return,
            }
        }
    }

    fn retry_wanted(&self) -> bool {
        let local = self.local.read().unwrap_or_else(PoisonError::into_inner);
        local.values().any(|local| matches!(local, Local::Failed { quarantined: false, .. }))
    }

    async fn reconcile(&self, state: &MetadataState, caught_up: bool, services: &Arc<dyn Services>) {
        let mut wanted = self.wanted(state);
        let next_replica = ReplicaId(state.next_replica());
        if caught_up {
            self.remove_unwanted(state, &wanted).await;
        }
        {
            let local = self.local.read().unwrap_or_else(PoisonError::into_inner);
            wanted.retain(|group, wanted| match local.get(group) {
                Some(Local::Open(partition)) => {
                    partition.configure(&wanted.topic);
                    false
                }
                Some(Local::Failed { quarantined, .. }) => !quarantined,
                None => true,
            });
        }
        if caught_up {
            // What was placed before the file was damaged may have had a log.
            let placed = *self.lock_placed().get_or_insert(next_replica);
            wanted.values_mut().for_each(|wanted| wanted.spec.may_create = wanted.spec.replica >= placed);
        } else {
            wanted.retain(|group, wanted| self.store.has_log(*group, wanted.spec.replica).unwrap_or(true));
        }
        // In the same order on all nodes: a group can have a leader when most of them have opened it.
        let mut wanted: Vec<_> = wanted.into_values().collect();
        wanted.sort_unstable_by_key(|wanted| wanted.spec.group);
        stream::iter(wanted)
            .for_each_concurrent(OPEN_COUNT_MAX, |wanted| self.open_one(wanted, services.clone()))
            .await;
        if caught_up && *self.lock_placed() < Some(next_replica) && self.settled(state) {
            match self.store.set_placed(next_replica) {
                Ok(()) => *self.lock_placed() = Some(next_replica),
                Err(error) => tracing::warn!(%error, "replicas placed here are not written down"),
            }
        }
    }

    fn lock_placed(&self) -> MutexGuard<'_, Option<ReplicaId>> {
        self.placed.lock().unwrap_or_else(PoisonError::into_inner)
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
                let quarantined = matches!(error, OpenError::Quarantined { .. });
                tracing::error!(error = reason, quarantined, "replica does not open");
                Local::Failed { replica, reason, quarantined }
            }
        };
        self.local.write().unwrap_or_else(PoisonError::into_inner).insert(group, local);
    }

    async fn remove_unwanted(&self, state: &MetadataState, wanted: &HashMap<GroupId, Wanted>) {
        let is_placed =
            |group: GroupId, replica| wanted.get(&group).is_some_and(|wanted| wanted.spec.replica == replica);
        let gone: Vec<(GroupId, Local)> = {
            let mut local = self.local.write().unwrap_or_else(PoisonError::into_inner);
            local
                .extract_if(|group, local| group.0 < state.next_group() && !is_placed(*group, local.replica()))
                .collect()
        };
        for (group, local) in gone {
            let replica = local.replica();
            if let Local::Open(partition) = local {
                partition.shutdown().await;
            }
            if let Err(error) = self.host.delete(group, replica).await {
                tracing::warn!(group = group.0, %error, "data of a replica that is gone stays on the disk");
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
            if group == GroupId::METADATA || group.0 >= state.next_group() || is_placed(group, replica) {
                continue;
            }
            if let Err(error) = self.store.delete_log(group, replica) {
                tracing::warn!(group = group.0, %error, "data of a replica that is gone stays on the disk");
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

fn has_stopped(partition: &Partition, reason: &str) -> String {
    format!("{}/{} has stopped: {reason}", partition.topic().name, partition.partition())
}
