//! How much the content of a source takes in a file system, before it is put there.

use std::io::{self, Read};
use std::ops::AddAssign;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::compress::{Compression, Decoder, buffered};
use super::members::Members;
use super::node::{Kind, Node};
use super::slice::Slice;
use vellum_base::error::ResultExt;
use vellum_base::{Error, Result};

/// Content is kept in blocks of so many bytes.
const BLOCK: u64 = 4096;

/// What content needs: no less than it takes, and not much more.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Measure {
    /// Bytes, in whole blocks.
    pub bytes: u64,
    /// Files, directories and whatever else has an inode.
    pub files: u64,
}

impl Measure {
    fn add(&mut self, content: u64) {
        self.files += 1;
        self.add_bytes(content);
    }

    /// What an archive says of its files may be anything: the sum ends at what no disk has.
    fn add_bytes(&mut self, content: u64) {
        let content = content.checked_next_multiple_of(BLOCK).unwrap_or(u64::MAX);
        self.bytes = self.bytes.saturating_add(content);
    }

    fn node(&mut self, node: &Node) {
        let content = match &node.kind {
            Kind::File {
                extents: Some(extents),
                ..
            } => {
                let lengths = extents.iter().map(|extent| extent.length);
                lengths.fold(0, u64::saturating_add)
            }
            Kind::File {
                size,
                extents: None,
            } => *size,
            Kind::Directory => BLOCK,
            // Another name of what was counted.
            Kind::HardLink(_) => return,
            _ => 0,
        };
        self.add(content);
        let attributes: usize = node.xattrs.values().map(Vec::len).sum();
        self.add_bytes(attributes as u64);
    }
}

impl AddAssign for Measure {
    fn add_assign(&mut self, other: Measure) {
        self.bytes = self.bytes.saturating_add(other.bytes);
        self.files += other.files;
    }
}

/// What is in a tar, by its headers; `None` for a compressed one, unless `thoroughly`.
pub(super) fn tar(input: Slice, thoroughly: bool) -> Result<Option<Measure>> {
    let mut head = Vec::new();
    let first = input.clone().take(512).read_to_end(&mut head);
    first.map_err(|error| Error::io("reading the first bytes", error))?;
    let mut sum = Measure::default();
    if Compression::detect(&head)? == Compression::None {
        let mut members = Members::new(input);
        while let Some(member) = members.next()? {
            sum.node(&member.node);
            members.seek_past_content();
        }
        return Ok(Some(sum));
    }
    if !thoroughly {
        return Ok(None);
    }
    let mut members = Members::new(Decoder::new(buffered(input))?);
    while let Some(member) = members.next()? {
        sum.node(&member.node);
    }
    Ok(Some(sum))
}

/// What is below a directory.
pub(super) fn tree(root: &Path) -> Result<Measure> {
    let mut sum = Measure::default();
    let mut left = vec![root.to_owned()];
    while let Some(directory) = left.pop() {
        let what = || format!("listing {}", directory.display());
        for entry in std::fs::read_dir(&directory).context(what)? {
            let entry = entry.context(what)?;
            let stat = match entry.metadata() {
                Ok(stat) => stat,
                // Gone meanwhile: who copies it says so, if it matters.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => {
                    return Err(Error::io(
                        format!("looking at {}", entry.path().display()),
                        error,
                    ));
                }
            };
            if stat.is_dir() {
                left.push(entry.path());
            }
            // Holes take nothing, and compression ends with the copy.
            let content = match stat.is_file() {
                true if stat.blocks() == 0 => 0,
                true => stat.size(),
                false => BLOCK * u64::from(stat.is_dir()),
            };
            sum.add(content);
        }
    }
    Ok(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_that_no_disk_has_add_up_to_the_most_there_is() {
        let mut sum = Measure::default();
        sum.add(u64::MAX - 1);
        sum.add(5000);
        assert_eq!((sum.bytes, sum.files), (u64::MAX, 2));
        sum += sum;
        assert_eq!((sum.bytes, sum.files), (u64::MAX, 4));
    }

    #[test]
    fn a_tree_is_measured_in_blocks_and_inodes() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("d")).unwrap();
        std::fs::write(root.path().join("d/one"), [1; 5000]).unwrap();
        std::fs::write(root.path().join("empty"), "").unwrap();
        let expected = Measure {
            bytes: 4096 + 8192,
            files: 3,
        };
        assert_eq!(tree(root.path()).unwrap(), expected);
    }
}
