//! Metrics and health over HTTP.

use std::net::SocketAddr;

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header},
    response::IntoResponse,
    routing::get,
};
use tokio::net::TcpListener;

use crate::{Error, Metrics};

const METRICS_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// A listener that answers `GET /metrics`, `/healthz` and `/readyz`.
pub(crate) struct Admin {
    listener: TcpListener,
    metrics: Metrics,
    pub(crate) address: SocketAddr,
}

impl Admin {
    pub(crate) async fn bind(address: SocketAddr, metrics: Metrics) -> Result<Self, Error> {
        let refuse = |error: std::io::Error| Error::Listen { address, reason: error.to_string() };
        let listener = TcpListener::bind(address).await.map_err(refuse)?;
        let address = listener.local_addr().map_err(refuse)?;
        Ok(Self { listener, metrics, address })
    }

    /// Serves until dropped.
    pub(crate) async fn serve(self) {
        let router = Router::new()
            .route("/metrics", get(metrics))
            .route("/healthz", get(|| async { "ok\n" }))
            .route("/readyz", get(ready))
            .with_state(self.metrics);
        if let Err(error) = axum::serve(self.listener, router).await {
            tracing::error!(address = %self.address, %error, "the admin listener ended");
        }
    }
}

async fn metrics(State(metrics): State<Metrics>) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, METRICS_TYPE)], metrics.text())
}

async fn ready(State(metrics): State<Metrics>) -> impl IntoResponse {
    match metrics.not_ready() {
        None => (StatusCode::OK, "ready\n".to_owned()),
        Some(reason) => (StatusCode::SERVICE_UNAVAILABLE, format!("{reason}\n")),
    }
}
