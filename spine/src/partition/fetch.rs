//! Reads of what is committed, and waiting for more.

use std::time::Duration;

use arqon_proto::{Batch, Offset, RaftIndex, limits, wire, wire::list_offsets::At};
use arqon_raft::Readable;
use arqon_storage::ReadError;
use tokio::time::Instant;

use super::{
    Partition, Replica,
    ahead::{self, Place},
    error::{error, invalid},
};

impl Partition {
    /// Reads data batches from an offset on, waiting at the tail for up to `wait_ms`.
    ///
    /// # Errors
    /// NOT_LEADER unless any replica may answer; OFFSET_OUT_OF_RANGE with the log start when
    /// the offset is trimmed or beyond the end; DAMAGED naming the offsets.
    pub async fn fetch(&self, request: wire::Fetch) -> Result<(wire::Fetched, Vec<Batch>), wire::Error> {
        let replica = &self.replica;
        let term = if request.any_replica { None } else { Some(replica.require_leader()?) };
        let mut is_confirmed = false;
        if request.linearizable {
            replica.confirm_leader().await?;
            is_confirmed = true;
        }
        let wait_ms = request.wait_ms.min(limits::POLL_WAIT_MS_MAX);
        let deadline = Instant::now() + Duration::from_millis(u64::from(wait_ms));
        let mut readable = replica.group.readable();
        let mut status = replica.group.watch();
        loop {
            let now = *readable.borrow_and_update();
            status.borrow_and_update();
            // A leader of before must not call an offset wrong that its successor has.
            if !request.any_replica && !is_confirmed && Offset(request.offset) > now.next_offset {
                replica.confirm_leader().await?;
                is_confirmed = true;
                continue;
            }
            if let Some(reply) = replica.read(&request, now).await? {
                return Ok(reply);
            }
            // A client must not wait here while the records arrive at another leader.
            if term.is_some() && replica.leading_term() != term {
                return Err(replica.not_leader());
            }
            tokio::select! {
                changed = readable.changed() => if changed.is_err() { return Err(replica.not_leader()) },
                changed = status.changed() => if changed.is_err() { return Err(replica.not_leader()) },
                () = tokio::time::sleep_until(deadline) => return Ok((replica.fetched(now), Vec::new())),
            }
        }
    }

    /// An offset by name or by time. By time: the first record of a batch at or after it, or
    /// the end of the log. The leader asks a majority whether it still leads, so neither the start nor the end that it
    /// tells is behind what anybody was told before.
    ///
    /// # Errors
    /// NOT_LEADER unless any replica may answer; VALIDATION_ERROR when nothing is asked for;
    /// DAMAGED.
    pub async fn list_offsets(&self, request: wire::ListOffsets) -> Result<wire::OffsetsListed, wire::Error> {
        let replica = &self.replica;
        if !request.any_replica {
            replica.confirm_leader().await?;
        }
        let readable = *replica.group.readable().borrow();
        let log = replica.group.log();
        let offset = match request.at {
            Some(At::Earliest(_)) => replica.log_start(),
            Some(At::Latest(_)) => readable.next_offset,
            Some(At::TimeMs(time_ms)) => match readable.index {
                Some(through) => log.offset_at_time(time_ms, through).map_err(|cause| replica.read_error(cause))?,
                None => readable.next_offset,
            },
            None => return Err(invalid("at", "ask for earliest, latest or a time")),
        };
        Ok(wire::OffsetsListed { offset: offset.0 })
    }
}

impl Replica {
    /// Asks a majority whether this replica leads, and waits until all that was acknowledged by then is applied here.
    async fn confirm_leader(&self) -> Result<(), wire::Error> {
        self.require_leader()?;
        let confirmed = Box::pin(self.group.confirm_leader()).await;
        confirmed.map_err(|_| self.not_leader())
    }

    /// The answer, if there is one without waiting for more to be committed.
    async fn read(
        &self,
        request: &wire::Fetch,
        readable: Readable,
    ) -> Result<Option<(wire::Fetched, Vec<Batch>)>, wire::Error> {
        let offset = Offset(request.offset);
        let log_start = self.log_start();
        if offset < log_start {
            return Err(self.read_error(ReadError::OutOfRange { log_start }));
        }
        // A replica that lags must not call an offset wrong that its leader has.
        if offset > readable.next_offset && !request.any_replica {
            return Err(wire::Error {
                log_start: log_start.0,
                ..error(
                    wire::ErrorCode::OffsetOutOfRange,
                    format_args!("{} ends at offset {}, not at {offset}", self.name(), readable.next_offset),
                )
            });
        }
        let Some(through) = readable.index.filter(|_| offset < readable.next_offset) else { return Ok(None) };
        let size_max = match request.bytes_max as usize {
            0 => limits::FETCH_SIZE_MAX,
            size => size.min(limits::FETCH_SIZE_MAX),
        };
        let log = self.group.log();
        let batches = if log.is_recent(offset) {
            log.read_data(offset, through, size_max)
        } else {
            self.read_from_disk(offset, size_max, through, readable.next_offset).await?
        };
        Ok(Some((self.fetched(readable), batches.map_err(|cause| self.read_error(cause))?)))
    }

    /// The outer error: the node is stopping.
    async fn read_from_disk(
        &self,
        offset: Offset,
        size_max: usize,
        through: RaftIndex,
        end: Offset,
    ) -> Result<Result<Vec<Batch>, ReadError>, wire::Error> {
        let (log, kept, group) = (self.group.log(), self.services.ahead(), self.group.id());
        let place = Place { group, offset };
        let reading = kept.take(place).unwrap_or_else(|| kept.read(log, offset, through, size_max));
        let mut batches = match reading.await.map_err(|_| self.not_leader())? {
            Ok(batches) => batches,
            Err(cause) => return Ok(Err(cause)),
        };
        ahead::cut(&mut batches, size_max);
        let next = batches.last().map(|batch| batch.header.next_offset());
        if let Some(offset) = next.filter(|next| *next < end && !log.is_recent(*next)) {
            kept.keep(Place { group, offset }, size_max, kept.read(log, offset, through, size_max));
        }
        Ok(Ok(batches))
    }

    fn fetched(&self, readable: Readable) -> wire::Fetched {
        wire::Fetched {
            committed: readable.next_offset.0,
            log_start: self.log_start().0,
            topic: self.topic.name.clone(),
            partition: self.partition.0,
        }
    }
}
