//! `arqon topic backup` and `arqon topic restore`.
//!
//! ```text
//!   leaders --fetch--> files of batches + manifest.json  --verify, produce--> a new topic
//! ```

mod manifest;
mod restore;

use std::fs::{self, File};
use std::io::{BufWriter, IsTerminal, Write};
use std::path::{Path, PathBuf};

use arqon_proto::wire;
use arqon_sdk::{Client, From};
use bytes::BytesMut;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::json;

use crate::connect::Connect;
use crate::{Failure, output};
use manifest::{MANIFEST_NAME, Manifest, PartitionFile, Tally, file_name};

pub(crate) use restore::{RestoreArgs, restore};

const WRITE_BUFFER_SIZE: usize = 1 << 20;

/// Arguments of `arqon topic backup`.
#[derive(Clone, Debug, clap::Args)]
pub struct BackupArgs {
    /// Name of the topic
    topic: String,
    /// Directory for the backup; what an unfinished one left there is written anew
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    #[command(flatten)]
    connect: Connect,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

/// A bar on standard error, if that is a terminal.
fn bar(length: u64, unit: &str) -> ProgressBar {
    let is_terminal = std::io::stderr().is_terminal();
    let target = if is_terminal { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
    let bar = ProgressBar::with_draw_target(Some(length), target);
    let style = ProgressStyle::with_template(&format!("{{elapsed_precise}} [{{bar:40}}] {{pos}}/{{len}} {unit}"));
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("=> "));
    bar
}

/// Copies what is committed when it begins.
///
/// # Errors
/// The directory holds a finished backup or cannot be written, or the topic cannot be read.
pub(crate) async fn backup(args: BackupArgs) -> Result<(), Failure> {
    let dir = args.out.as_path();
    let failed = |error: std::io::Error| Failure::failed(error).at(dir.display());
    if dir.join(MANIFEST_NAME).exists() {
        return Err(Failure::usage(format!("--out {}: there is a finished backup already", dir.display())));
    }
    let client = args.connect.client().await?;
    let topic = client.describe_topic(&args.topic).await?;
    fs::create_dir_all(dir).map_err(failed)?;
    let mut spans = Vec::new();
    for partition in &topic.partitions {
        let start = client.list_offsets(&args.topic, partition.partition, From::Earliest).await?;
        let end = client.list_offsets(&args.topic, partition.partition, From::Latest).await?;
        spans.push((partition.partition, start, end.max(start)));
    }
    let bar = bar(spans.iter().map(|(_, start, end)| end - start).sum(), "events");
    let mut files = Vec::new();
    for (partition, start, end) in spans {
        files.push(save(&client, &args.topic, dir, partition, (start, end), &bar).await?);
    }
    let manifest = Manifest::new(&topic, files);
    let text = serde_json::to_string_pretty(&manifest).map_err(Failure::failed)?;
    write_durably(&dir.join(MANIFEST_NAME), text.as_bytes()).map_err(failed)?;
    // The names, too, have to survive a power cut.
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(failed)?;
    bar.finish_and_clear();
    let (records, size): (u64, u64) =
        manifest.partitions.iter().fold((0, 0), |sum, file| (sum.0 + file.records, sum.1 + file.size));
    if args.json {
        return output::json(&json!({
            "topic": args.topic,
            "directory": dir.display().to_string(),
            "events": records,
            "bytes": size,
            "partitions": manifest.partitions,
        }));
    }
    let partitions = manifest.partitions.len();
    output::line(format_args!("{records} events of {partitions} partitions, {size} bytes, in {}", dir.display()))
}

fn write_durably(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let unfinished = path.with_extension("unfinished");
    let mut file = File::create(&unfinished)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(unfinished, path)
}

/// Copies one partition from offset `span.0` to `span.1`.
async fn save(
    client: &Client,
    topic: &str,
    dir: &Path,
    partition: u32,
    span: (u64, u64),
    bar: &ProgressBar,
) -> Result<PartitionFile, Failure> {
    let path = dir.join(file_name(partition));
    let failed = |error: std::io::Error| Failure::failed(error).at(path.display());
    let file = File::create(&path).map_err(failed)?;
    let mut out = BufWriter::with_capacity(WRITE_BUFFER_SIZE, file);
    let (start, end) = span;
    let mut tally = Tally::starting_at(partition, start);
    let mut encoded = BytesMut::new();
    while tally.end_offset() < end {
        let offset = tally.end_offset();
        let fetch = wire::Fetch { topic: topic.to_owned(), partition, offset, ..Default::default() };
        let fetched = client.fetch_raw(fetch).await.map_err(Failure::from)?;
        if fetched.batches.is_empty() {
            return Err(Failure::failed(format!(
                "{topic}/{partition} gives nothing at offset {offset}, before its end"
            )));
        }
        for batch in fetched.batches.iter().take_while(|batch| batch.header.base_offset.0 < end) {
            encoded.clear();
            batch.encode_into(&mut encoded);
            tally
                .add(&batch.header, &encoded)
                .map_err(|problem| Failure::failed(format!("{topic}/{partition}: {problem}")))?;
            out.write_all(&encoded).map_err(failed)?;
            bar.inc(u64::from(batch.header.record_count));
        }
    }
    let file = out.into_inner().map_err(|error| failed(error.into_error()))?;
    file.sync_all().map_err(failed)?;
    Ok(tally.finish())
}
