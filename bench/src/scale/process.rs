//! What the kernel says of the nodes, and does to their files.

use std::{
    fs::File,
    io,
    path::Path,
    time::{Duration, Instant},
};

use rustix::{
    fs::{Advice, fadvise},
    process::{Pid, Signal, kill_process},
};

/// Longest wait for a node to end by itself.
const END_TIME_MAX: Duration = Duration::from_secs(60);

/// Anonymous resident memory of each process, in MiB (2^20 bytes): `RssAnon` of proc_pid_status(5).
///
/// # Errors
/// A process that is gone.
pub fn rss_anon_mib(pids: &[u32]) -> Result<Vec<f64>, String> {
    let mib = |pid: &u32| {
        let path = format!("/proc/{pid}/status");
        let text = std::fs::read_to_string(&path).map_err(|error| format!("{path}: {error}"))?;
        kib_of(&text, "RssAnon:").map(|kib| kib as f64 / 1024.0).ok_or_else(|| format!("{path}: no RssAnon"))
    };
    pids.iter().map(mib).collect()
}

fn kib_of(status: &str, field: &str) -> Option<u64> {
    let rest = status.lines().find_map(|line| line.strip_prefix(field))?;
    rest.trim().strip_suffix("kB")?.trim().parse().ok()
}

/// Every file below `dir`.
fn each_file(dir: &Path, work: &mut impl FnMut(&Path, &std::fs::Metadata) -> io::Result<()>) -> io::Result<()> {
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        // A node may remove a file meanwhile.
        let Ok(metadata) = entry.metadata() else { continue };
        if metadata.is_dir() {
            each_file(&entry.path(), work)?;
        } else {
            work(&entry.path(), &metadata)?;
        }
    }
    Ok(())
}

/// Bytes that the files below `dir` take on the disk.
///
/// # Errors
/// A directory that cannot be read.
pub fn allocated_size(dir: &Path) -> Result<u64, String> {
    use std::os::unix::fs::MetadataExt;
    let mut size = 0;
    let mut add = |_: &Path, metadata: &std::fs::Metadata| {
        size += metadata.blocks() * 512;
        Ok(())
    };
    each_file(dir, &mut add).map_err(|error| format!("{}: {error}", dir.display()))?;
    Ok(size)
}

/// Takes the files below `dir` out of the page cache, so that the next reader goes to the disk.
///
/// # Errors
/// A file that cannot be opened.
pub fn drop_page_cache(dir: &Path) -> Result<(), String> {
    let mut drop_file = |path: &Path, _: &std::fs::Metadata| {
        let file = File::open(path)?;
        // Dirty pages stay; these are to be written first.
        file.sync_all()?;
        Ok(fadvise(&file, 0, None, Advice::DontNeed)?)
    };
    each_file(dir, &mut drop_file).map_err(|error| format!("{}: {error}", dir.display()))
}

/// Sends SIGTERM and waits until the process has ended, though its parent has not reaped it; the
/// time that it took.
///
/// # Errors
/// It is gone already, or does not end.
pub async fn terminate(pid: u32) -> Result<Duration, String> {
    let begin = Instant::now();
    let handle = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or("no such process")?;
    kill_process(handle, Signal::TERM).map_err(|error| format!("cannot end process {pid}: {error}"))?;
    while is_running(pid) {
        if begin.elapsed() > END_TIME_MAX {
            return Err(format!("process {pid} runs on {} s after SIGTERM", END_TIME_MAX.as_secs()));
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    Ok(begin.elapsed())
}

/// Whether the process is there and more than an entry in the table.
pub fn is_running(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat.rsplit_once(')').and_then(|(_, rest)| rest.trim_start().chars().next());
    state.is_some_and(|state| !matches!(state, 'Z' | 'X'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_of_this_process_is_found() {
        assert!(rss_anon_mib(&[std::process::id()]).unwrap()[0] > 0.1);
        assert_eq!(kib_of("Name:\tx\nRssAnon:\t    2048 kB\n", "RssAnon:"), Some(2048));
        assert_eq!(kib_of("RssAnon: many", "RssAnon:"), None);
    }

    #[tokio::test]
    async fn a_process_ends_by_sigterm_and_is_seen_to_have_ended() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        assert!(is_running(child.id()));
        terminate(child.id()).await.unwrap();
        assert!(!is_running(child.id()));
        child.wait().unwrap();
    }

    #[test]
    fn files_are_counted_and_leave_the_cache() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("a")).unwrap();
        std::fs::write(dir.path().join("a/b"), vec![1; 100_000]).unwrap();
        drop_page_cache(dir.path()).unwrap();
        assert!(allocated_size(dir.path()).unwrap() >= 100_000);
    }
}
