//! The command line: many seeds, one seed, and the names of the faults.

use std::{path::PathBuf, process::ExitCode, time::Duration};

use clap::{Args, Parser, Subcommand};

use crate::{
    faults::{KINDS, Kind},
    fleet::{Fleet, Totals},
    run::{Report, Settings, run},
};

/// Real time for one seed, which needs some seconds of the processor: on a machine that does much else they take long.
const SEED_PATIENCE: Duration = Duration::from_secs(600);

#[derive(Parser)]
#[command(name = "arqon-sim", about = "A cluster in one thread: faults by a seed, every run replays", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Runs many seeds; a failing one is printed with the command that replays it.
    Run(Many),
    /// Runs one seed in this process and prints its report as JSON; with --trace, what happens.
    One(One),
    /// Names the faults.
    List,
}

#[derive(Args, Clone)]
struct Shape {
    /// How long faults come and go in a run, in simulated time.
    #[arg(long, default_value = "20s", value_parser = humantime::parse_duration)]
    length: Duration,
    /// Brokers; drawn from the seed when absent.
    #[arg(long, value_parser = clap::value_parser!(u8).range(1..=9))]
    nodes: Option<u8>,
    /// Only these faults, with commas between them; by default each seed draws some.
    #[arg(long, value_delimiter = ',', value_parser = parse_kind)]
    faults: Vec<Kind>,
    /// A positive control: the disks lie, and a sync makes nothing durable.
    #[arg(long)]
    lying_disks: bool,
}

#[derive(Args)]
struct Many {
    /// How many seeds; without it and without --time: 200.
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    seeds: Option<u64>,
    /// So many seeds at least, however long they take.
    #[arg(long, default_value_t = 1, requires = "time", conflicts_with = "seeds")]
    seeds_min: u64,
    /// The first seed.
    #[arg(long, default_value_t = 1)]
    from: u64,
    /// No seed begins after this time, but for --seeds-min.
    #[arg(long, value_parser = humantime::parse_duration)]
    time: Option<Duration>,
    /// Processes at once; by default one for each processor.
    #[arg(long)]
    jobs: Option<usize>,
    /// No seed begins after one that failed.
    #[arg(long)]
    stop_at_first: bool,
    /// Runs each seed twice and compares the two runs event by event.
    #[arg(long)]
    twice: bool,
    /// Prints what happens, of one seed.
    #[arg(long, conflicts_with_all = ["seeds", "seeds_min", "time", "jobs", "twice", "json", "stop_at_first"])]
    trace: bool,
    /// Prints a report as JSON for each seed.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    shape: Shape,
}

#[derive(Args)]
struct One {
    /// The seed.
    #[arg(long)]
    seed: u64,
    /// Prints what happens; twice: packets too.
    #[arg(long, action = clap::ArgAction::Count)]
    trace: u8,
    #[command(flatten)]
    shape: Shape,
}

fn parse_kind(text: &str) -> Result<Kind, String> {
    let find = KINDS.into_iter().find(|kind| format!("{kind:?}").eq_ignore_ascii_case(text));
    find.ok_or_else(|| format!("{text:?} is no fault; `arqon-sim list` names them"))
}

/// The program.
#[must_use]
pub fn main() -> ExitCode {
    match Cli::parse().command {
        Command::Run(many) if many.trace => run_one(&One { seed: many.from, trace: 1, shape: many.shape }),
        Command::Run(many) => run_many(&many),
        Command::One(one) => run_one(&one),
        Command::List => {
            KINDS.iter().for_each(|kind| println!("{kind:?}"));
            ExitCode::SUCCESS
        }
    }
}

fn run_one(one: &One) -> ExitCode {
    crate::trace::print(one.trace);
    let kinds = (!one.shape.faults.is_empty()).then(|| one.shape.faults.clone());
    let settings = Settings {
        seed: one.seed,
        length: one.shape.length,
        node_count: one.shape.nodes,
        kinds,
        lying_disks: one.shape.lying_disks,
    };
    let report = run(&settings);
    match serde_json::to_string(&report) {
        Ok(text) => println!("{text}"),
        Err(error) => eprintln!("the report cannot be written: {error}"),
    }
    let code = u8::from(!report.broken.is_empty());
    // Nothing is taken down: machines that still run would want a world.
    std::process::exit(i32::from(code))
}

fn shape_arguments(shape: &Shape) -> Vec<String> {
    let mut out = vec![format!("--length={}", humantime::format_duration(shape.length).to_string().replace(' ', ""))];
    out.extend(shape.nodes.map(|count| format!("--nodes={count}")));
    if shape.lying_disks {
        out.push("--lying-disks".to_owned());
    }
    if !shape.faults.is_empty() {
        let names: Vec<String> = shape.faults.iter().map(|kind| format!("{kind:?}")).collect();
        out.push(format!("--faults={}", names.join(",")));
    }
    out
}

fn run_many(many: &Many) -> ExitCode {
    let program = match std::env::current_exe() {
        Ok(program) => program,
        Err(error) => {
            eprintln!("error: this program does not find itself: {error}");
            return ExitCode::FAILURE;
        }
    };
    let arguments = shape_arguments(&many.shape);
    let fleet = fleet(many, program, &arguments);
    let totals = fleet.run(|report| tell(report, many.json, &arguments));
    summarise(&totals);
    if totals.failed().next().is_some() { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

fn fleet(many: &Many, program: PathBuf, arguments: &[String]) -> Fleet {
    let count = if many.seeds.is_none() && many.time.is_none() { Some(200) } else { many.seeds };
    let parallelism = many.jobs.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
    let arguments = std::iter::once("one".to_owned()).chain(arguments.iter().cloned()).collect();
    Fleet {
        program,
        arguments,
        from: many.from,
        count,
        count_min: many.seeds_min,
        time: many.time,
        parallelism,
        patience: SEED_PATIENCE,
        twice: many.twice,
        stop_at_first: many.stop_at_first,
    }
}

fn tell(report: &Report, as_json: bool, arguments: &[String]) {
    if as_json {
        match serde_json::to_string(report) {
            Ok(text) => println!("{text}"),
            Err(error) => eprintln!("the report cannot be written: {error}"),
        }
    } else if !report.broken.is_empty() {
        println!("seed {} fails:", report.seed);
        for (name, what) in report.broken.iter().take(5) {
            println!("  {name}: {what}");
        }
        let differs = report.broken.iter().any(|(name, _)| name == "same-run-twice");
        let how = if differs { "--seeds 1 --twice" } else { "--trace" };
        println!("  replay: arqon-sim run --from {} {how} {}", report.seed, arguments.join(" "));
    }
}

fn summarise(totals: &Totals) {
    let sum = |of: fn(&Report) -> u64| totals.reports.iter().map(of).sum::<u64>();
    let (count, failed) = (totals.reports.len(), totals.failed().count());
    let simulated_s = sum(|report| report.simulated_ms) as f64 / 1_000.0;
    let seconds = totals.took.as_secs_f64();
    let cpu_ms = sum(|report| report.cpu_ms) as f64;
    let fault_count = sum(|report| report.faults.values().sum());
    eprintln!(
        "{count} seeds in {seconds:.0} s, {:.0} a minute: {failed} failed; {simulated_s:.0} s simulated at {:.1} ms of \
         CPU a second, {fault_count} faults, {} acknowledged, {} jobs completed",
        count as f64 * 60.0 / seconds.max(0.001),
        cpu_ms / simulated_s.max(0.001),
        sum(|report| report.acked_count),
        sum(|report| report.completed_count),
    );
}
