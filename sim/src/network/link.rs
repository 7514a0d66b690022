//! What lies between two hosts.

use std::collections::BTreeMap;

use crate::system::HostId;

/// One direction between two hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Link {
    /// Nothing gets through.
    pub is_cut: bool,
    /// So many of a hundred packets are lost, and sent again.
    pub loss_percent: u64,
    /// A packet takes from the first to the second time, in ns.
    pub delay_ns: (u64, u64),
}

impl Link {
    /// A quiet local network.
    pub const SOUND: Self = Self { is_cut: false, loss_percent: 0, delay_ns: (60_000, 400_000) };
    const OWN: Self = Self { is_cut: false, loss_percent: 0, delay_ns: (10_000, 30_000) };
}

/// All links; those that nothing was said about are sound.
#[derive(Default)]
pub struct Links {
    changed: BTreeMap<(HostId, HostId), Link>,
}

impl Links {
    /// The link from one host to another.
    #[must_use]
    pub fn between(&self, from: HostId, to: HostId) -> Link {
        if from == to { Link::OWN } else { self.changed.get(&(from, to)).copied().unwrap_or(Link::SOUND) }
    }

    /// Changes one direction.
    pub fn change(&mut self, from: HostId, to: HostId, change: impl FnOnce(&mut Link)) {
        let mut link = self.between(from, to);
        change(&mut link);
        self.changed.insert((from, to), link);
    }

    /// Makes all of them sound.
    pub fn heal(&mut self) {
        self.changed.clear();
    }
}
