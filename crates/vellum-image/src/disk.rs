//! What a disk image holds, however its file keeps it.

use std::fmt;
use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};

use super::raw::Holds;
use vellum_base::Result;
use vellum_base::error::ResultExt;
use vellum_base::interrupt;

/// Bytes that are looked at together.
const CHUNK: usize = 1 << 20;

/// A disk image or block device: its bytes, and what they show.
#[derive(Debug)]
#[non_exhaustive]
pub struct DiskImage {
    /// Where it is.
    pub path: PathBuf,
    /// Its size in bytes, a multiple of 512.
    pub size: u64,
    /// What it shows; `None` where that is not known and the user said that it is a disk.
    pub holds: Option<Holds>,
    content: Box<dyn DiskContent>,
}

/// The bytes of a disk.
pub(super) trait DiskContent: fmt::Debug + Send {
    /// The next range from `at` on, below `size`, that may hold something else than zeros.
    fn next_data(&self, at: u64, size: u64) -> Result<Option<Range<u64>>>;

    /// Fills `into` from `at`, which lies within the disk with all of it.
    fn read(&self, into: &mut [u8], at: u64) -> Result<()>;
}

impl DiskImage {
    pub(super) fn new(path: &Path, size: u64, content: Box<dyn DiskContent>) -> DiskImage {
        DiskImage {
            path: path.into(),
            size,
            holds: None,
            content,
        }
    }

    /// The file at `path`, byte for byte. What it holds is not looked at.
    ///
    /// # Errors
    /// Where it cannot be opened.
    pub fn of_file(path: &Path) -> Result<DiskImage> {
        let mut file = File::open(path).context(|| format!("opening {}", path.display()))?;
        let size = size_of(&mut file)?;
        Ok(DiskImage::new(path, size, Box::new(file)))
    }

    /// The next range of bytes from `at` on that may hold something else than zeros; `None` where only
    /// zeros follow. It never reaches beyond the end.
    ///
    /// # Errors
    /// `Io` where it cannot be read; `Corrupt` where the image contradicts itself.
    pub fn next_data(&self, at: u64) -> Result<Option<Range<u64>>> {
        if at >= self.size {
            return Ok(None);
        }
        let found = self.content.next_data(at, self.size)?;
        Ok(found.map(|range| range.start..range.end.min(self.size)))
    }

    /// Fills `into` from `at`.
    ///
    /// # Errors
    /// As [`DiskImage::next_data`]; `OutOfRange` beyond the end.
    pub fn read_at(&self, into: &mut [u8], at: u64) -> Result<()> {
        vellum_base::block::check_range(at, into.len() as u64, self.size)?;
        self.content.read(into, at)
    }

    /// Whether there is nothing but zeros.
    pub(super) fn is_blank(&self) -> Result<bool> {
        let mut buffer = vec![0; CHUNK];
        let mut at = 0;
        while let Some(range) = self.next_data(at)? {
            at = range.start;
            while at < range.end {
                interrupt::check()?;
                let count = (range.end - at).min(CHUNK as u64);
                let (chunk, _) = buffer.split_at_mut(count as usize);
                self.read_at(chunk, at)?;
                if chunk.iter().any(|byte| *byte != 0) {
                    return Ok(false);
                }
                at += count;
            }
        }
        Ok(true)
    }
}

/// The size of a file or block device; the metadata of the latter say 0.
pub(super) fn size_of(file: &mut File) -> Result<u64> {
    file.seek(SeekFrom::End(0)).context(|| "finding its size")
}

/// A file or block device, byte for byte.
impl DiskContent for File {
    fn next_data(&self, at: u64, size: u64) -> Result<Option<Range<u64>>> {
        let start = match lseek(self, at.cast_signed(), Whence::SeekData) {
            Ok(start) => start,
            Err(Errno::ENXIO) => return Ok(None),
            // This file system cannot tell.
            Err(Errno::EINVAL | Errno::EOPNOTSUPP) => return Ok(Some(at..size)),
            Err(errno) => return Err(errno).context(|| "looking for its holes"),
        };
        let end = lseek(self, start, Whence::SeekHole).context(|| "looking for its holes")?;
        let (start, end) = (start.cast_unsigned(), end.cast_unsigned());
        // The kernel may know of data beyond the end that was told.
        Ok((start < size).then_some(start..end))
    }

    fn read(&self, into: &mut [u8], at: u64) -> Result<()> {
        self.read_exact_at(into, at).context(|| "reading it")
    }
}
