//! `arqon`: every role and tool of ArqonBus.

use std::process::ExitCode;

#[cfg(feature = "planted")]
compile_error!("`arqon` is never built with planted bugs: build planted/ instead");

fn main() -> ExitCode {
    arqon_cli::main()
}
