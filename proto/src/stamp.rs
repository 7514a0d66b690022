//! Stamps: what the Spine knows of each record of a data batch (its cause).

use bytes::Bytes;
use prost::Message;

use crate::{
    DecodeError,
    wire::{Cause, Stamp, StampSource, Stamps},
};

/// One record's stamp with its source.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StampView<'a> {
    /// What the record shares with others of its batch.
    pub source: &'a StampSource,
    /// Offset of the cause; also the record's sequence in the job-result scope.
    pub offset: u64,
    /// Attempt of the lease under which the record was made.
    pub attempt: u32,
}

impl StampView<'_> {
    /// The cause as clients see it.
    #[must_use]
    pub fn cause(&self) -> Cause {
        Cause {
            topic: self.source.topic.clone(),
            partition: self.source.partition,
            offset: self.offset,
            operator_id: self.source.operator_id.clone(),
            operator_version: self.source.operator_version.clone(),
            circuit_revision: self.source.circuit_revision,
            attempt: self.attempt,
            group: self.source.group.clone(),
            replay_id: self.source.replay_id.clone(),
        }
    }
}

/// Encodes one (source, offset, attempt) per record; equal sources are stored once.
#[must_use]
pub fn encode_stamps(stamps: impl IntoIterator<Item = (StampSource, u64, u32)>) -> Bytes {
    let mut out = Stamps::default();
    for (source, offset, attempt) in stamps {
        // Records of one batch come from few leases' groups: the last source nearly always fits.
        let index = match out.sources.iter().rposition(|known| *known == source) {
            Some(index) => index,
            None => {
                out.sources.push(source);
                out.sources.len() - 1
            }
        };
        out.stamps.push(Stamp { source: index as u32, offset, attempt });
    }
    out.encode_to_vec().into()
}

/// Decodes the stamps of a batch with `record_count` records; `None` when it has none.
///
/// # Errors
/// Malformed protobuf, a number of stamps other than `record_count`, or an unknown source.
pub fn decode_stamps(bytes: &Bytes, record_count: u32) -> Result<Option<Stamps>, DecodeError> {
    if bytes.is_empty() {
        return Ok(None);
    }
    let stamps = Stamps::decode(bytes.clone()).map_err(|_| DecodeError::Protobuf { what: "batch stamps" })?;
    if stamps.stamps.len() != record_count as usize {
        return Err(DecodeError::Value { field: "stamp count", value: stamps.stamps.len() as u64 });
    }
    if let Some(bad) = stamps.stamps.iter().find(|stamp| stamp.source as usize >= stamps.sources.len()) {
        return Err(DecodeError::Value { field: "stamp source", value: u64::from(bad.source) });
    }
    Ok(Some(stamps))
}

impl Stamps {
    /// The stamp of each record, in order. Only for stamps from [`decode_stamps`].
    pub fn iter(&self) -> impl Iterator<Item = StampView<'_>> {
        self.stamps.iter().map(|stamp| StampView {
            source: &self.sources[stamp.source as usize],
            offset: stamp.offset,
            attempt: stamp.attempt,
        })
    }
}
