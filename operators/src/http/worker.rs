//! The worker behind the shim: posts jobs to it and reads its answers.

use std::{error::Error as _, time::Duration};

use arqon_sdk::Event;
use bytes::BytesMut;
use reqwest::{
    Client, Response, Url,
    header::{CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue},
    redirect,
};
use tokio::time::{sleep, timeout};

use super::{config::HttpShimConfig, message::stated_error};
use crate::{Error, JobError};

/// A connection that nobody uses is closed after this time: sooner than servers do it, so that
/// a job is hardly ever sent into a connection that is just being closed.
const IDLE: Duration = Duration::from_secs(1);
const CONNECT_TIMEOUT_MAX: Duration = Duration::from_secs(5);
const PAUSE_MIN: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(2);
/// The body of an error answer is read up to this size.
const ERROR_BODY_SIZE_MAX: usize = 64 << 10;
/// An event header that is passed on may be this long, in bytes.
const PASSED_VALUE_SIZE_MAX: usize = 8 << 10;

/// Why there is no answer.
#[derive(Debug)]
pub(crate) enum CallError {
    /// No connection could be made: the worker has not seen the job.
    Unreachable(String),
    /// The connection ended before the whole answer was there.
    Lost(String),
    /// The job has failed for good.
    Failed(String),
}

impl From<JobError> for CallError {
    fn from(error: JobError) -> Self {
        Self::Failed(error.to_string())
    }
}

/// One worker, as configured.
pub(crate) struct Worker {
    client: Client,
    url: Url,
    headers: Vec<(HeaderName, HeaderValue)>,
    passed: Vec<(String, HeaderName)>,
    timeout: Duration,
    response_size_max: usize,
    retries: u32,
}

impl Worker {
    pub(crate) fn new(config: &HttpShimConfig) -> Result<Self, Error> {
        // Another part of the process may have chosen the same provider before.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let url = config.url()?;
        let timeout = Duration::from_millis(config.timeout_ms);
        let mut builder = Client::builder()
            .user_agent(concat!("arqon-http-shim/", env!("CARGO_PKG_VERSION")))
            .no_proxy()
            .redirect(redirect::Policy::none())
            .pool_idle_timeout(IDLE)
            .connect_timeout((timeout / 2).min(CONNECT_TIMEOUT_MAX));
        if url.scheme() == "http" {
            // Without this a machine that has no certificates could not even use plain HTTP.
            builder = builder.tls_certs_only([]);
        }
        let client = builder.build().map_err(|error| Error::HttpClient { reason: chain(&error) })?;
        Ok(Self {
            client,
            url,
            headers: config.static_headers()?,
            passed: config.passed_headers()?,
            timeout,
            response_size_max: config.max_response_bytes,
            retries: config.retries,
        })
    }

    /// Posts `job` and reads the answer. Tries again, with growing pauses, where no connection
    /// could be made.
    pub(crate) async fn post(&self, job: &Event, attempt: u32) -> Result<BytesMut, CallError> {
        let headers = self.headers_for(job, attempt)?;
        let mut pause = PAUSE_MIN;
        for _ in 0..self.retries {
            match self.post_once(job, headers.clone()).await {
                Err(CallError::Unreachable(_)) => {}
                other => return other,
            }
            sleep(pause).await;
            pause = (pause * 2).min(PAUSE_MAX);
        }
        self.post_once(job, headers).await
    }

    /// Whether a connection can be made. Asks for the head of the worker's address; whatever it
    /// answers, it is there.
    pub(crate) async fn probe(&self) -> Result<(), String> {
        let request = self.client.head(self.url.clone()).headers(self.headers.iter().cloned().collect());
        match timeout(self.timeout, request.send()).await {
            Ok(Err(error)) if error.is_connect() => Err(chain(&error)),
            _ => Ok(()),
        }
    }

    async fn post_once(&self, job: &Event, headers: HeaderMap) -> Result<BytesMut, CallError> {
        let exchange = async {
            let request = self.client.post(self.url.clone()).headers(headers).body(job.payload.clone());
            let response = request.send().await.map_err(failed_send)?;
            let status = response.status();
            if !status.is_success() {
                // The body only adds to the message; the job has failed already.
                let said = read(response, ERROR_BODY_SIZE_MAX).await.ok().and_then(|body| stated_error(&body));
                let said = said.map(|text| format!(": {text}")).unwrap_or_default();
                return Err(CallError::Failed(format!("the worker answered {}{said}", status.as_u16())));
            }
            read(response, self.response_size_max).await
        };
        timeout(self.timeout, exchange).await.unwrap_or_else(|_| {
            Err(CallError::Failed(format!("the worker did not answer within {} ms", self.timeout.as_millis())))
        })
    }

    fn headers_for(&self, job: &Event, attempt: u32) -> Result<HeaderMap, JobError> {
        let mut out: HeaderMap = self.headers.iter().cloned().collect();
        for (name, header) in &self.passed {
            let Some(value) = job.headers.get(name) else { continue };
            let usable =
                HeaderValue::from_bytes(value.as_bytes()).ok().filter(|_| value.len() <= PASSED_VALUE_SIZE_MAX);
            let Some(value) = usable else {
                return Err(JobError::failed(format!("the job's header {name} cannot be passed to the worker")));
            };
            out.insert(header, value);
        }
        out.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Ok(value) = HeaderValue::from_str(&job.traceparent)
            && !value.is_empty()
        {
            out.insert("traceparent", value);
        }
        // Topic names are of letters, digits, dots, dashes and underscores.
        if let Ok(topic) = HeaderValue::from_str(&job.topic) {
            out.insert("x-arqon-job-topic", topic);
        }
        out.insert("x-arqon-job-partition", job.partition.into());
        out.insert("x-arqon-job-offset", job.offset.into());
        out.insert("x-arqon-job-attempt", attempt.into());
        Ok(out)
    }
}

fn failed_send(error: reqwest::Error) -> CallError {
    if error.is_connect() {
        CallError::Unreachable(chain(&error))
    } else if error.is_builder() {
        CallError::Failed(chain(&error))
    } else {
        CallError::Lost(chain(&error))
    }
}

/// The body of `response`, which must not be larger than `size_max`.
async fn read(mut response: Response, size_max: usize) -> Result<BytesMut, CallError> {
    let too_large = || CallError::Failed(format!("the worker's answer is larger than {size_max} bytes"));
    if response.content_length().is_some_and(|size| size > size_max as u64) {
        return Err(too_large());
    }
    let mut body = BytesMut::new();
    while let Some(chunk) = response.chunk().await.map_err(|error| CallError::Lost(chain(&error)))? {
        if body.len() + chunk.len() > size_max {
            return Err(too_large());
        }
        body.extend_from_slice(&chunk);
    }
    Ok(body)
}

/// The innermost cause of an error, which says what happened; the outer ones only repeat the
/// address.
fn chain(error: &reqwest::Error) -> String {
    let mut cause = error.source();
    while let Some(inner) = cause.and_then(|error| error.source()) {
        cause = Some(inner);
    }
    cause.map_or_else(|| "the request failed".to_owned(), |cause| cause.to_string().replace('\n', " "))
}
