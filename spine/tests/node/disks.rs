//! Disks that are nearly full under whole nodes.
#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::{collections::BTreeSet, time::Duration};

use arqon_proto::wire;
use arqon_storage::{DiskSpace, Operation};
use tokio::time::{Instant, timeout};
use wire::ErrorCode;

use crate::support::{Cluster, authorized, batch, fetch_from, until};

const LARGE: u64 = 100 << 30;
/// Ten slow seconds make a slow disk, and then a few of its syncs are in line.
const SLOW_PATIENCE: Duration = Duration::from_secs(180);
/// What does not wait for the syncs that a slow disk has in line is done by then.
const AT_ONCE: Duration = Duration::from_secs(2);
/// Below the reserve of 512 MiB, and above the quarter of it at which followers refuse data.
const LOW: DiskSpace = DiskSpace { free_size: 300 << 20, total_size: LARGE };
/// Of every node but those that are low, whatever the machine of the test has.
const ENOUGH: DiskSpace = DiskSpace { free_size: LARGE, total_size: LARGE };

async fn status(cluster: &Cluster, ask: usize) -> wire::ClusterStatusResponse {
    let request = authorized(wire::ClusterStatusRequest {}, &cluster.admin());
    cluster.control(ask).await.cluster_status(request).await.unwrap().into_inner()
}

/// Writes one event at whoever leads. On a busy machine another one may lead a moment later, and then this fails.
async fn write(cluster: &Cluster) -> Result<wire::Produced, wire::Error> {
    let leader = cluster.leader_of(0, "events", 0).await;
    cluster.connect(leader, &cluster.admin()).await.produce("events", 0, batch(&["x"])).await
}

/// Writes until it succeeds, without being told that a disk is full.
async fn write_with_space(cluster: &Cluster, what: &str) {
    until(what, async || match write(cluster).await {
        Ok(_) => true,
        Err(refused) => {
            assert_ne!(refused.code(), ErrorCode::StorageFull, "{what}: {refused:?}");
            false
        }
    })
    .await;
}

/// The story: the disk of one follower is nearly full, and nobody minds, because the others are a majority. With a
/// second one new records would fill it: they are refused before that, reads go on, and space on either brings
/// writes back.
#[tokio::test(flavor = "multi_thread")]
async fn records_are_taken_while_most_disks_have_space() {
    let cluster = Cluster::start_on_faulty_disks(3).await;
    cluster.disks.iter().for_each(|disk| disk.set_space(Some(ENOUGH)));
    cluster.create(0, "events", 1).await.unwrap();
    until("there is space", async || write(&cluster).await.is_ok()).await;
    let leader = cluster.leader_of(0, "events", 0).await;
    let others = [(leader + 1) % 3, (leader + 2) % 3];
    let is_told = async |node: usize| {
        status(&cluster, leader).await.nodes[node].problems.iter().any(|line| line.contains("of disk left"))
    };
    cluster.disks[others[0]].set_space(Some(LOW));
    until("the first disk is seen to be low", async || is_told(others[0]).await).await;
    write_with_space(&cluster, "two of three disks have space").await;
    cluster.disks[others[1]].set_space(Some(LOW));
    let mut refused = None;
    until("records are refused", async || {
        refused = write(&cluster).await.err().filter(|refused| refused.code() == ErrorCode::StorageFull);
        refused.is_some()
    })
    .await;
    let refused = refused.expect("the refusal that was waited for");
    let mut low = others.map(|node| (node + 1).to_string());
    low.sort();
    assert!(refused.message.contains(&format!("the disks of nodes {} are nearly full", low.join(", "))), "{refused:?}");
    until("reads go on", async || {
        let leader = cluster.leader_of(0, "events", 0).await;
        let mut client = cluster.connect(leader, &cluster.admin()).await;
        client.fetch(fetch_from("events", 0)).await.is_ok_and(|events| !events.is_empty())
    })
    .await;
    // The first one is still low, and the leader has just shown that it knows.
    cluster.disks[others[1]].set_space(Some(ENOUGH));
    until("records are taken again", async || write(&cluster).await.is_ok()).await;

    // A leader that is low itself would refuse for ever what the others have space for.
    cluster.disks[others[0]].set_space(Some(ENOUGH));
    let leader = cluster.leader_of(0, "events", 0).await;
    cluster.disks[leader].set_space(Some(LOW));
    until("another one leads", async || cluster.leader_of(0, "events", 0).await != leader).await;
    until("records are taken by it", async || write(&cluster).await.is_ok()).await;
    cluster.shutdown().await;
}

/// The story: the disk under a leader becomes slow. Its followers commit without it, but everything it leads would wait
/// for whatever it must have on disk itself; after ten seconds it leads nothing any more.
#[tokio::test(flavor = "multi_thread")]
async fn a_leader_with_a_slow_disk_gives_leadership_away() {
    let cluster = Cluster::start_on_faulty_disks(3).await;
    cluster.disks.iter().for_each(|disk| disk.set_space(Some(ENOUGH)));
    cluster.create(0, "events", 1).await.unwrap();
    until("there is space", async || write(&cluster).await.is_ok()).await;
    let leader = cluster.leader_of(0, "events", 0).await;
    let mut metadata = 0;
    until("the metadata has a leader", async || {
        metadata = status(&cluster, 0).await.metadata_leader as usize;
        metadata > 0
    })
    .await;
    metadata -= 1;
    // That of the partition, and that of the metadata, which may be another one.
    for slow in BTreeSet::from([leader, metadata]) {
        let ask = (slow + 1) % 3;
        cluster.disks[slow].delay(Operation::Sync, 700);
        let begun = Instant::now();
        loop {
            // Flushes are what shows that a disk is slow. Nobody can say what becomes of a write at the moment of
            // the change before that disk has done what it has in line.
            let _ = timeout(Duration::from_secs(1), write(&cluster)).await;
            let leads_metadata = status(&cluster, ask).await.metadata_leader == slow as u64 + 1;
            if !leads_metadata && cluster.leader_of(ask, "events", 0).await != slow {
                break;
            }
            assert!(begun.elapsed() < SLOW_PATIENCE, "node {slow} leads with a slow disk");
        }
        write_with_space(&cluster, "the others commit").await;
        // It says so itself at once, and keeps nobody waiting for what its disk has in line.
        let mut client = cluster.connect(slow, &cluster.admin()).await;
        let asked = timeout(AT_ONCE, client.produce("events", 0, batch(&["x"]))).await;
        let refused = asked.expect("an answer in time").unwrap_err();
        assert_eq!(refused.code(), ErrorCode::NotLeader, "{refused:?}");
        cluster.disks[slow].delay(Operation::Sync, 0);
    }
    cluster.shutdown().await;
}
