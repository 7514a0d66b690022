//! `arqon cluster status` and `arqon operator list`: what the control plane knows.

use arqon_proto::wire;
use serde_json::{Value, json};

use crate::connect::ConnectControl;
use crate::{Failure, output};

/// What to do with the cluster.
#[derive(Clone, Debug, clap::Subcommand)]
pub enum ClusterCommand {
    /// Show the nodes and what they lead
    #[command(after_help = "Example: arqon cluster status --json")]
    Status(StatusArgs),
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
    let ClusterCommand::Status(args) = command;
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
                if node.reachable { "up" } else { "unreachable" }.to_owned(),
                node.leader_count.to_string(),
                node.replica_count.to_string(),
                info.client_address,
                if node.problems.is_empty() { "-".to_owned() } else { node.problems.join("; ") },
            ]
        })
        .collect();
    output::table(&["NODE", "STATE", "LEADS", "REPLICAS", "CLIENTS AT", "PROBLEMS"], &rows)
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
                "problems": node.problems,
            })
        })
        .collect();
    json!({
        "cluster": status.cluster,
        "answered_by": status.answered_by,
        "metadata_leader": status.metadata_leader,
        "topic_count": status.topic_count,
        "partition_count": status.partition_count,
        "leaderless_count": status.leaderless_count,
        "nodes": nodes,
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
