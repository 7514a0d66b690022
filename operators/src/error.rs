//! Why an operator does not start, or stops.

use std::net::SocketAddr;

/// Why a configuration is refused: one line that names the key.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{key}: {problem}")]
pub struct ConfigError {
    /// The key, for example `timeout_ms`, or the file.
    pub key: String,
    /// What is wrong with it.
    pub problem: String,
}

impl ConfigError {
    pub(crate) fn new(key: impl Into<String>, problem: impl Into<String>) -> Self {
        Self { key: key.into(), problem: problem.into() }
    }
}

/// Why an operator does not start, or ended before it was told to. Every message is one line.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// An option or a key of the configuration is refused.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The bus cannot be reached, or refuses this operator for good.
    #[error(transparent)]
    Bus(#[from] arqon_sdk::Error),
    /// The admin address cannot be listened on.
    #[error("admin_listen: cannot listen on {address}: {reason}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why.
        reason: String,
    },
    /// The HTTP client could not be made.
    #[error("url: {reason}")]
    HttpClient {
        /// Why.
        reason: String,
    },
}
