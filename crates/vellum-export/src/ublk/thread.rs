//! The thread that fetches the requests of a ublk device and commits the answers, one system call for what
//! was answered and what has come; and the threads to which it gives what has to wait.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsRawFd;

use io_uring::{IoUring, cqueue, opcode, squeue, types};
use memmap2::MmapMut;

use super::abi::{DEPTH, Descriptor, IoVerb, MAX_IO, Op, Tag, io_command};
use super::crew::{Crew, Moved};
use crate::fuse::abi::{
    FALLOC_PUNCH_HOLE_KEEP_SIZE, FALLOC_ZERO_RANGE_KEEP_SIZE, Operation, ParseError, Request,
};
use crate::fuse::slot::Shared;
use crate::fuse::transport::{Ended, Fetched, Patience, Reply, Transport};
use crate::uring::{Crowd, is_passing};
use vellum_base::block::{Durability, part};
use vellum_base::error::{Error, Result, ResultExt};

/// A request of this many bytes is carried out by another thread where others wait: copying takes longer
/// than waking.
const LARGE: u64 = 128 << 10;

/// What a completion is about that is about no request.
const WAKE: u64 = 1 << 32;

/// A request that a thread has, its data in the thread's buffer.
struct InHand<'a> {
    crew: &'a Crew,
    shared: &'a Shared,
    /// The thread's number among those of the device.
    index: usize,
    data: MmapMut,
    asked: Descriptor,
}

impl<'a> InHand<'a> {
    fn new(crew: &'a Crew, shared: &'a Shared, index: usize) -> Result<InHand<'a>> {
        Ok(InHand {
            crew,
            shared,
            index,
            data: MmapMut::map_anon(MAX_IO).context(|| "a buffer for requests")?,
            asked: Descriptor {
                op: Op::Flush,
                offset: 0,
                len: 0,
                fua: false,
                keep_allocated: false,
            },
        })
    }

    /// Takes a request in hand, and what it brings.
    fn take(&mut self, tag: Tag) -> Result<Fetched<Tag>> {
        self.shared.begun(self.index);
        self.asked = self.crew.descriptor(tag)?;
        if self.asked.op != Op::Write {
            return Ok(Fetched::Request(tag));
        }
        let len = self.asked.len as usize;
        let data = self.data.get_mut(..len);
        let data = data
            .ok_or_else(|| Error::internal(format!("the kernel sends a request of {len} bytes")))?;
        Ok(match self.crew.take_data(tag, data)? {
            Moved::All => Fetched::Request(tag),
            Moved::Gone => Fetched::Over(Ended::SessionOver),
        })
    }

    fn request(&self, tag: Tag) -> std::result::Result<Request<'_>, ParseError> {
        let Descriptor {
            op, offset, len, ..
        } = self.asked;
        let operation = match op {
            Op::Read => Operation::Read {
                offset,
                size: len as u32,
            },
            Op::Write => Operation::Write {
                offset,
                data: part(&self.data, 0, len as usize),
                durability: match self.asked.fua {
                    true => Durability::Durable,
                    false => Durability::Buffered,
                },
            },
            Op::Flush => Operation::Fsync,
            Op::Discard => Operation::Fallocate {
                offset,
                length: len,
                mode: FALLOC_PUNCH_HOLE_KEEP_SIZE,
            },
            Op::WriteZeroes => Operation::Fallocate {
                offset,
                length: len,
                mode: match self.asked.keep_allocated {
                    true => FALLOC_ZERO_RANGE_KEEP_SIZE,
                    false => FALLOC_PUNCH_HOLE_KEEP_SIZE,
                },
            },
            Op::Other(_) => Operation::Fallocate {
                offset,
                length: len,
                mode: u32::MAX,
            },
        };
        Ok(Request {
            opcode: 0,
            unique: u64::from(tag.0),
            operation,
        })
    }

    /// Hands over what a READ gets, and says what to commit.
    fn finish(&self, tag: Tag, reply: &Reply) -> Result<i32> {
        let result = match reply {
            Reply::None => 0,
            Reply::Errno(errno) => -*errno,
            Reply::Body(_) => self.asked.len as i32,
            Reply::Data(len) => match self.crew.give_data(tag, part(&self.data, 0, *len))? {
                Moved::All => *len as i32,
                // Nobody waits for it any more.
                Moved::Gone => -libc::EIO,
            },
        };
        self.shared.served_one(self.index);
        Ok(result)
    }
}

/// The thread with the ring; [`Transport`] for it.
pub(crate) struct UblkThread<'a> {
    crew: &'a Crew,
    ring: IoUring,
    ready: VecDeque<Tag>,
    hand: InHand<'a>,
    crowd: Crowd,
    over: bool,
}

impl<'a> UblkThread<'a> {
    /// A ring whose fetches the kernel has. The calling thread alone may use it: the kernel takes commits
    /// from nobody else.
    ///
    /// # Errors
    /// [`ErrorKind::Io`](vellum_base::ErrorKind::Io) where the kernel refuses.
    pub(crate) fn new(crew: &'a Crew, shared: &'a Shared) -> Result<UblkThread<'a>> {
        let what = || "a ring cannot be set up";
        let ring: IoUring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_taskrun_flag()
            .setup_submit_all()
            .build(u32::from(DEPTH) * 2)
            .context(what)?;
        let device = [crew.fd().as_raw_fd()];
        ring.submitter().register_files(&device).context(what)?;
        let mut thread = UblkThread {
            crew,
            ring,
            ready: VecDeque::new(),
            hand: InHand::new(crew, shared, 0)?,
            crowd: Crowd::new(),
            over: false,
        };
        thread.listen()?;
        for tag in 0..DEPTH {
            thread.command(IoVerb::Fetch, Tag(tag), 0)?;
        }
        // All in one call: the kernel cannot forget half of the fetches of a server that is killed.
        thread.submit(0)?;
        crew.map()?;
        Ok(thread)
    }

    /// Asks to be woken when the others have something to commit.
    fn listen(&mut self) -> Result<()> {
        let wake = types::Fd(self.crew.inbox.wake_fd());
        let poll = opcode::PollAdd::new(wake, libc::POLLIN as u32).multi(true);
        self.push(&poll.build().user_data(WAKE))
    }

    fn command(&mut self, verb: IoVerb, tag: Tag, result: i32) -> Result<()> {
        let entry = opcode::UringCmd16::new(types::Fixed(0), verb as u32)
            .cmd(io_command(tag, result))
            .build();
        self.push(&entry.user_data(u64::from(tag.0)))
    }

    fn push(&mut self, entry: &squeue::Entry) -> Result<()> {
        if self.ring.submission().is_full() {
            self.submit(0)?;
        }
        // SAFETY: the entries name no memory of ours, and descriptors that the crew keeps open.
        let pushed = unsafe { self.ring.submission().push(entry) };
        pushed.map_err(|_| Error::internal("the queue of submissions is full after a submission"))
    }

    fn send(&mut self, tag: Tag, result: i32) -> Result<()> {
        self.command(IoVerb::CommitAndFetch, tag, result)
    }

    /// Submits all and waits for `want` completions.
    fn submit(&mut self, want: usize) -> Result<()> {
        match self.ring.submitter().submit_and_wait(want) {
            Ok(_) => {}
            Err(error) if is_passing(&error) => {}
            Err(error) => return Err(Error::io("a ring does not go on", error)),
        }
        let completions: Vec<(u64, i32, bool)> = self
            .ring
            .completion()
            .map(|done| (done.user_data(), done.result(), cqueue::more(done.flags())))
            .collect();
        for (user_data, result, more) in completions {
            match (user_data, -result) {
                (WAKE, _) if more => {}
                (WAKE, _) => self.listen()?,
                (tag, 0) => self.ready.push_back(Tag(tag as u16)),
                (_, libc::ENODEV) => self.over = true,
                (_, errno) => {
                    let error = io::Error::from_raw_os_error(errno);
                    return Err(Error::io("a request of a ublk device failed", error));
                }
            }
        }
        Ok(())
    }

    fn has_others(&self) -> bool {
        !self.ready.is_empty() || self.crew.inbox.has_any()
    }
}

impl Transport for UblkThread<'_> {
    type Ticket = Tag;

    fn fetch(&mut self) -> Result<Fetched<Tag>> {
        loop {
            if self.crew.jobs.is_stopped() {
                self.submit(0)?;
                return Ok(Fetched::Over(Ended::Stopped));
            }
            for (tag, result) in self.crew.inbox.take() {
                self.send(tag, result)?;
            }
            if let Some(tag) = self.ready.pop_front() {
                if self.has_others() && self.crew.descriptor(tag)?.len >= LARGE {
                    self.crew.jobs.put(tag);
                    continue;
                }
                self.crowd.begin();
                return self.hand.take(tag);
            }
            if self.over {
                return Ok(Fetched::Over(Ended::SessionOver));
            }
            if self.crew.inbox.lie_down() {
                let submitted = self.submit(1);
                self.crew.inbox.get_up();
                submitted?;
            }
        }
    }

    fn request(&self, tag: Tag) -> Result<std::result::Result<Request<'_>, ParseError>> {
        Ok(self.hand.request(tag))
    }

    fn carried_out(&self, _: Tag) -> Option<i32> {
        // The kernel sends what was not committed again, and no answer was seen by anybody.
        None
    }

    fn data(&mut self, _: Tag, len: usize) -> Option<&mut [u8]> {
        self.hand.data.get_mut(..len)
    }

    fn commit(&mut self, tag: Tag, reply: Reply) -> Result<Option<Ended>> {
        let result = self.hand.finish(tag, &reply)?;
        self.crowd.done(|| self.ring.submission().taskrun());
        self.send(tag, result)?;
        Ok(None)
    }

    fn flush(&mut self) -> Result<()> {
        self.submit(0)
    }

    fn patience(&self) -> Patience {
        if self.crowd.is_calm() && !self.has_others() {
            Patience::Host
        } else {
            Patience::None
        }
    }

    fn hand_over(&mut self, tag: Tag) {
        self.crowd.handed_over();
        self.hand.shared.handed_over(self.hand.index);
        self.crew.jobs.put(tag);
    }
}

/// A thread without a ring, for requests that wait or are large.
pub(crate) struct SpareThread<'a> {
    crew: &'a Crew,
    hand: InHand<'a>,
}

impl<'a> SpareThread<'a> {
    /// Thread `index` of those of the device.
    ///
    /// # Errors
    /// [`ErrorKind::Io`](vellum_base::ErrorKind::Io) without memory.
    pub(crate) fn new(crew: &'a Crew, shared: &'a Shared, index: usize) -> Result<SpareThread<'a>> {
        Ok(SpareThread {
            crew,
            hand: InHand::new(crew, shared, index)?,
        })
    }
}

impl Transport for SpareThread<'_> {
    type Ticket = Tag;

    fn fetch(&mut self) -> Result<Fetched<Tag>> {
        let Some(tag) = self.crew.jobs.next() else {
            return Ok(Fetched::Over(Ended::Stopped));
        };
        self.hand.take(tag)
    }

    fn request(&self, tag: Tag) -> Result<std::result::Result<Request<'_>, ParseError>> {
        Ok(self.hand.request(tag))
    }

    fn carried_out(&self, _: Tag) -> Option<i32> {
        None
    }

    fn data(&mut self, _: Tag, len: usize) -> Option<&mut [u8]> {
        self.hand.data.get_mut(..len)
    }

    fn commit(&mut self, tag: Tag, reply: Reply) -> Result<Option<Ended>> {
        let result = self.hand.finish(tag, &reply)?;
        self.crew.inbox.tell([(tag, result)]);
        Ok(None)
    }

    fn flush(&mut self) -> Result<()> {
        Ok(())
    }

    fn patience(&self) -> Patience {
        Patience::Any
    }

    fn hand_over(&mut self, tag: Tag) {
        self.crew.jobs.put(tag);
    }
}
