//! Runs the built `arqon`, and clusters of it.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value;

/// `arqon` without anything of the caller's environment that it would read.
pub fn arqon(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_arqon"));
    for name in ["ARQON_SERVER", "ARQONBUS_URL", "ARQON_TOKEN", "ARQONBUS_TOKEN", "ARQON_CONTROL", "RUST_LOG"] {
        command.env_remove(name);
    }
    command.args(args).stdin(Stdio::null());
    command
}

/// Runs with `input` on standard input until the end.
pub fn run(command: &mut Command, input: &[u8]) -> Output {
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_vec();
    // A command that refuses its arguments never reads: the pipe may break.
    let feed = std::thread::spawn(move || drop(stdin.write_all(&input)));
    let output = child.wait_with_output().unwrap();
    feed.join().unwrap();
    output
}

/// Standard output of a run that must succeed.
pub fn succeed(command: &mut Command, input: &[u8]) -> String {
    let output = run(command, input);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {}\n{stderr}", output.status);
    String::from_utf8(output.stdout).unwrap()
}

/// The lines of JSON on standard output of a run that must succeed.
pub fn documents(command: &mut Command, input: &[u8]) -> Vec<Value> {
    succeed(command, input).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// The one-line error of a run that must fail with `code`.
pub fn fail(command: &mut Command, input: &[u8], code: i32) -> String {
    let output = run(command, input);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(code), "{command:?}: {stderr}");
    let lines: Vec<&str> = stderr.lines().filter(|line| line.starts_with("arqon: ")).collect();
    assert_eq!(lines.len(), 1, "{command:?} should print one line of error: {stderr}");
    assert!(!stderr.contains("panicked"), "{command:?}: {stderr}");
    lines[0].to_owned()
}

/// Whoever listens here has the address to itself; no server of these tests is given the port.
const HOST_PORT: u16 = 7699;

/// A loopback address that no other test is given, whatever runs beside this process. Nor do outgoing connections take
/// its ports: they leave from 127.0.0.1.
pub fn own_host() -> Ipv4Addr {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let found = (0..1_000).find_map(|_| {
        // Processes begin at places of their own, between 127.1.0.0 and 127.254.255.255.
        let number = std::process::id().wrapping_mul(64).wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed));
        let [_, high, middle, low] = (number % (254 << 16) + (1 << 16)).to_be_bytes();
        let host = Ipv4Addr::new(127, high, middle, low);
        let held = TcpListener::bind((host, HOST_PORT)).ok()?;
        // For as long as this process lives.
        std::mem::forget(held);
        Some(host)
    });
    found.unwrap()
}

/// Writes the configurations of a new cluster and moves it to an address of its own, so that its ports are free again
/// and again: those of 127.0.0.1 may be another's by the time that a process is started for the second time.
fn prepare(node_count: u32, data: &Path) {
    let mut command = arqon(&["up", "--prepare", "--json", "--nodes", &node_count.to_string(), "--data"]);
    succeed(command.arg(data), b"");
    let host = own_host();
    for entry in fs::read_dir(data).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "toml") {
            let text = fs::read_to_string(&path).unwrap();
            fs::write(&path, text.replace("127.0.0.1:", &format!("{host}:"))).unwrap();
        }
    }
}

/// `arqon up` in a directory; stopped when dropped.
pub struct Cluster {
    child: Child,
    /// What it printed when it was ready.
    pub document: Value,
}

impl Cluster {
    /// Starts `node_count` nodes in `data`, where they may have run before.
    pub fn start(node_count: u32, data: &Path) -> Self {
        if !data.join("node-1.toml").exists() {
            prepare(node_count, data);
        }
        Self::up(node_count, data)
    }

    /// Starts them as a user does, on the default ports when they are free. Once a process has ended its ports may be
    /// another's, so that this is for tests that start nothing again.
    pub fn start_new(node_count: u32, data: &Path) -> Self {
        Self::up(node_count, data)
    }

    fn up(node_count: u32, data: &Path) -> Self {
        let mut command = arqon(&["up", "--json", "--nodes", &node_count.to_string(), "--data"]);
        let mut child = command.arg(data).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let document = serde_json::from_str(&line).unwrap_or_else(|_| panic!("arqon up printed {line:?}"));
        Self { child, document }
    }

    /// `arqon` with this cluster's address and token in its environment.
    pub fn arqon(&self, args: &[&str]) -> Command {
        let mut command = arqon(args);
        command.env("ARQON_SERVER", self.text("server")).env("ARQON_TOKEN", self.text("token"));
        command
    }

    /// A member of the document.
    pub fn text(&self, name: &str) -> String {
        self.document[name].as_str().unwrap().to_owned()
    }

    /// The processes of nodes and Shield.
    pub fn pids(&self) -> Vec<i32> {
        self.document["pids"].as_array().unwrap().iter().map(|pid| pid.as_i64().unwrap() as i32).collect()
    }

    /// Stops with SIGTERM; the exit must be clean.
    pub fn stop(mut self) {
        self.signal(rustix::process::Signal::TERM);
        let status = self.child.wait().unwrap();
        assert!(status.success(), "arqon up ended with {status}");
    }

    /// Kills `arqon up` itself.
    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).unwrap();
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // Already waited for after `stop` and `kill`.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Polls until `condition` holds.
pub fn eventually(what: &str, limit: Duration, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + limit;
    while !condition() {
        assert!(Instant::now() < deadline, "{what} did not happen within {limit:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Whether a process runs (a zombie does not).
pub fn is_running(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z'))
}
