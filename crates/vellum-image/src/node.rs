//! One file of a tree, apart from its bytes: what a tar member says and what a file system holds.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

/// The permission bits of a mode: set-id, sticky and rwx.
pub(super) const PERMISSIONS: u32 = 0o7777;

/// Directories nest at most this deep in a tree that is copied, compared or written: no path of
/// [`MAX_PATH`] bytes names what is deeper.
pub(super) const MAX_DEPTH: usize = 2048;

/// The longest path and link target that is accepted, in bytes (`PATH_MAX` less its final zero).
pub(super) const MAX_PATH: usize = 4095;

/// A run of data bytes inside a sparse file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Extent {
    /// Where it starts, in bytes.
    pub offset: u64,
    /// Its length in bytes.
    pub length: u64,
}

impl Extent {
    /// The byte after the last one, or `None` beyond 64 bits.
    pub fn end(self) -> Option<u64> {
        self.offset.checked_add(self.length)
    }
}

/// A moment as a file system keeps it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub(super) struct Time {
    /// Seconds since 1970, negative before.
    pub seconds: i64,
    /// Nanoseconds after `seconds`, below 1,000,000,000.
    pub nanoseconds: u32,
}

impl Time {
    /// As the `utimensat` family wants it.
    pub fn spec(self) -> nix::sys::time::TimeSpec {
        nix::sys::time::TimeSpec::new(self.seconds, i64::from(self.nanoseconds))
    }

    /// Reads a PAX time: a decimal number of seconds with an optional fraction and sign.
    ///
    /// Digits beyond the ninth of the fraction are dropped (towards the past, as GNU tar does).
    pub fn parse_pax(text: &str) -> Option<Time> {
        let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
        let negative = whole.starts_with('-');
        let seconds: i64 = whole.parse().ok()?;
        if !fraction.bytes().all(|byte| byte.is_ascii_digit()) {
            return None;
        }
        let digits: String = fraction
            .chars()
            .chain("000000000".chars())
            .take(9)
            .collect();
        let nanoseconds: u32 = digits.parse().ok()?;
        if negative && nanoseconds > 0 {
            return Some(Time {
                seconds: seconds.checked_sub(1)?,
                nanoseconds: 1_000_000_000 - nanoseconds,
            });
        }
        Some(Time {
            seconds,
            nanoseconds,
        })
    }
}

impl fmt::Display for Time {
    /// As a PAX record has it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (mut seconds, mut nanoseconds) = (self.seconds, self.nanoseconds);
        let mut sign = "";
        if seconds < 0 {
            sign = "-";
            if nanoseconds > 0 {
                seconds = seconds.saturating_add(1);
                nanoseconds = 1_000_000_000_u32.saturating_sub(nanoseconds);
            }
        }
        write!(f, "{sign}{}", seconds.unsigned_abs())?;
        if nanoseconds > 0 {
            let digits = format!("{nanoseconds:09}");
            write!(f, ".{}", digits.trim_end_matches('0'))?;
        }
        Ok(())
    }
}

/// What a node is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Kind {
    /// A regular file of `size` bytes; with `extents`, everything outside them is zero.
    File {
        size: u64,
        extents: Option<Vec<Extent>>,
    },
    Directory,
    /// Its target, as written.
    Symlink(Vec<u8>),
    /// The path, relative to the root, of the file that it is another name of.
    HardLink(Vec<u8>),
    CharDevice {
        major: u32,
        minor: u32,
    },
    BlockDevice {
        major: u32,
        minor: u32,
    },
    Fifo,
    Socket,
}

/// What a file can do whoever starts it.
pub(super) const CAPABILITY: &[u8] = b"security.capability";

/// Extended attributes by full name (`user.x`, `security.capability`).
pub(super) type Xattrs = BTreeMap<Vec<u8>, Vec<u8>>;

/// Name, type and attributes of one file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Node {
    /// Its path relative to the root: no leading slash, no `.` or `..`; empty for the root itself.
    pub path: Vec<u8>,
    pub kind: Kind,
    /// Permission bits ([`PERMISSIONS`]).
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub mtime: Time,
    /// `None` when the source does not say.
    pub atime: Option<Time>,
    pub xattrs: Xattrs,
}

impl Node {
    /// How messages name it.
    pub fn shown(&self) -> String {
        shown(&self.path)
    }
}

/// A path for a message: lossy, quoted, and cut when absurdly long.
pub(super) fn shown(path: &[u8]) -> String {
    if path.is_empty() {
        return "\"/\"".into();
    }
    let text = String::from_utf8_lossy(path);
    if text.chars().count() > 200 {
        let head: String = text.chars().take(200).collect();
        return format!("{head:?}…");
    }
    format!("{text:?}")
}

/// The directory and the name of a path; `None` for the root.
#[expect(clippy::indexing_slicing, reason = "the slash was found in the path")]
pub(super) fn split(path: &[u8]) -> Option<(&[u8], &[u8])> {
    if path.is_empty() {
        return None;
    }
    match path.iter().rposition(|byte| *byte == b'/') {
        Some(slash) => Some((&path[..slash], &path[slash + 1..])),
        None => Some((&[], path)),
    }
}

/// `directory` with `name` below it.
pub(super) fn join(directory: &[u8], name: &[u8]) -> Vec<u8> {
    let mut path = Vec::with_capacity(directory.len() + 1 + name.len());
    path.extend_from_slice(directory);
    if !path.is_empty() {
        path.push(b'/');
    }
    path.extend_from_slice(name);
    path
}

/// Bytes as a path.
pub(super) fn to_path(bytes: &[u8]) -> PathBuf {
    PathBuf::from(OsStr::from_bytes(bytes))
}

/// Why a name from an archive cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum BadPath {
    ParentComponent,
    Zero,
    TooLong,
}

impl fmt::Display for BadPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            BadPath::ParentComponent => f.write_str("it has a \"..\" in it"),
            BadPath::Zero => f.write_str("it has a zero byte in it"),
            BadPath::TooLong => write!(f, "it is longer than {MAX_PATH} bytes"),
        }
    }
}

/// Brings a name from an archive into the form of [`Node::path`].
///
/// Leading slashes and `.` are dropped, as tar does; `..` is refused rather than interpreted,
/// since what it means depends on links that an archive can place.
pub(super) fn normalise(name: &[u8]) -> Result<Vec<u8>, BadPath> {
    if name.contains(&0) {
        return Err(BadPath::Zero);
    }
    let mut path = Vec::with_capacity(name.len());
    for component in name.split(|byte| *byte == b'/') {
        match component {
            b"" | b"." => continue,
            b".." => return Err(BadPath::ParentComponent),
            _ => {}
        }
        if !path.is_empty() {
            path.push(b'/');
        }
        path.extend_from_slice(component);
    }
    if path.len() > MAX_PATH {
        return Err(BadPath::TooLong);
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn time(seconds: i64, nanoseconds: u32) -> Time {
        Time {
            seconds,
            nanoseconds,
        }
    }

    #[test]
    fn pax_times_parse_with_fractions_and_before_1970() {
        assert_eq!(Time::parse_pax("12"), Some(time(12, 0)));
        assert_eq!(Time::parse_pax("12.5"), Some(time(12, 500_000_000)));
        assert_eq!(Time::parse_pax("1.0000000019"), Some(time(1, 1)));
        assert_eq!(Time::parse_pax("-1.25"), Some(time(-2, 750_000_000)));
        assert_eq!(Time::parse_pax("-0.5"), Some(time(-1, 500_000_000)));
        assert_eq!(Time::parse_pax("1.x"), None);
        assert_eq!(Time::parse_pax(""), None);
        assert_eq!(Time::parse_pax("99999999999999999999"), None);
    }

    #[test]
    fn pax_times_print_what_they_parse() {
        for moment in [
            time(0, 0),
            time(5, 1),
            time(-1, 500_000_000),
            time(-2, 0),
            time(-7, 999_999_999),
            time(1 << 40, 120_000_000),
        ] {
            assert_eq!(Time::parse_pax(&moment.to_string()), Some(moment));
        }
    }

    #[test]
    fn names_lose_leading_slashes_and_dots() {
        assert_eq!(normalise(b"./a//b/./c/").unwrap(), b"a/b/c");
        assert_eq!(normalise(b"/etc/passwd").unwrap(), b"etc/passwd");
        assert_eq!(normalise(b"./").unwrap(), b"");
    }

    #[test]
    fn names_with_parent_components_zeros_or_absurd_lengths_are_refused() {
        assert_eq!(normalise(b"a/../b"), Err(BadPath::ParentComponent));
        assert_eq!(normalise(b".."), Err(BadPath::ParentComponent));
        assert_eq!(normalise(b"a\0b"), Err(BadPath::Zero));
        assert_eq!(normalise(&[b'a'; MAX_PATH + 1]), Err(BadPath::TooLong));
        let deep = b"d/".repeat(MAX_DEPTH + 1);
        assert_eq!(normalise(&deep), Err(BadPath::TooLong));
        assert!(normalise(&b"d/".repeat(MAX_DEPTH)).is_ok());
        assert_eq!(normalise(b"..a/b..").unwrap(), b"..a/b..");
    }

    #[test]
    fn paths_split_into_directory_and_name() {
        assert_eq!(split(b""), None);
        assert_eq!(split(b"a"), Some((&b""[..], &b"a"[..])));
        assert_eq!(split(b"a/b/c"), Some((&b"a/b"[..], &b"c"[..])));
        assert_eq!(join(b"a/b", b"c"), b"a/b/c");
        assert_eq!(join(b"", b"c"), b"c");
    }
}
