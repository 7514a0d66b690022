//! Operators on a real node in this process: jobs in, results out.
#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use arqon_operators::{Error, HttpShim, HttpShimConfig, JobError, Operator, RunOptions, result_id, run, run_http};
use arqon_proto::{Claims, EventType, TokenAlgorithm, TokenKeyPair, TokenSigner, wire};
use arqon_sdk::{Client, ConsumerOptions, Event, From, NewEvent, Options, ProducerOptions};
use arqon_spine::{Config, ListenAddresses, Node};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::{Notify, oneshot},
    time::timeout,
};
use wire::control_client::ControlClient;

/// Nothing here takes so long, even on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);
const PARTITIONS: u32 = 2;

struct Bus {
    node: Node,
    addresses: ListenAddresses,
    signer: TokenSigner,
    _folder: TempDir,
}

impl Bus {
    async fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let pair = TokenKeyPair::generate().unwrap();
        std::fs::write(folder.path().join("token.pem"), &pair.public_key_pem).unwrap();
        let text = format!(
            r#"
node = 1
cluster = "test"
bootstrap = true
data = "{folder}/data"
cluster_secret = "a secret for tests of 32 bytes or more"
[listen]
client = "127.0.0.1:0"
peer = "127.0.0.1:0"
control = "127.0.0.1:0"
admin = "127.0.0.1:0"
[[auth.keys]]
algorithm = "EdDSA"
public_key_file = "{folder}/token.pem"
"#,
            folder = folder.path().display()
        );
        let node = Node::start(Config::parse(&text).unwrap()).await.unwrap();
        let ready = async {
            while node.not_ready().is_some() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        timeout(PATIENCE, ready).await.expect("the node is ready in time");
        let signer = TokenSigner::from_pem(TokenAlgorithm::EdDSA, None, pair.private_key_pem.as_bytes()).unwrap();
        let addresses = node.addresses();
        Self { node, addresses, signer, _folder: folder }
    }

    fn token(&self, role: &str, permissions: &[&str]) -> String {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
        let claims = Claims {
            sub: "test".into(),
            tenant_id: "acme".into(),
            aud: "arqonbus".into(),
            exp: now + 600,
            iat: now,
            role: role.into(),
            permissions: permissions.iter().map(|&text| text.to_owned()).collect(),
        };
        self.signer.mint(&claims).unwrap()
    }

    fn server(&self) -> String {
        self.addresses.client.to_string()
    }

    async fn client(&self, token: String) -> Client {
        Client::connect(Options::new([self.server()], token)).await.unwrap()
    }

    async fn create(&self, topic: &str) {
        let address = format!("http://{}", self.addresses.control);
        let mut control = ControlClient::connect(address).await.unwrap();
        let config = wire::TopicConfig {
            name: topic.into(),
            partitions: PARTITIONS,
            retention_ms: 3_600_000,
            attempts_max: 5,
            ..Default::default()
        };
        let mut request = tonic::Request::new(wire::CreateTopicRequest { config: Some(config) });
        let bearer = format!("Bearer {}", self.token("admin", &[]));
        request.metadata_mut().insert("authorization", bearer.parse().unwrap());
        control.create_topic(request).await.unwrap();
    }

    /// Publishes jobs with the ids `0..count`.
    async fn publish(&self, topic: &str, count: usize, payload: impl Fn(usize) -> String) {
        let client = self.client(self.token("admin", &[])).await;
        let producer = client.producer(topic, ProducerOptions::default()).await.unwrap();
        for index in 0..count {
            let job = NewEvent::new(payload(index)).key(index.to_string()).event_type(EventType::Job);
            producer.send(job).await.unwrap();
        }
        producer.flush().await.unwrap();
    }

    /// Waits for `count` results; then reads the whole topic once more to see any too many.
    async fn results(&self, topic: &str, count: usize) -> Vec<Event> {
        let client = self.client(self.token("admin", &[])).await;
        let options = ConsumerOptions { from: From::Earliest, ..Default::default() };
        let mut consumer = client.consumer(topic, options.clone()).await.unwrap();
        for seen in 0..count {
            let next = timeout(PATIENCE, consumer.next()).await;
            next.unwrap_or_else(|_| panic!("result {seen} of {count} comes in time")).unwrap();
        }
        let options = ConsumerOptions { stop_at_end: true, ..options };
        let mut consumer = client.consumer(topic, options).await.unwrap();
        let mut all = Vec::new();
        while let Some(event) = consumer.next().await.unwrap() {
            all.push(event);
        }
        assert_eq!(all.len(), count, "one result a job");
        all
    }
}

fn payload(event: &Event) -> String {
    String::from_utf8(event.payload.to_vec()).unwrap()
}

struct Echo;

impl Operator for Echo {
    async fn run(&self, job: &Event, attempt: u32) -> Result<NewEvent, JobError> {
        match payload(job).as_str() {
            "1" => Err(JobError::failed("one is refused")),
            "2" if attempt == 1 => Err(JobError::retry(Duration::from_millis(50), "not yet")),
            "3" => panic!("three"),
            text => Ok(NewEvent::new(format!("echo {text}"))),
        }
    }
}

fn registration(id: &str) -> wire::OperatorRegistration {
    wire::OperatorRegistration {
        operator_id: id.into(),
        operator_type: "generic".into(),
        version: "1.2.3".into(),
        hardware_profile: "cpu".into(),
        stage: "staging".into(),
        ..Default::default()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_native_operator_gives_every_job_its_one_result() {
    let bus = Bus::start().await;
    bus.create("echo.jobs").await;
    let token = bus.token("", &["subscribe:echo.jobs", "publish:echo.results", "execute:generic"]);
    let client = bus.client(token).await;
    let (stop, stopped) = oneshot::channel::<()>();
    let options = RunOptions::new("echo.jobs", "echo");
    let running = tokio::spawn(async move {
        run(&client, registration("echo-1"), options, Echo, async { stopped.await.unwrap_or_default() }).await
    });
    bus.publish("echo.jobs", 20, |index| index.to_string()).await;
    let results = bus.results("echo.results", 20).await;
    stop.send(()).unwrap();
    timeout(PATIENCE, running).await.expect("it stops in time").unwrap().unwrap();

    let by_key: BTreeMap<String, &Event> =
        results.iter().map(|result| (String::from_utf8(result.key.to_vec()).unwrap(), result)).collect();
    assert_eq!(by_key.len(), 20);
    for (key, result) in &by_key {
        let cause = result.cause.as_ref().unwrap();
        assert_eq!((cause.operator_id.as_str(), cause.operator_version.as_str()), ("echo-1", "1.2.3"));
        assert_eq!(
            (cause.topic.as_str(), cause.partition, cause.group.as_str()),
            ("echo.jobs", result.partition, "echo")
        );
        assert_eq!(result.r#type, EventType::JobResult);
        let job = Event {
            tenant_id: "acme".into(),
            topic: "echo.jobs".into(),
            partition: cause.partition,
            offset: cause.offset,
            ..Event::default()
        };
        assert_eq!(result.id, result_id(&job, "echo"), "a second run would give the same id");
        match key.as_str() {
            "1" => assert!(payload(result).contains("\"error\":\"one is refused\""), "{}", payload(result)),
            "2" => assert_eq!((payload(result).as_str(), cause.attempt), ("echo 2", 2)),
            "3" => assert!(payload(result).contains("the operator panicked: three"), "{}", payload(result)),
            other => assert_eq!(payload(result), format!("echo {other}")),
        }
    }
    bus.node.shutdown().await;
}

/// A worker that answers every job, and says when it got the first one of them. While it is
/// held it takes jobs and gives no answers.
struct HttpWorker {
    address: SocketAddr,
    posts: Arc<AtomicU32>,
    first: Arc<Notify>,
    open: tokio::sync::watch::Sender<bool>,
}

impl HttpWorker {
    async fn start(open: bool) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (posts, first) = (Arc::<AtomicU32>::default(), Arc::<Notify>::default());
        let open = tokio::sync::watch::Sender::new(open);
        let (count, notify, gate) = (posts.clone(), first.clone(), open.clone());
        let distill = move |body: String| {
            let (count, notify, mut gate) = (count.clone(), notify.clone(), gate.subscribe());
            async move {
                if count.fetch_add(1, Ordering::SeqCst) == 0 {
                    notify.notify_one();
                }
                gate.wait_for(|open| *open).await.unwrap();
                body.replace("job_id", "given")
            }
        };
        let router = axum::Router::new().route("/distill", axum::routing::post(distill));
        tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self { address, posts, first, open }
    }
}

fn shim_config(bus: &Bus, worker: SocketAddr, id: &str, more: &str) -> HttpShimConfig {
    let token = bus.token("", &["subscribe:genesis.jobs", "publish:genesis.results", "execute:genesis"]);
    let server = bus.server();
    let text = format!(
        r#"
servers = ["{server}"]
token = "{token}"
operator_id = "{id}"
operator_type = "genesis"
version = "1"
jobs_topic = "genesis.jobs"
url = "http://{worker}/distill"
lease_ms = 1000
{more}
"#
    );
    HttpShimConfig::parse(&text).unwrap()
}

fn check_seeds(results: &[Event]) {
    let mut ids: Vec<u64> = Vec::new();
    for result in results {
        let json: serde_json::Value = serde_json::from_slice(&result.payload).unwrap();
        assert_eq!(json["seed"]["given"], json["job_id"], "{json}");
        assert_eq!(&*result.schema, "arqonbus.genesis.result.v1");
        ids.push(json["job_id"].as_u64().unwrap());
    }
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), results.len(), "every job has its own result");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn jobs_of_a_shim_that_dies_are_done_by_another() {
    let bus = Bus::start().await;
    bus.create("genesis.jobs").await;
    let held = HttpWorker::start(false).await;
    let dying = HttpShim::bind(shim_config(&bus, held.address, "g-1", "")).await.unwrap();
    // On a runtime of its own, which ends with all that it holds: as when a process is killed,
    // nothing is given back.
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.spawn(dying.run(std::future::pending()));
    bus.publish("genesis.jobs", 30, |index| format!("{{\"job_id\":{index}}}")).await;
    timeout(PATIENCE, held.first.notified()).await.expect("a job reaches the first worker");
    runtime.shutdown_background();

    let worker = HttpWorker::start(true).await;
    let config = shim_config(&bus, worker.address, "g-2", "admin_listen = \"127.0.0.1:0\"");
    let shim = HttpShim::bind(config).await.unwrap();
    let admin = shim.admin_address().unwrap();
    let (stop, stopped) = oneshot::channel::<()>();
    let running = tokio::spawn(shim.run(async { stopped.await.unwrap_or_default() }));
    check_seeds(&bus.results("genesis.results", 30).await);

    // A result can be read before the shim is told that it is kept, and counts it.
    let counted = async { while !get(admin, "/metrics").await.contains("jobs_total{end=\"done\"} 30") {} };
    timeout(PATIENCE, counted).await.expect("all are counted");
    assert!(get(admin, "/readyz").await.starts_with("HTTP/1.1 200"));
    assert!(get(admin, "/healthz").await.contains("ok"));
    stop.send(()).unwrap();
    timeout(PATIENCE, running).await.expect("it stops in time").unwrap().unwrap();
    assert!(TcpStream::connect(admin).await.is_err(), "the admin port is closed");
    bus.node.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn jobs_that_reach_a_worker_twice_have_one_result() {
    let bus = Bus::start().await;
    bus.create("genesis.jobs").await;
    let held = HttpWorker::start(false).await;
    let mut stops = Vec::new();
    let mut running = Vec::new();
    for id in ["g-1", "g-2"] {
        let shim = HttpShim::bind(shim_config(&bus, held.address, id, "parallelism = 8")).await.unwrap();
        let (stop, stopped) = oneshot::channel::<()>();
        stops.push(stop);
        running.push(tokio::spawn(shim.run(async { stopped.await.unwrap_or_default() })));
    }
    bus.publish("genesis.jobs", 12, |index| format!("{{\"job_id\":{index}}}")).await;
    timeout(PATIENCE, held.first.notified()).await.expect("a job reaches the worker");
    // One shim ends with jobs at the worker, whose answers nobody hears.
    running.remove(0).abort();
    held.open.send_replace(true);
    check_seeds(&bus.results("genesis.results", 12).await);
    assert!(held.posts.load(Ordering::SeqCst) >= 12);
    stops.remove(1).send(()).unwrap();
    timeout(PATIENCE, running.remove(0)).await.expect("it stops in time").unwrap().unwrap();
    bus.node.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_wrong_at_the_start_is_one_line_that_names_it() {
    let bus = Bus::start().await;
    let worker: SocketAddr = "127.0.0.1:9".parse().unwrap();
    let failure = async |config: HttpShimConfig| -> String {
        let ended = timeout(PATIENCE, run_http(config, std::future::pending())).await.expect("it ends in time");
        let text = ended.unwrap_err().to_string();
        assert!(!text.contains('\n'), "{text}");
        text
    };
    let text = failure(shim_config(&bus, worker, "g-1", "")).await;
    assert!(text.contains("TARGET_NOT_FOUND") && text.contains("genesis.jobs"), "{text}");

    bus.create("genesis.jobs").await;
    let mut wrong = shim_config(&bus, worker, "g-1", "");
    wrong.token = Some(arqon_operators::Secret("not.a.token".into()));
    let text = failure(wrong).await;
    assert!(text.contains("AUTHENTICATION_FAILED") && !text.contains("not.a.token"), "{text}");

    let mut wrong = shim_config(&bus, worker, "g-1", "");
    let other = bus.token("", &["subscribe:genesis.jobs", "publish:genesis.results", "execute:nvm"]);
    wrong.token = Some(arqon_operators::Secret(other));
    let text = failure(wrong).await;
    assert!(text.contains("AUTHORIZATION_DENIED") && text.contains("execute:genesis"), "{text}");

    let mut wrong = shim_config(&bus, worker, "g-1", "");
    wrong.servers = vec!["127.0.0.1:9".into()];
    let text = failure(wrong).await;
    assert!(text.contains("127.0.0.1:9"), "{text}");

    let taken = TcpListener::bind("127.0.0.1:0").await.unwrap().into_std().unwrap();
    let address = taken.local_addr().unwrap();
    let wrong = shim_config(&bus, worker, "g-1", &format!("admin_listen = \"{address}\""));
    let error = HttpShim::bind(wrong).await.unwrap_err();
    assert!(matches!(&error, Error::Listen { .. }) && error.to_string().contains(&address.to_string()), "{error}");
    bus.node.shutdown().await;
}

async fn get(address: SocketAddr, path: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}
