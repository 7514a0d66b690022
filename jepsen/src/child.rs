//! Runs of this program in processes of their own, so that one that fails takes nothing with it.

use std::{ffi::OsString, path::PathBuf, process::Stdio, time::Duration};

use tokio::{process::Command, time::timeout};

use crate::{cluster::last_line, ledger::Entry};

/// Time that a run may take beyond the time of its faults.
const REST_TIME_MAX: Duration = Duration::from_secs(420);

/// What to run.
#[derive(Clone, Debug)]
pub(crate) struct Ask {
    /// The program that has `run`; this one.
    pub(crate) program: PathBuf,
    pub(crate) faults: String,
    pub(crate) workloads: Vec<String>,
    pub(crate) nodes: u32,
    pub(crate) seed: u64,
    pub(crate) time: Duration,
    /// Its run directory.
    pub(crate) dir: PathBuf,
    pub(crate) arqon: Option<PathBuf>,
    /// More arguments of `run`.
    pub(crate) more: Vec<OsString>,
    /// Variables of its environment, which its nodes get too.
    pub(crate) environment: Vec<(String, String)>,
}

/// Makes the run and gives its verdict; one that ends without a verdict does not count and says why.
pub(crate) async fn run(ask: &Ask) -> Entry {
    let verdict = match attempt(ask).await {
        Ok(verdict) => verdict,
        Err(why) => Entry {
            seed: Some(ask.seed),
            nodes: ask.nodes as usize,
            workloads: ask.workloads.clone(),
            not_counted: vec![format!("no verdict: {why}")],
            ..Entry::default()
        },
    };
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    Entry { unix_seconds: now.as_secs(), faults_asked: ask.faults.clone(), ..verdict }
}

async fn attempt(ask: &Ask) -> Result<Entry, String> {
    std::fs::create_dir_all(&ask.dir).map_err(|error| format!("cannot make {}: {error}", ask.dir.display()))?;
    let errors = ask.dir.join("run.err");
    let file = std::fs::File::create(&errors).map_err(|error| format!("{}: {error}", errors.display()))?;
    let mut command = Command::new(&ask.program);
    command.arg("run").arg("--json");
    command.args(["--faults", &ask.faults, "--workload", &ask.workloads.join(",")]);
    command.args(["--nodes", &ask.nodes.to_string(), "--seed", &ask.seed.to_string()]);
    command.args(["--time", &crate::run::shown_time(ask.time)]).arg("--dir").arg(&ask.dir);
    if let Some(arqon) = &ask.arqon {
        command.arg("--arqon").arg(arqon);
    }
    command.args(&ask.more).envs(ask.environment.iter().map(|(name, value)| (name, value)));
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(file).kill_on_drop(true);
    let limit = ask.time + REST_TIME_MAX;
    let run = async { command.spawn()?.wait_with_output().await };
    let output = match timeout(limit, run).await {
        Ok(Ok(output)) => output,
        Ok(Err(error)) => return Err(format!("cannot run {}: {error}", ask.program.display())),
        Err(_) => return Err(format!("the run did not end within {} s", limit.as_secs())),
    };
    serde_json::from_slice(&output.stdout)
        .map_err(|_| format!("{}; it ended with {}", last_line(&errors), output.status))
}

#[cfg(test)]
pub(crate) mod tests {
    use std::path::Path;

    use super::*;

    /// A program in place of this one, which answers `run` with what `script` prints.
    pub(crate) fn program(dir: &Path, script: &str) -> PathBuf {
        let (text, path) = (dir.join("script"), dir.join("program"));
        std::fs::write(&text, format!("#!/bin/sh\n{script}\n")).unwrap();
        // Installed by another process: a file that is open for writing here cannot be run.
        let installed = std::process::Command::new("install").args(["-m", "755"]).arg(&text).arg(&path).status();
        assert!(installed.unwrap().success());
        path
    }

    pub(crate) fn ask(program: PathBuf, dir: &Path) -> Ask {
        Ask {
            program,
            faults: "kill".into(),
            workloads: vec!["append".into()],
            nodes: 3,
            seed: 7,
            time: Duration::from_secs(1),
            dir: dir.join("run"),
            arqon: None,
            more: Vec::new(),
            environment: vec![("ARQON_PLANTED".into(), "bug".into())],
        }
    }

    #[tokio::test]
    async fn a_run_is_asked_for_and_its_verdict_read() {
        let dir = tempfile::tempdir().unwrap();
        let script = r#"echo "$* $ARQON_PLANTED" >&2; echo '{"valid":true,"seed":7,"acked":5,"faults":[]}'; exit 0"#;
        let ask = ask(program(dir.path(), script), dir.path());
        let entry = run(&ask).await;
        assert!(entry.valid && entry.acked == 5 && entry.faults_asked == "kill", "{entry:?}");
        let asked = std::fs::read_to_string(ask.dir.join("run.err")).unwrap();
        assert!(
            asked.starts_with("run --json --faults kill --workload append --nodes 3 --seed 7 --time 1s"),
            "{asked}"
        );
        assert!(asked.trim_end().ends_with(" bug"), "{asked}");
    }

    #[tokio::test]
    async fn a_run_without_a_verdict_does_not_count_and_says_why() {
        let dir = tempfile::tempdir().unwrap();
        let ask = ask(program(dir.path(), "echo 'error: no root here' >&2; exit 1"), dir.path());
        let entry = run(&ask).await;
        assert!(!entry.valid && entry.not_counted[0].starts_with("no verdict: error: no root here"), "{entry:?}");
    }
}
