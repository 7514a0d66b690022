//! Standard output: lines and JSON documents.

use std::io::{self, Write};

use serde_json::Value;

use crate::Failure;

/// Prints one line and flushes it, so that whoever reads a pipe sees it at once.
///
/// # Errors
/// Standard output cannot be written, other than because its reader has left: see [`gone`].
pub fn line(text: impl std::fmt::Display) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    writeln!(out, "{text}").and_then(|()| out.flush()).map_err(failed)
}

/// Prints one JSON document on one line.
///
/// # Errors
/// As [`line`].
pub fn json(document: &Value) -> Result<(), Failure> {
    line(document)
}

/// Prints rows below a heading, columns aligned.
///
/// # Errors
/// As [`line`].
pub fn table(heading: &[&str], rows: &[Vec<String>]) -> Result<(), Failure> {
    let mut widths: Vec<usize> = heading.iter().map(|name| name.len()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let draw = |cells: &mut dyn Iterator<Item = &str>| {
        let mut text = String::new();
        for (cell, width) in cells.zip(&widths) {
            text.push_str(&format!("{cell:<width$}  "));
        }
        text.trim_end().to_owned()
    };
    line(draw(&mut heading.iter().copied()))?;
    rows.iter().try_for_each(|row| line(draw(&mut row.iter().map(String::as_str))))
}

const READER_GONE: &str = "standard output was closed";

fn failed(error: io::Error) -> Failure {
    if error.kind() == io::ErrorKind::BrokenPipe {
        return Failure::failed(READER_GONE);
    }
    Failure::failed(format!("standard output: {error}"))
}

/// Whether the command ended because the reader of its output has left, as `head` does: that
/// is no failure.
pub fn gone(failure: &Failure) -> bool {
    failure.to_string() == READER_GONE
}
