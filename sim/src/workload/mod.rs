//! What clients do in a run. Each client is a program on a machine that never fails.

pub mod append;
pub mod members;
pub mod metadata;
pub mod queue;
pub mod repeat;
pub mod tail;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use arqon_proto::wire::{self, control_client::ControlClient};
use tokio::time::{sleep, timeout};
use tonic::{Code, Status, transport::Endpoint};

use crate::{cluster::Access, random::Random};

/// Patience with one request to the control plane.
const CONTROL_PATIENCE: Duration = Duration::from_secs(5);

/// Tells the clients of a run to come to their end.
#[derive(Clone, Default)]
pub struct Stop(Arc<AtomicBool>);

impl Stop {
    /// From now on nothing new is begun.
    pub fn set(&self) {
        self.0.store(true, Relaxed);
    }

    /// Whether it was said.
    #[must_use]
    pub fn is_set(&self) -> bool {
        self.0.load(Relaxed)
    }
}

/// How much producers have to send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pace {
    /// There is always something to be written.
    Busy,
    /// A partition is left alone for seconds: what the last write left behind stays as it is.
    Quiet,
}

impl Pace {
    /// Mean time between two sends, in ms.
    pub(crate) fn gap_ms(self, random: &mut Random) -> u64 {
        *random.pick(match self {
            Self::Busy => &[20, 60, 200],
            Self::Quiet => &[400, 1_500, 1_500],
        })
    }
}

pub(crate) async fn pause(random: &mut Random, ms: std::ops::Range<u64>) {
    sleep(Duration::from_millis(random.of(ms))).await;
}

pub(crate) type Control = ControlClient<tonic::transport::Channel>;

/// Does one request to the control plane of one node.
pub(crate) async fn ask<T>(
    access: &Access,
    index: usize,
    request: impl AsyncFnOnce(Control) -> Result<T, Status>,
) -> Result<T, Status> {
    let unreachable = |error: tonic::transport::Error| Status::unavailable(error.to_string());
    let asked = async {
        let endpoint = Endpoint::from_shared(access.control(index)).map_err(unreachable)?;
        request(ControlClient::new(endpoint.connect().await.map_err(unreachable)?)).await
    };
    timeout(CONTROL_PATIENCE, asked).await.unwrap_or_else(|_| Err(Status::deadline_exceeded("no answer in time")))
}

/// A request that shows the token.
pub(crate) fn authorized<T>(access: &Access, message: T) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    if let Ok(value) = access.bearer().parse() {
        request.metadata_mut().insert("authorization", value);
    }
    request
}

/// Creates a topic, asking one node after the other until it is there.
pub async fn create_topic(access: &Access, config: wire::TopicConfig) {
    for index in 0.. {
        let request = wire::CreateTopicRequest { config: Some(config.clone()) };
        let created =
            ask(access, index, async |mut control| control.create_topic(authorized(access, request)).await).await;
        match created {
            Ok(_) => return,
            Err(status) if status.code() == Code::AlreadyExists => return,
            Err(status) => tracing::debug!("creating {}: {}", config.name, status.message()),
        }
        sleep(Duration::from_millis(300)).await;
    }
}
