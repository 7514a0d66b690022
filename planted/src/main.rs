//! `arqon` as it must not be: the environment chooses a bug (`ARQON_PLANTED`) or the line at which
//! the process ends (`ARQON_CRASH_AT`). `arqon-jepsen controls` runs it; nobody else should.

use std::process::ExitCode;

fn main() -> ExitCode {
    arqon_cli::main()
}
