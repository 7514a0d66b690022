//! What a run loop is told.

use std::time::Duration;

use arqon_proto::{check_schema, check_tenant, check_topic, limits, results_topic_of, wire};

use super::metrics::Metrics;
use crate::ConfigError;

/// Jobs that one operator may run at a time, at most.
pub const PARALLELISM_MAX: u32 = 1_000;
/// Longest time for running jobs to end after the signal to stop.
pub const DRAIN_MAX: Duration = Duration::from_secs(600);

const TYPES: [&str; 6] = ["genesis", "nvm", "bowlnet", "helios", "qml", "generic"];
const HARDWARE_PROFILES: [&str; 5] = ["cpu", "gpu", "fpga", "audio", "optical"];
const STAGES: [&str; 3] = ["prototype", "staging", "production"];

/// Where jobs come from, where results go, and how many at a time. Start from
/// [`RunOptions::new`].
#[derive(Clone, Debug)]
pub struct RunOptions {
    /// The queue, as in `genesis.jobs`.
    pub jobs_topic: String,
    /// Where results go, as in `genesis.results`.
    pub results_topic: String,
    /// Group of the queue: its workers share the jobs.
    pub group: String,
    /// Schema of results that name none, or empty.
    pub result_schema: String,
    /// Jobs that run at a time, 1 to [`PARALLELISM_MAX`].
    pub parallelism: u32,
    /// Length of a lease. It is renewed while the job runs: it only says how soon others get the
    /// jobs of a process that died.
    pub lease: Duration,
    /// Time for running jobs to end after the signal to stop; the rest is given back.
    pub drain: Duration,
    /// What is counted.
    pub metrics: Metrics,
}

impl RunOptions {
    /// Jobs of `jobs_topic` for `group`, results to [`results_topic_of`], four at a time, a lease
    /// of 30 s and 20 s to drain.
    pub fn new(jobs_topic: impl Into<String>, group: impl Into<String>) -> Self {
        let jobs_topic = jobs_topic.into();
        Self {
            results_topic: results_topic_of(&jobs_topic),
            jobs_topic,
            group: group.into(),
            result_schema: String::new(),
            parallelism: 4,
            lease: Duration::from_millis(u64::from(limits::LEASE_MS_DEFAULT)),
            drain: Duration::from_secs(20),
            metrics: Metrics::new(),
        }
    }

    /// Checks every option.
    ///
    /// # Errors
    /// The first that is wrong, by the name of its field.
    pub fn check(&self) -> Result<(), ConfigError> {
        for (key, topic) in [("jobs_topic", &self.jobs_topic), ("results_topic", &self.results_topic)] {
            check_topic(topic).map_err(|error| ConfigError::new(key, format!("{:?}: {}", error.name, error.rule)))?;
        }
        if self.jobs_topic == self.results_topic {
            return Err(ConfigError::new("results_topic", "is the jobs topic"));
        }
        check_tenant("group", &self.group)
            .map_err(|error| ConfigError::new("group", format!("{:?}: {}", error.name, error.rule)))?;
        check_schema(&self.result_schema)
            .map_err(|error| ConfigError::new("result_schema", format!("{:?}: {}", error.name, error.rule)))?;
        if !(1..=PARALLELISM_MAX).contains(&self.parallelism) {
            return Err(ConfigError::new(
                "parallelism",
                format!("is {}, not 1 to {PARALLELISM_MAX}", self.parallelism),
            ));
        }
        let lease_ms = self.lease.as_millis();
        let (least, most) = (limits::LEASE_MS_MIN, limits::LEASE_MS_MAX);
        if !(u128::from(least)..=u128::from(most)).contains(&lease_ms) {
            return Err(ConfigError::new("lease_ms", format!("is {lease_ms}, not {least} to {most}")));
        }
        if self.drain > DRAIN_MAX {
            let reason = format!("is {}, not 0 to {}", self.drain.as_millis(), DRAIN_MAX.as_millis());
            return Err(ConfigError::new("drain_ms", reason));
        }
        Ok(())
    }
}

/// Checks what is said about an operator when it registers.
///
/// # Errors
/// The first field that is empty, too long, or none of its known values.
pub fn check_registration(registration: &wire::OperatorRegistration) -> Result<(), ConfigError> {
    check_tenant("operator_id", &registration.operator_id)
        .map_err(|error| ConfigError::new("operator_id", format!("{:?}: {}", error.name, error.rule)))?;
    let one_of = |key: &str, value: &str, known: &[&str]| {
        if known.contains(&value) {
            Ok(())
        } else {
            Err(ConfigError::new(key, format!("{value:?} is none of {}", known.join(", "))))
        }
    };
    one_of("operator_type", &registration.operator_type, &TYPES)?;
    one_of("hardware_profile", &registration.hardware_profile, &HARDWARE_PROFILES)?;
    one_of("stage", &registration.stage, &STAGES)?;
    let version = &registration.version;
    if version.is_empty() || version.len() > limits::NAME_SIZE_MAX || version.chars().any(char::is_control) {
        return Err(ConfigError::new("version", format!("is not 1 to {} bytes of text", limits::NAME_SIZE_MAX)));
    }
    for schema in &registration.supported_schemas {
        check_schema(schema)
            .map_err(|error| ConfigError::new("supported_schemas", format!("{:?}: {}", error.name, error.rule)))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_go_beside_their_jobs() {
        assert!(RunOptions::new("genesis.jobs", "g").check().is_ok());
    }

    #[test]
    fn wrong_options_are_named() {
        type Change = fn(&mut RunOptions);
        let cases: [(&str, Change); 9] = [
            ("jobs_topic", |o| o.jobs_topic = "a b".into()),
            ("results_topic", |o| o.results_topic.clear()),
            ("results_topic", |o| o.results_topic = o.jobs_topic.clone()),
            ("group", |o| o.group = "a..b".into()),
            ("result_schema", |o| o.result_schema = "none".into()),
            ("parallelism", |o| o.parallelism = 0),
            ("parallelism", |o| o.parallelism = PARALLELISM_MAX + 1),
            ("lease_ms", |o| o.lease = Duration::from_millis(999)),
            ("drain_ms", |o| o.drain = Duration::MAX),
        ];
        for (key, change) in cases {
            let mut options = RunOptions::new("genesis.jobs", "genesis");
            change(&mut options);
            assert_eq!(options.check().unwrap_err().key, key);
        }
    }

    #[test]
    fn wrong_registrations_are_named() {
        type Change = fn(&mut wire::OperatorRegistration);
        let good = wire::OperatorRegistration {
            operator_id: "op-1".into(),
            operator_type: "generic".into(),
            version: "1".into(),
            hardware_profile: "cpu".into(),
            stage: "staging".into(),
            ..Default::default()
        };
        check_registration(&good).unwrap();
        let cases: [(&str, Change); 6] = [
            ("operator_id", |r| r.operator_id = "a b".into()),
            ("operator_type", |r| r.operator_type = "oracle".into()),
            ("version", |r| r.version.clear()),
            ("hardware_profile", |r| r.hardware_profile.clear()),
            ("stage", |r| r.stage = "test".into()),
            ("supported_schemas", |r| r.supported_schemas.push("x".into())),
        ];
        for (key, change) in cases {
            let mut registration = good.clone();
            change(&mut registration);
            assert_eq!(check_registration(&registration).unwrap_err().key, key);
        }
    }
}
