//! Topics that come, change and go, logs that are trimmed, and partitions that move, while everything else
//! goes on.

use std::sync::{Arc, Mutex, PoisonError};

use arqon_proto::wire;
use arqon_sdk::From;

use super::{Stop, ask, authorized, pause};
use crate::{cluster::Access, history::Place, random::Random};

/// Topics at once.
const TOPIC_COUNT: u64 = 4;

/// Changes metadata until it is told to stop. What becomes of each request is not known for certain:
/// the invariants look at what all nodes agree on in the end.
pub async fn churn(access: Access, stop: Stop, places: Vec<Place>, node_count: u64, mut random: Random) {
    while !stop.is_set() {
        let topic = format!("side.{}", random.of(0..TOPIC_COUNT));
        let index = random.of(0..8) as usize;
        let done = match random.of(0..6) {
            0 | 1 => {
                let config = wire::TopicConfig {
                    name: topic.clone(),
                    partitions: random.of(1..3) as u32,
                    retention_ms: 3_600_000,
                    ..Default::default()
                };
                let request = wire::CreateTopicRequest { config: Some(config) };
                ask(&access, index, async |mut control| control.create_topic(authorized(&access, request)).await)
                    .await
                    .map(drop)
            }
            2 => {
                let request = wire::AlterTopicRequest {
                    topic: topic.clone(),
                    retention_ms: Some(random.of(60_000..7_200_000)),
                    partitions: random.percent(30).then_some(3),
                    ..Default::default()
                };
                ask(&access, index, async |mut control| control.alter_topic(authorized(&access, request)).await)
                    .await
                    .map(drop)
            }
            3 => {
                let to = random.of(1..node_count + 1);
                let place = random.pick(&places).clone();
                let request = wire::TransferLeaderRequest {
                    topic: place.topic,
                    partition: place.partition,
                    to,
                    ..Default::default()
                };
                ask(&access, index, async |mut control| control.transfer_leader(authorized(&access, request)).await)
                    .await
                    .map(drop)
            }
            4 => {
                let place = random.pick(&places).clone();
                // Most of these are refused, since they name nodes with the wrong replicas.
                let request = wire::MovePartitionRequest {
                    topic: place.topic,
                    partition: place.partition,
                    from: random.of(1..node_count + 1),
                    to: random.of(1..node_count + 1),
                    ..Default::default()
                };
                ask(&access, index, async |mut control| control.move_partition(authorized(&access, request)).await)
                    .await
                    .map(drop)
            }
            _ => {
                let request = wire::DeleteTopicRequest { topic: topic.clone() };
                ask(&access, index, async |mut control| control.delete_topic(authorized(&access, request)).await)
                    .await
                    .map(drop)
            }
        };
        if let Err(status) = done {
            tracing::debug!("{topic} is not changed: {}", status.message());
        }
        pause(&mut random, 300..2_000).await;
    }
}

/// The topic whose log is trimmed.
pub const TRIMMED: &str = "sim.trimmed";

/// What is known of the front of the log that is trimmed.
#[derive(Clone, Debug, Default)]
pub struct Front {
    /// Where the log was seen to begin, in order.
    pub starts: Vec<u64>,
    /// The highest offset before which anybody asked for a trim: what stands from there on must stay.
    pub asked_before: u64,
}

/// Shared by the one who trims and the judge.
pub type SharedFront = Arc<Mutex<Front>>;

/// Trims a partition now and then, and looks where it begins.
pub async fn trim(access: Access, stop: Stop, front: SharedFront, mut random: Random) {
    let change = |change: &dyn Fn(&mut Front)| change(&mut front.lock().unwrap_or_else(PoisonError::into_inner));
    while !stop.is_set() {
        pause(&mut random, 100..1_500).await;
        let client = access.client();
        if let Ok(start) = client.list_offsets(TRIMMED, 0, From::Earliest).await {
            change(&|front| front.starts.push(start));
        }
        let Ok(end) = client.list_offsets(TRIMMED, 0, From::Latest).await else { continue };
        let offset = random.of(0..end + 1);
        // Before the request: it may be carried out without an answer.
        change(&|front| front.asked_before = front.asked_before.max(offset));
        let before = wire::trim_topic_request::Before::BeforeOffset(offset);
        let request = wire::TrimTopicRequest { topic: TRIMMED.to_owned(), partition: Some(0), before: Some(before) };
        let index = random.of(0..8) as usize;
        let done = ask(&access, index, async |mut control| control.trim_topic(authorized(&access, request)).await);
        if let Err(status) = done.await {
            tracing::debug!("{TRIMMED} is not trimmed: {}", status.message());
        }
    }
}
