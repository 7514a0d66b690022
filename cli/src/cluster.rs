//! A cluster on this machine: its directory, and its processes.
//!
//! ```text
//!   DIR/cluster.secret  token.pem  token.pub.pem  token      made once, kept
//!       node-1.toml ..  shield.toml                          read by `arqon node`, `arqon shield`
//!       node-1/ ..                                           data directories
//!       logs/node-1.log ..  logs/shield.log                  standard error of each process
//! ```

use std::fs;
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::task::Poll;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use arqon_proto::{AUDIENCE_DEFAULT, Claims, TokenAlgorithm, TokenKeyPair, TokenSigner};
use serde_json::{Value, json};

use crate::Failure;
use crate::ports::{self, Ports};
use crate::process::Process;

/// Most nodes of a local cluster.
pub const NODE_COUNT_MAX: u16 = 9;
/// The tenant of the tokens made here.
pub const TENANT: &str = "local";

const READY_TIMEOUT: Duration = Duration::from_secs(60);
const TOKEN_TTL: Duration = Duration::from_secs(30 * 24 * 3_600);
const START_COUNT_MAX: usize = 5;

/// A cluster's directory: everything that its processes are started from.
#[derive(Debug)]
pub struct Layout {
    data: PathBuf,
    node_count: u16,
    addresses: Vec<NodeAddresses>,
    shield: String,
    token: String,
    signing_key: Vec<u8>,
    fresh: bool,
}

/// Where one node is reached, as `host:port`.
#[derive(Clone, Debug)]
pub struct NodeAddresses {
    /// Frames of clients.
    pub client: String,
    /// The gRPC control plane.
    pub control: String,
    /// Metrics and health.
    pub admin: String,
}

impl Layout {
    /// Opens the directory, or lays out a new cluster of `node_count` nodes in it.
    /// `prefer_default` takes the default ports when they are free.
    ///
    /// # Errors
    /// The directory holds something else or a cluster of another size, or cannot be written.
    pub fn open(data: &Path, node_count: u16, prefer_default: bool) -> Result<Self, Failure> {
        make_directory(data)?;
        // Children and users get the configs' paths from here.
        let data = data.canonicalize().map_err(|error| file_failed(data, &error))?;
        let fresh = !data.join("node-1.toml").exists();
        if fresh {
            if is_foreign(&data)? {
                return Err(Failure::failed(format!(
                    "{} is not empty and holds no cluster made by arqon up",
                    data.display()
                )));
            }
            lay_out(&data, node_count, prefer_default)?;
        }
        Self::read(data, node_count, fresh)
    }

    fn read(data: PathBuf, node_count: u16, fresh: bool) -> Result<Self, Failure> {
        let mut addresses = Vec::new();
        while let path = data.join(format!("node-{}.toml", addresses.len() + 1))
            && path.exists()
        {
            let config = arqon_spine::Config::load(&path).map_err(|error| Failure::failed(error).at(path.display()))?;
            let listen = config.listen;
            addresses.push(NodeAddresses { client: listen.client, control: listen.control, admin: listen.admin });
        }
        if addresses.len() != usize::from(node_count) {
            let found = addresses.len();
            return Err(Failure::failed(format!(
                "{} holds a cluster of {found} nodes: use --nodes {found}",
                data.display()
            )));
        }
        let path = data.join("shield.toml");
        let shield: toml::Table =
            read_text(&path)?.parse().map_err(|error| Failure::failed(error).at(path.display()))?;
        let shield = shield.get("listen").and_then(toml::Value::as_str).unwrap_or_default();
        let shield = format!("ws://{shield}/v1/ws");
        let signing_key = read_text(&data.join("token.pem"))?.into_bytes();
        let mut layout = Self { data, node_count, addresses, shield, token: String::new(), signing_key, fresh };
        layout.token = layout.mint("admin", "admin", &["admin:cluster"])?;
        write_secret(&layout.data.join("token"), layout.token.as_bytes())?;
        Ok(layout)
    }

    /// A token of this cluster.
    ///
    /// # Errors
    /// The cluster's key cannot sign.
    pub fn mint(&self, subject: &str, role: &str, permissions: &[&str]) -> Result<String, Failure> {
        let signer = TokenSigner::from_pem(TokenAlgorithm::EdDSA, None, &self.signing_key);
        let signer = signer.map_err(|error| Failure::failed(error).at(self.data.join("token.pem").display()))?;
        let now = unix_seconds();
        let claims = Claims {
            sub: subject.to_owned(),
            tenant_id: TENANT.to_owned(),
            aud: AUDIENCE_DEFAULT.to_owned(),
            exp: now + TOKEN_TTL.as_secs(),
            iat: now,
            role: role.to_owned(),
            permissions: permissions.iter().map(ToString::to_string).collect(),
        };
        signer.mint(&claims).map_err(Failure::failed)
    }

    /// The directory, absolute.
    #[must_use]
    pub fn data(&self) -> &Path {
        &self.data
    }

    /// The nodes' client addresses, `host:port`, from node 1 on, divided by commas.
    #[must_use]
    pub fn servers(&self) -> String {
        self.addresses.iter().map(|node| node.client.as_str()).collect::<Vec<_>>().join(",")
    }

    /// The nodes' addresses, from node 1 on.
    #[must_use]
    pub fn addresses(&self) -> &[NodeAddresses] {
        &self.addresses
    }

    /// The Shield's address, `ws://host:port/v1/ws`.
    #[must_use]
    pub fn shield(&self) -> &str {
        &self.shield
    }

    /// A token with the role admin.
    #[must_use]
    pub fn token(&self) -> &str {
        &self.token
    }

    /// The document that `arqon up --json` prints; `pids` are the nodes and then the Shield.
    #[must_use]
    pub fn document(&self, pids: &[u32]) -> Value {
        let console = self.addresses.first().map(|node| format!("http://{}", node.admin));
        json!({
            "server": self.servers(),
            "shield": self.shield,
            "console": console,
            "token": self.token,
            "data": self.data,
            "pids": pids,
        })
    }

    fn config(&self, name: &str) -> String {
        self.data.join(format!("{name}.toml")).display().to_string()
    }

    /// Where the process `name` logs.
    #[must_use]
    pub fn log(&self, name: &str) -> PathBuf {
        self.data.join("logs").join(format!("{name}.log"))
    }

    /// Forgets the ports of a cluster that has never run, so that others can be taken.
    fn discard(&self) -> Result<(), Failure> {
        for node in 1..=self.node_count {
            for path in [self.data.join(format!("node-{node}.toml")), self.log(&format!("node-{node}"))] {
                remove(fs::remove_file(&path), &path)?;
            }
            let path = self.data.join(format!("node-{node}"));
            remove(fs::remove_dir_all(&path), &path)?;
        }
        Ok(())
    }
}

fn remove(result: std::io::Result<()>, path: &Path) -> Result<(), Failure> {
    match result {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(file_failed(path, &error)),
        _ => Ok(()),
    }
}

/// The running processes of a cluster. Dropping it kills them all.
#[derive(Debug)]
pub struct LocalCluster {
    layout: Layout,
    // `None`: killed and not started again.
    nodes: Vec<Option<Process>>,
    shield: Process,
}

impl LocalCluster {
    /// Starts nodes and Shield, and waits until all are ready. A new cluster whose ports were
    /// taken by somebody else in the meantime is laid out again.
    ///
    /// # Errors
    /// The last line that the process at fault logged.
    pub async fn start(data: &Path, node_count: u16, prefer_default: bool) -> Result<Self, Failure> {
        let mut attempt = 1;
        loop {
            let layout = Layout::open(data, node_count, prefer_default)?;
            let fresh = layout.fresh;
            match Self::start_processes(layout).await {
                Err((layout, failure))
                    if fresh && attempt < START_COUNT_MAX && failure.to_string().contains("in use") =>
                {
                    layout.discard()?;
                    attempt += 1;
                }
                result => return result.map_err(|(_, failure)| failure),
            }
        }
    }

    async fn start_processes(layout: Layout) -> Result<Self, (Layout, Failure)> {
        match spawn_all(&layout).await {
            Ok((nodes, shield)) => Ok(Self { layout, nodes: nodes.into_iter().map(Some).collect(), shield }),
            Err(failure) => Err((layout, failure)),
        }
    }

    /// The cluster's directory and addresses.
    #[must_use]
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Process ids of the nodes, then the Shield.
    #[must_use]
    pub fn pids(&self) -> Vec<u32> {
        self.nodes.iter().flatten().chain([&self.shield]).filter_map(Process::pid).collect()
    }

    /// Kills node `node` (from 1) with SIGKILL, if it runs.
    ///
    /// # Errors
    /// There is no such node, or the kernel refuses.
    pub async fn kill_node(&mut self, node: u64) -> Result<(), Failure> {
        match self.node(node)?.take() {
            Some(mut process) => process.kill().await,
            None => Ok(()),
        }
    }

    /// Starts a killed node again; [`Self::node_ready`] waits for it.
    ///
    /// # Errors
    /// There is no such node, or it cannot be started.
    pub fn restart_node(&mut self, node: u64) -> Result<(), Failure> {
        let process = spawn_node(&self.layout, node)?;
        *self.node(node)? = Some(process);
        Ok(())
    }

    /// Waits until a node that was started again is ready.
    ///
    /// # Errors
    /// It does not start: the last line that it logged.
    pub async fn node_ready(&mut self, node: u64) -> Result<(), Failure> {
        match self.node(node)? {
            Some(process) => process.ready(READY_TIMEOUT).await.map(drop),
            None => Err(Failure::failed(format!("node {node} does not run"))),
        }
    }

    fn node(&mut self, node: u64) -> Result<&mut Option<Process>, Failure> {
        let index = usize::try_from(node).ok().and_then(|node| node.checked_sub(1));
        let found = index.and_then(|index| self.nodes.get_mut(index));
        found.ok_or_else(|| Failure::failed(format!("there is no node {node}")))
    }

    /// Waits until any process ends by itself, which none should: which one, from 0, the Shield
    /// after the nodes. May be dropped and called again.
    pub async fn ended(&mut self) -> (usize, Failure) {
        let shield = self.nodes.len();
        let mut all: Vec<_> = (self.nodes.iter_mut().enumerate())
            .filter_map(|(index, process)| Some((index, process.as_mut()?)))
            .chain([(shield, &mut self.shield)])
            .map(|(index, process)| Box::pin(async move { (index, process.ended().await) }))
            .collect();
        std::future::poll_fn(|context| {
            let ended = all.iter_mut().map(|ended| ended.as_mut().poll(context));
            ended.into_iter().find(Poll::is_ready).unwrap_or(Poll::Pending)
        })
        .await
    }

    /// Starts the process again that [`Self::ended`] named, and waits until it is ready.
    ///
    /// # Errors
    /// It does not start: the last line that it logged.
    pub async fn restart(&mut self, index: usize) -> Result<(), Failure> {
        if index < self.nodes.len() {
            let node = index as u64 + 1;
            self.restart_node(node)?;
            return self.node_ready(node).await;
        }
        self.shield = spawn_shield(&self.layout)?;
        self.shield.ready(READY_TIMEOUT).await.map(drop)
    }

    /// Stops the Shield, then the nodes, one after the other, each handing over what it leads.
    ///
    /// # Errors
    /// The first process that did not stop cleanly; all are stopped nevertheless.
    pub async fn stop(mut self) -> Result<(), Failure> {
        let mut result = self.shield.stop().await;
        for node in self.nodes.iter_mut().flatten() {
            result = result.and(node.stop().await);
        }
        result
    }
}

fn spawn_node(layout: &Layout, node: u64) -> Result<Process, Failure> {
    let name = format!("node-{node}");
    Process::spawn(&name, &["node", "--config", &layout.config(&name)], &layout.log(&name))
}

fn spawn_shield(layout: &Layout) -> Result<Process, Failure> {
    Process::spawn("shield", &["shield", "--config", &layout.config("shield")], &layout.log("shield"))
}

async fn spawn_all(layout: &Layout) -> Result<(Vec<Process>, Process), Failure> {
    let mut nodes = Vec::new();
    for node in 1..=u64::from(layout.node_count) {
        nodes.push(spawn_node(layout, node)?);
    }
    // A node is ready when a majority has a leader: all are started before any is waited for.
    for node in &mut nodes {
        node.ready(READY_TIMEOUT).await?;
    }
    let mut shield = spawn_shield(layout)?;
    shield.ready(READY_TIMEOUT).await?;
    Ok((nodes, shield))
}

// What is left of an earlier try to lay out a cluster here is not foreign.
fn is_foreign(data: &Path) -> Result<bool, Failure> {
    const OWN: [&str; 6] = ["cluster.secret", "token.pem", "token.pub.pem", "token", "shield.toml", "logs"];
    let entries = fs::read_dir(data).map_err(|error| file_failed(data, &error))?;
    for entry in entries {
        let name = entry.map_err(|error| file_failed(data, &error))?.file_name();
        if !OWN.iter().any(|own| name == *own) {
            return Ok(true);
        }
    }
    Ok(false)
}

fn lay_out(data: &Path, node_count: u16, prefer_default: bool) -> Result<(), Failure> {
    let nodes = ports::find(node_count, prefer_default)?;
    let pair = TokenKeyPair::generate().map_err(Failure::failed)?;
    write_secret(&data.join("cluster.secret"), random_hex().as_bytes())?;
    write_secret(&data.join("token.pem"), pair.private_key_pem.as_bytes())?;
    write(&data.join("token.pub.pem"), pair.public_key_pem.as_bytes())?;
    write(&data.join("shield.toml"), shield_config(&nodes).as_bytes())?;
    // node-1.toml last: with it the directory counts as laid out.
    for (index, ports) in nodes.iter().enumerate().rev() {
        let text = node_config(index + 1, *ports, &nodes);
        write(&data.join(format!("node-{}.toml", index + 1)), text.as_bytes())?;
    }
    Ok(())
}

const AUTH: &str = "[auth]\n[[auth.keys]]\nalgorithm = \"EdDSA\"\npublic_key_file = \"token.pub.pem\"\n";

fn node_config(node: usize, own: Ports, all: &[Ports]) -> String {
    let bootstrap = if all.len() == 1 { "bootstrap = true\n" } else { "" };
    let mut text = format!(
        "node = {node}\ncluster = \"local\"\ndata = \"node-{node}\"\ncluster_secret_file = \"cluster.secret\"\n{bootstrap}\n\
         [listen]\nclient = \"{}\"\npeer = \"{}\"\ncontrol = \"{}\"\nadmin = \"{}\"\n\n{AUTH}",
        own.client(),
        own.peer(),
        own.control(),
        own.admin()
    );
    for (index, ports) in all.iter().enumerate() {
        text.push_str(&format!(
            "\n[[peers]]\nnode = {}\nclient = \"{}\"\npeer = \"{}\"\ncontrol = \"{}\"\n",
            index + 1,
            ports.client(),
            ports.peer(),
            ports.control()
        ));
    }
    text
}

fn shield_config(all: &[Ports]) -> String {
    let servers: Vec<String> = all.iter().map(|ports| ports.client()).collect();
    let (listen, admin) = all.first().map(|ports| (ports.shield(), ports.shield_admin())).unwrap_or_default();
    format!("listen = \"{listen}\"\nadmin = \"{admin}\"\nservers = {servers:?}\n\n{AUTH}")
}

/// 32 random bytes in hexadecimal.
fn random_hex() -> String {
    format!("{}{}", uuid::Uuid::new_v4().simple(), uuid::Uuid::new_v4().simple())
}

/// Seconds since 1970.
pub(crate) fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

fn make_directory(path: &Path) -> Result<(), Failure> {
    let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(path);
    made.map_err(|error| file_failed(path, &error))
}

fn read_text(path: &Path) -> Result<String, Failure> {
    fs::read_to_string(path).map_err(|error| file_failed(path, &error))
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), Failure> {
    fs::write(path, bytes).map_err(|error| file_failed(path, &error))
}

/// Writes a file that only its owner may read.
pub(crate) fn write_secret(path: &Path, bytes: &[u8]) -> Result<(), Failure> {
    let file = fs::OpenOptions::new().create(true).write(true).truncate(true).mode(0o600).open(path);
    file.and_then(|mut file| file.write_all(bytes)).map_err(|error| file_failed(path, &error))
}

/// A failure that names the file.
pub(crate) fn file_failed(path: &Path, error: &std::io::Error) -> Failure {
    Failure::failed(error).at(path.display())
}
