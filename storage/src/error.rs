//! Errors, one enum per operation.

use std::io;

use arqon_proto::{GroupId, NodeId, Offset, RaftIndex, ReplicaId};

/// Why a data directory or a log in it was not opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another process (or another handle of this one) holds the directory.
    #[error("data directory {dir} is in use by another process")]
    InUse {
        /// The directory.
        dir: String,
    },
    /// The directory holds files and none of them is an ArqonBus identity.
    #[error("{dir} is not empty and not an ArqonBus data directory: it holds {found}")]
    NotOurs {
        /// The directory.
        dir: String,
        /// One of the names found there.
        found: String,
    },
    /// The directory belongs to another cluster.
    #[error("data directory {dir} belongs to cluster {found:?}, not {expected:?}")]
    OtherCluster {
        /// The directory.
        dir: String,
        /// Cluster that it belongs to.
        found: String,
        /// Cluster that was asked for.
        expected: String,
    },
    /// The directory belongs to another broker.
    #[error("data directory {dir} belongs to node {found}, not {expected}")]
    OtherNode {
        /// The directory.
        dir: String,
        /// Node that it belongs to.
        found: NodeId,
        /// Node that was asked for.
        expected: NodeId,
    },
    /// A newer program wrote this; nothing was touched.
    #[error("{what} has format version {version}, this program reads up to 1: a newer program wrote it")]
    NewerFormat {
        /// The file.
        what: String,
        /// Its version.
        version: u32,
    },
    /// The identity file of the directory is damaged.
    #[error("identity file {what} is damaged: {reason}")]
    Identity {
        /// The file.
        what: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The log cannot keep its promises; nothing in it was changed.
    #[error("log of group {group} replica {replica} is quarantined: {reason}")]
    Quarantined {
        /// Group of the log.
        group: GroupId,
        /// Replica of the log.
        replica: ReplicaId,
        /// What was found, and where.
        reason: String,
    },
    /// This log is open already.
    #[error("log of group {group} replica {replica} is open already")]
    LogOpen {
        /// Group of the log.
        group: GroupId,
        /// Replica of the log.
        replica: ReplicaId,
    },
    /// The backend asked for is not there.
    #[error("io_uring is refused here: {reason}; use the backend \"plain\" or \"auto\"")]
    NoUring {
        /// What the kernel said.
        reason: String,
    },
    /// The disk failed.
    #[error("{what}: {source}")]
    Io {
        /// File or directory.
        what: String,
        /// The failure.
        source: io::Error,
    },
}

/// Why an append was refused. Nothing of it was kept.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// An earlier write or sync failed; the log takes no writes until it is opened again.
    #[error("log is closed for writing: {0}")]
    Poisoned(String),
    /// Too much is waiting for the disk.
    #[error("{pending_size} bytes wait to be flushed, the limit is {limit}")]
    Overloaded {
        /// Bytes waiting.
        pending_size: usize,
        /// The limit in bytes.
        limit: usize,
    },
    /// The log was deleted or its store closed.
    #[error("log is closed")]
    Closed,
}

impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        Self::other(error)
    }
}

/// Why a read gave nothing.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The offset is below the first one retained.
    #[error("offset is below the log start {log_start}")]
    OutOfRange {
        /// First offset retained.
        log_start: Offset,
    },
    /// The entry was purged.
    #[error("index is below the first retained index {first}")]
    Purged {
        /// First index retained.
        first: RaftIndex,
    },
    /// Bytes on the disk fail their checks. Nothing wrong was returned; reading on is
    /// possible from the offset after `last`.
    #[error("records at offsets {first} to {last} are damaged: {reason}")]
    Damaged {
        /// First offset that cannot be read.
        first: Offset,
        /// Last offset that cannot be read; below `first` when the entry holds no records.
        last: Offset,
        /// Index of the damaged entry.
        index: RaftIndex,
        /// What is wrong.
        reason: String,
    },
    /// The disk failed.
    #[error("reading the log failed: {0}")]
    Io(#[from] io::Error),
}
