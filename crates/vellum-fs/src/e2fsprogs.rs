//! Programs of e2fsprogs, started so that they look at no file system but the one that they are given.
//!
//! They ask first whether that one is mounted, and for that they open every loop device in the table of
//! mounts and ask it what it lies on (libext2fs, check_loop_mounted). Where the server below one does
//! not answer, whosever it is, they would hang, and could not even be killed. So they see a table of
//! mounts without entries; what they are given is never mounted, which their callers see to.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use vellum_base::error::{Error, ErrorKind, Result};

/// A program of e2fsprogs, by its name.
pub(super) fn program(name: &str) -> Command {
    let mut command = Command::new(name);
    command
        // Where a plain user's PATH does not look.
        .env("PATH", "/usr/sbin:/sbin:/usr/local/sbin:/usr/bin:/bin")
        .env("LC_ALL", "C")
        // That there is no table of mounts is no failure.
        .env("EXT2FS_NO_MTAB_OK", "1")
        .stdin(Stdio::null());
    // SAFETY: between fork and exec only system calls are made, with arguments that are constants:
    // nothing is allocated, and no lock is taken.
    unsafe { command.pre_exec(hide_mounts) };
    command
}

/// Gives the calling process a mount namespace of its own in which nothing lies at /proc. Where the
/// kernel refuses, as to those who are not root and could open no loop device either, all stays as it
/// is.
fn hide_mounts() -> io::Result<()> {
    let none = None::<&std::ffi::CStr>;
    let hide = || {
        unshare(CloneFlags::CLONE_NEWNS)?;
        // What is unmounted elsewhere goes here too; what is mounted here is seen here alone.
        let slave = MsFlags::MS_REC | MsFlags::MS_SLAVE;
        mount(none, c"/", none, slave, none)?;
        let flags = MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        mount(Some(c"vellum"), c"/proc", Some(c"tmpfs"), flags, none)
    };
    let _: nix::Result<()> = hide();
    Ok(())
}

/// Runs a program to its end.
///
/// # Errors
/// [`ErrorKind::Missing`] where it is not installed, [`ErrorKind::Command`] with what it said.
pub(super) fn run(command: &mut Command) -> Result<()> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.output().map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => Error::with_source(
            ErrorKind::Missing,
            format!("{name}: not installed (Debian: apt-get install e2fsprogs)"),
            error,
        ),
        _ => Error::io(format!("{name}: cannot be run"), error),
    })?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr);
    Err(Error::new(
        ErrorKind::Command,
        format!(
            "{name}: {}: {}",
            output.status,
            text.trim().replace('\n', "; ")
        ),
    ))
}
