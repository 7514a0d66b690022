//! One control entry out of all that waits: what workers settle, what ran out, and new grants.

use std::collections::{BTreeMap, BTreeSet};

use arqon_proto::{Batch, Offset, wire, wire::queue_command::Command};
use arqon_raft::{Applied, ProposeError};
use futures_util::{FutureExt, future::BoxFuture};
use tokio::time::Instant;

use super::{
    Lead,
    clock::Clock,
    lines::Lines,
    requests::{DeleteGroup, Settle, SettleKind, Waiting},
};
use crate::{
    partition::{
        error::invalid,
        grants::{Granted, Grants},
    },
    state::{Queue, push_range, ranges_of},
};

/// Ranges in one control entry, beyond which the rest goes into the next one.
const ENTRY_RANGE_COUNT_MAX: usize = 20_000;

/// Whom one command of the entry in flight belongs to.
pub(super) enum Part {
    Own,
    Settle { settle: Settle, lost: Vec<wire::LeaseRef> },
    Grant { waiting: Waiting, granted: Granted },
    Delete(DeleteGroup),
}

impl Part {
    pub(super) fn refuse(self, cause: wire::Error) {
        match self {
            Self::Own => {}
            Self::Settle { settle, .. } => drop(settle.reply.send(Err(cause))),
            Self::Grant { waiting, .. } => waiting.refuse(cause),
            Self::Delete(delete) => drop(delete.reply.send(Err(cause))),
        }
    }
}

/// A control entry in the making.
#[derive(Default)]
struct Entry {
    record: wire::ControlRecord,
    parts: Vec<Part>,
    range_count: usize,
}

impl Entry {
    fn put(&mut self, group: &str, command: Command, part: Part) {
        self.range_count += ranges_in(&command).len();
        self.record.queue.push(wire::QueueCommand { group: group.to_owned(), command: Some(command) });
        self.parts.push(part);
    }

    /// One more command may go over the limit by what one command holds at most.
    fn has_room(&self) -> bool {
        self.range_count < ENTRY_RANGE_COUNT_MAX
    }
}

/// An entry that was proposed, until its outcome is known.
pub(super) struct Flight {
    pub(super) record: wire::ControlRecord,
    pub(super) parts: Vec<Part>,
    pub(super) outcome: BoxFuture<'static, Result<Applied, ProposeError>>,
}

impl Lead<'_> {
    /// Puts everything that waits into one entry and proposes it, if there is anything.
    pub(super) async fn build(&mut self, now: Instant) {
        let mut entry = Entry::default();
        self.put_deletes(&mut entry);
        if !entry.parts.is_empty() {
            // What else waits may be of the groups that go: it sees the state after this entry.
            return self.fly(entry);
        }
        let (mut at_hand, replica) = (Vec::new(), self.replica.clone());
        for offset in self.next_jobs() {
            at_hand.extend(replica.jobs_ahead(offset).await);
        }
        while entry.has_room()
            && let Some(settle) = self.settling.pop_front()
        {
            self.put_settle(settle, &mut entry);
        }
        self.put_expired(now, &mut entry);
        self.put_buried(&mut entry);
        self.put_grants(at_hand, &mut entry);
        if !entry.parts.is_empty() {
            self.fly(entry);
        }
    }

    fn fly(&mut self, Entry { record, parts, .. }: Entry) {
        let outcome = self.propose(record.clone()).boxed();
        self.flight = Some(Flight { record, parts, outcome });
    }

    /// Puts the groups that may go into the entry, each once; answers the others at once.
    fn put_deletes(&mut self, entry: &mut Entry) {
        let mut going = BTreeSet::new();
        for delete in std::mem::take(&mut self.deleting) {
            if going.contains(&delete.group) {
                // It sees in the next entry what this one has done.
                self.deleting.push_back(delete);
                continue;
            }
            let known = {
                let shared = self.replica.machine.lock();
                shared.state.queue(&delete.group).map(|queue| queue.leases().len())
            };
            let waiting_count = self.lines.by_group.get(&delete.group).map_or(0, BTreeMap::len);
            let Some(leased_count) = known else {
                let _ = delete.reply.send(Ok(false));
                continue;
            };
            if !delete.force && leased_count + waiting_count > 0 {
                let message = format!(
                    "group {:?} of {} is in use: {leased_count} jobs are leased and {waiting_count} workers wait; stop \
                     its workers first, or force it",
                    delete.group,
                    self.replica.name()
                );
                let _ = delete.reply.send(Err(invalid("group", message)));
            } else if delete.only_check {
                let _ = delete.reply.send(Ok(true));
            } else {
                let group = delete.group.clone();
                going.insert(group.clone());
                entry.put(&group, Command::Delete(wire::QueueDelete {}), Part::Delete(delete));
            }
        }
    }

    fn put_expired(&mut self, now: Instant, entry: &mut Entry) {
        let shared = self.replica.machine.lock();
        for (group, clock) in &mut self.clocks {
            if !entry.has_room() {
                return;
            }
            let leases = shared.state.queue(group).map(Queue::leases);
            let mut due: Vec<_> = clock.leases.due(now).take(ENTRY_RANGE_COUNT_MAX).collect();
            due.sort_unstable();
            let mut expired = Vec::new();
            for (first, end) in due {
                let mut is_leased = false;
                for (from, to, lease) in leases.iter().flat_map(|leases| leases.within(first, end)) {
                    push_range(&mut expired, from, (to - from) as u32, lease.attempt);
                    is_leased = true;
                }
                if !is_leased {
                    clock.leases.remove(first, end);
                }
            }
            if !expired.is_empty() {
                let command = Command::Expire(wire::QueueExpire { ranges: expired });
                entry.put(group, command, Part::Own);
            }
        }
    }

    fn put_buried(&self, entry: &mut Entry) {
        let mut buried: BTreeMap<&str, BTreeMap<u64, u32>> = BTreeMap::new();
        for job in &self.burials.buried {
            buried.entry(&job.group).or_default().insert(job.offset, job.attempt);
        }
        for (group, jobs) in buried {
            entry.put(group, Command::Bury(wire::QueueBury { ranges: ranges_of(jobs) }), Part::Own);
        }
    }

    fn put_grants(&mut self, at_hand: Vec<Batch>, entry: &mut Entry) {
        if self.lines.count() == 0 || !entry.has_room() {
            return;
        }
        let mut grants = Grants::new(self.replica, at_hand);
        let no_clock = Clock::default();
        let Lines { by_group, polls, group_of, .. } = &mut self.lines;
        for (group, line) in by_group.iter_mut() {
            let clock = self.clocks.get(group).unwrap_or(&no_clock);
            for (ticket, waiting, granted) in grants.of_group(group, line, &clock.ready) {
                polls.remove(ticket);
                group_of.remove(&ticket);
                match granted {
                    Ok(granted) => {
                        let command = Command::Grant(granted.command(&waiting.holder));
                        entry.put(group, command, Part::Grant { waiting, granted });
                    }
                    Err(cause) => waiting.refuse(cause),
                }
            }
        }
        by_group.retain(|_, line| !line.is_empty());
        grants.read_ahead();
    }

    /// Where the groups with waiting workers go on.
    fn next_jobs(&self) -> BTreeSet<Offset> {
        let log_start = self.replica.group.log().log_start();
        let shared = self.replica.machine.lock();
        let next_of = |group: &String| shared.state.queue(group).map_or(log_start, |queue| Offset(queue.next()));
        self.lines.by_group.keys().map(|group| next_of(group).max(log_start)).collect()
    }

    /// Puts the leases that are still held into the entry; answers at once when none is.
    fn put_settle(&self, settle: Settle, entry: &mut Entry) {
        let of = |leases: &[wire::LeaseRef]| ranges_of(leases.iter().map(|lease| (lease.offset, lease.attempt)));
        let (mut ranges, mut lost) = (of(&settle.leases), Vec::new());
        {
            let shared = self.replica.machine.lock();
            let queue = shared.state.queue(&settle.group);
            if !queue.is_some_and(|queue| ranges.iter().all(|range| queue.is_all_leased(range))) {
                let is_held =
                    |lease: &wire::LeaseRef| queue.is_some_and(|queue| queue.is_leased(lease.offset, lease.attempt));
                let (held, others): (Vec<_>, Vec<_>) = settle.leases.iter().copied().partition(is_held);
                (ranges, lost) = (of(&held), others);
            }
        }
        if ranges.is_empty() {
            let _ = settle.reply.send(Ok(wire::Settled { lost }));
            return;
        }
        let command = match settle.kind {
            SettleKind::Ack => Command::Ack(wire::QueueAck { ranges }),
            SettleKind::Nack { delay_ms } => Command::Nack(wire::QueueNack { ranges, delay_ms }),
            SettleKind::Renew => Command::Renew(wire::QueueRenew { ranges }),
        };
        let group = settle.group.clone();
        entry.put(&group, command, Part::Settle { settle, lost });
    }
}

pub(super) fn ranges_in(command: &Command) -> &[wire::OffsetRange] {
    match command {
        Command::Grant(grant) => &grant.ranges,
        Command::Ack(ack) => &ack.ranges,
        Command::Nack(nack) => &nack.ranges,
        Command::Renew(renew) => &renew.ranges,
        Command::Expire(expire) => &expire.ranges,
        Command::Bury(bury) => &bury.ranges,
        Command::Delete(_) => &[],
    }
}
