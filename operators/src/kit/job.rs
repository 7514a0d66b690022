//! One leased job, from lease to settlement.

use std::{panic::AssertUnwindSafe, sync::Arc, time::Duration};

use arqon_proto::wire::ErrorCode;
use arqon_sdk::{Error, Event, NewEvent};
use futures_util::FutureExt;
use tokio::{sync::watch, time::Instant};

use super::{
    bus::Lease,
    metrics::JobEnd,
    operator::{JobError, Operator, finish},
    options::RunOptions,
};

/// Runs `lease` and settles it. What the operator does wrong ends with the job.
///
/// # Errors
/// The bus refuses this operator for good: no further job can succeed either.
pub(crate) async fn run_job<O: Operator, L: Lease>(
    operator: Arc<O>,
    options: Arc<RunOptions>,
    lease: L,
    mut stopping: watch::Receiver<bool>,
) -> Result<(), Error> {
    let started = Instant::now();
    options.metrics.started();
    let answer = tokio::select! {
        biased;
        answer = run_caught(&*operator, lease.job(), lease.attempt()) => Ok(answer),
        // A dropped sender means the same as the signal.
        _ = stopping.wait_for(|stop| *stop) => Err(JobEnd::Returned),
        () = lease.lost() => Err(JobEnd::Lost),
    };
    let job = lease.job();
    let (topic, partition, offset) = (&*job.topic, job.partition, job.offset);
    let attempt = lease.attempt();
    let (end, fatal) = match answer {
        Err(JobEnd::Lost) => (JobEnd::Lost, None),
        Err(end) => (give_back(&lease, Duration::ZERO, end).await, None),
        Ok(Err(JobError::Retry { delay, reason })) => {
            tracing::debug!(topic, partition, offset, attempt, reason, "job is to be tried again");
            (give_back(&lease, delay, JobEnd::Retried).await, None)
        }
        Ok(Ok(result)) => complete(&*operator, &options, &lease, result, JobEnd::Done).await,
        Ok(Err(JobError::Failed(message))) => {
            tracing::debug!(topic, partition, offset, attempt, message, "job failed");
            let result = operator.failed(lease.job(), &message);
            complete(&*operator, &options, &lease, result, JobEnd::Failed).await
        }
    };
    tracing::debug!(topic, partition, offset, attempt, ?end, "job ended");
    options.metrics.ended(end, started.elapsed());
    fatal.map_or(Ok(()), Err)
}

/// The operator's answer; a panic becomes a failed job.
async fn run_caught<O: Operator>(operator: &O, job: &Event, attempt: u32) -> Result<NewEvent, JobError> {
    // The operator is used again after a panic. Its own locks tell it where that matters.
    AssertUnwindSafe(operator.run(job, attempt)).catch_unwind().await.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str));
        tracing::error!(topic = &*job.topic, partition = job.partition, offset = job.offset, "the operator panicked");
        Err(JobError::failed(format!("the operator panicked: {}", text.unwrap_or("no message"))))
    })
}

async fn give_back<L: Lease>(lease: &L, delay: Duration, end: JobEnd) -> JobEnd {
    match lease.give_back(delay).await {
        Ok(()) => end,
        Err(Error::LeaseLost) => JobEnd::Lost,
        Err(error) => {
            // The lease runs out in any case, and then the job is handed out again.
            tracing::warn!(%error, "a job could not be given back");
            end
        }
    }
}

/// Publishes `result`, or why it cannot be published, and settles the job.
async fn complete<O: Operator, L: Lease>(
    operator: &O,
    options: &RunOptions,
    lease: &L,
    result: NewEvent,
    end: JobEnd,
) -> (JobEnd, Option<Error>) {
    let finish = |job: &Event, result| finish(result, job, &options.group, &options.result_schema);
    let result = finish(lease.job(), result);
    let refused = match lease.complete(&options.results_topic, result).await {
        Err(error) if refuses_result(&error) => error,
        settled => return judge(settled, end),
    };
    let message = format!("the result is refused: {refused}");
    let result = finish(lease.job(), operator.failed(lease.job(), &message));
    judge(lease.complete(&options.results_topic, result).await, JobEnd::Failed)
}

fn judge(settled: Result<(), Error>, end: JobEnd) -> (JobEnd, Option<Error>) {
    match settled {
        Ok(()) => (end, None),
        Err(Error::LeaseLost) => (JobEnd::Lost, None),
        Err(error) if is_fatal(&error) || error.code() == Some(ErrorCode::TargetNotFound) => {
            (JobEnd::Returned, Some(error))
        }
        Err(error) => {
            tracing::warn!(%error, "a result could not be published; its job goes back");
            (JobEnd::Returned, None)
        }
    }
}

/// Whether it is this result that cannot be published, and another may.
fn refuses_result(error: &Error) -> bool {
    matches!(error, Error::Invalid { .. })
        || matches!(error.code(), Some(ErrorCode::ValidationError | ErrorCode::PolicyBlocked))
}

/// Whether the bus refuses this operator, now and later.
pub(crate) fn is_fatal(error: &Error) -> bool {
    matches!(error, Error::Closed)
        || matches!(
            error.code(),
            Some(ErrorCode::AuthenticationFailed | ErrorCode::AuthorizationDenied | ErrorCode::UnsupportedVersion)
        )
}
