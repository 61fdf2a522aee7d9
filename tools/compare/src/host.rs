//! What a run needs of the host: other programs, servers, mounts and loop devices, each with an
//! end that is certain.

mod devices;
mod files;
mod link;

pub use devices::{Loop, Mount, detach_below, is_mounted};
pub use files::{
    allocated, copy_tree, drop_caches, read_all, read_files, reading, sync_fs, written,
};
pub use link::{End, Link, SERVER};

use std::fs::{self, File};
use std::io::{Read, Seek};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill, killpg};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::{Pid, User};

use crate::cpu;

/// No single command takes longer than this, or it is killed and counts as failed.
const LONGEST_COMMAND: Duration = Duration::from_secs(900);

/// When all work ends.
static END: OnceLock<Instant> = OnceLock::new();

/// What only cleans up has this long, also after the end.
const CLEANING: Duration = Duration::from_secs(60);
static CLEANING_UP: AtomicUsize = AtomicUsize::new(0);

/// From here on no command runs for longer than until `end`, but for those that clean up.
pub fn limit_commands(end: Instant) {
    let _ = END.set(end);
}

/// Whether the time that was given is over.
pub fn out_of_time() -> bool {
    END.get().is_some_and(|end| Instant::now() >= *end)
}

/// While it lives, commands clean up: they have a minute each, whatever the time.
pub struct CleaningUp(());

impl CleaningUp {
    /// From here on.
    pub fn begin() -> Self {
        CLEANING_UP.fetch_add(1, Ordering::Relaxed);
        CleaningUp(())
    }
}

impl Drop for CleaningUp {
    fn drop(&mut self) {
        CLEANING_UP.fetch_sub(1, Ordering::Relaxed);
    }
}

/// How long a command that begins now may take.
pub fn longest_command() -> Duration {
    if CLEANING_UP.load(Ordering::Relaxed) > 0 {
        return CLEANING;
    }
    END.get().map_or(LONGEST_COMMAND, |end| {
        let left = end.saturating_duration_since(Instant::now());
        left.min(LONGEST_COMMAND)
    })
}

/// Bytes of memory that programs can have without swapping; 0 where the kernel does not say.
pub fn available_memory() -> u64 {
    let table = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = table
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}

static INTERRUPTED: OnceLock<Arc<AtomicBool>> = OnceLock::new();

/// From here on SIGINT and SIGTERM end what runs and clean up; a second one ends at once.
pub fn catch_signals() -> Result<()> {
    let flag = Arc::clone(INTERRUPTED.get_or_init(Arc::default));
    for signal in [2, 15] {
        signal_hook::flag::register_conditional_shutdown(signal, 130, Arc::clone(&flag))?;
        signal_hook::flag::register(signal, Arc::clone(&flag))?;
    }
    Ok(())
}

/// Whether the user wants to end.
pub fn interrupted() -> bool {
    INTERRUPTED
        .get()
        .is_some_and(|flag| flag.load(Ordering::Relaxed))
}

/// A program that has ended well.
#[derive(Debug)]
pub struct Finished {
    /// Its standard output.
    pub stdout: String,
    /// Seconds from start to end.
    pub seconds: f64,
    /// CPU seconds of it and of the children that it waited for.
    pub cpu: f64,
}

/// Runs a program to its end.
///
/// # Errors
/// Without the program, when it fails (with what it said), when the user interrupts.
pub fn run(command: &mut Command) -> Result<Finished> {
    run_while(command, Patience::UntilTheEnd)
}

/// [`run`] for a program that leaves something on the host, of which whoever called takes care afterwards, such
/// as a mount. Once it is begun, neither the end of the time nor the user stops it half way.
///
/// # Errors
/// As [`run`]; when it takes a minute.
pub fn run_whole(command: &mut Command) -> Result<Finished> {
    if interrupted() {
        bail!("{}: not started, since it was interrupted", shown(command));
    }
    run_while(command, Patience::Whole)
}

/// What ends a program that runs.
#[derive(Clone, Copy)]
enum Patience {
    /// The end of the time, and the user.
    UntilTheEnd,
    /// Nothing but a minute.
    Whole,
}

fn run_while(command: &mut Command, patience: Patience) -> Result<Finished> {
    let name = shown(command);
    let limit = longest_command();
    if limit.is_zero() {
        bail!("{name}: not started, since the time limit is over");
    }
    // Files, not pipes: nobody has to read along.
    let mut stdout = tempfile::tempfile()?;
    let mut stderr = tempfile::tempfile()?;
    let start = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(stdout.try_clone()?)
        .stderr(stderr.try_clone()?)
        .process_group(0)
        .spawn()
        .with_context(|| format!("cannot start {name}"))?;
    let ended = wait(&mut child, limit, patience);
    let seconds = start.elapsed().as_secs_f64();
    let (status, cpu) = ended.with_context(|| name.clone())?;
    if !status.success() {
        let said = text(&mut stderr)? + &text(&mut stdout)?;
        bail!("{name}: {status}: {}", tail(&said, 600));
    }
    Ok(Finished {
        stdout: text(&mut stdout)?,
        seconds,
        cpu,
    })
}

/// [`run`] for a program and its arguments.
pub fn sh(program: &str, arguments: &[&str]) -> Result<Finished> {
    run(Command::new(program).args(arguments))
}

/// Runs a command to its end, which an interrupt of the user does not take away as it does with [`run`].
///
/// # Errors
/// Without the program, when it fails (with what it said).
pub fn clean_up(command: &mut Command) -> Result<()> {
    // A file, not a pipe, which a server that it leaves behind would hold open.
    let mut stderr = tempfile::tempfile()?;
    command.stdin(Stdio::null()).stdout(Stdio::null());
    let status = command.stderr(stderr.try_clone()?).status()?;
    if !status.success() {
        bail!("{status}: {}", text(&mut stderr)?.trim());
    }
    Ok(())
}

/// A command as a person would type it.
fn shown(command: &Command) -> String {
    let mut line = command.get_program().to_string_lossy().into_owned();
    for argument in command.get_args() {
        line.push(' ');
        line.push_str(&argument.to_string_lossy());
    }
    line
}

fn text(file: &mut File) -> Result<String> {
    let mut bytes = Vec::new();
    file.rewind()?;
    file.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The last `length` characters of what a program said.
fn tail(said: &str, length: usize) -> String {
    let said = said.trim();
    let skip = said.chars().count().saturating_sub(length);
    said.chars().skip(skip).collect()
}

/// Waits for a child, to its end or as long as `limit`; its status, and the CPU seconds of it and its children.
fn wait(child: &mut Child, limit: Duration, patience: Patience) -> Result<(ExitStatus, f64)> {
    let (limit, ends_early) = match patience {
        Patience::UntilTheEnd => (limit, true),
        Patience::Whole => (CLEANING, false),
    };
    let pid = Pid::from_raw(i32::try_from(child.id())?);
    let start = Instant::now();
    let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT | WaitPidFlag::WNOHANG;
    loop {
        if waitid(Id::Pid(pid), flags)? != WaitStatus::StillAlive {
            // It has ended but is still listed, with its times.
            let cpu = cpu::of_process(child.id()).unwrap_or(0.0);
            return Ok((child.wait()?, cpu));
        }
        let elapsed = start.elapsed();
        let is_interrupted = ends_early && interrupted();
        if is_interrupted || elapsed > limit {
            // With all that it has started, which is of its process group.
            let _ = killpg(pid, Signal::SIGKILL);
            child.wait()?;
            bail!(if is_interrupted {
                "interrupted".to_owned()
            } else {
                format!("killed after {} s, at its limit of time", limit.as_secs())
            });
        }
        // Short waits for short commands: an error of 2 % at most.
        sleep((elapsed / 50).clamp(Duration::from_micros(100), Duration::from_millis(10)));
    }
}

/// Polls until something holds; false when it does not within `limit`.
pub fn poll(limit: Duration, mut holds: impl FnMut() -> bool) -> bool {
    let start = Instant::now();
    loop {
        if holds() {
            return true;
        }
        if start.elapsed() > limit || interrupted() {
            return false;
        }
        sleep(Duration::from_millis(5));
    }
}

/// A server that runs until it is stopped or dropped.
#[derive(Debug)]
pub struct Server {
    child: Option<Child>,
    stop: Signal,
    name: String,
}

impl Server {
    /// Starts it and waits until it is `ready`. `stop` is the signal that ends it well.
    ///
    /// # Errors
    /// When it ends before it is ready, with what it said; or is not ready within 60 s, or within
    /// the time that is left.
    pub fn start(
        command: &mut Command,
        stop: Signal,
        mut ready: impl FnMut() -> bool,
    ) -> Result<Self> {
        Self::start_knowing(command, stop, |_| ready())
    }

    /// [`Server::start`], where `ready` has to know the process.
    pub fn start_knowing(
        command: &mut Command,
        stop: Signal,
        mut ready: impl FnMut(u32) -> bool,
    ) -> Result<Self> {
        let name = shown(command);
        let mut output = tempfile::tempfile()?;
        let child = command
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output.try_clone()?)
            // Ctrl-C is for us: the server is stopped after those who use it.
            .process_group(0)
            .spawn()
            .with_context(|| format!("cannot start {name}"))?;
        let pid = child.id();
        let mut server = Server {
            child: Some(child),
            stop,
            name,
        };
        let mut ended = false;
        let is_ready = poll(longest_command().min(Duration::from_secs(60)), || {
            ended = server
                .child
                .as_mut()
                .is_none_or(|child| !matches!(child.try_wait(), Ok(None)));
            ended || ready(pid)
        });
        if ended || !is_ready {
            let why = if ended { "ended" } else { "is not ready" };
            bail!("{} {why}: {}", server.name, tail(&text(&mut output)?, 600));
        }
        Ok(server)
    }

    /// Its process.
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// Stops it; the CPU seconds that it and its children took in all.
    pub fn stop(mut self) -> Result<f64> {
        self.end()
    }

    fn end(&mut self) -> Result<f64> {
        let Some(mut child) = self.child.take() else {
            return Ok(0.0);
        };
        let pid = Pid::from_raw(i32::try_from(child.id())?);
        let _ = kill(pid, self.stop);
        let name = &self.name;
        let stopped = poll_uninterrupted(Duration::from_secs(60), || {
            let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT | WaitPidFlag::WNOHANG;
            waitid(Id::Pid(pid), flags) != Ok(WaitStatus::StillAlive)
        });
        let cpu = cpu::of_process(child.id()).unwrap_or(0.0);
        if !stopped {
            drop(child.kill());
        }
        child.wait()?;
        if !stopped {
            bail!("{name} did not stop within 60 s and was killed");
        }
        Ok(cpu)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        report(self.end().map(drop));
    }
}

/// [`poll`], also after an interrupt: for cleaning up.
pub fn poll_uninterrupted(limit: Duration, mut holds: impl FnMut() -> bool) -> bool {
    let start = Instant::now();
    while start.elapsed() < limit {
        if holds() {
            return true;
        }
        sleep(Duration::from_millis(2));
    }
    false
}

/// What goes wrong while cleaning up is said, and stops nothing.
pub fn report(result: Result<()>) {
    if let Err(error) = result {
        eprintln!("compare: while cleaning up: {error:#}");
    }
}

/// Where a program is, looked for in PATH and in the places of system programs.
pub fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin", "/usr/bin"].map(PathBuf::from))
        .map(|dir| dir.join(name))
        .find(|file| file.is_file())
}

/// Whether the kernel can mount this type of file system.
pub fn kernel_mounts(kind: &str) -> bool {
    let listed = || {
        fs::read_to_string("/proc/filesystems").is_ok_and(|list| {
            list.lines()
                .any(|line| line.split_whitespace().last() == Some(kind))
        })
    };
    listed() || (sh("modprobe", &["-q", kind]).is_ok() && listed())
}

/// The user of that name.
pub fn user(name: &str) -> Result<User> {
    User::from_name(name)?.with_context(|| format!("no user {name}"))
}

/// A program, as the user `name`, who may not get into our working directory.
pub fn program_as(name: &str, file: &Path) -> Result<Command> {
    let user = user(name)?;
    let mut command = Command::new(file);
    command
        .uid(user.uid.as_raw())
        .gid(user.gid.as_raw())
        .current_dir("/")
        .env("LC_ALL", "C")
        .env("HOME", "/");
    Ok(command)
}

/// Makes `dir`, where it is missing, a directory of the user `name` alone.
pub fn give(dir: &Path, name: &str) -> Result<()> {
    let user = user(name)?;
    fs::create_dir_all(dir)?;
    nix::unistd::chown(dir, Some(user.uid), Some(user.gid))?;
    fs::set_permissions(dir, fs::Permissions::from_mode(0o700))?;
    Ok(())
}

/// A directory of the user `name` with a short path, for sockets and temporary files: in TMPDIR
/// where that user gets there, else in /tmp.
pub fn directory_for(name: &str) -> Result<tempfile::TempDir> {
    let own = std::env::temp_dir();
    let open = own.ancestors().all(|dir| {
        fs::metadata(dir).is_ok_and(|metadata| metadata.permissions().mode() & 0o001 != 0)
    });
    let parent = if open { own } else { "/tmp".into() };
    let dir = tempfile::Builder::new().prefix("vcs").tempdir_in(parent)?;
    give(dir.path(), name)?;
    Ok(dir)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_leaves_something_on_the_host_is_not_stopped_half_way_when_the_time_is_over() {
        let wait = |patience| {
            let mut child = Command::new("sleep").arg("0.2").spawn().unwrap();
            super::wait(&mut child, Duration::ZERO, patience)
        };
        assert!(wait(Patience::Whole).unwrap().0.success());
        let killed = wait(Patience::UntilTheEnd).unwrap_err().to_string();
        assert!(killed.contains("limit of time"), "{killed}");
    }
}
