//! `arqon group`: the groups of workers of a jobs topic, and how far each of them is.

use std::collections::BTreeMap;

use arqon_proto::{TopicClass, wire};
use serde_json::{Value, json};

use crate::connect::ConnectControl;
use crate::{Failure, confirm, output};

/// What to do with groups.
#[derive(Clone, Debug, clap::Subcommand)]
pub enum GroupCommand {
    /// List the groups of a jobs topic
    #[command(after_help = "Example: arqon group list demo.jobs")]
    List(ListArgs),
    /// Show how far a group is in each partition
    #[command(after_help = "Example: arqon group describe demo.jobs render")]
    Describe(DescribeArgs),
    /// Delete a group: which jobs it has settled is forgotten, and retention waits for it no more
    #[command(
        after_help = "Example: arqon group delete demo.jobs render\n\nStop its workers first: one that goes on makes a group of the same name, which begins\n\
        at the oldest job that is kept."
    )]
    Delete(DeleteArgs),
}

/// Arguments of `arqon group list`.
#[derive(Clone, Debug, clap::Args)]
pub struct ListArgs {
    /// Name of the jobs topic
    topic: String,
    #[command(flatten)]
    connect: ConnectControl,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

/// Arguments of `arqon group describe`.
#[derive(Clone, Debug, clap::Args)]
pub struct DescribeArgs {
    /// Name of the jobs topic
    topic: String,
    /// Name of the group
    group: String,
    #[command(flatten)]
    connect: ConnectControl,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

/// Arguments of `arqon group delete`.
#[derive(Clone, Debug, clap::Args)]
pub struct DeleteArgs {
    /// Name of the jobs topic
    topic: String,
    /// Name of the group
    group: String,
    /// Delete it although workers hold leases or wait for jobs
    #[arg(long)]
    force: bool,
    /// Do not ask for the name of the group
    #[arg(long)]
    yes: bool,
    #[command(flatten)]
    connect: ConnectControl,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

/// A group in one partition, as its leader says.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Position {
    partition: u32,
    /// Every job below is settled.
    floor: u64,
    next: u64,
    end: u64,
    leased: u64,
    pending: u64,
    /// Bytes of segments that are kept for it.
    held_size: u64,
}

impl Position {
    /// Jobs from the first unsettled one on.
    fn lag(&self) -> u64 {
        self.end.saturating_sub(self.floor)
    }

    fn document(&self) -> Value {
        json!({
            "partition": self.partition,
            "floor": self.floor,
            "next": self.next,
            "end": self.end,
            "lag": self.lag(),
            "leased": self.leased,
            "pending": self.pending,
            "held_bytes": self.held_size,
        })
    }
}

/// Does what the arguments say.
///
/// # Errors
/// The control plane cannot be reached or refuses.
pub async fn group(command: GroupCommand) -> Result<(), Failure> {
    match command {
        GroupCommand::List(args) => list(args).await,
        GroupCommand::Describe(args) => describe(args).await,
        GroupCommand::Delete(args) => delete(args).await,
    }
}

/// The groups of a topic, and the partitions whose leaders did not answer.
async fn groups(connect: &ConnectControl, topic: &str) -> Result<(BTreeMap<String, Vec<Position>>, Vec<u32>), Failure> {
    let mut control = connect.control().await?;
    let request = control.request(wire::DescribeTopic { topic: topic.to_owned() });
    let status = control.client().describe_topic(request).await?.into_inner();
    let description = status.description.unwrap_or_default();
    if description.class != TopicClass::Jobs.name() {
        let class = description.class;
        return Err(Failure::failed(format!("topic: {topic} is of class {class}: only a jobs topic has groups")));
    }
    let is_silent = |partition: &u32| status.leaders.iter().all(|leader| leader.partition != *partition);
    let silent = description.partitions.iter().map(|at| at.partition).filter(is_silent).collect();
    Ok((positions(&status.leaders), silent))
}

fn positions(leaders: &[wire::PartitionStatus]) -> BTreeMap<String, Vec<Position>> {
    let mut groups: BTreeMap<String, Vec<Position>> = BTreeMap::new();
    for status in leaders {
        for queue in &status.queues {
            let holder = status.holders.iter().find(|holder| holder.kind == "queue" && holder.name == queue.group);
            groups.entry(queue.group.clone()).or_default().push(Position {
                partition: status.partition,
                floor: queue.floor,
                next: queue.next,
                end: status.committed,
                leased: queue.leased,
                pending: queue.pending,
                held_size: holder.map_or(0, |holder| holder.size),
            });
        }
    }
    groups
}

fn tell_silent(silent: &[u32]) -> Result<(), Failure> {
    if silent.is_empty() {
        return Ok(());
    }
    let names: Vec<String> = silent.iter().map(ToString::to_string).collect();
    output::line(format_args!("no leader answers for partitions {}", names.join(", ")))
}

async fn list(args: ListArgs) -> Result<(), Failure> {
    let (groups, silent) = groups(&args.connect, &args.topic).await?;
    let sum = |positions: &[Position], of: fn(&Position) -> u64| positions.iter().map(of).sum::<u64>();
    if args.json {
        let document = |(name, at): (&String, &Vec<Position>)| {
            json!({
                "group": name,
                "partitions": at.len(),
                "lag": sum(at, Position::lag),
                "leased": sum(at, |at| at.leased),
                "pending": sum(at, |at| at.pending),
                "held_bytes": sum(at, |at| at.held_size),
            })
        };
        let all: Vec<Value> = groups.iter().map(document).collect();
        return output::json(&json!({ "topic": args.topic, "groups": all, "partitions_without_answer": silent }));
    }
    let row = |(name, at): (&String, &Vec<Position>)| {
        let sums =
            [sum(at, Position::lag), sum(at, |at| at.leased), sum(at, |at| at.pending), sum(at, |at| at.held_size)];
        let numbers = [at.len() as u64].into_iter().chain(sums).map(|number| number.to_string());
        std::iter::once(name.clone()).chain(numbers).collect()
    };
    let rows: Vec<Vec<String>> = groups.iter().map(row).collect();
    output::table(&["GROUP", "PARTITIONS", "LAG", "LEASED", "PENDING", "HOLDS BYTES"], &rows)?;
    tell_silent(&silent)
}

async fn describe(args: DescribeArgs) -> Result<(), Failure> {
    let (mut groups, silent) = groups(&args.connect, &args.topic).await?;
    let positions = groups.remove(&args.group);
    let Some(positions) = positions else {
        let known: Vec<String> = groups.into_keys().collect();
        let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
        return Err(Failure::failed(format!("{} has no group {:?}; it has {known}", args.topic, args.group)));
    };
    if args.json {
        let at: Vec<Value> = positions.iter().map(Position::document).collect();
        return output::json(&json!({
            "topic": args.topic,
            "group": args.group,
            "partitions": at,
            "partitions_without_answer": silent,
        }));
    }
    let row = |at: &Position| {
        let numbers = [at.partition.into(), at.floor, at.next, at.end, at.lag(), at.leased, at.pending, at.held_size];
        numbers.iter().map(u64::to_string).collect()
    };
    let rows: Vec<Vec<String>> = positions.iter().map(row).collect();
    output::table(&["PARTITION", "SETTLED TO", "NEXT", "END", "LAG", "LEASED", "PENDING", "HOLDS BYTES"], &rows)?;
    tell_silent(&silent)
}

async fn delete(args: DeleteArgs) -> Result<(), Failure> {
    if !args.yes {
        let prompt = format!("Type the name of the group to forget which jobs of {} it has settled", args.topic);
        let typed = confirm::ask(&prompt, "--yes")?;
        if typed != args.group {
            return Err(Failure::failed(format!(
                "not confirmed: {typed:?} is not the name of the group; nothing was changed"
            )));
        }
    }
    let mut control = args.connect.control().await?;
    let request = wire::DeleteGroupRequest { topic: args.topic.clone(), group: args.group.clone(), force: args.force };
    let request = control.request(request);
    let count = control.client().delete_group(request).await?.into_inner().partition_count;
    if args.json {
        return output::json(&json!({ "topic": args.topic, "group": args.group, "partitions": count }));
    }
    output::line(format_args!("deleted group {} of {} in {count} partitions", args.group, args.topic))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_of_all_partitions_come_together_under_their_group() {
        let status = |partition, group: &str, floor| wire::PartitionStatus {
            partition,
            committed: 10,
            queues: vec![wire::QueueStatus { group: group.into(), floor, next: 7, leased: 2, pending: 1 }],
            holders: vec![wire::RetentionHolder {
                kind: "queue".into(),
                name: group.into(),
                floor,
                records: 10 - floor,
                size: 99,
            }],
            ..Default::default()
        };
        let groups = positions(&[status(0, "a", 4), status(1, "b", 0), status(2, "a", 10)]);
        assert_eq!(groups.keys().collect::<Vec<_>>(), ["a", "b"]);
        let lags: Vec<_> = groups["a"].iter().map(|at| (at.partition, at.lag(), at.held_size)).collect();
        assert_eq!(lags, [(0, 6, 99), (2, 0, 99)]);
    }
}
