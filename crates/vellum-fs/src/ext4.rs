//! ext4 on a device: the template that all containers start from, mount, growth, trim, usage.
//!
//! The template is made on a sparse file and allocates as little as ext4 can do with: no inode
//! table is written (a sparse file reads zeros, which mke2fs notes in the group descriptors, so
//! the kernel does not zero them later either), the journal is left as a hole, no blocks are
//! reserved. Group descriptors are spread over the device (meta_bg) instead of reserving room for
//! growth in front (resize_inode), which costs 4 MiB at 10 GiB and bounds how far it can grow.
//! Extended attributes that do not fit a block get inodes of their own (ea_inode): images have them,
//! and a feature cannot be turned on under a file system that is in use.

use std::fs::{self, File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, MsFlags};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::e2fsprogs;
use super::mountinfo::MountInfo;
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};

/// Exactly these features, whatever the host's mke2fs.conf says, so that every host makes the
/// same template.
const FEATURES: &str = "none,has_journal,ext_attr,dir_index,filetype,meta_bg,extent,64bit,\
                        flex_bg,sparse_super,large_file,huge_file,dir_nlink,extra_isize,\
                        metadata_csum,ea_inode";
/// Bytes of a file system for each file or directory that it can hold.
pub const BYTES_PER_INODE: u64 = 16 << 10;
/// The smallest size that ext4 with a journal is made at.
const MIN_SIZE: u64 = 16 << 20;
/// What mke2fs takes as the smallest journal.
const MIN_JOURNAL: u64 = 4 << 20;
const DEFAULT_JOURNAL: u64 = 16 << 20;

mod ioctl {
    /// `struct fstrim_range` of include/uapi/linux/fs.h.
    #[repr(C)]
    pub struct FstrimRange {
        pub start: u64,
        pub len: u64,
        pub minlen: u64,
    }

    nix::ioctl_readwrite!(fitrim, b'X', 121, FstrimRange);
    nix::ioctl_write_ptr!(ext4_resize_fs, b'f', 16, u64);
}

/// How to make a file system.
#[derive(Debug, Clone)]
pub struct MakeOptions {
    /// Its UUID, which also seeds its directory hashes: the same UUID, size and time give the same
    /// bytes.
    pub uuid: Uuid,
    /// Seconds since 1970 that all its times are.
    pub time: u64,
    /// Bytes of the journal; by default 16 MiB, or 4 MiB on a device below 256 MiB.
    pub journal: Option<u64>,
    /// Keep the directory `lost+found`, which e2fsck makes when it needs it.
    pub lost_and_found: bool,
}

impl MakeOptions {
    /// A file system with this UUID whose times are all the first second of 2020.
    pub fn new(uuid: Uuid) -> Self {
        MakeOptions {
            uuid,
            time: 1_577_836_800,
            journal: None,
            lost_and_found: false,
        }
    }
}

/// Makes an ext4 of `size` bytes on `path`: a regular file, which is made or emptied, or a block
/// device, whose inode tables are then left to the kernel to zero.
///
/// # Errors
/// [`ErrorKind::InvalidInput`] for a size that is too small or no multiple of 4096,
/// [`ErrorKind::Missing`] without e2fsprogs, [`ErrorKind::Command`] with what mke2fs said.
pub fn make(path: &Path, size: u64, options: &MakeOptions) -> Result<()> {
    if size < MIN_SIZE || !size.is_multiple_of(4096) {
        return Err(Error::new(
            ErrorKind::InvalidInput,
            format!("{size} bytes for an ext4: a multiple of 4096 from 16 MiB on is needed"),
        ));
    }
    let is_device = path
        .metadata()
        .is_ok_and(|metadata| metadata.file_type().is_block_device());
    if !is_device {
        let file = OpenOptions::new()
            .create(true)
            .write(true)
            .truncate(true)
            .custom_flags(libc::O_CLOEXEC | libc::O_NOFOLLOW)
            .open(path)
            .context(|| path.display().to_string())?;
        file.set_len(size).context(|| path.display().to_string())?;
    }
    let journal = options.journal.unwrap_or(if size < 256 << 20 {
        MIN_JOURNAL
    } else {
        DEFAULT_JOURNAL
    });
    let extended = format!(
        "hash_seed={},lazy_journal_init=1,lazy_itable_init={},root_owner=0:0",
        options.uuid,
        i32::from(is_device)
    );
    let mut command = program("mke2fs", options);
    command
        .args(["-q", "-F", "-t", "ext4", "-b", "4096", "-I", "256"])
        .args(["-i", &BYTES_PER_INODE.to_string(), "-G", "16", "-m", "0"])
        .args(["-e", "remount-ro"])
        .args(["-O", FEATURES])
        .args(["-U", &options.uuid.to_string()])
        .args(["-J", &format!("size={}", journal >> 20)])
        .args(["-E", &extended])
        .arg(path)
        .arg(format!("{}k", size / 1024));
    e2fsprogs::run(&mut command)?;
    if !options.lost_and_found {
        let mut command = program("debugfs", options);
        command.args(["-w", "-R", "rmdir lost+found"]).arg(path);
        e2fsprogs::run(&mut command)?;
    }
    Ok(())
}

/// As [`e2fsprogs::program`], for whom it is always the same time.
fn program(name: &str, options: &MakeOptions) -> Command {
    let mut command = e2fsprogs::program(name);
    command
        .env("E2FSPROGS_FAKE_TIME", options.time.to_string())
        .env_remove("MKE2FS_CONFIG");
    command
}

/// When a read of a file changes its access time. With copy-on-write that is never free: the first
/// such change copies the block of the inode up.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Atime {
    /// Never.
    #[default]
    Noatime,
    /// When it is older than the last change, or than a day.
    Relatime,
    /// Always.
    Strictatime,
}

/// How to mount.
#[derive(Debug, Clone, Copy, Default)]
pub struct MountOptions {
    /// Mount read-only. The journal must be clean.
    pub read_only: bool,
    /// Setuid and setgid programs and file capabilities are without effect.
    pub no_suid: bool,
    /// Device nodes cannot be opened.
    pub no_dev: bool,
    /// Access times.
    pub atime: Atime,
    /// What is written is thrown away after a crash: nothing waits for the device to make it durable, nor
    /// does the device hear what becomes free.
    pub scratch: bool,
}

impl MountOptions {
    /// The flags of mount(2).
    fn flags(self) -> MsFlags {
        let atime = match self.atime {
            Atime::Noatime => MsFlags::MS_NOATIME,
            Atime::Relatime => MsFlags::MS_RELATIME,
            Atime::Strictatime => MsFlags::MS_STRICTATIME,
        };
        let given = [
            (self.read_only, MsFlags::MS_RDONLY),
            (self.no_suid, MsFlags::MS_NOSUID),
            (self.no_dev, MsFlags::MS_NODEV),
        ];
        let given = given.into_iter().filter(|(given, _)| *given);
        given.fold(atime, |flags, (_, flag)| flags | flag)
    }

    /// ext4's own options for it, as mount(8) takes them.
    pub fn data(self) -> &'static str {
        if self.read_only {
            "errors=remount-ro,noinit_itable"
        } else if self.scratch {
            "errors=remount-ro,noinit_itable,nobarrier,data=writeback"
        } else {
            "errors=remount-ro,noinit_itable,discard"
        }
    }
}

/// Mounts the ext4 on `device` at the directory `target`: deleted files become holes (`discard`),
/// a journal that was not closed in order is replayed, an error makes it read-only.
///
/// # Errors
/// [`ErrorKind::Permission`] without CAP_SYS_ADMIN, [`ErrorKind::Io`] or [`ErrorKind::InvalidInput`]
/// where there is no ext4.
pub fn mount(device: &Path, target: &Path, options: MountOptions) -> Result<()> {
    let (flags, data) = (options.flags(), Some(options.data()));
    nix::mount::mount(Some(device), target, Some("ext4"), flags, data).map_err(|errno| {
        let what = format!(
            "{}: cannot be mounted on {}",
            device.display(),
            target.display()
        );
        match errno {
            nix::errno::Errno::EINVAL => Error::with_source(
                ErrorKind::InvalidInput,
                format!("{what}: no ext4, or one this kernel cannot mount (see dmesg)"),
                errno,
            ),
            _ => Error::io(what, errno.into()),
        }
    })
}

/// Lets nothing write through the mount at `target`, which was mounted with these options; other mounts of the same
/// file system stay as they are.
///
/// # Errors
/// [`ErrorKind::Permission`] without CAP_SYS_ADMIN.
pub fn make_read_only(target: &Path, options: MountOptions) -> Result<()> {
    let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY | options.flags();
    let none: Option<&Path> = None;
    nix::mount::mount(none, target, none, flags, none).map_err(|errno| {
        let what = format!("{}: cannot be made read-only", target.display());
        Error::io(what, errno.into())
    })
}

/// Unmounts `target`, waiting at most `timeout` for those who use it. One that is not mounted is
/// fine.
///
/// # Errors
/// [`ErrorKind::InUse`] when it is still used then; nothing is changed.
pub fn unmount(target: &Path, timeout: Duration) -> Result<()> {
    let deadline = Instant::now() + timeout;
    let mut pause = Duration::from_millis(1);
    loop {
        match nix::mount::umount2(target, MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) | Err(nix::errno::Errno::EINVAL | nix::errno::Errno::ENOENT) => return Ok(()),
            Err(nix::errno::Errno::EBUSY) if Instant::now() < deadline => {
                std::thread::sleep(pause);
                pause = (pause * 2).min(Duration::from_millis(50));
            }
            Err(errno) => {
                return Err(Error::io(
                    format!("{}: cannot be unmounted", target.display()),
                    errno.into(),
                ));
            }
        }
    }
}

/// Takes `target` out of sight now; the file system ends with its last user.
///
/// # Errors
/// [`ErrorKind::Permission`] without CAP_SYS_ADMIN.
pub fn unmount_lazily(target: &Path) -> Result<()> {
    match nix::mount::umount2(target, MntFlags::UMOUNT_NOFOLLOW | MntFlags::MNT_DETACH) {
        Ok(()) | Err(nix::errno::Errno::EINVAL | nix::errno::Errno::ENOENT) => Ok(()),
        Err(errno) => Err(Error::io(
            format!("{}: cannot be unmounted", target.display()),
            errno.into(),
        )),
    }
}

/// True of an ext4 that was mounted to be written and takes no writes any more: it met an error,
/// such as a journal that could not be written, and stays so until it is mounted anew.
pub fn has_given_up(mount: &MountInfo) -> bool {
    let mut of_super = mount.super_options.split(',');
    // Newer kernels say so; older ones turn the file system read-only, and not the mount.
    of_super.any(|option| matches!(option, "emergency_ro" | "shutdown" | "ro"))
        && !mount.options.split(',').any(|option| option == "ro")
}

/// Bytes that programs have written to the ext4 on a device, and that have no blocks yet since they
/// are only in memory. 0 where the kernel does not say.
pub fn delayed_bytes(device: &Path) -> u64 {
    let Some(name) = device.file_name() else {
        return 0;
    };
    let path = Path::new("/sys/fs/ext4")
        .join(name)
        .join("delayed_allocation_blocks");
    let blocks = fs::read_to_string(path).ok();
    let blocks = blocks.and_then(|text| text.trim().parse::<u64>().ok());
    // All that are made here have blocks of 4 KiB; of others it is no more than an estimate.
    blocks.unwrap_or(0) * 4096
}

/// True when something is mounted at exactly `target`.
///
/// # Errors
/// [`ErrorKind::Io`] where /proc is missing.
pub fn is_mounted(target: &Path) -> Result<bool> {
    let target = fs::canonicalize(target).unwrap_or_else(|_| target.to_path_buf());
    Ok(MountInfo::at(&target)?.is_some())
}

/// Grows the ext4 mounted at `target` to `size` bytes while it is used; the device must have
/// grown before.
///
/// # Errors
/// [`ErrorKind::Permission`] without CAP_SYS_RESOURCE (some containers' root lacks it): unmount it
/// and call [`grow_unmounted`] then.
pub fn grow(target: &Path, size: u64) -> Result<()> {
    let dir = open_root(target)?;
    let stat = nix::sys::statvfs::statvfs(target).context(|| target.display().to_string())?;
    // The kernel counts in blocks of the file system, which may be smaller than ours.
    let blocks = size / stat.block_size();
    // SAFETY: the kernel reads the u64 that the reference names; the descriptor is open.
    unsafe { ioctl::ext4_resize_fs(dir.as_raw_fd(), &blocks) }.map_err(|errno| match errno {
        nix::errno::Errno::EPERM => Error::with_source(
            ErrorKind::Permission,
            format!(
                "{}: growing a mounted ext4 needs CAP_SYS_RESOURCE: unmount it and grow it then",
                target.display()
            ),
            errno,
        ),
        _ => Error::io(
            format!("{}: cannot be grown to {size} bytes", target.display()),
            errno.into(),
        ),
    })?;
    Ok(())
}

/// True when this process has the right that [`grow`] needs: CAP_SYS_RESOURCE.
///
/// # Errors
/// Where /proc is missing.
pub fn may_grow_mounted() -> Result<bool> {
    // include/uapi/linux/capability.h
    const CAP_SYS_RESOURCE: u32 = 24;
    let status = fs::read_to_string("/proc/self/status").context(|| "/proc/self/status")?;
    let mask = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    Ok(mask.is_some_and(|mask| mask >> CAP_SYS_RESOURCE & 1 == 1))
}

/// Grows the ext4 on `device`, which is not mounted, to the device's size. It must be
/// [clean](super::superblock::Superblock::clean).
///
/// # Errors
/// [`ErrorKind::Missing`] without e2fsprogs, [`ErrorKind::Command`] with what resize2fs said.
pub fn grow_unmounted(device: &Path) -> Result<()> {
    // What resize2fs refuses for good reason, and does all the same with -f.
    if let Some(why) = crate::superblock::Superblock::of_file(device)?.fixed() {
        return Err(Error::new(
            ErrorKind::Unsupported,
            format!("{}: cannot be grown, since {why}", device.display()),
        ));
    }
    // -f: a clean file system need not be checked first.
    let mut resize = e2fsprogs::program("resize2fs");
    // Cut off it leaves a file system that has to be repaired, so Ctrl-C must not reach it.
    resize.process_group(0).arg("-f").arg(device);
    e2fsprogs::run(&mut resize)
        .map_err(|error| error.context(format!("{}: cannot be grown", device.display())))
}

/// Tells the device about every free block of the ext4 mounted at `target`; returns the bytes.
///
/// # Errors
/// [`ErrorKind::Unsupported`] where the device takes no discard.
pub fn trim(target: &Path) -> Result<u64> {
    let dir = open_root(target)?;
    let mut range = ioctl::FstrimRange {
        start: 0,
        len: u64::MAX,
        minlen: 0,
    };
    // SAFETY: the kernel reads and writes the structure that the reference names.
    unsafe { ioctl::fitrim(dir.as_raw_fd(), &mut range) }
        .context(|| format!("{}: cannot be trimmed", target.display()))?;
    Ok(range.len)
}

/// What statfs(2) says of a mounted file system, in bytes and files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct Usage {
    /// Room for data.
    pub size: u64,
    /// Taken by data.
    pub used: u64,
    /// Free.
    pub free: u64,
    /// Files and directories that there can be.
    pub files: u64,
    /// Files and directories that there are.
    pub files_used: u64,
}

/// How full the file system at `target` is.
///
/// # Errors
/// [`ErrorKind::NotFound`] or [`ErrorKind::Io`].
pub fn usage(target: &Path) -> Result<Usage> {
    let stat = nix::sys::statvfs::statvfs(target).context(|| target.display().to_string())?;
    let unit = stat.fragment_size();
    Ok(Usage {
        size: stat.blocks() * unit,
        used: stat.blocks().saturating_sub(stat.blocks_free()) * unit,
        free: stat.blocks_available() * unit,
        files: stat.files(),
        files_used: stat.files().saturating_sub(stat.files_free()),
    })
}

/// Opens the root of a mounted file system for an ioctl.
pub(super) fn open_root(target: &Path) -> Result<File> {
    OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW | libc::O_CLOEXEC)
        .open(target)
        .context(|| format!("{}: cannot be opened", target.display()))
}
