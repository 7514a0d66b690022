//! The producers that a partition remembers, in the order of their last use.
//!
//! There may be 100,000 in every partition, most of them seen once, so a scope takes 64 bytes here
//! and a hash table holds only its place:
//!
//! ```text
//!   table: hash(id) ──► place      scopes: [ id | next | newest batch | older ─► 4 batches | links ]
//!                                            oldest ⇄ ... ⇄ newest, by use
//! ```

use std::{collections::hash_map::RandomState, hash::BuildHasher};

use arqon_proto::{limits, wire};
use hashbrown::HashTable;

pub(super) type ProducerId = [u8; 16];

/// Batches remembered besides the newest.
const OLDER_COUNT: usize = limits::PRODUCER_BATCH_COUNT - 1;
/// No neighbour.
const NONE: u32 = u32::MAX;

/// What is known of one producer: at least one batch.
#[derive(Debug)]
pub(super) struct Scope {
    id: ProducerId,
    pub epoch: u32,
    /// Records of the newest batch, which ends at `next_sequence`.
    newest_count: u32,
    pub next_sequence: u64,
    pub last_time_ms: u64,
    newest_offset: u64,
    // Oldest first; places of no batch have a count of 0. Most producers need none.
    older: Option<Box<[wire::ProducerBatch; OLDER_COUNT]>>,
    previous: u32,
    next: u32,
}

const _: () = assert!(size_of::<Scope>() == 64);

impl Scope {
    /// A producer whose first known batch is `batch`.
    pub fn new(epoch: u32, last_time_ms: u64, batch: wire::ProducerBatch) -> Self {
        Self {
            id: ProducerId::default(),
            epoch,
            newest_count: batch.count,
            next_sequence: batch.sequence + u64::from(batch.count),
            last_time_ms,
            newest_offset: batch.offset,
            older: None,
            previous: NONE,
            next: NONE,
        }
    }

    pub fn id(&self) -> ProducerId {
        self.id
    }

    /// Remembers the next batch; the oldest is forgotten where there are too many.
    pub fn push(&mut self, batch: wire::ProducerBatch) {
        let newest = self.newest();
        let older = self.older.get_or_insert_default();
        older.rotate_left(1);
        older[OLDER_COUNT - 1] = newest;
        self.set_newest(batch);
    }

    fn set_newest(&mut self, batch: wire::ProducerBatch) {
        self.newest_count = batch.count;
        self.newest_offset = batch.offset;
        self.next_sequence = batch.sequence + u64::from(batch.count);
    }

    /// A new epoch, in which `batch` is the first.
    pub fn restart(&mut self, epoch: u32, batch: wire::ProducerBatch) {
        self.epoch = epoch;
        self.older = None;
        self.set_newest(batch);
    }

    fn newest(&self) -> wire::ProducerBatch {
        wire::ProducerBatch {
            sequence: self.next_sequence - u64::from(self.newest_count),
            count: self.newest_count,
            offset: self.newest_offset,
        }
    }

    /// The remembered batches, oldest first.
    pub fn batches(&self) -> impl Iterator<Item = wire::ProducerBatch> {
        let older = self.older.iter().flat_map(|older| older.iter()).filter(|batch| batch.count > 0);
        older.copied().chain([self.newest()])
    }

    /// Offset of `sequence` where one of the remembered batches holds it.
    pub fn offset_of(&self, sequence: u64) -> Option<u64> {
        let mut batches = self.batches();
        let held = batches.find(|batch| (batch.sequence..batch.sequence + u64::from(batch.count)).contains(&sequence));
        held.map(|batch| batch.offset + (sequence - batch.sequence))
    }
}

/// Scopes by producer, in the order of use.
#[derive(Debug)]
pub(super) struct Scopes {
    table: HashTable<u32>,
    hasher: RandomState,
    scopes: Vec<Scope>,
    // Ends of the list by use.
    oldest: u32,
    newest: u32,
}

impl Default for Scopes {
    fn default() -> Self {
        let hasher = RandomState::new();
        Self { table: HashTable::new(), hasher, scopes: Vec::new(), oldest: NONE, newest: NONE }
    }
}

impl Scopes {
    pub fn len(&self) -> usize {
        self.scopes.len()
    }

    fn place(&self, id: &ProducerId) -> Option<u32> {
        self.table.find(self.hasher.hash_one(id), |at| self.scopes[*at as usize].id == *id).copied()
    }

    pub fn get(&self, id: &ProducerId) -> Option<&Scope> {
        self.place(id).map(|at| &self.scopes[at as usize])
    }

    /// The scope of `id`, which is now the one used last.
    pub fn touch(&mut self, id: &ProducerId) -> Option<&mut Scope> {
        let at = self.place(id)?;
        self.unlink(at);
        self.link(at);
        Some(&mut self.scopes[at as usize])
    }

    /// Adds the scope of `id`, which there must not be yet, as the one used last.
    ///
    /// # Panics
    /// Beyond 2^32 scopes.
    pub fn insert(&mut self, id: ProducerId, scope: Scope) {
        let at = u32::try_from(self.scopes.len()).expect("scopes are limited to far fewer");
        self.scopes.push(Scope { id, ..scope });
        let (hasher, scopes) = (&self.hasher, &self.scopes);
        let hash_of = |at: &u32| hasher.hash_one(scopes[*at as usize].id);
        self.table.insert_unique(hash_of(&at), at, hash_of);
        self.link(at);
    }

    /// The scope that was used least recently.
    pub fn oldest(&self) -> Option<&Scope> {
        self.scopes.get(self.oldest as usize)
    }

    pub fn remove_oldest(&mut self) {
        let at = self.oldest;
        if at == NONE {
            return;
        }
        self.unlink(at);
        self.forget_place(at);
        self.scopes.swap_remove(at as usize);
        // The last scope has moved into the gap.
        let from = self.scopes.len() as u32;
        if from == at {
            return;
        }
        let Scope { id, previous, next, .. } = self.scopes[at as usize];
        let entry = self.table.find_mut(self.hasher.hash_one(id), |at| *at == from);
        *entry.expect("every scope has its place in the table") = at;
        *self.next_of(previous) = at;
        *self.previous_of(next) = at;
    }

    /// All of them, the least recently used first.
    pub fn iter(&self) -> impl Iterator<Item = &Scope> {
        std::iter::successors(self.oldest(), |scope| self.scopes.get(scope.next as usize))
    }

    fn forget_place(&mut self, at: u32) {
        let hash = self.hasher.hash_one(self.scopes[at as usize].id);
        if let Ok(entry) = self.table.find_entry(hash, |other| *other == at) {
            entry.remove();
        }
    }

    fn next_of(&mut self, at: u32) -> &mut u32 {
        self.scopes.get_mut(at as usize).map_or(&mut self.oldest, |scope| &mut scope.next)
    }

    fn previous_of(&mut self, at: u32) -> &mut u32 {
        self.scopes.get_mut(at as usize).map_or(&mut self.newest, |scope| &mut scope.previous)
    }

    fn unlink(&mut self, at: u32) {
        let Scope { previous, next, .. } = self.scopes[at as usize];
        *self.next_of(previous) = next;
        *self.previous_of(next) = previous;
    }

    fn link(&mut self, at: u32) {
        let previous = std::mem::replace(&mut self.newest, at);
        *self.next_of(previous) = at;
        let scope = &mut self.scopes[at as usize];
        (scope.previous, scope.next) = (previous, NONE);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;

    fn id(number: u8) -> ProducerId {
        [number; 16]
    }

    fn scope() -> Scope {
        Scope::new(0, 0, wire::ProducerBatch { sequence: 0, count: 1, offset: 0 })
    }

    proptest! {
        #[test]
        fn scopes_come_in_the_order_of_use(steps in prop::collection::vec((0u8..12, prop::bool::weighted(0.3)), 0..200)) {
            let (mut scopes, mut model) = (Scopes::default(), VecDeque::new());
            for (number, removes) in steps {
                if removes {
                    scopes.remove_oldest();
                    model.pop_front();
                } else {
                    if scopes.touch(&id(number)).is_none() {
                        scopes.insert(id(number), scope());
                    }
                    model.retain(|other| *other != number);
                    model.push_back(number);
                }
                prop_assert!(scopes.iter().map(Scope::id).eq(model.iter().map(|number| id(*number))));
                prop_assert_eq!(scopes.len(), model.len());
                prop_assert!((0..12).all(|number| scopes.get(&id(number)).is_some() == model.contains(&number)));
            }
        }
    }

    #[test]
    fn a_scope_remembers_its_last_batches() {
        let batch = |number: u64| wire::ProducerBatch { sequence: number * 3, count: 3, offset: 100 + number * 10 };
        let mut scope = Scope::new(1, 0, batch(0));
        for number in 1..8 {
            scope.push(batch(number));
            let first = (number + 1).saturating_sub(limits::PRODUCER_BATCH_COUNT as u64);
            assert!(scope.batches().eq((first..=number).map(batch)));
        }
        assert_eq!(scope.next_sequence, 24);
        assert_eq!(scope.offset_of(8), None);
        assert_eq!(scope.offset_of(10), Some(131));
        assert_eq!(scope.offset_of(23), Some(172));
        assert_eq!(scope.offset_of(24), None);
    }
}
