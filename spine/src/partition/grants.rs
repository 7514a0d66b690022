//! Which waiting worker gets which jobs. Reads the jobs first: only what fits into one answer
//! is granted.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
};

use arqon_proto::{
    Batch, LeaseKey, Offset, limits,
    wire::{self, LeaseClaims, OffsetRange, QueueGrant},
};
use arqon_raft::Readable;
use bytes::BytesMut;

use super::{
    Replica,
    ahead::{self, Place},
    error::{error, invalid, overloaded},
    queue::{Line, Waiting},
};
use crate::state::{Holder, ranges_of};

/// Bytes of batches that one entry's grants hold in memory until it is committed.
const GRANTED_SIZE_MAX: usize = 4 * limits::FETCH_SIZE_MAX;
/// Read at a time when looking for jobs, in bytes.
const READ_SIZE: usize = 256 << 10;
/// What offset and attempt add to the size of a token at most, in bytes.
const OFFSET_GROWTH: usize = 18;

/// Read ahead of the jobs that come next, in bytes.
const AHEAD_SIZE_MAX: usize = limits::FETCH_SIZE_MAX;

/// Jobs for one worker.
pub(super) struct Granted {
    pub leases: Vec<wire::Lease>,
    pub batches: Vec<Batch>,
    pub ranges: Vec<OffsetRange>,
}

impl Granted {
    pub(super) fn command(&self, holder: &Holder) -> QueueGrant {
        QueueGrant {
            ranges: self.ranges.clone(),
            worker: holder.worker.clone(),
            operator_id: holder.operator_id.clone(),
            operator_version: holder.operator_version.clone(),
            lease_ms: holder.lease_ms,
        }
    }
}

/// The grants of one control entry.
pub(super) struct Grants<'a> {
    replica: &'a Arc<Replica>,
    readable: Readable,
    key: Option<LeaseKey>,
    size: usize,
    new_group_count: usize,
    // Batches at hand, by base offset.
    read: BTreeMap<u64, Batch>,
    // Where groups go on next time, and the bytes that they took this time.
    next: Vec<(u64, usize)>,
}

/// What of a group's jobs is still to be had in this entry.
struct Stock {
    floor: u64,
    // Pending jobs with the attempt that a grant makes.
    again: VecDeque<(u64, u32)>,
    next: u64,
    end: u64,
    free_count: usize,
}

impl Stock {
    /// The next job and the attempt that a grant makes: what was handed out before comes first.
    fn first(&self) -> Option<(u64, u32)> {
        let fresh = (self.next < self.end && self.free_count > 0).then_some((self.next, 1));
        // What was handed out before is outstanding already and takes no more room.
        self.again.front().copied().or(fresh)
    }

    fn take_first(&mut self) {
        if self.again.pop_front().is_none() {
            self.next += 1;
            self.free_count -= 1;
        }
    }
}

impl<'a> Grants<'a> {
    /// With batches that were read before.
    pub(super) fn new(replica: &'a Arc<Replica>, at_hand: Vec<Batch>) -> Self {
        let readable = *replica.group.readable().borrow();
        let key = replica.services.lease_keys().last().cloned();
        let read = at_hand.into_iter().map(|batch| (batch.header.base_offset.0, batch)).collect();
        Self { replica, readable, key, size: 0, new_group_count: 0, read, next: Vec::new() }
    }

    /// Serves the line as far as jobs and room go. Those served (or refused) have left it.
    pub(super) fn of_group(
        &mut self,
        group: &str,
        line: &mut Line,
        ready: &BTreeSet<u64>,
    ) -> Vec<(u64, Waiting, Result<Granted, wire::Error>)> {
        // Nothing to count while nothing comes back.
        let wanted_count = if ready.is_empty() { 0 } else { line.values().map(|waiting| waiting.job_count_max).sum() };
        let Some(mut stock) = self.stock(group, ready, wanted_count) else {
            let (name, topic) = (self.replica.name(), &self.replica.topic.name);
            let message =
                format!("{name} has as many groups as it may; `arqon group delete {topic} GROUP` removes one");
            let full = || invalid("group", &message);
            return std::mem::take(line).into_iter().map(|(ticket, waiting)| (ticket, waiting, Err(full()))).collect();
        };
        let mut out = Vec::new();
        let size_before = self.size;
        while stock.first().is_some()
            && self.size < GRANTED_SIZE_MAX
            && let Some((ticket, waiting)) = line.pop_first()
        {
            if !waiting.is_wanted() {
                out.push((ticket, waiting, Err(self.replica.not_leader())));
                continue;
            }
            let granted = self.serve(group, &mut stock, waiting.job_count_max, waiting.holder.clone());
            let is_refused = granted.is_err();
            out.push((ticket, waiting, granted));
            if is_refused {
                break;
            }
        }
        if self.size > size_before && stock.next < stock.end {
            self.next.push((stock.next, self.size - size_before));
        }
        out
    }

    /// Reads on from where the groups that took jobs left off, while their grants are written.
    pub(super) fn read_ahead(self) {
        let (log, Some(through)) = (self.replica.group.log(), self.readable.index) else { return };
        for (next, size_max) in &self.next {
            let offset = Offset(*next);
            if log.is_recent(offset) {
                continue;
            }
            let (mut rest, mut end, mut size) = (Vec::new(), *next, 0);
            while let Some(batch) = self.at_hand(end) {
                end = batch.header.next_offset().0;
                size += batch.header.batch_size();
                rest.push(batch.clone());
            }
            let more = (*size_max).clamp(READ_SIZE, AHEAD_SIZE_MAX).saturating_sub(size);
            let kept = self.replica.services.ahead();
            let reading = ahead::read_on(rest, log, Offset(end), through, more);
            kept.keep(Place { group: self.replica.group.id(), offset }, size + more, reading);
        }
    }

    fn at_hand(&self, offset: u64) -> Option<&Batch> {
        let (_, batch) = self.read.range(..=offset).next_back()?;
        (batch.header.next_offset().0 > offset).then_some(batch)
    }

    /// The jobs that the group has; `None` when it would be one group too many.
    fn stock(&mut self, group: &str, ready: &BTreeSet<u64>, wanted_count: usize) -> Option<Stock> {
        let log_start = self.replica.group.log().log_start().0;
        let shared = self.replica.machine.lock();
        let end = self.readable.next_offset.0;
        let stock = |floor, again, next: u64, outstanding_count: usize| Stock {
            floor,
            again,
            next: next.max(log_start),
            end,
            free_count: limits::OUTSTANDING_COUNT_MAX.saturating_sub(outstanding_count),
        };
        match shared.state.queue(group) {
            Some(queue) => {
                let attempt_of =
                    |offset: &u64| queue.pending().get(offset).map(|pending| (*offset, pending.attempt + 1));
                let again: VecDeque<_> = ready.iter().filter_map(attempt_of).take(wanted_count).collect();
                Some(stock(queue.floor(), again, queue.next(), queue.outstanding_count()))
            }
            None => {
                if shared.state.queues().count() + self.new_group_count >= limits::QUEUE_GROUP_COUNT_MAX {
                    return None;
                }
                self.new_group_count += 1;
                Some(stock(log_start, VecDeque::new(), log_start, 0))
            }
        }
    }

    fn serve(
        &mut self,
        group: &str,
        stock: &mut Stock,
        job_count_max: usize,
        holder: Arc<Holder>,
    ) -> Result<Granted, wire::Error> {
        let key = self.key.clone().ok_or_else(|| overloaded("the cluster has no lease key yet"))?;
        let mut jobs = Vec::new();
        let mut batches: BTreeMap<u64, Batch> = BTreeMap::new();
        let mut size = 0;
        while jobs.len() < job_count_max
            && let Some((offset, attempt)) = stock.first()
        {
            let batch = match self.read(offset) {
                Ok(batch) => batch,
                // What was found before is good.
                Err(_) if !jobs.is_empty() => break,
                Err(cause) => return Err(cause),
            };
            let base = batch.header.base_offset.0;
            if !batches.contains_key(&base) {
                // Half a batch costs the reader and the network as much as a whole one.
                let left = batch.header.next_offset().0 - offset;
                if jobs.len() >= job_count_max.div_ceil(2) && left > (job_count_max - jobs.len()) as u64 {
                    break;
                }
                if !batches.is_empty() && size + batch.header.batch_size() > limits::FETCH_SIZE_MAX {
                    break;
                }
                size += batch.header.batch_size();
                batches.insert(base, batch);
            }
            jobs.push((offset, attempt));
            stock.take_first();
        }
        self.size += size;
        jobs.sort_unstable();
        let mut claims = self.claims(group, stock.floor, &holder);
        // All tokens of a grant lie in one buffer.
        let mut tokens = BytesMut::with_capacity(jobs.len() * (key.token_size(&claims) + OFFSET_GROWTH));
        let lease = |&(offset, attempt): &(u64, u32)| {
            (claims.offset, claims.attempt) = (offset, attempt);
            key.sign_into(&claims, &mut tokens);
            wire::Lease { offset, attempt, lease_ms: holder.lease_ms, token: tokens.split().freeze() }
        };
        let leases = jobs.iter().map(lease).collect();
        Ok(Granted { leases, batches: batches.into_values().collect(), ranges: ranges_of(jobs) })
    }

    /// What the tokens of a grant have in common.
    fn claims(&self, group: &str, floor: u64, holder: &Holder) -> LeaseClaims {
        let results_topic = self.replica.topic.results_topic.clone();
        LeaseClaims {
            operator_id: holder.operator_id.clone(),
            operator_version: holder.operator_version.clone(),
            ..self.replica.claims(group, floor, 0, 0, results_topic)
        }
    }

    fn read(&mut self, offset: u64) -> Result<Batch, wire::Error> {
        if self.at_hand(offset).is_none() {
            for batch in self.replica.read_jobs(Offset(offset), self.readable, READ_SIZE)? {
                self.read.insert(batch.header.base_offset.0, batch);
            }
        }
        self.at_hand(offset).cloned().ok_or_else(|| {
            error(
                wire::ErrorCode::InternalError,
                format_args!("the log of {} does not hold offset {offset}", self.replica.name()),
            )
        })
    }
}

impl Replica {
    /// What was read ahead for a group that goes on at `offset`, or what is read now where that
    /// needs the disk. Nothing where that fails: whoever needs it will read it again, and tell.
    pub(super) async fn jobs_ahead(&self, offset: Offset) -> Vec<Batch> {
        let (log, readable) = (self.group.log(), *self.group.readable().borrow());
        let kept = self.services.ahead().take(Place { group: self.group.id(), offset });
        let reading = match (kept, readable.index) {
            (Some(reading), _) => reading,
            (None, Some(through)) if offset < readable.next_offset && !log.is_recent(offset) => {
                ahead::read_jobs(log, offset, through, READ_SIZE)
            }
            _ => return Vec::new(),
        };
        reading.await.ok().and_then(Result::ok).unwrap_or_default()
    }

    /// Committed batches from the one that holds `offset` on.
    pub(super) fn read_jobs(
        &self,
        offset: Offset,
        readable: Readable,
        size_max: usize,
    ) -> Result<Vec<Batch>, wire::Error> {
        let Some(through) = readable.index else { return Ok(Vec::new()) };
        self.group.log().read_data(offset, through, size_max).map_err(|cause| self.read_error(cause))
    }

    /// The right to write the result of a job of this partition, without an operator.
    pub(super) fn claims(
        &self,
        group: &str,
        floor: u64,
        offset: u64,
        attempt: u32,
        results_topic: String,
    ) -> LeaseClaims {
        LeaseClaims {
            tenant: self.topic.tenant.clone(),
            topic: self.topic.name.clone(),
            partition: self.partition.0,
            offset,
            group: group.to_owned(),
            attempt,
            acked_floor: floor,
            results_topic,
            ..LeaseClaims::default()
        }
    }
}
