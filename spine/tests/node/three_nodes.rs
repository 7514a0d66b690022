//! Three nodes in one process, on real ports and disks.

use crate::support::{Cluster, authorized, batch, batch_of, fetch_from};
use arqon_proto::{ProducerStamp, wire};
use wire::{ErrorCode, frame::Body};

/// Writes one batch with its sequence until it is acknowledged, on whichever node leads, as a
/// careful client does.
async fn write(cluster: &Cluster, ask: usize, topic: &str, sequence: u64) {
    crate::support::until("the batch is acknowledged", async || {
        let leader = cluster.leader_of(ask, topic, 0).await;
        let mut client = cluster.connect(leader, &cluster.admin()).await;
        let producer = ProducerStamp { id: [9; 16], epoch: 0, base_sequence: sequence };
        match client.produce(topic, 0, batch_of("", [sequence.to_string().into()], Some(producer))).await {
            Ok(_) => true,
            Err(refused) => match refused.code() {
                ErrorCode::Duplicate => true,
                ErrorCode::NotLeader | ErrorCode::UnknownOutcome | ErrorCode::Overloaded => false,
                _ => panic!("{refused:?}"),
            },
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_topic_made_on_one_node_works_on_all_at_once() {
    let cluster = Cluster::start(3).await;
    for ask in 0..3 {
        let topic = format!("events-{ask}");
        let description = cluster.create(ask, &topic, 3).await.unwrap();
        let mut leaders: Vec<u64> = description.partitions.iter().map(|at| at.leader_node).collect();
        leaders.sort_unstable();
        assert_eq!(leaders, [1, 2, 3], "leaders are spread");
        for partition in description.partitions {
            // No retry: the answer to the creation promises that this works.
            let mut client = cluster.connect(partition.leader_node as usize - 1, &cluster.admin()).await;
            client.produce(&topic, partition.partition, batch(&["x"])).await.unwrap();
            for other in 0..3 {
                let mut client = cluster.connect(other, &cluster.admin()).await;
                assert_eq!(client.describe(&topic).await.unwrap().partitions.len(), 3);
            }
        }
    }
    let mut control = cluster.control(1).await;
    let status =
        control.cluster_status(authorized(wire::ClusterStatusRequest {}, &cluster.admin())).await.unwrap().into_inner();
    assert_eq!((status.answered_by, status.leaderless_count), (2, 0));
    assert!(status.nodes.iter().all(|node| node.reachable && node.replica_count == 10), "{status:?}");
    cluster.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_follower_names_the_leader_and_serves_reads_that_any_replica_may() {
    let cluster = Cluster::start(3).await;
    cluster.create(0, "events", 1).await.unwrap();
    let leader = cluster.leader_of(0, "events", 0).await;
    let follower = (leader + 1) % 3;
    write(&cluster, leader, "events", 0).await;
    let mut client = cluster.connect(follower, &cluster.admin()).await;
    for refused in [
        client.produce("events", 0, batch(&["x"])).await.unwrap_err(),
        client.fetch(fetch_from("events", 0)).await.unwrap_err(),
    ] {
        assert_eq!(refused.code(), ErrorCode::NotLeader);
        assert_eq!(refused.leader_address, cluster.addresses[leader].client.to_string());
    }
    let any = wire::Fetch { any_replica: true, wait_ms: 5_000, ..fetch_from("events", 0) };
    assert_eq!(client.fetch(any).await.unwrap(), ["0"]);
    cluster.shutdown().await;
}

/// The story: the leader goes away in good order in the middle of a stream of writes, the
/// others go on, it comes back and catches up; nothing is lost, doubled or reordered.
#[tokio::test(flavor = "multi_thread")]
async fn writes_go_on_when_a_node_leaves_and_it_catches_up_when_it_is_back() {
    let mut cluster = Cluster::start(3).await;
    cluster.create(0, "events", 1).await.unwrap();
    let gone = cluster.leader_of(0, "events", 0).await;
    for sequence in 0..10 {
        write(&cluster, gone, "events", sequence).await;
    }
    cluster.stop(gone).await;
    let ask = (gone + 1) % 3;
    for sequence in 10..20 {
        write(&cluster, ask, "events", sequence).await;
    }
    // The metadata goes on too, and the node hears of it when it is back.
    cluster.create(ask, "later", 1).await.unwrap();
    cluster.restart(gone).await;
    cluster.wait_ready().await;
    let expected: Vec<String> = (0..20).map(|sequence| sequence.to_string()).collect();
    for node in 0..3 {
        let mut client = cluster.connect(node, &cluster.admin()).await;
        let any = wire::Fetch { any_replica: true, ..fetch_from("events", 0) };
        crate::support::until("the replica has it all", async || {
            client.fetch(any.clone()).await.is_ok_and(|all| all == expected)
        })
        .await;
        crate::support::until("the node knows the new topic", async || client.describe("later").await.is_ok()).await;
    }
    cluster.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_topic_leaves_the_disk_of_a_node_that_was_away() {
    let mut cluster = Cluster::start(3).await;
    cluster.create(0, "events", 1).await.unwrap();
    let logs = |config: &arqon_spine::Config| std::fs::read_dir(config.data.join("logs")).unwrap().count();
    crate::support::until("every node has the replica", async || {
        cluster.configs.iter().all(|config| logs(config) == 3)
    })
    .await;
    cluster.stop(2).await;
    let mut control = cluster.control(0).await;
    let delete = wire::DeleteTopicRequest { topic: "events".into() };
    control.delete_topic(authorized(delete, &cluster.admin())).await.unwrap();
    cluster.restart(2).await;
    crate::support::until("the data is gone", async || cluster.configs.iter().all(|config| logs(config) == 2)).await;
    cluster.wait_ready().await;
    cluster.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn dead_letters_find_their_topics_on_other_nodes() {
    let cluster = Cluster::start(3).await;
    let config = wire::TopicConfig { name: "nvm.jobs".into(), retention_ms: 1, attempts_max: 1, ..Default::default() };
    let mut control = cluster.control(0).await;
    let create = wire::CreateTopicRequest { config: Some(config) };
    control.create_topic(authorized(create, &cluster.admin())).await.unwrap();
    let leader = cluster.leader_of(0, "nvm.jobs", 0).await;
    // Three topics of one partition on three nodes: the routes are remote ones.
    assert_ne!(cluster.leader_of(0, "nvm.results", 0).await, leader);
    let mut client = cluster.connect(leader, &cluster.admin()).await;
    client.produce("nvm.jobs", 0, batch(&["hopeless"])).await.unwrap();
    let work = wire::Work {
        topic: "nvm.jobs".into(),
        group: "g".into(),
        worker: "w".into(),
        jobs_max: 1,
        wait_ms: 10_000,
        ..Default::default()
    };
    let (leased, _) = client.work(work).await.unwrap();
    let lease = wire::LeaseRef { offset: leased.leases[0].offset, attempt: 1 };
    let nack = wire::Nack { topic: "nvm.jobs".into(), group: "g".into(), leases: vec![lease], ..Default::default() };
    client.request(Body::Nack(nack), &[]).await.unwrap();
    for topic in ["nvm.jobs.dead", "nvm.results"] {
        let mut client = cluster.connect(cluster.leader_of(0, topic, 0).await, &cluster.admin()).await;
        let poll = wire::Fetch { wait_ms: 15_000, ..fetch_from(topic, 0) };
        let found = client.fetch(poll).await.unwrap();
        assert_eq!(found.len(), 1, "{topic}: {found:?}");
    }
    cluster.shutdown().await;
}

/// The story: a topic is made while a node is away, which comes back while nobody can tell it of that. What
/// it does not know yet is no topic that does not exist: clients must go on asking.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_starts_does_not_deny_the_topics_that_exist() {
    let mut cluster = Cluster::start(3).await;
    cluster.stop(2).await;
    cluster.create(0, "nvm.jobs", 1).await.unwrap();
    for node in 0..2 {
        cluster.stop(node).await;
    }
    cluster.restart(2).await;
    let mut client = cluster.connect(2, &cluster.admin()).await;
    let work = wire::Work {
        topic: "nvm.jobs".into(),
        group: "g".into(),
        worker: "w".into(),
        jobs_max: 1,
        operator_id: "o".into(),
        ..Default::default()
    };
    for refused in [
        client.describe("nvm.jobs").await.unwrap_err(),
        client.produce("nvm.jobs", 0, batch(&["x"])).await.unwrap_err(),
        client.fetch(fetch_from("nvm.jobs", 0)).await.unwrap_err(),
        client.work(work).await.unwrap_err(),
    ] {
        assert_eq!((refused.code(), refused.retry_after_ms), (ErrorCode::Overloaded, 200), "{refused:?}");
        assert_eq!(refused.message, "node 3 is starting: it does not know the cluster's topics yet");
    }
    let mut control = cluster.control(2).await;
    let describe = wire::DescribeTopic { topic: "nvm.jobs".into() };
    let list = wire::ListTopicsRequest::default();
    for refused in [
        control.describe_topic(authorized(describe, &cluster.admin())).await.map(drop).unwrap_err(),
        control.list_topics(authorized(list, &cluster.admin())).await.map(drop).unwrap_err(),
    ] {
        assert_eq!(refused.code(), tonic::Code::Unavailable, "{refused:?}");
        assert!(refused.message().contains("node 3 is starting"), "{refused:?}");
    }

    cluster.restart(0).await;
    cluster.restart(1).await;
    crate::support::until("the node knows the topic", async || match client.describe("nvm.jobs").await {
        Ok(_) => true,
        Err(refused) => {
            assert_eq!(refused.code(), ErrorCode::Overloaded, "{refused:?}");
            false
        }
    })
    .await;
    // Now it knows what does not exist, too.
    crate::support::until("the node knows all topics", async || {
        client.describe("nothing").await.unwrap_err().code() == ErrorCode::TargetNotFound
    })
    .await;
    cluster.shutdown().await;
}

/// The story: a topic is made while a node is away. The node comes back with its old data, in
/// which the topic is not.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_is_back_does_not_deny_what_was_made_while_it_was_away() {
    let mut cluster = Cluster::start(3).await;
    cluster.create(0, "early", 1).await.unwrap();
    cluster.stop(2).await;
    cluster.create(0, "late", 1).await.unwrap();
    cluster.stop(0).await;
    cluster.stop(1).await;
    cluster.restart(2).await;
    let mut client = cluster.connect(2, &cluster.admin()).await;
    crate::support::until("what it knew it knows", async || client.describe("early").await.is_ok()).await;
    assert_eq!(client.describe("late").await.unwrap_err().code(), ErrorCode::Overloaded);
    cluster.restart(0).await;
    cluster.restart(1).await;
    crate::support::until("the node knows the topic", async || match client.describe("late").await {
        Ok(_) => true,
        Err(refused) => {
            assert_eq!(refused.code(), ErrorCode::Overloaded, "{refused:?}");
            false
        }
    })
    .await;
    cluster.shutdown().await;
}
