//! A memory cgroup for one process, of version 2 or 1, where this system lets us make one.

use std::path::{Path, PathBuf};

/// A group with a memory limit. Removed on drop, when nothing runs in it any more.
pub struct Cgroup {
    dir: PathBuf,
    unified: bool,
}

impl Cgroup {
    /// Makes the group `name` with `memory_max` bytes.
    ///
    /// # Errors
    /// Why there can be none here.
    pub fn create(name: &str, memory_max: u64) -> Result<Self, String> {
        let (root, unified) = memory_root()?;
        if unified {
            // Already on where something like systemd cares for it.
            let _ = std::fs::write(root.join("cgroup.subtree_control"), "+memory");
        }
        let dir = root.join(name);
        std::fs::create_dir(&dir).map_err(|error| format!("cannot make {}: {error}", dir.display()))?;
        let group = Self { dir, unified };
        let limit = if unified { "memory.max" } else { "memory.limit_in_bytes" };
        group.write(limit, &memory_max.to_string())?;
        Ok(group)
    }

    /// Moves a process in. What it has in memory stays accounted where it was.
    pub fn add(&self, pid: u32) -> Result<(), String> {
        self.write("cgroup.procs", &pid.to_string())
    }

    /// Processes of the group that the kernel killed for memory.
    pub fn oom_kill_count(&self) -> Result<u64, String> {
        let file = if self.unified { "memory.events" } else { "memory.oom_control" };
        let text = self.read(file)?;
        count_of(&text, "oom_kill").ok_or_else(|| format!("{}: no oom_kill", self.dir.join(file).display()))
    }

    /// The most that was charged, page cache included, in MiB.
    pub fn peak_mib(&self) -> Option<f64> {
        let file = if self.unified { "memory.peak" } else { "memory.max_usage_in_bytes" };
        let bytes: u64 = self.read(file).ok()?.trim().parse().ok()?;
        Some(bytes as f64 / f64::from(1 << 20))
    }

    fn read(&self, file: &str) -> Result<String, String> {
        let path = self.dir.join(file);
        std::fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))
    }

    fn write(&self, file: &str, value: &str) -> Result<(), String> {
        let path = self.dir.join(file);
        std::fs::write(&path, value).map_err(|error| format!("{}: {error}", path.display()))
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // One that still has a process cannot be removed; it is empty at the next boot at the latest.
        let _ = std::fs::remove_dir(&self.dir);
    }
}

fn count_of(text: &str, field: &str) -> Option<u64> {
    let mut lines = text.lines().filter_map(|line| line.split_once(' '));
    lines.find(|(name, _)| *name == field)?.1.trim().parse().ok()
}

/// Where groups with a memory limit are made, and whether that is version 2.
fn memory_root() -> Result<(PathBuf, bool), String> {
    let mounts = std::fs::read_to_string("/proc/mounts").map_err(|error| format!("/proc/mounts: {error}"))?;
    let mut fields = mounts.lines().map(|line| line.split_ascii_whitespace().collect::<Vec<_>>());
    let found = fields.find_map(|fields| match fields[..] {
        [_, place, "cgroup2", ..] => {
            let controllers = std::fs::read_to_string(Path::new(place).join("cgroup.controllers")).ok()?;
            controllers.split_ascii_whitespace().any(|name| name == "memory").then(|| (PathBuf::from(place), true))
        }
        [_, place, "cgroup", options, ..] => {
            options.split(',').any(|option| option == "memory").then(|| (PathBuf::from(place), false))
        }
        _ => None,
    });
    found.ok_or_else(|| "no cgroup with the memory controller is mounted".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_found_in_both_formats() {
        assert_eq!(count_of("low 0\nhigh 0\nmax 5\noom 1\noom_kill 2\noom_group_kill 0\n", "oom_kill"), Some(2));
        assert_eq!(count_of("oom_kill_disable 0\nunder_oom 0\noom_kill 3\n", "oom_kill"), Some(3));
        assert_eq!(count_of("oom 1\n", "oom_kill"), None);
    }
}
