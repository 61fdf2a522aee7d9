//! What the tests of images share: trees to compare, archives to make, tools to run.
#![allow(dead_code, missing_docs)]

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use tar_core::{EntryBuilder, EntryType};

/// Fails unless the test runs as root.
pub fn need_root() {
    assert!(
        nix::unistd::geteuid().is_root(),
        "this test needs root (owners, devices): run it with sudo or in a container as root"
    );
}

/// Runs `program` with `arguments` and returns what it printed.
pub fn run<A: AsRef<OsStr>>(program: &str, arguments: &[A]) -> String {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .unwrap_or_else(|error| panic!("{program}: {error} (apt-get install {program})"));
    assert!(
        output.status.success(),
        "{program} {:?}: {}\n{}{}",
        arguments.iter().map(AsRef::as_ref).collect::<Vec<_>>(),
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Runs a script in `directory`; it stops at the first command that fails.
pub fn shell(directory: &Path, script: &str) -> String {
    let output = Command::new("sh")
        .args(["-euc", script])
        .current_dir(directory)
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{script}\n{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Everything about one file that an image keeps, as one comparable line.
pub type Snapshot = BTreeMap<PathBuf, String>;

/// Describes every file below `root` (and `root` itself) without help from the crate.
pub fn snapshot(root: &Path) -> Snapshot {
    let mut snapshot = Snapshot::new();
    let mut links = HashMap::new();
    visit(root, Path::new(""), &mut links, &mut snapshot);
    snapshot
}

fn visit(root: &Path, path: &Path, links: &mut HashMap<u64, PathBuf>, snapshot: &mut Snapshot) {
    let full = if path.as_os_str().is_empty() {
        root.to_owned()
    } else {
        root.join(path)
    };
    let meta = fs::symlink_metadata(&full).unwrap();
    let kind = meta.file_type();
    let what = if kind.is_dir() {
        "directory".to_owned()
    } else if kind.is_symlink() {
        format!("link to {:?}", fs::read_link(&full).unwrap())
    } else if kind.is_char_device() || kind.is_block_device() {
        let letter = if kind.is_char_device() { 'c' } else { 'b' };
        format!("device {letter} {:#x}", meta.rdev())
    } else if kind.is_fifo() {
        "fifo".to_owned()
    } else if kind.is_socket() {
        "socket".to_owned()
    } else {
        let sum = if meta.len() < 64 << 20 {
            let data = fs::read(&full).unwrap();
            use sha2::Digest;
            format!("{:02x?}", &sha2::Sha256::digest(&data)[..8])
        } else {
            // A huge sparse file: the test that makes one looks inside by itself.
            String::new()
        };
        format!("file of {} {sum}", meta.len())
    };
    let mut line = format!(
        "{what} mode {:o} owner {}:{} time {}.{:09}",
        meta.mode() & 0o7777,
        meta.uid(),
        meta.gid(),
        meta.mtime(),
        meta.mtime_nsec()
    );
    let mut names: Vec<_> = xattr::list(&full).unwrap().collect();
    names.sort();
    for name in names {
        let value = xattr::get(&full, &name).unwrap().unwrap();
        line.push_str(&format!(" {name:?}={value:02x?}"));
    }
    if !kind.is_dir() && meta.nlink() > 1 {
        let first = links.entry(meta.ino()).or_insert_with(|| path.to_owned());
        line.push_str(&format!(" same as {first:?}"));
    }
    snapshot.insert(path.to_owned(), line);
    if kind.is_dir() {
        let mut names: Vec<_> = fs::read_dir(&full)
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        names.sort();
        for name in names {
            visit(root, &path.join(name), links, snapshot);
        }
    }
}

/// Fails with the lines that differ.
#[track_caller]
pub fn assert_same(left: &Snapshot, right: &Snapshot) {
    let mut differences = String::new();
    for path in left.keys().chain(right.keys()) {
        let (one, two) = (left.get(path), right.get(path));
        if one != two {
            differences.push_str(&format!(
                "{path:?}\n  left:  {}\n  right: {}\n",
                one.map_or("-", String::as_str),
                two.map_or("-", String::as_str)
            ));
        }
    }
    assert!(differences.is_empty(), "the trees differ:\n{differences}");
}

/// A tar put together member by member, with any names at all.
#[derive(Default)]
pub struct Tar(pub Vec<u8>);

impl Tar {
    pub fn new() -> Tar {
        Tar::default()
    }

    pub fn raw(mut self, mut entry: EntryBuilder, data: &[u8]) -> Tar {
        self.0.extend(entry.finish_bytes());
        self.0.extend(data);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    pub fn entry(kind: EntryType, path: &str, mode: u32) -> EntryBuilder {
        let mut entry = EntryBuilder::new_ustar();
        entry.path(path).entry_type(kind);
        entry.mode(mode).unwrap();
        entry.mtime(1_000_000).unwrap();
        entry.uid(0).unwrap();
        entry.gid(0).unwrap();
        entry.size(0).unwrap();
        entry
    }

    pub fn file(self, path: &str, data: &str) -> Tar {
        let mut entry = Tar::entry(EntryType::Regular, path, 0o644);
        entry.size(data.len() as u64).unwrap();
        self.raw(entry, data.as_bytes())
    }

    pub fn bytes(self, path: &str, data: &[u8]) -> Tar {
        let mut entry = Self::entry(EntryType::Regular, path, 0o644);
        entry.size(data.len() as u64).unwrap();
        self.raw(entry, data)
    }

    pub fn dir(self, path: &str) -> Tar {
        self.raw(Tar::entry(EntryType::Directory, path, 0o755), b"")
    }

    pub fn symlink(self, path: &str, target: &str) -> Tar {
        let mut entry = Tar::entry(EntryType::Symlink, path, 0o777);
        entry.link_name(target);
        self.raw(entry, b"")
    }

    pub fn hard_link(self, path: &str, target: &str) -> Tar {
        let mut entry = Tar::entry(EntryType::Link, path, 0o644);
        entry.link_name(target);
        self.raw(entry, b"")
    }

    pub fn device(self, path: &str, major: u32, minor: u32) -> Tar {
        let mut entry = Tar::entry(EntryType::Char, path, 0o600);
        entry.device(major, minor).unwrap();
        self.raw(entry, b"")
    }

    pub fn end(mut self) -> Vec<u8> {
        self.0.extend([0; 1024]);
        self.0
    }
}

/// A tree with one of everything: made by programs, not by the crate.
pub fn make_rich_tree(root: &Path) {
    need_root();
    for (tool, package) in [
        ("setfattr", "attr"),
        ("setfacl", "acl"),
        ("/sbin/setcap", "libcap2-bin"),
    ] {
        let found = Command::new("sh")
            .args(["-c", "command -v \"$0\"", tool])
            .output();
        assert!(
            found.unwrap().status.success(),
            "{tool} is missing: apt-get install {package}"
        );
    }
    shell(
        root,
        r#"
        umask 022
        mkdir -p etc usr/bin var/empty sticky deep
        echo hello > etc/hostname
        : > etc/empty
        cp /bin/true usr/bin/su; chmod 4755 usr/bin/su
        cp /bin/true usr/bin/ping; /sbin/setcap cap_net_raw,cap_net_admin=ep usr/bin/ping
        cp /bin/true usr/bin/odd; /sbin/setcap cap_dac_override,cap_fowner=ep usr/bin/odd
        chmod 2755 usr/bin; chmod 1777 sticky; chmod 0 var/empty
        ln etc/hostname etc/hardlink; ln etc/hostname usr/second
        ln -s ../etc/hostname usr/relative; ln -s /etc/hostname usr/absolute
        ln -s nowhere/at/all usr/dangling; ln -s usr lib
        mknod dev-null c 1 3; mknod dev-disk b 259 1048575; mkfifo -m 600 pipe
        setfattr -n user.plain -v value etc/empty
        setfattr -n user.binary -v 0x0a0d003d0a0a256e etc/empty
        setfattr -n user.e=quals%25 -v x etc/empty
        setfattr -n user.on.dir -v 'line
next' etc
        setfattr -n trusted.secret -v t usr/bin/su
        setfacl -m u:1234:r,g:77:rw etc/hostname
        setfacl -d -m u:1234:rwx usr
        chown 1000:1001 etc/empty; chown 4000000000:3000000001 sticky
        chown -h 12:34 usr/dangling; chown 5:6 dev-null pipe
        printf 'a name' > "$(printf 'with\nnewline \351 and space')"
        long=$(printf 'l%.0s' $(seq 1 240)); echo long > "deep/$long"
        mkdir -p "deep/$long-d/$long/$long"; echo deeper > "deep/$long-d/$long/$long/$long"
        ln -s "$long/$long" deep/longlink; ln "deep/$long" "deep/hard-$long"
        truncate -s 1G sparse; echo start | dd of=sparse conv=notrunc status=none
        echo middle | dd of=sparse conv=notrunc bs=1M seek=500 status=none
        echo end | dd of=sparse conv=notrunc bs=1 seek=1073741820 status=none
        truncate -s 3M all-hole
        touch -h -d '1999-12-31 23:59:59.123456789' usr/relative etc/hostname pipe dev-null
        touch -d '1960-01-01 00:00:00.25' etc/empty
        touch -d '2038-01-19 03:14:08.000000001' usr/bin/su
        touch -d '2001-02-03 04:05:06.789' usr/bin usr etc
        touch -d '2002-02-03 04:05:06.7' .
        "#,
    );
}
