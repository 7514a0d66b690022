//! `arqon cluster recover`: goes on with what is left when most nodes are lost for good.

use std::path::PathBuf;

use arqon_spine::{Config, LostPartition, UnsafeRecovery};
use serde_json::{Value, json};

use crate::{Failure, confirm, output};

/// Arguments of `arqon cluster recover`.
#[derive(Clone, Debug, clap::Args)]
pub struct RecoverArgs {
    /// Says that events may be lost; there is no other way
    #[arg(long = "unsafe", required = true)]
    accepts_loss: bool,
    /// Configuration of the node that is left; it must be stopped
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Nodes that are gone for good, divided by commas
    #[arg(long, value_name = "NODES", value_delimiter = ',', required = true)]
    lost: Vec<u64>,
    /// Of several nodes that are left, the one whose metadata counts; the same on all of them [default: this one]
    #[arg(long, value_name = "NODE")]
    keep: Option<u64>,
    /// Do it, without asking: the name of the cluster
    #[arg(long, value_name = "CLUSTER")]
    confirm: Option<String>,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

/// Shows what would be lost and, when that is confirmed, goes on without it.
///
/// # Errors
/// The configuration or an argument is wrong, the node runs, nobody confirmed, or the disk failed.
pub async fn recover(args: RecoverArgs) -> Result<(), Failure> {
    let place = args.config.display();
    let config = Config::load(&args.config).map_err(|error| Failure::failed(error).at(place))?;
    let recovery = UnsafeRecovery::plan(&config, args.lost.iter().copied().collect(), args.keep);
    let recovery = recovery.map_err(Failure::failed)?;
    if !args.json {
        show(&recovery, &args.lost)?;
    }
    let document = document(&recovery, &args.lost);
    let given = match args.confirm {
        Some(given) => given,
        None => {
            let prompt = "Type the name of the cluster to go on without the lost nodes";
            confirm::ask(prompt, &format!("--confirm {}", config.cluster))?
        }
    };
    if given != config.cluster {
        return Err(Failure::failed(format!(
            "not confirmed: {given:?} is not the name of the cluster; nothing was changed"
        )));
    }
    let is_keeper = recovery.is_keeper();
    recovery.carry_out().await.map_err(Failure::failed)?;
    if args.json {
        return output::json(&document);
    }
    output::line(if is_keeper {
        "done. Start this node; empty the data directories of the lost nodes before they come back, and add them with \
         `arqon cluster add-node`"
    } else {
        "done. Start this node when the one that keeps the metadata runs"
    })
}

fn show(recovery: &UnsafeRecovery, lost: &[u64]) -> Result<(), Failure> {
    let nodes = lost.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    output::line(format_args!(
        "Without nodes {nodes}, {} partitions have lost their majority. Commands and events that only the lost nodes \
         had are gone:",
        recovery.partitions().len()
    ))?;
    let rows: Vec<Vec<String>> = recovery
        .partitions()
        .iter()
        .map(|lost| {
            let [kept, risk] = fate(lost);
            vec![format!("{}/{}/{}", lost.tenant, lost.topic, lost.partition), lost.keeper.to_string(), kept, risk]
        })
        .collect();
    output::table(&["PARTITION", "NODE", "KEPT", "MAY BE LOST"], &rows)
}

fn fate(lost: &LostPartition) -> [String; 2] {
    match lost.kept {
        _ if lost.is_empty => ["nothing".to_owned(), "everything".to_owned()],
        None => ["see that node".to_owned(), "see that node".to_owned()],
        Some(kept) => {
            let doubtful = if kept.certain < kept.end {
                format!(" ({} to {} perhaps never acknowledged)", kept.certain, kept.end.0 - 1)
            } else {
                String::new()
            };
            [format!("{} to {}{doubtful}", kept.start, kept.end), format!("from offset {} on", kept.end)]
        }
    }
}

fn document(recovery: &UnsafeRecovery, lost: &[u64]) -> Value {
    let partition = |lost: &LostPartition| {
        json!({
            "tenant": lost.tenant,
            "topic": lost.topic,
            "partition": lost.partition,
            "node": lost.keeper.0,
            "empty": lost.is_empty,
            "log_start": lost.kept.map(|kept| kept.start.0),
            "certain_to": lost.kept.map(|kept| kept.certain.0),
            "lost_from": lost.kept.map(|kept| kept.end.0),
        })
    };
    json!({
        "lost_nodes": lost,
        "keeps_metadata": recovery.is_keeper(),
        "partitions": recovery.partitions().iter().map(partition).collect::<Vec<_>>(),
    })
}
