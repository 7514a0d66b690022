//! The one task that proposes: what it is given is checked, admitted and proposed in order.

use std::sync::Arc;

use arqon_proto::{Batch, BatchKind, Offset, Term, wire, wire::Stamps};
use arqon_raft::{Applied, Proposal, ProposeError};
use prost::Message;
use tokio::{
    runtime::Handle,
    sync::{mpsc, oneshot, watch},
};

use super::Replica;
use crate::state::{Admission, InFlight, PartitionState, Refused};

/// Something to propose.
pub(super) enum Submission {
    /// A checked data batch.
    Data { batch: Batch, stamps: Option<Arc<Stamps>>, reply: oneshot::Sender<Result<Placed, Unplaced>> },
    /// Queue commands that are right in `term`.
    Control { term: Term, record: wire::ControlRecord, reply: oneshot::Sender<Result<Proposal, ProposeError>> },
}

/// A batch that was proposed.
pub(super) struct Placed {
    proposal: Option<Proposal>,
    /// Offset and time that it gets if this node stays leader.
    pub base_offset: Offset,
    pub time_ms: u64,
}

impl Placed {
    /// Waits until the batch is applied.
    pub(super) async fn applied(mut self) -> Result<Applied, ProposeError> {
        let outcome = self.proposal.as_mut().expect("only the end of a `Placed` takes it").await;
        self.proposal = None;
        outcome
    }
}

impl Drop for Placed {
    /// A proposal counts against the bytes in flight until it is dropped. When nobody waits for
    /// the outcome any more, the batch is in flight all the same.
    fn drop(&mut self) {
        if let (Some(proposal), Ok(runtime)) = (self.proposal.take(), Handle::try_current()) {
            runtime.spawn(proposal);
        }
    }
}

/// Why a batch was not proposed.
#[derive(Debug)]
pub(super) enum Unplaced {
    Refused(Refused),
    Failed(wire::Error),
}

/// Runs until `closing` turns true or all senders are gone.
pub(super) async fn run(
    replica: Arc<Replica>,
    mut submissions: mpsc::Receiver<Submission>,
    mut closing: watch::Receiver<bool>,
) {
    loop {
        let submission = tokio::select! {
            biased;
            _ = closing.wait_for(|is_closing| *is_closing) => return,
            submission = submissions.recv() => submission,
        };
        match submission {
            None => return,
            Some(Submission::Data { batch, stamps, reply }) => {
                let size = batch.header.batch_size();
                let placed = replica.place(batch, stamps.as_deref()).await;
                replica.release(size);
                // Whoever stopped waiting does not need the answer.
                let _ = reply.send(placed);
            }
            Some(Submission::Control { term, record, reply }) => {
                let _ = reply.send(replica.propose_control(term, &record).await);
            }
        }
    }
}

impl Replica {
    async fn place(&self, mut batch: Batch, stamps: Option<&Stamps>) -> Result<Placed, Unplaced> {
        let term = self.require_leader().map_err(Unplaced::Failed)?;
        if let Some(refusal) = self.refuses(batch.header.batch_size()) {
            // What is written already is still a duplicate: whoever repeats a batch must learn that.
            let check =
                |state: &PartitionState, in_flight: &mut InFlight| in_flight.check(state, &batch.header, stamps);
            if let Err(known @ (Refused::Duplicate(_) | Refused::InFlight)) = self.with_in_flight(term, check) {
                return Err(Unplaced::Refused(known));
            }
            return Err(Unplaced::Failed(refusal));
        }
        let admit = |state: &PartitionState, in_flight: &mut InFlight| {
            in_flight.admit(state, &batch.header, stamps, self.services.now_ms())
        };
        let admission = self.with_in_flight(term, admit).map_err(Unplaced::Refused)?;
        batch.header.time_ms = admission.time_ms;
        batch.header.base_offset = Offset(0);
        let header = batch.header.clone();
        let Admission { time_ms, base_offset, .. } = admission;
        match self.group.propose(term, batch).await {
            Ok(proposal) => Ok(Placed { proposal: Some(proposal), base_offset, time_ms }),
            Err(cause) => {
                // After an unknown outcome it may still be applied: it stays in flight.
                if !matches!(cause, ProposeError::UnknownOutcome(_)) {
                    self.machine.lock().in_flight.withdraw(&header, stamps, admission);
                }
                Err(Unplaced::Failed(self.propose_error(&cause, false)))
            }
        }
    }

    async fn propose_control(&self, term: Term, record: &wire::ControlRecord) -> Result<Proposal, ProposeError> {
        let mut batch = Batch::internal(BatchKind::Control, record.encode_to_vec().into());
        batch.header.time_ms =
            self.with_in_flight(term, |state, in_flight| in_flight.time_ms(state, self.services.now_ms()));
        self.group.propose(term, batch).await
    }

    fn with_in_flight<T>(&self, term: Term, visit: impl FnOnce(&PartitionState, &mut InFlight) -> T) -> T {
        // Read before the lock: the log has one of its own.
        let next_offset = self.group.log().next_offset();
        let mut shared = self.machine.lock();
        let shared = &mut *shared;
        shared.in_flight.begin(term, next_offset);
        visit(&shared.state, &mut shared.in_flight)
    }
}
