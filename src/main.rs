//! The `vellum` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    vellum::cli::main()
}
