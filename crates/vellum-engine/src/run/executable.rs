//! Whether a command can be executed in a container, found out before a runtime tries: the runtimes
//! say it in words of their own, on the command's standard error, and with the exit status of a
//! command that ran.
//!
//! What is not sure here is left to the runtime.

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::stat::{SFlag, fstat};

use super::spec::Bind;
use super::user::open_in_root;

/// The exit status for a program that is not there, as shells and docker have it.
pub(super) const NOT_FOUND: u8 = 127;
/// The exit status for what is there and no program.
pub(super) const NO_PROGRAM: u8 = 126;
/// As the kernel has it: the longest first line of a script that is looked at.
const SCRIPT_LINE: usize = 256;
/// Tables of programs are no larger.
const MAX_HEADERS: usize = 1 << 16;

/// Why a command does not start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct NoProgram {
    pub(super) status: u8,
    pub(super) why: String,
}

/// A container's files as its processes will see them.
#[derive(Debug)]
pub(super) struct Files<'a> {
    pub(super) root: &'a Path,
    /// What is not below `root` yet.
    pub(super) binds: &'a [Bind],
}

/// Where the container's own file systems will be, which nobody can look into before.
const MOUNTED: [&str; 3] = ["/proc", "/dev", "/sys"];

enum Found {
    File(OwnedFd),
    Missing,
    /// Only the runtime can tell.
    Unsure,
}

impl Files<'_> {
    fn open(&self, path: &Path) -> Found {
        if MOUNTED.iter().any(|mounted| path.starts_with(mounted)) {
            return Found::Unsure;
        }
        let below = |bind: &&Bind| path.starts_with(&bind.destination);
        let bind = self
            .binds
            .iter()
            .filter(below)
            .max_by_key(|bind| bind.destination.components().count());
        let (root, rest) = match bind {
            None => (self.root, path),
            // A file, or a directory whose links may lead out of it: the runtime knows.
            Some(bind) if !bind.source.is_dir() => return Found::Unsure,
            Some(bind) => (
                bind.source.as_path(),
                path.strip_prefix(&bind.destination).unwrap_or(path),
            ),
        };
        match open_in_root(root, rest, OFlag::O_PATH) {
            Ok(file) => Found::File(file),
            Err(Errno::ENOENT | Errno::ENOTDIR) if bind.is_none() => Found::Missing,
            Err(_) => Found::Unsure,
        }
    }
}

/// Looks whether `args` can be executed from `cwd` with the environment `env`; `None` where it can, or
/// where that is not sure.
pub(super) fn check(
    files: &Files<'_>,
    args: &[String],
    env: &[String],
    cwd: &str,
) -> Option<NoProgram> {
    let program = args.first().map(String::as_str).unwrap_or_default();
    let no = |status, why: String| {
        Some(NoProgram {
            status,
            why: format!("{program:?} {why}"),
        })
    };
    if program.is_empty() {
        return no(NOT_FOUND, "is no program's name".into());
    }
    if program.contains('/') {
        return match files.open(&normal(&Path::new(cwd).join(program))) {
            Found::File(file) => examine(files, &file).and_then(|(status, why)| no(status, why)),
            Found::Missing => no(NOT_FOUND, "is not in the container".into()),
            Found::Unsure => None,
        };
    }
    let path = env
        .iter()
        .find_map(|entry| entry.strip_prefix("PATH="))
        .unwrap_or_default();
    let mut refused = None;
    for dir in path
        .split(':')
        .map(|dir| if dir.is_empty() { "." } else { dir })
    {
        match files.open(&normal(&Path::new(cwd).join(dir).join(program))) {
            Found::File(file) => match examine(files, &file) {
                None => return None,
                // One without the right to be executed, or a directory: another may come.
                Some(reason) => refused = refused.or(Some(reason)),
            },
            Found::Missing => {}
            Found::Unsure => return None,
        }
    }
    match refused {
        Some((status, why)) => no(status, why),
        None => no(
            NOT_FOUND,
            format!("is in no directory of the container's PATH ({path:?})"),
        ),
    }
}

/// Without `.` and `..`, which stay inside.
fn normal(path: &Path) -> PathBuf {
    let mut out = PathBuf::from("/");
    for component in path.components() {
        match component {
            Component::Normal(name) => out.push(name),
            Component::ParentDir => {
                out.pop();
            }
            _ => {}
        }
    }
    out
}

/// Why a file cannot be executed.
fn examine(files: &Files<'_>, file: &OwnedFd) -> Option<(u8, String)> {
    let stat = fstat(file).ok()?;
    let kind = SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits());
    if kind == SFlag::S_IFDIR {
        return Some((NO_PROGRAM, "is a directory".into()));
    }
    if kind != SFlag::S_IFREG {
        return Some((NO_PROGRAM, "is no regular file".into()));
    }
    if stat.st_mode & 0o111 == 0 {
        return Some((NO_PROGRAM, "may not be executed: its mode has no x".into()));
    }
    // For reading this time: the first descriptor only names it.
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(file));
    let mut file = File::open(path).ok()?;
    let mut head = Vec::new();
    file.by_ref()
        .take(SCRIPT_LINE as u64)
        .read_to_end(&mut head)
        .ok()?;
    if head.starts_with(b"#!") {
        return interpreter_of_script(&head)
            .and_then(|name| missing(files, &name, "its interpreter"));
    }
    if head.starts_with(b"\x7fELF") {
        return examine_elf(files, &file, &head);
    }
    if other_formats() {
        return None;
    }
    Some((
        NO_PROGRAM,
        "is no program that this kernel knows (exec format error), and no script that begins with #!".into(),
    ))
}

/// Whether the kernel was told of further formats.
fn other_formats() -> bool {
    // Besides `register` and `status`.
    std::fs::read_dir("/proc/sys/fs/binfmt_misc").is_ok_and(|entries| entries.count() > 2)
}

fn interpreter_of_script(head: &[u8]) -> Option<String> {
    let line = head.get(2..)?.split(|byte| *byte == b'\n').next()?;
    let mut words = line
        .split(|byte| b" \t".contains(byte))
        .filter(|word| !word.is_empty());
    // As the kernel: a carriage return belongs to the name.
    String::from_utf8(words.next()?.to_vec()).ok()
}

fn missing(files: &Files<'_>, name: &str, what: &str) -> Option<(u8, String)> {
    if !name.starts_with('/') {
        return None;
    }
    match files.open(&normal(Path::new(name))) {
        Found::Missing => Some((
            NOT_FOUND,
            format!("needs {name:?}, {what}, which is not in the container"),
        )),
        _ => None,
    }
}

/// A program of this host's kind whose loader is not there, or one that is cut off.
fn examine_elf(files: &Files<'_>, file: &File, head: &[u8]) -> Option<(u8, String)> {
    const CLASS_64: u8 = 2;
    const PT_INTERP: u32 = 3;
    let byte = |at: usize| head.get(at).copied();
    let here = if cfg!(target_endian = "little") { 1 } else { 2 };
    let broken = || Some((NO_PROGRAM, "is a damaged program".to_owned()));
    if head.len() < 52 {
        return broken();
    }
    if byte(4) != Some(CLASS_64) || byte(5) != Some(here) {
        return None;
    }
    let number = |bytes: &[u8], at: usize, len: usize| -> Option<u64> {
        let mut word = [0; 8];
        let source = bytes.get(at..at + len)?;
        if cfg!(target_endian = "little") {
            word.get_mut(..len)?.copy_from_slice(source);
        } else {
            word.get_mut(8 - len..)?.copy_from_slice(source);
        }
        Some(u64::from_ne_bytes(word))
    };
    let (Some(table), Some(size), Some(count)) = (
        number(head, 32, 8),
        number(head, 54, 2),
        number(head, 56, 2),
    ) else {
        return broken();
    };
    let len = usize::try_from(size * count)
        .ok()
        .filter(|len| *len <= MAX_HEADERS && size >= 56)?;
    let mut headers = vec![0; len];
    if file.read_exact_at(&mut headers, table).is_err() {
        return broken();
    }
    for header in headers.chunks_exact(size as usize) {
        if number(header, 0, 4) != Some(u64::from(PT_INTERP)) {
            continue;
        }
        let (offset, length) = (number(header, 8, 8)?, number(header, 32, 8)?);
        let mut name = vec![0; usize::try_from(length).ok().filter(|len| *len <= 4096)?];
        file.read_exact_at(&mut name, offset).ok()?;
        let name = String::from_utf8(name).ok()?;
        return missing(files, name.trim_end_matches('\0'), "its loader");
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn what_cannot_be_executed_is_told_with_its_status_and_why() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("bin")).unwrap();
        let write = |name: &str, content: &[u8], mode: u32| {
            let path = root.path().join(name);
            std::fs::write(&path, content).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        };
        write("bin/crlf", b"#!/bin/sh\r\necho\n", 0o755);
        write("bin/lost", b"#! /no/such -x\n", 0o755);
        write("bin/script", b"#!/bin/crlf\n", 0o755);
        write("bin/text", b"echo x\n", 0o755);
        write("bin/empty", b"", 0o755);
        write("bin/elf", b"\x7fELF\x02\x01\x01\0garbage", 0o755);
        write("bin/data", b"#!/bin/crlf\n", 0o644);
        let this = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        write("bin/dynamic", &this, 0o755);
        let files = Files {
            root: root.path(),
            binds: &[],
        };
        let env = ["PATH=/sbin:/bin".to_owned()];
        let checked = |program: &str| check(&files, &[program.to_owned()], &env, "/bin");
        for (program, status, why) in [
            ("/bin/crlf", 127, "/bin/sh\\r"),
            ("lost", 127, "/no/such"),
            ("dynamic", 127, "its loader"),
            ("gone", 127, "PATH (\"/sbin:/bin\")"),
            ("/gone", 127, "not in the container"),
            ("./gone", 127, "not in the container"),
            ("", 127, "no program's name"),
            ("text", 126, "no script"),
            ("empty", 126, "no script"),
            ("elf", 126, "damaged"),
            ("data", 126, "no x"),
            ("../bin", 126, "directory"),
        ] {
            if status == 126 && why == "no script" && other_formats() {
                continue;
            }
            let no = checked(program).expect(program);
            assert_eq!(no.status, status, "{program}: {}", no.why);
            assert!(no.why.contains(why), "{program}: {}", no.why);
        }
        assert_eq!(checked("script"), None);
        assert_eq!(checked("./script"), None);
        assert_eq!(checked("/proc/self/exe"), None);
    }

    #[test]
    fn programs_in_a_volume_are_found_there_and_doubts_are_left_to_the_runtime() {
        let root = tempfile::tempdir().unwrap();
        let volume = tempfile::tempdir().unwrap();
        std::fs::write(volume.path().join("data"), "x").unwrap();
        let binds = [Bind {
            source: volume.path().to_owned(),
            destination: "/opt/tools".into(),
            read_only: false,
        }];
        let files = Files {
            root: root.path(),
            binds: &binds,
        };
        let checked = |program: &str| check(&files, &[program.to_owned()], &[], "/");
        assert_eq!(checked("/opt/tools/data").unwrap().status, 126);
        assert_eq!(checked("/opt/tools/gone"), None);
        assert_eq!(checked("/opt/gone").unwrap().status, 127);
    }
}
