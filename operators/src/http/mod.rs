//! Puts an HTTP service behind the bus: jobs are posted to it, answers become results.
//!
//! ```text
//!   genesis.jobs ── lease ──► shim ── POST ──► worker
//!   genesis.results ◄─ result + token ─┘ ◄─ JSON ──┘
//! ```
//!
//! | the worker                                   | the job |
//! |----------------------------------------------|---------|
//! | answers 2xx with JSON                        | has its result |
//! | answers anything else, junk, too much, or too late | has a result with `error` |
//! | cannot be reached, after all retries         | goes back to its queue; no more are taken until the worker is there |
//! | closes the connection before its answer      | the same, without a retry in place |

mod config;
mod message;
#[cfg(test)]
mod tests;
mod worker;

use std::{
    net::SocketAddr,
    pin::pin,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use arqon_sdk::{Client, Event, NewEvent, Options};
use tokio::time::sleep;

pub use config::{HttpShimConfig, Secret, TOKEN_VARIABLES};
use message::{check_job, result_payload};
use worker::{CallError, Worker};

use crate::{Error, JobError, Metrics, Operator, admin::Admin, run};

const PROBE_PAUSE_MIN: Duration = Duration::from_millis(100);
const PROBE_PAUSE_MAX: Duration = Duration::from_secs(2);

/// The operator that has its work done by an HTTP service.
pub(crate) struct HttpOperator {
    worker: Worker,
    job_schema: String,
    result_field: String,
    down_delay: Duration,
    /// The worker could not be reached, or nobody has tried yet.
    down: AtomicBool,
}

impl HttpOperator {
    pub(crate) fn new(config: &HttpShimConfig) -> Result<Self, Error> {
        Ok(Self {
            worker: Worker::new(config)?,
            job_schema: config.job_schema(),
            result_field: config.result_field().to_owned(),
            down_delay: Duration::from_millis(u64::from(config.down_delay_ms)),
            down: AtomicBool::new(true),
        })
    }
}

impl Operator for HttpOperator {
    async fn run(&self, job: &Event, attempt: u32) -> Result<NewEvent, JobError> {
        check_job(job, &self.job_schema)?;
        let reason = match self.worker.post(job, attempt).await {
            Ok(answer) => return result_payload(job, &self.result_field, &answer).map(NewEvent::new),
            Err(CallError::Failed(message)) => return Err(JobError::Failed(message)),
            Err(CallError::Unreachable(reason)) => format!("the worker cannot be reached: {reason}"),
            Err(CallError::Lost(reason)) => format!("the worker closed the connection: {reason}"),
        };
        if !self.down.swap(true, Ordering::Relaxed) {
            tracing::warn!(reason, "no jobs are taken until the worker can be reached");
        }
        Err(JobError::retry(self.down_delay, reason))
    }

    async fn ready(&self) {
        let mut pause = PROBE_PAUSE_MIN;
        while self.down.load(Ordering::Relaxed) {
            match self.worker.probe().await {
                Ok(()) => {
                    self.down.store(false, Ordering::Relaxed);
                    tracing::info!("the worker can be reached");
                }
                Err(reason) => {
                    tracing::debug!(reason, "the worker cannot be reached");
                    sleep(pause).await;
                    pause = (pause * 2).min(PROBE_PAUSE_MAX);
                }
            }
        }
    }
}

/// A shim whose configuration has been checked and whose admin address is bound.
pub struct HttpShim {
    config: HttpShimConfig,
    token: String,
    ca: Option<Vec<u8>>,
    operator: HttpOperator,
    metrics: Metrics,
    admin: Option<Admin>,
}

impl std::fmt::Debug for HttpShim {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "HttpShim({:?})", self.config)
    }
}

impl HttpShim {
    /// Checks `config`, reads the token and the CA, and binds the admin address. Talks to nobody yet.
    ///
    /// # Errors
    /// A wrong key, no token, or an admin address that cannot be listened on.
    pub async fn bind(config: HttpShimConfig) -> Result<Self, Error> {
        config.check()?;
        let (token, ca) = (config.token()?, config.ca()?);
        let operator = HttpOperator::new(&config)?;
        let metrics = Metrics::new();
        let admin = match config.admin_address()? {
            Some(address) => Some(Admin::bind(address, metrics.clone()).await?),
            None => None,
        };
        Ok(Self { config, token, ca, operator, metrics, admin })
    }

    /// Where metrics and health are served, with the real port.
    #[must_use]
    pub fn admin_address(&self) -> Option<SocketAddr> {
        self.admin.as_ref().map(|admin| admin.address)
    }

    /// What is counted.
    #[must_use]
    pub fn metrics(&self) -> Metrics {
        self.metrics.clone()
    }

    /// Works until `shutdown` resolves, then lets running jobs end.
    ///
    /// # Errors
    /// No server can be reached at the start, a topic does not exist, or the bus refuses this
    /// operator for good.
    pub async fn run(self, shutdown: impl Future<Output = ()>) -> Result<(), Error> {
        tracing::info!(config = ?self.config, "HTTP shim");
        let mut sdk = Options::new(self.config.servers.clone(), self.token);
        sdk.ca = self.ca;
        sdk.client_name = format!("arqon-http-shim/{} {}", env!("CARGO_PKG_VERSION"), self.config.operator_id);
        let (registration, options) = (self.config.registration(), self.config.options(self.metrics));
        let work = async {
            let mut shutdown = pin!(shutdown);
            let client = tokio::select! {
                () = &mut shutdown => return Ok(()),
                client = Client::connect(sdk) => client?,
            };
            run(&client, registration, options, self.operator, shutdown).await
        };
        let mut work = pin!(work);
        let Some(admin) = self.admin else { return work.await };
        tokio::select! {
            ended = &mut work => ended,
            // The listener is gone for good; jobs go on without it.
            () = admin.serve() => work.await,
        }
    }
}

/// Runs the shim until `shutdown` resolves: [`HttpShim::bind`] and [`HttpShim::run`].
///
/// # Errors
/// As both.
pub async fn run_http(config: HttpShimConfig, shutdown: impl Future<Output = ()>) -> Result<(), Error> {
    HttpShim::bind(config).await?.run(shutdown).await
}
