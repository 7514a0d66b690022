//! Writes and syncs of many files side by side, through io_uring: told to the kernel in one call
//! and waited for in the same one, so that the device is told once and no thread is between.

use std::io;
use std::os::fd::RawFd;

use io_uring::{IoUring, Probe, opcode, squeue, types};

/// One thing to do to one file.
pub(crate) enum Job<'a> {
    /// Write these bytes at this place.
    Write(RawFd, &'a [u8], u64),
    /// fdatasync.
    Sync(RawFd),
}

impl Job<'_> {
    fn entry(&self) -> squeue::Entry {
        match self {
            // Of a larger piece the kernel says how much it wrote.
            Self::Write(fd, bytes, at) => {
                let size = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
                opcode::Write::new(types::Fd(*fd), bytes.as_ptr(), size).offset(*at).build()
            }
            Self::Sync(fd) => opcode::Fsync::new(types::Fd(*fd)).flags(types::FsyncFlags::DATASYNC).build(),
        }
    }
}

pub(crate) struct Ring {
    ring: IoUring,
    entry_count: u32,
}

/// Entries that the kernel may still work on. Leaving the frame that lends it their memory, by
/// an error or a panic, would let it write other bytes than meant to a log.
struct Lent(usize);

impl Drop for Lent {
    fn drop(&mut self) {
        if self.0 > 0 {
            tracing::error!("a ring failed with {} writes in flight", self.0);
            std::process::abort();
        }
    }
}

impl Ring {
    /// Sets up a ring with room for `entry_count` jobs at once, a power of two, unless the kernel
    /// refuses it or one of the operations.
    pub fn new(entry_count: u32) -> io::Result<Self> {
        let ring = IoUring::new(entry_count)?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        for code in [opcode::Write::CODE, opcode::Fsync::CODE] {
            if !probe.is_supported(code) {
                return Err(io::Error::new(io::ErrorKind::Unsupported, format!("operation {code} is not supported")));
            }
        }
        Ok(Self { ring, entry_count })
    }

    /// Does all `jobs`, in no order, and returns when the last one is complete: for each the
    /// bytes written, 0 for a sync, or its error.
    ///
    /// # Errors
    /// The ring does not work any more; an unknown part was done.
    pub fn run(&mut self, jobs: &[Job<'_>]) -> io::Result<Vec<io::Result<usize>>> {
        let mut results = Vec::with_capacity(jobs.len());
        for part in jobs.chunks(self.entry_count as usize) {
            let base = results.len();
            results.extend(part.iter().map(|_| Ok(0)));
            let mut lent = Lent(part.len());
            for (number, job) in part.iter().enumerate() {
                let entry = job.entry().user_data((base + number) as u64);
                // SAFETY: the memory and the descriptor of the job are borrowed for this call,
                // and it is not left before `lent` is down to zero: each entry is complete, or
                // the kernel has not seen it and the queue that holds it is never submitted again.
                if unsafe { self.ring.submission().push(&entry) }.is_err() {
                    unreachable!("the queue is empty and has room for {} entries", self.entry_count);
                }
            }
            while lent.0 > 0 {
                match self.ring.submit_and_wait(lent.0) {
                    Ok(_) => {}
                    // Interrupted, or the kernel wants completions taken first.
                    Err(error)
                        if matches!(
                            error.kind(),
                            io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock | io::ErrorKind::ResourceBusy
                        ) => {}
                    Err(error) => {
                        let unseen = self.ring.submission().len();
                        lent.0 -= unseen.min(lent.0);
                        return Err(error);
                    }
                }
                for entry in self.ring.completion() {
                    lent.0 -= 1;
                    let result = entry.result();
                    let size = usize::try_from(result).map_err(|_| io::Error::from_raw_os_error(-result));
                    if let Some(place) = usize::try_from(entry.user_data()).ok().and_then(|at| results.get_mut(at)) {
                        *place = size;
                    }
                }
            }
        }
        Ok(results)
    }
}
