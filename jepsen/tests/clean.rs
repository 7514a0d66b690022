//! The story: a run is ended, in order or not, while it has namespaces, mounts, loop devices and processes. Nothing
//! of it may be left, and another run at the same time is left alone. Needs root and a machine that makes such hosts,
//! as these runs do.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::{
    fs::{self, File},
    path::Path,
    process::{Child, Command, Stdio},
    sync::LazyLock,
    time::{Duration, Instant},
};

use arqon_jepsen::{Machine, Need};
use rustix::process::{Pid, Signal, kill_process};

/// Stands for arqon: writes configurations, and runs nodes that never become ready.
const ARQON: &str = r#"#!/bin/sh
if [ "$1" = up ]; then
  for n in 1 2 3; do
    printf 'node = %s\n[listen]\nclient = "127.0.0.1:10"\npeer = "127.0.0.1:11"\ncontrol = "127.0.0.1:12"\nadmin = "127.0.0.1:13"\n' $n > "$7/node-$n.toml"
  done
  echo '{"server":"127.0.0.1:10","token":"t"}'
else
  echo '{}'
  # In the run's disk, as a real node is.
  cd "$(sed -n 's/^data = "\(.*\)\/data"$/\1/p' "$5")" && exec sleep 600
fi
"#;

/// Long enough for a machine that does much else.
const WAIT_TIME_MAX: Duration = Duration::from_secs(120);

/// Looked at once: what is tried carries the number of this process in its name.
static MACHINE: LazyLock<Machine> = LazyLock::new(|| Machine::look(false, Err(String::new())));

struct Run {
    child: Child,
    dir: tempfile::TempDir,
}

fn ip(args: &[&str]) -> String {
    let output = Command::new("ip").args(args).output().unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

impl Run {
    fn start(disk: &str) -> Self {
        let mut run = Self::begin(disk);
        run.nodes_run();
        run
    }

    /// Does not wait for the nodes.
    fn begin(disk: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (text, arqon) = (dir.path().join("script"), dir.path().join("arqon"));
        fs::write(&text, ARQON).unwrap();
        // By a process of its own: a descriptor that writes to a program must not be inherited by others.
        assert!(Command::new("install").args(["-m", "755"]).arg(&text).arg(&arqon).status().unwrap().success());
        let mut command = Command::new(env!("CARGO_BIN_EXE_arqon-jepsen"));
        command.args(["run", "--json", "--faults", "none", "--disk", disk, "--dir"]).arg(dir.path().join("run"));
        let stderr = File::create(dir.path().join("stderr")).unwrap();
        command.arg("--arqon").arg(arqon).stdout(Stdio::null()).stderr(stderr);
        Self { child: command.spawn().unwrap(), dir }
    }

    fn nodes_run(&mut self) {
        self.until("all three nodes run", |run| {
            let ended = run.child.try_wait().unwrap();
            assert!(ended.is_none(), "the run ended ({ended:?}): {}", run.stderr());
            (1..=3).all(|node| run.node_runs(node))
        });
    }

    fn until(&mut self, what: &str, mut is_so: impl FnMut(&mut Self) -> bool) {
        let end = Instant::now() + WAIT_TIME_MAX;
        while !is_so(self) {
            assert!(
                Instant::now() < end,
                "not within {WAIT_TIME_MAX:?}: {what}; there is {:?}; the run and its reaper told: {}",
                self.left(),
                self.stderr()
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// What the run and its reaper have told.
    fn stderr(&self) -> String {
        fs::read_to_string(self.dir.path().join("stderr")).unwrap()
    }

    fn id(&self) -> String {
        format!("{:x}", self.child.id())
    }

    fn node_runs(&self, node: u32) -> bool {
        let listed = ip(&["netns", "pids", &format!("aj{}-{node}", self.id())]);
        listed
            .split_whitespace()
            .any(|pid| fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name == "sleep\n"))
    }

    fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(i32::try_from(self.child.id()).unwrap()).unwrap();
        kill_process(pid, signal).unwrap();
    }

    /// What is there of this run, a line each.
    fn left(&self) -> Vec<String> {
        let dir = self.dir.path().to_str().unwrap();
        let name = format!("aj{}", self.id());
        let mut left: Vec<String> = Vec::new();
        left.extend(ip(&["netns"]).lines().filter(|line| line.starts_with(&format!("{name}-"))).map(str::to_owned));
        left.extend(
            ip(&["-br", "link"])
                .lines()
                .filter(|line| line.starts_with(&format!("{name} ")) || line.starts_with(&format!("{name}v")))
                .map(|line| line.split(' ').next().unwrap().to_owned()),
        );
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        left.extend(mounts.lines().filter(|line| line.contains(dir)).map(str::to_owned));
        for device in fs::read_dir("/sys/block").unwrap() {
            let file = fs::read_to_string(device.unwrap().path().join("loop/backing_file")).unwrap_or_default();
            left.extend(file.contains(dir).then_some(file));
        }
        for process in fs::read_dir("/proc").unwrap() {
            let process = process.unwrap().path();
            let line = fs::read_to_string(process.join("cmdline")).unwrap_or_default();
            let here = fs::read_link(process.join("cwd")).unwrap_or_default();
            let is_own = process.file_name().is_some_and(|pid| pid.to_str() == Some(&self.child.id().to_string()));
            if !is_own && (line.contains(dir) || here.starts_with(dir)) {
                left.push(format!("{}: {line}", process.display()));
            }
        }
        left.extend(Path::new(&format!("/run/arqon-jepsen/{}.json", self.id())).exists().then(|| "claim".to_owned()));
        left
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        // A test that failed before it ended the run.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Whether this machine can make hosts with such a disk; says what is missing where it cannot.
fn can(disk: &str) -> bool {
    let disk_need = match disk {
        "ext4" => Some(Need::LoopDisk),
        "fuse" => Some(Need::FuseDisk),
        _ => None,
    };
    let missing = [Some(Need::Network), disk_need].into_iter().flatten().find_map(|need| MACHINE.has(need).err());
    if let Some(why) = &missing {
        eprintln!("not run with disk {disk}: {why}");
    }
    missing.is_none()
}

fn clean() {
    let output = Command::new(env!("CARGO_BIN_EXE_arqon-jepsen")).arg("clean").output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn nothing_is_left_of_a_run_that_is_killed() {
    for disk in ["ext4", "fuse", "plain"].into_iter().filter(|disk| can(disk)) {
        let mut run = Run::start(disk);
        assert!(run.left().len() > 6, "{:?}", run.left());
        run.signal(Signal::KILL);
        run.child.wait().unwrap();
        run.until("the reaper is through", |run| run.left().is_empty());
    }
}

#[test]
fn nothing_is_left_of_a_run_that_is_stopped_with_ctrl_c() {
    for disk in ["ext4", "fuse"].into_iter().filter(|disk| can(disk)) {
        let mut run = Run::start(disk);
        run.signal(Signal::INT);
        assert!(!run.child.wait().unwrap().success());
        assert_eq!(run.left(), [""; 0], "with {disk}, right after its end: {}", run.stderr());
    }
}

#[test]
fn a_stopped_node_does_not_keep_a_killed_run_and_clean_leaves_a_living_one_alone() {
    if !(can("ext4") && can("fuse")) {
        return;
    }
    // Side by side, as each waits only so long for nodes that never become ready.
    let (mut dead, mut living) = (Run::begin("ext4"), Run::begin("fuse"));
    dead.nodes_run();
    living.nodes_run();
    for pid in ip(&["netns", "pids", &format!("aj{}-2", dead.id())]).split_whitespace() {
        kill_process(Pid::from_raw(pid.parse().unwrap()).unwrap(), Signal::STOP).unwrap();
    }
    let before = living.left();
    dead.signal(Signal::KILL);
    dead.child.wait().unwrap();
    // While the reaper does the same, and after it.
    clean();
    dead.until("the reaper is through", |dead| dead.left().is_empty());
    clean();
    assert_eq!(living.left(), before, "{}", living.stderr());
}
