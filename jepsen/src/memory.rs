//! The memory of the nodes, looked at again and again while they run.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::time::interval;

use crate::history::{Line, Value, Writer};

/// Time between two looks.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// The process of each node that was started last, by the node's number.
#[derive(Clone, Debug, Default)]
pub(crate) struct Running(Arc<Mutex<BTreeMap<u64, u32>>>);

impl Running {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, u32>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A node is that process from now on.
    pub(crate) fn set(&self, node: u64, pid: u32) {
        self.lock().insert(node, pid);
    }
}

/// Records what each node has, until this is dropped.
pub(crate) async fn watch(running: Running, history: Arc<Writer>) {
    let mut looks = interval(LOOK_INTERVAL);
    loop {
        looks.tick().await;
        let processes: Vec<_> = running.lock().iter().map(|(node, pid)| (*node, *pid)).collect();
        for (node, pid) in processes {
            // One that has ended meanwhile has none.
            let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            if let Some(bytes) = own_size(&status).filter(|_| is_child(&status)) {
                history.record(Line { node: Some(node), value: Some(Value::One(bytes)), ..Line::nemesis("memory") });
            }
        }
    }
}

/// Bytes in memory that are the process's own, as proc(5) tells them; not those of the files that it maps, which
/// the kernel takes back when it likes.
fn own_size(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// Whether this process has started it: the number of one that has ended may be another's.
fn is_child(status: &str) -> bool {
    let parent = status.lines().find_map(|line| line.strip_prefix("PPid:"));
    parent.is_some_and(|pid| pid.trim() == std::process::id().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_takes_memory_is_seen_to() {
        let own = || own_size(&std::fs::read_to_string("/proc/self/status").unwrap()).unwrap();
        assert!(own() > 0);
        // Another test of this process may give memory back at the same time, and the kernel may move some to swap:
        // to see it once is enough.
        let is_seen = (0..100).any(|_| {
            let before = own();
            let taken = std::hint::black_box(vec![1_u8; 64 << 20]);
            let after = own();
            drop(std::hint::black_box(taken));
            after >= before + (16 << 20)
        });
        assert!(is_seen, "64 MiB were taken and never 16 MiB of them seen");
        assert_eq!(own_size("Name:\tarqon\nState:\tZ (zombie)\n"), None);
    }
}
