//! Groups of workers that are deleted, over all partitions of a topic.
#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use crate::support::{Cluster, authorized, batch, until};
use arqon_proto::wire;
use wire::frame::Body;

const TOPIC: &str = "a.jobs";

async fn delete(cluster: &Cluster, ask: usize, group: &str, force: bool, token: &str) -> Result<u32, tonic::Status> {
    let request = wire::DeleteGroupRequest { topic: TOPIC.into(), group: group.into(), force };
    let answer = cluster.control(ask).await.delete_group(authorized(request, token)).await?;
    Ok(answer.into_inner().partition_count)
}

/// Partitions that know the group, as their leaders say.
async fn known(cluster: &Cluster, ask: usize, group: &str) -> usize {
    let request = authorized(wire::DescribeTopic { topic: TOPIC.into() }, &cluster.admin());
    let leaders = cluster.control(ask).await.describe_topic(request).await.unwrap().into_inner().leaders;
    leaders.iter().filter(|status| status.queues.iter().any(|queue| queue.group == group)).count()
}

/// Takes one job of a partition.
async fn take(cluster: &Cluster, partition: u32, group: &str) -> wire::Lease {
    let leader = cluster.leader_of(0, TOPIC, partition as usize).await;
    let mut client = cluster.connect(leader, &cluster.admin()).await;
    client.produce(TOPIC, partition, batch(&["{\"job_id\":\"j\"}"])).await.unwrap();
    let work = wire::Work {
        topic: TOPIC.into(),
        partition,
        group: group.into(),
        worker: "w".into(),
        jobs_max: 1,
        wait_ms: 10_000,
        lease_ms: 60_000,
        ..Default::default()
    };
    match client.request(Body::Work(work), &[]).await.unwrap().0 {
        Body::Leased(leased) => leased.leases[0].clone(),
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_group_is_deleted_from_all_partitions_through_any_node() {
    let cluster = Cluster::start(3).await;
    cluster.create(0, TOPIC, 3).await.unwrap();
    for partition in [0, 2] {
        take(&cluster, partition, "g").await;
    }
    let admin = cluster.admin();
    until("two partitions know it", async || known(&cluster, 1, "g").await == 2).await;
    let token = cluster.token("acme", &["execute:a.jobs", "publish:a.jobs", "subscribe:a.jobs"]);
    let refused = delete(&cluster, 0, "g", true, &token).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::PermissionDenied, "{refused:?}");
    let refused = delete(&cluster, 1, "g", false, &admin).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::InvalidArgument, "{refused:?}");
    assert!(refused.message().contains("in use: 1 jobs are leased"), "{refused:?}");
    assert_eq!(known(&cluster, 1, "g").await, 2, "nothing is done by halves");
    let refused = delete(&cluster, 1, "other", false, &admin).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::NotFound, "{refused:?}");
    for ask in 0..3 {
        let refused = delete(&cluster, ask, "a b", true, &admin).await.unwrap_err();
        assert_eq!(refused.code(), tonic::Code::InvalidArgument, "{refused:?}");
    }
    assert_eq!(delete(&cluster, 1, "g", true, &admin).await.unwrap(), 2);
    assert_eq!(known(&cluster, 2, "g").await, 0);
    assert_eq!(delete(&cluster, 2, "g", true, &admin).await.unwrap_err().code(), tonic::Code::NotFound);
    assert_eq!(take(&cluster, 0, "g").await.attempt, 1, "one of its name begins anew");
    cluster.shutdown().await;
}
