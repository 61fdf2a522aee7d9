//! Who holds a lock (flock) on a file: the kernel's list of locks, and what /proc says of processes.
//!
//! Nothing is written for it: who only looks at a store changes none of its files.

use std::fmt;
use std::fs;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::moment::rfc3339;

/// The kernel's list is read so far: some ten thousand locks.
const MAX_LOCKS: u64 = 1 << 20;
/// Descriptors of a process that are looked at.
const MAX_FILES: usize = 16 << 10;
/// Characters of a command line that are shown.
const MAX_COMMAND: usize = 120;

/// A process that holds something.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// Its id, as this process sees it.
    pub pid: i32,
    /// Its command line, shortened.
    pub command: String,
    /// Since when it runs (RFC 3339), where that can be told.
    pub since: Option<String>,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({}", self.pid, self.command)?;
        if let Some(since) = &self.since {
            write!(f, ", since {since}")?;
        }
        f.write_str(")")
    }
}

impl Holder {
    /// The process with this id, while it is there.
    pub fn of(pid: i32) -> Option<Holder> {
        let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        Some(Holder {
            pid,
            command: shown(&line),
            since: started(pid),
        })
    }

    /// The calling process.
    pub fn current() -> Option<Holder> {
        Holder::of(nix::unistd::getpid().as_raw())
    }

    /// Who holds a lock on the file `path`. `None` where nobody does, or one that cannot be seen
    /// from here: in another pid namespace, or on another host.
    pub fn of_lock(path: &Path) -> Option<Holder> {
        let file = fs::metadata(path).ok()?;
        let mut text = String::new();
        let locks = fs::File::open("/proc/locks").ok()?;
        locks.take(MAX_LOCKS).read_to_string(&mut text).ok()?;
        text.lines()
            .filter_map(parse)
            .filter(|lock| lock.inode == file.ino())
            // Some file systems (btrfs, overlays) show another device there than stat(2) does.
            .find(|lock| lock.device == device_of(&file) || has_open(lock.pid, &file))
            .and_then(|lock| Holder::of(lock.pid))
    }
}

/// For messages: `: 123 (vellum nbd c, since …)`, or what can be said instead.
pub fn by(holder: Option<&Holder>) -> String {
    match holder {
        Some(holder) => format!(": {holder}"),
        None => " (which cannot be seen from here: in another pid namespace?)".to_owned(),
    }
}

/// A lock in the kernel's list.
#[derive(Debug, PartialEq, Eq)]
struct Lock {
    pid: i32,
    device: (u64, u64),
    inode: u64,
}

/// A line of /proc/locks: `1: FLOCK  ADVISORY  WRITE 123 08:01:4711 0 EOF`. `None` for one who waits
/// (`1: -> FLOCK …`), for other kinds of locks, and for a process of another pid namespace.
fn parse(line: &str) -> Option<Lock> {
    let mut words = line.split_ascii_whitespace().skip(1);
    if words.next()? != "FLOCK" {
        return None;
    }
    let pid = words.nth(2)?.parse().ok().filter(|pid| *pid > 0)?;
    let mut place = words.next()?.split(':');
    let mut hex = || u64::from_str_radix(place.next()?, 16).ok();
    let device = (hex()?, hex()?);
    Some(Lock {
        pid,
        device,
        inode: place.next()?.parse().ok()?,
    })
}

fn device_of(file: &fs::Metadata) -> (u64, u64) {
    let device = file.dev();
    (nix::sys::stat::major(device), nix::sys::stat::minor(device))
}

/// True when a process has the file open.
fn has_open(pid: i32, file: &fs::Metadata) -> bool {
    let files = fs::read_dir(format!("/proc/{pid}/fd"));
    files
        .into_iter()
        .flatten()
        .flatten()
        .take(MAX_FILES)
        .filter_map(|open| fs::metadata(open.path()).ok())
        .any(|open| (open.dev(), open.ino()) == (file.dev(), file.ino()))
}

/// A command line for people: the program without its directory, and without `--root DIR`, which the
/// reader knows.
fn shown(line: &[u8]) -> String {
    let line = String::from_utf8_lossy(line);
    let mut words = line.split_terminator('\0');
    // A kernel thread, and a process that is gone, have no command line.
    let program = words.next().unwrap_or("");
    let program = program.rsplit('/').next().unwrap_or(program);
    let mut shown = program.to_owned();
    while let Some(word) = words.next() {
        if word == "--root" {
            words.next();
            continue;
        }
        shown.push(' ');
        shown.push_str(word);
    }
    let shown: String = shown
        .chars()
        .map(|c| if c.is_control() { '?' } else { c })
        .collect();
    if shown.chars().count() <= MAX_COMMAND {
        return shown;
    }
    let cut: String = shown.chars().take(MAX_COMMAND).collect();
    format!("{cut}…")
}

/// When a process was started.
fn started(pid: i32) -> Option<String> {
    let text = fs::read(format!("/proc/{pid}/stat")).ok()?;
    // The command's name may hold spaces and brackets: fields are counted after the last one.
    let end = text.iter().rposition(|byte| *byte == b')')?;
    let rest = std::str::from_utf8(text.get(end + 1..)?).ok()?;
    let ticks: u64 = rest.split_ascii_whitespace().nth(19)?.parse().ok()?;
    let per_second = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK).ok()??;
    let boot = fs::read_to_string("/proc/stat").ok()?;
    let boot = boot.lines().find_map(|line| line.strip_prefix("btime "))?;
    let since_boot = Duration::from_millis(ticks * 1000 / u64::try_from(per_second).ok()?.max(1));
    let at: SystemTime = UNIX_EPOCH + Duration::from_secs(boot.trim().parse().ok()?) + since_boot;
    Some(rfc3339(at))
}

#[cfg(test)]
mod tests {
    use super::super::{FileStorage, LockMode, Storage};
    use super::*;

    #[test]
    fn lines_of_holders_are_told_from_those_of_waiters_and_of_other_locks() {
        let held = parse("4: FLOCK  ADVISORY  WRITE 708 fe:0a:13 0 EOF").unwrap();
        assert_eq!((held.pid, held.device, held.inode), (708, (0xfe, 10), 13));
        for other in [
            "4: -> FLOCK  ADVISORY  WRITE 709 fe:0a:13 0 EOF",
            "5: POSIX  ADVISORY  WRITE 710 fe:0a:13 0 EOF",
            "6: FLOCK  ADVISORY  WRITE 0 fe:0a:13 0 EOF",
            "7: FLOCK",
            "",
        ] {
            assert_eq!(parse(other), None, "{other}");
        }
    }

    #[test]
    fn the_holder_of_a_lock_is_named_with_its_command_while_it_holds_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let lock = || FileStorage.lock(&path, LockMode::Exclusive, false).unwrap();
        let held = lock().unwrap();
        let holder = Holder::of_lock(&path).unwrap();
        assert_eq!(holder.pid, std::process::id() as i32);
        assert!(!holder.command.is_empty() && !holder.command.contains('/'));
        let since = humantime::parse_rfc3339(holder.since.as_deref().unwrap()).unwrap();
        let now = SystemTime::now() + Duration::from_secs(5);
        assert!(since <= now && since + Duration::from_secs(3600) > now);
        drop(held);
        assert_eq!(Holder::of_lock(&path), None);
        assert_eq!(Holder::of_lock(&dir.path().join("none")), None);
    }

    #[test]
    fn a_command_line_is_shown_without_paths_that_say_nothing_and_not_for_ever() {
        let line = b"/usr/bin/vellum\0--root\0/var/lib/vellum\0nbd\0a\nb\0";
        assert_eq!(shown(line), "vellum nbd a?b");
        let long = shown("x\0".repeat(1000).as_bytes());
        assert_eq!(long.chars().count(), MAX_COMMAND + 1);
    }
}
