//! What clients asked for and what they were told, in the order in which it happened.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::{system::now_ns, trace};

/// A partition of a topic.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// Name of the topic.
    pub topic: String,
    /// Number of the partition.
    pub partition: u32,
}

/// What a client learned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fact {
    /// A producer begins to send a value.
    Sent,
    /// It is acknowledged at this offset.
    Acked(u64),
    /// It may have been written.
    Unknown(String),
    /// A reader got it at this offset.
    Read(u64),
    /// A reader got bytes that no producer has sent, at this offset.
    ReadGarbage(u64),
    /// A linearizable read, begun at this time in ns, was told that the log ends before this offset.
    Tail(u64, u64),
    /// A worker was told that its job, at this offset, is settled with its result.
    Completed(u64),
    /// A reader ended with an error that it should never see.
    ReaderFailed(String),
}

/// One line of a history.
#[derive(Clone, Debug)]
pub struct Event {
    /// Simulated time in ns.
    pub at_ns: u64,
    /// Number of the client.
    pub client: u64,
    /// Where.
    pub place: Place,
    /// The value, unique in its topic; 0 where there is none.
    pub value: u64,
    /// What happened.
    pub fact: Fact,
}

/// Shared by all clients of a run.
#[derive(Clone, Default)]
pub struct History(Arc<Mutex<Vec<Event>>>);

impl History {
    /// Adds a line.
    pub fn note(&self, client: u64, place: &Place, value: u64, fact: Fact) {
        trace::say(&format!("client {client} {}/{} {value}: {fact:?}", place.topic, place.partition));
        self.lock().push(Event { at_ns: now_ns(), client, place: place.clone(), value, fact });
    }

    /// All lines so far.
    pub fn lock(&self) -> MutexGuard<'_, Vec<Event>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Smallest payload, in bytes: the value, and once more, mixed.
const PAYLOAD_SIZE_MIN: usize = 16;

fn mix(value: u64) -> u64 {
    value.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29)
}

/// A payload of about `size` bytes from which the value can be read back.
#[must_use]
pub fn encode(value: u64, size: usize) -> Vec<u8> {
    let words = [value, mix(value)].into_iter().cycle();
    words.flat_map(u64::to_le_bytes).take(size.max(PAYLOAD_SIZE_MIN)).collect()
}

/// The value of a payload; none where any byte is not as it was sent.
#[must_use]
pub fn decode(payload: &[u8]) -> Option<u64> {
    let value = u64::from_le_bytes(payload.get(..8)?.try_into().ok()?);
    (encode(value, payload.len()) == payload).then_some(value)
}
