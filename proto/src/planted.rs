//! Bugs and crash points for the fault tests, which exist only with the feature `planted`: without
//! it every question here is a constant, and nothing of this is in the program.
//!
//! A fault test that has never found a bug proves nothing. So `planted/` builds the same programs
//! with this feature, and one variable of the environment chooses the bug ([`BUG_VARIABLE`]) or the
//! line at which the process ends as if by the power ([`CRASH_VARIABLE`]).

/// Names the one planted bug of a process.
pub const BUG_VARIABLE: &str = "ARQON_PLANTED";
/// Gives every segment the same size, in bytes, so that points that come once a segment are soon reached.
pub const SEGMENT_VARIABLE: &str = "ARQON_SEGMENT_SIZE";
/// Names a crash point and how many times it is passed before, as in `segment-named:3`.
pub const CRASH_VARIABLE: &str = "ARQON_CRASH_AT";

/// A promise that is broken on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bug {
    /// Groups are acknowledged without a flush of the disk.
    AckBeforeFlush,
    /// Recovery takes whatever damage it meets for the end of the log.
    CutAtDamage,
    /// A vote is answered and kept in memory alone.
    VoteNotSaved,
    /// Bytes read from a segment are not compared with their checksums.
    ReadWithoutChecksum,
    /// Directories are never synced, and new names reach the disk whenever it likes.
    NoDirectorySync,
    /// A leader that restarts inside its lease goes on without an election.
    LeaderRestore,
    /// Checkpoints forget the producers' sequences.
    SequencesNotInCheckpoint,
    /// A linearizable read asks no majority.
    StaleLeaderRead,
    /// Whoever held a lease once may answer and settle the job again.
    UnfencedLease,
    /// What recovery found above the durable mark is taken as durable.
    RecoveredTailNotSynced,
    /// Access tokens are good for ever.
    ExpiryIgnored,
}

impl Bug {
    /// All of them.
    pub const ALL: [Self; 11] = [
        Self::AckBeforeFlush,
        Self::CutAtDamage,
        Self::VoteNotSaved,
        Self::ReadWithoutChecksum,
        Self::NoDirectorySync,
        Self::LeaderRestore,
        Self::SequencesNotInCheckpoint,
        Self::StaleLeaderRead,
        Self::UnfencedLease,
        Self::RecoveredTailNotSynced,
        Self::ExpiryIgnored,
    ];

    /// As it is written in [`BUG_VARIABLE`].
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::AckBeforeFlush => "ack-before-flush",
            Self::CutAtDamage => "cut-at-damage",
            Self::VoteNotSaved => "vote-not-saved",
            Self::ReadWithoutChecksum => "read-without-checksum",
            Self::NoDirectorySync => "no-directory-sync",
            Self::LeaderRestore => "leader-restore",
            Self::SequencesNotInCheckpoint => "sequences-not-in-checkpoint",
            Self::StaleLeaderRead => "stale-leader-read",
            Self::UnfencedLease => "unfenced-lease",
            Self::RecoveredTailNotSynced => "recovered-tail-not-synced",
            Self::ExpiryIgnored => "expiry-ignored",
        }
    }
}

/// Whether this program can have planted bugs.
pub const IS_PLANTED: bool = cfg!(feature = "planted");

/// Every crash point, by the name that [`crash_point`] is given.
pub const CRASH_POINTS: &[&str] = &[
    // A group on its way to the disk.
    "group-written",
    "group-flushed",
    "mark-written",
    // A new segment.
    "segment-written",
    "segment-named",
    "segment-begun",
    "segment-in-manifest",
    // A new segment in the file of an old one.
    "recycle-written",
    "recycle-named",
    // The list of a log's files, which each of these changes.
    "manifest-written",
    "manifest-named",
    // A truncation.
    "truncate-marked",
    "truncate-in-manifest",
    "truncate-removed",
    // Retention.
    "retention-proposed",
    "retention-checkpoint",
    "purge-in-manifest",
    "purge-removed",
    // Files of purged segments on their way into the pool.
    "retire-renamed",
    "retire-removed",
    "retire-pooled",
    // A snapshot that is installed.
    "snapshot-received",
    "install-checkpoint",
    "install-in-manifest",
    "install-removed",
    // Small files that are replaced.
    "vote-written",
    "vote-named",
    "checkpoint-written",
    "checkpoint-named",
    "checkpoint-pruned",
    "index-written",
    // Repair of damage.
    "repair-written",
    "repair-named",
    // The files of a data directory itself.
    "node-file-written",
    "node-file-named",
    // A log that is created or deleted.
    "log-created",
    "log-deleted",
    // Opening a log after a crash.
    "recovery-marked",
    "recovery-cleaned",
];

/// Whether this process has `bug`.
#[cfg(not(feature = "planted"))]
#[must_use]
#[inline(always)]
pub const fn has(_bug: Bug) -> bool {
    false
}

/// Ends the process if it was told to end here.
#[cfg(not(feature = "planted"))]
#[inline(always)]
pub const fn crash_point(_name: &'static str) {}

/// The size of every segment, in bytes, if this process was told one.
#[cfg(not(feature = "planted"))]
#[must_use]
#[inline(always)]
pub const fn segment_size() -> Option<u64> {
    None
}

#[cfg(feature = "planted")]
pub use chosen::{crash_point, has, segment_size};

#[cfg(feature = "planted")]
mod chosen {
    use std::sync::LazyLock;
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::{BUG_VARIABLE, Bug, CRASH_POINTS, CRASH_VARIABLE, SEGMENT_VARIABLE};

    static BUG: LazyLock<Option<Bug>> = LazyLock::new(|| {
        let name = std::env::var(BUG_VARIABLE).ok()?;
        let bug = Bug::ALL.into_iter().find(|bug| bug.name() == name);
        Some(bug.unwrap_or_else(|| panic!("{BUG_VARIABLE}: no planted bug has the name {name:?}")))
    });

    struct Crash {
        name: String,
        /// Times that the point is passed before.
        left: AtomicU64,
    }

    static CRASH: LazyLock<Option<Crash>> = LazyLock::new(|| {
        let text = std::env::var(CRASH_VARIABLE).ok()?;
        let (name, count) = text.split_once(':').unwrap_or((&text, "0"));
        let left = count.parse().unwrap_or_else(|_| panic!("{CRASH_VARIABLE}: {count:?} is not a number"));
        assert!(CRASH_POINTS.contains(&name), "{CRASH_VARIABLE}: no crash point has the name {name:?}");
        Some(Crash { name: name.to_owned(), left: AtomicU64::new(left) })
    });

    /// Whether this process has `bug`.
    #[must_use]
    pub fn has(bug: Bug) -> bool {
        *BUG == Some(bug)
    }

    /// The size of every segment, in bytes, if this process was told one.
    ///
    /// # Panics
    /// On what is not a number.
    #[must_use]
    pub fn segment_size() -> Option<u64> {
        let text = std::env::var(SEGMENT_VARIABLE).ok()?;
        Some(text.parse().unwrap_or_else(|_| panic!("{SEGMENT_VARIABLE}: {text:?} is not a number")))
    }

    /// Ends the process if it was told to end here, with nothing flushed, closed or told to anybody.
    ///
    /// # Panics
    /// On a name that is not among [`CRASH_POINTS`].
    pub fn crash_point(name: &'static str) {
        assert!(CRASH_POINTS.contains(&name), "{name} is not listed");
        let Some(crash) = CRASH.as_ref().filter(|crash| crash.name == name) else { return };
        let before = crash.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1));
        if before.is_err() {
            eprintln!("crash point {name} reached");
            std::process::abort();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_told_apart() {
        let names = Bug::ALL.map(Bug::name);
        for names in [&names[..], CRASH_POINTS] {
            let different: std::collections::BTreeSet<_> = names.iter().collect();
            assert_eq!(different.len(), names.len());
        }
    }
}
