//! Versions of a protocol, and which one two ends use.

use std::fmt;

use crate::wire;

/// Versions that clients speak with a node or a Shield.
pub const CLIENT_VERSIONS: VersionRange = VersionRange::new(1, 1);
/// Versions that nodes speak with each other.
pub const PEER_VERSIONS: VersionRange = VersionRange::new(1, 2);

/// The versions that one end speaks, all from the lowest to the highest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VersionRange {
    min: u32,
    max: u32,
}

impl VersionRange {
    /// The versions from `min` to `max`.
    ///
    /// # Panics
    /// When there are none, or one of them is 0.
    #[must_use]
    pub const fn new(min: u32, max: u32) -> Self {
        assert!(0 < min && min <= max, "a range has a lowest version, from 1, and none below it");
        Self { min, max }
    }

    /// What the other end has told: its lowest version, and its highest. An end that knows nothing of ranges leaves
    /// `max` 0 and speaks `min` alone; one that tells nothing at all speaks version 1.
    #[must_use]
    pub fn told(min: u32, max: u32) -> Self {
        let min = min.max(1);
        Self { min, max: max.max(min) }
    }

    /// The lowest version.
    #[must_use]
    pub const fn min(self) -> u32 {
        self.min
    }

    /// The highest version.
    #[must_use]
    pub const fn max(self) -> u32 {
        self.max
    }

    /// The version that a client and a server use, or what the server tells the client instead.
    ///
    /// # Errors
    /// UNSUPPORTED_VERSION, naming the field and both ranges.
    pub fn greet(self, hello: &wire::Hello) -> Result<u32, wire::Error> {
        let theirs = Self::told(hello.version, hello.version_max);
        self.common(theirs).ok_or_else(|| wire::Error {
            code: wire::ErrorCode::UnsupportedVersion.into(),
            message: format!("no common protocol: the client speaks {theirs}, this server speaks {self}"),
            field: "version".to_owned(),
            ..Default::default()
        })
    }

    /// Whether `version` is one of them.
    #[must_use]
    pub fn contains(self, version: u32) -> bool {
        (self.min..=self.max).contains(&version)
    }

    /// The version that two ends use: the highest that both speak. `None` when there is no such one.
    #[must_use]
    pub fn common(self, other: Self) -> Option<u32> {
        let highest = self.max.min(other.max);
        (self.contains(highest) && other.contains(highest)).then_some(highest)
    }
}

impl fmt::Display for VersionRange {
    /// `version 1`, or `versions 1 to 2`.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.min == self.max {
            true => write!(formatter, "version {}", self.min),
            false => write!(formatter, "versions {} to {}", self.min, self.max),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_ends_use_the_highest_version_that_both_speak() {
        let range = VersionRange::new;
        let cases = [
            (range(1, 1), range(1, 1), Some(1)),
            (range(1, 2), range(1, 1), Some(1)),
            (range(1, 3), range(2, 5), Some(3)),
            (range(1, 2), range(3, 4), None),
            (range(2, 2), range(1, 1), None),
        ];
        for (one, other, version) in cases {
            assert_eq!((one.common(other), other.common(one)), (version, version), "{one} and {other}");
        }
    }

    #[test]
    fn an_end_that_tells_no_range_speaks_one_version() {
        assert_eq!(VersionRange::told(1, 0), VersionRange::new(1, 1));
        assert_eq!(VersionRange::told(0, 0), VersionRange::new(1, 1));
        assert_eq!(VersionRange::told(3, 0), VersionRange::new(3, 3));
        assert_eq!(VersionRange::told(3, 2), VersionRange::new(3, 3), "what cannot be is the lowest alone");
        assert_eq!(VersionRange::told(1, 2).to_string(), "versions 1 to 2");
    }
}
