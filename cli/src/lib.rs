//! The one binary, `arqon`: joins the parts of ArqonBus behind subcommands.
//!
//! ```text
//!   command ─┬─ serve      node, shield, operator http       (roles, from a file until a signal)
//!            ├─ up, demo ── cluster ── process               (roles as children on this machine)
//!            ├─ topic, group, cluster_* ── connect           (gRPC control plane)
//!            ├─ publish, consume, work ── connect            (frames, through sdk/)
//!            └─ token, offline, doctor                       (no server)
//! ```
//!
//! Standard output carries results alone, one JSON document (or one a line) with `--json`;
//! errors are one line on standard error.

mod anew;
mod backup;
mod cluster;
mod cluster_change;
mod cluster_recover;
mod cluster_status;
mod command;
mod confirm;
mod connect;
mod consume;
mod demo;
mod doctor;
mod failure;
mod group;
mod health;
mod logging;
mod offline;
mod output;
mod ports;
mod process;
mod publish;
mod serve;
mod signals;
mod token;
mod topic;
mod topic_change;
mod up;
mod version;
mod work;

pub use command::main;
pub use failure::Failure;
