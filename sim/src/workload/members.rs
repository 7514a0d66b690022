//! What an operator does to the members of the cluster, as often as it takes.

use std::time::Duration;

use arqon_proto::wire;
use tokio::time::sleep;
use tonic::Code;

use super::{ask, authorized};
use crate::{cluster::Access, random::Random};

const RETRY_DELAY: Duration = Duration::from_millis(300);
/// Any node is asked; those that do not run refuse at once.
const INDEX_MAX: u64 = 64;

/// Adds a node and waits until it is a voter of the metadata.
pub async fn add(access: Access, info: wire::NodeInfo, mut random: Random) {
    let is_voter = |status: &wire::NodeStatus| {
        status.voter && status.reachable && status.info.as_ref().is_some_and(|known| known.node == info.node)
    };
    while !status(&access, &mut random).await.iter().any(is_voter) {
        let request = wire::AddNodeRequest { info: Some(info.clone()) };
        let index = random.of(0..INDEX_MAX) as usize;
        let done = ask(&access, index, async |mut control| control.add_node(authorized(&access, request)).await);
        if let Err(status) = done.await {
            tracing::debug!("node {} is not added yet: {}", info.node, status.message());
        }
        sleep(RETRY_DELAY).await;
    }
}

/// Empties a node and removes it; the cluster has told when this returns.
pub async fn remove(access: Access, node: u64, mut random: Random) {
    let known = |status: &wire::NodeStatus| status.info.clone().filter(|info| info.node == node);
    loop {
        let index = random.of(0..INDEX_MAX) as usize;
        let all = status(&access, &mut random).await;
        let own = all.iter().find(|status| known(status).is_some());
        let is_leaving = own.and_then(known).is_some_and(|info| info.leaving);
        let is_empty = own.is_some_and(|status| status.reachable && status.replica_count == 0);
        let done = if is_leaving && is_empty {
            let request = wire::RemoveNodeRequest { node };
            ask(&access, index, async |mut control| control.remove_node(authorized(&access, request)).await).await
        } else {
            let request = wire::DrainNodeRequest { node, cancel: false };
            ask(&access, index, async |mut control| control.drain_node(authorized(&access, request)).await).await
        };
        match done {
            Ok(_) if is_leaving && is_empty => return,
            // Its answer was lost: the metadata's leader does not know the node any more.
            Err(status) if status.code() == Code::NotFound => return,
            Err(status) => tracing::debug!("node {node} does not leave yet: {}", status.message()),
            Ok(_) => {}
        }
        sleep(RETRY_DELAY).await;
    }
}

async fn status(access: &Access, random: &mut Random) -> Vec<wire::NodeStatus> {
    let index = random.of(0..INDEX_MAX) as usize;
    let request = wire::ClusterStatusRequest::default();
    let asked = ask(access, index, async |mut control| control.cluster_status(authorized(access, request)).await);
    asked.await.map(|answer| answer.into_inner().nodes).unwrap_or_default()
}
