//! Work queues: every job to one worker at a time, and one result a job.

use std::{collections::BTreeSet, sync::atomic::Ordering, time::Duration};

use arqon_proto::{
    Batch, BatchBuilder, Compression, DecodeError, Record, decode_stamps, limits, records,
    wire::{self, ErrorCode, Lease, LeaseRef},
};
use tokio::time::{Instant, timeout};

use super::cluster::*;
use crate::partition::{Operator, Partition};

pub fn work(job_count_max: u32, wait_ms: u32) -> wire::Work {
    wire::Work {
        topic: JOBS.into(),
        group: "g".into(),
        worker: "w".into(),
        jobs_max: job_count_max,
        wait_ms,
        ..Default::default()
    }
}

pub fn ack(leases: &[Lease]) -> wire::Ack {
    let leases = leases.iter().map(|lease| LeaseRef { offset: lease.offset, attempt: lease.attempt });
    wire::Ack { topic: JOBS.into(), group: "g".into(), leases: leases.collect(), ..Default::default() }
}

fn nack(leases: &[Lease], delay_ms: u32) -> wire::Nack {
    let ack = ack(leases);
    wire::Nack { topic: ack.topic, group: ack.group, leases: ack.leases, delay_ms, ..Default::default() }
}

pub async fn put_jobs(jobs: &Partition, count: u64) {
    let payloads = (0..count).map(|at| format!("{{\"job_id\":\"job-{at}\"}}"));
    jobs.produce(produce_to(JOBS), batch_of(payloads, None)).await.unwrap();
}

/// Takes jobs until there are `count`.
pub async fn take(jobs: &Partition, count: usize) -> Vec<Lease> {
    let mut out = Vec::new();
    while out.len() < count {
        let wanted = work((count - out.len()) as u32, 20_000);
        let (leased, batches) = timeout(PATIENCE, jobs.work(wanted, None)).await.unwrap().unwrap();
        let offsets: BTreeSet<_> = payloads(&batches).into_iter().map(|(offset, _)| offset).collect();
        assert!(leased.leases.iter().all(|lease| offsets.contains(&lease.offset)), "a job came without its record");
        out.extend(leased.leases);
    }
    out
}

pub async fn result_of(results: &Partition, lease: &Lease) -> Result<wire::Produced, wire::Error> {
    let request = with_tokens(RESULTS, [lease.token.clone()]);
    results.produce(request, batch_of([format!("result of {}", lease.offset)], None)).await
}

fn offsets(leases: &[Lease]) -> Vec<(u64, u32)> {
    leases.iter().map(|lease| (lease.offset, lease.attempt)).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_workers_share_the_jobs_and_each_has_one_result() {
    let cluster = Cluster::start(1).await;
    let (jobs, results) = (cluster.leader(JOBS).await, cluster.leader(RESULTS).await);
    let mut workers = tokio::task::JoinSet::new();
    for at in 0..8 {
        let (jobs, results) = (jobs.clone(), results.clone());
        workers.spawn(async move {
            let operator = Operator { id: format!("op-{at}"), version: "1.2".into() };
            while jobs.status().queues.first().is_none_or(|queue| queue.floor < 300) {
                let request = wire::Work { worker: format!("w-{at}"), ..work(7, 100) };
                let (leased, _) = jobs.work(request, Some(operator.clone())).await.unwrap();
                for lease in &leased.leases {
                    assert_eq!(lease.attempt, 1);
                    result_of(&results, lease).await.unwrap();
                    assert_eq!(code(result_of(&results, lease).await), ErrorCode::Duplicate);
                }
                if !leased.leases.is_empty() {
                    assert!(jobs.ack(ack(&leased.leases)).await.unwrap().lost.is_empty());
                }
            }
        });
    }
    for _ in 0..3 {
        put_jobs(&jobs, 100).await;
    }
    timeout(PATIENCE, async {
        while let Some(worker) = workers.join_next().await {
            worker.unwrap();
        }
    })
    .await
    .unwrap();

    let mut answered = BTreeSet::new();
    for batch in drain(&results).await {
        let stamps = decode_stamps(&batch.stamps, batch.header.record_count).unwrap().unwrap();
        for stamp in stamps.iter() {
            let cause = stamp.cause();
            assert_eq!((cause.topic.as_str(), cause.operator_version.as_str()), (JOBS, "1.2"));
            assert!(answered.insert(cause.offset), "job {} has two results", cause.offset);
        }
    }
    assert_eq!(answered, (0..300).collect());
    let queue = &jobs.status().queues[0];
    assert_eq!((queue.floor, queue.next, queue.leased, queue.pending), (300, 300, 0, 0));
    assert_eq!(jobs.status().queues[0].floor, 300);
    assert_eq!(cluster.metrics.granted_count.load(Ordering::Relaxed), 300);
    assert_eq!(cluster.metrics.leased_count.load(Ordering::Relaxed), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_given_back_comes_again_after_its_delay_and_its_old_lease_is_lost() {
    let cluster = Cluster::start(1).await;
    let jobs = cluster.leader(JOBS).await;
    put_jobs(&jobs, 3).await;
    let first = take(&jobs, 3).await;
    assert_eq!(offsets(&first), [(0, 1), (1, 1), (2, 1)]);
    // Longer than a slow machine takes until it asks for the job again.
    let delay = Duration::from_secs(5);
    let started = Instant::now();
    jobs.nack(nack(&first[1..2], delay.as_millis() as u32)).await.unwrap();
    jobs.ack(ack(&first[..1])).await.unwrap();
    let (none, _) = jobs.work(work(5, 0), None).await.unwrap();
    assert!(none.leases.is_empty(), "the delay is not over");
    let again = take(&jobs, 1).await;
    assert_eq!(offsets(&again), [(1, 2)]);
    assert!(started.elapsed() >= delay);
    let settled = jobs.ack(ack(&first)).await.unwrap();
    let lost: BTreeSet<_> = settled.lost.iter().map(|lease| (lease.offset, lease.attempt)).collect();
    assert_eq!(lost, BTreeSet::from([(0, 1), (1, 1)]));
    assert_eq!(jobs.status().queues[0].floor, 1);
    assert!(jobs.ack(ack(&again)).await.unwrap().lost.is_empty());
    assert_eq!(jobs.status().queues[0].floor, 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lease_runs_out_unless_it_is_renewed_and_an_expired_operator_loses_its_own() {
    let cluster = Cluster::start(1).await;
    let jobs = cluster.leader(JOBS).await;
    put_jobs(&jobs, 3).await;
    // Much longer than a slow machine takes from one renewal to the next.
    let lease = Duration::from_secs(5);
    let short = |worker: &str| wire::Work { lease_ms: lease.as_millis() as u32, worker: worker.into(), ..work(1, 0) };
    let started = Instant::now();
    let (silent, _) = jobs.work(short("silent"), None).await.unwrap();
    let (busy, _) = jobs.work(short("busy"), None).await.unwrap();
    let granted = Instant::now();
    let op = Operator { id: "op".into(), version: "1".into() };
    let (owned, _) = jobs.work(work(1, 0), Some(op)).await.unwrap();
    assert_eq!(offsets(&[silent.leases.clone(), busy.leases.clone(), owned.leases].concat()), [(0, 1), (1, 1), (2, 1)]);

    jobs.expire_operator("somebody else").await;
    jobs.expire_operator("op").await;
    let taken_over = take(&jobs, 1).await;
    assert_eq!(offsets(&taken_over), [(2, 2)]);

    let renew = ack(&busy.leases);
    let renew = wire::Renew { topic: renew.topic, group: renew.group, leases: renew.leases, ..Default::default() };
    let again = async {
        loop {
            let renewed = jobs.renew(renew.clone()).await.expect("a renewal is answered");
            assert!(renewed.lost.is_empty());
            let (leased, _) = jobs.work(work(1, 100), None).await.expect("a request for jobs is answered");
            if !leased.leases.is_empty() {
                break leased.leases;
            }
        }
    };
    let again = timeout(PATIENCE, again).await.expect("the job of the silent worker comes again");
    assert_eq!(offsets(&again), [(0, 2)]);
    assert!(started.elapsed() >= lease);
    tokio::time::sleep_until(granted + lease).await;
    assert!(jobs.ack(ack(&busy.leases)).await.unwrap().lost.is_empty(), "the renewed lease still holds");
    assert_eq!(cluster.metrics.expired_count.load(Ordering::Relaxed), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_without_attempts_left_is_dead_lettered_once_with_its_one_result() {
    let cluster = Cluster::start(1).await;
    let (jobs, results, dead) = (cluster.leader(JOBS).await, cluster.leader(RESULTS).await, cluster.leader(DEAD).await);
    // The answers of the first writes are lost: the move is tried again.
    cluster.shared.lost_answer_count.store(3, Ordering::Relaxed);
    put_jobs(&jobs, 2).await;
    let first = take(&jobs, 2).await;
    jobs.nack(nack(&first, 0)).await.unwrap();
    let second = take(&jobs, 2).await;
    assert_eq!(offsets(&second), [(0, 2), (1, 2)]);
    // One of them has a result and only its ack is missing.
    result_of(&results, &second[1]).await.unwrap();
    jobs.nack(nack(&second, 0)).await.unwrap();

    let mut readable = jobs.group().readable();
    timeout(PATIENCE, async {
        while jobs.status().queues[0].floor < 2 {
            readable.changed().await.unwrap();
        }
    })
    .await
    .unwrap();
    assert_eq!(code(result_of(&results, &second[0]).await), ErrorCode::Duplicate);
    let (none, _) = jobs.work(work(5, 0), None).await.unwrap();
    assert!(none.leases.is_empty());

    let mut letters = Vec::new();
    for batch in drain(&dead).await {
        records(&batch, |_, record| {
            letters.push((
                String::from_utf8(record.payload.to_vec()).unwrap(),
                record.header("arqonbus-dead-reason").map(str::to_owned),
            ));
            Ok::<_, DecodeError>(())
        })
        .unwrap();
    }
    letters.sort();
    let reason = Some("2 attempts without an ack".to_owned());
    let letter = |at: u32| (format!("{{\"job_id\":\"job-{at}\"}}"), reason.clone());
    assert_eq!(letters, [letter(0), letter(1)]);
    let mut answers: Vec<_> = payloads(&drain(&results).await).into_iter().map(|(_, payload)| payload).collect();
    answers.sort();
    assert_eq!(
        answers,
        ["result of 1", "{\"error\":\"DEAD_LETTERED: 2 attempts without an ack\",\"job_id\":\"job-0\"}"]
    );
    // Nobody but the bus writes dead letters.
    let forged = dead.produce(with_tokens(DEAD, [second[0].token.clone()]), batch_of(["x".into()], None)).await;
    assert_eq!(code(forged), ErrorCode::ValidationError);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_went_away_while_it_waited_takes_no_job_with_it() {
    let cluster = Cluster::start(1).await;
    let jobs = cluster.leader(JOBS).await;
    for _ in 0..5 {
        let mut gone = Box::pin(jobs.work(work(1, 30_000), None));
        assert!(futures_util::poll!(&mut gone).is_pending());
    }
    let (one, _) = tokio::join!(take(&jobs, 1), put_jobs(&jobs, 1));
    assert_eq!(offsets(&one), [(0, 1)]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_holds_only_as_many_jobs_as_fit() {
    let cluster = Cluster::start(1).await;
    let jobs = cluster.leader(JOBS).await;
    for at in 0..12u8 {
        let mut builder = BatchBuilder::new();
        builder.push(&Record { payload: vec![at; 1 << 20].into(), ..Default::default() }).unwrap();
        jobs.produce(produce_to(JOBS), builder.build(Compression::None, None)).await.unwrap();
    }
    let (first, batches) = jobs.work(work(100, 0), None).await.unwrap();
    let size: usize = batches.iter().map(|batch: &Batch| batch.header.batch_size()).sum();
    assert!(size <= limits::FETCH_SIZE_MAX && first.leases.len() == 7, "{size} bytes, {} jobs", first.leases.len());
    let (second, _) = jobs.work(work(100, 0), None).await.unwrap();
    assert_eq!(second.leases.iter().map(|lease| lease.offset).collect::<Vec<_>>(), (7..12).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_no_worker_may_ask_is_refused_by_name() {
    let cluster = Cluster::start(1).await;
    let jobs = cluster.leader(JOBS).await;
    let refused = [
        ("group", wire::Work { group: String::new(), ..work(1, 0) }),
        ("worker", wire::Work { worker: "a b".into(), ..work(1, 0) }),
        ("jobs_max", work(0, 0)),
    ];
    for (field, request) in refused {
        assert_eq!(jobs.work(request, None).await.unwrap_err().field, field);
    }
    assert_eq!(jobs.ack(ack(&[])).await.unwrap_err().field, "leases");
    let lease = Lease { offset: 3, attempt: 1, ..Default::default() };
    assert_eq!(jobs.nack(nack(std::slice::from_ref(&lease), u32::MAX)).await.unwrap_err().field, "delay_ms");
    assert_eq!(jobs.ack(ack(&[lease])).await.unwrap().lost.len(), 1);
    // Groups have a limit; jobs must be there, or nothing is granted and no group made.
    put_jobs(&jobs, 1).await;
    for at in 0..limits::QUEUE_GROUP_COUNT_MAX {
        let request = wire::Work { group: format!("g{at}"), ..work(1, 0) };
        assert_eq!(jobs.work(request, None).await.unwrap().0.leases.len(), 1);
    }
    assert_eq!(jobs.work(work(1, 0), None).await.unwrap_err().field, "group");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_grant_ends_with_a_batch_rather_than_in_the_midst_of_one() {
    let cluster = Cluster::start(1).await;
    let jobs = cluster.leader(JOBS).await;
    for _ in 0..4 {
        put_jobs(&jobs, 6).await;
    }
    let work_some = async |job_count_max| {
        let (leased, batches) = jobs.work(work(job_count_max, 20_000), None).await.unwrap();
        (leased.leases.len(), batches.len())
    };
    // Not when less than half of what was asked for would come.
    assert_eq!(work_some(4).await, (4, 1));
    assert_eq!(work_some(5).await, (5, 2));
    assert_eq!(work_some(5).await, (3, 1));
    assert_eq!(work_some(100).await, (12, 2));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn jobs_that_lie_on_the_disk_come_whole_and_in_order_to_workers_of_two_groups() {
    let cluster = Cluster::start(1).await;
    let jobs = cluster.leader(JOBS).await;
    let big = "j".repeat(128 << 10);
    // More than the log keeps in memory.
    let count = 2 * limits::RECENT_SIZE_MAX / big.len();
    for first in (0..count).step_by(4) {
        let payloads = (first..first + 4).map(|at| format!("{at} {big}"));
        jobs.produce(produce_to(JOBS), batch_of(payloads, None)).await.unwrap();
    }
    assert!(!jobs.group().log().is_recent(arqon_proto::Offset(0)));
    let mut seen = [0, 0];
    while seen[0] < count as u64 {
        for (group, next) in ["g", "h"].into_iter().zip(&mut seen) {
            let request = wire::Work { group: group.into(), ..work(30, 20_000) };
            let (leased, batches) = timeout(PATIENCE, jobs.work(request, None)).await.unwrap().unwrap();
            let payloads = payloads(&batches);
            for lease in &leased.leases {
                let (_, payload) = payloads.iter().find(|(offset, _)| *offset == lease.offset).unwrap();
                assert_eq!((lease.offset, payload.starts_with(&format!("{next} j"))), (*next, true));
                *next += 1;
            }
            let ack = wire::Ack { group: group.into(), ..ack(&leased.leases) };
            assert!(jobs.ack(ack).await.unwrap().lost.is_empty());
        }
    }
    assert_eq!(seen, [count as u64; 2]);
}
