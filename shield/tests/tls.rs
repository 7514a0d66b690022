//! Clients reach a node with certificates through a Shield with certificates.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

#[expect(dead_code, reason = "the node's own tests use the rest")]
#[path = "../../spine/tests/node/support.rs"]
mod support;

use std::time::Duration;

use arqon_sdk::{Client, ConsumerOptions, From, NewEvent, Options, ProducerOptions};
use arqon_shield::{Auth, AuthKey, Config, Limits, Shield, Tls};
use support::{Certificates, Cluster};

/// No test is about a time that lasts as long.
const LONG_MS: u64 = support::PATIENCE.as_millis() as u64;

async fn shield(cluster: &Cluster, brokers_ca: bool, request_ms: u64) -> Shield {
    let node = &cluster.configs[0];
    let files = node.tls.clone().unwrap();
    let key = &node.auth.keys[0];
    let key = AuthKey { kid: None, algorithm: key.algorithm, public_key_file: key.public_key_file.clone() };
    let config = Config {
        listen: "127.0.0.1:0".into(),
        admin: "127.0.0.1:0".into(),
        servers: vec![cluster.addresses[0].client.to_string()],
        dev: false,
        auth: Auth { audience: "arqonbus".into(), keys: vec![key] },
        tls: Tls {
            certificate_file: Some(files.certificate_file),
            key_file: Some(files.key_file),
            ca_file: brokers_ca.then_some(files.ca_file),
        },
        limits: Limits { handshake_ms: LONG_MS, ping_ms: LONG_MS, write_ms: LONG_MS, request_ms, ..Limits::default() },
    };
    Shield::start(config).await.unwrap()
}

fn options(cluster: &Cluster, shield: &Shield, scheme: &str, ca: Option<&str>) -> Options {
    let mut options = Options::new([format!("{scheme}://{}", shield.address())], cluster.admin());
    options.ca = ca.map(|ca| ca.as_bytes().to_vec());
    (options.request_timeout, options.connect_timeout) = (support::PATIENCE, support::PATIENCE);
    options
}

async fn refused(cluster: &Cluster, shield: &Shield, scheme: &str, ca: Option<&str>) -> String {
    let refusal = Client::connect(options(cluster, shield, scheme, ca)).await.err();
    let error = refusal.expect("the client is refused").to_string();
    assert!(!error.contains('\n'), "{error}");
    error
}

#[tokio::test(flavor = "multi_thread")]
async fn events_travel_with_tls_on_both_sides_of_the_shield() {
    let (ours, theirs) = (Certificates::generate(), Certificates::generate());
    let cluster = Cluster::start_with(1, Some(&ours)).await;
    cluster.create(0, "events", 1).await.unwrap();
    let shield = shield(&cluster, true, LONG_MS).await;
    assert!(shield.is_secure());
    assert!(refused(&cluster, &shield, "wss", None).await.contains("TLS needs the certificate of the CA"));
    let error = refused(&cluster, &shield, "wss", Some(&theirs.ca)).await;
    assert!(error.contains("TLS handshake: invalid peer certificate"), "{error}");
    let error = refused(&cluster, &shield, "ws", Some(&ours.ca)).await;
    assert!(error.contains("wss://"), "{error}");

    let options = options(&cluster, &shield, "wss", Some(&ours.ca));
    let client = Client::connect(options).await.expect("a client that trusts the CA is let in");
    let producer = client.producer("events", ProducerOptions::default()).await.unwrap();
    let payload = vec![7; 300_000];
    for _ in 0..10 {
        producer.publish(NewEvent::new(payload.clone())).await.unwrap();
    }
    let options = ConsumerOptions { from: From::Earliest, stop_at_end: true, ..Default::default() };
    let mut consumer = client.consumer("events", options).await.unwrap();
    let mut count = 0;
    while let Some(event) = consumer.next().await.unwrap() {
        assert_eq!(event.payload, payload);
        count += 1;
    }
    assert_eq!(count, 10);
    shield.shutdown().await;
    cluster.shutdown().await;
}

/// The Shield lets its clients in by itself; what it lacks towards the nodes shows with a request,
/// and clients are not told more than that the Spine gives no answer.
#[tokio::test(flavor = "multi_thread")]
async fn a_shield_without_the_ca_of_the_nodes_reaches_none() {
    let ours = Certificates::generate();
    let cluster = Cluster::start_with(1, Some(&ours)).await;
    cluster.create(0, "events", 1).await.unwrap();
    // Nothing is answered, however long it takes: it need not take long.
    let shield = shield(&cluster, false, 200).await;
    let options = options(&cluster, &shield, "wss", Some(&ours.ca));
    let options = Options { request_timeout: Duration::from_secs(2), ..options };
    let client = Client::connect(options).await.expect("the Shield lets it in by itself");
    let error = client.describe_topic("events").await.err().unwrap().to_string();
    assert!(error.contains("timed out"), "{error}");
    shield.shutdown().await;
    cluster.shutdown().await;
}
