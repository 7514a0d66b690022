//! Asks before something is done that cannot be taken back.

use std::io::{BufRead, IsTerminal, Write};

use crate::Failure;

/// What is typed after `prompt`. Where nobody can be asked, `flag` says how to confirm.
///
/// # Errors
/// Standard input is no terminal, or cannot be read.
pub(crate) fn ask(prompt: &str, flag: &str) -> Result<String, Failure> {
    if !std::io::stdin().is_terminal() {
        return Err(Failure::usage(format!("{flag} is needed where nobody can be asked; nothing was changed")));
    }
    let mut out = std::io::stderr().lock();
    let asked = write!(out, "{prompt}: ").and_then(|()| out.flush());
    asked.map_err(Failure::failed)?;
    let mut line = String::new();
    std::io::stdin().lock().read_line(&mut line).map_err(Failure::failed)?;
    Ok(line.trim().to_owned())
}
