//! Jobs without attempts left: the job goes to `<topic>.dead`, and its one result says so.
//!
//! Both are written under a lease of the job itself, so that the dead-letter and the results
//! topic refuse a second one: a leader that does not know how far the last one came writes
//! again. Only then is the job settled.

use std::sync::Arc;

use arqon_proto::{
    Batch, BatchBuilder, Compression, DecodeError, EventType, Offset, Record, records,
    wire::{self, ErrorCode},
};
use bytes::Bytes;
use futures_util::{StreamExt, stream};
use ring::digest::{Context, SHA256};

use super::{
    Replica,
    error::{error, overloaded},
};

/// Schema of the result of a dead job: JSON with `error` and, where the job had one, `job_id`.
const RESULT_SCHEMA: &str = "arqonbus.dead.v1";
/// Header of a dead job that says why.
const REASON_HEADER: &str = "arqonbus-dead-reason";
/// Longest `job_id` that is repeated in a result, in bytes.
const JOB_ID_SIZE_MAX: usize = 1_024;
/// Jobs on their way at once.
const CONCURRENT_COUNT: usize = 16;

/// A job that has had its last attempt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct DeadJob {
    pub group: String,
    pub offset: u64,
    pub attempt: u32,
}

/// Writes the jobs to the dead-letter topic and their results; says of each whether both are
/// committed.
pub(super) async fn take_away(replica: Arc<Replica>, jobs: Vec<DeadJob>) -> Vec<(DeadJob, bool)> {
    let one = |job: DeadJob| {
        let replica = replica.clone();
        async move {
            let result = replica.take_away_one(&job).await;
            if let Err(cause) = &result {
                tracing::warn!(
                    partition = replica.name(),
                    group = job.group,
                    offset = job.offset,
                    cause = cause.message,
                    "a job without attempts left could not be dead-lettered yet"
                );
            }
            (job, result.is_ok())
        }
    };
    stream::iter(jobs).map(one).buffer_unordered(CONCURRENT_COUNT).collect().await
}

/// Whether a job's own id fits into its result, whatever the job's author put there.
fn is_short(id: &serde_json::Value) -> bool {
    match id {
        serde_json::Value::String(text) => text.len() <= JOB_ID_SIZE_MAX,
        other => other.is_number(),
    }
}

impl Replica {
    async fn take_away_one(&self, job: &DeadJob) -> Result<(), wire::Error> {
        let record = self.read_record(job.offset)?;
        let reason = format!("{} attempts without an ack", job.attempt);
        let dead_topic = format!("{}.dead", self.topic.name);
        self.write(job, &dead_topic, self.dead_record(job, &record, &reason)).await?;
        if self.topic.results_topic.is_empty() {
            return Ok(());
        }
        let result = self.result_record(job, &record, &reason);
        self.write(job, &self.topic.results_topic, result).await
    }

    fn read_record(&self, offset: u64) -> Result<Record, wire::Error> {
        let readable = *self.group.readable().borrow();
        let batches = self.read_jobs(Offset(offset), readable, 1)?;
        let holds = |batch: &&Batch| batch.header.base_offset.0 <= offset && offset < batch.header.next_offset().0;
        let mut found = None;
        if let Some(batch) = batches.iter().find(holds) {
            let wanted = offset - batch.header.base_offset.0;
            records(batch, |index, record| {
                if u64::from(index) == wanted {
                    found = Some(record.to_record());
                }
                Ok::<_, DecodeError>(())
            })
            .map_err(|cause| error(ErrorCode::InternalError, cause))?;
        }
        found.ok_or_else(|| error(ErrorCode::InternalError, format_args!("job {offset} is not in the log")))
    }

    /// The job as it was, with the reason among its headers where there is room for it.
    fn dead_record(&self, job: &DeadJob, record: &Record, reason: &str) -> Record {
        let plain = Record { id: self.derived_id(job, "dead"), ..record.clone() };
        let mut marked = plain.clone();
        marked.headers.push((REASON_HEADER.to_owned(), reason.to_owned()));
        if marked.check().is_ok() { marked } else { plain }
    }

    fn result_record(&self, job: &DeadJob, record: &Record, reason: &str) -> Record {
        let mut body = serde_json::Map::new();
        if let Ok(serde_json::Value::Object(mut fields)) = serde_json::from_slice(&record.payload)
            && let Some(job_id) = fields.remove("job_id").filter(is_short)
        {
            body.insert("job_id".to_owned(), job_id);
        }
        body.insert("error".to_owned(), format!("DEAD_LETTERED: {reason}").into());
        let headers = record.headers.iter().filter(|(name, _)| name == "traceparent").cloned().collect();
        Record {
            id: self.derived_id(job, "result"),
            event_type: EventType::JobResult as u8,
            schema: RESULT_SCHEMA.to_owned(),
            key: record.key.clone(),
            headers,
            extension: Bytes::new(),
            payload: serde_json::Value::Object(body).to_string().into(),
        }
    }

    /// A UUIDv8 that follows from the job: a second try makes the same event.
    fn derived_id(&self, job: &DeadJob, kind: &str) -> [u8; 16] {
        let mut hash = Context::new(&SHA256);
        for text in [&self.topic.tenant, &self.topic.name, &job.group, kind] {
            hash.update(&(text.len() as u64).to_le_bytes());
            hash.update(text.as_bytes());
        }
        hash.update(&self.partition.0.to_le_bytes());
        hash.update(&job.offset.to_le_bytes());
        let mut id = [0; 16];
        id.copy_from_slice(&hash.finish().as_ref()[..16]);
        uuid::Uuid::new_v8(id).into_bytes()
    }

    async fn write(&self, job: &DeadJob, topic: &str, record: Record) -> Result<(), wire::Error> {
        let count = self.services.partition_count(&self.topic.tenant, topic).filter(|count| *count > 0);
        let count = count.ok_or_else(|| wire::Error {
            field: topic.to_owned(),
            ..error(ErrorCode::TargetNotFound, format_args!("topic {topic} does not exist"))
        })?;
        let keys = self.services.lease_keys();
        let key = keys.last().ok_or_else(|| overloaded("the cluster has no lease key yet"))?;
        let floor = self.machine.lock().state.queue(&job.group).map_or(0, |queue| queue.floor());
        let token = key.sign(&self.claims(&job.group, floor, job.offset, job.attempt, topic.to_owned()));
        let mut builder = BatchBuilder::new();
        builder.push(&record).map_err(|cause| error(ErrorCode::InternalError, cause))?;
        let request = wire::Produce {
            topic: topic.to_owned(),
            partition: self.partition.0 % count,
            durability: wire::Durability::MajorityFsync.into(),
            lease_tokens: vec![token],
        };
        let batch = builder.build(Compression::None, None);
        let written = self.services.produce_routed(self.topic.tenant.clone(), request, batch).await;
        match written {
            // An earlier try, or for the result the worker itself, was faster.
            Err(cause) if cause.code() == ErrorCode::Duplicate => Ok(()),
            Err(cause) => Err(cause),
            Ok(_) => Ok(()),
        }
    }
}
