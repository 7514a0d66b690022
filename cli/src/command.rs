//! The command line.

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::cluster_status::ClusterCommand;
use crate::group::GroupCommand;
use crate::logging::LogArgs;
use crate::offline::LogCommand;
use crate::serve::{ConfigArgs, OperatorCommand};
use crate::topic::TopicCommand;
use crate::{
    Failure, cluster_status, consume, demo, doctor, group, logging, offline, output, process, publish, serve, token,
    topic, up, version, work,
};

/// ArqonBus: an event-sourced, replicated log with job queues. Jobs in, results out, each once.
#[derive(Debug, Parser)]
#[command(
    name = "arqon",
    version = version::text(),
    propagate_version = true,
    after_help = "Example: arqon demo\n\nCommands that speak to a cluster find it by --server (or ARQON_SERVER, ARQONBUS_URL) and show the token in\n\
        ARQON_TOKEN (or ARQONBUS_TOKEN). Errors are one line on standard error; exit code 1: failed, 2: usage."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    log: LogArgs,
    /// The process that started this one; without it this one ends too.
    #[arg(long, global = true, hide = true)]
    parent_pid: Option<u32>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Start a cluster, run jobs through it, kill parts of it, and count what came out
    Demo(demo::DemoArgs),
    /// Run a cluster on this machine until Ctrl-C
    Up(up::UpArgs),
    /// Run one node
    #[command(
        after_help = "Example: arqon node --config node.toml\n\nPrints one line of JSON with its addresses when it is ready."
    )]
    Node(ConfigArgs),
    /// Run a Shield, the WebSocket edge
    #[command(
        after_help = "Example: arqon shield --config shield.toml\n\nPrints one line of JSON with its address when it is ready."
    )]
    Shield(ConfigArgs),
    /// Run an operator, or list those there are
    #[command(subcommand)]
    Operator(OperatorCommand),
    /// Show the state of the cluster
    #[command(subcommand)]
    Cluster(ClusterCommand),
    /// Make, list, describe and delete topics
    #[command(subcommand)]
    Topic(TopicCommand),
    /// List, describe and delete the groups of workers of a jobs topic
    #[command(subcommand)]
    Group(GroupCommand),
    /// Publish lines as events
    Publish(publish::PublishArgs),
    /// Print the events of a topic
    Consume(consume::ConsumeArgs),
    /// Run a command for each job of a queue
    Work(work::WorkArgs),
    /// Make access tokens, and keys that sign them
    Token(token::TokenArgs),
    /// Read the data directory of a node
    #[command(subcommand)]
    Log(LogCommand),
    /// Check whether this machine is fit to run a node
    Doctor(doctor::DoctorArgs),
    /// The worker of the demo
    #[command(hide = true)]
    GenesisWorker(genesis_worker::Args),
}

impl Command {
    /// Roles start their logs themselves, as their configuration says.
    fn is_role(&self) -> bool {
        matches!(
            self,
            Self::Node(_) | Self::Shield(_) | Self::GenesisWorker(_) | Self::Operator(OperatorCommand::Http(_))
        )
    }
}

/// Runs the command line of this process.
#[must_use]
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) if output::gone(&failure) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("arqon: {failure}");
            failure.exit_code()
        }
    }
}

fn run(cli: Cli) -> Result<(), Failure> {
    if let Some(parent) = cli.parent_pid {
        process::die_with_parent(parent)?;
    }
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    if let Command::Node(args) = &cli.command
        && let Some(threads) = args.node_threads()?
    {
        runtime.worker_threads(threads);
    }
    let runtime = runtime.enable_all().build();
    let runtime = runtime.map_err(|error| Failure::failed(format!("cannot start threads: {error}")))?;
    // On this thread, which lives as long as the process: children die with it.
    let result = runtime.block_on(dispatch(cli.command, cli.log));
    // A read of standard input cannot be cancelled and must not hold up the end.
    runtime.shutdown_background();
    result
}

async fn dispatch(command: Command, log: LogArgs) -> Result<(), Failure> {
    if !command.is_role() {
        logging::start(log, "warn", false);
    }
    match command {
        Command::Demo(args) => demo::demo(args).await,
        Command::Up(args) => up::up(args).await,
        Command::Node(args) => serve::node(args, log).await,
        Command::Shield(args) => serve::shield(args, log).await,
        Command::Operator(OperatorCommand::Http(args)) => serve::operator_http(args, log).await,
        Command::Operator(OperatorCommand::List(args)) => cluster_status::operator_list(args).await,
        Command::Cluster(command) => cluster_status::cluster(command).await,
        Command::Topic(command) => topic::topic(command).await,
        Command::Group(command) => group::group(command).await,
        Command::Publish(args) => publish::publish(args).await,
        Command::Consume(args) => consume::consume(args).await,
        Command::Work(args) => work::work(args).await,
        Command::Token(args) => token::token(args),
        Command::Log(command) => offline::log(command),
        Command::Doctor(args) => doctor::doctor(args).await,
        Command::GenesisWorker(args) => {
            logging::start(log, "info", false);
            genesis_worker::run(args).await.map_err(Failure::failed)
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn check(command: &clap::Command, path: &str) {
        let path = format!("{path} {}", command.get_name());
        if command.is_hide_set() || command.get_name() == "help" {
            return;
        }
        if command.has_subcommands() {
            return command.get_subcommands().for_each(|sub| check(sub, &path));
        }
        let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
        assert!(help.contains("Example"), "{path} has no example");
        assert!(help.contains("arqon "), "{path} has no example");
    }

    #[test]
    fn every_command_has_an_example() {
        let command = Cli::command();
        command.clone().debug_assert();
        command.get_subcommands().for_each(|sub| check(sub, "arqon"));
    }
}
