//! A client's batch: checked, stamped, submitted, answered.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use arqon_proto::{
    Batch, LeaseKey, Offset, TopicClass, check_records, decode_stamps, encode_stamps, limits,
    wire::{self, Durability, LeaseClaims, StampSource, Stamps},
};
use bytes::Bytes;
use tokio::{sync::oneshot, time::Instant};

use super::{
    Partition, Replica,
    error::{bad_batch, invalid, overloaded, unknown_outcome},
    metrics::add,
    submit::{Placed, Submission, Unplaced},
};
use crate::state::Refused;

/// How long a duplicate waits for the batch in flight that it repeats.
const DUPLICATE_WAIT: Duration = Duration::from_secs(30);

impl Partition {
    /// Writes one batch and waits for its outcome. The caller has checked that the client may.
    ///
    /// # Errors
    /// See [`Partition::submit`] and [`Submitted::outcome`].
    pub async fn produce(&self, request: wire::Produce, batch: Batch) -> Result<wire::Produced, wire::Error> {
        self.submit(request, batch)?.outcome().await
    }

    /// Checks one batch and puts it in line; batches are proposed in the order of these calls.
    /// The outcome need not be awaited before the next call.
    ///
    /// # Errors
    /// NOT_LEADER; VALIDATION_ERROR when a rule on batches or lease tokens is broken;
    /// OVERLOADED when too much is in line. Nothing was written.
    pub fn submit(&self, request: wire::Produce, mut batch: Batch) -> Result<Submitted, wire::Error> {
        let replica = &self.replica;
        replica.require_leader()?;
        let durability = Durability::try_from(request.durability)
            .map_err(|_| invalid("durability", "it is not a level that this broker knows"))?;
        if !batch.stamps.is_empty() {
            return Err(invalid("stamps", "only the bus stamps records"));
        }
        check_records(&batch).map_err(|cause| bad_batch(&cause))?;
        let stamps = replica.stamp(&mut batch, &request.lease_tokens)?;
        let size = batch.header.batch_size();
        let (reply, placed) = oneshot::channel();
        let submitted = Submitted {
            replica: replica.clone(),
            started: Instant::now(),
            durability,
            batch: batch.clone(),
            stamps: stamps.clone(),
            placed,
        };
        replica.reserve(size)?;
        let submission = Submission::Data { batch, stamps, reply };
        self.submissions.try_send(submission).map_err(|_| {
            replica.release(size);
            add(&replica.metrics.overloaded_count, 1);
            overloaded(format_args!("{} has too many batches in line", replica.name()))
        })?;
        Ok(submitted)
    }
}

impl Replica {
    /// Checks the lease tokens and writes what they prove into the batch's stamps.
    fn stamp(&self, batch: &mut Batch, tokens: &[Bytes]) -> Result<Option<Arc<Stamps>>, wire::Error> {
        let count = batch.header.record_count as usize;
        if !matches!(self.class, TopicClass::Results | TopicClass::Dead) {
            let is_plain = tokens.is_empty();
            let refusal = || invalid("lease_tokens", format_args!("{} is no topic for results", self.topic.name));
            return if is_plain { Ok(None) } else { Err(refusal()) };
        }
        if tokens.len() != count {
            let message = format_args!(
                "{} takes results of granted jobs only: {count} records came with {} lease tokens",
                self.topic.name,
                tokens.len()
            );
            return Err(invalid("lease_tokens", message));
        }
        if batch.header.has_producer() {
            return Err(invalid("producer_id", "results are de-duplicated by their job, not by producer"));
        }
        let keys = self.services.lease_keys();
        let claims: Vec<_> = tokens.iter().map(|token| self.verify(&keys, token)).collect::<Result<_, _>>()?;
        let encoded = encode_stamps(sources_of(&claims)?);
        if batch.header.batch_size() + encoded.len() > limits::BATCH_SIZE_MAX {
            return Err(invalid("batch", "it is over the size limit with its stamps; send fewer records at a time"));
        }
        let stamps = decode_stamps(&encoded, batch.header.record_count).map_err(|cause| bad_batch(&cause))?;
        batch.set_stamps(encoded);
        Ok(stamps.map(Arc::new))
    }

    fn verify(&self, keys: &[LeaseKey], token: &Bytes) -> Result<LeaseClaims, wire::Error> {
        let claims = LeaseKey::verify(keys, token).map_err(|cause| invalid("lease_tokens", cause))?;
        // A dead-letter topic may have fewer partitions than its jobs; results never.
        let is_partition = claims.partition == self.partition.0 || self.class == TopicClass::Dead;
        if claims.tenant != self.topic.tenant || claims.results_topic != self.topic.name || !is_partition {
            let message = format_args!(
                "the lease of job {} of {}/{} gives no right to write to {}",
                claims.offset,
                claims.topic,
                claims.partition,
                self.name()
            );
            return Err(invalid("lease_tokens", message));
        }
        Ok(claims)
    }

    /// Makes room for `size` bytes in line.
    fn reserve(&self, size: usize) -> Result<(), wire::Error> {
        use std::sync::atomic::Ordering::Relaxed;
        let before = self.queued_size.fetch_add(size, Relaxed);
        if before > 0 && before + size > limits::UNCOMMITTED_SIZE_MAX {
            self.release(size);
            add(&self.metrics.overloaded_count, 1);
            return Err(overloaded(format_args!("{} has too many bytes in line", self.name())));
        }
        Ok(())
    }

    pub(super) fn release(&self, size: usize) {
        self.queued_size.fetch_sub(size, std::sync::atomic::Ordering::Relaxed);
    }
}

/// One stamp per claim. Claims of one queue share the highest floor that any of them proves,
/// so that records of one worker share one source.
fn sources_of(claims: &[LeaseClaims]) -> Result<Vec<(StampSource, u64, u32)>, wire::Error> {
    let mut floors = BTreeMap::new();
    let mut offsets = BTreeSet::new();
    let scope =
        |claims: &LeaseClaims| (claims.topic.clone(), claims.partition, claims.group.clone(), claims.replay_id.clone());
    for claims in claims {
        // The answer to a duplicate names job offsets: each must mean one record.
        if !offsets.insert(claims.offset) {
            return Err(invalid("lease_tokens", format_args!("two records of the batch answer job {}", claims.offset)));
        }
        let floor = floors.entry(scope(claims)).or_insert(claims.acked_floor);
        *floor = claims.acked_floor.max(*floor);
    }
    let stamps = claims.iter().map(|claims| {
        let source = StampSource {
            topic: claims.topic.clone(),
            partition: claims.partition,
            group: claims.group.clone(),
            operator_id: claims.operator_id.clone(),
            operator_version: claims.operator_version.clone(),
            circuit_revision: claims.circuit_revision,
            replay_id: claims.replay_id.clone(),
            acked_floor: floors.get(&scope(claims)).copied().unwrap_or(claims.acked_floor),
        };
        (source, claims.offset, claims.attempt)
    });
    Ok(stamps.collect())
}

/// A batch in line; its outcome may be awaited at any time, or dropped without effect on it.
pub struct Submitted {
    replica: Arc<Replica>,
    started: Instant,
    durability: Durability,
    batch: Batch,
    stamps: Option<Arc<Stamps>>,
    placed: oneshot::Receiver<Result<Placed, Unplaced>>,
}

impl Submitted {
    /// Waits until the batch is as durable as its request asks.
    ///
    /// # Errors
    /// NOT_LEADER and OVERLOADED: nothing was written. UNKNOWN_OUTCOME: send the same batch
    /// again. DUPLICATE, OUT_OF_ORDER, UNKNOWN_PRODUCER, PRODUCER_FENCED: the sequences do not
    /// fit what is in the log.
    pub async fn outcome(self) -> Result<wire::Produced, wire::Error> {
        let replica = self.replica.clone();
        let result = self.wait().await;
        if let Err(cause) = &result {
            match cause.code() {
                wire::ErrorCode::Duplicate => add(&replica.metrics.duplicate_count, 1),
                wire::ErrorCode::Overloaded => add(&replica.metrics.overloaded_count, 1),
                _ => {}
            }
        }
        result
    }

    async fn wait(mut self) -> Result<wire::Produced, wire::Error> {
        let replica = self.replica.clone();
        let placed = match (&mut self.placed).await {
            Ok(Ok(placed)) => placed,
            Ok(Err(Unplaced::Refused(Refused::InFlight))) => return Err(self.wait_for_first().await),
            Ok(Err(Unplaced::Refused(cause))) => return Err(replica.refused(cause)),
            Ok(Err(Unplaced::Failed(cause))) => return Err(cause),
            // The submission task drops what it has not proposed when it ends.
            Err(_) => return Err(replica.not_leader()),
        };
        if self.durability == Durability::LeaderReceived {
            replica.count_produced(&self.batch, self.started);
            return Ok(produced(placed.base_offset, placed.time_ms, self.durability));
        }
        let applied = placed.applied().await.map_err(|cause| replica.propose_error(&cause, true))?;
        replica.count_produced(&self.batch, self.started);
        Ok(produced(applied.base_offset, applied.time_ms, self.durability))
    }

    /// The batch repeats one in flight: its answer is a duplicate's, once that one is committed.
    async fn wait_for_first(&self) -> wire::Error {
        let replica = &self.replica;
        let Some(term) = replica.leading_term() else { return replica.not_leader() };
        let mut readable = replica.group.readable();
        let mut status = replica.group.watch();
        let give_up = tokio::time::sleep(DUPLICATE_WAIT);
        tokio::pin!(give_up);
        loop {
            readable.borrow_and_update();
            status.borrow_and_update();
            if replica.leading_term() != Some(term) {
                return replica.not_leader();
            }
            let checked = {
                let shared = replica.machine.lock();
                shared.in_flight.check(&shared.state, &self.batch.header, self.stamps.as_deref())
            };
            match checked {
                Err(Refused::InFlight) => {}
                Err(cause) => return replica.refused(cause),
                // The first one was not written after all.
                Ok(()) => return overloaded("the first attempt to write this batch failed"),
            }
            tokio::select! {
                _ = readable.changed() => {}
                changed = status.changed() => if changed.is_err() { return replica.not_leader() },
                () = &mut give_up => return unknown_outcome("the same batch, sent before, is still not committed"),
            }
        }
    }
}

impl Replica {
    fn count_produced(&self, batch: &Batch, started: Instant) {
        let metrics = &self.metrics;
        metrics.produce_latency.record(started.elapsed());
        add(&metrics.batch_count, 1);
        add(&metrics.record_count, batch.header.record_count as usize);
        add(&metrics.batch_size, batch.header.batch_size());
    }
}

impl std::fmt::Debug for Replica {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.name())
    }
}

fn produced(base_offset: Offset, time_ms: u64, durability: Durability) -> wire::Produced {
    wire::Produced { base_offset: base_offset.0, time_ms, durability: durability.into() }
}
