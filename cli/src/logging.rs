//! Logs go to standard error. One place decides level and form.

use std::io::IsTerminal;

use clap::ValueEnum;
use tracing_subscriber::EnvFilter;

/// How much is logged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Level {
    /// Only what failed.
    Error,
    /// What may need somebody.
    Warn,
    /// The life of the process.
    Info,
    /// Single requests; no payloads.
    Debug,
    /// Everything.
    Trace,
}

impl Level {
    fn name(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warn => "warn",
            Self::Info => "info",
            Self::Debug => "debug",
            Self::Trace => "trace",
        }
    }
}

/// What the command line says about logs.
#[derive(Clone, Copy, Debug, clap::Args)]
pub struct LogArgs {
    /// How much to log to standard error; RUST_LOG, when set, decides instead
    #[arg(long, global = true, value_enum, value_name = "LEVEL")]
    pub log_level: Option<Level>,
    /// Log one JSON document a line
    #[arg(long, global = true)]
    pub log_json: bool,
}

/// Starts logging. `configured` is what the role's configuration says, or the command's own
/// default; the command line and RUST_LOG go before it.
pub fn start(args: LogArgs, configured: &str, configured_json: bool) {
    let level = match args.log_level {
        Some(level) => level.name(),
        None => configured,
    };
    // openraft tells of every election and append at INFO; raft/ logs what matters of it.
    let filter = EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| EnvFilter::new(format!("{level},openraft=warn,h2=warn,hyper=warn,tower=warn")));
    let logs = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let logs = logs.with_ansi(std::io::stderr().is_terminal());
    // A second start within one process, as in tests, keeps the first.
    let _ = if args.log_json || configured_json { logs.json().try_init() } else { logs.try_init() };
}
