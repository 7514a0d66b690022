//! `arqon-sim`: runs seeds of the simulation.

use std::process::ExitCode;

#[cfg(feature = "planted")]
compile_error!("`arqon-sim` is never built with planted bugs: build planted/sim instead");

// Nor by way of a crate that it is made of.
const _: () = assert!(cfg!(feature = "planted") || !arqon_proto::planted::IS_PLANTED);

fn main() -> ExitCode {
    arqon_sim::main()
}
