//! One segment file, and how its batches are walked.

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use arqon_proto::planted;
use arqon_proto::{BATCH_HEADER_SIZE, Batch, BatchKind, DecodeError, Header};
use bytes::Bytes;

use crate::damage::Cursor;
use crate::disk::blocks::{self, READ_SIZE_MAX};
use crate::disk::{BlockFile, Disk, File, is_unreadable, join};
use crate::index::IndexPoint;
use crate::layout::{BLOCK_SIZE, MARK_AT, Mark, SEGMENT_DATA_AT, SegmentHeader};
use crate::options::INDEX_STEP;
use crate::pool::Spare;
use crate::position::LogPosition;

/// Bytes read at once when headers are walked.
const WINDOW_SIZE: usize = 64 << 10;
/// The same at first, where the walk is likely to end soon.
const WINDOW_SIZE_MIN: usize = 2 * BATCH_HEADER_SIZE;
/// Readers that want fewer bytes than this go through the page cache: what one of them reads,
/// others may read again.
const CHUNK_SIZE_MIN: usize = 256 << 10;

/// Longest time in which a busy log uses up one step of zeroes; the next step is larger.
const FILL_STEP_TIME: Duration = Duration::from_millis(100);
/// Largest step of filling ahead, in bytes.
const FILL_STEP_MAX: u64 = 8 << 20;

/// A segment that exists, or that a queued roll will create before anything is written to it.
///
/// ```text
///          end of the batches   durable_end    zeroes being written
///   ───────────────┼─────────────────┼────────────────┤
///     batches      │ zeroes, durable │                │
/// ```
///
/// Blocks up to `durable_end` are allocated and written for good, zeroes at least: replacing them
/// changes nothing but their bytes. In a file that was another segment before, old bytes stand in the
/// place of those zeroes; but for the ones right behind the batches, which each write brings along.
pub(crate) struct Segment {
    pub dir: String,
    pub header: SegmentHeader,
    /// Replaced by a repair.
    file: RwLock<Option<Arc<dyn File>>>,
    tail: Mutex<Tail>,
    fill: Mutex<Fill>,
    filled: Condvar,
    /// Which of the two slots holds the newest mark; the next one goes to the other.
    slot: AtomicUsize,
}

/// What writing batches needs, as long as the segment takes any.
#[derive(Default)]
struct Tail {
    blocks: Option<Arc<dyn BlockFile>>,
    /// Byte after the last batch written, and the bytes of its block up to there: the next write
    /// begins with them.
    end: u64,
    begun: Vec<u8>,
}

/// Zeroes ahead of the batches.
#[derive(Default)]
struct Fill {
    allowed: bool,
    /// Handle for the zeroes, apart from that of the batches: the system reports a failed
    /// write-back once per handle, and a failure seen here must not hide from their sync.
    blocks: Option<Arc<dyn BlockFile>>,
    durable_end: u64,
    /// Every block up to there was written in this run, and the segment was neither cut nor found damaged:
    /// its file may become another segment.
    reusable: bool,
    /// Byte after the last write of batches, finished or not.
    reserved_end: u64,
    /// Somebody writes zeroes and syncs them.
    running: bool,
    /// Zeroes are being written right now.
    writing: bool,
    /// Batches wait for that to end.
    hurry: bool,
    step: u64,
    stepped_at: Option<Instant>,
}

impl Segment {
    pub fn new(dir: &str, header: SegmentHeader) -> Self {
        Self {
            dir: dir.to_owned(),
            header,
            file: RwLock::default(),
            tail: Mutex::default(),
            fill: Mutex::default(),
            filled: Condvar::new(),
            slot: AtomicUsize::new(0),
        }
    }

    /// A segment of an earlier run. Of its zeroes nothing is known: the file may have been copied
    /// with holes in their place.
    pub fn opened(dir: &str, header: SegmentHeader, file: Arc<dyn File>, slot: usize) -> Self {
        let segment = Self::new(dir, header);
        segment.slot.store(slot, Ordering::Relaxed);
        segment.set_file(file);
        segment
    }

    pub fn path(&self) -> String {
        join(&self.dir, &self.header.file_name())
    }

    pub fn file(&self) -> io::Result<Arc<dyn File>> {
        let file = self.file.read().unwrap_or_else(PoisonError::into_inner).clone();
        file.ok_or_else(|| io::Error::other(format!("{} was not created", self.path())))
    }

    fn set_file(&self, file: Arc<dyn File>) -> Option<Arc<dyn File>> {
        self.file.write().unwrap_or_else(PoisonError::into_inner).replace(file)
    }

    /// Takes `file`, which has the same bytes but for damaged ones, in place of the one there was.
    /// Called by operations of the log only. What was read from the old one stays as it is.
    pub fn replace_file(&self, file: Arc<dyn File>) {
        let mut fill = self.lock_fill();
        let allowed = std::mem::replace(&mut fill.allowed, false);
        while fill.running {
            fill = self.filled.wait(fill).unwrap_or_else(PoisonError::into_inner);
        }
        // Nothing is known of its blocks, as in a segment that was opened.
        *fill = Fill { allowed, ..Fill::default() };
        drop(fill);
        *self.lock_tail() = Tail::default();
        self.set_file(file);
    }

    /// Creates the file with header, first mark and zeroes; durable when it returns. No batch
    /// may be written before, so that a file with this name always has a whole header.
    pub fn create(&self, disk: &dyn Disk, mark: &Mark, fill_size: u64) -> io::Result<()> {
        let front = self.front(mark)?;
        let fresh = format!("{}.tmp", self.path());
        let file = disk.create(&fresh)?;
        file.write_at(&[Bytes::from(front)], 0)?;
        let (blocks, fill_blocks) = (disk.open_blocks(&fresh)?, disk.open_blocks(&fresh)?);
        let end = blocks::round_up(SEGMENT_DATA_AT + fill_size).min(self.header.capacity);
        let mut at = SEGMENT_DATA_AT;
        while at < end {
            let zeroes = blocks::zeroes(end - at)?;
            blocks.write(zeroes, at)?;
            at += zeroes.len() as u64;
        }
        file.sync()?;
        planted::crash_point("segment-written");
        disk.rename(&fresh, &self.path())?;
        planted::crash_point("segment-named");
        disk.sync_dir(&self.dir)?;
        self.begin(file, [blocks, fill_blocks], at, fill_size);
        Ok(())
    }

    /// Takes the file of `spare` instead of a new one; durable when it returns. The file is whole before it
    /// gets its name, as a new one is: a crash leaves it in the pool or in its place. Of its old marks
    /// none is left, and zeroes stand where the first batch goes.
    pub fn recycle(&self, disk: &dyn Disk, mark: &Mark, spare: &Spare, fill_size: u64) -> io::Result<()> {
        assert!(spare.durable_end <= self.header.capacity, "a spare file is no larger than its next segment may be");
        let file = disk.open(&spare.path)?;
        file.write_at(&[Bytes::from(self.front(mark)?)], 0)?;
        let handles = [disk.open_blocks(&spare.path)?, disk.open_blocks(&spare.path)?];
        handles[0].write(blocks::zeroes(BLOCK_SIZE as u64)?, SEGMENT_DATA_AT)?;
        file.sync()?;
        planted::crash_point("recycle-written");
        disk.rename(&spare.path, &self.path())?;
        planted::crash_point("recycle-named");
        disk.sync_dir(&self.dir)?;
        self.begin(file, handles, spare.durable_end, fill_size);
        Ok(())
    }

    /// The blocks in front of the batches: header, first mark, no second one.
    fn front(&self, mark: &Mark) -> io::Result<Vec<u8>> {
        let mut front = vec![0; usize::try_from(SEGMENT_DATA_AT).map_err(io::Error::other)?];
        for (at, block) in [(0, self.header.encode()), (MARK_AT[0], mark.encode())] {
            let at = usize::try_from(at).map_err(io::Error::other)?;
            front[at..at + block.len()].copy_from_slice(&block);
        }
        Ok(front)
    }

    /// Takes batches from now on, in a file whose blocks up to `durable_end` are durable.
    fn begin(&self, file: Arc<dyn File>, blocks: [Arc<dyn BlockFile>; 2], durable_end: u64, step: u64) {
        let [blocks, fill_blocks] = blocks;
        *self.lock_fill() =
            Fill { allowed: true, blocks: Some(fill_blocks), durable_end, reusable: true, step, ..Fill::default() };
        self.lock_tail().blocks = Some(blocks);
        assert!(self.set_file(file).is_none(), "a segment is created once");
    }

    /// Never lets the file become another segment: entries were cut off, or the disk may be failing.
    pub fn forbid_reuse(&self) {
        self.lock_fill().reusable = false;
    }

    /// Gives up a segment that was purged. Says up to where the blocks of its file are durable when it may
    /// become another segment: nobody has a handle, a map or a part of a map of it any more.
    pub fn into_reusable(this: Arc<Self>) -> Option<u64> {
        // Whoever reads, fills or saves the index of a segment holds it for as long.
        let Self { file, tail, fill, .. } = Arc::into_inner(this)?;
        let users = file.into_inner().unwrap_or_else(PoisonError::into_inner).map(|file| file.users());
        drop(tail);
        let Fill { reusable, durable_end, .. } = fill.into_inner().unwrap_or_else(PoisonError::into_inner);
        let is_unused = users.is_some_and(|users| users.strong_count() == 0);
        (reusable && is_unused).then_some(durable_end)
    }

    /// Writes the next mark, without syncing it. A torn write leaves the other slot whole.
    pub fn write_mark(&self, mark: &Mark) -> io::Result<()> {
        let slot = 1 - self.slot.load(Ordering::Relaxed);
        self.file()?.write_at(&[Bytes::from(mark.encode())], MARK_AT[slot])?;
        self.slot.store(slot, Ordering::Relaxed);
        Ok(())
    }

    fn lock_fill(&self) -> MutexGuard<'_, Fill> {
        self.fill.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_tail(&self) -> MutexGuard<'_, Tail> {
        self.tail.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The handle through which batches are written. Called by operations of the log only: a
    /// later one may remove the file and give its name to another.
    pub fn blocks(&self, disk: &dyn Disk) -> io::Result<Arc<dyn BlockFile>> {
        let mut tail = self.lock_tail();
        if let Some(blocks) = &tail.blocks {
            return Ok(Arc::clone(blocks));
        }
        let blocks = disk.open_blocks(&self.path())?;
        tail.blocks = Some(Arc::clone(&blocks));
        self.lock_fill().blocks = Some(disk.open_blocks(&self.path())?);
        Ok(blocks)
    }

    /// The bytes before `at` in its block, which are written again with what follows them.
    pub fn take_begun(&self, at: u64) -> io::Result<Vec<u8>> {
        let mut tail = self.lock_tail();
        if tail.end == at {
            return Ok(std::mem::take(&mut tail.begun));
        }
        let from = blocks::round_down(at);
        let mut begun = vec![0; usize::try_from(at - from).map_err(io::Error::other)?];
        if self.file()?.read_at(&mut begun, from)? < begun.len() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(begun)
    }

    /// Keeps the bytes of the last block, of which `end` is the first free one.
    pub fn put_begun(&self, end: u64, begun: Vec<u8>) {
        let mut tail = self.lock_tail();
        (tail.end, tail.begun) = (end, begun);
    }

    /// Byte after the blocks that a write of batches up to `end` takes. Behind the last batch there is room
    /// for the zeroes by which a reader knows that no other follows, whatever the file held before.
    pub fn write_end(&self, end: u64) -> u64 {
        let block_end = blocks::round_up(end);
        let has_room = block_end - end >= BATCH_HEADER_SIZE as u64;
        let more = block_end + BLOCK_SIZE as u64;
        if has_room || more > self.header.capacity { block_end } else { more }
    }

    /// Takes the blocks up to `end` for a write of batches. Says whether they are durable
    /// already, so that replacing them changes no more than their bytes.
    pub fn reserve(&self, end: u64) -> bool {
        let end = blocks::round_up(end);
        let mut fill = self.lock_fill();
        while fill.writing && end > fill.durable_end {
            fill.hurry = true;
            fill = self.filled.wait(fill).unwrap_or_else(PoisonError::into_inner);
        }
        fill.reserved_end = fill.reserved_end.max(end);
        end <= fill.durable_end
    }

    /// Batches up to `end` were written, and this file was synced after that.
    pub fn synced_through(&self, end: u64) {
        let mut fill = self.lock_fill();
        fill.durable_end = fill.durable_end.max(blocks::round_up(end));
    }

    /// Lets zeroes be written ahead in a segment that was opened.
    pub fn allow_fill(&self) {
        self.lock_fill().allowed = true;
    }

    /// No more batches: the segment is full or was cut.
    pub fn end_writes(&self) {
        {
            let mut fill = self.lock_fill();
            (fill.allowed, fill.blocks) = (false, None);
        }
        *self.lock_tail() = Tail::default();
    }

    /// Whether few zero bytes follow `end` and there is room for more.
    pub fn wants_fill(&self, end: u64, ahead_min: u64) -> bool {
        let fill = self.lock_fill();
        let ahead = (fill.step / 2).max(ahead_min);
        fill.allowed && !fill.running && fill.durable_end < self.header.capacity && fill.durable_end < end + ahead
    }

    /// Writes zeroes behind what is written, at least `size_min` bytes and more the faster
    /// the log goes; durable when it returns. Says how many.
    pub fn fill(&self, size_min: u64) -> io::Result<u64> {
        let (blocks, from, to) = {
            let mut fill = self.lock_fill();
            let from = fill.durable_end.max(fill.reserved_end);
            let end = blocks::round_down(self.header.capacity);
            // In a segment that was opened the end of the batches shows with the first write.
            if !fill.allowed || fill.running || from < SEGMENT_DATA_AT || from >= end {
                return Ok(0);
            }
            let Some(blocks) = fill.blocks.clone() else { return Ok(0) };
            fill.grow_step(size_min);
            (fill.running, fill.hurry) = (true, false);
            (blocks, from, blocks::round_up(from + fill.step).min(end))
        };
        let result = self.write_zeroes(blocks.as_ref(), from, to);
        let mut fill = self.lock_fill();
        fill.running = false;
        self.filled.notify_all();
        let end = result?;
        fill.durable_end = fill.durable_end.max(end);
        Ok(end - from)
    }

    fn write_zeroes(&self, blocks: &dyn BlockFile, from: u64, to: u64) -> io::Result<u64> {
        let mut at = from;
        let mut result = Ok(());
        while at < to && result.is_ok() {
            {
                let mut fill = self.lock_fill();
                // A write of batches that took these blocks meanwhile will sync the file itself.
                if std::mem::take(&mut fill.hurry) || fill.reserved_end > at {
                    break;
                }
                fill.writing = true;
            }
            result = blocks::zeroes(to - at).and_then(|zeroes| {
                at += zeroes.len() as u64;
                blocks.write(zeroes, at - zeroes.len() as u64)
            });
            self.lock_fill().writing = false;
            self.filled.notify_all();
        }
        result?;
        if at == from {
            return Ok(from);
        }
        blocks.sync()?;
        Ok(at)
    }

    /// One batch whose header was found at `at`, CRCs checked.
    pub fn batch_at(&self, at: u64, header: &Header) -> Result<Batch, BatchError> {
        split(self.file()?.view(at, header.batch_size(), self.header.capacity)?, header)
    }
}

impl Fill {
    fn grow_step(&mut self, size_min: u64) {
        let now = Instant::now();
        let step = self.step.max(size_min);
        let busy = self.stepped_at.replace(now).is_some_and(|before| now - before < FILL_STEP_TIME);
        self.step = if busy { (step * 2).min(FILL_STEP_MAX.max(size_min)) } else { step };
    }
}

/// Why a batch could not be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BatchError {
    #[error("{0}")]
    Bytes(#[from] DecodeError),
    #[error("{0}")]
    Disk(#[from] io::Error),
}

impl BatchError {
    /// Whether an error of the disk says that the bytes are lost, and not only out of reach now.
    pub fn is_damage_of(error: &io::Error) -> bool {
        error.kind() == io::ErrorKind::UnexpectedEof || is_unreadable(error)
    }
}

/// What a log knows of one of its segments; changed under the log's lock.
pub(crate) struct SegmentState {
    pub segment: Arc<Segment>,
    /// Byte after the last batch.
    pub end: u64,
    /// Index after the last entry.
    pub next_index: u64,
    /// Offset after the last record.
    pub next_offset: u64,
    pub last_term: u64,
    /// Newest time of a data batch in it or before it.
    pub last_time_ms: u64,
    index_step: u64,
    points: Vec<IndexPoint>,
    /// The last entry cannot be read: the next one is a place to enter at.
    ends_damaged: bool,
}

impl SegmentState {
    pub fn new(segment: Arc<Segment>, index_step: u64) -> Self {
        let header = &segment.header;
        let (next_index, next_offset) = (header.base_index.0, header.base_offset.0);
        let (last_term, last_time_ms) = (header.term_before.0, header.time_before_ms);
        Self {
            end: SEGMENT_DATA_AT,
            next_index,
            next_offset,
            last_term,
            last_time_ms,
            index_step,
            points: Vec::new(),
            ends_damaged: false,
            segment,
        }
    }

    pub fn base_index(&self) -> u64 {
        self.segment.header.base_index.0
    }

    pub fn last(&self) -> Option<LogPosition> {
        (self.next_index > self.base_index()).then(|| LogPosition::new(self.last_term, self.next_index - 1))
    }

    /// Counts a batch that stands at `self.end`.
    pub fn push(&mut self, header: &Header) {
        assert_eq!(header.index.0, self.next_index, "entries of a segment are consecutive");
        let is_far = self.points.last().is_none_or(|point| self.end - point.at >= self.index_step);
        if std::mem::take(&mut self.ends_damaged) || is_far {
            self.points.push(IndexPoint::of(self.end, self.last_time_ms, header));
        }
        self.end += header.batch_size() as u64;
        self.next_index += 1;
        self.next_offset = header.next_offset().0;
        self.last_term = header.term.0;
        if header.kind == BatchKind::Data {
            self.last_time_ms = self.last_time_ms.max(header.time_ms);
        }
    }

    /// Takes the place of counting every batch before the last of `points`, which are of this
    /// segment. The batch there comes next.
    pub fn jump(&mut self, points: &[IndexPoint]) {
        let Some((next, before)) = points.split_last() else { return };
        // Those behind damage that the walk has met stay.
        self.points.extend_from_slice(before);
        self.points.retain(|point| point.at < next.at);
        self.points.sort_by_key(|point| point.at);
        self.points.dedup_by_key(|point| point.at);
        (self.end, self.next_index, self.next_offset) = (next.at, next.index, next.offset);
        self.last_time_ms = next.time_before_ms;
    }

    /// Goes on at `point` behind entries that cannot be read.
    pub fn skip_to(&mut self, point: IndexPoint) {
        (self.end, self.next_index, self.next_offset) = (point.at, point.index, point.offset);
        self.points.push(point);
    }

    /// The next entry is a place to enter at: what stands before it cannot be read.
    pub fn enter_at_end(&mut self) {
        self.ends_damaged = true;
    }

    /// Adds a point, unless one is there.
    pub fn add_point(&mut self, mut point: IndexPoint) {
        let at = self.points.partition_point(|known| known.at < point.at);
        if self.points.get(at).is_none_or(|known| known.at > point.at) {
            let before =
                at.checked_sub(1).map_or(self.segment.header.time_before_ms, |at| self.points[at].time_before_ms);
            point.time_before_ms = point.time_before_ms.max(before);
            self.points.insert(at, point);
        }
    }

    /// Entries can be read again that stand before byte `end`: `points` among them, and the newest of
    /// their times.
    pub fn fill_in(&mut self, points: Vec<IndexPoint>, end: u64, time_ms: u64) {
        for point in self.points.iter_mut().filter(|point| point.at >= end) {
            point.time_before_ms = point.time_before_ms.max(time_ms);
        }
        self.points.extend(points);
        self.points.sort_unstable_by_key(|point| point.at);
        self.points.dedup_by_key(|point| point.at);
        self.last_time_ms = self.last_time_ms.max(time_ms);
    }

    pub fn points(&self) -> &[IndexPoint] {
        &self.points
    }

    /// Forgets everything from the entry that begins at `begin`.
    pub fn cut(&mut self, begin: &Cursor, last_term: u64) {
        self.points.retain(|point| point.at < begin.at);
        self.end = begin.at;
        self.next_index = begin.index;
        self.next_offset = begin.offset;
        self.last_term = last_term;
        // The time stays: it is an upper limit, and times never go back.
    }

    /// The last point for which `before` holds, or the first byte of data.
    fn enter(&self, before: impl Fn(&IndexPoint) -> bool) -> IndexPoint {
        let count = self.points.partition_point(before);
        let header = &self.segment.header;
        count.checked_sub(1).map_or(
            IndexPoint {
                at: SEGMENT_DATA_AT,
                index: header.base_index.0,
                offset: header.base_offset.0,
                time_before_ms: header.time_before_ms,
                chain: header.chain,
                term: header.term_before.0,
            },
            |last| self.points[last],
        )
    }

    pub fn enter_index(&self, index: u64) -> IndexPoint {
        self.enter(|point| point.index <= index)
    }

    pub fn enter_offset(&self, offset: u64) -> IndexPoint {
        self.enter(|point| point.offset <= offset)
    }

    pub fn enter_time(&self, time_ms: u64) -> IndexPoint {
        self.enter(|point| point.time_before_ms < time_ms)
    }

    /// Offset of the first index point after byte `at`, or of the end.
    pub fn offset_after(&self, at: u64) -> u64 {
        let point = self.points.iter().find(|point| point.at > at);
        point.map_or(self.next_offset, |point| point.offset)
    }
}

/// Reads headers one after the other through a window, without their payloads unless they are
/// asked for.
pub(crate) struct Walk<'a> {
    file: &'a dyn File,
    window: Vec<u8>,
    window_at: u64,
    /// Bytes read past the page cache, where many are wanted.
    chunk: Bytes,
    chunk_at: u64,
    /// Up to where bytes are wanted, about, and so read; 0 for no such reads.
    chunk_end: u64,
    /// Bytes read next time.
    window_size: usize,
    /// Byte of the next header.
    pub at: u64,
    end: u64,
}

impl<'a> Walk<'a> {
    pub fn new(file: &'a dyn File, at: u64, end: u64) -> Self {
        let (window, chunk) = (Vec::new(), Bytes::new());
        Self { file, window, window_at: 0, chunk, chunk_at: 0, chunk_end: 0, window_size: WINDOW_SIZE, at, end }
    }

    /// For a walk that is likely to end soon: reads little at first.
    pub fn growing(file: &'a dyn File, at: u64, end: u64) -> Self {
        Self { window_size: WINDOW_SIZE_MIN, ..Self::new(file, at, end) }
    }

    /// For about `size` bytes of whole batches from `at` on.
    pub fn of_batches(file: &'a dyn File, at: u64, end: u64, size: usize) -> Self {
        // The first batch stands up to a step of the index behind `at`.
        let wanted_end = at.saturating_add(INDEX_STEP).saturating_add(size as u64);
        let chunk_end = if size >= CHUNK_SIZE_MIN { wanted_end.min(end) } else { 0 };
        Self { chunk_end, ..Self::new(file, at, end) }
    }

    /// `size` bytes from `at` on in the chunk, which is read anew when it does not hold them.
    fn in_chunk(&mut self, at: u64, size: usize) -> io::Result<Option<Bytes>> {
        for fresh in [false, true] {
            if fresh {
                let from = blocks::round_down(at);
                let needed = at + size as u64 - from;
                let wanted = (blocks::round_up(self.chunk_end).max(from) - from).max(needed);
                let wanted = usize::try_from(wanted).unwrap_or(usize::MAX).min(READ_SIZE_MAX);
                if needed > wanted as u64 {
                    return Ok(None);
                }
                let read = match self.file.read_past_cache(at, wanted) {
                    // What is wanted may stand beside what the device cannot read.
                    Err(error) if is_unreadable(&error) => None,
                    read => read?,
                };
                let Some((from, bytes)) = read else {
                    self.chunk_end = 0;
                    return Ok(None);
                };
                (self.chunk_at, self.chunk) = (from, bytes);
            }
            if let Some(from) = at.checked_sub(self.chunk_at)
                && let Ok(from) = usize::try_from(from)
                && from + size <= self.chunk.len()
            {
                return Ok(Some(self.chunk.slice(from..from + size)));
            }
        }
        Ok(None)
    }

    /// The next 128 bytes; `None` when fewer are left before the end.
    pub fn bytes(&mut self) -> io::Result<Option<[u8; BATCH_HEADER_SIZE]>> {
        if self.at + BATCH_HEADER_SIZE as u64 > self.end {
            return Ok(None);
        }
        if self.chunk_end > 0
            && let Some(bytes) = self.in_chunk(self.at, BATCH_HEADER_SIZE)?
            && let Some(bytes) = bytes.first_chunk()
        {
            return Ok(Some(*bytes));
        }
        for _ in 0..2 {
            if let Some(from) = self.at.checked_sub(self.window_at)
                && let Ok(from) = usize::try_from(from)
                && let Some(bytes) = self.window.get(from..).and_then(|rest| rest.first_chunk())
            {
                return Ok(Some(*bytes));
            }
            self.read_window()?;
        }
        Ok(None)
    }

    fn read_window(&mut self) -> io::Result<()> {
        let size = usize::try_from(self.end - self.at).unwrap_or(usize::MAX).min(self.window_size);
        self.window_size = (self.window_size * 4).min(WINDOW_SIZE);
        // Behind what the device cannot read in a window there may be a header that it can.
        for size in [size, BATCH_HEADER_SIZE] {
            self.window.resize(size, 0);
            match self.file.read_at(&mut self.window, self.at) {
                Ok(read) => {
                    self.window.truncate(read);
                    self.window_at = self.at;
                    return Ok(());
                }
                Err(error) => {
                    self.window.clear();
                    if size == BATCH_HEADER_SIZE || !is_unreadable(&error) {
                        return Err(error);
                    }
                }
            }
        }
        Ok(())
    }

    /// The next header, decoded; the walk moves behind its batch.
    pub fn next(&mut self) -> Result<Option<(u64, Header)>, BatchError> {
        let Some(bytes) = self.bytes()? else { return Ok(None) };
        let header = Header::decode(&bytes)?;
        let at = self.at;
        self.at += header.batch_size() as u64;
        Ok(Some((at, header)))
    }

    /// The batch whose header was found at `at`, CRCs checked.
    pub fn batch(&mut self, segment: &Segment, at: u64, header: &Header) -> Result<Batch, BatchError> {
        if self.chunk_end > 0
            && let Some(bytes) = self.in_chunk(at, header.batch_size())?
        {
            return split(bytes, header);
        }
        segment.batch_at(at, header)
    }
}

fn split(mut bytes: Bytes, header: &Header) -> Result<Batch, BatchError> {
    let batch = Batch::split_from(&mut bytes)?;
    if batch.header != *header {
        return Err(DecodeError::Crc { what: "batch header" }.into());
    }
    Ok(batch)
}

/// Header and newest mark of a segment file, and whether a mark slot is neither whole nor empty.
pub(crate) struct Front {
    pub header: Result<SegmentHeader, DecodeError>,
    pub mark: Option<Mark>,
    /// The slot of that mark.
    pub slot: usize,
    pub slot_error: Option<DecodeError>,
}

/// Reads the blocks in front of a segment's batches.
pub(crate) fn read_front(file: &dyn File) -> io::Result<Front> {
    let mut block = vec![0; BLOCK_SIZE];
    let read = file.read_at(&mut block, 0)?;
    let header = SegmentHeader::decode(&block[..read]);
    let mut front = Front { header, mark: None, slot: 0, slot_error: None };
    for (slot, at) in MARK_AT.into_iter().enumerate() {
        let read = file.read_at(&mut block, at)?;
        match Mark::decode(&block[..read]) {
            Ok(mark) if front.mark.as_ref().is_none_or(|other| other.sequence < mark.sequence) => {
                (front.mark, front.slot) = (Some(mark), slot);
            }
            Ok(_) => {}
            Err(error) => {
                if block[..read].iter().any(|byte| *byte != 0) {
                    front.slot_error = Some(error);
                }
            }
        }
    }
    Ok(front)
}
