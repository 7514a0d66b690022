//! Which replicas a node takes itself for when its disk does not say.
#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::path::PathBuf;

use arqon_proto::wire;
use arqon_spine::{Config, Node, StartError};

use crate::support::{Cluster, authorized, until};

/// Why a node with this configuration does not start.
async fn refusal(config: Config) -> StartError {
    Node::start(config).await.err().expect("the node does not start")
}

/// A node lost its disk, and whoever set it up again left the other nodes out of its configuration. With its old number
/// it would be a voter of the standing cluster that has forgotten its votes, and a cluster of its own besides.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_lost_its_disk_and_names_nobody_forms_no_second_cluster() {
    let mut cluster = Cluster::start(3).await;
    cluster.stop(0).await;
    std::fs::remove_dir_all(cluster.data(0)).unwrap();
    let mut alone = cluster.configs[0].clone();
    alone.peers.clear();
    let refused = refusal(alone.clone()).await;
    assert!(matches!(refused, StartError::Alone), "{refused}");
    assert!(refused.to_string().starts_with("bootstrap: the data directory is empty"), "{refused}");
    // Not even when it is told to.
    alone.bootstrap = true;
    let refused = refusal(alone).await;
    assert!(matches!(refused, StartError::ClusterStands { node: 2 | 3 }), "{refused}");
    cluster.restart(0).await;
    until("the node is ready", async || cluster.nodes[0].as_ref().unwrap().not_ready().is_none()).await;
    cluster.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_whose_metadata_is_damaged_says_where_another_copy_is_named() {
    let mut cluster = Cluster::start(3).await;
    cluster.stop(0).await;
    std::fs::write(cluster.data(0).join("logs/0-1/vote"), b"nonsense").unwrap();
    let mut alone = cluster.configs[0].clone();
    alone.peers.clear();
    let refused = refusal(alone).await.to_string();
    assert!(refused.contains("quarantined") && refused.contains("as [[peers]]"), "{refused}");
    cluster.restart(0).await;
    until("the node is ready", async || cluster.nodes[0].as_ref().unwrap().not_ready().is_none()).await;
    cluster.shutdown().await;
}

/// The log of a replica of one of `groups` on a node.
fn log_of(cluster: &Cluster, index: usize, groups: &[u64]) -> Option<PathBuf> {
    let mut logs = std::fs::read_dir(cluster.data(index).join("logs")).unwrap().map(|at| at.unwrap().path());
    logs.find(|log| {
        let (group, _) = log.file_name().unwrap().to_str().unwrap().split_once('-').unwrap();
        groups.iter().any(|known| known.to_string() == group)
    })
}

/// The only copy of a partition is lost and nobody can replace it. What is placed beside it later has had a log all the
/// same: when that is lost too, it does not come back empty and vote.
#[tokio::test(flavor = "multi_thread")]
async fn a_lost_log_is_noticed_beside_one_that_cannot_be_replaced() {
    let mut cluster = Cluster::start(3).await;
    let config = wire::TopicConfig {
        name: "one.copy".into(),
        partitions: 3,
        replication: 1,
        retention_ms: 3_600_000,
        ..Default::default()
    };
    let request = wire::CreateTopicRequest { config: Some(config) };
    cluster.control(0).await.create_topic(authorized(request, &cluster.admin())).await.unwrap();
    // Group 0 is the metadata, 1 the operators' topic.
    let only = |cluster: &Cluster| log_of(cluster, 2, &[2, 3, 4]);
    until("the copy is there", async || only(&cluster).is_some()).await;
    let bound = cluster.data(2).join("placed");
    until("what is placed is written down", async || bound.exists()).await;
    cluster.stop(2).await;
    std::fs::remove_dir_all(only(&cluster).unwrap()).unwrap();
    cluster.restart(2).await;
    let before = std::fs::read(&bound).unwrap();

    cluster.create(0, "three.copies", 1).await.unwrap();
    until("what was placed since is written down", async || std::fs::read(&bound).unwrap() != before).await;
    cluster.stop(2).await;
    let later = log_of(&cluster, 2, &[5]).unwrap();
    std::fs::remove_dir_all(&later).unwrap();
    cluster.restart(2).await;
    until("another replica takes its place", async || log_of(&cluster, 2, &[5]).is_some_and(|log| log != later)).await;
    assert!(!later.exists() && only(&cluster).is_none());
    cluster.shutdown().await;
}
