//! A block device of the host, by its name: what is the same whatever driver makes it.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_fs::mountinfo::MountInfo;

/// Keeps a device there that nobody has mounted or open at the moment. It is no exclusive opener: others
/// can mount the device meanwhile, but whoever detaches it waits for its end.
#[derive(Debug)]
pub struct DiskHold(#[expect(dead_code, reason = "held open for its Drop")] File);

impl DiskHold {
    /// With a descriptor of the device.
    pub(crate) fn new(node: File) -> DiskHold {
        DiskHold(node)
    }
}

/// A block device, there or not.
#[derive(Debug, Clone)]
pub(crate) struct BlockNode {
    name: String,
}

impl BlockNode {
    /// The one of that name in /dev and /sys/block.
    pub(crate) fn new(name: String) -> BlockNode {
        BlockNode { name }
    }

    pub(crate) fn path(&self) -> PathBuf {
        Path::new("/dev").join(&self.name)
    }

    pub(crate) fn sysfs(&self) -> PathBuf {
        Path::new("/sys/block").join(&self.name)
    }

    /// Its device number, major and minor; `None` where it is not there.
    pub(crate) fn major_minor(&self) -> Option<(u32, u32)> {
        let text = fs::read_to_string(self.sysfs().join("dev")).ok()?;
        let (major, minor) = text.trim().split_once(':')?;
        Some((major.parse().ok()?, minor.parse().ok()?))
    }

    pub(crate) fn open(&self, write: bool, flags: i32) -> Result<File> {
        let path = self.path();
        OpenOptions::new()
            .read(true)
            .write(write)
            .custom_flags(libc::O_CLOEXEC | flags)
            .open(&path)
            .map_err(|error| match (error.raw_os_error(), self.major_minor()) {
                // A container's own /dev does not show what the kernel makes.
                (Some(libc::ENOENT), Some((major, minor))) => Error::with_source(
                    ErrorKind::Missing,
                    format!(
                        "{0}: the kernel has this device, but /dev shows no node for it: `mknod {0} b \
                         {major} {minor}`, or, in a container, give it the host's /dev",
                        path.display(),
                    ),
                    error,
                ),
                _ => Error::io(format!("{}: cannot be opened", path.display()), error),
            })
    }

    /// Keeps the device there until the answer is dropped, as between an unmount and a mount.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] where it cannot be opened.
    pub(crate) fn hold(&self) -> Result<DiskHold> {
        self.open(false, 0).map(DiskHold)
    }

    /// True while a mount in whatever namespace, or another exclusive opener, has the device.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] where it cannot be opened.
    pub(crate) fn is_claimed(&self) -> Result<bool> {
        match self.open(false, libc::O_EXCL) {
            Ok(_) => Ok(false),
            Err(error) if error.kind() == ErrorKind::InUse => Ok(true),
            Err(error) => Err(error),
        }
    }

    /// Waits until no mount and no other exclusive opener has the device; false when `timeout` passed
    /// first, or somebody has it who [stays](UntilFree). A copy of a mount may be in a mount namespace that
    /// was made at that moment, as by a server that starts, and goes soon: while it is there, another mount
    /// gives the same file system.
    ///
    /// # Errors
    /// As [`BlockNode::is_claimed`].
    pub(crate) fn wait_unclaimed(&self, timeout: Duration) -> Result<bool> {
        let mut until_free = UntilFree::new(self, timeout);
        while self.is_claimed()? {
            if !until_free.goes_on() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// A number that no other device has in this boot, nor this one when it is attached again; `None`
    /// before Linux 5.15.
    pub(crate) fn diskseq(&self) -> Option<u64> {
        let text = fs::read_to_string(self.sysfs().join("diskseq")).ok()?;
        text.trim().parse().ok()
    }

    /// Size in bytes.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] where sysfs has no such device.
    pub(crate) fn size(&self) -> Result<u64> {
        let path = self.sysfs().join("size");
        let text = fs::read_to_string(&path).context(|| path.display().to_string())?;
        let sectors: u64 = text
            .trim()
            .parse()
            .map_err(|error| Error::with_source(ErrorKind::Io, "a size in sysfs", error))?;
        Ok(sectors * 512)
    }

    /// Who keeps the device from being detached, as far as can be found out, and what to do.
    pub(crate) fn user(&self) -> String {
        match self.find_user() {
            Some(user) => user.what,
            None => "it is mounted or open somewhere (see findmnt and fuser)".into(),
        }
    }

    fn find_user(&self) -> Option<User> {
        let (path, number) = (self.path(), self.major_minor());
        let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
        let own = fs::read_link("/proc/self/ns/mnt").ok();
        // A server of ours keeps the namespace that it was started in, and what is mounted there.
        let mut kept = None;
        for process in processes {
            let name = process.file_name();
            let Some(pid) = name.to_str().and_then(|name| name.parse::<i32>().ok()) else {
                continue;
            };
            let user = |what| Some(User { pid: None, what });
            let dir = process.path();
            let comm = fs::read_to_string(dir.join("comm")).unwrap_or_default();
            let comm = comm.trim_end();
            let mounts = fs::read(dir.join("mountinfo")).unwrap_or_default();
            let mounts = MountInfo::parse(&mounts);
            let is_ours = |mount: &&MountInfo| Some(mount.major_minor) == number;
            if let Some(mount) = mounts.iter().find(is_ours) {
                let target = mount.target.display();
                if fs::read_link(dir.join("ns/mnt")).ok() == own {
                    return user(format!("it is mounted at {target}: unmount that first"));
                }
                let place =
                    format!("it is mounted at {target} in the mount namespace of process {pid}");
                let enter = format!("`nsenter -t {pid} -m umount {target}`");
                if comm.starts_with("vellum-") {
                    let what = format!(
                        "{place} ({comm}), where its server was started: {enter} unmounts it"
                    );
                    kept = kept.or_else(|| user(what));
                    continue;
                }
                return Some(User {
                    pid: Some(pid),
                    what: format!("{place} ({comm}): end that, or {enter}"),
                });
            }
            let files = fs::read_dir(dir.join("fd")).into_iter().flatten().flatten();
            if files
                .filter_map(|file| fs::read_link(file.path()).ok())
                .any(|file| file == path)
            {
                return user(format!("process {pid} ({comm}) has it open"));
            }
        }
        kept
    }
}

/// Who has a device.
struct User {
    /// A process of a mount namespace other than ours, in which it is mounted.
    pid: Option<i32>,
    /// For a person, with what to do.
    what: String,
}

/// The wait of somebody who wants a device that others have: until a time has passed, or one process of
/// another mount namespace was found to have it mounted twice in a row, which does not go soon.
pub(crate) struct UntilFree<'a> {
    node: &'a BlockNode,
    deadline: Instant,
    pause: Duration,
    /// When to look who has it, and who had it last.
    next_look: Instant,
    seen: Option<i32>,
}

impl<'a> UntilFree<'a> {
    const BETWEEN_LOOKS: Duration = Duration::from_secs(1);

    /// From now on.
    pub(crate) fn new(node: &'a BlockNode, timeout: Duration) -> UntilFree<'a> {
        let now = Instant::now();
        UntilFree {
            node,
            deadline: now + timeout,
            pause: Duration::from_micros(200),
            next_look: now + Self::BETWEEN_LOOKS,
            seen: None,
        }
    }

    /// Waits a moment; false where it is no use to wait any longer.
    pub(crate) fn goes_on(&mut self) -> bool {
        let now = Instant::now();
        if now >= self.deadline || now >= self.next_look && self.stays() {
            return false;
        }
        std::thread::sleep(self.pause);
        self.pause = (self.pause * 2).min(Duration::from_millis(20));
        true
    }

    fn stays(&mut self) -> bool {
        self.next_look = Instant::now() + Self::BETWEEN_LOOKS;
        let before = self.seen;
        self.seen = self.node.find_user().and_then(|user| user.pid);
        self.seen.is_some() && self.seen == before
    }
}

/// True of what the kernel says to an opener while it takes a device away after its last close.
pub(crate) fn is_detaching(error: &Error) -> bool {
    error.raw_os_error() == Some(libc::ENXIO)
}
