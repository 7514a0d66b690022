//! Black-box fault tests of ArqonBus on real processes.
//!
//! ```text
//!   run   ─┬─ cluster    nodes: processes, each on a host of its own
//!          │    ├─ host   network namespaces, and how they are given back
//!          │    └─ disk   ext4 on loop devices, FUSE, plain directories
//!          ├─ fault      the nemesis: which fault when, from a seed ─┐
//!          ├─ workload   what clients do, the closing read          ─┼─ history (JSON lines on disk)
//!          ├─ check      one file an anomaly; judges a history       ┤
//!          └─ report     verdict, plots, timeline, page             ─┘
//!   soak      ── run after run, each noted in the ledger ── scorecard
//!   controls  ── the same runs on a program with planted bugs
//! ```
//!
//! Only the built `arqon` program and the SDK are used, as any client would. The checkers know
//! nothing of either: they judge histories, of this program or of any other.

mod check;
mod child;
mod cluster;
mod controls;
mod disk;
mod fault;
mod history;
mod host;
mod ledger;
mod memory;
mod payload;
mod report;
mod run;
mod scorecard;
mod soak;
mod workload;

pub use check::{Anomaly, FailoverMs, FaultCount, MemoryMib, Verdict, judge};
pub use cluster::{Cluster, Error as ClusterError, Options as ClusterOptions, find_arqon};
pub use controls::{Caught, ControlsArgs, controls};
pub use disk::{DiskKind, serve as serve_disk};
pub use history::{Error as HistoryError, History};
pub use host::{Machine, Need, clean, reap};
pub use report::{json, text, write as write_report};
pub use run::{Run, RunArgs, list, parse_time, run};
pub use scorecard::{ScorecardArgs, scorecard};
pub use soak::{SoakArgs, Soaked, soak};
pub use workload::Kind as WorkloadKind;
