//! What an operator is: a job in, a result out.

use std::time::Duration;

use arqon_proto::EventType;
use arqon_sdk::{Event, NewEvent};
use uuid::Uuid;
use xxhash_rust::xxh3::Xxh3;

use crate::json::{self, Document};

/// Longest error text in a result, in bytes.
const ERROR_TEXT_SIZE_MAX: usize = 1_000;
/// Longest `job_id` that is given back, in bytes of JSON.
const JOB_ID_SIZE_MAX: usize = 1_000;

/// Does the work of one operator type.
///
/// ```
/// use arqon_operators::{JobError, Operator};
/// use arqon_sdk::{Event, NewEvent};
///
/// struct Upper;
///
/// impl Operator for Upper {
///     async fn run(&self, job: &Event, _attempt: u32) -> Result<NewEvent, JobError> {
///         let text = std::str::from_utf8(&job.payload).map_err(|_| JobError::failed("payload is not UTF-8"))?;
///         Ok(NewEvent::new(text.to_uppercase()))
///     }
/// }
/// ```
pub trait Operator: Send + Sync + 'static {
    /// Makes the one result of `job`; `attempt` counts from 1. What the result leaves empty is
    /// filled in: schema from the options, key and trace context from the job. Its id and type
    /// are always set.
    ///
    /// The job's lease is renewed meanwhile, however long it takes. The future is dropped when
    /// the lease is lost or the process stops. It runs on the async runtime, so that long
    /// computation belongs into `spawn_blocking`. A panic is a failed job.
    ///
    /// # Errors
    /// [`JobError`] says whether the job has failed for good or is to be tried again.
    fn run(&self, job: &Event, attempt: u32) -> impl Future<Output = Result<NewEvent, JobError>> + Send;

    /// Resolves when a job can be taken; no job is leased before. The default is always ready.
    fn ready(&self) -> impl Future<Output = ()> + Send {
        async {}
    }

    /// The result of a job that failed. The default is [`failed_result`].
    fn failed(&self, job: &Event, message: &str) -> NewEvent {
        failed_result(job, message)
    }
}

/// Why a job has no result.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum JobError {
    /// The job cannot be done. A result that says so is published, and the job is settled.
    #[error("{0}")]
    Failed(String),
    /// The job may be done later or elsewhere: it goes back to its queue, until its topic's
    /// limit of attempts is reached.
    #[error("{reason}")]
    Retry {
        /// Nobody gets the job before this time has passed.
        delay: Duration,
        /// Why, for the log.
        reason: String,
    },
}

impl JobError {
    /// A job that failed for good.
    #[must_use]
    pub fn failed(message: impl Into<String>) -> Self {
        Self::Failed(message.into())
    }

    /// A job to be tried again after `delay`.
    #[must_use]
    pub fn retry(delay: Duration, reason: impl Into<String>) -> Self {
        Self::Retry { delay, reason: reason.into() }
    }
}

/// The job's id as JSON: the `job_id` of a JSON payload where that is text or a number, else
/// the id of the event as a UUID in quotes.
#[must_use]
pub fn job_id(job: &Event) -> String {
    let usable = |written: &&str| {
        let is_text_or_number = written.starts_with(|c: char| c == '"' || c == '-' || c.is_ascii_digit());
        is_text_or_number && written.len() <= JOB_ID_SIZE_MAX
    };
    let members = match json::parse(&job.payload) {
        Ok(Document::Object(members)) => members,
        _ => Vec::new(),
    };
    match members.iter().find(|(name, _)| name == "job_id").map(|(_, written)| *written).filter(usable) {
        Some(written) => written.to_owned(),
        None => format!("\"{}\"", Uuid::from_bytes(job.id)),
    }
}

/// The result that says why a job failed: `{"job_id": ..., "error": "..."}`, the message as
/// one line of at most 1,000 bytes.
#[must_use]
pub fn failed_result(job: &Event, message: &str) -> NewEvent {
    let mut line: String = message.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    if line.len() > ERROR_TEXT_SIZE_MAX {
        let ends = line.char_indices().map(|(start, c)| start + c.len_utf8());
        line.truncate(ends.take_while(|end| *end <= ERROR_TEXT_SIZE_MAX).last().unwrap_or(0));
        line.push_str("...");
    }
    let error = serde_json::Value::String(line);
    NewEvent::new(format!("{{\"job_id\":{},\"error\":{error}}}", job_id(job)))
}

/// The id of the result of `job` for `group`: the same for every attempt, so that a second run
/// gives the same event. UUIDv8 from XXH3-128 of the cause and the group.
#[must_use]
pub fn result_id(job: &Event, group: &str) -> [u8; 16] {
    let mut hash = Xxh3::new();
    for part in [job.tenant_id.as_bytes(), job.topic.as_bytes(), group.as_bytes()] {
        hash.update(&(part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    hash.update(&job.partition.to_le_bytes());
    hash.update(&job.offset.to_le_bytes());
    Uuid::new_v8(hash.digest128().to_be_bytes()).into_bytes()
}

/// Fills in what the operator left open.
pub(crate) fn finish(mut result: NewEvent, job: &Event, group: &str, schema: &str) -> NewEvent {
    result.id = Some(result_id(job, group));
    result.event_type = EventType::JobResult;
    if result.schema.is_empty() {
        schema.clone_into(&mut result.schema);
    }
    if result.key.is_empty() {
        result.key = job.key.clone();
    }
    if result.traceparent.is_empty() {
        job.traceparent.clone_into(&mut result.traceparent);
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(payload: &str) -> Event {
        Event {
            id: [7; 16],
            topic: "a.jobs".into(),
            tenant_id: "acme".into(),
            offset: 4,
            key: "k".into(),
            traceparent: "00-aa-bb-01".into(),
            payload: payload.to_owned().into(),
            ..Event::default()
        }
    }

    #[test]
    fn the_job_id_is_given_back_as_it_came() {
        let own = "\"07070707-0707-0707-0707-070707070707\"".to_owned();
        let long = format!("{{\"job_id\":\"{}\"}}", "x".repeat(2_000));
        for (payload, expected) in [
            (r#"{"job_id":"a\"b"}"#, r#""a\"b""#),
            (r#"{"x":1,"job_id": 340282366920938463463374607431768211455}"#, "340282366920938463463374607431768211455"),
            (r#"{"job_id":-1}"#, "-1"),
            (r#"{"job_id":null}"#, own.as_str()),
            (r#"{"job_id":{"a":1}}"#, own.as_str()),
            (r#"{}"#, own.as_str()),
            ("[1]", own.as_str()),
            ("not json", own.as_str()),
            ("\u{0}", own.as_str()),
            (&long, own.as_str()),
        ] {
            assert_eq!(job_id(&job(payload)), expected, "{payload}");
        }
    }

    #[test]
    fn a_failure_is_one_bounded_line_of_json() {
        let message = format!("first \"line\"\nsecond {}", "ä".repeat(2_000));
        let result = failed_result(&job(r#"{"job_id":"j1"}"#), &message);
        let json: serde_json::Value = serde_json::from_slice(&result.payload).unwrap();
        assert_eq!(json["job_id"], "j1");
        let error = json["error"].as_str().unwrap();
        assert!(error.starts_with("first \"line\" second ää") && error.len() < 1_010, "{error}");
    }

    #[test]
    fn every_attempt_makes_the_same_id_and_every_job_another() {
        let first = job("{}");
        assert_eq!(result_id(&first, "g"), result_id(&job("other payload"), "g"));
        let mut ids = vec![result_id(&first, "g"), result_id(&first, "h")];
        for change in [
            |job: &mut Event| job.offset = 5,
            |job: &mut Event| job.partition = 1,
            |job: &mut Event| job.topic = "b.jobs".into(),
            |job: &mut Event| job.tenant_id = "other".into(),
        ] {
            let mut other = job("{}");
            change(&mut other);
            ids.push(result_id(&other, "g"));
        }
        ids.sort_unstable();
        ids.dedup();
        assert_eq!(ids.len(), 6);
        assert_eq!(Uuid::from_bytes(ids[0]).get_version_num(), 8);
    }

    #[test]
    fn what_the_operator_set_stays() {
        let result = finish(NewEvent::new("r"), &job("{}"), "g", "a.result.v1");
        assert_eq!((result.schema.as_str(), &result.key[..]), ("a.result.v1", &b"k"[..]));
        assert_eq!((result.traceparent.as_str(), result.event_type), ("00-aa-bb-01", EventType::JobResult));
        let own = NewEvent::new("r").schema("b.result.v2").key("own").traceparent("00-cc-dd-01");
        let result = finish(own, &job("{}"), "g", "a.result.v1");
        assert_eq!((result.schema.as_str(), &result.key[..]), ("b.result.v2", &b"own"[..]));
        assert_eq!(result.traceparent, "00-cc-dd-01");
    }
}
