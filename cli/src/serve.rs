//! The roles: node, Shield and operator, each from its configuration file until a signal.
//!
//! A role prints one line of JSON on standard output when it is ready, with the addresses that
//! it really listens on; everything else goes to its log on standard error.

use std::path::PathBuf;
use std::time::Duration;

use arqon_operators::{HttpShim, HttpShimConfig};
use arqon_shield::Shield;
use arqon_spine::Node;
use serde_json::json;

use crate::logging::LogArgs;
use crate::signals::StopSignals;
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

/// Runs a node until SIGINT or SIGTERM.
///
/// # Errors
/// The configuration is wrong, or the node cannot start.
pub async fn node(args: ConfigArgs, log: LogArgs) -> Result<(), Failure> {
    let config = arqon_spine::Config::load(&args.config).map_err(|error| at(&args, error))?;
    logging::start(log, &config.log.level, config.log.json);
    tracing::info!(version = env!("CARGO_PKG_VERSION"), config = config.redacted(), "node starts");
    let mut signals = StopSignals::listen()?;
    let number = config.node;
    // It may wait for the cluster for as long as it takes.
    let node = tokio::select! {
        started = Node::start(config) => started.map_err(Failure::failed)?,
        () = signals.wait() => return Ok(()),
    };
    let addresses = node.addresses();
    let admin = addresses.admin.to_string();
    let ready = async {
        while let Err(problem) = health::wait_ready(&admin, READY_TOLD_AFTER).await {
            tracing::warn!(problem, "not ready yet");
        }
    };
    tokio::select! {
        () = ready => {
            output::json(&json!({
                "ready": true,
                "node": number,
                "client": addresses.client.to_string(),
                "peer": addresses.peer.to_string(),
                "control": addresses.control.to_string(),
                "admin": admin,
            }))?;
            signals.wait().await;
        }
        () = signals.wait() => {}
    }
    tracing::info!("node stops");
    node.shutdown().await;
    Ok(())
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
