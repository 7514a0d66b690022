//! Where an entry stands, whether its own bytes can be read or not.
//!
//! A log is cut between two entries: what it takes is the byte, the offset and the chain value there. The entry
//! itself says them, and so does whatever borders on it: the end of the log, the header of a segment, damage that is listed.

use std::io;
use std::sync::Arc;

use arqon_proto::{Header, Offset, limits};

use crate::damage::Cursor;
use crate::disk;
use crate::error::ReadError;
use crate::layout::SEGMENT_DATA_AT;
use crate::log::{LogCore, State};
use crate::position::index_after;
use crate::segment::{BatchError, Segment, Walk};

/// Why the place of an entry is not known.
pub(crate) enum Unplaced {
    /// It lies behind the first entry of damage that is listed.
    Damaged(ReadError),
    /// Bytes on the way to it fail their checks, and are not listed as damage.
    Unread {
        segment: Arc<Segment>,
        at: u64,
        reason: String,
    },
    Disk(io::Error),
}

impl From<Unplaced> for io::Error {
    fn from(unplaced: Unplaced) -> Self {
        match unplaced {
            Unplaced::Damaged(error) => Self::new(io::ErrorKind::InvalidData, error),
            Unplaced::Unread { segment, at, reason } => Self::other(format!("{} byte {at}: {reason}", segment.path())),
            Unplaced::Disk(error) => error,
        }
    }
}

impl LogCore {
    /// Lists the damage that stands in the way of placing the entry at `index`.
    pub fn examine_before(&self, index: u64) {
        for _ in 0..limits::DAMAGE_COUNT_MAX {
            let state = self.lock();
            if index < index_after(state.purged) || index >= index_after(state.last) {
                return;
            }
            let Err(Unplaced::Unread { segment, at, .. }) = self.place_of(&state, index) else { return };
            drop(state);
            if self.examine(&segment, at).is_none() {
                return;
            }
        }
    }

    /// Where the entry at `index` begins, which need not be readable, or where the next one will; without its
    /// term. Damage next to it says what its bytes would.
    pub fn place_of(&self, state: &State, index: u64) -> Result<Cursor, Unplaced> {
        let place = |at, offset: Offset, chain| Ok(Cursor { at, index, offset: offset.0, chain, term: 0 });
        if index == index_after(state.last) {
            return place(
                state.segments.back().map_or(SEGMENT_DATA_AT, |tail| tail.end),
                state.next_offset,
                state.chain,
            );
        }
        if let Some(recent) = state.recent_at(index) {
            return place(recent.at, recent.batch.header.base_offset, recent.batch.header.chain);
        }
        if let Some(begins) = state.segments.iter().rfind(|segment| segment.base_index() == index) {
            let header = &begins.segment.header;
            return place(SEGMENT_DATA_AT, header.base_offset, header.chain);
        }
        if let Some(damage) = state.damage.at_index(index) {
            if damage.first.0 != index {
                return Err(Unplaced::Damaged(damage.read_error()));
            }
            return place(damage.bytes().map_or(0, |(at, _)| at), damage.first_offset, damage.chain_before);
        }
        if let Some(damage) = index.checked_sub(1).and_then(|before| state.damage.at_index(before))
            && let Some((_, end)) = damage.bytes()
        {
            return place(end, damage.next_offset, damage.chain_after);
        }
        let (at, header) = self.find(state, index)?;
        place(at, header.base_offset, header.chain)
    }

    /// Byte and header of the entry at `index`, which is in the log. From memory if possible.
    ///
    /// # Errors
    /// Bytes on the way to it are damaged, or the disk failed.
    pub fn locate(&self, state: &State, index: u64) -> io::Result<(u64, Header)> {
        Ok(self.find(state, index)?)
    }

    fn find(&self, state: &State, index: u64) -> Result<(u64, Header), Unplaced> {
        if let Some(recent) = state.recent_at(index) {
            return Ok((recent.at, recent.batch.header.clone()));
        }
        let count = state.segments.partition_point(|segment| segment.base_index() <= index);
        let found = count.checked_sub(1).and_then(|at| state.segments.get(at));
        let missing = || Unplaced::Disk(io::Error::other(format!("entry {index} is not where the index says")));
        let segment = found.ok_or_else(missing)?;
        let file = segment.segment.file().map_err(Unplaced::Disk)?;
        let mut walk = Walk::new(file.as_ref(), segment.enter_index(index).at, segment.end);
        loop {
            let at = walk.at;
            let unread = |reason| Unplaced::Unread { segment: Arc::clone(&segment.segment), at, reason };
            match walk.next() {
                Ok(Some((at, header))) if header.index.0 == index => return Ok((at, header)),
                Ok(Some((_, header))) if header.index.0 < index => {}
                Ok(Some(_)) => return Err(unread(format!("entry {index} is not where the index says"))),
                Ok(None) => return Err(missing()),
                Err(BatchError::Disk(error)) if !disk::is_unreadable(&error) => return Err(Unplaced::Disk(error)),
                Err(error) => return Err(unread(error.to_string())),
            }
        }
    }
}
