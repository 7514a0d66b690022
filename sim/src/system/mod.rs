//! What the simulation puts in the place of the machine: clock, randomness and sockets.
//!
//! ```text
//!   storage, raft, spine, sdk, tokio, std, ring, ...      as they are, not one line for the simulation
//!        │ clock_gettime, getrandom, socket, send, epoll_wait ...
//!   calls.rs      the C library's functions, defined here: the linker takes these
//!        │ on the thread of a simulation            │ on any other thread
//!   this module, network/                           the kernel
//! ```
//!
//! A simulation runs on one thread. On it time stands still until the world moves it, randomness
//! comes from the seed, sockets lead to the simulated network, and what would escape all that, such
//! as a new thread or a sleep, ends the process with a message that says what it was.

pub mod calls;

use std::{
    cell::{Cell, RefCell},
    task::Waker,
};

use crate::{network::Network, random::Random};

/// The simulated wall clock shows this when a simulation begins, in ms since 1970.
pub const WALL_START_MS: u64 = 1_800_000_000_000;
/// The monotonic clock shows this when a simulation begins, in ns: programs compute with times of
/// some minutes ago.
const MONOTONIC_START_NS: u64 = 100_000_000_000_000;

/// Number of a simulated machine; its address is 127.0.0.(number).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct HostId(pub u8);

thread_local! {
    static ACTIVE: Cell<bool> = const { Cell::new(false) };
    static NOW_NS: Cell<u64> = const { Cell::new(0) };
    static HOST: Cell<HostId> = const { Cell::new(HostId(0)) };
    static SKEWS_MS: RefCell<[i64; 256]> = const { RefCell::new([0; 256]) };
    static RANDOM: RefCell<Random> = const { RefCell::new(Random::new(0)) };
    static NETWORK: RefCell<Option<Network>> = const { RefCell::new(None) };
    static PARKING: RefCell<Parking> = const { RefCell::new(Parking { waker: None, parked: None }) };
}

/// How the runtime of the host that runs now comes to its end when it has nothing more to do.
struct Parking {
    /// Of the runtime's root task.
    waker: Option<Waker>,
    /// The runtime would sleep: until the time in ns, or for ever.
    parked: Option<Option<u64>>,
}

/// Makes the calling thread that of a simulation, until the process ends.
pub fn activate(seed: u64, network: Network) {
    calls::keep();
    RANDOM.set(Random::new(seed));
    NETWORK.set(Some(network));
    ACTIVE.set(true);
}

/// Whether the calling thread is that of a simulation.
pub fn is_active() -> bool {
    ACTIVE.try_with(Cell::get).unwrap_or(false)
}

/// Simulated time since the beginning, in ns.
pub fn now_ns() -> u64 {
    NOW_NS.get()
}

/// Moves the time.
///
/// # Panics
/// It would go back.
pub fn set_now_ns(now_ns: u64) {
    assert!(now_ns >= NOW_NS.get(), "simulated time goes on");
    NOW_NS.set(now_ns);
}

/// The machine whose code runs now; 0 is the world itself.
pub fn host() -> HostId {
    HOST.get()
}

pub(crate) fn set_host(host: HostId) {
    HOST.set(host);
}

/// Lets the wall clock of a machine differ from the true time.
pub fn set_skew_ms(host: HostId, skew_ms: i64) {
    SKEWS_MS.with_borrow_mut(|skews| skews[usize::from(host.0)] = skew_ms);
}

/// The monotonic clock in ns.
pub(crate) fn monotonic_ns() -> u64 {
    MONOTONIC_START_NS + now_ns()
}

/// The wall clock of the machine whose code runs now, in ns since 1970.
pub(crate) fn wall_ns() -> u64 {
    let skew_ms = SKEWS_MS.with_borrow(|skews| skews[usize::from(host().0)]);
    WALL_START_MS.saturating_add_signed(skew_ms) * 1_000_000 + now_ns()
}

pub(crate) fn fill_random(bytes: &mut [u8]) {
    RANDOM.with_borrow_mut(|random| random.fill(bytes));
}

/// Works on the network of the simulation.
///
/// # Panics
/// There is none, or it is in use.
pub fn with_network<T>(work: impl FnOnce(&mut Network) -> T) -> T {
    NETWORK.with_borrow_mut(|network| work(network.as_mut().expect("a simulation has a network")))
}

/// The root task of a runtime waits to be told that the runtime has nothing more to do.
pub(crate) fn await_park(waker: &Waker) -> Option<Option<u64>> {
    PARKING.with_borrow_mut(|parking| {
        let parked = parking.parked.take();
        parking.waker = if parked.is_some() { None } else { Some(waker.clone()) };
        parked
    })
}

/// A runtime has nothing more to do until `wake_ns`.
///
/// # Panics
/// No runtime runs under [`await_park`].
pub(crate) fn park(wake_ns: Option<u64>) {
    let waker = PARKING.with_borrow_mut(|parking| {
        parking.parked = Some(wake_ns);
        parking.waker.take()
    });
    waker.expect("runtimes are run by the world").wake();
}
