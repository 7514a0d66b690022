//! `arqon-sim` with a bug in every node: the environment chooses it (`ARQON_PLANTED`). `arqon-jepsen controls`
//! runs it; a simulation that finds nothing here is blind.

use std::process::ExitCode;

fn main() -> ExitCode {
    arqon_sim::main()
}
