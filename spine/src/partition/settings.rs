//! The settings of a topic that may change while its replicas run.

use arqon_proto::{limits, wire};

use super::{Partition, Replica};

/// See [`wire::TopicConfig`], whose fields these are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Settings {
    pub retention_ms: u64,
    pub retention_bytes: u64,
    pub attempts_max: u32,
}

impl From<&wire::TopicConfig> for Settings {
    fn from(topic: &wire::TopicConfig) -> Self {
        let attempts_max = if topic.attempts_max == 0 { limits::ATTEMPT_COUNT_DEFAULT } else { topic.attempts_max };
        Self { retention_ms: topic.retention_ms, retention_bytes: topic.retention_bytes, attempts_max }
    }
}

impl Partition {
    /// Takes over the settings of `topic` that may change. Retention looks at once; attempts count
    /// from a job's next failure on.
    pub fn configure(&self, topic: &wire::TopicConfig) {
        let settings = Settings::from(topic);
        self.replica.settings.send_if_modified(|known| std::mem::replace(known, settings) != settings);
    }
}

impl Replica {
    pub(super) fn settings(&self) -> Settings {
        *self.settings.borrow()
    }

    /// Attempts before a job is dead-lettered.
    pub(super) fn attempts_max(&self) -> u32 {
        self.settings().attempts_max
    }
}
