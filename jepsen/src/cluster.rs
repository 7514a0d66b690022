//! A cluster of real `arqon node` processes, each of which can be killed, stopped and started again.
//!
//! `arqon up --prepare` writes the configurations and the token; the processes are started
//! here, so that they are this program's own children. They die with it: by drop, and by the
//! kernel's parent-death signal should it be killed itself (`--parent-pid`; the kernel watches
//! the spawning thread, so nodes are started from threads that last).
//!
//! With a claim every node runs in a namespace of its own with an address of its own; without one all
//! are on this machine's loopback.

mod admin;
mod config;
mod control;
mod process;
mod program;

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use serde::Deserialize;
use tokio::{
    process::{Child, Command},
    time::{Instant, timeout},
};

use crate::{
    disk::{Disk, DiskKind},
    host::{Claim, Network, run_tool},
    memory::Running,
};
use config::Place;

pub(crate) use process::{Exit, last_line};
pub(crate) use program::find_planted;
pub use program::{Program, find_arqon};

/// The tenant of the clusters that `arqon up` prepares.
const TENANT: &str = "local";
/// Time for the configurations to be written.
const PREPARE_TIME_MAX: Duration = Duration::from_secs(60);
/// Time for killed nodes to be gone.
const GONE_TIME_MAX: Duration = Duration::from_secs(5);
/// Tries to start a cluster, should another program take a port in between.
const START_COUNT_MAX: usize = 3;

/// Why a cluster or one of its nodes does not run: one line.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Error(String);

impl Error {
    pub(crate) fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }
}

fn refuse<T>(text: impl Into<String>) -> Result<T, Error> {
    Err(Error(text.into()))
}

/// What `arqon up --json` prints.
#[derive(Debug, Deserialize)]
struct Prepared {
    token: String,
}

/// What a cluster is made of.
#[derive(Clone, Debug)]
pub struct Options<'a> {
    /// The program of the nodes.
    pub arqon: PathBuf,
    /// This program, which serves FUSE disks.
    pub program: PathBuf,
    /// Configurations, logs and disks; made when missing.
    pub dir: PathBuf,
    /// Nodes that form the cluster, numbered from 1.
    pub node_count: u32,
    /// Nodes beyond them that are configured and not started; they may be added.
    pub spare_count: u32,
    /// Of every node.
    pub disk: DiskKind,
    /// Makes hosts of their own.
    pub claim: Option<&'a Claim>,
    /// The library that fakes the clock, for nodes whose clock is to be changed.
    pub faketime: Option<PathBuf>,
}

/// One node.
struct Node {
    number: u64,
    /// What runs it; a rolling upgrade changes that.
    arqon: PathBuf,
    config: PathBuf,
    log: PathBuf,
    disk: Disk,
    client: String,
    peer: String,
    control: String,
    admin: String,
    child: Option<Child>,
}

/// The nodes, their disks and their network.
pub struct Cluster {
    server: String,
    token: String,
    token_key: PathBuf,
    nodes: Vec<Node>,
    /// Nodes that are there to be added.
    spares: Vec<u64>,
    network: Option<Network>,
    faketime: Option<PathBuf>,
    running: Running,
}

impl Cluster {
    /// Prepares `node_count` nodes on this machine's loopback in `dir`, starts them and waits until all are ready.
    ///
    /// # Errors
    /// The line that names what failed: the program, its configurations or a node.
    pub async fn start(arqon: PathBuf, dir: &Path, node_count: u32) -> Result<Self, Error> {
        let options = Options {
            arqon,
            program: PathBuf::new(),
            dir: dir.to_owned(),
            node_count,
            spare_count: 0,
            disk: DiskKind::Plain,
            claim: None,
            faketime: None,
        };
        Self::start_on(&options).await
    }

    /// Prepares the nodes, starts those that form the cluster and waits until they are ready.
    ///
    /// # Errors
    /// The line that names what failed: the program, its configurations, its host or a node.
    pub async fn start_on(options: &Options<'_>) -> Result<Self, Error> {
        let mut last = None;
        for attempt in 0..START_COUNT_MAX {
            let dir = options.dir.join(format!("cluster-{attempt}"));
            let mut cluster = Self::prepare(options, &dir).await?;
            match cluster.start_all().await {
                Ok(()) => return Ok(cluster),
                // A port taken by another program since the preparation: choose anew. A host has all of its ports.
                Err(error) if error.0.contains("in use") && options.claim.is_none() => last = Some(error),
                Err(error) => return Err(error),
            }
        }
        Err(last.unwrap_or_else(|| Error("the cluster was never tried".into())))
    }

    async fn prepare(options: &Options<'_>, dir: &Path) -> Result<Self, Error> {
        std::fs::create_dir_all(dir).map_err(|error| Error(format!("cannot make {}: {error}", dir.display())))?;
        let count = options.node_count + options.spare_count;
        let prepared = prepare_files(&options.arqon, dir, count).await?;
        let numbers: Vec<u64> = (1..=u64::from(count)).collect();
        let network = match options.claim {
            Some(claim) => Some(Network::create(claim, &numbers).await?),
            None => None,
        };
        let mut nodes = Vec::new();
        for number in &numbers {
            let home = dir.join(format!("node-{number}"));
            let disk = Disk::create(options.disk, &home, &options.program).await?;
            let place = Place {
                members: u64::from(options.node_count),
                hosts: network.as_ref().map(|network| numbers.iter().map(|node| network.address(*node)).collect()),
                data: disk.data(),
            };
            let (config, listen) = config::place(dir, *number, &place)?;
            nodes.push(Node {
                number: *number,
                arqon: options.arqon.clone(),
                config,
                log: dir.join(format!("node-{number}.log")),
                disk,
                client: listen.client,
                peer: listen.peer,
                control: listen.control,
                admin: listen.admin,
                child: None,
            });
        }
        let members = &nodes[..options.node_count as usize];
        let server = members.iter().map(|node| node.client.as_str()).collect::<Vec<_>>().join(",");
        let spares = numbers[options.node_count as usize..].to_vec();
        let token_key = dir.join("token.pem");
        Ok(Self {
            server,
            token: prepared.token,
            token_key,
            nodes,
            spares,
            network,
            faketime: options.faketime.clone(),
            running: Running::default(),
        })
    }

    async fn start_all(&mut self) -> Result<(), Error> {
        let mut lines = Vec::new();
        for index in 0..self.nodes.len() - self.spares.len() {
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

    /// The private key in PEM that signs the cluster's tokens.
    #[must_use]
    pub fn token_key(&self) -> &Path {
        &self.token_key
    }

    /// The tenant that the token is for.
    #[must_use]
    pub fn tenant(&self) -> &str {
        TENANT
    }

    /// A token that may do everything in its tenant.
    #[must_use]
    pub fn token(&self) -> &str {
        &self.token
    }

    /// Control planes of the nodes that form the cluster.
    #[must_use]
    pub fn controls(&self) -> Vec<String> {
        self.members().map(|node| node.control.clone()).collect()
    }

    fn members(&self) -> impl Iterator<Item = &Node> {
        self.nodes.iter().filter(|node| !self.spares.contains(&node.number))
    }

    /// Numbers of the nodes that form the cluster.
    #[must_use]
    pub fn nodes(&self) -> Vec<u64> {
        self.members().map(|node| node.number).collect()
    }

    /// A spare node is one of the cluster from now on.
    pub fn joined(&mut self, number: u64) {
        self.spares.retain(|spare| *spare != number);
    }

    /// A node is none of the cluster any more.
    pub fn left(&mut self, number: u64) {
        if !self.spares.contains(&number) {
            self.spares.push(number);
        }
    }

    /// Nodes that may be added.
    #[must_use]
    pub fn spares(&self) -> &[u64] {
        &self.spares
    }

    /// The processes of the nodes, for whoever looks at them.
    pub(crate) fn running(&self) -> Running {
        self.running.clone()
    }

    /// The network of the hosts, where they have addresses of their own.
    #[must_use]
    pub fn network(&self) -> Option<&Network> {
        self.network.as_ref()
    }

    /// The disk of a node.
    ///
    /// # Errors
    /// No such node.
    pub fn disk(&mut self, number: u64) -> Result<&mut Disk, Error> {
        let index = self.index(number)?;
        Ok(&mut self.nodes[index].disk)
    }

    /// Where a node has its data.
    ///
    /// # Errors
    /// No such node.
    pub fn data(&self, number: u64) -> Result<PathBuf, Error> {
        Ok(self.nodes[self.index(number)?].disk.data())
    }

    /// What a node has logged.
    ///
    /// # Errors
    /// No such node.
    pub fn log(&self, number: u64) -> Result<&Path, Error> {
        Ok(&self.nodes[self.index(number)?].log)
    }

    /// The file that says what time it is on a node; see faketime(1).
    ///
    /// # Errors
    /// No such node.
    pub fn clock(&self, number: u64) -> Result<PathBuf, Error> {
        Ok(self.nodes[self.index(number)?].config.with_extension("clock"))
    }

    /// Copies what each node has on its disk to where the run leaves its data, as disks are gone with the run. The
    /// nodes end here.
    ///
    /// # Errors
    /// The copy fails.
    pub async fn keep_data(&mut self) -> Result<(), Error> {
        for number in self.nodes.iter().map(|node| node.number).collect::<Vec<_>>() {
            if self.runs(number) {
                self.kill(number).await?;
            }
            let disk = self.disk(number)?;
            let (from, kind) = (disk.data(), disk.kind());
            if kind != DiskKind::Plain && from.exists() {
                let to = disk.path().with_file_name("kept");
                run_tool("cp", &["-a", &from.display().to_string(), &to.display().to_string()], "").await?;
            }
        }
        Ok(())
    }

    fn index(&self, number: u64) -> Result<usize, Error> {
        let found = self.nodes.iter().position(|node| node.number == number);
        found.ok_or_else(|| Error(format!("node {number} does not exist")))
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

/// Has `arqon up --prepare` write the configurations of `node_count` nodes.
async fn prepare_files(arqon: &Path, dir: &Path, node_count: u32) -> Result<Prepared, Error> {
    let mut command = Command::new(arqon);
    command.arg("up").args(["--nodes", &node_count.to_string(), "--prepare", "--json", "--data"]).arg(dir);
    command.kill_on_drop(true);
    let run = timeout(PREPARE_TIME_MAX, command.output()).await;
    let Ok(run) = run else {
        return refuse(format!("{} up --prepare did not end; it must write the files and exit", arqon.display()));
    };
    let output = run.map_err(|error| Error(format!("cannot run {}: {error}", arqon.display())))?;
    if !output.status.success() {
        let reason = String::from_utf8_lossy(&output.stderr);
        let reason = reason.lines().find(|line| !line.trim().is_empty()).unwrap_or("it says nothing");
        return refuse(format!("{} up --prepare failed ({}): {reason}", arqon.display(), output.status));
    }
    serde_json::from_slice(&output.stdout)
        .map_err(|error| Error(format!("{} up --prepare --json printed no such line: {error}", arqon.display())))
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;
    use crate::child::tests::program;

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
  printf 'node = 1\n[listen]\nclient = "127.0.0.1:1"\npeer = "127.0.0.1:1"\ncontrol = "127.0.0.1:1"\nadmin = "127.0.0.1:1"\n' > "$7/node-1.toml"
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
  printf 'node = 1\n[listen]\nclient = "127.0.0.1:1"\npeer = "127.0.0.1:1"\ncontrol = "127.0.0.1:1"\nadmin = "{}"\n' > "$7/node-1.toml"
  echo '{{"server":"127.0.0.1:1","token":"t"}}'
else
  echo '{{}}'; exec sleep 600
fi"#,
            admin.local_addr().unwrap()
        );
        let ready = tokio::spawn(async move {
            let (mut stream, _) = admin.accept().await.unwrap();
            stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.unwrap();
            stream.shutdown().await.unwrap();
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
}
