//! What a producer promises: every acknowledged event stands once, in order, whatever fails.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod fake;

use std::{collections::HashMap, time::Duration};

use arqon_sdk::{
    Client, Compression, ConsumerOptions, Error, From, NewEvent, Options, ProducerOptions, wire::ErrorCode,
};
use fake::{Bus, Fault, Kind, error, refuse};

fn options(servers: Vec<String>) -> Options {
    let mut options = Options::new(servers, "token");
    options.backoff_min = Duration::from_millis(1);
    options.backoff_max = Duration::from_millis(20);
    options
}

async fn bus(topic: &str, partition_count: usize, node_count: usize) -> (Bus, Client) {
    let bus = Bus::start(node_count).await;
    bus.state().create(topic, partition_count);
    let client = Client::connect(options(bus.servers())).await.unwrap();
    (bus, client)
}

/// Publishes numbered events to one partition and expects each one's receipt to say where it is.
async fn publish_numbered(bus: &Bus, client: &Client, count: usize, batch_size: usize) {
    let options = ProducerOptions { batch_size, ..Default::default() };
    let producer = client.producer("t", options).await.unwrap();
    let mut deliveries = Vec::new();
    for number in 0..count {
        deliveries.push(producer.send(NewEvent::new(number.to_string())).await.unwrap());
    }
    for (number, delivery) in deliveries.into_iter().enumerate() {
        assert_eq!(delivery.await.unwrap().offset, number as u64);
    }
    let expected: Vec<String> = (0..count).map(|number| number.to_string()).collect();
    assert_eq!(bus.state().payloads("t", 0), expected);
}

#[tokio::test]
async fn events_come_back_as_they_were_on_both_carriers() {
    let bus = Bus::start(3).await;
    bus.state().create("t", 4);
    let shield = vec![format!("ws://{}", bus.address(0))];
    for (round, servers) in [bus.servers(), shield].into_iter().enumerate() {
        let client = Client::connect(options(servers)).await.unwrap();
        let producer_options = ProducerOptions { compression: Compression::Lz4, ..Default::default() };
        let producer = client.producer("t", producer_options).await.unwrap();
        for number in 0..500u32 {
            let event = NewEvent::new(format!("{round} {number}")).key(format!("key-{}", number % 7)).header("n", "1");
            drop(producer.send(event).await.unwrap());
        }
        producer.close().await.unwrap();
        assert!(matches!(producer.publish(NewEvent::new("late")).await, Err(Error::Closed)));

        let stop = ConsumerOptions { stop_at_end: true, bytes_max: 2_000, ..Default::default() };
        let mut consumer = client.consumer("t", stop).await.unwrap();
        let mut by_key: HashMap<Vec<u8>, Vec<u32>> = HashMap::new();
        while let Some(event) = consumer.next().await.unwrap() {
            assert_eq!((&*event.tenant_id, event.headers["n"].as_str()), ("acme", "1"));
            assert_eq!(event.partition, arqon_sdk::partition_of(&event.key, 4));
            let text = String::from_utf8(event.payload.to_vec()).unwrap();
            let (in_round, number) = text.split_once(' ').unwrap();
            if in_round == round.to_string() {
                by_key.entry(event.key.to_vec()).or_default().push(number.parse().unwrap());
            }
        }
        assert_eq!(by_key.values().map(Vec::len).sum::<usize>(), 500);
        assert!(by_key.values().all(|numbers| numbers.is_sorted()), "the order of a key is kept");
    }
}

#[tokio::test]
async fn receipts_come_in_any_order_to_any_task_even_when_the_producer_is_gone() {
    let (bus, client) = bus("t", 1, 1).await;
    bus.faults(Kind::Produce, [None, Some(Fault::Lost)]);
    let options = ProducerOptions { buffer_size: 2 << 20, batch_size: 3_000, ..Default::default() };
    let producer = client.producer("t", options).await.unwrap();
    let mut deliveries = Vec::new();
    for number in 0..2_000u64 {
        deliveries.push((number, producer.send(NewEvent::new(number.to_string())).await.unwrap()));
    }
    drop(producer);
    let odd: Vec<_> = deliveries.extract_if(.., |(number, _)| *number % 2 == 1).collect();
    let odd = tokio::spawn(async move {
        for (number, delivery) in odd {
            assert_eq!(delivery.await.unwrap().offset, number);
        }
    });
    for (number, delivery) in deliveries.into_iter().rev() {
        assert_eq!(delivery.await.unwrap().offset, number);
    }
    odd.await.unwrap();

    let stop = ConsumerOptions { stop_at_end: true, ..Default::default() };
    let mut consumer = client.consumer("t", stop).await.unwrap();
    let mut ids = std::collections::HashSet::new();
    while let Some(event) = consumer.next().await.unwrap() {
        assert_eq!((event.id[6] >> 4, event.id[8] >> 6), (7, 0b10), "a UUIDv7 was made");
        ids.insert(event.id);
    }
    assert_eq!(ids.len(), 2_000);
}

#[tokio::test]
async fn a_full_buffer_lets_senders_wait_and_no_event_is_lost() {
    let (bus, client) = bus("t", 2, 1).await;
    let options = ProducerOptions { buffer_size: 1_179_648, ..Default::default() };
    let producer = client.producer("t", options).await.unwrap();
    let mut senders = tokio::task::JoinSet::new();
    for _ in 0..8 {
        let producer = producer.clone();
        senders.spawn(async move {
            for _ in 0..20 {
                drop(producer.send(NewEvent::new(vec![b'x'; 200_000])).await.unwrap());
            }
        });
    }
    senders.join_all().await;
    producer.flush().await.unwrap();
    let written: usize = (0..2).map(|partition| bus.state().payloads("t", partition).len()).sum();
    assert_eq!(written, 160);
}

#[tokio::test]
async fn a_batch_whose_answer_is_lost_stands_once_and_its_receipt_is_right() {
    let (bus, client) = bus("t", 1, 1).await;
    bus.faults(Kind::Produce, [None, Some(Fault::DoneThenLost), Some(Fault::Lost), None, Some(Fault::DoneThenLost)]);
    publish_numbered(&bus, &client, 200, 300).await;
}

#[tokio::test]
async fn pipelined_batches_keep_their_order_through_any_mix_of_failures() {
    let (bus, client) = bus("t", 1, 1).await;
    let mut choice = 12_345u32;
    let faults = (0..120).map(|_| {
        choice = choice.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        match (choice >> 16) % 8 {
            0 => Some(Fault::DoneThenLost),
            1 => Some(Fault::Lost),
            2 => refuse(ErrorCode::Overloaded),
            3 => refuse(ErrorCode::NotLeader),
            4 => refuse(ErrorCode::UnknownOutcome),
            _ => None,
        }
    });
    bus.faults(Kind::Produce, faults);
    publish_numbered(&bus, &client, 2_000, 500).await;
}

#[tokio::test]
async fn a_new_leader_is_found_by_its_name_or_by_asking() {
    for names_leader in [true, false] {
        let (bus, client) = bus("t", 1, 3).await;
        bus.state().names_leader = names_leader;
        let producer = client.producer("t", ProducerOptions::default()).await.unwrap();
        for leader in [0, 2, 1, 2] {
            bus.lead("t", 0, leader);
            producer.publish(NewEvent::new("x")).await.unwrap();
        }
        assert_eq!(bus.state().payloads("t", 0).len(), 4);
    }
}

#[tokio::test]
async fn a_dead_leader_is_waited_for_until_another_leads() {
    let (mut bus, client) = bus("t", 1, 3).await;
    let producer = client.producer("t", ProducerOptions::default()).await.unwrap();
    producer.publish(NewEvent::new("0")).await.unwrap();
    bus.kill(0).await;
    let waiting = tokio::spawn(async move { producer.publish(NewEvent::new("1")).await });
    // The client has to find out from the others that the dead node still counts as leader.
    let asked = bus.state().seen["describe"];
    while bus.state().seen["describe"] < asked + 2 {
        tokio::task::yield_now().await;
    }
    assert!(!waiting.is_finished());
    bus.lead("t", 0, 1);
    assert_eq!(waiting.await.unwrap().unwrap().offset, 1);
}

#[tokio::test]
async fn a_refused_event_fails_alone_and_those_after_it_are_written_in_order() {
    let (bus, client) = bus("t", 1, 1).await;
    let options = ProducerOptions { batch_size: 1, ..Default::default() };
    let producer = client.producer("t", options).await.unwrap();
    let mut deliveries = Vec::new();
    for number in 0..30 {
        let payload = if number % 10 == 4 { "poison".to_owned() } else { number.to_string() };
        deliveries.push(producer.send(NewEvent::new(payload)).await.unwrap());
    }
    let mut written = Vec::new();
    for (number, delivery) in deliveries.into_iter().enumerate() {
        match delivery.await {
            Ok(receipt) => written.push((number.to_string(), receipt.offset)),
            Err(error) => assert_eq!((error.code_name(), number % 10), ("POLICY_BLOCKED", 4), "{error}"),
        }
    }
    assert_eq!(written.len(), 27);
    let stand = bus.state().payloads("t", 0);
    let expected: Vec<_> = written.iter().map(|(payload, _)| payload.clone()).collect();
    assert_eq!(stand, expected);
    assert!(written.iter().enumerate().all(|(index, (_, offset))| *offset == index as u64));
}

#[tokio::test]
async fn a_producer_that_the_bus_forgot_goes_on() {
    let (bus, client) = bus("t", 1, 1).await;
    let producer = client.producer("t", ProducerOptions::default()).await.unwrap();
    producer.publish(NewEvent::new("0")).await.unwrap();
    bus.faults(Kind::Produce, [refuse(ErrorCode::UnknownProducer)]);
    assert_eq!(producer.publish(NewEvent::new("1")).await.unwrap().offset, 1);
    assert_eq!(bus.state().payloads("t", 0), ["0", "1"]);
}

#[tokio::test]
async fn the_older_of_two_producers_with_one_id_is_fenced() {
    let (bus, client) = bus("t", 1, 1).await;
    let with_epoch =
        |producer_epoch| ProducerOptions { producer_id: Some([7; 16]), producer_epoch, ..Default::default() };
    let old = client.producer("t", with_epoch(0)).await.unwrap();
    old.publish(NewEvent::new("old")).await.unwrap();
    let new = client.producer("t", with_epoch(1)).await.unwrap();
    new.publish(NewEvent::new("new")).await.unwrap();
    for _ in 0..2 {
        let error = old.publish(NewEvent::new("too late")).await.unwrap_err();
        assert_eq!(error.code_name(), "PRODUCER_FENCED");
    }
    assert_eq!(bus.state().payloads("t", 0), ["old", "new"]);
}

#[tokio::test]
async fn a_silent_server_ends_in_an_unknown_outcome_within_the_time_given() {
    let bus = Bus::start(1).await;
    bus.state().create("t", 1);
    let mut options = options(bus.servers());
    options.request_timeout = Duration::from_secs(2);
    options.attempt_timeout = Duration::from_millis(100);
    let client = Client::connect(options).await.unwrap();
    let producer = client.producer("t", ProducerOptions::default()).await.unwrap();
    bus.faults(Kind::Produce, std::iter::repeat_n(Some(Fault::Mute), 1_000));
    let error = producer.publish(NewEvent::new("x")).await.unwrap_err();
    assert_eq!(error.code_name(), "UNKNOWN_OUTCOME", "{error}");
    assert!(error.to_string().contains("produce to t/0"), "{error}");
}

#[tokio::test]
async fn a_bad_event_comes_back_with_its_error() {
    let (_bus, client) = bus("t", 1, 1).await;
    let producer = client.producer("t", ProducerOptions::default()).await.unwrap();
    let event = NewEvent::new("kept").schema("no version");
    let refused = producer.send(event).await.unwrap_err();
    assert!(refused.error.to_string().starts_with("schema"), "{refused}");
    assert_eq!(&refused.event.payload[..], b"kept");
}

#[tokio::test]
async fn failures_to_connect_are_one_line_that_names_the_thing() {
    // Below the ports that others are given: nobody listens there.
    let unused = "127.0.0.1:9".to_owned();
    let error = Client::connect(options(vec![unused.clone()])).await.unwrap_err().to_string();
    assert!(error.starts_with(&format!("cannot reach {unused}: ")) && !error.contains('\n'), "{error}");

    let bus = Bus::start(1).await;
    for servers in [bus.servers(), vec![format!("ws://{}", bus.address(0))]] {
        let mut options = options(servers);
        options.token = "wrong".to_owned();
        let error = Client::connect(options).await.unwrap_err();
        assert_eq!(error.to_string(), "AUTHENTICATION_FAILED: token is wrong");
    }
    let client = Client::connect(options(bus.servers())).await.unwrap();
    let error = client.describe_topic("nope").await.unwrap_err();
    assert_eq!(error.to_string(), "TARGET_NOT_FOUND: topic nope does not exist");
    let error = client.list_offsets("bad name", 0, From::Latest).await.unwrap_err();
    assert_eq!(error.code_name(), "TARGET_NOT_FOUND");
}

/// The story: nodes that have just started do not know the topics yet.
#[tokio::test]
async fn a_node_that_cannot_describe_a_topic_yet_is_passed_over_or_waited_for() {
    let starting = |retry_after_ms| {
        let refusal = error(ErrorCode::Overloaded, "node 1 is starting", "");
        Some(Fault::Refuse(arqon_sdk::wire::Error { retry_after_ms, ..refusal }))
    };
    let (bus, client) = bus("t", 1, 3).await;
    // Another node knows: there is no need to wait as long as the first one asks.
    bus.faults(Kind::Describe, [starting(3_600_000)]);
    assert_eq!(client.describe_topic("t").await.unwrap().partitions.len(), 1);
    // No node knows: it is asked again.
    let client = Client::connect(options(bus.servers())).await.unwrap();
    bus.faults(Kind::Describe, [starting(1), starting(1), starting(1), None]);
    assert_eq!(client.describe_topic("t").await.unwrap().partitions.len(), 1);
    // One that is not starting says that there is no such topic, and it is right.
    bus.faults(Kind::Describe, [None, starting(1), starting(1)]);
    assert_eq!(client.describe_topic("nope").await.unwrap_err().code(), Some(ErrorCode::TargetNotFound));
}

/// The story: the disk of a node failed it, or its network. Clients could still reach it and went by what it said of
/// the leaders, for as long as it was there: that there were none, or one that was gone.
#[tokio::test]
async fn a_node_that_is_cut_off_does_not_keep_its_clients_from_the_leader() {
    let (mut bus, _) = bus("t", 1, 3).await;
    bus.lead("t", 0, 1);
    bus.kill(2).await;
    for (round, believed) in [None, Some(2)].into_iter().enumerate() {
        bus.state().cut_off.insert(0, believed);
        // Which server a client asks first is left to chance.
        for client in 0..8 {
            let connected = Client::connect(options(bus.servers())).await.expect("two nodes are there");
            let producer = connected.producer("t", ProducerOptions::default()).await.unwrap();
            let published = producer.publish(NewEvent::new("x")).await.unwrap();
            assert_eq!(published.offset, round as u64 * 8 + client);
        }
    }
}

#[tokio::test]
async fn without_an_id_a_produce_of_unknown_outcome_is_not_sent_again() {
    let (bus, client) = bus("t", 1, 1).await;
    let mut builder = arqon_proto::BatchBuilder::new();
    builder.push(&arqon_proto::Record { payload: "x".into(), ..Default::default() }).unwrap();
    let mut bytes = bytes::BytesMut::new();
    builder.build(Compression::None, None).encode_into(&mut bytes);
    let produce = arqon_sdk::wire::Produce { topic: "t".into(), ..Default::default() };
    bus.faults(Kind::Produce, [Some(Fault::DoneThenLost)]);
    let body = arqon_sdk::frame::Body::Produce(produce);
    let error = client.request(body.clone(), vec![bytes.clone().freeze()]).await.unwrap_err();
    assert_eq!(error.code_name(), "UNKNOWN_OUTCOME");
    assert_eq!(bus.state().payloads("t", 0).len(), 1);
    bus.faults(Kind::Produce, [refuse(ErrorCode::Overloaded)]);
    client.request(body, vec![bytes.freeze()]).await.unwrap();
    assert_eq!(bus.state().payloads("t", 0).len(), 2, "what was certainly not done is done");
}
