//! Disk images in QEMU's format qcow2, read and written.
//!
//! The crate `imago` reads and writes them. What it does not know of the format (clusters compressed with
//! zstd, extended L2 entries, images that were not closed in order) qemu-img(1) reads instead. Which
//! files an image is made of neither of them decides: [`chain`] finds them, and both are told.

mod chain;
mod convert;
mod header;
mod read;
mod tables;
mod write;

pub use write::{Qcow2Writer, cluster_size};

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;

use nix::sys::memfd::{MFdFlags, memfd_create};

use super::disk::DiskImage;
use super::raw;
use super::source::SourceOptions;
use vellum_base::error::ResultExt;
use vellum_base::{Error, ErrorKind, Result};

/// What is copied of either end of a disk to find out what it holds, in bytes: partition tables, RAID
/// and file systems have their marks there.
const ENDS: u64 = 2 << 20;

/// Whether a file that begins with `head` is a qcow2, of a version that is read here.
pub(super) fn is_one(head: &[u8]) -> bool {
    header::has_magic(head)
}

/// Opens the qcow2 at `path`, with the files that it is based on, as far as `options` allow them.
///
/// # Errors
/// `Permission` for a backing file that is not allowed; `Unsupported` for a feature that is not read;
/// `Corrupt` for an image that contradicts itself; `Missing` where qemu-img is needed and not installed.
pub(super) fn open(path: &Path, file: File, options: &SourceOptions) -> Result<DiskImage> {
    let links = chain::find(file, &options.allow_backing)?;
    let size = links.size;
    let mut disk = match links.needs_qemu() {
        None => DiskImage::new(path, size, Box::new(read::Qcow2::open(links)?)),
        Some(why) => {
            let raw = convert::to_raw(&links, why, &options.spool)?;
            DiskImage::new(path, size, Box::new(raw))
        }
    };
    disk.holds = raw::probe(&ends_of(&disk)?)?;
    if disk.holds.is_none() && disk.is_blank()? {
        disk.holds = Some(raw::Holds::Blank);
    }
    raw::check_sectors(&disk)?;
    Ok(disk)
}

/// Both ends of a disk in a file of its size in memory, for blkid(8).
fn ends_of(disk: &DiskImage) -> Result<File> {
    let doing = || "copying both ends of the disk";
    let name = "vellum-disk";
    let ends = memfd_create(name, MFdFlags::MFD_CLOEXEC).context(doing)?;
    let mut ends = File::from(ends);
    ends.set_len(disk.size).context(doing)?;
    let head = disk.size.min(ENDS);
    let mut buffer = vec![0; head as usize];
    disk.read_at(&mut buffer, 0)?;
    ends.write_all(&buffer).context(doing)?;
    let tail = (disk.size - head).min(ENDS);
    buffer.truncate(tail as usize);
    disk.read_at(&mut buffer, disk.size - tail)?;
    ends.write_all_at(&buffer, disk.size - tail)
        .context(doing)?;
    Ok(ends)
}

fn corrupt(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::Corrupt, what)
}

fn cut_off() -> Error {
    corrupt("it is cut off: some of what its tables refer to lies beyond its end")
}
