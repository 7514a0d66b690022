//! Memory that the clients of a node share, and the part of it that each connection may take.
//!
//! | bytes of | all connections | one connection | who waits |
//! |---|---|---|---|
//! | large frames partly received | 32 MiB | one frame | the reader, before it reads on |
//! | requests not answered yet | 64 MiB | 32 MiB | the reader, before the next frame |
//! | answers not sent yet | 64 MiB | a part of what is free, or one answer | the answer, not read from the log yet |
//!
//! Requests that may wait in the node for something to happen (fetches, requests for jobs) take a place each:
//! 16,384 in all, of which a connection takes an eighth of what is free, or 64. More are refused.
//!
//! A connection holds at most a sixteenth of what is free of the answers' memory, and answers are read
//! no larger than that, so dozens of clients that do not read leave room for those that do. Very many
//! of them, or answers that cannot be smaller because they are one large batch, may take all there is:
//! whoever holds memory without any progress is dropped, and after seconds when others wait for it.

use std::{sync::Arc, time::Duration};

use arqon_proto::limits;
use tokio::sync::{Mutex, MutexGuard, OwnedSemaphorePermit, Semaphore};

/// Requests received and not answered yet, per connection, in bytes. More is not read.
const RECEIVED_SIZE_MAX: usize = 32 << 20;
/// The most that one connection holds for answers not sent, whatever is free, in bytes.
const SENDING_SIZE_MAX: usize = 16 << 20;
/// One connection may hold what is free, divided by this, of the memory for answers.
const FREE_PART: usize = 16;
/// Answers are not made smaller than this when memory is short, in bytes.
const ANSWER_SIZE_LOW: usize = 64 << 10;
/// One connection may have as many places for requests that wait as are free, divided by this.
const FREE_REQUESTS_PART: usize = 8;
/// A connection may have so many of them while there are any.
const REQUEST_COUNT_LOW: usize = 64;
/// A client without progress is dropped after this time.
const STALL_MAX: Duration = Duration::from_secs(30);
/// The same while others wait for the memory that it holds.
const STALL_MAX_SHORT: Duration = Duration::from_secs(5);

/// Memory for the clients of one node.
pub(super) struct Budget {
    frames: Arc<Semaphore>,
    received: Arc<Semaphore>,
    sending: Arc<Semaphore>,
    requests: Arc<Semaphore>,
}

impl Budget {
    pub(super) fn new() -> Self {
        Self {
            frames: Arc::new(Semaphore::new(limits::PARTIAL_FRAMES_TOTAL_MAX)),
            received: Arc::new(Semaphore::new(limits::RECEIVED_TOTAL_MAX)),
            sending: Arc::new(Semaphore::new(limits::SENDING_TOTAL_MAX)),
            requests: Arc::new(Semaphore::new(limits::REQUESTS_TOTAL_MAX)),
        }
    }

    /// Memory for one frame of `size` bytes, in the order in which connections ask.
    pub(super) async fn frame(&self, size: usize) -> Option<OwnedSemaphorePermit> {
        acquire(&self.frames, size).await
    }

    /// How long a frame may not grow.
    pub(super) fn frame_stall_max(&self) -> Duration {
        stall_max(&self.frames)
    }

    /// How long a client may not read.
    pub(super) fn sending_stall_max(&self) -> Duration {
        stall_max(&self.sending)
    }
}

// Those who wait have taken what was left: nothing is free then.
fn stall_max(semaphore: &Semaphore) -> Duration {
    if semaphore.available_permits() == 0 { STALL_MAX_SHORT } else { STALL_MAX }
}

// `None` is for a closed semaphore; none of these is ever closed.
async fn acquire(semaphore: &Arc<Semaphore>, size: usize) -> Option<OwnedSemaphorePermit> {
    semaphore.clone().acquire_many_owned(u32::try_from(size).ok()?).await.ok()
}

fn try_acquire(semaphore: &Arc<Semaphore>, size: usize) -> Option<OwnedSemaphorePermit> {
    semaphore.clone().try_acquire_many_owned(u32::try_from(size).ok()?).ok()
}

/// What one connection holds of the budget.
pub(super) struct Share {
    budget: Arc<Budget>,
    received: Arc<Semaphore>,
    sending: Arc<Semaphore>,
    waiting: Arc<Semaphore>,
    turn: Mutex<()>,
}

/// Memory or a place, of the connection and of the node, until it is dropped.
pub(super) struct Room {
    _of_connection: OwnedSemaphorePermit,
    _of_node: OwnedSemaphorePermit,
}

/// The right to take room for an answer: one answer of a connection waits, the others wait for
/// their turn.
pub(super) struct Turn<'a> {
    _guard: MutexGuard<'a, ()>,
}

impl Share {
    pub(super) fn new(budget: Arc<Budget>) -> Self {
        Self {
            budget,
            received: Arc::new(Semaphore::new(RECEIVED_SIZE_MAX)),
            sending: Arc::new(Semaphore::new(SENDING_SIZE_MAX)),
            waiting: Arc::new(Semaphore::new(limits::CONNECTION_REQUEST_COUNT_MAX)),
            turn: Mutex::new(()),
        }
    }

    /// A place for one more request that may wait.
    pub(super) fn try_wait(&self) -> Option<Room> {
        let requests = &self.budget.requests;
        let count_max = (requests.available_permits() / FREE_REQUESTS_PART).max(REQUEST_COUNT_LOW);
        let count = limits::CONNECTION_REQUEST_COUNT_MAX - self.waiting.available_permits();
        if count >= count_max {
            return None;
        }
        Some(Room { _of_node: try_acquire(requests, 1)?, _of_connection: try_acquire(&self.waiting, 1)? })
    }

    /// Waits until a request of `size` bytes may be kept.
    pub(super) async fn received(&self, size: usize) -> Option<Room> {
        let size = size.min(RECEIVED_SIZE_MAX);
        let of_connection = acquire(&self.received, size).await?;
        Some(Room { _of_connection: of_connection, _of_node: acquire(&self.budget.received, size).await? })
    }

    /// The turn, when no answer waits.
    pub(super) fn try_turn(&self) -> Option<Turn<'_>> {
        self.turn.try_lock().ok().map(|guard| Turn { _guard: guard })
    }

    /// Waits for the turn.
    pub(super) async fn turn(&self) -> Turn<'_> {
        Turn { _guard: self.turn.lock().await }
    }

    /// How large an answer should be at most, now, in bytes.
    pub(super) fn answer_size_max(&self) -> usize {
        self.part().max(ANSWER_SIZE_LOW)
    }

    /// Room for an answer of `size` bytes, if it is there.
    pub(super) fn try_room(&self, _turn: &Turn<'_>, size: usize) -> Option<Room> {
        let size = size.min(SENDING_SIZE_MAX);
        let of_connection = try_acquire(&self.sending, self.free_for(size))?;
        Some(Room { _of_node: try_acquire(&self.budget.sending, size)?, _of_connection: cut(of_connection, size) })
    }

    /// Waits for room for an answer of `size` bytes.
    pub(super) async fn room(&self, _turn: &Turn<'_>, size: usize) -> Option<Room> {
        let size = size.min(SENDING_SIZE_MAX);
        let of_connection = cut(acquire(&self.sending, self.free_for(size)).await?, size);
        Some(Room { _of_node: acquire(&self.budget.sending, size).await?, _of_connection: of_connection })
    }

    // Bytes of answers that this connection may hold.
    fn part(&self) -> usize {
        (self.budget.sending.available_permits() / FREE_PART).min(SENDING_SIZE_MAX)
    }

    // What must be free of the connection's own memory so that `size` more keep within its part:
    // all of it when the answer alone is larger than that.
    fn free_for(&self, size: usize) -> usize {
        SENDING_SIZE_MAX - self.part().saturating_sub(size)
    }
}

fn cut(mut permit: OwnedSemaphorePermit, size: usize) -> OwnedSemaphorePermit {
    let surplus = permit.num_permits().saturating_sub(size);
    drop(permit.split(surplus));
    permit
}

#[cfg(test)]
mod tests {
    use super::*;

    const ANSWER_SIZE: usize = 1 << 20;

    fn take_all(share: &Share) -> Vec<Room> {
        let turn = share.try_turn().unwrap();
        std::iter::from_fn(|| share.try_room(&turn, share.answer_size_max().min(ANSWER_SIZE))).collect()
    }

    #[test]
    fn deaf_connections_leave_room_for_others() {
        let budget = Arc::new(Budget::new());
        let shares: Vec<_> = (0..64).map(|_| Share::new(budget.clone())).collect();
        let held: Vec<_> = shares.iter().map(take_all).collect();
        assert!(held.iter().all(|held| !held.is_empty()), "each has an answer on its way");
        let other = Share::new(budget.clone());
        let size = other.answer_size_max();
        let turn = other.try_turn().unwrap();
        assert!(other.try_room(&turn, size).is_some(), "{size} bytes");
        drop(held);
        assert_eq!(budget.sending.available_permits(), limits::SENDING_TOTAL_MAX, "all of it came back");
    }

    #[tokio::test]
    async fn requests_of_all_connections_keep_within_the_budget() {
        let budget = Arc::new(Budget::new());
        let mut held = Vec::new();
        for _ in 0..limits::RECEIVED_TOTAL_MAX / RECEIVED_SIZE_MAX {
            held.push(Share::new(budget.clone()).received(usize::MAX).await);
        }
        let late = Share::new(budget.clone());
        let mut waiting = std::pin::pin!(late.received(1));
        assert!(is_pending(waiting.as_mut()).await, "nothing is left");
        held.pop();
        assert!(waiting.await.is_some());
    }

    async fn is_pending<T>(mut future: std::pin::Pin<&mut impl Future<Output = T>>) -> bool {
        std::future::poll_fn(|context| std::task::Poll::Ready(future.as_mut().poll(context).is_pending())).await
    }

    #[tokio::test]
    async fn whoever_stalls_goes_early_when_others_wait() {
        let budget = Budget::new();
        let held = budget.frame(limits::PARTIAL_FRAMES_TOTAL_MAX - 1).await;
        assert_eq!(budget.frame_stall_max(), STALL_MAX);
        let mut waiting = std::pin::pin!(budget.frame(2));
        assert!(is_pending(waiting.as_mut()).await);
        assert_eq!(budget.frame_stall_max(), STALL_MAX_SHORT);
        drop(held);
        assert!(waiting.await.is_some());
    }

    #[test]
    fn connections_that_wait_for_much_leave_places_for_others() {
        let budget = Arc::new(Budget::new());
        let take_all = |share: &Share| {
            let places = (0..limits::CONNECTION_REQUEST_COUNT_MAX).map_while(|_| share.try_wait());
            places.collect::<Vec<_>>()
        };
        let shares: Vec<_> = (0..16).map(|_| Share::new(budget.clone())).collect();
        let held: Vec<_> = shares.iter().map(take_all).collect();
        assert!(held[0].len() > 1_000, "{}", held[0].len());
        let late = take_all(&Share::new(budget.clone()));
        assert!(late.len() >= REQUEST_COUNT_LOW, "{}", late.len());
        drop((held, late));
        assert_eq!(budget.requests.available_permits(), limits::REQUESTS_TOTAL_MAX);
    }
}
