//! The program `vellum`. All of it is in the workspace's crates, below `crates/`; here is its command
//! line, one file a command.

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    vellum_base::inherit::at_start();
    vellum_base::memory::keep_small();
    cli::main()
}
