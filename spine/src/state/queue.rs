//! Work queues on a jobs partition: which job of a group is waiting, leased or settled.
//!
//! ```text
//!            settled                 leased, pending or settled            never granted
//!   |------------------------------|----------------------------------|-------------------->
//!   log start                    floor                              next            log end
//!
//!   (never granted) --grant--> leased --ack--> settled
//!                    ^           | nack, expire
//!                    |           v
//!                    '--grant-- pending --bury--> settled
//! ```
//!
//! A group that is deleted is forgotten whole; another of its name begins at the log start.
//!
//! A command on a lease carries the attempt that it means; a stale one has no effect and is
//! listed as lost. There are no deadlines here: the leader keeps the time.

use std::{
    collections::{BTreeMap, HashSet},
    sync::Arc,
};

use arqon_proto::{
    DecodeError,
    wire::{ControlRecord, LeaseState, OffsetRange, PendingState, QueueState, queue_command::Command},
};

use super::{CommandOutcome, QueueOutcome, offsets::Offsets, ranges::Ranges};

/// Who holds leases, and for how long each.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Holder {
    pub worker: String,
    pub operator_id: String,
    pub operator_version: String,
    pub lease_ms: u32,
}

/// A job handed out.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Lease {
    pub attempt: u32,
    pub holder: Arc<Holder>,
}

/// A job that was handed out and waits for its next attempt.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Pending {
    /// Attempts made so far.
    pub attempt: u32,
    /// How long it is to wait, from the command on.
    pub delay_ms: u32,
}

/// One group's queue.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Queue {
    next: u64,
    settled: Offsets,
    leases: Ranges<Lease>,
    pending: BTreeMap<u64, Pending>,
}

/// The offsets as ranges of equal attempt, in the order given.
pub(crate) fn ranges_of(leases: impl IntoIterator<Item = (u64, u32)>) -> Vec<OffsetRange> {
    let mut out = Vec::new();
    for (offset, attempt) in leases {
        push_range(&mut out, offset, 1, attempt);
    }
    out
}

/// Adds `count` offsets from `first` on, to the last range where they follow it.
pub(crate) fn push_range(out: &mut Vec<OffsetRange>, first: u64, count: u32, attempt: u32) {
    match out.last_mut() {
        Some(last) if last.attempt == attempt && first.checked_sub(last.first) == Some(u64::from(last.count)) => {
            last.count += count;
        }
        _ => out.push(OffsetRange { first, count, attempt }),
    }
}

/// Calls `with` for each part of `range` as either held or not, in order.
fn divide(range: &OffsetRange, held: impl Iterator<Item = (u64, u64)>, mut with: impl FnMut(u64, u64, bool)) {
    let end = range.first + u64::from(range.count);
    let mut next = range.first;
    for (from, to) in held {
        if next < from {
            with(next, from, false);
        }
        with(from, to, true);
        next = to;
    }
    if next < end {
        with(next, end, false);
    }
}

impl Queue {
    fn starting_at(offset: u64) -> Self {
        Self {
            next: offset,
            settled: Offsets::starting_at(offset),
            leases: Ranges::default(),
            pending: BTreeMap::new(),
        }
    }

    /// Lowest offset that was never granted.
    pub(crate) fn next(&self) -> u64 {
        self.next
    }

    /// Every job below is settled.
    pub(crate) fn floor(&self) -> u64 {
        self.settled.floor()
    }

    /// Jobs handed out, by offset.
    pub(crate) fn leases(&self) -> &Ranges<Lease> {
        &self.leases
    }

    /// Jobs that wait for their next attempt, by offset.
    pub(crate) fn pending(&self) -> &BTreeMap<u64, Pending> {
        &self.pending
    }

    /// Leased and pending jobs.
    pub(crate) fn outstanding_count(&self) -> usize {
        self.leases.len() + self.pending.len()
    }

    /// Whether `offset` is leased under `attempt`.
    pub(crate) fn is_leased(&self, offset: u64, attempt: u32) -> bool {
        self.leases.get(offset).is_some_and(|lease| lease.attempt == attempt)
    }

    /// The parts of `range` that are leased under its attempt: first offset, offset after the
    /// last, and the lease.
    pub(crate) fn leased_of(&self, range: &OffsetRange) -> impl Iterator<Item = (u64, u64, &Lease)> {
        let attempt = range.attempt;
        // No job has the largest offset, so that an end beyond it loses none.
        let end = range.first.saturating_add(u64::from(range.count));
        self.leases.within(range.first, end).filter(move |(_, _, lease)| lease.attempt == attempt)
    }

    /// Whether all of `range` is leased under its attempt.
    pub(crate) fn is_all_leased(&self, range: &OffsetRange) -> bool {
        self.leased_of(range).map(|(first, end, _)| end - first).sum::<u64>() == u64::from(range.count)
    }

    fn grant(&mut self, range: &OffsetRange, holder: &Arc<Holder>, lost: &mut Vec<OffsetRange>) {
        let lease = Lease { attempt: range.attempt, holder: holder.clone() };
        let end = range.first + u64::from(range.count);
        // What was never granted comes after all that was.
        let fresh = if lease.attempt == 1 { range.first.max(self.next).min(end) } else { end };
        for offset in range.first..fresh {
            if self.pending.get(&offset).is_some_and(|pending| pending.attempt + 1 == lease.attempt) {
                self.pending.remove(&offset);
                self.leases.insert(offset, offset + 1, lease.clone());
            } else {
                push_range(lost, offset, 1, lease.attempt);
            }
        }
        if fresh < end {
            // Jobs that the leader passed over are no longer in the log.
            self.settled.insert_range(self.next, fresh);
            self.next = end;
            self.leases.insert(fresh, end, lease);
        }
    }

    /// Ends those leases of `range` that are held; the others are added to `lost`.
    fn end_leases(&mut self, range: &OffsetRange, lost: &mut Vec<OffsetRange>) -> Vec<(u64, u64)> {
        let mut held = Vec::new();
        divide(range, self.leased_of(range).map(|(first, end, _)| (first, end)), |first, end, is_held| {
            if is_held {
                held.push((first, end));
            } else {
                push_range(lost, first, (end - first) as u32, range.attempt);
            }
        });
        for (first, end) in &held {
            self.leases.remove(*first, *end, |_, _| {});
        }
        held
    }

    fn settle(&mut self, first: u64, end: u64) {
        let is_new = self.settled.insert_new(first, end);
        assert!(is_new, "a job of {first} to {end} was outstanding and settled at once");
    }

    fn command(&mut self, range: &OffsetRange, command: &Command, holder: &Arc<Holder>, lost: &mut Vec<OffsetRange>) {
        let attempt = range.attempt;
        match command {
            Command::Grant(_) => self.grant(range, holder, lost),
            Command::Renew(_) => {
                divide(range, self.leased_of(range).map(|(first, end, _)| (first, end)), |first, end, is_held| {
                    if !is_held {
                        push_range(lost, first, (end - first) as u32, attempt);
                    }
                });
            }
            Command::Ack(_) => {
                for (first, end) in self.end_leases(range, lost) {
                    self.settle(first, end);
                }
            }
            Command::Nack(_) | Command::Expire(_) => {
                let delay_ms = if let Command::Nack(nack) = command { nack.delay_ms } else { 0 };
                for (first, end) in self.end_leases(range, lost) {
                    self.pending.extend((first..end).map(|offset| (offset, Pending { attempt, delay_ms })));
                }
            }
            Command::Bury(_) => {
                for offset in range.first..range.first + u64::from(range.count) {
                    if self.pending.get(&offset).is_some_and(|pending| pending.attempt == attempt) {
                        self.pending.remove(&offset);
                        self.settle(offset, offset + 1);
                    } else {
                        push_range(lost, offset, 1, attempt);
                    }
                }
            }
            // Names no jobs: the whole queue goes.
            Command::Delete(_) => {}
        }
    }
}

/// The queues of one partition, by group.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Queues {
    groups: BTreeMap<String, Queue>,
}

impl Queues {
    pub(super) fn get(&self, group: &str) -> Option<&Queue> {
        self.groups.get(group)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&str, &Queue)> {
        self.groups.iter().map(|(group, queue)| (group.as_str(), queue))
    }

    /// Applies the commands in order and says which leases each of them missed.
    pub(super) fn apply(&mut self, record: &ControlRecord) -> QueueOutcome {
        let commands = record.queue.iter().map(|command| {
            let lost = command.command.as_ref().map(|inner| self.apply_command(&command.group, inner));
            CommandOutcome { lost: lost.unwrap_or_default() }
        });
        QueueOutcome { commands: commands.collect() }
    }

    fn apply_command(&mut self, group: &str, command: &Command) -> Vec<OffsetRange> {
        let mut holder = Arc::default();
        let ranges = match command {
            Command::Grant(grant) => {
                holder = Arc::new(Holder {
                    worker: grant.worker.clone(),
                    operator_id: grant.operator_id.clone(),
                    operator_version: grant.operator_version.clone(),
                    lease_ms: grant.lease_ms,
                });
                // A group starts where the leader first grants from.
                if let Some(start) = grant.ranges.iter().map(|range| range.first).min()
                    && !self.groups.contains_key(group)
                {
                    self.groups.insert(group.to_owned(), Queue::starting_at(start));
                }
                &grant.ranges
            }
            Command::Ack(ack) => &ack.ranges,
            Command::Nack(nack) => &nack.ranges,
            Command::Renew(renew) => &renew.ranges,
            Command::Expire(expire) => &expire.ranges,
            Command::Bury(bury) => &bury.ranges,
            Command::Delete(_) => {
                self.groups.remove(group);
                return Vec::new();
            }
        };
        let Some(queue) = self.groups.get_mut(group) else { return ranges.clone() };
        let mut lost = Vec::new();
        ranges.iter().for_each(|range| queue.command(range, command, &holder, &mut lost));
        queue.settled.close_up();
        lost
    }

    pub(super) fn encode(&self) -> Vec<QueueState> {
        self.groups.iter().map(|(group, queue)| encode_queue(group, queue)).collect()
    }

    pub(super) fn decode(states: Vec<QueueState>) -> Result<Self, DecodeError> {
        let mut groups = BTreeMap::new();
        // Workers take many jobs at a time: their leases share one holder.
        let mut holders = HashSet::new();
        for state in states {
            let group = state.group.clone();
            if groups.insert(group, decode_queue(state, &mut holders)?).is_some() {
                return Err(DecodeError::Value { field: "queue given twice", value: groups.len() as u64 });
            }
        }
        Ok(Self { groups })
    }
}

fn encode_queue(group: &str, queue: &Queue) -> QueueState {
    let leases = queue.leases.each().map(|(offset, lease)| LeaseState {
        offset,
        attempt: lease.attempt,
        worker: lease.holder.worker.clone(),
        operator_id: lease.holder.operator_id.clone(),
        operator_version: lease.holder.operator_version.clone(),
        lease_ms: lease.holder.lease_ms,
    });
    let pending = queue.pending.iter().map(|(offset, pending)| PendingState {
        offset: *offset,
        attempt: pending.attempt,
        delay_ms: pending.delay_ms,
    });
    QueueState {
        group: group.to_owned(),
        next: queue.next,
        floor: queue.floor(),
        settled: queue.settled.encode_above(),
        leases: leases.collect(),
        pending: pending.collect(),
    }
}

fn decode_queue(state: QueueState, holders: &mut HashSet<Arc<Holder>>) -> Result<Queue, DecodeError> {
    let mut queue = Queue::starting_at(state.next);
    queue.settled = Offsets::decode(state.floor, &state.settled, "settled jobs")?;
    let fits = |queue: &Queue, offset: u64| {
        let is_free = queue.leases.get(offset).is_none() && !queue.pending.contains_key(&offset);
        if offset < queue.next && !queue.settled.contains(offset) && is_free {
            Ok(())
        } else {
            Err(DecodeError::Value { field: "outstanding job", value: offset })
        }
    };
    for lease in state.leases {
        fits(&queue, lease.offset)?;
        let holder = Holder {
            worker: lease.worker,
            operator_id: lease.operator_id,
            operator_version: lease.operator_version,
            lease_ms: lease.lease_ms,
        };
        let holder = match holders.get(&holder) {
            Some(known) => known.clone(),
            None => {
                let holder = Arc::new(holder);
                holders.insert(holder.clone());
                holder
            }
        };
        queue.leases.insert(lease.offset, lease.offset + 1, Lease { attempt: lease.attempt, holder });
    }
    for pending in state.pending {
        fits(&queue, pending.offset)?;
        queue.pending.insert(pending.offset, Pending { attempt: pending.attempt, delay_ms: pending.delay_ms });
    }
    Ok(queue)
}
