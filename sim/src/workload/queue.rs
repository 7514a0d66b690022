//! Jobs with one result each: workers, whose machines may end with the jobs that they hold.

use std::time::Duration;

use arqon_sdk::{Error, NewEvent, WorkerOptions};
use tokio::time::{sleep, timeout};

use super::{Stop, pause};
use crate::{
    cluster::Access,
    history::{Fact, History, Place, decode},
    random::Random,
};

/// The topic of jobs.
pub const JOBS: &str = "sim.jobs";
/// The topic of their results.
pub const RESULTS: &str = "sim.results";
const RETRY_DELAY: Duration = Duration::from_millis(200);
const IDLE_PATIENCE: Duration = Duration::from_millis(500);

/// Takes jobs and completes them, until it is told to stop or its machine ends. The result says which job
/// it is of.
pub async fn work(access: Access, history: History, stop: Stop, client: u64, mut random: Random) {
    while !stop.is_set() {
        let options = WorkerOptions {
            worker: format!("worker-{client}"),
            lease: Duration::from_secs(3),
            wait: Duration::from_millis(300),
            ..WorkerOptions::default()
        };
        let connection = access.client();
        let Ok(mut worker) = connection.worker(JOBS, options).await else {
            sleep(RETRY_DELAY).await;
            continue;
        };
        while !stop.is_set() {
            let job = match timeout(IDLE_PATIENCE, worker.next()).await {
                Ok(Ok(Some(job))) => job,
                Ok(Ok(None)) => break,
                Ok(Err(error)) if error.is_transient() => {
                    sleep(RETRY_DELAY).await;
                    continue;
                }
                Ok(Err(_)) => break,
                Err(_) => continue,
            };
            pause(&mut random, 1..40).await;
            let place = Place { topic: JOBS.to_owned(), partition: job.event.partition };
            let Some(value) = decode(&job.event.payload) else {
                history.note(client, &place, 0, Fact::ReadGarbage(job.event.offset));
                continue;
            };
            match job.complete(RESULTS, NewEvent::new(job.event.payload.clone())).await {
                Ok(_) => history.note(client, &place, value, Fact::Completed(job.event.offset)),
                Err(Error::LeaseLost) => {}
                Err(error) => tracing::debug!("job {} is not completed: {error}", job.event.offset),
            }
        }
    }
}
