//! Partitions on real Raft groups and real logs, one or three nodes in one process.

mod cluster;
mod failover;
mod produce;
mod queue;
mod retention;
