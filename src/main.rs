//! The `vellum` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    vellum::inherit::at_start();
    vellum::memory::keep_small();
    vellum::cli::main()
}
