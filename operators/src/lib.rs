//! Operators: what takes jobs from `*.jobs` and puts one result each on `*.results`.
//!
//! ```text
//!   *.jobs ──lease──► run loop ──► Operator::run ──result──► *.results
//!                        │             ▲
//!      registration,     ▼             ├── your own code
//!      heartbeats     system.control.  └── HTTP shim ── POST ──► worker
//!                     operators
//! ```
//!
//! [`run`] drives anything that implements [`Operator`]; [`run_http`] is that with the shim,
//! which has the work done by an HTTP service. Operators speak to the bus through arqon-sdk
//! only. `docs/operators.md` is the guide.

mod admin;
mod error;
mod http;
mod json;
mod kit;

pub use error::{ConfigError, Error};
pub use http::{HttpShim, HttpShimConfig, Secret, TOKEN_VARIABLES, run_http};
pub use kit::{
    DRAIN_MAX, HEARTBEAT_SCHEMA, JobEnd, JobError, Metrics, Operator, PARALLELISM_MAX, REGISTRATION_SCHEMA, RunOptions,
    check_registration, failed_result, job_id, result_id, run,
};
