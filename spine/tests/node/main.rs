//! Whole nodes in this process: real ports, real disks, raw frames.

mod clocks;
mod disks;
mod greedy;
mod groups;
mod identity;
mod members;
mod one_node;
mod support;
mod three_nodes;
mod tls;
mod topics;
