//! The HTTP operator against a small worker.

#[path = "../../../raft/tests/support/loopback.rs"]
mod loopback;

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use arqon_sdk::Event;
use axum::{
    Router,
    body::Bytes,
    extract::State,
    http::{HeaderMap, StatusCode},
    response::{IntoResponse, Redirect, Response},
    routing::post,
};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
    task::JoinHandle,
};

use super::{HttpOperator, HttpShimConfig};
use crate::{JobError, Operator};

const ANSWER_LIMIT: usize = 10_000;
/// What takes longer never comes.
const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Clone, Default)]
struct Calls(Arc<AtomicU32>);

/// Answers as the job's `ask` says.
async fn work(State(calls): State<Calls>, headers: HeaderMap, body: Bytes) -> Response {
    calls.0.fetch_add(1, Ordering::SeqCst);
    let job: Value = serde_json::from_slice(&body).unwrap();
    match job["ask"].as_str().unwrap_or_default() {
        "refuse" => (StatusCode::UNPROCESSABLE_ENTITY, r#"{"error":"not a checkerboard"}"#).into_response(),
        "crash" => (StatusCode::INTERNAL_SERVER_ERROR, "<html>Traceback</html>").into_response(),
        "sleep" => std::future::pending().await,
        "junk" => "{\"seed\":".into_response(),
        "empty" => StatusCode::NO_CONTENT.into_response(),
        "large" => vec![b' '; ANSWER_LIMIT + 1].into_response(),
        "large-error" => (StatusCode::BAD_GATEWAY, vec![b'x'; 1 << 20]).into_response(),
        "move" => Redirect::temporary("http://127.0.0.1:1/elsewhere").into_response(),
        "headers" => {
            let seen: Vec<_> = headers.iter().map(|(name, value)| (name.as_str(), value.to_str().unwrap())).collect();
            serde_json::to_string(&seen.into_iter().collect::<std::collections::BTreeMap<_, _>>())
                .unwrap()
                .into_response()
        }
        _ => format!(r#"{{"job_id":"other","seed":{{"echo":{}}},"error_rms":2.50}}"#, job["width"]).into_response(),
    }
}

/// A worker on a free port, gone when dropped.
struct Worker {
    url: String,
    calls: Calls,
    task: JoinHandle<()>,
}

impl Worker {
    async fn start() -> Self {
        Self::on(TcpListener::bind("127.0.0.1:0").await.unwrap())
    }

    fn on(listener: TcpListener) -> Self {
        let url = format!("http://{}/distill", listener.local_addr().unwrap());
        let calls = Calls::default();
        let router = Router::new().route("/distill", post(work)).with_state(calls.clone());
        let task = tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self { url, calls, task }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Where nobody listens, and nobody else takes the port meanwhile.
async fn free_address() -> SocketAddr {
    let listener = TcpListener::bind((loopback::own_loopback(), 0)).await.expect("a free port");
    listener.local_addr().expect("the address of a listener")
}

fn operator(url: &str, more: &str) -> HttpOperator {
    let text = format!(
        r#"
servers = ["127.0.0.1:7700"]
operator_id = "g-1"
operator_type = "genesis"
version = "1"
jobs_topic = "genesis.jobs"
url = "{url}"
max_response_bytes = {ANSWER_LIMIT}
{more}
"#
    );
    HttpOperator::new(&HttpShimConfig::parse(&text).unwrap()).unwrap()
}

fn job(payload: &Value) -> Event {
    Event {
        id: [7; 16],
        topic: "genesis.jobs".into(),
        partition: 2,
        offset: 41,
        schema: "arqonbus.genesis.job.v1".into(),
        payload: payload.to_string().into(),
        ..Event::default()
    }
}

async fn failure(operator: &HttpOperator, ask: &str) -> String {
    match operator.run(&job(&json!({"job_id": "j", "ask": ask})), 1).await {
        Err(JobError::Failed(message)) => message,
        other => panic!("{ask}: {other:?}"),
    }
}

#[tokio::test]
async fn an_answer_is_the_result() {
    let worker = Worker::start().await;
    let operator = operator(&worker.url, "");
    operator.ready().await;
    let result = operator.run(&job(&json!({"job_id": "j-1", "width": 96})), 1).await.unwrap();
    assert_eq!(&result.payload[..], br#"{"job_id":"j-1","seed":{"echo":96},"error_rms":2.50}"#);
    let anonymous = operator.run(&job(&json!({"width": 1})), 1).await.unwrap();
    let anonymous: Value = serde_json::from_slice(&anonymous.payload).unwrap();
    assert_eq!(anonymous["job_id"], "07070707-0707-0707-0707-070707070707");
}

#[tokio::test]
async fn what_a_worker_does_wrong_is_a_failure_that_says_so() {
    let worker = Worker::start().await;
    let patient = operator(&worker.url, "timeout_ms = 60000");
    let hasty = operator(&worker.url, "timeout_ms = 2000");
    for (ask, message) in [
        ("refuse", "the worker answered 422: not a checkerboard"),
        ("crash", "the worker answered 500"),
        ("large-error", "the worker answered 502"),
        ("move", "the worker answered 307"),
        ("sleep", "the worker did not answer within 2000 ms"),
        ("junk", "the worker's answer is not JSON: "),
        ("empty", "the worker's answer is not JSON: "),
        ("large", "the worker's answer is larger than 10000 bytes"),
    ] {
        let found = failure(if ask == "sleep" { &hasty } else { &patient }, ask).await;
        assert!(found.starts_with(message) && !found.contains('\n'), "{ask}: {found}");
    }
    assert_eq!(worker.calls.0.load(Ordering::SeqCst), 8, "none of them was tried twice");
}

#[tokio::test]
async fn jobs_that_the_worker_could_not_read_do_not_reach_it() {
    let worker = Worker::start().await;
    let operator = operator(&worker.url, "pass_headers = [\"colour\"]");
    let good = job(&json!({}));
    for bad in [
        Event { payload: "[]".into(), ..good.clone() },
        Event { payload: "\u{0}".into(), ..good.clone() },
        Event { schema: "arqonbus.nvm.job.v1".into(), ..good.clone() },
        Event { headers: [("colour".into(), "red\r\nHost: evil".into())].into(), ..good.clone() },
    ] {
        assert!(matches!(operator.run(&bad, 1).await, Err(JobError::Failed(_))));
    }
    assert_eq!(worker.calls.0.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn headers_say_where_the_job_stands() {
    let worker = Worker::start().await;
    let more = "pass_headers = [\"colour\", \"shape\"]\nheaders = { authorization = \"Bearer b\", x-static = \"s\" }";
    let operator = operator(&worker.url, more);
    let mut asked = job(&json!({"ask": "headers"}));
    asked.traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".into();
    asked.headers = [("colour".into(), "red".into()), ("secret".into(), "x".into())].into();
    let result = operator.run(&asked, 3).await.unwrap();
    let seen: Value = serde_json::from_slice(&result.payload).unwrap();
    let seen = &seen["seed"];
    for (name, value) in [
        ("content-type", "application/json"),
        ("traceparent", asked.traceparent.as_str()),
        ("x-arqon-job-topic", "genesis.jobs"),
        ("x-arqon-job-partition", "2"),
        ("x-arqon-job-offset", "41"),
        ("x-arqon-job-attempt", "3"),
        ("colour", "red"),
        ("authorization", "Bearer b"),
        ("x-static", "s"),
    ] {
        assert_eq!(seen[name], value, "{name}");
    }
    assert!(seen.get("secret").is_none() && seen.get("shape").is_none());
}

#[tokio::test]
async fn a_worker_that_is_not_there_keeps_its_jobs_in_the_queue() {
    let address = free_address().await;
    let operator = Arc::new(operator(&format!("http://{address}/distill"), "retries = 1\ndown_delay_ms = 1234"));
    match operator.run(&job(&json!({"width": 1})), 1).await {
        Err(JobError::Retry { delay, reason }) => {
            assert_eq!(delay, Duration::from_millis(1234));
            assert!(reason.starts_with("the worker cannot be reached: "), "{reason}");
        }
        other => panic!("{other:?}"),
    }
    let waiting = operator.clone();
    let ready = tokio::spawn(async move { waiting.ready().await });
    let watched = tokio::time::timeout(Duration::from_millis(300), async {
        while !ready.is_finished() {
            tokio::task::yield_now().await
        }
    });
    assert!(watched.await.is_err(), "not ready while nobody listens");
    let worker = Worker::on(TcpListener::bind(address).await.unwrap());
    tokio::time::timeout(PATIENCE, ready).await.expect("the worker is found").unwrap();
    assert_eq!(worker.calls.0.load(Ordering::SeqCst), 0, "looking for it is not a job");
    operator.run(&job(&json!({"width": 1})), 2).await.unwrap();
}

#[tokio::test]
async fn a_worker_that_comes_up_during_the_retries_gets_the_job() {
    let address = free_address().await;
    let operator = operator(&format!("http://{address}/distill"), "retries = 10");
    let event = job(&json!({"width": 1}));
    let mut run = std::pin::pin!(operator.run(&event, 1));
    // The first tries fail while nobody listens.
    assert!(tokio::time::timeout(Duration::from_millis(250), &mut run).await.is_err());
    let _worker = Worker::on(TcpListener::bind(address).await.unwrap());
    run.await.unwrap();
}

#[tokio::test]
async fn a_connection_that_ends_early_sends_the_job_back_without_a_second_try() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/distill", listener.local_addr().unwrap());
    let server = tokio::spawn(async move {
        // Half an answer, then the end: once with and once without a first line.
        for part in ["", "HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{"] {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = [0; 4096];
            let _ = stream.read(&mut request).await.unwrap();
            stream.write_all(part.as_bytes()).await.unwrap();
        }
        // Nobody comes a third time before this.
        listener
    });
    let operator = operator(&url, "retries = 3");
    for _ in 0..2 {
        match operator.run(&job(&json!({})), 1).await {
            Err(JobError::Retry { reason, .. }) => assert!(reason.starts_with("the worker closed the"), "{reason}"),
            other => panic!("{other:?}"),
        }
    }
    let listener = server.await.unwrap();
    let third = tokio::time::timeout(Duration::from_millis(200), listener.accept()).await;
    assert!(third.is_err(), "a job whose fate is unknown is not posted again in place");
}

#[tokio::test]
async fn a_worker_that_answers_drop_by_drop_is_cut_off_in_time() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/distill", listener.local_addr().unwrap());
    let server = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut request = [0; 4096];
        let _ = stream.read(&mut request).await.unwrap();
        stream.write_all(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n").await.unwrap();
        while stream.write_all(b"1\r\n \r\n").await.is_ok() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    let operator = operator(&url, "timeout_ms = 2000");
    let failed = tokio::time::timeout(PATIENCE, failure(&operator, "")).await.expect("it is cut off");
    assert_eq!(failed, "the worker did not answer within 2000 ms");
    server.abort();
}
