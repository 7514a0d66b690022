//! What an operator counts.

use std::{
    fmt::Write as _,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicI64, Ordering},
    },
    time::Duration,
};

use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder, text::encode},
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::Registry,
};

/// How a job ended here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum JobEnd {
    /// Its result is published and the job settled.
    Done,
    /// A result with `error` is published and the job settled.
    Failed,
    /// The operator gave it back, to be tried again.
    Retried,
    /// It was given back because the operator stops or its result could not be published.
    Returned,
    /// Its lease was lost meanwhile; another worker has it.
    Lost,
}

impl JobEnd {
    fn name(self) -> &'static str {
        match self {
            Self::Done => "done",
            Self::Failed => "failed",
            Self::Retried => "retried",
            Self::Returned => "returned",
            Self::Lost => "lost",
        }
    }
}

impl EncodeLabelValue for JobEnd {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> std::fmt::Result {
        encoder.write_str(self.name())
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct EndLabel {
    end: JobEnd,
}

/// Counters of one operator, and whether it is able to work. Clones share their values.
#[derive(Clone)]
pub struct Metrics {
    inner: Arc<Inner>,
}

struct Inner {
    registry: Registry,
    jobs: Family<EndLabel, Counter>,
    running: Gauge<i64, AtomicI64>,
    duration: Histogram,
    heartbeat_failures: Counter,
    registered: AtomicBool,
    leasing: AtomicBool,
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl std::fmt::Debug for Metrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Metrics(running {})", self.running())
    }
}

impl Metrics {
    /// All at zero.
    #[must_use]
    pub fn new() -> Self {
        let mut registry = Registry::with_prefix("arqon_operator");
        let jobs = Family::<EndLabel, Counter>::default();
        let running = Gauge::<i64, AtomicI64>::default();
        // 1 ms to a good half hour.
        let duration = Histogram::new(prometheus_client::metrics::histogram::exponential_buckets(0.001, 2.0, 22));
        let heartbeat_failures = Counter::default();
        registry.register("jobs", "Jobs by how they ended here", jobs.clone());
        registry.register("running_jobs", "Jobs running now", running.clone());
        registry.register("job_duration_seconds", "Time from lease to settlement", duration.clone());
        registry.register("heartbeat_failures", "Registrations and heartbeats not written", heartbeat_failures.clone());
        for end in [JobEnd::Done, JobEnd::Failed, JobEnd::Retried, JobEnd::Returned, JobEnd::Lost] {
            // Present from the start, at zero.
            drop(jobs.get_or_create(&EndLabel { end }));
        }
        let (registered, leasing) = (AtomicBool::new(false), AtomicBool::new(false));
        Self { inner: Arc::new(Inner { registry, jobs, running, duration, heartbeat_failures, registered, leasing }) }
    }

    /// Jobs that ended like `end` so far.
    #[must_use]
    pub fn jobs(&self, end: JobEnd) -> u64 {
        self.inner.jobs.get_or_create(&EndLabel { end }).get()
    }

    /// Jobs running now.
    #[must_use]
    pub fn running(&self) -> u32 {
        u32::try_from(self.inner.running.get()).unwrap_or(0)
    }

    /// Why no jobs are taken now, or `None` when they are.
    #[must_use]
    pub fn not_ready(&self) -> Option<&'static str> {
        if !self.inner.registered.load(Ordering::Relaxed) {
            Some("not registered")
        } else if !self.inner.leasing.load(Ordering::Relaxed) {
            Some("not taking jobs")
        } else {
            None
        }
    }

    /// All values in the Prometheus (OpenMetrics) text format.
    #[must_use]
    pub fn text(&self) -> String {
        let mut out = String::new();
        // Writing into a String fails never.
        let _ = encode(&mut out, &self.inner.registry);
        out
    }

    pub(crate) fn started(&self) {
        self.inner.running.inc();
    }

    pub(crate) fn ended(&self, end: JobEnd, took: Duration) {
        self.inner.running.dec();
        self.inner.jobs.get_or_create(&EndLabel { end }).inc();
        self.inner.duration.observe(took.as_secs_f64());
    }

    pub(crate) fn announced(&self, success: bool) {
        self.inner.registered.store(success, Ordering::Relaxed);
        if !success {
            self.inner.heartbeat_failures.inc();
        }
    }

    pub(crate) fn set_leasing(&self, leasing: bool) {
        self.inner.leasing.store(leasing, Ordering::Relaxed);
    }
}
