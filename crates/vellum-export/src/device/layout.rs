//! What a device consists of for those who look for it: the files of its run directory, and what its
//! processes are called.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use crate::unix_socket;
use vellum_base::error::{Result, ResultExt};

/// The file that the FUSE session is mounted on.
pub const DEV: &str = "dev";
/// The state, as JSON.
pub const STATE: &str = "state.json";
/// The control socket.
pub const CONTROL: &str = "control.sock";
/// What the processes had to say.
pub const LOG: &str = "log";
/// The loop device that `attach` made: [`super::state::Hint`].
pub const LOOP: &str = "loop";

/// What the processes of a device are called in `ps`. The first character tells systemd's
/// shutdown to leave them alone until the file systems on them are unmounted.
pub const ARG0: &str = "@vellum-device";

/// A path to a file of `dir` that is short however long the path of `dir` is: a socket's path has
/// room for 107 bytes. Valid while the returned file is open.
pub(super) fn short_path(dir: &Path, name: &str) -> Result<(File, PathBuf)> {
    let handle = std::fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH | libc::O_DIRECTORY | libc::O_CLOEXEC)
        .open(dir)
        .context(|| dir.display().to_string())?;
    let path = PathBuf::from(format!("/proc/self/fd/{}/{name}", handle.as_raw_fd()));
    Ok((handle, path))
}

/// True while a process of the device of `run_dir` lives, whether or not it answers, and in whatever
/// namespaces: all of them hold the socket.
pub(super) fn is_listened(run_dir: &Path) -> bool {
    short_path(run_dir, CONTROL).is_ok_and(|(_handle, path)| unix_socket::is_listened(&path))
}
