//! Linearizable reads of where a partition ends.

use std::time::Duration;

use arqon_sdk::{Client, wire};
use tokio::time::{sleep, timeout};

use super::{Stop, pause};
use crate::{
    cluster::Access,
    history::{Fact, History, Place},
    random::Random,
    system::now_ns,
};

/// A read that takes longer is given up.
const READ_PATIENCE: Duration = Duration::from_secs(5);
const RETRY_PAUSE: Duration = Duration::from_millis(100);

/// Asks again and again where a partition ends, until it is told to stop.
pub async fn watch(access: Access, history: History, stop: Stop, client: u64, place: Place, mut random: Random) {
    let connection = access.client();
    let mut end = 0;
    while !stop.is_set() {
        read(&connection, &history, client, &place, &mut end).await;
        pause(&mut random, 50..400).await;
    }
}

/// Asks until it is told where a partition ends.
pub async fn until_told(access: &Access, history: &History, client: u64, place: &Place) {
    let connection = access.client();
    while !read(&connection, history, client, place, &mut 0).await {
        sleep(RETRY_PAUSE).await;
    }
}

/// One read, from the highest end that was told on. Whether it was answered.
async fn read(connection: &Client, history: &History, client: u64, place: &Place, end: &mut u64) -> bool {
    let fetch = wire::Fetch {
        topic: place.topic.clone(),
        partition: place.partition,
        offset: *end,
        bytes_max: 1,
        linearizable: true,
        ..Default::default()
    };
    let begun_ns = now_ns();
    let answer = timeout(READ_PATIENCE, connection.fetch_raw(fetch)).await;
    let Ok(Ok(fetched)) = answer else { return false };
    history.note(client, place, 0, Fact::Tail(begun_ns, fetched.committed));
    *end = (*end).max(fetched.committed);
    true
}
