//! One round: the groups of all logs that have one ready are written, then made durable together.
//!
//! ```text
//!   group of log a ─┐            ┌─> write ─┐
//!   group of log b ─┼─> arena ───┼─> write ─┼─> one flush of the disk ─> marks, callbacks
//!   group of log c ─┘  (copied)  └─> write ─┘
//! ```
//!
//! The flush of the disk counts for groups that replace durable blocks of a file that is flushed
//! with the disk; every other group gets a sync of its own file.

use std::io;
use std::sync::Arc;
use std::time::Instant;

use memmap2::MmapMut;

use super::Engine;
use crate::disk::ring::{Job, Ring};
use crate::disk::{BLOCK_SIZE, BlockFile, Disk, blocks};
use crate::flush::{Flushed, Group, copy};
use crate::log::LogCore;
use arqon_proto::planted::{self, Bug};

/// Bytes that are copied together and written side by side. Used over and over, so that it stays
/// in the caches of the processor.
const ARENA_SIZE: usize = 1 << 20;

/// What a round writes with.
pub(crate) struct Writer {
    ring: Option<Ring>,
    arena: MmapMut,
    used: usize,
    staged: Vec<Staged>,
    /// Of each flight of the round.
    results: Vec<io::Result<()>>,
}

/// Part of the arena that is to be written.
struct Staged {
    flight: usize,
    from: usize,
    to: usize,
    at: u64,
}

/// A group on its way to the disk.
struct Flight {
    core: Arc<LogCore>,
    group: Group,
    started: Instant,
    blocks: Arc<dyn BlockFile>,
    /// The flush of the disk makes it durable.
    flushed_with_disk: bool,
    /// Bytes before the group in its first block.
    begun: Vec<u8>,
}

impl Flight {
    /// Takes the group in front of a log's queue. A log that failed meanwhile has lost it.
    fn take(engine: &Engine, core: &Arc<LogCore>) -> Option<Self> {
        let started = Instant::now();
        let group = core.take_group()?;
        let segment = &group.segment;
        let opened = segment.blocks(engine.disk.as_ref());
        match opened.and_then(|blocks| Ok((blocks, segment.take_begun(group.at)?))) {
            Ok((blocks, begun)) => {
                let write_end = segment.write_end(group.end());
                let flushed_with_disk = segment.reserve(write_end) && blocks.flushed_with_disk();
                Some(Self { core: Arc::clone(core), group, started, blocks, flushed_with_disk, begun })
            }
            Err(error) => {
                core.finish_group(group, started, Err(error));
                None
            }
        }
    }
}

/// Runs a round over `cores`, each of which has a group in front of its queue.
pub(super) fn run(engine: &Engine, cores: &[Arc<LogCore>], writer: &mut Writer) {
    let mut flights: Vec<Flight> = cores.iter().filter_map(|core| Flight::take(engine, core)).collect();
    writer.results = flights.iter().map(|_| Ok(())).collect();
    for number in 0..flights.len() {
        let begun = std::mem::take(&mut flights[number].begun);
        writer.stage(&flights, number, begun);
    }
    writer.write(&flights);
    writer.sync(engine.disk.as_ref(), &flights);
    for (flight, result) in flights.into_iter().zip(std::mem::take(&mut writer.results)) {
        let flushed = if flight.flushed_with_disk { Flushed::Disk } else { Flushed::File };
        flight.core.finish_group(flight.group, flight.started, result.map(|()| flushed));
    }
}

impl Writer {
    pub fn new(ring: Option<Ring>) -> io::Result<Self> {
        let arena = blocks::buffer(ARENA_SIZE)?;
        Ok(Self { ring, arena, used: 0, staged: Vec::new(), results: Vec::new() })
    }

    /// Forgets a round that did not come to its end.
    pub fn reset(&mut self) {
        self.used = 0;
        self.staged.clear();
        self.results.clear();
    }

    /// Copies a group into the arena, in whole blocks and with zeroes behind it; writes what is there when
    /// it is full.
    fn stage(&mut self, flights: &[Flight], number: usize, mut begun: Vec<u8>) {
        let group = &flights[number].group;
        let mut place = Place { flight: number, at: blocks::round_down(group.at), from: self.used };
        for part in std::iter::once(begun.as_slice()).chain(group.parts()) {
            self.copy(flights, &mut place, part);
        }
        begun.clear();
        let in_block = self.used % BLOCK_SIZE;
        if in_block > 0 {
            begun.extend_from_slice(&self.arena[self.used - in_block..self.used]);
            let end = self.used.next_multiple_of(BLOCK_SIZE);
            self.arena[self.used..end].fill(0);
            self.used = end;
        }
        if group.segment.write_end(group.end()) > blocks::round_up(group.end()) {
            self.copy(flights, &mut place, &[0; BLOCK_SIZE]);
        }
        self.close(&mut place);
        group.segment.put_begun(group.end(), begun);
    }

    fn copy(&mut self, flights: &[Flight], place: &mut Place, mut part: &[u8]) {
        while !part.is_empty() {
            if self.used == ARENA_SIZE {
                self.close(place);
                self.write(flights);
                place.from = 0;
            }
            let size = part.len().min(ARENA_SIZE - self.used);
            self.arena[self.used..self.used + size].copy_from_slice(&part[..size]);
            self.used += size;
            part = &part[size..];
        }
    }

    /// Ends the part of the arena that belongs to one place in one file.
    fn close(&mut self, place: &mut Place) {
        if self.used > place.from {
            self.staged.push(Staged { flight: place.flight, from: place.from, to: self.used, at: place.at });
            place.at += (self.used - place.from) as u64;
            place.from = self.used;
        }
    }

    fn fail(&mut self, flight: usize, error: io::Error) {
        if self.results[flight].is_ok() {
            self.results[flight] = Err(error);
        }
    }

    /// Writes what is staged, side by side, and waits for it. The arena is free then.
    fn write(&mut self, flights: &[Flight]) {
        self.used = 0;
        let staged = std::mem::take(&mut self.staged);
        let mut written = vec![0; staged.len()];
        if staged.len() > 1 {
            self.write_through_ring(flights, &staged, &mut written);
        }
        // What the ring did not take, or not as a whole.
        for (part, written) in staged.iter().zip(written) {
            let size = part.to - part.from;
            if written == size || self.results[part.flight].is_err() {
                continue;
            }
            let written = written - written % BLOCK_SIZE;
            let bytes = &self.arena[part.from + written..part.to];
            if let Err(error) = flights[part.flight].blocks.write(bytes, part.at + written as u64) {
                self.fail(part.flight, error);
            }
        }
    }

    fn write_through_ring(&mut self, flights: &[Flight], staged: &[Staged], written: &mut [usize]) {
        let Some(ring) = &mut self.ring else { return };
        let fd = |part: &Staged| flights[part.flight].blocks.descriptor();
        let jobs: Option<Vec<Job<'_>>> =
            staged.iter().map(|part| Some(Job::Write(fd(part)?, &self.arena[part.from..part.to], part.at))).collect();
        let Some(jobs) = jobs else { return };
        match ring.run(&jobs) {
            Ok(results) => {
                for (number, result) in results.into_iter().enumerate() {
                    match result {
                        Ok(size) => written[number] = size,
                        Err(error) if may_be_tried_again(&error) => {}
                        Err(error) => self.fail(staged[number].flight, error),
                    }
                }
            }
            Err(error) => self.end_ring(&error),
        }
    }

    fn end_ring(&mut self, error: &io::Error) {
        tracing::error!("io_uring failed, going on without it: {error}");
        self.ring = None;
    }

    /// Makes everything written durable.
    fn sync(&mut self, disk: &dyn Disk, flights: &[Flight]) {
        let whole = |writer: &Self, with_disk: bool| -> Vec<usize> {
            let numbers = 0..flights.len();
            numbers.filter(|at| writer.results[*at].is_ok() && flights[*at].flushed_with_disk == with_disk).collect()
        };
        let together = whole(self, true);
        planted::crash_point("group-written");
        if planted::has(Bug::AckBeforeFlush) {
            return;
        }
        if !together.is_empty()
            && let Err(error) = disk.flush()
        {
            let error = named("flush of the disk", &error);
            together.into_iter().for_each(|flight| self.fail(flight, copy(&error)));
        }
        let apart = whole(self, false);
        let files: Vec<&dyn BlockFile> = apart.iter().map(|flight| flights[*flight].blocks.as_ref()).collect();
        for (flight, result) in apart.into_iter().zip(self.sync_each(&files)) {
            let group = &flights[flight].group;
            match result {
                Ok(()) => group.segment.synced_through(group.end()),
                Err(error) => self.fail(flight, named("fdatasync", &error)),
            }
        }
        planted::crash_point("group-flushed");
    }

    /// A sync of each file, through the ring side by side. None is ever tried again.
    fn sync_each(&mut self, files: &[&dyn BlockFile]) -> Vec<io::Result<()>> {
        let jobs: Option<Vec<Job<'_>>> = files.iter().map(|blocks| Some(Job::Sync(blocks.descriptor()?))).collect();
        if let Some(ring) = &mut self.ring
            && let Some(jobs) = jobs
            && jobs.len() > 1
        {
            return match ring.run(&jobs) {
                Ok(results) => results.into_iter().map(|result| result.map(drop)).collect(),
                Err(error) => {
                    self.end_ring(&error);
                    jobs.iter().map(|_| Err(copy(&error))).collect()
                }
            };
        }
        files.iter().map(|blocks| blocks.sync()).collect()
    }
}

/// The same error, which says what failed.
fn named(what: &str, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{what}: {error}"))
}

/// Where the bytes of one flight go that are being copied.
struct Place {
    flight: usize,
    at: u64,
    from: usize,
}

fn may_be_tried_again(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock)
        || error.raw_os_error() == Some(rustix::io::Errno::CANCELED.raw_os_error())
}
