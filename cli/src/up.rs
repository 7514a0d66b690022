//! `arqon up`: a cluster on this machine until Ctrl-C.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::time::Duration;

use tokio::time::{Instant, sleep};

use crate::cluster::{Layout, LocalCluster, NODE_COUNT_MAX};
use crate::signals::StopSignals;
use crate::{Failure, output};

/// So many processes may end by themselves within [`RESTARTS_WITHIN`].
const RESTARTS_MAX: usize = 10;
const RESTARTS_WITHIN: Duration = Duration::from_secs(60);
const RESTART_PAUSE: Duration = Duration::from_secs(1);

/// Arguments of `arqon up`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Examples:\n  arqon up\n  arqon up --nodes 1 --data ./bus --json\n\n\
    The ports are the default ones when they are free; a cluster in DIR keeps its ports. Without\n\
    --data everything is deleted at the end. A process that ends by itself is started again.")]
pub struct UpArgs {
    /// Number of nodes
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=i64::from(NODE_COUNT_MAX)))]
    nodes: u16,
    /// Directory of the cluster, made when it is missing [default: a temporary one]
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Write configurations, keys and token into DIR, start nothing
    #[arg(long, requires = "data")]
    prepare: bool,
    /// Print one JSON document when the cluster is ready
    #[arg(long)]
    json: bool,
}

/// Runs until SIGINT or SIGTERM.
///
/// # Errors
/// A process does not start, or ends by itself.
pub async fn up(args: UpArgs) -> Result<(), Failure> {
    if let (true, Some(data)) = (args.prepare, &args.data) {
        return announce(&Layout::open(data, args.nodes, false)?, &[], args.json);
    }
    let temporary;
    let data = match args.data {
        Some(data) => data,
        None => {
            temporary = tempfile::Builder::new().prefix("arqon-").tempdir().map_err(Failure::failed)?;
            temporary.path().to_owned()
        }
    };
    let mut signals = StopSignals::listen()?;
    let mut cluster = tokio::select! {
        cluster = LocalCluster::start(&data, args.nodes, true) => cluster?,
        () = signals.wait() => return Ok(()),
    };
    announce(cluster.layout(), &cluster.pids(), args.json)?;
    let result = tokio::select! {
        failure = keep_running(&mut cluster) => Err(failure),
        () = signals.wait() => Ok(()),
    };
    result.and(cluster.stop().await)
}

/// Starts again what ends by itself, as a service manager would, until that happens too often.
async fn keep_running(cluster: &mut LocalCluster) -> Failure {
    let mut restarts: VecDeque<Instant> = VecDeque::new();
    loop {
        let (index, failure) = cluster.ended().await;
        if restarts.len() == RESTARTS_MAX && restarts.front().is_some_and(|first| first.elapsed() < RESTARTS_WITHIN) {
            return failure;
        }
        while restarts.len() >= RESTARTS_MAX {
            restarts.pop_front();
        }
        restarts.push_back(Instant::now());
        tracing::warn!("{failure}; starting it again");
        sleep(RESTART_PAUSE).await;
        if let Err(failure) = cluster.restart(index).await {
            return failure;
        }
    }
}

fn announce(layout: &Layout, pids: &[u32], json: bool) -> Result<(), Failure> {
    if json {
        return output::json(&layout.document(pids));
    }
    let console = layout.addresses().first().map(|node| node.admin.as_str()).unwrap_or_default();
    output::line(format_args!(
        "{} nodes in {}\n\n  nodes    {}\n  shield   {}\n  metrics  http://{console}/metrics\n\n\
         In another terminal:\n\n  export ARQON_SERVER={}\n  export ARQON_TOKEN={}",
        layout.addresses().len(),
        layout.data().display(),
        layout.servers(),
        layout.shield(),
        layout.servers(),
        layout.token()
    ))?;
    if pids.is_empty() { Ok(()) } else { output::line("\nCtrl-C stops the cluster.") }
}
