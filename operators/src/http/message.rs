//! From a job to the body of a request, and from an answer to the payload of a result.
//!
//! ```text
//!   job payload      {"job_id": "7", "imageData": "...", "width": 96, ...}     posted as it is
//!   answer           {"seed": {...}, "error_rms": 2.5}    or    {"cell_px": 7, ...}
//!   result payload   {"job_id": "7", "seed": {...}, "error_rms": 2.5}
//!                                     or    {"job_id": "7", "seed": {"cell_px": 7, ...}}
//! ```
//!
//! An answer that is an object with the member that results of this operator have becomes the
//! result, with the job's id in it; any other answer becomes that member. Its JSON is passed
//! on byte by byte, so that no number changes on its way.

use std::collections::HashSet;

use arqon_proto::limits;
use arqon_sdk::Event;

use crate::{
    JobError, job_id,
    json::{self, Document},
};

/// Checks that `job` is one for a worker that takes `schema` (empty: any).
pub(crate) fn check_job(job: &Event, schema: &str) -> Result<(), JobError> {
    if !schema.is_empty() && !job.schema.is_empty() && *job.schema != *schema {
        return Err(JobError::failed(format!("the job has the schema {}, this operator takes {schema}", job.schema)));
    }
    match json::parse(&job.payload) {
        Ok(Document::Object(_)) => Ok(()),
        Ok(Document::Other(_)) => Err(JobError::failed("the job's payload is not a JSON object")),
        Err(error) => Err(JobError::failed(format!("the job's payload is not JSON: {error}"))),
    }
}

/// The payload of the result for `answer`.
pub(crate) fn result_payload(job: &Event, field: &str, answer: &[u8]) -> Result<String, JobError> {
    let document =
        json::parse(answer).map_err(|error| JobError::failed(format!("the worker's answer is not JSON: {error}")))?;
    let mut out = format!("{{\"job_id\":{}", job_id(job));
    let mut push = |name: &str, written: &str| {
        out.push(',');
        out.push_str(&serde_json::Value::from(name).to_string());
        out.push(':');
        out.push_str(written);
    };
    match document {
        Document::Object(members) if members.iter().any(|(name, _)| name == field) => {
            let mut seen = HashSet::from(["job_id"]);
            // Readers of JSON keep the last of two members with one name, and so does this.
            let mut kept: Vec<_> = members.iter().rev().filter(|(name, _)| seen.insert(name)).collect();
            kept.reverse();
            kept.iter().for_each(|(name, written)| push(name, written));
        }
        _ => push(field, std::str::from_utf8(answer).unwrap_or_default().trim_ascii()),
    }
    out.push('}');
    if out.len() > limits::PAYLOAD_SIZE_MAX {
        let (size, limit) = (out.len(), limits::PAYLOAD_SIZE_MAX);
        return Err(JobError::failed(format!("the result would have {size} bytes, the limit is {limit}")));
    }
    Ok(out)
}

/// What a worker says about its own error: the text under `error`, if the body has one.
pub(crate) fn stated_error(body: &[u8]) -> Option<String> {
    let Ok(Document::Object(members)) = json::parse(body) else { return None };
    let (_, written) = members.iter().find(|(name, _)| name == "error")?;
    serde_json::from_str(written).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(payload: &str) -> Event {
        Event { payload: payload.to_owned().into(), schema: "arqonbus.genesis.job.v1".into(), ..Event::default() }
    }

    fn result(answer: &str) -> Result<String, String> {
        result_payload(&job(r#"{"job_id":"7"}"#), "seed", answer.as_bytes()).map_err(|error| error.to_string())
    }

    #[test]
    fn an_answer_becomes_a_result() {
        for (answer, expected) in [
            (r#"{"cell_px":7}"#, r#"{"job_id":"7","seed":{"cell_px":7}}"#),
            (r#"{"seed":{"a":1},"error_rms":2.5}"#, r#"{"job_id":"7","seed":{"a":1},"error_rms":2.5}"#),
            (r#" {"job_id":"x","seed":null} "#, r#"{"job_id":"7","seed":null}"#),
            (r#"{"error":"odd"}"#, r#"{"job_id":"7","seed":{"error":"odd"}}"#),
            (r#"[1,2]"#, r#"{"job_id":"7","seed":[1,2]}"#),
            (r#""{""#, r#"{"job_id":"7","seed":"{"}"#),
            (
                "340282366920938463463374607431768211455.50",
                r#"{"job_id":"7","seed":340282366920938463463374607431768211455.50}"#,
            ),
            (r#"{"seed":1,"x":0,"seed":2}"#, r#"{"job_id":"7","x":0,"seed":2}"#),
            (r#"{"a\"b":1,"seed":2}"#, r#"{"job_id":"7","a\"b":1,"seed":2}"#),
        ] {
            assert_eq!(result(answer).unwrap(), expected);
        }
    }

    #[test]
    fn junk_is_an_error() {
        for answer in ["", "<html>", "{\"seed\":", "{\"seed\":1} x", "NaN", "\u{0}"] {
            assert!(result(answer).unwrap_err().starts_with("the worker's answer is not JSON: "), "{answer}");
        }
        assert!(result_payload(&job("{}"), "seed", b"\"\xff\"").is_err());
        let deep = format!("{{\"seed\":{}{}}}", "[".repeat(100_000), "]".repeat(100_000));
        // Nesting must not use up the stack; whether it is taken does not matter.
        let _ = result(&deep);
        let large = format!("\"{}\"", "x".repeat(limits::PAYLOAD_SIZE_MAX - 2));
        assert!(result(&large).unwrap_err().contains("the limit is 1048576"));
    }

    #[test]
    fn jobs_that_are_not_for_the_worker_fail() {
        let schema = "arqonbus.genesis.job.v1";
        check_job(&job("{}"), schema).unwrap();
        check_job(&Event { schema: "".into(), ..job("{}") }, schema).unwrap();
        check_job(&Event { schema: "a.b.v1".into(), ..job("{}") }, "").unwrap();
        let other = check_job(&Event { schema: "a.b.v1".into(), ..job("{}") }, schema).unwrap_err().to_string();
        assert!(other.contains("a.b.v1") && other.contains(schema), "{other}");
        assert!(check_job(&job("[]"), schema).unwrap_err().to_string().contains("not a JSON object"));
        assert!(check_job(&job("{"), schema).unwrap_err().to_string().contains("not JSON"));
    }

    #[test]
    fn a_worker_s_own_words_are_found() {
        assert_eq!(stated_error(br#"{"error":"not a checkerboard"}"#).as_deref(), Some("not a checkerboard"));
        assert_eq!(stated_error(b"<html>"), None);
        assert_eq!(stated_error(br#"["error"]"#), None);
    }
}
