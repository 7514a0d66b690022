//! The admin port: metrics and health over HTTP. It shows no payloads and takes no commands.

use std::{sync::Arc, time::Duration};

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header::CONTENT_TYPE},
    response::{IntoResponse, Response},
    routing::get,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::watch,
    time::timeout,
};

use crate::server::Shared;

const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
const REACH_TIME: Duration = Duration::from_secs(1);

/// Serves until the Shield stops.
pub(crate) async fn serve(shared: Arc<Shared>, listener: TcpListener, mut stopping: watch::Receiver<bool>) {
    let router = Router::new()
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(ready))
        .route("/metrics", get(metrics))
        .with_state(shared);
    let stopped = async move {
        stopping.wait_for(|stopping| *stopping).await.ok();
    };
    if let Err(error) = axum::serve(listener, router).with_graceful_shutdown(stopped).await {
        tracing::error!(%error, "the admin port has stopped");
    }
}

/// Ready while some broker takes connections.
async fn ready(State(shared): State<Arc<Shared>>) -> Response {
    for server in &shared.config.servers {
        if matches!(timeout(REACH_TIME, TcpStream::connect(server)).await, Ok(Ok(_))) {
            return (StatusCode::OK, "ready\n").into_response();
        }
    }
    (StatusCode::SERVICE_UNAVAILABLE, "no broker takes connections\n").into_response()
}

async fn metrics(State(shared): State<Arc<Shared>>) -> Response {
    match shared.metrics.text() {
        Ok(text) => ([(CONTENT_TYPE, OPEN_METRICS)], text).into_response(),
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}
