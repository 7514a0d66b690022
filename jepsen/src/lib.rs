//! Black-box fault tests of ArqonBus on real processes.
//!
//! ```text
//!   smoke ─┬─ cluster    node processes: start, SIGKILL, start again
//!          ├─ nemesis    which fault when, from a seed        ─┐
//!          ├─ workload   producers, readers, the closing read ─┼─ history (JSON lines on disk)
//!          └─ check      one file an anomaly; judges a history ┘
//! ```
//!
//! Only the built `arqon` program and the SDK are used, as any client would. The checkers know
//! nothing of either: they judge histories, of this program or of any other.

mod check;
mod cluster;
mod history;
mod nemesis;
mod payload;
mod report;
mod smoke;
mod workload;

pub use check::{Anomaly, Verdict, judge};
pub use cluster::{Cluster, Error as ClusterError, find_arqon};
pub use history::{Error as HistoryError, History};
pub use report::{json, text};
pub use smoke::{Run, SmokeArgs, parse_time, smoke};
