//! What every operator shares: its shape, and the loop that runs it.

mod bus;
mod job;
mod metrics;
mod operator;
mod options;
mod presence;
mod run_loop;
#[cfg(test)]
mod tests;

use std::time::Duration;

use arqon_proto::{limits, wire};
use arqon_sdk::Client;

use bus::{SdkBus, SdkQueue};
pub use metrics::{JobEnd, Metrics};
pub use operator::{JobError, Operator, failed_result, job_id, result_id};
pub use options::{DRAIN_MAX, PARALLELISM_MAX, RunOptions, check_registration};
pub use presence::{HEARTBEAT_SCHEMA, REGISTRATION_SCHEMA};

use crate::Error;

/// Registers `operator`, leases jobs, runs them side by side, publishes their results and
/// settles them, until `shutdown` resolves. Then no more jobs are leased, running ones may end
/// within [`RunOptions::drain`], the rest goes back to the queue, and the bus is told.
///
/// The loop survives the loss of servers and changes of leaders, and registers again when the
/// bus does not know the operator any more.
///
/// # Errors
/// A wrong option or registration, a topic that does not exist, or a bus that refuses this
/// operator for good (token, permissions). No server in reach is an error only at the start.
pub async fn run<O: Operator>(
    client: &Client,
    registration: wire::OperatorRegistration,
    options: RunOptions,
    operator: O,
    shutdown: impl Future<Output = ()>,
) -> Result<(), Error> {
    let queue = SdkQueue::new(client.clone(), &registration.operator_id, &options);
    let heartbeat = Duration::from_millis(limits::OPERATOR_HEARTBEAT_MS);
    run_loop::run_on(SdkBus::new(client.clone()), queue, registration, options, operator, heartbeat, shutdown).await
}
