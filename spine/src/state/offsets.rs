//! A set of offsets above a floor.

use arqon_proto::DecodeError;
use bytes::Bytes;
use roaring::RoaringTreemap;

/// Offsets of which everything below `floor` belongs to the set.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Offsets {
    floor: u64,
    above: RoaringTreemap,
}

impl Offsets {
    pub(super) fn starting_at(floor: u64) -> Self {
        Self { floor, above: RoaringTreemap::new() }
    }

    /// Everything below is in the set.
    pub(super) fn floor(&self) -> u64 {
        self.floor
    }

    pub(super) fn contains(&self, offset: u64) -> bool {
        offset < self.floor || self.above.contains(offset)
    }

    /// Adds `offset`; false when it was there.
    pub(super) fn insert(&mut self, offset: u64) -> bool {
        offset >= self.floor && self.above.insert(offset)
    }

    /// Adds `first..end`.
    pub(super) fn insert_range(&mut self, first: u64, end: u64) {
        self.above.insert_range(first.max(self.floor)..end);
    }

    /// Adds `first..end`; false when one of them was there, and then some may be added.
    pub(super) fn insert_new(&mut self, first: u64, end: u64) -> bool {
        if first == self.floor && self.above.is_empty() {
            self.floor = end.max(first);
            return true;
        }
        first >= self.floor && self.above.insert_range(first..end) == end.saturating_sub(first)
    }

    /// Moves the floor up over the offsets that follow it without a gap.
    pub(super) fn close_up(&mut self) {
        let mut end = self.floor;
        for offset in &self.above {
            if offset != end {
                break;
            }
            end += 1;
        }
        self.raise(end);
    }

    /// Raises the floor; it never goes back.
    pub(super) fn raise(&mut self, floor: u64) {
        if floor > self.floor {
            self.above.remove_range(self.floor..floor);
            self.floor = floor;
        }
    }

    /// The portable roaring bytes of what lies above the floor. The set is rebuilt first: how
    /// it came about must not show in its bytes.
    pub(super) fn encode_above(&self) -> Bytes {
        let mut canonical = RoaringTreemap::new();
        for offset in &self.above {
            canonical.insert(offset);
        }
        let mut out = Vec::with_capacity(canonical.serialized_size());
        canonical.serialize_into(&mut out).expect("writing into memory does not fail");
        out.into()
    }

    pub(super) fn decode(floor: u64, above: &[u8], field: &'static str) -> Result<Self, DecodeError> {
        let above = if above.is_empty() {
            RoaringTreemap::new()
        } else {
            RoaringTreemap::deserialize_from(above).map_err(|_| DecodeError::Text { field })?
        };
        if let Some(low) = above.min().filter(|low| *low < floor) {
            return Err(DecodeError::Value { field, value: low });
        }
        Ok(Self { floor, above })
    }
}
