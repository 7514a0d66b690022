//! The handle of one local replica of one group.

use std::{
    collections::BTreeSet,
    future::Future,
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use arqon_proto::planted::{self, Bug};
use arqon_proto::{Batch, GroupId, NodeId, RaftIndex, ReplicaId, Term, limits};
use arqon_storage::{CheckpointKind, Log, LogPosition, ReadError};
use bytes::Bytes;
use futures_util::future::BoxFuture;
use openraft::{
    ReadPolicy, ServerState,
    async_runtime::watch::WatchReceiver as _,
    errors::{ClientWriteError, ForwardReason, ForwardToLeader},
    raft::ClientWriteResult,
};
use tokio::sync::{Semaphore, oneshot, watch};

use crate::{
    aside::aside,
    host::Raft,
    machine::{Machine, Readable, Replay, StateMachine},
    pulse::Pulse,
    repair::{self, REPAIR_PATIENCE, Repairs},
    store::Appended,
    types::{Applied, CommittedLeaderId, Reply, TypeConfig},
};

/// Entries that a replica may lack and still count as caught up.
pub(crate) const CAUGHT_UP_LAG_MAX: u64 = 256;

/// Why a proposal has no answer of the state machine.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProposeError {
    /// This replica does not lead (in that term any more). Surely not written.
    #[error("this replica is not the leader")]
    NotLeader {
        /// The leader's node, when known.
        leader: Option<NodeId>,
    },
    /// It may have been written, or may still be. Ask again with the same sequence.
    #[error("the outcome is not known: {0}")]
    UnknownOutcome(String),
    /// Too many bytes wait to be committed. Surely not written.
    #[error("too many bytes wait to be committed")]
    Overloaded,
    /// The replica has stopped. Surely not written.
    #[error("the replica has stopped: {0}")]
    Stopped(String),
}

/// What a replica knows of its group.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Status {
    /// Current term.
    pub term: Term,
    /// Node of the leader, when known.
    pub leader: Option<NodeId>,
    /// Whether this replica leads.
    pub is_leader: bool,
    /// Whether it leads, has applied an entry of its own term, so that its state is complete, and has not asked
    /// another to take over. Nothing may be accepted before or after.
    pub ready: bool,
    /// Last applied entry.
    pub applied: Option<RaftIndex>,
    /// Last entry of the local log.
    pub last: Option<RaftIndex>,
    /// Nodes of the voters.
    pub voters: Vec<NodeId>,
    /// Why the replica does not work any more, if so.
    pub stopped: Option<String>,
}

/// A cheap handle of one local replica.
#[derive(Clone)]
pub struct Group {
    inner: Arc<Inner>,
}

struct Inner {
    id: GroupId,
    replica: ReplicaId,
    raft: Raft,
    pulse: Arc<Pulse>,
    log: Log,
    repairs: Arc<Repairs>,
    readable: watch::Receiver<Readable>,
    status: watch::Receiver<Status>,
    uncommitted: Arc<Semaphore>,
    /// Held by whoever has a proposal on its way into the log.
    proposing: tokio::sync::Mutex<Arc<Appended>>,
    /// Makes machines for retention points. In a mutex because machines are not `Sync`; held as
    /// long as a trim runs, so that there is one at a time.
    blank: tokio::sync::Mutex<Box<dyn StateMachine>>,
}

impl std::fmt::Debug for Group {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Group({}, replica {})", self.inner.id, self.inner.replica)
    }
}

/// A batch in the log of its leader; resolves when it is applied, or is known not to be.
#[must_use = "the batch counts as in flight until the proposal is dropped"]
pub struct Proposal {
    reply: oneshot::Receiver<ClientWriteResult<TypeConfig>>,
    raft: Raft,
}

impl Future for Proposal {
    type Output = Result<Applied, ProposeError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let Poll::Ready(reply) = Pin::new(&mut self.reply).poll(cx) else { return Poll::Pending };
        Poll::Ready(match reply {
            Ok(Ok(response)) => response.data.ok_or_else(|| unknown("the entry was applied without an answer")),
            Ok(Err(ClientWriteError::ForwardToLeader(to))) => Err(not_leader(&to)),
            Ok(Err(ClientWriteError::LogEntryDiscarded(_))) => Err(unknown("another leader took over")),
            Ok(Err(other)) => Err(unknown(&other.to_string())),
            Err(_) => Err(unknown(&stopped(&self.raft).unwrap_or_else(|| "the replica stopped".into()))),
        })
    }
}

fn not_leader(to: &ForwardToLeader<TypeConfig>) -> ProposeError {
    ProposeError::NotLeader { leader: to.leader_node.map(|at| NodeId(at.node)) }
}

fn unknown(reason: &str) -> ProposeError {
    ProposeError::UnknownOutcome(reason.to_owned())
}

fn stopped(raft: &Raft) -> Option<String> {
    raft.metrics().borrow_watched().running_state.as_ref().err().map(ToString::to_string)
}

impl Group {
    pub(crate) fn new(
        id: GroupId,
        replica: ReplicaId,
        (raft, pulse, appended, repairs): (Raft, Arc<Pulse>, Arc<Appended>, Arc<Repairs>),
        log: Log,
        readable: watch::Receiver<Readable>,
        blank: Box<dyn StateMachine>,
    ) -> Self {
        let first = read_status(&raft, &pulse, &log, *readable.borrow());
        let (status_tx, status) = watch::channel(first);
        tokio::spawn(follow_status(raft.clone(), pulse.clone(), log.clone(), readable.clone(), status_tx));
        let uncommitted = Arc::new(Semaphore::new(limits::UNCOMMITTED_SIZE_MAX));
        let blank = blank.into();
        Self {
            inner: Arc::new(Inner {
                id,
                replica,
                raft,
                pulse,
                log,
                repairs,
                readable,
                status,
                uncommitted,
                proposing: appended.into(),
                blank,
            }),
        }
    }

    /// The group.
    #[must_use]
    pub fn id(&self) -> GroupId {
        self.inner.id
    }

    /// This replica's Raft id.
    #[must_use]
    pub fn replica(&self) -> ReplicaId {
        self.inner.replica
    }

    /// The segments behind the group: readers go here, up to [`Self::readable`].
    #[must_use]
    pub fn log(&self) -> &Log {
        &self.inner.log
    }

    pub(crate) fn raft(&self) -> &Raft {
        &self.inner.raft
    }

    pub(crate) fn pulse(&self) -> &Pulse {
        &self.inner.pulse
    }

    /// Saves the state of the replica, so that what is applied now is not applied again when it
    /// is opened next.
    pub(crate) async fn save_state(&self) -> io::Result<()> {
        let taken = self.inner.raft.with_state_machine(|machine: &mut Machine| {
            let checkpoint = machine.take_checkpoint();
            Box::pin(std::future::ready(checkpoint))
        });
        match taken.await.map_err(io::Error::other)? {
            Some((at, bytes)) => self.inner.log.save_checkpoint(CheckpointKind::Newest, at, bytes).await,
            None => Ok(()),
        }
    }

    /// Puts a batch into the log, in the order of calls, and returns when it stands there. `term` is
    /// the term in which the caller checked its state: when another has begun the answer is
    /// [`ProposeError::NotLeader`].
    ///
    /// A batch that is refused never has a later one of the same term behind it in the log unless
    /// that was proposed after the refusal: each waits for the one before. openraft refuses while
    /// no majority has answered of late, and takes the next one as soon as one has.
    ///
    /// # Errors
    /// [`ProposeError`]; all but `UnknownOutcome` mean that the batch was not written.
    pub async fn propose(&self, term: Term, batch: Batch) -> Result<Proposal, ProposeError> {
        let proposing = self.inner.proposing.lock().await;
        match self.try_propose(&proposing, term, batch.clone()).await? {
            Ok(proposal) => Ok(proposal),
            Err(to) if to.reason == ForwardReason::LeaseExpired => {
                // Nothing was sent for a while, or a majority is away: ask.
                self.confirm_leader().await?;
                let again = self.try_propose(&proposing, term, batch).await?;
                again.map_err(|to| not_leader(&to))
            }
            Err(to) => Err(not_leader(&to)),
        }
    }

    /// The inner error: openraft did not take the batch.
    async fn try_propose(
        &self,
        appended: &Appended,
        term: Term,
        batch: Batch,
    ) -> Result<Result<Proposal, ForwardToLeader<TypeConfig>>, ProposeError> {
        let size = batch.header.batch_size() as u32;
        let share =
            self.inner.uncommitted.clone().try_acquire_many_owned(size).map_err(|_| ProposeError::Overloaded)?;
        let (outcome, mut reply) = oneshot::channel();
        let appended = appended.expect(term.0);
        let raft = &self.inner.raft;
        raft.write(batch)
            .with_leader(CommittedLeaderId::new(term.0))
            .responder(Reply { outcome, share })
            .await
            .map_err(|fatal| ProposeError::Stopped(fatal.to_string()))?;
        tokio::select! {
            biased;
            Ok(()) = appended => Ok(Ok(Proposal { reply, raft: raft.clone() })),
            refused = &mut reply => match refused {
                Ok(Err(ClientWriteError::ForwardToLeader(to))) => Ok(Err(to)),
                Ok(Err(other)) => Err(unknown(&other.to_string())),
                Ok(Ok(_)) | Err(_) => Err(unknown(&stopped(raft).unwrap_or_else(|| "the replica stopped".into()))),
            },
        }
    }

    /// The state of the replica now.
    #[must_use]
    pub fn status(&self) -> Status {
        read_status(&self.inner.raft, &self.inner.pulse, &self.inner.log, *self.inner.readable.borrow())
    }

    /// Whether this replica leads and has applied an entry of its own term; as [`Self::watch`]
    /// tells, and cheaper than [`Self::status`].
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.inner.status.borrow().ready
    }

    /// Node of the leader, when known; as [`Self::watch`] tells, and cheaper than [`Self::status`].
    #[must_use]
    pub fn leader(&self) -> Option<NodeId> {
        self.inner.status.borrow().leader
    }

    /// Why the replica does not work any more, if so.
    #[must_use]
    pub fn stopped(&self) -> Option<String> {
        self.inner.log.poisoned().or_else(|| stopped(&self.inner.raft))
    }

    /// Why the log here is closed for writing, if a write or sync of it has failed. Another start of this process
    /// opens it again.
    #[must_use]
    pub fn closed(&self) -> Option<String> {
        self.inner.log.poisoned()
    }

    /// Whether this replica leads and the voter on `node` has everything but the last few entries.
    #[must_use]
    pub fn is_caught_up(&self, node: NodeId) -> bool {
        let metrics = self.inner.raft.metrics();
        let metrics = metrics.borrow_watched();
        let membership = metrics.membership_config.membership();
        let mut voters = membership.voter_ids();
        let is_there = |id: &u64| membership.get_node(id).is_some_and(|at| at.node == node.0);
        let Some(target) = voters.find(is_there) else { return false };
        let matching = metrics.replication.as_ref().and_then(|targets| targets.get(&target)?.as_ref());
        let last_index = metrics.last_log_index.unwrap_or_default();
        matching.is_some_and(|matching| last_index.saturating_sub(matching.index()) <= CAUGHT_UP_LAG_MAX)
    }

    /// The nodes of the voters; two sets while they change.
    pub(crate) fn voter_nodes(&self) -> Vec<BTreeSet<NodeId>> {
        repair::voter_nodes(self.inner.raft.server_metrics().borrow_watched().membership_config.membership())
    }

    /// Follows leadership, term and readiness. Positions in it are those of the last such change.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<Status> {
        self.inner.status.clone()
    }

    /// Follows up to where readers may read.
    #[must_use]
    pub fn readable(&self) -> watch::Receiver<Readable> {
        self.inner.readable.clone()
    }

    /// Confirms with a majority that this replica leads, and waits until everything that was
    /// acknowledged before the call is readable here (ReadIndex).
    ///
    /// # Errors
    /// `NotLeader` when it does not lead, or no majority answers.
    pub async fn confirm_leader(&self) -> Result<(), ProposeError> {
        if planted::has(Bug::StaleLeaderRead) {
            return Ok(());
        }
        match self.inner.raft.ensure_linearizable(ReadPolicy::ReadIndex).await {
            Ok(_) => Ok(()),
            Err(_) => match stopped(&self.inner.raft) {
                Some(reason) => Err(ProposeError::Stopped(reason)),
                None => Err(ProposeError::NotLeader { leader: self.status().leader }),
            },
        }
    }

    /// Drops the log up to `through` on this replica: saves the state right after it as the
    /// snapshot for those who lag, then purges. Entries that a follower still needs are purged
    /// when it has them. Nothing happens when they are gone already. Waits up to ten seconds for the repair
    /// of each damaged entry that it meets.
    ///
    /// # Errors
    /// `through` is not applied here, the log cannot be read, or the replica has stopped.
    pub fn trim(&self, through: LogPosition) -> BoxFuture<'_, io::Result<()>> {
        Box::pin(async move {
            let inner = &self.inner;
            let blank = inner.blank.lock().await;
            if inner.log.purged() >= Some(through) {
                return Ok(());
            }
            if inner.readable.borrow().index < Some(through.index) {
                return Err(io::Error::other(format!(
                    "entry {} is not applied yet and cannot be trimmed",
                    through.index
                )));
            }
            let checkpoint = self.make_checkpoint(blank.fresh(), through).await?;
            inner.log.save_checkpoint(CheckpointKind::Retention, through, checkpoint).await?;
            planted::crash_point("retention-checkpoint");
            inner.raft.trigger().snapshot().await.map_err(io::Error::other)
        })
    }

    /// The checkpoint of the state right after the entry `through`.
    async fn make_checkpoint(&self, blank: Box<dyn StateMachine>, through: LogPosition) -> io::Result<Bytes> {
        let (log, repairs) = (&self.inner.log, &self.inner.repairs);
        let (has_threads, own) = (log.store_has_threads(), log.clone());
        let mut replay = aside(has_threads, move || Replay::begin(blank, own, through)).await??;
        let mut unrepaired = None;
        loop {
            let made;
            (replay, made) = aside(has_threads, move || {
                let made = replay.run();
                (replay, made)
            })
            .await?;
            match made {
                // It may also have been repaired before anybody could wait for it: told by the next read.
                Err(ReadError::Damaged { index, .. }) if unrepaired != Some(index) => {
                    let is_repaired = repairs.repaired(log, index, Some(REPAIR_PATIENCE)).await;
                    unrepaired = (!is_repaired).then_some(index);
                }
                made => return made.map_err(io::Error::other),
            }
        }
    }

    /// Waits until `through` is no longer in the log of this replica.
    pub async fn trimmed(&self, through: LogPosition) {
        let mut metrics = self.inner.raft.data_metrics();
        while self.inner.log.purged() < Some(through) {
            if metrics.changed().await.is_err() {
                return;
            }
        }
    }

    /// Whether this replica stands for election when it hears of no leader. It always votes.
    pub fn stand_for_election(&self, may_stand: bool) {
        self.inner.raft.runtime_config().elect(may_stand);
    }

    /// Asks the replica on `to` to take over; resolves when it has or the time is over.
    ///
    /// # Errors
    /// `NotLeader` when this replica does not lead or `to` has no voter of the group.
    pub fn transfer_leader(&self, to: NodeId) -> BoxFuture<'_, Result<(), ProposeError>> {
        Box::pin(async move {
            let raft = &self.inner.raft;
            let target = {
                let metrics = raft.server_metrics();
                let metrics = metrics.borrow_watched();
                let voters: BTreeSet<u64> = metrics.membership_config.membership().voter_ids().collect();
                let mut nodes = metrics.membership_config.membership().nodes();
                nodes.find(|(id, at)| at.node == to.0 && voters.contains(id)).map(|(id, _)| *id)
            };
            let refused = || ProposeError::NotLeader { leader: self.status().leader };
            self.transfer_to(target.ok_or_else(refused)?).await
        })
    }

    /// As [`Self::transfer_leader`], to a voter by its id.
    pub(crate) async fn transfer_to(&self, target: u64) -> Result<(), ProposeError> {
        let status = self.status();
        if !status.is_leader {
            return Err(ProposeError::NotLeader { leader: status.leader });
        }
        self.inner.pulse.resign(status.term.0);
        let raft = &self.inner.raft;
        raft.trigger().transfer_leader(target).await.map_err(|fatal| ProposeError::Stopped(fatal.to_string()))
    }
}

fn read_status(raft: &Raft, pulse: &Pulse, log: &Log, readable: Readable) -> Status {
    let metrics = raft.server_metrics();
    let metrics = metrics.borrow_watched();
    let membership = metrics.membership_config.membership();
    let term = Term(metrics.vote.leader_id.term);
    let is_leader = metrics.state == ServerState::Leader;
    let node_of = |replica: u64| membership.get_node(&replica).map(|at| NodeId(at.node));
    Status {
        term,
        leader: metrics.current_leader.and_then(node_of),
        is_leader,
        ready: is_leader && readable.term == term && !pulse.has_resigned(term.0),
        applied: readable.index,
        last: log.last().map(|last| last.index),
        voters: membership.voter_ids().filter_map(node_of).collect(),
        stopped: log.poisoned().or_else(|| stopped(raft)),
    }
}

/// Publishes a status whenever leadership, term, readiness or membership change.
async fn follow_status(
    raft: Raft,
    pulse: Arc<Pulse>,
    log: Log,
    mut readable: watch::Receiver<Readable>,
    out: watch::Sender<Status>,
) {
    let mut server = raft.server_metrics();
    loop {
        let status = read_status(&raft, &pulse, &log, *readable.borrow_and_update());
        let waits_for_noop = status.is_leader && !status.ready && !pulse.has_resigned(status.term.0);
        out.send_if_modified(|old| {
            let changed = (old.term, old.leader, old.is_leader, old.ready, &old.voters, &old.stopped)
                != (status.term, status.leader, status.is_leader, status.ready, &status.voters, &status.stopped);
            *old = status;
            changed
        });
        let ended = tokio::select! {
            changed = server.changed() => changed.is_err(),
            // Before openraft knows of it, which on a slow disk takes long.
            () = pulse.resigned() => false,
            // Every commit changes this: watched only until the leader's first entry is applied.
            changed = readable.changed(), if waits_for_noop => changed.is_err(),
            () = out.closed() => return,
        };
        if ended {
            let status = read_status(&raft, &pulse, &log, *readable.borrow());
            out.send_replace(Status { is_leader: false, ready: false, ..status });
            return;
        }
    }
}
