//! Nodes with certificates, and clients that trust the right ones, the wrong ones or none.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::time::Duration;

use crate::support::{Certificates, Cluster, PATIENCE};
use arqon_proto::tls_client;
use arqon_sdk::{Client, ConsumerOptions, Error, From, NewEvent, Options, ProducerOptions};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};
use tokio_rustls::{TlsConnector, rustls::pki_types::ServerName};

async fn client(cluster: &Cluster, server: usize, ca: Option<&str>) -> Result<Client, Error> {
    let mut options = Options::new([cluster.addresses[server].client.to_string()], cluster.admin());
    options.ca = ca.map(|ca| ca.as_bytes().to_vec());
    options.request_timeout = Duration::from_secs(10);
    Client::connect(options).await
}

async fn publish_and_read(client: &Client, topic: &str, count: usize) {
    let producer = client.producer(topic, ProducerOptions::default()).await.unwrap();
    // More than a socket buffer holds, so that TLS has to hold bytes back.
    let payload = vec![7; 200_000];
    for _ in 0..count {
        producer.publish(NewEvent::new(payload.clone())).await.unwrap();
    }
    let options = ConsumerOptions { from: From::Earliest, stop_at_end: true, ..Default::default() };
    let mut consumer = client.consumer(topic, options).await.unwrap();
    let mut read = 0;
    while let Some(event) = timeout(PATIENCE, consumer.next()).await.unwrap().unwrap() {
        assert_eq!(event.payload, payload);
        read += 1;
    }
    assert_eq!(read, count);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_needs_the_ca_of_the_node() {
    let (ours, theirs) = (Certificates::generate(), Certificates::generate());
    let cluster = Cluster::start_with(1, Some(&ours)).await;
    cluster.create(0, "events", 1).await.unwrap();
    for (ca, part) in
        [(None, "expects a TLS handshake"), (Some(theirs.ca.as_str()), "TLS handshake: invalid peer certificate")]
    {
        let error = client(&cluster, 0, ca).await.err().unwrap().to_string();
        assert!(error.contains(part) && !error.contains('\n'), "{error}");
    }
    publish_and_read(&client(&cluster, 0, Some(&ours.ca)).await.unwrap(), "events", 20).await;
    // The admin port stays plain.
    assert_eq!(cluster.get(0, "/healthz").await.0, 200);
    cluster.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_without_tls_is_named_to_a_client_that_wants_it() {
    let cluster = Cluster::start(1).await;
    let error = client(&cluster, 0, Some(&Certificates::generate().ca)).await.err().unwrap().to_string();
    assert!(error.contains("TLS handshake: ") && !error.contains('\n'), "{error}");
    cluster.shutdown().await;
}

/// Clients are sent on to leaders, which they reach with TLS too; peers want to see a certificate.
#[tokio::test(flavor = "multi_thread")]
async fn three_nodes_with_certificates_replicate_and_keep_strangers_out() {
    let ours = Certificates::generate();
    let cluster = Cluster::start_with(3, Some(&ours)).await;
    for server in 0..3 {
        let topic = format!("events-{server}");
        cluster.create(server, &topic, 3).await.unwrap();
        publish_and_read(&client(&cluster, server, Some(&ours.ca)).await.unwrap(), &topic, 6).await;
    }
    let peer = TcpStream::connect(cluster.addresses[0].peer).await.unwrap();
    let stranger = TlsConnector::from(tls_client(ours.ca.as_bytes(), None).unwrap());
    let mut peer = stranger.connect(ServerName::try_from("127.0.0.1").unwrap(), peer).await.unwrap();
    // The refusal may already be there before this is written.
    peer.write_all(b"hello").await.ok();
    let refused = timeout(PATIENCE, peer.read_u8()).await.unwrap().unwrap_err().to_string();
    assert!(refused.contains("CertificateRequired"), "{refused}");
    cluster.shutdown().await;
}
