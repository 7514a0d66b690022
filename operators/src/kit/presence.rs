//! Keeps the bus told that this operator is there.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use arqon_proto::{EventType, wire};
use arqon_sdk::{Error, NewEvent};
use prost::Message;
use tokio::time::{MissedTickBehavior, interval};

use super::{bus::Bus, metrics::Metrics};

/// Schema of a registration.
pub const REGISTRATION_SCHEMA: &str = "arqonbus.operator.registration.v1";
/// Schema of a heartbeat.
pub const HEARTBEAT_SCHEMA: &str = "arqonbus.operator.heartbeat.v1";

/// Of so many heartbeats one is a registration: the log that holds them forgets old events.
const REGISTRATION_EVERY: u64 = 12;

/// Registration and heartbeats of one operator.
pub(crate) struct Presence<B> {
    bus: Arc<B>,
    registration: wire::OperatorRegistration,
    metrics: Metrics,
    /// The last announcement was not written: the bus may have forgotten this operator, so
    /// that the next one is a registration.
    uncertain: AtomicBool,
}

impl<B: Bus> Presence<B> {
    pub(crate) fn new(bus: Arc<B>, registration: wire::OperatorRegistration, metrics: Metrics) -> Self {
        Self { bus, registration, metrics, uncertain: AtomicBool::new(false) }
    }

    /// Registers, again if need be.
    pub(crate) async fn register(&self) -> Result<(), Error> {
        self.announce(REGISTRATION_SCHEMA, self.registration.encode_to_vec()).await
    }

    /// Tells the bus that this operator takes no more jobs.
    pub(crate) async fn leave(&self) -> Result<(), Error> {
        self.heartbeat(true).await
    }

    async fn heartbeat(&self, leaving: bool) -> Result<(), Error> {
        let operator_id = self.registration.operator_id.clone();
        let heartbeat = wire::OperatorHeartbeat { operator_id, running_jobs: self.metrics.running(), leaving };
        self.announce(HEARTBEAT_SCHEMA, heartbeat.encode_to_vec()).await
    }

    async fn announce(&self, schema: &str, payload: Vec<u8>) -> Result<(), Error> {
        let event = NewEvent::new(payload)
            .schema(schema)
            .key(self.registration.operator_id.clone())
            .event_type(EventType::Control);
        let result = self.bus.announce(event).await;
        self.uncertain.store(result.is_err(), Ordering::Relaxed);
        self.metrics.announced(result.is_ok());
        result
    }

    /// Sends a heartbeat `every` so often until dropped. Failures are logged; whether they matter
    /// shows when jobs are leased.
    pub(crate) async fn keep(&self, every: Duration) {
        let mut ticks = interval(every);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // The first tick is at once, and a registration has just been sent.
        ticks.tick().await;
        for beat in 1u64.. {
            ticks.tick().await;
            let result = if self.uncertain.load(Ordering::Relaxed) || beat % REGISTRATION_EVERY == 0 {
                self.register().await
            } else {
                self.heartbeat(false).await
            };
            if let Err(error) = result {
                tracing::warn!(operator = self.registration.operator_id, %error, "heartbeat not written");
            }
        }
    }
}
