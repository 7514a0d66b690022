//! `genesis-worker`: the HTTP service on its own.

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::Parser;
use tracing_subscriber::EnvFilter;

/// Distils pictures of noisy checkerboards to the seeds that draw them: POST /distill, GET /healthz.
#[derive(Debug, Parser)]
#[command(
    name = "genesis-worker",
    version,
    after_help = "Example: genesis-worker --listen 127.0.0.1:3000\nLogs go to standard error; RUST_LOG=debug shows every request."
)]
struct Cli {
    #[command(flatten)]
    args: genesis_worker::Args,
}

#[tokio::main]
async fn main() -> ExitCode {
    let cli = Cli::parse();
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .init();
    match genesis_worker::run(cli.args).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("genesis-worker: {error}");
            ExitCode::FAILURE
        }
    }
}
