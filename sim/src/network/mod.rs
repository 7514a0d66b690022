//! The simulated network: TCP on IPv4 as the system calls show it.
//!
//! ```text
//!   send ──► way: packets in order, each with its delay ──► inbox ──► receive
//!            at its time a packet arrives, or is tried again when the link between
//!            the two hosts is cut or drops it, as TCP does
//! ```
//!
//! Connections keep their order and nothing is lost in them; packets of different connections
//! overtake each other. What a partition holds back arrives after it. Pure, but for the time and the
//! hosts' state, which the world tells it.

mod link;
mod stream;

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, BinaryHeap},
    net::{Ipv4Addr, SocketAddrV4},
    os::fd::RawFd,
};

use libc::c_int;

pub use self::link::{Link, Links};
use self::stream::{Connection, End, Packet, SIDES, Side};
use crate::{
    random::Random,
    system::{HostId, now_ns},
    trace,
};

/// A descriptor of the simulated network.
pub type Fd = RawFd;
/// Real descriptors stay below this.
pub const FD_MIN: Fd = 1 << 24;
/// Connections that wait to be accepted.
const BACKLOG_MAX: usize = 1_024;
const PORT_MIN: u16 = 20_000;
/// A packet that does not get through is tried again after this time, which doubles up to the longest.
const RETRY_NS_MIN: u64 = 200_000_000;
const RETRY_NS_MAX: u64 = 1_600_000_000;

/// What is left of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostState {
    /// It runs.
    Up,
    /// Its process is gone: it refuses connections.
    Dead,
    /// It is off: it does not answer.
    Off,
}

type ConnectionId = u64;

enum Socket {
    New { address: Option<SocketAddrV4> },
    Listener { address: SocketAddrV4, backlog: Vec<ConnectionId> },
    Stream { connection: ConnectionId, side: Side },
}

struct SocketEntry {
    host: HostId,
    socket: Socket,
    watch: Option<Watch>,
}

#[derive(Clone, Copy)]
struct Watch {
    interest: u32,
    token: u64,
}

/// See the module.
pub struct Network {
    sockets: BTreeMap<Fd, SocketEntry>,
    listeners: BTreeMap<SocketAddrV4, Fd>,
    connections: BTreeMap<ConnectionId, Connection>,
    /// Ways on which a packet arrives, by time.
    arrivals: BinaryHeap<Reverse<(u64, u64, ConnectionId, Side)>>,
    /// What the sockets of each host have to tell its one runtime.
    ready: BTreeMap<HostId, BTreeMap<Fd, u32>>,
    hosts: BTreeMap<HostId, HostState>,
    /// Hosts that have something to do.
    woken: BTreeSet<HostId>,
    /// Between hosts.
    pub links: Links,
    random: Random,
    next_fd: Fd,
    next_connection: ConnectionId,
    next_arrival: u64,
    next_port: u16,
    /// Packets that arrived.
    pub delivered_count: u64,
    /// Times that a packet did not get through.
    pub dropped_count: u64,
}

fn host_of(address: SocketAddrV4) -> HostId {
    HostId(address.ip().octets()[3])
}

impl Network {
    /// Without hosts.
    #[must_use]
    pub fn new(random: Random) -> Self {
        Self {
            sockets: BTreeMap::new(),
            listeners: BTreeMap::new(),
            connections: BTreeMap::new(),
            arrivals: BinaryHeap::new(),
            ready: BTreeMap::new(),
            hosts: BTreeMap::new(),
            woken: BTreeSet::new(),
            links: Links::default(),
            random,
            next_fd: FD_MIN,
            next_connection: 1,
            next_arrival: 1,
            next_port: PORT_MIN,
            delivered_count: 0,
            dropped_count: 0,
        }
    }

    /// When the next packet arrives, in ns.
    #[must_use]
    pub fn next_ns(&self) -> Option<u64> {
        self.arrivals.peek().map(|Reverse((at_ns, ..))| *at_ns)
    }

    /// The hosts that have something to do since they were last asked for.
    pub fn take_woken(&mut self) -> BTreeSet<HostId> {
        std::mem::take(&mut self.woken)
    }

    /// Says whether a host runs. One that stops loses all its sockets: when its process dies, the
    /// other ends are told; when its power goes, they are not.
    pub fn set_host(&mut self, host: HostId, state: HostState) {
        self.hosts.insert(host, state);
        if state == HostState::Up {
            return;
        }
        let fds: Vec<Fd> = self.sockets.iter().filter(|(_, entry)| entry.host == host).map(|(fd, _)| *fd).collect();
        for fd in fds {
            let Some(entry) = self.sockets.remove(&fd) else { continue };
            match entry.socket {
                Socket::Listener { address, backlog } => {
                    self.listeners.remove(&address);
                    for connection in backlog {
                        self.abandon(connection, Side::Acceptor, state);
                    }
                }
                Socket::Stream { connection, side } => self.abandon(connection, side, state),
                Socket::New { .. } => {}
            }
        }
    }

    fn abandon(&mut self, id: ConnectionId, side: Side, state: HostState) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        connection.end_mut(side).abandon();
        if state == HostState::Off {
            connection.way_mut(side).clear();
        } else {
            self.push(id, side, Packet::Reset);
        }
    }

    /// Breaks up to `count` connections between two hosts, both ends being told.
    pub fn break_connections(&mut self, pair: (HostId, HostId), count: usize) -> usize {
        let is_between = |connection: &Connection| {
            let hosts = SIDES.map(|side| connection.end(side).host);
            hosts == [pair.0, pair.1] || hosts == [pair.1, pair.0]
        };
        let found = self.connections.iter().filter(|(_, connection)| is_between(connection));
        let ids: Vec<ConnectionId> = found.map(|(id, _)| *id).take(count).collect();
        for id in &ids {
            for side in SIDES {
                self.reset(*id, side);
            }
        }
        ids.len()
    }

    /// Lets everything arrive whose time has come.
    pub fn deliver_due(&mut self) {
        while let Some(Reverse((at_ns, ..))) = self.arrivals.peek()
            && *at_ns <= now_ns()
        {
            let Some(Reverse((_, _, id, from))) = self.arrivals.pop() else { return };
            self.arrive(id, from);
        }
    }

    /// The packet in front of a way arrives, or is tried again later.
    fn arrive(&mut self, id: ConnectionId, from: Side) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        let (source, target) = (connection.end(from).host, connection.end(from.other()).host);
        let way = connection.way_mut(from);
        way.is_scheduled = false;
        if way.packets.is_empty() {
            return;
        }
        let link = self.links.between(source, target);
        let is_lost = link.is_cut || link.loss_percent > 0 && self.random.percent(link.loss_percent);
        if is_lost || self.hosts.get(&target).copied().unwrap_or(HostState::Off) == HostState::Off {
            self.dropped_count += 1;
            let retry_ns = way.retry_ns.clamp(RETRY_NS_MIN, RETRY_NS_MAX);
            way.retry_ns = retry_ns * 2;
            way.not_before_ns = now_ns() + retry_ns;
            trace::note("lost", &[id, from as u64, retry_ns]);
        } else {
            way.retry_ns = 0;
            let Some((_, packet)) = way.packets.pop_front() else { return };
            way.size -= packet.size();
            self.delivered_count += 1;
            trace::note_bytes("arrives", &[id, from as u64, packet.kind()], packet.bytes());
            self.take(id, from, packet);
        }
        self.schedule(id, from);
    }

    /// Sees to it that the packet in front of a way arrives some time.
    fn schedule(&mut self, id: ConnectionId, from: Side) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        if SIDES.iter().all(|side| connection.end(*side).is_over() && connection.way(*side).packets.is_empty()) {
            self.connections.remove(&id);
            return;
        }
        let way = connection.way_mut(from);
        if let (false, Some((at_ns, _))) = (way.is_scheduled, way.packets.front()) {
            way.is_scheduled = true;
            let at_ns = (*at_ns).max(way.not_before_ns).max(now_ns());
            self.arrivals.push(Reverse((at_ns, self.next_arrival, id, from)));
            self.next_arrival += 1;
        }
    }

    fn push(&mut self, id: ConnectionId, from: Side, packet: Packet) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        let (source, target) = (connection.end(from).host, connection.end(from.other()).host);
        let link = self.links.between(source, target);
        let delay_ns = self.random.of(link.delay_ns.0..link.delay_ns.1.max(link.delay_ns.0 + 1));
        let way = connection.way_mut(from);
        let at_ns = (now_ns() + delay_ns).max(way.packets.back().map_or(0, |(at_ns, _)| *at_ns));
        way.size += packet.size();
        way.packets.push_back((at_ns, packet));
        self.schedule(id, from);
    }

    /// A packet is there.
    fn take(&mut self, id: ConnectionId, from: Side, packet: Packet) {
        let to = from.other();
        match packet {
            Packet::Open => self.take_open(id),
            Packet::Accepted => {
                let Some(connection) = self.connections.get_mut(&id) else { return };
                connection.end_mut(to).is_open = true;
                self.tell(id, to, libc::EPOLLOUT);
            }
            Packet::Data(bytes) => {
                let Some(connection) = self.connections.get_mut(&id) else { return };
                let end = connection.end_mut(to);
                if !end.is_there {
                    return self.push(id, to, Packet::Reset);
                }
                if end.error.is_none() {
                    end.take(bytes);
                    self.tell(id, to, libc::EPOLLIN);
                }
            }
            Packet::End => {
                let Some(connection) = self.connections.get_mut(&id) else { return };
                connection.end_mut(to).peer_ended = true;
                self.tell(id, to, libc::EPOLLIN | libc::EPOLLRDHUP);
            }
            Packet::Reset => self.reset(id, to),
        }
    }

    fn take_open(&mut self, id: ConnectionId) {
        let Some(connection) = self.connections.get(&id) else { return };
        let listener = self.listeners.get(&connection.end(Side::Acceptor).address).copied();
        let entry = listener.and_then(|fd| Some((fd, self.sockets.get_mut(&fd)?)));
        if let Some((fd, SocketEntry { socket: Socket::Listener { backlog, .. }, .. })) = entry
            && backlog.len() < BACKLOG_MAX
        {
            backlog.push(id);
            if let Some(connection) = self.connections.get_mut(&id) {
                let end = connection.end_mut(Side::Acceptor);
                (end.is_there, end.is_open) = (true, true);
            }
            self.notify(fd, libc::EPOLLIN);
            self.push(id, Side::Acceptor, Packet::Accepted);
        } else {
            self.push(id, Side::Acceptor, Packet::Reset);
        }
    }

    /// An end learns that its connection is gone.
    fn reset(&mut self, id: ConnectionId, side: Side) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        connection.way_mut(side).clear();
        let end = connection.end_mut(side);
        let error = if end.is_open { libc::ECONNRESET } else { libc::ECONNREFUSED };
        end.error.get_or_insert(error);
        self.tell(id, side, libc::EPOLLIN | libc::EPOLLOUT | libc::EPOLLERR | libc::EPOLLHUP | libc::EPOLLRDHUP);
        self.schedule(id, side);
    }

    fn tell(&mut self, id: ConnectionId, side: Side, flags: c_int) {
        if let Some(fd) = self.connections.get(&id).and_then(|connection| connection.end(side).fd) {
            self.notify(fd, flags);
        }
    }

    fn notify(&mut self, fd: Fd, flags: c_int) {
        let Some(entry) = self.sockets.get(&fd) else { return };
        let Some(watch) = entry.watch else { return };
        let flags = flags as u32 & (watch.interest | libc::EPOLLERR as u32 | libc::EPOLLHUP as u32);
        if flags != 0 {
            *self.ready.entry(entry.host).or_default().entry(fd).or_default() |= flags;
            self.woken.insert(entry.host);
        }
    }

    fn stream(&mut self, fd: Fd) -> Result<(ConnectionId, Side, &mut Connection), c_int> {
        match self.sockets.get(&fd).ok_or(libc::EBADF)?.socket {
            Socket::Stream { connection, side } => {
                let found = self.connections.get_mut(&connection).ok_or(libc::ECONNRESET)?;
                Ok((connection, side, found))
            }
            _ => Err(libc::ENOTCONN),
        }
    }

    fn entry(&mut self, fd: Fd) -> Result<&mut SocketEntry, c_int> {
        self.sockets.get_mut(&fd).ok_or(libc::EBADF)
    }

    fn add_socket(&mut self, host: HostId, socket: Socket) -> Fd {
        let fd = self.next_fd;
        self.next_fd += 1;
        self.sockets.insert(fd, SocketEntry { host, socket, watch: None });
        fd
    }

    fn free_address(&mut self, host: HostId) -> SocketAddrV4 {
        self.next_port = self.next_port.checked_add(1).unwrap_or(PORT_MIN);
        SocketAddrV4::new(Ipv4Addr::new(127, 0, 0, host.0), self.next_port)
    }
}

/// The system calls; an error is a number of the C library.
impl Network {
    pub(crate) fn socket(&mut self, host: HostId) -> Result<usize, c_int> {
        Ok(self.add_socket(host, Socket::New { address: None }) as usize)
    }

    pub(crate) fn bind(&mut self, fd: Fd, address: SocketAddrV4) -> Result<usize, c_int> {
        let entry = self.entry(fd)?;
        if host_of(address) != entry.host {
            return Err(libc::EADDRNOTAVAIL);
        }
        entry.socket = Socket::New { address: Some(address) };
        Ok(0)
    }

    pub(crate) fn listen(&mut self, fd: Fd) -> Result<usize, c_int> {
        let entry = self.entry(fd)?;
        let Socket::New { address: Some(address) } = entry.socket else { return Err(libc::EINVAL) };
        entry.socket = Socket::Listener { address, backlog: Vec::new() };
        match self.listeners.insert(address, fd) {
            None => Ok(0),
            Some(other) => {
                self.listeners.insert(address, other);
                Err(libc::EADDRINUSE)
            }
        }
    }

    pub(crate) fn connect(&mut self, fd: Fd, to: SocketAddrV4) -> Result<usize, c_int> {
        let host = self.entry(fd)?.host;
        let own = self.free_address(host);
        let id = self.next_connection;
        self.next_connection += 1;
        let mut dialler = End::new(host, own);
        (dialler.fd, dialler.is_there) = (Some(fd), true);
        self.connections.insert(id, Connection::new(dialler, End::new(host_of(to), to)));
        self.entry(fd)?.socket = Socket::Stream { connection: id, side: Side::Dialler };
        trace::note("connects", &[id, u64::from(host.0), u64::from(host_of(to).0), u64::from(to.port())]);
        self.push(id, Side::Dialler, Packet::Open);
        Err(libc::EINPROGRESS)
    }

    pub(crate) fn accept(&mut self, fd: Fd) -> Result<(Fd, SocketAddrV4), c_int> {
        let entry = self.entry(fd)?;
        let host = entry.host;
        let Socket::Listener { backlog, .. } = &mut entry.socket else { return Err(libc::EINVAL) };
        if backlog.is_empty() {
            return Err(libc::EAGAIN);
        }
        let id = backlog.remove(0);
        let accepted = self.add_socket(host, Socket::Stream { connection: id, side: Side::Acceptor });
        let connection = self.connections.get_mut(&id).ok_or(libc::ECONNABORTED)?;
        connection.end_mut(Side::Acceptor).fd = Some(accepted);
        Ok((accepted, connection.end(Side::Dialler).address))
    }

    pub(crate) fn own_address(&mut self, fd: Fd) -> Result<SocketAddrV4, c_int> {
        let host = self.entry(fd)?.host;
        match &self.entry(fd)?.socket {
            Socket::New { address } => Ok(address.unwrap_or(SocketAddrV4::new(Ipv4Addr::new(127, 0, 0, host.0), 0))),
            Socket::Listener { address, .. } => Ok(*address),
            Socket::Stream { .. } => self.stream(fd).map(|(_, side, connection)| connection.end(side).address),
        }
    }

    pub(crate) fn peer_address(&mut self, fd: Fd) -> Result<SocketAddrV4, c_int> {
        let (_, side, connection) = self.stream(fd)?;
        if !connection.end(side).is_open {
            return Err(libc::ENOTCONN);
        }
        Ok(connection.end(side.other()).address)
    }

    pub(crate) fn take_error(&mut self, fd: Fd) -> c_int {
        let Ok((_, side, connection)) = self.stream(fd) else { return 0 };
        let end = connection.end(side);
        // Stays for reads and writes to find.
        end.error.unwrap_or(0)
    }

    pub(crate) fn send(&mut self, fd: Fd, mut bytes: Vec<u8>) -> Result<usize, c_int> {
        let (id, side, connection) = self.stream(fd)?;
        let in_use = connection.way(side).size + connection.end(side.other()).inbox_size;
        let end = connection.end_mut(side);
        if end.error.is_some() || end.has_ended {
            return Err(libc::EPIPE);
        }
        let room = stream::WINDOW_SIZE.saturating_sub(in_use);
        if !end.is_open || room == 0 {
            end.wants_room = true;
            return Err(libc::EAGAIN);
        }
        if bytes.len() > room {
            // A part is taken, and the sender learns when there is room again.
            end.wants_room = true;
            bytes.truncate(room);
        }
        let size = bytes.len();
        if size > 0 {
            self.push(id, side, Packet::Data(bytes));
        }
        Ok(size)
    }

    pub(crate) fn receive(&mut self, fd: Fd, room: &mut [u8], peeks: bool) -> Result<usize, c_int> {
        let (id, side, connection) = self.stream(fd)?;
        let end = connection.end_mut(side);
        let size = end.give(room, peeks);
        if size > 0 {
            if std::mem::take(&mut connection.end_mut(side.other()).wants_room) {
                self.tell(id, side.other(), libc::EPOLLOUT);
            }
            return Ok(size);
        }
        match (end.error, end.peer_ended) {
            (Some(error), _) => Err(error),
            (None, true) => Ok(0),
            (None, false) => Err(libc::EAGAIN),
        }
    }

    pub(crate) fn end_writes(&mut self, fd: Fd) -> Result<usize, c_int> {
        let (id, side, connection) = self.stream(fd)?;
        if !std::mem::replace(&mut connection.end_mut(side).has_ended, true) {
            self.push(id, side, Packet::End);
        }
        Ok(0)
    }

    pub(crate) fn close(&mut self, fd: Fd) -> Result<usize, c_int> {
        let Some(entry) = self.sockets.remove(&fd) else {
            // The host stopped before its program closed it.
            return Ok(0);
        };
        self.forget_ready(entry.host, fd);
        match entry.socket {
            Socket::New { .. } => {}
            Socket::Listener { address, backlog } => {
                self.listeners.remove(&address);
                for id in backlog {
                    self.abandon(id, Side::Acceptor, HostState::Dead);
                }
            }
            Socket::Stream { connection: id, side } => {
                let Some(connection) = self.connections.get_mut(&id) else { return Ok(0) };
                let end = connection.end_mut(side);
                let is_clean = end.inbox_size == 0 && end.error.is_none();
                let has_ended = end.has_ended;
                end.abandon();
                match (is_clean, has_ended) {
                    (true, true) => self.schedule(id, side),
                    (true, false) => self.push(id, side, Packet::End),
                    (false, _) => self.push(id, side, Packet::Reset),
                }
            }
        }
        Ok(0)
    }

    pub(crate) fn watch(&mut self, fd: Fd, interest: u32, token: u64) -> Result<usize, c_int> {
        self.entry(fd)?.watch = Some(Watch { interest, token });
        let flags = match &self.entry(fd)?.socket {
            Socket::New { .. } => libc::EPOLLHUP,
            Socket::Listener { backlog, .. } => {
                if backlog.is_empty() {
                    0
                } else {
                    libc::EPOLLIN
                }
            }
            Socket::Stream { .. } => {
                let (_, side, connection) = self.stream(fd)?;
                let end = connection.end(side);
                let readable = end.inbox_size > 0 || end.peer_ended || end.error.is_some();
                let writable = end.is_open || end.error.is_some();
                (if readable { libc::EPOLLIN } else { 0 }) | (if writable { libc::EPOLLOUT } else { 0 })
            }
        };
        self.notify(fd, flags);
        Ok(0)
    }

    pub(crate) fn unwatch(&mut self, fd: Fd) -> Result<usize, c_int> {
        let entry = self.entry(fd)?;
        entry.watch = None;
        let host = entry.host;
        self.forget_ready(host, fd);
        Ok(0)
    }

    fn forget_ready(&mut self, host: HostId, fd: Fd) {
        if let Some(ready) = self.ready.get_mut(&host) {
            ready.remove(&fd);
        }
    }

    /// Flags and tokens of a host's sockets, up to `count_max`, that have something to tell.
    pub(crate) fn take_ready(&mut self, host: HostId, count_max: usize) -> Vec<(u32, u64)> {
        let mut out = Vec::new();
        let Some(ready) = self.ready.get_mut(&host) else { return out };
        while out.len() < count_max
            && let Some((fd, flags)) = ready.pop_first()
        {
            if let Some(watch) = self.sockets.get(&fd).and_then(|entry| entry.watch) {
                out.push((flags, watch.token));
            }
        }
        out
    }
}
