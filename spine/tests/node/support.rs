//! A cluster in this process, and a client that speaks raw frames.
#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

#[path = "../../../raft/tests/support/loopback.rs"]
mod loopback;

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use arqon_proto::{
    Batch, BatchBuilder, Claims, Compression, ProducerStamp, Record, TokenAlgorithm, TokenKeyPair, TokenSigner,
    decode_frame, encode_frame, frame_size, wire,
};
use arqon_spine::{
    Auth, AuthKey, Clock, Config, Listen, ListenAddresses, Listeners, Log, Node, Peer, Secret, Storage, Tls,
};
use arqon_storage::{FaultyDisk, Identity, RealDisk, Store};
use bytes::{Bytes, BytesMut};
use futures_util::future::join_all;
use loopback::own_loopback;
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::JoinHandle,
    time::{Instant, sleep, timeout},
};
use tonic::transport::{Certificate, ClientTlsConfig, Endpoint};
use wire::{control_client::ControlClient, frame::Body};

/// What takes longer never comes: far more than anything takes on a machine that has much else to do.
pub const PATIENCE: Duration = Duration::from_secs(60);

pub struct Cluster {
    pub nodes: Vec<Option<Node>>,
    pub configs: Vec<Config>,
    pub addresses: Vec<ListenAddresses>,
    pub signer: TokenSigner,
    /// Those of the nodes, until they are restarted.
    pub clocks: Vec<Clock>,
    /// With TLS: what clients must trust, PEM.
    pub ca: Option<Vec<u8>>,
    /// Those of the nodes, if they were started on such disks, until they are restarted.
    pub disks: Vec<FaultyDisk>,
    folder: TempDir,
}

/// A CA, and a certificate of it with its key for the nodes and for 127.0.0.1; all PEM.
pub struct Certificates {
    host: Ipv4Addr,
    pub ca: String,
    pub certificate: String,
    pub key: String,
}

impl Certificates {
    pub fn generate() -> Self {
        let host = own_loopback();
        let key = rcgen::KeyPair::generate().unwrap();
        let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let ca = params.self_signed(&key).unwrap().pem();
        let issuer = rcgen::Issuer::new(params, key);
        let key = rcgen::KeyPair::generate().unwrap();
        let params = rcgen::CertificateParams::new(vec![host.to_string(), "127.0.0.1".to_owned()]).unwrap();
        Self { host, ca, certificate: params.signed_by(&key, &issuer).unwrap().pem(), key: key.serialize_pem() }
    }

    /// The files `NAME.pem`, `NAME.key.pem` and `NAME.ca.pem`.
    pub fn write(&self, folder: &Path, name: &str) -> Tls {
        let write = |suffix: &str, text: &str| {
            let path = folder.join(format!("{name}{suffix}.pem"));
            std::fs::write(&path, text).unwrap();
            path
        };
        Tls {
            certificate_file: write("", &self.certificate),
            key_file: write(".key", &self.key),
            ca_file: write(".ca", &self.ca),
        }
    }
}

impl Cluster {
    /// Starts `count` nodes and waits until all are ready.
    pub async fn start(count: u64) -> Self {
        Self::start_with(count, None).await
    }

    /// The same, with TLS on all ports but the admin's.
    pub async fn start_with(count: u64, certificates: Option<&Certificates>) -> Self {
        Self::start_as(count, certificates, false).await
    }

    /// The same as `start`, on disks whose space and speed a test decides.
    pub async fn start_on_faulty_disks(count: u64) -> Self {
        Self::start_as(count, None, true).await
    }

    async fn start_as(count: u64, certificates: Option<&Certificates>, on_faulty_disks: bool) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let pair = TokenKeyPair::generate().unwrap();
        let public_key_file = folder.path().join("token.pem");
        std::fs::write(&public_key_file, &pair.public_key_pem).unwrap();
        let tls = certificates.map(|certificates| certificates.write(folder.path(), "node"));
        let ca = certificates.map(|certificates| certificates.ca.clone().into_bytes());
        let host = certificates.map_or_else(own_loopback, |certificates| certificates.host);
        let any = SocketAddr::new(host.into(), 0);
        let any = ListenAddresses { client: any, peer: any, control: any, admin: any };
        let bound: Vec<Listeners> = (0..count).map(|_| Listeners::bind(&any).unwrap()).collect();
        let addresses: Vec<ListenAddresses> = bound.iter().map(|bound| bound.addresses().unwrap()).collect();
        let peer = |(index, at): (usize, &ListenAddresses)| Peer {
            node: index as u64 + 1,
            client: at.client.to_string(),
            peer: at.peer.to_string(),
            control: at.control.to_string(),
        };
        let peers: Vec<Peer> = addresses.iter().enumerate().map(peer).collect();
        let config = |(index, at): (usize, &ListenAddresses)| Config {
            node: index as u64 + 1,
            cluster: "test".into(),
            data: folder.path().join(format!("node-{}", index + 1)),
            dev: false,
            bootstrap: count == 1,
            program: "test".into(),
            threads: None,
            cluster_secret: Some(Secret("a secret for tests of 32 bytes or more".into())),
            cluster_secret_file: None,
            listen: Listen {
                client: at.client.to_string(),
                peer: at.peer.to_string(),
                control: at.control.to_string(),
                admin: at.admin.to_string(),
            },
            auth: Auth {
                audience: "arqonbus".into(),
                keys: vec![AuthKey {
                    kid: None,
                    algorithm: TokenAlgorithm::EdDSA,
                    public_key_file: public_key_file.clone(),
                }],
            },
            tls: tls.clone(),
            storage: Storage::default(),
            log: Log::default(),
            peers: peers.clone(),
        };
        let configs: Vec<Config> = addresses.iter().enumerate().map(config).collect();
        let clocks: Vec<Clock> = configs.iter().map(|_| Clock::default()).collect();
        // A node of a new cluster waits for most of the others.
        let starting = configs.iter().zip(bound).zip(&clocks);
        let mut disks = Vec::new();
        let starting = starting.map(|((config, bound), clock)| {
            let (config, clock) = (config.clone(), clock.clone());
            let identity = Identity { cluster: config.cluster.clone(), node: config.node_id() };
            let store = on_faulty_disks.then(|| {
                let disk = FaultyDisk::new(Arc::new(RealDisk::create(&config.data).unwrap()));
                disks.push(disk.clone());
                Store::open_on(Arc::new(disk), identity, config.storage.options()).unwrap()
            });
            async move {
                match store {
                    Some(store) => Node::start_over(config, bound, clock, store).await,
                    None => Node::start_by(config, bound, clock).await,
                }
            }
        });
        let nodes = join_all(starting).await.into_iter().map(|node| Some(node.unwrap())).collect();
        let signer = TokenSigner::from_pem(TokenAlgorithm::EdDSA, None, pair.private_key_pem.as_bytes()).unwrap();
        let cluster = Self { nodes, configs, addresses, signer, clocks, ca, disks, folder };
        cluster.wait_ready().await;
        cluster
    }

    /// Starts a node that the cluster does not know yet; it runs when it was
    /// added. Its number is the one after the last.
    pub fn start_another(&mut self) -> (wire::NodeInfo, JoinHandle<Node>) {
        let host = self.addresses[0].client.ip();
        let any = SocketAddr::new(host, 0);
        let bound = Listeners::bind(&ListenAddresses { client: any, peer: any, control: any, admin: any }).unwrap();
        let addresses = bound.addresses().unwrap();
        let node = self.nodes.len() as u64 + 1;
        let peer = Peer {
            node,
            client: addresses.client.to_string(),
            peer: addresses.peer.to_string(),
            control: addresses.control.to_string(),
        };
        let info = wire::NodeInfo {
            node,
            client_address: peer.client.clone(),
            peer_address: peer.peer.clone(),
            control_address: peer.control.clone(),
            ..Default::default()
        };
        let mut config = self.configs[0].clone();
        (config.node, config.data) = (node, self.data(node as usize - 1));
        config.listen = Listen {
            client: peer.client.clone(),
            peer: peer.peer.clone(),
            control: peer.control.clone(),
            admin: addresses.admin.to_string(),
        };
        config.peers.push(peer);
        config.bootstrap = false;
        self.configs.push(config.clone());
        self.addresses.push(addresses);
        self.nodes.push(None);
        (info, tokio::spawn(async move { Node::start_on(config, bound).await.unwrap() }))
    }

    /// Where a node keeps its data.
    pub fn data(&self, index: usize) -> PathBuf {
        self.folder.path().join(format!("node-{}", index + 1))
    }

    /// Until every running node says that it is ready.
    pub async fn wait_ready(&self) {
        for node in self.nodes.iter().flatten() {
            until("nodes are ready", async || node.not_ready().is_none()).await;
        }
    }

    pub async fn stop(&mut self, index: usize) {
        self.nodes[index].take().unwrap().shutdown().await;
    }

    pub async fn restart(&mut self, index: usize) {
        self.nodes[index] = Some(Node::start(self.configs[index].clone()).await.unwrap());
    }

    pub async fn shutdown(mut self) {
        for node in self.nodes.drain(..).flatten() {
            node.shutdown().await;
        }
    }

    pub fn claims(&self, tenant: &str, permissions: &[&str]) -> Claims {
        let now = now_seconds();
        Claims {
            sub: "test".into(),
            tenant_id: tenant.into(),
            aud: "arqonbus".into(),
            exp: now + 600,
            iat: now,
            role: String::new(),
            permissions: permissions.iter().map(|&text| text.to_owned()).collect(),
        }
    }

    pub fn token(&self, tenant: &str, permissions: &[&str]) -> String {
        self.signer.mint(&self.claims(tenant, permissions)).unwrap()
    }

    pub fn admin(&self) -> String {
        self.signer.mint(&Claims { role: "admin".into(), ..self.claims("acme", &[]) }).unwrap()
    }

    pub async fn connect(&self, index: usize, token: &str) -> Client {
        Client::connect(self.addresses[index].client, token).await.unwrap()
    }

    pub async fn control(&self, index: usize) -> ControlClient<tonic::transport::Channel> {
        let address = self.addresses[index].control;
        let endpoint = match &self.ca {
            Some(ca) => Endpoint::from_shared(format!("https://{address}"))
                .unwrap()
                .tls_config(ClientTlsConfig::new().ca_certificate(Certificate::from_pem(ca))),
            None => Endpoint::from_shared(format!("http://{address}")),
        };
        ControlClient::new(endpoint.unwrap().connect().await.unwrap())
    }

    pub async fn create(
        &self,
        index: usize,
        name: &str,
        partitions: u32,
    ) -> Result<wire::TopicDescription, tonic::Status> {
        let config = wire::TopicConfig { name: name.into(), partitions, retention_ms: 3_600_000, ..Default::default() };
        let request = wire::CreateTopicRequest { config: Some(config) };
        let answer = self.control(index).await.create_topic(authorized(request, &self.admin())).await?;
        Ok(answer.into_inner())
    }

    /// The node that leads a partition, as an index.
    pub async fn leader_of(&self, ask: usize, topic: &str, partition: usize) -> usize {
        let mut client = self.connect(ask, &self.admin()).await;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let description = client.describe(topic).await.unwrap();
            let leader = description.partitions[partition].leader_node as usize;
            if leader > 0 && self.nodes[leader - 1].is_some() {
                return leader - 1;
            }
            assert!(Instant::now() < deadline, "{topic}/{partition} has no leader");
            sleep(Duration::from_millis(20)).await;
        }
    }

    /// GET on the admin port: status and text.
    pub async fn get(&self, index: usize, path: &str) -> (u16, String) {
        let mut stream = TcpStream::connect(self.addresses[index].admin).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        let status = answer.split(' ').nth(1).unwrap().parse().unwrap();
        (status, answer)
    }
}

pub fn now_seconds() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs()
}

pub fn authorized<T>(message: T, token: &str) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
    request
}

/// Polls until `condition` holds.
pub async fn until(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition().await {
        assert!(Instant::now() < deadline, "in time: {what}");
        sleep(Duration::from_millis(20)).await;
    }
}

pub type Answer = Result<(Body, Bytes), wire::Error>;

pub struct Client {
    stream: TcpStream,
    buffer: BytesMut,
    next_id: u64,
    pub welcome: wire::Welcome,
}

impl Client {
    pub async fn connect(address: SocketAddr, token: &str) -> Result<Self, wire::Error> {
        Self::connect_with(address, wire::Hello { version: 1, token: token.into(), ..Default::default() }).await
    }

    pub async fn connect_with(address: SocketAddr, hello: wire::Hello) -> Result<Self, wire::Error> {
        let mut client = Self::raw(address).await;
        client.send(Body::Hello(hello), &[]).await;
        match client.receive().await.expect("an answer to Hello").1? {
            (Body::Welcome(welcome), _) => client.welcome = welcome,
            (other, _) => panic!("{other:?}"),
        }
        Ok(client)
    }

    pub async fn raw(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).await.unwrap();
        stream.set_nodelay(true).unwrap();
        Self { stream, buffer: BytesMut::new(), next_id: 0, welcome: wire::Welcome::default() }
    }

    pub async fn send(&mut self, body: Body, batches: &[Batch]) -> u64 {
        self.next_id += 1;
        let mut raw = BytesMut::new();
        for batch in batches {
            batch.encode_into(&mut raw);
        }
        let frame = wire::Frame { request_id: self.next_id, body: Some(body) };
        let mut bytes = encode_frame(&frame, raw.len()).unwrap().to_vec();
        bytes.extend_from_slice(&raw);
        // Where the server has closed the connection, no answer comes.
        let _ = self.stream.write_all(&bytes).await;
        self.next_id
    }

    pub async fn send_bytes(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.unwrap();
    }

    /// The next frame; `None` when the server closed the connection.
    pub async fn receive(&mut self) -> Option<(u64, Answer)> {
        loop {
            if let Some(size) = frame_size(&self.buffer).unwrap()
                && self.buffer.len() >= size
            {
                let (frame, body) = decode_frame::<wire::Frame>(self.buffer.split_to(size).freeze()).unwrap();
                let answer = match frame.body.unwrap() {
                    Body::Error(error) => Err(error),
                    other => Ok((other, body)),
                };
                return Some((frame.request_id, answer));
            }
            let read = timeout(PATIENCE, self.stream.read_buf(&mut self.buffer)).await.expect("an answer in time");
            if read.unwrap_or(0) == 0 {
                return None;
            }
        }
    }

    pub async fn request(&mut self, body: Body, batches: &[Batch]) -> Answer {
        let id = self.send(body, batches).await;
        let (answered, answer) = self.receive().await.expect("the connection stands");
        assert_eq!(answered, id, "{answer:?}");
        answer
    }

    pub async fn describe(&mut self, topic: &str) -> Result<wire::TopicDescription, wire::Error> {
        match self.request(Body::DescribeTopic(wire::DescribeTopic { topic: topic.into() }), &[]).await? {
            (Body::TopicDescription(description), _) => Ok(description),
            (other, _) => panic!("{other:?}"),
        }
    }

    pub async fn produce(&mut self, topic: &str, partition: u32, batch: Batch) -> Result<wire::Produced, wire::Error> {
        let request = wire::Produce { topic: topic.into(), partition, ..Default::default() };
        match self.request(Body::Produce(request), &[batch]).await? {
            (Body::Produced(produced), _) => Ok(produced),
            (other, _) => panic!("{other:?}"),
        }
    }

    pub async fn fetch(&mut self, request: wire::Fetch) -> Result<Vec<String>, wire::Error> {
        match self.request(Body::Fetch(request), &[]).await? {
            (Body::Fetched(_), body) => Ok(payloads(body)),
            (other, _) => panic!("{other:?}"),
        }
    }

    pub async fn work(&mut self, request: wire::Work) -> Result<(wire::Leased, Vec<String>), wire::Error> {
        match self.request(Body::Work(request), &[]).await? {
            (Body::Leased(leased), body) => Ok((leased, payloads(body))),
            (other, _) => panic!("{other:?}"),
        }
    }
}

pub fn fetch_from(topic: &str, offset: u64) -> wire::Fetch {
    wire::Fetch { topic: topic.into(), offset, ..Default::default() }
}

pub fn payloads(mut body: Bytes) -> Vec<String> {
    let mut out = Vec::new();
    while !body.is_empty() {
        let batch = Batch::split_from(&mut body).unwrap();
        arqon_proto::records(&batch, |_, record| {
            out.push(String::from_utf8(record.payload.to_vec()).unwrap());
            Ok::<_, arqon_proto::DecodeError>(())
        })
        .unwrap();
    }
    out
}

pub fn batch(payloads: &[&str]) -> Batch {
    batch_of("", payloads.iter().map(|text| Bytes::copy_from_slice(text.as_bytes())), None)
}

pub fn batch_of(schema: &str, payloads: impl IntoIterator<Item = Bytes>, producer: Option<ProducerStamp>) -> Batch {
    let mut builder = BatchBuilder::new();
    for payload in payloads {
        let id = *uuid::Uuid::now_v7().as_bytes();
        builder.push(&Record { id, schema: schema.into(), payload, ..Default::default() }).unwrap();
    }
    builder.build(Compression::None, producer)
}
