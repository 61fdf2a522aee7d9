//! Processes by identity: a pid with its start time, waited for through a pidfd.

use std::fs;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::sync::OnceLock;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};

use vellum_base::error::{Result, ResultExt};

/// A process that cannot be taken for a later one with the same pid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Process id.
    pub pid: i32,
    /// Start time in clock ticks since boot (field 22 of /proc/PID/stat).
    pub start: u64,
}

/// What a process is seen to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Seen {
    /// It runs, or it cannot be said.
    Runs,
    /// Somebody stopped it, by SIGSTOP or with a debugger.
    Stopped,
    /// It is dead, and so are all its threads.
    Gone,
}

impl Identity {
    /// The process with this pid, if there is one.
    ///
    /// # Errors
    /// Where that cannot be told, as with too many open files.
    pub fn of(pid: i32) -> Result<Option<Identity>> {
        let found = stat(pid).context(|| format!("process {pid}: cannot be looked at"))?;
        Ok(found.map(|(_, start)| Identity { pid, start }))
    }

    /// The calling process.
    ///
    /// # Panics
    /// Where it cannot be looked at: under a name that is not its own it would be taken for dead.
    #[expect(
        clippy::unreachable,
        reason = "a process that runs has an entry in /proc, without which nothing here works"
    )]
    pub fn current() -> Identity {
        let pid = nix::unistd::getpid().as_raw();
        match stat(pid) {
            Ok(Some((_, start))) => Identity { pid, start },
            other => unreachable!("/proc/{pid}/stat is ours, and cannot be read: {other:?}"),
        }
    }

    /// True while any of its threads runs. One that dies may be a zombie whose other threads still
    /// have its files, and their locks. One that cannot be looked at (too many open files) is not taken
    /// for dead: what its death allows cannot be taken back.
    pub fn is_alive(self) -> bool {
        self.look() != Seen::Gone
    }

    /// What it is seen to do, as [`Identity::is_alive`] and [`Identity::is_stopped`] would say, with one look.
    pub(super) fn look(self) -> Seen {
        self.seen().unwrap_or(Seen::Runs)
    }

    fn seen(self) -> io::Result<Seen> {
        Ok(match stat(self.pid)? {
            Some((state, start)) if start == self.start => match state {
                b'T' | b't' => Seen::Stopped,
                b'Z' | b'X' if !has_threads(self.pid)? => Seen::Gone,
                _ => Seen::Runs,
            },
            _ => Seen::Gone,
        })
    }

    /// True while it is seen to be stopped: by SIGSTOP, or by a debugger.
    pub fn is_stopped(self) -> bool {
        self.look() == Seen::Stopped
    }

    /// True while its main thread is seen to wait in the kernel for what cannot be interrupted, as the disk.
    pub fn is_in_the_kernel(self) -> bool {
        matches!(stat(self.pid), Ok(Some((b'D', start))) if start == self.start)
    }

    /// True where it runs the same program file as the caller.
    pub fn runs_our_program(self) -> bool {
        let file = |pid: &str| {
            let file = fs::metadata(format!("/proc/{pid}/exe")).ok()?;
            Some((file.dev(), file.ino()))
        };
        let ours = file("self");
        ours.is_some() && file(&self.pid.to_string()) == ours
    }

    /// A handle on it, or `None` when it is gone.
    ///
    /// # Errors
    /// Where that cannot be told, as with too many open files.
    pub fn open(self) -> Result<Option<Process>> {
        let open = || match Process::open(self.pid) {
            // The handle is on whoever had the pid just now: look again.
            Ok(process) => Ok((self.seen()? != Seen::Gone).then_some(process)),
            // The number is none of a process, or a thread of another process has it now.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(None),
            Err(error) => present(Err(error)),
        };
        open().context(|| format!("process {}: cannot be opened", self.pid))
    }
}

/// What was found of a process; `None` where there is no such process (any more).
fn present<T>(found: io::Result<T>) -> io::Result<Option<T>> {
    match found {
        Ok(found) => Ok(Some(found)),
        // Of a file of /proc that was opened before the process ended it is ESRCH.
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH)) => Ok(None),
        Err(error) => Err(error),
    }
}

/// True while a thread besides the first runs.
fn has_threads(pid: i32) -> io::Result<bool> {
    let threads = present(fs::read_dir(format!("/proc/{pid}/task")))?;
    Ok(threads.is_some_and(|threads| threads.count() > 1))
}

/// What the threads of a process are doing at this moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Threads {
    /// The first runs, or would if a processor were free.
    pub first_runnable: bool,
    /// So does another.
    pub runnable: bool,
    /// Those that wait in the kernel for what cannot be interrupted, as the disk.
    pub in_kernel: Vec<i32>,
    /// Processor time that all of them took, those that ended among them.
    pub cpu: Duration,
}

impl Threads {
    /// Those of a process; `None` when it is gone, or not all of them can be looked at: of threads that
    /// were not seen nobody can say that they hang.
    pub fn of(pid: i32) -> Option<Threads> {
        let mut threads = Threads {
            cpu: cpu(&fs::read(format!("/proc/{pid}/stat")).ok()?)?,
            ..Threads::default()
        };
        for entry in fs::read_dir(format!("/proc/{pid}/task")).ok()?.flatten() {
            let thread = entry.file_name();
            let Some(thread) = thread.to_str().and_then(|name| name.parse().ok()) else {
                continue;
            };
            // It may have ended meanwhile.
            let Some(text) = present(fs::read(entry.path().join("stat"))).ok()? else {
                continue;
            };
            match parse_stat(&text) {
                Some((b'R', _)) if thread == pid => threads.first_runnable = true,
                Some((b'R', _)) => threads.runnable = true,
                Some((b'D', _)) => threads.in_kernel.push(thread),
                _ => {}
            }
        }
        Some(threads)
    }
}

/// utime and stime, fields 14 and 15 of a stat file.
fn cpu(text: &[u8]) -> Option<Duration> {
    let mut fields = fields_after_name(text)?;
    let user: u64 = fields.nth(11)?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    // In the kernel's USER_HZ, which is 100 on every architecture that we run on.
    Some(Duration::from_millis((user + system) * 10))
}

/// The namespaces in which a pid and a start time mean something: a process that lives in others
/// cannot be judged by them.
pub fn namespaces() -> String {
    let id = |kind: &str| fs::read_link(format!("/proc/self/ns/{kind}")).ok();
    let ids = [id("pid"), id("time")].into_iter().flatten();
    ids.map(|id| id.display().to_string())
        .collect::<Vec<_>>()
        .join(" ")
}

/// More than /proc/PID/stat holds: 52 numbers, and a name of at most 15 bytes.
const STAT_MAX: usize = 2048;

/// /proc/PID/stat; `None` where there is no such process. In one read: a command looks at the processes of a
/// device many times.
fn stat_file(pid: i32) -> io::Result<Option<Vec<u8>>> {
    let read = || {
        let mut text = vec![0; STAT_MAX];
        let len = fs::File::open(format!("/proc/{pid}/stat"))?.read(&mut text)?;
        text.truncate(len);
        Ok(text)
    };
    present(read())
}

/// From include/linux/sched.h: the process is on its way out.
const PF_EXITING: u64 = 4;

/// True where a process has begun to end, or is gone: it starts no other any more.
///
/// # Errors
/// Where that cannot be told, as with too many open files.
pub fn is_ending(pid: i32) -> Result<bool> {
    let what = || format!("process {pid}: cannot be looked at");
    let Some(text) = stat_file(pid).context(what)? else {
        return Ok(true);
    };
    // The ninth field of all.
    let flags = fields_after_name(&text).and_then(|mut fields| fields.nth(6)?.parse::<u64>().ok());
    let flags = flags
        .ok_or(io::ErrorKind::InvalidData)
        .map_err(io::Error::from);
    Ok(flags.context(what)? & PF_EXITING != 0)
}

/// State and start time of a process from /proc; `None` where there is none.
fn stat(pid: i32) -> io::Result<Option<(u8, u64)>> {
    let Some(text) = stat_file(pid)? else {
        return Ok(None);
    };
    let parsed = parse_stat(&text).ok_or(io::ErrorKind::InvalidData)?;
    Ok(Some(parsed))
}

/// The fields of a stat file from the third on. The command's name may hold spaces and brackets:
/// they are counted after the last one.
fn fields_after_name(text: &[u8]) -> Option<std::str::SplitAsciiWhitespace<'_>> {
    let end = text.iter().rposition(|byte| *byte == b')')?;
    let rest = std::str::from_utf8(text.get(end + 1..)?).ok()?;
    Some(rest.split_ascii_whitespace())
}

fn parse_stat(text: &[u8]) -> Option<(u8, u64)> {
    let mut fields = fields_after_name(text)?;
    let state = *fields.next()?.as_bytes().first()?;
    let start = fields.nth(18)?.parse().ok()?;
    Some((state, start))
}

/// A handle on a process that stays on that process.
#[derive(Debug)]
pub struct Process {
    pid: i32,
    fd: OwnedFd,
}

impl Process {
    /// Opens a pidfd.
    ///
    /// # Errors
    /// ESRCH when there is no such process.
    pub fn open(pid: i32) -> io::Result<Process> {
        // SAFETY: the call takes two integers and returns a new descriptor or -1.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new and ours; the kernel made it close-on-exec.
        let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
        Ok(Process { pid, fd })
    }

    /// Process id.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Sends a signal; a process that is gone is fine.
    pub fn signal(&self, signal: Signal) {
        // SAFETY: the descriptor is a pidfd, and no siginfo is passed.
        unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                self.fd.as_raw_fd(),
                signal as i32,
                std::ptr::null::<libc::siginfo_t>(),
                0,
            )
        };
    }

    /// Waits until all its threads have ended; false when `timeout` passed first.
    ///
    /// # Errors
    /// [`vellum_base::ErrorKind::Io`] where poll fails.
    pub fn wait(&self, timeout: Duration) -> Result<bool> {
        let deadline = std::time::Instant::now() + timeout;
        loop {
            let left = deadline.saturating_duration_since(std::time::Instant::now());
            let mut fds = [PollFd::new(self.fd.as_fd(), PollFlags::POLLIN)];
            // Rounded up, so that the wait does not spin in its last millisecond.
            let left = left.as_millis().saturating_add(1).min(60_000) as u16;
            match poll(&mut fds, PollTimeout::from(left)) {
                Ok(0) if std::time::Instant::now() >= deadline => return Ok(false),
                Ok(0) | Err(nix::errno::Errno::EINTR) => {}
                Ok(_) => return Ok(true),
                Err(errno) => {
                    return Err(io::Error::from(errno))
                        .context(|| format!("process {}: cannot be waited for", self.pid));
                }
            }
        }
    }
}

impl AsFd for Process {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Kills a process, unless its pid is another's by now.
pub(super) fn kill(process: Identity) {
    match process.open() {
        Ok(Some(process)) => process.signal(Signal::SIGKILL),
        Ok(None) => {}
        Err(error) => tracing::error!("it is not killed: {error}"),
    }
}

/// The boot's id: state written before a reboot is about other processes.
///
/// # Errors
/// Where it cannot be read: then nobody can say which boot a state is of.
pub fn boot_id() -> Result<String> {
    // It stays as it is for as long as this process lives.
    static ID: OnceLock<String> = OnceLock::new();
    if let Some(id) = ID.get() {
        return Ok(id.clone());
    }
    let path = "/proc/sys/kernel/random/boot_id";
    let text = fs::read_to_string(path).context(|| format!("{path}: cannot be read"))?;
    Ok(ID.get_or_init(|| text.trim().to_owned()).clone())
}

/// Nanoseconds of CLOCK_MONOTONIC, which all processes of a host share.
pub fn monotonic_ns() -> u64 {
    match nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC) {
        Ok(now) => now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64,
        Err(_) => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stopped_process_is_told_from_one_that_waits_and_lives_on() {
        let mut child = std::process::Command::new("sleep")
            .arg("600")
            .spawn()
            .unwrap();
        let identity = Identity::of(child.id() as i32).unwrap().unwrap();
        assert!(!identity.is_stopped());
        let process = identity.open().unwrap().unwrap();
        process.signal(Signal::SIGSTOP);
        let deadline = std::time::Instant::now() + Duration::from_secs(20);
        while !identity.is_stopped() {
            assert!(std::time::Instant::now() < deadline);
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(identity.is_alive());
        let threads = Threads::of(identity.pid).unwrap();
        assert!(!threads.runnable && threads.in_kernel.is_empty());
        assert!(
            !Identity {
                start: 1,
                ..identity
            }
            .is_stopped()
        );
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(Threads::of(identity.pid), None);
        assert_eq!(Identity::of(identity.pid).unwrap(), None);
    }

    #[test]
    fn a_process_that_cannot_be_looked_at_is_neither_gone_nor_another() {
        use nix::sys::resource::{Resource, getrlimit, setrlimit};
        let mut child = std::process::Command::new("sleep")
            .arg("600")
            .spawn()
            .unwrap();
        let identity = Identity::of(child.id() as i32).unwrap().unwrap();
        // Each test is a process of its own.
        let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        setrlimit(Resource::RLIMIT_NOFILE, 0, hard).unwrap();
        let found = (
            identity.is_alive(),
            identity.open().is_err(),
            Identity::of(identity.pid).is_err(),
            Threads::of(identity.pid),
        );
        setrlimit(Resource::RLIMIT_NOFILE, soft, hard).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(found, (true, true, true, None));
        assert!(!identity.is_alive() && identity.open().unwrap().is_none());
    }

    #[test]
    fn processor_time_is_read_whatever_the_name_of_the_command_holds() {
        let line = b"7 (a) b (c)) S 1 7 7 0 -1 4194560 100 0 0 0 150 50 0 0 20 0 1 0 4242 0 0";
        assert_eq!(cpu(line), Some(Duration::from_secs(2)));
        assert_eq!(parse_stat(line), Some((b'S', 4242)));
        assert_eq!(cpu(b"7 (a"), None);
    }

    #[test]
    fn an_identity_outlives_neither_its_process_nor_its_start_time() {
        let me = Identity::current();
        assert!(me.is_alive());
        let other = Identity {
            start: me.start + 1,
            ..me
        };
        assert!(!other.is_alive());
        assert!(other.open().unwrap().is_none());

        let mut child = std::process::Command::new("true").spawn().unwrap();
        let process = Process::open(child.id() as i32).unwrap();
        let identity = Identity::of(child.id() as i32).unwrap().unwrap();
        assert!(process.wait(Duration::from_secs(10)).unwrap());
        assert!(!identity.is_alive(), "a zombie is not alive");
        child.wait().unwrap();
    }
}
