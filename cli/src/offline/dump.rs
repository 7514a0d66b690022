//! `arqon log dump`: the entries of a log as text or JSON lines.

use std::ops::ControlFlow;
use std::time::{Duration, UNIX_EPOCH};

use arqon_proto::{Batch, BatchKind, DecodeError, EventType, GroupId, RecordRef, decode_stamps, records, wire};
use arqon_storage::{BatchInspection, LogInspection};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use prost::Message as _;
use serde_json::{Value, json};

use super::{DirArgs, damage_of, ended, fault_document, fault_name, kind_name, open};
use crate::{Failure, output};

/// The last millisecond that has a date with a year of four digits.
const DATE_MS_MAX: u64 = 253_402_300_799_999;

/// Arguments of `arqon log dump`.
#[derive(Clone, Debug, clap::Args)]
pub struct DumpArgs {
    #[command(flatten)]
    dir: DirArgs,
    /// Only this group: 0 is the metadata of the cluster, every partition has its own
    #[arg(long, value_name = "N")]
    group: Option<u64>,
    /// Events from this offset on, and no other entries before them
    #[arg(long, value_name = "OFFSET")]
    from: Option<u64>,
    /// Stop after N lines
    #[arg(long, value_name = "N")]
    limit: Option<u64>,
}

/// Prints lines, up to the limit.
struct Printer {
    json: bool,
    from: u64,
    left: u64,
}

/// Prints the entries of the logs in order.
///
/// # Errors
/// The directory is not one of a node, or what was looked at is damaged.
pub fn dump(args: &DumpArgs) -> Result<(), Failure> {
    let (_, _, inspection) = open(&args.dir)?;
    let wanted = |log: &&LogInspection| args.group.is_none_or(|group| log.group.0 == group);
    let logs: Vec<_> = inspection.logs.iter().filter(wanted).collect();
    if let (Some(group), []) = (args.group, logs.as_slice()) {
        return Err(Failure::failed(format!("{}: there is no log of group {group}", args.dir.dir.display())));
    }
    let (json, left) = (args.dir.json, args.limit.unwrap_or(u64::MAX));
    let mut printer = Printer { json, from: args.from.unwrap_or(0), left };
    let mut damage_count = 0;
    for log in logs {
        let mut result = Ok(());
        let check = log.check(|_, batch| {
            result = printer.entry(log, batch);
            if result.is_err() || printer.left == 0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        result?;
        for fault in &check.faults {
            if json {
                let fault = fault_document(fault);
                output::json(&json!({ "group": log.group.0, "replica": log.replica.0, "fault": fault }))?;
            } else {
                output::line(format_args!("group {} {}: {fault}", log.group, fault_name(fault)))?;
            }
        }
        damage_count += damage_of(log, &check).len();
        if printer.left == 0 {
            break;
        }
    }
    ended(&args.dir, damage_count)
}

impl Printer {
    fn entry(&mut self, log: &LogInspection, entry: &BatchInspection) -> Result<(), Failure> {
        let BatchInspection::Whole { batch, .. } = entry else { return Ok(()) };
        let header = &batch.header;
        let purged = log.purged.is_some_and(|purged| header.index <= purged.index);
        if purged || header.next_offset().0 < self.from || self.left == 0 {
            return Ok(());
        }
        if header.kind != BatchKind::Data {
            let text = internal_text(log.group, batch);
            return self.print(log, batch, vec![field("kind", kind_name(header.kind)), field("text", text)]);
        }
        let mut result = Ok(());
        let read = records(batch, |number, record| {
            let offset = header.base_offset.0 + u64::from(number);
            if offset >= self.from && self.left > 0 && result.is_ok() {
                result = self.print(log, batch, event_fields(batch, number, &record));
            }
            Ok::<_, DecodeError>(())
        });
        result?;
        // The bytes are as they were written, and yet no records: a bug of whoever wrote them.
        read.or_else(|error| {
            self.print(log, batch, vec![field("kind", "data"), field("unreadable", error.to_string())])
        })
    }

    /// Prints one line: the place of `batch`, then `fields`.
    fn print(&mut self, log: &LogInspection, batch: &Batch, fields: Vec<Field>) -> Result<(), Failure> {
        self.left -= 1;
        let header = &batch.header;
        let mut line = vec![field("group", log.group.0), field("term", header.term.0), field("index", header.index.0)];
        line.extend(fields);
        if self.json {
            output::json(&Value::Object(line.into_iter().collect()))
        } else {
            output::line(text_line(&line))
        }
    }
}

/// Name and value, in the order in which they are printed.
type Field = (String, Value);

fn field(name: &str, value: impl Into<Value>) -> Field {
    (name.to_owned(), value.into())
}

/// `name value` for each field; what is a word or a number stands bare, all else in quotes.
fn text_line(fields: &[Field]) -> String {
    let word = |(name, value): &Field| match (name.as_str(), value) {
        ("time_ms", value) => format!("time {}", date(value.as_u64().unwrap_or_default())),
        ("kind", Value::String(text)) => text.clone(),
        // Of this program's making, but for names in it: nothing in a line may begin another.
        ("text", Value::String(text)) => text.escape_default().to_string().replace("\\\"", "\""),
        ("type" | "id" | "producer_id" | "unreadable", Value::String(text)) => format!("{name} {text}"),
        (_, value) => format!("{name} {value}"),
    };
    fields.iter().map(word).collect::<Vec<_>>().join(" ")
}

fn date(ms: u64) -> String {
    if ms > DATE_MS_MAX {
        return format!("{ms} ms");
    }
    humantime::format_rfc3339_millis(UNIX_EPOCH + Duration::from_millis(ms)).to_string()
}

/// `bytes` as text where they are text, under a name that says which.
fn printable(name: &str, bytes: &[u8]) -> Field {
    match std::str::from_utf8(bytes) {
        Ok(text) => field(name, text),
        Err(_) => field(&format!("{name}_base64"), BASE64_STANDARD.encode(bytes)),
    }
}

/// Record `number` of a data batch. Fields that are empty are left out, but for the payload.
fn event_fields(batch: &Batch, number: u32, record: &RecordRef<'_>) -> Vec<Field> {
    let header = &batch.header;
    let mut fields = vec![
        field("kind", "data"),
        field("offset", header.base_offset.0 + u64::from(number)),
        field("time_ms", header.time_ms),
        field("type", type_name(record.event_type)),
        field("id", uuid::Uuid::from_bytes(record.id).to_string()),
    ];
    if header.has_producer() {
        fields.push(field("producer_id", uuid::Uuid::from_bytes(header.producer_id).to_string()));
        fields.push(field("sequence", header.base_sequence.wrapping_add(u64::from(number))));
    }
    if !record.schema.is_empty() {
        fields.push(field("schema", record.schema));
    }
    if !record.key.is_empty() {
        fields.push(printable("key", record.key));
    }
    let headers: Vec<_> = record.headers().collect();
    if !headers.is_empty() {
        fields.push(field("headers", json!(headers)));
    }
    if let Ok(Some(stamps)) = decode_stamps(&batch.stamps, header.record_count)
        && let Some(stamp) = stamps.iter().nth(number as usize)
    {
        let cause = stamp.cause();
        let cause = json!({
            "topic": cause.topic,
            "partition": cause.partition,
            "offset": cause.offset,
            "operator_id": cause.operator_id,
            "attempt": cause.attempt,
        });
        fields.push(field("cause", cause));
    }
    fields.push(printable("payload", record.payload));
    fields
}

fn type_name(number: u8) -> String {
    let known = EventType::try_from(i32::from(number));
    known
        .map_or_else(|_| number.to_string(), |kind| kind.as_str_name().trim_start_matches("EVENT_TYPE_").to_lowercase())
}

/// What a control or Raft entry says.
fn internal_text(group: GroupId, batch: &Batch) -> String {
    let bytes = batch.records.as_ref();
    let text = match batch.header.kind {
        BatchKind::Raft => wire::RaftRecord::decode(bytes).map(|record| format!("{:?}", record.entry)),
        _ if group == GroupId::METADATA => wire::MetadataCommand::decode(bytes).map(|command| metadata_text(&command)),
        _ => wire::ControlRecord::decode(bytes).map(|record| format!("{record:?}")),
    };
    text.unwrap_or_else(|error| format!("{error}: {}", BASE64_STANDARD.encode(bytes)))
}

/// A command of the metadata, without the secret of a lease key.
fn metadata_text(command: &wire::MetadataCommand) -> String {
    match &command.command {
        Some(wire::metadata_command::Command::AddLeaseKey(key)) => format!("AddLeaseKey {{ key_id: {} }}", key.key_id),
        Some(command) => format!("{command:?}"),
        None => "an unknown command".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use arqon_proto::{BatchBuilder, Compression, Record};
    use bytes::Bytes;

    fn batch() -> Batch {
        let mut builder = BatchBuilder::new();
        let record = |payload: &'static [u8]| Record {
            schema: "a.v1".to_owned(),
            key: Bytes::from_static(b"k"),
            headers: vec![("name".to_owned(), "value".to_owned())],
            payload: Bytes::from_static(payload),
            ..Record::default()
        };
        builder.push(&record(b"two\nlines")).unwrap();
        builder.push(&record(&[0xff, 0])).unwrap();
        let mut batch = builder.build(Compression::None, None);
        batch.header.base_offset = arqon_proto::Offset(40);
        batch.header.time_ms = 1_700_000_000_123;
        batch
    }

    #[test]
    fn events_are_one_line_each_whatever_they_hold() {
        let batch = batch();
        let mut lines = Vec::new();
        records(&batch, |number, record| {
            lines.push(text_line(&event_fields(&batch, number, &record)));
            Ok::<_, DecodeError>(())
        })
        .unwrap();
        assert_eq!(lines.len(), 2);
        for part in ["data offset 40 ", "time 2023-11-14T22:13:20.123Z", "key \"k\"", "payload \"two\\nlines\""] {
            assert!(lines[0].contains(part), "{part} in {}", lines[0]);
        }
        assert!(lines[1].contains("offset 41") && lines[1].ends_with("payload_base64 \"/wA=\""), "{}", lines[1]);
        assert_eq!(date(u64::MAX), format!("{} ms", u64::MAX));
    }

    #[test]
    fn a_secret_is_not_printed() {
        let key = wire::AddLeaseKeyCommand { key_id: 3, secret: b"do not tell".to_vec().into() };
        let command = wire::metadata_command::Command::AddLeaseKey(key);
        let bytes = wire::MetadataCommand { command: Some(command) }.encode_to_vec();
        let text = internal_text(GroupId::METADATA, &Batch::internal(BatchKind::Control, bytes.into()));
        assert_eq!(text, "AddLeaseKey { key_id: 3 }");
    }
}
