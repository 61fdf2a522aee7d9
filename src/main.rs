//! The `vellum` command.

use std::process::ExitCode;

use clap::Parser;
use vellum::export::device::command::{self, FileDeviceArgs};

/// Block-level copy-on-write storage for containers.
#[derive(Parser)]
enum Cli {
    /// Serve a block device to the kernel
    #[command(hide = true)]
    DeviceSupervisor(FileDeviceArgs),
}

fn main() -> ExitCode {
    let Cli::DeviceSupervisor(args) = Cli::parse();
    vellum::export::device::init_log();
    match command::run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vellum: {error}");
            ExitCode::FAILURE
        }
    }
}
