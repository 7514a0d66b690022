//! What a run has taken from the system, written down before it is taken, so that it can be given back
//! whatever becomes of the run.
//!
//! ```text
//!   run ── pipe ──> reaper (a process of its own)
//!    │                 the pipe ends when the run ends, however it ends
//!    └── claim file <──┘ gives back what the claim says, and deletes it
//! ```
//!
//! Everything carries the id of the run in its name: namespaces `ajID-1`, the bridge `ajID`, interfaces
//! `ajIDv1`; mounts and loop devices lie below the run's directory. So a claim of a process that has
//! ended says all that may be left of it, and two runs at a time do not touch each other. Whoever cleans up holds a
//! lock on the claim meanwhile: the reaper of a run and `clean` may come at the same time.

use std::{
    fs::{self, File},
    io::{self, Read},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use rustix::{
    mount::{UnmountFlags, unmount},
    process::{Pid, Signal, kill_process},
};
use serde::{Deserialize, Serialize};

use super::tool;
use crate::cluster::Error;

/// Time for killed processes to be gone.
const GONE_TIME_MAX: Duration = Duration::from_secs(10);
/// Looks at what is gone and what is not.
const LOOK_PAUSE: Duration = Duration::from_millis(5);

/// What one run has taken.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claim {
    /// Its process.
    pub pid: u32,
    /// When that process began, in clock ticks since the system started: process ids come again.
    pub started: u64,
    /// In all names.
    pub id: String,
    /// Mounts and loop devices lie below it.
    pub dir: PathBuf,
}

/// Where claims are.
fn folder() -> PathBuf {
    let uid = rustix::process::geteuid();
    if uid.is_root() { "/run/arqon-jepsen".into() } else { std::env::temp_dir().join(format!("arqon-jepsen-{uid:?}")) }
}

/// When process `pid` began; `None` when there is none, or when it only waits to be collected.
fn process_start(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in brackets, may hold anything; after it come the state and then numbers.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    let state = fields.next()?;
    // Field 22 of proc_pid_stat(5), counted from 1, of which three are gone.
    let started = fields.nth(18)?.parse().ok()?;
    (state != "Z").then_some(started)
}

impl Claim {
    /// The claim of this process on what lies below `dir`.
    ///
    /// # Errors
    /// /proc cannot be read.
    pub fn own(dir: &Path) -> Result<Self, Error> {
        let pid = std::process::id();
        let Some(started) = process_start(pid) else {
            return Err(Error::new(format!("cannot read /proc/{pid}/stat")));
        };
        let dir = fs::canonicalize(dir).map_err(|error| Error::new(format!("{}: {error}", dir.display())))?;
        Ok(Self { pid, started, id: format!("{pid:x}"), dir })
    }

    /// The namespace of a node.
    #[must_use]
    pub fn namespace(&self, node: u64) -> String {
        format!("aj{}-{node}", self.id)
    }

    /// The bridge of the run.
    #[must_use]
    pub fn bridge(&self) -> String {
        format!("aj{}", self.id)
    }

    /// The end of a node's cable at the bridge.
    #[must_use]
    pub fn cable(&self, node: u64) -> String {
        format!("aj{}v{node}", self.id)
    }

    fn path(&self) -> PathBuf {
        folder().join(format!("{}.json", self.id))
    }

    fn is_dead(&self) -> bool {
        process_start(self.pid) != Some(self.started)
    }

    /// Waits until nobody else does the same, gives back everything that this claim says and forgets the claim. What
    /// is gone already is no error. Gives what could not be given back, a line each; the claim stays then.
    #[must_use]
    pub fn release(&self) -> Vec<String> {
        let path = self.path();
        match lock(&path) {
            Ok(Some(_lock)) => self.give_back(),
            Ok(None) => Vec::new(),
            Err(error) => vec![format!("cannot lock {}: {error}", path.display())],
        }
    }

    fn give_back(&self) -> Vec<String> {
        let mut left = Vec::new();
        let namespaces = self.namespaces();
        for name in &namespaces {
            left.extend(end_processes(name).err());
        }
        left.extend(self.unmount_all());
        left.extend(self.detach_loops());
        left.extend(namespaces.iter().filter_map(|name| delete_namespace(name).err()));
        for name in self.interfaces() {
            let deleted = tool::run_blocking("ip", &["link", "delete", &name], "");
            // The system may have come first, as its namespace was the last user.
            let is_there = Path::new("/sys/class/net").join(&name).exists();
            left.extend(deleted.err().filter(|_| is_there).map(|error| error.to_string()));
        }
        if left.is_empty() {
            // Nobody else deletes it but somebody who has done the same.
            let _ = fs::remove_file(self.path());
        }
        left
    }

    fn namespaces(&self) -> Vec<String> {
        let prefix = format!("aj{}-", self.id);
        let entries = fs::read_dir("/run/netns").into_iter().flatten().flatten();
        let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
        names.filter(|name| name.starts_with(&prefix)).collect()
    }

    /// The bridge and the cables. A cable outlives its namespace's name while a connection of a node that was
    /// killed still tries to tell the others.
    fn interfaces(&self) -> Vec<String> {
        let cable = format!("aj{}v", self.id);
        let entries = fs::read_dir("/sys/class/net").into_iter().flatten().flatten();
        let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
        names.filter(|name| name.starts_with(&cable) || *name == self.bridge()).collect()
    }

    /// Unmounts what lies below the directory, the newest first; what is busy goes when its users do.
    fn unmount_all(&self) -> Vec<String> {
        for path in mounts_below(&self.dir).iter().rev() {
            // A FUSE disk may come first with its own; what is still there is told below.
            let _ = unmount(path, UnmountFlags::empty()).or_else(|_| unmount(path, UnmountFlags::DETACH));
        }
        mounts_below(&self.dir).iter().map(|path| format!("cannot unmount {}", path.display())).collect()
    }

    fn detach_loops(&self) -> Vec<String> {
        let of_run = || {
            let devices = fs::read_dir("/sys/block").into_iter().flatten().flatten();
            let ours = devices.filter(|device| {
                let file = fs::read_to_string(device.path().join("loop/backing_file")).unwrap_or_default();
                Path::new(file.trim_end()).starts_with(&self.dir)
            });
            ours.map(|device| format!("/dev/{}", device.file_name().to_string_lossy())).collect::<Vec<_>>()
        };
        for device in of_run() {
            // One whose file system was just unmounted detaches itself; then this finds nothing to do.
            let _ = tool::run_blocking("losetup", &["--detach", &device], "");
        }
        let end = Instant::now() + GONE_TIME_MAX;
        loop {
            let left = of_run();
            if left.is_empty() || Instant::now() > end {
                return left.iter().map(|device| format!("cannot detach {device}")).collect();
            }
            std::thread::sleep(LOOK_PAUSE);
        }
    }
}

/// Waits until nobody else cleans up by the claim at `path`, and keeps others from it for as long as the file is open.
/// `None` when the claim is gone, as somebody else has given everything back.
fn lock(path: &Path) -> io::Result<Option<File>> {
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened?,
    };
    file.lock()?;
    // Whoever had the lock before may have deleted the file.
    Ok((file.metadata()?.nlink() > 0).then_some(file))
}

fn namespace_exists(namespace: &str) -> bool {
    Path::new("/run/netns").join(namespace).exists()
}

/// Deletes a namespace unless it is gone already.
fn delete_namespace(namespace: &str) -> Result<(), String> {
    let deleted = tool::run_blocking("ip", &["netns", "delete", namespace], "");
    deleted.map(|_| ()).or_else(|error| if namespace_exists(namespace) { Err(error.to_string()) } else { Ok(()) })
}

/// Kills all processes of a namespace and sees them gone.
fn end_processes(namespace: &str) -> Result<(), String> {
    let end = Instant::now() + GONE_TIME_MAX;
    loop {
        let listed = match tool::run_blocking("ip", &["netns", "pids", namespace], "") {
            Ok(listed) => listed,
            Err(error) if namespace_exists(namespace) => return Err(error.to_string()),
            // It was deleted, which is only done when its processes are gone.
            Err(_) => return Ok(()),
        };
        let pids: Vec<u32> = listed.split_whitespace().filter_map(|pid| pid.parse().ok()).collect();
        let alive: Vec<u32> = pids.into_iter().filter(|pid| process_start(*pid).is_some()).collect();
        if alive.is_empty() {
            return Ok(());
        }
        if Instant::now() > end {
            return Err(format!("processes {alive:?} of namespace {namespace} do not end"));
        }
        for pid in alive.iter().filter_map(|pid| i32::try_from(*pid).ok()).filter_map(Pid::from_raw) {
            // It may have ended by itself.
            let _ = kill_process(pid, Signal::KILL);
        }
        std::thread::sleep(LOOK_PAUSE);
    }
}

/// Mount points below `dir`, in the order of mounting.
pub(crate) fn mounts_below(dir: &Path) -> Vec<PathBuf> {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let points = table.lines().filter_map(|line| line.split(' ').nth(4)).map(unescape);
    points.filter(|point| point.starts_with(dir) && point != dir).collect()
}

/// Spaces and their like stand as octal numbers in the table of mounts.
fn unescape(text: &str) -> PathBuf {
    let mut out = text.to_owned();
    for (from, to) in [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")] {
        out = out.replace(from, to);
    }
    out.into()
}

/// A claim that is in force; given back on drop.
pub struct Held {
    claim: Claim,
    /// Ends when its standard input does: with this program at the latest.
    reaper: Child,
}

impl Held {
    /// Writes the claim of this process down and starts its reaper, which is `program reap FILE`.
    ///
    /// # Errors
    /// The file cannot be written or the reaper does not start.
    pub fn take(dir: &Path, program: &Path) -> Result<Self, Error> {
        let claim = Claim::own(dir)?;
        let path = claim.path();
        let wrong = |error: io::Error| Error::new(format!("claim {}: {error}", path.display()));
        fs::create_dir_all(folder()).map_err(wrong)?;
        let text = serde_json::to_string(&claim).map_err(|error| wrong(error.into()))?;
        // Under its name it is whole: `clean` may read it at any time.
        let draft = path.with_extension("draft");
        fs::write(&draft, text).and_then(|()| fs::rename(&draft, &path)).map_err(wrong)?;
        let mut command = Command::new(program);
        // In a session of its own, so that no signal for this program's group reaches it.
        command.arg("reap").arg(&path).stdin(Stdio::piped()).stdout(Stdio::null());
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        let reaper = command.spawn().map_err(|error| Error::new(format!("cannot start the reaper: {error}")))?;
        Ok(Self { claim, reaper })
    }

    /// The names to use.
    #[must_use]
    pub fn claim(&self) -> &Claim {
        &self.claim
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let left = {
            // What this process has taken is given back even if somebody has deleted its claim.
            let _lock = lock(&self.claim.path());
            self.claim.give_back()
        };
        for line in left {
            eprintln!("warning: {line}");
        }
        drop(self.reaper.stdin.take());
        // It has nothing left to do, or tries once more.
        let _ = self.reaper.wait();
    }
}

/// Waits until the run that holds the other end of standard input is gone, and cleans up after it.
///
/// # Errors
/// What could not be given back.
pub fn reap(file: &Path) -> Result<(), String> {
    // The end, or an error: either way the run is gone.
    let _ = std::io::stdin().read_to_end(&mut Vec::new());
    match fs::read_to_string(file) {
        Ok(text) => {
            let claim: Claim = serde_json::from_str(&text).map_err(|error| format!("{}: {error}", file.display()))?;
            let left = claim.release();
            if left.is_empty() { Ok(()) } else { Err(left.join("; ")) }
        }
        // The run has cleaned up itself.
        Err(_) => Ok(()),
    }
}

/// Gives back what runs left that have ended, and only theirs. Gives the ids of those runs.
///
/// # Errors
/// What could not be given back, a line each.
pub fn clean() -> Result<Vec<String>, String> {
    let mut cleaned = Vec::new();
    let mut left = Vec::new();
    for entry in fs::read_dir(folder()).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.extension().is_none_or(|extension| extension != "json") {
            // A claim that is being written: its run has taken nothing yet.
            continue;
        }
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            // The run, or its reaper, was through in the meantime.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => {
                left.push(format!("{}: {error}", path.display()));
                continue;
            }
        };
        let Ok(claim) = serde_json::from_str::<Claim>(&text) else {
            left.push(format!("{}: is no claim", path.display()));
            continue;
        };
        if claim.is_dead() {
            left.extend(claim.release());
            cleaned.push(claim.id);
        }
    }
    left.extend(clean_trials());
    if left.is_empty() { Ok(cleaned) } else { Err(left.join("\n")) }
}

/// Namespaces in which a process that has ended tried what the machine can do; they hold nothing.
fn clean_trials() -> Vec<String> {
    let entries = fs::read_dir("/run/netns").into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    let is_dead = |name: &String| {
        let id = name.strip_prefix("aj").and_then(|rest| rest.strip_suffix("-trial"));
        id.and_then(|id| u32::from_str_radix(id, 16).ok()).is_some_and(|pid| process_start(pid).is_none())
    };
    names.filter(is_dead).filter_map(|name| delete_namespace(&name).err()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_known_by_its_start_and_a_dead_one_is_dead() {
        let dir = tempfile::tempdir().unwrap();
        let claim = Claim::own(dir.path()).unwrap();
        assert!(!claim.is_dead());
        assert!(Claim { started: claim.started + 1, ..claim.clone() }.is_dead(), "another process of the same number");
        let mut child = Command::new("true").spawn().unwrap();
        let dead = Claim { pid: child.id(), ..claim };
        child.wait().unwrap();
        assert!(dead.is_dead());
    }

    #[test]
    fn whoever_waits_for_a_claim_learns_that_it_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("claim.json");
        fs::write(&path, "{}").unwrap();
        let held = lock(&path).unwrap().unwrap();
        let other = path.clone();
        let waiting = std::thread::spawn(move || lock(&other).unwrap().is_some());
        fs::remove_file(&path).unwrap();
        drop(held);
        assert!(!waiting.join().unwrap());
        assert!(lock(&path).unwrap().is_none());
    }

    #[test]
    fn a_namespace_that_is_gone_is_no_error() {
        assert_eq!(end_processes("aj-not-there"), Ok(()));
        assert_eq!(delete_namespace("aj-not-there"), Ok(()));
    }

    #[test]
    fn names_fit_into_an_interface_name() {
        let dir = tempfile::tempdir().unwrap();
        let claim = Claim { id: format!("{:x}", 1 << 22), ..Claim::own(dir.path()).unwrap() };
        assert!(claim.cable(99).len() < 16 && claim.bridge().len() < 16, "{}", claim.cable(99));
    }

    #[test]
    fn names_in_the_table_of_mounts_are_read_back() {
        assert_eq!(unescape("/a\\040b\\134c"), Path::new("/a b\\c"));
    }
}
