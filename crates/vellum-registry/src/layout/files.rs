//! The files of an OCI layout, in a directory, an archive or a bucket.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_base::interrupt;

use super::super::failure::Failure;
use super::super::ranges::Flow;
use super::archive::Archive;
use super::bucket::Bucket;
use super::directory::{self, Directory, read_part};

/// Bytes of a file that are read at a time.
const PIECE: u64 = 1 << 20;

/// Where the files are.
#[derive(Debug)]
pub(super) enum Files {
    Directory(Directory),
    Archive(Archive),
    Bucket(Bucket),
}

/// Files to which some are added.
#[derive(Debug)]
pub(crate) enum Filling<'a> {
    /// In a directory.
    Directory(directory::Filling),
    /// In a bucket.
    Bucket(&'a Bucket),
}

/// A file of this host, or a part of one.
struct Local {
    file: std::sync::Arc<File>,
    at: u64,
    len: u64,
}

impl Files {
    /// The file of this host that has it, where that is here; `None` where there is none.
    fn local(&self, name: &str) -> Result<Option<Local>> {
        match self {
            Files::Directory(directory) => Ok(directory.open(name)?.map(|(file, len)| Local {
                file: file.into(),
                at: 0,
                len,
            })),
            Files::Archive(archive) => {
                Ok(archive
                    .open(name)
                    .map(|(file, at, len)| Local { file, at, len }))
            }
            Files::Bucket(_) => Err(Error::internal("a bucket is not on this host")),
        }
    }

    /// All of a short file; `None` where there is none.
    pub async fn read(&self, name: &str, most: u64) -> Result<Option<Vec<u8>>, Failure> {
        if let Files::Bucket(bucket) = self {
            return Ok(bucket.read(name, most).await?.map(|(bytes, _)| bytes));
        }
        let found = self.local(name)?;
        let read = |local: Local| read_part(&local.file, local.at, local.len, most, name);
        Ok(found.map(read).transpose()?)
    }

    /// How many bytes a file has; `None` where there is none.
    pub async fn size(&self, name: &str) -> Result<Option<u64>, Failure> {
        match self {
            Files::Bucket(bucket) => bucket.size(name).await,
            _ => Ok(self.local(name)?.map(|local| local.len)),
        }
    }

    /// Hands out a file from a byte on, until its end or `each` wants no more. False where there is none.
    pub async fn stream(
        &self,
        name: &str,
        from: u64,
        each: &mut dyn FnMut(&[u8]) -> Result<Flow, Failure>,
    ) -> Result<bool, Failure> {
        if let Files::Bucket(bucket) = self {
            return bucket.stream(name, from, each).await;
        }
        let Some(local) = self.local(name)? else {
            return Ok(false);
        };
        let mut at = from;
        while at < local.len {
            interrupt::check()?;
            let bytes = local.part(at..(at + PIECE), name)?;
            at += bytes.len() as u64;
            if bytes.is_empty() || each(&bytes)? == Flow::Stop {
                break;
            }
        }
        Ok(true)
    }

    /// Those bytes of a file, fewer where it ends before; `None` where there is none.
    pub async fn range(&self, name: &str, range: Range<u64>) -> Result<Option<Vec<u8>>, Failure> {
        if let Files::Bucket(bucket) = self {
            return bucket.range(name, range).await;
        }
        let local = self.local(name)?;
        Ok(local.map(|local| local.part(range, name)).transpose()?)
    }

    /// Gets ready to add some.
    ///
    /// # Errors
    /// Where the host refuses.
    pub fn fill(&self) -> Result<Filling<'_>> {
        match self {
            Files::Directory(directory) => directory.fill().map(Filling::Directory),
            Files::Bucket(bucket) => Ok(Filling::Bucket(bucket)),
            Files::Archive(_) => Err(Error::internal("an archive is not added to")),
        }
    }
}

impl Local {
    fn part(&self, range: Range<u64>, name: &str) -> Result<Vec<u8>> {
        let end = range.end.min(self.len);
        let len = end.saturating_sub(range.start);
        let len = usize::try_from(len)
            .map_err(|_| Error::new(ErrorKind::Corrupt, format!("{name}: too much at once")))?;
        let mut bytes = vec![0; len];
        self.file
            .read_exact_at(&mut bytes, self.at + range.start)
            .context(|| format!("cannot read {name}"))?;
        Ok(bytes)
    }
}

impl Filling<'_> {
    /// Puts bytes there.
    pub async fn put(&self, name: &str, bytes: &[u8]) -> Result<(), Failure> {
        match self {
            Filling::Directory(directory) => Ok(directory.put(name, bytes)?),
            Filling::Bucket(bucket) => bucket.put(name, bytes).await,
        }
    }

    /// Puts a file there; `moved` counts its bytes.
    pub async fn put_file(
        &self,
        name: &str,
        from: &Path,
        moved: &AtomicU64,
    ) -> Result<(), Failure> {
        match self {
            Filling::Directory(directory) => Ok(directory.put_file(name, from, |count| {
                moved.fetch_add(count, Ordering::Relaxed);
                interrupt::check()
            })?),
            Filling::Bucket(bucket) => bucket.put_file(name, from, moved).await,
        }
    }

    /// Changes a file that others may be changing too: no change is lost. `change` gets what it holds, and says what
    /// it is to hold, or `None` where it stays; it may be asked again.
    pub async fn change(
        &self,
        name: &str,
        most: u64,
        change: &dyn Fn(Option<Vec<u8>>) -> Result<Option<Vec<u8>>>,
    ) -> Result<(), Failure> {
        match self {
            Filling::Directory(directory) => Ok(directory.change(name, most, change)?),
            Filling::Bucket(bucket) => bucket.change(name, most, change).await,
        }
    }
}
