//! Commands to the control device: devices come, start, are taken over, and go.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};

use io_uring::squeue::Entry128;
use io_uring::{IoUring, cqueue, opcode, types};

use super::abi::{
    ANY_ID, DeviceId, DeviceInfo, INFO_LEN, NEEDED, Verb, control_command, feature, parameters,
};
use super::disk::Mark;
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};

/// The kernel's control device.
pub(crate) const PATH: &str = "/dev/ublk-control";

/// A command takes microseconds; one that takes longer than this hangs.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long the kernel may take to notice that a server is dead. Where every request that a device can have
/// was with it, the kernel looks once a second.
const NOTICE: Duration = Duration::from_secs(25);

/// What to say of a command that is not answered.
const HUNG: &str = "no answer: another program may hang in ublk (`ps -eo pid,stat,wchan:20,comm` shows who waits \
                    there); `--transport classic` does without it";

/// The kernel's control device, open.
#[derive(Debug)]
pub(crate) struct Control(File);

impl Control {
    /// Opens it.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] where this host has none, or one that lacks what is needed: with what to do.
    pub(crate) fn open() -> Result<Control> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_CLOEXEC)
            .open(PATH)
            .map_err(|error| match error.kind() {
                io::ErrorKind::NotFound => Error::with_source(
                    ErrorKind::Unsupported,
                    format!(
                        "{PATH}: this host has no ublk: `modprobe ublk_drv` (Linux 6.5 or newer), or leave out \
                         `--transport ublk`"
                    ),
                    error,
                ),
                _ => Error::io(format!("{PATH}: cannot be opened"), error),
            })?;
        Ok(Control(file))
    }

    /// Its descriptor, for the processes of a device to hand on.
    pub(crate) fn into_file(self) -> File {
        self.0
    }

    /// Whether the kernel has all that is needed.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] where it does not.
    pub(crate) fn check(&self) -> Result<()> {
        let features = self.features()?;
        if features & NEEDED == NEEDED {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::Unsupported,
            format!(
                "this kernel's ublk lacks what a killed server's replacement needs (features {features:#x}, \
                 wanted {NEEDED:#x}): Linux 6.5 has it; leave out `--transport ublk`"
            ),
        ))
    }

    fn features(&self) -> Result<u64> {
        let mut bytes = [0; 8];
        match self.command(Verb::Features, ANY_ID, Some(&mut bytes), 0, PATIENCE) {
            Ok(()) => Ok(u64::from_ne_bytes(bytes)),
            // Before Linux 6.5 it cannot be asked.
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(libc::ENODEV | libc::EINVAL | libc::EOPNOTSUPP)
                ) =>
            {
                Ok(0)
            }
            Err(error) if error.kind() == ErrorKind::Permission => Err(error.context(
                "io_uring cannot be used here (sysctl kernel.io_uring_disabled must be 0 or 1; in a container, \
                 its seccomp profile must allow it)",
            )),
            Err(error) => Err(error),
        }
    }

    /// Makes a device, marked with a number of ours. It has no server yet, and is not to be seen in /dev but
    /// for its character device.
    ///
    /// # Errors
    /// [`ErrorKind::Timeout`] where the kernel does not answer.
    pub(crate) fn add(&self, mark: u64) -> Result<DeviceId> {
        let flags = NEEDED | feature::CMD_IOCTL_ENCODE | feature::UPDATE_SIZE;
        let mut bytes = DeviceInfo::wanted(flags, mark);
        self.command(Verb::Add, ANY_ID, Some(&mut bytes), 0, PATIENCE)?;
        let info = DeviceInfo::parse(&bytes);
        Ok(DeviceId(info.id))
    }

    /// Says how large a device is, before it is started.
    ///
    /// # Errors
    /// As [`Control::add`].
    pub(crate) fn set_parameters(&self, id: DeviceId, size: u64, read_only: bool) -> Result<()> {
        let mut bytes = parameters(size, read_only);
        self.command(Verb::SetParameters, id.0, Some(&mut bytes), 0, PATIENCE)
    }

    /// Shows the block device of a device whose server fetches. The kernel reads from it meanwhile.
    ///
    /// # Errors
    /// As [`Control::add`].
    pub(crate) fn start(&self, id: DeviceId, pid: i32) -> Result<()> {
        self.command(Verb::Start, id.0, None, pid as u64, PATIENCE)
    }

    /// Waits until the kernel has seen that the server of a device is dead, and readies the device for the
    /// next one, which then fetches.
    ///
    /// # Errors
    /// [`ErrorKind::Timeout`], and [`ErrorKind::NotFound`] where the device was deleted: one of that number
    /// without the mark is another's.
    pub(crate) fn start_recovery(&self, id: DeviceId, mark: Mark) -> Result<()> {
        let deadline = Instant::now() + NOTICE;
        let mut pause = Duration::from_micros(100);
        loop {
            let info = self.info(id)?.filter(|info| mark.matches(info.mark));
            let Some(info) = info else {
                return Err(gone(id));
            };
            let begun = match info.waits_for_a_server() {
                true => self.begin_recovery(id)?,
                false => false,
            };
            if begun {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(Error::new(
                    ErrorKind::Timeout,
                    format!(
                        "/dev/ublkc{}: the kernel did not let go of its dead server within {NOTICE:?}",
                        id.0
                    ),
                ));
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(5));
        }
    }

    fn begin_recovery(&self, id: DeviceId) -> Result<bool> {
        match self.command(Verb::StartRecovery, id.0, None, 0, PATIENCE) {
            Ok(()) => Ok(true),
            // The dead server's descriptor is not closed yet.
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => Ok(false),
            // A server between the two died before it fetched: all is ready.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(true),
            Err(error) => Err(error),
        }
    }

    /// Lets requests come, once the next server fetches.
    ///
    /// # Errors
    /// As [`Control::add`].
    pub(crate) fn end_recovery(&self, id: DeviceId, pid: i32) -> Result<()> {
        self.command(Verb::EndRecovery, id.0, None, pid as u64, PATIENCE)
    }

    /// Tells the kernel that a device that is used has another size in bytes.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] before Linux 6.16.
    pub(crate) fn update_size(&self, id: DeviceId, size: u64) -> Result<()> {
        let sectors = size / super::abi::SECTOR;
        let info = self.info(id)?.ok_or_else(|| gone(id))?;
        if info.flags & feature::UPDATE_SIZE == 0 {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!(
                    "/dev/ublkb{}: this kernel's ublk devices do not grow in use (Linux 6.16 has it): unmount \
                     it, which then grows at the next mount, or mount it with `--transport classic`",
                    id.0
                ),
            ));
        }
        self.command(Verb::UpdateSize, id.0, None, sectors, PATIENCE)
    }

    fn info(&self, id: DeviceId) -> Result<Option<DeviceInfo>> {
        let mut bytes = [0; INFO_LEN];
        match self.command(Verb::Info, id.0, Some(&mut bytes), 0, PATIENCE) {
            Ok(()) => Ok(Some(DeviceInfo::parse(&bytes))),
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The number of ours that a device is marked with; `None` where there is no such device.
    ///
    /// # Errors
    /// As [`Control::add`].
    pub(crate) fn mark(&self, id: DeviceId) -> Result<Option<u64>> {
        Ok(self.info(id)?.map(|info| info.mark))
    }

    /// Deletes a device: who uses it gets I/O errors. One that is gone is fine. Does not wait for those who
    /// have it open.
    ///
    /// # Errors
    /// As [`Control::add`].
    pub(crate) fn delete(&self, id: DeviceId) -> Result<()> {
        let mut result = self.command(Verb::DeleteAsync, id.0, None, 0, PATIENCE);
        // Before Linux 6.9 it waits, which need not be to the end.
        if result.as_ref().err().and_then(Error::raw_os_error) == Some(libc::EOPNOTSUPP) {
            result = self.command(Verb::Delete, id.0, None, 0, Duration::from_secs(1));
            if result.as_ref().is_err_and(is_hang) {
                return Ok(());
            }
        }
        match result.as_ref().err().and_then(Error::raw_os_error) {
            Some(libc::ENODEV) => Ok(()),
            _ => result,
        }
    }

    /// Sends one command, with bytes that the kernel reads or fills, and waits for its end.
    fn command(
        &self,
        verb: Verb,
        id: u32,
        buffer: Option<&mut [u8]>,
        number: u64,
        patience: Duration,
    ) -> Result<()> {
        let what = || format!("{PATH}: {verb:?}");
        let mut own: Box<[u8]> = match &buffer {
            Some(buffer) => (**buffer).into(),
            None => Box::default(),
        };
        let addr = match own.is_empty() {
            true => 0,
            false => own.as_mut_ptr() as u64,
        };
        let result = self.send(verb, id, (addr, own.len() as u16), number, patience);
        let result = result.context(what);
        match (&result, buffer) {
            // The kernel may fill it yet.
            (Err(error), _) if is_hang(error) => std::mem::forget(own),
            (Ok(()), Some(buffer)) => buffer.copy_from_slice(&own),
            _ => {}
        }
        result
    }

    /// `bytes` are the address and length of memory that outlives the command.
    fn send(
        &self,
        verb: Verb,
        id: u32,
        (addr, len): (u64, u16),
        number: u64,
        patience: Duration,
    ) -> io::Result<()> {
        let mut ring: IoUring<Entry128, cqueue::Entry> = IoUring::builder().build(1)?;
        let fd = types::Fd(self.0.as_raw_fd());
        let command = control_command(id, addr, len, number);
        let entry = opcode::UringCmd80::new(fd, verb as u32)
            .cmd(command)
            .build();
        // SAFETY: the caller's memory outlives the command.
        let pushed = unsafe { ring.submission().push(&entry) };
        pushed.map_err(io::Error::other)?;
        let deadline = Instant::now() + patience;
        loop {
            if let Some(done) = ring.completion().next() {
                return match done.result() {
                    result if result < 0 => Err(io::Error::from_raw_os_error(-result)),
                    _ => Ok(()),
                };
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::Error::new(io::ErrorKind::TimedOut, HUNG));
            }
            let time = types::Timespec::from(left);
            let args = types::SubmitArgs::new().timespec(&time);
            match ring.submitter().submit_with_args(1, &args) {
                Ok(_) => {}
                Err(error) if matches!(error.raw_os_error(), Some(libc::EINTR | libc::ETIME)) => {}
                Err(error) => return Err(error),
            }
        }
    }
}

fn gone(id: DeviceId) -> Error {
    Error::new(
        ErrorKind::NotFound,
        format!("/dev/ublkc{}: the device was deleted", id.0),
    )
}

fn is_hang(error: &Error) -> bool {
    error.kind() == ErrorKind::Timeout
}
