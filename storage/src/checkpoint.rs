//! Checkpoints of the state machine above a log: opaque bytes, each at a log position.
//!
//! A checkpoint becomes durable only after the log is durable up to its position, so that a
//! power cut never leaves one above the end of the log.

use std::io;
use std::sync::Arc;

use arqon_proto::planted;
use arqon_proto::{DecodeError, RaftIndex, Term};
use bytes::Bytes;
use tokio::sync::oneshot;

use crate::disk::{self, Disk, join};
use crate::flush::Done;
use crate::index;
use crate::layout::{PREFIX_SIZE, What, claims_newer, seal, unseal};
use crate::log::{Log, LogCore, State, wait};
use crate::position::{LogPosition, index_after};

/// Largest checkpoint in bytes.
const CHECKPOINT_SIZE_MAX: usize = 1 << 30;
/// Largest file of one, with what stands around it.
const FILE_SIZE_MAX: usize = CHECKPOINT_SIZE_MAX + 4_096;
/// Newest checkpoints kept: if one turns out bad, the one before is taken.
const NEWEST_COUNT: usize = 2;
const POSITION_SIZE: usize = 16;

/// What a checkpoint is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CheckpointKind {
    /// Keeps the restart short; the two newest are kept.
    Newest,
    /// Stands at the log start and is what a lagging replica is given; one is kept.
    Retention,
}

impl CheckpointKind {
    const fn name(self) -> &'static str {
        match self {
            Self::Newest => "newest",
            Self::Retention => "retention",
        }
    }
}

/// A checkpoint that waits for the log to be flushed up to its position.
pub(crate) struct CheckpointWrite {
    pub kind: CheckpointKind,
    pub position: LogPosition,
    pub bytes: Bytes,
    pub done: Done,
}

fn file_name(kind: CheckpointKind, position: LogPosition) -> String {
    format!("checkpoint-{}-{:020}-{:020}", kind.name(), position.index.0, position.term.0)
}

/// Kind and position of a file name made by [`file_name`].
pub(crate) fn parse_file_name(name: &str) -> Option<(CheckpointKind, LogPosition)> {
    let rest = name.strip_prefix("checkpoint-")?;
    let (kind, rest) = rest.split_once('-')?;
    let kind = [CheckpointKind::Newest, CheckpointKind::Retention].into_iter().find(|known| known.name() == kind)?;
    let (index, term) = rest.split_once('-')?;
    let position = LogPosition { term: Term(term.parse().ok()?), index: RaftIndex(index.parse().ok()?) };
    Some((kind, position))
}

/// Refuses a checkpoint that is whole and of a newer format. Another one is left to whoever loads it.
pub(crate) fn check_version(disk: &dyn Disk, path: &str) -> Result<(), DecodeError> {
    // Most are large: only one that claims to be newer is read to its end.
    let mut prefix = [0; PREFIX_SIZE];
    let read = disk.open(path).and_then(|file| file.read_at(&mut prefix, 0)).unwrap_or(0);
    if read < PREFIX_SIZE || !claims_newer(&prefix) {
        return Ok(());
    }
    let Ok(bytes) = disk::read_all(disk, path, FILE_SIZE_MAX) else { return Ok(()) };
    match unseal(What::Checkpoint, &bytes) {
        Err(error @ DecodeError::Version { .. }) => Err(error),
        _ => Ok(()),
    }
}

/// Gives the checkpoints whose position is flushed to the housekeeper.
pub(crate) fn start_ready(core: &Arc<LogCore>, state: &mut State) {
    let flushed = index_after(state.flushed);
    let mut at = 0;
    while at < state.checkpoints_waiting.len() {
        if state.checkpoints_waiting[at].position.index.0 < flushed {
            let write = state.checkpoints_waiting.swap_remove(at);
            core.engine.request_checkpoint(core, write);
        } else {
            at += 1;
        }
    }
}

/// Writes one checkpoint file; durable when it returns.
pub(crate) fn write(core: &LogCore, kind: CheckpointKind, position: LogPosition, bytes: &[u8]) -> io::Result<()> {
    let mut payload = Vec::with_capacity(POSITION_SIZE + bytes.len());
    payload.extend_from_slice(&position.term.0.to_le_bytes());
    payload.extend_from_slice(&position.index.0.to_le_bytes());
    payload.extend_from_slice(bytes);
    let sealed = seal(What::Checkpoint, &payload);
    let (disk, name) = (core.engine.disk.as_ref(), file_name(kind, position));
    disk::replace(disk, &core.dir, &name, sealed, disk::CHECKPOINT_POINTS)?;
    let mut state = core.lock();
    state.checkpoints.retain(|other| *other != (kind, position));
    state.checkpoints.push((kind, position));
    Ok(())
}

/// Removes the checkpoints that newer ones replace.
pub(crate) fn prune(core: &LogCore) -> io::Result<()> {
    let mut superseded = Vec::new();
    {
        let mut state = core.lock();
        state.checkpoints.sort_by_key(|(_, position)| std::cmp::Reverse(*position));
        let (mut newest, mut retention) = (0, 0);
        state.checkpoints.retain(|(kind, position)| {
            let (count, limit) = match kind {
                CheckpointKind::Newest => (&mut newest, NEWEST_COUNT),
                CheckpointKind::Retention => (&mut retention, 1),
            };
            *count += 1;
            let keep = *count <= limit;
            if !keep {
                superseded.push(file_name(*kind, *position));
            }
            keep
        });
    }
    for name in superseded {
        core.engine.disk.remove(&join(&core.dir, &name))?;
        planted::crash_point("checkpoint-pruned");
    }
    Ok(())
}

/// Writes a checkpoint whose position is flushed, and tells whoever waits.
pub(crate) fn perform(core: &LogCore, request: CheckpointWrite) {
    let result = write(core, request.kind, request.position, &request.bytes);
    match &result {
        // It stands, and takes the place of the earlier ones from now on, whether their files go or not.
        Ok(()) => {
            if let Err(error) = prune(core) {
                tracing::warn!(group = core.group.0, "a file of an earlier checkpoint stays: {error}");
            }
        }
        Err(error) => {
            tracing::warn!(group = core.group.0, "saving a checkpoint at {} failed: {error}", request.position);
        }
    }
    // A restart goes on from here: with the walk of the log too.
    let tail = core.lock().segments.back().map(|tail| Arc::clone(&tail.segment));
    if let Some(tail) = tail {
        index::save(core, &tail);
    }
    request.done.send(result);
}

impl Log {
    /// Saves a checkpoint of the state after `position` was applied. It is durable on return;
    /// that takes until the log is flushed up to `position`.
    ///
    /// # Errors
    /// `InvalidInput` when the position is not in the log (see [`Log::install`]) or the bytes
    /// pass 1 GiB; the log is closed for writing; or the disk failed. The earlier checkpoints
    /// stand then, and the log goes on.
    pub async fn save_checkpoint(&self, kind: CheckpointKind, position: LogPosition, bytes: Bytes) -> io::Result<()> {
        if bytes.len() > CHECKPOINT_SIZE_MAX {
            let text = format!("checkpoint has {} bytes, the limit is {CHECKPOINT_SIZE_MAX}", bytes.len());
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        let (done, receiver) = oneshot::channel();
        {
            let mut state = self.core.lock();
            state.writable()?;
            if position.index.0 >= index_after(state.last) {
                let text = format!("checkpoint position {position} is beyond the end of the log");
                return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
            }
            state.checkpoints_waiting.push(CheckpointWrite { kind, position, bytes, done: Done::new(done) });
            start_ready(&self.core, &mut state);
        }
        wait(receiver).await
    }

    /// The checkpoints on disk, newest first.
    #[must_use]
    pub fn checkpoints(&self) -> Vec<(CheckpointKind, LogPosition)> {
        let mut checkpoints = self.core.lock().checkpoints.clone();
        checkpoints.sort_by_key(|(_, position)| std::cmp::Reverse(*position));
        checkpoints
    }

    /// Reads a checkpoint back.
    ///
    /// # Errors
    /// `NotFound`; `InvalidData` when its bytes are damaged (take the older one then); or a
    /// failure of the disk.
    pub fn load_checkpoint(&self, kind: CheckpointKind, position: LogPosition) -> io::Result<Bytes> {
        let path = join(&self.core.dir, &file_name(kind, position));
        let damaged = |reason: String| io::Error::new(io::ErrorKind::InvalidData, format!("{path}: {reason}"));
        let bytes = Bytes::from(disk::read_all(self.core.engine.disk.as_ref(), &path, FILE_SIZE_MAX)?);
        let payload = bytes.slice_ref(unseal(What::Checkpoint, &bytes).map_err(|error| damaged(error.to_string()))?);
        if payload.len() < POSITION_SIZE
            || payload[..8] != position.term.0.to_le_bytes()
            || payload[8..POSITION_SIZE] != position.index.0.to_le_bytes()
        {
            return Err(damaged("it is of another position than its name says".to_owned()));
        }
        Ok(payload.slice(POSITION_SIZE..))
    }
}
