//! Nodes that come, go and lose their disks while clients write.
#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use arqon_proto::{ProducerStamp, wire};
use tokio::{task::JoinHandle, time::sleep};
use wire::ErrorCode;

use crate::support::{Client, Cluster, authorized, batch_of, fetch_from, until};

const TOPIC: &str = "events";

/// Writes one number after the other, each until it is acknowledged, as a careful client does.
struct Writer {
    stop: Arc<AtomicBool>,
    /// Numbers acknowledged so far.
    count: Arc<AtomicU64>,
    task: JoinHandle<Duration>,
}

impl Writer {
    fn start(cluster: &Cluster) -> Self {
        let (stop, count) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let addresses: Vec<_> = cluster.addresses.iter().map(|at| at.client).collect();
        let token = cluster.admin();
        let task = tokio::spawn(write(addresses, token, stop.clone(), count.clone()));
        Self { stop, count, task }
    }

    /// The numbers acknowledged, and the longest pause between two.
    async fn stop(self) -> (u64, Duration) {
        self.stop.store(true, Ordering::Relaxed);
        let pause = self.task.await.unwrap();
        (self.count.load(Ordering::Relaxed), pause)
    }

    /// Until numbers were acknowledged that were sent after this call.
    async fn goes_on(&self) {
        let count = self.count.load(Ordering::Relaxed);
        until("writes go on", async || self.count.load(Ordering::Relaxed) > count + 5).await;
    }
}

async fn write(
    mut addresses: Vec<std::net::SocketAddr>,
    token: String,
    stop: Arc<AtomicBool>,
    count: Arc<AtomicU64>,
) -> Duration {
    let (mut client, mut pause, mut last) = (None, Duration::ZERO, Instant::now());
    while !stop.load(Ordering::Relaxed) {
        let sequence = count.load(Ordering::Relaxed);
        let Some(open) = &mut client else {
            addresses.rotate_left(1);
            let connecting = tokio::net::TcpStream::connect(addresses[0]).await;
            client = match connecting {
                Ok(_) => Client::connect(addresses[0], &token).await.ok(),
                Err(_) => None,
            };
            continue;
        };
        let producer = ProducerStamp { id: [9; 16], epoch: 0, base_sequence: sequence };
        let batch = batch_of("", [sequence.to_string().into()], Some(producer));
        let request = wire::Produce { topic: TOPIC.into(), ..Default::default() };
        open.send(wire::frame::Body::Produce(request), &[batch]).await;
        match open.receive().await {
            Some((_, Ok(_))) => {}
            Some((_, Err(refused))) if refused.code() == ErrorCode::Duplicate => {}
            Some((_, Err(refused))) if refused.code() == ErrorCode::NotLeader => {
                if let Ok(leader) = refused.leader_address.parse() {
                    addresses.insert(1, leader);
                    addresses.truncate(6);
                }
                client = None;
                sleep(Duration::from_millis(5)).await;
                continue;
            }
            Some((_, Err(refused))) if matches!(refused.code(), ErrorCode::Overloaded | ErrorCode::UnknownOutcome) => {
                continue;
            }
            Some((_, Err(refused))) => panic!("{refused:?}"),
            None => {
                client = None;
                continue;
            }
        }
        count.fetch_add(1, Ordering::Relaxed);
        pause = pause.max(last.elapsed());
        last = Instant::now();
    }
    pause
}

/// Every number once and in order, as the leader has them.
async fn assert_all_there(cluster: &Cluster, ask: usize, count: u64) {
    let leader = cluster.leader_of(ask, TOPIC, 0).await;
    assert_copy(cluster, leader, count).await;
}

/// Every number once and in order, as the replica on a node has them.
async fn assert_copy(cluster: &Cluster, index: usize, count: u64) {
    let copy = read(cluster, index, count).await;
    let first_wrong = copy.iter().enumerate().find(|(at, number)| **number != at.to_string());
    assert_eq!((copy.len() as u64, first_wrong), (count, None), "on node {}", index + 1);
}

/// What the replica on a node has, up to `count` numbers.
async fn read(cluster: &Cluster, index: usize, count: u64) -> Vec<String> {
    let mut client = cluster.connect(index, &cluster.admin()).await;
    let mut all = Vec::new();
    while (all.len() as u64) < count {
        let request = wire::Fetch { any_replica: true, wait_ms: 10_000, ..fetch_from(TOPIC, all.len() as u64) };
        let part = client.fetch(request).await.unwrap();
        assert!(!part.is_empty(), "{} of {count} numbers on node {}", all.len(), index + 1);
        all.extend(part);
    }
    all
}

fn operator(cluster: &Cluster) -> String {
    cluster.token("acme", &["admin:cluster"])
}

async fn status(cluster: &Cluster, ask: usize) -> wire::ClusterStatusResponse {
    status_as(cluster, ask, &cluster.admin()).await
}

async fn status_as(cluster: &Cluster, ask: usize, token: &str) -> wire::ClusterStatusResponse {
    let request = authorized(wire::ClusterStatusRequest {}, token);
    cluster.control(ask).await.cluster_status(request).await.unwrap().into_inner()
}

/// A node that never comes.
fn absent() -> wire::NodeInfo {
    let nowhere = || "127.0.0.1:1".to_owned();
    wire::NodeInfo {
        node: 9,
        client_address: nowhere(),
        peer_address: nowhere(),
        control_address: nowhere(),
        ..Default::default()
    }
}

async fn add(cluster: &mut Cluster) -> usize {
    let (info, starting) = cluster.start_another();
    let request = authorized(wire::AddNodeRequest { info: Some(info.clone()) }, &operator(cluster));
    cluster.control(0).await.add_node(request).await.unwrap();
    let index = info.node as usize - 1;
    cluster.nodes[index] = Some(starting.await.unwrap());
    index
}

/// Where the partition has replicas, once nothing moves any more.
async fn settled(cluster: &Cluster, ask: usize) -> BTreeSet<u64> {
    until("no replicas move", async || status(cluster, ask).await.moves.is_empty()).await;
    cluster.leader_of(ask, TOPIC, 0).await;
    let mut client = cluster.connect(ask, &cluster.admin()).await;
    client.describe(TOPIC).await.unwrap().partitions[0].replica_nodes.iter().copied().collect()
}

fn move_request(from: u64, to: u64, cancel: bool) -> wire::MovePartitionRequest {
    wire::MovePartitionRequest { topic: TOPIC.into(), from, to, cancel, ..Default::default() }
}

/// The whole life of a node, under load: added, given a replica by a move, filled by the decommission of
/// another one, which is then removed. Nothing that was acknowledged is lost, doubled or reordered.
#[tokio::test(flavor = "multi_thread")]
async fn nodes_come_and_go_under_load() {
    let mut cluster = Cluster::start(3).await;
    cluster.create(0, TOPIC, 1).await.unwrap();
    let writer = Writer::start(&cluster);
    writer.goes_on().await;

    let fourth = add(&mut cluster).await;
    until("the node votes in the metadata group", async || {
        status(&cluster, 0).await.nodes.iter().any(|node| node.voter && node.info.as_ref().unwrap().node == 4)
    })
    .await;
    until("the node is ready", async || cluster.nodes[fourth].as_ref().unwrap().not_ready().is_none()).await;

    let leader = cluster.leader_of(0, TOPIC, 0).await;
    let mut control = cluster.control(fourth).await;
    let request = authorized(move_request(leader as u64 + 1, 4, false), &operator(&cluster));
    control.move_partition(request).await.unwrap();
    let nodes = settled(&cluster, fourth).await;
    assert!(nodes.contains(&4) && !nodes.contains(&(leader as u64 + 1)), "{nodes:?}");
    writer.goes_on().await;

    // Back onto the node that is not leaving: three are left, each with a replica.
    let drained = nodes.iter().copied().find(|node| *node != 4).unwrap();
    let request = authorized(wire::DrainNodeRequest { node: drained, cancel: false }, &operator(&cluster));
    control.drain_node(request).await.unwrap();
    let nodes = settled(&cluster, fourth).await;
    assert_eq!(nodes, (1..=4).filter(|node| *node != drained).collect());
    // What the system keeps on every node goes as well; only those who run the cluster see it.
    until("nothing is left on the node", async || {
        status_as(&cluster, fourth, &operator(&cluster)).await.moves.is_empty()
    })
    .await;
    let request = authorized(wire::RemoveNodeRequest { node: drained }, &operator(&cluster));
    control.remove_node(request).await.unwrap();
    until("the metadata group has three voters", async || {
        let now = status(&cluster, fourth).await;
        now.nodes.len() == 3 && now.nodes.iter().all(|node| node.voter)
    })
    .await;
    cluster.stop(drained as usize - 1).await;
    writer.goes_on().await;

    let (count, pause) = writer.stop().await;
    assert_all_there(&cluster, fourth, count).await;
    // The copies that came by moves are whole.
    for node in nodes {
        assert_copy(&cluster, node as usize - 1, count).await;
    }
    println!("{count} numbers acknowledged, the longest pause was {pause:?}");
    cluster.shutdown().await;
}

/// A move to a node that is away waits, is seen, and can be taken back.
#[tokio::test(flavor = "multi_thread")]
async fn a_move_that_gets_nowhere_is_cancelled_and_leaves_everything_as_it_was() {
    let mut cluster = Cluster::start(3).await;
    cluster.create(0, TOPIC, 1).await.unwrap();
    let fourth = add(&mut cluster).await;
    let before = settled(&cluster, 0).await;
    cluster.stop(fourth).await;
    let mut control = cluster.control(0).await;
    let from = *before.iter().next().unwrap();
    control.move_partition(authorized(move_request(from, 4, false), &operator(&cluster))).await.unwrap();
    let moves = status(&cluster, 0).await.moves;
    assert_eq!(
        (moves[0].topic.as_str(), moves[0].from.as_slice(), moves[0].to.as_slice()),
        (TOPIC, [from].as_slice(), [4].as_slice())
    );
    let again =
        control.move_partition(authorized(move_request(from, 4, false), &operator(&cluster))).await.unwrap_err();
    assert_eq!(again.code(), tonic::Code::AlreadyExists);
    let refused = control.move_partition(authorized(move_request(0, 0, true), &cluster.admin())).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::PermissionDenied);
    control.move_partition(authorized(move_request(0, 0, true), &operator(&cluster))).await.unwrap();
    assert_eq!(settled(&cluster, 0).await, before);
    let writer = Writer::start(&cluster);
    writer.goes_on().await;
    let (count, _) = writer.stop().await;
    assert_all_there(&cluster, 0, count).await;
    cluster.shutdown().await;
}

/// A node that is being emptied is kept after all, before and while its replicas move.
#[tokio::test(flavor = "multi_thread")]
async fn a_decommission_is_taken_back_under_load() {
    let mut cluster = Cluster::start(3).await;
    cluster.create(0, TOPIC, 1).await.unwrap();
    let fourth = add(&mut cluster).await;
    let before = settled(&cluster, 0).await;
    let writer = Writer::start(&cluster);
    writer.goes_on().await;
    let leaving = *before.iter().next().unwrap();
    let mut control = cluster.control(fourth).await;
    for begins_to_move in [false, true] {
        let drain = |cancel| wire::DrainNodeRequest { node: leaving, cancel };
        control.drain_node(authorized(drain(false), &operator(&cluster))).await.unwrap();
        if begins_to_move {
            until("the move is under way, or over", async || {
                let moves = status(&cluster, fourth).await.moves;
                moves.first().is_none_or(|change| !change.phase.is_empty())
            })
            .await;
        }
        control.drain_node(authorized(drain(true), &operator(&cluster))).await.unwrap();
        let nodes = settled(&cluster, fourth).await;
        assert_eq!(nodes.len(), 3, "{nodes:?}");
        let kept = status(&cluster, fourth).await.nodes;
        assert!(kept.iter().all(|node| !node.info.as_ref().unwrap().leaving), "{kept:?}");
        writer.goes_on().await;
    }
    let nodes = settled(&cluster, fourth).await;
    let (count, _) = writer.stop().await;
    for node in nodes {
        assert_copy(&cluster, node as usize - 1, count).await;
    }
    cluster.shutdown().await;
}

/// An addition is taken back by the removal of the node, although it never came.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_never_came_is_taken_out_again() {
    let cluster = Cluster::start(3).await;
    cluster.create(0, TOPIC, 1).await.unwrap();
    let request = authorized(wire::AddNodeRequest { info: Some(absent()) }, &operator(&cluster));
    let mut control = cluster.control(0).await;
    control.add_node(request).await.unwrap();
    let drain = wire::DrainNodeRequest { node: absent().node, cancel: false };
    control.drain_node(authorized(drain, &operator(&cluster))).await.unwrap();
    until("nothing is to come to it any more", async || {
        let moves = status_as(&cluster, 0, &operator(&cluster)).await.moves;
        moves.iter().all(|change| !change.from.contains(&absent().node))
    })
    .await;
    let remove = wire::RemoveNodeRequest { node: absent().node };
    control.remove_node(authorized(remove, &operator(&cluster))).await.unwrap();
    assert_eq!(status(&cluster, 0).await.nodes.len(), 3);
    let writer = Writer::start(&cluster);
    writer.goes_on().await;
    writer.stop().await;
    cluster.shutdown().await;
}

/// Of two nodes both must agree that one goes: when the command is done, that one may be stopped at once.
#[tokio::test(flavor = "multi_thread")]
async fn a_removed_node_is_no_longer_needed_when_the_command_is_done() {
    let mut cluster = Cluster::start(2).await;
    let mut control = cluster.control(0).await;
    let drain = wire::DrainNodeRequest { node: 2, cancel: false };
    control.drain_node(authorized(drain, &operator(&cluster))).await.unwrap();
    until("nothing is left on the node", async || status_as(&cluster, 0, &operator(&cluster)).await.moves.is_empty())
        .await;
    let remove = wire::RemoveNodeRequest { node: 2 };
    control.remove_node(authorized(remove, &operator(&cluster))).await.unwrap();
    cluster.stop(1).await;
    // A change of the metadata needs a majority of its voters.
    until("the one that is left decides alone", async || cluster.create(0, TOPIC, 1).await.is_ok()).await;
    cluster.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn leadership_goes_where_it_is_sent_and_stays_there() {
    let cluster = Cluster::start(3).await;
    cluster.create(0, TOPIC, 1).await.unwrap();
    let writer = Writer::start(&cluster);
    writer.goes_on().await;
    let leader = cluster.leader_of(0, TOPIC, 0).await;
    let to = ((leader + 1) % 3) as u64 + 1;
    let request = wire::TransferLeaderRequest { topic: TOPIC.into(), to, ..Default::default() };
    cluster.control(leader).await.transfer_leader(authorized(request, &operator(&cluster))).await.unwrap();
    assert_eq!(cluster.leader_of(to as usize - 1, TOPIC, 0).await, to as usize - 1);
    writer.goes_on().await;
    let (count, _) = writer.stop().await;
    assert_all_there(&cluster, to as usize - 1, count).await;
    let mut client = cluster.connect(0, &cluster.admin()).await;
    assert_eq!(client.describe(TOPIC).await.unwrap().partitions[0].replica_nodes[0], to, "it belongs there now");
    cluster.shutdown().await;
}

/// A node whose disk is gone must not vote or acknowledge as the one that it was: it comes back under new
/// replica ids and copies everything.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_lost_its_disk_comes_back_as_another_and_copies_everything() {
    let mut cluster = Cluster::start(3).await;
    cluster.create(0, TOPIC, 1).await.unwrap();
    let writer = Writer::start(&cluster);
    writer.goes_on().await;
    // A node that never comes keeps nobody else from becoming a voter again.
    let request = authorized(wire::AddNodeRequest { info: Some(absent()) }, &operator(&cluster));
    cluster.control(0).await.add_node(request).await.unwrap();
    cluster.stop(1).await;
    std::fs::remove_dir_all(cluster.data(1)).unwrap();
    writer.goes_on().await;
    cluster.restart(1).await;
    until("the node is ready", async || cluster.nodes[1].as_ref().unwrap().not_ready().is_none()).await;
    assert_eq!(settled(&cluster, 1).await, BTreeSet::from([1, 2, 3]));
    until("it votes in the metadata group", async || {
        status(&cluster, 0).await.nodes.iter().any(|node| node.voter && node.info.as_ref().unwrap().node == 2)
    })
    .await;
    let (count, _) = writer.stop().await;
    assert_copy(&cluster, 1, count).await;
    let logs: Vec<_> =
        std::fs::read_dir(cluster.data(1).join("logs")).unwrap().map(|at| at.unwrap().file_name()).collect();
    assert!(logs.iter().all(|name| name.to_str().unwrap().split_once('-').unwrap().1.parse::<u64>().unwrap() > 3));
    cluster.shutdown().await;
}

/// The log of the topic's replica on a node: group 0 is the metadata, 1 the operators' topic.
fn topic_log(cluster: &Cluster, index: usize) -> Option<std::path::PathBuf> {
    let mut logs = std::fs::read_dir(cluster.data(index).join("logs")).unwrap().map(|at| at.unwrap().path());
    logs.find(|log| log.file_name().unwrap().to_str().unwrap().starts_with("2-"))
}

/// A replica whose log is gone, or whose vote cannot be read, is replaced without anybody's help.
#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_may_not_be_trusted_is_replaced_by_itself() {
    let mut cluster = Cluster::start(3).await;
    cluster.create(0, TOPIC, 1).await.unwrap();
    let writer = Writer::start(&cluster);
    writer.goes_on().await;
    until("what is placed is written down", async || cluster.data(2).join("placed").exists()).await;
    for damage in [
        |log: &std::path::Path| std::fs::remove_dir_all(log).unwrap(),
        |log: &std::path::Path| {
            std::fs::write(log.join("vote"), b"nonsense").unwrap();
        },
    ] {
        cluster.stop(2).await;
        let log = topic_log(&cluster, 2).expect("the topic's replica");
        damage(&log);
        cluster.restart(2).await;
        until("the node is ready", async || cluster.nodes[2].as_ref().unwrap().not_ready().is_none()).await;
        assert_eq!(settled(&cluster, 2).await, BTreeSet::from([1, 2, 3]));
        assert!(!log.exists(), "the old replica is gone");
        writer.goes_on().await;
    }
    let (count, _) = writer.stop().await;
    assert_copy(&cluster, 2, count).await;
    cluster.shutdown().await;
}

/// A node that is being emptied loses its disk: what it still was must not come back empty and vote.
#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_is_lost_while_its_node_is_emptied_does_not_vote_again() {
    let mut cluster = Cluster::start(3).await;
    cluster.create(0, TOPIC, 1).await.unwrap();
    let fourth = add(&mut cluster).await;
    let writer = Writer::start(&cluster);
    writer.goes_on().await;
    cluster.stop(fourth).await;
    let request = authorized(wire::DrainNodeRequest { node: 3, cancel: false }, &operator(&cluster));
    cluster.control(0).await.drain_node(request).await.unwrap();
    let old = topic_log(&cluster, 2).expect("the topic's replica on node 3");
    cluster.stop(2).await;
    std::fs::remove_dir_all(cluster.data(2)).unwrap();
    cluster.restart(2).await;
    writer.goes_on().await;
    cluster.restart(fourth).await;
    assert_eq!(settled(&cluster, 0).await, BTreeSet::from([1, 2, 4]));
    assert!(!old.exists(), "the replica that was lost has no log again");
    let (count, _) = writer.stop().await;
    assert_copy(&cluster, fourth, count).await;
    cluster.shutdown().await;
}

/// A move is taken back at all kinds of moments, also when the new replica is the only voter already.
#[tokio::test(flavor = "multi_thread")]
async fn a_move_may_be_cancelled_at_any_moment() {
    let cluster = Cluster::start(3).await;
    let config = wire::TopicConfig {
        name: TOPIC.into(),
        partitions: 1,
        replication: 1,
        retention_ms: 3_600_000,
        ..Default::default()
    };
    let request = wire::CreateTopicRequest { config: Some(config) };
    cluster.control(0).await.create_topic(authorized(request, &cluster.admin())).await.unwrap();
    let writer = Writer::start(&cluster);
    writer.goes_on().await;
    let mut control = cluster.control(0).await;
    for wait_ms in [0, 40, 90, 150, 220, 300, 400, 500] {
        let from = *settled(&cluster, 0).await.iter().next().unwrap();
        let to = from % 3 + 1;
        control.move_partition(authorized(move_request(from, to, false), &operator(&cluster))).await.unwrap();
        sleep(Duration::from_millis(wait_ms)).await;
        // Refused when the move has ended before.
        let cancelled = control.move_partition(authorized(move_request(0, 0, true), &operator(&cluster))).await.is_ok();
        let now = settled(&cluster, 0).await;
        assert_eq!(now, BTreeSet::from([if cancelled { from } else { to }]), "after {wait_ms} ms");
        writer.goes_on().await;
    }
    let (count, _) = writer.stop().await;
    assert_all_there(&cluster, 0, count).await;
    cluster.shutdown().await;
}

/// The same for the metadata's own replica.
#[tokio::test(flavor = "multi_thread")]
async fn a_metadata_replica_that_may_not_be_trusted_is_copied_anew() {
    let mut cluster = Cluster::start(3).await;
    cluster.create(0, TOPIC, 1).await.unwrap();
    cluster.stop(0).await;
    std::fs::write(cluster.data(0).join("logs/0-1/vote"), b"nonsense").unwrap();
    cluster.restart(0).await;
    until("the node is ready", async || cluster.nodes[0].as_ref().unwrap().not_ready().is_none()).await;
    until("it votes again", async || status(&cluster, 1).await.nodes.iter().all(|node| node.voter)).await;
    assert!(!cluster.data(0).join("logs/0-1").exists());
    cluster.create(0, "another", 3).await.unwrap();
    cluster.shutdown().await;
}

/// Two disks of three are lost. Nobody can know what only they had; the operator decides to go on, and that
/// stands in the cluster's status. The lost nodes come back empty and the copies are made again.
#[tokio::test(flavor = "multi_thread")]
async fn an_operator_may_go_on_from_one_node_of_three() {
    let mut cluster = Cluster::start(3).await;
    cluster.create(0, TOPIC, 1).await.unwrap();
    let writer = Writer::start(&cluster);
    writer.goes_on().await;
    let (count, _) = writer.stop().await;
    // Followers learn of the last commit a little later; what they have is kept in any case.
    assert_copy(&cluster, 0, count).await;
    for index in 0..3 {
        cluster.stop(index).await;
    }
    let refused = arqon_spine::UnsafeRecovery::plan(&cluster.configs[0], BTreeSet::from([2]), None);
    let refused = refused.err().unwrap().to_string();
    assert!(refused.contains("--lost: most nodes are left"), "{refused}");
    for index in [1, 2] {
        std::fs::remove_dir_all(cluster.data(index)).unwrap();
    }
    let recovery = arqon_spine::UnsafeRecovery::plan(&cluster.configs[0], BTreeSet::from([2, 3]), None).unwrap();
    let lost = recovery.partitions().iter().find(|lost| lost.topic == TOPIC).unwrap().clone();
    assert_eq!((lost.kept.unwrap().end.0, lost.is_empty), (count, false));
    recovery.carry_out().await.unwrap();

    // All at once: the empty ones must not form a cluster of their own.
    let empty = [1, 2].map(|index| {
        let config = cluster.configs[index].clone();
        tokio::spawn(async move { arqon_spine::Node::start(config).await.unwrap() })
    });
    cluster.restart(0).await;
    until("the node is ready", async || cluster.nodes[0].as_ref().unwrap().not_ready().is_none()).await;
    let now = status(&cluster, 0).await;
    assert_eq!((now.nodes.len(), now.unsafe_recoveries[0].lost.as_slice()), (1, [2, 3].as_slice()));
    assert_all_there(&cluster, 0, count).await;

    for (index, starting) in [1, 2].into_iter().zip(empty) {
        let info = wire::NodeInfo {
            node: index as u64 + 1,
            client_address: cluster.addresses[index].client.to_string(),
            peer_address: cluster.addresses[index].peer.to_string(),
            control_address: cluster.addresses[index].control.to_string(),
            ..Default::default()
        };
        let request = authorized(wire::AddNodeRequest { info: Some(info) }, &operator(&cluster));
        cluster.control(0).await.add_node(request).await.unwrap();
        cluster.nodes[index] = Some(starting.await.unwrap());
    }
    until("there are three copies again", async || settled(&cluster, 0).await == BTreeSet::from([1, 2, 3])).await;
    assert_copy(&cluster, 2, count).await;
    cluster.stop(0).await;
    assert_all_there(&cluster, 1, count).await;
    cluster.shutdown().await;
}
