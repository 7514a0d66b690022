//! This bus and NATS in turn, case by case.

use std::sync::Arc;

use arqon_jepsen::find_arqon;

use super::{
    NatsArgs, Report,
    cases::{self, Case},
    page,
    report::Row,
    server::{Program, Servers},
    stage::{Side, Stage, blocking},
};
use crate::own::temporary_directory;

/// Measures what `args` ask for; gives what is to be printed.
///
/// # Errors
/// The line that says what failed; figures of a run with a wrong read are never shown.
pub async fn run(args: NatsArgs) -> Result<String, String> {
    let chosen = cases::chosen(&args.cases)?;
    let arqon = find_arqon(args.arqon.clone()).await.map_err(|error| error.to_string())?;
    let given = args.nats_server.clone();
    let program = blocking(move || Program::find(given.as_deref())).await?;
    let temporary = temporary_directory(args.load.dir.as_deref())?;
    if crate::disk::Gauge::new(temporary.path())?.is_tmpfs() {
        eprintln!("warning: the directory lies in memory (tmpfs), no figure is about a disk; see --dir");
    }
    let plan = args.plan();
    let (round_s, linger_ms) = (plan.round_time.as_secs_f64(), args.load.linger.as_secs_f64() * 1e3);
    let mut report = Report::new(program.version.clone(), plan.rounds, round_s, linger_ms);
    for nodes in [3, 1] {
        let of_nodes: Vec<&Case> = chosen.iter().filter(|case| case.nodes == nodes).collect();
        if of_nodes.is_empty() {
            continue;
        }
        let dir = temporary.path().join(format!("nodes-{nodes}"));
        let load = args.load.of(plan);
        let programs = if args.nats_only { Vec::new() } else { vec![("arqon", arqon.clone())] };
        let stage = Stage::start(load, &programs, Some(&program), &dir, &of_nodes).await?;
        for case in of_nodes {
            let rows = rows(&stage, case, &mut report).await.map_err(|error| format!("{}: {error}", case.name))?;
            report.cases.extend(rows);
        }
        drop(stage);
        // The next servers need the room; what is left over goes with the temporary directory.
        let _ = std::fs::remove_dir_all(&dir);
    }
    if let Some(dir) = &args.page {
        page::write(dir, &report)?;
        eprintln!("written: {}", dir.join("nats.md").display());
    }
    Ok(if args.json { report.json() } else { report.table() })
}

/// The case's rows, one for each way of NATS.
async fn rows(stage: &Stage, case: &Case, report: &mut Report) -> Result<Vec<Row>, String> {
    let sides = stage.sides(case);
    let outcomes = stage.case(case, &sides, false, report).await?;
    let mut figures: Vec<_> = outcomes.into_iter().map(|outcome| outcome.figures).collect();
    let own = matches!(sides.first(), Some(Side::Ours(_))).then(|| figures.remove(0));
    let mut rows = Vec::new();
    for (servers, nats) in sides.iter().filter_map(nats_of).zip(figures) {
        for (_, target) in case.against.iter().filter(|(sync, _)| *sync == servers.sync) {
            rows.push(Row::new(case, servers.sync, *target, own.clone(), nats.clone()));
        }
    }
    Ok(rows)
}

fn nats_of<'a>(side: &'a Side<'_>) -> Option<&'a Arc<Servers>> {
    match side {
        Side::Ours(_) => None,
        Side::Nats(servers) => Some(servers),
    }
}
