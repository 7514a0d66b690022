//! The built binary, as its users meet it.

mod bad_input;
mod running;
mod samples;
mod tour;
