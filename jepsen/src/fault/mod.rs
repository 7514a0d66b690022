//! Faults: what there is, what each needs, and the nemesis that makes them.
//!
//! ```text
//!   nemesis   which fault when, from a seed; heals everything at the end
//!     ├─ process      kill, pause, rolling restart, clocks
//!     ├─ upgrade      rolling upgrade, and back
//!     ├─ traffic      partitions, loss, slow links
//!     ├─ storage      power cuts, full, failing and slow disks
//!     ├─ point        crash points inside a roll, retention, a snapshot, a truncation, a recovery
//!     ├─ damage       flipped bits, truncated, deleted and zeroed files
//!     ├─ membership   moves, new nodes and nodes that leave
//!     └─ script       fixed sequences of these, by name
//! ```
//!
//! Each fault writes two lines into the history: that it begins, and, when it is known, whether it is
//! proven that it struck. A third one says when it is over.

mod active;
mod damage;
mod membership;
mod nemesis;
mod point;
mod process;
mod script;
mod storage;
mod traffic;
mod upgrade;

use std::fmt;

use crate::{
    disk::DiskKind,
    host::{Machine, Need},
};

pub use nemesis::{Nemesis, Plan};
pub use point::parse_point;
pub use script::{SCRIPTS, Script};
pub use upgrade::Programs;

macro_rules! faults {
    ($($variant:ident, $name:literal, $row:literal, [$($need:ident),*], $about:literal;)*) => {
        /// A kind of fault.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Fault {
            $(#[doc = $about] $variant,)*
        }

        impl Fault {
            /// All of them.
            pub const ALL: &[Fault] = &[$(Fault::$variant,)*];

            /// As histories and the command line have it.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self { $(Fault::$variant => $name,)* }
            }

            /// Row of the scorecard; 0 for faults that have no row of their own and are part of row 20.
            #[must_use]
            pub fn row(self) -> u32 {
                match self { $(Fault::$variant => $row,)* }
            }

            /// What one does.
            #[must_use]
            pub fn about(self) -> &'static str {
                match self { $(Fault::$variant => $about,)* }
            }

            /// What it needs of the machine.
            #[must_use]
            pub fn needs(self) -> &'static [Need] {
                match self { $(Fault::$variant => &[$(Need::$need),*],)* }
            }
        }
    };
}

faults! {
    Kill, "kill", 0, [], "a node gets SIGKILL and comes back";
    PowerCutAll, "power-cut-all", 1, [Power], "all nodes lose their power at once, and what was not synced";
    PowerCutOne, "power-cut-one", 1, [Power], "one node loses its power, and what was not synced";
    MajoritySwap, "majority-swap", 2, [Network, Filter, Power], "a node is cut off or paused, another loses its power, then the first comes back and the third goes";
    BitFlip, "bit-flip", 3, [], "one bit of a file of a minority is flipped, while the node runs or while it is down";
    FileDamage, "file-damage", 4, [], "a file of a minority is truncated, deleted, zeroed, or gets an old chunk back";
    BadRecordAll, "bad-record-all", 5, [], "the same record is bad on every replica";
    DiskFull, "disk-full", 6, [Power], "no byte fits on a disk any more";
    EioWrite, "eio-write", 6, [FuseDisk], "writes fail with EIO";
    EioFsync, "eio-fsync", 6, [FuseDisk], "fsyncs fail with EIO, and what they were to save is lost";
    SlowDisk, "slow-disk", 7, [FuseDisk], "a disk takes 50 ms to 5 s for each request";
    PartitionHalves, "partition-halves", 8, [Network, Filter], "a minority and a majority do not hear each other";
    PartitionOneWay, "partition-one-way", 8, [Network, Filter], "one node does not hear the others, or is not heard";
    PartitionBridge, "partition-bridge", 8, [Network, Filter], "two halves hear each other only through one node";
    PartitionRing, "partition-ring", 8, [Network, Filter], "each node hears only its neighbour on one side";
    Loss, "loss", 9, [Network, Filter], "1 to 20 % of the packets between nodes are lost";
    Delay, "delay", 9, [Network, Shaper], "what a node sends queues at a slow link";
    PauseLeader, "pause-leader", 10, [], "a leader is stopped for 1 to 60 s";
    Pause, "pause", 10, [], "any node is stopped for a while";
    FailPoint, "fail-point", 11, [FailPoints], "a node dies at a point of its code, inside a roll, retention, a snapshot, a truncation, a checkpoint or a recovery, and may lose its power there";
    Membership, "membership", 12, [], "replicas move, nodes come and go, while a node is killed or cut off";
    Roll, "roll", 13, [], "all nodes are restarted, one after the other";
    Upgrade, "upgrade", 13, [Previous], "all nodes are restarted with the other program, one after the other; some of the times back again half-way";
    ClockJump, "clock-jump", 14, [Clock], "a clock jumps by an hour, forward and then back";
    ClockStrobe, "clock-strobe", 14, [Clock], "a clock goes to and fro by an hour";
}

impl fmt::Display for Fault {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())
    }
}

/// What a run is to do to its cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// In the order of the table.
    pub faults: Vec<Fault>,
    /// Faults at a time, at most.
    pub width: usize,
}

impl Choice {
    /// Reads a list of names: of faults, `none`, `mix` for all that go together and several at a time,
    /// `ci` for the bounded mix of every check, or the number of a row.
    ///
    /// # Errors
    /// The name that is none.
    pub fn parse(list: &str) -> Result<Self, String> {
        let mut choice = Self { faults: Vec::new(), width: 1 };
        for name in list.split(',').map(str::trim).filter(|name| !name.is_empty() && *name != "none") {
            let of_row = |fault: &&Fault| name.parse() == Ok(fault.row()) && fault.row() != 0;
            let found: Vec<Fault> = match name {
                "mix" => Fault::ALL.iter().copied().filter(|fault| fault.mixes()).collect(),
                "ci" => CI.to_vec(),
                _ => Fault::ALL.iter().filter(|fault| fault.name() == name || of_row(fault)).copied().collect(),
            };
            if found.is_empty() {
                return Err(format!("{name:?} is no fault; `arqon-jepsen list` names them"));
            }
            if name == "mix" {
                choice.width = MIX_WIDTH;
            }
            choice.faults.extend(found);
        }
        choice.faults.sort_unstable();
        choice.faults.dedup();
        Ok(choice)
    }

    /// The disk that can do all this: a program where it must be, else by the seed.
    ///
    /// # Errors
    /// Faults that do not go together on any disk of this machine.
    pub fn disk(&self, machine: &Machine, seed: u64) -> Result<DiskKind, String> {
        let wants = |need| self.faults.iter().any(|fault| fault.needs().contains(&need));
        let (loop_disk, fuse_disk) = (machine.has(Need::LoopDisk), machine.has(Need::FuseDisk));
        if wants(Need::FuseDisk) {
            return fuse_disk.map(|()| DiskKind::Fuse);
        }
        match (loop_disk, fuse_disk) {
            (Ok(()), Ok(())) => Ok(if seed.is_multiple_of(2) { DiskKind::Ext4 } else { DiskKind::Fuse }),
            (Ok(()), Err(_)) => Ok(DiskKind::Ext4),
            (Err(_), Ok(())) => Ok(DiskKind::Fuse),
            (Err(why), Err(_)) if wants(Need::Power) => Err(why),
            (Err(_), Err(_)) => Ok(DiskKind::Plain),
        }
    }
}

/// Faults at a time in a mix.
const MIX_WIDTH: usize = 3;

/// What every check covers.
const CI: [Fault; 10] = [
    Fault::Kill,
    Fault::PowerCutAll,
    Fault::PowerCutOne,
    Fault::BitFlip,
    Fault::PartitionHalves,
    Fault::PartitionOneWay,
    Fault::PartitionRing,
    Fault::PauseLeader,
    Fault::Membership,
    Fault::Roll,
];

impl Fault {
    /// Whether it goes together with others: not what ends in a state that must not go on, and not what the
    /// whole run must be made for, which joins a mix where it is named beside it.
    fn mixes(self) -> bool {
        !matches!(self, Self::BadRecordAll | Self::Upgrade | Self::FailPoint | Self::ClockJump | Self::ClockStrobe)
    }

    /// Whether only one of its kind can be at a time, as it is about all nodes.
    fn is_network(self) -> bool {
        matches!(
            self,
            Self::PartitionHalves
                | Self::PartitionOneWay
                | Self::PartitionBridge
                | Self::PartitionRing
                | Self::Loss
                | Self::Delay
        )
    }

    /// Whether it wants all nodes for itself.
    fn is_alone(self) -> bool {
        matches!(
            self,
            Self::PowerCutAll
                | Self::MajoritySwap
                | Self::Membership
                | Self::Roll
                | Self::BadRecordAll
                | Self::FailPoint
        )
    }

    /// Whether the machine can do it.
    ///
    /// # Errors
    /// What is missing.
    pub fn possible(self, machine: &Machine) -> Result<(), String> {
        self.needs().iter().try_for_each(|need| machine.has(*need))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_name_faults_rows_and_groups() {
        let names = |list: &str| Choice::parse(list).map(|choice| choice.faults);
        assert_eq!(names("none"), Ok(vec![]));
        assert_eq!(names("pause,kill,pause"), Ok(vec![Fault::Kill, Fault::Pause]));
        assert_eq!(names("8").map(|faults| faults.len()), Ok(4));
        assert!(names("mix").unwrap().len() > 15 && Choice::parse("mix").unwrap().width == MIX_WIDTH);
        assert!(names("kill,flood").unwrap_err().contains("flood"));
        assert!(names("0").is_err(), "what has no row is in no row");
    }

    #[test]
    fn every_row_up_to_14_has_a_fault_and_names_are_unique() {
        for row in 1..=14 {
            assert!(Fault::ALL.iter().any(|fault| fault.row() == row), "row {row}");
        }
        for fault in Fault::ALL {
            assert_eq!(Fault::ALL.iter().filter(|other| other.name() == fault.name()).count(), 1);
        }
    }
}
