//! Things that fall due, each at its own time.

use std::collections::{BTreeMap, BTreeSet};

use tokio::time::Instant;

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
}
