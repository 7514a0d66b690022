//! What the outcome of a control entry means for the clocks and for those who asked.

use std::collections::BTreeSet;

use arqon_proto::{wire, wire::queue_command::Command};
use arqon_raft::{Applied, ProposeError};
use prost::Message;
use tokio::time::Instant;

use super::{
    End, Lead, RETRY_PAUSE,
    clock::millis,
    entry::{Flight, Part, ranges_in},
};
use crate::{
    partition::metrics::add,
    state::{QueueOutcome, ranges_of},
};

impl Lead<'_> {
    /// The entry in flight has its outcome.
    pub(super) fn landed(&mut self, outcome: Result<Applied, ProposeError>) -> Option<End> {
        let flight = self.flight.take()?;
        let applied = match outcome {
            Ok(applied) => applied,
            Err(cause) => return self.failed(flight, &cause),
        };
        self.retry_at = None;
        let outcome = QueueOutcome::decode(applied.outcome).expect("the state machine of this process encoded it");
        assert_eq!(outcome.commands.len(), flight.parts.len(), "each command has its outcome");
        let now = Instant::now();
        let commands = flight.record.queue.into_iter().zip(flight.parts).zip(outcome.commands);
        for ((command, part), outcome) in commands {
            let lost: BTreeSet<_> = each(&outcome.lost).collect();
            if let Some(inner) = command.command {
                for range in without(ranges_in(&inner), &lost) {
                    self.took_effect(&command.group, &inner, &range, now);
                }
                match inner {
                    Command::Bury(bury) => {
                        self.burials.forget(&command.group, &each(&bury.ranges).map(|(offset, _)| offset).collect());
                    }
                    Command::Delete(_) => {
                        self.clocks.remove(&command.group);
                        self.burials.forget_group(&command.group);
                    }
                    _ => {}
                }
            }
            self.answer(&command.group, part, lost, now);
        }
        self.count_leased();
        None
    }

    /// The entry in flight has no outcome.
    fn failed(&mut self, flight: Flight, cause: &ProposeError) -> Option<End> {
        let still_leads = self.replica.leading_term() == Some(self.term);
        // A leader that has not heard from a majority of late takes no entries for a moment.
        let is_pushed_back = match cause {
            ProposeError::Overloaded => true,
            ProposeError::NotLeader { .. } => still_leads,
            ProposeError::UnknownOutcome(_) | ProposeError::Stopped(_) => false,
        };
        let error = self.replica.propose_error(cause, true);
        for (command, part) in flight.record.queue.into_iter().zip(flight.parts) {
            match part {
                // Nothing was granted: the worker waits on.
                Part::Grant { waiting, .. } if is_pushed_back => self.lines.join(command.group, waiting),
                part => part.refuse(error.clone()),
            }
        }
        if is_pushed_back {
            self.retry_at = Some(Instant::now() + RETRY_PAUSE);
            return None;
        }
        Some(if still_leads { End::Unknown } else { End::NotLeader })
    }

    /// Sets the clocks after what a committed command did to one range.
    fn took_effect(&mut self, group: &str, command: &Command, range: &wire::OffsetRange, now: Instant) {
        let replica = self.replica.clone();
        let metrics = &replica.metrics;
        let attempts_max = replica.attempts_max();
        let clock = self.clocks.entry(group.to_owned()).or_default();
        let (first, attempt, count) = (range.first, range.attempt, range.count as usize);
        let end = first + count as u64;
        let mut wait = |delay_ms| {
            clock.leases.remove(first, end);
            (first..end).for_each(|offset| clock.wait(offset, attempt, delay_ms, attempts_max, now));
        };
        match command {
            Command::Grant(grant) => {
                if !clock.ready.is_empty() {
                    (first..end).for_each(|offset| _ = clock.ready.remove(&offset));
                }
                clock.leases.set(first, end, now + millis(grant.lease_ms));
                add(&metrics.granted_count, count);
                add(&metrics.redelivered_count, if attempt > 1 { count } else { 0 });
            }
            Command::Ack(_) => clock.leases.remove(first, end),
            Command::Nack(nack) => wait(nack.delay_ms),
            Command::Expire(_) => {
                wait(0);
                add(&metrics.expired_count, count);
            }
            Command::Renew(_) => {
                let shared = replica.machine.lock();
                // A later command of the same entry may have ended some.
                let leases = shared.state.queue(group).into_iter().flat_map(|queue| queue.leased_of(range));
                for (first, end, lease) in leases {
                    clock.leases.set(first, end, now + millis(lease.holder.lease_ms));
                }
            }
            Command::Bury(_) => {
                (first..end).for_each(|offset| _ = clock.dead.remove(&offset));
                add(&metrics.dead_count, count);
            }
            // Names no jobs.
            Command::Delete(_) => {}
        }
    }

    fn answer(&mut self, group: &str, part: Part, lost: BTreeSet<(u64, u32)>, now: Instant) {
        match part {
            Part::Own => {}
            Part::Delete(delete) => drop(delete.reply.send(Ok(true))),
            Part::Settle { settle, lost: mut all } => {
                all.extend(lost.into_iter().map(|(offset, attempt)| wire::LeaseRef { offset, attempt }));
                let _ = settle.reply.send(Ok(wire::Settled { lost: all }));
            }
            Part::Grant { waiting, mut granted } => {
                if !lost.is_empty() {
                    granted.leases.retain(|lease| !lost.contains(&(lease.offset, lease.attempt)));
                }
                let ranges = without(&granted.ranges, &lost);
                let reply = (self.replica.leased(granted.leases), granted.batches);
                self.replica.metrics.work_latency.record(waiting.since.elapsed());
                if waiting.reply.send(Ok(reply)).is_err() {
                    // The worker has gone: its jobs need not wait for their leases to run out.
                    let clock = self.clocks.entry(group.to_owned()).or_default();
                    for range in ranges {
                        clock.leases.set(range.first, range.first + u64::from(range.count), now);
                    }
                }
            }
        }
    }

    pub(super) fn count_leased(&mut self) {
        let shared = self.replica.machine.lock();
        let count: usize = shared.state.queues().map(|(_, queue)| queue.leases().len()).sum();
        drop(shared);
        self.set_leased_count(count as i64);
    }

    pub(super) fn set_leased_count(&mut self, count: i64) {
        let change = count - self.leased_count;
        self.leased_count = count;
        self.replica.metrics.leased_count.fetch_add(change, std::sync::atomic::Ordering::Relaxed);
    }
}

fn each(ranges: &[wire::OffsetRange]) -> impl Iterator<Item = (u64, u32)> + '_ {
    ranges.iter().flat_map(|range| (0..u64::from(range.count)).map(move |at| (range.first + at, range.attempt)))
}

/// The ranges without the leases of `lost`.
fn without(ranges: &[wire::OffsetRange], lost: &BTreeSet<(u64, u32)>) -> Vec<wire::OffsetRange> {
    if lost.is_empty() {
        return ranges.to_vec();
    }
    ranges_of(each(ranges).filter(|lease| !lost.contains(lease)))
}
