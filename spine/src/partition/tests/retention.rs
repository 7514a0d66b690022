//! Old segments go, on every replica alike, and never what a queue still needs.

use std::{sync::atomic::Ordering, time::Duration};

use arqon_proto::wire::{self, ErrorCode};
use rand::{Rng, SeedableRng, rngs::StdRng};
use tokio::time::{sleep, timeout};

use super::{
    cluster::{Cluster, EVENTS, JOBS, PATIENCE, batch_of, code, drain, produce_to, topic},
    queue::{ack, put_jobs, take},
};
use crate::partition::Partition;

/// Text that does not compress, so that `count` of them fill some segments.
async fn fill(partition: &Partition, topic: &str, count: u64) {
    try_fill(partition, topic, count).await.unwrap();
}

async fn try_fill(partition: &Partition, topic: &str, count: u64) -> Result<(), wire::Error> {
    let mut random = StdRng::seed_from_u64(1);
    for _ in 0..count {
        let text: String = (0..100_000).map(|_| char::from(random.next_u32() as u8 % 94 + 33)).collect();
        partition.produce(produce_to(topic), batch_of([text], None)).await?;
    }
    Ok(())
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

/// The story: a worker takes a job and keeps it, while others write until the topic's limit is
/// reached. Writers are told who is in the way, and go on as soon as it is not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_topic_that_is_full_behind_a_queue_names_it_and_goes_on_when_the_queue_does() {
    let cluster = Cluster::start(1).await;
    let jobs = cluster.leader(JOBS).await;
    let known = batch_of(["known".to_owned()], Some((9, 0)));
    jobs.produce(produce_to(JOBS), known.clone()).await.unwrap();
    let held = take(&jobs, 1).await;
    let mut refused = None;
    for _ in 0..200 {
        if let Err(error) = try_fill(&jobs, JOBS, 1).await {
            refused = Some(error);
            break;
        }
    }
    let refused = refused.expect("a limit of 1 MiB is reached");
    assert_eq!((refused.code(), refused.field.as_str()), (ErrorCode::TopicFull, JOBS));
    assert!(refused.message.contains("a.jobs/0") && refused.message.contains("queue group \"g\""), "{refused:?}");
    assert!(refused.message.contains("to offset 0") && refused.retry_after_ms > 0, "{refused:?}");
    assert!(refused.message.contains("`arqon group delete a.jobs g`"), "{refused:?}");
    let status = jobs.full_status();
    let holder = &status.holders[0];
    assert_eq!((holder.kind.as_str(), holder.name.as_str(), holder.floor), ("queue", "g", 0));
    assert_eq!((holder.records, holder.size), (status.committed, status.size));
    assert_eq!((status.log_start, status.refuses.as_str()), (0, refused.message.as_str()));
    // Whoever repeats a batch that stands in the log learns just that.
    assert_eq!(code(jobs.produce(produce_to(JOBS), known).await), ErrorCode::Duplicate);
    // All other jobs are settled; the first one still holds everything.
    let rest = take(&jobs, status.committed as usize - 1).await;
    assert!(jobs.ack(ack(&rest)).await.unwrap().lost.is_empty());
    assert_eq!(code(try_fill(&jobs, JOBS, 1).await), ErrorCode::TopicFull);
    assert!(jobs.ack(ack(&held)).await.unwrap().lost.is_empty());
    fill(&jobs, JOBS, 1).await;
    assert!(trimmed(&jobs).await <= status.committed);
    assert_eq!(jobs.full_status().refuses, "");
}

/// The story: a group that nobody works in any more has a job that it never settles. Its operator gives it up.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_topic_that_is_full_behind_a_group_takes_records_when_the_group_is_deleted() {
    let mut cluster = Cluster::start(1).await;
    let jobs = cluster.leader(JOBS).await;
    put_jobs(&jobs, 1).await;
    let held = take(&jobs, 1).await;
    while try_fill(&jobs, JOBS, 1).await.is_ok() {}
    let refused = jobs.delete_group("g", false, false).await.unwrap_err();
    assert_eq!((refused.code(), refused.field.as_str()), (ErrorCode::ValidationError, "group"));
    assert!(refused.message.contains("1 jobs are leased"), "{refused:?}");
    assert!(jobs.delete_group("g", true, true).await.unwrap());
    assert_eq!(code(try_fill(&jobs, JOBS, 1).await), ErrorCode::TopicFull, "that was only asked");
    assert!(!jobs.delete_group("other", false, false).await.unwrap());
    assert!(jobs.delete_group("g", true, false).await.unwrap());
    fill(&jobs, JOBS, 1).await;
    assert_eq!(jobs.ack(ack(&held)).await.unwrap().lost.len(), 1, "its leases are gone");
    assert!(jobs.full_status().queues.is_empty());
    drop(jobs);
    cluster.restart().await;
    let jobs = cluster.leader(JOBS).await;
    assert!(jobs.full_status().queues.is_empty(), "it stays deleted");
    let again = take(&jobs, 1).await;
    assert_eq!((again[0].offset, again[0].attempt), (jobs.status().log_start, 1), "one of its name begins anew");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_that_is_nearly_full_stops_new_records_and_nothing_else() {
    let cluster = Cluster::start(1).await;
    let jobs = cluster.leader(JOBS).await;
    put_jobs(&jobs, 2).await;
    cluster.shared.is_low.store(true, Ordering::Relaxed);
    let refused = jobs.produce(produce_to(JOBS), batch_of(["x".to_owned()], None)).await.unwrap_err();
    assert_eq!(refused.code(), ErrorCode::StorageFull);
    assert!(refused.message.contains("a.jobs/0") && refused.retry_after_ms > 0, "{refused:?}");
    assert_eq!(drain(&jobs).await.len(), 1, "reads go on");
    let taken = take(&jobs, 2).await;
    assert!(jobs.ack(ack(&taken)).await.unwrap().lost.is_empty(), "queues go on");
    cluster.shared.is_low.store(false, Ordering::Relaxed);
    put_jobs(&jobs, 1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_goes_by_age_while_the_clock_is_wrong() {
    let cluster = Cluster::start(1).await;
    let events = cluster.leader(EVENTS).await;
    let by_age = wire::TopicConfig { retention_ms: 1_000, retention_bytes: 0, ..topic(EVENTS) };
    events.configure(&by_age);
    fill(&events, EVENTS, 30).await;
    cluster.shared.is_clock_off.store(true, Ordering::Relaxed);
    cluster.shared.now_ms.fetch_add(3_600_000, Ordering::Relaxed);
    let submissions = events.submissions.downgrade();
    events.replica.propose_log_start(&submissions).await;
    assert_eq!(events.status().log_start, 0);
    cluster.shared.is_clock_off.store(false, Ordering::Relaxed);
    events.replica.propose_log_start(&submissions).await;
    assert!(trimmed(&events).await > 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_time_of_batches_never_goes_back_whatever_the_clock_does() {
    let mut cluster = Cluster::start(3).await;
    let write = async |partition: &Partition| {
        partition.produce(produce_to(EVENTS), batch_of(["x".to_owned()], None)).await.unwrap().time_ms
    };
    let first = write(&cluster.leader(EVENTS).await).await;
    cluster.shared.now_ms.store(first - 500_000, Ordering::Relaxed);
    assert_eq!(write(&cluster.leader(EVENTS).await).await, first);
    // A leader that has just started knows it from the log.
    cluster.restart().await;
    assert_eq!(write(&cluster.leader(EVENTS).await).await, first);
    cluster.shared.now_ms.store(first + 5, Ordering::Relaxed);
    let leader = cluster.leader(EVENTS).await;
    assert_eq!(write(&leader).await, first + 5);
    let at = |time_ms| wire::ListOffsets { at: Some(wire::list_offsets::At::TimeMs(time_ms)), ..Default::default() };
    for (time_ms, offset) in [(0, 0), (first, 0), (first + 1, 3), (first + 5, 3), (first + 6, 4)] {
        assert_eq!(leader.list_offsets(at(time_ms)).await.unwrap().offset, offset, "{time_ms}");
    }
}
