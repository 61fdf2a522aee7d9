//! The loop of one serving thread: what a device answers, however the requests come.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::abi::{self, Operation};
use super::transport::{Body, Classic, Ended, Fetched, Patience, Reply, Transport};
use vellum_base::block::{BlockDevice, Durability, ExtentKind, ZeroMode};
use vellum_base::error::{Error, Result};
use vellum_base::storage::{about_to_wait, unless_it_stalls, unless_it_waits, waits};

/// What the threads that serve one session share.
pub struct Server<'a> {
    /// What is served.
    pub device: &'a dyn BlockDevice,
    /// Set to end the threads.
    pub stop: &'a AtomicBool,
    /// Failures answered so far, so that a full disk does not fill the log.
    pub failures: &'a AtomicU64,
    /// Writes that wait for room on the host's disk, and how many may: the other threads serve.
    pub held: &'a AtomicU64,
    /// See [`Server::held`].
    pub held_at_most: u64,
}

/// What became of a request.
enum Outcome {
    /// It is answered so.
    Reply(Reply),
    /// Nothing by this process: the server was told to stop, and the next one gets the request.
    Left,
    /// It has to wait for longer than this thread may.
    Waits,
}

fn errno(errno: i32) -> Outcome {
    Outcome::Reply(Reply::Errno(errno))
}

fn body(body: &[u8]) -> Outcome {
    Outcome::Reply(Reply::Body(Body::new(body)))
}

impl Server<'_> {
    /// Answers requests until the session is over or `stop` is set.
    ///
    /// # Errors
    /// Those of [`Transport`].
    pub fn run(&self, transport: &mut impl Transport) -> Result<Ended> {
        loop {
            let ticket = match transport.fetch()? {
                Fetched::Request(ticket) => ticket,
                Fetched::Over(ended) => return Ok(ended),
            };
            if let Some(ended) = self.answer(transport, ticket)? {
                return Ok(ended);
            }
        }
    }

    /// Answers the request that a dead server left in the slot of `classic`, if there is one.
    ///
    /// # Errors
    /// As [`Server::run`].
    pub fn replay(&self, classic: &mut Classic<'_>) -> Result<()> {
        if let Some(owed) = classic.owed() {
            self.answer(classic, owed)?;
        }
        Ok(())
    }

    fn answer<T: Transport>(&self, transport: &mut T, ticket: T::Ticket) -> Result<Option<Ended>> {
        let mut wrote = false;
        let done = transport.carried_out(ticket);
        let outcome = match transport.request(ticket)? {
            Ok(request) => {
                wrote = matches!(request.operation, Operation::Write { .. });
                let outcome = match (request.operation, done) {
                    (Operation::Read { offset, size }, _) => {
                        self.read(transport, ticket, offset, size)
                    }
                    (operation, Some(errno)) if operation.changes_data() => {
                        Ok(carried_out(operation, errno))
                    }
                    (operation, _) => self.execute(operation, transport.patience()),
                };
                outcome.unwrap_or_else(|error| self.failed(&error))
            }
            Err(_) => errno(libc::EINVAL),
        };
        let ended = match outcome {
            Outcome::Left => return Ok(Some(Ended::Stopped)),
            Outcome::Waits => {
                transport.hand_over(ticket);
                return Ok(None);
            }
            Outcome::Reply(reply) => transport.commit(ticket, reply)?,
        };
        if wrote && self.device.expects_flush() {
            transport.flush()?;
            self.device.flush_ahead();
        }
        Ok(ended)
    }

    /// The errno of a failure, which is logged: each of the first ones, then ever fewer.
    fn failed(&self, error: &Error) -> Outcome {
        let count = self.failures.fetch_add(1, Ordering::Relaxed) + 1;
        if count.is_power_of_two() {
            tracing::error!(failures = count, "a request failed: {error}");
        }
        errno(error.errno())
    }

    fn read<T: Transport>(
        &self,
        transport: &mut T,
        ticket: T::Ticket,
        offset: u64,
        size: u32,
    ) -> Result<Outcome> {
        let rest = self.device.size().saturating_sub(offset);
        let len = (size as usize).min(usize::try_from(rest).unwrap_or(usize::MAX));
        let patience = transport.patience();
        let Some(buf) = transport.data(ticket, len) else {
            return Ok(errno(libc::EINVAL));
        };
        let mut read = || self.device.read_at(buf, offset);
        let done = match patience {
            Patience::Any => Some(read()),
            Patience::Host => unless_it_stalls(read),
            Patience::None => unless_it_waits(read),
        };
        Ok(match done {
            Some(done) => done.map(|()| Outcome::Reply(Reply::Data(len)))?,
            None => Outcome::Waits,
        })
    }

    /// Does what wants space, and holds it for a while where the host's disk is full, since a file
    /// system that is told so may give up; `done` is the outcome once there was room.
    fn patiently(
        &self,
        patience: Patience,
        done: Outcome,
        mut work: impl FnMut() -> Result<()>,
    ) -> Result<Outcome> {
        let mut result = match patience {
            Patience::Any => work(),
            // What it copies up may be elsewhere.
            Patience::Host | Patience::None => match unless_it_stalls(&mut work) {
                Some(result) => result,
                None => return Ok(Outcome::Waits),
            },
        };
        if !result.as_ref().is_err_and(Error::is_full_disk) {
            return result.map(|()| done);
        }
        if patience != Patience::Any {
            return Ok(Outcome::Waits);
        }
        let _held = Held(self.held);
        if self.held.fetch_add(1, Ordering::AcqRel) >= self.held_at_most {
            return result.map(|()| done);
        }
        about_to_wait();
        let _waits = waits();
        while result.as_ref().is_err_and(Error::is_full_disk) && self.device.wait_for_room() {
            if self.stop.load(Ordering::Acquire) {
                return Ok(Outcome::Left);
            }
            result = work();
        }
        result.map(|()| done)
    }

    fn execute(&self, operation: Operation<'_>, patience: Patience) -> Result<Outcome> {
        let device = self.device;
        Ok(match operation {
            Operation::Write { durability, .. }
                if patience == Patience::None && durability == Durability::Durable =>
            {
                Outcome::Waits
            }
            Operation::Write {
                offset,
                data,
                durability,
            } => {
                let write = || device.write_at(data, offset, durability);
                let done = body(&abi::write_out(data.len() as u32));
                self.patiently(patience, done, write)?
            }
            Operation::Fsync if patience == Patience::None => Outcome::Waits,
            Operation::Fsync => {
                device.flush()?;
                errno(0)
            }
            Operation::Fallocate {
                offset,
                length,
                mode,
            } => match mode {
                abi::FALLOC_PUNCH_HOLE_KEEP_SIZE => {
                    let discard = || device.discard(offset, length);
                    self.patiently(patience, errno(0), discard)?
                }
                abi::FALLOC_ZERO_RANGE_KEEP_SIZE => {
                    let mode = ZeroMode::KeepAllocated;
                    let zero = || device.write_zeroes(offset, length, mode, Durability::Buffered);
                    self.patiently(patience, errno(0), zero)?
                }
                // Not ENOSYS, after which the kernel would never ask for any mode again.
                _ => errno(libc::EOPNOTSUPP),
            },
            Operation::Getattr => {
                let mode = if device.is_read_only() { 0o400 } else { 0o600 };
                body(&abi::attr_out(device.size(), libc::S_IFREG | mode))
            }
            Operation::Open { flags } => {
                let writes = flags as i32 & libc::O_ACCMODE != libc::O_RDONLY;
                if writes && device.is_read_only() {
                    errno(libc::EROFS)
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
                Err(refused) => errno(refused),
            },
            Operation::Statfs => body(&abi::statfs_out(device.size())),
            Operation::Flush | Operation::Release | Operation::Destroy | Operation::Retrieved => {
                errno(0)
            }
            Operation::Forget => Outcome::Reply(Reply::None),
            // ENOSYS makes the kernel stop asking: for interrupts, xattrs, access checks, statx.
            Operation::Init(_)
            | Operation::Read { .. }
            | Operation::Interrupt
            | Operation::Other => errno(libc::ENOSYS),
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
fn carried_out(operation: Operation<'_>, result: i32) -> Outcome {
    match operation {
        Operation::Write { data, .. } if result == 0 => body(&abi::write_out(data.len() as u32)),
        _ => errno(result),
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
