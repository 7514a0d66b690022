//! The configuration of the HTTP shim: one TOML file, checked before anything starts.

use std::{
    collections::BTreeMap,
    fmt,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use arqon_proto::{TOKEN_SIZE_MAX, check_schema, limits, results_topic_of, tls_client, wire};
use reqwest::{
    Url,
    header::{HeaderName, HeaderValue},
};
use serde::Deserialize;

use crate::{ConfigError, Metrics, RunOptions, check_registration};

/// Where the token is looked for when the file names none; the first that is set counts.
pub const TOKEN_VARIABLES: [&str; 2] = ["ARQON_TOKEN", "ARQONBUS_TOKEN"];

const TIMEOUT_MS_MAX: u64 = 3_600_000;
const RETRIES_MAX: u32 = 10;
const HEADER_COUNT_MAX: usize = 32;
/// Headers that the shim itself sets, or that belong to the connection.
const RESERVED_HEADERS: [&str; 8] =
    ["connection", "content-length", "content-type", "expect", "host", "te", "traceparent", "transfer-encoding"];
/// Start of the headers that tell a worker where its job stands.
pub(crate) const JOB_HEADER_PREFIX: &str = "x-arqon-";

/// Text that is never printed.
#[derive(Clone, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct Secret(pub String);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(secret)")
    }
}

/// What the HTTP shim is told; `docs/operators.md` explains every key. Times in milliseconds,
/// sizes in bytes.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HttpShimConfig {
    /// `host:port` of brokers, or `ws://host:port` of Shields; `wss://` with `ca_file`.
    pub servers: Vec<String>,
    /// A file with the CA to trust (PEM): with it brokers are spoken to with TLS.
    pub ca_file: Option<PathBuf>,
    /// The access token.
    pub token: Option<Secret>,
    /// A file with the access token; white space at its ends does not count.
    pub token_file: Option<PathBuf>,
    /// Name of this shim, one of its own for every process.
    pub operator_id: String,
    /// `genesis`, `nvm`, `bowlnet`, `helios`, `qml` or `generic`.
    pub operator_type: String,
    /// Version of the worker, stamped on every result.
    pub version: String,
    /// `cpu`, `gpu`, `fpga`, `audio` or `optical`.
    #[serde(default = "cpu")]
    pub hardware_profile: String,
    /// `prototype`, `staging` or `production`.
    #[serde(default = "staging")]
    pub stage: String,
    /// Free words about what this operator can do.
    #[serde(default)]
    pub capabilities: Vec<String>,
    /// The queue of jobs.
    pub jobs_topic: String,
    /// Where results go; `X.results` for `X.jobs` when absent.
    pub results_topic: Option<String>,
    /// Group of the queue; the operator's type when absent.
    pub group: Option<String>,
    /// Schema of jobs; one that names another fails. `arqonbus.TYPE.job.v1` when absent.
    pub job_schema: Option<String>,
    /// Schema of results; `arqonbus.TYPE.result.v1` when absent.
    pub result_schema: Option<String>,
    /// Where the answer goes in a result; `seed` for genesis and `result` for all others when
    /// absent.
    pub result_field: Option<String>,
    /// Where jobs are posted.
    pub url: String,
    /// Headers for every request.
    #[serde(default)]
    pub headers: BTreeMap<String, Secret>,
    /// Names of event headers that are passed on as HTTP headers.
    #[serde(default)]
    pub pass_headers: Vec<String>,
    /// Time for a worker to answer a job, its whole body included.
    #[serde(default = "timeout_ms")]
    pub timeout_ms: u64,
    /// Largest answer that is taken.
    #[serde(default = "max_response_bytes")]
    pub max_response_bytes: usize,
    /// Further tries to connect before a job goes back to its queue.
    #[serde(default = "retries")]
    pub retries: u32,
    /// For how long a job that went back, because the worker could not be reached, is kept from
    /// everybody.
    #[serde(default = "down_delay_ms")]
    pub down_delay_ms: u32,
    /// Jobs that run at a time.
    #[serde(default = "parallelism")]
    pub parallelism: u32,
    /// Length of a lease.
    #[serde(default = "lease_ms")]
    pub lease_ms: u32,
    /// Time for running jobs to end after the signal to stop.
    #[serde(default = "drain_ms")]
    pub drain_ms: u64,
    /// `ip:port` for `/metrics`, `/healthz` and `/readyz`; none when absent.
    pub admin_listen: Option<String>,
    /// Accepts an `admin_listen` that is open to the network.
    #[serde(default)]
    pub dev: bool,
}

fn cpu() -> String {
    "cpu".to_owned()
}
fn staging() -> String {
    "staging".to_owned()
}
fn timeout_ms() -> u64 {
    10_000
}
fn max_response_bytes() -> usize {
    limits::PAYLOAD_SIZE_MAX
}
fn retries() -> u32 {
    3
}
fn down_delay_ms() -> u32 {
    2_000
}
fn parallelism() -> u32 {
    4
}
fn lease_ms() -> u32 {
    limits::LEASE_MS_DEFAULT
}
fn drain_ms() -> u64 {
    15_000
}

fn refuse<T>(key: impl Into<String>, problem: impl Into<String>) -> Result<T, ConfigError> {
    Err(ConfigError::new(key, problem))
}

impl HttpShimConfig {
    /// Reads and checks the file at `path`; relative files in it start at its folder.
    ///
    /// # Errors
    /// The file cannot be read, is not TOML, has an unknown key or a value that cannot be.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|error| ConfigError::new(path.display().to_string(), format!("cannot be read: {error}")))?;
        let mut config = Self::parse(&text)?;
        let folder = path.parent().unwrap_or(Path::new(""));
        config.token_file = config.token_file.map(|file| folder.join(file));
        config.ca_file = config.ca_file.map(|file| folder.join(file));
        Ok(config)
    }

    /// Reads and checks TOML text. No file is opened.
    ///
    /// # Errors
    /// As [`HttpShimConfig::load`].
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        let config: Self = toml::from_str(text).map_err(|error| toml_error(text, &error))?;
        config.check()?;
        Ok(config)
    }

    /// Checks everything that can be checked without opening a file.
    ///
    /// # Errors
    /// The first key that is wrong.
    pub fn check(&self) -> Result<(), ConfigError> {
        if self.servers.iter().all(|server| server.trim().is_empty()) {
            return refuse("servers", "names no server");
        }
        if self.token.is_some() && self.token_file.is_some() {
            return refuse("token", "give it or token_file, not both");
        }
        for (key, schema) in [("job_schema", &self.job_schema), ("result_schema", &self.result_schema)] {
            check_schema(schema.as_deref().unwrap_or_default())
                .map_err(|error| ConfigError::new(key, format!("{:?}: {}", error.name, error.rule)))?;
        }
        check_registration(&self.registration())?;
        self.options(Metrics::new()).check()?;
        if matches!(self.result_field(), "" | "job_id" | "error") {
            return refuse("result_field", format!("{:?} cannot be used", self.result_field()));
        }
        self.url()?;
        self.static_headers()?;
        self.passed_headers()?;
        in_range("timeout_ms", self.timeout_ms, 1, TIMEOUT_MS_MAX)?;
        in_range("max_response_bytes", self.max_response_bytes as u64, 1, limits::PAYLOAD_SIZE_MAX as u64)?;
        in_range("retries", u64::from(self.retries), 0, u64::from(RETRIES_MAX))?;
        in_range("down_delay_ms", u64::from(self.down_delay_ms), 0, u64::from(limits::NACK_DELAY_MS_MAX))?;
        self.admin_address()?;
        Ok(())
    }

    /// The access token: from the configuration, its file, or the environment.
    ///
    /// # Errors
    /// None given, a file that cannot be read, or text that cannot be a token.
    pub fn token(&self) -> Result<String, ConfigError> {
        let (key, text) = match (&self.token, &self.token_file) {
            (Some(token), _) => ("token", token.0.clone()),
            (None, Some(file)) => {
                let read = std::fs::read_to_string(file);
                let problem = |error| ConfigError::new("token_file", format!("{}: {error}", file.display()));
                ("token_file", read.map_err(problem)?)
            }
            (None, None) => match TOKEN_VARIABLES.iter().find_map(|name| Some((*name, std::env::var(name).ok()?))) {
                Some((name, text)) => (name, text),
                None => return refuse("token", "is missing; give token, token_file or ARQON_TOKEN"),
            },
        };
        let token = text.trim();
        if token.is_empty() || token.len() > TOKEN_SIZE_MAX || !token.bytes().all(|b| b.is_ascii_graphic()) {
            return refuse(key, "is not a token");
        }
        Ok(token.to_owned())
    }

    /// The CA to trust, PEM.
    ///
    /// # Errors
    /// A file that cannot be read or holds no certificate.
    pub fn ca(&self) -> Result<Option<Vec<u8>>, ConfigError> {
        let Some(file) = &self.ca_file else { return Ok(None) };
        let problem = |error: String| ConfigError::new("ca_file", format!("{}: {error}", file.display()));
        let ca = std::fs::read(file).map_err(|error| problem(error.to_string()))?;
        tls_client(&ca, None).map_err(|error| problem(error.reason))?;
        Ok(Some(ca))
    }

    /// What is said about this operator when it registers.
    #[must_use]
    pub fn registration(&self) -> wire::OperatorRegistration {
        wire::OperatorRegistration {
            operator_id: self.operator_id.clone(),
            operator_type: self.operator_type.clone(),
            version: self.version.clone(),
            supported_schemas: vec![self.job_schema(), self.result_schema()],
            resource_limits: None,
            hardware_profile: self.hardware_profile.clone(),
            stage: self.stage.clone(),
            capabilities: self.capabilities.clone(),
        }
    }

    /// How the run loop is to work.
    #[must_use]
    pub fn options(&self, metrics: Metrics) -> RunOptions {
        RunOptions {
            jobs_topic: self.jobs_topic.clone(),
            results_topic: self.results_topic.clone().unwrap_or_else(|| results_topic_of(&self.jobs_topic)),
            group: self.group.clone().unwrap_or_else(|| self.operator_type.clone()),
            result_schema: self.result_schema(),
            parallelism: self.parallelism,
            lease: Duration::from_millis(u64::from(self.lease_ms)),
            drain: Duration::from_millis(self.drain_ms),
            metrics,
        }
    }

    /// Schema of the jobs that are taken; empty: any.
    #[must_use]
    pub fn job_schema(&self) -> String {
        self.job_schema.clone().unwrap_or_else(|| format!("arqonbus.{}.job.v1", self.operator_type))
    }

    /// Schema of results.
    #[must_use]
    pub fn result_schema(&self) -> String {
        self.result_schema.clone().unwrap_or_else(|| format!("arqonbus.{}.result.v1", self.operator_type))
    }

    /// Where the answer goes in a result.
    #[must_use]
    pub fn result_field(&self) -> &str {
        let usual = if self.operator_type == "genesis" { "seed" } else { "result" };
        self.result_field.as_deref().unwrap_or(usual)
    }

    /// Where jobs are posted.
    ///
    /// # Errors
    /// Not an `http` or `https` URL with a host, or one with a user in it.
    pub fn url(&self) -> Result<Url, ConfigError> {
        let url = Url::parse(&self.url).map_err(|error| ConfigError::new("url", format!("{:?}: {error}", self.url)))?;
        if !matches!(url.scheme(), "http" | "https") || url.host_str().is_none() {
            return refuse("url", format!("{:?} is not an http or https address", self.url));
        }
        if !url.username().is_empty() || url.password().is_some() {
            return refuse("url", "has a user in it; use headers.authorization");
        }
        Ok(url)
    }

    /// Where metrics and health are served.
    ///
    /// # Errors
    /// Not an `ip:port`, or open to the network outside dev mode.
    pub fn admin_address(&self) -> Result<Option<SocketAddr>, ConfigError> {
        let Some(text) = &self.admin_listen else { return Ok(None) };
        let Ok(address) = text.parse::<SocketAddr>() else {
            return refuse("admin_listen", format!("{text:?} is not an ip:port"));
        };
        if !self.dev && !address.ip().is_loopback() {
            let problem = format!("{address} is open to the network without TLS; only with dev = true");
            return refuse("admin_listen", problem);
        }
        Ok(Some(address))
    }

    pub(crate) fn static_headers(&self) -> Result<Vec<(HeaderName, HeaderValue)>, ConfigError> {
        if self.headers.len() > HEADER_COUNT_MAX {
            return refuse("headers", format!("has {} names, the limit is {HEADER_COUNT_MAX}", self.headers.len()));
        }
        let mut out = Vec::new();
        for (name, value) in &self.headers {
            let key = format!("headers.{name}");
            let name = header_name(&key, name)?;
            let Ok(mut value) = HeaderValue::from_str(&value.0) else {
                return refuse(key, "its value is not one line of ASCII");
            };
            value.set_sensitive(true);
            out.push((name, value));
        }
        Ok(out)
    }

    /// Names of event headers, and the HTTP headers that they become.
    pub(crate) fn passed_headers(&self) -> Result<Vec<(String, HeaderName)>, ConfigError> {
        if self.pass_headers.len() > HEADER_COUNT_MAX {
            let count = self.pass_headers.len();
            return refuse("pass_headers", format!("has {count} names, the limit is {HEADER_COUNT_MAX}"));
        }
        self.pass_headers
            .iter()
            .map(|name| {
                if self.headers.keys().any(|own| own.eq_ignore_ascii_case(name)) {
                    return refuse("pass_headers", format!("{name:?} is in headers as well"));
                }
                Ok((name.clone(), header_name("pass_headers", name)?))
            })
            .collect()
    }
}

fn in_range(key: &str, value: u64, least: u64, most: u64) -> Result<(), ConfigError> {
    if (least..=most).contains(&value) { Ok(()) } else { refuse(key, format!("is {value}, not {least} to {most}")) }
}

fn header_name(key: &str, name: &str) -> Result<HeaderName, ConfigError> {
    let Ok(parsed) = name.parse::<HeaderName>() else {
        return refuse(key, format!("{name:?} is not the name of an HTTP header"));
    };
    if RESERVED_HEADERS.contains(&parsed.as_str()) || parsed.as_str().starts_with(JOB_HEADER_PREFIX) {
        return refuse(key, format!("{name:?} is set by the shim itself"));
    }
    Ok(parsed)
}

/// One line that names the line and, where there is one, the key at fault.
fn toml_error(text: &str, error: &toml::de::Error) -> ConfigError {
    let problem = error.message().replace('\n', " ");
    let Some(span) = error.span() else { return ConfigError::new("configuration", problem) };
    let before = text.get(..span.start).unwrap_or_default();
    let line_number = before.matches('\n').count() + 1;
    let line = text.lines().nth(line_number - 1).unwrap_or_default();
    let name = line.split_once('=').map_or("", |(name, _)| name).trim();
    let missing = problem.starts_with("missing field");
    if name.is_empty() || missing {
        return ConfigError::new(
            if missing { "configuration".to_owned() } else { format!("line {line_number}") },
            problem,
        );
    }
    ConfigError::new(format!("line {line_number}, {name}"), problem)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEAST: &str = r#"
servers = ["127.0.0.1:7700"]
token = "top-secret"
operator_id = "genesis-distiller-1"
operator_type = "genesis"
version = "1.2.0"
jobs_topic = "genesis.jobs"
url = "http://127.0.0.1:3000/distill"
"#;

    #[test]
    fn the_least_configuration_has_the_documented_defaults() {
        let config = HttpShimConfig::parse(LEAST).unwrap();
        let options = config.options(Metrics::new());
        assert_eq!((options.results_topic.as_str(), options.group.as_str()), ("genesis.results", "genesis"));
        assert_eq!((config.job_schema().as_str(), config.result_field()), ("arqonbus.genesis.job.v1", "seed"));
        assert_eq!((config.timeout_ms, config.parallelism, config.lease_ms), (10_000, 4, 30_000));
        assert_eq!(options.result_schema, "arqonbus.genesis.result.v1");
        assert_eq!(config.token().unwrap(), "top-secret");
        assert_eq!(config.registration().hardware_profile, "cpu");
        let nvm = HttpShimConfig::parse(&LEAST.replace("\"genesis\"", "\"nvm\"")).unwrap();
        assert_eq!(nvm.result_field(), "result");
    }

    #[test]
    fn the_guide_shows_every_key_with_its_default() {
        let guide = include_str!("../../../docs/operators.md");
        let text = guide.split("```toml\n").nth(1).unwrap().split("```").next().unwrap();
        let shown = HttpShimConfig::parse(text).unwrap();
        // The reader's own list of keys.
        let unknown = HttpShimConfig::parse("unknown = 1").unwrap_err().problem;
        let keys: Vec<&str> = unknown.split('`').skip(3).step_by(2).collect();
        assert!(keys.len() > 20, "{unknown}");
        for key in keys.iter().filter(|key| **key != "token") {
            let has = |line: &str| line.starts_with(&format!("{key} = ")) || line.starts_with(&format!("[{key}]"));
            assert!(text.lines().any(has), "{key}");
        }
        // What the guide gives as a default is one.
        let least =
            LEAST.replace("[\"127.0.0.1:7700\"]", "[\"127.0.0.1:7700\", \"127.0.0.1:7800\"]").replace("1.2.0", "1.4.0");
        let mut least = HttpShimConfig::parse(&least).unwrap();
        assert_eq!(format!("{:?}", least.options(Metrics::new())), format!("{:?}", shown.options(Metrics::new())));
        assert_eq!((least.job_schema(), least.result_field()), (shown.job_schema(), shown.result_field()));
        (least.token, least.token_file) = (None, shown.token_file.clone());
        least.ca_file = shown.ca_file.clone();
        (least.results_topic, least.group) = (shown.results_topic.clone(), shown.group.clone());
        (least.job_schema, least.result_schema) = (shown.job_schema.clone(), shown.result_schema.clone());
        (least.result_field, least.headers) = (shown.result_field.clone(), shown.headers.clone());
        (least.pass_headers, least.admin_listen) = (shown.pass_headers.clone(), shown.admin_listen.clone());
        assert_eq!(least, shown);
    }

    #[test]
    fn secrets_are_not_printed() {
        let text = format!("{LEAST}\n[headers]\nauthorization = \"Bearer hidden\"\n");
        let config = HttpShimConfig::parse(&text).unwrap();
        let shown = format!("{config:?} {:?}", config.static_headers().unwrap());
        assert!(!shown.contains("top-secret") && !shown.contains("hidden"), "{shown}");
        assert!(shown.contains("authorization"));
    }

    #[test]
    fn the_token_file_lies_beside_the_configuration() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("shim.toml");
        std::fs::write(folder.path().join("shim.token"), " abc.def \n").unwrap();
        std::fs::write(&path, LEAST.replace("token = \"top-secret\"", "token_file = \"shim.token\"")).unwrap();
        let config = HttpShimConfig::load(&path).unwrap();
        assert_eq!(config.token().unwrap(), "abc.def");
        std::fs::remove_file(folder.path().join("shim.token")).unwrap();
        assert_eq!(config.token().unwrap_err().key, "token_file");
        let missing = HttpShimConfig::load(&folder.path().join("none.toml")).unwrap_err().to_string();
        assert!(missing.contains("none.toml: cannot be read"), "{missing}");
    }

    #[test]
    fn every_refusal_is_one_line_that_names_the_key() {
        let with = |line: &str| format!("{line}\n{LEAST}");
        let cases = [
            (with("paralellism = 4"), "paralellism"),
            (with("parallelism = \"four\""), "parallelism"),
            (with("parallelism = 0"), "parallelism"),
            (with("timeout_ms = 0"), "timeout_ms"),
            (with("timeout_ms = -1"), "timeout_ms"),
            (with("retries = 11"), "retries"),
            (with("lease_ms = 10"), "lease_ms"),
            (with("drain_ms = 600001"), "drain_ms"),
            (with("down_delay_ms = 86400001"), "down_delay_ms"),
            (with("max_response_bytes = 2000000"), "max_response_bytes"),
            (with("results_topic = \"genesis.jobs\""), "results_topic"),
            (with("group = \"\""), "group"),
            (with("job_schema = \"job\""), "job_schema"),
            (with("result_schema = \"a b.v1\""), "result_schema"),
            (with("result_field = \"error\""), "result_field"),
            (with("hardware_profile = \"tpu\""), "hardware_profile"),
            (with("stage = \"dev\""), "stage"),
            (with("token_file = \"x\""), "token"),
            (with("admin_listen = \"7721\""), "admin_listen"),
            (with("admin_listen = \"0.0.0.0:7721\""), "admin_listen"),
            (with("pass_headers = [\"a b\"]"), "pass_headers"),
            (with("pass_headers = [\"Host\"]"), "pass_headers"),
            (with("pass_headers = [\"X-Arqon-Topic\"]"), "pass_headers"),
            (with("headers = { traceparent = \"x\" }"), "headers.traceparent"),
            (with("headers = { a = \"x\\ny\" }"), "headers.a"),
            (with("headers = { a = \"x\" }\npass_headers = [\"A\"]"), "pass_headers"),
            (LEAST.replace("servers = [\"127.0.0.1:7700\"]", "servers = []"), "servers"),
            (LEAST.replace("\"genesis\"", "\"oracle\""), "operator_type"),
            (LEAST.replace("genesis-distiller-1", "a b"), "operator_id"),
            (LEAST.replace("1.2.0", ""), "version"),
            (LEAST.replace("http://", "ftp://"), "url"),
            (LEAST.replace("http://", "http://user:pw@"), "url"),
            (LEAST.replace("http://127.0.0.1:3000/distill", "127.0.0.1:3000"), "url"),
            (LEAST.replace("jobs_topic = \"genesis.jobs\"", ""), "jobs_topic"),
            ("servers = [".to_owned(), "line 1"),
        ];
        for (text, key) in cases {
            let error = HttpShimConfig::parse(&text).unwrap_err().to_string();
            assert!(error.contains(key) && !error.contains('\n'), "{key}: {error}");
            assert!(!error.contains("top-secret"), "{error}");
        }
    }
}
