//! The processes of the nodes: started, signalled, waited for.

use std::{
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process};
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::{Child, Command},
    sync::oneshot,
    time::{Instant, sleep, timeout, timeout_at},
};

use super::{Cluster, Error, admin, refuse};

/// Time for a node to become ready after it was started.
const READY_SECONDS_MAX: u64 = 60;
/// Time for a node to end when it is asked to.
const STOP_SECONDS_MAX: u64 = 30;
/// The number of the signal, as `kill -9` has it.
const SIGKILL: i32 = 9;

/// How a node ended.
#[derive(Clone, Debug)]
pub(crate) struct Exit {
    /// Whether with exit code 0.
    pub success: bool,
    /// Its status and its last log line.
    pub story: String,
}

impl Cluster {
    /// Runs a node with another program from its next start on.
    ///
    /// # Errors
    /// No such node.
    pub fn set_program(&mut self, number: u64, arqon: &Path) -> Result<(), Error> {
        let index = self.index(number)?;
        self.nodes[index].arqon = arqon.to_owned();
        Ok(())
    }

    /// The program that a node was started with last, unless with another one that time.
    ///
    /// # Errors
    /// No such node.
    pub fn program(&self, number: u64) -> Result<&Path, Error> {
        Ok(&self.nodes[self.index(number)?].arqon)
    }

    /// The file that the process of a node was started from, as the kernel says.
    #[must_use]
    pub fn runs_from(&self, number: u64) -> Option<PathBuf> {
        std::fs::read_link(format!("/proc/{}/exe", self.pid(number).ok()?.as_raw_nonzero())).ok()
    }

    /// Process ids of the nodes that run.
    #[must_use]
    pub fn pids(&self) -> Vec<u32> {
        self.nodes.iter().filter_map(|node| node.child.as_ref().and_then(Child::id)).collect()
    }

    /// Whether the process of a node is there.
    #[must_use]
    pub fn runs(&self, number: u64) -> bool {
        self.nodes.iter().any(|node| node.number == number && node.child.is_some())
    }

    /// Sends a signal to a node.
    ///
    /// # Errors
    /// The node does not run, or the system refuses.
    pub fn signal(&self, number: u64, signal: Signal) -> Result<(), Error> {
        let pid = self.pid(number)?;
        kill_process(pid, signal).map_err(|error| Error(format!("cannot signal node {number}: {error}")))
    }

    fn pid(&self, number: u64) -> Result<Pid, Error> {
        let child = self.nodes[self.index(number)?].child.as_ref();
        let pid = child.and_then(Child::id).and_then(|pid| i32::try_from(pid).ok()).and_then(Pid::from_raw);
        pid.ok_or_else(|| Error(format!("node {number} does not run")))
    }

    /// Whether the kernel says that a node is stopped by a signal.
    ///
    /// # Errors
    /// The node does not run.
    pub fn is_stopped(&self, number: u64) -> Result<bool, Error> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid(number)?.as_raw_nonzero()));
        Ok(stat.unwrap_or_default().rsplit_once(')').is_some_and(|(_, rest)| rest.trim_start().starts_with('T')))
    }

    /// Sends SIGKILL to a node and waits for its end. Whether that signal is what ended it.
    ///
    /// # Errors
    /// The node does not run, or the system refuses.
    pub async fn kill(&mut self, number: u64) -> Result<bool, Error> {
        let index = self.index(number)?;
        let Some(mut child) = self.nodes[index].child.take() else {
            return refuse(format!("node {number} does not run"));
        };
        child.start_kill().map_err(|error| Error(format!("cannot kill node {number}: {error}")))?;
        let status = child.wait().await.map_err(|error| Error(format!("cannot wait for node {number}: {error}")))?;
        Ok(status.signal() == Some(SIGKILL))
    }

    /// A node that runs no more although nobody here ended it, and how it ended.
    pub fn ended_by_itself(&mut self) -> Option<(u64, String)> {
        for node in &mut self.nodes {
            if let Some(status) = node.child.as_mut().and_then(|child| child.try_wait().ok().flatten()) {
                node.child = None;
                return Some((node.number, format!("ended by itself ({status}): {}", last_line(&node.log))));
            }
        }
        None
    }

    /// Whether the process of a node is not there any more, whoever ended it.
    pub fn has_ended(&mut self, number: u64) -> bool {
        let Some(node) = self.nodes.iter_mut().find(|node| node.number == number) else { return true };
        if node.child.as_mut().is_some_and(|child| !matches!(child.try_wait(), Ok(None))) {
            node.child = None;
        }
        node.child.is_none()
    }

    /// Whether a node has ended because it could not start, as its last line says; one that fails later says more.
    pub fn refused_to_start(&mut self, number: u64) -> bool {
        let has_ended = self.has_ended(number);
        let mut nodes = self.nodes.iter().filter(|node| node.number == number);
        has_ended && nodes.any(|node| last_line(&node.log).starts_with("arqon: "))
    }

    /// Asks a node to end, as an operator does, and waits for it. Whether it ended with success.
    ///
    /// # Errors
    /// The node does not run, or does not end in time.
    pub async fn stop(&mut self, number: u64) -> Result<bool, Error> {
        self.signal(number, Signal::TERM)?;
        let index = self.index(number)?;
        let Some(mut child) = self.nodes[index].child.take() else {
            return refuse(format!("node {number} does not run"));
        };
        match timeout(Duration::from_secs(STOP_SECONDS_MAX), child.wait()).await {
            Ok(Ok(status)) => Ok(status.success()),
            Ok(Err(error)) => refuse(format!("cannot wait for node {number}: {error}")),
            Err(_) => refuse(format!("node {number} does not end within {STOP_SECONDS_MAX} s of SIGTERM")),
        }
    }

    /// Starts a node again and does not wait for it.
    ///
    /// # Errors
    /// The process cannot be started.
    pub fn begin(&mut self, number: u64) -> Result<(), Error> {
        let index = self.index(number)?;
        self.launch(index).map(|_| ())
    }

    /// Starts a node with another program this one time, with more variables in its environment, and does not wait
    /// for it.
    ///
    /// # Errors
    /// The process cannot be started.
    pub(crate) fn begin_with(&mut self, number: u64, program: &Path, variables: &[(&str, &str)]) -> Result<(), Error> {
        let index = self.index(number)?;
        self.launch_with(index, program, variables).map(|_| ())
    }

    /// Waits until a node ends by itself or by a signal, but not longer than `limit`.
    ///
    /// # Errors
    /// The node does not run.
    pub(crate) async fn ends(&mut self, number: u64, limit: Duration) -> Result<Option<Exit>, Error> {
        let index = self.index(number)?;
        let node = &mut self.nodes[index];
        let Some(child) = node.child.as_mut() else { return refuse(format!("node {number} does not run")) };
        let Ok(waited) = timeout(limit, child.wait()).await else { return Ok(None) };
        let status = waited.map_err(|error| Error(format!("cannot wait for node {number}: {error}")))?;
        node.child = None;
        Ok(Some(Exit { success: status.success(), story: format!("ended ({status}): {}", last_line(&node.log)) }))
    }

    /// Waits until a node is ready that was started with [`Cluster::begin`].
    ///
    /// # Errors
    /// It ends, or is not ready in time; its last log line is quoted.
    pub async fn ready(&mut self, number: u64) -> Result<(), Error> {
        let index = self.index(number)?;
        self.wait_admin(index, Instant::now() + Duration::from_secs(READY_SECONDS_MAX)).await
    }

    /// Starts a node again and waits until it is ready.
    ///
    /// # Errors
    /// It ends at once, or is not ready in time; its last log line is quoted.
    pub async fn restart(&mut self, number: u64) -> Result<(), Error> {
        let index = self.index(number)?;
        let line = self.launch(index)?;
        self.wait_ready(index, line).await
    }

    /// Waits for a node that was started with [`Cluster::begin`] to be ready, but not longer than `limit`. Why it ended
    /// instead, if it did.
    pub async fn refuses(&mut self, number: u64, limit: Duration) -> Option<String> {
        let index = self.index(number).ok()?;
        // Neither ready nor at its end is no refusal: it may need others that are away.
        let waited = timeout(limit, self.wait_admin(index, Instant::now() + limit * 2)).await;
        if !self.has_ended(self.nodes[index].number) {
            return None;
        }
        let node = &self.nodes[index];
        Some(waited.ok().and_then(Result::err).map_or_else(|| last_line(&node.log), |error| error.to_string()))
    }

    /// Starts the process; the receiver gets the line that it prints when it listens.
    pub(super) fn launch(&mut self, index: usize) -> Result<oneshot::Receiver<String>, Error> {
        let arqon = self.nodes[index].arqon.clone();
        self.launch_with(index, &arqon, &[])
    }

    fn launch_with(
        &mut self,
        index: usize,
        arqon: &Path,
        variables: &[(&str, &str)],
    ) -> Result<oneshot::Receiver<String>, Error> {
        let node = &mut self.nodes[index];
        let log = std::fs::OpenOptions::new().create(true).append(true).open(&node.log);
        let log = log.map_err(|error| Error(format!("cannot open {}: {error}", node.log.display())))?;
        let mut command = match &self.network {
            Some(network) => {
                let [program, argument] = network.enter(node.number);
                let mut command = Command::new(program);
                command.arg(argument).arg("--").arg(arqon);
                command
            }
            None => Command::new(arqon),
        };
        if let Some(library) = &self.faketime {
            let clock = node.config.with_extension("clock");
            if !clock.exists() {
                let written = std::fs::write(&clock, "+0");
                written.map_err(|error| Error(format!("cannot write {}: {error}", clock.display())))?;
            }
            command.env("LD_PRELOAD", library).env("FAKETIME_TIMESTAMP_FILE", clock);
            // A look at the file for each look at the clock would cost more than the node itself.
            command.env("FAKETIME_CACHE_DURATION", "1").env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
            command.env("DONT_FAKE_MONOTONIC", "1");
        }
        command.envs(variables.iter().copied());
        // The node asks the kernel to be killed when this process ends, however it ends.
        command.args(["--parent-pid", &std::process::id().to_string(), "node", "--config"]).arg(&node.config);
        // A group of its own: Ctrl-C reaches this program alone, which then ends the nodes.
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log).process_group(0).kill_on_drop(true);
        let mut child = command.spawn().map_err(|error| Error(format!("cannot start {}: {error}", arqon.display())))?;
        let (ready, line) = oneshot::channel();
        if let Some(stdout) = child.stdout.take() {
            tokio::spawn(async move {
                let mut lines = BufReader::new(stdout).lines();
                if let Ok(Some(line)) = lines.next_line().await {
                    // Nobody waits any more when the start was given up.
                    let _ = ready.send(line);
                }
                // Whatever else it prints must not fill the pipe.
                while let Ok(Some(_)) = lines.next_line().await {}
            });
        }
        if let Some(pid) = child.id() {
            self.running.set(node.number, pid);
        }
        node.child = Some(child);
        Ok(line)
    }

    pub(super) async fn wait_ready(&mut self, index: usize, line: oneshot::Receiver<String>) -> Result<(), Error> {
        let deadline = Instant::now() + Duration::from_secs(READY_SECONDS_MAX);
        let node = &mut self.nodes[index];
        let number = node.number;
        match timeout_at(deadline, line).await {
            Ok(Ok(_)) => {}
            Ok(Err(_)) => return refuse(format!("node {number} ended while starting: {}", last_line(&node.log))),
            Err(_) => {
                return refuse(format!(
                    "node {number} is not up after {READY_SECONDS_MAX} s: {}",
                    last_line(&node.log)
                ));
            }
        }
        self.wait_admin(index, deadline).await
    }

    async fn wait_admin(&mut self, index: usize, deadline: Instant) -> Result<(), Error> {
        let node = &mut self.nodes[index];
        let number = node.number;
        while !admin::is_ready(&node.admin).await {
            if Instant::now() > deadline {
                return refuse(format!(
                    "node {number} is not ready after {READY_SECONDS_MAX} s: {}",
                    last_line(&node.log)
                ));
            }
            let ended = node.child.as_mut().and_then(|child| child.try_wait().ok().flatten());
            if let Some(status) = ended {
                return refuse(format!("node {number} ended ({status}): {}", last_line(&node.log)));
            }
            sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }
}

/// The last line of a log: why its program ended, most often.
pub(crate) fn last_line(log: &Path) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let line = text.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("its log is empty");
    format!("{line} ({})", log.display())
}
