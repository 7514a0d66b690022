//! Events to write, and events as they are read.

use arqon_proto::{
    Batch, BatchBuilder, Compression, DecodeError, EventType, RecordParts, RecordRef, decode_stamps, records, wire,
};
use bytes::Bytes;
use uuid::Uuid;

use crate::Error;

/// An event as clients read it, assembled from batch header, stamps and record.
pub type Event = wire::Event;

const TRACEPARENT: &str = "traceparent";

/// An event to be published.
///
/// ```
/// use arqon_sdk::NewEvent;
/// let event = NewEvent::new("hello").schema("example.greeting.v1").key("greetings").header("lang", "en");
/// assert_eq!(&event.payload[..], b"hello");
/// ```
#[derive(Clone, Debug, Default, PartialEq)]
pub struct NewEvent {
    /// UUIDv7; made on sending when `None`.
    pub id: Option<[u8; 16]>,
    /// Schema name with a version, as in `arqonbus.nvm.job.v1`, or empty.
    pub schema: String,
    /// Events with the same key go to the same partition, in order. Empty: any partition.
    pub key: Bytes,
    /// The payload, opaque to the bus; 1 MiB at most.
    pub payload: Bytes,
    /// Names and values.
    pub headers: Vec<(String, String)>,
    /// What the event is for.
    pub event_type: EventType,
    /// W3C trace context, or empty.
    pub traceparent: String,
}

impl NewEvent {
    /// An event with `payload` and nothing else.
    pub fn new(payload: impl Into<Bytes>) -> Self {
        Self { payload: payload.into(), ..Self::default() }
    }

    /// Sets the schema's name.
    #[must_use]
    pub fn schema(mut self, schema: impl Into<String>) -> Self {
        self.schema = schema.into();
        self
    }

    /// Sets the partitioning key.
    #[must_use]
    pub fn key(mut self, key: impl Into<Bytes>) -> Self {
        self.key = key.into();
        self
    }

    /// Adds a header.
    #[must_use]
    pub fn header(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.headers.push((name.into(), value.into()));
        self
    }

    /// Sets what the event is for.
    #[must_use]
    pub fn event_type(mut self, event_type: EventType) -> Self {
        self.event_type = event_type;
        self
    }

    /// Sets the trace context.
    #[must_use]
    pub fn traceparent(mut self, traceparent: impl Into<String>) -> Self {
        self.traceparent = traceparent.into();
        self
    }

    /// Sets the id, a UUIDv7.
    #[must_use]
    pub fn id(mut self, id: [u8; 16]) -> Self {
        self.id = Some(id);
        self
    }

    /// Calls `with` with the record to write; its id is zero when the event has none.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming the field over its limit.
    pub(crate) fn checked<T>(&self, with: impl FnOnce(RecordParts<'_>) -> T) -> Result<T, Error> {
        let mut record = RecordParts {
            id: self.id.unwrap_or_default(),
            event_type: self.event_type as u8,
            schema: &self.schema,
            key: &self.key,
            headers: &self.headers,
            extension: &[],
            payload: &self.payload,
        };
        let traced: Vec<_>;
        if !self.traceparent.is_empty() {
            let others = self.headers.iter().filter(|(name, _)| name != TRACEPARENT).cloned();
            traced = others.chain([(TRACEPARENT.to_owned(), self.traceparent.clone())]).collect();
            record.headers = &traced;
        }
        record.check().map_err(invalid_event)?;
        Ok(with(record))
    }

    /// A batch of this event alone.
    ///
    /// # Errors
    /// As [`NewEvent::checked`].
    pub(crate) fn batch(&self) -> Result<Batch, Error> {
        self.checked(|record| {
            let id = self.id.unwrap_or_else(|| Uuid::now_v7().into_bytes());
            let mut builder = BatchBuilder::new();
            let _first_always_fits = builder.append(&RecordParts { id, ..record });
            builder.build(Compression::None, None)
        })
    }
}

/// The limit or name at fault, as an argument's error.
fn invalid_event(error: DecodeError) -> Error {
    let text = error.to_string();
    match error {
        DecodeError::TooLarge { field, .. } | DecodeError::Text { field } => {
            Error::invalid(field, text.strip_prefix(field).unwrap_or(&text).trim_start())
        }
        _ => Error::invalid("event", text),
    }
}

/// The events of one data batch, from offset `from` on.
///
/// # Errors
/// Stamps or records that are malformed.
pub(crate) fn assemble(
    topic: &str,
    tenant: &str,
    partition: u32,
    batch: &Batch,
    from: u64,
) -> Result<Vec<Event>, DecodeError> {
    let header = &batch.header;
    let stamps = decode_stamps(&batch.stamps, header.record_count)?;
    let causes: Vec<wire::Cause> =
        stamps.as_ref().map(|stamps| stamps.iter().map(|stamp| stamp.cause()).collect()).unwrap_or_default();
    let mut out = Vec::with_capacity((header.record_count as usize).min(4_096));
    records(batch, |index, record| {
        let offset = header.base_offset.0 + u64::from(index);
        if offset < from {
            return Ok(());
        }
        let mut event = from_record(batch, &record)?;
        event.topic = topic.to_owned();
        event.tenant_id = tenant.to_owned();
        event.partition = partition;
        event.offset = offset;
        event.time_ms = header.time_ms;
        if header.has_producer() {
            event.producer_id = Bytes::copy_from_slice(&header.producer_id);
            event.sequence = header.base_sequence + u64::from(index);
        }
        event.cause = causes.get(index as usize).cloned();
        out.push(event);
        Ok::<_, DecodeError>(())
    })?;
    Ok(out)
}

fn from_record(batch: &Batch, record: &RecordRef<'_>) -> Result<Event, DecodeError> {
    // Records that were not compressed lie in the batch's own buffer, which is shared then.
    let bytes = |part: &[u8]| match batch.header.compression {
        Compression::None if !part.is_empty() => batch.records.slice_ref(part),
        _ => Bytes::copy_from_slice(part),
    };
    let mut event = Event {
        id: Bytes::copy_from_slice(&record.id),
        schema: record.schema.to_owned(),
        payload: bytes(record.payload),
        key: bytes(record.key),
        r#type: EventType::try_from(i32::from(record.event_type))
            .map_err(|_| DecodeError::Value { field: "event type", value: u64::from(record.event_type) })?
            .into(),
        ..Event::default()
    };
    for (name, value) in record.headers() {
        if name == TRACEPARENT {
            event.traceparent = value.to_owned();
        } else {
            event.headers.insert(name.to_owned(), value.to_owned());
        }
    }
    Ok(event)
}

#[cfg(test)]
mod tests {
    use arqon_proto::{Offset, ProducerStamp, encode_stamps};

    use super::*;

    #[test]
    fn an_event_reads_as_it_was_written() {
        for compression in [Compression::None, Compression::Lz4] {
            let payload = vec![7u8; 500];
            let new = NewEvent::new(payload.clone())
                .id([5; 16])
                .schema("a.b.v1")
                .key("k")
                .header("x", "y")
                .event_type(EventType::Job)
                .traceparent("00-aa-bb-01");
            let mut builder = BatchBuilder::new();
            NewEvent::new("first").checked(|record| assert!(builder.append(&record))).unwrap();
            new.checked(|record| assert!(builder.append(&record))).unwrap();
            let stamp = ProducerStamp { id: [9; 16], epoch: 1, base_sequence: 40 };
            let mut batch = builder.build(compression, Some(stamp));
            let source = wire::StampSource { topic: "g.jobs".into(), operator_id: "op".into(), ..Default::default() };
            batch.set_stamps(encode_stamps([(source.clone(), 1, 1), (source, 2, 3)]));
            batch.header.base_offset = Offset(100);
            batch.header.time_ms = 5;
            let events = assemble("t", "acme", 3, &batch, 101).unwrap();
            assert_eq!(events.len(), 1, "offset 100 is below the one asked for");
            let event = &events[0];
            assert_eq!((event.offset, event.partition, event.time_ms, event.sequence), (101, 3, 5, 41));
            assert_eq!((&event.payload[..], &event.key[..]), (&payload[..], &b"k"[..]));
            assert_eq!(
                (event.schema.as_str(), event.topic.as_str(), event.tenant_id.as_str()),
                ("a.b.v1", "t", "acme")
            );
            assert_eq!(event.headers.get("x").map(String::as_str), Some("y"));
            assert_eq!(event.traceparent, "00-aa-bb-01");
            assert_eq!(event.r#type(), EventType::Job);
            let cause = event.cause.as_ref().unwrap();
            assert_eq!((cause.topic.as_str(), cause.offset, cause.attempt), ("g.jobs", 2, 3));
            assert_eq!(event.id[..], new.id.unwrap());
        }
    }

    #[test]
    fn a_wrong_event_names_its_field() {
        let error = NewEvent::new(vec![0; 2 << 20]).batch().unwrap_err().to_string();
        assert_eq!(error, "payload has 2097152 bytes, the limit is 1048576");
        let error = NewEvent::new("x").schema("nope").batch().unwrap_err().to_string();
        assert!(error.starts_with("schema"), "{error}");
    }
}
