//! Writes a backup into a topic that is made for it.
//!
//! The events are written as one producer whose id comes from the backup and the topic's name, with
//! sequences from 0 in each partition. So a restore that was interrupted is just run again: what
//! stands in the topic is known by that id and is not written twice.

use std::collections::VecDeque;
use std::path::PathBuf;

use arqon_proto::{Batch, Offset, RaftIndex, Term, TopicClass, results_topic_of, wire};
use arqon_sdk::{Client, From, Submitted};
use bytes::{Bytes, BytesMut};
use indicatif::ProgressBar;
use ring::digest::{SHA256, digest};
use serde_json::json;

use super::{
    bar,
    manifest::{Batches, Manifest, PartitionFile, verify},
};
use crate::connect::ConnectControl;
use crate::{Failure, output};

/// Batches sent and not acknowledged.
const WINDOW: usize = 16;

/// Arguments of `arqon topic restore`.
#[derive(Clone, Debug, clap::Args)]
pub struct RestoreArgs {
    /// Directory of the backup
    #[arg(value_name = "DIR")]
    dir: PathBuf,
    /// Name of the topic to make [default: that of the topic that was backed up]
    #[arg(long = "as", value_name = "NAME")]
    name: Option<String>,
    /// Copies of each partition [default: as many as the topic that was backed up had]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    replication: Option<u32>,
    #[command(flatten)]
    connect: ConnectControl,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

/// Checks the whole backup, makes the topic and writes the events.
///
/// # Errors
/// The backup is damaged, the topic holds something else, or it cannot be made or written.
pub(crate) async fn restore(args: RestoreArgs) -> Result<(), Failure> {
    let manifest = Manifest::read(&args.dir)?;
    let name = args.name.as_deref().unwrap_or(&manifest.topic);
    if matches!(TopicClass::of(name), TopicClass::Results | TopicClass::Dead | TopicClass::System) {
        let class = TopicClass::of(name).name();
        return Err(Failure::usage(format!(
            "--as: {name:?} is of class {class}, which takes only what the bus itself vouches for: name a topic of events"
        )));
    }
    let size: u64 = manifest.partitions.iter().map(|file| file.size).sum();
    let checking = bar(size, "bytes checked");
    for file in &manifest.partitions {
        tokio::task::block_in_place(|| verify(&args.dir, file, |size| checking.inc(size)))?;
    }
    checking.finish_and_clear();

    let client = args.connect.client().await?;
    let target = Target { client: &client, name, producer_id: producer_id(&manifest, name) };
    make_topic(&args.connect, topic_config(&manifest, name, args.replication)).await?;
    let count = client.describe_topic(name).await?.partitions.len();
    if count != manifest.partitions.len() {
        let problem = format!("it exists with {count} partitions, and the backup has {}", manifest.partitions.len());
        return Err(Failure::failed(format_args!("{problem}: choose another name with --as")).at(name));
    }
    let records: u64 = manifest.partitions.iter().map(|file| file.records).sum();
    let writing = bar(records, "events");
    let mut written = 0;
    for file in &manifest.partitions {
        let present = target.present(file).await?;
        writing.inc(present);
        target.write(&args.dir, file, present, &writing).await?;
        written += file.records - present;
    }
    writing.finish_and_clear();
    if args.json {
        return output::json(&json!({
            "topic": name,
            "events": records,
            "written": written,
            "partitions": manifest.partitions.len(),
        }));
    }
    let present = match records - written {
        0 => String::new(),
        count => format!(", {count} of them were there already"),
    };
    output::line(format_args!("{name} has {records} events in {} partitions{present}", manifest.partitions.len()))
}

/// As whom a backup is written to the topic `name`.
fn producer_id(manifest: &Manifest, name: &str) -> [u8; 16] {
    let mut text = manifest.id.clone().into_bytes();
    text.extend_from_slice(name.as_bytes());
    let mut id = [0; 16];
    id.copy_from_slice(&digest(&SHA256, &text).as_ref()[..16]);
    uuid::Builder::from_custom_bytes(id).into_uuid().into_bytes()
}

/// The settings of the topic that is made of a backup.
fn topic_config(manifest: &Manifest, name: &str, replication: Option<u32>) -> wire::TopicConfig {
    // A plain name gets the class that was backed up, if a plain name may have it.
    let class = match (TopicClass::of(name), manifest.class.as_str()) {
        (TopicClass::Events, class @ ("jobs" | "streams")) => class.to_owned(),
        _ => String::new(),
    };
    let is_jobs = TopicClass::of(name) == TopicClass::Jobs || class == TopicClass::Jobs.name();
    // A results topic that went by the name of its jobs topic goes by the new name.
    let is_named = manifest.results_topic != results_topic_of(&manifest.topic);
    wire::TopicConfig {
        name: name.to_owned(),
        partitions: u32::try_from(manifest.partitions.len()).unwrap_or(u32::MAX),
        retention_ms: manifest.retention_ms,
        retention_bytes: manifest.retention_bytes,
        attempts_max: if is_jobs { manifest.attempts_max } else { 0 },
        replication: replication.unwrap_or(manifest.replication),
        results_topic: if is_jobs && is_named { manifest.results_topic.clone() } else { String::new() },
        class,
        ..Default::default()
    }
}

async fn make_topic(connect: &ConnectControl, config: wire::TopicConfig) -> Result<(), Failure> {
    let mut control = connect.control().await?;
    let request = control.request(wire::CreateTopicRequest { config: Some(config) });
    match control.client().create_topic(request).await {
        Ok(_) => Ok(()),
        // Perhaps by this restore, when it was interrupted: that shows in its partitions.
        Err(status) if status.code() == tonic::Code::AlreadyExists => Ok(()),
        Err(status) => Err(status.into()),
    }
}

/// The topic that is written.
struct Target<'a> {
    client: &'a Client,
    name: &'a str,
    producer_id: [u8; 16],
}

impl Target<'_> {
    /// Records of `file` that stand in the topic already.
    ///
    /// # Errors
    /// The topic has other partitions, or holds other events.
    async fn present(&self, file: &PartitionFile) -> Result<u64, Failure> {
        let place = format!("{}/{}", self.name, file.partition);
        let end = self.client.list_offsets(self.name, file.partition, From::Latest).await?;
        if end == 0 {
            return Ok(0);
        }
        let start = self.client.list_offsets(self.name, file.partition, From::Earliest).await?;
        let fetch = |offset| wire::Fetch {
            topic: self.name.to_owned(),
            partition: file.partition,
            offset,
            bytes_max: 1,
            ..Default::default()
        };
        // Nobody else's batch may stand at either end.
        for offset in [start, end - 1] {
            let batches = self.client.fetch_raw(fetch(offset)).await?.batches;
            let header = batches.first().map(|batch| &batch.header);
            let is_ours = |header: &arqon_proto::Header| {
                header.producer_id == self.producer_id && header.base_sequence == header.base_offset.0
            };
            if end > file.records || !header.is_some_and(is_ours) {
                let problem = "it exists and holds other events: choose another name with --as";
                return Err(Failure::failed(problem).at(place));
            }
        }
        Ok(end)
    }

    /// Writes the records of `file` from number `present` on.
    async fn write(
        &self,
        dir: &std::path::Path,
        file: &PartitionFile,
        present: u64,
        bar: &ProgressBar,
    ) -> Result<(), Failure> {
        let mut batches = Batches::open(dir, file)?;
        let mut waiting: VecDeque<(u32, Submitted)> = VecDeque::new();
        let mut sequence = 0;
        while let Some((batch, _)) = tokio::task::block_in_place(|| batches.next())? {
            let count = batch.header.record_count;
            let first = sequence;
            sequence += u64::from(count);
            if sequence <= present {
                continue;
            }
            if waiting.len() >= WINDOW
                && let Some((count, submitted)) = waiting.pop_front()
            {
                submitted.outcome().await?;
                bar.inc(u64::from(count));
            }
            let produce =
                wire::Produce { topic: self.name.to_owned(), partition: file.partition, ..Default::default() };
            let submitted = self.client.submit(produce, self.rewritten(batch, first)).await?;
            waiting.push_back((count, submitted));
        }
        for (count, submitted) in waiting {
            submitted.outcome().await?;
            bar.inc(u64::from(count));
        }
        let end = self.client.list_offsets(self.name, file.partition, From::Latest).await?;
        if end != file.records {
            let problem = format!("it has {end} events where the backup has {}: somebody else writes", file.records);
            return Err(Failure::failed(problem).at(format_args!("{}/{}", self.name, file.partition)));
        }
        Ok(())
    }

    /// The records as a client sends them: what the bus filled in is left out.
    fn rewritten(&self, mut batch: Batch, sequence: u64) -> Bytes {
        batch.set_stamps(Bytes::new());
        let header = &mut batch.header;
        (header.producer_id, header.producer_epoch, header.base_sequence) = (self.producer_id, 0, sequence);
        (header.time_ms, header.base_offset, header.chain) = (0, Offset(0), 0);
        (header.term, header.index) = (Term(0), RaftIndex(0));
        let mut encoded = BytesMut::new();
        batch.encode_into(&mut encoded);
        encoded.freeze()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: &str = r#"{
        "format": "arqonbus-topic-backup", "version": 1, "id": "x", "topic": "a.jobs", "class": "jobs",
        "retention_ms": 1000, "retention_bytes": 7, "attempts_max": 4,
        "partitions": [{
            "partition": 0, "file": "partition-0.batches", "first_offset": 0, "end_offset": 0, "records": 0,
            "batches": 0, "size": 0, "first_time_ms": 0, "last_time_ms": 0, "sha256": ""
        }]
    }"#;

    fn read(text: &str) -> Result<Manifest, Failure> {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("manifest.json"), text).unwrap();
        Manifest::read(folder.path())
    }

    #[test]
    fn a_restored_topic_has_the_settings_of_the_one_that_was_backed_up() {
        let topic = wire::TopicDescription {
            topic: "a.jobs".into(),
            class: "jobs".into(),
            replication: 2,
            retention_ms: 1_000,
            retention_bytes: 7,
            attempts_max: 4,
            results_topic: "all.results".into(),
            ..Default::default()
        };
        let saved = Manifest::new(&topic, read(OLD).unwrap().partitions);
        let saved = read(&serde_json::to_string(&saved).unwrap()).unwrap();
        let config = topic_config(&saved, "b.jobs", None);
        assert_eq!((config.replication, config.results_topic.as_str()), (2, "all.results"));
        assert_eq!((config.retention_ms, config.retention_bytes, config.attempts_max), (1_000, 7, 4));
        assert_eq!(topic_config(&saved, "b.jobs", Some(1)).replication, 1);
        let events = Manifest { class: "events".into(), ..saved.clone() };
        assert_eq!(topic_config(&events, "b.events", None).results_topic, "", "only a jobs topic has one");
        let by_name = Manifest { results_topic: "a.results".into(), ..saved };
        assert_eq!(topic_config(&by_name, "b.jobs", None).results_topic, "", "b.jobs gets b.results");
    }

    #[test]
    fn manifests_of_older_programs_restore_and_those_of_newer_ones_are_refused() {
        let config = topic_config(&read(OLD).unwrap(), "a.jobs", None);
        assert_eq!((config.replication, config.results_topic.as_str(), config.attempts_max), (0, "", 4));
        let refused = read(&OLD.replace("\"version\": 1", "\"version\": 3")).unwrap_err().to_string();
        assert!(refused.contains("version 3"), "{refused}");
    }
}
