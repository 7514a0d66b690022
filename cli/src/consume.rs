//! `arqon consume`: prints the events of a topic.

use std::time::{SystemTime, UNIX_EPOCH};

use arqon_sdk::{ConsumerOptions, Event, From};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde_json::{Map, Value, json};

use crate::connect::Connect;
use crate::signals::StopSignals;
use crate::{Failure, output};

/// Numbers from here on are milliseconds since 1970 (September 2001), below it offsets.
const TIME_MS_MIN: u64 = 1_000_000_000_000;

/// Arguments of `arqon consume`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Examples:\n  arqon consume demo.events --from earliest --limit 10\n  \
    arqon consume demo.events --from 2026-01-31T12:00:00Z --json\n\n\
    Without --limit it follows the topic until Ctrl-C. Payloads are printed one a line, in base64 where\n\
    they are not UTF-8; --json prints whole events, with payload or payload_base64.")]
pub struct ConsumeArgs {
    /// Topic
    topic: String,
    /// Where to start: earliest, latest, an offset, or a time (RFC 3339, or ms since 1970)
    #[arg(long, value_name = "POSITION", default_value = "latest", value_parser = parse_from)]
    from: From,
    /// Only this partition; may be given several times
    #[arg(long = "partition", value_name = "N")]
    partitions: Vec<u32>,
    /// Stop after N events
    #[arg(long, value_name = "N")]
    limit: Option<u64>,
    /// Stop at what was the end of the topic at the start
    #[arg(long)]
    stop_at_end: bool,
    #[command(flatten)]
    connect: Connect,
    /// Print one JSON document an event
    #[arg(long)]
    json: bool,
}

/// Prints events until the limit, the end, or a signal.
///
/// # Errors
/// The topic does not exist or cannot be read.
pub async fn consume(args: ConsumeArgs) -> Result<(), Failure> {
    let mut signals = StopSignals::listen()?;
    tokio::select! {
        result = print_events(&args) => result,
        () = signals.wait() => Ok(()),
    }
}

async fn print_events(args: &ConsumeArgs) -> Result<(), Failure> {
    let client = args.connect.client().await?;
    let options = ConsumerOptions {
        from: args.from,
        partitions: (!args.partitions.is_empty()).then(|| args.partitions.clone()),
        stop_at_end: args.stop_at_end,
        ..ConsumerOptions::default()
    };
    let mut consumer = client.consumer(&args.topic, options).await?;
    let mut left = args.limit.unwrap_or(u64::MAX);
    while left > 0 {
        let Some(event) = consumer.next().await? else { break };
        if args.json {
            output::json(&event_document(&event))?;
        } else {
            let (_, payload) = printable(&event.payload);
            output::line(payload)?;
        }
        left -= 1;
    }
    Ok(())
}

/// Reads `--from`.
fn parse_from(text: &str) -> Result<From, String> {
    match text {
        "earliest" => return Ok(From::Earliest),
        "latest" => return Ok(From::Latest),
        _ => {}
    }
    if let Ok(number) = text.parse::<u64>() {
        return Ok(if number >= TIME_MS_MIN { From::Time(number) } else { From::Offset(number) });
    }
    let time: SystemTime = humantime::parse_rfc3339_weak(text)
        .map_err(|_| "use earliest, latest, an offset, or a time such as 2026-01-31T12:00:00Z".to_owned())?;
    let since = time.duration_since(UNIX_EPOCH).map_err(|_| "is before 1970".to_owned())?;
    Ok(From::Time(u64::try_from(since.as_millis()).unwrap_or(u64::MAX)))
}

/// The payload as text, and the name of the field that it goes into.
fn printable(payload: &[u8]) -> (&'static str, String) {
    match std::str::from_utf8(payload) {
        Ok(text) => ("payload", text.to_owned()),
        Err(_) => ("payload_base64", BASE64_STANDARD.encode(payload)),
    }
}

/// An event as `--json` shows it. Fields that are empty are left out.
fn event_document(event: &Event) -> Value {
    let mut document = Map::new();
    let mut put = |name: &str, value: Value| {
        let empty = matches!(&value, Value::String(text) if text.is_empty());
        if !empty {
            document.insert(name.to_owned(), value);
        }
    };
    put("topic", json!(&*event.topic));
    put("partition", json!(event.partition));
    put("offset", json!(event.offset));
    put("time_ms", json!(event.time_ms));
    put("id", json!(uuid::Uuid::from_bytes(event.id).to_string()));
    put("type", json!(event.r#type.as_str_name().trim_start_matches("EVENT_TYPE_").to_lowercase()));
    put("schema", json!(&*event.schema));
    let (name, key) = printable(&event.key);
    put(if name == "payload" { "key" } else { "key_base64" }, json!(key));
    put("tenant", json!(&*event.tenant_id));
    put("traceparent", json!(event.traceparent));
    if !event.headers.is_empty() {
        put("headers", json!(event.headers));
    }
    if let Some(cause) = &event.cause {
        put(
            "cause",
            json!({
                "topic": cause.topic,
                "partition": cause.partition,
                "offset": cause.offset,
                "operator_id": cause.operator_id,
                "operator_version": cause.operator_version,
                "group": cause.group,
                "attempt": cause.attempt,
            }),
        );
    }
    let (name, payload) = printable(&event.payload);
    document.insert(name.to_owned(), json!(payload));
    Value::Object(document)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_are_words_offsets_or_times() {
        assert_eq!(parse_from("earliest"), Ok(From::Earliest));
        assert_eq!(parse_from("latest"), Ok(From::Latest));
        assert_eq!(parse_from("17"), Ok(From::Offset(17)));
        assert_eq!(parse_from("1700000000000"), Ok(From::Time(1_700_000_000_000)));
        assert_eq!(parse_from("2023-11-14T22:13:20Z"), Ok(From::Time(1_700_000_000_000)));
        for wrong in ["-1", "yesterday", ""] {
            assert!(parse_from(wrong).unwrap_err().contains("earliest"), "{wrong}");
        }
    }

    #[test]
    fn a_payload_that_is_no_text_is_base64() {
        let event = Event { payload: vec![0xff, 0].into(), offset: 3, ..Event::default() };
        let document = event_document(&event);
        assert_eq!(document["payload_base64"], "/wA=");
        assert_eq!(document["offset"], 3);
        assert!(document.get("payload").is_none() && document.get("schema").is_none());
    }
}
