//! Two programs of this bus in turn, case by case: what a change costs, or what it gains.

use std::path::PathBuf;
use std::time::Duration;

use arqon_jepsen::{find_arqon, parse_time};
use serde::Serialize;

use super::{
    LoadArgs, Plan, Report,
    cases::{self, Case},
    measure::HalfRound,
    report::{Figures, Verdict, figures_head, figures_line},
    stage::{Outcome, Stage},
};
use crate::own::temporary_directory;

/// What the later program may lose against the earlier one, and still counts as no slower.
const TOLERANCE: f64 = 0.05;

/// Arguments of `builds`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Example:\n  git worktree add ../before REV\n  \
    cargo build --release -p arqon-cli --manifest-path ../before/Cargo.toml --target-dir ../before/target\n  \
    arqon-bench builds --before ../before/target/release/arqon\n\n\
    Both have their clusters up all the time and take turns in every round; the settings are those that are best for the \
    earlier one.")]
pub struct BuildsArgs {
    /// The earlier arqon program
    #[arg(long, value_name = "FILE")]
    before: PathBuf,
    /// The later arqon program [default: the one beside this program, else built]
    #[arg(long, value_name = "FILE")]
    after: Option<PathBuf>,
    /// Only cases whose names contain one of these
    #[arg(long, value_name = "PART,...", value_delimiter = ',')]
    cases: Vec<String>,
    /// Time of each case on each side, divided over the rounds
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = parse_time)]
    time: Duration,
    /// Rounds of each case; the medians are reported
    #[arg(long, value_name = "N", default_value_t = 6, value_parser = clap::value_parser!(u32).range(1..=99))]
    rounds: u32,
    #[command(flatten)]
    load: LoadArgs,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

/// One case of both programs.
#[derive(Clone, Debug, Serialize)]
struct Pair {
    name: &'static str,
    before: Figures,
    after: Figures,
    targets: Vec<Verdict>,
}

impl Pair {
    fn new(case: &Case, before: Outcome, after: Outcome) -> Self {
        let ratio = |figure: fn(&HalfRound) -> f64| ratio(&before.rounds, &after.rounds, figure);
        let at_least = |what, ratio: f64| Verdict {
            what,
            ratio,
            target: format!("at least {}x", 1.0 - TOLERANCE),
            met: ratio >= 1.0 - TOLERANCE,
        };
        let at_most = |what, ratio: f64| Verdict {
            what,
            ratio,
            target: format!("at most {}x", 1.0 + TOLERANCE),
            met: ratio <= 1.0 + TOLERANCE,
        };
        let mut targets = match case.is_about_latency() {
            true => vec![
                at_most("p50", ratio(|round| round.measured.p50_us)),
                at_most("p99", ratio(|round| round.measured.p99_us)),
            ],
            false => {
                vec![at_least(
                    "messages a second",
                    ratio(|round| round.measured.messages as f64 / round.measured.seconds),
                )]
            }
        };
        let cpu = ratio(|round| round.server_seconds / round.measured.messages.max(1) as f64);
        targets.push(at_most("servers' CPU", cpu));
        Self { name: case.name, before: before.figures, after: after.figures, targets }
    }
}

/// The middle of the ratios of a figure, after over before, of each round. The speed of a shared machine may change by a
/// factor within a run, and two halves of a round stand closer together than two medians do.
fn ratio(before: &[HalfRound], after: &[HalfRound], figure: fn(&HalfRound) -> f64) -> f64 {
    let mut ratios: Vec<f64> = before.iter().zip(after).map(|(before, after)| figure(after) / figure(before)).collect();
    ratios.sort_by(f64::total_cmp);
    let upper = ratios.len() / 2;
    match ratios.len() % 2 {
        0 => f64::midpoint(ratios[upper - 1], ratios[upper]),
        _ => ratios[upper],
    }
}

/// Measures what `args` ask for; gives what is to be printed.
///
/// # Errors
/// The line that says what failed; figures of a run with a wrong read are never shown.
pub async fn builds(args: BuildsArgs) -> Result<String, String> {
    let chosen = cases::chosen(&args.cases)?;
    if !args.before.is_file() {
        return Err(format!("--before {}: there is no such program", args.before.display()));
    }
    let after = find_arqon(args.after.clone()).await.map_err(|error| error.to_string())?;
    let temporary = temporary_directory(args.load.dir.as_deref())?;
    let plan = Plan::new(args.time, args.rounds);
    let load = args.load.of(plan);
    let mut report =
        Report::new(String::new(), plan.rounds, plan.round_time.as_secs_f64(), args.load.linger.as_secs_f64() * 1e3);
    let programs = [("before", args.before.clone()), ("after", after)];
    let mut pairs = Vec::new();
    for nodes in [3, 1] {
        let of_nodes: Vec<&Case> = chosen.iter().filter(|case| case.nodes == nodes).collect();
        if of_nodes.is_empty() {
            continue;
        }
        let dir = temporary.path().join(format!("nodes-{nodes}"));
        let stage = Stage::start(load, &programs, None, &dir, &of_nodes).await?;
        for case in of_nodes {
            let sides = stage.sides(case);
            let failed = |error| format!("{}: {error}", case.name);
            let outcomes = stage.case(case, &sides, true, &mut report).await.map_err(failed)?;
            let mut outcomes = outcomes.into_iter();
            let (Some(before), Some(after)) = (outcomes.next(), outcomes.next()) else {
                unreachable!("each program has its outcome");
            };
            pairs.push(Pair::new(case, before, after));
        }
        drop(stage);
        // The next nodes need the room; what is left over goes with the temporary directory.
        let _ = std::fs::remove_dir_all(&dir);
    }
    Ok(if args.json { json(&pairs, &report) } else { table(&pairs, &report) })
}

fn json(pairs: &[Pair], report: &Report) -> String {
    #[derive(Serialize)]
    struct Document<'a> {
        cases: &'a [Pair],
        rounds: u32,
        round_s: f64,
        linger_ms: f64,
        idle_cpu: f64,
        kernel: &'a str,
        cpus: usize,
        date: &'a str,
    }
    let Report { rounds, round_s, linger_ms, idle_cpu, cpus, .. } = *report;
    let (kernel, date) = (report.kernel.as_str(), report.date.as_str());
    let document = Document { cases: pairs, rounds, round_s, linger_ms, idle_cpu, kernel, cpus, date };
    serde_json::to_string(&document).expect("numbers and text only")
}

fn table(pairs: &[Pair], report: &Report) -> String {
    let mut lines = vec![figures_head()];
    for pair in pairs {
        lines.push(figures_line(pair.name, "before", &pair.before));
        lines.push(figures_line(pair.name, "after", &pair.after));
        lines.extend(pair.targets.iter().map(ToString::to_string));
    }
    lines.push(report.foot());
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::{
        super::{cases::CASES, report::tests::half_round},
        *,
    };

    #[test]
    fn a_build_that_loses_more_than_the_tolerance_is_told() {
        let outcome = |case: &Case, rounds: &[(u64, f64)]| {
            let rounds: Vec<_> = rounds.iter().map(|(messages, p50)| half_round(*messages, *p50)).collect();
            Outcome { figures: Figures::new(case, "d", "c".into(), &rounds), rounds }
        };
        let throughput = CASES.iter().find(|case| !case.is_about_latency()).unwrap();
        let latency = CASES.iter().find(|case| case.is_about_latency()).unwrap();
        let is_met = |pair: &Pair| pair.targets[0].met;
        for (messages, met) in [(960, true), (940, false)] {
            let pair =
                Pair::new(throughput, outcome(throughput, &[(1_000, 10.0)]), outcome(throughput, &[(messages, 10.0)]));
            assert_eq!(is_met(&pair), met, "{messages}");
        }
        for (p50, met) in [(104.0, true), (106.0, false)] {
            let pair = Pair::new(latency, outcome(latency, &[(10, 100.0)]), outcome(latency, &[(10, p50)]));
            assert_eq!(is_met(&pair), met, "{p50}");
        }
        // The machine became three times as slow; in each round both were equally fast, or nearly.
        let before = outcome(throughput, &[(900, 1.0), (300, 1.0), (310, 1.0)]);
        let pair = Pair::new(throughput, before, outcome(throughput, &[(890, 1.0), (300, 1.0), (250, 1.0)]));
        assert!((pair.targets[0].ratio - 890.0 / 900.0).abs() < 1e-9, "{}", pair.targets[0].ratio);
    }
}
