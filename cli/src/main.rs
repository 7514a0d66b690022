//! `arqon`: every role and tool of ArqonBus.

use std::process::ExitCode;

#[cfg(feature = "planted")]
compile_error!("`arqon` is never built with planted bugs: build planted/ instead");

// Nor by way of a crate that it is made of.
const _: () = assert!(cfg!(feature = "planted") || !arqon_proto::planted::IS_PLANTED);

fn main() -> ExitCode {
    arqon_cli::main()
}
