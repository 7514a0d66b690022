//! `arqon log`: reads a node's data directory without the node.

mod dump;

use std::ops::ControlFlow;
use std::path::PathBuf;

use arqon_proto::{BatchKind, Header};
use arqon_storage::{BatchInspection, Fault, Inspection, LogCheck, LogInspection, SegmentInspection};
use serde_json::{Value, json};

use crate::{Failure, output};

/// What to do with a data directory.
#[derive(Clone, Debug, clap::Subcommand)]
pub enum LogCommand {
    /// List logs, segments, terms and batches
    #[command(after_help = "Example: arqon log inspect ./bus/node-1 --batches\n\n\
        Fails when acknowledged data is damaged, after everything was listed.")]
    Inspect(InspectArgs),
    /// Check every checksum, the chain and that no segment is missing
    #[command(after_help = "Example: arqon log verify ./bus/node-1\n\n\
        Fails when acknowledged data is damaged. A torn tail is none: the next start cuts it off.")]
    Verify(DirArgs),
    /// Print the entries: events, control records, Raft entries
    #[command(after_help = "Example: arqon log dump ./bus/node-1 --group 4 --from 100 --limit 10\n\n\
        Offsets and times are those of the events. What is missing or damaged is told after the entries of\n\
        its log, and fails the command; --limit ends it before that.")]
    Dump(dump::DumpArgs),
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
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Does what the arguments say.
///
/// # Errors
/// The directory is not one of a node, or acknowledged data in it is damaged.
pub fn log(command: LogCommand) -> Result<(), Failure> {
    match command {
        LogCommand::Inspect(args) => inspect(&args),
        LogCommand::Verify(args) => verify(&args),
        LogCommand::Dump(args) => dump::dump(&args),
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

/// What makes `arqon log` fail: files and entries of `log` that are damaged, one line each.
fn damage_of(log: &LogInspection, check: &LogCheck) -> Vec<String> {
    let name = log_name(log);
    let files = log.damage.iter().map(|text| format!("{name}: {text}"));
    let faults = check.faults.iter().filter(|fault| fault.is_damage).map(|fault| format!("{name}: {fault}"));
    files.chain(faults).collect()
}

fn log_name(log: &LogInspection) -> String {
    format!("group {} replica {}", log.group, log.replica)
}

/// The result of a command that met `count` damaged places.
fn ended(args: &DirArgs, count: usize) -> Result<(), Failure> {
    match count {
        0 => Ok(()),
        1 => Err(Failure::failed(format!("{}: 1 place is damaged", args.dir.display()))),
        count => Err(Failure::failed(format!("{}: {count} places are damaged", args.dir.display()))),
    }
}

/// What one segment adds up to, and the lines or documents of its batches.
#[derive(Default)]
struct Totals {
    batches: u64,
    records: u64,
    size: u64,
    damaged: Vec<String>,
    first_bad: Option<(u64, String)>,
    listed: Vec<Value>,
}

impl Totals {
    fn add(&mut self, batch: &BatchInspection) {
        match batch {
            BatchInspection::Whole { batch, .. } => {
                self.batches += 1;
                self.size += batch.header.batch_size() as u64;
                if batch.header.kind == BatchKind::Data {
                    self.records += u64::from(batch.header.record_count);
                }
            }
            BatchInspection::DamagedRecords { at, header, reason } => {
                self.batches += 1;
                self.damaged.push(format!("byte {at}, index {}: {reason}", header.index));
                self.first_bad.get_or_insert_with(|| (*at, reason.clone()));
            }
            BatchInspection::FirstBadByte { at, reason } => {
                self.first_bad.get_or_insert_with(|| (*at, reason.clone()));
            }
        }
    }
}

fn inspect(args: &InspectArgs) -> Result<(), Failure> {
    let (cluster, node, inspection) = open(&args.dir)?;
    let json = args.dir.json;
    if !json {
        output::line(format_args!("node {node} of cluster {cluster}, {} logs", inspection.logs.len()))?;
    }
    let (mut logs, mut damage_count) = (Vec::new(), 0);
    for log in &inspection.logs {
        let mut totals: Vec<_> = log.segments.iter().map(|_| Totals::default()).collect();
        let check = log.check(|number, batch| {
            let totals = &mut totals[number];
            totals.add(batch);
            if args.batches {
                totals.listed.push(if json { batch_document(batch) } else { json!(batch_line(batch)) });
            }
            ControlFlow::Continue(())
        });
        damage_count += damage_of(log, &check).len();
        let segments = log.segments.iter().zip(&totals);
        if json {
            let documents: Vec<_> = segments.map(|(segment, totals)| segment_document(segment, totals)).collect();
            logs.push(log_document(log, &check, &documents));
            continue;
        }
        output::line(format_args!("\n{}{}", log_name(log), log_summary(log)))?;
        for (segment, totals) in segments {
            output::line(segment_line(segment, totals))?;
            for line in totals.listed.iter().filter_map(Value::as_str) {
                output::line(format_args!("    {line}"))?;
            }
        }
        for span in &check.terms {
            output::line(format_args!("  term {}: entries {} to {}", span.term, span.first, span.last))?;
        }
        for fault in &check.faults {
            output::line(format_args!("  {}: {fault}", fault_name(fault)))?;
        }
    }
    if json {
        output::json(&json!({ "cluster": cluster, "node": node, "logs": logs }))?;
    }
    ended(&args.dir, damage_count)
}

fn fault_name(fault: &Fault) -> &'static str {
    if fault.is_damage { "damaged" } else { "not counted" }
}

fn verify(args: &DirArgs) -> Result<(), Failure> {
    let (cluster, node, inspection) = open(args)?;
    let (mut batches, mut records, mut bytes) = (0, 0, 0);
    let (mut damage, mut tails) = (Vec::new(), Vec::new());
    for log in &inspection.logs {
        let check = log.check(|_, _| ControlFlow::Continue(()));
        batches += check.batch_count;
        records += check.record_count;
        bytes += check.size;
        damage.extend(damage_of(log, &check));
        let torn = check.faults.iter().filter(|fault| !fault.is_damage);
        tails.extend(torn.map(|fault| format!("{}: {fault}", log_name(log))));
    }
    if args.json {
        output::json(&json!({
            "cluster": cluster, "node": node, "logs": inspection.logs.len(), "batches": batches,
            "records": records, "bytes": bytes, "valid": damage.is_empty(), "damage": damage, "not_counted": tails,
        }))?;
    } else {
        let count = inspection.logs.len();
        output::line(format_args!("{count} logs, {batches} batches, {records} records, {bytes} bytes checked"))?;
        tails.iter().try_for_each(|text| output::line(format_args!("not counted: {text}")))?;
        damage.iter().try_for_each(|text| output::line(format_args!("damaged: {text}")))?;
    }
    ended(args, damage.len())
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

fn log_document(log: &LogInspection, check: &LogCheck, segments: &[Value]) -> Value {
    let terms = check
        .terms
        .iter()
        .map(|span| json!({ "term": span.term.0, "first_index": span.first.0, "last_index": span.last.0 }));
    json!({
        "group": log.group.0,
        "replica": log.replica.0,
        "purged_index": log.purged.map(|purged| purged.index.0),
        "committed_index": log.committed.map(|committed| committed.index.0),
        "flushed_next_index": log.marked_next_index,
        "sync_failed": log.sync_failed,
        "damage": log.damage,
        "terms": terms.collect::<Vec<_>>(),
        "faults": check.faults.iter().map(fault_document).collect::<Vec<_>>(),
        "segments": segments,
    })
}

fn fault_document(fault: &Fault) -> Value {
    json!({
        "path": fault.path,
        "byte": fault.at,
        "first_index": fault.first.0,
        "last_index": fault.last.0,
        "reason": fault.reason,
        "damage": fault.is_damage,
    })
}

fn segment_line(segment: &SegmentInspection, totals: &Totals) -> String {
    let (index, offset, _) = segment.base;
    let mut text = format!(
        "  {}: from index {index}, offset {offset}: {} batches, {} records, {} of {} bytes",
        segment.path, totals.batches, totals.records, totals.size, segment.capacity
    );
    if segment.is_stale {
        text.push_str(", stale");
    }
    if let Some((at, reason)) = &totals.first_bad {
        text.push_str(&format!("; first bad byte {at}: {reason}"));
    }
    text
}

fn segment_document(segment: &SegmentInspection, totals: &Totals) -> Value {
    let mut document = json!({
        "path": segment.path,
        "size": segment.size,
        "capacity": segment.capacity,
        "stale": segment.is_stale,
        "base_index": segment.base.0,
        "base_offset": segment.base.1,
        "batch_count": totals.batches,
        "record_count": totals.records,
        "bytes": totals.size,
        "damaged": totals.damaged,
        "first_bad_byte": totals.first_bad.as_ref().map(|(at, _)| at),
        "first_bad_reason": totals.first_bad.as_ref().map(|(_, reason)| reason),
    });
    if !totals.listed.is_empty() {
        document["batches"] = json!(totals.listed);
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

/// Byte, header and what is wrong of a batch; none at a byte that begins no batch.
fn parts(batch: &BatchInspection) -> Result<(u64, &Header, Option<&str>), (u64, &str)> {
    match batch {
        BatchInspection::Whole { at, batch } => Ok((*at, &batch.header, None)),
        BatchInspection::DamagedRecords { at, header, reason } => Ok((*at, header, Some(reason))),
        BatchInspection::FirstBadByte { at, reason } => Err((*at, reason)),
    }
}

fn batch_line(batch: &BatchInspection) -> String {
    match parts(batch) {
        Ok((at, header, reason)) => format!(
            "byte {at}: {} term {} index {} offset {} records {} bytes {} time {}{}",
            kind_name(header.kind),
            header.term,
            header.index,
            header.base_offset,
            header.record_count,
            header.batch_size(),
            header.time_ms,
            reason.map(|reason| format!("  DAMAGED: {reason}")).unwrap_or_default(),
        ),
        Err((at, reason)) => format!("byte {at}: {reason}"),
    }
}

fn batch_document(batch: &BatchInspection) -> Value {
    match parts(batch) {
        Ok((at, header, reason)) => json!({
            "at": at,
            "kind": kind_name(header.kind),
            "term": header.term.0,
            "index": header.index.0,
            "base_offset": header.base_offset.0,
            "record_count": header.record_count,
            "size": header.batch_size(),
            "time_ms": header.time_ms,
            "damaged": reason,
        }),
        Err((at, reason)) => json!({ "first_bad_byte": at, "reason": reason }),
    }
}
