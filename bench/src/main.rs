//! `arqon-bench`: how fast ArqonBus is, beside what the disk alone can do.
//!
//! ```text
//!   self ─┬─ disk       what one writer gets from the disk, without a bus
//!         ├─ cluster    1 or 3 node processes (of arqon-jepsen)
//!         ├─ load       the clients: publish, one at a time, fetch, publish to consume
//!         ├─ cpu        what the nodes used, from /proc
//!         └─ report     medians of the rounds, as a table or JSON
//! ```

mod cpu;
mod disk;
mod load;
mod own;
mod payload;
mod report;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tokio::signal::unix::{SignalKind, signal};

/// Benchmarks of ArqonBus.
#[derive(Parser)]
#[command(name = "arqon-bench", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// A local cluster of node processes: throughput, latency and CPU, beside the raw disk
    #[command(name = "self")]
    Own(own::OwnArgs),
}

fn main() -> ExitCode {
    let Arguments { command: Command::Own(args) } = Arguments::parse();
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => return failed(&format!("cannot start: {error}")),
    };
    let as_json = args.json;
    // A signal drops the run, and with it the cluster, whose nodes are killed then.
    let report = runtime.block_on(async {
        tokio::select! {
            report = own::run(args) => report,
            stopped = stop_signal() => Err(stopped),
        }
    });
    match report {
        Ok(report) => {
            println!("{}", if as_json { report.json() } else { report.table() });
            ExitCode::SUCCESS
        }
        Err(error) => failed(&error),
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

fn failed(error: &str) -> ExitCode {
    eprintln!("error: {error}");
    ExitCode::FAILURE
}
