//! Every limit of the wire, the log and the broker, in one place. Sizes in bytes.

/// Payload of one event.
pub const PAYLOAD_SIZE_MAX: usize = 1 << 20;
/// One record with key, schema, headers and payload.
pub const RECORD_SIZE_MAX: usize = PAYLOAD_SIZE_MAX + (128 << 10);
/// Partitioning key of one event.
pub const KEY_SIZE_MAX: usize = 4 << 10;
/// Schema name, for example `arqonbus.nvm.job.v1`.
pub const SCHEMA_SIZE_MAX: usize = 256;
/// Headers of one event.
pub const HEADER_COUNT_MAX: usize = 64;
/// Name of one header.
pub const HEADER_NAME_SIZE_MAX: usize = 256;
/// Value of one header.
pub const HEADER_VALUE_SIZE_MAX: usize = 32 << 10;
/// Records of one batch.
pub const BATCH_RECORD_COUNT_MAX: usize = 65_536;
/// One batch as stored: header, stamps and (compressed) records.
pub const BATCH_SIZE_MAX: usize = 4 << 20;
/// The records of one batch after decompression.
pub const BATCH_RECORDS_SIZE_MAX: usize = 8 << 20;
/// Records section after decompression, as a multiple of its stored size.
pub const COMPRESSION_RATIO_MAX: usize = 100;
/// One frame on TCP or one WebSocket message.
pub const FRAME_SIZE_MAX: usize = 16 << 20;
/// The protobuf header of one frame.
pub const FRAME_HEADER_SIZE_MAX: usize = 4 << 20;
/// What one fetch may return, whatever it asks for (at least one batch is returned).
pub const FETCH_SIZE_MAX: usize = 8 << 20;
/// Longest long-poll, in milliseconds.
pub const POLL_WAIT_MS_MAX: u32 = 30_000;
/// Jobs granted by one work request.
pub const WORK_JOB_COUNT_MAX: u32 = 1_000;
/// Leases outstanding per queue group and partition.
pub const OUTSTANDING_COUNT_MAX: usize = 100_000;
/// Queue groups on one partition.
pub const QUEUE_GROUP_COUNT_MAX: usize = 64;
/// Shortest and longest lease of a job, in milliseconds.
pub const LEASE_MS_MIN: u32 = 1_000;
/// See [`LEASE_MS_MIN`].
pub const LEASE_MS_MAX: u32 = 3_600_000;
/// Lease when a work request names none, in milliseconds.
pub const LEASE_MS_DEFAULT: u32 = 30_000;
/// Attempts before a job is dead-lettered, when its topic names none.
pub const ATTEMPT_COUNT_DEFAULT: u32 = 5;
/// Longest delay of a nack, in milliseconds.
pub const NACK_DELAY_MS_MAX: u32 = 86_400_000;
/// Partitions of one topic.
pub const PARTITION_COUNT_MAX: u32 = 1_000;
/// Topic, group, tenant, worker and operator names.
pub const NAME_SIZE_MAX: usize = 200;
/// Producer scopes remembered per partition; the least recently used is forgotten.
pub const PRODUCER_COUNT_MAX: usize = 100_000;
/// A producer scope is forgotten after this time without a batch, by batch times.
pub const PRODUCER_EXPIRY_MS: u64 = 7 * 24 * 3_600_000;
/// Batches per producer whose offsets are remembered for duplicates.
pub const PRODUCER_BATCH_COUNT: usize = 5;
/// Bytes proposed and not yet committed, per partition; more is pushed back.
pub const UNCOMMITTED_SIZE_MAX: usize = 64 << 20;
/// Entries of one append sent to a follower, in bytes.
pub const APPEND_SIZE_MAX: usize = 1 << 20;
/// Recent entries kept in memory per group, in bytes.
pub const RECENT_SIZE_MAX: usize = 32 << 20;
/// Recent entries kept in memory by all groups of a node together, in bytes.
pub const RECENT_TOTAL_MAX: usize = 64 << 20;
/// Requests that one client connection may have outstanding.
pub const CONNECTION_REQUEST_COUNT_MAX: usize = 8_192;
/// Fetches and requests for jobs not answered yet, of all connections to a node.
pub const REQUESTS_TOTAL_MAX: usize = 16_384;
/// Client connections per node.
pub const CONNECTION_COUNT_MAX: usize = 10_000;
/// Requests received and not answered yet, of all connections of a node.
pub const RECEIVED_TOTAL_MAX: usize = 64 << 20;
/// Answers that were not sent yet, of all connections of a node.
pub const SENDING_TOTAL_MAX: usize = 64 << 20;
/// Large frames that are partly received, of all connections of a node.
pub const PARTIAL_FRAMES_TOTAL_MAX: usize = 32 << 20;
/// Longest time between two tries to reach another node, in milliseconds.
pub const REDIAL_MS_MAX: u64 = 500;
/// Least reserve of a node's disk: what was admitted and is not written yet must fit into it.
pub const RESERVE_SIZE_MIN: u64 = 64 << 20;
/// Time to complete a handshake, in milliseconds.
pub const HANDSHAKE_MS_MAX: u64 = 5_000;

/// Below this much free on the disk of a data directory, new data is refused; on a small disk below
/// [`DISK_RESERVE_PERCENT_MAX`] of it. Followers refuse data below a quarter of that.
pub const DISK_RESERVE_SIZE_MAX: u64 = 512 << 20;
/// See [`DISK_RESERVE_SIZE_MAX`]; in percent of the disk.
pub const DISK_RESERVE_PERCENT_MAX: u64 = 5;

/// Nodes that a node remembers as having dialled it.
pub const DIALLER_COUNT_MAX: usize = 1_024;

/// Files of purged segments that a data directory keeps for new ones, in bytes together.
pub const SEGMENT_POOL_SIZE_MAX: u64 = 512 << 20;

/// Ranges of damaged entries that one log keeps account of.
pub const DAMAGE_COUNT_MAX: usize = 256;

/// Entries put in the place of damaged ones at once, in bytes.
pub const REPAIR_SIZE_MAX: usize = 256 << 20;

/// Bytes per second that a store reads to find damage.
pub const SCRUB_RATE_MAX: u64 = 4 << 20;

/// Operators send a heartbeat this often, in milliseconds.
pub const OPERATOR_HEARTBEAT_MS: u64 = 5_000;
/// An operator silent for this long is expired and loses its leases, in milliseconds.
pub const OPERATOR_EXPIRY_MS: u64 = 15_000;

const _: () = assert!(RECORD_SIZE_MAX + 4096 <= BATCH_SIZE_MAX);
const _: () = assert!(FETCH_SIZE_MAX + BATCH_SIZE_MAX + FRAME_HEADER_SIZE_MAX <= FRAME_SIZE_MAX);
