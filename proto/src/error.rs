//! Errors of decoding, and the names of the wire's error codes.

use crate::wire;

/// Why bytes from a disk or a network are not what they should be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// The bytes end too early.
    #[error("{what} is cut short: {have} of {need} bytes")]
    Truncated {
        /// Which part.
        what: &'static str,
        /// Bytes needed.
        need: usize,
        /// Bytes there.
        have: usize,
    },
    /// The first bytes are not the part's mark.
    #[error("{what} does not start with its magic number")]
    Magic {
        /// Which part.
        what: &'static str,
    },
    /// A newer program wrote it.
    #[error("{what} has format version {version}, this program reads version 1")]
    Version {
        /// Which part.
        what: &'static str,
        /// The version found.
        version: u32,
    },
    /// A newer program wrote it, in a version of its own kind.
    #[error("{what} is newer than this program")]
    Unknown {
        /// Which part.
        what: &'static str,
    },
    /// The checksum does not match.
    #[error("checksum of {what} does not match")]
    Crc {
        /// Which part.
        what: &'static str,
    },
    /// A field has a value that cannot be.
    #[error("{field} has the invalid value {value}")]
    Value {
        /// Which field.
        field: &'static str,
        /// The value found.
        value: u64,
    },
    /// A field is over its limit.
    #[error("{field} has {size} bytes, the limit is {limit}")]
    TooLarge {
        /// Which field.
        field: &'static str,
        /// Size found.
        size: usize,
        /// Its limit.
        limit: usize,
    },
    /// Text that is not UTF-8, or a name outside its alphabet.
    #[error("{field} is not valid text")]
    Text {
        /// Which field.
        field: &'static str,
    },
    /// The records could not be decompressed within their limits.
    #[error("records do not decompress to the {plain} bytes that the header names")]
    Compression {
        /// Size that the header names.
        plain: usize,
    },
    /// A protobuf message is malformed.
    #[error("{what} is not valid protobuf")]
    Protobuf {
        /// Which message.
        what: &'static str,
    },
}

/// The stable, upper-case name of a wire error code, for example `NOT_LEADER`.
#[must_use]
pub fn code_name(code: wire::ErrorCode) -> &'static str {
    code.as_str_name().trim_start_matches("ERROR_CODE_")
}
