//! What a worker promises: bounded, fair, one result a job, nothing forgotten.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod fake;

use std::{collections::HashSet, time::Duration};

use arqon_sdk::{Client, Error, Job, NewEvent, Options, ProducerOptions, Worker, WorkerOptions, wire::ErrorCode};
use fake::{Bus, Fault, Kind, refuse};

/// What takes longer never comes.
const PATIENCE: Duration = Duration::from_secs(60);
/// Much longer than a slow machine takes for one job, where jobs must come again that were granted in an answer that
/// was lost.
const SHORT_LEASE: Duration = Duration::from_secs(5);

async fn bus_with(jobs: usize, partition_count: usize) -> (Bus, Client) {
    let bus = Bus::start(2).await;
    bus.state().create("x.jobs", partition_count);
    bus.state().create("x.results", partition_count);
    let mut options = Options::new(bus.servers(), "token");
    options.backoff_min = Duration::from_millis(1);
    options.backoff_max = Duration::from_millis(20);
    let client = Client::connect(options).await.unwrap();
    let producer = client.producer("x.jobs", ProducerOptions::default()).await.unwrap();
    for number in 0..jobs {
        let key = format!("{number}");
        drop(producer.send(NewEvent::new(number.to_string()).key(key)).await.unwrap());
    }
    producer.close().await.unwrap();
    (bus, client)
}

/// With leases that do not end while a test runs.
async fn worker(client: &Client, parallelism: usize) -> Worker {
    worker_with(client, parallelism, Duration::from_secs(30)).await
}

async fn worker_with(client: &Client, parallelism: usize, lease: Duration) -> Worker {
    let options =
        WorkerOptions { group: "g".into(), parallelism, wait: Duration::from_millis(100), lease, ..Default::default() };
    client.worker("x.jobs", options).await.unwrap()
}

async fn next(worker: &mut Worker) -> Job {
    worker.next().await.unwrap().unwrap()
}

fn results(bus: &Bus, partition_count: u32) -> Vec<bytes::Bytes> {
    (0..partition_count).flat_map(|partition| bus.state().payloads("x.results", partition)).collect()
}

#[tokio::test]
async fn every_job_of_every_partition_gets_its_one_result() {
    let (bus, client) = bus_with(200, 4).await;
    bus.faults(Kind::Work, [None, Some(Fault::Lost), refuse(ErrorCode::NotLeader), refuse(ErrorCode::Overloaded)]);
    bus.faults(Kind::Ack, [Some(Fault::DoneThenLost), None, Some(Fault::Lost)]);
    bus.faults(Kind::Produce, [Some(Fault::DoneThenLost), None, Some(Fault::Lost)]);
    let mut worker = worker_with(&client, 8, SHORT_LEASE).await;
    let mut running = tokio::task::JoinSet::new();
    for _ in 0..200 {
        let job = next(&mut worker).await;
        running
            .spawn(async move { job.complete("x.results", NewEvent::new(job.event.payload.clone())).await.unwrap() });
    }
    for completed in running.join_all().await {
        assert!(!completed.duplicate && completed.offset.is_some());
    }
    assert_eq!(worker.stop(PATIENCE).await, 0);
    assert!(worker.next().await.unwrap().is_none());
    let distinct: HashSet<_> = results(&bus, 4).into_iter().collect();
    assert_eq!((distinct.len(), results(&bus, 4).len()), (200, 200));
    for partition in 0..4 {
        let mut state = bus.state();
        let jobs = state.partition("x.jobs", partition);
        assert!(jobs.queues["g"].leased.is_empty() && jobs.queues["g"].pending.is_empty());
        assert_eq!(jobs.queues["g"].settled.len() as u64, jobs.next);
    }
}

#[tokio::test]
async fn many_jobs_are_acknowledged_together_and_the_lost_one_is_told() {
    let (bus, client) = bus_with(300, 2).await;
    bus.faults(Kind::Ack, [Some(Fault::Lost), refuse(ErrorCode::NotLeader)]);
    let mut worker = worker_with(&client, 64, SHORT_LEASE).await;
    let mut acknowledged = 0;
    let mut lost = None;
    while acknowledged < 300 {
        let jobs = worker.next_many(50).await.unwrap().unwrap();
        assert!((1..=50).contains(&jobs.len()));
        let first = (jobs[0].event.partition, jobs[0].event.offset);
        let is_lost = lost.is_none();
        if is_lost {
            lost = Some(first);
            bus.state().partition("x.jobs", first.0).expire("g", first.1);
        }
        let count = jobs.len();
        let refused = Job::ack_all(jobs).await;
        assert_eq!(refused.len(), usize::from(is_lost));
        for (job, error) in &refused {
            assert_eq!(lost, Some((job.event.partition, job.event.offset)));
            assert!(matches!(error, Error::LeaseLost), "{error}");
        }
        acknowledged += count - refused.len();
    }
    assert_eq!(worker.stop(PATIENCE).await, 0, "every place is free again");
}

#[tokio::test]
async fn no_more_jobs_are_held_than_allowed() {
    let (bus, client) = bus_with(50, 4).await;
    let mut worker = worker(&client, 3).await;
    let held = [next(&mut worker).await, next(&mut worker).await, next(&mut worker).await];
    assert!(tokio::time::timeout(Duration::from_millis(300), worker.next()).await.is_err());
    let leased = |partition| {
        let mut state = bus.state();
        state.partition("x.jobs", partition).queues.get("g").map_or(0, |queue| queue.leased.len())
    };
    assert_eq!((0..4).map(leased).sum::<usize>(), 3);
    held[0].ack().await.unwrap();
    drop(held);
    next(&mut worker).await;
}

#[tokio::test]
async fn every_place_is_used_though_requests_wait_for_company() {
    let (bus, client) = bus_with(2_000, 1).await;
    let mut worker = worker(&client, 97).await;
    let mut held = Vec::new();
    for _ in 0..10 {
        while held.len() < 97 {
            held.extend(worker.next_many(97).await.unwrap().unwrap());
        }
        assert_eq!(held.len(), 97);
        // A few at a time: too few for more than one request.
        assert!(Job::ack_all(held.drain(..5).collect()).await.is_empty());
    }
    let settled = |bus: &Bus| bus.state().partition("x.jobs", 0).queues["g"].settled.len();
    assert_eq!(settled(&bus), 50);
    assert!(Job::ack_all(held).await.is_empty());
    assert_eq!((settled(&bus), worker.stop(PATIENCE).await), (142, 0), "every place is free again");
}

#[tokio::test]
async fn a_job_that_is_dropped_or_given_back_comes_again() {
    let (_bus, client) = bus_with(1, 1).await;
    let mut worker = worker(&client, 2).await;
    drop(next(&mut worker).await);
    let second = next(&mut worker).await;
    assert_eq!(second.attempt, 2);
    second.nack(Duration::ZERO).await.unwrap();
    assert!(matches!(second.ack().await, Err(Error::LeaseLost)), "settled once");
    let third = next(&mut worker).await;
    assert_eq!(third.attempt, 3);
    third.ack().await.unwrap();
}

#[tokio::test]
async fn a_result_too_large_leaves_the_job_in_hand() {
    let (bus, client) = bus_with(1, 1).await;
    let mut worker = worker(&client, 1).await;
    let job = next(&mut worker).await;
    let error = job.complete("x.results", NewEvent::new(vec![0; 2 << 20])).await.unwrap_err();
    assert!(error.to_string().starts_with("payload has"), "{error}");
    job.complete("x.results", NewEvent::new("failed")).await.unwrap();
    assert_eq!(results(&bus, 1), ["failed"]);
}

#[tokio::test]
async fn a_lost_lease_is_noticed_and_only_the_first_result_stands() {
    let (bus, client) = bus_with(1, 1).await;
    // Renewed after a third of it.
    let mut worker = worker_with(&client, 2, Duration::from_secs(3)).await;
    let first = next(&mut worker).await;
    bus.state().partition("x.jobs", 0).expire("g", 0);
    bus.shared.changed.notify_waiters();
    tokio::time::timeout(PATIENCE, first.lost()).await.expect("the renewal tells");
    assert!(first.is_lost());
    let second = next(&mut worker).await;
    assert_eq!(second.attempt, 2);
    assert!(!second.complete("x.results", NewEvent::new("second")).await.unwrap().duplicate);
    let late = first.complete("x.results", NewEvent::new("first")).await.unwrap();
    assert!(late.duplicate);
    assert_eq!(late.offset, Some(0));
    assert_eq!(results(&bus, 1), ["second"]);
}

#[tokio::test]
async fn leases_are_renewed_while_the_job_lives() {
    let (bus, client) = bus_with(2, 1).await;
    let mut worker = worker_with(&client, 2, Duration::from_secs(3)).await;
    let held = [next(&mut worker).await, next(&mut worker).await];
    let renewals = || bus.state().partition("x.jobs", 0).queues["g"].renewals;
    let renewed = async {
        while renewals() < 4 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, renewed).await.expect("two jobs, renewed twice");
    assert!(held.iter().all(|job| !job.is_lost()));
}

#[tokio::test]
async fn stopping_gives_back_what_was_not_handed_out_and_waits_for_the_rest() {
    let (bus, client) = bus_with(10, 1).await;
    let mut worker = worker(&client, 4).await;
    let held = next(&mut worker).await;
    // As long as a slow machine takes to give the others back.
    assert_eq!(worker.stop(Duration::from_secs(3)).await, 1, "one is still held");
    {
        let mut state = bus.state();
        let queue = &state.partition("x.jobs", 0).queues["g"];
        assert_eq!(queue.leased.len(), 1, "the others were given back");
    }
    assert!(worker.next().await.unwrap().is_none());
    held.complete("x.results", NewEvent::new("r")).await.unwrap();
    drop(held);
    assert_eq!(worker.stop(PATIENCE).await, 0);
}

#[tokio::test]
async fn what_cannot_work_is_refused_by_name() {
    let (bus, client) = bus_with(1, 1).await;
    let refused = async |options| client.worker("x.jobs", options).await.unwrap_err().to_string();
    assert!(refused(WorkerOptions { parallelism: 0, ..Default::default() }).await.starts_with("parallelism "));
    assert!(refused(WorkerOptions { lease: Duration::ZERO, ..Default::default() }).await.starts_with("lease "));
    assert!(refused(WorkerOptions { group: "a b".into(), ..Default::default() }).await.starts_with("group "));
    assert!(client.worker("nope", WorkerOptions::default()).await.is_err());
    bus.faults(Kind::Work, [refuse(ErrorCode::AuthorizationDenied)]);
    let mut worker = worker(&client, 1).await;
    for _ in 0..2 {
        assert_eq!(worker.next().await.unwrap_err().code_name(), "AUTHORIZATION_DENIED");
    }
}
