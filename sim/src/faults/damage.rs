//! Bytes and files that are not what was written.

use arqon_storage::Disk as _;

use super::{Faults, Kind, SECOND_NS, Step};
use crate::{cluster::Cluster, trace, world::World};

impl Faults {
    /// One of the minority, if it is in the cluster.
    fn machine_that_rots(&mut self, cluster: &Cluster) -> Option<usize> {
        let candidates: Vec<usize> = self.rotting.intersection(&cluster.members).copied().collect();
        (!candidates.is_empty()).then(|| *self.random.pick(&candidates))
    }

    /// Changes some bytes of a file of a node that may rot. Its process ends before, or does not.
    pub(super) fn rot(&mut self, world: &mut World, cluster: &mut Cluster) {
        let Some(index) = self.machine_that_rots(cluster) else { return };
        let machine = &mut cluster.machines[index];
        if self.random.percent(50) && world.is_up(machine.host()) {
            machine.kill(world);
            self.falling[index] = None;
            self.later(SECOND_NS / 10..3 * SECOND_NS, Step::Boot(index));
        }
        let files: Vec<String> = files(machine.memory()).into_iter().filter(|path| path.contains("logs/")).collect();
        if files.is_empty() {
            return;
        }
        let path = self.random.pick(&files);
        let Ok(mut bytes) = machine.memory().bytes(path) else { return };
        if bytes.is_empty() {
            return;
        }
        let at = self.random.of(0..bytes.len() as u64) as usize;
        bytes[at] ^= 1 << self.random.of(0..8);
        trace::say(&format!("node {}: bit flipped in {path} at {at} of {}", index + 1, bytes.len()));
        if machine.memory().rot(path, at as u64, bytes[at]).is_ok() {
            self.rotten.insert(index);
            self.injected.push(Kind::Rot);
        }
    }

    /// Cuts, zeroes or removes a file of a node that may rot, while its process is down.
    pub(super) fn spoil(&mut self, world: &mut World, cluster: &mut Cluster) {
        let Some(index) = self.machine_that_rots(cluster) else { return };
        let machine = &mut cluster.machines[index];
        if world.is_up(machine.host()) {
            machine.kill(world);
            self.falling[index] = None;
            self.later(SECOND_NS / 10..3 * SECOND_NS, Step::Boot(index));
        }
        let disk = machine.memory();
        let files: Vec<String> = files(disk).into_iter().filter(|path| path.contains("logs/")).collect();
        let Some(path) = (!files.is_empty()).then(|| self.random.pick(&files)) else { return };
        let Ok(mut bytes) = disk.bytes(path) else { return };
        let from = self.random.of(0..bytes.len() as u64 + 1) as usize;
        let (what, done) = match self.random.of(0..3) {
            0 => {
                bytes.truncate(from);
                ("cut", disk.set_bytes(path, &bytes))
            }
            1 => {
                bytes[from..].fill(0);
                ("zeroed", disk.set_bytes(path, &bytes))
            }
            _ => {
                let dir = path.rsplit_once('/').map_or(".", |(dir, _)| dir);
                ("removed", disk.remove(path).and_then(|()| disk.sync_dir(dir)))
            }
        };
        trace::say(&format!("node {}: {path} is {what} from {from} on", index + 1));
        if done.is_ok() {
            self.rotten.insert(index);
            self.injected.push(Kind::Files);
        }
    }
}

/// All files of a disk.
fn files(disk: &arqon_storage::MemoryDisk) -> Vec<String> {
    let mut out = Vec::new();
    let mut dirs = vec![String::from(".")];
    while let Some(dir) = dirs.pop() {
        for name in disk.list(&dir).unwrap_or_default() {
            let path = if dir == "." { name } else { format!("{dir}/{name}") };
            if disk.list(&path).is_ok() { dirs.push(path) } else { out.push(path) }
        }
    }
    out
}

pub(super) fn used_size(index: usize, cluster: &Cluster) -> u64 {
    let disk = cluster.machines[index].memory();
    files(disk).iter().map(|path| disk.bytes(path).map_or(0, |bytes| bytes.len() as u64)).sum()
}
