//! A role of this program as a child process.
//!
//! A child runs in a process group of its own, so that Ctrl-C reaches only the parent, which
//! stops its children in order; and it asks the kernel to be killed when its parent dies, so
//! that none is ever left behind. Children must be spawned from a thread that lives as long
//! as they may: the kernel watches the spawning thread, not its process.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use rustix::process::{Pid, Signal};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::process::{Child, ChildStdout, Command};
use tokio::time::timeout;

use crate::Failure;

/// Longest ready line, in bytes.
const READY_LINE_SIZE_MAX: u64 = 64 << 10;
/// How much of a log's end is shown when its child fails, in bytes.
const LOG_TAIL_SIZE: u64 = 4 << 10;
/// How long a child may take to stop after SIGTERM: on a slow disk or a busy machine it takes long to hand over what
/// it leads and to bring everything to the disk, and a child that is killed has done neither.
const STOP_TIMEOUT: Duration = Duration::from_secs(60);

/// Makes the kernel kill this process when its parent dies.
///
/// # Errors
/// The parent is not (or no longer) the process `parent`, or the kernel refuses.
pub fn die_with_parent(parent: u32) -> Result<(), Failure> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
        .map_err(|error| Failure::failed(format!("parent-death signal: {error}")))?;
    // The parent may have died before the line above.
    let now = rustix::process::getppid().map(|pid| pid.as_raw_nonzero().get().unsigned_abs());
    if now == Some(parent) { Ok(()) } else { Err(Failure::failed(format!("the parent process {parent} has ended"))) }
}

/// One child. Dropping it kills it.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    stdout: Option<BufReader<ChildStdout>>,
    log: PathBuf,
}

impl Process {
    /// Starts this program with `args`. Its standard error is appended to `log`.
    ///
    /// # Errors
    /// The log cannot be opened or the process not be started.
    pub fn spawn(name: &str, args: &[&str], log: &Path) -> Result<Self, Failure> {
        let failed = |error: io::Error| Failure::failed(format!("cannot start {name}: {error}"));
        let stderr = open_log(log).map_err(failed)?;
        let program = std::env::current_exe().map_err(failed)?;
        let mut child = Command::new(program)
            .arg("--parent-pid")
            .arg(std::process::id().to_string())
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(stderr)
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .map_err(failed)?;
        let stdout = child.stdout.take().map(BufReader::new);
        Ok(Self { name: name.to_owned(), child, stdout, log: log.to_owned() })
    }

    /// Waits for the line of JSON that the child prints when it is ready.
    ///
    /// # Errors
    /// The child ended or was not ready within `limit`: the last line that it logged.
    pub async fn ready(&mut self, limit: Duration) -> Result<Value, Failure> {
        let mut text = String::new();
        let read = async {
            let Some(stdout) = self.stdout.as_mut() else { return Ok(0) };
            stdout.take(READY_LINE_SIZE_MAX).read_line(&mut text).await
        };
        match timeout(limit, read).await {
            Err(_) => Err(self.failure(&format!("was not ready within {} s", limit.as_secs()))),
            Ok(Err(error)) => Err(self.failure(&error.to_string())),
            Ok(Ok(_)) => serde_json::from_str(&text).map_err(|_| self.failure("did not start")),
        }
    }

    /// The process id.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.child.id()
    }

    /// Sends a signal; a child that has ended is left alone.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn signal(&self, signal: Signal) -> Result<(), Failure> {
        let pid = self.child.id().and_then(|pid| i32::try_from(pid).ok()).and_then(Pid::from_raw);
        let Some(pid) = pid else { return Ok(()) };
        rustix::process::kill_process(pid, signal)
            .map_err(|error| Failure::failed(format!("cannot signal {}: {error}", self.name)))
    }

    /// Kills with SIGKILL and waits until the process is gone.
    ///
    /// # Errors
    /// The kernel refuses.
    pub async fn kill(&mut self) -> Result<(), Failure> {
        self.child.kill().await.map_err(|error| Failure::failed(format!("cannot kill {}: {error}", self.name)))
    }

    /// Stops with SIGTERM, or SIGKILL when that takes too long.
    ///
    /// # Errors
    /// It did not stop by itself, or ended with an error.
    pub async fn stop(&mut self) -> Result<(), Failure> {
        self.signal(Signal::TERM)?;
        match timeout(STOP_TIMEOUT, self.child.wait()).await {
            Ok(Ok(status)) if status.success() => Ok(()),
            Ok(Ok(status)) => Err(self.failure(&format!("ended with {status}"))),
            Ok(Err(error)) => Err(self.failure(&error.to_string())),
            Err(_) => {
                self.kill().await?;
                Err(self.failure(&format!("did not stop within {} s", STOP_TIMEOUT.as_secs())))
            }
        }
    }

    /// Waits until the process ends by itself, and says how.
    pub async fn ended(&mut self) -> Failure {
        match self.child.wait().await {
            // Killed: its log does not say why.
            Ok(status) if status.code().is_none() => Failure::failed(format!("{} ended with {status}", self.name)),
            Ok(status) => self.failure(&format!("ended with {status}")),
            Err(error) => self.failure(&error.to_string()),
        }
    }

    fn failure(&self, problem: &str) -> Failure {
        let tail = log_tail(&self.log);
        let last = tail.lines().rev().map(str::trim).find(|line| !line.is_empty());
        let log = self.log.display();
        match last {
            Some(last) => {
                let last = last.strip_prefix("arqon: ").unwrap_or(last);
                Failure::failed(format!("{} {problem}: {last} (log: {log})", self.name))
            }
            None => Failure::failed(format!("{} {problem} (log: {log})", self.name)),
        }
    }
}

fn open_log(path: &Path) -> io::Result<File> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    OpenOptions::new().create(true).append(true).open(path)
}

fn log_tail(path: &Path) -> String {
    let read = || {
        let mut file = File::open(path)?;
        let size = file.metadata()?.len();
        file.seek(SeekFrom::Start(size.saturating_sub(LOG_TAIL_SIZE)))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok::<_, io::Error>(bytes)
    };
    read().map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
}
