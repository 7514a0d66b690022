//! Clocks that are wrong.
#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use crate::support::{Cluster, authorized, batch, now_seconds, until};
use arqon_proto::{Claims, wire};

async fn status(cluster: &Cluster, ask: usize) -> wire::ClusterStatusResponse {
    let request = authorized(wire::ClusterStatusRequest {}, &cluster.admin());
    cluster.control(ask).await.cluster_status(request).await.unwrap().into_inner()
}

/// The story: the clock of a leader jumps a minute ahead. Its partitions go to others at once and
/// what is written gets no time of the future; the node still judges tokens rightly. When the
/// clock is set right the node leads again.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_whose_clock_is_wrong_leads_nothing_until_it_is_right() {
    let cluster = Cluster::start(3).await;
    cluster.create(0, "events", 3).await.unwrap();
    let wrong = cluster.leader_of(0, "events", 0).await;
    let ask = (wrong + 1) % 3;
    cluster.clocks[wrong].set_ahead_ms(60_000);
    until("it leads nothing and says why", async || {
        let status = status(&cluster, ask).await;
        let node = &status.nodes[wrong];
        let is_told = node.problems.iter().any(|problem| problem.contains("ms ahead of the others"));
        let metadata_moved = status.metadata_leader != 0 && status.metadata_leader != wrong as u64 + 1;
        is_told && node.leader_count == 0 && status.leaderless_count == 0 && metadata_moved
    })
    .await;
    let sound = status(&cluster, ask).await;
    assert!((0..3).all(|node| node == wrong || sound.nodes[node].problems.is_empty()), "{sound:?}");
    let leader = cluster.leader_of(ask, "events", 0).await;
    assert_ne!(leader, wrong);
    let mut client = cluster.connect(leader, &cluster.admin()).await;
    let produced = client.produce("events", 0, batch(&["x"])).await.unwrap();
    assert!(produced.time_ms < (now_seconds() + 30) * 1_000, "{produced:?}");
    // By the wrong clock this token would have expired half a minute ago.
    let claims = Claims { exp: now_seconds() + 30, ..cluster.claims("acme", &["subscribe:events"]) };
    cluster.connect(wrong, &cluster.signer.mint(&claims).unwrap()).await;
    let (_, metrics) = cluster.get(wrong, "/metrics").await;
    assert!(metrics.lines().any(|line| line == "arqon_clock_off 1"), "{metrics}");

    cluster.clocks[wrong].set_ahead_ms(0);
    until("it leads again", async || {
        let status = status(&cluster, ask).await;
        status.nodes[wrong].problems.is_empty() && status.nodes[wrong].leader_count > 0
    })
    .await;
    cluster.shutdown().await;
}
