//! Three nodes in one process: real logs, real sockets, real openraft.
#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod support;

use std::{net::Ipv4Addr, path::Path, sync::Arc, time::Duration};

use arqon_proto::{Batch, BatchKind, NodeId, Offset, RaftIndex, ReplicaId, TlsIdentity, tls_client, tls_server};
use arqon_raft::{Applied, Group, MembersStep, OpenError, PeerTls, ProposeError, WantedMembers};
use arqon_storage::{Identity, Options, Store};
use bytes::Bytes;
use support::{Node, PATIENCE, loopback::own_loopback, open_node};
use tokio::{
    net::{TcpListener, ToSocketAddrs},
    time::timeout,
};

fn batch(payload: usize) -> Batch {
    support::batch(vec![7; payload])
}

fn payloads(group: &Group) -> Vec<usize> {
    support::payloads(group).iter().map(Bytes::len).collect()
}

struct Cluster {
    dir: tempfile::TempDir,
    addresses: Vec<(NodeId, String)>,
    tls: Option<PeerTls>,
    nodes: Vec<Option<Node>>,
}

async fn listener(address: impl ToSocketAddrs) -> TcpListener {
    TcpListener::bind(address).await.unwrap()
}

impl Cluster {
    async fn start(count: u64) -> Self {
        Self::start_on(own_loopback(), count, None).await
    }

    async fn start_on(host: Ipv4Addr, count: u64, tls: Option<PeerTls>) -> Self {
        let mut listeners = Vec::new();
        let mut addresses = Vec::new();
        for id in 1..=count {
            let bound = listener((host, 0)).await;
            addresses.push((NodeId(id), bound.local_addr().unwrap().to_string()));
            listeners.push(bound);
        }
        let mut cluster = Self { dir: tempfile::tempdir().unwrap(), addresses, tls, nodes: Vec::new() };
        for (id, bound) in (1..).zip(listeners) {
            let node = cluster.open(id, bound).await.unwrap();
            cluster.nodes.push(Some(node));
        }
        cluster
    }

    fn data(&self, id: u64) -> std::path::PathBuf {
        self.dir.path().join(format!("node-{id}"))
    }

    async fn open(&self, id: u64, peer_listener: TcpListener) -> Result<Node, OpenError> {
        let identity = Identity { cluster: "test".into(), node: NodeId(id) };
        let store = Store::open(&self.data(id), identity, Options::default()).unwrap();
        open_node(id, &self.addresses, store, peer_listener, self.tls.clone()).await
    }

    async fn stop(&mut self, id: u64) {
        let node = self.nodes[id as usize - 1].take().unwrap();
        node.host.shutdown().await;
    }

    async fn restart(&mut self, id: u64) {
        let bound = listener(&self.addresses[id as usize - 1].1).await;
        let node = self.open(id, bound).await.unwrap();
        self.nodes[id as usize - 1] = Some(node);
    }

    fn running(&self) -> impl Iterator<Item = &Node> {
        self.nodes.iter().flatten()
    }

    fn node(&self, id: u64) -> &Node {
        self.nodes[id as usize - 1].as_ref().unwrap()
    }

    /// Waits for a leader that may accept writes.
    async fn leader(&self) -> (u64, &Node) {
        let ready = self.running().map(|node| {
            let mut watch = node.group.watch();
            Box::pin(async move {
                watch.wait_for(|status| status.ready).await.unwrap();
                node
            })
        });
        let (node, _, _) = timeout(PATIENCE, futures_util::future::select_all(ready)).await.expect("a leader");
        let id =
            self.nodes.iter().position(|at| at.as_ref().is_some_and(|at| at.group.replica() == node.group.replica()));
        (id.unwrap() as u64 + 1, node)
    }

    async fn publish(&self, payload: usize) -> Applied {
        let (_, leader) = self.leader().await;
        let term = leader.group.status().term;
        let proposal = leader.group.propose(term, batch(payload)).await.unwrap();
        timeout(PATIENCE, proposal).await.expect("an answer in time").unwrap()
    }

    /// Waits until every running node has applied through `index`.
    async fn converge(&self, index: RaftIndex) {
        for node in self.running() {
            let mut readable = node.group.readable();
            let reached = readable.wait_for(|readable| readable.index >= Some(index));
            timeout(PATIENCE, reached).await.expect("convergence in time").unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_acknowledged_is_on_every_replica_in_order() {
    let mut cluster = Cluster::start(3).await;
    let mut last = None;
    for payload in 1..=50 {
        let applied = cluster.publish(payload).await;
        assert_eq!(applied.base_offset, Offset(payload as u64 - 1));
        last = Some(applied.position.index);
    }
    cluster.converge(last.unwrap()).await;
    let expected: Vec<usize> = (1..=50).collect();
    for node in cluster.running() {
        assert_eq!(payloads(&node.group), expected);
    }
    for id in 1..=3 {
        cluster.stop(id).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_group_that_does_nothing_keeps_its_leader() {
    let mut cluster = Cluster::start(3).await;
    let (_, leader) = cluster.leader().await;
    let term = leader.group.status().term;
    // A majority was enough for the election: the third may not have heard of it yet.
    for node in cluster.running() {
        let mut watch = node.group.watch();
        let heard = watch.wait_for(|status| status.term == term && status.leader.is_some());
        timeout(PATIENCE, heard).await.expect("all follow").unwrap();
    }
    // Longer than an election time-out and than openraft's own heartbeats are apart.
    let changes = cluster.running().map(|node| {
        let mut watch = node.group.watch();
        Box::pin(async move { watch.wait_for(|status| status.term != term).await.map(|status| status.clone()).ok() })
    });
    let changed = timeout(Duration::from_secs(5), futures_util::future::select_all(changes)).await;
    assert!(changed.is_err(), "{:?}", changed.map(|(status, _, _)| status));
    for id in 1..=3 {
        cluster.stop(id).await;
    }
}

/// openraft refuses proposals when no majority has answered for a second, which is the case after a
/// second of rest; the proposal itself must then ask for an answer.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_first_batch_after_a_rest_is_taken() {
    let mut cluster = Cluster::start(3).await;
    cluster.publish(1).await;
    let term = cluster.leader().await.1.group.status().term;
    for number in 1..=4 {
        tokio::time::sleep(Duration::from_millis(1_300)).await;
        let group = &cluster.leader().await.1.group;
        group.propose(term, batch(number)).await.unwrap().await.unwrap();
    }
    for id in 1..=3 {
        cluster.stop(id).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_goes_is_replaced_and_catches_up_when_it_returns() {
    let mut cluster = Cluster::start(3).await;
    cluster.publish(1).await;
    let (first, _) = cluster.leader().await;
    cluster.stop(first).await;
    for payload in 2..=20 {
        cluster.publish(payload).await;
    }
    let (second, _) = cluster.leader().await;
    assert_ne!(first, second);
    cluster.restart(first).await;
    let last = cluster.publish(21).await;
    cluster.converge(last.position.index).await;
    assert_eq!(payloads(&cluster.node(first).group), (1..=21).collect::<Vec<_>>());
    for id in 1..=3 {
        cluster.stop(id).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_nodes_restarted_at_once_still_have_everything() {
    let mut cluster = Cluster::start(3).await;
    for payload in 1..=10 {
        cluster.publish(payload).await;
    }
    for id in 1..=3 {
        cluster.stop(id).await;
    }
    for id in 1..=3 {
        cluster.restart(id).await;
    }
    let last = cluster.publish(11).await;
    assert_eq!(last.base_offset, Offset(10));
    cluster.converge(last.position.index).await;
    for id in 1..=3 {
        assert_eq!(payloads(&cluster.node(id).group), (1..=11).collect::<Vec<_>>());
        cluster.stop(id).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn proposals_keep_the_order_in_which_they_were_submitted() {
    let cluster = Cluster::start(3).await;
    let (_, leader) = cluster.leader().await;
    let term = leader.group.status().term;
    let mut proposals = Vec::new();
    for payload in 1..=200 {
        proposals.push(leader.group.propose(term, batch(payload)).await.unwrap());
    }
    for (offset, proposal) in proposals.into_iter().enumerate() {
        assert_eq!(timeout(PATIENCE, proposal).await.unwrap().unwrap().base_offset, Offset(offset as u64));
    }
    assert_eq!(payloads(&leader.group), (1..=200).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_follower_and_a_past_term_are_refused_before_anything_is_written() {
    let cluster = Cluster::start(3).await;
    cluster.publish(1).await;
    let (leader_id, leader) = cluster.leader().await;
    let status = leader.group.status();
    let follower = cluster.node(leader_id % 3 + 1);
    let refused = follower.group.propose(status.term, batch(2)).await;
    assert!(matches!(refused, Err(ProposeError::NotLeader { .. })));
    let past = arqon_proto::Term(status.term.0 - 1);
    let refused = leader.group.propose(past, batch(3)).await;
    assert!(matches!(refused, Err(ProposeError::NotLeader { .. })));
    let applied = cluster.publish(4).await;
    assert_eq!(applied.base_offset, Offset(1), "nothing in between was written");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leadership_moves_where_it_is_asked_to() {
    let cluster = Cluster::start(3).await;
    cluster.publish(1).await;
    let (from, leader) = cluster.leader().await;
    let to = from % 3 + 1;
    leader.group.transfer_leader(NodeId(to)).await.unwrap();
    let mut watch = cluster.node(to).group.watch();
    timeout(PATIENCE, watch.wait_for(|status| status.ready)).await.expect("taken over in time").unwrap();
    cluster.publish(2).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_confirms_itself_and_reads_what_was_acknowledged() {
    let mut cluster = Cluster::start(3).await;
    let applied = cluster.publish(1).await;
    let (id, leader) = cluster.leader().await;
    leader.group.confirm_leader().await.unwrap();
    assert!(leader.group.readable().borrow().index >= Some(applied.position.index));
    let follower = cluster.node(id % 3 + 1);
    assert!(matches!(follower.group.confirm_leader().await, Err(ProposeError::NotLeader { .. })));
    // Alone it may not claim to lead.
    let group = leader.group.clone();
    for other in (1..=3).filter(|other| *other != id) {
        cluster.stop(other).await;
    }
    assert!(timeout(PATIENCE, group.confirm_leader()).await.unwrap_or(Err(ProposeError::Overloaded)).is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_answer_each_others_requests() {
    let cluster = Cluster::start(2).await;
    let handler: arqon_raft::ForwardHandler = Arc::new(|from, kind, body| {
        Box::pin(async move {
            if kind == "fail" {
                return Err("no".to_owned());
            }
            Ok(Bytes::from(format!("{from} {kind} {}", body.len())))
        })
    });
    cluster.node(2).host.on_forward(handler);
    let answer = async |kind: &str| cluster.node(1).host.forward(NodeId(2), kind, Bytes::from_static(b"abc")).await;
    assert_eq!(answer("echo").await.unwrap(), "1 echo 3");
    assert_eq!(answer("fail").await.unwrap_err().to_string(), "no");
    assert!(cluster.node(1).host.peer_reachable(NodeId(2)));
}

/// A CA and a certificate of it for `host`.
fn certificates(host: Ipv4Addr) -> (String, String, String) {
    let key = rcgen::KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let ca = params.self_signed(&key).unwrap();
    let issuer = rcgen::Issuer::new(params, key);
    let node_key = rcgen::KeyPair::generate().unwrap();
    let node = rcgen::CertificateParams::new(vec![host.to_string()]).unwrap();
    let node = node.signed_by(&node_key, &issuer).unwrap();
    (ca.pem(), node.pem(), node_key.serialize_pem())
}

fn peer_tls(client_of: &(String, String, String), server_of: &(String, String, String)) -> PeerTls {
    let client = TlsIdentity { certificate: client_of.1.as_bytes(), key: client_of.2.as_bytes() };
    let server = TlsIdentity { certificate: server_of.1.as_bytes(), key: server_of.2.as_bytes() };
    let ca = server_of.0.as_bytes();
    PeerTls { server: tls_server(server, Some(ca)).unwrap(), client: tls_client(ca, Some(client)).unwrap() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn peers_with_certificates_of_the_cluster_replicate_over_tls() {
    let host = own_loopback();
    let ours = certificates(host);
    let cluster = Cluster::start_on(host, 3, Some(peer_tls(&ours, &ours))).await;
    let last = cluster.publish(1).await;
    cluster.converge(last.position.index).await;
    for node in cluster.running() {
        assert_eq!(payloads(&node.group), [1]);
    }
}

/// The secret may leak; a node without a certificate of the cluster is still kept out.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_with_a_certificate_of_another_ca_is_kept_out() {
    let host = own_loopback();
    let (ours, theirs) = (certificates(host), certificates(host));
    let mut cluster = Cluster::start_on(host, 3, Some(peer_tls(&ours, &ours))).await;
    cluster.publish(1).await;
    cluster.stop(3).await;
    cluster.tls = Some(peer_tls(&theirs, &ours));
    cluster.restart(3).await;
    cluster.publish(2).await;
    // Node 3 accepts connections, so it follows; it can reach nobody itself.
    let intruder = cluster.node(3);
    assert!(intruder.host.forward(NodeId(1), "any", Bytes::new()).await.is_err());
    assert!(!intruder.host.peer_reachable(NodeId(1)) && !intruder.host.peer_reachable(NodeId(2)));
}

fn damage_vote(dir: &Path) {
    let mut found = 0;
    let mut dirs = vec![dir.to_owned()];
    while let Some(dir) = dirs.pop() {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                dirs.push(path);
            } else if path.file_name().unwrap().to_str().unwrap().contains("vote") {
                let mut bytes = std::fs::read(&path).unwrap();
                bytes.iter_mut().for_each(|byte| *byte ^= 0x55);
                std::fs::write(&path, bytes).unwrap();
                found += 1;
            }
        }
    }
    assert!(found > 0, "there is a vote to damage");
}

/// A replica that lost its vote could vote twice in a term: it must not take part at all, and the
/// others must go on without it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_without_its_vote_is_quarantined_and_the_others_go_on() {
    let mut cluster = Cluster::start(3).await;
    cluster.publish(1).await;
    cluster.stop(3).await;
    damage_vote(&cluster.data(3));
    let bound = listener(&cluster.addresses[2].1).await;
    let error = cluster.open(3, bound).await.err().expect("it must not open");
    assert!(matches!(error, OpenError::Quarantined { .. }), "{error}");
    cluster.publish(2).await;
    let last = cluster.publish(3).await;
    cluster.converge(last.position.index).await;
}

/// A replica that was away while history was trimmed must end with the same log start and all
/// that is retained, and nothing that was acknowledged since.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_behind_the_log_start_gets_everything_that_is_retained() {
    let mut cluster = Cluster::start(3).await;
    cluster.publish(1).await;
    cluster.stop(3).await;
    let mut middle = None;
    for payload in 2..=60 {
        let applied = cluster.publish(payload).await;
        if payload == 40 {
            middle = Some(applied.position);
        }
    }
    let through = middle.unwrap();
    cluster.converge(through.index).await;
    for node in cluster.running() {
        node.group.trim(through).await.unwrap();
        let mut purged = Box::pin(node.group.trimmed(through));
        timeout(PATIENCE, &mut purged).await.expect("trimmed in time");
        assert_eq!(node.group.log().log_start(), Offset(40));
    }
    cluster.restart(3).await;
    let last = cluster.publish(61).await;
    cluster.converge(last.position.index).await;
    for id in 1..=3 {
        assert_eq!(payloads(&cluster.node(id).group), (41..=61).collect::<Vec<_>>(), "node {id}");
    }
    // And once more from their own disks.
    for id in 1..=3 {
        cluster.stop(id).await;
    }
    for id in 1..=3 {
        cluster.restart(id).await;
    }
    let last = cluster.publish(62).await;
    assert_eq!(last.base_offset, Offset(61));
    cluster.converge(last.position.index).await;
    for id in 1..=3 {
        assert_eq!(payloads(&cluster.node(id).group), (41..=62).collect::<Vec<_>>(), "node {id}");
    }
}

// A leader with a newer program writes an entry that this node's program does not know. Passed over, it would leave a
// replica that says it has applied the entry and has a state of its own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_entry_of_a_newer_program_stops_the_group_and_is_never_passed_over() {
    let mut cluster = Cluster::start(1).await;
    let before = cluster.publish(10).await.position.index;
    let (_, leader) = cluster.leader().await;
    let newer = Batch::internal(BatchKind::Control, Bytes::from_static(support::NEWER));
    let proposal = leader.group.propose(leader.group.status().term, newer).await.unwrap();
    assert!(timeout(PATIENCE, proposal).await.expect("an answer in time").is_err());
    let told = format!("entry 1-{} cannot be applied: entry is newer than this program", before.0 + 1);
    let node = cluster.node(1);
    let mut watch = node.group.watch();
    let stopped = watch.wait_for(|status| status.stopped.is_some());
    let reason = timeout(PATIENCE, stopped).await.expect("a stop in time").unwrap().stopped.clone().unwrap();
    assert!(reason.contains(&told), "{reason}");
    assert_eq!(node.group.readable().borrow().index, Some(before));
    cluster.stop(1).await;
    let bound = listener(&cluster.addresses[0].1).await;
    let refused = cluster.open(1, bound).await.err().expect("the entry is in the way at a start too").to_string();
    assert!(refused.contains(&told), "{refused}");
}

#[test]
fn control_entries_take_no_offsets() {
    let control = Batch::internal(BatchKind::Control, Bytes::from_static(b"x"));
    assert_eq!(control.header.record_count, 0);
    assert_eq!(control.header.next_offset(), control.header.base_offset);
}

/// A node that would not be missed yet must not vote: lost and come back empty, it would vote a second time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_may_not_vote_yet_stays_a_learner_however_much_it_has_copied() {
    let mut cluster = Cluster::start(3).await;
    cluster.publish(1).await;
    let (first, _) = cluster.leader().await;
    let learner = first % 3 + 1;
    let replica = |node: u64| ReplicaId(100 + node);
    let wanted = |nodes: &[u64], voters: &[u64]| WantedMembers {
        replicas: nodes.iter().map(|node| (replica(*node), NodeId(*node))).collect(),
        eligible: voters.iter().map(|node| replica(*node)).collect(),
        reachable: (1..=3).map(NodeId).collect(),
        one_by_one: true,
    };
    let others: Vec<u64> = (1..=3).filter(|node| *node != learner).collect();
    let step = async |wanted: &WantedMembers| loop {
        let (_, leader) = cluster.leader().await;
        match leader.group.step_members(wanted).await {
            Ok(MembersStep::Changed | MembersStep::HandedOver) | Err(_) => {}
            Ok(step) => return step,
        }
    };
    assert_eq!(step(&wanted(&others, &others)).await, MembersStep::Done);
    let not_yet = wanted(&[1, 2, 3], &others);
    let copied = async || loop {
        match step(&not_yet).await {
            MembersStep::CatchingUp { behind: 0 } => return,
            MembersStep::CatchingUp { .. } => tokio::task::yield_now().await,
            step => panic!("{step:?}"),
        }
    };
    timeout(PATIENCE, copied()).await.expect("the learner copies the log");
    let last = cluster.publish(2).await;
    cluster.converge(last.position.index).await;
    assert!(!cluster.leader().await.1.group.voters().contains_key(&replica(learner)));
    timeout(PATIENCE, copied()).await.expect("it stays one");
    let done = async || while step(&wanted(&[1, 2, 3], &[1, 2, 3])).await != MembersStep::Done {};
    timeout(PATIENCE, done()).await.expect("it votes when it may");
    assert!(cluster.leader().await.1.group.voters().contains_key(&replica(learner)));
    for id in 1..=3 {
        cluster.stop(id).await;
    }
}
