//! Damaged entries of one replica come back from the others, to the last bit, while the group goes on.
#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod support;

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use arqon_proto::{NodeId, Offset, RaftIndex};
use arqon_raft::OpenError;
use arqon_storage::{
    Disk, DiskSpace, FaultyDisk, Identity, MemoryDisk, Operation, Options, ReadError, SpaceState, Store,
};
use bytes::Bytes;
use support::{GROUP, Node, PATIENCE, batch, open_node, payloads};
use tokio::{net::TcpListener, time::timeout};

/// Byte at which the batches of a segment begin.
const DATA_AT: usize = 12_288;
const PAYLOAD_SIZE: usize = 600;
const COUNT: usize = 60;

/// Three nodes on disks in memory, whose bytes a test may change.
struct Cluster {
    addresses: Vec<(NodeId, String)>,
    disks: Vec<MemoryDisk>,
    /// What each node sees of its disk.
    seen: Mutex<[Option<FaultyDisk>; 3]>,
    nodes: Vec<Option<Node>>,
}

impl Cluster {
    async fn start() -> Self {
        let addresses = (1..=3).map(|id| (NodeId(id), String::new())).collect();
        let disks = (0..3).map(|_| MemoryDisk::new()).collect();
        let mut cluster = Self { addresses, disks, seen: Mutex::default(), nodes: vec![None, None, None] };
        // All of them at once: a replica that opens may need another.
        let listeners = cluster.listeners(&[0, 1, 2]).await;
        for (at, listener) in listeners {
            cluster.nodes[at] = Some(cluster.open(at, listener).await);
        }
        cluster
    }

    async fn listeners(&mut self, which: &[usize]) -> Vec<(usize, TcpListener)> {
        let mut listeners = Vec::new();
        for at in which {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            self.addresses[*at].1 = listener.local_addr().unwrap().to_string();
            listeners.push((*at, listener));
        }
        for node in self.nodes.iter().flatten() {
            node.host.set_peers(self.addresses.clone());
        }
        listeners
    }

    /// Little is kept in memory, so that reads go to the disk.
    async fn open(&self, at: usize, listener: TcpListener) -> Node {
        self.try_open(at, listener).await.unwrap()
    }

    async fn try_open(&self, at: usize, listener: TcpListener) -> Result<Node, OpenError> {
        let id = at as u64 + 1;
        let identity = Identity { cluster: "test".into(), node: NodeId(id) };
        let options = Options {
            segment_size_first: 24 << 10,
            segment_size_max: 24 << 10,
            index_step: 4 << 10,
            recent_size_max: 1 << 10,
            fill_size: 4 << 10,
            scrub_rate_max: 0,
            ..Options::default()
        };
        let disk = FaultyDisk::new(Arc::new(self.disks[at].again()));
        self.seen.lock().unwrap()[at] = Some(disk.clone());
        let store = Store::open_on(Arc::new(disk), identity, options).unwrap();
        open_node(id, &self.addresses, store, listener, None).await
    }

    async fn stop(&mut self, which: &[usize]) {
        for at in which {
            let node = self.nodes[*at].take().unwrap();
            node.host.shutdown().await;
        }
    }

    /// Opens nodes side by side, as processes do.
    async fn restart(&mut self, which: &[usize]) {
        let listeners = self.listeners(which).await;
        for at in which {
            // As another process has it: with a lock of its own.
            self.disks[*at] = MemoryDisk::copy_of(&self.disks[*at]);
        }
        let opening = listeners.into_iter().map(async |(at, listener)| (at, self.open(at, listener).await));
        for (at, node) in futures_util::future::join_all(opening).await {
            self.nodes[at] = Some(node);
        }
    }

    fn node(&self, at: usize) -> &Node {
        self.nodes[at].as_ref().unwrap()
    }

    async fn leader(&self) -> usize {
        let ready = self.nodes.iter().enumerate().filter_map(|(at, node)| {
            let mut watch = node.as_ref()?.group.watch();
            Some(Box::pin(async move {
                watch.wait_for(|status| status.ready).await.unwrap();
                at
            }))
        });
        timeout(PATIENCE, futures_util::future::select_all(ready)).await.expect("a leader").0
    }

    /// Appends payloads and waits until all running replicas have them.
    async fn publish(&self, numbers: std::ops::Range<usize>) {
        let mut last = None;
        for number in numbers {
            let group = &self.node(self.leader().await).group;
            let proposal = group.propose(group.status().term, batch(payload(number))).await.unwrap();
            last = Some(timeout(PATIENCE, proposal).await.expect("an answer").unwrap().position.index);
        }
        for node in self.nodes.iter().flatten() {
            let mut readable = node.group.readable();
            let reached = readable.wait_for(|readable| readable.index >= last);
            timeout(PATIENCE, reached).await.expect("convergence").unwrap();
            // The committed position is on disk with the mark, which comes a moment later.
            node.group.log().save_vote(node.group.log().vote().unwrap()).await.unwrap();
        }
    }

    /// The first segment of a replica, which is full.
    fn segment(&self, at: usize) -> String {
        let dir = format!("logs/{GROUP}-{}", 101 + at);
        let names = self.disks[at].list(&dir).unwrap();
        let segments: Vec<_> = names.iter().filter(|name| name.ends_with(".seg")).collect();
        assert!(segments.len() > 2, "{segments:?}");
        format!("{dir}/{}", segments[0])
    }

    /// The same in the records, in whichever segment the entry stands.
    fn damage_retained(&self, at: usize, number: usize) {
        let dir = format!("logs/{GROUP}-{}", 101 + at);
        let names = self.disks[at].list(&dir).unwrap();
        let segments = names.iter().filter(|name| name.ends_with(".seg"));
        let wanted = payload(number);
        for path in segments.map(|name| format!("{dir}/{name}")) {
            let mut bytes = self.disks[at].bytes(&path).unwrap();
            if let Some(found) = bytes.windows(PAYLOAD_SIZE).position(|bytes| bytes == wanted) {
                bytes[found + 77] ^= 8;
                return self.disks[at].set_bytes(&path, &bytes).unwrap();
            }
        }
        panic!("payload {number} is in no segment of {dir}");
    }

    /// Flips a bit of the header or the records of the entry with that payload.
    fn damage(&self, at: usize, number: usize, header: bool) -> (String, Vec<u8>) {
        let path = self.segment(at);
        let whole = self.disks[at].bytes(&path).unwrap();
        let wanted = payload(number);
        let found = whole.windows(PAYLOAD_SIZE).position(|bytes| bytes == wanted).unwrap();
        let mut bytes = whole.clone();
        bytes[if header { found - 32 - 100 } else { found + 77 }] ^= 8;
        assert_ne!(bytes, whole);
        self.disks[at].set_bytes(&path, &bytes).unwrap();
        (path, whole)
    }

    /// Changes what is free on a node's disk, and waits until it has noticed.
    async fn set_space(&self, at: usize, space: Option<DiskSpace>, state: SpaceState) {
        self.seen.lock().unwrap()[at].as_ref().unwrap().set_space(space);
        let log = self.node(at).group.log();
        let noticed = async {
            while log.store_space().state != state {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        timeout(PATIENCE, noticed).await.expect("the space is looked at");
    }

    /// Waits until a replica has repaired something and nothing is damaged any more.
    async fn repaired(&self, at: usize) {
        let host = &self.node(at).host;
        let done = async {
            loop {
                let summary = host.damage_summary();
                if summary.iter().any(|one| one.repaired_count > 0 && one.damaged.is_empty()) {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        let repaired = timeout(PATIENCE, done).await;
        repaired.unwrap_or_else(|_| panic!("not repaired: {:?}", host.damage_summary()));
    }

    fn assert_whole(&self, at: usize, count: usize) {
        let expected: Vec<Bytes> = (0..count).map(|number| payload(number).into()).collect();
        assert!(payloads(&self.node(at).group) == expected, "replica {at} differs");
    }
}

/// Bytes that say which one it is.
fn payload(number: usize) -> Vec<u8> {
    format!("payload {number:04} ").bytes().cycle().take(PAYLOAD_SIZE).collect()
}

fn data_of(bytes: &[u8]) -> &[u8] {
    &bytes[DATA_AT..]
}

/// Reads the records at `offset` as a consumer would.
fn read(node: &Node, offset: usize) -> Result<Bytes, ReadError> {
    let through = node.group.readable().borrow().index.unwrap();
    let batches = node.group.log().read_data(Offset(offset as u64), through, 1)?;
    Ok(batches[0].records.slice(32..))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn damage_of_a_stopped_replica_is_repaired_when_it_comes_back() {
    let mut cluster = Cluster::start().await;
    cluster.publish(0..COUNT).await;
    for (at, header) in [(0, true), (1, false), (2, true)] {
        cluster.stop(&[at]).await;
        let (path, whole) = cluster.damage(at, 4, header);
        cluster.restart(&[at]).await;
        if !header {
            // Records are looked at when they are read.
            assert!(matches!(read(cluster.node(at), 4), Err(ReadError::Damaged { .. }) | Ok(_)));
        }
        cluster.repaired(at).await;
        cluster.assert_whole(at, COUNT);
        let found = cluster.disks[at].bytes(&path).unwrap();
        assert!(data_of(&found) == data_of(&whole), "the file is not what it was");
    }
    cluster.publish(COUNT..COUNT + 5).await;
    cluster.stop(&[0, 1, 2]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn damage_met_by_a_reader_is_an_error_first_and_then_repaired_in_use() {
    let mut cluster = Cluster::start().await;
    cluster.publish(0..COUNT).await;
    let leader = cluster.leader().await;
    let (path, whole) = cluster.damage(leader, 5, true);
    let error = read(cluster.node(leader), 5).unwrap_err();
    assert!(matches!(error, ReadError::Damaged { first: Offset(5), last: Offset(5), .. }), "{error}");
    // Everything else goes on.
    assert_eq!(read(cluster.node(leader), 6).unwrap(), payload(6));
    cluster.publish(COUNT..COUNT + 3).await;
    cluster.repaired(leader).await;
    assert_eq!(read(cluster.node(leader), 5).unwrap(), payload(5));
    assert!(data_of(&cluster.disks[leader].bytes(&path).unwrap()) == data_of(&whole));
    cluster.assert_whole(leader, COUNT + 3);
    cluster.stop(&[0, 1, 2]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_whole_segment_comes_back_and_two_replicas_repair_each_other() {
    let mut cluster = Cluster::start().await;
    cluster.publish(0..COUNT).await;
    cluster.stop(&[0, 1, 2]).await;
    // One has lost a file, another one an entry of the same: the third has both.
    cluster.damage(1, 3, true);
    let path = cluster.segment(0);
    cluster.disks[0].remove(&path).unwrap();
    cluster.disks[0].sync_dir(&path[..path.rfind('/').unwrap()]).unwrap();
    cluster.restart(&[0, 1, 2]).await;
    for at in [0, 1] {
        cluster.repaired(at).await;
        cluster.assert_whole(at, COUNT);
    }
    // And where no single replica has everything, each gives what it has.
    cluster.stop(&[0, 1, 2]).await;
    for (at, numbers) in [(0, [2, 3]), (1, [3, 4]), (2, [5, 6])] {
        numbers.into_iter().for_each(|number| drop(cluster.damage(at, number, true)));
    }
    cluster.restart(&[0, 1, 2]).await;
    for at in 0..3 {
        cluster.repaired(at).await;
        cluster.assert_whole(at, COUNT);
    }
    cluster.publish(COUNT..COUNT + 3).await;
    cluster.stop(&[0, 1, 2]).await;
}

/// The same record bad on every replica is gone. It is told so, by its offsets; everything else is
/// served and written, and nobody gets other bytes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_record_that_is_bad_everywhere_is_a_clear_error() {
    let mut cluster = Cluster::start().await;
    cluster.publish(0..COUNT).await;
    for at in 0..3 {
        cluster.damage(at, 4, at == 1);
    }
    cluster.publish(COUNT..COUNT + 1).await;
    for at in 0..3 {
        let error = read(cluster.node(at), 4).unwrap_err();
        assert!(matches!(error, ReadError::Damaged { first: Offset(4), last: Offset(4), .. }), "{error}");
    }
    let given_up = async {
        while !cluster.node(0).host.damage_summary().iter().any(|one| one.problem.is_some()) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, given_up).await.expect("the operator is told");
    let summary = cluster.node(0).host.damage_summary().remove(0);
    assert_eq!((summary.repaired_count, summary.damaged.len()), (0, 1), "{summary:?}");
    assert!(summary.problem.unwrap().contains("node 2"));
    for at in 0..3 {
        assert!(matches!(read(cluster.node(at), 4), Err(ReadError::Damaged { .. })));
        for number in (0..COUNT).filter(|number| *number != 4) {
            assert_eq!(read(cluster.node(at), number).unwrap(), payload(number));
        }
        assert_eq!(cluster.node(at).group.stopped(), None);
    }
    cluster.publish(COUNT + 1..COUNT + 3).await;
    cluster.stop(&[0, 1, 2]).await;
}

/// The story: a follower was away, and what it lacks is damaged on the leader. The leader gets it from the
/// third replica first, and the follower catches up.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_repairs_what_a_follower_lacks() {
    let mut cluster = Cluster::start().await;
    cluster.publish(0..1).await;
    let leader = cluster.leader().await;
    let away = (leader + 1) % 3;
    cluster.stop(&[away]).await;
    cluster.publish(1..COUNT).await;
    cluster.damage(leader, 7, false);
    cluster.damage(leader, 9, true);
    // The leader goes on trying to send from entry 1 on, and so meets the damage.
    let host = &cluster.node(leader).host;
    let repaired = async {
        while !host.damage_summary().iter().any(|one| one.repaired_count == 2) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, repaired).await.unwrap_or_else(|_| panic!("{:?}", host.damage_summary()));
    cluster.restart(&[away]).await;
    let mut readable = cluster.node(away).group.readable();
    let last = cluster.node(leader).group.readable().borrow().index;
    let caught_up = readable.wait_for(|readable| readable.index >= last);
    timeout(PATIENCE, caught_up).await.expect("the follower gets everything").unwrap();
    cluster.assert_whole(away, COUNT);
    cluster.assert_whole(leader, COUNT);
    assert_eq!(cluster.node(leader).group.stopped(), None);
    cluster.stop(&[0, 1, 2]).await;
}

/// The story: a follower was away, and what it lacks is damaged on the leader; the third replica has not got it to
/// give either. Perhaps it can read more as a leader, so leadership goes there; but it does not go round for ever, and
/// writes go on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_cannot_read_what_a_follower_lacks_gives_way() {
    let mut cluster = Cluster::start().await;
    cluster.publish(0..1).await;
    let other = cluster.leader().await;
    let (away, leader) = ((other + 1) % 3, (other + 2) % 3);
    cluster.stop(&[away]).await;
    cluster.publish(1..COUNT).await;
    cluster.damage(other, 7, false);
    cluster.damage(leader, 7, false);
    // Whoever leads already may have read what it sends next; who begins to has to read it.
    cluster.node(other).group.transfer_leader(NodeId(leader as u64 + 1)).await.unwrap();
    let mut watch = cluster.node(leader).group.watch();
    let leads = watch.wait_for(|status| status.ready);
    let term = timeout(PATIENCE, leads).await.expect("it leads").unwrap().term;
    // The leader meets the damage when the follower is back and asks for what it lacks, and gives way; so does the other
    // replica, as the follower cannot be elected. Whoever leads again keeps leadership, whatever comes of further attempts.
    cluster.restart(&[away]).await;
    let leads_again = watch.wait_for(|status| status.ready && status.term > term);
    let leads_again =
        timeout(PATIENCE, leads_again).await.expect("leadership goes to the other replica and comes back");
    let term = leads_again.unwrap().term;
    let summary = || cluster.node(leader).host.damage_summary().remove(0);
    assert!(summary().problem.is_some(), "{:?}", summary());
    let before = summary().failed_count;
    let tried = async {
        while summary().failed_count < before + 2 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, tried).await.expect("it goes on trying");
    let status = cluster.node(leader).group.status();
    assert!(status.ready && status.term == term, "leadership goes round: {term:?}, then {status:?}");
    cluster.stop(&[away]).await;
    cluster.publish(COUNT..COUNT + 3).await;
    for at in [leader, other] {
        assert_eq!(read(cluster.node(at), COUNT + 2).unwrap(), payload(COUNT + 2));
        assert_eq!(cluster.node(at).group.stopped(), None);
    }
    cluster.stop(&[leader, other]).await;
}

/// The story: a leader whose disk has become slow hands over, as a node does with all that it leads. Entries wait for
/// that disk all the time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_hands_over_while_entries_wait_for_its_slow_disk() {
    let mut cluster = Cluster::start().await;
    cluster.publish(0..1).await;
    let leader = cluster.leader().await;
    let heir = (leader + 1) % 3;
    let disk = cluster.seen.lock().unwrap()[leader].clone().unwrap();
    disk.delay(Operation::Sync, 700);
    let group = cluster.node(leader).group.clone();
    let term = group.status().term;
    for number in 1..10 {
        let proposal = group.propose(term, batch(payload(number))).await.unwrap();
        timeout(PATIENCE, proposal).await.expect("the others commit").unwrap();
    }
    group.transfer_leader(NodeId(heir as u64 + 1)).await.unwrap();
    let mut watch = cluster.node(heir).group.watch();
    let leads = watch.wait_for(|status| status.is_leader);
    timeout(PATIENCE, leads).await.expect("the heir leads").unwrap();
    disk.delay(Operation::Sync, 0);
    let mut watch = group.watch();
    let follows = watch.wait_for(|status| !status.is_leader);
    timeout(PATIENCE, follows).await.expect("the old leader follows").unwrap();
    cluster.publish(10..12).await;
    cluster.stop(&[0, 1, 2]).await;
}

/// The story: the disks of both followers fill. They refuse data before openraft sees it, so nobody
/// fails; what the leader has waits, and is committed when there is space again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn followers_with_a_full_disk_refuse_data_until_there_is_space() {
    let mut cluster = Cluster::start().await;
    cluster.publish(0..3).await;
    let leader = cluster.leader().await;
    let followers = [(leader + 1) % 3, (leader + 2) % 3];
    let before = followers.map(|at| cluster.node(at).group.log().last());
    for at in followers {
        cluster.set_space(at, Some(DiskSpace { free_size: 0, total_size: 1 << 40 }), SpaceState::Full).await;
    }
    let group = cluster.node(leader).group.clone();
    let mut proposal = group.propose(group.status().term, batch(payload(3))).await.unwrap();
    assert!(timeout(Duration::from_millis(700), &mut proposal).await.is_err(), "acknowledged by nobody's disk");
    assert_eq!(followers.map(|at| cluster.node(at).group.log().last()), before);
    for at in followers {
        cluster.set_space(at, None, SpaceState::Enough).await;
    }
    timeout(PATIENCE, proposal).await.expect("committed when there is space").unwrap();
    cluster.publish(4..6).await;
    for at in 0..3 {
        assert_eq!(cluster.node(at).group.stopped(), None);
        cluster.assert_whole(at, 6);
    }
    cluster.stop(&[0, 1, 2]).await;
}

/// A state that does not open is made again: from the log when all of it is there, not at all when its
/// start is gone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_checkpoint_is_made_again_from_the_log_or_quarantines() {
    let mut cluster = Cluster::start().await;
    // A clean stop saves the state after a quarter of a megabyte.
    cluster.publish(0..450).await;
    let at = (cluster.leader().await + 1) % 3;
    let dir = format!("logs/{GROUP}-{}", 101 + at);
    let spoil = |disk: &MemoryDisk| {
        let names = disk.list(&dir).unwrap();
        let checkpoints: Vec<_> = names.iter().filter(|name| name.starts_with("checkpoint")).collect();
        assert!(!checkpoints.is_empty(), "{names:?}");
        for name in checkpoints {
            let path = format!("{dir}/{name}");
            let bytes = disk.bytes(&path).unwrap();
            disk.set_bytes(&path, &bytes[..bytes.len() / 2]).unwrap();
        }
    };
    cluster.stop(&[at]).await;
    spoil(&cluster.disks[at]);
    cluster.restart(&[at]).await;
    cluster.publish(450..455).await;
    cluster.assert_whole(at, 455);
    // The answer of the state machine counts what it has applied.
    cluster.node(cluster.leader().await).group.transfer_leader(NodeId(at as u64 + 1)).await.unwrap();
    let mut watch = cluster.node(at).group.watch();
    timeout(PATIENCE, watch.wait_for(|status| status.ready)).await.expect("it leads").unwrap();
    let group = cluster.node(at).group.clone();
    let proposal = group.propose(group.status().term, batch(payload(455))).await.unwrap();
    let applied = timeout(PATIENCE, proposal).await.expect("an answer").unwrap();
    assert_eq!(applied.outcome, vec![(456 % 256) as u8]);

    let through = group.log().last_segment_boundary(RaftIndex(200)).unwrap();
    group.trim(through).await.unwrap();
    timeout(PATIENCE, group.trimmed(through)).await.expect("trimmed");
    drop(group);
    cluster.stop(&[at]).await;
    spoil(&cluster.disks[at]);
    cluster.disks[at] = MemoryDisk::copy_of(&cluster.disks[at]);
    let listener = cluster.listeners(&[at]).await.remove(0).1;
    let error = cluster.try_open(at, listener).await.err().expect("it must not open");
    assert!(matches!(&error, OpenError::Quarantined { reason, .. } if reason.contains("checkpoint")), "{error}");
}

/// Trims a replica at the newest segment boundary at or before `index`.
async fn trim(node: &Node, index: u64) -> std::io::Result<()> {
    let through = node.group.log().last_segment_boundary(RaftIndex(index)).unwrap();
    node.group.trim(through).await?;
    timeout(PATIENCE, node.group.trimmed(through)).await.expect("trimmed");
    Ok(())
}

/// Waits until a node says that its replica may not run any more, and why.
async fn given_up(node: &Node) -> String {
    let given_up = async {
        loop {
            if let Some((_, reason)) = node.host.quarantined().into_iter().find(|(group, _)| *group == GROUP) {
                return reason;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let given_up = timeout(PATIENCE, given_up).await;
    given_up.unwrap_or_else(|_| panic!("it goes on: {:?}", node.host.damage_summary()))
}

/// The story: nobody has read the entry since it went bad, until the log start passes it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn damage_that_is_met_by_a_trim_is_repaired_first() {
    let mut cluster = Cluster::start().await;
    cluster.publish(0..COUNT).await;
    cluster.damage(0, 4, false);
    cluster.damage(0, 7, true);
    trim(cluster.node(0), 40).await.unwrap();
    assert!(cluster.node(0).group.log().log_start() > Offset(8));
    for at in [1, 2] {
        trim(cluster.node(at), 40).await.unwrap();
    }
    cluster.publish(COUNT..COUNT + 2).await;
    for at in 0..3 {
        assert_eq!(cluster.node(at).group.stopped(), None);
    }
    cluster.stop(&[0, 1, 2]).await;
}

/// The story: the others have dropped the entry already. One of them that still has it is enough; when both
/// have not, the replica can neither be trimmed nor repaired, and makes room for a copy.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_needs_what_a_majority_has_purged_is_given_up() {
    let mut cluster = Cluster::start().await;
    cluster.publish(0..COUNT).await;
    let leader = cluster.leader().await;
    let [at, second, third] = [(leader + 1) % 3, (leader + 2) % 3, leader];
    trim(cluster.node(second), 40).await.unwrap();
    cluster.damage(at, 4, false);
    trim(cluster.node(at), 20).await.unwrap();
    trim(cluster.node(third), 40).await.unwrap();
    cluster.publish(COUNT..COUNT + 1).await;
    assert_eq!(cluster.node(at).host.quarantined(), []);

    // It is lost here, and nobody needs it: the replica goes on.
    let start = cluster.node(at).group.log().log_start().0 as usize;
    cluster.damage_retained(at, start + 1);
    assert!(matches!(read(cluster.node(at), start + 1), Err(ReadError::Damaged { .. })));
    let told = async {
        while !cluster.node(at).host.damage_summary().iter().any(|one| one.problem.is_some()) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, told).await.expect("the operator is told");
    assert_eq!(cluster.node(at).host.quarantined(), []);
    let group = cluster.node(at).group.clone();
    assert!(trim(cluster.node(at), 40).await.is_err());
    let reason = given_up(cluster.node(at)).await;
    assert!(reason.contains("a majority has purged"), "{reason}");
    let stopped = async {
        while group.stopped().is_none() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, stopped).await.expect("it takes no part any more");
    drop(group);
    // The others are a majority.
    cluster.stop(&[at]).await;
    cluster.publish(COUNT + 1..COUNT + 3).await;
    cluster.stop(&[second, third]).await;
}

/// The story: a replica was away while the others trimmed their logs. What it has to apply again is damaged,
/// and nobody has it any more.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_cannot_apply_what_a_majority_has_purged_is_given_up() {
    let mut cluster = Cluster::start().await;
    cluster.publish(0..COUNT).await;
    let at = (cluster.leader().await + 1) % 3;
    cluster.stop(&[at]).await;
    cluster.damage(at, 4, false);
    for other in (0..3).filter(|other| *other != at) {
        trim(cluster.node(other), 40).await.unwrap();
    }
    cluster.disks[at] = MemoryDisk::copy_of(&cluster.disks[at]);
    let listener = cluster.listeners(&[at]).await.remove(0).1;
    let error = cluster.try_open(at, listener).await.err().expect("it must not open");
    let OpenError::Quarantined { reason, .. } = &error else { panic!("{error}") };
    assert!(reason.contains("a majority has purged"), "{reason}");
    cluster.publish(COUNT..COUNT + 2).await;
    cluster.stop(&[0, 1, 2].into_iter().filter(|other| *other != at).collect::<Vec<_>>()).await;
}

/// The story: a leader has lost the checkpoint at its log start, and a follower needs it. Nothing ends; the
/// follower gets it from another leader.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_without_its_checkpoint_gives_way_to_one_that_has_it() {
    let mut cluster = Cluster::start().await;
    cluster.publish(0..1).await;
    let leader = cluster.leader().await;
    let [away, heir] = [(leader + 1) % 3, (leader + 2) % 3];
    cluster.stop(&[away]).await;
    cluster.publish(1..COUNT).await;
    for at in [leader, heir] {
        trim(cluster.node(at), 40).await.unwrap();
    }
    let dir = format!("logs/{GROUP}-{}", 101 + leader);
    let names = cluster.disks[leader].list(&dir).unwrap();
    let checkpoints: Vec<_> = names.iter().filter(|name| name.starts_with("checkpoint")).collect();
    assert!(!checkpoints.is_empty(), "{names:?}");
    for name in checkpoints {
        let path = format!("{dir}/{name}");
        let bytes = cluster.disks[leader].bytes(&path).unwrap();
        cluster.disks[leader].set_bytes(&path, &bytes[..bytes.len() / 2]).unwrap();
    }
    cluster.restart(&[away]).await;
    let mut readable = cluster.node(away).group.readable();
    let caught_up = readable.wait_for(|readable| readable.index >= Some(RaftIndex(COUNT as u64)));
    timeout(PATIENCE, caught_up).await.expect("the follower gets the state").unwrap();
    for at in 0..3 {
        assert_eq!(cluster.node(at).group.stopped(), None);
    }
    assert_eq!(cluster.leader().await, heir);
    cluster.publish(COUNT..COUNT + 2).await;
    cluster.stop(&[0, 1, 2]).await;
}

/// Nothing that is not committed is given away, and nothing that was never asked for is believed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn indexes_beyond_the_log_are_no_damage() {
    let mut cluster = Cluster::start().await;
    cluster.publish(0..3).await;
    for at in 0..3 {
        let log = cluster.node(at).group.log();
        assert!(log.entries(RaftIndex(1_000)..RaftIndex(1_001), 1).unwrap().is_empty());
        assert_eq!(cluster.node(at).host.damage_summary(), []);
    }
    cluster.stop(&[0, 1, 2]).await;
}
