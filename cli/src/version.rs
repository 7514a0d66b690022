//! Which program this is.

use std::sync::LazyLock;

use arqon_proto::{CLIENT_VERSIONS, PEER_VERSIONS};

/// Version and commit, as nodes tell them of themselves.
pub const PROGRAM: &str = concat!(env!("CARGO_PKG_VERSION"), "-", env!("ARQON_COMMIT"));

/// The same, with the protocols that this program speaks.
pub fn text() -> &'static str {
    static TEXT: LazyLock<String> = LazyLock::new(|| {
        format!("{PROGRAM} (between nodes: protocol {PEER_VERSIONS}; to clients: protocol {CLIENT_VERSIONS})")
    });
    &TEXT
}
