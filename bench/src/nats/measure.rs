//! What servers used meanwhile: CPU, memory and disk, from /proc and the file system.

use std::{
    collections::BTreeSet,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::Duration,
};

use crate::{cpu, load::Measured};

/// Bytes of a block as `st_blocks` counts them.
const BLOCK_SIZE: u64 = 512;
/// Time for the last copy to reach its disk after the last acknowledgement.
const SETTLE_TIME_MAX: Duration = Duration::from_secs(15);

/// One round of one side.
#[derive(Clone, Copy, Debug, Default)]
pub struct HalfRound {
    /// What the client saw.
    pub measured: Measured,
    /// CPU time of the servers meanwhile, in seconds.
    pub server_seconds: f64,
    /// CPU time of this program meanwhile, in seconds.
    pub client_seconds: f64,
    /// CPU time of the servers whose turn it was not, in seconds.
    pub idle_seconds: f64,
    /// Most memory of all its servers together since the round began, in bytes.
    pub memory_size: u64,
    /// Least bytes that a replica has allocated for the round; 0 where none is written.
    pub disk_size: u64,
}

/// Taken before the work, to be compared with after it.
pub struct Before<'a> {
    busy: &'a [u32],
    idle: &'a [u32],
    server_seconds: f64,
    client_seconds: f64,
    idle_seconds: f64,
}

impl<'a> Before<'a> {
    /// Starts to measure the servers that are to work, `busy`, and the others.
    ///
    /// # Errors
    /// A process that is gone.
    pub fn new(busy: &'a [u32], idle: &'a [u32]) -> Result<Self, String> {
        for pid in busy {
            // Makes the peak that of this round. Not allowed everywhere; the peak is that of the run then.
            let _ = std::fs::write(format!("/proc/{pid}/clear_refs"), "5");
        }
        Ok(Self {
            busy,
            idle,
            server_seconds: cpu::seconds(busy)?,
            client_seconds: cpu::seconds(&[std::process::id()])?,
            idle_seconds: cpu::seconds(idle)?,
        })
    }

    /// What was used since.
    ///
    /// # Errors
    /// A process that is gone.
    pub fn after(self, measured: Measured) -> Result<HalfRound, String> {
        Ok(HalfRound {
            measured,
            server_seconds: cpu::seconds(self.busy)? - self.server_seconds,
            client_seconds: cpu::seconds(&[std::process::id()])? - self.client_seconds,
            idle_seconds: cpu::seconds(self.idle)? - self.idle_seconds,
            memory_size: self.busy.iter().map(|pid| peak_size(*pid)).sum::<Result<u64, String>>()?,
            disk_size: 0,
        })
    }
}

/// The most memory that a process has had, in bytes.
fn peak_size(pid: u32) -> Result<u64, String> {
    let path = format!("/proc/{pid}/status");
    let text = std::fs::read_to_string(&path).map_err(|error| format!("{path}: {error}"))?;
    peak_of(&text).ok_or_else(|| format!("{path}: no VmHWM"))
}

fn peak_of(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix(" kB")?.trim().parse().ok()?;
    Some(kib << 10)
}

/// Bytes that the file system has allocated below a directory.
pub fn allocated(dir: &Path) -> u64 {
    // Files come and go meanwhile: what is gone has no size.
    let Ok(entries) = std::fs::read_dir(dir) else { return 0 };
    let sizes = entries.flatten().map(|entry| match entry.metadata() {
        Ok(metadata) if metadata.is_dir() => allocated(&entry.path()),
        Ok(metadata) => metadata.blocks() * BLOCK_SIZE,
        Err(_) => 0,
    });
    sizes.sum()
}

/// Where a replica keeps its logs, a directory each, and those that were there before.
#[derive(Clone, Debug)]
pub struct Ground {
    root: PathBuf,
    known: BTreeSet<PathBuf>,
}

impl Ground {
    /// As it is now.
    pub fn new(root: PathBuf) -> Self {
        Self { known: directories(&root).collect(), root }
    }

    /// Bytes allocated in the logs that have come since.
    fn grown(&self) -> u64 {
        directories(&self.root).filter(|path| !self.known.contains(path)).map(|path| allocated(&path)).sum()
    }
}

fn directories(root: &Path) -> impl Iterator<Item = PathBuf> {
    std::fs::read_dir(root).into_iter().flatten().flatten().map(|entry| entry.path())
}

/// Waits until each replica has allocated `payload_size` bytes at least for its new logs; the smallest.
///
/// # Errors
/// A replica that does not have it: its messages were made smaller, or are not there.
pub async fn check_disk(grounds: &[Ground], payload_size: u64) -> Result<u64, String> {
    let begin = std::time::Instant::now();
    loop {
        let sizes: Vec<u64> = grounds.iter().map(Ground::grown).collect();
        let smallest = sizes.iter().copied().min().unwrap_or_default();
        if smallest >= payload_size {
            return Ok(smallest);
        }
        if begin.elapsed() > SETTLE_TIME_MAX {
            return Err(format!(
                "a replica has {smallest} bytes on disk for {payload_size} bytes of payload; all have {sizes:?}"
            ));
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Writes back what the last round left to the kernel, so that the next one does not pay for it.
///
/// # Errors
/// The directory is gone.
pub async fn settle(dir: &Path) -> Result<(), String> {
    let dir = dir.to_owned();
    let syncing = tokio::task::spawn_blocking(move || {
        let file = std::fs::File::open(&dir).map_err(|error| format!("{}: {error}", dir.display()))?;
        rustix::fs::syncfs(&file).map_err(|error| format!("{}: {error}", dir.display()))
    });
    syncing.await.map_err(|error| error.to_string())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_peak_is_read_and_this_process_has_one() {
        assert_eq!(peak_of("VmPeak:\t 9 kB\nVmHWM:\t   1234 kB\nVmRSS:\t 1 kB"), Some(1234 << 10));
        assert_eq!(peak_of("VmHWM: many"), None);
        assert!(peak_size(std::process::id()).unwrap() > 1 << 20);
    }

    #[tokio::test]
    async fn only_what_is_new_on_every_replica_counts() {
        let dir = tempfile::tempdir().unwrap();
        let write = |path: &str| {
            std::fs::create_dir_all(dir.path().join(path)).unwrap();
            std::fs::write(dir.path().join(path).join("file"), vec![1; 100_000]).unwrap();
        };
        write("1/old");
        write("2/old");
        let grounds = ["1", "2"].map(|replica| Ground::new(dir.path().join(replica)));
        write("1/new/deep");
        assert_eq!(grounds.each_ref().map(|ground| ground.grown() >= 100_000), [true, false]);
        write("2/new");
        let smallest = check_disk(&grounds, 100_000).await.unwrap();
        assert!((100_000..200_000).contains(&smallest), "{smallest}");
    }
}
