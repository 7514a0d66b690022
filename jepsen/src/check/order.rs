//! The order of a key's values, from all polls and all sends proven committed; gaps removed.

use std::collections::{BTreeMap, HashMap};

use crate::history::KeyHistory;

/// Which values stand where.
#[derive(Debug, Default)]
pub(super) struct Order {
    /// Values by offset: one each, unless replicas or answers disagree.
    pub(super) at: BTreeMap<u64, Vec<u64>>,
    /// Offsets by value: one each, unless a value stands twice.
    pub(super) of: HashMap<u64, Vec<u64>>,
    /// Position of each offset once the gaps are removed, from 0.
    pub(super) rank: HashMap<u64, usize>,
}

impl Order {
    pub(super) fn of(history: &KeyHistory) -> Self {
        let read = history.reads.iter().flat_map(|read| &read.values);
        let read = read.filter_map(|(offset, value)| value.map(|value| (*offset, value)));
        let acked =
            history.appends.iter().filter_map(|append| append.acked().map(|(offset, _)| (offset, append.value)));
        let mut order = Self::default();
        for (offset, value) in read.chain(acked) {
            let values = order.at.entry(offset).or_default();
            if !values.contains(&value) {
                values.push(value);
                order.of.entry(value).or_default().push(offset);
            }
        }
        order.rank = order.at.keys().enumerate().map(|(rank, offset)| (*offset, rank)).collect();
        order
    }
}
