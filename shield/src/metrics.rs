//! What a Shield counts, as Prometheus text.

use std::{fmt, time::Duration};

use arqon_proto::{code_name, wire};
use prometheus_client::{
    encoding::text,
    metrics::{
        counter::Counter,
        family::Family,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::{Registry, Unit},
};

type Labelled = Family<Vec<(&'static str, &'static str)>, Counter>;

/// The counters of one Shield.
pub(crate) struct Metrics {
    registry: Registry,
    pub(crate) connections: Gauge,
    pub(crate) received_frames: Counter,
    pub(crate) received_size: Counter,
    pub(crate) sent_frames: Counter,
    pub(crate) sent_size: Counter,
    pub(crate) rate_limited: Counter,
    pub(crate) slow_clients: Counter,
    latency: Histogram,
    refused_handshakes: Labelled,
    error_answers: Labelled,
    closed: Labelled,
}

impl Metrics {
    pub(crate) fn new() -> Self {
        // From 0.25 ms to 8 s.
        let latency = Histogram::new(exponential_buckets(0.000_25, 2.0, 16));
        let mut metrics = Self {
            registry: Registry::with_prefix("arqon_shield"),
            connections: Gauge::default(),
            received_frames: Counter::default(),
            received_size: Counter::default(),
            sent_frames: Counter::default(),
            sent_size: Counter::default(),
            rate_limited: Counter::default(),
            slow_clients: Counter::default(),
            latency,
            refused_handshakes: Family::default(),
            error_answers: Family::default(),
            closed: Family::default(),
        };
        metrics.register();
        metrics
    }

    fn register(&mut self) {
        let registry = &mut self.registry;
        registry.register("connections", "Client connections that stand", self.connections.clone());
        registry.register("received_frames", "Frames of clients", self.received_frames.clone());
        registry.register_with_unit("received", "Frames of clients", Unit::Bytes, self.received_size.clone());
        registry.register("sent_frames", "Frames to clients", self.sent_frames.clone());
        registry.register_with_unit("sent", "Frames to clients", Unit::Bytes, self.sent_size.clone());
        registry.register("rate_limited", "Requests over a message rate", self.rate_limited.clone());
        registry.register("slow_clients", "Clients dropped because they took no bytes", self.slow_clients.clone());
        registry.register_with_unit(
            "request_latency",
            "From a request's frame to its answer, long-polls left out",
            Unit::Seconds,
            self.latency.clone(),
        );
        registry.register("refused_handshakes", "Handshakes refused, by reason", self.refused_handshakes.clone());
        registry.register("error_answers", "Requests answered with an error, by code", self.error_answers.clone());
        registry.register("closed", "Sessions ended by the Shield, by reason", self.closed.clone());
    }

    pub(crate) fn refused_handshake(&self, reason: &'static str) {
        self.refused_handshakes.get_or_create(&vec![("reason", reason)]).inc();
    }

    pub(crate) fn error_answer(&self, code: wire::ErrorCode) {
        self.error_answers.get_or_create(&vec![("code", code_name(code))]).inc();
    }

    pub(crate) fn closed(&self, reason: &'static str) {
        self.closed.get_or_create(&vec![("reason", reason)]).inc();
    }

    pub(crate) fn answered(&self, latency: Duration) {
        self.latency.observe(latency.as_secs_f64());
    }

    /// The text of `/metrics`.
    pub(crate) fn text(&self) -> Result<String, fmt::Error> {
        let mut out = String::new();
        text::encode(&mut out, &self.registry)?;
        Ok(out)
    }
}
