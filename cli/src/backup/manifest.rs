//! What a backup is on disk.
//!
//! ```text
//!   DIR/manifest.json          written last: a directory without it is an unfinished backup
//!   DIR/partition-0.batches    the data batches of partition 0 as on the wire, back to back
//!   DIR/partition-1.batches    ...
//! ```
//!
//! Batches keep their headers, with original times and offsets, their stamps and their records;
//! each carries its own checksums (docs/format.md), and the manifest a SHA-256 of each file.

use std::fs::File;
use std::io::{BufReader, ErrorKind, Read};
use std::path::Path;

use arqon_proto::{BATCH_HEADER_SIZE, Batch, BatchKind, Header, Offset, wire};
use bytes::{Bytes, BytesMut};
use ring::digest::{Context, SHA256};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::Failure;

pub(super) const MANIFEST_NAME: &str = "manifest.json";
const FORMAT: &str = "arqonbus-topic-backup";
const VERSION: u32 = 2;
/// The first version knew neither `replication` nor `results_topic`.
const VERSION_MIN: u32 = 1;
const READ_BUFFER_SIZE: usize = 1 << 20;
/// A manifest is a few hundred bytes a partition; this is far above.
const MANIFEST_SIZE_MAX: u64 = 16 << 20;

/// The manifest, as JSON.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Manifest {
    pub format: String,
    pub version: u32,
    /// Makes restores of this backup known to the bus, so that one can be run again.
    pub id: String,
    pub topic: String,
    pub class: String,
    pub retention_ms: u64,
    pub retention_bytes: u64,
    pub attempts_max: u32,
    /// Copies of each partition; 0 in an old manifest: as many as a new topic gets.
    #[serde(default)]
    pub replication: u32,
    /// Of a jobs topic; empty otherwise, and in an old manifest: as the jobs topic's name says.
    #[serde(default)]
    pub results_topic: String,
    pub partitions: Vec<PartitionFile>,
}

/// One partition. Times in ms since 1970; both are 0 when there are no records.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct PartitionFile {
    pub partition: u32,
    pub file: String,
    /// Of the first record; the offset after the last one.
    pub first_offset: u64,
    pub end_offset: u64,
    pub records: u64,
    pub batches: u64,
    pub size: u64,
    pub first_time_ms: u64,
    pub last_time_ms: u64,
    /// In hexadecimal.
    pub sha256: String,
}

pub(super) fn file_name(partition: u32) -> String {
    format!("partition-{partition}.batches")
}

pub(super) fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

impl Manifest {
    pub(super) fn new(topic: &wire::TopicDescription, partitions: Vec<PartitionFile>) -> Self {
        Self {
            format: FORMAT.to_owned(),
            version: VERSION,
            id: Uuid::new_v4().to_string(),
            topic: topic.topic.clone(),
            class: topic.class.clone(),
            retention_ms: topic.retention_ms,
            retention_bytes: topic.retention_bytes,
            attempts_max: topic.attempts_max,
            replication: topic.replication,
            results_topic: topic.results_topic.clone(),
            partitions,
        }
    }

    /// The manifest of the backup in `dir`.
    ///
    /// # Errors
    /// There is none that this program can read.
    pub(super) fn read(dir: &Path) -> Result<Self, Failure> {
        let path = dir.join(MANIFEST_NAME);
        let failed = |problem: String| Failure::failed(problem).at(path.display());
        let mut text = String::new();
        let read = File::open(&path).and_then(|file| file.take(MANIFEST_SIZE_MAX).read_to_string(&mut text));
        match read {
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::NotFound => {
                return Err(failed("there is none: this is no backup, or one that was not finished".to_owned()));
            }
            Err(error) => return Err(failed(error.to_string())),
        }
        // The version first: another one may have other fields.
        #[derive(Deserialize)]
        struct Version {
            format: String,
            version: u32,
        }
        let Version { format, version } =
            serde_json::from_str(&text).map_err(|error| failed(format!("no manifest of a backup: {error}")))?;
        if format != FORMAT || !(VERSION_MIN..=VERSION).contains(&version) {
            return Err(failed(format!("format {format:?} version {version} is not one that this program knows")));
        }
        let manifest: Self = serde_json::from_str(&text).map_err(|error| failed(error.to_string()))?;
        let in_order = manifest
            .partitions
            .iter()
            .zip(0..)
            .all(|(file, partition)| file.partition == partition && file.file == file_name(partition));
        if manifest.partitions.is_empty() || !in_order {
            return Err(failed("its partitions are not numbered from 0".to_owned()));
        }
        Ok(manifest)
    }
}

/// Sums up the batches of one file while they are written or read.
pub(super) struct Tally {
    file: PartitionFile,
    hash: Context,
}

impl Tally {
    pub(super) fn starting_at(partition: u32, offset: u64) -> Self {
        let file = PartitionFile {
            partition,
            file: file_name(partition),
            first_offset: offset,
            end_offset: offset,
            records: 0,
            batches: 0,
            size: 0,
            first_time_ms: 0,
            last_time_ms: 0,
            sha256: String::new(),
        };
        Self { file, hash: Context::new(&SHA256) }
    }

    pub(super) fn end_offset(&self) -> u64 {
        self.file.end_offset
    }

    /// Counts a batch, `encoded` as it stands in the file.
    ///
    /// # Errors
    /// It is no data batch, or not the one that follows.
    pub(super) fn add(&mut self, header: &Header, encoded: &[u8]) -> Result<(), String> {
        let file = &mut self.file;
        if header.kind != BatchKind::Data {
            return Err(format!("the batch at byte {} is no data batch", file.size));
        }
        if header.base_offset != Offset(file.end_offset) {
            return Err(format!("offset {} follows where {} should", header.base_offset, file.end_offset));
        }
        if file.batches == 0 {
            file.first_time_ms = header.time_ms;
        }
        file.last_time_ms = header.time_ms;
        file.end_offset = header.next_offset().0;
        file.records += u64::from(header.record_count);
        file.batches += 1;
        file.size += encoded.len() as u64;
        self.hash.update(encoded);
        Ok(())
    }

    pub(super) fn finish(self) -> PartitionFile {
        PartitionFile { sha256: hexadecimal(self.hash.finish().as_ref()), ..self.file }
    }
}

/// Reads the batches of one file, one at a time.
pub(super) struct Batches {
    reader: BufReader<File>,
    place: String,
    at: u64,
}

impl Batches {
    pub(super) fn open(dir: &Path, file: &PartitionFile) -> Result<Self, Failure> {
        let path = dir.join(&file.file);
        let place = path.display().to_string();
        let opened = File::open(&path).map_err(|error| Failure::failed(error).at(&place))?;
        Ok(Self { reader: BufReader::with_capacity(READ_BUFFER_SIZE, opened), place, at: 0 })
    }

    /// The next batch, its checksums checked, and its bytes; `None` at the end of the file.
    ///
    /// # Errors
    /// The byte of the first batch that is damaged or cut short.
    pub(super) fn next(&mut self) -> Result<Option<(Batch, Bytes)>, Failure> {
        let mut encoded = BytesMut::zeroed(BATCH_HEADER_SIZE);
        if self.fill(&mut encoded)? == 0 {
            return Ok(None);
        }
        let header = Header::decode(&encoded).map_err(|error| self.damaged(error))?;
        encoded.resize(header.batch_size(), 0);
        let read = self.fill(&mut encoded[BATCH_HEADER_SIZE..])?;
        encoded.truncate(BATCH_HEADER_SIZE + read);
        let encoded = encoded.freeze();
        let batch = Batch::split_from(&mut encoded.clone()).map_err(|error| self.damaged(error))?;
        self.at += encoded.len() as u64;
        Ok(Some((batch, encoded)))
    }

    /// Reads until `buffer` is full or the file ends.
    fn fill(&mut self, buffer: &mut [u8]) -> Result<usize, Failure> {
        let mut size = 0;
        while size < buffer.len() {
            match self.reader.read(&mut buffer[size..]) {
                Ok(0) => break,
                Ok(read) => size += read,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(Failure::failed(error).at(&self.place)),
            }
        }
        Ok(size)
    }

    fn damaged(&self, error: impl std::fmt::Display) -> Failure {
        Failure::failed(format!("the batch at byte {} is damaged: {error}", self.at)).at(&self.place)
    }
}

/// Reads a whole file and compares it with its entry in the manifest; `read` is told of each batch's
/// size.
///
/// # Errors
/// The first thing that is not as the manifest says.
pub(super) fn verify(dir: &Path, file: &PartitionFile, mut read: impl FnMut(u64)) -> Result<(), Failure> {
    let mut batches = Batches::open(dir, file)?;
    let mut tally = Tally::starting_at(file.partition, file.first_offset);
    while let Some((batch, encoded)) = batches.next()? {
        tally.add(&batch.header, &encoded).map_err(|problem| batches.damaged(problem))?;
        read(encoded.len() as u64);
    }
    let found = tally.finish();
    if found != *file {
        let problem = format!(
            "it is not what was backed up: {} records in {} bytes with SHA-256 {}, where the manifest says {} in {} with {}",
            found.records, found.size, found.sha256, file.records, file.size, file.sha256
        );
        return Err(Failure::failed(problem).at(&batches.place));
    }
    Ok(())
}
