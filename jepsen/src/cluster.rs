//! A local cluster of real `arqon node` processes, each of which can be killed and started
//! again.
//!
//! `arqon up --prepare` writes the configurations and the token; the processes are started
//! here, so that they are this program's own children. They die with it: by drop, and by the
//! kernel's parent-death signal should it be killed itself (`--parent-pid`; the kernel watches
//! the spawning thread, so nodes are started from threads that last).

use std::{
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use arqon_proto::wire::{self, control_client::ControlClient};
use serde::Deserialize;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::TcpStream,
    process::{Child, Command},
    sync::oneshot,
    time::{Instant, sleep, timeout, timeout_at},
};
use tonic::transport::Endpoint;

/// Time for a node to become ready after it was started.
const READY_SECONDS_MAX: u64 = 60;
/// Time for one call of the control plane.
const CONTROL_SECONDS_MAX: u64 = 20;
/// Time for killed nodes to be gone.
const GONE_TIME_MAX: Duration = Duration::from_secs(5);
/// The number of the signal, as `kill -9` has it.
const SIGKILL: i32 = 9;
/// Tries to start a cluster, should another program take a port in between.
const START_COUNT_MAX: usize = 3;

/// Why a cluster or one of its nodes does not run: one line.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Error(String);

fn refuse<T>(text: impl Into<String>) -> Result<T, Error> {
    Err(Error(text.into()))
}

/// What `arqon up --json` prints.
#[derive(Debug, Deserialize)]
struct Prepared {
    server: String,
    token: String,
}

/// The part of a node's configuration that is needed here.
#[derive(Debug, Deserialize)]
struct NodeConfig {
    node: u64,
    listen: Listen,
}

#[derive(Debug, Deserialize)]
struct Listen {
    control: String,
    admin: String,
}

/// One node.
struct Node {
    number: u64,
    config: PathBuf,
    log: PathBuf,
    control: String,
    admin: String,
    child: Option<Child>,
    ready: bool,
}

/// Node processes on this machine, with their data in one directory.
pub struct Cluster {
    arqon: PathBuf,
    server: String,
    token: String,
    nodes: Vec<Node>,
}

/// The `arqon` program: `given`, else the one beside this executable, else built by cargo.
///
/// # Errors
/// There is none and it cannot be built.
pub async fn find_arqon(given: Option<PathBuf>) -> Result<PathBuf, Error> {
    if let Some(path) = given {
        return if path.is_file() { Ok(path) } else { refuse(format!("--arqon {}: no such file", path.display())) };
    }
    let own = std::env::current_exe().map_err(|error| Error(format!("cannot tell where this program is: {error}")))?;
    // Test executables stand one folder deeper.
    let folders = own.ancestors().skip(1).take(2);
    let beside: Vec<PathBuf> = folders.map(|folder| folder.join("arqon")).collect();
    if let Some(path) = beside.iter().find(|path| path.is_file()) {
        return Ok(path.clone());
    }
    eprintln!("no arqon beside {}; building it: cargo build --release -p arqon-cli", own.display());
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let built = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args(["build", "--release", "-p", "arqon-cli"])
        .current_dir(root)
        .stdout(Stdio::null())
        .status()
        .await;
    match built {
        Ok(status) if status.success() => {}
        Ok(status) => return refuse(format!("cargo build --release -p arqon-cli ended with {status}")),
        Err(error) => {
            return refuse(format!("cannot run cargo to build arqon: {error}; name the program with --arqon"));
        }
    }
    match beside.iter().find(|path| path.is_file()) {
        Some(path) => Ok(path.clone()),
        None => refuse("arqon was built but is not beside this program; name it with --arqon"),
    }
}

impl Cluster {
    /// Prepares `node_count` nodes in `dir`, starts them and waits until all are ready.
    ///
    /// # Errors
    /// The line that names what failed: the program, its configurations or a node.
    pub async fn start(arqon: PathBuf, dir: &Path, node_count: u32) -> Result<Self, Error> {
        let mut last = None;
        for attempt in 0..START_COUNT_MAX {
            let dir = dir.join(format!("cluster-{attempt}"));
            let mut cluster = Self::prepare(arqon.clone(), &dir, node_count).await?;
            match cluster.start_all().await {
                Ok(()) => return Ok(cluster),
                // A port taken by another program since the preparation: choose anew.
                Err(error) if error.0.contains("in use") => last = Some(error),
                Err(error) => return Err(error),
            }
        }
        Err(last.unwrap_or_else(|| Error("the cluster was never tried".into())))
    }

    async fn prepare(arqon: PathBuf, dir: &Path, node_count: u32) -> Result<Self, Error> {
        std::fs::create_dir_all(dir).map_err(|error| Error(format!("cannot make {}: {error}", dir.display())))?;
        let mut command = Command::new(&arqon);
        command.arg("up").args(["--nodes", &node_count.to_string(), "--prepare", "--json", "--data"]).arg(dir);
        command.kill_on_drop(true);
        let run = timeout(Duration::from_secs(READY_SECONDS_MAX), command.output()).await;
        let Ok(run) = run else {
            return refuse(format!("{} up --prepare did not end; it must write the files and exit", arqon.display()));
        };
        let output = run.map_err(|error| Error(format!("cannot run {}: {error}", arqon.display())))?;
        if !output.status.success() {
            let reason = String::from_utf8_lossy(&output.stderr);
            let reason = reason.lines().find(|line| !line.trim().is_empty()).unwrap_or("it says nothing");
            return refuse(format!("{} up --prepare failed ({}): {reason}", arqon.display(), output.status));
        }
        let prepared: Prepared = serde_json::from_slice(&output.stdout)
            .map_err(|error| Error(format!("{} up --prepare --json printed no such line: {error}", arqon.display())))?;
        let nodes = (1..=node_count).map(|number| read_node(dir, number)).collect::<Result<_, _>>()?;
        Ok(Self { arqon, server: prepared.server, token: prepared.token, nodes })
    }

    async fn start_all(&mut self) -> Result<(), Error> {
        let mut lines = Vec::new();
        for index in 0..self.nodes.len() {
            lines.push(self.launch(index)?);
        }
        for (index, line) in lines.into_iter().enumerate() {
            self.wait_ready(index, line).await?;
        }
        Ok(())
    }

    /// Client addresses of all nodes, divided by commas.
    #[must_use]
    pub fn server(&self) -> &str {
        &self.server
    }

    /// A token that may do everything in its tenant.
    #[must_use]
    pub fn token(&self) -> &str {
        &self.token
    }

    /// Numbers of the nodes.
    #[must_use]
    pub fn nodes(&self) -> Vec<u64> {
        self.nodes.iter().map(|node| node.number).collect()
    }

    /// Process ids of the nodes that run.
    #[must_use]
    pub fn pids(&self) -> Vec<u32> {
        self.nodes.iter().filter_map(|node| node.child.as_ref().and_then(Child::id)).collect()
    }

    /// Whether every node runs and has been ready.
    #[must_use]
    pub fn is_up(&self) -> bool {
        self.nodes.iter().all(|node| node.ready)
    }

    /// Sends SIGKILL to a node and waits for its end. Whether that signal is what ended it.
    ///
    /// # Errors
    /// The node does not run, or the system refuses.
    pub async fn kill(&mut self, number: u64) -> Result<bool, Error> {
        let index = self.index(number)?;
        let Some(mut child) = self.nodes[index].child.take() else {
            return refuse(format!("node {number} does not run"));
        };
        self.nodes[index].ready = false;
        child.start_kill().map_err(|error| Error(format!("cannot kill node {number}: {error}")))?;
        let status = child.wait().await.map_err(|error| Error(format!("cannot wait for node {number}: {error}")))?;
        Ok(status.signal() == Some(SIGKILL))
    }

    /// Starts a node again and waits until it is ready.
    ///
    /// # Errors
    /// It ends at once, or is not ready in time; its last log line is quoted.
    pub async fn restart(&mut self, number: u64) -> Result<(), Error> {
        let index = self.index(number)?;
        let line = self.launch(index)?;
        self.wait_ready(index, line).await
    }

    fn index(&self, number: u64) -> Result<usize, Error> {
        let found = self.nodes.iter().position(|node| node.number == number);
        found.ok_or_else(|| Error(format!("node {number} does not exist")))
    }

    /// Starts the process; the receiver gets the line that it prints when it listens.
    fn launch(&mut self, index: usize) -> Result<oneshot::Receiver<String>, Error> {
        let node = &mut self.nodes[index];
        let log = std::fs::OpenOptions::new().create(true).append(true).open(&node.log);
        let log = log.map_err(|error| Error(format!("cannot open {}: {error}", node.log.display())))?;
        let mut command = Command::new(&self.arqon);
        // The node asks the kernel to be killed when this process ends, however it ends.
        command.args(["--parent-pid", &std::process::id().to_string(), "node", "--config"]).arg(&node.config);
        // A group of its own: Ctrl-C reaches this program alone, which then ends the nodes.
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log).process_group(0).kill_on_drop(true);
        let mut child =
            command.spawn().map_err(|error| Error(format!("cannot start {}: {error}", self.arqon.display())))?;
        let (ready, line) = oneshot::channel();
        if let Some(stdout) = child.stdout.take() {
            tokio::spawn(async move {
                let mut lines = BufReader::new(stdout).lines();
                if let Ok(Some(line)) = lines.next_line().await {
                    // Nobody waits any more when the start was given up.
                    let _ = ready.send(line);
                }
                // Whatever else it prints must not fill the pipe.
                while let Ok(Some(_)) = lines.next_line().await {}
            });
        }
        node.child = Some(child);
        Ok(line)
    }

    async fn wait_ready(&mut self, index: usize, line: oneshot::Receiver<String>) -> Result<(), Error> {
        let deadline = Instant::now() + Duration::from_secs(READY_SECONDS_MAX);
        let node = &mut self.nodes[index];
        let number = node.number;
        match timeout_at(deadline, line).await {
            Ok(Ok(_)) => {}
            Ok(Err(_)) => return refuse(format!("node {number} ended while starting: {}", last_line(&node.log))),
            Err(_) => {
                return refuse(format!(
                    "node {number} is not up after {READY_SECONDS_MAX} s: {}",
                    last_line(&node.log)
                ));
            }
        }
        while !is_ready(&node.admin).await {
            if Instant::now() > deadline {
                return refuse(format!(
                    "node {number} is not ready after {READY_SECONDS_MAX} s: {}",
                    last_line(&node.log)
                ));
            }
            let ended = node.child.as_mut().and_then(|child| child.try_wait().ok().flatten());
            if let Some(status) = ended {
                return refuse(format!("node {number} ended ({status}): {}", last_line(&node.log)));
            }
            sleep(Duration::from_millis(20)).await;
        }
        node.ready = true;
        Ok(())
    }

    /// Creates a topic of class `events` on all nodes.
    ///
    /// # Errors
    /// What the control plane says.
    pub async fn create_topic(&self, name: &str, partition_count: u32) -> Result<(), Error> {
        let config = wire::TopicConfig {
            name: name.to_owned(),
            class: "events".to_owned(),
            partitions: partition_count,
            replication: self.nodes.len() as u32,
            retention_ms: 24 * 3_600_000,
            ..Default::default()
        };
        let mut client = self.control(&self.nodes[0]).await?;
        let request = self.authorized(wire::CreateTopicRequest { config: Some(config) })?;
        let outcome = client.create_topic(request).await;
        outcome.map(|_| ()).map_err(|status| Error(format!("cannot create topic {name}: {}", status.message())))
    }

    /// Deletes a topic and its data.
    ///
    /// # Errors
    /// What the control plane says.
    pub async fn delete_topic(&self, name: &str) -> Result<(), Error> {
        let mut client = self.control(&self.nodes[0]).await?;
        let request = self.authorized(wire::DeleteTopicRequest { topic: name.to_owned() })?;
        let outcome = client.delete_topic(request).await;
        outcome.map(|_| ()).map_err(|status| Error(format!("cannot delete topic {name}: {}", status.message())))
    }

    /// The leader of each partition as a running node other than `except` sees it; 0 is unknown.
    ///
    /// # Errors
    /// No node answers.
    pub async fn leaders(&self, topic: &str, except: u64) -> Result<Vec<(u32, u64)>, Error> {
        let mut last = Error("no node runs".into());
        for node in self.nodes.iter().filter(|node| node.child.is_some() && node.number != except) {
            let asked = async {
                let mut client = self.control(node).await?;
                let request = self.authorized(wire::DescribeTopic { topic: topic.to_owned() })?;
                let answer = client.describe_topic(request).await;
                answer.map_err(|status| Error(format!("cannot describe topic {topic}: {}", status.message())))
            };
            match timeout(Duration::from_secs(1), asked).await {
                Ok(Ok(answer)) => {
                    let partitions = answer.into_inner().description.unwrap_or_default().partitions;
                    return Ok(partitions.iter().map(|part| (part.partition, part.leader_node)).collect());
                }
                Ok(Err(error)) => last = error,
                Err(_) => last = Error(format!("node {} does not answer", node.number)),
            }
        }
        Err(last)
    }

    async fn control(&self, node: &Node) -> Result<ControlClient<tonic::transport::Channel>, Error> {
        let unreachable = |error| Error(format!("control plane of node {} at {}: {error}", node.number, node.control));
        let endpoint = Endpoint::from_shared(format!("http://{}", node.control)).map_err(unreachable)?;
        let endpoint = endpoint.timeout(Duration::from_secs(CONTROL_SECONDS_MAX));
        Ok(ControlClient::new(endpoint.connect().await.map_err(unreachable)?))
    }

    fn authorized<T>(&self, message: T) -> Result<tonic::Request<T>, Error> {
        let mut request = tonic::Request::new(message);
        let Ok(bearer) = format!("Bearer {}", self.token).parse() else {
            return refuse("the token that arqon up printed does not fit into a header");
        };
        request.metadata_mut().insert("authorization", bearer);
        Ok(request)
    }
}

impl Drop for Cluster {
    /// Kills the nodes and sees them gone, so that their directory can be deleted after this.
    fn drop(&mut self) {
        for child in self.nodes.iter_mut().filter_map(|node| node.child.as_mut()) {
            // One that has ended already needs no signal.
            let _ = child.start_kill();
        }
        let deadline = Instant::now() + GONE_TIME_MAX;
        for child in self.nodes.iter_mut().filter_map(|node| node.child.as_mut()) {
            while matches!(child.try_wait(), Ok(None)) && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }
}

fn read_node(dir: &Path, number: u32) -> Result<Node, Error> {
    let path = dir.join(format!("node-{number}.toml"));
    let text = std::fs::read_to_string(&path)
        .map_err(|error| Error(format!("{}: {error}; arqon up --prepare should have written it", path.display())))?;
    let config: NodeConfig =
        toml::from_str(&text).map_err(|error| Error(format!("{}: {}", path.display(), error.message())))?;
    Ok(Node {
        number: config.node,
        log: dir.join(format!("node-{number}.log")),
        config: path,
        control: config.listen.control,
        admin: config.listen.admin,
        child: None,
        ready: false,
    })
}

/// The last line of a node's log: why it ended, most often.
fn last_line(log: &Path) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let line = text.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("its log is empty");
    format!("{line} ({})", log.display())
}

/// Whether `GET /readyz` answers 200.
async fn is_ready(admin: &str) -> bool {
    let ask = async {
        let mut stream = TcpStream::connect(admin).await?;
        let request = format!("GET /readyz HTTP/1.1\r\nHost: {admin}\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut answer = [0; 12];
        stream.read_exact(&mut answer).await?;
        Ok::<_, std::io::Error>(answer)
    };
    matches!(timeout(Duration::from_secs(2), ask).await, Ok(Ok(answer)) if answer.ends_with(b" 200"))
}

#[cfg(test)]
mod tests {
    use super::*;

    // Put in place by a process of its own: a descriptor that writes to the program would be inherited, for
    // a moment, by whatever other tests start then, and a file that is open for writing cannot be run.
    fn program(dir: &Path, script: &str) -> PathBuf {
        let (text, path) = (dir.join("script"), dir.join("arqon"));
        std::fs::write(&text, format!("#!/bin/sh\n{script}\n")).unwrap();
        let installed = std::process::Command::new("install").args(["-m", "755"]).arg(&text).arg(&path).status();
        assert!(installed.unwrap().success());
        path
    }

    async fn error_of(script: &str) -> String {
        let dir = tempfile::tempdir().unwrap();
        let program = program(dir.path(), script);
        Cluster::start(program, dir.path(), 1).await.err().unwrap().to_string()
    }

    #[tokio::test]
    async fn a_program_without_prepare_is_named() {
        let error = error_of("echo \"error: unexpected argument '--prepare'\" >&2; exit 2").await;
        assert!(error.contains("up --prepare failed") && error.contains("unexpected argument"), "{error}");
        let error = error_of("echo '{\"server\":\"127.0.0.1:1\",\"token\":\"t\"}'").await;
        assert!(error.contains("node-1.toml") && error.contains("should have written it"), "{error}");
    }

    #[tokio::test]
    async fn a_node_that_ends_at_once_is_told_with_its_last_log_line() {
        let script = r#"
if [ "$1" = up ]; then
  printf 'node = 1\n[listen]\ncontrol = "127.0.0.1:1"\nadmin = "127.0.0.1:1"\n' > "$7/node-1.toml"
  echo '{"server":"127.0.0.1:1","token":"t"}'
else
  echo "data: the directory belongs to another cluster" >&2; exit 1
fi"#;
        let error = error_of(script).await;
        assert!(error.contains("node 1 ended while starting: data: the directory belongs"), "{error}");
    }

    #[tokio::test]
    async fn the_nodes_are_gone_when_the_cluster_is_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let admin = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let script = format!(
            r#"
if [ "$1" = up ]; then
  printf 'node = 1\n[listen]\ncontrol = "127.0.0.1:1"\nadmin = "{}"\n' > "$7/node-1.toml"
  echo '{{"server":"127.0.0.1:1","token":"t"}}'
else
  echo '{{}}'; exec sleep 600
fi"#,
            admin.local_addr().unwrap()
        );
        let ready = tokio::spawn(async move {
            let (mut stream, _) = admin.accept().await.unwrap();
            stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.unwrap();
            // Closing with the request unread would reset the connection under the answer; that
            // the other side closes first is as good.
            let _ = stream.read_to_end(&mut Vec::new()).await;
        });
        let cluster = Cluster::start(program(dir.path(), &script), dir.path(), 1).await.unwrap();
        ready.await.unwrap();
        let pid = cluster.pids()[0];
        assert!(Path::new(&format!("/proc/{pid}")).exists());
        drop(cluster);
        assert!(!Path::new(&format!("/proc/{pid}")).exists(), "node {pid} outlives its cluster");
    }

    #[tokio::test]
    async fn readiness_is_the_answer_200_and_nothing_else() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let server = tokio::spawn(async move {
            for status in ["503 Service Unavailable", "200 OK"] {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut request = [0; 1024];
                assert!(stream.read(&mut request).await.unwrap() > 0);
                stream.write_all(format!("HTTP/1.1 {status}\r\n\r\n").as_bytes()).await.unwrap();
            }
        });
        assert!(!is_ready(&address).await);
        assert!(is_ready(&address).await);
        server.await.unwrap();
        assert!(!is_ready(&address).await);
    }
}
