//! Faults of disks and of their power.

use std::time::Duration;

use rand::{
    RngExt,
    seq::{IndexedRandom, SliceRandom},
};
use rustix::process::Signal;
use tokio::time::{Instant, sleep};

use super::{
    Fault,
    active::{Active, Undo},
    nemesis::Nemesis,
    script::Way,
};
use crate::{
    cluster::Error,
    disk::{Cut, DiskKind, Trouble},
    history::Line,
    host::PacketDrop,
};

/// How long there is no power, in milliseconds.
const DARK_MS: (u64, u64) = (50, 1_000);
/// How long a disk is in trouble, in milliseconds.
const TROUBLE_MS: (u64, u64) = (1_000, 10_000);
/// How long each part of a majority swap takes, in milliseconds.
const SWAP_MS: (u64, u64) = (1_000, 4_000);
/// Delays of a slow disk, in milliseconds.
const SLOW_MS: (u32, u32) = (50, 5_000);

impl Nemesis<'_> {
    /// Takes the power of `nodes` at once. Either the disk goes first, in the middle of what the node writes, or
    /// the node does.
    pub(super) async fn lose_power(&mut self, nodes: &[u64]) -> Result<(), Error> {
        let disk_first = self.random.random_bool(0.5);
        if disk_first {
            for node in nodes {
                self.cluster.disk(*node)?.off().await?;
            }
        }
        for node in nodes {
            if self.cluster.runs(*node) {
                self.cluster.signal(*node, Signal::KILL)?;
            }
        }
        for node in nodes {
            if self.cluster.runs(*node) {
                self.cluster.kill(*node).await?;
            }
            if !disk_first {
                self.cluster.disk(*node)?.off().await?;
            }
        }
        Ok(())
    }

    pub(super) async fn restore_power(&mut self, nodes: &[u64]) -> Result<Cut, Error> {
        let mut all = Cut { bytes: 0, detail: String::new() };
        for node in nodes {
            let seed = self.random.random();
            let cut = self.cluster.disk(*node)?.restore(seed).await?;
            all.bytes += cut.bytes;
            let comma = if all.detail.is_empty() { "" } else { "; " };
            all.detail.push_str(&format!("{comma}node {node}: {}", cut.detail));
        }
        Ok(all)
    }

    pub(super) async fn power_cut(&mut self, fault: Fault) -> Result<Option<Active>, Error> {
        let nodes = self.cluster.nodes();
        let (label, nodes) = match fault {
            Fault::PowerCutAll => (0, nodes),
            _ => match self.pick(&nodes) {
                Some(node) => (node, vec![node]),
                None => return Ok(None),
            },
        };
        self.begins(fault, label, &nodes).await;
        self.lose_power(&nodes).await?;
        let cut = self.restore_power(&nodes).await?;
        self.struck(fault, label, cut.bytes > 0, cut.detail);
        let until = Instant::now() + self.time(DARK_MS.0, DARK_MS.1);
        Ok(Some(Active { fault, label, nodes, until, undo: Undo::Start }))
    }

    /// Takes node `node` out of the majority: it is stopped, or nobody hears it and it hears nobody.
    async fn exclude(&mut self, node: u64, by_pause: bool) -> Result<(), Error> {
        if by_pause {
            return self.cluster.signal(node, Signal::STOP);
        }
        let others = self.cluster.nodes().into_iter().filter(|other| *other != node);
        let cut = |other| [(node, other), (other, node)].map(|(at, from)| PacketDrop { at, from, percent: 100 });
        let drops: Vec<PacketDrop> = others.flat_map(cut).collect();
        let network = self.cluster.network().ok_or_else(|| Error::new("the nodes have no network of their own"))?;
        network.drop_packets(&drops).await
    }

    /// Gives how many packets were dropped, or 1 for a node that was stopped.
    async fn include(&mut self, node: u64, by_pause: bool) -> Result<u64, Error> {
        if by_pause {
            let is_stopped = self.cluster.is_stopped(node)?;
            self.cluster.signal(node, Signal::CONT)?;
            return Ok(u64::from(is_stopped));
        }
        let network = self.cluster.network().ok_or_else(|| Error::new("the nodes have no network of their own"))?;
        network.drop_nothing().await
    }

    /// A is cut off while B and C acknowledge; B loses its power and, with it, whatever it had not
    /// synced; then C is cut off and A comes back. What B and C acknowledged must be known to A and B.
    /// With five nodes the others stay as they are.
    pub(super) async fn majority_swap(&mut self) -> Result<Option<Active>, Error> {
        let fault = Fault::MajoritySwap;
        let mut nodes = self.cluster.nodes();
        nodes.shuffle(&mut self.random);
        let &[away, dark, last, ..] = nodes.as_slice() else { return Ok(None) };
        let by_pause = match self.way {
            Way::Pause => true,
            Way::CutOff => false,
            _ => self.random.random_bool(0.5),
        };
        self.begins(fault, 0, &[away, dark, last]).await;
        self.exclude(away, by_pause).await?;
        let time = self.time(SWAP_MS.0, SWAP_MS.1);
        sleep(time).await;
        self.lose_power(&[dark]).await?;
        let mut excluded = self.include(away, by_pause).await?;
        self.exclude(last, by_pause).await?;
        let cut = self.restore_power(&[dark]).await?;
        self.history.record(Line { node: Some(dark), ..Line::nemesis("restart") });
        self.cluster.begin(dark)?;
        let time = self.time(SWAP_MS.0, SWAP_MS.1);
        sleep(time + Duration::from_secs(2)).await;
        excluded += self.include(last, by_pause).await?;
        let how = if by_pause { "pauses" } else { "packets dropped" };
        let detail = format!("{excluded} {how}; {}", cut.detail);
        self.struck(fault, 0, cut.bytes > 0 && excluded > 0, detail);
        Ok(Some(Self::over(fault, 0)))
    }

    pub(super) async fn disk_trouble(&mut self, fault: Fault) -> Result<Option<Active>, Error> {
        let Some(node) = self.pick(&self.cluster.nodes()) else { return Ok(None) };
        let percent = *[5, 30, 100].choose(&mut self.random).unwrap_or(&100);
        let seed = self.random.random();
        let none = Trouble { seed, ..Trouble::default() };
        let trouble = match fault {
            Fault::DiskFull => Trouble { full: true, ..none },
            Fault::EioWrite => Trouble { write_errors_percent: percent, ..none },
            Fault::EioFsync => Trouble { sync_errors_percent: percent, ..none },
            _ => {
                let longest = self.time(u64::from(SLOW_MS.0) * 2, u64::from(SLOW_MS.1)).as_millis() as u32;
                Trouble { delay_ms_min: SLOW_MS.0, delay_ms_max: longest, ..none }
            }
        };
        self.begins(fault, node, &[node]).await;
        self.cluster.disk(node)?.trouble(trouble).await?;
        let until = Instant::now() + self.time(TROUBLE_MS.0, TROUBLE_MS.1);
        Ok(Some(Active { fault, label: node, nodes: vec![node], until, undo: Undo::Disk }))
    }

    /// A node that met an error on its disk starts itself anew, in its own time: nobody does that for it here.
    pub(super) async fn make_sound(&mut self, active: &Active) -> Result<(), Error> {
        let node = active.label;
        let disk = self.cluster.disk(node)?;
        let is_program = disk.kind() == DiskKind::Fuse;
        let counted = disk.count().await?.unwrap_or_default();
        disk.trouble(Trouble::default()).await?;
        let (count, what) = match active.fault {
            // A node that sees in time that the disk is full does not run into it. ext4 says no more than that
            // all was taken, and a node's writes fit into what they have.
            Fault::DiskFull if is_program => {
                (counted.full_errors + counted.full_looks, "looks at a full disk and writes that did not fit")
            }
            Fault::DiskFull => (1, "time that all space of the disk was taken"),
            Fault::EioWrite => (counted.write_errors, "writes failed"),
            Fault::EioFsync => (counted.sync_errors, "fsyncs failed"),
            _ => (counted.delays, "requests were delayed"),
        };
        self.struck(active.fault, node, count > 0, format!("{count} {what}"));
        // A supervisor would see to one that could not start.
        if self.cluster.refused_to_start(node) {
            self.start_again(active).await?;
        }
        Ok(())
    }
}
