//! The `vellum` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    vellum::memory::keep_small();
    vellum::cli::main()
}
