//! One node on real ports, as clients see it.

use crate::support::{Client, Cluster, PATIENCE, authorized, batch, batch_of, fetch_from};
use arqon_proto::{Claims, OPERATOR_TOPIC, ProducerStamp, limits, wire};
use arqon_spine::{Listeners, Node};
use prost::Message;
use wire::{ErrorCode, frame::Body};

#[tokio::test(flavor = "multi_thread")]
async fn what_is_produced_is_fetched_and_survives_a_restart() {
    let mut cluster = Cluster::start(1).await;
    let description = cluster.create(0, "events", 2).await.unwrap();
    assert_eq!((description.partitions.len(), description.partitions[1].leader_node), (2, 1));
    let mut client = cluster.connect(0, &cluster.token("acme", &["publish:events", "subscribe:events"])).await;
    assert_eq!((client.welcome.tenant.as_str(), client.welcome.node), ("acme", 1));
    assert_eq!(client.produce("events", 1, batch(&["a", "b"])).await.unwrap().base_offset, 0);
    assert_eq!(client.produce("events", 1, batch(&["c"])).await.unwrap().base_offset, 2);
    let fetch = wire::Fetch { partition: 1, ..fetch_from("events", 0) };
    assert_eq!(client.fetch(fetch.clone()).await.unwrap(), ["a", "b", "c"]);
    assert_eq!(client.fetch(fetch_from("events", 0)).await.unwrap(), Vec::<String>::new());
    drop(client);

    cluster.stop(0).await;
    cluster.restart(0).await;
    cluster.wait_ready().await;
    let mut client = cluster.connect(0, &cluster.admin()).await;
    crate::support::until("the partition leads again", async || match client.fetch(fetch.clone()).await {
        Ok(payloads) => payloads == ["a", "b", "c"],
        Err(error) => {
            assert_eq!(error.code(), ErrorCode::NotLeader, "{error:?}");
            false
        }
    })
    .await;
    cluster.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_poll_sees_what_comes_and_pipelined_batches_keep_their_order() {
    let cluster = Cluster::start(1).await;
    cluster.create(0, "events", 1).await.unwrap();
    let mut reader = cluster.connect(0, &cluster.admin()).await;
    let poll = wire::Fetch { wait_ms: limits::POLL_WAIT_MS_MAX, ..fetch_from("events", 0) };
    reader.send(Body::Fetch(poll), &[]).await;
    let mut writer = cluster.connect(0, &cluster.admin()).await;
    let count = 200;
    for sequence in 0..count {
        let producer = ProducerStamp { id: [7; 16], epoch: 0, base_sequence: sequence };
        let one = batch_of("", [format!("{sequence:04}").into()], Some(producer));
        let request = wire::Produce { topic: "events".into(), ..Default::default() };
        writer.send(Body::Produce(request), &[one]).await;
    }
    let mut answered = std::collections::HashSet::new();
    for _ in 0..count {
        let (id, answer) = writer.receive().await.unwrap();
        assert!(matches!(answer, Ok((Body::Produced(_), _))), "{id}: {answer:?}");
        assert!(answered.insert(id));
    }
    let (_, polled) = reader.receive().await.unwrap();
    assert!(!crate::support::payloads(polled.unwrap().1).is_empty());
    let all = reader.fetch(fetch_from("events", 0)).await.unwrap();
    assert_eq!(all, (0..count).map(|sequence| format!("{sequence:04}")).collect::<Vec<_>>());
    let again = batch_of("", ["x".into()], Some(ProducerStamp { id: [7; 16], epoch: 0, base_sequence: count - 1 }));
    let refused = writer.produce("events", 0, again).await.unwrap_err();
    assert_eq!((refused.code(), refused.duplicates[0].offset), (ErrorCode::Duplicate, Some(count - 1)));
    cluster.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_may_not_is_refused_with_the_reason() {
    let cluster = Cluster::start(1).await;
    cluster.create(0, "a.b", 1).await.unwrap();
    let address = cluster.addresses[0].client;
    let refused = async |token: &str| Client::connect(address, token).await.map(|_| ()).unwrap_err();
    let other = arqon_proto::TokenKeyPair::generate().unwrap();
    let forger =
        arqon_proto::TokenSigner::from_pem(arqon_proto::TokenAlgorithm::EdDSA, None, other.private_key_pem.as_bytes())
            .unwrap();
    let expired = Claims { exp: crate::support::now_seconds() - 1, ..cluster.claims("acme", &[]) };
    for (token, reason) in [
        (String::new(), "missing"),
        ("garbage".into(), "malformed"),
        (forger.mint(&cluster.claims("acme", &["publish:*"])).unwrap(), "signature"),
        (cluster.signer.mint(&expired).unwrap(), "expired"),
    ] {
        let error = refused(&token).await;
        assert_eq!(error.code(), ErrorCode::AuthenticationFailed);
        assert!(error.message.contains(reason), "{}", error.message);
    }
    let mut reader = cluster.connect(0, &cluster.token("acme", &["subscribe:a.*"])).await;
    let denied = reader.produce("a.b", 0, batch(&["x"])).await.unwrap_err();
    assert_eq!(denied.code(), ErrorCode::AuthorizationDenied);
    assert_eq!(denied.message, "the token does not allow publish:a.b");
    assert_eq!(reader.fetch(fetch_from("b", 0)).await.unwrap_err().code(), ErrorCode::AuthorizationDenied);
    assert_eq!(reader.fetch(fetch_from(OPERATOR_TOPIC, 0)).await.unwrap_err().code(), ErrorCode::AuthorizationDenied);
    // Another tenant's topic of the same name does not exist.
    let mut stranger = cluster.connect(0, &cluster.token("other", &["subscribe:*", "publish:*"])).await;
    for error in [
        stranger.fetch(fetch_from("a.b", 0)).await.unwrap_err(),
        stranger.produce("a.b", 0, batch(&["x"])).await.unwrap_err(),
        stranger.describe("a.b").await.unwrap_err(),
    ] {
        assert_eq!((error.code(), error.field.as_str()), (ErrorCode::TargetNotFound, "a.b"), "{error:?}");
    }
    let mut admin = cluster.connect(0, &cluster.admin()).await;
    let missing = admin.produce("a.b", 7, batch(&["x"])).await.unwrap_err();
    assert_eq!((missing.code(), missing.field.as_str()), (ErrorCode::TargetNotFound, "a.b/7"));
    cluster.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_frames_end_the_session_and_bad_requests_do_not() {
    let cluster = Cluster::start(1).await;
    cluster.create(0, "events", 1).await.unwrap();
    let admin = cluster.admin();
    let address = cluster.addresses[0].client;

    let mut client = cluster.connect(0, &admin).await;
    let mut torn = batch(&["x"]);
    torn.header.records_crc ^= 1;
    assert_eq!(client.produce("events", 0, torn).await.unwrap_err().field, "batch");
    let produce = || Body::Produce(wire::Produce { topic: "events".into(), ..Default::default() });
    let two = client.request(produce(), &[batch(&["x"]), batch(&["y"])]).await.unwrap_err();
    assert_eq!(two.code(), ErrorCode::ValidationError);
    let mut stamped = batch(&["x"]);
    stamped.set_stamps(bytes::Bytes::from_static(b"forged"));
    assert_eq!(client.produce("events", 0, stamped).await.unwrap_err().field, "stamps");
    let odd = client.request(Body::Produced(wire::Produced::default()), &[]).await.unwrap_err();
    assert_eq!(odd.field, "body");
    assert_eq!(client.produce("events", 0, batch(&["still here"])).await.unwrap().base_offset, 0);
    drop(client);

    // Larger than any frame: refused by its first bytes.
    let mut client = cluster.connect(0, &admin).await;
    client.send_bytes(&(limits::FRAME_SIZE_MAX as u32).to_le_bytes()).await;
    let (id, refused) = client.receive().await.unwrap();
    let refused = refused.unwrap_err();
    assert_eq!((id, refused.field.as_str()), (0, "frame"));
    assert!(refused.message.contains("limit is 16777216"), "{}", refused.message);
    assert!(client.receive().await.is_none(), "closed");

    // Before the token was seen, frames must be small.
    let mut client = Client::raw(address).await;
    client.send_bytes(&(1u32 << 20).to_le_bytes()).await;
    assert_eq!(client.receive().await.unwrap().1.unwrap_err().field, "frame");
    assert!(client.receive().await.is_none(), "closed");

    let mut client = cluster.connect(0, &admin).await;
    client.send_bytes(&[12, 0, 0, 0, 8, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]).await;
    assert_eq!(client.receive().await.unwrap().1.unwrap_err().field, "frame");
    assert!(client.receive().await.is_none(), "closed");

    let newer = wire::Hello { version: 2, token: admin.clone(), ..Default::default() };
    let refused = Client::connect_with(address, newer).await.map(|_| ()).unwrap_err();
    assert_eq!((refused.code(), refused.field.as_str()), (ErrorCode::UnsupportedVersion, "version"));
    assert!(refused.message.contains("client speaks version 2, this server speaks version 1"), "{}", refused.message);
    // One that speaks more versions is answered in one that both know.
    let both = wire::Hello { version: 1, version_max: 9, token: admin.clone(), ..Default::default() };
    assert_eq!(Client::connect_with(address, both).await.map(|client| client.welcome.version).unwrap(), 1);
    cluster.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_ends_with_its_token() {
    let cluster = Cluster::start(1).await;
    // Long enough for a slow machine to connect with it.
    let short = Claims { exp: crate::support::now_seconds() + 5, ..cluster.claims("acme", &[]) };
    let mut client = cluster.connect(0, &cluster.signer.mint(&short).unwrap()).await;
    let (id, ended) = client.receive().await.unwrap();
    let ended = ended.unwrap_err();
    assert_eq!(
        (id, ended.code(), ended.message.as_str()),
        (0, ErrorCode::AuthenticationFailed, "the token has expired")
    );
    assert!(client.receive().await.is_none(), "closed");
    cluster.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_wait_for_the_clients_credit() {
    let cluster = Cluster::start(1).await;
    cluster.create(0, "events", 1).await.unwrap();
    let hello = wire::Hello { version: 1, token: cluster.admin(), credit_bytes: 1_000, ..Default::default() };
    let mut client = Client::connect_with(cluster.addresses[0].client, hello).await.unwrap();
    let payload = "x".repeat(700);
    client.produce("events", 0, batch(&[&payload])).await.unwrap();
    assert_eq!(client.fetch(fetch_from("events", 0)).await.unwrap(), std::slice::from_ref(&payload));
    client.send(Body::Fetch(fetch_from("events", 0)), &[]).await;
    let ping = client.send(Body::Ping(wire::Ping {}), &[]).await;
    let (id, answer) = client.receive().await.unwrap();
    assert_eq!(id, ping, "the fetch waits, the ping does not: {answer:?}");
    client.send(Body::Credit(wire::Credit { bytes: 1_000 }), &[]).await;
    let (_, fetched) = client.receive().await.unwrap();
    assert_eq!(crate::support::payloads(fetched.unwrap().1), [payload]);
    cluster.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn jobs_are_leased_to_live_operators_and_have_one_result() {
    let cluster = Cluster::start(1).await;
    let jobs = cluster.create(0, "genesis.jobs", 1).await.unwrap();
    assert_eq!(jobs.results_topic, "genesis.results");
    let permissions = ["publish:genesis.jobs", "subscribe:genesis.*", "execute:genesis"];
    let mut client = cluster.connect(0, &cluster.token("acme", &permissions)).await;
    client.produce("genesis.jobs", 0, batch(&["job"])).await.unwrap();
    let work = |operator: &str| wire::Work {
        topic: "genesis.jobs".into(),
        group: "g".into(),
        worker: "w".into(),
        operator_id: operator.into(),
        jobs_max: 10,
        wait_ms: limits::POLL_WAIT_MS_MAX,
        lease_ms: 600_000,
        ..Default::default()
    };
    let unknown = client.work(work("g1")).await.unwrap_err();
    assert_eq!((unknown.code(), unknown.field.as_str()), (ErrorCode::TargetNotFound, "g1"));
    let registration = wire::OperatorRegistration {
        operator_id: "g1".into(),
        operator_type: "genesis".into(),
        version: "1.2".into(),
        ..Default::default()
    };
    let registered = batch_of("arqonbus.operator.registration.v1", [registration.encode_to_vec().into()], None);
    client.produce(OPERATOR_TOPIC, 0, registered).await.unwrap();
    let mut leased = None;
    crate::support::until("the node knows the operator", async || {
        leased = client.work(work("g1")).await.ok();
        leased.is_some()
    })
    .await;
    let (leased, payloads) = leased.unwrap();
    assert_eq!(payloads, ["job"]);
    let lease = leased.leases[0].clone();
    // The token of the lease is the right to write the result; no publish:genesis.results.
    let produce = wire::Produce {
        topic: "genesis.results".into(),
        lease_tokens: vec![lease.token.clone()],
        ..Default::default()
    };
    client.request(Body::Produce(produce.clone()), &[batch(&["result"])]).await.unwrap();
    let second = client.request(Body::Produce(produce), &[batch(&["another"])]).await.unwrap_err();
    assert_eq!(second.code(), ErrorCode::Duplicate);
    let bare = client.produce("genesis.results", 0, batch(&["forged"])).await.unwrap_err();
    assert_eq!(bare.code(), ErrorCode::AuthorizationDenied);
    let ack = wire::Ack {
        topic: "genesis.jobs".into(),
        group: "g".into(),
        leases: vec![wire::LeaseRef { offset: lease.offset, attempt: lease.attempt }],
        ..Default::default()
    };
    let settled = client.request(Body::Ack(ack), &[]).await.unwrap();
    assert!(matches!(settled.0, Body::Settled(settled) if settled.lost.is_empty()));
    assert_eq!(client.fetch(fetch_from("genesis.results", 0)).await.unwrap(), ["result"]);

    let mut control = cluster.control(0).await;
    let operators = control.list_operators(authorized(wire::ListOperatorsRequest {}, &cluster.admin())).await.unwrap();
    let operators = operators.into_inner().operators;
    assert_eq!((operators.len(), operators[0].live), (1, true));
    cluster.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_that_leaves_gives_its_jobs_back_at_once() {
    let cluster = Cluster::start(1).await;
    cluster.create(0, "genesis.jobs", 1).await.unwrap();
    let mut client = cluster.connect(0, &cluster.admin()).await;
    client.produce("genesis.jobs", 0, batch(&["job"])).await.unwrap();
    let registration = |id: &str| {
        let message = wire::OperatorRegistration {
            operator_id: id.into(),
            operator_type: "genesis".into(),
            version: "1".into(),
            ..Default::default()
        };
        batch_of("arqonbus.operator.registration.v1", [message.encode_to_vec().into()], None)
    };
    client.produce(OPERATOR_TOPIC, 0, registration("g1")).await.unwrap();
    client.produce(OPERATOR_TOPIC, 0, registration("g2")).await.unwrap();
    let work = |operator: &str| wire::Work {
        topic: "genesis.jobs".into(),
        group: "g".into(),
        worker: operator.into(),
        operator_id: operator.into(),
        jobs_max: 1,
        wait_ms: limits::POLL_WAIT_MS_MAX,
        lease_ms: 600_000,
        ..Default::default()
    };
    crate::support::until("the first operator has the job", async || {
        client.work(work("g1")).await.is_ok_and(|(leased, _)| leased.leases.len() == 1)
    })
    .await;
    let leaving = wire::OperatorHeartbeat { operator_id: "g1".into(), running_jobs: 0, leaving: true };
    let leaving = batch_of("arqonbus.operator.heartbeat.v1", [leaving.encode_to_vec().into()], None);
    client.produce(OPERATOR_TOPIC, 0, leaving).await.unwrap();
    let (leased, payloads) = client.work(work("g2")).await.unwrap();
    assert_eq!((payloads.as_slice(), leased.leases[0].attempt), (["job".to_owned()].as_slice(), 2));
    cluster.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_control_plane_asks_for_tokens_and_names_what_is_wrong() {
    let cluster = Cluster::start(1).await;
    let mut control = cluster.control(0).await;
    let bare = control.list_topics(wire::ListTopicsRequest {}).await.unwrap_err();
    assert_eq!(bare.code(), tonic::Code::Unauthenticated);
    assert!(bare.message().starts_with("AUTHENTICATION_FAILED: "), "{}", bare.message());
    let config = wire::TopicConfig { name: "x".into(), retention_ms: 1, ..Default::default() };
    let create = wire::CreateTopicRequest { config: Some(config) };
    let denied = control.create_topic(authorized(create, &cluster.token("acme", &["publish:*"]))).await.unwrap_err();
    assert!(denied.message().starts_with("AUTHORIZATION_DENIED: "), "{}", denied.message());
    for name in ["system.x", "a b", ""] {
        let refused = cluster.create(0, name, 1).await.unwrap_err();
        assert!(matches!(refused.code(), tonic::Code::InvalidArgument | tonic::Code::PermissionDenied), "{refused}");
    }
    cluster.create(0, "x.jobs", 1).await.unwrap();
    assert_eq!(cluster.create(0, "x.jobs", 1).await.unwrap_err().code(), tonic::Code::AlreadyExists);
    let topics =
        control.list_topics(authorized(wire::ListTopicsRequest {}, &cluster.admin())).await.unwrap().into_inner();
    let names: Vec<_> = topics.topics.iter().map(|topic| topic.topic.as_str()).collect();
    assert_eq!(names, ["x.jobs", "x.jobs.dead", "x.results"]);
    let status =
        control.cluster_status(authorized(wire::ClusterStatusRequest {}, &cluster.admin())).await.unwrap().into_inner();
    assert_eq!((status.metadata_leader, status.topic_count, status.leaderless_count), (1, 4, 0));
    let delete = wire::DeleteTopicRequest { topic: "x.jobs".into() };
    control.delete_topic(authorized(delete, &cluster.admin())).await.unwrap();
    let mut client = cluster.connect(0, &cluster.admin()).await;
    assert_eq!(client.describe("x.jobs").await.unwrap_err().code(), ErrorCode::TargetNotFound);
    let gone = client.produce("x.jobs", 0, batch(&["x"])).await.unwrap_err();
    assert_eq!(gone.code(), ErrorCode::TargetNotFound);
    cluster.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_admin_port_shows_health_and_positions() {
    let cluster = Cluster::start(1).await;
    cluster.create(0, "events", 1).await.unwrap();
    let mut client = cluster.connect(0, &cluster.admin()).await;
    client.produce("events", 0, batch(&["a", "b", "c"])).await.unwrap();
    assert_eq!(cluster.get(0, "/healthz").await.0, 200);
    assert_eq!(cluster.get(0, "/readyz").await.0, 200);
    assert_eq!(cluster.get(0, "/other").await.0, 404);
    let (status, text) = cluster.get(0, "/metrics").await;
    assert_eq!(status, 200);
    for line in [
        r#"arqon_partition_committed{tenant="acme",topic="events",partition="0"} 3"#,
        r#"arqon_partition_leader{tenant="acme",topic="events",partition="0"} 1"#,
        r#"arqon_build_info{program="test",peer_protocol="versions 1 to 2",client_protocol="version 1"} 1"#,
        "arqon_connections 1",
        "arqon_produce_records_total 3",
        "arqon_produce_commit_seconds_count 1",
        "arqon_log_flush_seconds_bucket",
        "# EOF",
    ] {
        assert!(text.contains(line), "{line} in\n{text}");
    }
    let mut families = std::collections::HashSet::new();
    let twice = text.lines().filter(|line| line.starts_with("# TYPE ")).find(|line| !families.insert(*line));
    assert_eq!(twice, None, "a collector refuses a family that comes twice");
    cluster.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_cannot_start_says_why_in_one_line() {
    let mut cluster = Cluster::start(1).await;
    let config = cluster.configs[0].clone();
    let starting = async |config: arqon_spine::Config| Node::start(config).await.map(|_| ()).unwrap_err().to_string();
    let busy = starting(config.clone()).await;
    let expected = format!("listen.client: cannot listen on {}", cluster.addresses[0].client);
    assert!(busy.starts_with(&expected), "{busy}");

    let mut elsewhere = config.clone();
    for address in [
        &mut elsewhere.listen.client,
        &mut elsewhere.listen.peer,
        &mut elsewhere.listen.control,
        &mut elsewhere.listen.admin,
    ] {
        *address = "127.0.0.1:0".into();
    }
    let in_use = starting(elsewhere.clone()).await;
    assert!(in_use.starts_with("data: "), "{in_use}");
    cluster.stop(0).await;
    elsewhere.cluster = "other".into();
    let foreign = starting(elsewhere.clone()).await;
    assert!(foreign.starts_with("data: ") && foreign.contains("test"), "{foreign}");
    let keyless =
        arqon_spine::Config { auth: arqon_spine::Auth { keys: vec![], ..elsewhere.auth.clone() }, ..elsewhere };
    assert!(starting(keyless).await.starts_with("auth.keys: "));
    for text in [busy, in_use, foreign] {
        assert!(!text.contains('\n'), "{text}");
    }
    assert!(Listeners::bind(&config.listen_addresses().unwrap()).is_ok(), "a stopped node leaves its ports");
    tokio::time::timeout(PATIENCE, cluster.shutdown()).await.unwrap();
}
