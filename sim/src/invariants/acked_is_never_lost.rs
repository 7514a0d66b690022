//! A value that was acknowledged, or that a reader got, stands at its offset in the end; where the partition cannot be
//! read any more, it lies on the disks of a majority of its replicas.

use std::collections::{BTreeMap, BTreeSet};

use crate::{
    history::{Event, Fact},
    invariants::{Facts, REPLICA_COUNT, Records},
};

pub fn check(facts: &Facts) -> Vec<String> {
    let mut broken = Vec::new();
    let on_disks = OnDisks::new(facts);
    for event in &facts.history {
        let (what, offset) = match event.fact {
            Fact::Acked(offset) => ("acknowledged", offset),
            Fact::Read(offset) => ("read", offset),
            _ => continue,
        };
        // A trim takes whole segments: what it was asked for and left must be right.
        let is_cut_off = |records: &Records| records.first().is_none_or(|(first, _)| offset < *first);
        let may_be_gone = facts.finals.get(&event.place).is_none_or(is_cut_off);
        if may_be_gone && facts.fronts.get(&event.place).is_some_and(|front| offset < front.asked_before) {
            continue;
        }
        let lost = match facts.finals.get(&event.place) {
            Some(records) => {
                let at = records.binary_search_by_key(&offset, |(offset, _)| *offset);
                let found = at.ok().map(|at| records[at].1);
                (found != Some(Some(event.value))).then(|| format!("in the end there is {found:?}"))
            }
            None => on_disks.why_lost(event, offset),
        };
        if let Some(lost) = lost {
            let place = &event.place;
            broken.push(format!(
                "{}/{}: value {} was {what} at offset {offset} by client {} at {} ms; {lost}",
                place.topic,
                place.partition,
                event.value,
                event.client,
                event.at_ns / 1_000_000
            ));
        }
    }
    broken
}

/// What the disks hold, of all groups together: which group a partition was is not known outside, and a
/// value stands in one topic only, but for jobs, which their results repeat.
struct OnDisks {
    /// The nodes that have a value at an offset.
    nodes: BTreeMap<(u64, u64), BTreeSet<u64>>,
    /// So many must have what was acknowledged. Disks of a minority may have been damaged on purpose.
    needed: usize,
}

impl OnDisks {
    fn new(facts: &Facts) -> Self {
        let mut nodes: BTreeMap<_, BTreeSet<u64>> = BTreeMap::new();
        for log in facts.logs.values().flatten() {
            for place in &log.values {
                nodes.entry(*place).or_default().insert(log.node);
            }
        }
        let majority = facts.node_count.min(REPLICA_COUNT) / 2 + 1;
        Self { nodes, needed: majority.saturating_sub(facts.rotten.len()).max(1) }
    }

    fn why_lost(&self, event: &Event, offset: u64) -> Option<String> {
        let count = self.nodes.get(&(offset, event.value)).map_or(0, BTreeSet::len);
        let text = || format!("the partition cannot be read, and {count} disks have it, not {}", self.needed);
        (count < self.needed).then(text)
    }
}
