//! `arqon topic alter` and `arqon topic trim`: what changes a topic that is in use.

use std::time::{Duration, SystemTime};

use arqon_proto::wire;
use serde_json::json;
use wire::trim_topic_request::Before;

use crate::connect::ConnectControl;
use crate::topic::{description, millis, parse_duration, retention};
use crate::{Failure, output};

/// Arguments of `arqon topic alter`.
#[derive(Clone, Debug, clap::Args)]
#[group(id = "change", multiple = true)]
pub struct AlterArgs {
    /// Name of the topic
    topic: String,
    /// Keep events for this time, as in 36h or 7d; 0s for no limit by time
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    retention: Option<Duration>,
    /// Keep at most this many bytes a partition; 0 for no limit by size
    #[arg(long, value_name = "BYTES")]
    retention_bytes: Option<u64>,
    /// Attempts before a job goes to the dead letters
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    attempts_max: Option<u32>,
    /// Number of partitions, never fewer than now; a jobs topic takes more only while it is empty
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    partitions: Option<u32>,
    #[command(flatten)]
    connect: ConnectControl,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

/// Arguments of `arqon topic trim`.
#[derive(Clone, Debug, clap::Args)]
pub struct TrimArgs {
    /// Name of the topic
    topic: String,
    /// Trim this partition [default: all, with --before-time]
    #[arg(long, value_name = "N")]
    partition: Option<u32>,
    /// Drop events before this offset
    #[arg(long, value_name = "OFFSET", requires = "partition", conflicts_with = "before_time")]
    before: Option<u64>,
    /// Drop events that are older than this, as in 36h, or written before a time as in 2031-05-01T00:00:00Z
    #[arg(long, value_name = "TIME", value_parser = parse_time, required_unless_present = "before")]
    before_time: Option<SystemTime>,
    #[command(flatten)]
    connect: ConnectControl,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

/// A point in time, or how long ago it was.
fn parse_time(text: &str) -> Result<SystemTime, String> {
    if let Ok(time) = humantime::parse_rfc3339_weak(text) {
        return Ok(time);
    }
    let ago = humantime::parse_duration(text).ok();
    let time = ago.and_then(|ago| SystemTime::now().checked_sub(ago)).filter(|time| *time >= SystemTime::UNIX_EPOCH);
    time.ok_or_else(|| "neither a time as in 2031-05-01T00:00:00Z nor a span as in 36h".to_owned())
}

/// Changes settings.
///
/// # Errors
/// Nothing to change is named, or the control plane cannot be reached or refuses.
pub async fn alter(args: AlterArgs) -> Result<(), Failure> {
    let change = wire::AlterTopicRequest {
        topic: args.topic,
        retention_ms: args.retention.map(millis),
        retention_bytes: args.retention_bytes,
        attempts_max: args.attempts_max,
        partitions: args.partitions,
    };
    if change == (wire::AlterTopicRequest { topic: change.topic.clone(), ..Default::default() }) {
        return Err(Failure::usage(
            "nothing to change: name --retention, --retention-bytes, --attempts-max or --partitions",
        ));
    }
    let mut control = args.connect.control().await?;
    let request = control.request(change);
    let topic = control.client().alter_topic(request).await?.into_inner();
    if args.json {
        return output::json(&description(&topic));
    }
    let attempts = match topic.attempts_max {
        0 => String::new(),
        count => format!(", {count} attempts"),
    };
    output::line(format_args!(
        "{} has {} partitions, keeps {}{attempts}",
        topic.topic,
        topic.partitions.len(),
        retention(&topic)
    ))
}

/// Drops old segments.
///
/// # Errors
/// The control plane cannot be reached or refuses.
pub async fn trim(args: TrimArgs) -> Result<(), Failure> {
    let since_1970 = |time: SystemTime| time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, millis);
    let before = match (args.before, args.before_time) {
        (Some(offset), _) => Some(Before::BeforeOffset(offset)),
        (None, time) => time.map(|time| Before::BeforeTimeMs(since_1970(time))),
    };
    let mut control = args.connect.control().await?;
    let request =
        control.request(wire::TrimTopicRequest { topic: args.topic.clone(), partition: args.partition, before });
    let partitions = control.client().trim_topic(request).await?.into_inner().partitions;
    if args.json {
        let starts = partitions.iter().map(|at| json!({ "partition": at.partition, "log_start": at.log_start }));
        return output::json(&json!({ "topic": args.topic, "partitions": starts.collect::<Vec<_>>() }));
    }
    partitions.iter().try_for_each(|at| {
        output::line(format_args!("{}/{} starts at offset {}", args.topic, at.partition, at.log_start))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_a_point_or_a_span_ago() {
        let point = parse_time("2031-05-01T00:00:00Z").unwrap();
        assert_eq!(point.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs(), 1_935_360_000);
        let then = parse_time("1h").unwrap();
        let ago = SystemTime::now().duration_since(then).unwrap();
        assert!(ago >= Duration::from_secs(3_600) && ago < Duration::from_secs(3_700), "{ago:?}");
        for wrong in ["yesterday", "", "9999999999years"] {
            assert!(parse_time(wrong).is_err(), "{wrong}");
        }
    }
}
