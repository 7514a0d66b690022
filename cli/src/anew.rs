//! A node whose disk has failed it starts itself anew, as an operator would restart it.
//!
//! A log that met a failed write or sync is closed until its process starts again: only a start may say what of it is
//! on the disk (docs/reliability.md). So the process runs its own program once more in its place: same number,
//! arguments and files, nothing in memory. While that goes on to fail, the pauses between two tries double.

use std::{env, ffi::OsString, os::unix::process::CommandExt, process::Command, time::Duration};

use crate::Failure;

/// The pause before this start, in seconds, for the next one.
const PAUSE_VARIABLE: &str = "ARQON_RESTART_PAUSE";
const PAUSE_MIN: Duration = Duration::from_secs(5);
const PAUSE_MAX: Duration = Duration::from_secs(300);
/// A node that was ready for so long before its disk failed again has been well.
const WELL_TIME: Duration = Duration::from_secs(30);

/// Who started this process.
#[derive(Clone, Copy, Debug)]
pub struct Starts {
    /// How long it waited before it started itself; `None` when somebody else started it.
    waited: Option<Duration>,
}

impl Starts {
    /// Of this process.
    #[must_use]
    pub fn of_this_process() -> Self {
        let waited = env::var(PAUSE_VARIABLE).ok().and_then(|seconds| seconds.parse().ok());
        Self { waited: waited.map(Duration::from_secs) }
    }

    /// Whether this process was started by itself.
    #[must_use]
    pub fn is_again(&self) -> bool {
        self.waited.is_some()
    }

    /// How long to wait before the next start of a node that was ready for `ran`.
    #[must_use]
    pub fn pause(&self, ran: Duration) -> Duration {
        match self.waited {
            Some(waited) if ran < WELL_TIME => (waited * 2).clamp(PAUSE_MIN, PAUSE_MAX),
            _ => PAUSE_MIN,
        }
    }
}

/// Runs this program anew in this process, which waited for `paused`.
///
/// # Errors
/// The system refuses. There is no way back otherwise.
pub fn start(paused: Duration) -> Result<(), Failure> {
    let mut arguments = env::args_os();
    let name = arguments.next().unwrap_or_else(|| OsString::from("arqon"));
    // The program that runs, whatever stands at its path by now.
    let mut program = Command::new("/proc/self/exe");
    program.arg0(name).args(arguments).env(PAUSE_VARIABLE, paused.as_secs().to_string());
    Err(Failure::failed(format!("cannot start anew: {}", program.exec())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_until_a_node_has_been_well() {
        let seconds = Duration::from_secs;
        let pause = |waited, ran| Starts { waited }.pause(ran);
        assert_eq!(pause(None, seconds(1)), seconds(5), "the first time");
        assert_eq!(pause(Some(seconds(5)), seconds(1)), seconds(10));
        assert_eq!(pause(Some(seconds(200)), seconds(1)), seconds(300));
        assert_eq!(pause(Some(seconds(300)), seconds(1)), seconds(300));
        assert_eq!(pause(Some(seconds(300)), seconds(31)), seconds(5));
        assert_eq!(pause(Some(seconds(0)), seconds(1)), seconds(5), "whatever somebody set");
    }
}
