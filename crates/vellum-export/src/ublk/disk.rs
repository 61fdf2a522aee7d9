//! The block devices that ublk shows, and whose they are.

use std::fs;
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use super::abi::DeviceId;
use super::control::Control;
use crate::block_node::{BlockNode, DiskHold, is_detaching};
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_fs::held_dir::Place;
use vellum_fs::run_dir::RunDir;

/// Every device has an entry here, started or not.
const CLASS: &str = "/sys/class/ublk-char";
/// How long udev may take to show a node.
const SHOWN: Duration = Duration::from_secs(5);
/// The kernel looks once in so many milliseconds whether a server died that had every request a device can
/// have: nothing else tells it before Linux 6.15.
const LOOK_MS: &str = "1000";

/// The number that the devices of this program are marked with, so that whoever finds one knows whose it is
/// although every note about it is lost: 16 bits for this program, 24 for the name of the run directory, and
/// 24 for which directory that is, since a copy of one has its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Mark {
    bits: u64,
    /// Those of the bits that are known.
    mask: u64,
}

impl Mark {
    const MAGIC: u64 = 0x5645 << 48;
    const OURS: u64 = 0xffff << 48;
    const PLACE: u64 = (1 << 24) - 1;

    /// Of the device of `run_dir`, whose disk may fail.
    pub(crate) fn of(run_dir: &RunDir) -> Mark {
        Mark::new(run_dir.name().as_encoded_bytes(), run_dir.place().ok())
    }

    fn new(name: &[u8], place: Option<Place>) -> Mark {
        // Any odd number spreads the bits; this is 2^64 divided by the golden ratio.
        const SPREAD: u64 = 0x9e37_79b9_7f4a_7c15;
        let mix = |hash: u64, word: u64| (hash ^ word).wrapping_mul(SPREAD).rotate_left(29);
        let name = name
            .iter()
            .fold(0, |hash, byte| mix(hash, u64::from(*byte)));
        let bits = Mark::MAGIC | (name >> 40) << 24;
        match place {
            Some(place) => Mark {
                bits: bits | mix(mix(0, place.ino), place.dev) >> 40,
                mask: u64::MAX,
            },
            None => Mark {
                bits,
                mask: !Mark::PLACE,
            },
        }
    }

    pub(crate) fn bits(self) -> u64 {
        self.bits
    }

    /// True where a device is marked so.
    pub(super) fn matches(self, bits: u64) -> bool {
        bits & self.mask == self.bits & self.mask
    }
}

/// One block device of ublk. Dropping it does not delete it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct UblkDisk(pub(crate) DeviceId);

impl UblkDisk {
    /// The device at `/dev/ublkbN`, or `None` for another path.
    pub(crate) fn from_path(path: &Path) -> Option<Self> {
        let number = path.to_str()?.strip_prefix("/dev/ublkb")?.parse().ok()?;
        Some(UblkDisk(DeviceId(number)))
    }

    pub(crate) fn node(self) -> BlockNode {
        BlockNode::new(format!("ublkb{}", self.0.0))
    }

    /// True where it was made by this program.
    pub(crate) fn is_ours(self) -> bool {
        let mark = Control::open().and_then(|control| control.mark(self.0));
        matches!(mark, Ok(Some(bits)) if bits & Mark::OURS == Mark::MAGIC)
    }

    /// Opens it, once its node is there.
    ///
    /// # Errors
    /// [`ErrorKind::Missing`] where that does not come.
    pub(crate) fn hold_when_shown(self) -> Result<DiskHold> {
        let deadline = Instant::now() + SHOWN;
        loop {
            match self.node().open(false, 0) {
                Err(error) if error.kind() == ErrorKind::Missing && Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                opened => return opened.map(DiskHold::new),
            }
        }
    }

    /// Has the kernel look often whether its server lives. Best effort: without it that takes 30 seconds.
    pub(crate) fn look_often(self) {
        let path = self.node().sysfs().join("queue/io_timeout");
        if let Err(error) = fs::write(&path, LOOK_MS) {
            tracing::warn!("{}: {error}", path.display());
        }
    }

    /// True while requests wait for an answer.
    pub(crate) fn has_requests(self) -> bool {
        let text = fs::read_to_string(self.node().sysfs().join("inflight")).unwrap_or_default();
        text.split_ascii_whitespace().any(|number| number != "0")
    }

    /// Every device that has this mark.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] where the kernel does not answer.
    pub(crate) fn find(mark: Mark) -> Result<Vec<UblkDisk>> {
        let ids = all()?;
        if ids.is_empty() {
            return Ok(Vec::new());
        }
        let control = match Control::open() {
            // A container's own /dev may lack it.
            Err(error) if error.kind() == ErrorKind::Unsupported => return Ok(Vec::new()),
            other => other?,
        };
        let mut found = Vec::new();
        for id in ids {
            match control.mark(id) {
                Ok(Some(bits)) if mark.matches(bits) => found.push(UblkDisk(id)),
                Err(error) if error.kind() == ErrorKind::Timeout => return Err(error),
                // Of one that a user without rights made the kernel does not tell.
                _ => {}
            }
        }
        Ok(found)
    }

    /// Grows it to `size` bytes.
    ///
    /// # Errors
    /// As [`Control::update_size`].
    pub(crate) fn resize(self, size: u64) -> Result<()> {
        Control::open()?.update_size(self.0, size)
    }

    /// Deletes it, waiting at most `timeout` for openers that come and go (udev).
    ///
    /// # Errors
    /// [`ErrorKind::InUse`] while it is mounted or held open; nothing is changed then.
    pub(crate) fn detach(self, mark: Mark, timeout: Duration) -> Result<()> {
        match self.node().wait_unclaimed(timeout) {
            Ok(true) => self.delete_marked(mark),
            Ok(false) => Err(Error::new(
                ErrorKind::InUse,
                format!("{}: {}", self.node().path().display(), self.node().user()),
            )),
            Err(error) if is_detaching(&error) || error.kind() == ErrorKind::NotFound => {
                self.delete_marked(mark)
            }
            Err(error) => Err(error),
        }
    }

    /// Deletes it where it has this mark, now: whoever has it open gets I/O errors. The number may be
    /// another's by now.
    ///
    /// # Errors
    /// As [`Control::delete`].
    pub(crate) fn delete_marked(self, mark: Mark) -> Result<()> {
        let control = Control::open()?;
        match control.mark(self.0)? {
            Some(bits) if mark.matches(bits) => control.delete(self.0),
            _ => Ok(()),
        }
    }
}

/// The numbers of all devices.
fn all() -> Result<Vec<DeviceId>> {
    let entries = match fs::read_dir(CLASS) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).context(|| CLASS.to_owned()),
    };
    let names = entries.flatten().map(|entry| entry.file_name());
    Ok(names
        .filter_map(|name| name.to_str()?.strip_prefix("ublkc")?.parse().ok())
        .map(DeviceId)
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_paths_of_ublk_devices_are_taken_for_one() {
        let disk = UblkDisk::from_path(Path::new("/dev/ublkb12")).unwrap();
        assert_eq!(disk.node().path(), Path::new("/dev/ublkb12"));
        assert_eq!(UblkDisk::from_path(Path::new("/dev/ublkc1")), None);
        assert_eq!(UblkDisk::from_path(Path::new("/dev/ublk-control")), None);
    }

    #[test]
    fn marks_tell_run_directories_and_copies_of_them_apart() {
        let place = |ino| Some(Place { dev: 1, ino });
        let mark = Mark::new(b"a", place(2));
        assert!(mark.matches(Mark::new(b"a", place(2)).bits()));
        assert!(!mark.matches(Mark::new(b"b", place(2)).bits()));
        assert!(!mark.matches(Mark::new(b"a", place(3)).bits()), "a copy");
        assert_eq!(mark.bits() & Mark::OURS, Mark::MAGIC);
        let failed_disk = Mark::new(b"a", None);
        assert!(failed_disk.matches(mark.bits()));
        assert!(!failed_disk.matches(Mark::new(b"b", place(2)).bits()));
        assert!(!failed_disk.matches(0));
    }
}
