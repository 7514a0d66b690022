//! Generated protobuf messages and the gRPC control plane, from `proto/arqonbus/v1`.
#![expect(clippy::all, reason = "generated code")]

tonic::include_proto!("arqonbus.v1");

/// The encoded `FileDescriptorSet` of all messages, for gRPC reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
