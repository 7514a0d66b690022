//! `arqon cluster add-node`, `decommission`, `remove-node`, `move` and `transfer-leader`: what changes the
//! cluster itself.
//!
//! The cluster carries a change out by itself; these commands ask for it and, unless told to detach,
//! watch until it is done.

use std::io::IsTerminal;
use std::time::Duration;

use arqon_proto::wire;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::json;
use tokio::time::sleep;

use crate::connect::{ConnectControl, Control};
use crate::{Failure, output};

const WATCH_INTERVAL: Duration = Duration::from_millis(300);
/// Looks that may fail in a row while leaders change.
const FAILURE_COUNT_MAX: u32 = 30;

/// How to reach the cluster and what to print.
#[derive(Clone, Debug, clap::Args)]
pub struct Answer {
    #[command(flatten)]
    connect: ConnectControl,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

/// Whether to wait for the end of a change.
#[derive(Clone, Debug, clap::Args)]
pub struct Wait {
    /// Return when the change is decided; `arqon cluster status` shows how far it is
    #[arg(long)]
    detach: bool,
}

/// Arguments of `arqon cluster add-node`.
#[derive(Clone, Debug, clap::Args)]
pub struct AddNodeArgs {
    /// Number of the new node, as in its configuration
    node: u64,
    /// Where clients reach it
    #[arg(long, value_name = "HOST:PORT")]
    client: String,
    /// Where the other nodes reach it
    #[arg(long, value_name = "HOST:PORT")]
    peer: String,
    /// Its control plane
    #[arg(long, value_name = "HOST:PORT")]
    control_address: String,
    #[command(flatten)]
    wait: Wait,
    #[command(flatten)]
    answer: Answer,
}

/// Arguments of `arqon cluster remove-node`.
#[derive(Clone, Debug, clap::Args)]
pub struct RemoveNodeArgs {
    /// Number of the node
    node: u64,
    #[command(flatten)]
    answer: Answer,
}

/// Arguments of `arqon cluster decommission`.
#[derive(Clone, Debug, clap::Args)]
pub struct DecommissionArgs {
    /// Number of the node
    node: u64,
    /// Keep the node after all: what has not moved yet stays
    #[arg(long)]
    cancel: bool,
    #[command(flatten)]
    wait: Wait,
    #[command(flatten)]
    answer: Answer,
}

/// A partition.
#[derive(Clone, Debug, clap::Args)]
pub struct PartitionArgs {
    /// Name of the topic
    topic: String,
    /// Which of its partitions
    #[arg(long, value_name = "N", default_value_t = 0)]
    partition: u32,
    /// Whose topic it is [default: the token's tenant]
    #[arg(long, value_name = "TENANT")]
    tenant: Option<String>,
}

/// Arguments of `arqon cluster move`.
#[derive(Clone, Debug, clap::Args)]
pub struct MoveArgs {
    #[command(flatten)]
    partition: PartitionArgs,
    /// Node whose replica goes
    #[arg(long, value_name = "NODE", required_unless_present = "cancel")]
    from: Option<u64>,
    /// Node that gets a replica
    #[arg(long, value_name = "NODE", required_unless_present = "cancel")]
    to: Option<u64>,
    /// Take back a move that is under way
    #[arg(long, conflicts_with_all = ["from", "to"])]
    cancel: bool,
    #[command(flatten)]
    wait: Wait,
    #[command(flatten)]
    answer: Answer,
}

/// Arguments of `arqon cluster transfer-leader`.
#[derive(Clone, Debug, clap::Args)]
pub struct TransferArgs {
    #[command(flatten)]
    partition: PartitionArgs,
    /// Node that is to lead, and to which leadership belongs from now on
    #[arg(long, value_name = "NODE")]
    to: u64,
    #[command(flatten)]
    answer: Answer,
}

/// Adds a node that is starting.
///
/// # Errors
/// The control plane cannot be reached or refuses.
pub async fn add_node(args: AddNodeArgs) -> Result<(), Failure> {
    let AddNodeArgs { node, client, peer, control_address, wait, answer } = args;
    let mut control = answer.connect.control().await?;
    let info =
        wire::NodeInfo { node, client_address: client, peer_address: peer, control_address, ..Default::default() };
    let request = control.request(wire::AddNodeRequest { info: Some(info) });
    control.client().add_node(request).await?;
    if !wait.detach {
        let is_in = |status: &wire::ClusterStatusResponse| {
            let known = status.nodes.iter().find(|known| known.info.as_ref().is_some_and(|info| info.node == node));
            match known {
                Some(known) if known.voter => None,
                Some(known) if !known.reachable => Some(format!("node {node} cannot be reached yet; start it")),
                _ => Some(format!("node {node} copies the metadata")),
            }
        };
        watch(&mut control, is_in).await?;
    }
    say(&answer, json!({ "node": node, "added": true }), format!("node {node} is in the cluster"))
}

/// Removes a node that has no replicas any more.
///
/// # Errors
/// As [`add_node`].
pub async fn remove_node(args: RemoveNodeArgs) -> Result<(), Failure> {
    let RemoveNodeArgs { node, answer } = args;
    let mut control = answer.connect.control().await?;
    let request = control.request(wire::RemoveNodeRequest { node });
    let bar = spinner();
    bar.set_message(format!("node {node} leaves the metadata"));
    bar.enable_steady_tick(WATCH_INTERVAL);
    let done = control.client().remove_node(request).await;
    bar.finish_and_clear();
    done?;
    say(&answer, json!({ "node": node, "removed": true }), format!("node {node} is removed; stop it"))
}

/// Moves everything away from a node.
///
/// # Errors
/// As [`add_node`].
pub async fn decommission(args: DecommissionArgs) -> Result<(), Failure> {
    let DecommissionArgs { node, cancel, wait, answer } = args;
    let mut control = answer.connect.control().await?;
    let request = control.request(wire::DrainNodeRequest { node, cancel });
    control.client().drain_node(request).await?;
    if cancel {
        return say(&answer, json!({ "node": node, "leaving": false }), format!("node {node} stays"));
    }
    if !wait.detach {
        let is_empty = |status: &wire::ClusterStatusResponse| {
            let moves: Vec<_> = status.moves.iter().filter(|change| change.from.contains(&node)).collect();
            let first = moves.first()?;
            Some(format!("{} partitions to go; {}", moves.len(), describe(first)))
        };
        watch(&mut control, is_empty).await?;
    }
    let text = format!("node {node} has no replicas any more; `arqon cluster remove-node {node}` ends it");
    let text = if wait.detach { format!("node {node} is leaving") } else { text };
    say(&answer, json!({ "node": node, "leaving": true, "empty": !wait.detach }), text)
}

/// Moves a replica of a partition.
///
/// # Errors
/// As [`add_node`].
pub async fn move_partition(args: MoveArgs) -> Result<(), Failure> {
    let MoveArgs { partition: PartitionArgs { topic, partition, tenant }, from, to, cancel, wait, answer } = args;
    let mut control = answer.connect.control().await?;
    let request = control.request(wire::MovePartitionRequest {
        tenant: tenant.clone().unwrap_or_default(),
        topic: topic.clone(),
        partition,
        from: from.unwrap_or_default(),
        to: to.unwrap_or_default(),
        cancel,
    });
    control.client().move_partition(request).await?;
    if !wait.detach {
        let is_done = |status: &wire::ClusterStatusResponse| {
            let is_it = |change: &&wire::MoveStatus| {
                change.topic == topic
                    && change.partition == partition
                    && tenant.as_ref().is_none_or(|tenant| change.tenant == *tenant)
            };
            status.moves.iter().find(is_it).map(describe)
        };
        watch(&mut control, is_done).await?;
    }
    let done = if cancel { "is where it was" } else { "has moved" };
    let done = if wait.detach && !cancel { "is moving" } else { done };
    let document = json!({ "topic": topic, "partition": partition, "from": from, "to": to, "cancelled": cancel });
    say(&answer, document, format!("{topic}/{partition} {done}"))
}

/// Gives leadership of a partition to a node.
///
/// # Errors
/// As [`add_node`].
pub async fn transfer_leader(args: TransferArgs) -> Result<(), Failure> {
    let TransferArgs { partition: PartitionArgs { topic, partition, tenant }, to, answer } = args;
    let mut control = answer.connect.control().await?;
    let tenant = tenant.unwrap_or_default();
    let request = control.request(wire::TransferLeaderRequest { tenant, topic: topic.clone(), partition, to });
    control.client().transfer_leader(request).await?;
    let document = json!({ "topic": topic, "partition": partition, "leader_node": to });
    say(&answer, document, format!("{topic}/{partition} is led by node {to}"))
}

/// One line about a change of replicas.
pub(crate) fn describe(change: &wire::MoveStatus) -> String {
    let nodes = |nodes: &[u64]| nodes.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    let phase = if change.phase.is_empty() { "waits" } else { &change.phase };
    let behind = if change.behind > 0 { format!(", {} entries behind", change.behind) } else { String::new() };
    let way = match (nodes(&change.from), nodes(&change.to)) {
        (from, to) if from.is_empty() => format!("to node {to}"),
        (from, to) if to.is_empty() => format!("off node {from}"),
        (from, to) => format!("from node {from} to node {to}"),
    };
    format!("{}/{} {way}: {phase}{behind}", change.topic, change.partition)
}

/// Until `left` says that nothing is left to do; what it says is shown on a terminal.
async fn watch(
    control: &mut Control,
    left: impl Fn(&wire::ClusterStatusResponse) -> Option<String>,
) -> Result<(), Failure> {
    let bar = spinner();
    let mut failure_count = 0;
    loop {
        let request = control.request(wire::ClusterStatusRequest {});
        match control.client().cluster_status(request).await {
            Ok(status) => {
                failure_count = 0;
                let Some(news) = left(&status.into_inner()) else { break };
                bar.set_message(format!("{news} (Ctrl-C leaves; the cluster goes on)"));
                bar.tick();
            }
            Err(_) if failure_count < FAILURE_COUNT_MAX => failure_count += 1,
            Err(error) => return Err(error.into()),
        }
        sleep(WATCH_INTERVAL).await;
    }
    bar.finish_and_clear();
    Ok(())
}

/// Shown on a terminal only.
fn spinner() -> ProgressBar {
    let target =
        if std::io::stderr().is_terminal() { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
    ProgressBar::with_draw_target(None, target).with_style(ProgressStyle::default_spinner())
}

fn say(answer: &Answer, document: serde_json::Value, text: String) -> Result<(), Failure> {
    if answer.json { output::json(&document) } else { output::line(text) }
}
