//! `arqon-jepsen`: see the library.

use std::{path::PathBuf, process::ExitCode};

use arqon_jepsen::{History, SmokeArgs, Verdict, json, judge, smoke, text};
use clap::{Parser, Subcommand};
use tokio::signal::unix::{SignalKind, signal};

/// Fault tests of ArqonBus on real processes.
///
/// Exit code 0: valid. 1: an anomaly, or a run that does not count, or no verdict. 2: usage.
#[derive(Parser)]
#[command(name = "arqon-jepsen", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Three nodes under appends, one killed each second, then healed and judged
    Smoke(SmokeArgs),
    /// Judge a stored history
    #[command(after_help = "Example:\n  arqon-jepsen check history.jsonl --json")]
    Check {
        /// The history, JSON lines
        history: PathBuf,
        /// Print the verdict as one JSON document
        #[arg(long)]
        json: bool,
    },
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => return failed(&format!("cannot start: {error}")),
    };
    match arguments.command {
        Command::Check { history, json } => match History::load(&history) {
            Ok(loaded) => show(&judge(&loaded), &history, None, json),
            Err(error) => failed(&error.to_string()),
        },
        Command::Smoke(args) => {
            let as_json = args.json;
            // A signal drops the run, and with it the cluster, whose nodes are killed then.
            let run = runtime.block_on(async {
                tokio::select! {
                    run = smoke(args) => run,
                    stopped = stop_signal() => Err(stopped),
                }
            });
            match run {
                Ok(run) => show(&run.verdict, &run.history, Some(&run.replay), as_json),
                Err(error) => failed(&error),
            }
        }
    }
}

async fn stop_signal() -> String {
    let (Ok(mut terminate), Ok(mut interrupt)) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        return "cannot listen for signals".to_owned();
    };
    tokio::select! {
        _ = terminate.recv() => "stopped by SIGTERM".to_owned(),
        _ = interrupt.recv() => "stopped by Ctrl-C".to_owned(),
    }
}

fn show(verdict: &Verdict, history: &std::path::Path, replay: Option<&str>, as_json: bool) -> ExitCode {
    let shown = if as_json { json(verdict, history, replay) } else { text(verdict, history, replay) };
    println!("{shown}");
    if verdict.valid { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn failed(error: &str) -> ExitCode {
    eprintln!("error: {error}");
    ExitCode::FAILURE
}
