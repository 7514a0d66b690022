//! Whole runs, each in a process of its own, as `arqon-sim` makes them.
#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::process::Command;

use arqon_sim::Report;

fn run(seed: u64, arguments: &[&str]) -> Report {
    let mut command = Command::new(env!("CARGO_BIN_EXE_arqon-sim"));
    let length = arguments.iter().find(|argument| argument.starts_with("--length")).unwrap_or(&"--length=6s");
    let rest = arguments.iter().filter(|argument| !argument.starts_with("--length"));
    let output = command.args(["one", length, "--seed", &seed.to_string()]).args(rest).output().unwrap();
    serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&output.stderr)))
}

fn same(report: &Report) -> (u64, u64, u64) {
    (report.hash, report.event_count, report.acked_count)
}

#[test]
fn a_seed_gives_the_same_run_to_the_byte_and_another_seed_another() {
    let first = run(11, &[]);
    assert!(first.acked_count > 0 && first.completed_count > 0, "{first:?}");
    assert_eq!(same(&first), same(&run(11, &[])));
    assert_ne!(first.hash, run(12, &[]).hash);
}

#[test]
fn looking_at_a_run_does_not_change_it() {
    assert_eq!(same(&run(13, &[])), same(&run(13, &["--trace", "--trace"])));
}

#[test]
fn acknowledged_writes_survive_the_power_of_all_nodes() {
    let report = run(14, &["--faults", "PowerOfAll"]);
    assert!(report.faults.contains_key("Power"), "{report:?}");
    assert!(report.broken.is_empty(), "{:?}", report.broken);
}

/// The same with disks that only claim to be synced: acknowledged writes are gone, and a simulation
/// that does not say so would find nothing else either.
#[test]
fn disks_that_lie_are_found_out() {
    let caught = (1..=5).map(|seed| run(seed, &["--faults", "PowerOfAll", "--lying-disks"]));
    let names: Vec<String> = caught.flat_map(|report| report.broken).map(|(name, _)| name).collect();
    assert!(names.iter().any(|name| name == "acked-is-never-lost"), "{names:?}");
}

#[test]
fn a_cluster_grows_and_shrinks_under_load() {
    let report = run(15, &["--faults", "Members", "--length=20s"]);
    assert!(report.faults.get("Members").is_some_and(|count| *count >= 2), "{report:?}");
    assert!(report.broken.is_empty(), "{:?}", report.broken);
}
