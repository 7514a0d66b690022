//! What is kept of a log, and for how long.
//!
//! The leader looks where whole segments may expire, or is asked to drop some, and proposes the new
//! log start; every replica trims its own log when that is applied. So the log start is the same
//! everywhere, and never goes back, whoever leads next.

use std::{sync::Arc, time::Duration};

use arqon_proto::planted;
use arqon_proto::{Offset, RaftIndex, Term, wire, wire::ErrorCode};
use arqon_storage::LogPosition;
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::{MissedTickBehavior, interval, timeout},
};

use super::{
    Partition, Replica,
    error::{error, invalid, overloaded},
    submit::Submission,
};

const CHECK_INTERVAL: Duration = Duration::from_secs(2);
/// How long the answer to a trim waits until the leader's own segments are gone.
const TRIM_PATIENCE: Duration = Duration::from_secs(5);

/// What a trim is to drop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TrimBefore {
    /// Records before this offset.
    Offset(Offset),
    /// Records before the first one with this time or a later one, in ms since 1970.
    TimeMs(u64),
}

/// Runs until `closing` turns true.
pub(super) async fn run(
    replica: Arc<Replica>,
    submissions: mpsc::WeakSender<Submission>,
    mut closing: watch::Receiver<bool>,
) {
    let mut log_start = replica.machine.log_start();
    let mut settings = replica.settings.subscribe();
    let mut ticks = interval(CHECK_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let is_tick = tokio::select! {
            biased;
            _ = closing.wait_for(|is_closing| *is_closing) => return,
            _ = log_start.changed() => false,
            _ = settings.changed() => true,
            _ = ticks.tick() => true,
        };
        let target = *log_start.borrow_and_update();
        let round = async {
            if is_tick {
                replica.propose_log_start(&submissions).await;
            }
            replica.trim_log(target).await;
        };
        tokio::select! {
            _ = closing.wait_for(|is_closing| *is_closing) => return,
            () = round => {}
        }
    }
}

impl Partition {
    /// Moves the log start to the last segment boundary at or before `before`, which may be where
    /// it is; gives the first offset that is kept then. With `only_check` nothing is done.
    ///
    /// # Errors
    /// NOT_LEADER; VALIDATION_ERROR naming who still needs records before `before`;
    /// OFFSET_OUT_OF_RANGE when it lies beyond the committed end; OVERLOADED and UNKNOWN_OUTCOME.
    pub async fn trim(&self, before: TrimBefore, only_check: bool) -> Result<Offset, wire::Error> {
        let replica = &self.replica;
        let term = replica.require_leader()?;
        let before = replica.trim_offset(before)?;
        let log = replica.group.log();
        let log_start = replica.log_start();
        // A size limit of nothing: all segments that end at or before the offset.
        let point = log.retention_point(0, None, Some(0), before).filter(|(_, offset)| *offset > log_start);
        let Some((position, offset)) = point.filter(|_| !only_check) else { return Ok(log_start) };
        let start = wire::LogStart { term: position.term.0, index: position.index.0, offset: offset.0 };
        replica.propose_start(&self.submissions, term, start).await?;
        // Whoever reads at the leader next sees the new start; followers trim when they get there.
        timeout(TRIM_PATIENCE, replica.group.trimmed(position)).await.ok();
        Ok(offset)
    }
}

impl Replica {
    /// First offset that is kept. Segments go a little after the entry that says so is applied, later
    /// on some replicas than on others; what is told never goes back with another leader.
    pub(super) fn log_start(&self) -> Offset {
        let told = (*self.machine.log_start().borrow()).map_or(Offset(0), |start| Offset(start.offset));
        self.group.log().log_start().max(told)
    }

    fn trim_offset(&self, before: TrimBefore) -> Result<Offset, wire::Error> {
        let readable = *self.group.readable().borrow();
        let before = match (before, readable.index) {
            (TrimBefore::Offset(offset), _) => offset,
            (TrimBefore::TimeMs(_), None) => Offset(0),
            (TrimBefore::TimeMs(time_ms), Some(through)) => {
                let found = self.group.log().offset_at_time(time_ms, through);
                found.map_err(|cause| self.read_error(cause))?
            }
        };
        if before > readable.next_offset {
            let message = format_args!("{} ends at offset {}, before {before}", self.name(), readable.next_offset);
            return Err(wire::Error { field: "before".to_owned(), ..error(ErrorCode::OffsetOutOfRange, message) });
        }
        match self.first_holder() {
            Some(holder) if holder.floor < before => {
                let (name, remedy) = (self.name(), holder.remedy(&self.topic.name));
                let message = format!("{name} cannot be trimmed to {before}: it is held by {holder}; {remedy}");
                Err(invalid("before", message))
            }
            _ => Ok(before),
        }
    }

    pub(super) async fn propose_log_start(&self, submissions: &mpsc::WeakSender<Submission>) {
        let (Some(term), Some(submissions)) = (self.leading_term(), submissions.upgrade()) else { return };
        let limit = |value: u64| (value > 0).then_some(value);
        let settings = self.settings();
        // By a clock that is wrong, everything may look old.
        let age_ms = limit(settings.retention_ms).filter(|_| self.services.clock_is_sound());
        let (size, floor) = (limit(settings.retention_bytes), self.retention_floor());
        let point = self.group.log().retention_point(self.services.now_ms(), age_ms, size, floor);
        let Some((position, offset)) = point else { return };
        let start = wire::LogStart { term: position.term.0, index: position.index.0, offset: offset.0 };
        let known = *self.machine.log_start().borrow();
        if known.is_some_and(|known| known.index >= start.index) {
            return;
        }
        if let Err(refused) = self.propose_start(&submissions, term, start).await {
            // The next round looks again.
            tracing::debug!(partition = self.name(), refused = refused.message, "log start not moved");
        }
    }

    /// Returns when the new start is applied here.
    async fn propose_start(
        &self,
        submissions: &mpsc::Sender<Submission>,
        term: Term,
        start: wire::LogStart,
    ) -> Result<(), wire::Error> {
        let record = wire::ControlRecord { log_start: Some(start), ..Default::default() };
        let (reply, placed) = oneshot::channel();
        submissions
            .try_send(Submission::Control { term, record, reply })
            .map_err(|_| overloaded(format_args!("{} has too many batches in line", self.name())))?;
        // The submission task drops what it has not proposed when it ends.
        let proposal = placed.await.map_err(|_| self.not_leader())?;
        let proposal = proposal.map_err(|cause| self.propose_error(&cause, false))?;
        planted::crash_point("retention-proposed");
        proposal.await.map(drop).map_err(|cause| self.propose_error(&cause, true))
    }

    async fn trim_log(&self, start: Option<wire::LogStart>) {
        let Some(start) = start else { return };
        let through = LogPosition { term: Term(start.term), index: RaftIndex(start.index) };
        if self.group.log().purged() >= Some(through) {
            return;
        }
        match self.group.trim(through).await {
            Ok(()) => tracing::info!(
                topic = self.topic.name,
                partition = self.partition.0,
                log_start = start.offset,
                "log trimmed"
            ),
            // Tried again with the next round.
            Err(error) => tracing::warn!(
                topic = self.topic.name,
                partition = self.partition.0,
                %error,
                "log not trimmed"
            ),
        }
    }
}
