//! What is kept of a log, and for how long.
//!
//! The leader looks where whole segments may expire and proposes the new log start; every
//! replica trims its own log when that is applied. So the log start is the same everywhere, and
//! never goes back, whoever leads next.

use std::{sync::Arc, time::Duration};

use arqon_proto::{Offset, RaftIndex, Term, wire};
use arqon_storage::LogPosition;
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::{MissedTickBehavior, interval},
};

use super::{Replica, submit::Submission};

const CHECK_INTERVAL: Duration = Duration::from_secs(2);

/// Runs until `closing` turns true.
pub(super) async fn run(
    replica: Arc<Replica>,
    submissions: mpsc::WeakSender<Submission>,
    mut closing: watch::Receiver<bool>,
) {
    let mut log_start = replica.machine.log_start();
    let mut ticks = interval(CHECK_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let is_tick = tokio::select! {
            biased;
            _ = closing.wait_for(|is_closing| *is_closing) => return,
            _ = log_start.changed() => false,
            _ = ticks.tick() => true,
        };
        let target = *log_start.borrow_and_update();
        let round = async {
            if is_tick {
                replica.propose_log_start(&submissions).await;
            }
            replica.trim(target).await;
        };
        tokio::select! {
            _ = closing.wait_for(|is_closing| *is_closing) => return,
            () = round => {}
        }
    }
}

impl Replica {
    /// Retention must not pass this offset: a queue group has jobs from here on unsettled.
    fn retention_floor(&self) -> Offset {
        let shared = self.machine.lock();
        let floors = shared.state.queues().map(|(_, queue)| queue.floor());
        Offset(floors.min().unwrap_or(u64::MAX))
    }

    async fn propose_log_start(&self, submissions: &mpsc::WeakSender<Submission>) {
        let (Some(term), Some(submissions)) = (self.leading_term(), submissions.upgrade()) else { return };
        let limit = |value: u64| (value > 0).then_some(value);
        let (age_ms, size) = (limit(self.topic.retention_ms), limit(self.topic.retention_bytes));
        let point = self.group.log().retention_point(self.services.now_ms(), age_ms, size, self.retention_floor());
        let Some((position, offset)) = point else { return };
        let start = wire::LogStart { term: position.term.0, index: position.index.0, offset: offset.0 };
        let known = *self.machine.log_start().borrow();
        if known.is_some_and(|known| known.index >= start.index) {
            return;
        }
        let record = wire::ControlRecord { log_start: Some(start), ..Default::default() };
        let (reply, placed) = oneshot::channel();
        if submissions.try_send(Submission::Control { term, record, reply }).is_err() {
            return;
        }
        // Whatever becomes of it, the next round looks again.
        if let Ok(Ok(proposal)) = placed.await {
            let _ = proposal.await;
        }
    }

    async fn trim(&self, start: Option<wire::LogStart>) {
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
                "log trimmed by retention"
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
