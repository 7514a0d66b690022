//! The world: simulated machines, each with a runtime of its own, on one thread and one clock.
//!
//! ```text
//!   time = the earliest of: a packet arrives, a machine wants to wake
//!   └─► packets arrive ─► every machine with something to do runs until it would sleep ─► again
//! ```
//!
//! A machine that crashes loses its runtime with everything in it.

use std::{
    collections::{BTreeMap, BTreeSet},
    future::{Future, poll_fn},
    task::Poll,
};

use tokio::runtime::{Builder, Runtime};

use crate::{
    network::HostState,
    system::{self, HostId, now_ns},
    trace,
};

/// Rounds at one and the same time after which the world is stuck.
const ROUND_COUNT_MAX: usize = 100_000;

struct Machine {
    runtime: Runtime,
    /// It has asked to be woken then.
    wake_ns: Option<u64>,
    /// It stands still until then.
    paused_until_ns: u64,
}

/// See the module.
#[derive(Default)]
pub struct World {
    machines: BTreeMap<HostId, Machine>,
    woken: BTreeSet<HostId>,
}

impl World {
    /// Starts a machine with one program.
    ///
    /// # Panics
    /// It runs already, or no runtime can be made.
    pub fn boot(&mut self, host: HostId, program: impl Future<Output = ()> + Send + 'static) {
        system::with_network(|network| network.set_host(host, HostState::Up));
        system::set_host(host);
        let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime needs a few descriptors");
        runtime.spawn(program);
        system::set_host(HostId(0));
        let before = self.machines.insert(host, Machine { runtime, wake_ns: None, paused_until_ns: 0 });
        assert!(before.is_none(), "a machine is booted once");
        self.woken.insert(host);
    }

    /// Starts another program on a machine that runs.
    pub fn spawn(&mut self, host: HostId, program: impl Future<Output = ()> + Send + 'static) {
        if let Some(machine) = self.machines.get(&host) {
            machine.runtime.spawn(program);
            self.woken.insert(host);
        }
    }

    /// Whether a machine runs.
    #[must_use]
    pub fn is_up(&self, host: HostId) -> bool {
        self.machines.contains_key(&host)
    }

    /// Ends everything that runs on a machine at once. Its disk must refuse it before.
    pub fn stop(&mut self, host: HostId, state: HostState) {
        system::with_network(|network| network.set_host(host, state));
        self.woken.remove(&host);
        if let Some(machine) = self.machines.remove(&host) {
            system::set_host(host);
            drop(machine.runtime);
            system::set_host(HostId(0));
        }
    }

    /// Lets a machine stand still, as SIGSTOP does; its clock goes on.
    pub fn pause(&mut self, host: HostId, until_ns: u64) {
        if let Some(machine) = self.machines.get_mut(&host) {
            machine.paused_until_ns = until_ns;
        }
    }

    /// Something was changed from outside that a machine should look at.
    pub fn wake(&mut self, host: HostId) {
        self.woken.insert(host);
    }

    /// When anything happens next, in ns.
    fn next_ns(&mut self) -> Option<u64> {
        self.woken.extend(system::with_network(|network| network.take_woken()));
        let machines = self.machines.iter().filter_map(|(host, machine)| {
            let wake_ns = if self.woken.contains(host) { Some(now_ns()) } else { machine.wake_ns };
            wake_ns.map(|at_ns| at_ns.max(machine.paused_until_ns))
        });
        machines.chain(system::with_network(|network| network.next_ns())).min().map(|at_ns| at_ns.max(now_ns()))
    }

    /// Lets time pass until `until_ns`. `look` sees the world after every machine that ran, and may end it
    /// by answering true; it is told which machine.
    pub fn run_until(&mut self, until_ns: u64, look: &mut dyn FnMut(&mut Self, HostId) -> bool) {
        let mut round_count = 0;
        while let Some(at_ns) = self.next_ns().filter(|at_ns| *at_ns <= until_ns) {
            round_count = if at_ns > now_ns() { 0 } else { round_count + 1 };
            assert!(round_count < ROUND_COUNT_MAX, "the world goes round and time stands still");
            system::set_now_ns(at_ns);
            system::with_network(|network| network.deliver_due());
            self.woken.extend(system::with_network(|network| network.take_woken()));
            let due: Vec<HostId> = self
                .machines
                .iter()
                .filter(|(host, machine)| {
                    let wants = self.woken.contains(host) || machine.wake_ns.is_some_and(|wake_ns| wake_ns <= at_ns);
                    wants && machine.paused_until_ns <= at_ns
                })
                .map(|(host, _)| *host)
                .collect();
            for host in due {
                self.run(host);
                if look(self, host) {
                    return;
                }
            }
        }
        system::set_now_ns(until_ns.max(now_ns()));
    }

    /// Runs a machine until it would sleep.
    fn run(&mut self, host: HostId) {
        self.woken.remove(&host);
        let Some(machine) = self.machines.get_mut(&host) else { return };
        system::set_host(host);
        let parked = machine.runtime.block_on(poll_fn(|context| match system::await_park(context.waker()) {
            Some(parked) => Poll::Ready(parked),
            None => Poll::Pending,
        }));
        system::set_host(HostId(0));
        machine.wake_ns = parked;
        trace::note("sleeps", &[u64::from(host.0), parked.unwrap_or(0)]);
    }
}
