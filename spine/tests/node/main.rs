//! Whole nodes in this process: real ports, real disks, raw frames.

mod clocks;
mod greedy;
mod members;
mod one_node;
mod support;
mod three_nodes;
mod tls;
mod topics;
