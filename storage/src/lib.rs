//! The segment logs of one data directory: one log per replica of a Raft group.
//!
//! ```text
//!      purged      committed       flushed         last
//!         │            │              │              │
//!   ──────┼────────────┼──────────────┼──────────────┤ append
//!   gone  │     read from the map     │ in memory,   │
//!         │     or from memory        │ on its way   │
//!         ▲                           ▲
//!     log start                 durable mark: at or behind it
//!
//!   DIR/identity                        cluster, node
//!   DIR/lock                            held while the store is open
//!   DIR/logs/GROUP-REPLICA/manifest     the two ends of the log
//!                         /vote
//!                         /OFFSET-INDEX.seg
//!                         /OFFSET-INDEX.idx
//!                         /checkpoint-KIND-INDEX-TERM
//!   DIR/pool/N.spare                    files of purged segments, for new ones
//!
//!   store.rs     opens a directory          recovery.rs  opens a log after a crash
//!   log.rs       changes of a log           flush.rs     what they do on disk
//!   read.rs      reads                      engine.rs    the threads that do it
//!   recent.rs    entries in memory          turn.rs      a round on the thread that appends
//!   segment.rs   one file                   layout.rs    its bytes
//!   index.rs     where to enter a segment  space.rs    what the disk still takes
//!   pool.rs      files that are used again
//!   damage.rs    what cannot be read       repair.rs   and how it is put right
//!   scrub.rs     looks for it
//!   disk.rs      what is needed of a disk: real, in memory, faulty
//! ```
//!
//! What a log must keep: an entry whose `on_flushed` ran with `Ok` is there after any crash, at
//! its place and byte by byte; an entry that was truncated never comes back; a vote that was
//! saved is the vote. Bytes of a batch are written once and never again, so maps of them stay
//! valid: a truncation or a cut moves on to a new segment, and the file of a purged one becomes another
//! only when nobody has a map of it.
//!
//! This crate knows neither Raft nor records: votes, checkpoints and payloads are bytes.

mod checkpoint;
mod damage;
mod disk;
mod engine;
mod error;
mod flush;
mod index;
mod inspect;
mod layout;
mod log;
mod metrics;
mod options;
mod place;
mod pool;
mod position;
mod read;
mod recent;
mod recovery;
mod repair;
mod scrub;
mod search;
mod segment;
mod space;
mod store;
mod turn;

pub use checkpoint::CheckpointKind;
pub use damage::Damage;
pub use disk::faulty::{FaultyDisk, Operation};
pub use disk::memory::{MemoryDisk, Unsynced};
pub use disk::real::RealDisk;
pub use disk::{BLOCK_SIZE, BlockFile, Disk, DiskSpace, File};
pub use error::{Error, OpenError, ReadError};
pub use inspect::{
    BatchInspection, Fault, Inspection, LogCheck, LogInspection, SegmentInspection, TermSpan, inspect, inspect_on,
};
pub use log::{Log, OnFlushed};
pub use metrics::{Histogram, Metrics};
pub use options::{Backend, Identity, Options};
pub use position::LogPosition;
pub use recovery::{Cut, Recovery};
pub use space::{Space, SpaceState};
pub use store::Store;
pub use turn::Turn;
