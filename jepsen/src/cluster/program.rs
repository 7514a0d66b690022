//! Programs that nodes run: where they are, and which version each one is.

use std::{
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use tokio::{process::Command, time::timeout};

use super::{Error, refuse};

/// Time for a program to say which one it is.
const VERSION_TIME_MAX: Duration = Duration::from_secs(20);

/// A program, and the version that it tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Program {
    /// The file.
    pub path: PathBuf,
    /// The first word after its name of what it prints for `--version`, as in `0.1.0-5f0c1c2ad3b4`.
    pub version: String,
}

impl Program {
    /// Asks the program at `path` which version it is.
    ///
    /// # Errors
    /// It does not say.
    pub async fn ask(path: &Path) -> Result<Self, Error> {
        let run = Command::new(path).arg("--version").stdin(Stdio::null()).kill_on_drop(true).output();
        let output = match timeout(VERSION_TIME_MAX, run).await {
            Ok(Ok(output)) => output,
            Ok(Err(error)) => return refuse(format!("cannot run {}: {error}", path.display())),
            Err(_) => return refuse(format!("{} --version does not end", path.display())),
        };
        let text = String::from_utf8_lossy(&output.stdout);
        match text.split_whitespace().nth(1).filter(|_| output.status.success()) {
            Some(version) => Ok(Self { path: path.to_owned(), version: version.to_owned() }),
            None => refuse(format!("{} --version tells no version", path.display())),
        }
    }
}

/// The program with crash points: `given`, else `arqon-planted` beside this executable.
///
/// # Errors
/// There is none; the line says how it is built.
pub(crate) fn find_planted(given: Option<&Path>) -> Result<PathBuf, String> {
    let beside = || Some(std::env::current_exe().ok()?.with_file_name("arqon-planted"));
    let build = "CARGO_TARGET_DIR=target cargo build --release --manifest-path planted/Cargo.toml";
    let Some(path) = given.map(Path::to_owned).or_else(beside) else {
        return Err("cannot tell where this program is; name the planted one with --planted".to_owned());
    };
    match path.is_file() {
        true => Ok(path),
        false => Err(format!("{}: no such file; build it: {build}", path.display())),
    }
}

/// The `arqon` program: `given`, else the one beside this executable, else built by cargo.
///
/// # Errors
/// There is none and it cannot be built.
pub async fn find_arqon(given: Option<PathBuf>) -> Result<PathBuf, Error> {
    if let Some(path) = given {
        return if path.is_file() { Ok(path) } else { refuse(format!("--arqon {}: no such file", path.display())) };
    }
    let own = std::env::current_exe().map_err(|error| Error(format!("cannot tell where this program is: {error}")))?;
    // Test executables stand one folder deeper.
    let folders = own.ancestors().skip(1).take(2);
    let beside: Vec<PathBuf> = folders.map(|folder| folder.join("arqon")).collect();
    if let Some(path) = beside.iter().find(|path| path.is_file()) {
        return Ok(path.clone());
    }
    eprintln!("no arqon beside {}; building it: cargo build --release -p arqon-cli", own.display());
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let built = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args(["build", "--release", "-p", "arqon-cli"])
        .current_dir(root)
        .stdout(Stdio::null())
        .status()
        .await;
    match built {
        Ok(status) if status.success() => {}
        Ok(status) => return refuse(format!("cargo build --release -p arqon-cli ended with {status}")),
        Err(error) => {
            return refuse(format!("cannot run cargo to build arqon: {error}; name the program with --arqon"));
        }
    }
    match beside.iter().find(|path| path.is_file()) {
        Some(path) => Ok(path.clone()),
        None => refuse("arqon was built but is not beside this program; name it with --arqon"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::child::tests::program;

    #[tokio::test]
    async fn a_program_tells_its_version_or_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = program(dir.path(), "echo 'arqon 0.1.0-5f0c1c2 (and more)'");
        assert_eq!(Program::ask(&path).await.unwrap().version, "0.1.0-5f0c1c2");
        let path = program(dir.path(), "echo usage >&2; exit 2");
        let error = Program::ask(&path).await.unwrap_err().to_string();
        assert!(error.contains("tells no version") && error.contains(&path.display().to_string()), "{error}");
    }
}
