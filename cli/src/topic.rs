//! `arqon topic`: makes, lists, describes and deletes topics; see also `topic_change`.

use std::time::Duration;

use arqon_proto::wire;
use serde_json::{Value, json};

use crate::backup::{self, BackupArgs, RestoreArgs};
use crate::connect::ConnectControl;
use crate::topic_change::{self, AlterArgs, TrimArgs};
use crate::{Failure, output};

/// What to do with topics.
#[derive(Clone, Debug, clap::Subcommand)]
pub enum TopicCommand {
    /// Make a topic; X.jobs also gets X.results and X.jobs.dead
    #[command(after_help = "Example: arqon topic create demo.jobs --partitions 3 --retention 7d")]
    Create(CreateArgs),
    /// List the topics of the token's tenant
    #[command(after_help = "Example: arqon topic list --json")]
    List(ListArgs),
    /// Show a topic, its partitions and its queues
    #[command(after_help = "Example: arqon topic describe demo.jobs")]
    Describe(NameArgs),
    /// Change the settings of a topic
    #[command(after_help = "Example: arqon topic alter demo.events --retention 30d --partitions 6")]
    Alter(AlterArgs),
    /// Drop old events: whole segments, so that the new start may lie before what is asked for
    #[command(
        after_help = "Examples: arqon topic trim demo.events --before-time 36h\n          arqon topic trim demo.events --partition 0 --before 120000"
    )]
    Trim(TrimArgs),
    /// Copy a topic's events into a directory
    #[command(after_help = "Example: arqon topic backup demo.events --out ./demo.events-backup")]
    Backup(BackupArgs),
    /// Make a topic of a backup; an interrupted restore is run again
    #[command(after_help = "Example: arqon topic restore ./demo.events-backup --as demo.restored")]
    Restore(RestoreArgs),
    /// Delete a topic and all its events
    #[command(after_help = "Example: arqon topic delete demo.jobs")]
    Delete(NameArgs),
}

/// Arguments of `arqon topic create`.
#[derive(Clone, Debug, clap::Args)]
pub struct CreateArgs {
    /// Name, as in demo.jobs
    topic: String,
    /// Number of partitions
    #[arg(long, value_name = "N", default_value_t = 1)]
    partitions: u32,
    /// Copies of each partition [default: 3, or the number of nodes when there are fewer]
    #[arg(long, value_name = "N")]
    replication: Option<u32>,
    /// Keep events for this time, as in 36h or 7d
    #[arg(long, value_name = "TIME", default_value = "7d", value_parser = parse_duration)]
    retention: Duration,
    /// Keep at most this many bytes a partition; 0 for no limit
    #[arg(long, value_name = "BYTES", default_value_t = 0)]
    retention_bytes: u64,
    /// Attempts before a job goes to the dead letters
    #[arg(long, value_name = "N")]
    attempts_max: Option<u32>,
    #[command(flatten)]
    connect: ConnectControl,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

/// Arguments of `arqon topic list`.
#[derive(Clone, Debug, clap::Args)]
pub struct ListArgs {
    #[command(flatten)]
    connect: ConnectControl,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

/// Arguments of a command about one topic.
#[derive(Clone, Debug, clap::Args)]
pub struct NameArgs {
    /// Name of the topic
    topic: String,
    #[command(flatten)]
    connect: ConnectControl,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

/// A time span such as `90s` or `7d`.
pub(crate) fn parse_duration(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text).map_err(|error| format!("{error}, as in 90s, 36h or 7d"))
}

/// Whole milliseconds, for the wire.
pub(crate) fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// Does what the arguments say.
///
/// # Errors
/// The control plane cannot be reached or refuses.
pub async fn topic(command: TopicCommand) -> Result<(), Failure> {
    match command {
        TopicCommand::Create(args) => create(args).await,
        TopicCommand::List(args) => list(args).await,
        TopicCommand::Describe(args) => describe(args).await,
        TopicCommand::Alter(args) => topic_change::alter(args).await,
        TopicCommand::Trim(args) => topic_change::trim(args).await,
        TopicCommand::Backup(args) => backup::backup(args).await,
        TopicCommand::Restore(args) => backup::restore(args).await,
        TopicCommand::Delete(args) => delete(args).await,
    }
}

async fn create(args: CreateArgs) -> Result<(), Failure> {
    let mut control = args.connect.control().await?;
    let replication = match args.replication {
        Some(replication) => replication,
        None => {
            let request = control.request(wire::ClusterStatusRequest {});
            let status = control.client().cluster_status(request).await?.into_inner();
            u32::try_from(status.nodes.len()).unwrap_or(u32::MAX).clamp(1, 3)
        }
    };
    let config = wire::TopicConfig {
        name: args.topic,
        partitions: args.partitions,
        replication,
        retention_ms: millis(args.retention),
        retention_bytes: args.retention_bytes,
        attempts_max: args.attempts_max.unwrap_or(0),
        ..Default::default()
    };
    let request = control.request(wire::CreateTopicRequest { config: Some(config) });
    let topic = control.client().create_topic(request).await?.into_inner();
    if args.json {
        return output::json(&description(&topic));
    }
    output::line(format_args!(
        "created {} ({}, {} partitions, {} copies)",
        topic.topic,
        topic.class,
        topic.partitions.len(),
        topic.replication
    ))
}

async fn list(args: ListArgs) -> Result<(), Failure> {
    let mut control = args.connect.control().await?;
    let request = control.request(wire::ListTopicsRequest {});
    let topics = control.client().list_topics(request).await?.into_inner().topics;
    if args.json {
        return output::json(&json!({ "topics": topics.iter().map(description).collect::<Vec<_>>() }));
    }
    let rows: Vec<Vec<String>> = topics
        .iter()
        .map(|topic| {
            vec![
                topic.topic.clone(),
                topic.class.clone(),
                topic.partitions.len().to_string(),
                topic.replication.to_string(),
                retention(topic),
            ]
        })
        .collect();
    output::table(&["TOPIC", "CLASS", "PARTITIONS", "COPIES", "RETENTION"], &rows)
}

async fn describe(args: NameArgs) -> Result<(), Failure> {
    let mut control = args.connect.control().await?;
    let request = control.request(wire::DescribeTopic { topic: args.topic });
    let status = control.client().describe_topic(request).await?.into_inner();
    let topic = status.description.clone().unwrap_or_default();
    if args.json {
        let mut document = description(&topic);
        document["replicas_here"] = status.partitions.iter().map(partition_status).collect();
        document["leaders"] = status.leaders.iter().map(partition_status).collect();
        return output::json(&document);
    }
    output::line(format_args!(
        "{}: {}, {} copies, retention {}",
        topic.topic,
        topic.class,
        topic.replication,
        retention(&topic)
    ))?;
    if !topic.results_topic.is_empty() {
        output::line(format_args!("results go to {}", topic.results_topic))?;
    }
    let rows: Vec<Vec<String>> = topic
        .partitions
        .iter()
        .map(|partition| {
            // What only the leader knows, or else what the replica on the node asked knows.
            let known = |statuses: &[wire::PartitionStatus]| {
                statuses.iter().find(|status| status.partition == partition.partition).cloned()
            };
            let known = known(&status.leaders).or_else(|| known(&status.partitions));
            let show = |show: fn(&wire::PartitionStatus) -> String| known.as_ref().map_or_else(|| "-".to_owned(), show);
            vec![
                partition.partition.to_string(),
                partition.leader_node.to_string(),
                partition.replica_nodes.iter().map(ToString::to_string).collect::<Vec<_>>().join(","),
                show(|status| status.log_start.to_string()),
                show(|status| status.committed.to_string()),
                show(|status| status.size.to_string()),
                show(queues),
                show(holders),
            ]
        })
        .collect();
    output::table(&["PARTITION", "LEADER", "NODES", "START", "END", "BYTES", "QUEUES", "RETENTION HELD BY"], &rows)?;
    let mut refusing = status.leaders.iter().filter(|status| !status.refuses.is_empty());
    refusing.try_for_each(|status| output::line(&status.refuses))
}

async fn delete(args: NameArgs) -> Result<(), Failure> {
    let mut control = args.connect.control().await?;
    let request = control.request(wire::DeleteTopicRequest { topic: args.topic.clone() });
    control.client().delete_topic(request).await?;
    if args.json {
        return output::json(&json!({ "topic": args.topic, "deleted": true }));
    }
    output::line(format_args!("deleted {}", args.topic))
}

pub(crate) fn retention(topic: &wire::TopicDescription) -> String {
    let time = (topic.retention_ms > 0).then(|| humantime::format_duration(Duration::from_millis(topic.retention_ms)));
    match (time, topic.retention_bytes) {
        (Some(time), 0) => time.to_string(),
        (Some(time), bytes) => format!("{time} or {bytes} bytes"),
        (None, bytes) => format!("{bytes} bytes"),
    }
}

fn queues(status: &wire::PartitionStatus) -> String {
    if status.queues.is_empty() {
        return "-".to_owned();
    }
    let show = |queue: &wire::QueueStatus| {
        format!("{}: settled to {}, leased {}, waiting {}", queue.group, queue.floor, queue.leased, queue.pending)
    };
    status.queues.iter().map(show).collect::<Vec<_>>().join("; ")
}

/// Who keeps old events here, and how much.
fn holders(status: &wire::PartitionStatus) -> String {
    if status.holders.is_empty() {
        return "-".to_owned();
    }
    let show = |holder: &wire::RetentionHolder| {
        format!(
            "{} {}: {} events from offset {} on, {} bytes",
            holder.kind, holder.name, holder.records, holder.floor, holder.size
        )
    };
    status.holders.iter().map(show).collect::<Vec<_>>().join("; ")
}

pub(crate) fn description(topic: &wire::TopicDescription) -> Value {
    let partitions: Vec<Value> = topic
        .partitions
        .iter()
        .map(|partition| {
            json!({
                "partition": partition.partition,
                "leader_node": partition.leader_node,
                "leader_address": partition.leader_address,
                "replica_nodes": partition.replica_nodes,
            })
        })
        .collect();
    json!({
        "topic": topic.topic,
        "class": topic.class,
        "replication": topic.replication,
        "retention_ms": topic.retention_ms,
        "retention_bytes": topic.retention_bytes,
        "attempts_max": topic.attempts_max,
        "results_topic": topic.results_topic,
        "partitions": partitions,
    })
}

fn partition_status(status: &wire::PartitionStatus) -> Value {
    let queues: Vec<Value> = status
        .queues
        .iter()
        .map(|queue| {
            json!({
                "group": queue.group,
                "floor": queue.floor,
                "next": queue.next,
                "leased": queue.leased,
                "pending": queue.pending,
            })
        })
        .collect();
    let holders: Vec<Value> = status
        .holders
        .iter()
        .map(|holder| {
            json!({
                "kind": holder.kind,
                "name": holder.name,
                "floor": holder.floor,
                "events": holder.records,
                "bytes": holder.size,
            })
        })
        .collect();
    json!({
        "partition": status.partition,
        "log_start": status.log_start,
        "log_end": status.log_end,
        "committed": status.committed,
        "term": status.term,
        "leader": status.leader,
        "queues": queues,
        "bytes": status.size,
        "holders": holders,
        "refuses": if status.refuses.is_empty() { Value::Null } else { json!(status.refuses) },
    })
}
