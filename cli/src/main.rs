//! `arqon`: every role and tool of ArqonBus.

use std::process::ExitCode;

fn main() -> ExitCode {
    arqon_cli::main()
}
