//! Settings that change while a topic is in use, and trims, on real nodes.
#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use crate::support::{Cluster, authorized, batch_of, fetch_from, until};
use arqon_proto::wire;
use rand::{Rng, SeedableRng, rngs::StdRng};
use wire::{ErrorCode, frame::Body, trim_topic_request::Before};

const RECORD_SIZE: usize = 200_000;

async fn alter(
    cluster: &Cluster,
    ask: usize,
    change: wire::AlterTopicRequest,
) -> Result<wire::TopicDescription, tonic::Status> {
    let request = authorized(change, &cluster.admin());
    cluster.control(ask).await.alter_topic(request).await.map(tonic::Response::into_inner)
}

async fn trim(cluster: &Cluster, ask: usize, request: wire::TrimTopicRequest) -> Result<Vec<u64>, tonic::Status> {
    let request = authorized(request, &cluster.admin());
    let answer = cluster.control(ask).await.trim_topic(request).await?.into_inner();
    Ok(answer.partitions.iter().map(|at| at.log_start).collect())
}

/// How partition 0 is, as its leader says.
async fn status(cluster: &Cluster, ask: usize, topic: &str) -> wire::PartitionStatus {
    let request = authorized(wire::DescribeTopic { topic: topic.into() }, &cluster.admin());
    let answer = cluster.control(ask).await.describe_topic(request).await.unwrap().into_inner();
    answer.leaders.into_iter().find(|status| status.partition == 0).expect("the leader answers")
}

/// Writes `count` events that do not compress, one a batch, to a partition.
async fn fill(cluster: &Cluster, topic: &str, partition: usize, count: u64) {
    fill_from(cluster, 0, topic, partition, count).await;
}

async fn fill_from(cluster: &Cluster, ask: usize, topic: &str, partition: usize, count: u64) {
    let leader = cluster.leader_of(ask, topic, partition).await;
    let mut client = cluster.connect(leader, &cluster.admin()).await;
    let mut random = StdRng::seed_from_u64(7);
    for _ in 0..count {
        let mut payload = vec![0; RECORD_SIZE];
        random.fill_bytes(&mut payload);
        client.produce(topic, partition as u32, batch_of("", [payload.into()], None)).await.unwrap();
    }
}

fn refusal<T: std::fmt::Debug>(answer: Result<T, tonic::Status>, code: tonic::Code, part: &str) {
    let refused = answer.unwrap_err();
    assert_eq!(refused.code(), code, "{refused:?}");
    assert!(refused.message().contains(part), "{refused:?} should say {part:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn partitions_that_are_added_can_be_written_at_once_and_the_old_ones_go_on() {
    let cluster = Cluster::start(3).await;
    cluster.create(0, "a.events", 1).await.unwrap();
    fill(&cluster, "a.events", 0, 1).await;
    let change = wire::AlterTopicRequest { topic: "a.events".into(), partitions: Some(4), ..Default::default() };
    let description = alter(&cluster, 1, change).await.unwrap();
    assert_eq!(description.partitions.len(), 4);
    for partition in 0..4 {
        fill(&cluster, "a.events", partition, 1).await;
    }
    assert_eq!(status(&cluster, 2, "a.events").await.committed, 2);
    // A jobs topic grows with its companions until the first job is there.
    cluster.create(0, "a.jobs", 1).await.unwrap();
    let grow =
        |count| wire::AlterTopicRequest { topic: "a.jobs".into(), partitions: Some(count), ..Default::default() };
    alter(&cluster, 0, grow(2)).await.unwrap();
    for topic in ["a.jobs", "a.results", "a.jobs.dead"] {
        let mut client = cluster.connect(2, &cluster.admin()).await;
        until("all nodes know", async || client.describe(topic).await.unwrap().partitions.len() == 2).await;
    }
    fill(&cluster, "a.jobs", 1, 1).await;
    refusal(alter(&cluster, 2, grow(3)).await, tonic::Code::InvalidArgument, "holds jobs");
    refusal(alter(&cluster, 2, grow(1)).await, tonic::Code::InvalidArgument, "never fewer");
    // Whoever may not administer the topic may neither alter nor trim it.
    let token = cluster.token("acme", &["publish:a.*", "subscribe:a.*"]);
    let mut control = cluster.control(0).await;
    let refused = control.alter_topic(authorized(grow(3), &token)).await;
    refusal(refused, tonic::Code::PermissionDenied, "admin:a.jobs");
    let request = wire::TrimTopicRequest { topic: "a.jobs".into(), ..Default::default() };
    let refused = control.trim_topic(authorized(request, &token)).await;
    refusal(refused, tonic::Code::PermissionDenied, "admin:a.jobs");
    cluster.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_size_limit_acts_on_the_running_partition() {
    let cluster = Cluster::start(1).await;
    cluster.create(0, "a.events", 1).await.unwrap();
    fill(&cluster, "a.events", 0, 40).await;
    assert_eq!(status(&cluster, 0, "a.events").await.log_start, 0);
    let change =
        wire::AlterTopicRequest { topic: "a.events".into(), retention_bytes: Some(2 << 20), ..Default::default() };
    alter(&cluster, 0, change).await.unwrap();
    until("old segments go", async || status(&cluster, 0, "a.events").await.log_start > 0).await;
    let status = status(&cluster, 0, "a.events").await;
    assert!(status.size >= 2 << 20, "the limit is kept: {status:?}");
    cluster.shutdown().await;
}

/// Reads a node's own replica from `start` to `end`: every record, and none before.
async fn check_replica(cluster: &Cluster, node: usize, topic: &str, start: u64, end: u64) {
    let mut client = cluster.connect(node, &cluster.admin()).await;
    until("the replica is trimmed and has caught up", async || {
        let fetch = wire::Fetch { any_replica: true, ..fetch_from(topic, end - 1) };
        match client.request(Body::Fetch(fetch), &[]).await {
            Ok((Body::Fetched(fetched), _)) => fetched.log_start == start && fetched.committed == end,
            _ => false,
        }
    })
    .await;
    let gone = wire::Fetch { any_replica: true, ..fetch_from(topic, start - 1) };
    let refused = client.request(Body::Fetch(gone), &[]).await.unwrap_err();
    assert_eq!((refused.code(), refused.log_start), (ErrorCode::OffsetOutOfRange, start));
    let mut next = start;
    while next < end {
        let fetch = wire::Fetch { any_replica: true, ..fetch_from(topic, next) };
        let (_, mut body) = client.request(Body::Fetch(fetch), &[]).await.unwrap();
        assert!(!body.is_empty(), "record {next} of {topic} is on node {node}");
        while !body.is_empty() {
            let header = arqon_proto::Batch::split_from(&mut body).unwrap().header;
            assert_eq!(header.base_offset.0, next);
            next = header.next_offset().0;
        }
    }
}

/// The story: an operator drops old events of topics that are in use. A node is away meanwhile: of
/// one topic it lacks all that is kept, of the other it has most. What is dropped is gone
/// everywhere and for good, whoever leads, and nothing else is.
#[tokio::test(flavor = "multi_thread")]
async fn a_trim_ends_at_a_segment_boundary_on_all_replicas_and_lasts() {
    let mut cluster = Cluster::start(3).await;
    for (topic, count) in [("far.events", 3), ("near.events", 35)] {
        cluster.create(0, topic, 1).await.unwrap();
        fill(&cluster, topic, 0, count).await;
    }
    let away = (cluster.leader_of(0, "far.events", 0).await + 1) % 3;
    for topic in ["far.events", "near.events"] {
        until("the node that leaves has it all", async || {
            let mut client = cluster.connect(away, &cluster.admin()).await;
            let fetch = wire::Fetch { any_replica: true, ..fetch_from(topic, 2) };
            client.request(Body::Fetch(fetch), &[]).await.is_ok_and(|(_, body)| !body.is_empty())
        })
        .await;
    }
    cluster.stop(away).await;
    let ask = (away + 1) % 3;
    let request = |topic: &str, before| wire::TrimTopicRequest {
        topic: topic.into(),
        partition: Some(0),
        before: Some(Before::BeforeOffset(before)),
    };
    let mut starts = Vec::new();
    for (topic, count) in [("far.events", 37), ("near.events", 5)] {
        fill_from(&cluster, ask, topic, 0, count).await;
        let start = trim(&cluster, ask, request(topic, 30)).await.unwrap()[0];
        assert!(start > 3 && start <= 30, "{topic}: {start}");
        assert_eq!(status(&cluster, ask, topic).await.log_start, start);
        // Asking for less changes nothing, and asking for more than there is is an error.
        assert_eq!(trim(&cluster, ask, request(topic, 1)).await.unwrap(), [start]);
        let beyond = trim(&cluster, ask, request(topic, 41)).await;
        refusal(beyond, tonic::Code::OutOfRange, "ends at offset 40");
        starts.push((topic, start));
    }
    let no_partition = wire::TrimTopicRequest { partition: None, ..request("far.events", 1) };
    refusal(trim(&cluster, ask, no_partition).await, tonic::Code::InvalidArgument, "say which");
    cluster.restart(away).await;
    cluster.wait_ready().await;
    for (topic, start) in &starts {
        for node in 0..3 {
            check_replica(&cluster, node, topic, *start, 40).await;
        }
    }
    // Another leader of each: the same start.
    let leader = cluster.leader_of(ask, "far.events", 0).await;
    cluster.stop(leader).await;
    let left = (0..3).find(|node| *node != leader).unwrap();
    for (topic, start) in &starts {
        until("a leader answers", async || {
            let request = authorized(wire::DescribeTopic { topic: (*topic).into() }, &cluster.admin());
            let answer = cluster.control(left).await.describe_topic(request).await.unwrap().into_inner();
            answer.leaders.iter().any(|status| status.log_start == *start && status.committed == 40)
        })
        .await;
    }
    cluster.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trim_by_time_takes_all_partitions_and_stops_before_what_a_queue_needs() {
    let cluster = Cluster::start(1).await;
    cluster.create(0, "a.jobs", 2).await.unwrap();
    for partition in 0..2 {
        fill(&cluster, "a.jobs", partition, 20).await;
    }
    let request = wire::TrimTopicRequest {
        topic: "a.jobs".into(),
        partition: None,
        before: Some(Before::BeforeTimeMs(u64::MAX)),
    };
    let mut client = cluster.connect(0, &cluster.admin()).await;
    let work = wire::Work {
        topic: "a.jobs".into(),
        partition: 1,
        group: "slow".into(),
        worker: "w".into(),
        jobs_max: 1,
        wait_ms: 10_000,
        ..Default::default()
    };
    client.request(Body::Work(work), &[]).await.unwrap();
    // Partition 0 could go; but the answer is for all of them, and nothing has happened.
    refusal(trim(&cluster, 0, request.clone()).await, tonic::Code::InvalidArgument, "a.jobs/1 cannot be trimmed");
    refusal(trim(&cluster, 0, request.clone()).await, tonic::Code::InvalidArgument, "\"slow\"");
    assert_eq!(status(&cluster, 0, "a.jobs").await.log_start, 0);
    let ack = wire::Ack {
        topic: "a.jobs".into(),
        partition: 1,
        group: "slow".into(),
        leases: vec![wire::LeaseRef { offset: 0, attempt: 1 }],
    };
    client.request(Body::Ack(ack), &[]).await.unwrap();
    let one = wire::TrimTopicRequest { partition: Some(0), ..request };
    let starts = trim(&cluster, 0, one).await.unwrap();
    assert!(starts[0] > 0, "{starts:?}");
    cluster.shutdown().await;
}
