//! The mounts that the calling process sees, from /proc/self/mountinfo (proc(5)).

use std::ffi::OsString;
use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use vellum_base::error::{Error, ErrorKind, Result, ResultExt};

/// One mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountInfo {
    /// Number of this mount.
    pub id: u64,
    /// Number of the mount that it lies on.
    pub parent: u64,
    /// Device number of the file system.
    pub major_minor: (u32, u32),
    /// Which directory of the file system is its root.
    pub root: PathBuf,
    /// Where it is mounted.
    pub target: PathBuf,
    /// Options of this mount, separated by commas.
    pub options: String,
    /// Type of the file system, with its subtype.
    pub fs_type: String,
    /// What is mounted: a device's path for most.
    pub source: PathBuf,
    /// Options of the file system, separated by commas.
    pub super_options: String,
}

impl MountInfo {
    /// Every mount, in the order of mounting.
    ///
    /// # Errors
    /// [`vellum_base::ErrorKind::Io`] where /proc is not mounted.
    pub fn read() -> Result<Vec<MountInfo>> {
        let path = "/proc/self/mountinfo";
        let bytes = fs::read(path).context(|| format!("{path}: cannot be read"))?;
        Ok(MountInfo::parse(&bytes))
    }

    /// Parses the content of a mountinfo file; lines that make no sense are left out.
    pub fn parse(bytes: &[u8]) -> Vec<MountInfo> {
        bytes
            .split(|byte| *byte == b'\n')
            .filter_map(parse_line)
            .collect()
    }

    /// The topmost mount at exactly `target`, which must be absolute and without links.
    ///
    /// # Errors
    /// As [`MountInfo::read`].
    pub fn at(target: &Path) -> Result<Option<MountInfo>> {
        let mut all = MountInfo::read()?;
        all.retain(|mount| mount.target == target);
        Ok(all.pop())
    }

    /// Makes sure that an unmount of its target takes this mount away and nothing else.
    ///
    /// # Errors
    /// [`ErrorKind::InUse`] while something else is mounted on top of it, below it, or over a directory
    /// on the way to it.
    pub fn check_uncovered(&self, all: &[MountInfo]) -> Result<()> {
        let refused = |other: &MountInfo, how: &str| {
            Error::new(
                ErrorKind::InUse,
                format!(
                    "{}: something else ({}) is mounted {how}: unmount that first (`umount {}`)",
                    self.target.display(),
                    other.fs_type,
                    other.target.display()
                ),
            )
        };
        let others = || all.iter().filter(|o| o.major_minor != self.major_minor);
        if let Some(other) = others().find(|other| other.parent == self.id) {
            let how = match other.target == self.target {
                true => "on top of it".to_owned(),
                false => format!("below it, at {}", other.target.display()),
            };
            return Err(refused(other, &how));
        }
        // Its path leads elsewhere, to what was mounted over a directory on the way.
        let hides = |other: &&MountInfo| {
            other.id > self.id
                && other.target != self.target
                && self.target.starts_with(&other.target)
        };
        match (others().find(hides), self.is_seen()?) {
            (Some(other), false) => {
                Err(refused(other, &format!("over {}", other.target.display())))
            }
            _ => Ok(()),
        }
    }

    /// True where its path leads to it, and not to another mount.
    fn is_seen(&self) -> Result<bool> {
        let flags = libc::O_PATH | libc::O_NOFOLLOW | libc::O_CLOEXEC;
        let opened = fs::OpenOptions::new()
            .read(true)
            .custom_flags(flags)
            .open(&self.target);
        let Ok(opened) = opened else {
            return Ok(false);
        };
        let path = format!("/proc/self/fdinfo/{}", opened.as_raw_fd());
        let info = fs::read_to_string(&path).context(|| format!("{path}: cannot be read"))?;
        let id = info.lines().find_map(|line| line.strip_prefix("mnt_id:"));
        // A kernel that does not tell (before 3.15) is none that we run on.
        Ok(id.is_some_and(|id| id.trim().parse() == Ok(self.id)))
    }

    /// The mount that `path`, absolute and without links, lies on.
    ///
    /// # Errors
    /// As [`MountInfo::read`].
    pub fn of(path: &Path) -> Result<Option<MountInfo>> {
        let all = MountInfo::read()?.into_iter();
        // Of those at one place the last one is seen.
        Ok(all
            .filter(|mount| path.starts_with(&mount.target))
            .max_by_key(|mount| mount.target.as_os_str().len()))
    }

    /// True when option `name` is among the mount's or the file system's.
    pub fn has_option(&self, name: &str) -> bool {
        let mut all = self.options.split(',').chain(self.super_options.split(','));
        all.any(|option| option == name)
    }
}

fn parse_line(line: &[u8]) -> Option<MountInfo> {
    let mut fields = line.split(|byte| *byte == b' ');
    let id = number(fields.next()?)?;
    let parent = number(fields.next()?)?;
    let device = std::str::from_utf8(fields.next()?).ok()?;
    let (major, minor) = device.split_once(':')?;
    let root = path(fields.next()?);
    let target = path(fields.next()?);
    let options = text(fields.next()?);
    // Optional fields, any number of them, up to a single hyphen.
    fields.find(|field| *field == b"-")?;
    Some(MountInfo {
        id,
        parent,
        major_minor: (major.parse().ok()?, minor.parse().ok()?),
        root,
        target,
        options,
        fs_type: text(fields.next()?),
        source: path(fields.next()?),
        super_options: text(fields.next().unwrap_or_default()),
    })
}

fn number(field: &[u8]) -> Option<u64> {
    std::str::from_utf8(field).ok()?.parse().ok()
}

fn path(field: &[u8]) -> PathBuf {
    PathBuf::from(OsString::from_vec(unescape(field)))
}

fn text(field: &[u8]) -> String {
    String::from_utf8_lossy(&unescape(field)).into_owned()
}

/// Undoes `\ooo`, which stands for space, tab, newline, backslash and `#`.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, tail)) = rest.split_first() {
        if *first == b'\\'
            && let Some((digits, after)) = tail.split_at_checked(3)
            && digits.iter().all(|digit| (b'0'..=b'7').contains(digit))
        {
            let value = digits
                .iter()
                .fold(0u32, |value, digit| value * 8 + u32::from(digit - b'0'));
            out.push(value as u8);
            rest = after;
        } else {
            out.push(*first);
            rest = tail;
        }
    }
    out
}

/// True where /dev shows by itself what devices the kernel makes: not in most containers.
pub fn shows_devices() -> bool {
    let dev = MountInfo::at(Path::new("/dev"));
    dev.is_ok_and(|mount| mount.is_some_and(|mount| mount.fs_type == "devtmpfs"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_with_escapes_and_optional_fields_is_understood() {
        let line = b"36 35 7:12 /a\\040b /mnt\\134x\\012y rw,noatime master:1 shared:7 - \
                     fuse.vellum ve\\040llum rw,errors=continue";
        let all = MountInfo::parse(line);
        assert_eq!(all.len(), 1);
        let mount = &all[0];
        assert_eq!(mount.major_minor, (7, 12));
        assert_eq!(mount.root, Path::new("/a b"));
        assert_eq!(mount.target, Path::new("/mnt\\x\ny"));
        assert_eq!(mount.fs_type, "fuse.vellum");
        assert_eq!(mount.source, Path::new("ve llum"));
        assert!(mount.has_option("noatime") && mount.has_option("errors=continue"));
        assert!(!mount.has_option("ro"));
    }

    #[test]
    fn broken_lines_are_left_out_and_odd_escapes_are_kept() {
        let lines = b"1 2 3\n\n1 2 x:y / / rw - a b c\n1 2 3:4 / /\\04 rw - a b";
        let all = MountInfo::parse(lines);
        assert_eq!(all.len(), 1);
        assert_eq!(all[0].target, Path::new("/\\04"));
        assert_eq!(all[0].super_options, "");
    }

    #[test]
    fn the_root_is_among_our_own_mounts() {
        assert!(MountInfo::at(Path::new("/")).unwrap().is_some());
    }
}
