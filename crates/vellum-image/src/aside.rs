//! The contents of new files, kept beside the tree that they belong to until somebody lays them out.
//!
//! A layer's file system is filled by the kernel and then written once more in an order of its own. What the
//! files hold need not go through the kernel's file system for that: it lies in a file without a name meanwhile.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use nix::sys::stat::futimens;
use nix::sys::time::TimeSpec;
use vellum_base::block::in_memory;
use vellum_base::error::ResultExt;
use vellum_base::{Error, Result, interrupt};
use xattr::FileExt as _;

use super::content::CHUNK;
use super::node::CAPABILITY;
use super::tree::read_full;
use super::walk::walk;

/// Contents lie on borders of so many bytes, and are told by so many: a block of the file system.
const BLOCK: u64 = 4096;
/// The longest file that every file system of a store holds, and a long way from what some do not.
const MOST: u64 = 8 << 40;

/// Contents of files that were put into a tree without them, by number of inode.
///
/// Files are there in the tree, with their sizes, and hold nothing but a hole.
#[derive(Debug)]
pub struct Aside {
    spool: File,
    /// What is kept in all may end here.
    limit: u64,
    end: u64,
    files: HashMap<u64, Kept>,
}

#[derive(Debug)]
struct Kept {
    /// Where its first byte is, or would be, in the spool.
    start: u64,
    size: u64,
    /// Bytes of the file that were written, in whole blocks: ascending, apart from each other.
    written: Vec<Range<u64>>,
}

impl Aside {
    /// Keeps contents of `limit` bytes at most in `spool`, an empty file. Files with more stay in the tree.
    pub fn new(spool: File, limit: u64) -> Self {
        Aside {
            spool,
            limit: limit.min(MOST),
            end: 0,
            files: HashMap::new(),
        }
    }

    /// Begins the content of a new file of the tree. `None` where it is to be written into the file itself.
    pub(super) fn begin(&mut self, file: &File, size: u64) -> io::Result<Option<Part<'_>>> {
        let inode = file.metadata()?.ino();
        // Another file may have had the number.
        self.files.remove(&inode);
        let room = self.limit - self.end;
        if size == 0 || size > room {
            return Ok(None);
        }
        let start = self.end;
        self.end = (start + size).next_multiple_of(BLOCK).min(self.limit);
        let kept = self.files.entry(inode).insert_entry(Kept {
            start,
            size,
            written: Vec::new(),
        });
        Ok(Some(Part {
            spool: &self.spool,
            kept: kept.into_mut(),
        }))
    }

    /// True where no file has its content here.
    pub fn is_empty(&self) -> bool {
        self.files.is_empty()
    }

    /// The bytes of the file with that number that were written, in whole blocks: ascending, apart from each other;
    /// the last block may reach beyond the file's end. `None` of a file whose content is in the tree.
    pub fn written(&self, inode: u64) -> Option<&[Range<u64>]> {
        self.files.get(&inode).map(|kept| &kept.written[..])
    }

    /// Fills `buf` with bytes of a file from `offset` on; what was not written is zeros.
    ///
    /// # Errors
    /// [`vellum_base::ErrorKind::Io`]; [`vellum_base::ErrorKind::Internal`] for a file whose content is not here.
    pub fn fill(&self, inode: u64, buf: &mut [u8], offset: u64) -> Result<()> {
        let kept = self.files.get(&inode);
        let kept = kept.ok_or_else(|| {
            Error::internal(format!("no content of inode {inode} was kept aside"))
        })?;
        self.read(kept, buf, offset)
            .context(|| "reading what an import keeps of a file's content")
    }

    fn read(&self, kept: &Kept, buf: &mut [u8], offset: u64) -> io::Result<()> {
        // Behind its end begins the next file, and behind the last one nothing.
        let left = usize::try_from(kept.size.saturating_sub(offset)).unwrap_or(usize::MAX);
        let (rest, behind) = buf.split_at_mut(left.min(buf.len()));
        behind.fill(0);
        read_full(&self.spool, rest, kept.start + offset)
    }

    /// Writes all contents into their files after all, in the tree at `target`, which has not changed since.
    ///
    /// # Errors
    /// [`vellum_base::ErrorKind::NoSpace`] where they do not fit; as reading and writing files.
    pub fn write_back(&self, target: &Path) -> Result<()> {
        let mut buffer = vec![0; CHUNK];
        walk(target, &mut |node, file| {
            interrupt::check()?;
            match file {
                Some(file) => self.write_file(&file, &mut buffer),
                None => Ok(()),
            }
            .context(|| format!("unpacking {}", node.shown()))
        })
    }

    /// Writes the content of a regular file, if it is here. Whatever else had its number is gone, or is none.
    fn write_file(&self, file: &File, buffer: &mut [u8]) -> Result<()> {
        let before = file.metadata().context(|| "reading its times")?;
        let Some(kept) = self.files.get(&before.ino()) else {
            return Ok(());
        };
        let capability = OsStr::from_bytes(CAPABILITY);
        let able = file
            .get_xattr(capability)
            .context(|| "reading what it may do")?;
        // It is open for reading.
        let again = format!("/proc/self/fd/{}", file.as_raw_fd());
        let file = OpenOptions::new().write(true).open(again);
        let file = file.context(|| "opening it")?;
        for range in &kept.written {
            let mut at = range.start;
            let end = range.end.min(kept.size);
            while at < end {
                let count = (end - at).min(CHUNK as u64);
                let (bytes, _) = buffer.split_at_mut(in_memory(count));
                self.read(kept, bytes, at).context(|| "reading it")?;
                file.write_all_at(bytes, at).context(|| "writing it")?;
                at += count;
            }
        }
        // The kernel takes it from whatever is written.
        if let Some(able) = able {
            let set = file.set_xattr(capability, &able);
            set.context(|| "setting what it may do")?;
        }
        let accessed = TimeSpec::new(before.atime(), before.atime_nsec());
        let modified = TimeSpec::new(before.mtime(), before.mtime_nsec());
        futimens(&file, &accessed, &modified).context(|| "setting its times")
    }
}

/// The content of one file, as it comes.
pub(super) struct Part<'a> {
    spool: &'a File,
    kept: &'a mut Kept,
}

impl<'a> Part<'a> {
    /// Where it is written to, and which byte there is its first.
    pub fn place(&self) -> (&'a File, u64) {
        (self.spool, self.kept.start)
    }

    /// Those bytes of it were written.
    pub fn note(&mut self, bytes: Range<u64>) {
        let start = bytes.start / BLOCK * BLOCK;
        let end = bytes.end.next_multiple_of(BLOCK);
        match self.kept.written.last_mut() {
            Some(last) if last.start <= start && start <= last.end => last.end = last.end.max(end),
            _ => self.kept.written.push(start..end),
        }
    }

    /// No more of it comes.
    pub fn end(self) {
        let written = &mut self.kept.written;
        if written.is_sorted_by(|one, next| one.end < next.start) {
            return;
        }
        written.sort_by_key(|range| range.start);
        let mut merged: Vec<Range<u64>> = Vec::with_capacity(written.len());
        for range in written.drain(..) {
            match merged.last_mut() {
                Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
                _ => merged.push(range),
            }
        }
        *written = merged;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn aside(limit: u64) -> Aside {
        Aside::new(tempfile::tempfile().unwrap(), limit)
    }

    fn put(aside: &mut Aside, file: &File, bytes: &[u8], pieces: &[Range<u64>]) -> bool {
        let part = aside.begin(file, bytes.len() as u64).unwrap();
        let Some(mut part) = part else {
            return false;
        };
        for piece in pieces {
            let (spool, first) = part.place();
            let data = &bytes[piece.start as usize..piece.end as usize];
            spool.write_all_at(data, first + piece.start).unwrap();
            part.note(piece.clone());
        }
        part.end();
        true
    }

    fn put_whole(aside: &mut Aside, file: &File, bytes: &[u8]) -> bool {
        let whole = 0..bytes.len() as u64;
        put(aside, file, bytes, std::slice::from_ref(&whole))
    }

    #[test]
    fn what_was_written_is_told_in_whole_blocks_and_read_up_to_the_end_of_the_file() {
        let (one, two) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        let mut aside = aside(1 << 30);
        let bytes = vec![7; 50_000];
        // The last comes before the one in front of it, and the first two touch one block.
        let pieces = [0..100, 4000..5000, 40_000..50_000, 20_000..20_001];
        assert!(put(&mut aside, &one, &bytes, &pieces));
        assert!(put_whole(&mut aside, &two, &[9; 5000]));
        let inode = one.metadata().unwrap().ino();
        let written = aside.written(inode).unwrap();
        assert_eq!(written, [0..8192, 16_384..20_480, 36_864..53_248]);
        let mut found = vec![1; 53_248];
        aside.fill(inode, &mut found, 0).unwrap();
        for (at, byte) in found.iter().enumerate() {
            let inside = pieces.iter().any(|piece| piece.contains(&(at as u64)));
            assert_eq!(*byte, if inside { 7 } else { 0 }, "byte {at}");
        }
        let other = two.metadata().unwrap().ino();
        let mut found = vec![1; 8192];
        aside.fill(other, &mut found, 4096).unwrap();
        assert!(found[..904].iter().all(|byte| *byte == 9));
        assert!(found[904..].iter().all(|byte| *byte == 0));
        assert!(aside.fill(1 << 40, &mut found, 0).is_err());
    }

    #[test]
    fn a_file_with_the_number_of_another_has_nothing_of_its_content() {
        let file = tempfile::tempfile().unwrap();
        let inode = file.metadata().unwrap().ino();
        let mut aside = aside(1 << 30);
        assert!(put_whole(&mut aside, &file, &[7; 100]));
        assert!(!put(&mut aside, &file, &[], &[]));
        assert_eq!(aside.written(inode), None);
        assert!(aside.is_empty());
    }

    #[test]
    fn what_is_more_than_the_limit_stays_in_the_tree() {
        let (one, two) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        let mut aside = aside(8192);
        assert!(!put_whole(&mut aside, &one, &[7; 8193]));
        assert!(put_whole(&mut aside, &one, &[7; 4097]));
        assert!(!put_whole(&mut aside, &two, &[7; 1]));
    }
}
