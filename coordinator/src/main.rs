//! The coordinator's one program: `mesh-coordinator serve`, and its operator's verbs.

use std::process::ExitCode;

fn main() -> ExitCode {
    coordinator::cli::main()
}
