//! Names of topics, tenants, groups and schemas.

use crate::limits;

/// Why a name is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field} {name:?} is not valid: {rule}")]
pub struct NameError {
    /// Which field held it.
    pub field: &'static str,
    /// The name, cut to 80 characters.
    pub name: String,
    /// The rule it breaks.
    pub rule: &'static str,
}

/// What a topic is for; follows from the last part of its name unless set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TopicClass {
    /// Plain events.
    Events,
    /// `*.jobs`: a queue kept as a log.
    Jobs,
    /// `*.results`, `*.features`: one result a job.
    Results,
    /// `*.streams`: continuous data.
    Streams,
    /// `*.dead`: jobs that ran out of attempts.
    Dead,
    /// `system.*`.
    System,
}

impl TopicClass {
    /// The class that a topic's name asks for.
    #[must_use]
    pub fn of(topic: &str) -> Self {
        if topic.starts_with("system.") {
            return Self::System;
        }
        match topic.rsplit('.').next() {
            Some("jobs") => Self::Jobs,
            Some("results" | "features") => Self::Results,
            Some("streams") => Self::Streams,
            Some("dead") => Self::Dead,
            _ => Self::Events,
        }
    }

    /// Lower-case name, as in `topic describe`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Events => "events",
            Self::Jobs => "jobs",
            Self::Results => "results",
            Self::Streams => "streams",
            Self::Dead => "dead",
            Self::System => "system",
        }
    }
}

/// The results topic of a jobs topic for which none is named: `a.results` for `a.jobs`, `x.results` for any other `x`.
#[must_use]
pub fn results_topic_of(jobs_topic: &str) -> String {
    format!("{}.results", jobs_topic.strip_suffix(".jobs").unwrap_or(jobs_topic))
}

fn refuse(field: &'static str, name: &str, rule: &'static str) -> Result<(), NameError> {
    Err(NameError { field, name: name.chars().take(80).collect(), rule })
}

fn check_parts(field: &'static str, name: &str) -> Result<(), NameError> {
    if name.is_empty() {
        return refuse(field, name, "it is empty");
    }
    if name.len() > limits::NAME_SIZE_MAX {
        return refuse(field, name, "it is longer than 200 bytes");
    }
    if !name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_')) {
        return refuse(field, name, "use letters, digits, '.', '-' and '_'");
    }
    if name.split('.').any(str::is_empty) {
        return refuse(field, name, "the parts between dots must not be empty");
    }
    Ok(())
}

/// Checks a topic name such as `genesis.jobs`.
///
/// # Errors
/// Empty, over 200 bytes, an empty part, or a character other than letters, digits, `.-_`.
pub fn check_topic(name: &str) -> Result<(), NameError> {
    check_parts("topic", name)
}

/// Checks a tenant, group, worker or operator name; same alphabet as a topic.
///
/// # Errors
/// As [`check_topic`], with `field` named.
pub fn check_tenant(field: &'static str, name: &str) -> Result<(), NameError> {
    check_parts(field, name)
}

/// Checks a schema name: dotted parts that end in a version, `arqonbus.nvm.job.v1`. The empty
/// name stands for "no schema".
///
/// # Errors
/// Over 256 bytes, a wrong character, or no version at the end.
pub fn check_schema(name: &str) -> Result<(), NameError> {
    if name.is_empty() {
        return Ok(());
    }
    if name.len() > limits::SCHEMA_SIZE_MAX {
        return refuse("schema", name, "it is longer than 256 bytes");
    }
    check_parts("schema", name)?;
    let version = name.rsplit('.').next().unwrap_or_default();
    let digits = version.strip_prefix('v').unwrap_or_default();
    if !name.contains('.') || digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return refuse("schema", name, "it must end in a version, as in arqonbus.nvm.job.v1");
    }
    Ok(())
}
