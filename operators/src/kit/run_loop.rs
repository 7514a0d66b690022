//! The run loop: register, lease, run, publish, settle, leave.

use std::{pin::pin, sync::Arc, time::Duration};

use arqon_proto::wire::{self, ErrorCode};
use futures_util::{FutureExt, StreamExt, stream};
use tokio::{
    sync::watch,
    task::{JoinError, JoinSet},
    time::{Instant, sleep, timeout},
};

use super::{
    bus::{Bus, Queue},
    job::{is_fatal, run_job},
    operator::Operator,
    options::{RunOptions, check_registration},
    presence::Presence,
};
use crate::Error;

/// Time to give jobs back once the drain time is over, and to say goodbye.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(5);
/// An unknown operator registers again at most this often.
const REGISTRATION_PAUSE: Duration = Duration::from_secs(1);
const PAUSE_MIN: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(2);

/// See [`super::run`], here against any bus.
pub(crate) async fn run_on<B: Bus, Q: Queue, O: Operator>(
    bus: B,
    queue: Q,
    mut registration: wire::OperatorRegistration,
    options: RunOptions,
    operator: O,
    heartbeat: Duration,
    shutdown: impl Future<Output = ()>,
) -> Result<(), Error> {
    options.check()?;
    check_registration(&registration)?;
    registration.resource_limits.get_or_insert_default().max_parallel_jobs = options.parallelism;
    let mut shutdown = pin!(shutdown.fuse());

    let (bus, operator, options) = (Arc::new(bus), Arc::new(operator), Arc::new(options));
    let presence = Arc::new(Presence::new(bus.clone(), registration, options.metrics.clone()));
    let start = async {
        bus.check_topic(&options.jobs_topic).await?;
        bus.check_topic(&options.results_topic).await?;
        presence.register().await
    };
    tokio::select! {
        () = &mut shutdown => return Ok(()),
        started = start => started?,
    }
    // Ends when it goes out of scope.
    let mut heartbeats = JoinSet::new();
    let keeper = presence.clone();
    heartbeats.spawn(async move { keeper.keep(heartbeat).await });

    let (stop, stopping) = watch::channel(false);
    let mut jobs = JoinSet::new();
    let leasing = Leasing {
        queue,
        bus,
        operator: operator.clone(),
        presence: presence.clone(),
        options: options.clone(),
        pause: PAUSE_MIN,
        registered_at: Instant::now(),
    };
    let mut failure = {
        // As a stream the wait for the next job survives being set aside for another branch.
        let leases = stream::unfold(leasing, |mut leasing| async move {
            let lease = leasing.next().await;
            Some((lease, leasing))
        });
        let mut leases = pin!(leases);
        loop {
            tokio::select! {
                biased;
                () = &mut shutdown => break None,
                Some(ended) = jobs.join_next() => if let Some(error) = fatal(ended) { break Some(error) },
                lease = leases.next(), if jobs.len() < options.parallelism as usize => match lease {
                    Some(Ok(lease)) => {
                        jobs.spawn(run_job(operator.clone(), options.clone(), lease, stopping.clone()));
                    }
                    Some(Err(error)) => break Some(error),
                    None => break None,
                },
            }
        }
    };
    options.metrics.set_leasing(false);
    failure = drain(&mut jobs, &options, stop).await.or(failure);
    drop(heartbeats);
    match timeout(LEAVE_TIMEOUT, presence.leave()).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::warn!(%error, "the bus could not be told that this operator leaves"),
        Err(_) => tracing::warn!("the bus could not be told in time that this operator leaves"),
    }
    failure.map_or(Ok(()), |error| Err(error.into()))
}

/// Lets running jobs end within the drain time and gives the rest back. Answers the first
/// refusal among their ends.
async fn drain(
    jobs: &mut JoinSet<Result<(), arqon_sdk::Error>>,
    options: &RunOptions,
    stop: watch::Sender<bool>,
) -> Option<arqon_sdk::Error> {
    let mut failure = None;
    for (limit, last) in [(options.drain, false), (LEAVE_TIMEOUT, true)] {
        if last {
            // Nobody listens when all jobs have ended.
            let _ = stop.send(true);
        }
        let all = async {
            while let Some(ended) = jobs.join_next().await {
                failure = fatal(ended).or(failure.take());
            }
        };
        if timeout(limit, all).await.is_ok() {
            break;
        }
        if last {
            tracing::warn!(jobs = jobs.len(), "jobs left behind; their leases run out");
        }
    }
    failure
}

fn fatal(ended: Result<Result<(), arqon_sdk::Error>, JoinError>) -> Option<arqon_sdk::Error> {
    match ended {
        Ok(result) => result.err(),
        Err(error) => {
            tracing::error!(%error, "the task of a job ended early; its lease runs out");
            None
        }
    }
}

/// Takes jobs from the queue, and does what must be done when that fails.
struct Leasing<B, Q, O> {
    bus: Arc<B>,
    queue: Q,
    operator: Arc<O>,
    presence: Arc<Presence<B>>,
    options: Arc<RunOptions>,
    pause: Duration,
    registered_at: Instant,
}

impl<B: Bus, Q: Queue, O: Operator> Leasing<B, Q, O> {
    /// The next job, once the operator is ready for one.
    async fn next(&mut self) -> Result<Q::Lease, arqon_sdk::Error> {
        loop {
            {
                let mut ready = pin!(self.operator.ready());
                if ready.as_mut().now_or_never().is_none() {
                    self.options.metrics.set_leasing(false);
                    self.queue.pause();
                    ready.await;
                }
            }
            self.options.metrics.set_leasing(true);
            match self.queue.next().await {
                Ok(lease) => {
                    self.pause = PAUSE_MIN;
                    return Ok(lease);
                }
                Err(error) => {
                    self.options.metrics.set_leasing(false);
                    self.recover(error).await?;
                }
            }
        }
    }

    /// Makes it worth trying again, or gives the error back.
    async fn recover(&mut self, error: arqon_sdk::Error) -> Result<(), arqon_sdk::Error> {
        if is_fatal(&error)
            || matches!(error, arqon_sdk::Error::Invalid { .. })
            || error.code() == Some(ErrorCode::ValidationError)
        {
            return Err(error);
        }
        if error.code() == Some(ErrorCode::TargetNotFound) {
            self.register_again(error).await?;
        } else {
            tracing::warn!(topic = self.options.jobs_topic, %error, "no jobs can be taken now");
        }
        sleep(self.pause).await;
        self.pause = (self.pause * 2).min(PAUSE_MAX);
        Ok(())
    }

    /// Something named in the request is unknown: the topic, which is final, or else this
    /// operator, because it was silent for too long or the bus has yet to read of it.
    async fn register_again(&mut self, error: arqon_sdk::Error) -> Result<(), arqon_sdk::Error> {
        match self.bus.check_topic(&self.options.jobs_topic).await {
            Err(unknown) if unknown.code() == Some(ErrorCode::TargetNotFound) => return Err(unknown),
            Err(_) => return Ok(()),
            Ok(()) => {}
        }
        if self.registered_at.elapsed() < REGISTRATION_PAUSE {
            return Ok(());
        }
        tracing::info!(%error, "registering again");
        self.registered_at = Instant::now();
        match self.presence.register().await {
            Err(error) if is_fatal(&error) => Err(error),
            // Tried again with the next refusal, or by the heartbeat.
            _ => Ok(()),
        }
    }
}
