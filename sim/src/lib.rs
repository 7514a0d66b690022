//! A whole cluster in one thread, on a simulated clock, network and disk: a seed gives the same run,
//! to the byte.
//!
//! ```text
//!   command.rs ► fleet.rs ── a process a seed ──► run.rs: start, workload and faults, heal, check
//!                                                  │
//!       workload/  clients: the real SDK     faults/    what goes wrong, drawn from the seed
//!       machine.rs  brokers: the real node over a disk in memory
//!                                     │
//!       world.rs   machines, each with a runtime, and one clock
//!       network/   TCP as the system calls show it
//!       system/    the C library's functions for clock, randomness and sockets, defined here
//!
//!   logs.rs  what lies on the disks in the end   ──►  invariants/  what must hold after every run
//!   trace.rs  what happened, and its hash
//! ```

mod cluster;
mod command;
mod faults;
mod fleet;
mod history;
mod invariants;
mod logs;
mod machine;
mod network;
mod random;
mod run;
mod system;
mod trace;
mod workload;
mod world;

pub use command::main;
pub use run::Report;
