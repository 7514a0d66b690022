//! The order of a key's values, from all polls and all sends proven committed; gaps removed.
//!
//! Sorted lists, 24 bytes an entry: histories have millions of them.

use crate::history::KeyHistory;

/// Which values stand where.
#[derive(Debug, Default)]
pub(super) struct Order {
    /// Offsets with values, sorted, each pair once: one value an offset, unless replicas or
    /// answers disagree.
    pub(super) entries: Vec<(u64, u64)>,
    /// The offsets that hold something, sorted: the place in this list is the rank.
    offsets: Vec<u64>,
}

impl Order {
    pub(super) fn of(history: &KeyHistory) -> Self {
        let acked = |append: &crate::history::Append| append.acked().map(|(offset, _)| (offset, append.value));
        let mut entries: Vec<(u64, u64)> = history.appends.iter().filter_map(acked).collect();
        entries.sort_unstable();
        entries.dedup();
        // Nearly everything that is read has been acknowledged; the rest comes in between.
        let mut more = Vec::new();
        for read in &history.reads {
            let mut hint = 0;
            for (offset, value) in read.values.iter() {
                let Some(value) = value else { continue };
                match find(&entries, hint, &(offset, value)) {
                    Some(index) => hint = index + 1,
                    None => more.push((offset, value)),
                }
                // What readers repeat is kept once.
                if more.len() > entries.len().max(1 << 16) {
                    merge(&mut entries, &mut more);
                    hint = 0;
                }
            }
        }
        merge(&mut entries, &mut more);
        let mut offsets: Vec<u64> = entries.iter().map(|(offset, _)| *offset).collect();
        offsets.dedup();
        Self { entries, offsets }
    }

    /// Position of an offset once the gaps are removed, from 0; `hint` is where it may be.
    pub(super) fn rank(&self, offset: u64, hint: usize) -> Option<usize> {
        find(&self.offsets, hint, &offset)
    }

    /// The rank of the first offset at or after `offset`.
    pub(super) fn rank_from(&self, offset: u64) -> usize {
        self.offsets.partition_point(|known| *known < offset)
    }

    /// The offset of a rank.
    pub(super) fn offset(&self, rank: usize) -> Option<u64> {
        self.offsets.get(rank).copied()
    }

    /// Values with their offsets, sorted.
    pub(super) fn places(&self) -> Vec<(u64, u64)> {
        let mut places: Vec<_> = self.entries.iter().map(|(offset, value)| (*value, *offset)).collect();
        places.sort_unstable();
        places
    }
}

/// The index of `wanted` in a sorted list; looked for at `hint` first.
fn find<T: Ord>(list: &[T], hint: usize, wanted: &T) -> Option<usize> {
    if list.get(hint) == Some(wanted) {
        return Some(hint);
    }
    list.binary_search(wanted).ok()
}

fn merge(entries: &mut Vec<(u64, u64)>, more: &mut Vec<(u64, u64)>) {
    if more.is_empty() {
        return;
    }
    more.sort_unstable();
    more.dedup();
    entries.append(more);
    // Two sorted runs: the stable sort merges them.
    entries.sort();
    entries.dedup();
    more.shrink_to(1 << 16);
}

#[cfg(test)]
mod tests {
    use super::{super::story, *};

    #[test]
    fn reads_and_acknowledgements_make_one_order_without_gaps() {
        let history = KeyHistory {
            appends: vec![story::acked(11, 0, 0, 1), story::acked(13, 7, 0, 1)],
            reads: vec![story::poll(1, &[(0, 11), (3, 12)]), story::poll(1, &[(3, 12), (7, 13), (7, 14)])],
            ..KeyHistory::default()
        };
        let order = Order::of(&history);
        assert_eq!(order.entries, [(0, 11), (3, 12), (7, 13), (7, 14)]);
        assert_eq!((order.rank(7, 0), order.rank(7, 2), order.rank(5, 0)), (Some(2), Some(2), None));
        assert_eq!((order.rank_from(1), order.rank_from(8), order.offset(1)), (1, 3, Some(3)));
    }
}
