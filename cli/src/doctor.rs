//! `arqon doctor`: is this machine fit to run a node?

use std::fs::{self, File};
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use arqon_storage::{Backend, Identity, Store};
use rustix::process::{Resource, getrlimit};
use serde_json::json;

use crate::cluster::file_failed;
use crate::{Failure, output};

const SYNC_COUNT: usize = 200;
const BLOCK_SIZE: usize = 4 << 10;
const SYNC_P50_WARN: Duration = Duration::from_millis(5);
const SYNC_P50_FAIL: Duration = Duration::from_millis(100);
/// Faster than a device can be: the disk is memory, or it does not sync.
const SYNC_P50_TOO_FAST: Duration = Duration::from_micros(5);
const SPACE_WARN: u64 = 10 << 30;
const SPACE_FAIL: u64 = 1 << 30;
const FILES_WARN: u64 = 65_536;
const FILES_FAIL: u64 = 1_024;
const MEMORY_WARN: u64 = 2 << 30;
/// io_uring as the log uses it.
const KERNEL_MIN: (u32, u32) = (5, 6);
const PORTS: [(u16, &str); 5] =
    [(7700, "clients"), (7701, "peers"), (7705, "control plane"), (7710, "Shield"), (7720, "admin")];

/// Arguments of `arqon doctor`.
#[derive(Clone, Debug, clap::Args)]
#[command(
    after_help = "Example: arqon doctor --dir /var/lib/arqonbus\n\nExit code 1 when a check fails; warnings pass."
)]
pub struct DoctorArgs {
    /// Directory for the data, whose disk is measured with a temporary file
    #[arg(long, value_name = "DIR", default_value = ".")]
    dir: PathBuf,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Ok,
    Warn,
    Fail,
}

impl Verdict {
    fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warn => "warn",
            Self::Fail => "fail",
        }
    }

    /// Compares with limits below which it warns or fails.
    fn at_least(value: u64, warn: u64, fail: u64) -> Self {
        match value {
            value if value < fail => Self::Fail,
            value if value < warn => Self::Warn,
            _ => Self::Ok,
        }
    }
}

struct Check {
    name: &'static str,
    verdict: Verdict,
    detail: String,
    measured: serde_json::Value,
}

impl Check {
    fn new(name: &'static str, verdict: Verdict, detail: impl Into<String>) -> Self {
        Self { name, verdict, detail: detail.into(), measured: json!({}) }
    }
}

/// Runs all checks and prints them.
///
/// # Errors
/// A check failed, or the directory cannot be written.
pub async fn doctor(args: DoctorArgs) -> Result<(), Failure> {
    let folder = tempfile::Builder::new().prefix("arqon-doctor-").tempdir_in(&args.dir);
    let folder = folder.map_err(|error| file_failed(&args.dir, &error))?;
    let mut checks = vec![kernel(), io_uring(&folder.path().join("store")).await];
    checks.push(sync_latency(folder.path())?);
    checks.extend([space(&args.dir), files(), memory()]);
    checks.extend(PORTS.iter().map(|&(port, name)| port_free(port, name)));
    let failed: Vec<&str> =
        checks.iter().filter(|check| check.verdict == Verdict::Fail).map(|check| check.name).collect();
    if args.json {
        let documents: Vec<_> = checks
            .iter()
            .map(|check| {
                json!({
                    "check": check.name, "verdict": check.verdict.name(), "detail": check.detail, "measured": check.measured,
                })
            })
            .collect();
        output::json(&json!({ "ok": failed.is_empty(), "checks": documents }))?;
    } else {
        for check in &checks {
            output::line(format_args!("{:<4} {}: {}", check.verdict.name(), check.name, check.detail))?;
        }
    }
    if failed.is_empty() { Ok(()) } else { Err(Failure::failed(format!("failed: {}", failed.join(", ")))) }
}

fn kernel() -> Check {
    let uname = rustix::system::uname();
    let release = uname.release().to_string_lossy().into_owned();
    let mut numbers = release.split(['.', '-']).map_while(|part| part.parse::<u32>().ok());
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    let verdict = if version >= KERNEL_MIN { Verdict::Ok } else { Verdict::Warn };
    let mut check = Check::new("kernel", verdict, format!("Linux {release}"));
    check.measured = json!({ "release": release });
    check
}

async fn io_uring(folder: &Path) -> Check {
    let identity = Identity { cluster: "doctor".to_owned(), node: arqon_proto::NodeId(1) };
    let options = arqon_storage::Options { backend: Backend::Uring, ..Default::default() };
    match Store::open(folder, identity, options) {
        Ok(store) => {
            store.close().await;
            Check::new("io_uring", Verdict::Ok, "allowed")
        }
        Err(error) => {
            let detail = format!("not allowed, the log is written with pwrite and fdatasync: {error}");
            Check::new("io_uring", Verdict::Warn, detail)
        }
    }
}

/// Times synced writes over blocks that were written before, as the log does them.
fn sync_latency(folder: &Path) -> Result<Check, Failure> {
    let path = folder.join("sync");
    let measure = || {
        let file = File::options().create(true).truncate(true).write(true).open(&path)?;
        let block = [0x5a; BLOCK_SIZE];
        file.write_all_at(&vec![0; BLOCK_SIZE * SYNC_COUNT], 0)?;
        file.sync_all()?;
        let mut times = Vec::with_capacity(SYNC_COUNT);
        for index in 0..SYNC_COUNT {
            let start = Instant::now();
            file.write_all_at(&block, (index * BLOCK_SIZE) as u64)?;
            file.sync_data()?;
            times.push(start.elapsed());
        }
        Ok::<_, std::io::Error>(times)
    };
    let mut times = measure().map_err(|error| file_failed(&path, &error))?;
    times.sort_unstable();
    let at =
        |percent: usize| times.get((times.len() * percent / 100).min(times.len() - 1)).copied().unwrap_or_default();
    let (p50, p99) = (at(50), at(99));
    let (verdict, remark) = match p50 {
        time if time > SYNC_P50_FAIL => (Verdict::Fail, ", too slow for a node"),
        time if time > SYNC_P50_WARN => (Verdict::Warn, ", slow"),
        time if time < SYNC_P50_TOO_FAST => (Verdict::Warn, ", so fast that nothing can be synced: is it in memory?"),
        _ => (Verdict::Ok, ""),
    };
    let detail = format!("fdatasync of 4 KiB p50 {p50:.1?}, p99 {p99:.1?}{remark}");
    let mut check = Check::new("disk", verdict, detail);
    check.measured = json!({ "p50_us": p50.as_micros() as u64, "p99_us": p99.as_micros() as u64 });
    Ok(check)
}

fn space(folder: &Path) -> Check {
    match rustix::fs::statvfs(folder) {
        Ok(disk) => {
            let free = disk.f_bavail.saturating_mul(disk.f_frsize);
            let verdict = Verdict::at_least(free, SPACE_WARN, SPACE_FAIL);
            let mut check = Check::new("space", verdict, format!("{:.1} GiB free", gib(free)));
            check.measured = json!({ "free_bytes": free });
            check
        }
        Err(error) => Check::new("space", Verdict::Warn, format!("unknown: {error}")),
    }
}

fn files() -> Check {
    let limit = getrlimit(Resource::Nofile).current;
    let verdict = limit.map_or(Verdict::Ok, |limit| Verdict::at_least(limit, FILES_WARN, FILES_FAIL));
    let shown = limit.map_or_else(|| "unlimited".to_owned(), |limit| limit.to_string());
    let advice = if verdict == Verdict::Ok { "" } else { ", raise it (ulimit -n 1048576)" };
    let mut check = Check::new("open files", verdict, format!("limit {shown}{advice}"));
    check.measured = json!({ "limit": limit });
    check
}

fn memory() -> Check {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let available = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))
        .and_then(|rest| rest.trim().trim_end_matches(" kB").parse::<u64>().ok());
    match available {
        Some(kib) => {
            let bytes = kib << 10;
            let verdict = Verdict::at_least(bytes, MEMORY_WARN, 0);
            let mut check = Check::new("memory", verdict, format!("{:.1} GiB available", gib(bytes)));
            check.measured = json!({ "available_bytes": bytes });
            check
        }
        None => Check::new("memory", Verdict::Warn, "unknown: /proc/meminfo cannot be read"),
    }
}

fn port_free(port: u16, name: &'static str) -> Check {
    let mut check = match TcpListener::bind((Ipv4Addr::LOCALHOST, port)) {
        Ok(_) => Check::new("port", Verdict::Ok, format!("{port} ({name}) is free")),
        Err(error) => Check::new("port", Verdict::Warn, format!("{port} ({name}) is taken: {error}")),
    };
    check.measured = json!({ "port": port });
    check
}

fn gib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 30)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_warn_before_they_fail() {
        let verdicts: Vec<_> = [5, 15, 25].iter().map(|&value| Verdict::at_least(value, 20, 10)).collect();
        assert_eq!(verdicts, [Verdict::Fail, Verdict::Warn, Verdict::Ok]);
    }

    #[test]
    fn the_disk_is_really_synced() {
        let folder = tempfile::tempdir().unwrap();
        let check = sync_latency(folder.path()).unwrap();
        assert!(check.measured["p99_us"].as_u64().unwrap() >= check.measured["p50_us"].as_u64().unwrap());
        assert!(check.detail.contains("p50"), "{}", check.detail);
    }
}
