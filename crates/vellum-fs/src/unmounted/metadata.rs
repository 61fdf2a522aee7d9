//! Where the blocks of a file system lie that are no contents of files: what a mount, the lookup of any path
//! and stat(2) read, and what the kernel reads before it writes.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;

use super::extents::Blocks;
use super::inode::Inode;
use super::{FileSystem, ROOT, Replayed, Source, corrupt};
use vellum_base::error::{ErrorKind, Result};
use vellum_base::interrupt;

/// The inodes of quotas for users and groups, whose content a mount reads.
const QUOTAS: [u32; 2] = [3, 4];

/// What blocks are read for; those come first without which the others are of no use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Purpose {
    /// A mount: the superblock, group descriptors, the journal's superblock, what is to be replayed of the
    /// journal, and the content of inodes that the file system keeps for itself.
    Mount,
    /// Inodes: their tables, as far as they may be in use.
    Inodes,
    /// Names: directories, and where these lie.
    Names,
    /// What an inode has elsewhere: extended attributes, targets of long links, and where the content of
    /// files lies.
    Files,
    /// What is free, read before something is written: bitmaps of blocks and inodes.
    Bitmaps,
}

/// Bytes of a file system, and what they are for.
pub type Piece = (Purpose, Range<u64>);

/// Finds all metadata of the ext4 on `source`, in no order, with ranges that may meet. Of inodes that are kept in a
/// way that is not known here there is the inode alone.
///
/// # Errors
/// [`ErrorKind::Unsupported`] for what is no ext4, or one with features that are not known here;
/// [`ErrorKind::Corrupt`] where it contradicts itself; as [`Source::fill`].
pub fn metadata(source: &dyn Source) -> Result<Vec<Piece>> {
    let noting = Noting {
        source,
        read: Mutex::default(),
        is_over: AtomicBool::new(false),
    };
    let replayed = Replayed::new(&noting)?;
    // Files that a mount would still delete have no names, so they make no difference here.
    let files = FileSystem::as_it_lies(&replayed, replayed.is_recovered())?;
    let mut found = Found::new(&files);
    // From here on nothing is noted.
    noting.is_over.store(true, Ordering::Relaxed);
    let read = std::mem::take(&mut *noting.read.lock());
    let read = read.into_iter().map(|range| (Purpose::Mount, range));
    found.pieces.extend(read);
    for block in replayed.journaled() {
        found.add(Purpose::Mount, block, 1);
    }
    found.own()?;
    for number in 0..files.groups.len() {
        found.group(number)?;
    }
    Ok(found.pieces)
}

/// Notes what is read.
struct Noting<'a> {
    source: &'a dyn Source,
    read: Mutex<Vec<Range<u64>>>,
    is_over: AtomicBool,
}

impl Source for Noting<'_> {
    fn bytes(&self) -> u64 {
        self.source.bytes()
    }

    fn fill(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.source.fill(buf, offset)?;
        if !self.is_over.load(Ordering::Relaxed) {
            let mut read = self.read.lock();
            read.push(offset..offset + buf.len() as u64);
        }
        Ok(())
    }
}

struct Found<'a> {
    files: &'a FileSystem<'a>,
    pieces: Vec<Piece>,
}

impl<'a> Found<'a> {
    fn new(files: &'a FileSystem<'a>) -> Self {
        Found {
            files,
            pieces: Vec::new(),
        }
    }

    fn bytes(&self, first: u64, count: u64) -> Range<u64> {
        let size = self.files.block_size();
        // They lie within the file system, which is no longer than its device.
        first * size..(first + count) * size
    }

    fn add(&mut self, purpose: Purpose, first: u64, count: u64) {
        let bytes = self.bytes(first, count);
        self.pieces.push((purpose, bytes));
    }

    /// What the file system keeps for itself, but for what each group has.
    fn own(&mut self) -> Result<()> {
        let layout = &self.files.layout;
        for block in &layout.descriptors {
            self.add(Purpose::Mount, *block, 1);
        }
        if let Some(number) = layout.journal.filter(|number| *number != 0)
            && let Some(journal) = self.files.inode(number)?
        {
            let blocks = self.files.blocks_of(&journal)?;
            for node in blocks.tree {
                self.add(Purpose::Mount, node, 1);
            }
            let first = blocks.content.first();
            let first = first.ok_or_else(|| corrupt("its journal has no blocks"))?;
            self.add(Purpose::Mount, first.physical, 1);
        }
        for number in QUOTAS.into_iter().chain(layout.nameless) {
            if number != 0
                && let Some(inode) = self.files.inode(number)?
            {
                self.all_of(&inode, Purpose::Mount)?;
            }
        }
        Ok(())
    }

    /// A group's bitmaps, its inodes, and what these have elsewhere.
    fn group(&mut self, number: usize) -> Result<()> {
        interrupt::check()?;
        let files = self.files;
        let group = files.group(number)?;
        self.add(Purpose::Bitmaps, group.block_bitmap, 1);
        self.add(Purpose::Bitmaps, group.inode_bitmap, 1);
        for chunk in files.chunks_of(number, group) {
            self.add(Purpose::Inodes, chunk.blocks.start, chunk.len());
            for inode in files.inodes_in(&chunk, |_| true)? {
                self.inode(&inode)?;
            }
        }
        Ok(())
    }

    fn inode(&mut self, inode: &Inode) -> Result<()> {
        if inode.number() < self.files.layout.first_inode && inode.number() != ROOT {
            return Ok(());
        }
        if let Some(block) = inode.xattr_block()
            && block < self.files.layout.blocks
        {
            self.add(Purpose::Files, block, 1);
        }
        if inode.is_directory() {
            return self.all_of(inode, Purpose::Names);
        }
        if !inode.is_file() || inode.is_value() {
            return self.all_of(inode, Purpose::Files);
        }
        for node in self.blocks_of(inode)?.tree {
            self.add(Purpose::Files, node, 1);
        }
        Ok(())
    }

    /// All blocks of an inode.
    fn all_of(&mut self, inode: &Inode, purpose: Purpose) -> Result<()> {
        let blocks = self.blocks_of(inode)?;
        for node in blocks.tree {
            self.add(purpose, node, 1);
        }
        for extent in blocks.content {
            self.add(purpose, extent.physical, extent.len);
        }
        Ok(())
    }

    /// None of an inode whose blocks are kept in a way that is not known here.
    fn blocks_of(&self, inode: &Inode) -> Result<Blocks> {
        match self.files.blocks_of(inode) {
            Err(error) if error.kind() == ErrorKind::Unsupported => Ok(Blocks::default()),
            blocks => blocks,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{FileExt, symlink};
    use std::process::Command;
    use vellum_base::error::Error;

    /// A device of which only some bytes are here.
    struct Only {
        file: std::fs::File,
        here: Vec<Range<u64>>,
    }

    impl Source for Only {
        fn bytes(&self) -> u64 {
            self.file.metadata().unwrap().len()
        }

        fn fill(&self, buf: &mut [u8], offset: u64) -> Result<()> {
            for block in (offset..offset + buf.len() as u64).step_by(1024) {
                if !self.here.iter().any(|range| range.contains(&block)) {
                    return Err(Error::new(ErrorKind::Absent, format!("byte {block}")));
                }
            }
            self.file.read_exact_at(buf, offset).unwrap();
            Ok(())
        }
    }

    /// A file system with some of everything, in blocks of that size.
    fn made(block_size: u64) -> (tempfile::TempDir, std::fs::File) {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        std::fs::create_dir(&root).unwrap();
        for name in 0..30 {
            let below = root.join(format!("dir{name}/below"));
            std::fs::create_dir_all(&below).unwrap();
            std::fs::write(below.join("file"), vec![name + 1; 30_000]).unwrap();
        }
        for name in 0..400 {
            std::fs::write(root.join(format!("dir0/a-rather-long-name-{name}")), "").unwrap();
        }
        symlink("x".repeat(300), root.join("long")).unwrap();
        let image = dir.path().join("image");
        std::fs::File::create(&image)
            .unwrap()
            .set_len(64 << 20)
            .unwrap();
        let made = Command::new("mke2fs")
            .args(["-q", "-t", "ext4", "-b", &block_size.to_string(), "-d"])
            .args([&root, &image])
            .status()
            .unwrap();
        assert!(made.success());
        let file = std::fs::File::open(&image).unwrap();
        (dir, file)
    }

    /// Reads all names and attributes below a directory, and says where the contents of files lie.
    fn walk(files: &FileSystem<'_>, number: u32, contents: &mut Vec<Range<u64>>) -> usize {
        let size = files.block_size();
        let mut found = 0;
        let directory = files.inode(number).unwrap().unwrap();
        for entry in files.list(&directory).unwrap() {
            let inode = files.inode(entry.inode).unwrap().unwrap();
            files.xattrs(&inode).unwrap();
            found += 1;
            if inode.is_directory() {
                found += walk(files, entry.inode, contents);
                continue;
            }
            for extent in files.blocks_of(&inode).unwrap().content {
                let at = extent.physical * size;
                match inode.is_file() {
                    true => contents.push(at..at + extent.len * size),
                    false => drop(files.blocks(extent.physical, 1).unwrap()),
                }
            }
        }
        found
    }

    #[test]
    fn with_its_metadata_alone_every_name_and_attribute_can_be_read_and_no_content() {
        for block_size in [1024, 4096] {
            let (_dir, file) = made(block_size);
            let whole = Only {
                here: std::iter::once(0..64 << 20).collect(),
                file: file.try_clone().unwrap(),
            };
            let pieces = metadata(&whole).unwrap();
            let here = pieces.iter().map(|(_, range)| range.clone()).collect();
            let only = Only { here, file };
            let replayed = Replayed::new(&only).unwrap();
            let files = FileSystem::open(&replayed).unwrap();
            let mut contents = Vec::new();
            // The directories, what is in them, lost+found, and the link.
            assert_eq!(walk(&files, ROOT, &mut contents), 30 * 3 + 400 + 2);
            assert_eq!(contents.len(), 30);
            for range in contents {
                let meets = |piece: &Range<u64>| piece.start < range.end && range.start < piece.end;
                assert!(!only.here.iter().any(meets), "{range:?}");
            }
            for group in 0..files.groups.len() {
                let group = files.group(group).unwrap();
                files.blocks(group.block_bitmap, 1).unwrap();
                files.blocks(group.inode_bitmap, 1).unwrap();
            }
            assert!(metadata(&only).unwrap() == pieces, "the same from these");
        }
    }

    #[test]
    fn what_is_no_ext4_has_none() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        let source = Only {
            here: std::iter::once(0..1 << 20).collect(),
            file,
        };
        let error = metadata(&source).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
    }
}
