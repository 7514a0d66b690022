//! openraft's state machine over a [`StateMachine`] of the Spine.
//!
//! The machine holds small derived state; the records stay in the log. Checkpoints of it only
//! shorten a restart. A snapshot for followers is a checkpoint at the retention point, never at
//! the last applied entry, because installing one drops the follower's log up to its position.

use std::{
    io,
    sync::{Mutex, PoisonError},
};

use arqon_proto::planted;
use arqon_proto::{Batch, BatchKind, DecodeError, Offset, RaftIndex, Term, limits, wire};
use arqon_storage::{CheckpointKind, Log, LogPosition, ReadError};
use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use openraft::{
    EntryPayload,
    storage::{EntryResponder, RaftSnapshotBuilder, RaftStateMachine},
};
use prost::Message;
use tokio::sync::watch;

use crate::{
    store::{Installed, InstalledSlot},
    types::{
        Applied, Entry, LogId, Membership, Snapshot, SnapshotMeta, StoredMembership, TypeConfig, from_wire_log_id,
        from_wire_membership, into_entry, log_id, position, wire_log_id, wire_membership,
    },
};

const CHECKPOINT_VERSION: u32 = 1;
/// A checkpoint is saved after this many bytes of applied entries.
const CHECKPOINT_INTERVAL_BYTES: usize = 16 << 20;
/// A clean stop saves none for less than this.
const CHECKPOINT_STOP_BYTES: usize = 256 << 10;

/// A group's deterministic state: what the Spine derives from the entries, in order.
///
/// Replicas that applied the same entries must have equal checkpoints, so an implementation
/// may use no clock, no randomness and no iteration order that varies.
pub trait StateMachine: Send + 'static {
    /// Applies one committed entry; the answer goes to its proposer. Raft's own entries come
    /// too (kind `raft`).
    ///
    /// # Errors
    /// An entry that a newer program wrote and this one does not know. It has changed nothing, and the group ends
    /// here: a replica that passed it over would differ from the others from then on.
    fn apply(&mut self, batch: &Batch) -> Result<Bytes, DecodeError>;

    /// The whole state.
    fn checkpoint(&self) -> Bytes;

    /// Replaces the state; empty bytes stand for that of an empty log.
    ///
    /// # Errors
    /// Bytes that no `checkpoint` made.
    fn restore(&mut self, state: &[u8]) -> Result<(), DecodeError>;

    /// Another machine of the same kind with the state of an empty log, seen by nobody else.
    fn fresh(&self) -> Box<dyn StateMachine>;
}

/// Up to where readers may read: min(applied, locally written). What is applied was read from
/// the local log, so it is written there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Readable {
    /// Last applied entry.
    pub index: Option<RaftIndex>,
    /// Term of that entry.
    pub term: Term,
    /// Offset after the last readable record.
    pub next_offset: Offset,
}

pub(crate) struct Machine {
    /// In a mutex only because openraft asks for `Sync`; it is never contended.
    inner: Mutex<Box<dyn StateMachine>>,
    log: Log,
    installed: InstalledSlot,
    readable: watch::Sender<Readable>,
    applied: Option<LogId>,
    membership: StoredMembership,
    next_offset: Offset,
    unsaved_bytes: usize,
}

impl Machine {
    /// Takes up the newest checkpoint that opens; entries after it are applied again.
    ///
    /// # Errors
    /// `InvalidData` when none opens and the log alone is not enough; or the disk failed.
    pub(crate) fn open(
        inner: Box<dyn StateMachine>,
        log: Log,
        installed: InstalledSlot,
        readable: watch::Sender<Readable>,
    ) -> io::Result<Self> {
        let mut machine = Self { installed, readable, ..Self::blank(inner, log) };
        machine.restore_newest(None)?;
        Ok(machine)
    }

    /// One that nobody hears of.
    fn blank(inner: Box<dyn StateMachine>, log: Log) -> Self {
        Self {
            inner: Mutex::new(inner),
            next_offset: Offset(0),
            log,
            installed: InstalledSlot::default(),
            readable: watch::Sender::default(),
            applied: None,
            membership: StoredMembership::default(),
            unsaved_bytes: 0,
        }
    }

    /// Takes up the newest checkpoint that opens, none after `limit`; the state of an empty log where no entry
    /// was purged.
    fn restore_newest(&mut self, limit: Option<LogPosition>) -> io::Result<()> {
        let mut checkpoints = self.log.checkpoints();
        checkpoints.sort_by_key(|(_, at)| std::cmp::Reverse(at.index));
        // From one below the log's start the state cannot be made again.
        checkpoints.retain(|(_, at)| self.log.purged().is_none_or(|purged| at.index >= purged.index));
        checkpoints.retain(|(_, at)| limit.is_none_or(|limit| at.index <= limit.index));
        for (kind, at) in checkpoints {
            match self.log.load_checkpoint(kind, at).and_then(|bytes| self.restore(&bytes)) {
                Ok(()) => return Ok(()),
                // The disk may give it the next time.
                Err(error) if !matches!(error.kind(), io::ErrorKind::InvalidData | io::ErrorKind::NotFound) => {
                    return Err(error);
                }
                // Derived data: an older one, or the log itself, gives the same state.
                Err(error) => {
                    tracing::warn!(%error, group = self.log.group().0, index = at.index.0, "checkpoint does not open, taking an older one")
                }
            }
        }
        if self.log.purged().is_some() {
            let reason = "the log's start is gone and no checkpoint of it opens";
            return Err(io::Error::new(io::ErrorKind::InvalidData, reason));
        }
        self.inner().restore(&[]).map_err(io::Error::other)
    }

    fn inner(&mut self) -> &mut dyn StateMachine {
        self.inner.get_mut().unwrap_or_else(PoisonError::into_inner).as_mut()
    }

    fn encode_checkpoint(&mut self) -> Bytes {
        let state = self.inner().checkpoint();
        let checkpoint = wire::Checkpoint {
            version: CHECKPOINT_VERSION,
            applied: self.applied.as_ref().map(wire_log_id),
            membership_id: self.membership.log_id().as_ref().map(wire_log_id),
            membership: Some(wire_membership(self.membership.membership())),
            state,
            next_offset: self.next_offset.0,
        };
        checkpoint.encode_to_vec().into()
    }

    /// The state now, if applying what came after the last checkpoint would take time.
    pub(crate) fn take_checkpoint(&mut self) -> Option<(LogPosition, Bytes)> {
        let at = self.applied.as_ref().map(position)?;
        if std::mem::take(&mut self.unsaved_bytes) < CHECKPOINT_STOP_BYTES {
            return None;
        }
        Some((at, self.encode_checkpoint()))
    }

    fn restore(&mut self, bytes: &Bytes) -> io::Result<()> {
        let checkpoint = decode_checkpoint(bytes)?;
        let membership = from_wire_membership(checkpoint.membership.unwrap_or_default())
            .ok_or_else(|| malformed("checkpoint holds a malformed membership".to_owned()))?;
        self.inner().restore(&checkpoint.state).map_err(|error| malformed(error.to_string()))?;
        self.applied = checkpoint.applied.map(from_wire_log_id);
        self.membership = StoredMembership::new(checkpoint.membership_id.map(from_wire_log_id), membership);
        self.next_offset = Offset(checkpoint.next_offset);
        self.publish();
        Ok(())
    }

    fn publish(&self) {
        self.readable.send_replace(Readable {
            index: self.applied.as_ref().map(|id| RaftIndex(id.index())),
            term: self.applied.as_ref().map_or(Term(0), |id| position(id).term),
            next_offset: self.next_offset,
        });
    }

    /// Index of the entry that is applied next.
    pub(crate) fn next_index(&self) -> u64 {
        self.applied.as_ref().map_or(0, |applied| applied.index() + 1)
    }

    /// The newest applied membership.
    pub(crate) fn members(&self) -> &Membership {
        self.membership.membership()
    }

    /// # Errors
    /// The entry is newer than this program.
    pub(crate) fn apply_entry(&mut self, entry: &Entry) -> io::Result<Applied> {
        if let Some(applied) = &self.applied {
            assert!(entry.log_id.index() > applied.index(), "entries are applied in order, each once");
        }
        let at = position(&entry.log_id);
        let mut answer = Applied { position: at, base_offset: self.next_offset, time_ms: 0, outcome: Bytes::new() };
        match &entry.payload {
            EntryPayload::Normal(batch) => {
                if batch.header.kind == BatchKind::Data {
                    assert_eq!(batch.header.base_offset, self.next_offset, "offsets have no gap");
                }
                answer.outcome = self.inner().apply(batch).map_err(|error| unknown_entry(at, &error))?;
                if batch.header.kind == BatchKind::Data {
                    self.next_offset = batch.header.next_offset();
                }
                answer.base_offset = batch.header.base_offset;
                answer.time_ms = batch.header.time_ms;
                self.unsaved_bytes += batch.header.batch_size();
            }
            EntryPayload::Membership(membership) => {
                self.membership = StoredMembership::new(Some(entry.log_id), membership.clone());
            }
            EntryPayload::Blank => {}
        }
        self.applied = Some(entry.log_id);
        Ok(answer)
    }
}

/// A machine of its own that applies the log again up to some entry, from the newest checkpoint before it.
pub(crate) struct Replay {
    machine: Machine,
    through: LogPosition,
}

impl Replay {
    /// Reads the checkpoint.
    ///
    /// # Errors
    /// `InvalidData` when no checkpoint of what was purged opens; or the disk failed.
    pub(crate) fn begin(blank: Box<dyn StateMachine>, log: Log, through: LogPosition) -> io::Result<Self> {
        let mut machine = Machine::blank(blank, log);
        machine.restore_newest(Some(through))?;
        Ok(Self { machine, through })
    }

    /// Applies the entries that are left and gives the checkpoint of the state right after the last one. Takes as
    /// long as reading them takes. After an error it may be called again, and goes on where that stood.
    ///
    /// # Errors
    /// Entries are damaged or missing, or the disk failed.
    pub(crate) fn run(&mut self) -> Result<Bytes, ReadError> {
        let (machine, through) = (&mut self.machine, self.through);
        while machine.next_index() <= through.index.0 {
            let next = machine.next_index();
            let batches = machine.log.entries(RaftIndex(next)..through.index.next(), limits::APPEND_SIZE_MAX)?;
            if batches.is_empty() {
                return Err(io::Error::other(format!("log has a hole at index {next}")).into());
            }
            for batch in batches {
                machine.apply_entry(&into_entry(batch).map_err(io::Error::other)?)?;
            }
        }
        if machine.applied.as_ref().map(position) != Some(through) {
            return Err(io::Error::other(format!("the log has no entry {}-{}", through.term, through.index)).into());
        }
        Ok(machine.encode_checkpoint())
    }
}

fn unknown_entry(at: LogPosition, error: &DecodeError) -> io::Error {
    let (term, index) = (at.term, at.index);
    let text = format!("entry {term}-{index} cannot be applied: {error}; this node needs the program of the others");
    io::Error::new(io::ErrorKind::Unsupported, text)
}

fn malformed(reason: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason)
}

fn decode_checkpoint(bytes: &Bytes) -> io::Result<wire::Checkpoint> {
    let checkpoint =
        wire::Checkpoint::decode(bytes.clone()).map_err(|_| malformed("checkpoint is malformed".to_owned()))?;
    if checkpoint.version != CHECKPOINT_VERSION {
        return Err(io::Error::other(format!("checkpoint has the unknown version {}", checkpoint.version)));
    }
    Ok(checkpoint)
}

impl RaftStateMachine<TypeConfig> for Machine {
    type SnapshotData = Bytes;
    type SnapshotBuilder = RetentionSnapshot;

    async fn applied_state(&mut self) -> Result<(Option<LogId>, StoredMembership), io::Error> {
        Ok((self.applied, self.membership.clone()))
    }

    async fn apply<Strm>(&mut self, mut entries: Strm) -> Result<(), io::Error>
    where
        Strm: Stream<Item = Result<EntryResponder<TypeConfig>, io::Error>> + Unpin + Send,
    {
        while let Some(item) = entries.next().await {
            let (entry, responder) = item?;
            let answer = self.apply_entry(&entry).inspect_err(|error| {
                tracing::error!(group = self.log.group().0, %error, "the replica stops");
            })?;
            // Before the answer: who was told of a write must be able to read it.
            self.publish();
            if let Some(responder) = responder {
                responder.send(Some(answer));
            }
        }
        if self.unsaved_bytes >= CHECKPOINT_INTERVAL_BYTES
            && let Some(applied) = self.applied
        {
            self.unsaved_bytes = 0;
            let (log, bytes, at) = (self.log.clone(), self.encode_checkpoint(), position(&applied));
            tokio::spawn(async move {
                if let Err(error) = log.save_checkpoint(CheckpointKind::Newest, at, bytes).await {
                    tracing::warn!(%error, index = at.index.0, "checkpoint not saved, a restart will take longer");
                }
            });
        }
        Ok(())
    }

    async fn get_snapshot_builder(&mut self) -> Self::SnapshotBuilder {
        RetentionSnapshot { log: self.log.clone(), membership: self.membership.clone() }
    }

    async fn install_snapshot(&mut self, meta: &SnapshotMeta, snapshot: Bytes) -> Result<(), io::Error> {
        // At start openraft hands the machine its own snapshot, which may lie behind it, and may be no more
        // than a position.
        if self.applied >= meta.last_log_id {
            return Ok(());
        }
        let checkpoint = decode_checkpoint(&snapshot)?;
        if checkpoint.applied.map(from_wire_log_id) != meta.last_log_id {
            return Err(io::Error::other("snapshot does not belong to its announced position"));
        }
        planted::crash_point("snapshot-received");
        self.restore(&snapshot)?;
        let Some(last) = &meta.last_log_id else { return Ok(()) };
        // The log jumps when openraft purges it, which it does next, and saves the checkpoint with
        // it: after a crash in between the old log stands.
        let installed = Installed { position: position(last), next_offset: self.next_offset, checkpoint: snapshot };
        *self.installed.lock().unwrap_or_else(PoisonError::into_inner) = Some(installed);
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<Snapshot>, io::Error> {
        // openraft ends the group when it finds none that it counts on.
        let snapshot = current_snapshot(&self.log)?;
        // A machine behind the log start would be told to install it.
        let is_covered = self.applied.as_ref().map(position) >= self.log.purged();
        Ok(snapshot.or_else(|| lost_snapshot(&self.log, &self.membership).filter(|_| is_covered)))
    }
}

/// Gives the checkpoint of the retention point. Without one nothing was purged and nobody needs
/// a snapshot, unless its file was lost. The present state must not stand in for it: whoever
/// installed that would drop all that is retained. So only its position is told then, without bytes, which
/// keeps openraft's account right; this replica cannot help one that lags, another one can: see
/// `Client::full_snapshot`.
pub(crate) struct RetentionSnapshot {
    log: Log,
    membership: StoredMembership,
}

impl RaftSnapshotBuilder<TypeConfig> for RetentionSnapshot {
    type SnapshotData = Bytes;

    async fn build_snapshot(&mut self) -> Result<Snapshot, io::Error> {
        if let Some(snapshot) = current_snapshot(&self.log)? {
            return Ok(snapshot);
        }
        let lost = lost_snapshot(&self.log, &self.membership);
        lost.ok_or_else(|| io::Error::other("nothing was purged, there is nothing to snapshot"))
    }
}

/// The place of a snapshot that is lost, if entries were purged and there must be one.
fn lost_snapshot(log: &Log, membership: &StoredMembership) -> Option<Snapshot> {
    let purged = log.purged()?;
    tracing::error!(
        group = log.group().0,
        index = purged.index.0,
        "the checkpoint at the log's start is lost: replicas that lag need another leader"
    );
    let meta = SnapshotMeta { last_log_id: Some(log_id(purged)), last_membership: membership.clone() };
    Some(Snapshot { meta, snapshot: Bytes::new() })
}

fn current_snapshot(log: &Log) -> io::Result<Option<Snapshot>> {
    let retention = log.checkpoints().into_iter().filter(|(kind, _)| *kind == CheckpointKind::Retention);
    let Some((kind, at)) = retention.max_by_key(|(_, at)| at.index) else {
        return Ok(None);
    };
    match log.load_checkpoint(kind, at).and_then(decode_snapshot) {
        Ok(snapshot) => Ok(Some(snapshot)),
        // As good as lost: see `RetentionSnapshot`.
        Err(error) if matches!(error.kind(), io::ErrorKind::InvalidData | io::ErrorKind::NotFound) => {
            let group = log.group().0;
            tracing::warn!(%error, group, index = at.index.0, "the checkpoint of the retention point does not open");
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

fn decode_snapshot(bytes: Bytes) -> io::Result<Snapshot> {
    let checkpoint = decode_checkpoint(&bytes)?;
    let membership = from_wire_membership(checkpoint.membership.unwrap_or_default())
        .ok_or_else(|| malformed("checkpoint holds a malformed membership".to_owned()))?;
    let membership_id = checkpoint.membership_id.map(from_wire_log_id);
    let meta = SnapshotMeta {
        last_log_id: checkpoint.applied.map(from_wire_log_id),
        last_membership: StoredMembership::new(membership_id, membership),
    };
    Ok(Snapshot { meta, snapshot: bytes })
}
