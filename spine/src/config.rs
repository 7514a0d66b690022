//! The configuration of a node: one TOML file, checked before anything starts.
//!
//! ```toml
//! node = 1                              # this node's number, from 1
//! cluster = "demo"
//! data = "data/node-1"                  # relative paths: from the folder of this file
//! cluster_secret_file = "cluster.secret"
//! threads = 2                           # of the node's runtime; as many as there are cores by default
//! bootstrap = false                     # true: with an empty data directory this node forms a cluster of itself
//!
//! [listen]                              # the defaults; port 0 takes a free one
//! client = "127.0.0.1:7700"
//! peer = "127.0.0.1:7701"
//! control = "127.0.0.1:7705"
//! admin = "127.0.0.1:7720"
//!
//! [[peers]]                             # every node, this one too; none for a single node, with bootstrap = true
//! node = 1
//! client = "127.0.0.1:7700"             # addresses under which others reach it
//! peer = "127.0.0.1:7701"
//! control = "127.0.0.1:7705"
//!
//! [auth]
//! audience = "arqonbus"
//! [[auth.keys]]
//! algorithm = "EdDSA"
//! public_key_file = "token.pub.pem"
//!
//! [storage]                             # the defaults
//! backend = "auto"                      # io_uring where it is allowed; "uring", "plain"
//! reserve_bytes = 536870912             # with less free on the disk no new data is taken
//! reserve_percent_max = 5               # ... but the reserve is this share of a smaller disk
//! scrub_bytes_per_second = 4194304      # read to find damage; 0 for none
//!
//! [tls]                                 # optional: TLS on the client, peer and control ports
//! certificate_file = "node.pem"
//! key_file = "node.key.pem"
//! ca_file = "ca.pem"
//! ```

use std::{
    collections::HashSet,
    fmt,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
};

use arqon_proto::{AUDIENCE_DEFAULT, NodeId, TokenAlgorithm, TokenKey, Verifier, check_tenant, limits, planted, wire};
use arqon_storage::Options;
use serde::{Deserialize, Serialize};

use crate::tls::Tls;

/// Shortest cluster secret, in bytes.
pub const CLUSTER_SECRET_SIZE_MIN: usize = 32;
/// Threads of a node's runtime.
const THREAD_COUNT_MAX: usize = 1_024;
/// Nodes of one cluster.
const NODE_COUNT_MAX: usize = 31;
/// The secret of a node in dev mode that names none. Refused otherwise.
const DEV_SECRET: &str = "arqonbus-dev-cluster-secret-that-anybody-knows";

/// Why a configuration is refused: one line that names the key.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{key}: {problem}")]
pub struct ConfigError {
    /// The key, for example `listen.client`, or the file.
    pub key: String,
    /// What is wrong with it.
    pub problem: String,
}

fn refuse<T>(key: impl Into<String>, problem: impl Into<String>) -> Result<T, ConfigError> {
    Err(ConfigError { key: key.into(), problem: problem.into() })
}

/// Text that is never printed.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Secret(pub String);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(secret)")
    }
}

/// What a node is told; see the head of this file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Number of this node, from 1.
    pub node: u64,
    /// Name of the cluster; a data directory belongs to one cluster for good.
    pub cluster: String,
    /// The data directory.
    pub data: PathBuf,
    /// Accepts a missing or known cluster secret, and addresses that are open to the network
    /// without TLS.
    #[serde(default)]
    pub dev: bool,
    /// Lets this node, when its data directory is empty, form a cluster of itself alone. Without it such a
    /// node does not start: it may be one of a cluster that has lost its disk.
    #[serde(default)]
    pub bootstrap: bool,
    /// Version of the program that starts the node, as the cluster's status and the metrics tell it. Not in the file.
    #[serde(skip)]
    pub program: String,
    /// Threads that serve sockets and groups, for the program that starts the node; one for each
    /// core when it is missing. Fewer are cheaper where nodes share a machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub threads: Option<usize>,
    /// What nodes prove to each other that they hold, at least 32 bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cluster_secret: Option<Secret>,
    /// A file with the cluster secret; white space at its ends does not count.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cluster_secret_file: Option<PathBuf>,
    /// Where this node listens.
    #[serde(default)]
    pub listen: Listen,
    /// Who may be a client.
    pub auth: Auth,
    /// Certificates; without them the ports speak plain TCP.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<Tls>,
    /// How the log is written.
    #[serde(default)]
    pub storage: Storage,
    /// What is logged; set up by the program that starts the node.
    #[serde(default)]
    pub log: Log,
    /// Every node of the cluster, this one included; empty for a single node.
    #[serde(default)]
    pub peers: Vec<Peer>,
}

/// Addresses to listen on. Port 0 takes a free port.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Listen {
    /// Frames of clients.
    pub client: String,
    /// Other nodes.
    pub peer: String,
    /// The gRPC control plane.
    pub control: String,
    /// Metrics and health over HTTP.
    pub admin: String,
}

impl Default for Listen {
    fn default() -> Self {
        let on = |port| SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port).to_string();
        Self { client: on(7700), peer: on(7701), control: on(7705), admin: on(7720) }
    }
}

/// How one node is reached, as `host:port`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Peer {
    /// Its number.
    pub node: u64,
    /// Its peer port.
    pub peer: String,
    /// Its client port.
    pub client: String,
    /// Its control port.
    pub control: String,
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

/// How the log is written, and what is left of the disk.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Storage {
    /// `auto`, `uring` or `plain`.
    pub backend: Backend,
    /// With fewer bytes free on the disk the node takes no new data, at least 64 MiB.
    pub reserve_bytes: u64,
    /// The reserve is this share of the disk at most, in percent of its size, from 1 to 100.
    pub reserve_percent_max: u64,
    /// Bytes per second that are read to find damage, of all logs together; 0 for none.
    pub scrub_bytes_per_second: u64,
}

impl Default for Storage {
    fn default() -> Self {
        Self {
            backend: Backend::default(),
            reserve_bytes: limits::DISK_RESERVE_SIZE_MAX,
            reserve_percent_max: limits::DISK_RESERVE_PERCENT_MAX,
            scrub_bytes_per_second: limits::SCRUB_RATE_MAX,
        }
    }
}

impl Storage {
    /// What the store is told.
    #[must_use]
    pub fn options(&self) -> Options {
        let mut options = Options {
            backend: match self.backend {
                Backend::Auto => arqon_storage::Backend::Auto,
                Backend::Uring => arqon_storage::Backend::Uring,
                Backend::Plain => arqon_storage::Backend::Plain,
            },
            reserve_size_max: self.reserve_bytes,
            reserve_percent_max: self.reserve_percent_max,
            scrub_rate_max: self.scrub_bytes_per_second,
            ..Options::default()
        };
        if let Some(size) = planted::segment_size() {
            (options.segment_size_first, options.segment_size_max) = (size, size);
        }
        options
    }
}

/// The way to the disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Backend {
    /// io_uring where it is allowed.
    #[default]
    Auto,
    /// io_uring, or the node does not start.
    Uring,
    /// pwrite and fdatasync.
    Plain,
}

/// What is logged.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Log {
    /// `error`, `warn`, `info`, `debug` or `trace`.
    pub level: String,
    /// One JSON document a line.
    pub json: bool,
}

impl Default for Log {
    fn default() -> Self {
        Self { level: "info".to_owned(), json: false }
    }
}

/// The listen addresses of a checked configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ListenAddresses {
    /// Frames of clients.
    pub client: SocketAddr,
    /// Other nodes.
    pub peer: SocketAddr,
    /// The gRPC control plane.
    pub control: SocketAddr,
    /// Metrics and health over HTTP.
    pub admin: SocketAddr,
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
        config.data = folder.join(&config.data);
        config.cluster_secret_file = config.cluster_secret_file.map(|file| folder.join(file));
        config.tls = config.tls.map(|tls| tls.below(folder));
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
        let config: Self = toml::from_str(text).map_err(|error| toml_error(text, &error))?;
        config.check()?;
        Ok(config)
    }

    /// The configuration as TOML, without its secret: for the log.
    #[must_use]
    pub fn redacted(&self) -> String {
        let mut shown = self.clone();
        if shown.cluster_secret.is_some() {
            shown.cluster_secret = Some(Secret("(secret)".to_owned()));
        }
        toml::to_string(&shown).unwrap_or_else(|_| format!("{shown:?}"))
    }

    /// Checks everything that can be checked without opening a file.
    ///
    /// # Errors
    /// The first key that is wrong.
    pub fn check(&self) -> Result<(), ConfigError> {
        if self.node == 0 {
            return refuse("node", "nodes are numbered from 1");
        }
        if let Err(error) = check_tenant("cluster", &self.cluster) {
            return refuse("cluster", format!("{:?} is not valid: {}", error.name, error.rule));
        }
        if self.data.as_os_str().is_empty() {
            return refuse("data", "it is empty");
        }
        if self.threads.is_some_and(|threads| !(1..=THREAD_COUNT_MAX).contains(&threads)) {
            return refuse("threads", format!("it must be from 1 to {THREAD_COUNT_MAX}"));
        }
        self.check_storage()?;
        self.listen_addresses()?;
        self.check_peers()?;
        self.check_secret_keys()?;
        if self.auth.keys.is_empty() {
            return refuse("auth.keys", "at least one key is needed");
        }
        if self.auth.audience.is_empty() {
            return refuse("auth.audience", "it is empty");
        }
        if !["error", "warn", "info", "debug", "trace"].contains(&self.log.level.as_str()) {
            return refuse("log.level", format!("{:?} is none of error, warn, info, debug, trace", self.log.level));
        }
        Ok(())
    }

    /// The addresses to listen on.
    ///
    /// # Errors
    /// One that is no `ip:port`, is used twice, or is open to the network without TLS outside
    /// dev mode.
    pub fn listen_addresses(&self) -> Result<ListenAddresses, ConfigError> {
        let mut seen = HashSet::new();
        let mut read = |key: &str, text: &str| {
            let is_secure = self.tls.is_some() && key != "admin";
            let remedy = if key == "admin" { "only with dev = true" } else { "give [tls]" };
            let key = format!("listen.{key}");
            let Ok(address) = text.parse::<SocketAddr>() else {
                return refuse(key, format!("{text:?} is not an ip:port"));
            };
            if !self.dev && !is_secure && !address.ip().is_loopback() {
                return refuse(key, format!("{address} is open to the network without TLS; {remedy}"));
            }
            if address.port() != 0 && !seen.insert(address) {
                return refuse(key, format!("{address} is used twice"));
            }
            Ok(address)
        };
        Ok(ListenAddresses {
            client: read("client", &self.listen.client)?,
            peer: read("peer", &self.listen.peer)?,
            control: read("control", &self.listen.control)?,
            admin: read("admin", &self.listen.admin)?,
        })
    }

    fn check_storage(&self) -> Result<(), ConfigError> {
        let Storage { reserve_bytes, reserve_percent_max, .. } = self.storage;
        if reserve_bytes < limits::RESERVE_SIZE_MIN {
            let least = limits::RESERVE_SIZE_MIN;
            let problem = format!("{reserve_bytes} is less than {least}, which requests on their way may take");
            return refuse("storage.reserve_bytes", problem);
        }
        if !(1..=100).contains(&reserve_percent_max) {
            let problem = format!("{reserve_percent_max} is no share of the disk from 1 to 100");
            return refuse("storage.reserve_percent_max", problem);
        }
        Ok(())
    }

    fn check_peers(&self) -> Result<(), ConfigError> {
        if self.peers.len() > NODE_COUNT_MAX {
            return refuse("peers", format!("there are {}, the limit is {NODE_COUNT_MAX}", self.peers.len()));
        }
        let (mut nodes, mut addresses) = (HashSet::new(), HashSet::new());
        for (index, peer) in self.peers.iter().enumerate() {
            if peer.node == 0 || !nodes.insert(peer.node) {
                return refuse(format!("peers[{index}].node"), format!("{} is 0 or used twice", peer.node));
            }
            for (name, address) in [("peer", &peer.peer), ("client", &peer.client), ("control", &peer.control)] {
                let key = format!("peers[{index}].{name}");
                let port = address
                    .rsplit_once(':')
                    .filter(|(host, _)| !host.is_empty())
                    .and_then(|(_, p)| p.parse::<u16>().ok());
                if port.is_none_or(|port| port == 0) {
                    return refuse(key, format!("{address:?} is not a host:port"));
                }
                if !addresses.insert(address) {
                    return refuse(key, format!("{address} is used twice"));
                }
            }
        }
        if !self.peers.is_empty() && !nodes.contains(&self.node) {
            return refuse("peers", format!("this node, {}, is not among them", self.node));
        }
        if self.bootstrap && nodes.iter().any(|node| *node != self.node) {
            let problem = "peers names other nodes, and a cluster of several is formed when all are up: leave it out";
            return refuse("bootstrap", problem);
        }
        Ok(())
    }

    fn check_secret_keys(&self) -> Result<(), ConfigError> {
        match (&self.cluster_secret, &self.cluster_secret_file) {
            (Some(_), Some(_)) => refuse("cluster_secret", "give it or cluster_secret_file, not both"),
            (Some(secret), None) => self.check_secret("cluster_secret", &secret.0),
            (None, None) if !self.dev => refuse("cluster_secret", "it is missing; so is cluster_secret_file"),
            _ => Ok(()),
        }
    }

    fn check_secret(&self, key: &str, secret: &str) -> Result<(), ConfigError> {
        if self.dev && !secret.is_empty() {
            return Ok(());
        }
        if secret.len() < CLUSTER_SECRET_SIZE_MIN {
            return refuse(
                key,
                format!("it has {} bytes, at least {CLUSTER_SECRET_SIZE_MIN} are needed", secret.len()),
            );
        }
        let repeated = secret.bytes().collect::<HashSet<u8>>().len() < 8;
        if secret == DEV_SECRET || repeated {
            return refuse(key, "it can be guessed");
        }
        Ok(())
    }

    /// The cluster secret, from the file if that is where it is.
    ///
    /// # Errors
    /// The file cannot be read, or its secret is too short or known.
    pub fn secret(&self) -> Result<Vec<u8>, ConfigError> {
        let key = "cluster_secret_file";
        let text = match (&self.cluster_secret, &self.cluster_secret_file) {
            (Some(secret), _) => return Ok(secret.0.clone().into_bytes()),
            (None, None) => return Ok(DEV_SECRET.into()),
            (None, Some(file)) => std::fs::read_to_string(file)
                .map_err(|error| ConfigError { key: key.into(), problem: format!("{}: {error}", file.display()) })?,
        };
        self.check_secret(key, text.trim())?;
        Ok(text.trim().into())
    }

    /// The verifier of client tokens, with the keys read from their files.
    ///
    /// # Errors
    /// A file that cannot be read or is not a public key of its algorithm.
    pub fn verifier(&self) -> Result<Verifier, ConfigError> {
        let mut keys = Vec::with_capacity(self.auth.keys.len());
        for (index, key) in self.auth.keys.iter().enumerate() {
            let problem = |problem: String| ConfigError {
                key: format!("auth.keys[{index}].public_key_file"),
                problem: format!("{}: {problem}", key.public_key_file.display()),
            };
            let public_key_pem = std::fs::read(&key.public_key_file).map_err(|error| problem(error.to_string()))?;
            let key = TokenKey { kid: key.kid.clone(), algorithm: key.algorithm, public_key_pem };
            // Each alone first, so that the error names its file.
            Verifier::from_keys(std::slice::from_ref(&key), &self.auth.audience)
                .map_err(|error| problem(error.to_string().replace("token key 0 ", "it ")))?;
            keys.push(key);
        }
        Verifier::from_keys(&keys, &self.auth.audience)
            .map_err(|error| ConfigError { key: "auth.keys".into(), problem: error.to_string() })
    }

    /// All nodes, this one with the addresses `own` when `peers` does not name it.
    #[must_use]
    pub fn nodes(&self, own: &ListenAddresses) -> Vec<wire::NodeInfo> {
        if self.peers.is_empty() {
            return vec![wire::NodeInfo {
                node: self.node,
                client_address: own.client.to_string(),
                peer_address: own.peer.to_string(),
                control_address: own.control.to_string(),
                ..Default::default()
            }];
        }
        let mut nodes: Vec<_> = self.peers.iter().map(Peer::to_info).collect();
        nodes.sort_by_key(|info| info.node);
        nodes
    }

    /// This node's number.
    #[must_use]
    pub fn node_id(&self) -> NodeId {
        NodeId(self.node)
    }
}

impl Peer {
    fn to_info(&self) -> wire::NodeInfo {
        wire::NodeInfo {
            node: self.node,
            client_address: self.client.clone(),
            peer_address: self.peer.clone(),
            control_address: self.control.clone(),
            ..Default::default()
        }
    }
}

// One line: the key on the line at fault, never its value, which may be a secret.
fn toml_error(text: &str, error: &toml::de::Error) -> ConfigError {
    let problem = error.message().replace('\n', " ");
    let Some(span) = error.span() else {
        return ConfigError { key: "configuration".into(), problem };
    };
    let before = text.get(..span.start).unwrap_or_default();
    let line_number = before.matches('\n').count() + 1;
    let line = text.lines().nth(line_number - 1).unwrap_or_default();
    let name = line.split('=').next().unwrap_or_default().trim();
    let key = if name.is_empty() { format!("line {line_number}") } else { format!("line {line_number}, {name}") };
    ConfigError { key, problem }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
node = 1
cluster = "demo"
data = "d"
cluster_secret = "0123456789abcdef0123456789abcdef"
[auth]
[[auth.keys]]
algorithm = "EdDSA"
public_key_file = "k.pem"
"#;

    #[test]
    fn the_least_configuration_has_the_documented_defaults() {
        let config = Config::parse(GOOD).unwrap();
        let addresses = config.listen_addresses().unwrap();
        assert_eq!(addresses.client.to_string(), "127.0.0.1:7700");
        assert_eq!(addresses.admin.to_string(), "127.0.0.1:7720");
        assert_eq!(config.auth.audience, "arqonbus");
        assert_eq!(config.nodes(&addresses).len(), 1);
        assert_eq!(Config::parse(&toml::to_string(&config).unwrap()).unwrap(), config);
        assert!(!config.redacted().contains("0123456789"), "{}", config.redacted());
        assert!(!format!("{config:?}").contains("0123456789"));
    }

    #[test]
    fn every_refusal_is_one_line_that_names_the_key() {
        let peers = |rest: &str| format!("{GOOD}\n[[peers]]\nnode = 2\npeer = \"a:1\"\nclient = \"a:2\"\n{rest}");
        let cases = [
            (GOOD.replace("node = 1", "node = 0"), "node: "),
            (GOOD.replace("node = 1", "node = \"x\""), "line 2, node: "),
            (GOOD.replace("node = 1", "node = 1\nthreads = 0"), "threads: "),
            (GOOD.replace("node = 1", "node = 1\nnoode = 2"), "noode"),
            (GOOD.replace("\"demo\"", "\"a b\""), "cluster: "),
            (GOOD.replace("data = \"d\"", "data = \"\""), "data: "),
            (GOOD.replace("data = \"d\"", ""), "data"),
            (GOOD.replace("0123456789abcdef0123456789abcdef", "short"), "cluster_secret: it has 5 bytes"),
            (GOOD.replace("0123456789abcdef0123456789abcdef", &"a".repeat(40)), "cluster_secret: "),
            (GOOD.replace("0123456789abcdef0123456789abcdef", DEV_SECRET), "cluster_secret: "),
            (GOOD.replace("EdDSA", "HS256"), "algorithm"),
            (format!("{GOOD}[listen]\nclient = \"0.0.0.0:7700\"\n"), "listen.client: 0.0.0.0:7700"),
            (format!("{GOOD}[listen]\nclient = \"localhost\"\n"), "listen.client: "),
            (format!("{GOOD}[listen]\nclient = \"127.0.0.1:7705\"\n"), "listen.control: 127.0.0.1:7705 is used twice"),
            (format!("{GOOD}[log]\nlevel = \"loud\"\n"), "log.level: "),
            (format!("{GOOD}[storage]\nbackend = \"fast\"\n"), "backend"),
            (format!("{GOOD}[storage]\nreserve_bytes = 1000\n"), "storage.reserve_bytes: 1000 is less"),
            (format!("{GOOD}[storage]\nreserve_bytes = -1\n"), "reserve_bytes"),
            (format!("{GOOD}[storage]\nreserve_percent_max = 0\n"), "storage.reserve_percent_max: 0"),
            (format!("{GOOD}[storage]\nreserve_percent_max = 101\n"), "storage.reserve_percent_max: 101"),
            (format!("{GOOD}[storage]\nscrub_bytes_per_second = \"fast\"\n"), "scrub_bytes_per_second"),
            (peers("control = \"a:3\""), "peers: this node, 1"),
            (
                peers("control = \"a:3\"\n[[peers]]\nnode = 1\npeer = \"a:4\"\nclient = \"a:5\"\ncontrol = \"a:6\"")
                    .replace("node = 1\ncluster", "node = 1\nbootstrap = true\ncluster"),
                "bootstrap: peers names other nodes",
            ),
            (peers("control = \"a\""), "peers[0].control: "),
            (peers("control = \"a:2\""), "peers[0].control: a:2 is used twice"),
            (format!("{GOOD}]"), "line 10"),
        ];
        for (text, expected) in cases {
            let error = Config::parse(&text).expect_err(expected).to_string();
            assert!(error.contains(expected), "{error} should name {expected}");
            assert!(!error.contains('\n'), "{error}");
            assert!(!error.contains("0123456789"), "{error}");
        }
    }

    #[test]
    fn dev_mode_and_only_dev_mode_opens_up() {
        let open = format!("{}[listen]\nclient = \"0.0.0.0:0\"\n", GOOD.replace("node = 1", "node = 1\ndev = true"));
        let open = open.replace("cluster_secret = \"0123456789abcdef0123456789abcdef\"", "");
        assert_eq!(Config::parse(&open).unwrap().secret().unwrap(), DEV_SECRET.as_bytes());
        assert!(Config::parse(&open.replace("dev = true", "")).is_err());
    }

    #[test]
    fn tls_opens_every_port_but_admin() {
        let tls = "[tls]\ncertificate_file = \"c\"\nkey_file = \"k\"\nca_file = \"ca\"\n";
        let open = "[listen]\nclient = \"0.0.0.0:1\"\npeer = \"0.0.0.0:2\"\ncontrol = \"0.0.0.0:3\"\n";
        Config::parse(&format!("{GOOD}{open}{tls}")).unwrap();
        let error = Config::parse(&format!("{GOOD}{open}")).unwrap_err().to_string();
        assert_eq!(error, "listen.client: 0.0.0.0:1 is open to the network without TLS; give [tls]");
        let error = Config::parse(&format!("{GOOD}{open}admin = \"0.0.0.0:4\"\n{tls}")).unwrap_err();
        assert_eq!(error.key, "listen.admin");
    }

    #[test]
    fn certificates_are_named_when_they_cannot_be_used() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
        let tls = "[tls]\ncertificate_file = \"c.pem\"\nkey_file = \"k.pem\"\nca_file = \"ca.pem\"\n";
        write("node.toml", &format!("{GOOD}{tls}"));
        let tls = Config::load(&folder.path().join("node.toml")).unwrap().tls.unwrap();
        let refused = || tls.load().err().map(|error| error.to_string()).unwrap_or_default();
        let names = |key: &str, file: &str| {
            let path = folder.path().join(file);
            assert!(refused().starts_with(&format!("{key}: {}: ", path.display())), "{}", refused());
        };
        let (own, other) = (rcgen::KeyPair::generate().unwrap(), rcgen::KeyPair::generate().unwrap());
        let certificate = rcgen::CertificateParams::new(vec!["a".to_owned()]).unwrap().self_signed(&own).unwrap();
        names("tls.certificate_file", "c.pem");
        write("c.pem", &certificate.pem());
        names("tls.key_file", "k.pem");
        write("k.pem", "no key");
        names("tls.ca_file", "ca.pem");
        write("ca.pem", "no certificate");
        names("tls.key_file", "k.pem");
        write("k.pem", &other.serialize_pem());
        names("tls.certificate_file", "c.pem");
        write("k.pem", &own.serialize_pem());
        names("tls.ca_file", "ca.pem");
        write("ca.pem", &certificate.pem());
        assert_eq!(refused(), "");
    }

    #[test]
    fn files_are_named_when_they_cannot_be_used() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("node.toml");
        std::fs::write(
            &path,
            GOOD.replace("cluster_secret = \"0123456789abcdef0123456789abcdef\"", "cluster_secret_file = \"s\""),
        )
        .unwrap();
        let config = Config::load(&path).unwrap();
        assert_eq!(config.data, folder.path().join("d"));
        assert!(config.secret().unwrap_err().to_string().starts_with("cluster_secret_file: "));
        std::fs::write(folder.path().join("s"), "short\n").unwrap();
        assert!(config.secret().unwrap_err().to_string().contains("it has 5 bytes"));
        std::fs::write(folder.path().join("s"), "0123456789abcdef0123456789abcdef\n").unwrap();
        assert_eq!(config.secret().unwrap().len(), 32);
        assert!(config.verifier().unwrap_err().to_string().starts_with("auth.keys[0].public_key_file: "));
        std::fs::write(folder.path().join("k.pem"), "hello").unwrap();
        assert!(config.verifier().unwrap_err().to_string().contains("is not a public key for EdDSA"));
        let pair = arqon_proto::TokenKeyPair::generate().unwrap();
        std::fs::write(folder.path().join("k.pem"), pair.public_key_pem).unwrap();
        config.verifier().unwrap();
        assert!(Config::load(&folder.path().join("none.toml")).unwrap_err().to_string().contains("none.toml"));
    }
}
