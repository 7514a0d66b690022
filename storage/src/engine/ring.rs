//! Flush groups through io_uring: for each group its writes and one fdatasync, linked, with
//! the groups of many logs in flight at once.

use std::collections::VecDeque;
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use io_uring::{IoUring, Probe, opcode, squeue, types};

use super::Engine;
use crate::disk::File;
use crate::flush::{Group, Op};
use crate::log::LogCore;

const ENTRY_COUNT: u32 = 256;
/// Writes of one group; groups with more go to the pool.
const WRITE_COUNT_MAX: usize = 48;
/// Entries in use at once, so that submission and completion queues never overflow.
const IN_USE_MAX: usize = ENTRY_COUNT as usize - WRITE_COUNT_MAX - 2;
/// Marks the completion of the wake-up poll.
const WAKE: u64 = u64::MAX;
/// `POLLIN` of poll(2).
const POLL_IN: u32 = 1;

struct Shared {
    inbox: Mutex<Inbox>,
    /// Whether the thread waits in the kernel and needs a byte in the pipe to look again.
    asleep: AtomicBool,
    wake: PipeWriter,
}

#[derive(Default)]
struct Inbox {
    logs: VecDeque<Arc<LogCore>>,
    /// The ring failed: everything goes to the pool.
    broken: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        if self.asleep.swap(false, Ordering::SeqCst) {
            // A full pipe wakes as well.
            let _ = (&self.wake).write(&[1]);
        }
    }
}

/// How the other threads reach the ring.
pub(super) struct Handle(Arc<Shared>);

impl Handle {
    /// Gives a log to the ring, or gives it back when the ring is broken.
    pub fn push(&self, core: Arc<LogCore>) -> Result<(), Arc<LogCore>> {
        {
            let mut inbox = self.0.lock();
            if inbox.broken {
                return Err(core);
            }
            inbox.logs.push_back(core);
        }
        self.0.wake();
        Ok(())
    }

    /// Makes the thread look again.
    pub fn wake(&self) {
        self.0.wake();
    }
}

/// The ring, before its thread runs.
pub(super) struct Ring {
    ring: IoUring,
    woken: PipeReader,
    shared: Arc<Shared>,
}

/// A group that the kernel works on.
struct Flight {
    core: Arc<LogCore>,
    group: Group,
    started: Instant,
    sizes: Vec<u32>,
    remaining: usize,
    /// A write was short or interrupted: the group is written again by the pool.
    again: bool,
    failed: Option<io::Error>,
}

/// The groups in flight, by slot. The kernel reads their buffers until they are complete.
#[derive(Default)]
struct Flights {
    slots: Vec<Option<Box<Flight>>>,
    in_use: usize,
}

impl Drop for Flights {
    fn drop(&mut self) {
        if self.slots.iter().any(Option::is_some) {
            // Unwinding would free memory that the kernel is still to read and write to a log.
            tracing::error!("the ring thread ended with writes in flight");
            std::process::abort();
        }
    }
}

impl Flights {
    fn insert(&mut self, flight: Box<Flight>) -> usize {
        self.in_use += flight.remaining;
        if let Some(slot) = self.slots.iter().position(Option::is_none) {
            self.slots[slot] = Some(flight);
            return slot;
        }
        self.slots.push(Some(flight));
        self.slots.len() - 1
    }
}

impl Ring {
    /// Sets up a ring, unless the kernel refuses it or one of the operations.
    pub fn new() -> io::Result<Self> {
        let ring = IoUring::new(ENTRY_COUNT)?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        for code in [opcode::Write::CODE, opcode::Fsync::CODE, opcode::PollAdd::CODE] {
            if !probe.is_supported(code) {
                return Err(io::Error::new(io::ErrorKind::Unsupported, format!("operation {code} is not supported")));
            }
        }
        let (woken, wake) = io::pipe()?;
        let shared = Shared { inbox: Mutex::default(), asleep: AtomicBool::new(false), wake };
        Ok(Self { ring, woken, shared: Arc::new(shared) })
    }

    pub fn handle(&self) -> Handle {
        Handle(Arc::clone(&self.shared))
    }

    /// Runs until stopped; everything pushed before is completed.
    pub fn run(mut self, engine: &Arc<Engine>) {
        let mut flights = Flights::default();
        let mut armed = false;
        loop {
            while flights.in_use < IN_USE_MAX
                && let Some(core) = self.next_log()
            {
                self.start(engine, core, &mut flights);
            }
            if engine.may_end() {
                return;
            }
            if !armed {
                let poll = opcode::PollAdd::new(types::Fd(self.woken.as_raw_fd()), POLL_IN).build().user_data(WAKE);
                // SAFETY: the entry refers to no memory, and `woken` lives as long as the ring.
                armed = unsafe { self.ring.submission().push(&poll) }.is_ok();
            }
            if let Err(error) = self.wait(engine, &flights) {
                self.give_up(engine, flights, &error);
                return;
            }
            let completed: Vec<(u64, i32)> =
                self.ring.completion().map(|entry| (entry.user_data(), entry.result())).collect();
            for (tag, result) in completed {
                if tag == WAKE {
                    armed = false;
                    // The poll said that there are bytes, so this does not block.
                    let _ = self.woken.read(&mut [0; 64]);
                } else {
                    complete(engine, &mut flights, tag, result);
                }
            }
        }
    }

    fn next_log(&self) -> Option<Arc<LogCore>> {
        self.shared.lock().logs.pop_front()
    }

    /// Submits, and waits for a completion unless there is more to start.
    fn wait(&self, engine: &Engine, flights: &Flights) -> io::Result<()> {
        self.shared.asleep.store(true, Ordering::SeqCst);
        let more = flights.in_use < IN_USE_MAX && !self.shared.lock().logs.is_empty() || engine.may_end();
        let result = self.ring.submit_and_wait(usize::from(!more));
        self.shared.asleep.store(false, Ordering::SeqCst);
        match result {
            Ok(_) => Ok(()),
            // Interrupted, or the kernel wants completions taken first: both are tried again.
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock | io::ErrorKind::ResourceBusy
                ) =>
            {
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// Takes the next operation of a log if it is a plain append; the pool takes all others.
    fn start(&mut self, engine: &Arc<Engine>, core: Arc<LogCore>, flights: &mut Flights) {
        let group = {
            let mut state = core.lock();
            match state.queue.pop_front() {
                Some(Op::Append(mut group)) => {
                    if fits(&mut group) {
                        Some(group)
                    } else {
                        state.queue.push_front(Op::Append(group));
                        None
                    }
                }
                Some(op) => {
                    state.queue.push_front(op);
                    None
                }
                None => None,
            }
        };
        let Some(mut group) = group else {
            engine.push_to_pool(core);
            return;
        };
        let Some((fd, file_at)) = descriptor(&group) else {
            core.lock().queue.push_front(Op::Append(group));
            engine.push_to_pool(core);
            return;
        };
        let sizes: Vec<u32> = group.pieces().iter().map(|piece| piece.len() as u32).collect();
        let remaining = sizes.len() + 1;
        let flight = Flight { core, group, started: Instant::now(), sizes, remaining, again: false, failed: None };
        let slot = flights.insert(Box::new(flight));
        let Some(flight) = flights.slots[slot].as_mut() else { return };

        let mut entries = Vec::with_capacity(remaining);
        let mut at = file_at;
        for (number, piece) in flight.group.pieces().iter().enumerate() {
            let write = opcode::Write::new(fd, piece.as_ptr(), piece.len() as u32).offset(at).build();
            entries.push(write.flags(squeue::Flags::IO_LINK).user_data(tag(slot, number)));
            at += piece.len() as u64;
        }
        let sync = opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build();
        entries.push(sync.user_data(tag(slot, remaining - 1)));
        let space = {
            let queue = self.ring.submission();
            queue.capacity() - queue.len()
        };
        if space < remaining {
            // A chain must reach the kernel in one submission. A failure shows in `wait`.
            let _ = self.ring.submit();
        }
        // SAFETY: the pieces and the open file are owned by the flight, which stays in its slot,
        // unmoved and unchanged, until all entries of it have completed: `complete` counts them,
        // `give_up` leaks the flights, and dropping `Flights` with one inside ends the process.
        let pushed = unsafe { self.ring.submission().push_multiple(&entries) };
        if pushed.is_err() {
            // The kernel has seen none of these entries.
            flights.in_use -= remaining;
            if let Some(flight) = flights.slots[slot].take() {
                flight.core.lock().queue.push_front(Op::Append(flight.group));
                engine.push_to_pool(flight.core);
            }
        }
    }

    /// The ring does not work any more: its logs fail, all others go on through the pool.
    fn give_up(&self, engine: &Arc<Engine>, mut flights: Flights, error: &io::Error) {
        tracing::error!("io_uring failed, going on without it: {error}");
        for flight in flights.slots.drain(..).flatten() {
            flight.core.poison(&format!("io_uring failed: {error}"));
            engine.release(Arc::clone(&flight.core));
            // The kernel may still read the buffers.
            std::mem::forget(flight);
        }
        let logs = {
            let mut inbox = self.shared.lock();
            inbox.broken = true;
            std::mem::take(&mut inbox.logs)
        };
        logs.into_iter().for_each(|core| engine.push_to_pool(core));
    }
}

fn tag(slot: usize, number: usize) -> u64 {
    (slot as u64) << 16 | number as u64
}

/// Whether the ring can take this group now.
fn fits(group: &mut Group) -> bool {
    group.pieces().len() <= WRITE_COUNT_MAX && descriptor(group).is_some() && group.segment.reserve(group.end(), false)
}

fn descriptor(group: &Group) -> Option<(types::Fd, u64)> {
    let file: &Arc<dyn File> = group.segment.file().ok()?;
    Some((types::Fd(file.descriptor()?), group.at))
}

/// Counts one completion; the last one of a group finishes it.
fn complete(engine: &Arc<Engine>, flights: &mut Flights, tag: u64, result: i32) {
    let (slot, number) = ((tag >> 16) as usize, (tag & 0xffff) as usize);
    let Some(flight) = flights.slots.get_mut(slot).and_then(Option::as_mut) else { return };
    flights.in_use -= 1;
    flight.remaining -= 1;
    if result < 0 {
        let error = io::Error::from_raw_os_error(-result);
        match rustix::io::Errno::from_raw_os_error(-result) {
            rustix::io::Errno::CANCELED | rustix::io::Errno::INTR | rustix::io::Errno::AGAIN => flight.again = true,
            _ => flight.failed = Some(error),
        }
    } else if flight.sizes.get(number).is_some_and(|size| i64::from(*size) != i64::from(result)) {
        flight.again = true;
    }
    if flight.remaining > 0 {
        return;
    }
    let Some(flight) = flights.slots[slot].take() else { return };
    let Flight { core, group, started, again, failed, .. } = *flight;
    match failed {
        Some(error) => core.finish_group(group, started, Err(error)),
        None if again => {
            core.lock().queue.push_front(Op::Append(group));
            engine.push_to_pool(core);
            return;
        }
        None => core.finish_group(group, started, Ok(())),
    }
    engine.release(core);
}
