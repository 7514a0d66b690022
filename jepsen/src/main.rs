//! `arqon-jepsen`: see the library.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use arqon_jepsen::{
    ControlsArgs, History, RunArgs, ScorecardArgs, SoakArgs, Verdict, clean, controls, json, judge, list, reap, run,
    scorecard, serve_disk, soak, text, write_report,
};
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
    /// A cluster of hosts under load and faults, then healed and judged
    Run(RunArgs),
    /// Name workloads and faults, and what of them this machine can do
    List {
        /// The arqon program of an earlier release, as for `run`
        #[arg(long, value_name = "FILE")]
        arqon_before: Option<PathBuf>,
        /// The arqon program with crash points, as for `run`
        #[arg(long, value_name = "FILE")]
        planted: Option<PathBuf>,
    },
    /// Give back what runs left that were killed: namespaces, mounts, loop devices
    Clean,
    /// Clean up when standard input ends
    #[command(hide = true)]
    Reap {
        /// The claim of the run
        claim: PathBuf,
    },
    /// Serve a disk until standard input ends
    #[command(hide = true)]
    Disk {
        /// Where its bytes lie
        store: PathBuf,
        /// Where it is mounted
        mount: PathBuf,
    },
    /// Judge a stored history
    #[command(after_help = "Example:\n  arqon-jepsen check history.jsonl --json")]
    Check {
        /// The history, JSON lines
        history: PathBuf,
        /// Print the verdict as one JSON document
        #[arg(long)]
        json: bool,
        /// Write plots, timeline and a page beside the history
        #[arg(long)]
        report: bool,
    },
    /// One run after the other for hours, each noted in a ledger
    Soak(SoakArgs),
    /// What the ledger shows, as a table in Markdown
    Scorecard(ScorecardArgs),
    /// Planted bugs: who catches them, after how long, with which anomaly
    Controls(ControlsArgs),
}

fn main() -> ExitCode {
    match Arguments::parse().command {
        Command::Check { history, json, report } => check(&history, json, report),
        Command::Scorecard(args) => match scorecard(&args) {
            Ok(table) => {
                print!("{table}");
                ExitCode::SUCCESS
            }
            Err(error) => failed(&error),
        },
        Command::Soak(args) => match until_stopped(soak(&args)) {
            Ok(soaked) => {
                println!("{} runs, {} with anomalies", soaked.runs, soaked.invalid);
                if soaked.invalid == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
            }
            Err(error) => failed(&error),
        },
        Command::Controls(args) => match until_stopped(controls(&args)) {
            Ok((table, all_caught)) => {
                println!("{table}");
                if all_caught { ExitCode::SUCCESS } else { ExitCode::FAILURE }
            }
            Err(error) => failed(&error),
        },
        Command::Run(args) => {
            let as_json = args.json;
            match until_stopped(run(args)) {
                Ok(run) => show(&run.verdict, &run.history, Some(&run.replay), as_json),
                Err(error) => failed(&error),
            }
        }
        Command::List { arqon_before, planted } => {
            println!("{}", list(arqon_before.is_some(), planted.as_deref()));
            ExitCode::SUCCESS
        }
        Command::Clean => match clean() {
            Ok(runs) => {
                println!("cleaned up after {} runs", runs.len());
                ExitCode::SUCCESS
            }
            Err(error) => failed(&error),
        },
        Command::Reap { claim } => reap(&claim).map_or_else(|error| failed(&error), |()| ExitCode::SUCCESS),
        Command::Disk { store, mount } => match serve_disk(&store, &mount) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => failed(&format!("disk {}: {error}", mount.display())),
        },
    }
}

/// Judges a stored history, whoever made it.
fn check(history: &Path, as_json: bool, report: bool) -> ExitCode {
    let loaded = match History::load(history) {
        Ok(loaded) => loaded,
        Err(error) => return failed(&error.to_string()),
    };
    let verdict = judge(&loaded);
    if report {
        let dir = history.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
        match write_report(dir, &loaded, &verdict, None) {
            Ok(page) => eprintln!("report: {}", page.display()),
            Err(error) => return failed(&error),
        }
    }
    show(&verdict, history, None, as_json)
}

/// A signal drops what goes on, and with it what it started: nodes, hosts, other runs.
fn until_stopped<T>(what: impl Future<Output = Result<T, String>>) -> Result<T, String> {
    let runtime = tokio::runtime::Runtime::new().map_err(|error| format!("cannot start: {error}"))?;
    runtime.block_on(async {
        tokio::select! {
            ended = what => ended,
            stopped = stop_signal() => Err(stopped),
        }
    })
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

fn show(verdict: &Verdict, history: &Path, replay: Option<&str>, as_json: bool) -> ExitCode {
    let shown = if as_json { json(verdict, history, replay) } else { text(verdict, history, replay) };
    println!("{shown}");
    if verdict.valid { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn failed(error: &str) -> ExitCode {
    eprintln!("error: {error}");
    ExitCode::FAILURE
}
