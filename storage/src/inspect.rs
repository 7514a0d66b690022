//! Reads a data directory from outside: no lock is taken and nothing is changed.

mod check;

use std::io;
use std::path::Path;
use std::sync::Arc;

use arqon_proto::{Batch, GroupId, Header, NodeId, RaftIndex, ReplicaId};

use crate::checkpoint::{self, CheckpointKind};
use crate::disk::real::RealDisk;
use crate::disk::{self, Disk, File, join};
use crate::layout::{
    IDENTITY_FILE, LOGS_DIR, MANIFEST_FILE, Manifest, REWRITE_FILE, SEGMENT_DATA_AT, VOTE_FILE, What, decode_identity,
    log_dir, parse_log_dir, unseal,
};
use crate::position::LogPosition;
use crate::segment::{Front, Walk, read_front};

pub use check::{Fault, LogCheck, TermSpan};

const SMALL_SIZE_MAX: usize = 1 << 20;

/// What a data directory holds.
pub struct Inspection {
    /// Cluster and node, or why they cannot be told.
    pub identity: Result<(String, NodeId), String>,
    /// The logs, by group and replica.
    pub logs: Vec<LogInspection>,
}

/// One log of the directory.
pub struct LogInspection {
    /// Raft group.
    pub group: GroupId,
    /// Replica placement.
    pub replica: ReplicaId,
    /// Its directory below the data directory.
    pub dir: String,
    /// Last entry dropped from the front.
    pub purged: Option<LogPosition>,
    /// First index of the newest segment that must be there.
    pub tail: Option<RaftIndex>,
    /// Newest committed position in a durable mark.
    pub committed: Option<LogPosition>,
    /// Index after the last entry that is known to be flushed.
    pub marked_next_index: Option<u64>,
    /// The segments, by index.
    pub segments: Vec<SegmentInspection>,
    /// The checkpoints by name; their bytes were checked.
    pub checkpoints: Vec<(CheckpointKind, LogPosition)>,
    /// Whether a sync failed in the run before.
    pub sync_failed: bool,
    /// Files that are damaged, with the reason.
    pub damage: Vec<String>,
}

/// One segment file.
pub struct SegmentInspection {
    /// Path below the data directory.
    pub path: String,
    /// Size of the file in bytes.
    pub size: u64,
    /// Size that it may reach, in bytes.
    pub capacity: u64,
    /// Whether the log restarted after it was written; it will be removed at the next open.
    pub is_stale: bool,
    /// First index, first offset, and chain value of the first entry.
    pub base: (u64, u64, u64),
    /// Byte at which it was sealed by a cut.
    pub sealed_at: Option<u64>,
    file: Arc<dyn File>,
}

/// One batch of a segment, or the end of what can be read.
#[derive(Debug)]
pub enum BatchInspection {
    /// A batch that continues the chain and whose bytes match their CRCs.
    Whole {
        /// Byte of its header.
        at: u64,
        /// The batch.
        batch: Batch,
    },
    /// The batch continues the chain; its stamps or records are damaged.
    DamagedRecords {
        /// Byte of its header.
        at: u64,
        /// The header.
        header: Header,
        /// What is wrong.
        reason: String,
    },
    /// Nothing from here on belongs to the log. A torn tail looks like this too.
    FirstBadByte {
        /// The byte.
        at: u64,
        /// What is wrong there.
        reason: String,
    },
}

/// Inspects the data directory `dir`, of a running node or a stopped one.
///
/// # Errors
/// The directory cannot be read.
pub fn inspect(dir: &Path) -> io::Result<Inspection> {
    inspect_on(&RealDisk::read_only(dir))
}

/// As [`inspect`], on another disk.
///
/// # Errors
/// The disk cannot be read.
pub fn inspect_on(disk: &dyn Disk) -> io::Result<Inspection> {
    let identity = disk::read_all(disk, IDENTITY_FILE, SMALL_SIZE_MAX)
        .map_err(|error| error.to_string())
        .and_then(|bytes| decode_identity(&bytes).map_err(|error| error.to_string()));
    let names = match disk.list(LOGS_DIR) {
        Err(error) if error.kind() == io::ErrorKind::NotFound && identity.is_ok() => Vec::new(),
        names => names?,
    };
    let mut places: Vec<_> = names.iter().filter_map(|name| parse_log_dir(name)).collect();
    places.sort_unstable();
    let logs =
        places.into_iter().map(|(group, replica)| inspect_log(disk, group, replica)).collect::<io::Result<_>>()?;
    Ok(Inspection { identity, logs })
}

fn inspect_log(disk: &dyn Disk, group: GroupId, replica: ReplicaId) -> io::Result<LogInspection> {
    let dir = log_dir(group, replica);
    let mut log = LogInspection {
        group,
        replica,
        dir: dir.clone(),
        purged: None,
        tail: None,
        committed: None,
        marked_next_index: None,
        segments: Vec::new(),
        checkpoints: Vec::new(),
        sync_failed: false,
        damage: Vec::new(),
    };
    let (mut generation, mut incarnation) = (0, None);
    match read_small(disk, &dir, MANIFEST_FILE)
        .and_then(|bytes| Manifest::decode(&bytes).map_err(|error| error.to_string()))
    {
        Ok(manifest) => {
            (log.purged, log.tail) = (manifest.purged, manifest.tail);
            (generation, incarnation) = (manifest.generation, Some(manifest.incarnation));
            if (manifest.group, manifest.replica) != (group, replica) {
                let owner = format!("group {} replica {}", manifest.group, manifest.replica);
                log.damage.push(format!("{MANIFEST_FILE}: it is of {owner}"));
            }
        }
        Err(reason) => log.damage.push(format!("{MANIFEST_FILE}: {reason}")),
    }
    let vote = read_small(disk, &dir, VOTE_FILE);
    if let Err(reason) = vote.and_then(|bytes| unseal(What::Vote, &bytes).map(drop).map_err(|error| error.to_string()))
    {
        log.damage.push(format!("{VOTE_FILE}: {reason}"));
    }
    let mut sequence = 0;
    for name in disk.list(&dir)? {
        log.sync_failed |= name == REWRITE_FILE;
        if let Some(found) = checkpoint::parse_file_name(&name) {
            let bytes = disk::read_all(disk, &join(&dir, &name), usize::MAX)?;
            match unseal(What::Checkpoint, &bytes) {
                Ok(_) => log.checkpoints.push(found),
                Err(error) => log.damage.push(format!("{name}: {error}")),
            }
        }
        if !name.ends_with(".seg") {
            continue;
        }
        let path = join(&dir, &name);
        let file = disk.open(&path)?;
        let Front { header, mark, slot_error, .. } = read_front(file.as_ref())?;
        match slot_error {
            Some(error) => log.damage.push(format!("{name}: {error}")),
            None if mark.is_none() => log.damage.push(format!("{name}: it has no durable mark")),
            None => {}
        }
        let header = match header {
            Ok(header) => header,
            Err(error) => {
                log.damage.push(format!("{name}: {error}"));
                continue;
            }
        };
        let owner = (header.group, header.replica, header.incarnation);
        if owner != (group, replica, incarnation.unwrap_or(header.incarnation)) || header.file_name() != name {
            log.damage.push(format!("{name}: it belongs to another log or place"));
            continue;
        }
        if file.size()? < SEGMENT_DATA_AT {
            log.damage.push(format!("{name}: it is cut short at byte {}", file.size()?));
        }
        if let Some(mark) = &mark
            && mark.sequence >= sequence
            && header.generation == generation
        {
            sequence = mark.sequence;
            log.marked_next_index = Some(mark.next_index);
            log.committed = mark.committed;
        }
        log.segments.push(SegmentInspection {
            path,
            size: file.size()?,
            capacity: header.capacity,
            is_stale: header.generation < generation,
            base: (header.base_index.0, header.base_offset.0, header.chain),
            sealed_at: mark.and_then(|mark| mark.sealed_at),
            file,
        });
    }
    log.segments.sort_by_key(|segment| segment.base.0);
    Ok(log)
}

fn read_small(disk: &dyn Disk, dir: &str, name: &str) -> Result<Vec<u8>, String> {
    disk::read_all(disk, &join(dir, name), SMALL_SIZE_MAX).map_err(|error| error.to_string())
}

impl SegmentInspection {
    /// The batches in order, payloads checked; a bad byte ends them.
    pub fn batches(&self) -> impl Iterator<Item = BatchInspection> + '_ {
        let end = self.size.min(self.capacity).min(self.sealed_at.unwrap_or(u64::MAX));
        let mut walk = Walk::new(self.file.as_ref(), SEGMENT_DATA_AT, end);
        let (mut index, _, mut chain) = self.base;
        let mut ended = false;
        std::iter::from_fn(move || {
            if ended {
                return None;
            }
            let at = walk.at;
            let mut bad = |reason: String| {
                ended = true;
                Some(BatchInspection::FirstBadByte { at, reason })
            };
            let bytes = match walk.bytes() {
                Ok(Some(bytes)) if bytes.iter().any(|byte| *byte != 0) => bytes,
                Ok(_) => {
                    ended = true;
                    return None;
                }
                Err(error) => return bad(error.to_string()),
            };
            let header = match Header::decode(&bytes) {
                Ok(header) => header,
                Err(error) => return bad(error.to_string()),
            };
            if (header.index.0, header.chain) != (index, chain) {
                return bad("the batch does not continue the chain".to_owned());
            }
            if at + header.batch_size() as u64 > end {
                return bad("the batch is cut short".to_owned());
            }
            walk.at += header.batch_size() as u64;
            index += 1;
            chain = Header::chain_value(&bytes);
            Some(match read_batch(self.file.as_ref(), at, &header) {
                Ok(batch) => BatchInspection::Whole { at, batch },
                Err(reason) => BatchInspection::DamagedRecords { at, header, reason },
            })
        })
    }
}

fn read_batch(file: &dyn File, at: u64, header: &Header) -> Result<Batch, String> {
    // A copy, not a map: the file may change or shrink under an inspector without a lock.
    let mut bytes = vec![0; header.batch_size()];
    let read = file.read_at(&mut bytes, at).map_err(|error| error.to_string())?;
    bytes.truncate(read);
    Batch::split_from(&mut bytes.into()).map_err(|error| error.to_string())
}
