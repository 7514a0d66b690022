//! The built binary, as its users meet it.

#![expect(clippy::unwrap_used, reason = "a test ends at the first thing that fails")]

mod bad_input;
mod members;
mod planted;
mod running;
mod samples;
mod topics;
mod tour;
