//! A line of batches to one partition: a supply of batches, and the flight that sends them.
//!
//! ```text
//!   supply --next--> flight --> connection          whoever kicks runs a round: takes in what
//!      ^                ^           |               happened, then moves batches as far as
//!    callers         happened <-- answers           there is room
//! ```
//!
//! No task stands between a caller and the socket, nor between an answer and who waits for it: a
//! round is run by the thread that has something to tell, unless one is being run, which then
//! goes on with another. What must be waited for (a leader, a pause, a linger, a time-out) is the
//! part of the driver, one task per line.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures_util::{StreamExt, future::BoxFuture, stream::FuturesUnordered};
use tokio::{
    sync::Notify,
    time::{Instant, sleep_until},
};

use crate::flight::{Flight, Happened, Hear, Item};

/// When a change of the supply matters to the flight.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Leaves {
    /// Something leaves now, on the thread of the caller.
    Now,
    /// Something leaves when the caller's task gives way, with what it adds until then.
    Soon,
    /// Nothing leaves before its linger ends or something else happens.
    Later,
}

/// Where the batches of a line come from.
pub(crate) trait Supply: Send + 'static {
    /// A batch that is not finished.
    type Batch;

    /// The next batch that should leave when so many are under way.
    fn next(&mut self, under_way: usize) -> Option<Self::Batch>;

    /// Finishes a batch; not in a hurry, nobody waits for the supply meanwhile.
    fn finish(batch: Self::Batch) -> Item;

    /// When a batch should leave that need not leave now.
    fn due(&self) -> Option<Instant>;

    /// Whether nothing is there.
    fn is_empty(&self) -> bool;
}

pub(crate) struct Line<S> {
    front: Mutex<Front<S>>,
    flight: Mutex<Flight>,
    happened: Mutex<Vec<Happened>>,
    waits: Mutex<Vec<BoxFuture<'static, Happened>>>,
    kick_count: AtomicUsize,
    driver: Notify,
    /// The driver of a busy line looks for time-outs this often.
    tick: Duration,
}

struct Front<S> {
    supply: S,
    /// When the driver looks next; `None`: when it is called.
    driver_wakes: Option<Instant>,
    /// Whether the flight could take a batch after the last round.
    has_room: bool,
    closed: bool,
}

impl<S: Supply> Front<S> {
    /// Whether the driver must be called to see to what is there. A batch that `leaves` now needs
    /// no look at its linger; without room it leaves with an answer.
    fn wakes_driver(&mut self, leaves: bool) -> bool {
        let due = self.supply.due().filter(|_| self.has_room && !leaves);
        let wakes = match (self.driver_wakes, due) {
            (None, due) => due.or_else(|| (!self.supply.is_empty()).then(Instant::now)),
            (Some(wakes), Some(due)) if due < wakes => Some(due),
            _ => return false,
        };
        self.driver_wakes = wakes.or(self.driver_wakes);
        wakes.is_some()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A line in use. When the last handle is gone, what is in the line is still sent.
pub(crate) struct LineHandle<S: Supply>(Arc<Line<S>>);

impl<S: Supply> Drop for LineHandle<S> {
    fn drop(&mut self) {
        lock(&self.0.front).closed = true;
        self.0.driver.notify_one();
    }
}

impl<S: Supply> LineHandle<S> {
    /// Opens a line, whose flight is made of the way to tell it what happened.
    pub(crate) fn open(supply: S, tick: Duration, flight: impl FnOnce(Hear) -> Flight) -> Self {
        let line = Arc::new_cyclic(|line: &Weak<Line<S>>| {
            let line = line.clone();
            let hear = move |happened| {
                if let Some(line) = line.upgrade() {
                    lock(&line.happened).push(happened);
                    line.kick();
                }
            };
            Line {
                front: Mutex::new(Front { supply, driver_wakes: None, has_room: true, closed: false }),
                flight: Mutex::new(flight(Arc::new(hear))),
                happened: Mutex::default(),
                waits: Mutex::default(),
                kick_count: AtomicUsize::new(0),
                driver: Notify::new(),
                tick,
            }
        });
        tokio::spawn(line.clone().drive());
        Self(line)
    }

    /// Changes the supply with `with`, which says when something should leave.
    pub(crate) fn add<T>(&self, with: impl FnOnce(&mut S) -> (T, Leaves)) -> T {
        let line = &self.0;
        let mut front = lock(&line.front);
        let (out, leaves) = with(&mut front.supply);
        let wakes = front.wakes_driver(leaves == Leaves::Now) || leaves == Leaves::Soon;
        drop(front);
        if leaves == Leaves::Now {
            line.kick();
        }
        if wakes {
            line.driver.notify_one();
        }
        out
    }

    /// Whether nothing is in the line.
    pub(crate) fn is_empty(&self) -> bool {
        lock(&self.0.flight).is_empty() && lock(&self.0.front).supply.is_empty()
    }
}

impl<S: Supply> Line<S> {
    /// Runs a round, or has whoever runs one run another.
    fn kick(&self) {
        if self.kick_count.fetch_add(1, Ordering::AcqRel) > 0 {
            return;
        }
        let mut seen = 1;
        loop {
            self.round();
            match self.kick_count.compare_exchange(seen, 0, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => break,
                Err(count) => seen = count,
            }
        }
    }

    fn round(&self) {
        let mut flight = lock(&self.flight);
        let happened = std::mem::take(&mut *lock(&self.happened));
        for happened in happened {
            flight.act(happened);
        }
        flight.pump();
        while flight.has_room() {
            let mut front = lock(&self.front);
            let Some(batch) = front.supply.next(flight.len()) else { break };
            drop(front);
            flight.push(S::finish(batch));
        }
        let waits = flight.waits();
        let mut front = lock(&self.front);
        front.has_room = flight.has_room();
        let wakes = front.wakes_driver(false);
        drop((front, flight));
        let has_waits = !waits.is_empty();
        lock(&self.waits).extend(waits);
        if wakes || has_waits {
            self.driver.notify_one();
        }
    }

    /// Does the waiting, until the line is closed and empty.
    async fn drive(self: Arc<Self>) {
        let mut waits = FuturesUnordered::new();
        loop {
            waits.extend(std::mem::take(&mut *lock(&self.waits)));
            let Some(wakes) = self.rest() else { break };
            tokio::select! {
                () = self.driver.notified() => {}
                Some(happened) = waits.next() => lock(&self.happened).push(happened),
                () = until(wakes) => {}
            }
            self.kick();
        }
    }

    /// When the driver has to look next; nothing when there will be nothing to look for.
    fn rest(&self) -> Option<Option<Instant>> {
        let flight = lock(&self.flight);
        let mut front = lock(&self.front);
        let is_empty = flight.is_empty() && front.supply.is_empty();
        if is_empty && front.closed {
            return None;
        }
        front.driver_wakes = (!is_empty).then(|| {
            let tick = Instant::now() + self.tick;
            let linger_end = front.supply.due().filter(|_| flight.has_room());
            [linger_end, flight.due()].into_iter().flatten().fold(tick, Instant::min)
        });
        Some(front.driver_wakes)
    }
}

async fn until(end: Option<Instant>) {
    match end {
        Some(end) => sleep_until(end).await,
        None => std::future::pending().await,
    }
}
