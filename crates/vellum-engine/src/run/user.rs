//! Who a process runs as: `USER[:GROUP]` looked up in the container's own files.

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, open, openat2};
use nix::sys::stat::Mode;

use vellum_base::error::{Error, ErrorKind, Result, ResultExt};

/// `/etc/passwd` and `/etc/group` are read up to here.
const MAX_FILE: u64 = 16 << 20;
/// The largest user or group id that is taken, as docker has it.
const MAX_ID: u32 = i32::MAX as u32;

/// A user as the kernel knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Who {
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// Supplementary groups.
    pub(super) groups: Vec<u32>,
    pub(super) home: String,
}

/// Opens `path` as a process whose root is `root` would: no link leads out.
pub(super) fn open_in_root(root: &Path, path: &Path, flags: OFlag) -> nix::Result<OwnedFd> {
    let root = open(
        root,
        OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC,
        Mode::empty(),
    )?;
    let how = OpenHow::new()
        .flags(flags | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    let mut tries = 0;
    loop {
        match openat2(&root, path, how) {
            // A rename somewhere on the host raced with the resolution of a "..".
            Err(Errno::EAGAIN | Errno::EINTR) if tries < 100 => tries += 1,
            other => return other,
        }
    }
}

/// The lines of a file in the container; none where there is no such file.
fn lines(root: &Path, path: &str) -> Result<Vec<String>> {
    // A fifo must not make us wait.
    let flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
    let file = match open_in_root(root, Path::new(path), flags) {
        Ok(fd) => File::from(fd),
        Err(Errno::ENOENT | Errno::ENOTDIR) => return Ok(Vec::new()),
        Err(errno) => {
            return Err(Error::io(
                format!("cannot read {path} of the container"),
                errno.into(),
            ));
        }
    };
    let doing = || format!("cannot read {path} of the container");
    if !file.metadata().context(doing)?.is_file() {
        return Err(Error::new(
            ErrorKind::InvalidInput,
            format!("{path} of the container is not a file"),
        ));
    }
    let mut bytes = Vec::new();
    file.take(MAX_FILE).read_to_end(&mut bytes).context(doing)?;
    let text = String::from_utf8_lossy(&bytes);
    Ok(text.lines().map(|line| line.trim().to_owned()).collect())
}

#[derive(Debug)]
struct PasswdLine {
    name: String,
    uid: u32,
    gid: u32,
    home: String,
}

fn passwd(line: &str) -> Option<PasswdLine> {
    let mut fields = line.split(':');
    let name = fields.next().filter(|name| !name.is_empty())?.to_owned();
    let uid = fields.nth(1)?.parse().ok()?;
    let gid = fields.next()?.parse().ok()?;
    let home = fields.nth(1).unwrap_or_default().to_owned();
    Some(PasswdLine {
        name,
        uid,
        gid,
        home,
    })
}

#[derive(Debug)]
struct GroupLine {
    name: String,
    gid: u32,
    members: Vec<String>,
}

fn group(line: &str) -> Option<GroupLine> {
    let mut fields = line.split(':');
    let name = fields.next().filter(|name| !name.is_empty())?.to_owned();
    let gid = fields.nth(1)?.parse().ok()?;
    let members = fields.next().unwrap_or_default();
    Some(GroupLine {
        name,
        gid,
        members: members.split(',').map(str::to_owned).collect(),
    })
}

/// Whether it is meant as an id, in range or not.
fn is_number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

/// A number in the range of ids.
fn number(text: &str) -> Option<u32> {
    text.parse().ok().filter(|id| *id <= MAX_ID)
}

/// Looks up `USER[:GROUP]`, names or numbers; empty is root. As docker has it: what is a number is
/// never a name, so that an image cannot make user 1001 root by a line that begins with `1001:x:0:`;
/// a number needs no line in the files; a group that is given replaces the user's own, the
/// supplementary ones too.
///
/// # Errors
/// [`ErrorKind::NotFound`] for a name that the container's files do not have.
pub(super) fn resolve(root: &Path, spec: &str) -> Result<Who> {
    let (user, wanted_group) = match spec.split_once(':') {
        Some((user, group)) => (user, Some(group).filter(|group| !group.is_empty())),
        None => (spec, None),
    };
    let user = if user.is_empty() { "0" } else { user };
    let users: Vec<PasswdLine> = lines(root, "/etc/passwd")?
        .iter()
        .filter_map(|line| passwd(line))
        .collect();
    let found = users.iter().find(|line| match is_number(user) {
        true => number(user) == Some(line.uid),
        false => line.name == user,
    });
    let mut who = match (found, number(user)) {
        (Some(line), _) => Who {
            uid: line.uid,
            gid: line.gid,
            groups: Vec::new(),
            home: line.home.clone(),
        },
        (None, Some(uid)) => Who {
            uid,
            gid: 0,
            groups: Vec::new(),
            home: String::new(),
        },
        (None, None) => return Err(no_such("user", user, "/etc/passwd")),
    };
    if who.home.is_empty() {
        who.home = if who.uid == 0 { "/root" } else { "/" }.into();
    }
    let groups: Vec<GroupLine> = lines(root, "/etc/group")?
        .iter()
        .filter_map(|line| group(line))
        .collect();
    match (wanted_group, found) {
        (Some(wanted), _) => {
            let gid = match is_number(wanted) {
                true => number(wanted),
                false => groups
                    .iter()
                    .find(|line| line.name == wanted)
                    .map(|line| line.gid),
            };
            who.gid = gid.ok_or_else(|| no_such("group", wanted, "/etc/group"))?;
        }
        (None, Some(user)) => {
            who.groups = groups
                .iter()
                .filter(|group| group.members.contains(&user.name))
                .map(|group| group.gid)
                .collect();
            who.groups.sort_unstable();
            who.groups.dedup();
        }
        (None, None) => {}
    }
    Ok(who)
}

fn no_such(what: &str, name: &str, file: &str) -> Error {
    Error::new(
        ErrorKind::NotFound,
        format!(
            "the container has no {what} {name:?} in its {file}: name one that it has, or give a number"
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("etc")).unwrap();
        std::fs::write(
            dir.path().join("etc/passwd"),
            "root:x:0:0:root:/root:/bin/sh\nbroken\nweb:x:33:34::/srv:/bin/sh\n7:x:0:0::/seven:\n",
        )
        .unwrap();
        std::fs::write(
            dir.path().join("etc/group"),
            "root:x:0:\nweb:x:34:\nlogs:x:40:web,root\nmore:x:41:web\n8:x:0:\n",
        )
        .unwrap();
        dir
    }

    #[test]
    fn names_and_numbers_are_looked_up_with_their_groups() {
        let root = root();
        let who = |spec| resolve(root.path(), spec).unwrap();
        assert_eq!((who("").uid, who("").groups), (0, vec![40]));
        let web = who("web");
        assert_eq!((web.uid, web.gid, &web.groups[..]), (33, 34, &[40, 41][..]));
        assert_eq!(web.home, "/srv");
        assert_eq!(who("33"), web);
        let given = who("web:logs");
        assert_eq!((given.uid, given.gid, given.groups), (33, 40, vec![]));
        assert_eq!(who("web:99").gid, 99);
        let stranger = who("1234");
        assert_eq!((stranger.uid, stranger.gid), (1234, 0));
        assert_eq!(stranger.home, "/");
        // Users and groups that are called like a number are not what the number means.
        let seven = who("7:8");
        assert_eq!((seven.uid, seven.gid, &seven.home[..]), (7, 8, "/"));
        assert_eq!((who("007").uid, who("7").groups), (7, vec![]));
    }

    #[test]
    fn unknown_names_and_impossible_numbers_are_errors_that_name_the_file() {
        let root = root();
        for (spec, file) in [
            ("nobody", "passwd"),
            ("web:none", "group"),
            ("4294967295", "passwd"),
            ("web:4294967295", "group"),
        ] {
            let error = resolve(root.path(), spec).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::NotFound, "{spec}");
            assert!(error.to_string().contains(file), "{error}");
        }
    }

    #[test]
    fn links_in_the_image_do_not_lead_to_the_hosts_files() {
        let root = tempfile::tempdir().unwrap();
        let outside = tempfile::tempdir().unwrap();
        std::fs::write(outside.path().join("passwd"), "evil:x:0:0::/:\n").unwrap();
        std::os::unix::fs::symlink(outside.path(), root.path().join("etc")).unwrap();
        let error = resolve(root.path(), "evil").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound);
        // Nor does a fifo hold us up.
        std::fs::remove_file(root.path().join("etc")).unwrap();
        std::fs::create_dir(root.path().join("etc")).unwrap();
        nix::unistd::mkfifo(&root.path().join("etc/passwd"), Mode::S_IRWXU).unwrap();
        let error = resolve(root.path(), "evil").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
    }
}
