//! The files of an ext4 as its blocks say, without mounting it: inodes, directories, extended
//! attributes, contents; and what two states of one file system differ in.
//!
//! It is for file systems that are whole: unmounted in order, frozen, or once their journal is replayed in
//! memory ([`Replayed`]). What has features that are not known here is refused, and so are bytes that
//! contradict their checksums or each other: whoever asks mounts it then, and has the kernel's word.
//!
//! Source: the kernel's Documentation/filesystems/ext4. The crates that read ext4 (`ext4-view`, `ext4`)
//! read by path: they know neither where a file lies nor what two states of a file system share.

mod canonical;
mod changed;
mod checksum;
mod content;
mod directory;
mod extents;
mod inode;
mod journal;
mod layout;
mod metadata;
mod parents;
mod xattrs;

pub use canonical::{Apart, Sink, lay_out};
pub use changed::{Changed, changed};
pub use content::{Contents, differences};
pub use directory::Entry;
pub use inode::{Inode, Timestamp};
pub use journal::Replayed;
pub use metadata::{Piece, Purpose, metadata};
pub use xattrs::Xattrs;

use layout::{Group, Layout};
use vellum_base::block::{BlockDevice, in_memory};
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};

/// The number of the root directory's inode.
pub const ROOT: u32 = 2;

/// Where blocks are read from.
pub trait Source: Sync {
    /// Bytes that there are.
    fn bytes(&self) -> u64;

    /// Fills `buf` with the bytes from `offset` on.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfRange`] beyond the end, [`ErrorKind::Io`] and others of the storage.
    fn fill(&self, buf: &mut [u8], offset: u64) -> Result<()>;
}

impl<T: BlockDevice> Source for T {
    fn bytes(&self) -> u64 {
        self.size()
    }

    fn fill(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.read_at(buf, offset)
    }
}

/// An ext4, read from its blocks.
pub struct FileSystem<'a> {
    source: &'a dyn Source,
    layout: Layout,
    groups: Vec<Group>,
}

impl<'a> FileSystem<'a> {
    /// Reads the superblock and the descriptors of all groups.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] for what is no ext4, has errors noted, features that are not known here
    /// or files that a mount would change; [`ErrorKind::Corrupt`] where it contradicts itself; as
    /// [`Source::fill`].
    pub fn open(source: &'a Replayed<'_>) -> Result<Self> {
        let files = Self::as_it_lies(source, source.is_recovered())?;
        if source.is_recovered() {
            files.check_orphans()?;
        }
        Ok(files)
    }

    /// As [`FileSystem::open`], also with files that a mount would still delete. The journal has been replayed, or does
    /// not matter, where that is `replayed`.
    fn as_it_lies(source: &'a dyn Source, replayed: bool) -> Result<Self> {
        let (layout, groups) = layout::read(source, replayed)?;
        Ok(FileSystem {
            source,
            layout,
            groups,
        })
    }

    /// Bytes in a block of the file system.
    pub fn block_size(&self) -> u64 {
        self.layout.block_size
    }

    /// The bytes of `count` blocks from `first` on.
    fn blocks(&self, first: u64, count: u64) -> Result<Vec<u8>> {
        let end = first.checked_add(count);
        if end.is_none_or(|end| end > self.layout.blocks) {
            return Err(corrupt(format!(
                "{count} blocks from {first} lie beyond its end"
            )));
        }
        let mut bytes = vec![0; in_memory(count * self.layout.block_size)];
        self.source
            .fill(&mut bytes, first * self.layout.block_size)
            .context(|| format!("reading {count} blocks of an ext4 from {first}"))?;
        Ok(bytes)
    }
}

fn corrupt(what: impl std::fmt::Display) -> Error {
    Error::new(
        ErrorKind::Corrupt,
        format!("the ext4 makes no sense: {what}"),
    )
}

fn unknown(what: impl std::fmt::Display) -> Error {
    Error::new(
        ErrorKind::Unsupported,
        format!("the ext4 can only be read by mounting it: {what}"),
    )
}
