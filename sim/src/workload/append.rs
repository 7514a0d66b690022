//! Producers with de-duplication, and readers that follow them.

use std::time::Duration;

use arqon_sdk::{ConsumerOptions, Error, From, NewEvent, ProducerOptions};
use tokio::time::sleep;

use super::{Pace, Stop, pause};
use crate::{
    cluster::Access,
    history::{Fact, History, Place, decode, encode},
    invariants::Records,
    random::Random,
};

/// Numbers of readers that follow one another.
const READER_STEP: u64 = 10_000;
/// Pause before a client that failed begins anew.
const RETRY_DELAY: Duration = Duration::from_millis(200);

/// Sends values to one partition until it is told to stop; counts itself off then.
pub async fn produce(
    access: Access,
    history: History,
    stop: Stop,
    (client, place): (u64, Place),
    pace: Pace,
    mut random: Random,
) {
    let mut next = 1;
    let gap_ms = pace.gap_ms(&mut random);
    // Some send so much that a node that ends cleanly saves its state.
    let size_max = *random.pick(&[600, 600, 600, 6_000]);
    while !stop.is_set() {
        let options = ProducerOptions { partition: Some(place.partition), ..ProducerOptions::default() };
        let connection = access.client();
        let Ok(producer) = connection.producer(&place.topic, options).await else {
            sleep(RETRY_DELAY).await;
            continue;
        };
        while !stop.is_set() {
            let value = client << 32 | next;
            next += 1;
            let size = random.of(16..size_max) as usize;
            history.note(client, &place, value, Fact::Sent);
            match producer.send(NewEvent::new(encode(value, size))).await {
                Ok(delivery) => {
                    let (history, place) = (history.clone(), place.clone());
                    tokio::spawn(async move {
                        let fact = match delivery.await {
                            Ok(receipt) => Fact::Acked(receipt.offset),
                            Err(error) => Fact::Unknown(error.to_string()),
                        };
                        history.note(client, &place, value, fact);
                    });
                }
                Err(refused) => {
                    history.note(client, &place, value, Fact::Unknown(refused.error.to_string()));
                    break;
                }
            }
            pause(&mut random, 1..2 * gap_ms).await;
        }
        // Another producer goes on: its values are new ones.
        drop(producer.flush().await);
        sleep(RETRY_DELAY).await;
    }
}

/// Reads one partition from its start on, until it is told to stop.
pub async fn follow(access: Access, history: History, stop: Stop, mut client: u64, place: Place) {
    let mut from = From::Earliest;
    while !stop.is_set() {
        let options = ConsumerOptions {
            from,
            partitions: Some(vec![place.partition]),
            wait: Duration::from_secs(1),
            ..ConsumerOptions::default()
        };
        let connection = access.client();
        if let Ok(mut consumer) = connection.consumer(&place.topic, options).await {
            loop {
                match consumer.next().await {
                    Ok(Some(event)) => {
                        note_read(&history, client, &place, event.offset, &event.payload);
                        from = From::Offset(event.offset + 1);
                    }
                    Ok(None) => break,
                    Err(error) if error.code() == Some(arqon_sdk::wire::ErrorCode::OffsetOutOfRange) => {
                        // Trimmed before it was read: another reader begins where the log does now.
                        client += READER_STEP;
                        from = From::Earliest;
                        break;
                    }
                    Err(error) => {
                        if matches!(error, Error::Gap { .. } | Error::BadData { .. }) {
                            history.note(client, &place, 0, Fact::ReaderFailed(error.to_string()));
                        }
                        break;
                    }
                }
                if stop.is_set() {
                    return;
                }
            }
        }
        sleep(RETRY_DELAY).await;
    }
}

pub(crate) fn note_read(history: &History, client: u64, place: &Place, offset: u64, payload: &[u8]) {
    match decode(payload) {
        Some(value) => history.note(client, place, value, Fact::Read(offset)),
        None => history.note(client, place, 0, Fact::ReadGarbage(offset)),
    }
}

/// Reads a partition from its start to what is its end now, from the leader or from one replica.
///
/// # Errors
/// It cannot be read to the end.
pub async fn read_all(access: &Access, place: &Place, replica_on: Option<u64>) -> Result<Records, Error> {
    let options = ConsumerOptions {
        partitions: Some(vec![place.partition]),
        any_replica_of: replica_on,
        stop_at_end: true,
        ..ConsumerOptions::default()
    };
    let connection = access.client();
    let mut consumer = connection.consumer(&place.topic, options).await?;
    let mut out = Vec::new();
    while let Some(event) = consumer.next().await? {
        out.push((event.offset, decode(&event.payload)));
    }
    Ok(out)
}
