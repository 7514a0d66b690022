//! Every bound of the client, in one place. Sizes in bytes.

use std::time::Duration;

/// Frames queued for one connection and not yet written; a sender waits for room above it.
pub const OUTGOING_SIZE_MAX: usize = 32 << 20;
/// Requests without an answer on one connection.
pub const REQUEST_COUNT_MAX: usize = arqon_proto::limits::CONNECTION_REQUEST_COUNT_MAX / 2;
/// One write to a socket gathers frames up to this size.
pub const WRITE_SIZE_MAX: usize = 1 << 20;
/// Topics whose leaders are remembered; the memory starts anew above it.
pub const TOPIC_COUNT_MAX: usize = 1_024;
/// Server addresses whose connections or failures are remembered.
pub const ADDRESS_COUNT_MAX: usize = 1_024;
/// Batches that a producer may have unanswered per partition: the Spine remembers the offsets
/// of as many, so that a resent batch always learns where it stands.
pub const IN_FLIGHT_COUNT_MAX: usize = arqon_proto::limits::PRODUCER_BATCH_COUNT;
/// Produces handed in as finished batches that may be unanswered per partition.
pub const LANE_WINDOW: usize = 128;
/// Produces that wait for a place in the lane's window.
pub const LANE_QUEUE: usize = 128;
/// A batch of a producer leaves at this size as soon as there is room; while there is none it
/// grows up to the producer's own limit.
pub const BATCH_SIZE: usize = 256 << 10;
/// Buffers of resolved batches that a producer keeps for the next ones, and their size.
pub const SPARE_COUNT_MAX: usize = 8;
/// See [`SPARE_COUNT_MAX`].
pub const SPARE_SIZE_MAX: usize = 2 << 20;
/// Batches of a partition under way beside which another leaves without lingering: one is being
/// synced while the next is on its way.
pub const EAGER_DEPTH: usize = 2;
/// Batches that a producer may have under way before all further ones linger.
pub const EAGER_COUNT_MAX: usize = 5;
/// Time for a connection to one of several servers that may know better who leads.
pub const OTHER_DIAL_TIME_MAX: Duration = Duration::from_millis(500);
/// Time-outs of batches are looked for this often.
pub const TICK_MAX: Duration = Duration::from_millis(250);
/// Longest linger of a producer.
pub const LINGER_MAX: Duration = Duration::from_millis(5);
/// Requests for jobs that a worker may have unanswered per partition.
pub const WORK_COUNT_MAX: usize = 4;
/// Jobs that one worker may hold.
pub const PARALLELISM_MAX: usize = 10_000;
/// Redirections (`NOT_LEADER` naming a leader) that are followed without a pause.
pub const REDIRECT_COUNT_MAX: u32 = 3;
