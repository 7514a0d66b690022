//! Events to write, and events as they are read.

use std::{collections::HashMap, sync::Arc};

use arqon_proto::{
    Batch, BatchBuilder, Compression, DecodeError, EventType, RecordCursor, RecordParts, decode_stamps, wire,
};
use bytes::Bytes;
use uuid::Uuid;

use crate::Error;

/// An event as clients read it, assembled from batch header, stamps and record. What the events of
/// a topic or a batch have in common is shared; payload and key lie in the bytes received.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Event {
    /// UUIDv7.
    pub id: [u8; 16],
    /// Topic.
    pub topic: Arc<str>,
    /// Append time in ms since 1970, set by the Spine.
    pub time_ms: u64,
    /// Schema name with a version, or empty.
    pub schema: Arc<str>,
    /// The payload.
    pub payload: Bytes,
    /// Partitioning key or empty.
    pub key: Bytes,
    /// What the event is for.
    pub r#type: EventType,
    /// Whose event it is, by the reader's token.
    pub tenant_id: Arc<str>,
    /// UUID of the producer, empty when there is none.
    pub producer_id: Bytes,
    /// Place in the producer's sequence.
    pub sequence: u64,
    /// W3C trace context, or empty.
    pub traceparent: String,
    /// Names and values.
    pub headers: HashMap<String, String>,
    /// The event that this one came from, stamped by the Spine.
    pub cause: Option<Box<wire::Cause>>,
    /// Partition.
    pub partition: u32,
    /// Offset in the partition.
    pub offset: u64,
}

impl From<Event> for wire::Event {
    fn from(event: Event) -> Self {
        Self {
            id: Bytes::copy_from_slice(&event.id),
            topic: event.topic.to_string(),
            time_ms: event.time_ms,
            schema: event.schema.to_string(),
            payload: event.payload,
            key: event.key,
            r#type: event.r#type.into(),
            tenant_id: event.tenant_id.to_string(),
            producer_id: event.producer_id,
            sequence: event.sequence,
            traceparent: event.traceparent,
            headers: event.headers,
            cause: event.cause.map(|cause| *cause),
            partition: event.partition,
            offset: event.offset,
        }
    }
}

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

/// Where events come from.
#[derive(Clone, Debug)]
pub(crate) struct Origin {
    pub(crate) topic: Arc<str>,
    pub(crate) tenant: Arc<str>,
    pub(crate) partition: u32,
}

/// The events of one data batch, made when they are asked for.
#[derive(Debug)]
pub(crate) struct Events {
    origin: Origin,
    records: RecordCursor,
    /// Offset of the next record.
    next: u64,
    end: u64,
    base: u64,
    time_ms: u64,
    producer_id: Bytes,
    base_sequence: u64,
    causes: Vec<wire::Cause>,
    /// The schema of the last event; others of the batch mostly have it too.
    schema: Arc<str>,
}

impl Events {
    /// # Errors
    /// Stamps that are malformed, or records that do not decompress.
    pub(crate) fn new(origin: Origin, batch: &Batch) -> Result<Self, DecodeError> {
        let header = &batch.header;
        let stamps = decode_stamps(&batch.stamps, header.record_count)?;
        let causes = stamps.map(|stamps| stamps.iter().map(|stamp| stamp.cause()).collect()).unwrap_or_default();
        Ok(Self {
            origin,
            records: RecordCursor::new(batch)?,
            next: header.base_offset.0,
            end: header.next_offset().0,
            base: header.base_offset.0,
            time_ms: header.time_ms,
            producer_id: match header.has_producer() {
                true => Bytes::copy_from_slice(&header.producer_id),
                false => Bytes::new(),
            },
            base_sequence: header.base_sequence,
            causes,
            schema: Arc::default(),
        })
    }

    pub(crate) fn origin(&self) -> &Origin {
        &self.origin
    }

    /// Takes only events below `offset`.
    pub(crate) fn end_at(&mut self, offset: u64) {
        self.end = self.end.min(offset);
    }

    /// The next event whose offset `wants`; `None` after the last.
    ///
    /// # Errors
    /// Records that are malformed.
    pub(crate) fn next(&mut self, mut wants: impl FnMut(u64) -> bool) -> Result<Option<Event>, DecodeError> {
        while self.next < self.end {
            let offset = self.next;
            self.next += 1;
            if wants(offset) {
                return self.event(offset).map(Some);
            }
            self.records.skip()?;
        }
        Ok(None)
    }

    fn event(&mut self, offset: u64) -> Result<Event, DecodeError> {
        let missing = DecodeError::Truncated { what: "record", need: 1, have: 0 };
        let (record, bytes) = self.records.read()?.ok_or(missing)?;
        let slice = |part: &[u8]| if part.is_empty() { Bytes::new() } else { bytes.slice_ref(part) };
        if *self.schema != *record.schema {
            self.schema = record.schema.into();
        }
        let index = offset - self.base;
        let has_producer = !self.producer_id.is_empty();
        let mut event = Event {
            id: record.id,
            topic: self.origin.topic.clone(),
            time_ms: self.time_ms,
            schema: self.schema.clone(),
            payload: slice(record.payload),
            key: slice(record.key),
            r#type: EventType::try_from(i32::from(record.event_type))
                .map_err(|_| DecodeError::Value { field: "event type", value: u64::from(record.event_type) })?,
            tenant_id: self.origin.tenant.clone(),
            producer_id: self.producer_id.clone(),
            sequence: if has_producer { self.base_sequence + index } else { 0 },
            traceparent: String::new(),
            headers: HashMap::new(),
            cause: self.causes.get(index as usize).cloned().map(Box::new),
            partition: self.origin.partition,
            offset,
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
            let origin = Origin { topic: "t".into(), tenant: "acme".into(), partition: 3 };
            let mut events = Events::new(origin, &batch).unwrap();
            let event = events.next(|offset| offset >= 101).unwrap().unwrap();
            assert!(events.next(|_| true).unwrap().is_none());
            assert_eq!((event.offset, event.partition, event.time_ms, event.sequence), (101, 3, 5, 41));
            assert_eq!((&event.payload[..], &event.key[..]), (&payload[..], &b"k"[..]));
            assert_eq!((&*event.schema, &*event.topic, &*event.tenant_id), ("a.b.v1", "t", "acme"));
            assert_eq!(event.headers.get("x").map(String::as_str), Some("y"));
            assert_eq!(event.traceparent, "00-aa-bb-01");
            assert_eq!(event.r#type, EventType::Job);
            let cause = event.cause.as_ref().unwrap();
            assert_eq!((cause.topic.as_str(), cause.offset, cause.attempt), ("g.jobs", 2, 3));
            assert_eq!(event.id, new.id.unwrap());
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
