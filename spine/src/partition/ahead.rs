//! Reads of old data, and reading ahead: while a client works on one part of the log, the disk
//! reads the next one.
//!
//! For consumers, a few threads of low priority do it for all partitions: readers of old data take
//! what the disk and the processors have left, and must not stand in the way of those who append.
//! What is read has to be sent as well, by threads of full priority; therefore a reader that had to
//! wait for a processor while others appended also pauses, many times as long as it had to wait.
//! Jobs for workers are read at once.

use std::{
    collections::VecDeque,
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc},
    thread,
    time::Duration,
};

use arqon_proto::{Batch, GroupId, Offset, RaftIndex};
use arqon_storage::{Log, ReadError};
use tokio::{sync::oneshot, task::spawn_blocking};

/// Parts that a node keeps for readers that have not asked for them yet. The one made first goes
/// first, so that a reader which left holds none for long.
const PART_COUNT_MAX: usize = 8;
/// Bytes that they ask for together, at most, unless one part alone asks for more.
const PARTS_SIZE_MAX: usize = 32 << 20;
/// Read at a time by [`read_on`], in bytes.
const STEP_SIZE: usize = 1 << 20;
/// Threads that read. A disk gives nearly all that it has to one or two.
const THREAD_COUNT: usize = 2;
/// How far they stand back, as `nice` counts it.
const THREAD_NICENESS: i32 = 10;
/// A pause is so many times as long as the thread waited for a processor while it read.
const PAUSE_FACTOR: u32 = 64;
/// Shorter pauses are left out.
const PAUSE_MIN: Duration = Duration::from_millis(1);
const PAUSE_MAX: Duration = Duration::from_millis(100);

/// Batches on their way from the disk; an error of the receiver when the node is stopping.
pub(super) type Reading = oneshot::Receiver<Result<Vec<Batch>, ReadError>>;

struct Job {
    read: Box<dyn FnOnce() + Send>,
    log: Log,
}

/// Where a part begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub group: GroupId,
    pub offset: Offset,
}

/// A part that nobody has asked for yet.
#[derive(Debug)]
struct Part {
    place: Place,
    size_max: usize,
    reading: Reading,
}

/// The parts that a node has read ahead, for all of its partitions, and the threads that read.
#[derive(Debug)]
pub struct Ahead {
    parts: Mutex<VecDeque<Part>>,
    /// For the threads, which end with it. None: whoever reads does it at once.
    jobs: Option<mpsc::Sender<Job>>,
}

impl Ahead {
    /// Starts the threads, if there are to be any: without them, whoever asks does the reading.
    ///
    /// # Errors
    /// A thread cannot be started.
    pub fn start(has_threads: bool) -> io::Result<Self> {
        if !has_threads {
            return Ok(Self { parts: Mutex::default(), jobs: None });
        }
        let (jobs, queue) = mpsc::channel::<Job>();
        let queue = Arc::new(Mutex::new(queue));
        for _ in 0..THREAD_COUNT {
            let queue = Arc::clone(&queue);
            thread::Builder::new().name("log-reader".to_owned()).spawn(move || run(&queue))?;
        }
        Ok(Self { parts: Mutex::default(), jobs: Some(jobs) })
    }

    /// Reads committed batches from `offset` on, for a consumer.
    pub(super) fn read(&self, log: &Log, offset: Offset, through: RaftIndex, size_max: usize) -> Reading {
        let reader = log.clone();
        let (read, reading) = job(move || reader.read_data(offset, through, size_max));
        match &self.jobs {
            // When the threads have ended, the reading ends with an error.
            Some(jobs) => drop(jobs.send(Job { read, log: log.clone() })),
            None => read(),
        }
        reading
    }

    /// The part at `place`, if it was read ahead or is being read; of any size.
    pub(super) fn take(&self, place: Place) -> Option<Reading> {
        let mut parts = self.lock();
        let at = parts.iter().position(|part| part.place == place)?;
        parts.remove(at).map(|part| part.reading)
    }

    /// Keeps a part of about `size_max` bytes until it is taken or displaced.
    pub(super) fn keep(&self, place: Place, size_max: usize, reading: Reading) {
        let mut parts = self.lock();
        parts.retain(|part| part.place != place);
        parts.push_back(Part { place, size_max, reading });
        let mut size: usize = parts.iter().map(|part| part.size_max).sum();
        while parts.len() > PART_COUNT_MAX || size > PARTS_SIZE_MAX && parts.len() > 1 {
            size -= parts.pop_front().map_or(0, |part| part.size_max);
        }
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Part>> {
        self.parts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Reads committed batches from `offset` on, for a worker.
pub(super) fn read_jobs(log: &Log, offset: Offset, through: RaftIndex, size_max: usize) -> Reading {
    read_on(Vec::new(), log, offset, through, size_max)
}

/// What is at hand, and then batches from `offset` on up to about `size_max` bytes more. Read in
/// steps, so that a batch which stays does not hold the memory of all those read with it.
pub(super) fn read_on(
    mut at_hand: Vec<Batch>,
    log: &Log,
    mut offset: Offset,
    through: RaftIndex,
    size_max: usize,
) -> Reading {
    let log = log.clone();
    let has_threads = log.store_has_threads();
    let (read, reading) = job(move || {
        let mut size = 0;
        while size < size_max {
            match log.read_data(offset, through, STEP_SIZE.min(size_max - size)) {
                Ok(more) => {
                    let Some(last) = more.last() else { break };
                    offset = last.header.next_offset();
                    size += more.iter().map(|batch| batch.header.batch_size()).sum::<usize>();
                    at_hand.extend(more);
                }
                Err(cause) if at_hand.is_empty() => return Err(cause),
                // Whoever gets there will read it again, and tell.
                Err(_) => break,
            }
        }
        Ok(at_hand)
    });
    if has_threads {
        spawn_blocking(read);
    } else {
        read();
    }
    reading
}

/// What a thread has to run, and where the batches then come out.
fn job(read: impl FnOnce() -> Result<Vec<Batch>, ReadError> + Send + 'static) -> (Box<dyn FnOnce() + Send>, Reading) {
    let (sender, reading) = oneshot::channel();
    let job = move || {
        // A part that was displaced before its turn is not read at all.
        if !sender.is_closed() {
            drop(sender.send(read()));
        }
    };
    (Box::new(job), reading)
}

/// Reads until nobody is left to read for.
fn run(queue: &Mutex<mpsc::Receiver<Job>>) {
    if let Err(error) = rustix::process::setpriority_process(None, THREAD_NICENESS) {
        tracing::debug!(%error, "readers of old data run with the priority of all others");
    }
    let mut written_before = 0;
    loop {
        let job = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(Job { read, log }) = job else { return };
        let waited = waited_for_processor();
        // A broken read must not end the reads of all others.
        drop(catch_unwind(AssertUnwindSafe(read)));
        let written = log.store_written_size();
        // A log that somebody closes must not stay open for a pause.
        drop(log);
        let others_append = std::mem::replace(&mut written_before, written) != written;
        if let (true, Some(before), Some(after)) = (others_append, waited, waited_for_processor()) {
            let pause = after.saturating_sub(before) * PAUSE_FACTOR;
            if pause >= PAUSE_MIN {
                thread::sleep(pause.min(PAUSE_MAX));
            }
        }
    }
}

/// How long this thread has waited for a processor in all; `None` where the kernel does not say.
fn waited_for_processor() -> Option<Duration> {
    let statistics = std::fs::read_to_string("/proc/thread-self/schedstat").ok()?;
    Some(Duration::from_nanos(statistics.split_whitespace().nth(1)?.parse().ok()?))
}

/// Cuts a part to what is asked for now: about `size_max` bytes, at least one batch.
pub(super) fn cut(batches: &mut Vec<Batch>, size_max: usize) {
    let mut size = 0;
    let fits = |batch: &Batch| {
        size += batch.header.batch_size();
        size <= size_max
    };
    let count = batches.iter().map(fits).take_while(|fits| *fits).count();
    batches.truncate(count.max(1));
}

#[cfg(test)]
mod tests {
    use arqon_proto::BatchKind;

    use super::*;

    fn place(offset: u64) -> Place {
        Place { group: GroupId(1), offset: Offset(offset) }
    }

    #[tokio::test]
    async fn a_part_is_given_once_and_the_oldest_makes_room() {
        let ahead = Ahead::start(true).unwrap();
        for offset in 0..=PART_COUNT_MAX as u64 {
            let (read, reading) = job(|| Ok(Vec::new()));
            read();
            ahead.keep(place(offset), 1, reading);
        }
        assert!(ahead.take(place(0)).is_none());
        assert!(ahead.take(place(1)).is_some() && ahead.take(place(1)).is_none());
        assert!(ahead.take(Place { group: GroupId(2), ..place(2) }).is_none());
        assert!(ahead.take(place(2)).unwrap().await.unwrap().unwrap().is_empty());
        // Two parts of half of the bytes, and a third one.
        for offset in 20..=22 {
            ahead.keep(place(offset), PARTS_SIZE_MAX / 2, job(|| Ok(Vec::new())).1);
        }
        assert!(ahead.take(place(20)).is_none() && ahead.take(place(3)).is_none());
        assert!(ahead.take(place(21)).is_some() && ahead.take(place(22)).is_some());
    }

    #[test]
    fn a_part_is_cut_to_what_is_asked_for_and_never_to_nothing() {
        let batch = Batch::internal(BatchKind::Control, vec![0; 872].into());
        let size = batch.header.batch_size();
        for (size_max, count) in [(0, 1), (size, 1), (3 * size - 1, 2), (3 * size, 3), (10 * size, 4)] {
            let mut batches = vec![batch.clone(); 4];
            cut(&mut batches, size_max);
            assert_eq!(batches.len(), count, "{size_max} bytes");
        }
    }
}
