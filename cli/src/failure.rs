//! How a command ends when it does not succeed.

use std::process::ExitCode;

/// Why a command failed: one line for standard error, and the exit code.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    message: String,
    usage: bool,
}

impl Failure {
    /// What was asked for could not be done: exit code 1.
    pub fn failed(message: impl std::fmt::Display) -> Self {
        Self { message: one_line(&message.to_string()), usage: false }
    }

    /// The command line asks for something that cannot be: exit code 2.
    pub fn usage(message: impl std::fmt::Display) -> Self {
        Self { message: one_line(&message.to_string()), usage: true }
    }

    /// The same failure with its place in front.
    #[must_use]
    pub fn at(mut self, place: impl std::fmt::Display) -> Self {
        self.message = format!("{place}: {}", self.message);
        self
    }

    /// The exit code: 1 failed, 2 usage.
    #[must_use]
    pub fn exit_code(&self) -> ExitCode {
        ExitCode::from(if self.usage { 2 } else { 1 })
    }
}

impl From<arqon_sdk::Error> for Failure {
    fn from(error: arqon_sdk::Error) -> Self {
        Self::failed(error)
    }
}

impl From<tonic::Status> for Failure {
    fn from(status: tonic::Status) -> Self {
        let message = status.message();
        // The Spine's messages begin with the wire's code; others are tonic's own.
        let coded = message.split_once(": ").is_some_and(|(code, _)| {
            !code.is_empty() && code.bytes().all(|byte| byte.is_ascii_uppercase() || byte == b'_')
        });
        if coded { Self::failed(message) } else { Self::failed(format!("{}: {message}", status.code().description())) }
    }
}

fn one_line(text: &str) -> String {
    text.split(['\n', '\r']).map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_one_line_whatever_it_was_made_of() {
        assert_eq!(Failure::failed("a\n  b\r\n\nc").to_string(), "a; b; c");
        assert_eq!(Failure::failed("x").at("line 3").to_string(), "line 3: x");
    }

    #[test]
    fn the_code_of_a_status_is_named_once() {
        let status = tonic::Status::not_found("TARGET_NOT_FOUND: topic \"x\" does not exist");
        assert_eq!(Failure::from(status).to_string(), "TARGET_NOT_FOUND: topic \"x\" does not exist");
        let status = tonic::Status::unavailable("broken pipe");
        assert!(Failure::from(status).to_string().ends_with(": broken pipe"));
    }
}
