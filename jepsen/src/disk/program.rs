//! The run's end of a [`fuse`](super::fuse) disk.

use std::{
    path::Path,
    process::Stdio,
    time::{Duration, Instant},
};

use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines},
    process::{Child, ChildStdin, ChildStdout, Command},
    time::timeout,
};

use super::fuse::{Answer, Counters, Lost, Order, Trouble};
use crate::cluster::Error;

/// Time for the program to end by itself.
const END_TIME_MAX: Duration = Duration::from_secs(5);
/// Time for the program to be gone once it is killed; a kernel that is busy with its mount holds it up.
const KILL_TIME_MAX: Duration = Duration::from_secs(10);
/// Time for an answer.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(30);

/// A disk program that runs; it ends with this.
pub struct Program {
    name: String,
    /// Its end is the end of the disk.
    orders: Option<ChildStdin>,
    answers: Lines<BufReader<ChildStdout>>,
    child: Child,
}

impl Program {
    /// Starts `program disk STORE MOUNT` and waits until it is mounted.
    ///
    /// # Errors
    /// It does not start or cannot mount; it says why on the terminal.
    pub async fn start(program: &Path, store: &Path, mount: &Path) -> Result<Self, Error> {
        let name = mount.display().to_string();
        let mut command = Command::new(program);
        command.arg("disk").arg(store).arg(mount).stdin(Stdio::piped()).stdout(Stdio::piped()).process_group(0);
        let mut child = command.spawn().map_err(|error| Error::new(format!("cannot start disk {name}: {error}")))?;
        let (Some(orders), Some(answers)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(Error::new(format!("disk {name} has no pipes")));
        };
        let mut disk = Self { name, orders: Some(orders), answers: BufReader::new(answers).lines(), child };
        disk.answer().await?;
        Ok(disk)
    }

    async fn answer(&mut self) -> Result<Answer, Error> {
        let wrong = |text: String| Error::new(format!("disk {}: {text}", self.name));
        let line = timeout(ANSWER_TIME_MAX, self.answers.next_line()).await;
        let line = line.map_err(|_| wrong("does not answer".to_owned()))?.map_err(|error| wrong(error.to_string()))?;
        let line = line.ok_or_else(|| wrong("has ended".to_owned()))?;
        match serde_json::from_str(&line).map_err(|error| wrong(error.to_string()))? {
            Answer::Failed(why) => Err(wrong(why)),
            answer => Ok(answer),
        }
    }

    async fn order(&mut self, order: Order) -> Result<Answer, Error> {
        let wrong = |error: std::io::Error| Error::new(format!("disk {}: {error}", self.name));
        let mut text = serde_json::to_string(&order).map_err(|error| wrong(error.into()))?;
        text.push('\n');
        let Some(orders) = &mut self.orders else { return self.unexpected(&Answer::Ready) };
        orders.write_all(text.as_bytes()).await.map_err(wrong)?;
        self.answer().await
    }

    fn unexpected<T>(&self, answer: &Answer) -> Result<T, Error> {
        Err(Error::new(format!("disk {}: answers {answer:?}", self.name)))
    }

    /// See [`Order::Trouble`].
    ///
    /// # Errors
    /// The disk does not answer.
    pub async fn trouble(&mut self, trouble: Trouble) -> Result<(), Error> {
        self.order(Order::Trouble(trouble)).await.map(|_| ())
    }

    /// See [`Order::Count`].
    ///
    /// # Errors
    /// The disk does not answer.
    pub async fn count(&mut self) -> Result<Counters, Error> {
        match self.order(Order::Count).await? {
            Answer::Counted(counters) => Ok(counters),
            other => self.unexpected(&other),
        }
    }

    /// See [`Order::Off`].
    ///
    /// # Errors
    /// The disk does not answer.
    pub async fn off(&mut self) -> Result<(), Error> {
        self.order(Order::Off).await.map(|_| ())
    }

    /// See [`Order::Cut`].
    ///
    /// # Errors
    /// Somebody still uses the disk.
    pub async fn cut(&mut self, seed: u64) -> Result<Lost, Error> {
        match self.order(Order::Cut { seed }).await? {
            Answer::Lost(lost) => Ok(lost),
            other => self.unexpected(&other),
        }
    }

    /// Whether the program has ended and was collected, waited for up to `limit`.
    fn is_gone_within(&mut self, limit: Duration) -> bool {
        let end = Instant::now() + limit;
        while matches!(self.child.try_wait(), Ok(None)) {
            if Instant::now() > end {
                return false;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        true
    }
}

impl Drop for Program {
    /// Sees the disk unmounted and its program gone.
    fn drop(&mut self) {
        drop(self.orders.take());
        if self.is_gone_within(END_TIME_MAX) {
            return;
        }
        // Its mount goes with the run's claim. It may have ended just now.
        let _ = self.child.start_kill();
        if !self.is_gone_within(KILL_TIME_MAX) {
            eprintln!("warning: the program of disk {} does not end", self.name);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::child::tests::program;

    #[tokio::test]
    async fn a_program_that_does_not_end_by_itself_is_killed_and_collected() {
        let dir = tempfile::tempdir().unwrap();
        let program = program(dir.path(), "echo '\"ready\"'; exec sleep 600");
        let disk = Program::start(&program, &dir.path().join("store"), &dir.path().join("mount")).await.unwrap();
        let process = Path::new("/proc").join(disk.child.id().unwrap().to_string());
        assert!(process.exists());
        drop(disk);
        assert!(!process.exists(), "not even as one that waits to be collected");
    }
}
