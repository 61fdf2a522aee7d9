//! Which files a qcow2 is made of: itself and those that it names as its backing, which may be any file of
//! the host, as far as they are allowed.

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::super::disk::{DiskImage, size_of};
use super::super::raw;
use super::corrupt;
use super::header::{Header, has_magic};
use vellum_base::block::MAX_VIRTUAL_SIZE;
use vellum_base::error::ResultExt;
use vellum_base::{Error, ErrorKind, Result};

/// The most files that one image may be made of.
const MAX_LINKS: usize = 256;

/// The files of an image.
#[derive(Debug)]
pub(super) struct Links {
    /// Bytes of the disk.
    pub size: u64,
    /// From the top down. There is at least one.
    files: Vec<Link>,
}

/// One of the files of an image.
#[derive(Debug)]
pub(super) struct Link {
    /// Where it is, without links.
    pub path: PathBuf,
    pub file: File,
    /// `None` for a raw one, which can only be the last.
    pub header: Option<Header>,
}

impl Links {
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = &Link> {
        self.files.iter()
    }

    pub fn into_iter(self) -> impl DoubleEndedIterator<Item = Link> {
        self.files.into_iter()
    }

    /// Why only QEMU itself can read one of them, if so.
    pub fn needs_qemu(&self) -> Option<&'static str> {
        let mut headers = self.files.iter().filter_map(|link| link.header.as_ref());
        headers.find_map(Header::needs_qemu)
    }
}

/// Finds the files of the image that lies in `file`.
///
/// # Errors
/// `Permission` for one that is neither beside the one that names it nor in `allowed`.
pub(super) fn find(file: File, allowed: &[PathBuf]) -> Result<Links> {
    let real = real_path(&file)?;
    let allowed = allowed
        .iter()
        .map(|path| {
            path.canonicalize()
                .context(|| format!("--allow-backing {}", path.display()))
        })
        .collect::<Result<Vec<PathBuf>>>()?;
    let top = link(real, file, Some("qcow2"))?;
    let size = top.header.as_ref().map(|header| header.size);
    let size = size.ok_or_else(|| Error::internal("a qcow2 without a header"))?;
    if size == 0 {
        return Err(Error::new(ErrorKind::InvalidInput, "its disk has no bytes"));
    }
    let mut links = vec![top];
    while let Some(next) = links.last().map(|last| below(last, &allowed)) {
        let Some(next) = next? else { break };
        let identity = |link: &Link| {
            link.file
                .metadata()
                .map(|meta| (meta.dev(), meta.ino()))
                .ok()
        };
        if links.len() >= MAX_LINKS || links.iter().any(|link| identity(link) == identity(&next)) {
            return Err(corrupt(format!(
                "its backing files go round in a circle, or are more than {MAX_LINKS} with it"
            )));
        }
        links.push(next);
    }
    Ok(Links { size, files: links })
}

/// Where a file is that is open, whatever its name leads to by now.
fn real_path(file: &File) -> Result<PathBuf> {
    std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))
        .context(|| "finding out where it is")
}

/// The file that `link` names as the one below.
fn below(link: &Link, allowed: &[PathBuf]) -> Result<Option<Link>> {
    let Some(header) = &link.header else {
        return Ok(None);
    };
    let Some(name) = &header.backing else {
        return Ok(None);
    };
    let what = || format!("the backing file {name:?} of {}", link.path.display());
    open_below(link, name, header.backing_format.as_deref(), allowed)
        .map(Some)
        .context(what)
}

fn open_below(link: &Link, name: &str, format: Option<&str>, allowed: &[PathBuf]) -> Result<Link> {
    let first = name.split('/').next().unwrap_or(name);
    if first.contains(':') {
        return Err(Error::new(
            ErrorKind::Unsupported,
            "it is no file, but something that only QEMU can open: copy all into one file first \
             (qemu-img convert -O qcow2)",
        ));
    }
    let directory = link.path.parent().unwrap_or(Path::new("/"));
    let path = directory.join(name);
    let real = path
        .canonicalize()
        .context(|| format!("opening {}", path.display()))?;
    let named = allowed.iter().any(|allowed| real.starts_with(allowed));
    if real.parent() != Some(directory) && !named {
        return Err(Error::new(
            ErrorKind::Permission,
            format!(
                "{} does not lie beside the image. Whoever made the image chose that name, and its \
                 content would become readable in containers: if it is meant, give --allow-backing {}",
                real.display(),
                real.display()
            ),
        ));
    }
    // Not to wait for whoever opens the other end of a pipe.
    let flags = libc::O_NONBLOCK | libc::O_NOFOLLOW;
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(flags)
        .open(&real)
        .context(|| format!("opening {}", real.display()))?;
    // A directory on the way may have become a link meanwhile.
    if real_path(&file)? != real {
        return Err(Error::new(
            ErrorKind::Permission,
            format!("{} was replaced while it was opened", real.display()),
        ));
    }
    let meta = file.metadata().context(|| "reading its attributes")?;
    let readable = meta.is_file() || (named && meta.file_type().is_block_device());
    if !readable {
        return Err(Error::new(
            ErrorKind::InvalidInput,
            format!("{} is not a plain file", real.display()),
        ));
    }
    let link = self::link(real, file, format)?;
    if !named {
        check_shows_a_disk(&link)?;
    }
    Ok(link)
}

/// Refuses a raw file that shows nothing that a disk does, as a key or a password file would: also beside
/// the image one is read only for what it is.
fn check_shows_a_disk(link: &Link) -> Result<()> {
    if link.header.is_some() || raw::probe(&link.file)?.is_some() {
        return Ok(());
    }
    let file = link.file.try_clone().context(|| "reading it")?;
    let size = file.metadata().context(|| "reading its attributes")?.len();
    if DiskImage::new(&link.path, size, Box::new(file)).is_blank()? {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Permission,
        format!(
            "{} shows neither a file system nor a partition table. Whoever made the image chose that name: \
             if it is a disk all the same, give --allow-backing {}",
            link.path.display(),
            link.path.display()
        ),
    ))
}

fn is_qcow2(file: &File, len: u64) -> Result<bool> {
    let mut head = [0; 8];
    let (there, _) = head.split_at_mut(len.min(8) as usize);
    file.read_exact_at(there, 0)
        .context(|| "reading its first bytes")?;
    Ok(has_magic(&head))
}

/// Describes a file that is to be read as `format`; as what it shows where the image does not say.
fn link(path: PathBuf, mut file: File, format: Option<&str>) -> Result<Link> {
    let len = size_of(&mut file)?;
    let qcow2 = match format {
        Some("qcow2") => true,
        Some("raw" | "file" | "host_device") => false,
        None => is_qcow2(&file, len)?,
        Some(other) => {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!(
                    "it is of the format {other:?}: copy all into one file first (qemu-img convert -O qcow2)"
                ),
            ));
        }
    };
    let header = qcow2.then(|| Header::read(&file, len)).transpose()?;
    let size = header.as_ref().map_or(len, |header| header.size);
    if size > MAX_VIRTUAL_SIZE {
        return Err(Error::new(
            ErrorKind::Unsupported,
            format!("a disk of {size} bytes: no more than {MAX_VIRTUAL_SIZE} can be taken"),
        ));
    }
    Ok(Link { path, file, header })
}
