//! A disk that is a program: `arqon-jepsen disk STORE MOUNT`, told what to do by JSON lines on its
//! standard input, each answered by one on its standard output. It unmounts and ends when the input ends, so
//! it does not outlive the run.

mod filesystem;
mod volume;

use std::{
    io::{self, BufRead, Write},
    path::Path,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use fuser::{BackgroundSession, Config, MountOption, Session};
use rustix::mount::{UnmountFlags, unmount};
use serde::{Deserialize, Serialize};

pub use filesystem::{Counters, Trouble};
use filesystem::{Served, Shared};
pub use volume::Lost;
use volume::Volume;

/// Threads, so that a delayed request does not hold up the others.
const THREAD_COUNT: usize = 8;
/// Time for the last user of the disk to be gone before it is unmounted.
const BUSY_TIME_MAX: Duration = Duration::from_secs(10);

/// What a disk is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Order {
    /// Make trouble from now on, and count anew.
    Trouble(Trouble),
    /// Say how much trouble there was.
    Count,
    /// The power is gone: answer errors and change nothing.
    Off,
    /// Lose what was not safe and come back. Nobody may use the disk any more.
    Cut {
        /// Decides what is lost.
        seed: u64,
    },
}

/// What a disk answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// So be it.
    Ready,
    /// Since the last order to make trouble.
    Counted(Counters),
    /// What the cut took.
    Lost(Lost),
    /// It cannot be done.
    Failed(String),
}

/// A mounted disk.
struct Disk {
    shared: Arc<Shared>,
    mount: std::path::PathBuf,
    session: Option<BackgroundSession>,
}

impl Disk {
    fn mount(&mut self) -> io::Result<()> {
        let mut config = Config::default();
        config.mount_options =
            vec![MountOption::FSName("arqon-jepsen".into()), MountOption::NoAtime, MountOption::DefaultPermissions];
        config.n_threads = Some(THREAD_COUNT);
        config.clone_fd = true;
        let session = Session::new(Served(self.shared.clone()), &self.mount, &config)?;
        self.session = Some(session.spawn()?);
        Ok(())
    }

    fn unmount(&mut self) -> io::Result<()> {
        let Some(session) = self.session.take() else { return Ok(()) };
        let end = Instant::now() + BUSY_TIME_MAX;
        while let Err(error) = unmount(&self.mount, UnmountFlags::empty()) {
            if Instant::now() > end || error != rustix::io::Errno::BUSY {
                self.session = Some(session);
                return Err(error.into());
            }
            thread::sleep(Duration::from_millis(5));
        }
        // A thread that was just being handed a request, as the close of a file that the kernel tells late,
        // learns in this way that the connection has ended; the others by a plain end.
        match session.join() {
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => Ok(()),
            ended => ended,
        }
    }

    fn obey(&mut self, order: Order) -> io::Result<Answer> {
        match order {
            Order::Trouble(trouble) => {
                self.shared.lock().set_trouble(trouble);
                Ok(Answer::Ready)
            }
            Order::Count => Ok(Answer::Counted(self.shared.lock().counters)),
            Order::Off => {
                self.shared.lock().is_off = true;
                Ok(Answer::Ready)
            }
            Order::Cut { seed } => {
                self.unmount()?;
                let lost = {
                    let mut state = self.shared.lock();
                    state.is_off = false;
                    state.volume.cut(seed)?
                };
                self.mount()?;
                Ok(Answer::Lost(lost))
            }
        }
    }
}

/// Serves a new disk at `mount` until standard input ends; its bytes lie in `store`.
///
/// # Errors
/// It cannot be mounted, or its output is gone.
pub fn serve(store: &Path, mount: &Path) -> io::Result<()> {
    let mut disk = Disk { shared: Shared::new(Volume::create(store)?), mount: mount.to_owned(), session: None };
    disk.mount()?;
    let mut out = io::stdout().lock();
    let mut say = |answer: &Answer| {
        let text = serde_json::to_string(answer)?;
        writeln!(out, "{text}")?;
        out.flush()
    };
    say(&Answer::Ready)?;
    for line in io::stdin().lock().lines() {
        let order = serde_json::from_str(&line?);
        let answer = match order {
            Ok(order) => disk.obey(order).unwrap_or_else(|error| Answer::Failed(error.to_string())),
            Err(error) => Answer::Failed(format!("not understood: {error}")),
        };
        say(&answer)?;
    }
    // Whoever still uses it gets errors; the mount itself goes with its last user.
    disk.shared.lock().is_off = true;
    // One that was unmounted by the run's cleaning is gone already.
    let _ = unmount(&disk.mount, UnmountFlags::DETACH);
    Ok(())
}
