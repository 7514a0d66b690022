//! Clients that take the memory of a node and give nothing back do not stop the others.

use std::time::Duration;

use arqon_proto::{limits, wire};
use futures_util::future::select_all;
use tokio::time::{Instant, timeout};
use wire::frame::Body;

use crate::support::{Client, Cluster, batch, fetch_from};

/// Clients without progress go after 30 s in any case, and after 5 s while others wait for what they hold. What takes
/// less than this has not waited for the former.
const BEFORE_ALL_GO: Duration = Duration::from_secs(25);

/// Forty clients ask for far more than all of them together may have, and read nothing.
#[tokio::test(flavor = "multi_thread")]
async fn deaf_readers_do_not_stop_others() {
    let cluster = Cluster::start(1).await;
    cluster.create(0, "events", 1).await.unwrap();
    let mut client = cluster.connect(0, &cluster.admin()).await;
    let payload = "x".repeat(limits::PAYLOAD_SIZE_MAX);
    for _ in 0..8 {
        client.produce("events", 0, batch(&[&payload])).await.unwrap();
    }
    let mut deaf = Vec::new();
    for _ in 0..40 {
        let mut greedy = cluster.connect(0, &cluster.admin()).await;
        for _ in 0..20 {
            greedy.send(Body::Fetch(fetch_from("events", 0)), &[]).await;
        }
        deaf.push(greedy);
    }
    client.produce("events", 0, batch(&["small"])).await.unwrap();
    for offset in 0..8 {
        let fetch = client.fetch(fetch_from("events", offset));
        let fetched = timeout(BEFORE_ALL_GO, fetch).await.expect("an answer beside the deaf").unwrap();
        assert_eq!(fetched[0].len(), payload.len());
    }
    // One more asks for as much and reads it: nothing of it is lost. Any of the others may have been dropped by now.
    let mut late = cluster.connect(0, &cluster.admin()).await;
    for _ in 0..20 {
        late.send(Body::Fetch(fetch_from("events", 0)), &[]).await;
    }
    for _ in 0..20 {
        let (_, fetched) = late.receive().await.unwrap();
        assert!(!crate::support::payloads(fetched.unwrap().1).is_empty());
    }
    drop((deaf, client, late));
    cluster.shutdown().await;
}

/// Clients that begin the largest frames and stop: small requests go on, large ones wait until
/// those that stall have been dropped.
#[tokio::test(flavor = "multi_thread")]
async fn half_frames_do_not_stop_others() {
    let cluster = Cluster::start(1).await;
    cluster.create(0, "events", 1).await.unwrap();
    let mut client = cluster.connect(0, &cluster.admin()).await;
    let mut stuck = Vec::new();
    for _ in 0..=limits::PARTIAL_FRAMES_TOTAL_MAX / limits::FRAME_SIZE_MAX {
        let mut half: Client = cluster.connect(0, &cluster.admin()).await;
        half.send_bytes(&(limits::FRAME_SIZE_MAX as u32 - 4).to_le_bytes()).await;
        half.send_bytes(&[0; 1_000]).await;
        stuck.push(half);
    }
    let begin = Instant::now();
    for text in ["a", "b", "c"] {
        client.produce("events", 0, batch(&[text])).await.unwrap();
    }
    assert_eq!(client.fetch(fetch_from("events", 0)).await.unwrap(), ["a", "b", "c"]);
    let large = "x".repeat(limits::PAYLOAD_SIZE_MAX);
    client.produce("events", 0, batch(&[&large])).await.unwrap();
    // Any but the one that came last at the node, which waited for memory too and has it now.
    let (answer, at, _) = select_all(stuck.iter_mut().map(|half| Box::pin(half.receive()))).await;
    let refused = answer.unwrap().1.unwrap_err();
    assert_eq!(refused.field, "frame", "{refused:?}");
    assert!(refused.message.contains("did not come in time"), "{}", refused.message);
    assert!(stuck[at].receive().await.is_none(), "closed");
    assert!(begin.elapsed() < BEFORE_ALL_GO);
    drop((stuck, client));
    cluster.shutdown().await;
}
