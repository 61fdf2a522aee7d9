//! What is put to the test: a file in a directory, a file, a block device, an NBD export.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;

use super::nbd::{Address, Client};
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_base::storage::write_dsync;
use vellum_export::nbd::protocol::transmission_flag;

/// The file that is made in a directory.
const FILE: &str = "vellum-durability";
/// Alignment that suits direct reads everywhere.
const ALIGN: usize = 4096;

/// A stack to test.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target(Kind);

#[derive(Debug, Clone, PartialEq, Eq)]
enum Kind {
    Nbd(Address),
    Path(PathBuf),
}

/// One way into the target: what one thread writes through.
pub(super) trait Channel: Send {
    /// Writes; nothing is promised yet.
    fn write(&mut self, bytes: &[u8], offset: u64) -> Result<()>;
    /// Writes, and returns when the bytes are durable.
    fn write_durable(&mut self, bytes: &[u8], offset: u64) -> Result<()>;
    /// Makes all that this channel wrote durable.
    fn flush(&mut self) -> Result<()>;
    /// False where [`Channel::write_durable`] is not to be had.
    fn has_durable_writes(&self) -> bool {
        true
    }
}

/// A target that is ready to be written.
pub(super) struct Opened {
    /// Bytes that may be written.
    pub(super) size: u64,
    pub(super) channels: Vec<Box<dyn Channel>>,
}

/// A target that is ready to be read.
pub(super) enum Reader {
    /// The file of a directory is not there.
    Missing,
    Nbd(Client),
    File {
        file: File,
        /// The page cache is left out.
        direct: bool,
    },
}

impl std::str::FromStr for Target {
    type Err = Error;

    /// An `nbd://` or `nbd+unix://` URI, or a path.
    fn from_str(text: &str) -> Result<Self> {
        Ok(Target(match Address::parse(text)? {
            Some(address) => Kind::Nbd(address),
            None => Kind::Path(text.into()),
        }))
    }
}

impl Target {
    /// The number of the device that a path lies on.
    fn device(path: &Path) -> Option<u64> {
        let path = match path.parent() {
            Some(parent) if !path.exists() && parent.as_os_str().is_empty() => Path::new("."),
            Some(parent) if !path.exists() => parent,
            _ => path,
        };
        path.metadata().ok().map(|metadata| metadata.dev())
    }

    /// True where `other` would get lost together with the target.
    pub(super) fn shares_disk_with(&self, other: &Path) -> bool {
        match &self.0 {
            Kind::Nbd(_) => false,
            Kind::Path(path) => {
                let is_device = path
                    .metadata()
                    .is_ok_and(|metadata| metadata.file_type().is_block_device());
                !is_device && Target::device(path) == Target::device(other)
            }
        }
    }

    /// Opens the target for `threads` writers. `size` is how much to write, in bytes.
    pub(super) fn open(&self, threads: usize, size: u64, overwrite: bool) -> Result<Opened> {
        match &self.0 {
            Kind::Nbd(address) => open_nbd(address, threads, size, overwrite),
            Kind::Path(path) => open_path(path, threads, size, overwrite),
        }
    }

    /// Opens the target to see what is there.
    pub(super) fn open_for_check(&self) -> Result<Reader> {
        let path = match &self.0 {
            Kind::Nbd(address) => return address.connect().map(Reader::Nbd),
            Kind::Path(path) => path,
        };
        let in_directory = path.is_dir();
        let path = if in_directory {
            path.join(FILE)
        } else {
            path.clone()
        };
        let open = |flags| {
            OpenOptions::new()
                .read(true)
                .custom_flags(libc::O_CLOEXEC | flags)
                .open(&path)
        };
        let (opened, direct) = match open(libc::O_DIRECT) {
            // The file system does not have it.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => (open(0), false),
            other => (other, true),
        };
        match opened {
            Ok(file) => Ok(Reader::File { file, direct }),
            Err(error) if in_directory && error.kind() == io::ErrorKind::NotFound => {
                Ok(Reader::Missing)
            }
            Err(error) => Err(Error::io(format!("cannot open {}", path.display()), error)),
        }
    }
}

/// What lies there is lost: only with the user's word.
fn check_overwrite(what: &str, overwrite: bool) -> Result<()> {
    if overwrite {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::AlreadyExists,
        format!("{what}: writing there destroys what it holds; say --overwrite if that is meant"),
    ))
}

fn open_nbd(address: &Address, threads: usize, size: u64, overwrite: bool) -> Result<Opened> {
    check_overwrite("the NBD export", overwrite)?;
    let first = address.connect()?;
    if first.has(transmission_flag::READ_ONLY) {
        return Err(Error::new(
            ErrorKind::ReadOnly,
            "the NBD export is read-only",
        ));
    }
    if !first.has(transmission_flag::SEND_FLUSH) {
        return Err(Error::new(
            ErrorKind::Unsupported,
            "the NBD server offers no FLUSH, so it promises nothing that could be tested",
        ));
    }
    let size = size.min(first.size());
    let several = first.may_have_company();
    let mut channels: Vec<Box<dyn Channel>> = Vec::new();
    if several {
        for _ in 1..threads {
            channels.push(Box::new(NbdChannel(Arc::new(Mutex::new(
                address.connect()?,
            )))));
        }
        channels.push(Box::new(NbdChannel(Arc::new(Mutex::new(first)))));
    } else {
        // A second connection may have to wait for the first to end, or have a cache of its own.
        let shared = Arc::new(Mutex::new(first));
        for _ in 0..threads {
            channels.push(Box::new(NbdChannel(shared.clone())));
        }
    }
    Ok(Opened { size, channels })
}

struct NbdChannel(Arc<Mutex<Client>>);

impl Channel for NbdChannel {
    fn write(&mut self, bytes: &[u8], offset: u64) -> Result<()> {
        self.0.lock().write(bytes, offset, false)
    }

    fn write_durable(&mut self, bytes: &[u8], offset: u64) -> Result<()> {
        self.0.lock().write(bytes, offset, true)
    }

    fn flush(&mut self) -> Result<()> {
        self.0.lock().flush()
    }

    fn has_durable_writes(&self) -> bool {
        self.0.lock().has(transmission_flag::SEND_FUA)
    }
}

fn open_path(path: &Path, threads: usize, size: u64, overwrite: bool) -> Result<Opened> {
    let what = || format!("cannot open {}", path.display());
    let found = match path.metadata() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        other => Some(other.context(what)?),
    };
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(libc::O_CLOEXEC);
    let (file, size) = match found {
        Some(metadata) if metadata.is_dir() => (make(&path.join(FILE), true, size)?, size),
        None => (make(path, false, size)?, size),
        Some(metadata) if metadata.file_type().is_block_device() => {
            check_overwrite(&path.display().to_string(), overwrite)?;
            // Refuses a device that is mounted or part of another.
            options.custom_flags(libc::O_CLOEXEC | libc::O_EXCL);
            let file = options.open(path).context(what)?;
            let len = (&file).seek_end().context(what)?;
            (file, size.min(len))
        }
        Some(metadata) if metadata.is_file() => {
            if metadata.len() > 0 {
                check_overwrite(&path.display().to_string(), overwrite)?;
            }
            let file = options.open(path).context(what)?;
            file.set_len(size.max(metadata.len()))
                .and_then(|()| file.sync_all())
                .context(what)?;
            (file, size)
        }
        Some(_) => {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!(
                    "{}: give a directory, a file, a block device or an NBD URI",
                    path.display()
                ),
            ));
        }
    };
    let file = Arc::new(file);
    let channels = (0..threads)
        .map(|_| -> Box<dyn Channel> { Box::new(FileChannel(file.clone())) })
        .collect();
    Ok(Opened { size, channels })
}

/// Makes the file, of `size` bytes and without blocks, durable under its name.
fn make(path: &Path, replace: bool, size: u64) -> Result<File> {
    let make = || -> io::Result<File> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .create_new(!replace)
            .truncate(replace)
            .custom_flags(libc::O_CLOEXEC | libc::O_NOFOLLOW)
            .open(path)?;
        file.set_len(size)?;
        file.sync_all()?;
        let parent = path.parent().filter(|dir| !dir.as_os_str().is_empty());
        File::open(parent.unwrap_or(Path::new(".")))?.sync_all()?;
        Ok(file)
    };
    make().context(|| format!("cannot make {}", path.display()))
}

/// The length of a block device.
trait SeekEnd {
    fn seek_end(self) -> io::Result<u64>;
}

impl SeekEnd for &File {
    fn seek_end(mut self) -> io::Result<u64> {
        io::Seek::seek(&mut self, io::SeekFrom::End(0))
    }
}

struct FileChannel(Arc<File>);

impl Channel for FileChannel {
    fn write(&mut self, bytes: &[u8], offset: u64) -> Result<()> {
        self.0
            .write_all_at(bytes, offset)
            .context(|| "a write fails")
    }

    fn write_durable(&mut self, mut bytes: &[u8], mut offset: u64) -> Result<()> {
        while !bytes.is_empty() {
            let written = write_dsync(&self.0, bytes, offset)
                .and_then(|written| match written {
                    0 => Err(io::ErrorKind::WriteZero.into()),
                    written => Ok(written),
                })
                .context(|| "a synchronous write (RWF_DSYNC) fails")?;
            (_, bytes) = bytes.split_at(written);
            offset += written as u64;
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        self.0.sync_data().context(|| "fdatasync fails")
    }
}

impl Reader {
    /// True where the page cache may hide what is not on the disk.
    pub(super) fn is_cached(&self) -> bool {
        matches!(self, Reader::File { direct: false, .. })
    }

    /// True for a directory without the file that is looked for.
    pub(super) fn is_absent(&self) -> bool {
        matches!(self, Reader::Missing)
    }

    /// Fills `buf`, which is aligned as [`AlignedBuf`] is; zeros beyond the end.
    pub(super) fn read(&mut self, buf: &mut [u8], offset: u64) -> Result<()> {
        match self {
            Reader::Missing => {
                buf.fill(0);
                Ok(())
            }
            Reader::Nbd(client) => {
                let there = client.size().saturating_sub(offset).min(buf.len() as u64) as usize;
                let (inside, beyond) = buf.split_at_mut(there);
                beyond.fill(0);
                if inside.is_empty() {
                    return Ok(());
                }
                client.read(inside, offset)
            }
            Reader::File { file, .. } => {
                let mut done = 0;
                while done < buf.len() {
                    let (_, rest) = buf.split_at_mut(done);
                    match file.read_at(rest, offset + done as u64) {
                        Ok(0) => {
                            rest.fill(0);
                            break;
                        }
                        Ok(read) => done += read,
                        Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                        // Behind a piece that ends within a sector.
                        Err(error)
                            if error.raw_os_error() == Some(libc::EINVAL) && done % ALIGN != 0 =>
                        {
                            rest.fill(0);
                            break;
                        }
                        Err(error) => return Err(Error::io("a read fails", error)),
                    }
                }
                Ok(())
            }
        }
    }
}

/// Bytes that a direct read can fill.
pub(super) struct AlignedBuf {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl AlignedBuf {
    pub(super) fn new(len: usize) -> Self {
        let bytes = vec![0; len + ALIGN];
        let start = bytes.as_ptr().align_offset(ALIGN);
        AlignedBuf { bytes, start, len }
    }

    /// The first `len` of its bytes.
    #[expect(
        clippy::indexing_slicing,
        reason = "`new` made room for `len` bytes behind `start`"
    )]
    pub(super) fn get(&mut self, len: usize) -> &mut [u8] {
        assert!(len <= self.len, "more of a buffer than there is");
        &mut self.bytes[self.start..self.start + len]
    }
}
