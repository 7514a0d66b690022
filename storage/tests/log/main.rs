//! The log from outside: one contract for all backends, a model, power cuts, damage.

#![expect(clippy::unwrap_used, reason = "a test ends at the first thing that fails")]

mod contract;
mod crash;
mod damage;
mod fixtures;
mod flips;
mod index;
mod many;
mod model;
mod recycle;
mod repair;
mod space;
mod support;
mod turn;
mod unreadable;
