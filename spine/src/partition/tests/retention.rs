//! Old segments go, on every replica alike, and never what a queue still needs.

use std::time::Duration;

use arqon_proto::wire::{self, ErrorCode};
use rand::{Rng, SeedableRng, rngs::StdRng};
use tokio::time::{sleep, timeout};

use super::{
    cluster::{Cluster, EVENTS, JOBS, PATIENCE, batch_of, code, produce_to},
    queue::{ack, take},
};
use crate::partition::Partition;

/// Text that does not compress, so that `count` of them fill some segments.
async fn fill(partition: &Partition, topic: &str, count: u64) {
    let mut random = StdRng::seed_from_u64(1);
    for _ in 0..count {
        let text: String = (0..100_000).map(|_| char::from(random.next_u32() as u8 % 94 + 33)).collect();
        partition.produce(produce_to(topic), batch_of([text], None)).await.unwrap();
    }
}

async fn trimmed(partition: &Partition) -> u64 {
    let moved = async {
        loop {
            match partition.status().log_start {
                0 => sleep(Duration::from_millis(20)).await,
                start => return start,
            }
        }
    };
    timeout(PATIENCE, moved).await.expect("the log is trimmed in time")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_over_the_size_limit_goes_on_every_replica_and_readers_are_told() {
    let mut cluster = Cluster::start(3).await;
    let leader = cluster.leader(EVENTS).await;
    fill(&leader, EVENTS, 60).await;
    let mut starts = Vec::new();
    for replica in cluster.replicas(EVENTS) {
        starts.push(trimmed(&replica).await);
    }
    assert_eq!(starts, vec![starts[0]; 3], "the log start is the same everywhere");
    let gone = leader.fetch(wire::Fetch { offset: 0, ..Default::default() }).await;
    assert_eq!(gone.as_ref().unwrap_err().log_start, starts[0]);
    assert_eq!(code(gone), ErrorCode::OffsetOutOfRange);
    let (_, kept) = leader.fetch(wire::Fetch { offset: starts[0], ..Default::default() }).await.unwrap();
    assert_eq!(kept[0].header.base_offset.0, starts[0]);
    drop(leader);
    cluster.restart().await;
    let leader = cluster.leader(EVENTS).await;
    assert!(leader.status().log_start >= starts[0], "the log start does not go back");
    assert_eq!(leader.status().committed, 60);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unsettled_job_is_kept_whatever_the_size() {
    let cluster = Cluster::start(1).await;
    let jobs = cluster.leader(JOBS).await;
    fill(&jobs, JOBS, 5).await;
    let held = take(&jobs, 1).await;
    fill(&jobs, JOBS, 55).await;
    let rest = take(&jobs, 59).await;
    assert!(jobs.ack(ack(&rest)).await.unwrap().lost.is_empty());
    // Everything but the first job is settled and far over the limit; that one holds it all.
    let point = || jobs.status().queues[0].floor;
    assert_eq!((point(), jobs.status().log_start), (0, 0));
    assert!(jobs.ack(ack(&held)).await.unwrap().lost.is_empty());
    assert_eq!(point(), 60);
    assert!(trimmed(&jobs).await <= 60);
}
