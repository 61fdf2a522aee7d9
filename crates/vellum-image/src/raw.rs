//! Disk images: what they hold, told by libblkid, and the formats that are not raw, by name.

use std::fmt;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::Path;
use std::process::{Command, Stdio};

use super::disk::{DiskImage, size_of};
use vellum_base::error::ResultExt;
use vellum_base::{Error, ErrorKind, Result};

/// Bytes in a sector: the least that disks are made of.
const SECTOR: u64 = 512;

/// What a disk image shows.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Holds {
    /// A file system over all of it, in libblkid's spelling: `ext4`, `xfs`.
    FileSystem(String),
    /// A partition table: `gpt`, `dos`.
    Partitions(String),
    /// Something else that libblkid knows: `swap`, `crypto_LUKS`, `LVM2_member`.
    Other(String),
    /// Nothing but zeros.
    Blank,
}

impl fmt::Display for Holds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Holds::FileSystem(name) => write!(f, "a file system of type {name}"),
            Holds::Partitions(name) => write!(f, "a partition table of type {name}"),
            Holds::Other(name) => write!(f, "{name}"),
            Holds::Blank => f.write_str("nothing but zeros"),
        }
    }
}

/// A file or block device as a disk. Unless the user `insists`, it must show what it is.
pub(super) fn open(path: &Path, mut file: File, insists: bool) -> Result<DiskImage> {
    let size = size_of(&mut file)?;
    if size == 0 {
        return Err(Error::new(ErrorKind::InvalidInput, "it is empty"));
    }
    if !insists {
        refuse_by_name(path, &file, size)?;
    }
    let probed = probe(&file);
    let mut disk = DiskImage::new(path, size, Box::new(file));
    disk.holds = match probed {
        Ok(None) if disk.is_blank()? => Some(Holds::Blank),
        Err(error) if insists => {
            tracing::warn!(%error, "what the disk image holds is not known");
            None
        }
        other => other?,
    };
    if disk.holds.is_none() && !insists {
        return Err(Error::new(
            ErrorKind::Unsupported,
            "it is nothing that can be imported: neither a tar (plain, gzip, zstd), an OCI layout \
             or archive, a Docker archive, a directory, nor a disk image that shows a file system \
             or a partition table. If it is a disk all the same, give --format raw",
        ));
    }
    check_sectors(&disk)?;
    Ok(disk)
}

/// Refuses a disk that ends within a sector.
pub(super) fn check_sectors(disk: &DiskImage) -> Result<()> {
    if disk.size.is_multiple_of(SECTOR) {
        return Ok(());
    }
    let what = match &disk.holds {
        Some(holds) => format!("it holds {holds}, but it"),
        None => "it".to_owned(),
    };
    Err(Error::new(
        ErrorKind::Unsupported,
        format!(
            "{what} has {} bytes, and a disk has whole sectors of 512: it is cut off, or \
             truncate -s %512 {} fills it up",
            disk.size,
            disk.path.display()
        ),
    ))
}

/// Formats of disk images with their marks: where, the bytes, whose, and qemu-img's word.
const FOREIGN: [(u64, &[u8], &str, &str); 13] = [
    (0, b"QFI\xfb\0\0\0\x01", "QEMU's old qcow", "qcow"),
    (0, b"QFI\xfb", "QEMU's qcow2", "qcow2"),
    (0, b"QED\0", "QEMU's QED", "qed"),
    (0, b"KDMV", "VMware's VMDK", "vmdk"),
    (0, b"COWD", "VMware's VMDK", "vmdk"),
    (0, b"# Disk DescriptorFile", "VMware's VMDK", "vmdk"),
    (0, b"vhdxfile", "Hyper-V's VHDX", "vhdx"),
    (0, b"conectix", "Virtual PC's VHD", "vpc"),
    (0x40, b"\x7f\x10\xda\xbe", "VirtualBox's VDI", "vdi"),
    (0, b"WithoutFreeSpace", "Parallels'", "parallels"),
    (0, b"WithouFreSpacExt", "Parallels'", "parallels"),
    (0, b"Bochs Virtual HD Image", "Bochs'", "bochs"),
    (0, b"#!/bin/sh\n#V2.0 Format", "cloop's", "cloop"),
];

/// Marks in the last sector.
const FOREIGN_TAIL: [(&[u8], &str, &str); 2] = [
    (b"conectix", "Virtual PC's VHD", "vpc"),
    (b"koly", "Apple's DMG", "dmg"),
];

/// Refuses disk images that are not raw, and tars that are damaged, by name.
fn refuse_by_name(path: &Path, file: &File, size: u64) -> Result<()> {
    let at = |offset: u64, magic: &[u8]| -> Result<bool> {
        let mut bytes = vec![0; magic.len()];
        if size < offset + magic.len() as u64 {
            return Ok(false);
        }
        file.read_exact_at(&mut bytes, offset)
            .context(|| "reading its first bytes")?;
        Ok(bytes == magic)
    };
    let kind = file.metadata().context(|| "looking at it")?.file_type();
    let foreign = |whose: &str, name: &str| {
        if name == "qcow2" && kind.is_block_device() {
            // In a file it is read, if its version is one that is. A device's bytes may be a guest's, who
            // could name any file as the one below.
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!(
                    "it is a block device that holds a disk image in {whose} format: give --format \
                     qcow2, or raw for its bytes as they are"
                ),
            ));
        }
        Err(Error::new(
            ErrorKind::Unsupported,
            format!(
                "it is a disk image in {whose} format: make it raw first with \
                 qemu-img convert -f {name} -O raw {} NEW.raw",
                path.display()
            ),
        ))
    };
    if at(0, b"VELLUMBK")? {
        return Err(Error::new(
            ErrorKind::Unsupported,
            format!(
                "it is a backup of a container: vellum restore NAME {} makes one of it",
                path.display()
            ),
        ));
    }
    for (offset, magic, whose, name) in FOREIGN {
        if at(offset, magic)? {
            return foreign(whose, name);
        }
    }
    for (magic, whose, name) in FOREIGN_TAIL {
        if size >= SECTOR && at(size - SECTOR, magic)? {
            return foreign(whose, name);
        }
    }
    if at(257, b"ustar")? {
        return Err(Error::new(
            ErrorKind::Corrupt,
            "it looks like a tar, but the checksum of its first header is wrong: it is damaged",
        ));
    }
    Ok(())
}

/// Asks libblkid what a disk holds; `None` where it knows nothing.
///
/// # Errors
/// `Missing` without blkid(8).
pub(super) fn probe(file: &File) -> Result<Option<Holds>> {
    let input = file.try_clone().context(|| "opening it for blkid")?;
    let output = Command::new("blkid")
        // Probing alone, without a cache; standard input is opened anew by that name.
        .args(["-p", "-o", "export", "/dev/stdin"])
        .env("PATH", "/usr/sbin:/sbin:/usr/local/sbin:/usr/bin:/bin")
        .env("LC_ALL", "C")
        .stdin(Stdio::from(input))
        .output()
        .map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => Error::with_source(
                ErrorKind::Missing,
                "blkid: not installed (Debian: apt-get install util-linux)",
                error,
            ),
            _ => Error::io("blkid: cannot be run", error),
        })?;
    match output.status.code() {
        Some(0) => Ok(parse(&String::from_utf8_lossy(&output.stdout))),
        // Nothing that it knows.
        Some(2) => Ok(None),
        // Marks of several things, as on a disk that was formatted anew.
        Some(8) => Ok(Some(Holds::Other(
            "marks of several file systems (see wipefs -n)".into(),
        ))),
        _ => Err(Error::new(
            ErrorKind::Command,
            format!(
                "blkid: {}: {}",
                output.status,
                String::from_utf8_lossy(&output.stderr).trim()
            ),
        )),
    }
}

/// Reads what `blkid -o export` prints.
fn parse(text: &str) -> Option<Holds> {
    let value = |key: &str| {
        let mut lines = text.lines();
        lines.find_map(|line| line.strip_prefix(key)?.strip_prefix('='))
    };
    match (value("TYPE"), value("USAGE"), value("PTTYPE")) {
        (Some(name), Some("filesystem"), _) => Some(Holds::FileSystem(name.into())),
        (_, _, Some(table)) => Some(Holds::Partitions(table.into())),
        (Some(name), _, None) => Some(Holds::Other(name.into())),
        (None, _, None) => None,
    }
}

/// What the beginning of a stream shows, for a message.
pub(super) fn holds_in(head: &[u8], spool: &Path) -> Option<Holds> {
    let mut file = tempfile::tempfile_in(spool).ok()?;
    file.write_all(head).ok()?;
    probe(&file).ok()?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_blkid_says_is_read() {
        let ext4 = "DEVNAME=x\nUUID=1\nTYPE=ext4\nUSAGE=filesystem\n";
        assert_eq!(parse(ext4), Some(Holds::FileSystem("ext4".into())));
        let gpt = "DEVNAME=x\nPTUUID=1\nPTTYPE=gpt\n";
        assert_eq!(parse(gpt), Some(Holds::Partitions("gpt".into())));
        let hybrid = "TYPE=iso9660\nUSAGE=filesystem\nPTTYPE=dos\n";
        assert_eq!(parse(hybrid), Some(Holds::FileSystem("iso9660".into())));
        let luks = "TYPE=crypto_LUKS\nUSAGE=crypto\n";
        assert_eq!(parse(luks), Some(Holds::Other("crypto_LUKS".into())));
        assert_eq!(parse("DEVNAME=x\n"), None);
    }
}
