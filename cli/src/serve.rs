//! The roles: node, Shield and operator, each from its configuration file until a signal.
//!
//! A role prints one line of JSON on standard output when it is ready, with the addresses that
//! it really listens on; everything else goes to its log on standard error.

use std::cell::Cell;
use std::future;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use arqon_operators::{HttpShim, HttpShimConfig};
use arqon_shield::Shield;
use arqon_spine::Node;
use serde_json::json;

use crate::anew::{self, Starts};
use crate::logging::LogArgs;
use crate::signals::StopSignals;
use crate::version::{self, PROGRAM};
use crate::{Failure, health, logging, output};

/// How long a node waits for the rest of its cluster before it says so in its log; it goes on
/// waiting.
const READY_TOLD_AFTER: Duration = Duration::from_secs(30);

/// Arguments of a role.
#[derive(Clone, Debug, clap::Args)]
pub struct ConfigArgs {
    /// Configuration, TOML
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
}

impl ConfigArgs {
    /// Threads that the node of this configuration asks for.
    ///
    /// # Errors
    /// The configuration is wrong.
    pub fn node_threads(&self) -> Result<Option<usize>, Failure> {
        Ok(arqon_spine::Config::load(&self.config).map_err(|error| at(self, error))?.threads)
    }
}

/// What an operator is in front of.
#[derive(Clone, Debug, clap::Subcommand)]
pub enum OperatorCommand {
    /// Post jobs to an HTTP worker and publish its answers
    #[command(after_help = "Example: arqon operator http --config http-shim.toml")]
    Http(ConfigArgs),
    /// List the operators that have registered
    #[command(after_help = "Example: arqon operator list --json")]
    List(crate::cluster_status::StatusArgs),
}

/// Runs a node until SIGINT or SIGTERM. One whose disk fails it is started anew; see [`anew`].
///
/// # Errors
/// The configuration is wrong, or the node cannot start.
pub async fn node(args: ConfigArgs, log: LogArgs) -> Result<(), Failure> {
    let mut config = arqon_spine::Config::load(&args.config).map_err(|error| at(&args, error))?;
    config.program = PROGRAM.to_owned();
    logging::start(log, &config.log.level, config.log.json);
    tracing::info!(version = version::text(), config = config.redacted(), "node starts");
    let mut signals = StopSignals::listen()?;
    let number = config.node;
    let starts = Starts::of_this_process();
    // It may wait for the cluster for as long as it takes.
    let started = tokio::select! {
        started = Node::start(config) => started,
        () = signals.wait() => return Ok(()),
    };
    let node = match started {
        Ok(node) => node,
        // The disk may need longer.
        Err(error) if starts.is_again() && error.is_of_disk() => {
            let pause = starts.pause(Duration::ZERO);
            tracing::error!(%error, seconds = pause.as_secs(), "the node starts itself anew after a pause");
            return tokio::select! {
                () = tokio::time::sleep(pause) => anew::start(pause),
                () = signals.wait() => Ok(()),
            };
        }
        Err(error) => return Err(Failure::failed(error)),
    };
    let addresses = node.addresses();
    let admin = addresses.admin.to_string();
    let ready = async {
        while let Err(problem) = health::wait_ready(&admin, READY_TOLD_AFTER).await {
            tracing::warn!(problem, "not ready yet");
        }
    };
    let ready_since = Cell::new(None);
    let serve = async {
        ready.await;
        ready_since.set(Some(Instant::now()));
        output::json(&json!({
            "ready": true,
            "node": number,
            "client": addresses.client.to_string(),
            "peer": addresses.peer.to_string(),
            "control": addresses.control.to_string(),
            "admin": admin,
        }))?;
        future::pending::<Result<(), Failure>>().await
    };
    let closed = async {
        let reason = node.closed().await;
        let pause = starts.pause(ready_since.get().map_or(Duration::ZERO, |since: Instant| since.elapsed()));
        tracing::error!(reason, seconds = pause.as_secs(), "the node starts itself anew after a pause");
        // Its other logs go on until then.
        tokio::time::sleep(pause).await;
        pause
    };
    let anew = tokio::select! {
        failed = serve => return failed,
        pause = closed => Some(pause),
        () = signals.wait() => None,
    };
    tracing::info!("node stops");
    node.shutdown().await;
    anew.map_or(Ok(()), anew::start)
}

/// Runs a Shield until SIGINT or SIGTERM.
///
/// # Errors
/// The configuration is wrong, or the Shield cannot start.
pub async fn shield(args: ConfigArgs, log: LogArgs) -> Result<(), Failure> {
    let config = arqon_shield::Config::load(&args.config).map_err(|error| at(&args, error))?;
    logging::start(log, "info", false);
    let mut signals = StopSignals::listen()?;
    let shield = Shield::start(config).await.map_err(Failure::failed)?;
    let scheme = if shield.is_secure() { "wss" } else { "ws" };
    let url = format!("{scheme}://{}/v1/ws", shield.address());
    output::json(&json!({ "ready": true, "shield": url, "admin": shield.admin_address().to_string() }))?;
    signals.wait().await;
    tracing::info!("Shield stops");
    shield.shutdown().await;
    Ok(())
}

/// Runs the HTTP shim until SIGINT or SIGTERM.
///
/// # Errors
/// The configuration is wrong, or the bus refuses the operator.
pub async fn operator_http(args: ConfigArgs, log: LogArgs) -> Result<(), Failure> {
    let config = HttpShimConfig::load(&args.config).map_err(|error| at(&args, error))?;
    logging::start(log, "info", false);
    let mut signals = StopSignals::listen()?;
    let operator = config.operator_id.clone();
    let shim = HttpShim::bind(config).await.map_err(Failure::failed)?;
    let admin = shim.admin_address().map(|address| address.to_string());
    output::json(&json!({ "ready": true, "operator": operator, "admin": admin }))?;
    shim.run(async move { signals.wait().await }).await.map_err(Failure::failed)
}

fn at(args: &ConfigArgs, error: impl std::fmt::Display) -> Failure {
    Failure::failed(error).at(args.config.display())
}
