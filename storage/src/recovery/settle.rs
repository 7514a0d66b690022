//! The disk is made to agree with what was found when a log was opened.

use std::io;
use std::sync::Arc;

use bytes::Bytes;

use super::{Opener, Recovery, Stop, Walked};
use crate::disk::{self, join};
use crate::layout::{MANIFEST_FILE, Manifest, Mark, REWRITE_FILE, SEGMENT_DATA_AT, VOTE_FILE};
use crate::segment::{Segment, SegmentState, read_front};
use arqon_proto::planted::{self, Bug};

impl Opener<'_> {
    /// Makes the disk agree with what was found, all of it durable: the bytes above the mark
    /// may be in the page cache only. Says the new mark, and whether the tail is sealed.
    pub(super) fn settle(
        &self,
        manifest: &mut Manifest,
        mark: Mark,
        walked: &mut Walked,
        recovery: &Recovery,
        leftover: &[String],
        vote: &Option<Bytes>,
    ) -> io::Result<(Mark, bool)> {
        let syncs = !planted::has(Bug::RecoveredTailNotSynced);
        if recovery.rewritten {
            // After a failed sync the pages count as clean: only fresh blocks can be believed.
            tracing::warn!(
                group = self.group.0,
                replica = self.replica.0,
                "a sync failed before: writing the tail again"
            );
            for segment in &mut walked.segments {
                if segment.next_index > mark.next_index || segment.next_index == walked.end.index {
                    segment.segment = Arc::new(self.rewrite(segment)?);
                }
            }
            disk::replace(self.disk, &self.dir, MANIFEST_FILE, manifest.encode(), disk::MANIFEST_POINTS)?;
            disk::replace(
                self.disk,
                &self.dir,
                VOTE_FILE,
                crate::flush::encode_vote(vote.as_ref()),
                disk::VOTE_POINTS,
            )?;
        }
        if let Some((number, from)) = walked.marked_at.filter(|_| syncs && !recovery.rewritten) {
            self.write_again(walked.segments.iter().skip(number), from)?;
        }
        for name in [MANIFEST_FILE, VOTE_FILE] {
            self.disk.open(&join(&self.dir, name))?.sync()?;
        }
        let count = walked.segments.len();
        for (number, segment) in walked.segments.iter().enumerate() {
            if syncs && (segment.next_index > mark.next_index || number + 1 == count) {
                segment.segment.file()?.sync()?;
            }
        }
        let mut mark = mark;
        let mut sealed = matches!(walked.stop, Stop::Sealed);
        if let Some(tail) = walked.segments.back() {
            let torn = recovery.cut.is_some() && !sealed;
            if torn || mark.next_index != walked.end.index {
                sealed |= torn;
                let sealed_at = sealed.then_some(tail.end);
                let (next_index, chain) = (walked.end.index, walked.end.chain);
                mark = Mark { sequence: mark.sequence + 1, next_index, chain, sealed_at, committed: mark.committed };
                tail.segment.write_mark(&mark)?;
                planted::crash_point("recovery-marked");
                if syncs {
                    tail.segment.file()?.sync()?;
                }
            }
        }
        if let Some(tail) = walked.segments.back().filter(|_| !sealed) {
            tail.segment.allow_fill();
        }
        // A truncation that had lowered the mark and not yet the manifest is completed here.
        let tail = walked.segments.back().map(|tail| tail.segment.header.base_index);
        if manifest.tail != tail {
            manifest.tail = tail;
            disk::replace(self.disk, &self.dir, MANIFEST_FILE, manifest.encode(), disk::MANIFEST_POINTS)?;
        }
        for name in leftover {
            match self.disk.remove(&join(&self.dir, name)) {
                // Replacing a file has used up its `.tmp`.
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        planted::crash_point("recovery-cleaned");
        self.disk.sync_dir(&self.dir)?;
        if recovery.rewritten {
            self.disk.remove(&join(&self.dir, REWRITE_FILE))?;
            self.disk.sync_dir(&self.dir)?;
        }
        Ok((mark, sealed))
    }

    /// Writes what lies above the mark, from byte `from` of the first segment on, over itself: nobody
    /// was told that it is durable, perhaps because a sync failed and no marker of that could be left.
    /// The pages count as clean then, and only those that are written again reach the disk.
    fn write_again<'s>(&self, segments: impl Iterator<Item = &'s SegmentState>, from: u64) -> io::Result<()> {
        let mut at = from;
        for segment in segments {
            let file = segment.segment.file()?;
            let mut bytes = vec![0; usize::try_from(segment.end.saturating_sub(at)).map_err(io::Error::other)?];
            if file.read_at(&mut bytes, at)? < bytes.len() {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            file.write_at(&[Bytes::from(bytes)], at)?;
            file.sync()?;
            at = SEGMENT_DATA_AT;
        }
        Ok(())
    }

    /// Copies a segment up to its last good batch to fresh blocks.
    fn rewrite(&self, segment: &SegmentState) -> io::Result<Segment> {
        let old = &segment.segment;
        let mut bytes = vec![0; usize::try_from(segment.end).map_err(io::Error::other)?];
        let read = old.file()?.read_at(&mut bytes, 0)?;
        bytes.truncate(read);
        let fresh = format!("{}.tmp", old.path());
        let file = self.disk.create(&fresh)?;
        file.write_at(&[Bytes::from(bytes)], 0)?;
        file.sync()?;
        self.disk.rename(&fresh, &old.path())?;
        self.disk.sync_dir(&self.dir)?;
        let slot = read_front(file.as_ref())?.slot;
        Ok(Segment::opened(&self.dir, old.header.clone(), file, slot))
    }
}
