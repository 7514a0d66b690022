//! Many seeds: a process for each, so that none can change another, and as many at once as there are
//! processors.

use std::{
    io,
    path::PathBuf,
    process::{Command, Stdio},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use crate::run::Report;

/// Seeds to run.
#[derive(Clone, Debug)]
pub struct Fleet {
    /// This program.
    pub program: PathBuf,
    /// What each process is given, before its seed.
    pub arguments: Vec<String>,
    /// First seed.
    pub from: u64,
    /// How many; the time alone decides when absent.
    pub count: Option<u64>,
    /// At least so many, however long they take.
    pub count_min: u64,
    /// No seed begins after this time.
    pub time: Option<Duration>,
    /// Processes at once.
    pub parallelism: usize,
    /// Real time for one seed.
    pub patience: Duration,
    /// Each seed twice, which must give the same run.
    pub twice: bool,
    /// No seed begins after one that failed.
    pub stop_at_first: bool,
}

/// How they went.
#[derive(Clone, Debug, Default)]
pub struct Totals {
    /// Reports in the order in which they came.
    pub reports: Vec<Report>,
    /// Real time.
    pub took: Duration,
}

impl Totals {
    /// Seeds with a broken rule.
    pub fn failed(&self) -> impl Iterator<Item = &Report> {
        self.reports.iter().filter(|report| !report.broken.is_empty())
    }
}

impl Fleet {
    /// Runs them; `tell` hears of each one.
    pub fn run(&self, tell: impl Fn(&Report) + Sync) -> Totals {
        let begin = Instant::now();
        let next = AtomicU64::new(0);
        let has_failed = AtomicBool::new(false);
        let reports = Mutex::new(Vec::new());
        let work = || {
            loop {
                let number = next.fetch_add(1, Relaxed);
                let is_late = number >= self.count_min && self.time.is_some_and(|time| begin.elapsed() >= time);
                let is_over = self.stop_at_first && has_failed.load(Relaxed);
                if is_late || is_over || self.count.is_some_and(|count| number >= count) {
                    return;
                }
                let report = self.run_seed(self.from + number);
                tell(&report);
                has_failed.fetch_or(!report.broken.is_empty(), Relaxed);
                reports.lock().unwrap_or_else(PoisonError::into_inner).push(report);
            }
        };
        std::thread::scope(|scope| {
            for _ in 0..self.parallelism.max(1) {
                scope.spawn(work);
            }
        });
        Totals { reports: reports.into_inner().unwrap_or_else(PoisonError::into_inner), took: begin.elapsed() }
    }

    fn run_seed(&self, seed: u64) -> Report {
        let mut report = self.run_once(seed);
        if self.twice {
            let again = self.run_once(seed);
            if (again.hash, again.event_count) != (report.hash, report.event_count) {
                let text = format!(
                    "two runs differ: {:016x} after {} events, {:016x} after {}",
                    report.hash, report.event_count, again.hash, again.event_count
                );
                report.broken.insert(0, ("same-run-twice".to_owned(), text));
            }
        }
        report
    }

    fn run_once(&self, seed: u64) -> Report {
        self.try_run(seed).unwrap_or_else(|reason| Report {
            seed,
            broken: vec![("run-ends".to_owned(), reason)],
            ..Report::default()
        })
    }

    fn try_run(&self, seed: u64) -> Result<Report, String> {
        let told = |error: io::Error| error.to_string();
        let mut child = Command::new(&self.program)
            .args(&self.arguments)
            .arg("--seed")
            .arg(seed.to_string())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(told)?;
        // Read along: whoever panics much would wait for a full pipe.
        let stderr = child.stderr.take().ok_or("the process has no standard error")?;
        let reader = std::thread::spawn(move || io::read_to_string(stderr).unwrap_or_default());
        let begin = Instant::now();
        while child.try_wait().map_err(told)?.is_none() {
            if begin.elapsed() > self.patience {
                child.kill().and_then(|()| child.wait()).map_err(told)?;
                return Err(format!("no end after {} s", self.patience.as_secs()));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        // A report is smaller than a pipe, so the process never waits for this.
        let output = child.wait_with_output().map_err(told)?;
        serde_json::from_slice(&output.stdout).map_err(|_| {
            let text = reader.join().unwrap_or_default();
            let last = text.lines().last().unwrap_or("it said nothing");
            format!("the process ended with {} and without a report: {last}", output.status)
        })
    }
}
