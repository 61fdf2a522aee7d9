//! The hidden subcommand that serves a plain file, for tests and for measuring the transport
//! without copy-on-write.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::fcntl::{FallocateFlags, Flock, FlockArg, fallocate};

use super::control::NoCommands;
use super::opened::Opened;
use super::supervisor::{SupervisorArgs, supervise};
use vellum_base::block::{
    BLOCK_SIZE, BlockDevice, Durability, Extent, ExtentKind, ZeroMode, check_range,
};
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_base::storage::waits;

/// `vellum device-supervisor --file PATH …`: what [`super::attach()`] starts for a plain file.
#[derive(Debug, Clone, clap::Args)]
pub struct FileDeviceArgs {
    /// The file to serve
    #[arg(long, value_name = "PATH")]
    pub file: PathBuf,
    /// Die at the first write, to test what happens then
    #[arg(long, hide = true)]
    pub abort_on_write: bool,
    /// What the next write does that finds this file, to test what happens then: a file `hang` is
    /// removed and the write waits for ever, `spin` is removed and it computes for ever, `wait` makes
    /// it wait as for a disk until the file is gone
    #[arg(long, hide = true, value_name = "DIR")]
    pub faults: Option<PathBuf>,
    #[command(flatten)]
    supervisor: SupervisorArgs,
}

/// Runs the subcommand.
///
/// # Errors
/// As [`supervise`].
pub fn run(args: &FileDeviceArgs) -> Result<()> {
    supervise(&args.supervisor, &|_, _| {
        let device = FileDevice::open(&args.file, args.supervisor.read_only)?;
        Ok(Opened {
            device: Arc::new(FileDevice {
                abort_on_write: args.abort_on_write,
                faults: args.faults.clone(),
                ..device
            }),
            control: Arc::new(NoCommands),
        })
    })
}

/// A plain file as a block device: no copy-on-write, no checksums.
#[derive(Debug)]
pub struct FileDevice {
    file: Flock<File>,
    name: PathBuf,
    read_only: bool,
    abort_on_write: bool,
    faults: Option<PathBuf>,
}

impl FileDevice {
    /// Opens and locks `path`, whose length is the device's size.
    ///
    /// # Errors
    /// [`ErrorKind::InUse`] while another process has it, [`ErrorKind::InvalidInput`] when its
    /// length is not a multiple of 4096.
    pub fn open(path: &Path, read_only: bool) -> Result<FileDevice> {
        let what = || path.display().to_string();
        let file = File::options()
            .read(true)
            .write(!read_only)
            .custom_flags(libc::O_CLOEXEC)
            .open(path)
            .context(what)?;
        let lock = if read_only {
            FlockArg::LockSharedNonblock
        } else {
            FlockArg::LockExclusiveNonblock
        };
        let file = Flock::lock(file, lock).map_err(|(_, errno)| {
            Error::with_source(
                ErrorKind::InUse,
                format!("{}: another process serves it", what()),
                errno,
            )
        })?;
        let len = file.metadata().context(what)?.len();
        if !len.is_multiple_of(BLOCK_SIZE) || len == 0 {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("{}: its length {len} is no multiple of 4096", what()),
            ));
        }
        Ok(FileDevice {
            file,
            name: path.to_path_buf(),
            read_only,
            abort_on_write: false,
            faults: None,
        })
    }

    fn failed(&self, what: &str, error: io::Error) -> Error {
        Error::io(format!("{}: {what}", self.name.display()), error)
    }

    /// Does what [`FileDeviceArgs::faults`] asks for.
    fn suffer(dir: &Path) {
        if std::fs::remove_file(dir.join("hang")).is_ok() {
            loop {
                std::thread::park();
            }
        }
        if std::fs::remove_file(dir.join("spin")).is_ok() {
            loop {
                std::hint::spin_loop();
            }
        }
        let _waits = waits();
        while dir.join("wait").exists() {
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn allocate(&self, flags: FallocateFlags, offset: u64, len: u64) -> Result<()> {
        check_range(offset, len, self.size())?;
        fallocate(
            self.file.as_fd(),
            flags | FallocateFlags::FALLOC_FL_KEEP_SIZE,
            offset as libc::off_t,
            len as libc::off_t,
        )
        .map_err(|errno| self.failed("fallocate", errno.into()))
    }
}

impl BlockDevice for FileDevice {
    fn size(&self) -> u64 {
        self.file.metadata().map_or(0, |metadata| metadata.size())
    }

    fn is_read_only(&self) -> bool {
        self.read_only
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.file
            .read_exact_at(buf, offset)
            .map_err(|error| self.failed("read", error))
    }

    fn write_at(&self, buf: &[u8], offset: u64, durability: Durability) -> Result<()> {
        if self.abort_on_write {
            std::process::abort();
        }
        if let Some(dir) = &self.faults {
            FileDevice::suffer(dir);
        }
        check_range(offset, buf.len() as u64, self.size())?;
        self.file
            .write_all_at(buf, offset)
            .map_err(|error| self.failed("write", error))?;
        match durability {
            Durability::Buffered => Ok(()),
            Durability::Durable => self.flush(),
        }
    }

    fn flush(&self) -> Result<()> {
        if self.read_only {
            return Ok(());
        }
        self.file
            .sync_data()
            .map_err(|error| self.failed("fdatasync", error))
    }

    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.allocate(FallocateFlags::FALLOC_FL_PUNCH_HOLE, offset, len)
    }

    fn write_zeroes(&self, offset: u64, len: u64, mode: ZeroMode, _: Durability) -> Result<()> {
        match mode {
            ZeroMode::MayUnmap => self.discard(offset, len),
            // Not every file system has ZERO_RANGE: a hole reads the same.
            ZeroMode::KeepAllocated => self
                .allocate(FallocateFlags::FALLOC_FL_ZERO_RANGE, offset, len)
                .or_else(|_| self.discard(offset, len)),
        }
    }

    fn extents(&self, offset: u64, len: u64, _: usize) -> Result<Vec<Extent>> {
        let kind = ExtentKind::Data;
        Ok(vec![Extent { offset, len, kind }])
    }
}
