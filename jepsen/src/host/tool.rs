//! Programs of the system that build hosts: `ip`, `nft`, `tc`, `mount` and their like.

use std::{
    io::Write,
    path::PathBuf,
    process::{Command as Sync, Output, Stdio},
    time::Duration,
};

use tokio::{io::AsyncWriteExt, process::Command, time::timeout};

use crate::cluster::Error;

/// Time for one program to end.
const TOOL_TIME_MAX: Duration = Duration::from_secs(30);
/// Where programs of the system may be besides the search path.
const SYSTEM_FOLDERS: [&str; 3] = ["/usr/sbin", "/sbin", "/usr/local/sbin"];

/// Where `program` is: on the search path, or where the system keeps its own.
#[must_use]
pub fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain(SYSTEM_FOLDERS.map(PathBuf::from));
    folders.map(|folder| folder.join(program)).find(|file| file.is_file())
}

fn path_of(program: &str) -> PathBuf {
    find(program).unwrap_or_else(|| program.into())
}

fn judge(program: &str, args: &[&str], output: Output) -> Result<String, Error> {
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let stderr = String::from_utf8_lossy(&output.stderr);
    let reason = stderr.lines().find(|line| !line.trim().is_empty()).unwrap_or("it says nothing");
    Err(Error::new(format!("{program} {} failed ({}): {reason}", args.join(" "), output.status)))
}

/// Runs `program` to its end with `input` on its standard input; gives what it printed.
///
/// # Errors
/// It is not there, fails, or does not end in time; its first line of complaint is quoted.
pub async fn run(program: &str, args: &[&str], input: &str) -> Result<String, Error> {
    let wrong = |error: std::io::Error| Error::new(format!("cannot run {program}: {error}"));
    let mut command = Command::new(path_of(program));
    command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    let mut child = command.spawn().map_err(wrong)?;
    if let Some(mut stdin) = child.stdin.take() {
        // A program that wants no input may have ended already; its exit status tells.
        let _ = stdin.write_all(input.as_bytes()).await;
    }
    match timeout(TOOL_TIME_MAX, child.wait_with_output()).await {
        Ok(output) => judge(program, args, output.map_err(wrong)?),
        Err(_) => {
            let seconds = TOOL_TIME_MAX.as_secs();
            Err(Error::new(format!("{program} {} did not end within {seconds} s", args.join(" "))))
        }
    }
}

/// As [`run`], where nothing asynchronous may run any more: while cleaning up.
///
/// # Errors
/// As [`run`], without the limit of time.
pub fn run_blocking(program: &str, args: &[&str], input: &str) -> Result<String, Error> {
    let wrong = |error: std::io::Error| Error::new(format!("cannot run {program}: {error}"));
    let mut command = Sync::new(path_of(program));
    command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(wrong)?;
    if let Some(mut stdin) = child.stdin.take() {
        // As above.
        let _ = stdin.write_all(input.as_bytes());
    }
    judge(program, args, child.wait_with_output().map_err(wrong)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_failing_program_is_quoted_and_a_missing_one_is_named() {
        assert_eq!(run("cat", &[], "all of it").await.unwrap(), "all of it");
        assert_eq!(run_blocking("cat", &[], "all of it").unwrap(), "all of it");
        let error = run("sh", &["-c", "echo first >&2; echo second >&2; exit 3"], "").await.unwrap_err().to_string();
        assert!(error.contains("exit status: 3") && error.ends_with("first"), "{error}");
        assert!(run("no-such-program", &[], "").await.unwrap_err().to_string().contains("no-such-program"));
    }
}
