//! How a node finds out which replica of the metadata group it is.
//!
//! ```text
//!   its log is here                                      that one
//!   nothing here, nor on any other configured node       a new cluster: its own number
//!   nothing here, no other node configured
//!     bootstrap = true, and nobody calls                 a new cluster of this node alone
//!     otherwise                                          none: the node does not start
//!   no log; a cluster stands, the node was added to it
//!     and never seen                                     the one that it was given
//!     and seen before: its data is lost                  a new one, and new ones of all partitions
//!   its log may not be trusted                           a new one
//!   no log; a cluster stands that does not know it       wait until it is added
//!   no log; some node does not answer, or knows of a     wait: a lost disk must not vote again
//!     cluster and has no leader now
//! ```
//!
//! A node that the configuration does not name and that calls under the cluster's name and secret is taken for one
//! of a standing cluster: none is formed then. A cluster's nodes call every member, so that one that lost
//! its disk and its configuration hears of them.
//!
//! A cluster is formed when all configured nodes have opened their replicas. A node is seen when it has caught up
//! with the metadata; before that no log of a partition is made on it.
//!
//! A replica that lost its log has lost its votes and what it acknowledged. Under its old id it could
//! break promises that others rely on; under a new one it is a learner that copies the log first.

use std::{sync::Arc, time::Duration};

use arqon_proto::{GroupId, NodeId, ReplicaId, limits, wire};
use arqon_raft::{Host, OpenError};
use arqon_storage::Store;
use bytes::Bytes;
use futures_util::future::join_all;
use prost::Message;
use tokio::time::{Instant, sleep, timeout};
use wire::metadata_command::Command;

use crate::{
    metadata::{MetadataGroup, Place},
    node::StartError,
};

/// The kind under which a starting node asks who it is.
pub(crate) const WHO_KIND: &str = "who";
/// The same, asked by another node on behalf of that one: only the leader answers.
pub(crate) const WHO_LEADER_KIND: &str = "who-leader";
/// The kind under which a node asks for new replicas in place of lost ones.
pub(crate) const REJOIN_KIND: &str = "rejoin";

const ASK_INTERVAL: Duration = Duration::from_millis(100);
const ASK_PATIENCE: Duration = Duration::from_secs(2);
/// A rejoin waits for a commit.
const REJOIN_PATIENCE: Duration = Duration::from_secs(12);
/// A node that forms a cluster of itself alone listens for the nodes of a standing one for so long: each calls twice
/// in this time, and a bit is for the handshake.
const ALONE_PATIENCE: Duration = Duration::from_millis(2 * limits::REDIAL_MS_MAX + 200);
/// A node that waits says so this often.
const WAIT_NEWS_INTERVAL: Duration = Duration::from_secs(30);

/// What another node knows of the one that asks.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub(crate) struct Who {
    /// The answering node has no metadata either and would form a cluster.
    #[prost(bool, tag = "1")]
    pub fresh: bool,
    /// A cluster stands; its leader vouches for the rest.
    #[prost(bool, tag = "2")]
    pub formed: bool,
    /// The asking node's replica of the metadata group; 0: it is no member.
    #[prost(uint64, tag = "3")]
    pub metadata_replica: u64,
    /// That replica has caught up once.
    #[prost(bool, tag = "4")]
    pub seen: bool,
}

/// Asks for new replicas.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub(crate) struct Rejoin {
    /// The node that asks.
    #[prost(uint64, tag = "1")]
    pub node: u64,
    /// Its replica of the metadata group so far.
    #[prost(uint64, tag = "2")]
    pub metadata_replica: u64,
    /// Whether its partitions are lost too.
    #[prost(bool, tag = "3")]
    pub all: bool,
}

/// Opens the metadata replica of this node, whichever that is now. Waits while that cannot be known.
///
/// # Errors
/// The disk refuses, or a newer program wrote it; nobody is configured who could tell which replica this is.
pub(crate) async fn open_metadata(
    host: &Host,
    store: &Store,
    node: NodeId,
    nodes: &[wire::NodeInfo],
    bootstrap: bool,
) -> Result<MetadataGroup, StartError> {
    let io = |source| OpenError::Io { group: GroupId::METADATA, replica: ReplicaId(node.0), source };
    let logs = store.logs().map_err(io)?;
    let mut here: Vec<_> = logs.iter().filter(|(group, _)| *group == GroupId::METADATA).map(|(_, id)| *id).collect();
    let newest = here.pop();
    for older in here {
        store.delete_log(GroupId::METADATA, older).map_err(io)?;
    }
    let place = match newest {
        Some(replica) => Place { replica, forms: replica.0 == node.0 },
        None => {
            // Without that file nobody knows which logs should be here.
            let all = !store.placed().is_ok_and(|bound| bound > ReplicaId(0));
            let forms = all && logs.is_empty();
            let is_alone = nodes.iter().all(|info| info.node == node.0);
            if is_alone && !forms {
                return Err(StartError::MetadataMissing);
            }
            if is_alone && !bootstrap {
                return Err(StartError::Alone);
            }
            host.on_forward(Arc::new(move |_, kind, _| {
                Box::pin(async move {
                    let fresh = Who { fresh: true, ..Who::default() };
                    let answers = forms && kind == WHO_KIND;
                    if answers { Ok(fresh.encode_to_vec().into()) } else { Err("node is starting".to_owned()) }
                })
            }));
            let place = if is_alone {
                form_alone(host, node).await?
            } else {
                find_place(host, node, nodes, Loss { replica: None, all, forms }).await
            };
            if !place.forms && all {
                // Replicas with lower numbers that were placed here are lost, if they ever had a log.
                store.set_placed(place.replica).map_err(io)?;
            }
            place
        }
    };
    match MetadataGroup::open(host, node, nodes, place).await {
        Err(lost @ OpenError::Quarantined { .. }) if nodes.len() < 2 => Err(StartError::MetadataLost(lost)),
        Err(OpenError::Quarantined { replica, reason, .. }) => {
            tracing::error!(replica = replica.0, reason, "the metadata here may not be trusted: copying it anew");
            let place = find_place(host, node, nodes, Loss { replica: Some(replica), all: false, forms: false }).await;
            host.delete(GroupId::METADATA, replica).await.map_err(io)?;
            Ok(MetadataGroup::open(host, node, nodes, place).await?)
        }
        opened => Ok(opened?),
    }
}

/// Forms a cluster of this node alone unless another one calls.
async fn form_alone(host: &Host, node: NodeId) -> Result<Place, StartError> {
    sleep(ALONE_PATIENCE).await;
    match host.dialled_by().into_iter().find(|caller| *caller != node) {
        Some(caller) => Err(StartError::ClusterStands { node: caller.0 }),
        None => Ok(Place { replica: ReplicaId(node.0), forms: true }),
    }
}

/// What a node has lost, if it had anything.
#[derive(Clone, Copy)]
struct Loss {
    /// The metadata replica here that may not be trusted: there is a cluster then.
    replica: Option<ReplicaId>,
    /// Whether its partitions are lost too.
    all: bool,
    /// Whether it may be one of those that form a cluster: there is nothing here at all.
    forms: bool,
}

async fn find_place(host: &Host, node: NodeId, nodes: &[wire::NodeInfo], loss: Loss) -> Place {
    let others: Vec<NodeId> = nodes.iter().map(|info| NodeId(info.node)).filter(|other| *other != node).collect();
    let mut news_due = Instant::now() + ASK_PATIENCE;
    loop {
        let answers = join_all(others.iter().map(|other| ask(host, *other, node))).await;
        let answers: Vec<(NodeId, Who)> =
            others.iter().copied().zip(answers).filter_map(|(at, a)| Some((at, a?))).collect();
        let mut waits_for = format!("of {} other nodes, {} answer", others.len(), answers.len());
        if let Some((at, who)) = answers.iter().find(|(_, who)| who.formed) {
            let is_lost = who.seen || loss.replica.is_some();
            if who.metadata_replica == 0 {
                waits_for = format!("node {node} is not in the cluster: run `arqon cluster add-node {node}`");
            } else if !is_lost {
                return Place { replica: ReplicaId(who.metadata_replica), forms: false };
            } else if let Some(replica) = rejoin(host, *at, node, who.metadata_replica, loss.all).await {
                tracing::warn!(replica = replica.0, "data of this node is lost: it copies it from the others");
                return Place { replica, forms: false };
            }
        }
        let fresh_count = answers.iter().filter(|(_, who)| who.fresh).count();
        let stranger = host.dialled_by().into_iter().find(|caller| *caller != node && !others.contains(caller));
        if let Some(stranger) = stranger
            && loss.forms
            && fresh_count == others.len()
        {
            waits_for = format!(
                "node {stranger}, which is not among the peers, called under this cluster's name and secret: no \
                 cluster is formed beside it; name it in [[peers]] of all nodes, or stop it while the cluster is formed"
            );
        } else if loss.forms && fresh_count == others.len() {
            return Place { replica: ReplicaId(node.0), forms: true };
        }
        if Instant::now() >= news_due {
            news_due = Instant::now() + WAIT_NEWS_INTERVAL;
            tracing::warn!(node = node.0, reason = waits_for, "waiting for the cluster");
        }
        sleep(ASK_INTERVAL).await;
    }
}

async fn ask(host: &Host, other: NodeId, node: NodeId) -> Option<Who> {
    let body = Bytes::copy_from_slice(&node.0.to_le_bytes());
    let answer = timeout(ASK_PATIENCE, host.forward(other, WHO_KIND, body)).await.ok()?.ok()?;
    Who::decode(answer).ok()
}

async fn rejoin(host: &Host, other: NodeId, node: NodeId, metadata_replica: u64, all: bool) -> Option<ReplicaId> {
    let body = Rejoin { node: node.0, metadata_replica, all }.encode_to_vec().into();
    let mut answer = timeout(REJOIN_PATIENCE, host.forward(other, REJOIN_KIND, body)).await.ok()?.ok()?;
    bytes::Buf::try_get_u64_le(&mut answer).ok().map(ReplicaId)
}

impl MetadataGroup {
    /// Says what the cluster knows of `node`, or that there is none; asks the leader if need be.
    ///
    /// # Errors
    /// Nobody can tell now, one line.
    pub(crate) async fn handle_who(&self, body: Bytes, may_ask: bool) -> Result<Bytes, String> {
        let node = <[u8; 8]>::try_from(body.as_ref()).map(u64::from_le_bytes).map_err(|_| "a malformed request")?;
        let status = self.group().status();
        let who = match status.leader {
            Some(_) if status.is_leader => {
                self.group().confirm_leader().await.map_err(|cause| cause.to_string())?;
                let published = self.published();
                if published.state.nodes().is_empty() && self.is_fresh() {
                    return Ok(Who { fresh: true, ..Who::default() }.encode_to_vec().into());
                }
                let info = published.state.nodes().iter().find(|info| info.node == node);
                Who {
                    fresh: false,
                    formed: !published.state.nodes().is_empty(),
                    metadata_replica: published.state.metadata_replica_of(node).unwrap_or_default(),
                    seen: info.is_some_and(|info| info.seen),
                }
            }
            Some(leader) if may_ask => {
                let answer = self.host().forward(leader, WHO_LEADER_KIND, body).await;
                let answer = answer.map_err(|cause| cause.to_string())?;
                // The leader speaks of the cluster; whether this node is fresh, only this node knows.
                let is_fresh = Who::decode(answer.clone()).is_ok_and(|who| who.fresh);
                return if is_fresh && !self.is_fresh() { Err("a cluster stands".to_owned()) } else { Ok(answer) };
            }
            None if self.is_fresh() => Who { fresh: true, ..Who::default() },
            _ => return Err("no leader of the metadata group is known".to_owned()),
        };
        Ok(who.encode_to_vec().into())
    }

    /// Gives a node new replicas in place of lost ones: the new number of its metadata replica.
    ///
    /// # Errors
    /// The metadata refuses, one line.
    pub(crate) async fn handle_rejoin(&self, body: Bytes) -> Result<Bytes, String> {
        let Rejoin { node, metadata_replica, all } =
            Rejoin::decode(body).map_err(|_| "a malformed request".to_owned())?;
        let command = wire::RejoinNodeCommand { node, metadata_replica, all };
        self.submit(Command::RejoinNode(command)).await.map_err(|refused| refused.message)?;
        let mut published = self.watch();
        let is_new = |published: &Arc<crate::metadata::Published>| {
            published.state.metadata_replica_of(node).is_none_or(|replica| replica != metadata_replica)
        };
        let now = published.wait_for(is_new).await.map_err(|cause| cause.to_string())?;
        let replica = now.state.metadata_replica_of(node).ok_or("the node was removed")?;
        Ok(Bytes::copy_from_slice(&replica.to_le_bytes()))
    }
}
