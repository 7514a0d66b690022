//! Things that fall due, each at its own time.

use std::collections::{BTreeMap, BTreeSet};

use tokio::time::Instant;

use crate::state::Ranges;

/// A time per key; a key set again moves.
#[derive(Debug)]
pub(super) struct Deadlines<K> {
    at: BTreeMap<K, Instant>,
    in_order: BTreeSet<(Instant, K)>,
}

impl<K> Default for Deadlines<K> {
    fn default() -> Self {
        Self { at: BTreeMap::new(), in_order: BTreeSet::new() }
    }
}

impl<K: Ord + Copy> Deadlines<K> {
    pub(super) fn set(&mut self, key: K, at: Instant) {
        self.remove(key);
        self.at.insert(key, at);
        self.in_order.insert((at, key));
    }

    pub(super) fn remove(&mut self, key: K) {
        if let Some(at) = self.at.remove(&key) {
            self.in_order.remove(&(at, key));
        }
    }

    /// When the first key falls due.
    pub(super) fn first(&self) -> Option<Instant> {
        self.in_order.first().map(|(at, _)| *at)
    }

    /// Keys that are due at `now`, earliest first.
    pub(super) fn due(&self, now: Instant) -> impl Iterator<Item = K> + '_ {
        self.in_order.iter().take_while(move |(at, _)| *at <= now).map(|(_, key)| *key)
    }

    /// Takes the first key that is due at `now`.
    pub(super) fn pop_due(&mut self, now: Instant) -> Option<K> {
        let key = self.due(now).next()?;
        self.remove(key);
        Some(key)
    }
}

/// A time per offset; offsets of one range that fall due together cost one entry.
#[derive(Debug, Default)]
pub(super) struct RangeDeadlines {
    at: Ranges<Instant>,
    in_order: BTreeSet<(Instant, u64)>,
}

impl RangeDeadlines {
    /// Sets the time of `first..end`; one set before no longer counts.
    pub(super) fn set(&mut self, first: u64, end: u64, at: Instant) {
        self.remove(first, end);
        if first < end {
            self.at.insert(first, end, at);
            self.in_order.insert((at, first));
        }
    }

    pub(super) fn remove(&mut self, first: u64, end: u64) {
        for offset in [first, end] {
            if let Some(at) = self.at.cut(offset) {
                self.in_order.insert((at, offset));
            }
        }
        self.at.remove(first, end, |from, at| _ = self.in_order.remove(&(at, from)));
    }

    /// When the first offset falls due.
    pub(super) fn first(&self) -> Option<Instant> {
        self.in_order.first().map(|(at, _)| *at)
    }

    /// Ranges that are due at `now`, earliest first: first offset, offset after the last.
    pub(super) fn due(&self, now: Instant) -> impl Iterator<Item = (u64, u64)> + '_ {
        let due = self.in_order.iter().take_while(move |(at, _)| *at <= now);
        due.filter_map(|(_, first)| self.at.end_of(*first).map(|end| (*first, end)))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn keys_fall_due_in_order_and_a_moved_one_at_its_new_time() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut deadlines = Deadlines::default();
        for (key, ms) in [(1u64, 30), (2, 10), (3, 20)] {
            deadlines.set(key, at(ms));
        }
        deadlines.set(2, at(40));
        deadlines.remove(3);
        assert_eq!(deadlines.first(), Some(at(30)));
        assert_eq!(deadlines.due(at(29)).count(), 0);
        assert_eq!(deadlines.due(at(40)).collect::<Vec<_>>(), [1, 2]);
        assert_eq!(deadlines.pop_due(at(40)), Some(1));
        assert_eq!(deadlines.pop_due(at(39)), None);
        assert_eq!(deadlines.pop_due(at(40)), Some(2));
        assert_eq!(deadlines.first(), None);
    }

    #[test]
    fn parts_of_a_range_may_be_moved_and_taken_out() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut deadlines = RangeDeadlines::default();
        deadlines.set(10, 20, at(30));
        deadlines.set(20, 22, at(10));
        deadlines.set(12, 14, at(40));
        deadlines.remove(18, 21);
        deadlines.set(5, 5, at(1));
        assert_eq!(deadlines.first(), Some(at(10)));
        assert_eq!(deadlines.due(at(39)).collect::<Vec<_>>(), [(21, 22), (10, 12), (14, 18)]);
        deadlines.remove(0, 16);
        assert_eq!(deadlines.due(at(40)).collect::<Vec<_>>(), [(21, 22), (16, 18)]);
        deadlines.remove(0, 30);
        assert_eq!((deadlines.first(), deadlines.in_order.len()), (None, 0));
    }
}
