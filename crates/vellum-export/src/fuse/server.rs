//! The loop of one serving thread: a read(2) for each request, a write(2) for each reply.

use std::fs::File;
use std::io::Write;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use nix::errno::Errno;

use super::abi::{self, Operation, ParseError, Request};
use super::readers::Readers;
use super::slot::{Owed, Slot};
use vellum_base::block::{BlockDevice, Durability, ExtentKind, ZeroMode};
use vellum_base::error::{Error, ErrorKind, Result};
use vellum_base::storage::{about_to_wait, waits};

/// Why a serving thread ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// The file was unmounted or the session aborted: nobody will ask again.
    SessionOver,
    /// It was told to stop; the session lives on.
    Stopped,
}

/// What the threads that serve one session share.
pub struct Server<'a> {
    /// The session's descriptor.
    pub session: &'a File,
    /// What is served.
    pub device: &'a dyn BlockDevice,
    /// Who of the threads takes the next request.
    pub readers: &'a Readers,
    /// Set to end the threads; one that waits for a request must be woken by a signal, and those
    /// that are spare by [`Readers::close`].
    pub stop: &'a AtomicBool,
    /// Note each request in the slot before answering it, for kernels that cannot resend.
    pub remember: bool,
    /// Failures answered so far, so that a full disk does not fill the log.
    pub failures: &'a AtomicU64,
    /// Writes that wait for room on the host's disk, and how many may: the other threads serve.
    pub held: &'a AtomicU64,
    /// See [`Server::held`].
    pub held_at_most: u64,
}

/// What to send: an errno, a short body in hand, or data that lies in the slot.
enum Answer {
    None,
    Errno(i32),
    Body(Body),
    Data(usize),
    /// None from this process: the server was told to stop, and the next one gets the request.
    Left,
}

/// A reply's body of at most 104 bytes.
struct Body {
    bytes: [u8; abi::OUT_HEADER_LEN + 104],
    len: usize,
}

#[expect(
    clippy::indexing_slicing,
    reason = "replies are laid out in `abi`, none longer than 104 bytes"
)]
fn body(body: &[u8]) -> Answer {
    let mut bytes = [0; abi::OUT_HEADER_LEN + 104];
    let len = body.len();
    bytes[abi::OUT_HEADER_LEN..abi::OUT_HEADER_LEN + len].copy_from_slice(body);
    Answer::Body(Body { bytes, len })
}

impl Body {
    /// The whole reply, `header` in front.
    #[expect(
        clippy::indexing_slicing,
        reason = "`body` made `bytes` with room for `len`"
    )]
    fn reply(&mut self, header: &[u8; abi::OUT_HEADER_LEN]) -> &[u8] {
        self.bytes[..abi::OUT_HEADER_LEN].copy_from_slice(header);
        &self.bytes[..abi::OUT_HEADER_LEN + self.len]
    }
}

impl Server<'_> {
    /// Answers requests with the buffer of `slot` until the session is over or `stop` is set.
    ///
    /// # Errors
    /// [`ErrorKind::Protocol`] when the kernel sends what is no request, [`ErrorKind::Io`] when
    /// the session's descriptor fails.
    pub fn run(&self, slot: &mut Slot) -> Result<Ended> {
        loop {
            let reading = self.readers.begin();
            if self.stop.load(Ordering::Acquire) {
                return Ok(Ended::Stopped);
            }
            slot.populate()?;
            let read = nix::unistd::read(self.session, slot.take(self.remember));
            drop(reading);
            let read = match read {
                Ok(read) => read,
                Err(Errno::EINTR | Errno::EAGAIN | Errno::ENOENT) => continue,
                Err(Errno::ENODEV | Errno::ECONNABORTED) => return Ok(Ended::SessionOver),
                Err(errno) => {
                    return Err(Error::io(
                        "/dev/fuse: no more requests can be read",
                        errno.into(),
                    ));
                }
            };
            slot.begun();
            if self.remember {
                slot.taken(read);
            }
            let request = Owed {
                len: read,
                done: None,
            };
            if let Some(ended) = self.answer(slot, request)? {
                return Ok(ended);
            }
        }
    }

    /// Answers the request that a dead server left in `slot`, if there is one.
    ///
    /// # Errors
    /// As [`Server::run`].
    pub fn replay(&self, slot: &mut Slot) -> Result<()> {
        if let Some(owed) = slot.owed() {
            if owed.done.is_none() {
                slot.taken(owed.len);
            }
            self.answer(slot, owed)?;
        }
        Ok(())
    }

    fn answer(&self, slot: &mut Slot, owed: Owed) -> Result<Option<Ended>> {
        let mut wrote = false;
        let (unique, answer) = match Request::parse(slot.request(owed.len)?) {
            Ok(request) => {
                let unique = request.unique;
                wrote = matches!(request.operation, Operation::Write { .. });
                let answer = match (request.operation, owed.done) {
                    (Operation::Read { offset, size }, _) => self.read(slot, offset, size),
                    (operation, Some(errno)) if operation.changes_data() => {
                        Ok(carried_out(operation, errno))
                    }
                    (operation, _) => self.execute(operation),
                };
                (unique, answer.unwrap_or_else(|error| self.failed(&error)))
            }
            Err(ParseError::ShortArguments(_, unique)) => (unique, Answer::Errno(libc::EINVAL)),
            Err(error) => {
                return Err(Error::with_source(
                    ErrorKind::Protocol,
                    "/dev/fuse: the kernel sent what is no request",
                    error,
                ));
            }
        };
        if matches!(answer, Answer::Left) {
            return Ok(Some(Ended::Stopped));
        }
        if self.remember {
            slot.done(match answer {
                Answer::Errno(errno) => errno,
                _ => 0,
            });
        }
        let mut session = self.session;
        let header = |errno, len| abi::out_header(unique, errno, len);
        let sent = match answer {
            Answer::None | Answer::Left => Ok(()),
            Answer::Errno(errno) => session.write_all(&header(errno, 0)),
            Answer::Body(mut body) => {
                let header = header(0, body.len);
                session.write_all(body.reply(&header))
            }
            Answer::Data(len) => session.write_all(slot.read_reply(header(0, len), len)),
        };
        slot.answered(unique & abi::UNIQUE_RESEND != 0);
        if wrote {
            self.device.flush_ahead();
        }
        match sent.map_err(|error| (error.raw_os_error(), error)) {
            // ENOENT: the asker is gone, or a dead server had answered already.
            Ok(()) | Err((Some(libc::ENOENT), _)) => Ok(None),
            Err((Some(libc::ENODEV | libc::ECONNABORTED), _)) => Ok(Some(Ended::SessionOver)),
            Err((_, error)) => Err(Error::io("/dev/fuse: a reply was refused", error)),
        }
    }

    /// The errno of a failure, which is logged: each of the first ones, then ever fewer.
    fn failed(&self, error: &Error) -> Answer {
        let count = self.failures.fetch_add(1, Ordering::Relaxed) + 1;
        if count.is_power_of_two() {
            tracing::error!(failures = count, "a request failed: {error}");
        }
        Answer::Errno(error.errno())
    }

    fn read(&self, slot: &mut Slot, offset: u64, size: u32) -> Result<Answer> {
        let rest = self.device.size().saturating_sub(offset);
        let len = (size as usize).min(usize::try_from(rest).unwrap_or(usize::MAX));
        let Some(buf) = slot.data(len) else {
            return Ok(Answer::Errno(libc::EINVAL));
        };
        self.device.read_at(buf, offset)?;
        Ok(Answer::Data(len))
    }

    /// Does what wants space, and holds it for a while where the host's disk is full, since a file
    /// system that is told so may give up. `None` where the server is told to stop meanwhile.
    fn patiently<T>(&self, mut work: impl FnMut() -> Result<T>) -> Result<Option<T>> {
        let mut result = work();
        if !result.as_ref().is_err_and(Error::is_full_disk) {
            return result.map(Some);
        }
        let _held = Held(self.held);
        if self.held.fetch_add(1, Ordering::AcqRel) >= self.held_at_most {
            return result.map(Some);
        }
        about_to_wait();
        let _waits = waits();
        while result.as_ref().is_err_and(Error::is_full_disk) && self.device.wait_for_room() {
            if self.stop.load(Ordering::Acquire) {
                return Ok(None);
            }
            result = work();
        }
        result.map(Some)
    }

    fn execute(&self, operation: Operation<'_>) -> Result<Answer> {
        let device = self.device;
        Ok(match operation {
            Operation::Write { offset, data } => {
                let write = || device.write_at(data, offset, Durability::Buffered);
                match self.patiently(write)? {
                    Some(()) => body(&abi::write_out(data.len() as u32)),
                    None => Answer::Left,
                }
            }
            Operation::Fsync => {
                device.flush()?;
                Answer::Errno(0)
            }
            Operation::Fallocate {
                offset,
                length,
                mode,
            } => match mode {
                abi::FALLOC_PUNCH_HOLE_KEEP_SIZE => {
                    device.discard(offset, length)?;
                    Answer::Errno(0)
                }
                abi::FALLOC_ZERO_RANGE_KEEP_SIZE => {
                    let mode = ZeroMode::KeepAllocated;
                    let zero = || device.write_zeroes(offset, length, mode, Durability::Buffered);
                    match self.patiently(zero)? {
                        Some(()) => Answer::Errno(0),
                        None => Answer::Left,
                    }
                }
                // Not ENOSYS, after which the kernel would never ask for any mode again.
                _ => Answer::Errno(libc::EOPNOTSUPP),
            },
            Operation::Getattr => {
                let mode = if device.is_read_only() { 0o400 } else { 0o600 };
                body(&abi::attr_out(device.size(), libc::S_IFREG | mode))
            }
            Operation::Open { flags } => {
                let writes = flags as i32 & libc::O_ACCMODE != libc::O_RDONLY;
                if writes && device.is_read_only() {
                    Answer::Errno(libc::EROFS)
                } else {
                    body(&abi::open_out(
                        abi::FOPEN_DIRECT_IO
                            | abi::FOPEN_NOFLUSH
                            | abi::FOPEN_PARALLEL_DIRECT_WRITES,
                    ))
                }
            }
            Operation::Lseek { offset, whence } => match seek(device, offset, whence)? {
                Ok(offset) => body(&abi::lseek_out(offset)),
                Err(errno) => Answer::Errno(errno),
            },
            Operation::Statfs => body(&abi::statfs_out(device.size())),
            Operation::Flush | Operation::Release | Operation::Destroy => Answer::Errno(0),
            Operation::Forget => Answer::None,
            // ENOSYS makes the kernel stop asking: for interrupts, xattrs, access checks, statx.
            Operation::Init(_)
            | Operation::Read { .. }
            | Operation::Interrupt
            | Operation::Other => Answer::Errno(libc::ENOSYS),
        })
    }
}

/// One of the writes that are held.
struct Held<'a>(&'a AtomicU64);

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// The answer to a request that a dead server had carried out with `errno`.
fn carried_out(operation: Operation<'_>, errno: i32) -> Answer {
    match operation {
        Operation::Write { data, .. } if errno == 0 => body(&abi::write_out(data.len() as u32)),
        _ => Answer::Errno(errno),
    }
}

/// The next data or hole from `offset` on, or the errno of lseek(2).
fn seek(device: &dyn BlockDevice, offset: u64, whence: u32) -> Result<Result<u64, i32>> {
    let want_data = match whence as i32 {
        libc::SEEK_DATA => true,
        libc::SEEK_HOLE => false,
        _ => return Ok(Err(libc::EINVAL)),
    };
    let size = device.size();
    if offset >= size {
        return Ok(Err(libc::ENXIO));
    }
    let mut at = offset;
    while at < size {
        let extents = device.extents(at, size - at, 64)?;
        if extents.is_empty() {
            break;
        }
        for extent in extents {
            if (extent.kind == ExtentKind::Data) == want_data {
                return Ok(Ok(extent.offset.max(offset)));
            }
            at = extent.offset + extent.len;
        }
    }
    // Every file ends in a virtual hole.
    Ok(if want_data {
        Err(libc::ENXIO)
    } else {
        Ok(size)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use vellum_base::block::MemoryDevice;

    #[test]
    fn seek_finds_data_and_holes_as_lseek_does() {
        let device = MemoryDevice::new(1 << 20);
        device
            .write_at(&[1; 4096], 8192, Durability::Buffered)
            .unwrap();
        let data = libc::SEEK_DATA as u32;
        let hole = libc::SEEK_HOLE as u32;
        assert_eq!(seek(&device, 0, data).unwrap(), Ok(8192));
        assert_eq!(seek(&device, 9000, data).unwrap(), Ok(9000));
        assert_eq!(seek(&device, 8192, hole).unwrap(), Ok(12288));
        assert_eq!(seek(&device, 12288, data).unwrap(), Err(libc::ENXIO));
        assert_eq!(seek(&device, 1 << 20, hole).unwrap(), Err(libc::ENXIO));
        assert_eq!(seek(&device, 0, 9).unwrap(), Err(libc::EINVAL));
    }
}
