//! Bytes that ArqonBus puts on a wire or a disk, and the limits on them.
//!
//! ```text
//!   record.rs   one event inside a batch          (written by clients)
//!   batch.rs    header | stamps | records         (the unit of wire, Raft and disk)
//!   stamp.rs    per-record provenance             (written by the Spine)
//!   frame.rs    length | header size | Frame | body   (client and peer transport)
//!   frame_buffer.rs, gather.rs   frames in and out of byte streams
//!   lease.rs    the MAC'd token of a granted job
//!   token.rs    access tokens of clients       (signed JWT)
//!   version.rs  which version of a protocol two ends use
//!   planted.rs  bugs and crash points for the fault tests, absent without their feature
//!   wire.rs     generated protobuf and gRPC
//! ```
//!
//! Nothing here does I/O. The byte maps are frozen by the fixtures in `proto/fixtures`;
//! `docs/format.md` and `docs/protocol.md` explain them for other languages.

mod batch;
mod error;
mod frame;
mod frame_buffer;
mod gather;
mod ids;
mod lease;
pub mod limits;
mod name;
pub mod planted;
mod record;
mod stamp;
mod tls;
mod token;
mod version;
pub mod wire;

pub use batch::{BATCH_HEADER_SIZE, Batch, BatchKind, Compression, FORMAT_VERSION, Header, chain_start};
pub use error::{DecodeError, code_name};
pub use frame::{decode_frame, encode_frame, frame_size};
pub use frame_buffer::FrameBuffer;
pub use gather::Gather;
pub use ids::{GroupId, NodeId, Offset, PartitionId, RaftIndex, ReplicaId, Term};
pub use lease::{LEASE_KEY_SIZE, LeaseKey, LeaseRejected};
pub use name::{NameError, TopicClass, check_schema, check_tenant, check_topic, results_topic_of};
pub use record::{
    BatchBuilder, EventType, ProducerStamp, Record, RecordCursor, RecordParts, RecordRef, check_records, records,
};
pub use stamp::{StampView, decode_stamps, encode_stamps};
pub use tls::{TlsError, TlsIdentity, tls_client, tls_server};
pub use token::{
    AUDIENCE_DEFAULT, Claims, OPERATOR_TOPIC, Permission, SYSTEM_TENANT, Session, TOKEN_SIZE_MAX, TokenAlgorithm,
    TokenError, TokenKey, TokenKeyPair, TokenSigner, Verb, Verifier,
};
pub use version::{CLIENT_VERSIONS, PEER_VERSIONS, VersionRange};
