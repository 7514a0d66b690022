//! What the tests of groups share: a small state machine, batches, and a node in this process.

#[allow(dead_code, reason = "not every test restarts a node on its port")]
pub mod loopback;

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use arqon_proto::{
    Batch, BatchBuilder, BatchKind, Compression, DecodeError, GroupId, NodeId, Offset, Record, ReplicaId,
};
use arqon_raft::{Group, GroupSpec, Host, HostOptions, OpenError, PeerTls, StateMachine};
use arqon_storage::Store;
use bytes::Bytes;
use tokio::net::TcpListener;

pub const GROUP: GroupId = GroupId(7);
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Remembers the sizes of the records that it applied, in order.
#[derive(Clone, Default)]
pub struct Sizes(pub Arc<Mutex<Vec<u8>>>);

/// A control entry that only a newer program knows.
pub const NEWER: &[u8] = b"newer";

impl StateMachine for Sizes {
    fn apply(&mut self, batch: &Batch) -> Result<Bytes, DecodeError> {
        if batch.header.kind == BatchKind::Control && batch.records == NEWER {
            return Err(DecodeError::Unknown { what: "entry" });
        }
        let mut sizes = self.0.lock().unwrap();
        sizes.push(batch.header.records_size as u8);
        Ok(Bytes::from(vec![sizes.len() as u8]))
    }

    fn checkpoint(&self) -> Bytes {
        self.0.lock().unwrap().clone().into()
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), DecodeError> {
        *self.0.lock().unwrap() = state.to_vec();
        Ok(())
    }

    fn fresh(&self) -> Box<dyn StateMachine> {
        Box::new(Self::default())
    }
}

pub struct Node {
    pub host: Host,
    pub group: Group,
    #[expect(dead_code, reason = "not every test looks at the applied state")]
    pub applied: Sizes,
}

/// Starts node `id` with its replica of the one group; `addresses` are those of all nodes.
pub async fn open_node(
    id: u64,
    addresses: &[(NodeId, String)],
    store: Store,
    peer_listener: TcpListener,
    tls: Option<PeerTls>,
) -> Result<Node, OpenError> {
    let options = HostOptions { node: NodeId(id), cluster: "test".into(), secret: vec![1; 32], tls, peer_listener };
    let host = Host::start(options, store);
    host.set_peers(addresses.to_vec());
    let initial = addresses.iter().map(|(node, _)| (ReplicaId(100 + node.0), *node)).collect();
    let applied = Sizes::default();
    let replica = ReplicaId(100 + id);
    let spec = GroupSpec {
        group: GROUP,
        replica,
        initial,
        may_create: true,
        first: id == 1,
        followers_act: false,
        owner: "test".to_owned(),
    };
    match host.open(spec, Box::new(applied.clone())).await {
        Ok(group) => Ok(Node { host, group, applied }),
        Err(error) => {
            host.shutdown().await;
            Err(error)
        }
    }
}

/// A batch of one record.
pub fn batch(payload: Vec<u8>) -> Batch {
    let mut builder = BatchBuilder::new();
    builder.push(&Record { payload: payload.into(), ..Default::default() }).unwrap();
    builder.build(Compression::None, None)
}

/// All payloads that a replica lets readers see, by offset.
pub fn payloads(group: &Group) -> Vec<Bytes> {
    let through = group.readable().borrow().index.unwrap();
    let mut next = group.log().log_start();
    let mut out = Vec::new();
    loop {
        let batches = group.log().read_data(next, through, 1 << 20).unwrap();
        let Some(last) = batches.last() else { return out };
        assert_eq!(batches[0].header.base_offset, next, "no gap between reads");
        next = last.header.next_offset();
        assert_eq!(next, Offset(last.header.base_offset.0 + 1));
        out.extend(batches.iter().map(|batch| batch.records.slice(32..)));
    }
}
