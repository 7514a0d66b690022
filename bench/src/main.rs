//! `arqon-bench`: how fast ArqonBus is, beside what the disk alone can do.
//!
//! ```text
//!   self ─┬─ disk       what one writer gets from the disk, without a bus
//!         ├─ cluster    1 or 3 node processes (of arqon-jepsen)
//!         ├─ load       the clients: publish, one at a time, fetch, publish to consume
//!         ├─ cpu        what the nodes used, from /proc
//!         └─ report     medians of the rounds, as a table or JSON
//!   nats                 the same work on NATS JetStream
//!   builds               the same work on two programs of this bus
//!   rounds               what durable writes to many files cost, each way to ask the disk
//!   scale                partitions, restarts, old readers, greedy clients
//! ```

mod cpu;
mod disk;
mod load;
mod nats;
mod own;
mod payload;
mod report;
mod rounds;
mod scale;

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
    /// The disk alone: rounds of writes over many files, made durable in each possible way
    Rounds(rounds::RoundsArgs),
    /// How cost grows with partitions, with the log, and with greedy clients; each with its target
    Scale(scale::ScaleArgs),
    /// The same work on this bus and on NATS JetStream, in turn
    Nats(nats::NatsArgs),
    /// The same work on two programs of this bus, in turn: what a change costs
    Builds(nats::BuildsArgs),
}

impl Command {
    /// Runs to the end; gives what is to be printed.
    async fn run(self) -> Result<String, String> {
        match self {
            Self::Own(args) => {
                let as_json = args.json;
                own::run(args).await.map(|report| if as_json { report.json() } else { report.table() })
            }
            Self::Nats(args) => nats::run(args).await,
            Self::Builds(args) => nats::builds(args).await,
            Self::Rounds(args) => {
                let as_json = args.json;
                rounds::run(args).await.map(|rounds| if as_json { rounds.json() } else { rounds.table() })
            }
            Self::Scale(args) => {
                let as_json = args.json;
                scale::run(args).await.map(|table| if as_json { table.json() } else { table.table() })
            }
        }
    }
}

fn main() -> ExitCode {
    let Arguments { command } = Arguments::parse();
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => return failed(&format!("cannot start: {error}")),
    };
    // A signal drops the run, and with it the cluster, whose nodes are killed then.
    let output = runtime.block_on(async {
        tokio::select! {
            output = command.run() => output,
            stopped = stop_signal() => Err(stopped),
        }
    });
    match output {
        Ok(output) => {
            println!("{output}");
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
