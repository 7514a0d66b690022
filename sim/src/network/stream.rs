//! One connection: its two ends, and the packets between them.

use std::{collections::VecDeque, net::SocketAddrV4};

use libc::c_int;

use super::Fd;
use crate::system::HostId;

/// Bytes of one direction that are under way or not yet read.
pub(super) const WINDOW_SIZE: usize = 256 << 10;

/// Who opened the connection, and who accepted it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Side {
    Dialler,
    Acceptor,
}

pub(super) const SIDES: [Side; 2] = [Side::Dialler, Side::Acceptor];

impl Side {
    pub fn other(self) -> Self {
        match self {
            Self::Dialler => Self::Acceptor,
            Self::Acceptor => Self::Dialler,
        }
    }
}

pub(super) enum Packet {
    Open,
    Accepted,
    Data(Vec<u8>),
    End,
    Reset,
}

impl Packet {
    pub fn bytes(&self) -> &[u8] {
        if let Self::Data(bytes) = self { bytes } else { &[] }
    }

    pub fn size(&self) -> usize {
        self.bytes().len()
    }

    /// For the trace.
    pub fn kind(&self) -> u64 {
        match self {
            Self::Open => 0,
            Self::Accepted => 1,
            Self::Data(_) => 2,
            Self::End => 3,
            Self::Reset => 4,
        }
    }
}

/// Packets from one end to the other, in order.
#[derive(Default)]
pub(super) struct Way {
    /// Each with the time at which it arrives, in ns.
    pub packets: VecDeque<(u64, Packet)>,
    /// Bytes of data in them.
    pub size: usize,
    /// The first of them has its place among the arrivals.
    pub is_scheduled: bool,
    /// For the next try, when one did not get through.
    pub retry_ns: u64,
    pub not_before_ns: u64,
}

impl Way {
    pub fn clear(&mut self) {
        self.packets.clear();
        self.size = 0;
    }
}

pub(super) struct End {
    pub host: HostId,
    pub address: SocketAddrV4,
    pub fd: Option<Fd>,
    /// A program has this end, or will accept it.
    pub is_there: bool,
    /// Connected.
    pub is_open: bool,
    pub error: Option<c_int>,
    /// The other end sends nothing more.
    pub peer_ended: bool,
    /// This end sends nothing more.
    pub has_ended: bool,
    /// A write found no room.
    pub wants_room: bool,
    inbox: VecDeque<Vec<u8>>,
    /// Bytes of the first part that were read.
    read: usize,
    pub inbox_size: usize,
}

impl End {
    pub fn new(host: HostId, address: SocketAddrV4) -> Self {
        Self {
            host,
            address,
            fd: None,
            is_there: false,
            is_open: false,
            error: None,
            peer_ended: false,
            has_ended: false,
            wants_room: false,
            inbox: VecDeque::new(),
            read: 0,
            inbox_size: 0,
        }
    }

    /// No program has this end any more.
    pub fn abandon(&mut self) {
        (self.fd, self.is_there, self.has_ended) = (None, false, true);
        self.inbox.clear();
        (self.read, self.inbox_size) = (0, 0);
    }

    /// Nothing more happens here.
    pub fn is_over(&self) -> bool {
        !self.is_there && self.has_ended
    }

    pub fn take(&mut self, bytes: Vec<u8>) {
        self.inbox_size += bytes.len();
        self.inbox.push_back(bytes);
    }

    /// Copies what has arrived.
    pub fn give(&mut self, room: &mut [u8], peeks: bool) -> usize {
        let (mut given, mut skip) = (0, self.read);
        for part in &self.inbox {
            let count = (part.len() - skip).min(room.len() - given);
            room[given..given + count].copy_from_slice(&part[skip..skip + count]);
            given += count;
            skip = 0;
        }
        if !peeks {
            self.inbox_size -= given;
            self.read += given;
            while self.inbox.front().is_some_and(|part| part.len() <= self.read) {
                self.read -= self.inbox.pop_front().map_or(0, |part| part.len());
            }
        }
        given
    }
}

pub(super) struct Connection {
    ends: [End; 2],
    ways: [Way; 2],
}

impl Connection {
    pub fn new(dialler: End, acceptor: End) -> Self {
        Self { ends: [dialler, acceptor], ways: [Way::default(), Way::default()] }
    }

    pub fn end(&self, side: Side) -> &End {
        &self.ends[side as usize]
    }

    pub fn end_mut(&mut self, side: Side) -> &mut End {
        &mut self.ends[side as usize]
    }

    /// From this side to the other.
    pub fn way(&self, side: Side) -> &Way {
        &self.ways[side as usize]
    }

    pub fn way_mut(&mut self, side: Side) -> &mut Way {
        &mut self.ways[side as usize]
    }
}
