//! The block device that a local client sees, whichever of the kernel's drivers makes it.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Serialize, Serializer};

use crate::block_node::BlockNode;
pub use crate::block_node::DiskHold;
use crate::loop_device::LoopDevice;
use crate::ublk::disk::{Mark, UblkDisk};
use vellum_base::error::{Error, Result};
use vellum_fs::run_dir::RunDir;

/// One block device, there or not. Dropping it does not take it away.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LocalDisk(Kind);

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Kind {
    Loop(LoopDevice),
    Ublk(UblkDisk),
}

/// As the path of its node.
impl Serialize for LocalDisk {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        self.path().serialize(serializer)
    }
}

impl From<LoopDevice> for LocalDisk {
    fn from(device: LoopDevice) -> LocalDisk {
        LocalDisk(Kind::Loop(device))
    }
}

impl From<UblkDisk> for LocalDisk {
    fn from(disk: UblkDisk) -> LocalDisk {
        LocalDisk(Kind::Ublk(disk))
    }
}

impl LocalDisk {
    /// The device at a path in /dev, or `None` for what is none of those that a device of ours can be.
    pub fn from_path(path: &Path) -> Option<LocalDisk> {
        let of_loop = LoopDevice::from_path(path).map(LocalDisk::from);
        of_loop.or_else(|| UblkDisk::from_path(path).map(LocalDisk::from))
    }

    /// The device of that number, major and minor.
    pub fn from_major_minor((major, minor): (u32, u32)) -> Option<LocalDisk> {
        let link = fs::read_link(format!("/sys/dev/block/{major}:{minor}")).ok()?;
        LocalDisk::from_path(&Path::new("/dev").join(link.file_name()?))
    }

    fn node(self) -> BlockNode {
        match self.0 {
            Kind::Loop(device) => device.node(),
            Kind::Ublk(disk) => disk.node(),
        }
    }

    /// Its device node.
    pub fn path(self) -> PathBuf {
        self.node().path()
    }

    /// Its device number, major and minor, as mounts on it show it; `None` where it is not there.
    pub fn major_minor(self) -> Option<(u32, u32)> {
        self.node().major_minor()
    }

    /// Keeps the device there until the answer is dropped, as between an unmount and a mount.
    ///
    /// # Errors
    /// [`Io`](vellum_base::ErrorKind::Io) where it cannot be opened.
    pub fn hold(self) -> Result<DiskHold> {
        self.node().hold()
    }

    /// True while a mount in whatever namespace, or another exclusive opener, has the device.
    ///
    /// # Errors
    /// [`Io`](vellum_base::ErrorKind::Io) where it cannot be opened.
    pub fn is_claimed(self) -> Result<bool> {
        self.node().is_claimed()
    }

    /// Waits until no mount and no other exclusive opener has the device; false when `timeout` passed
    /// first. A copy of a mount may be in a mount namespace that was made at that moment, as by a
    /// server that starts, and goes soon: while it is there, another mount gives the same file system.
    ///
    /// # Errors
    /// As [`LocalDisk::is_claimed`].
    pub fn wait_unclaimed(self, timeout: Duration) -> Result<bool> {
        self.node().wait_unclaimed(timeout)
    }

    /// A number that no other device has in this boot, nor this one when it is attached again; `None`
    /// before Linux 5.15.
    pub fn diskseq(self) -> Option<u64> {
        self.node().diskseq()
    }

    /// Size in bytes.
    ///
    /// # Errors
    /// [`Io`](vellum_base::ErrorKind::Io) where sysfs has no such device.
    pub fn size(self) -> Result<u64> {
        self.node().size()
    }

    /// Who keeps the device from being detached, as far as can be found out, and what to do.
    pub fn user(self) -> String {
        self.node().user()
    }

    /// Has the kernel see that what is behind it grew to `size` bytes. Under a writer it may take a few
    /// attempts.
    ///
    /// # Errors
    /// [`Unsupported`](vellum_base::ErrorKind::Unsupported) where the kernel cannot,
    /// [`Io`](vellum_base::ErrorKind::Io) where it refuses.
    pub fn resize(self, size: u64) -> Result<()> {
        match self.0 {
            Kind::Loop(device) => device.resize(),
            Kind::Ublk(disk) => disk.resize(size),
        }
    }

    /// Takes the device of `run_dir` away, waiting at most `timeout` for openers that come and go (udev).
    /// One that is not there is fine.
    ///
    /// # Errors
    /// [`InUse`](vellum_base::ErrorKind::InUse) while it is mounted or held open; nothing is changed then.
    pub(crate) fn detach(self, run_dir: &RunDir, timeout: Duration) -> Result<()> {
        match self.0 {
            Kind::Loop(device) => device.detach(timeout),
            Kind::Ublk(disk) => disk.detach(Mark::of(run_dir), timeout),
        }
    }

    /// Takes it away as soon as nobody has it open; a ublk device goes by [`LocalDisk::abort`] alone, since its
    /// number may be another's then.
    ///
    /// # Errors
    /// [`Io`](vellum_base::ErrorKind::Io) where the kernel refuses.
    pub(crate) fn detach_lazily(self) -> Result<()> {
        match self.0 {
            Kind::Loop(device) => device.detach_lazily(),
            Kind::Ublk(_) => Ok(()),
        }
    }

    /// Fails the requests to the device of `run_dir` that wait for a server which will not come. It is gone
    /// then.
    ///
    /// # Errors
    /// [`Io`](vellum_base::ErrorKind::Io) where the kernel refuses.
    pub(crate) fn abort(self, run_dir: &RunDir) -> Result<()> {
        match self.0 {
            // What is below it fails them.
            Kind::Loop(_) => Ok(()),
            Kind::Ublk(disk) => disk.delete_marked(Mark::of(run_dir)),
        }
    }

    /// True where the kernel keeps it, and lets its users wait, when its server is dead.
    pub(crate) fn outlives_its_server(self) -> bool {
        matches!(self.0, Kind::Ublk(_))
    }

    /// True while the kernel has it attached.
    pub(crate) fn is_attached(self) -> bool {
        match self.0 {
            Kind::Loop(device) => device.backing_file().is_some(),
            Kind::Ublk(disk) => disk.node().sysfs().exists(),
        }
    }

    /// Whether the kernel's notes about the device show that it is still what `backing` was attached to;
    /// only for kernels that do not count attachments, which have no ublk.
    pub(crate) fn is_backed_by(self, backing: &Path) -> bool {
        match self.0 {
            Kind::Loop(device) => device.backing_file().as_deref() == Some(backing),
            Kind::Ublk(_) => false,
        }
    }

    /// True where a Vellum serves it: the backing file of a loop device is one of `served`, or a ublk device
    /// has our mark.
    pub fn is_served_by_vellum(self, served: &[&Path]) -> bool {
        match self.0 {
            Kind::Loop(device) => {
                let file = device.backing_file();
                file.is_some_and(|file| served.contains(&file.as_path()))
            }
            Kind::Ublk(disk) => disk.is_ours(),
        }
    }
}

/// The device at a path that must be one.
///
/// # Errors
/// An internal error for another path.
pub fn at(path: &Path) -> Result<LocalDisk> {
    LocalDisk::from_path(path)
        .ok_or_else(|| Error::internal(format!("{}: no block device of ours", path.display())))
}
