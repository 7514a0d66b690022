//! The state as Raft's state machine, shared with the leader that checks against it.

use std::sync::{Arc, Mutex, MutexGuard};

use arqon_proto::{Batch, DecodeError, wire};
use arqon_raft::StateMachine;
use bytes::Bytes;
use tokio::sync::watch;

use super::{InFlight, PartitionState};

/// Applied and in flight under one lock, so that an entry is in exactly one of the two.
#[derive(Debug, Default)]
pub(crate) struct Shared {
    /// What the applied entries made.
    pub state: PartitionState,
    /// What the leader here has proposed.
    pub in_flight: InFlight,
}

/// The handle that Raft drives; the partition keeps a clone.
#[derive(Clone, Debug, Default)]
pub(crate) struct PartitionMachine {
    shared: Arc<Mutex<Shared>>,
    log_start: watch::Sender<Option<wire::LogStart>>,
}

impl PartitionMachine {
    /// The state, for as long as the guard lives: never across an await.
    ///
    /// # Panics
    /// When applying an entry has panicked: the state is then worth nothing.
    pub(crate) fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().expect("the state is dropped with the program once applying an entry has panicked")
    }
}

impl PartitionMachine {
    /// Follows up to where the log is to be trimmed.
    pub(crate) fn log_start(&self) -> watch::Receiver<Option<wire::LogStart>> {
        self.log_start.subscribe()
    }

    fn publish_log_start(&self, start: Option<wire::LogStart>) {
        self.log_start.send_if_modified(|known| std::mem::replace(known, start) != start);
    }
}

impl StateMachine for PartitionMachine {
    fn apply(&mut self, batch: &Batch) -> Result<Bytes, DecodeError> {
        let mut shared = self.lock();
        let outcome = shared.state.apply(batch)?;
        shared.in_flight.applied(batch);
        let log_start = shared.state.log_start();
        drop(shared);
        self.publish_log_start(log_start);
        Ok(outcome)
    }

    fn checkpoint(&self) -> Bytes {
        self.lock().state.checkpoint()
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), DecodeError> {
        let state = PartitionState::restore(state)?;
        self.publish_log_start(state.log_start());
        *self.lock() = Shared { state, in_flight: InFlight::default() };
        Ok(())
    }

    fn fresh(&self) -> Box<dyn StateMachine> {
        Box::new(Self::default())
    }
}
