//! The OCI runtime: an installed crun or runc, called as a program.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};

use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_base::inherit;
use vellum_export::fuse::session::FS_TYPE;
use vellum_export::local_disk::LocalDisk;
use vellum_fs::mountinfo::MountInfo;

/// The exit status for a failure before the command started, as docker has it.
pub const FAILURE: u8 = 125;
/// What both runtimes end with where they failed: a command may end so too.
pub(super) const ITS_OWN_FAILURE: u8 = 255;

/// Names another runtime, by path or by name.
const VARIABLE: &str = "VELLUM_RUNTIME";
const UNIFIED: &str = "/sys/fs/cgroup/unified";
/// A runtime on a busy host has noted what it started by then; its own error comes after that.
const NOTED_WITHIN: Duration = Duration::from_secs(20);

/// The runtime for new containers: `$VELLUM_RUNTIME`, else crun, else runc.
///
/// # Errors
/// [`ErrorKind::Missing`] where there is none, with what to install.
pub(crate) fn find() -> Result<PathBuf> {
    if let Some(name) = std::env::var_os(VARIABLE).filter(|name| !name.is_empty()) {
        return on_path(&name).ok_or_else(|| {
            Error::new(
                ErrorKind::Missing,
                format!(
                    "there is no OCI runtime {} ({VARIABLE} names it)",
                    name.display()
                ),
            )
        });
    }
    let mut names = ["crun", "runc"];
    if is_hybrid() {
        // crun has no way with such hosts of its own.
        names.reverse();
    }
    names
        .iter()
        .find_map(|name| on_path(OsStr::new(name)))
        .ok_or_else(|| {
            Error::new(
                ErrorKind::Missing,
                format!("there is no OCI runtime to run containers with: install one (`apt-get install crun`, or runc) or name one in {VARIABLE}"),
            )
        })
}

fn on_path(name: &OsStr) -> Option<PathBuf> {
    let usable = |path: &Path| {
        path.is_file() && nix::unistd::access(path, nix::unistd::AccessFlags::X_OK).is_ok()
    };
    if Path::new(name).components().count() > 1 {
        let path = std::path::absolute(name).ok()?;
        return usable(&path).then_some(path);
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        // Where Debian has runc, and not on the path of every user.
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|dir| dir.join(name))
        .find(|path| path.is_absolute() && usable(path))
}

/// True on a host with cgroup v1 controllers and some of v2's beside them.
fn is_hybrid() -> bool {
    std::fs::read_to_string(format!("{UNIFIED}/cgroup.controllers"))
        .is_ok_and(|controllers| !controllers.trim().is_empty())
}

/// A runtime with the directory that it keeps its state in.
#[derive(Debug, Clone)]
pub(super) struct Runtime {
    pub(super) program: PathBuf,
    pub(super) root: PathBuf,
}

impl Runtime {
    /// A call, to which the subcommand is added.
    pub(super) fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.arg("--root").arg(&self.root);
        // Signals are blocked here while it runs; in a container none is.
        inherit::for_child(&mut command);
        command
    }

    /// Whether it has noted a container, which it does after the first process is there; commands for
    /// the container fail before. Both runtimes replace the file as a whole.
    pub(super) fn knows(&self, id: &str) -> bool {
        let dir = self.root.join(id);
        ["status", "state.json"]
            .iter()
            .any(|name| dir.join(name).exists())
    }

    /// Waits until it has noted a container, as long as `lives` and not for ever.
    ///
    /// # Errors
    /// As `lives`.
    pub(super) fn wait_for(&self, id: &str, lives: impl Fn() -> Result<bool>) -> Result<()> {
        let end = Instant::now() + NOTED_WITHIN;
        while !self.knows(id) && lives()? && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    fn is_crun(&self) -> bool {
        self.program
            .file_name()
            .is_some_and(|name| name.to_string_lossy().starts_with("crun"))
    }

    /// Starts a call. `keep` is the root file system that it is about.
    pub(super) fn spawn(&self, command: &mut Command, keep: Option<&Path>) -> Result<Child> {
        let doing = || format!("cannot start {}", self.program.display());
        if !(self.is_crun() && is_hybrid()) {
            return command.spawn().context(doing);
        }
        // crun refuses a host whose second cgroup hierarchy has a controller, although it would
        // use the first one only: it gets a mount namespace in which the second is not mounted.
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                leave_mounts(keep)?;
                command.spawn().context(doing)
            });
            thread
                .join()
                .map_err(|_| Error::internal(format!("{}: its thread panicked", doing())))?
        })
    }

    /// Calls to the end; the answer is whether it succeeded, and what it said.
    pub(super) fn call(&self, command: &mut Command) -> Result<(bool, String)> {
        use std::process::Stdio;
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let output = self
            .spawn(command, None)?
            .wait_with_output()
            .context(|| format!("cannot wait for {}", self.program.display()))?;
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        Ok((output.status.success(), said))
    }
}

/// Gives the calling thread, and what it starts, a mount namespace of its own without the second
/// cgroup hierarchy. The mounts of other containers go too, or they would be held here.
fn leave_mounts(keep: Option<&Path>) -> Result<()> {
    let doing = || "cannot prepare a mount namespace for crun";
    unshare(CloneFlags::CLONE_NEWNS).context(doing)?;
    let none: Option<&Path> = None;
    let flags = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(none, "/", none, flags, none).context(doing)?;
    let mounts = MountInfo::read()?;
    let served: Vec<&Path> = mounts
        .iter()
        .filter(|mount| mount.fs_type == FS_TYPE)
        .map(|mount| mount.target.as_path())
        .collect();
    let is_other = |mount: &MountInfo| {
        if Some(mount.target.as_path()) == keep {
            return false;
        }
        mount.fs_type == FS_TYPE
            || LocalDisk::from_major_minor(mount.major_minor)
                .is_some_and(|disk| disk.is_served_by_vellum(&served))
    };
    for mount in mounts.iter().rev().filter(|mount| is_other(mount)) {
        // One that stays does no harm beyond a slower unmount.
        let _ = umount2(&mount.target, MntFlags::MNT_DETACH);
    }
    umount2(UNIFIED, MntFlags::MNT_DETACH).context(doing)
}

/// What a runtime wrote to its log (`--log-format json`) about a failure of its own, if it did.
pub(super) fn logged_failure(log: &Path) -> Option<String> {
    #[derive(serde::Deserialize)]
    struct Line {
        #[serde(default)]
        level: String,
        #[serde(default)]
        msg: String,
    }
    let text = std::fs::read_to_string(log).ok()?;
    text.lines()
        .filter_map(|line| serde_json::from_str::<Line>(line).ok())
        .filter(|line| ["error", "fatal"].contains(&line.level.as_str()))
        .map(|line| line.msg)
        .next_back()
}

/// True where a runtime says that there is no such container, or that nothing runs in it.
pub(super) fn is_absence(message: &str) -> bool {
    [
        "container does not exist",
        "is not running",
        "a stopped container",
        "/status`: No such file or directory",
    ]
    .iter()
    .any(|words| message.contains(words))
}

/// The exit status for a command that did not start, as shells and docker have it.
pub(super) fn status_of_failure(message: &str) -> u8 {
    let message = message.to_lowercase();
    let has = |words: &[&str]| words.iter().any(|word| message.contains(word));
    // What is not found there is what has just ended: the namespaces of a process.
    let ended = has(&["/ns/"]);
    if ended || !has(&["exec", "open executable", "find executable"]) {
        return FAILURE;
    }
    if has(&[
        "permission denied",
        "not permitted",
        "is a directory",
        "format error",
        "not executable",
    ]) {
        126
    } else if has(&["no such file", "not found"]) {
        127
    } else {
        FAILURE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_that_is_not_found_and_a_container_that_has_ended_are_told_apart() {
        for (message, status) in [
            (
                "exec failed: unable to start container process: exec: \"x\": executable file not found in $PATH",
                127,
            ),
            (
                "executable file `x` not found in $PATH: No such file or directory",
                127,
            ),
            (
                "exec failed: unable to start container process: exec: \"/etc\": permission denied",
                126,
            ),
            (
                "exec failed: unable to create new parent process: namespace path: lstat /proc/9/ns/ipc: no such file or directory",
                FAILURE,
            ),
            ("setns `mnt`: Bad file descriptor", FAILURE),
        ] {
            assert_eq!(status_of_failure(message), status, "{message}");
        }
    }
}
