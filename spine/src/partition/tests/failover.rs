//! Leaders change and nodes restart; what was acknowledged stays.

use std::{sync::Arc, time::Duration};

use arqon_proto::{
    NodeId, wire,
    wire::{ErrorCode, list_offsets::At},
};
use tokio::time::{sleep, timeout};

use super::{
    cluster::*,
    queue::{ack, put_jobs, result_of, take, work},
};
use crate::partition::Partition;

/// Moves the leadership of `topic` to another node.
async fn move_leader(cluster: &Cluster, topic: &str) -> Partition {
    let old = cluster.leader(topic).await;
    let own = old.group().status().leader.unwrap();
    let heir = NodeId(own.0 % 3 + 1);
    let mut status = old.group().watch();
    timeout(PATIENCE, async {
        while old.group().status().is_leader {
            old.group().transfer_leader(heir).await.unwrap();
            // An heir that lags does not take over: ask again.
            let _ = timeout(Duration::from_secs(2), status.wait_for(|status| !status.is_leader)).await;
        }
    })
    .await
    .unwrap();
    cluster.leader(topic).await
}

/// Sends `batch` until it is surely written once, as an SDK does.
async fn send(shared: &Arc<Shared>, at: u64) {
    let batch = batch_of((at * 2..at * 2 + 2).map(|at| format!("event {at}")), Some((1, at * 2)));
    loop {
        let leader = shared.leader(EVENTS).await;
        match leader.produce(produce_to(EVENTS), batch.clone()).await {
            Ok(_) => return,
            Err(cause) => match cause.code() {
                ErrorCode::Duplicate => return assert_eq!(cause.duplicates.len(), 2),
                ErrorCode::NotLeader | ErrorCode::UnknownOutcome | ErrorCode::Overloaded => {
                    sleep(Duration::from_millis(u64::from(cause.retry_after_ms.max(5)))).await;
                }
                other => panic!("{other:?}: {}", cause.message),
            },
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_producer_that_resends_over_changes_of_leader_writes_each_event_once() {
    let cluster = Cluster::start(3).await;
    let shared = cluster.shared.clone();
    let sender = tokio::spawn(async move {
        for at in 0..300 {
            send(&shared, at).await;
        }
    });
    for _ in 0..3 {
        move_leader(&cluster, EVENTS).await;
    }
    timeout(Duration::from_secs(60), sender).await.unwrap().unwrap();
    let leader = cluster.leader(EVENTS).await;
    let wanted: Vec<_> = (0..600).map(|at| (at, format!("event {at}"))).collect();
    assert_eq!(payloads(&drain(&leader).await), wanted);
    for replica in cluster.replicas(EVENTS) {
        let mut readable = replica.group().readable();
        timeout(PATIENCE, readable.wait_for(|readable| readable.next_offset.0 == 600)).await.unwrap().unwrap();
        assert_eq!(replica.machine_checkpoint(), leader.machine_checkpoint(), "replicas differ");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leases_survive_a_change_of_leader_and_no_job_is_handed_out_twice() {
    let cluster = Cluster::start(3).await;
    let jobs = cluster.leader(JOBS).await;
    put_jobs(&jobs, 10).await;
    let held = take(&jobs, 4).await;
    let short = wire::Work { lease_ms: 1_500, ..work(1, 0) };
    let (short, _) = jobs.work(short, None).await.unwrap();
    let waiting = {
        let other_group = wire::Work { group: "idle".into(), ..work(1, 30_000) };
        let jobs = jobs.clone();
        // Nothing is left for this group once it has had all jobs.
        let _ = jobs.work(wire::Work { group: "idle".into(), ..work(10, 0) }, None).await.unwrap();
        tokio::spawn(async move { jobs.work(other_group, None).await })
    };

    let next = move_leader(&cluster, JOBS).await;
    assert_ne!(next.group().replica(), jobs.group().replica());
    let sent_on = timeout(PATIENCE, waiting).await.unwrap().unwrap();
    assert_eq!(code(sent_on), ErrorCode::NotLeader, "a worker must not wait at the old leader");
    assert_eq!(code(jobs.ack(ack(&held)).await), ErrorCode::NotLeader);

    let (rest, _) = next.work(work(100, 20_000), None).await.unwrap();
    assert_eq!(rest.leases.iter().map(|lease| lease.offset).collect::<Vec<_>>(), (5..10).collect::<Vec<_>>());
    let results = cluster.leader(RESULTS).await;
    for lease in held.iter().chain(&rest.leases) {
        result_of(&results, lease).await.unwrap();
    }
    assert!(next.ack(ack(&held)).await.unwrap().lost.is_empty());
    assert!(next.ack(ack(&rest.leases)).await.unwrap().lost.is_empty());
    // The one whose worker is silent runs out at the new leader.
    let again = take(&next, 1).await;
    assert_eq!((again[0].offset, again[0].attempt), (short.leases[0].offset, 2));
    result_of(&results, &again[0]).await.unwrap();
    assert_eq!(code(result_of(&results, &short.leases[0]).await), ErrorCode::Duplicate);
    assert!(next.ack(ack(&again)).await.unwrap().lost.is_empty());
    let queue = next.status().queues.into_iter().find(|queue| queue.group == "g").unwrap();
    assert_eq!((queue.floor, queue.leased), (10, 0));
}

/// The story: a consumer has read on at the new leader and comes back to the one of before, which is cut off and does not
/// know it yet. It may say that it is no leader, and nothing of where the log begins or ends.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_of_before_calls_no_offset_wrong() {
    let cluster = Cluster::start(3).await;
    let leader = cluster.leader(EVENTS).await;
    let beyond = || wire::Fetch { offset: 7, ..Default::default() };
    let earliest = || wire::ListOffsets { at: Some(At::Earliest(true)), ..Default::default() };
    assert_eq!(code(leader.fetch(beyond()).await), ErrorCode::OffsetOutOfRange);
    assert_eq!(leader.list_offsets(earliest()).await.unwrap().offset, 0);
    let own = leader.group().status().leader.unwrap();
    for (_, host) in (1..).zip(&cluster.hosts).filter(|(node, _)| NodeId(*node) != own) {
        host.shutdown().await;
    }
    assert_eq!(code(timeout(PATIENCE, leader.fetch(beyond())).await.unwrap()), ErrorCode::NotLeader);
    assert_eq!(code(timeout(PATIENCE, leader.list_offsets(earliest())).await.unwrap()), ErrorCode::NotLeader);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_is_there_after_a_restart() {
    let mut cluster = Cluster::start(1).await;
    let jobs = cluster.leader(JOBS).await;
    let events = cluster.leader(EVENTS).await;
    put_jobs(&jobs, 5).await;
    let held = take(&jobs, 2).await;
    let event = || batch_of(["once".into()], Some((1, 0)));
    events.produce(produce_to(EVENTS), event()).await.unwrap();
    let before = jobs.machine_checkpoint();
    drop((jobs, events));
    cluster.restart().await;
    let (jobs, events) = (cluster.leader(JOBS).await, cluster.leader(EVENTS).await);
    assert_eq!(jobs.machine_checkpoint(), before);
    assert_eq!(code(events.produce(produce_to(EVENTS), event()).await), ErrorCode::Duplicate);
    let rest = take(&jobs, 3).await;
    assert!(rest.iter().all(|lease| lease.offset >= 2 && lease.attempt == 1));
    assert!(jobs.ack(ack(&held)).await.unwrap().lost.is_empty());
    assert_eq!(jobs.status().queues[0].floor, 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_partition_that_shuts_down_answers_those_who_wait() {
    let cluster = Cluster::start(1).await;
    let jobs = cluster.leader(JOBS).await;
    let waiting = tokio::spawn({
        let jobs = jobs.clone();
        async move { jobs.work(work(1, 30_000), None).await }
    });
    // An ack comes after the worker in line.
    put_jobs(&jobs, 1).await;
    let first = waiting.await.unwrap().unwrap().0;
    let waiting = tokio::spawn({
        let jobs = jobs.clone();
        async move { jobs.work(work(1, 30_000), None).await }
    });
    assert!(jobs.ack(ack(&first.leases)).await.unwrap().lost.is_empty());
    timeout(PATIENCE, jobs.shutdown()).await.unwrap();
    assert_eq!(code(timeout(PATIENCE, waiting).await.unwrap().unwrap()), ErrorCode::NotLeader);
    assert!(jobs.produce(produce_to(JOBS), batch_of(["late".into()], None)).await.is_err());
    assert!(jobs.work(work(1, 0), None).await.is_err());
}

impl Partition {
    fn machine_checkpoint(&self) -> bytes::Bytes {
        self.replica.machine.lock().state.checkpoint()
    }
}
