//! What this machine can do, found out by trying.

use std::{
    fs,
    path::{Path, PathBuf},
};

use super::tool;

/// Where distributions put the library that fakes the clock.
const FAKETIME_PATHS: [&str; 6] = [
    "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1",
    "/usr/lib/aarch64-linux-gnu/faketime/libfaketimeMT.so.1",
    "/usr/lib64/faketime/libfaketimeMT.so.1",
    "/usr/lib/faketime/libfaketimeMT.so.1",
    "/usr/local/lib/faketime/libfaketimeMT.so.1",
    "/usr/lib64/faketime/libfaketime.so.1",
];

/// Something that a fault needs of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Need {
    /// Namespaces and a bridge between them, so that each node has an address of its own.
    Network,
    /// Rules that drop packets.
    Filter,
    /// A queue that holds packets back.
    Shaper,
    /// A loop device with ext4 on it.
    LoopDisk,
    /// A disk that can lose its power and be full: of either kind.
    Power,
    /// A disk that is a program.
    FuseDisk,
    /// libfaketime.
    Clock,
    /// The program of an earlier release.
    Previous,
    /// The program with crash points.
    FailPoints,
}

/// What there is, or the reason why not.
#[derive(Clone, Debug)]
pub struct Machine {
    network: Result<(), String>,
    filter: Result<(), String>,
    shaper: Result<(), String>,
    loop_disk: Result<(), String>,
    fuse_disk: Result<(), String>,
    clock: Result<PathBuf, String>,
    previous: bool,
    planted: Result<PathBuf, String>,
}

fn tools(names: &[&str]) -> Result<(), String> {
    match names.iter().find(|name| tool::find(name).is_none()) {
        Some(name) => Err(format!("{name} is not installed")),
        None => Ok(()),
    }
}

fn device(path: &str) -> Result<(), String> {
    fs::OpenOptions::new().read(true).write(true).open(path).map(|_| ()).map_err(|error| format!("{path}: {error}"))
}

/// Mounts something where nobody sees it, in a namespace that is gone with the program. Where the system shares its
/// mounts, one that is unmounted elsewhere meanwhile goes there too.
fn mount() -> Result<(), String> {
    let at = std::env::temp_dir().display().to_string();
    let args = ["--mount", "--propagation", "slave", "mount", "-t", "tmpfs", "arqon-jepsen", &at];
    tool::run_blocking("unshare", &args, "").map(|_| ()).map_err(|error| error.to_string())
}

/// Asks for a loop device that is free; where devices are not the system's own, there may be none of that name.
fn loop_device() -> Result<(), String> {
    device("/dev/loop-control")?;
    let free = tool::run_blocking("losetup", &["--find"], "").map_err(|error| error.to_string())?;
    device(free.trim())
}

impl Machine {
    /// Tries what can be tried. `previous` says whether the program of an earlier release is named, `planted` where
    /// the one with crash points is, or why there is none.
    #[must_use]
    pub fn look(previous: bool, planted: Result<PathBuf, String>) -> Self {
        let root = if rustix::process::geteuid().is_root() { Ok(()) } else { Err("needs root".to_owned()) };
        let trial = format!("aj{:x}-trial", std::process::id());
        let made = root
            .clone()
            .and_then(|()| tools(&["ip", "nsenter"]))
            .and_then(|()| tool::run_blocking("ip", &["netns", "add", &trial], "").map_err(|error| error.to_string()));
        let in_trial = |program: &str, args: &[&str]| {
            let mut all = vec!["netns", "exec", &trial, program];
            all.extend(args);
            tool::run_blocking("ip", &all, "").map(|_| ()).map_err(|error| error.to_string())
        };
        let made = made.map(|_| ());
        let network = made
            .clone()
            .and_then(|()| in_trial("ip", &["link", "add", "aj0", "type", "bridge"]))
            .and_then(|()| in_trial("ip", &["link", "add", "aj1", "type", "veth", "peer", "name", "aj2"]));
        let filter = network.clone().and_then(|()| tools(&["nft"])).and_then(|()| {
            in_trial(
                "nft",
                &["add table inet t; add chain inet t c; add rule inet t c numgen random mod 100 < 5 counter drop"],
            )
        });
        let shaper = network.clone().and_then(|()| tools(&["tc"])).and_then(|()| {
            in_trial(
                "tc",
                &["qdisc", "add", "dev", "lo", "root", "tbf", "rate", "1mbit", "burst", "16kb", "latency", "50ms"],
            )
        });
        if made.is_ok() {
            // A run that is judged says the same of its own namespaces, loudly.
            let _ = tool::run_blocking("ip", &["netns", "delete", &trial], "");
        }
        let mounting = root.and_then(|()| tools(&["mount", "unshare"])).and_then(|()| mount());
        Self {
            network,
            filter,
            shaper,
            loop_disk: mounting.clone().and_then(|()| tools(&["mkfs.ext4", "losetup"])).and_then(|()| loop_device()),
            fuse_disk: mounting.and_then(|()| device("/dev/fuse")),
            clock: FAKETIME_PATHS
                .iter()
                .map(PathBuf::from)
                .find(|path| path.is_file())
                .ok_or_else(|| "libfaketime is not installed".to_owned()),
            previous,
            planted,
        }
    }

    /// Whether there is what `need` says.
    ///
    /// # Errors
    /// Why not, in a few words.
    pub fn has(&self, need: Need) -> Result<(), String> {
        match need {
            Need::Network => self.network.clone(),
            Need::Filter => self.filter.clone(),
            Need::Shaper => self.shaper.clone(),
            Need::LoopDisk => self.loop_disk.clone(),
            Need::FuseDisk => self.fuse_disk.clone(),
            Need::Power => self.loop_disk.clone().or_else(|_| self.fuse_disk.clone()),
            Need::Clock => self.clock.clone().map(|_| ()),
            Need::Previous if self.previous => Ok(()),
            Need::Previous => Err("--arqon-before names no program of an earlier release".to_owned()),
            Need::FailPoints => self.planted.clone().map(|_| ()),
        }
    }

    /// The program with crash points.
    #[must_use]
    pub fn planted(&self) -> Option<&Path> {
        self.planted.as_deref().ok()
    }

    /// The library that fakes the clock.
    #[must_use]
    pub fn faketime(&self) -> Option<&Path> {
        self.clock.as_deref().ok()
    }
}
