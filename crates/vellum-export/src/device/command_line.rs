//! What a process of a device is called and was told: how it is found where nothing can be read from its
//! run directory.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use vellum_fs::run_dir::RunDir;

/// What the processes of a device are called in `ps`. The first character tells systemd's
/// shutdown to leave them alone until the file systems on them are unmounted.
pub(super) const ARG0: &str = "@vellum-device";

/// The run directory that a device process was told, and all its arguments; `None` for any other
/// process. Whoever wants to can have such a command line, so it must be our user's, or root's; what
/// others hold is not even looked at, since that may hang.
pub(super) fn command_line(pid: i32) -> Option<(RunDir, Vec<OsString>)> {
    let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    if line.split(|byte| *byte == 0).next()? != ARG0.as_bytes() {
        return None;
    }
    let ours = nix::unistd::geteuid().as_raw();
    user_of(pid).filter(|user| *user == ours || *user == 0)?;
    let all = arguments(&line);
    let run_dir = RunDir::at(PathBuf::from(argument(&all, "--run-dir")?));
    Some((run_dir, all))
}

/// What stands behind `option` among arguments.
pub(super) fn argument<'a>(arguments: &'a [OsString], option: &str) -> Option<&'a OsStr> {
    let mut all = arguments.iter();
    all.find(|argument| *argument == option)?;
    all.next().map(OsString::as_os_str)
}

/// The run directory that a device process was told, `None` for any other process.
pub(super) fn run_dir_of(pid: i32) -> Option<RunDir> {
    command_line(pid).map(|(run_dir, _)| run_dir)
}

/// The user of a process where it has one alone: real, effective, saved and file system's.
fn user_of(pid: i32) -> Option<u32> {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("Uid:"))?;
    let mut users = line.split_ascii_whitespace().map(str::parse::<u32>);
    let first = users.next()?.ok()?;
    users
        .all(|user| user.as_ref() == Ok(&first))
        .then_some(first)
}

/// The arguments of a command line as the kernel gives it.
pub(super) fn arguments(line: &[u8]) -> Vec<OsString> {
    let parts = line.split(|byte| *byte == 0);
    parts
        .map(|part| OsString::from_vec(part.to_vec()))
        .collect()
}
