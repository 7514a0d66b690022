//! `arqon-sim`: runs seeds of the simulation.

use std::process::ExitCode;

#[cfg(feature = "planted")]
compile_error!("`arqon-sim` is never built with planted bugs: build planted/sim instead");

fn main() -> ExitCode {
    arqon_sim::main()
}
