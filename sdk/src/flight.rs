//! The batches of one partition on their way: pipelined, in order, resent until resolved.
//!
//! ```text
//!   resolved | sent sent sent | waiting waiting ...
//!            ^ front          ^ window ends here
//! ```
//!
//! As soon as one answer asks for a retry, nothing more is sent until every sent batch is
//! answered; then all unresolved ones are sent again, oldest first, to whoever leads now. So a
//! partition never sees a batch before one that was handed in earlier.
//!
//! Nothing here waits: what must be waited for is handed out as a future ([`Flight::waits`]) whose
//! outcome comes back to [`Flight::act`], and answers come through [`Hear`]. See line.rs.
//!
//! With a [`Stamping`] the flight numbers the records itself. When a batch is given up, its
//! sequences would leave a gap: the epoch is raised and what follows is numbered anew. A batch
//! that may have been written is never sent under a new epoch.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use arqon_proto::{Batch, ProducerStamp, wire};
use bytes::Bytes;
use futures_util::future::{BoxFuture, FutureExt};
use tokio::time::{Instant, sleep, timeout_at};
use wire::{ErrorCode, frame::Body};

use crate::{
    Error,
    connection::{Answer, Connection, Reply, StartError},
    retry::{Backoff, Verdict, judge},
    router::{Router, Target, timed_out},
    spare::Spare,
};

/// Takes the outcome of one batch.
pub(crate) type Done = Box<dyn FnOnce(Result<wire::Produced, Error>) + Send>;

/// The bytes of one batch.
pub(crate) enum Payload {
    /// Made elsewhere; `safe` says whether the Spine notices when it comes twice.
    Encoded { bytes: Bytes, safe: bool },
    /// Numbered and encoded by the flight.
    Batch(Batch),
}

/// One batch to be produced.
pub(crate) struct Item {
    pub(crate) produce: wire::Produce,
    pub(crate) payload: Payload,
    pub(crate) deadline: Instant,
    pub(crate) done: Done,
    /// Takes the memory of the records back when they are resolved.
    pub(crate) spare: Option<Arc<Spare>>,
}

/// The producer whose sequences the flight assigns.
pub(crate) struct Stamping {
    pub(crate) id: [u8; 16],
    pub(crate) epoch: u32,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    Waiting,
    Sent,
    /// Given up, its sequence is a gap.
    Failed,
    Resolved,
}

struct Slot {
    id: u64,
    produce: wire::Produce,
    payload: Payload,
    deadline: Instant,
    done: Option<Done>,
    spare: Option<Arc<Spare>>,
    state: State,
    /// How often it was sent, to tell a late answer.
    attempt: u32,
    /// The request under way.
    sent: Option<Sent>,
    /// Whether an earlier sending may have been written.
    unclear: bool,
    /// Whether it was numbered anew already because the Spine did not know its sequence.
    renumbered: bool,
    sequence: Option<u64>,
}

struct Sent {
    connection: Arc<Connection>,
    request: u64,
    end: Instant,
}

enum Phase {
    Idle,
    Connecting,
    Open(Arc<Connection>),
    /// Waits for the answers under way, then pauses.
    Draining(Duration),
    Pausing,
}

/// What a flight learns from outside.
pub(crate) enum Happened {
    Answered { id: u64, attempt: u32, result: Result<Answer, Error> },
    Connected(Result<Arc<Connection>, Error>),
    Rested,
    Room,
}

/// Brings what happened to the flight; called from anywhere, must not block.
pub(crate) type Hear = Arc<dyn Fn(Happened) + Send + Sync>;

/// See the module.
pub(crate) struct Flight {
    router: Arc<Router>,
    target: Target,
    name: String,
    window: usize,
    slots: VecDeque<Slot>,
    next_id: u64,
    stamping: Option<Stamping>,
    next_sequence: u64,
    renumber: bool,
    fenced: Option<Error>,
    phase: Phase,
    waits_for_room: bool,
    backoff: Backoff,
    last_error: String,
    hear: Hear,
    waits: Vec<BoxFuture<'static, Happened>>,
}

impl Flight {
    pub(crate) fn new(
        router: Arc<Router>,
        topic: &str,
        partition: u32,
        window: usize,
        stamping: Option<Stamping>,
        hear: Hear,
    ) -> Self {
        Self {
            target: Target::Leader { topic: topic.to_owned(), partition },
            name: format!("produce to {topic}/{partition}"),
            backoff: Backoff::new(&router.options),
            router,
            window,
            slots: VecDeque::new(),
            next_id: 0,
            stamping,
            next_sequence: 0,
            renumber: false,
            fenced: None,
            phase: Phase::Idle,
            waits_for_room: false,
            last_error: "no answer".to_owned(),
            hear,
            waits: Vec::new(),
        }
    }

    /// Whether another item may be pushed.
    pub(crate) fn has_room(&self) -> bool {
        self.slots.len() < self.window
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// Batches under way.
    pub(crate) fn len(&self) -> usize {
        self.slots.len()
    }

    /// Adds a batch behind all others.
    pub(crate) fn push(&mut self, item: Item) {
        if let Some(fenced) = &self.fenced {
            return (item.done)(Err(fenced.clone()));
        }
        self.next_id += 1;
        self.slots.push_back(Slot {
            id: self.next_id,
            produce: item.produce,
            payload: item.payload,
            deadline: item.deadline,
            done: Some(item.done),
            spare: item.spare,
            state: State::Waiting,
            attempt: 0,
            sent: None,
            unclear: false,
            renumbered: false,
            sequence: None,
        });
        self.pump();
    }

    /// What has to be waited for since the last call.
    pub(crate) fn waits(&mut self) -> Vec<BoxFuture<'static, Happened>> {
        std::mem::take(&mut self.waits)
    }

    /// When the first time-out is due.
    pub(crate) fn due(&self) -> Option<Instant> {
        let due = |slot: &Slot| match (slot.state, &slot.sent) {
            (State::Waiting, _) => Some(slot.deadline),
            (State::Sent, Some(sent)) => Some(sent.end),
            _ => None,
        };
        self.slots.iter().filter_map(due).min()
    }

    /// Acts on what happened.
    pub(crate) fn act(&mut self, happened: Happened) {
        match happened {
            Happened::Answered { id, attempt, result } => self.answered(id, attempt, result),
            Happened::Rested => self.connect(),
            Happened::Room => self.waits_for_room = false,
            Happened::Connected(Ok(connection)) => self.phase = Phase::Open(connection),
            Happened::Connected(Err(error)) => {
                if judge(&error) == Verdict::Final {
                    self.phase = Phase::Idle;
                    self.fail_all(&error);
                } else {
                    self.retry(&error);
                }
            }
        }
        self.pump();
    }

    fn answered(&mut self, id: u64, attempt: u32, result: Result<Answer, Error>) {
        let is_awaited = |slot: &Slot| slot.id == id && slot.attempt == attempt && slot.state == State::Sent;
        let Some(index) = self.slots.iter().position(is_awaited) else { return };
        self.slots[index].sent = None;
        let result = match result {
            Ok((Body::Produced(produced), _)) => Ok(produced),
            Ok((Body::Error(error), _)) => Err(Error::from(error)),
            Ok(_) => Err(Error::unexpected("the leader")),
            Err(error) => Err(error),
        };
        let error = match result {
            Ok(produced) => {
                self.backoff.reset();
                return self.resolve(index, produced);
            }
            Err(error) => error,
        };
        let is_front = self.slots.iter().take(index).all(|slot| slot.state == State::Resolved);
        let slot = &mut self.slots[index];
        match error.code() {
            Some(ErrorCode::Duplicate) if slot.unclear => match remembered_offset(&error) {
                Some(base_offset) => {
                    let durability = slot.produce.durability;
                    self.resolve(index, wire::Produced { base_offset, time_ms: 0, durability });
                }
                None => self.fail(index, &error),
            },
            Some(ErrorCode::OutOfOrder | ErrorCode::UnknownProducer) if !is_front => {
                // It only came too early: one before it is not written yet.
                slot.state = State::Waiting;
                self.retry(&error);
            }
            Some(ErrorCode::OutOfOrder | ErrorCode::UnknownProducer)
                if self.stamping.is_some() && !slot.unclear && !slot.renumbered =>
            {
                slot.state = State::Waiting;
                slot.renumbered = true;
                self.renumber = true;
                self.retry(&error);
            }
            Some(ErrorCode::ProducerFenced) if self.stamping.is_some() => {
                self.fenced = Some(error.clone());
                self.fail_all(&error);
            }
            _ => self.failed_or_again(index, &error),
        }
    }

    fn failed_or_again(&mut self, index: usize, error: &Error) {
        let safe = match &self.slots[index].payload {
            Payload::Encoded { safe, .. } => *safe,
            Payload::Batch(_) => self.stamping.is_some(),
        };
        let slot = &mut self.slots[index];
        match judge(error) {
            Verdict::Final => self.fail(index, error),
            Verdict::Unclear => {
                slot.unclear = true;
                if safe {
                    slot.state = State::Waiting;
                } else {
                    self.fail(index, &unknown_outcome(error));
                }
                self.retry(error);
            }
            Verdict::NotDone => {
                slot.state = State::Waiting;
                self.retry(error);
            }
        }
    }

    fn resolve(&mut self, index: usize, produced: wire::Produced) {
        let slot = &mut self.slots[index];
        slot.state = State::Resolved;
        if let Some(done) = slot.done.take() {
            done(Ok(produced));
        }
    }

    fn fail(&mut self, index: usize, error: &Error) {
        let slot = &mut self.slots[index];
        slot.state = State::Failed;
        if let Some(done) = slot.done.take() {
            done(Err(error.clone()));
        }
    }

    fn fail_all(&mut self, error: &Error) {
        for index in 0..self.slots.len() {
            if self.slots[index].state == State::Waiting || self.fenced.is_some() {
                let unclear = self.slots[index].unclear;
                self.fail(index, &if unclear { unknown_outcome(error) } else { error.clone() });
            }
        }
    }

    /// Stops sending until all answers are in, then pauses and looks for the leader anew.
    fn retry(&mut self, error: &Error) {
        self.router.learn(&self.target, error);
        self.last_error = error.to_string();
        match self.phase {
            // A round that fails as a whole counts once.
            Phase::Draining(_) | Phase::Pausing => {}
            _ => {
                let pause = self.backoff.after(error);
                tracing::debug!(what = %self.name, %error, pause_ms = pause.as_millis() as u64, "will try again");
                self.phase = Phase::Draining(pause);
            }
        }
    }

    fn connect(&mut self) {
        self.phase = Phase::Connecting;
        let (router, target) = (self.router.clone(), self.target.clone());
        let end = Instant::now() + router.options.attempt_timeout;
        let what = self.name.clone();
        let task = async move {
            let connected = timeout_at(end, router.connect(&target)).await;
            Happened::Connected(connected.unwrap_or_else(|_| {
                Err(Error::Unreachable { servers: what, reason: "no leader answered in time".to_owned() })
            }))
        };
        self.waits.push(task.boxed());
    }

    fn sent_count(&self) -> usize {
        self.slots.iter().filter(|slot| slot.state == State::Sent).count()
    }

    /// Does whatever the state allows without waiting.
    pub(crate) fn pump(&mut self) {
        self.expire();
        self.settle_front();
        if let Phase::Draining(pause) = self.phase
            && self.sent_count() == 0
        {
            self.phase = Phase::Pausing;
            self.waits.push(
                async move {
                    sleep(pause).await;
                    Happened::Rested
                }
                .boxed(),
            );
        }
        if matches!(self.phase, Phase::Idle) && self.slots.iter().any(|slot| slot.state == State::Waiting) {
            self.connect();
        }
        while let Phase::Open(connection) = &self.phase {
            let connection = connection.clone();
            let Some(index) = self.next_to_send() else { break };
            match self.send(&connection, index) {
                Ok(()) => {}
                Err(StartError::Full) => {
                    self.wait_for_room(connection);
                    break;
                }
                Err(StartError::Failed(error)) => match judge(&error) {
                    // Nothing was sent, so nothing is unclear.
                    Verdict::Unclear | Verdict::NotDone => self.retry(&error),
                    Verdict::Final => self.fail(index, &error),
                },
            }
            self.settle_front();
        }
        if let Phase::Draining(_) = self.phase
            && self.sent_count() == 0
        {
            self.pump();
        }
    }

    fn wait_for_room(&mut self, connection: Arc<Connection>) {
        if !std::mem::replace(&mut self.waits_for_room, true) {
            self.waits.push(
                async move {
                    connection.room().await;
                    Happened::Room
                }
                .boxed(),
            );
        }
    }

    /// The oldest waiting batch, unless one before it was given up and leaves a gap.
    fn next_to_send(&self) -> Option<usize> {
        for (index, slot) in self.slots.iter().enumerate() {
            match slot.state {
                State::Waiting => return Some(index),
                State::Failed if self.stamping.is_some() => return None,
                _ => {}
            }
        }
        None
    }

    fn send(&mut self, connection: &Arc<Connection>, index: usize) -> Result<(), StartError> {
        let slot = &mut self.slots[index];
        let pieces = match &mut slot.payload {
            Payload::Encoded { bytes, .. } => vec![bytes.clone()],
            Payload::Batch(batch) => {
                let header = &mut batch.header;
                if let Some(stamping) = &self.stamping {
                    let sequence = *slot.sequence.get_or_insert_with(|| {
                        let sequence = self.next_sequence;
                        self.next_sequence += u64::from(header.record_count);
                        sequence
                    });
                    let stamp = ProducerStamp { id: stamping.id, epoch: stamping.epoch, base_sequence: sequence };
                    header.producer_id = stamp.id;
                    header.producer_epoch = stamp.epoch;
                    header.base_sequence = stamp.base_sequence;
                }
                vec![Bytes::copy_from_slice(&header.encode()), batch.stamps.clone(), batch.records.clone()]
            }
        };
        let (id, attempt, hear) = (slot.id, slot.attempt + 1, self.hear.clone());
        let reply = Reply::Call(Box::new(move |result| hear(Happened::Answered { id, attempt, result })));
        let request = connection.start_for(reply, Body::Produce(slot.produce.clone()), &pieces)?;
        slot.state = State::Sent;
        slot.attempt = attempt;
        let end = slot.deadline.min(Instant::now() + self.router.options.attempt_timeout);
        slot.sent = Some(Sent { connection: connection.clone(), request, end });
        Ok(())
    }

    /// Gives up what waited beyond its deadline, and answers beyond their time.
    fn expire(&mut self) {
        if self.slots.is_empty() {
            return;
        }
        let now = Instant::now();
        for index in 0..self.slots.len() {
            let slot = &self.slots[index];
            if let Some(sent) = slot.sent.as_ref().filter(|sent| sent.end <= now) {
                sent.connection.forget(sent.request);
                let (id, attempt, error) = (slot.id, slot.attempt, sent.connection.no_answer());
                self.answered(id, attempt, Err(error));
            }
            let slot = &self.slots[index];
            if slot.state == State::Waiting && slot.deadline <= now {
                let error = timed_out(&self.name, &self.last_error);
                let error = if slot.unclear { unknown_outcome(&error) } else { error };
                self.fail(index, &error);
            }
        }
    }

    /// Drops what is resolved at the front, and closes the gap that a given-up batch leaves.
    fn settle_front(&mut self) {
        while let Some(front) = self.slots.front() {
            match front.state {
                State::Resolved => {}
                State::Failed if self.stamping.is_none() || front.sequence.is_none() => {}
                State::Failed if self.sent_count() == 0 => {
                    if front.unclear {
                        self.give_up_unclear();
                    }
                    self.new_epoch();
                }
                _ => break,
            }
            let front = self.slots.pop_front();
            if let Some(Slot { payload: Payload::Batch(batch), spare: Some(spare), .. }) = front {
                spare.take_back(batch.records);
            }
        }
        if self.renumber && self.sent_count() == 0 {
            self.new_epoch();
        }
    }

    /// The batches after one of unknown outcome may stand in the log just as well.
    fn give_up_unclear(&mut self) {
        let error = unknown_outcome(&timed_out(&self.name, &self.last_error));
        for index in 1..self.slots.len() {
            if self.slots[index].unclear && self.slots[index].state == State::Waiting {
                self.fail(index, &error);
            }
        }
    }

    fn new_epoch(&mut self) {
        self.renumber = false;
        if let Some(stamping) = &mut self.stamping {
            stamping.epoch += 1;
            self.next_sequence = 0;
            for slot in &mut self.slots {
                slot.sequence = None;
                slot.unclear = false;
            }
        }
    }
}

/// Where a batch that is known as a whole stands.
fn remembered_offset(error: &Error) -> Option<u64> {
    match error {
        Error::Server { details, .. } => details.duplicates.iter().min_by_key(|known| known.sequence)?.offset,
        _ => None,
    }
}

fn unknown_outcome(error: &Error) -> Error {
    if error.code() == Some(ErrorCode::UnknownOutcome) {
        return error.clone();
    }
    Error::server(ErrorCode::UnknownOutcome, format!("the batch may or may not be written ({error})"))
}
