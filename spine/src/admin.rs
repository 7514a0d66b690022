//! The admin port: metrics and health over HTTP. It shows no payloads and takes no commands.

use std::sync::Arc;

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header::CONTENT_TYPE},
    response::{IntoResponse, Response},
    routing::get,
};
use prometheus_client::{encoding::text, registry::Registry};
use tokio::net::TcpListener;

use crate::{broker::Broker, metrics};

const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

struct Admin {
    broker: Arc<Broker>,
    registry: Registry,
}

/// Serves until the node stops.
pub(crate) async fn serve(broker: Arc<Broker>, listener: TcpListener) {
    let mut stopping = broker.stopping.subscribe();
    let registry = metrics::registry(&broker);
    let router = Router::new()
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(ready))
        .route("/metrics", get(show_metrics))
        .with_state(Arc::new(Admin { broker, registry }));
    let stopped = async move {
        stopping.wait_for(|stopping| *stopping).await.ok();
    };
    if let Err(error) = axum::serve(listener, router).with_graceful_shutdown(stopped).await {
        tracing::error!(%error, "the admin port has stopped");
    }
}

async fn ready(State(admin): State<Arc<Admin>>) -> Response {
    match admin.broker.not_ready() {
        None => (StatusCode::OK, "ready\n".to_owned()).into_response(),
        Some(reason) => (StatusCode::SERVICE_UNAVAILABLE, format!("{reason}\n")).into_response(),
    }
}

async fn show_metrics(State(admin): State<Arc<Admin>>) -> Response {
    let mut out = String::new();
    match text::encode(&mut out, &admin.registry) {
        Ok(()) => ([(CONTENT_TYPE, OPEN_METRICS)], out).into_response(),
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}
