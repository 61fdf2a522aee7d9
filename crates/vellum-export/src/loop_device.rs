//! Loop devices: a block device of the kernel on top of a file, with direct I/O.
//!
//! The kernel detaches it at its last close (AUTOCLEAR): once nobody has it mounted or open, whatever
//! became of the commands and servers, and of the files in which its number was noted. Between
//! attaching and mounting other programs (resize2fs, e2fsck) open and close it, so it is
//! [held](DiskHold) meanwhile. One that others mount and open when they like [stays](Lifetime).
//!
//! What a crash leaves behind is found by what the kernel shows in sysfs: the name of the backing file,
//! and how often the device was attached. The ioctl that says more (LOOP_GET_STATUS64) asks the backing
//! file's file system, which hangs where that is a FUSE server that does: it is used nowhere.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::block_node::{BlockNode, DiskHold, UntilFree, is_detaching};
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};

const CONTROL: &str = "/dev/loop-control";
/// Loop numbers that a racing process may take from us before we give up.
const RACES: usize = 200;
/// The largest request of a FUSE file, so that the loop does not send one and a quarter.
const MAX_SECTORS_KB: u32 = 1024;

const LO_NAME_SIZE: usize = 64;
const LO_FLAGS_READ_ONLY: u32 = 1;
const LO_FLAGS_AUTOCLEAR: u32 = 4;
const LO_FLAGS_DIRECT_IO: u32 = 16;

/// `struct loop_info64` of include/uapi/linux/loop.h.
#[repr(C)]
#[derive(Clone, Copy)]
struct LoopInfo64 {
    lo_device: u64,
    lo_inode: u64,
    lo_rdevice: u64,
    lo_offset: u64,
    lo_sizelimit: u64,
    lo_number: u32,
    lo_encrypt_type: u32,
    lo_encrypt_key_size: u32,
    lo_flags: u32,
    lo_file_name: [u8; LO_NAME_SIZE],
    lo_crypt_name: [u8; LO_NAME_SIZE],
    lo_encrypt_key: [u8; 32],
    lo_init: [u64; 2],
}

/// `struct loop_config` of include/uapi/linux/loop.h.
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo64,
    reserved: [u64; 8],
}

const EMPTY_INFO: LoopInfo64 = LoopInfo64 {
    lo_device: 0,
    lo_inode: 0,
    lo_rdevice: 0,
    lo_offset: 0,
    lo_sizelimit: 0,
    lo_number: 0,
    lo_encrypt_type: 0,
    lo_encrypt_key_size: 0,
    lo_flags: 0,
    lo_file_name: [0; LO_NAME_SIZE],
    lo_crypt_name: [0; LO_NAME_SIZE],
    lo_encrypt_key: [0; 32],
    lo_init: [0; 2],
};

/// The ioctls, whose numbers are not built as others are.
mod ioctl {
    use super::LoopConfig;

    nix::ioctl_none_bad!(loop_ctl_get_free, 0x4C82);
    nix::ioctl_none_bad!(loop_clr_fd, 0x4C01);
    nix::ioctl_none_bad!(loop_set_capacity, 0x4C07);
    nix::ioctl_write_ptr_bad!(loop_configure, 0x4C0A, LoopConfig);
}

/// When a loop device is detached.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Lifetime {
    /// By the kernel, once nobody has it mounted, open or [held](DiskHold).
    #[default]
    LastClose,
    /// By [`LoopDevice::detach`] alone.
    Detach,
}

/// How to attach.
#[derive(Debug, Clone, Copy, Default)]
pub struct LoopOptions {
    /// Refuse writes.
    pub read_only: bool,
    /// When it is detached.
    pub lifetime: Lifetime,
}

/// One loop device, by its number. Dropping it does not detach.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LoopDevice {
    number: u32,
}

impl LoopDevice {
    /// The device with that number, attached or not.
    pub fn from_number(number: u32) -> Self {
        LoopDevice { number }
    }

    /// The device at `/dev/loopN`, or `None` for another path.
    pub fn from_path(path: &Path) -> Option<Self> {
        let number = path.to_str()?.strip_prefix("/dev/loop")?.parse().ok()?;
        Some(LoopDevice { number })
    }

    /// Its device node.
    pub fn path(self) -> PathBuf {
        self.node().path()
    }

    fn sysfs(self) -> PathBuf {
        self.node().sysfs()
    }

    /// What it is to those who do not care what makes it.
    pub(crate) fn node(self) -> BlockNode {
        BlockNode::new(format!("loop{}", self.number))
    }

    /// Attaches a free loop device to `backing`: direct I/O, 512-byte sectors (so that any ext4
    /// fits), discard passed on, requests of at most 1 MiB. It is held until the caller drops the
    /// second half of the answer.
    ///
    /// # Errors
    /// [`ErrorKind::Missing`] without loop devices in the kernel, [`ErrorKind::InUse`] when other
    /// processes take every free one, [`ErrorKind::Unsupported`] where the backing file refuses
    /// direct I/O.
    pub fn attach(backing: &Path, options: &LoopOptions) -> Result<(LoopDevice, DiskHold)> {
        let file = OpenOptions::new()
            .read(true)
            .write(!options.read_only)
            .custom_flags(libc::O_CLOEXEC | libc::O_NOFOLLOW)
            .open(backing)
            .context(|| format!("{}: cannot be opened", backing.display()))?;
        // Older kernels (6.1) take the size that the inode has in memory, which for a FUSE file is
        // 0 until somebody asked for it.
        file.metadata()
            .context(|| format!("{}: its size cannot be read", backing.display()))?;
        let mut info = EMPTY_INFO;
        info.lo_flags = LO_FLAGS_DIRECT_IO;
        if options.read_only {
            info.lo_flags |= LO_FLAGS_READ_ONLY;
        }
        if options.lifetime == Lifetime::LastClose {
            info.lo_flags |= LO_FLAGS_AUTOCLEAR;
        }
        let config = LoopConfig {
            fd: file.as_raw_fd() as u32,
            block_size: 512,
            info,
            reserved: [0; 8],
        };
        let control = open_control()?;
        for _ in 0..RACES {
            // SAFETY: the ioctl takes no argument and the descriptor is open.
            let number = unsafe { ioctl::loop_ctl_get_free(control.as_raw_fd()) }
                .context(|| format!("{CONTROL}: no free loop device"))?;
            let device = LoopDevice {
                number: number as u32,
            };
            let node = device.node().open(!options.read_only, 0)?;
            // SAFETY: `config` is a loop_config that outlives the call, and the kernel only
            // reads it.
            match unsafe { ioctl::loop_configure(node.as_raw_fd(), &config) } {
                Ok(_) => {
                    device.tune(&node, options.read_only)?;
                    return Ok((device, DiskHold::new(node)));
                }
                // Another process was faster with this number.
                Err(nix::errno::Errno::EBUSY) => {}
                Err(errno) => {
                    return Err(Error::io(
                        format!(
                            "{}: cannot be attached to {}",
                            device.path().display(),
                            backing.display()
                        ),
                        errno.into(),
                    ));
                }
            }
        }
        Err(Error::new(
            ErrorKind::InUse,
            format!("other processes took every free loop device, {RACES} times in a row"),
        ))
    }

    /// Checks that direct I/O is on and that flushes come through, and bounds the size of requests; detaches
    /// on failure.
    fn tune(self, node: &File, read_only: bool) -> Result<()> {
        let result = self.tune_attached(read_only);
        if result.is_err() {
            // SAFETY: the ioctl takes no argument and the descriptor is open.
            let _ = unsafe { ioctl::loop_clr_fd(node.as_raw_fd()) };
        }
        result
    }

    fn tune_attached(self, read_only: bool) -> Result<()> {
        let direct = fs::read_to_string(self.sysfs().join("loop/dio"))
            .context(|| format!("{}: its sysfs entry is missing", self.path().display()))?;
        if direct.trim() != "1" {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!(
                    "{}: the kernel refuses direct I/O on the backing file",
                    self.path().display()
                ),
            ));
        }
        if !read_only {
            self.pass_flushes_on()?;
        }
        let limit = self.sysfs().join("queue/max_sectors_kb");
        let current = fs::read_to_string(&limit).unwrap_or_default();
        if current
            .trim()
            .parse()
            .is_ok_and(|current: u32| current > MAX_SECTORS_KB)
        {
            // Larger requests would only be split, so a refusal costs speed alone.
            if let Err(error) = fs::write(&limit, MAX_SECTORS_KB.to_string()) {
                tracing::warn!("{}: {error}", limit.display());
            }
        }
        Ok(())
    }

    /// Has the kernel send the flushes of its users. Newer kernels (seen with Linux 6.18) go on to send none
    /// where whoever had this number before told them that the device has no cache.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] where that cannot be taken back: what users sync would not be durable.
    fn pass_flushes_on(self) -> Result<()> {
        let switch = self.sysfs().join("queue/write_cache");
        let passes = || fs::read_to_string(&switch).is_ok_and(|mode| mode.trim() == "write back");
        if passes() {
            return Ok(());
        }
        let set = fs::write(&switch, "write back");
        if passes() {
            tracing::warn!(
                "{}: somebody had told the kernel not to flush it: it does now",
                self.path().display()
            );
            return Ok(());
        }
        let why = match set {
            Err(error) => format!(" ({error})"),
            Ok(()) => String::new(),
        };
        Err(Error::new(
            ErrorKind::Unsupported,
            format!(
                "{}: the kernel would not flush it, as whoever had it before left it, and this cannot be \
                 changed from here{why}: `echo write back >{}` on the host",
                self.path().display(),
                switch.display()
            ),
        ))
    }

    /// The path of the backing file as the kernel shows it, or `None` when it is not attached.
    pub fn backing_file(self) -> Option<PathBuf> {
        let mut bytes = fs::read(self.sysfs().join("loop/backing_file")).ok()?;
        if bytes.last() == Some(&b'\n') {
            bytes.pop();
        }
        Some(PathBuf::from(std::ffi::OsStr::from_bytes(&bytes)))
    }

    /// Every loop device that is attached to `backing`, lowest first.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] where sysfs cannot be read.
    pub fn find(backing: &Path) -> Result<Vec<LoopDevice>> {
        let mut found = LoopDevice::attached()?;
        found.retain(|device| device.backing_file().as_deref() == Some(backing));
        Ok(found)
    }

    /// Every attached loop device of the host, lowest first.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] where sysfs cannot be read.
    pub fn attached() -> Result<Vec<LoopDevice>> {
        let entries =
            fs::read_dir("/sys/block").context(|| "/sys/block: cannot be read".to_string())?;
        let mut found: Vec<LoopDevice> = entries
            .flatten()
            .filter_map(|entry| {
                let name = entry.file_name();
                let number = name.to_str()?.strip_prefix("loop")?.parse().ok()?;
                Some(LoopDevice { number })
            })
            .filter(|device| device.sysfs().join("loop").exists())
            .collect();
        found.sort_unstable();
        Ok(found)
    }

    /// Takes the new size of the backing file over, after it grew.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] where the kernel refuses.
    pub fn resize(self) -> Result<()> {
        // A FUSE file's size is known to the kernel from its last GETATTR: ask again.
        if let Some(backing) = self.backing_file() {
            let _ = fs::metadata(backing);
        }
        let node = self.node().open(false, 0)?;
        // SAFETY: the ioctl takes no argument and the descriptor is open.
        unsafe { ioctl::loop_set_capacity(node.as_raw_fd()) }
            .context(|| format!("{}: the new size is refused", self.path().display()))?;
        Ok(())
    }

    /// Detaches, waiting at most `timeout` for openers that come and go (udev). One that is not
    /// attached is fine.
    ///
    /// # Errors
    /// [`ErrorKind::InUse`] while it is mounted or held open; nothing is changed then.
    pub fn detach(self, timeout: Duration) -> Result<()> {
        let node = self.node();
        let mut until_free = UntilFree::new(&node, timeout);
        loop {
            // An exclusive open fails while a mount of any mount namespace holds the device.
            match node.open(false, libc::O_EXCL) {
                Ok(opened) => {
                    // SAFETY: the ioctl takes no argument and the descriptor is open.
                    match unsafe { ioctl::loop_clr_fd(opened.as_raw_fd()) } {
                        Ok(_) | Err(nix::errno::Errno::ENXIO) => {
                            drop(opened);
                            return self.wait_detached(&mut until_free);
                        }
                        Err(nix::errno::Errno::EBUSY) => {}
                        Err(errno) => {
                            return Err(Error::io(
                                format!("{}: cannot be detached", self.path().display()),
                                errno.into(),
                            ));
                        }
                    }
                }
                Err(error) if error.kind() == ErrorKind::InUse => {}
                Err(_) if self.backing_file().is_none() => return Ok(()),
                Err(error) if is_detaching(&error) => return self.wait_detached(&mut until_free),
                Err(error) => return Err(error),
            }
            if !until_free.goes_on() {
                return Err(Error::new(
                    ErrorKind::InUse,
                    format!("{}: {}", self.path().display(), node.user()),
                ));
            }
        }
    }

    /// Detaches as soon as the last opener is gone, which may be now.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] where the kernel refuses.
    pub fn detach_lazily(self) -> Result<()> {
        let node = match self.node().open(false, 0) {
            Ok(node) => node,
            Err(_) if self.backing_file().is_none() => return Ok(()),
            Err(error) if is_detaching(&error) => return Ok(()),
            Err(error) => return Err(error),
        };
        // SAFETY: the ioctl takes no argument and the descriptor is open.
        match unsafe { ioctl::loop_clr_fd(node.as_raw_fd()) } {
            Ok(_) | Err(nix::errno::Errno::ENXIO) => Ok(()),
            Err(errno) => Err(Error::io(
                format!("{}: cannot be detached", self.path().display()),
                errno.into(),
            )),
        }
    }

    /// The kernel detaches at the last close, so another opener may delay it.
    fn wait_detached(self, until_free: &mut UntilFree<'_>) -> Result<()> {
        while self.sysfs().join("loop").exists() {
            if !until_free.goes_on() {
                return Err(Error::new(
                    ErrorKind::InUse,
                    format!(
                        "{}: detaches when it is closed, but {}",
                        self.path().display(),
                        self.node().user()
                    ),
                ));
            }
        }
        Ok(())
    }
}

fn open_control() -> Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_CLOEXEC)
        .open(CONTROL)
        .map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => Error::with_source(
                ErrorKind::Missing,
                format!(
                    "{CONTROL}: no loop devices: `modprobe loop`; where /sys/module/loop is there \
                     already, `mknod {CONTROL} c 10 237`, or, in a container, give it the host's /dev"
                ),
                error,
            ),
            _ => Error::io(format!("{CONTROL}: cannot be opened"), error),
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_have_the_kernels_sizes() {
        assert_eq!(size_of::<LoopInfo64>(), 232);
        assert_eq!(size_of::<LoopConfig>(), 304);
    }

    #[test]
    fn only_paths_of_loop_devices_are_taken_for_one() {
        assert_eq!(
            LoopDevice::from_path(Path::new("/dev/loop12")),
            Some(LoopDevice { number: 12 })
        );
        assert_eq!(LoopDevice::from_path(Path::new("/dev/loop-control")), None);
        assert_eq!(LoopDevice::from_path(Path::new("/dev/sda")), None);
    }

    /// Sets the switch back, whatever happens to the test.
    struct SetBack(PathBuf);

    impl Drop for SetBack {
        fn drop(&mut self) {
            let _ = fs::write(&self.0, "write back");
        }
    }

    /// Newer kernels leave that to the next user of the number.
    #[test]
    fn a_device_that_the_kernel_was_told_not_to_flush_is_flushed_again() {
        let backing = tempfile::NamedTempFile::new().unwrap();
        backing.as_file().set_len(1 << 20).unwrap();
        let (device, _hold) = LoopDevice::attach(backing.path(), &LoopOptions::default()).unwrap();
        // Dropped before the device detaches.
        let switch = SetBack(device.sysfs().join("queue/write_cache"));
        let mode = || fs::read_to_string(&switch.0).unwrap();
        assert_eq!(mode().trim(), "write back");
        fs::write(&switch.0, "write through").unwrap();
        assert_eq!(mode().trim(), "write through");
        device.pass_flushes_on().unwrap();
        assert_eq!(mode().trim(), "write back");
    }
}
