//! The HTTP service.
//!
//! A request takes one of [`REQUESTS_IN_FLIGHT_MAX`] slots before its body is read, and one of
//! as many cores as the machine has before its picture is fitted. Both are held until the work
//! ends, even when the client has gone.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, FromRequest, Request, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

use crate::fit::{NotCheckerboard, distill};
use crate::message::{BadField, DistillAnswer, DistillRequest};

/// Largest request body, in bytes.
pub const BODY_SIZE_MAX: usize = 8 << 20;
/// Most requests whose bodies are held at a time; further ones get 503.
pub const REQUESTS_IN_FLIGHT_MAX: usize = 32;
/// How long a client may take to send its body.
const BODY_TIMEOUT: Duration = Duration::from_secs(10);
/// How long open requests may take to end after the signal to stop.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);

struct Capacity {
    slots: Arc<Semaphore>,
    cores: Arc<Semaphore>,
}

/// The routes: `POST /distill` and `GET /healthz`.
///
/// Errors are `{"error": "..."}`: 400 names the field that cannot be understood, 408 a body
/// that came too slowly, 413 one that is too large, 422 says why the picture is not a
/// checkerboard, 503 that too many requests are in flight.
pub fn router() -> Router {
    let core_count = std::thread::available_parallelism().map_or(1, usize::from);
    router_with(REQUESTS_IN_FLIGHT_MAX, core_count)
}

fn router_with(slot_count: usize, core_count: usize) -> Router {
    let capacity =
        Arc::new(Capacity { slots: Arc::new(Semaphore::new(slot_count)), cores: Arc::new(Semaphore::new(core_count)) });
    Router::new()
        .route("/distill", post(answer_distill))
        .route("/healthz", get(|| async { "ok\n" }))
        .method_not_allowed_fallback(async || {
            Refusal::new(StatusCode::METHOD_NOT_ALLOWED, "use POST /distill or GET /healthz")
        })
        .fallback(async || Refusal::new(StatusCode::NOT_FOUND, "no such path, use POST /distill or GET /healthz"))
        .layer(DefaultBodyLimit::max(BODY_SIZE_MAX))
        .with_state(capacity)
}

/// Serves until `shutdown` resolves, then takes no more connections, lets open requests end
/// and returns. Requests that take longer than ten seconds to end are dropped.
///
/// # Errors
/// When the listener fails.
pub async fn serve(listener: TcpListener, shutdown: impl Future<Output = ()> + Send + 'static) -> io::Result<()> {
    let (stopping, stopped) = tokio::sync::oneshot::channel();
    let server = axum::serve(listener, router()).with_graceful_shutdown(async move {
        shutdown.await;
        // The receiver is gone only when the server has ended on its own.
        let _ = stopping.send(());
    });
    let drained = async {
        if stopped.await.is_err() {
            std::future::pending::<()>().await;
        }
        tokio::time::sleep(DRAIN_TIMEOUT).await;
    };
    tokio::select! {
        result = server.into_future() => result,
        () = drained => {
            tracing::warn!("requests still open after the drain time were dropped");
            Ok(())
        }
    }
}

/// An error on its way to the client.
#[derive(Debug)]
struct Refusal {
    status: StatusCode,
    error: String,
}

impl Refusal {
    fn new(status: StatusCode, error: impl Into<String>) -> Self {
        Self { status, error: error.into() }
    }
}

impl From<BadField> for Refusal {
    fn from(error: BadField) -> Self {
        Self::new(StatusCode::BAD_REQUEST, error.to_string())
    }
}

impl From<NotCheckerboard> for Refusal {
    fn from(error: NotCheckerboard) -> Self {
        Self::new(StatusCode::UNPROCESSABLE_ENTITY, error.to_string())
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        tracing::debug!(status = self.status.as_u16(), error = %self.error, "refused");
        let body = Json(serde_json::json!({ "error": self.error }));
        let mut response = (self.status, body).into_response();
        if self.status == StatusCode::SERVICE_UNAVAILABLE {
            let seconds = header::HeaderValue::from_static("1");
            response.headers_mut().insert(header::RETRY_AFTER, seconds);
        }
        response
    }
}

async fn answer_distill(
    State(capacity): State<Arc<Capacity>>,
    request: Request,
) -> Result<Json<DistillAnswer>, Refusal> {
    let slot = capacity
        .slots
        .clone()
        .try_acquire_owned()
        .map_err(|_| Refusal::new(StatusCode::SERVICE_UNAVAILABLE, "too many requests in flight, try again"))?;
    let body = tokio::time::timeout(BODY_TIMEOUT, Bytes::from_request(request, &()))
        .await
        .map_err(|_| Refusal::new(StatusCode::REQUEST_TIMEOUT, "body: came too slowly"))?
        .map_err(|rejection| match rejection.status() {
            StatusCode::PAYLOAD_TOO_LARGE => {
                Refusal::new(StatusCode::PAYLOAD_TOO_LARGE, format!("body: larger than {BODY_SIZE_MAX} bytes"))
            }
            status => Refusal::new(status, format!("body: {}", rejection.body_text())),
        })?;
    let stopped = |_| Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, "the fit was stopped");
    let core = capacity.cores.clone().acquire_owned().await;
    let core = core.map_err(|_| Refusal::new(StatusCode::SERVICE_UNAVAILABLE, "the worker is stopping"))?;
    let work = move || {
        let answer = distill_body(&body);
        drop((core, slot));
        answer
    };
    tokio::task::spawn_blocking(work).await.map_err(stopped)?.map(Json)
}

fn distill_body(body: &[u8]) -> Result<DistillAnswer, Refusal> {
    let start = Instant::now();
    let request = DistillRequest::from_json(body)?;
    let picture = request.picture()?;
    let seed = distill(&picture)?;
    let answer = DistillAnswer::new(request.job_id, seed, &picture);
    tracing::debug!(
        width = picture.width(),
        height = picture.height(),
        cell_px = answer.seed.cell_px,
        error_rms = answer.error_rms,
        elapsed_us = start.elapsed().as_micros() as u64,
        "distilled"
    );
    Ok(answer)
}
