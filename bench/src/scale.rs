//! `arqon-bench scale`: how cost grows with partitions, with the log, and with greedy clients.
//!
//! ```text
//!   growth    3 nodes and N partitions: throughput, CPU at rest, memory of a replica
//!   restart   1 node with much log: time until every partition serves, after SIGTERM and SIGKILL
//!   reader    what a reader of old data does to a publisher
//!   greedy    memory of the nodes at full load, whatever clients do; and inside a cgroup
//! ```

mod cgroup;
mod greedy;
mod growth;
mod hello;
mod process;
mod publish;
mod reader;
mod restart;
mod table;

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use arqon_jepsen::{Cluster, find_arqon};
use arqon_sdk::{Client, Options};

use self::table::Line;
pub use self::table::Table;
use crate::disk::Gauge;

/// Partitions of the growing cases.
const PARTITION_COUNTS: [u32; 4] = [1, 10, 100, 1_000];
/// Partitions of the restarted node.
const RESTART_COUNTS: [u32; 2] = [1, 100];

/// Arguments of `scale`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Cases: growth-1, growth-10, growth-100, growth-1000, restart-1, restart-100, reader, greedy, \
    cgroup.\n\nExample:\n  arqon-bench scale --cases growth-10,growth-1000\n\n\
    docs/bench/README.md says what each figure means.")]
pub struct ScaleArgs {
    /// Only cases whose name begins with one of these [default: all]
    #[arg(long, value_name = "NAME,...", value_delimiter = ',')]
    cases: Vec<String>,
    /// A short look: a tenth of the log, short rounds
    #[arg(long)]
    quick: bool,
    /// Bytes of log before a restart
    #[arg(long, value_name = "BYTES", default_value = "10GB", value_parser = parse_bytes)]
    log_size: u64,
    /// How often a restart is measured, each after SIGTERM and after SIGKILL
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=99))]
    restarts: u32,
    /// Directory on the disk to measure, made when missing [default: a temporary one]
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// The arqon program [default: the one beside this program, else built]
    #[arg(long, value_name = "FILE")]
    arqon: Option<PathBuf>,
    /// Seed of the payloads
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Print one JSON document
    #[arg(long)]
    pub json: bool,
}

fn parse_bytes(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let digits = text.trim_end_matches(|letter: char| letter.is_ascii_alphabetic());
    let unit = match &text[digits.len()..] {
        "" | "B" => 1,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        _ => return Err("must be bytes, or end in MB or GB".to_owned()),
    };
    let size = digits.parse::<u64>().ok().and_then(|number| number.checked_mul(unit));
    size.filter(|size| *size >= 1_000_000).ok_or_else(|| "must be 1MB or more".to_owned())
}

impl ScaleArgs {
    fn wants(&self, case: &str) -> bool {
        self.cases.is_empty()
            || self.cases.iter().any(|wanted| case == wanted || case.starts_with(&format!("{wanted}-")))
    }

    fn time(&self, seconds: u64) -> Duration {
        Duration::from_secs(if self.quick { seconds.div_ceil(4) } else { seconds })
    }

    fn log_size(&self) -> u64 {
        if self.quick { self.log_size / 10 } else { self.log_size }
    }
}

/// What the cases share.
struct Bench<'a> {
    args: &'a ScaleArgs,
    arqon: PathBuf,
    dir: &'a Path,
}

impl Bench<'_> {
    fn note(&self, text: &str) {
        eprintln!("{text}");
    }

    /// A fresh cluster, whose data is below the directory that comes with it.
    async fn cluster(&self, nodes: u32) -> Result<(Cluster, tempfile::TempDir), String> {
        let data = tempfile::tempdir_in(self.dir).map_err(|error| error.to_string())?;
        let cluster = Cluster::start(self.arqon.clone(), data.path(), nodes).await.map_err(text)?;
        Ok((cluster, data))
    }
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

async fn client(cluster: &Cluster) -> Result<Client, String> {
    let mut options = Options::new([cluster.server()], cluster.token());
    options.client_name = "arqon-bench".to_owned();
    Client::connect(options).await.map_err(text)
}

/// Measures the cases that `args` ask for.
///
/// # Errors
/// The line that says what failed.
pub async fn run(args: ScaleArgs) -> Result<Table, String> {
    let known =
        |wanted: &String| case_names().iter().any(|name| name == wanted || name.starts_with(&format!("{wanted}-")));
    if let Some(unknown) = args.cases.iter().find(|wanted| !known(wanted)) {
        return Err(format!("--cases {unknown}: there are {}", case_names().join(", ")));
    }
    let arqon = find_arqon(args.arqon.clone()).await.map_err(text)?;
    let temporary = crate::own::temporary_directory(args.dir.as_deref())?;
    if Gauge::new(temporary.path())?.is_tmpfs() {
        eprintln!("warning: the directory lies in memory (tmpfs), no figure is about a disk; see --dir");
    }
    let bench = Bench { args: &args, arqon, dir: temporary.path() };
    let mut lines = Vec::new();
    for count in PARTITION_COUNTS {
        if args.wants(&format!("growth-{count}")) {
            lines.extend(growth::measure(&bench, count).await?);
        }
    }
    lines.extend(shown(growth::ratios(&lines)));
    for count in RESTART_COUNTS {
        if args.wants(&format!("restart-{count}")) {
            lines.extend(shown(restart::measure(&bench, count).await?));
        }
    }
    if args.wants("reader") {
        lines.extend(shown(reader::measure(&bench).await?));
    }
    if args.wants("greedy") {
        lines.extend(greedy::measure(&bench).await?);
    }
    if args.wants("cgroup") {
        lines.extend(shown(greedy::measure_in_cgroup(&bench).await?));
    }
    Ok(Table::new(lines))
}

fn case_names() -> Vec<String> {
    let growth = PARTITION_COUNTS.iter().map(|count| format!("growth-{count}"));
    let restart = RESTART_COUNTS.iter().map(|count| format!("restart-{count}"));
    growth.chain(restart).chain(["reader", "greedy", "cgroup"].map(str::to_owned)).collect()
}

fn shown(lines: Vec<Line>) -> Vec<Line> {
    for line in &lines {
        eprintln!("{}", line.text());
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_with_their_units() {
        assert_eq!(parse_bytes("10GB"), Ok(10_000_000_000));
        assert_eq!(parse_bytes("250MB"), Ok(250_000_000));
        assert_eq!(parse_bytes("1048576"), Ok(1 << 20));
        for bad in ["", "GB", "10 GiB", "-1GB", "1", "99999999999999GB"] {
            assert!(parse_bytes(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_case_is_chosen_by_its_name_or_its_family() {
        #[derive(clap::Parser)]
        struct Parsed {
            #[command(flatten)]
            args: ScaleArgs,
        }
        let args = |cases: &str| <Parsed as clap::Parser>::parse_from(["scale", "--cases", cases]).args;
        assert!(args("growth-10").wants("growth-10") && !args("growth-10").wants("growth-100"));
        assert!(args("growth,reader").wants("growth-1000") && args("growth,reader").wants("reader"));
        assert!(!args("restart").wants("reader"));
    }
}
