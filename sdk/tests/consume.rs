//! What a consumer promises: every event once, in order, or an error that says what is missing.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod fake;

use std::time::Duration;

use arqon_proto::Offset;
use arqon_sdk::{Client, ConsumerOptions, Error, From, NewEvent, Options, ProducerOptions, wire::ErrorCode};
use fake::{Bus, Fault, Kind, refuse};

async fn bus_with(events: u32, node_count: usize) -> (Bus, Client) {
    let bus = Bus::start(node_count).await;
    bus.state().create("t", 1);
    let mut options = Options::new(bus.servers(), "token");
    options.backoff_min = Duration::from_millis(1);
    options.backoff_max = Duration::from_millis(20);
    let client = Client::connect(options).await.unwrap();
    let producer = client.producer("t", ProducerOptions { batch_size: 200, ..Default::default() }).await.unwrap();
    for number in 0..events {
        drop(producer.send(NewEvent::new(number.to_string())).await.unwrap());
    }
    producer.close().await.unwrap();
    (bus, client)
}

async fn read_all(client: &Client, options: ConsumerOptions) -> Result<Vec<u64>, Error> {
    let options = ConsumerOptions { stop_at_end: true, bytes_max: 1_000, ..options };
    let mut consumer = client.consumer("t", options).await?;
    let mut offsets = Vec::new();
    while let Some(event) = consumer.next().await? {
        assert_eq!(event.payload, event.offset.to_string());
        offsets.push(event.offset);
    }
    Ok(offsets)
}

#[tokio::test]
async fn reading_starts_where_it_is_told_and_ends_at_the_end() {
    let (_bus, client) = bus_with(100, 1).await;
    let start = async |from| read_all(&client, ConsumerOptions { from, ..Default::default() }).await.unwrap();
    assert_eq!(start(From::Earliest).await, (0..100).collect::<Vec<_>>());
    assert_eq!(start(From::Offset(37)).await, (37..100).collect::<Vec<_>>());
    assert_eq!(start(From::Latest).await, Vec::<u64>::new());
    let by_time = start(From::Time(1_050)).await;
    assert!(by_time[0] >= 50 && by_time.last() == Some(&99), "{by_time:?}");
}

#[tokio::test]
async fn lost_connections_and_new_leaders_neither_skip_nor_repeat() {
    let (bus, client) = bus_with(300, 3).await;
    bus.faults(
        Kind::Fetch,
        [
            None,
            Some(Fault::Lost),
            Some(Fault::DoneThenLost),
            None,
            refuse(ErrorCode::NotLeader),
            refuse(ErrorCode::Overloaded),
            Some(Fault::Garbage(b"\xff\xff\xff\xff\xff\xff\xff\xff")),
            Some(Fault::Garbage(b"\x08\x00\x00\x00\x04\x00\x00\x00junk")),
        ],
    );
    assert_eq!(read_all(&client, ConsumerOptions::default()).await.unwrap(), (0..300).collect::<Vec<_>>());
}

#[tokio::test]
async fn the_tail_is_followed() {
    let (_bus, client) = bus_with(1, 1).await;
    let mut consumer = client.consumer("t", ConsumerOptions::default()).await.unwrap();
    assert_eq!(consumer.next().await.unwrap().unwrap().offset, 0);
    let producer = client.producer("t", ProducerOptions::default()).await.unwrap();
    for offset in 1..5 {
        // A wait that is given up loses nothing.
        assert!(tokio::time::timeout(Duration::from_millis(1), consumer.next()).await.is_err());
        producer.publish(NewEvent::new("x")).await.unwrap();
        assert_eq!(consumer.next().await.unwrap().unwrap().offset, offset);
    }
}

#[tokio::test]
async fn each_replica_can_be_read_by_its_node() {
    let (bus, client) = bus_with(20, 3).await;
    for node in 1..=3 {
        let options = ConsumerOptions { any_replica_of: Some(node), ..Default::default() };
        assert_eq!(read_all(&client, options).await.unwrap().len(), 20);
    }
    let options = ConsumerOptions { any_replica_of: Some(9), ..Default::default() };
    let error = read_all(&client, options.clone()).await.unwrap_err().to_string();
    assert_eq!(error, "any_replica_of 9 has no replica of t/0");
    let shield = Options::new([format!("ws://{}", bus.address(0))], "token");
    let error = read_all(&Client::connect(shield).await.unwrap(), options).await.unwrap_err().to_string();
    assert!(error.starts_with("any_replica_of needs TCP"), "{error}");
}

#[tokio::test]
async fn a_gap_in_the_offsets_is_an_error_and_stays_one() {
    let (bus, client) = bus_with(50, 1).await;
    let missing = {
        let mut state = bus.state();
        let batch = state.partition("t", 0).batches.remove(2);
        (batch.header.base_offset, batch.header.next_offset())
    };
    let options = ConsumerOptions { stop_at_end: true, ..Default::default() };
    let mut consumer = client.consumer("t", options).await.unwrap();
    for _ in 0..2 {
        let error = loop {
            match consumer.next().await {
                Ok(event) => assert!(event.is_some(), "the end without an error"),
                Err(error) => break error,
            }
        };
        let Error::Gap { expected, found, .. } = error else { panic!("{error}") };
        assert_eq!((Offset(expected), Offset(found)), missing);
    }
}

#[tokio::test]
async fn deleted_and_damaged_records_are_errors_not_silence() {
    let (bus, client) = bus_with(50, 1).await;
    bus.state().partition("t", 0).log_start = 30;
    let options = ConsumerOptions { from: From::Offset(3), ..Default::default() };
    let error = read_all(&client, options).await.unwrap_err();
    assert_eq!(error.code_name(), "OFFSET_OUT_OF_RANGE");
    let Error::Server { details, .. } = error else { panic!() };
    assert_eq!(details.log_start, 30);

    bus.state().partition("t", 0).log_start = 0;
    bus.state().partition("t", 0).batches[1].header.records_crc ^= 1;
    let error = read_all(&client, ConsumerOptions::default()).await.unwrap_err();
    assert_eq!(error.code_name(), "BAD_DATA", "{error}");
    assert!(error.to_string().contains("t/0") && error.to_string().contains("checksum"), "{error}");
}

#[tokio::test]
async fn an_outage_is_told_and_reading_goes_on_after_it() {
    let (mut bus, client) = bus_with(0, 1).await;
    // It has so little time that the outage is told soon: on a busy machine anything that it does may take longer.
    let mut options = Options::new(bus.servers(), "token");
    options.request_timeout = Duration::from_millis(500);
    options.backoff_max = Duration::from_millis(10);
    let hasty = Client::connect(options).await.expect("the bus is there");
    let options = ConsumerOptions { wait: Duration::from_millis(10), ..Default::default() };
    let mut consumer = loop {
        match hasty.consumer("t", options.clone()).await {
            Ok(consumer) => break consumer,
            Err(error) => assert!(error.is_transient(), "{error}"),
        }
    };
    bus.kill(0).await;
    let error = consumer.next().await.unwrap_err();
    assert!(error.is_transient() && error.to_string().starts_with("fetch from t/0 timed out: "), "{error}");
    bus.restart(0).await;
    let producer = client.producer("t", ProducerOptions::default()).await.unwrap();
    producer.publish(NewEvent::new("back")).await.unwrap();
    let event = loop {
        match consumer.next().await {
            Ok(event) => break event.unwrap(),
            Err(error) => assert!(error.is_transient(), "{error}"),
        }
    };
    assert_eq!(event.payload, "back");
}
