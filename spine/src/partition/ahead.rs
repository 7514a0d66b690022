//! Reading ahead: while a client works on one part of the log, the disk reads the next one.

use std::{
    collections::VecDeque,
    sync::{Mutex, MutexGuard, PoisonError},
};

use arqon_proto::{Batch, GroupId, Offset, RaftIndex};
use arqon_storage::{Log, ReadError};
use tokio::task::{JoinHandle, spawn_blocking};

/// Parts that a node keeps for readers that have not asked for them yet. The one made first goes
/// first, so that a reader which left holds none for long.
const PART_COUNT_MAX: usize = 8;

/// Batches on their way from the disk.
pub(super) type Reading = JoinHandle<Result<Vec<Batch>, ReadError>>;

/// Where a part begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub group: GroupId,
    pub offset: Offset,
}

/// The parts that a node has read ahead, for all of its partitions.
#[derive(Debug, Default)]
pub struct Ahead {
    parts: Mutex<VecDeque<(Place, Reading)>>,
}

impl Ahead {
    /// The part at `place`, if it was read ahead or is being read; of any size.
    pub(super) fn take(&self, place: Place) -> Option<Reading> {
        let mut parts = self.lock();
        let at = parts.iter().position(|(other, _)| *other == place)?;
        parts.remove(at).map(|(_, reading)| reading)
    }

    /// Keeps a part until it is taken or displaced.
    pub(super) fn keep(&self, place: Place, reading: Reading) {
        let mut parts = self.lock();
        parts.retain(|(other, _)| *other != place);
        if parts.len() == PART_COUNT_MAX {
            parts.pop_front();
        }
        parts.push_back((place, reading));
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<(Place, Reading)>> {
        self.parts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Reads committed batches from `offset` on, on a thread that may wait for the disk.
pub(super) fn read(log: &Log, offset: Offset, through: RaftIndex, size_max: usize) -> Reading {
    let log = log.clone();
    spawn_blocking(move || log.read_data(offset, through, size_max))
}

/// What is at hand, and then batches from `offset` on up to about `size_max` bytes more.
pub(super) fn read_on(
    mut at_hand: Vec<Batch>,
    log: &Log,
    offset: Offset,
    through: RaftIndex,
    size_max: usize,
) -> Reading {
    let log = log.clone();
    spawn_blocking(move || match log.read_data(offset, through, size_max) {
        Ok(more) => {
            at_hand.extend(more);
            Ok(at_hand)
        }
        // Whoever gets there will read it again, and tell.
        Err(_) if !at_hand.is_empty() => Ok(at_hand),
        Err(cause) => Err(cause),
    })
}

/// Cuts a part to what is asked for now: about `size_max` bytes, at least one batch.
pub(super) fn cut(batches: &mut Vec<Batch>, size_max: usize) {
    let mut size = 0;
    let fits = |batch: &Batch| {
        size += batch.header.batch_size();
        size <= size_max
    };
    let count = batches.iter().map(fits).take_while(|fits| *fits).count();
    batches.truncate(count.max(1));
}

#[cfg(test)]
mod tests {
    use arqon_proto::BatchKind;

    use super::*;

    fn place(offset: u64) -> Place {
        Place { group: GroupId(1), offset: Offset(offset) }
    }

    #[tokio::test]
    async fn a_part_is_given_once_and_the_oldest_makes_room() {
        let ahead = Ahead::default();
        for offset in 0..=PART_COUNT_MAX as u64 {
            ahead.keep(place(offset), tokio::spawn(async { Ok(Vec::new()) }));
        }
        assert!(ahead.take(place(0)).is_none());
        assert!(ahead.take(place(1)).is_some() && ahead.take(place(1)).is_none());
        assert!(ahead.take(Place { group: GroupId(2), ..place(2) }).is_none());
        assert!(ahead.take(place(2)).unwrap().await.unwrap().unwrap().is_empty());
    }

    #[test]
    fn a_part_is_cut_to_what_is_asked_for_and_never_to_nothing() {
        let batch = Batch::internal(BatchKind::Control, vec![0; 872].into());
        let size = batch.header.batch_size();
        for (size_max, count) in [(0, 1), (size, 1), (3 * size - 1, 2), (3 * size, 3), (10 * size, 4)] {
            let mut batches = vec![batch.clone(); 4];
            cut(&mut batches, size_max);
            assert_eq!(batches.len(), count, "{size_max} bytes");
        }
    }
}
