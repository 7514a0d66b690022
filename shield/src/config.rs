//! The configuration of a Shield: one TOML file, checked before anything starts.
//!
//! ```toml
//! listen = "127.0.0.1:7710"             # the defaults; port 0 takes a free one
//! admin = "127.0.0.1:7720"
//! servers = ["127.0.0.1:7700"]          # client addresses of brokers
//!
//! [auth]
//! audience = "arqonbus"
//! [[auth.keys]]
//! algorithm = "EdDSA"
//! public_key_file = "token.pub.pem"     # relative paths: from the folder of this file
//!
//! [tls]                                 # all optional
//! certificate_file = "shield.pem"       # with key_file: clients connect with wss://
//! key_file = "shield.key.pem"
//! ca_file = "ca.pem"                    # speak TLS with the brokers
//!
//! [limits]                              # all optional
//! connections = 10000
//! ```

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use arqon_proto::{AUDIENCE_DEFAULT, TokenAlgorithm, TokenKey, Verifier, limits};
use serde::{Deserialize, Serialize};

use crate::Tls;

/// Why a configuration is refused: one line that names the key.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{key}: {problem}")]
pub struct ConfigError {
    /// The key, for example `limits.connections`, or the file.
    pub key: String,
    /// What is wrong with it.
    pub problem: String,
}

fn refuse<T>(key: impl Into<String>, problem: impl Into<String>) -> Result<T, ConfigError> {
    Err(ConfigError { key: key.into(), problem: problem.into() })
}

/// What a Shield is told; see the head of this file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Where clients connect.
    #[serde(default = "listen_default")]
    pub listen: String,
    /// Where metrics and health are shown.
    #[serde(default = "admin_default")]
    pub admin: String,
    /// Client addresses of brokers, `host:port`.
    pub servers: Vec<String>,
    /// Accepts addresses that are open to the network without TLS.
    #[serde(default)]
    pub dev: bool,
    /// Who may be a client.
    pub auth: Auth,
    /// Certificates; without them clients and brokers are spoken to without TLS.
    #[serde(default)]
    pub tls: Tls,
    /// What one client, one tenant and all together may use.
    #[serde(default)]
    pub limits: Limits,
}

fn listen_default() -> String {
    "127.0.0.1:7710".to_owned()
}

fn admin_default() -> String {
    "127.0.0.1:7720".to_owned()
}

/// Which tokens are accepted.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Auth {
    /// The audience that a token must name.
    #[serde(default = "audience_default")]
    pub audience: String,
    /// The keys that tokens may be signed with.
    pub keys: Vec<AuthKey>,
}

fn audience_default() -> String {
    AUDIENCE_DEFAULT.to_owned()
}

/// One key that tokens may be signed with.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AuthKey {
    /// Key id; a token that names one is checked with that key only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kid: Option<String>,
    /// `EdDSA` or `RS256`.
    pub algorithm: TokenAlgorithm,
    /// The public key in PEM.
    pub public_key_file: PathBuf,
}

/// Bounds on what clients use. Sizes in bytes, times in milliseconds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Connections at once.
    pub connections: usize,
    /// One message.
    pub message_size: usize,
    /// Time for a handshake, the first frame included.
    pub handshake_ms: u64,
    /// A silent client is pinged after this time and dropped after twice that.
    pub ping_ms: u64,
    /// A client that takes no bytes for this long is dropped.
    pub write_ms: u64,
    /// Time for one request at the Spine, its retries included; a long-poll's wait comes on top.
    pub request_ms: u64,
    /// Requests of one client without an answer.
    pub requests: usize,
    /// Batches received from one client and not yet answered.
    pub receive_size: usize,
    /// Answers to one client that are asked for or not yet sent.
    pub send_size: usize,
    /// Messages a second of one connection: each frame counts one, and each record one more.
    pub connection_rate: u32,
    /// Messages that one connection may send at once after a pause.
    pub connection_burst: u32,
    /// Messages a second of all connections of one tenant.
    pub tenant_rate: u32,
    /// Messages that one tenant may send at once after a pause.
    pub tenant_burst: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: limits::CONNECTION_COUNT_MAX,
            message_size: limits::FRAME_SIZE_MAX,
            handshake_ms: limits::HANDSHAKE_MS_MAX,
            ping_ms: 15_000,
            write_ms: 10_000,
            request_ms: 8_000,
            requests: 256,
            receive_size: 32 << 20,
            send_size: 32 << 20,
            connection_rate: 100_000,
            connection_burst: 100_000,
            tenant_rate: 500_000,
            tenant_burst: 500_000,
        }
    }
}

impl Limits {
    fn check(&self) -> Result<(), ConfigError> {
        let range = |name: &str, value: u64, min: u64, max: u64| {
            if (min..=max).contains(&value) {
                return Ok(());
            }
            refuse(format!("limits.{name}"), format!("{value} is not between {min} and {max}"))
        };
        let hour = 3_600_000;
        range("connections", self.connections as u64, 1, 1_000_000)?;
        range("message_size", self.message_size as u64, 1 << 10, limits::FRAME_SIZE_MAX as u64)?;
        range("handshake_ms", self.handshake_ms, 1, hour)?;
        range("ping_ms", self.ping_ms, 1, hour)?;
        range("write_ms", self.write_ms, 1, hour)?;
        range("request_ms", self.request_ms, 1, hour)?;
        range("requests", self.requests as u64, 1, limits::CONNECTION_REQUEST_COUNT_MAX as u64 / 2)?;
        range("receive_size", self.receive_size as u64, limits::BATCH_SIZE_MAX as u64, 1 << 30)?;
        range("send_size", self.send_size as u64, limits::BATCH_SIZE_MAX as u64, 1 << 30)?;
        range("connection_rate", self.connection_rate.into(), 1, u32::MAX.into())?;
        range("connection_burst", self.connection_burst.into(), 1, u32::MAX.into())?;
        range("tenant_rate", self.tenant_rate.into(), 1, u32::MAX.into())?;
        range("tenant_burst", self.tenant_burst.into(), 1, u32::MAX.into())
    }

    pub(crate) fn handshake(&self) -> Duration {
        Duration::from_millis(self.handshake_ms)
    }

    pub(crate) fn ping(&self) -> Duration {
        Duration::from_millis(self.ping_ms)
    }

    pub(crate) fn write(&self) -> Duration {
        Duration::from_millis(self.write_ms)
    }

    pub(crate) fn request(&self) -> Duration {
        Duration::from_millis(self.request_ms)
    }
}

impl Config {
    /// Reads and checks the file at `path`; relative paths in it start at its folder.
    ///
    /// # Errors
    /// The file cannot be read, is not TOML, has an unknown key or a value that cannot be.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|error| ConfigError {
            key: path.display().to_string(),
            problem: format!("cannot be read: {error}"),
        })?;
        let mut config = Self::parse(&text)?;
        let folder = path.parent().unwrap_or(Path::new(""));
        config.tls = config.tls.below(folder);
        for key in &mut config.auth.keys {
            key.public_key_file = folder.join(&key.public_key_file);
        }
        Ok(config)
    }

    /// Reads and checks TOML text. Paths are left as they are and no file is opened.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        let config: Self = toml::from_str(text).map_err(|error| unreadable(text, &error))?;
        config.check()?;
        Ok(config)
    }

    /// Checks everything that can be checked without opening a file.
    ///
    /// # Errors
    /// The first key that is wrong.
    pub fn check(&self) -> Result<(), ConfigError> {
        let (listen, admin) = self.addresses()?;
        if listen == admin && listen.port() != 0 {
            return refuse("admin", format!("{admin} is used by listen too"));
        }
        if self.servers.is_empty() {
            return refuse("servers", "it names no broker");
        }
        if let Some(server) = self.servers.iter().find(|server| server.contains("://")) {
            return refuse("servers", format!("{server:?} is not the host:port of a broker"));
        }
        arqon_sdk::Client::lazy(self.options("", "")).map_err(|error| ConfigError {
            key: "servers".to_owned(),
            problem: error.to_string().trim_start_matches("servers ").to_owned(),
        })?;
        if self.auth.keys.is_empty() {
            return refuse("auth.keys", "at least one key is needed");
        }
        if self.auth.audience.is_empty() {
            return refuse("auth.audience", "it is empty");
        }
        self.tls.check()?;
        self.limits.check()
    }

    /// The addresses to listen on: clients, admin.
    pub(crate) fn addresses(&self) -> Result<(SocketAddr, SocketAddr), ConfigError> {
        let read = |key: &str, text: &str| {
            let Ok(address) = text.parse::<SocketAddr>() else {
                return refuse(key, format!("{text:?} is not an ip:port"));
            };
            let is_secure = self.tls.is_listening() && key == "listen";
            if !self.dev && !is_secure && !address.ip().is_loopback() {
                let remedy = if key == "listen" { "give tls.certificate_file" } else { "only with dev = true" };
                return refuse(key, format!("{address} is open to the network without TLS; {remedy}"));
            }
            Ok(address)
        };
        Ok((read("listen", &self.listen)?, read("admin", &self.admin)?))
    }

    /// How a session's own client reaches the Spine.
    pub(crate) fn options(&self, token: &str, client: &str) -> arqon_sdk::Options {
        let mut options = arqon_sdk::Options::new(self.servers.iter().cloned(), token);
        options.client_name = format!("arqon-shield ({client})");
        options.request_timeout = self.limits.request();
        options.attempt_timeout = self.limits.request();
        options
    }

    /// The verifier of client tokens, with the keys read from their files.
    ///
    /// # Errors
    /// A file that cannot be read or is not a public key of its algorithm.
    pub(crate) fn verifier(&self) -> Result<Verifier, ConfigError> {
        let mut keys = Vec::with_capacity(self.auth.keys.len());
        for (index, key) in self.auth.keys.iter().enumerate() {
            let problem = |problem: String| ConfigError {
                key: format!("auth.keys[{index}].public_key_file"),
                problem: format!("{}: {problem}", key.public_key_file.display()),
            };
            let public_key_pem = std::fs::read(&key.public_key_file).map_err(|error| problem(error.to_string()))?;
            keys.push(TokenKey { kid: key.kid.clone(), algorithm: key.algorithm, public_key_pem });
        }
        Verifier::from_keys(&keys, &self.auth.audience)
            .map_err(|error| ConfigError { key: "auth.keys".into(), problem: error.to_string() })
    }
}

/// The error of the TOML reader, with the line and key at fault.
fn unreadable(text: &str, error: &toml::de::Error) -> ConfigError {
    let problem = error.message().replace('\n', " ");
    let Some(span) = error.span() else {
        return ConfigError { key: "configuration".into(), problem };
    };
    let start = span.start.min(text.len());
    let number = text.bytes().take(start).filter(|byte| *byte == b'\n').count();
    let line = text.lines().nth(number).unwrap_or_default();
    let name = line.split('=').next().unwrap_or_default().trim();
    ConfigError { key: format!("line {}, {name}", number + 1).trim_end_matches([',', ' ']).to_owned(), problem }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "servers = [\"127.0.0.1:7700\"]\n[auth]\n[[auth.keys]]\nalgorithm = \"EdDSA\"\n\
                        public_key_file = \"k.pem\"\n";

    #[test]
    fn defaults_are_those_of_the_documents() {
        let config = Config::parse(GOOD).unwrap();
        assert_eq!((config.listen.as_str(), config.admin.as_str()), ("127.0.0.1:7710", "127.0.0.1:7720"));
        assert_eq!(config.auth.audience, "arqonbus");
    }

    #[test]
    fn every_error_names_its_key() {
        for (text, key) in [
            (format!("lisden = \"x\"\n{GOOD}"), "line 1, lisden"),
            (format!("listen = \"x\"\n{GOOD}"), "listen"),
            (format!("listen = \"0.0.0.0:1\"\n{GOOD}"), "listen"),
            (format!("admin = \"0.0.0.0:1\"\n{GOOD}"), "admin"),
            (format!("listen = \"127.0.0.1:7720\"\n{GOOD}"), "admin"),
            (GOOD.replace("127.0.0.1:7700", "nowhere"), "servers"),
            (GOOD.replace("127.0.0.1:7700", "ws://a:1"), "servers"),
            (GOOD.replace("[\"127.0.0.1:7700\"]", "[]"), "servers"),
            (GOOD.replace("EdDSA", "HS256"), "line 4, algorithm"),
            (format!("listen = \"0.0.0.0:1\"\n{GOOD}[tls]\nca_file = \"c\""), "listen"),
            (format!("{GOOD}[tls]\ncertificate_file = \"c\""), "tls.key_file"),
            (format!("{GOOD}[tls]\nkey_file = \"k\""), "tls.certificate_file"),
            (format!("{GOOD}[limits]\nconnections = 0"), "limits.connections"),
            (format!("{GOOD}[limits]\ntenant_rate = 0"), "limits.tenant_rate"),
            (format!("{GOOD}[limits]\nnope = 0"), "line 7, nope"),
            ("servers = [".to_owned(), "line 1, servers"),
        ] {
            let error = Config::parse(&text).unwrap_err();
            assert_eq!(error.key, key, "{error}");
            assert!(!error.to_string().contains('\n'));
        }
        assert!(Config::parse(&format!("dev = true\nlisten = \"0.0.0.0:1\"\n{GOOD}")).is_ok());
        let tls = "[tls]\ncertificate_file = \"c\"\nkey_file = \"k\"\n";
        assert!(Config::parse(&format!("listen = \"0.0.0.0:1\"\n{GOOD}{tls}")).is_ok());
        assert_eq!(
            Config::parse(&format!("{GOOD}{tls}")).unwrap().tls.load().err().unwrap().key,
            "tls.certificate_file"
        );
        let config = Config::parse(GOOD).unwrap();
        assert_eq!(config.verifier().unwrap_err().key, "auth.keys[0].public_key_file");
    }
}
