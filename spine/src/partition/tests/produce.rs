//! Writing and reading.

use std::sync::atomic::Ordering;

use arqon_proto::{
    Batch, BatchBuilder, Compression, Record,
    wire::{self, Durability, ErrorCode, LeaseClaims, list_offsets::At},
};
use bytes::Bytes;
use tokio::time::timeout;

use super::cluster::*;

fn text(range: std::ops::Range<u64>) -> impl Iterator<Item = String> {
    range.map(|at| format!("event {at}"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pipelined_batches_are_written_in_order_and_a_resend_changes_nothing() {
    let cluster = Cluster::start(1).await;
    let events = cluster.leader(EVENTS).await;
    let batch = |at: u64| batch_of(text(at * 10..at * 10 + 10), Some((1, at * 10)));
    let mut submitted = Vec::new();
    for at in 0..50 {
        // The first and the sixth batch are sent twice while they are in flight.
        submitted.push((at, events.submit(produce_to(EVENTS), batch(at)).unwrap()));
        if at % 5 == 0 {
            submitted.push((1_000 + at, events.submit(produce_to(EVENTS), batch(at)).unwrap()));
        }
    }
    for (at, submitted) in submitted {
        match submitted.outcome().await {
            Ok(produced) => assert_eq!((at < 1_000, produced.base_offset), (true, at * 10)),
            Err(cause) => {
                assert_eq!((at >= 1_000, cause.code()), (true, ErrorCode::Duplicate), "{cause:?}");
                assert_eq!(cause.duplicates.len(), 10);
                assert_eq!(cause.duplicates[0].sequence, (at - 1_000) * 10);
            }
        }
    }
    cluster.shared.now_ms.store(7, Ordering::Relaxed);
    let after = events.produce(produce_to(EVENTS), batch(50)).await.unwrap();
    assert_eq!(after.time_ms, 1_000_000, "the clock went back, the time of batches must not");
    let late = events.produce(produce_to(EVENTS), batch(49)).await.unwrap_err();
    assert_eq!((late.code(), late.duplicates[3].offset), (ErrorCode::Duplicate, Some(493)));
    assert_eq!(code(events.produce(produce_to(EVENTS), batch(52)).await), ErrorCode::OutOfOrder);
    let stranger = batch_of(text(0..1), Some((2, 5)));
    assert_eq!(code(events.produce(produce_to(EVENTS), stranger).await), ErrorCode::UnknownProducer);

    let batches = drain(&events).await;
    assert_eq!(payloads(&batches), (0..510).zip(text(0..510)).collect::<Vec<_>>());
    assert_eq!(cluster.metrics.record_count.load(Ordering::Relaxed), 510);
    assert_eq!(cluster.metrics.duplicate_count.load(Ordering::Relaxed), 11);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_waits_at_the_tail_and_is_told_when_it_is_out_of_range() {
    let cluster = Cluster::start(3).await;
    let events = cluster.leader(EVENTS).await;
    let wait = wire::Fetch { wait_ms: 20_000, ..Default::default() };
    let (fetched, produced) = tokio::join!(events.fetch(wait), async {
        events.produce(produce_to(EVENTS), batch_of(text(0..3), None)).await
    });
    assert_eq!(produced.unwrap().base_offset, 0);
    let (fetched, batches) = fetched.unwrap();
    assert_eq!((fetched.committed, payloads(&batches).len()), (3, 3));

    let (fetched, batches) = events.fetch(wire::Fetch { offset: 3, ..Default::default() }).await.unwrap();
    assert!(fetched.committed == 3 && batches.is_empty());
    let beyond = events.fetch(wire::Fetch { offset: 4, ..Default::default() }).await;
    assert_eq!(code(beyond), ErrorCode::OffsetOutOfRange);
    // Records in the middle of a batch come with the whole batch.
    let (_, batches) = events.fetch(wire::Fetch { offset: 2, bytes_max: 1, ..Default::default() }).await.unwrap();
    assert_eq!(batches[0].header.base_offset.0, 0);

    for replica in cluster.replicas(EVENTS) {
        let asked = wire::Fetch { any_replica: true, wait_ms: 20_000, ..Default::default() };
        let (_, batches) = timeout(PATIENCE, replica.fetch(asked)).await.unwrap().unwrap();
        assert_eq!(payloads(&batches).len(), 3);
        if replica.group().replica() != events.group().replica() {
            let refused = replica.fetch(wire::Fetch::default()).await.unwrap_err();
            assert_eq!(refused.code(), ErrorCode::NotLeader);
            assert_eq!(refused.leader_address, "node-1:7700");
            let refused = replica.produce(produce_to(EVENTS), batch_of(text(0..1), None)).await;
            assert_eq!(code(refused), ErrorCode::NotLeader);
        }
    }

    cluster.shared.now_ms.store(2_000_000, Ordering::Relaxed);
    events.produce(produce_to(EVENTS), batch_of(text(3..4), None)).await.unwrap();
    for (at, wanted) in [
        (At::Earliest(true), 0),
        (At::Latest(true), 4),
        (At::TimeMs(0), 0),
        (At::TimeMs(1_000_001), 3),
        (At::TimeMs(2_000_001), 4),
    ] {
        let request = wire::ListOffsets { at: Some(at), ..Default::default() };
        assert_eq!(events.list_offsets(request).await.unwrap().offset, wanted, "{at:?}");
    }
    assert_eq!(code(events.list_offsets(wire::ListOffsets::default()).await), ErrorCode::ValidationError);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_that_breaks_a_rule_is_refused_and_nothing_is_written() {
    let cluster = Cluster::start(1).await;
    let events = cluster.leader(EVENTS).await;
    let results = cluster.leader(RESULTS).await;
    let good = || batch_of(text(0..2), None);
    let refuse = async |partition: &crate::partition::Partition, request: wire::Produce, batch: Batch, field: &str| {
        let cause = partition.produce(request, batch).await.unwrap_err();
        assert_eq!((cause.code(), cause.field.as_str()), (ErrorCode::ValidationError, field), "{}", cause.message);
        assert!(!cause.message.is_empty() && !cause.message.contains('\n'));
    };
    let mut miscounted = good();
    miscounted.header.record_count = 3;
    refuse(&events, produce_to(EVENTS), miscounted, "batch").await;
    let mut stamped = good();
    stamped.set_stamps(Bytes::from_static(b"x"));
    refuse(&events, produce_to(EVENTS), stamped, "stamps").await;
    refuse(&events, wire::Produce { durability: 9, ..produce_to(EVENTS) }, good(), "durability").await;

    let claims = |offset| LeaseClaims {
        tenant: TENANT.into(),
        topic: JOBS.into(),
        offset,
        group: "g".into(),
        attempt: 1,
        results_topic: RESULTS.into(),
        ..Default::default()
    };
    let key = keys()[0].clone();
    let sign = |claims: LeaseClaims| key.sign(&claims);
    refuse(&events, with_tokens(EVENTS, [sign(claims(0)), sign(claims(1))]), good(), "lease_tokens").await;
    refuse(&results, produce_to(RESULTS), good(), "lease_tokens").await;
    refuse(&results, with_tokens(RESULTS, [sign(claims(0))]), good(), "lease_tokens").await;
    refuse(&results, with_tokens(RESULTS, [sign(claims(4)), sign(claims(4))]), good(), "lease_tokens").await;
    let mut forged = sign(claims(1)).to_vec();
    forged[30] ^= 1;
    for other in [
        forged.into(),
        sign(LeaseClaims { tenant: "other".into(), ..claims(1) }),
        sign(LeaseClaims { partition: 1, ..claims(1) }),
        sign(LeaseClaims { results_topic: "b.results".into(), ..claims(1) }),
    ] {
        refuse(&results, with_tokens(RESULTS, [sign(claims(0)), other]), good(), "lease_tokens").await;
    }
    let numbered = batch_of(text(0..2), Some((1, 0)));
    let both = with_tokens(RESULTS, [sign(claims(0)), sign(claims(1))]);
    refuse(&results, both.clone(), numbered, "producer_id").await;
    for partition in [&events, &results] {
        assert_eq!(partition.status().log_end, 0);
    }
    assert_eq!(results.produce(both, good()).await.unwrap().base_offset, 0);
    assert_eq!(
        code(results.work(wire::Work { group: "g".into(), ..Default::default() }, None).await),
        ErrorCode::ValidationError
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leader_received_is_answered_with_the_offset_that_it_gets() {
    let cluster = Cluster::start(3).await;
    let events = cluster.leader(EVENTS).await;
    let request = wire::Produce { durability: Durability::LeaderReceived.into(), ..produce_to(EVENTS) };
    for at in 0..20 {
        let produced = events.produce(request.clone(), batch_of(text(at * 3..at * 3 + 3), None)).await.unwrap();
        assert_eq!((produced.base_offset, produced.durability()), (at * 3, Durability::LeaderReceived));
    }
    let last = events.produce(produce_to(EVENTS), batch_of(text(60..61), None)).await.unwrap();
    assert_eq!((last.base_offset, last.durability()), (60, Durability::MajorityFsync));
    assert_eq!(payloads(&drain(&events).await).len(), 61);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn too_much_at_once_is_pushed_back_and_what_was_accepted_is_written() {
    let cluster = Cluster::start(1).await;
    let events = cluster.leader(EVENTS).await;
    let mut builder = BatchBuilder::new();
    for at in 0..3u8 {
        builder.push(&Record { payload: vec![at; 1 << 20].into(), ..Default::default() }).unwrap();
    }
    let batch = builder.build(Compression::None, None);
    let submitted: Vec<_> = (0..60).map(|_| events.submit(produce_to(EVENTS), batch.clone())).collect();
    let mut written_count = 0;
    for submitted in submitted {
        let outcome = match submitted {
            Ok(submitted) => submitted.outcome().await,
            Err(cause) => Err(cause),
        };
        match outcome {
            Ok(_) => written_count += 1,
            Err(cause) => {
                assert_eq!(cause.code(), ErrorCode::Overloaded, "{}", cause.message);
                assert!(cause.retry_after_ms > 0);
            }
        }
    }
    assert!((1..60).contains(&written_count), "{written_count}");
    assert_eq!(events.status().committed, written_count * 3);
    assert!(timeout(PATIENCE, events.produce(produce_to(EVENTS), batch)).await.unwrap().is_ok());
}
