//! `arqon log`: reads a node's data directory without the node.

use std::path::PathBuf;

use arqon_proto::BatchKind;
use arqon_storage::{BatchInspection, Inspection, LogInspection, SegmentInspection};
use serde_json::{Value, json};

use crate::{Failure, output};

/// What to do with a data directory.
#[derive(Clone, Debug, clap::Subcommand)]
pub enum LogCommand {
    /// List logs, segments and batches
    #[command(after_help = "Example: arqon log inspect ./bus/node-1 --batches")]
    Inspect(InspectArgs),
    /// Check every checksum and the chain; fails when acknowledged data is damaged
    #[command(after_help = "Example: arqon log verify ./bus/node-1")]
    Verify(DirArgs),
}

/// Arguments of `arqon log inspect`.
#[derive(Clone, Debug, clap::Args)]
pub struct InspectArgs {
    #[command(flatten)]
    dir: DirArgs,
    /// Also list every batch
    #[arg(long)]
    batches: bool,
}

/// The directory and the form of the output.
#[derive(Clone, Debug, clap::Args)]
pub struct DirArgs {
    /// Data directory of one node; nothing in it is changed
    #[arg(value_name = "DIR")]
    dir: PathBuf,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

/// Does what the arguments say.
///
/// # Errors
/// The directory is not one of a node; `verify`: what is damaged.
pub fn log(command: LogCommand) -> Result<(), Failure> {
    match command {
        LogCommand::Inspect(args) => inspect(&args),
        LogCommand::Verify(args) => verify(&args),
    }
}

fn open(args: &DirArgs) -> Result<(String, u64, Inspection), Failure> {
    let place = args.dir.display();
    let mut inspection = arqon_storage::inspect(&args.dir).map_err(|error| Failure::failed(error).at(place))?;
    let unknown = Err("taken".to_owned());
    let identity = std::mem::replace(&mut inspection.identity, unknown);
    let place = args.dir.display();
    let (cluster, node) =
        identity.map_err(|reason| Failure::failed(format!("{place}: not a node's data directory: {reason}")))?;
    Ok((cluster, node.0, inspection))
}

/// What the batches of one segment add up to.
#[derive(Default)]
struct Totals {
    batches: u64,
    records: u64,
    bytes: u64,
    next_index: Option<u64>,
    damaged: Vec<String>,
    end: Option<(u64, String)>,
}

impl Totals {
    fn of(segment: &SegmentInspection, mut each: impl FnMut(&BatchInspection)) -> Self {
        let mut totals = Self::default();
        for batch in segment.batches() {
            each(&batch);
            match batch {
                BatchInspection::Whole { header, .. } => {
                    totals.batches += 1;
                    totals.bytes += header.batch_size() as u64;
                    totals.next_index = Some(header.index.0 + 1);
                    if header.kind == BatchKind::Data {
                        totals.records += u64::from(header.record_count);
                    }
                }
                BatchInspection::DamagedRecords { at, header, reason } => {
                    totals.batches += 1;
                    totals.next_index = Some(header.index.0 + 1);
                    totals.damaged.push(format!("{} at byte {at}, index {}: {reason}", segment.path, header.index));
                }
                BatchInspection::FirstBadByte { at, reason } => totals.end = Some((at, reason)),
            }
        }
        totals
    }
}

fn inspect(args: &InspectArgs) -> Result<(), Failure> {
    let (cluster, node, inspection) = open(&args.dir)?;
    let json = args.dir.json;
    if !json {
        output::line(format_args!("node {node} of cluster {cluster}, {} logs", inspection.logs.len()))?;
    }
    let mut logs = Vec::new();
    for log in &inspection.logs {
        if !json {
            output::line(format_args!("\ngroup {} replica {}{}", log.group, log.replica, log_summary(log)))?;
        }
        let mut segments = Vec::new();
        for segment in &log.segments {
            let mut batches = Vec::new();
            let totals = Totals::of(segment, |batch| {
                if args.batches {
                    batches.push(if json { batch_document(batch) } else { json!(batch_line(batch)) });
                }
            });
            segments.push(segment_document(segment, &totals, &batches));
            if !json {
                output::line(segment_line(segment, &totals))?;
                for line in batches.iter().filter_map(Value::as_str) {
                    output::line(format_args!("    {line}"))?;
                }
            }
        }
        logs.push(log_document(log, &segments));
    }
    if json { output::json(&json!({ "cluster": cluster, "node": node, "logs": logs })) } else { Ok(()) }
}

fn verify(args: &DirArgs) -> Result<(), Failure> {
    let (cluster, node, inspection) = open(args)?;
    let (mut batches, mut records, mut bytes) = (0, 0, 0);
    let mut damage = Vec::new();
    for log in &inspection.logs {
        let name = format!("group {} replica {}", log.group, log.replica);
        damage.extend(log.damage.iter().map(|text| format!("{name}: {text}")));
        let mut next_index = None;
        let mut end: Option<String> = None;
        for segment in log.segments.iter().filter(|segment| !segment.is_stale) {
            let expected = next_index.or(log.purged.map(|purged| purged.index.0 + 1)).unwrap_or(0);
            if segment.base.0 > expected {
                // Something is behind them, so this is no torn tail.
                let end = end.take().unwrap_or_else(|| "no segment holds them".to_owned());
                damage.push(format!("{name}: entries {expected} to {} are missing: {end}", segment.base.0 - 1));
            }
            let totals = Totals::of(segment, |_| {});
            batches += totals.batches;
            records += totals.records;
            bytes += totals.bytes;
            damage.extend(totals.damaged);
            next_index = totals.next_index.or(Some(segment.base.0)).max(next_index);
            end = totals.end.map(|(at, reason)| format!("{} at byte {at}: {reason}", segment.path));
        }
        // Above the durable mark a bad byte is a torn tail, which the next start cuts.
        let marked = log.marked_next_index.unwrap_or(0);
        let found = next_index.or(log.purged.map(|purged| purged.index.0 + 1)).unwrap_or(0);
        if found < marked {
            let end = end.unwrap_or_else(|| "the segments end early".to_owned());
            damage.push(format!("{name}: entries {found} to {} are missing: {end}", marked - 1));
        }
    }
    if args.json {
        output::json(&json!({
            "cluster": cluster, "node": node, "logs": inspection.logs.len(), "batches": batches,
            "records": records, "bytes": bytes, "valid": damage.is_empty(), "damage": damage,
        }))?;
    } else {
        let count = inspection.logs.len();
        output::line(format_args!("{count} logs, {batches} batches, {records} records, {bytes} bytes checked"))?;
        damage.iter().try_for_each(|text| output::line(format_args!("damaged: {text}")))?;
    }
    match damage.len() {
        0 => Ok(()),
        count => Err(Failure::failed(format!("{}: {count} places are damaged", args.dir.display()))),
    }
}

fn log_summary(log: &LogInspection) -> String {
    let mut text = String::new();
    if let Some(purged) = log.purged {
        text.push_str(&format!(", starts after index {}", purged.index));
    }
    if let Some(next) = log.marked_next_index {
        text.push_str(&format!(", flushed to index {next}"));
    }
    if let Some(committed) = log.committed {
        text.push_str(&format!(", committed {} in term {}", committed.index, committed.term));
    }
    for problem in &log.damage {
        text.push_str(&format!("; damaged: {problem}"));
    }
    if log.sync_failed {
        text.push_str("; a sync has failed");
    }
    text
}

fn log_document(log: &LogInspection, segments: &[Value]) -> Value {
    json!({
        "group": log.group.0,
        "replica": log.replica.0,
        "purged_index": log.purged.map(|purged| purged.index.0),
        "committed_index": log.committed.map(|committed| committed.index.0),
        "flushed_next_index": log.marked_next_index,
        "sync_failed": log.sync_failed,
        "damage": log.damage,
        "segments": segments,
    })
}

fn segment_line(segment: &SegmentInspection, totals: &Totals) -> String {
    let (index, offset, _) = segment.base;
    let mut text = format!(
        "  {}: from index {index}, offset {offset}: {} batches, {} records, {} of {} bytes",
        segment.path, totals.batches, totals.records, totals.bytes, segment.capacity
    );
    if segment.is_stale {
        text.push_str(", stale");
    }
    for damaged in &totals.damaged {
        text.push_str(&format!("; damaged: {damaged}"));
    }
    if let Some((at, reason)) = &totals.end {
        text.push_str(&format!("; ends at byte {at}: {reason}"));
    }
    text
}

fn segment_document(segment: &SegmentInspection, totals: &Totals, batches: &[Value]) -> Value {
    let mut document = json!({
        "path": segment.path,
        "size": segment.size,
        "capacity": segment.capacity,
        "stale": segment.is_stale,
        "base_index": segment.base.0,
        "base_offset": segment.base.1,
        "batch_count": totals.batches,
        "record_count": totals.records,
        "bytes": totals.bytes,
        "damaged": totals.damaged,
        "first_bad_byte": totals.end.as_ref().map(|(at, _)| at),
        "first_bad_reason": totals.end.as_ref().map(|(_, reason)| reason),
    });
    if !batches.is_empty() {
        document["batches"] = json!(batches);
    }
    document
}

fn kind_name(kind: BatchKind) -> &'static str {
    match kind {
        BatchKind::Data => "data",
        BatchKind::Control => "control",
        BatchKind::Raft => "raft",
    }
}

fn batch_line(batch: &BatchInspection) -> String {
    match batch {
        BatchInspection::Whole { at, header } | BatchInspection::DamagedRecords { at, header, .. } => {
            let damaged = match batch {
                BatchInspection::DamagedRecords { reason, .. } => format!("  DAMAGED: {reason}"),
                _ => String::new(),
            };
            format!(
                "byte {at}: {} term {} index {} offset {} records {} bytes {} time {}{damaged}",
                kind_name(header.kind),
                header.term,
                header.index,
                header.base_offset,
                header.record_count,
                header.batch_size(),
                header.time_ms
            )
        }
        BatchInspection::FirstBadByte { at, reason } => format!("byte {at}: {reason}"),
    }
}

fn batch_document(batch: &BatchInspection) -> Value {
    match batch {
        BatchInspection::Whole { at, header } | BatchInspection::DamagedRecords { at, header, .. } => json!({
            "at": at,
            "kind": kind_name(header.kind),
            "term": header.term.0,
            "index": header.index.0,
            "base_offset": header.base_offset.0,
            "record_count": header.record_count,
            "size": header.batch_size(),
            "time_ms": header.time_ms,
            "damaged": match batch {
                BatchInspection::DamagedRecords { reason, .. } => Some(reason),
                _ => None,
            },
        }),
        BatchInspection::FirstBadByte { at, reason } => json!({ "first_bad_byte": at, "reason": reason }),
    }
}
