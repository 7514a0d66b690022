//! `arqon cluster status` and `arqon operator list`: what the control plane knows.

use std::time::{Duration, UNIX_EPOCH};

use arqon_proto::wire;
use serde_json::{Value, json};

use crate::cluster_change::{self, AddNodeArgs, DecommissionArgs, MoveArgs, RemoveNodeArgs, TransferArgs};
use crate::cluster_recover::{self, RecoverArgs};
use crate::connect::ConnectControl;
use crate::{Failure, output};

/// What to do with the cluster.
#[derive(Clone, Debug, clap::Subcommand)]
pub enum ClusterCommand {
    /// Show the nodes and what they lead
    #[command(after_help = "Example: arqon cluster status --json")]
    Status(StatusArgs),
    /// Add a node; its configuration names all nodes, and it waits to be added
    #[command(
        after_help = "Example: arqon cluster add-node 4 --client d:7700 --peer d:7701 --control-address d:7705\n\nNeeds the permission admin:cluster, as the other commands that change the cluster."
    )]
    AddNode(AddNodeArgs),
    /// Move all replicas away from a node
    #[command(after_help = "Example: arqon cluster decommission 2")]
    Decommission(DecommissionArgs),
    /// Remove a node that has no replicas any more
    #[command(after_help = "Example: arqon cluster remove-node 2")]
    RemoveNode(RemoveNodeArgs),
    /// Move a replica of a partition to another node
    #[command(after_help = "Example: arqon cluster move demo.events --partition 1 --from 2 --to 4")]
    Move(MoveArgs),
    /// Give leadership of a partition to a node with a replica of it
    #[command(after_help = "Example: arqon cluster transfer-leader demo.events --partition 1 --to 3")]
    TransferLeader(TransferArgs),
    /// Go on with what is left when most nodes are lost for good; run beside the stopped node
    #[command(after_help = "Example: arqon cluster recover --unsafe --config node-1.toml --lost 2,3")]
    Recover(RecoverArgs),
}

/// Arguments of `arqon cluster status` and `arqon operator list`.
#[derive(Clone, Debug, clap::Args)]
pub struct StatusArgs {
    #[command(flatten)]
    connect: ConnectControl,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

/// Does what the arguments say.
///
/// # Errors
/// The control plane cannot be reached or refuses.
pub async fn cluster(command: ClusterCommand) -> Result<(), Failure> {
    match command {
        ClusterCommand::Status(args) => status(args).await,
        ClusterCommand::AddNode(args) => cluster_change::add_node(args).await,
        ClusterCommand::Decommission(args) => cluster_change::decommission(args).await,
        ClusterCommand::RemoveNode(args) => cluster_change::remove_node(args).await,
        ClusterCommand::Move(args) => cluster_change::move_partition(args).await,
        ClusterCommand::TransferLeader(args) => cluster_change::transfer_leader(args).await,
        ClusterCommand::Recover(args) => cluster_recover::recover(args).await,
    }
}

async fn status(args: StatusArgs) -> Result<(), Failure> {
    let mut control = args.connect.control().await?;
    let request = control.request(wire::ClusterStatusRequest {});
    let status = control.client().cluster_status(request).await?.into_inner();
    if args.json {
        return output::json(&cluster_document(&status));
    }
    let leader = match status.metadata_leader {
        0 => "no metadata leader".to_owned(),
        node => format!("metadata led by node {node}"),
    };
    output::line(format_args!(
        "{}: {} topics, {} partitions ({} without leader), {leader}; as seen by node {}",
        status.cluster, status.topic_count, status.partition_count, status.leaderless_count, status.answered_by
    ))?;
    let rows: Vec<Vec<String>> = status
        .nodes
        .iter()
        .map(|node| {
            let info = node.info.clone().unwrap_or_default();
            vec![
                info.node.to_string(),
                state(node).to_owned(),
                node.leader_count.to_string(),
                node.replica_count.to_string(),
                info.client_address,
                if node.program.is_empty() { "-".to_owned() } else { node.program.clone() },
                if node.problems.is_empty() { "-".to_owned() } else { node.problems.join("; ") },
            ]
        })
        .collect();
    output::table(&["NODE", "STATE", "LEADS", "REPLICAS", "CLIENTS AT", "PROGRAM", "PROBLEMS"], &rows)?;
    status.moves.iter().try_for_each(|change| output::line(cluster_change::describe(change)))?;
    status.unsafe_recoveries.iter().try_for_each(|recovery| {
        let time = humantime::format_rfc3339_seconds(UNIX_EPOCH + Duration::from_millis(recovery.time_ms));
        let lost = recovery.lost.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        output::line(format_args!(
            "{time}: went on without nodes {lost}; {} partitions may lack events",
            recovery.groups.len()
        ))
    })
}

fn state(node: &wire::NodeStatus) -> &'static str {
    match (node.reachable, node.info.as_ref().is_some_and(|info| info.leaving)) {
        (true, false) => "up",
        (true, true) => "leaving",
        (false, false) => "unreachable",
        (false, true) => "leaving, unreachable",
    }
}

fn cluster_document(status: &wire::ClusterStatusResponse) -> Value {
    let nodes: Vec<Value> = status
        .nodes
        .iter()
        .map(|node| {
            let info = node.info.clone().unwrap_or_default();
            json!({
                "node": info.node,
                "reachable": node.reachable,
                "leader_count": node.leader_count,
                "replica_count": node.replica_count,
                "client_address": info.client_address,
                "peer_address": info.peer_address,
                "control_address": info.control_address,
                "leaving": info.leaving,
                "metadata_voter": node.voter,
                "program": node.program,
                "peer_version_max": node.peer_version_max,
                "problems": node.problems,
            })
        })
        .collect();
    let change = |change: &wire::MoveStatus| {
        json!({
            "tenant": change.tenant,
            "topic": change.topic,
            "partition": change.partition,
            "from": change.from,
            "to": change.to,
            "phase": change.phase,
            "behind": change.behind,
        })
    };
    let recovery = |recovery: &wire::UnsafeRecoveryCommand| {
        let group = |group: &wire::UnsafeGroup| json!({ "group": group.group, "node": group.node, "lost_from": group.kept_offset, "empty": group.empty });
        json!({
            "time_ms": recovery.time_ms,
            "lost_nodes": recovery.lost,
            "partitions": recovery.groups.iter().map(group).collect::<Vec<_>>(),
        })
    };
    json!({
        "cluster": status.cluster,
        "answered_by": status.answered_by,
        "metadata_leader": status.metadata_leader,
        "topic_count": status.topic_count,
        "partition_count": status.partition_count,
        "leaderless_count": status.leaderless_count,
        "nodes": nodes,
        "unsafe_recoveries": status.unsafe_recoveries.iter().map(recovery).collect::<Vec<_>>(),
        "moves": status.moves.iter().map(change).collect::<Vec<_>>(),
    })
}

/// Prints the operators that have registered.
///
/// # Errors
/// The control plane cannot be reached or refuses.
pub async fn operator_list(args: StatusArgs) -> Result<(), Failure> {
    let mut control = args.connect.control().await?;
    let request = control.request(wire::ListOperatorsRequest {});
    let operators = control.client().list_operators(request).await?.into_inner().operators;
    if args.json {
        return output::json(&json!({ "operators": operators.iter().map(operator_document).collect::<Vec<_>>() }));
    }
    let rows: Vec<Vec<String>> = operators
        .iter()
        .map(|operator| {
            let registration = operator.registration.clone().unwrap_or_default();
            vec![
                registration.operator_id,
                registration.operator_type,
                registration.version,
                if operator.live { "live" } else { "expired" }.to_owned(),
                registration.stage,
                registration.supported_schemas.join(","),
            ]
        })
        .collect();
    output::table(&["OPERATOR", "TYPE", "VERSION", "STATE", "STAGE", "SCHEMAS"], &rows)
}

fn operator_document(operator: &wire::OperatorStatus) -> Value {
    let registration = operator.registration.clone().unwrap_or_default();
    let limits = registration.resource_limits.unwrap_or_default();
    json!({
        "operator_id": registration.operator_id,
        "operator_type": registration.operator_type,
        "version": registration.version,
        "supported_schemas": registration.supported_schemas,
        "hardware_profile": registration.hardware_profile,
        "stage": registration.stage,
        "capabilities": registration.capabilities,
        "max_parallel_jobs": limits.max_parallel_jobs,
        "live": operator.live,
        "last_heartbeat_ms": operator.last_heartbeat_ms,
    })
}
