//! The edge as clients meet it: who is let in, what ends a session, what is bounded.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

#[path = "../../sdk/tests/fake/mod.rs"]
mod fake;

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use arqon_proto::{Claims, TokenAlgorithm, TokenKeyPair, TokenSigner, decode_frame, encode_frame, wire};
use arqon_sdk::{Client, ConsumerOptions, NewEvent, Options, ProducerOptions, WorkerOptions};
use arqon_shield::{Auth, AuthKey, Config, Limits, Shield, Tls};
use bytes::{Bytes, BytesMut};
use fake::Bus;
use futures_util::{SinkExt, StreamExt};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};
use tokio_tungstenite::{
    MaybeTlsStream, WebSocketStream, connect_async,
    tungstenite::{Error, Message, client::IntoClientRequest, http::HeaderValue},
};
use wire::frame::Body;

type Socket = WebSocketStream<MaybeTlsStream<TcpStream>>;

/// What takes longer never comes.
const PATIENCE: Duration = Duration::from_secs(60);

struct Edge {
    bus: Bus,
    shield: Shield,
    signer: TokenSigner,
    config: Config,
    _folder: tempfile::TempDir,
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

impl Edge {
    /// A bus of three nodes with the topics `t`, `x.jobs` and `x.results`, and a Shield before it.
    async fn start(limit: impl FnOnce(&mut Limits)) -> Self {
        let bus = Bus::start(3).await;
        for topic in ["t", "x.jobs", "x.results"] {
            bus.state().create(topic, 1);
        }
        let folder = tempfile::tempdir().unwrap();
        let pair = TokenKeyPair::generate().unwrap();
        let public_key_file = folder.path().join("token.pub.pem");
        std::fs::write(&public_key_file, &pair.public_key_pem).unwrap();
        // A test that is about one of these times sets it.
        let long = PATIENCE.as_millis() as u64;
        let mut limits =
            Limits { handshake_ms: long, ping_ms: long, write_ms: long, request_ms: long, ..Limits::default() };
        limit(&mut limits);
        let key = AuthKey { kid: None, algorithm: TokenAlgorithm::EdDSA, public_key_file };
        let config = Config {
            listen: "127.0.0.1:0".into(),
            admin: "127.0.0.1:0".into(),
            servers: bus.servers(),
            dev: false,
            auth: Auth { audience: "arqonbus".into(), keys: vec![key] },
            tls: Tls::default(),
            limits,
        };
        let signer = TokenSigner::from_pem(TokenAlgorithm::EdDSA, None, pair.private_key_pem.as_bytes()).unwrap();
        Self { bus, shield: Shield::start(config.clone()).await.unwrap(), signer, config, _folder: folder }
    }

    fn token_for(&self, tenant: &str, permissions: &[&str], lasts: i64) -> String {
        let exp = now().saturating_add_signed(lasts);
        let permissions = permissions.iter().map(ToString::to_string).collect();
        let claims = Claims {
            sub: "ada".into(),
            tenant_id: tenant.into(),
            aud: "arqonbus".into(),
            exp,
            iat: now(),
            role: String::new(),
            permissions,
        };
        self.signer.mint(&claims).unwrap()
    }

    fn token(&self) -> String {
        self.token_for("acme", &["publish:*", "subscribe:*"], 600)
    }

    fn url(&self) -> String {
        format!("ws://{}/v1/ws", self.shield.address())
    }

    async fn open(&self) -> Socket {
        self.open_with(&self.token(), 0).await
    }

    /// A session past its first frame.
    async fn open_with(&self, token: &str, credit_bytes: u64) -> Socket {
        let mut socket = shake(&self.url(), Some(token), "arqonbus.v1").await.unwrap();
        let hello = wire::Hello { version: 1, client: "test".into(), credit_bytes, ..Default::default() };
        send(&mut socket, 0, Body::Hello(hello)).await;
        let (_, Body::Welcome(welcome), _) = answer(&mut socket).await else { panic!() };
        assert_eq!((welcome.version, welcome.node), (1, 0));
        socket
    }

    async fn client(&self) -> Client {
        Client::connect(Options::new([self.url()], self.token())).await.unwrap()
    }

    /// The status line and the body of an admin page.
    async fn admin(&self, path: &str) -> String {
        let mut stream = TcpStream::connect(self.shield.admin_address()).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut page = String::new();
        stream.read_to_string(&mut page).await.unwrap();
        page
    }

    async fn wait_for_metric(&self, line: &str) {
        let seen = async {
            while !self.admin("/metrics").await.lines().any(|known| known == line) {
                tokio::task::yield_now().await;
            }
        };
        timeout(PATIENCE, seen).await.expect(line);
    }
}

async fn shake(url: &str, token: Option<&str>, subprotocol: &str) -> Result<Socket, Error> {
    let mut request = url.into_client_request().unwrap();
    if let Some(token) = token {
        request.headers_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
    }
    if !subprotocol.is_empty() {
        request.headers_mut().insert("sec-websocket-protocol", HeaderValue::from_str(subprotocol).unwrap());
    }
    connect_async(request).await.map(|(socket, _)| socket)
}

fn encoded(id: u64, body: Body) -> Bytes {
    encode_frame(&wire::Frame { request_id: id, body: Some(body) }, 0).unwrap()
}

async fn send(socket: &mut Socket, id: u64, body: Body) {
    socket.send(Message::Binary(encoded(id, body))).await.unwrap();
}

/// The next frame, or the code with which the session was closed.
async fn next(socket: &mut Socket) -> Result<(u64, Body, Bytes), u16> {
    loop {
        match timeout(PATIENCE, socket.next()).await.expect("an answer") {
            Some(Ok(Message::Binary(frame))) => {
                let (frame, payload) = decode_frame::<wire::Frame>(frame).unwrap();
                return Ok((frame.request_id, frame.body.unwrap(), payload));
            }
            Some(Ok(Message::Close(Some(close)))) => return Err(close.code.into()),
            Some(Ok(_)) => {}
            other => panic!("{other:?}"),
        }
    }
}

async fn answer(socket: &mut Socket) -> (u64, Body, Bytes) {
    next(socket).await.expect("a frame")
}

async fn refusal(socket: &mut Socket) -> wire::Error {
    match answer(socket).await {
        (_, Body::Error(error), _) => error,
        other => panic!("{other:?}"),
    }
}

fn describe() -> Body {
    Body::DescribeTopic(wire::DescribeTopic { topic: "t".into() })
}

fn fetch() -> Body {
    Body::Fetch(wire::Fetch { topic: "t".into(), ..Default::default() })
}

#[tokio::test]
async fn each_refused_handshake_has_its_status() {
    let edge = Edge::start(|_| {}).await;
    let (url, good) = (edge.url(), edge.token());
    let expired = edge.token_for("acme", &[], -10);
    let other = Edge::start(|_| {}).await.token();
    for (url, token, subprotocol, expected) in [
        (url.replace("/v1/ws", "/v2"), Some(&good), "arqonbus.v1", (404, "/v1/ws")),
        (url.clone(), Some(&good), "", (426, "arqonbus.v1")),
        (url.clone(), Some(&good), "other", (426, "arqonbus.v1")),
        (url.clone(), None, "arqonbus.v1", (401, "missing")),
        (url.clone(), Some(&expired), "arqonbus.v1", (401, "expired")),
        (url.clone(), Some(&other), "arqonbus.v1", (401, "signature")),
        (url.clone(), Some(&"junk".to_owned()), "arqonbus.v1", (401, "malformed")),
    ] {
        let Err(Error::Http(response)) = shake(&url, token.map(String::as_str), subprotocol).await else { panic!() };
        let text = String::from_utf8(response.body().clone().unwrap_or_default()).unwrap();
        assert_eq!(response.status().as_u16(), expected.0, "{text}");
        assert!(text.contains(expected.1), "{text}");
    }
    shake(&format!("{url}?a=b&access_token={good}"), None, "arqonbus.v1").await.expect("browsers set no headers");
    edge.wait_for_metric("arqon_shield_refused_handshakes_total{reason=\"token\"} 4").await;
}

#[tokio::test]
async fn what_is_no_frame_ends_the_session_with_its_code_and_no_other_session() {
    let edge = Edge::start(|limits| limits.message_size = 4_096).await;
    let mut bystander = edge.open().await;
    let bad_header = Bytes::from_static(b"\x08\x00\x00\x00\x04\x00\x00\x00\xff\xff\xff\xff");
    for (message, code) in [
        (Message::text("hello"), 1003),
        (Message::binary(vec![0; 5_000]), 1009),
        (Message::binary("junk"), 1002),
        (Message::binary(Bytes::new()), 1002),
        (Message::binary(b"\xff\xff\xff\xff\xff\xff\xff\xff".as_slice()), 1002),
        (Message::Binary(bad_header), 1007),
    ] {
        let mut socket = edge.open().await;
        socket.send(message).await.unwrap();
        assert_eq!(next(&mut socket).await.unwrap_err(), code);
    }
    let mut hasty = shake(&edge.url(), Some(&edge.token()), "arqonbus.v1").await.unwrap();
    send(&mut hasty, 1, describe()).await;
    assert_eq!(next(&mut hasty).await.unwrap_err(), 1002);
    send(&mut bystander, 1, describe()).await;
    assert!(matches!(answer(&mut bystander).await, (1, Body::TopicDescription(_), _)));
}

#[tokio::test]
async fn sessions_outlive_the_death_of_a_node() {
    let mut edge = Edge::start(|_| {}).await;
    let client = edge.client().await;
    let producer = client.producer("t", ProducerOptions::default()).await.unwrap();
    producer.publish(NewEvent::new("0")).await.unwrap();
    edge.bus.kill(0).await;
    let waiting = tokio::spawn(async move { producer.publish(NewEvent::new("1")).await.unwrap().offset });
    edge.bus.lead("t", 0, 1);
    assert_eq!(waiting.await.unwrap(), 1);
    let options = ConsumerOptions { stop_at_end: true, ..Default::default() };
    let mut consumer = client.consumer("t", options).await.unwrap();
    for expected in ["0", "1"] {
        assert_eq!(consumer.next().await.unwrap().unwrap().payload, expected);
    }
    edge.wait_for_metric("arqon_shield_connections 1").await;
    assert!(!edge.admin("/metrics").await.contains("arqon_shield_closed_total{"));
}

#[tokio::test]
async fn jobs_are_worked_through_the_edge_and_lease_tokens_pass() {
    let edge = Edge::start(|_| {}).await;
    let producer = edge.client().await.producer("x.jobs", ProducerOptions::default()).await.unwrap();
    producer.publish(NewEvent::new("job")).await.unwrap();
    // May take jobs, and write only the results of those that it has.
    let token = edge.token_for("acme", &["subscribe:x.jobs", "execute:x"], 600);
    let client = Client::connect(Options::new([edge.url()], token)).await.unwrap();
    let mut worker = client.worker("x.jobs", WorkerOptions::default()).await.unwrap();
    let job = worker.next().await.unwrap().unwrap();
    job.complete("x.results", NewEvent::new("result")).await.unwrap();
    assert_eq!(edge.bus.state().payloads("x.results", 0), ["result"]);
    let results = client.producer("x.results", ProducerOptions::default()).await.unwrap();
    let error = results.publish(NewEvent::new("forged")).await.unwrap_err();
    assert_eq!(error.to_string(), "AUTHORIZATION_DENIED: the token does not allow publish:x.results");
}

#[tokio::test]
async fn a_client_over_its_rate_is_told_when_to_come_back() {
    // All pass only where they take a second each.
    let edge = Edge::start(|limits| (limits.connection_rate, limits.connection_burst) = (1, 10)).await;
    let mut socket = edge.open().await;
    for id in 1..=100 {
        send(&mut socket, id, describe()).await;
    }
    let mut limited = Vec::new();
    for _ in 1..=100 {
        if let (id, Body::Error(error), _) = answer(&mut socket).await {
            assert_eq!(error.code(), wire::ErrorCode::RateLimitExceeded);
            assert!((1..=1_001).contains(&error.retry_after_ms), "{}", error.retry_after_ms);
            limited.push(id);
        }
    }
    assert!(!limited.is_empty() && limited.iter().all(|id| *id > 10), "{limited:?}");
    edge.wait_for_metric(&format!("arqon_shield_rate_limited_total {}", limited.len())).await;
}

#[tokio::test]
async fn a_flood_of_one_tenant_leaves_another_served() {
    // The calm one sends no more than a burst; the flood gets one more through with each second that the test takes.
    let edge = Edge::start(|limits| (limits.tenant_rate, limits.tenant_burst) = (1, 20)).await;
    let mut flooding = edge.open_with(&edge.token_for("a", &["subscribe:*"], 600), 0).await;
    let mut calm = edge.open_with(&edge.token_for("b", &["subscribe:*"], 600), 0).await;
    let mut refused = 0;
    for round in 1..=10 {
        for id in 1..=50 {
            send(&mut flooding, id, describe()).await;
        }
        send(&mut calm, round, describe()).await;
        assert!(matches!(answer(&mut calm).await, (_, Body::TopicDescription(_), _)));
        for _ in 1..=50 {
            refused += usize::from(matches!(answer(&mut flooding).await, (_, Body::Error(_), _)));
        }
    }
    assert!(refused > 400, "{refused} of 500");
}

#[tokio::test]
async fn answers_wait_for_credit() {
    let edge = Edge::start(|_| {}).await;
    let producer = edge.client().await.producer("t", ProducerOptions::default()).await.unwrap();
    producer.publish(NewEvent::new(vec![7; 10_000])).await.unwrap();
    let mut socket = edge.open_with(&edge.token(), 20_000).await;
    send(&mut socket, 1, fetch()).await;
    let (1, Body::Fetched(_), payload) = answer(&mut socket).await else { panic!() };
    assert!(payload.len() > 10_000);
    // Twice the size is more than the credit that is left; what has no body needs none.
    send(&mut socket, 2, fetch()).await;
    send(&mut socket, 3, describe()).await;
    assert_eq!(answer(&mut socket).await.0, 3);
    assert!(timeout(Duration::from_millis(200), socket.next()).await.is_err(), "no credit, no answer");
    send(&mut socket, 0, Body::Credit(wire::Credit { bytes: 20_000 })).await;
    assert_eq!(answer(&mut socket).await.0, 2);
}

#[tokio::test]
async fn a_client_that_does_not_read_is_dropped() {
    let edge = Edge::start(|limits| {
        limits.write_ms = 2_000;
        limits.requests = 64;
        limits.send_size = 4 << 20;
    })
    .await;
    let producer = edge.client().await.producer("t", ProducerOptions::default()).await.unwrap();
    producer.publish(NewEvent::new(vec![7; 900_000])).await.unwrap();
    let mut socket = edge.open().await;
    for id in 1..=60 {
        send(&mut socket, id, fetch()).await;
    }
    edge.wait_for_metric("arqon_shield_slow_clients_total 1").await;
}

#[tokio::test]
async fn a_session_ends_with_its_token() {
    let edge = Edge::start(|_| {}).await;
    // Long enough for a slow machine to open the session and to be answered.
    let mut socket = edge.open_with(&edge.token_for("acme", &["subscribe:*"], 5), 0).await;
    send(&mut socket, 1, describe()).await;
    assert_eq!(answer(&mut socket).await.0, 1);
    assert_eq!(next(&mut socket).await.unwrap_err(), 4401);
}

#[tokio::test]
async fn a_silent_client_is_pinged_and_then_closed() {
    let edge = Edge::start(|limits| limits.ping_ms = 2_000).await;
    let mut awake = edge.open().await;
    let mut asleep = edge.open().await;
    let MaybeTlsStream::Plain(stream) = asleep.get_mut() else { panic!() };
    let mut bytes = Vec::new();
    timeout(PATIENCE, stream.read_to_end(&mut bytes)).await.unwrap().unwrap();
    assert!(bytes.windows(2).any(|pair| pair == 4408u16.to_be_bytes()), "{bytes:?}");
    let pings = async { while !matches!(awake.next().await, Some(Ok(Message::Ping(_)))) {} };
    timeout(PATIENCE, pings).await.expect("the other answers its pings");
}

#[tokio::test]
async fn a_handshake_that_does_not_end_is_ended() {
    let edge = Edge::start(|limits| limits.handshake_ms = 2_000).await;
    let mut stream = TcpStream::connect(edge.shield.address()).await.unwrap();
    stream.write_all(b"GET /v1/ws HTTP/1.1\r\nhost:").await.unwrap();
    let ended = timeout(PATIENCE, stream.read_to_end(&mut Vec::new())).await.expect("in time");
    assert!(matches!(ended, Ok(0) | Err(_)), "without a word");
    let mut mute = shake(&edge.url(), Some(&edge.token()), "arqonbus.v1").await.unwrap();
    assert_eq!(next(&mut mute).await.unwrap_err(), 4408, "a first frame is part of it");
}

#[tokio::test]
async fn the_number_of_connections_is_bounded() {
    let edge = Edge::start(|limits| limits.connections = 1).await;
    let first = edge.open().await;
    let Err(Error::Http(response)) = shake(&edge.url(), Some(&edge.token()), "arqonbus.v1").await else { panic!() };
    assert_eq!(response.status().as_u16(), 503);
    drop(first);
    edge.wait_for_metric("arqon_shield_connections 0").await;
    edge.open().await;
}

#[tokio::test]
async fn stopping_says_goodbye() {
    let edge = Edge::start(|_| {}).await;
    let mut socket = edge.open().await;
    let stopped = tokio::spawn(edge.shield.shutdown());
    assert_eq!(next(&mut socket).await.unwrap_err(), 1001);
    stopped.await.unwrap();
}

#[tokio::test]
async fn readiness_follows_the_brokers() {
    let mut edge = Edge::start(|_| {}).await;
    assert!(edge.admin("/healthz").await.starts_with("HTTP/1.1 200"));
    assert!(edge.admin("/readyz").await.starts_with("HTTP/1.1 200"));
    for node in 0..3 {
        edge.bus.kill(node).await;
    }
    assert!(edge.admin("/readyz").await.starts_with("HTTP/1.1 503"));
    let mut socket = edge.open().await;
    let produce = wire::Produce { topic: "t".into(), ..Default::default() };
    let mut junk = BytesMut::from(
        &encode_frame(&wire::Frame { request_id: 1, body: Some(Body::Produce(produce)) }, 4).unwrap()[..],
    );
    junk.extend_from_slice(b"junk");
    socket.send(Message::Binary(junk.freeze())).await.unwrap();
    assert_eq!(refusal(&mut socket).await.code(), wire::ErrorCode::ValidationError);
}

#[tokio::test]
async fn a_shield_that_cannot_start_names_the_key() {
    let edge = Edge::start(|_| {}).await;
    let taken = edge.shield.address().to_string();
    let error = Shield::start(Config { listen: taken.clone(), ..edge.config.clone() }).await.unwrap_err().to_string();
    assert!(error.starts_with(&format!("listen: cannot listen on {taken}")), "{error}");
    let mut config = edge.config.clone();
    std::fs::write(&config.auth.keys[0].public_key_file, "junk").unwrap();
    let error = Shield::start(config.clone()).await.unwrap_err().to_string();
    assert!(error.starts_with("auth.keys: "), "{error}");
    config.auth.keys[0].public_key_file = "/nowhere/key.pem".into();
    let error = Shield::start(config).await.unwrap_err().to_string();
    assert!(error.starts_with("auth.keys[0].public_key_file: /nowhere/key.pem: "), "{error}");
}
