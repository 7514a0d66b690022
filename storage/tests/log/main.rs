//! The log from outside: one contract for all backends, a model, power cuts, damage.

mod contract;
mod crash;
mod damage;
mod model;
mod support;
