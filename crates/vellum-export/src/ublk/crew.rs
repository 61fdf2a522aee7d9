//! What the threads that serve a ublk device share.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use memmap2::{MmapOptions, MmapRaw};

use super::abi::{self, DEPTH, DESCRIPTOR_LEN, Descriptor, DeviceId, Tag};
use crate::inbox::{Inbox, Jobs};
use crate::shortage::Shortage;
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};

/// How long udev may take to show a device's character device, and to close it again.
const SHOWN: Duration = Duration::from_secs(10);
const PAGE: usize = 4096;

/// The answer to a request: bytes, or an errno below 0.
pub(super) type Answer = (Tag, i32);

/// The thread that fetches and commits, and those that carry out what has to wait.
#[derive(Debug)]
pub(crate) struct Crew {
    /// The device's character device.
    device: File,
    /// What is asked, as the kernel lays it out; mapped by the thread that fetches.
    descriptors: OnceLock<MmapRaw>,
    /// Where the thread that fetches is told what to commit.
    pub(super) inbox: Inbox<Answer>,
    pub(super) jobs: Jobs<Tag>,
}

impl Crew {
    /// For the threads of one worker: no other process may serve the device. `shortage` is told when none is
    /// spare any more.
    ///
    /// # Errors
    /// [`ErrorKind::InUse`] while another program has its character device open, [`ErrorKind::Missing`] where
    /// that does not show.
    pub(crate) fn new(id: DeviceId, shortage: Shortage) -> Result<Crew> {
        Ok(Crew {
            device: open(id)?,
            descriptors: OnceLock::new(),
            inbox: Inbox::new()?,
            jobs: Jobs::new(shortage),
        })
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.device.as_fd()
    }

    /// Maps the descriptors, to be called once the kernel has the first fetches: it remembers who mapped
    /// them first, and would refuse the next server if this process died between the two.
    pub(super) fn map(&self) -> Result<()> {
        let len = (usize::from(DEPTH) * DESCRIPTOR_LEN).next_multiple_of(PAGE);
        let map = MmapOptions::new().len(len).map_raw_read_only(&self.device);
        let map = map.context(|| "the requests of a ublk device cannot be mapped")?;
        self.descriptors
            .set(map)
            .map_err(|_| Error::internal("the requests of a ublk device are mapped already"))
    }

    /// What a request asks that was fetched and not committed.
    pub(super) fn descriptor(&self, tag: Tag) -> Result<Descriptor> {
        let map = self.descriptors.get();
        let map = map.ok_or_else(|| Error::internal("a request came before all was mapped"))?;
        assert!(tag.0 < DEPTH, "the kernel names a request that cannot be");
        let mut bytes = [0; DESCRIPTOR_LEN];
        let from = map
            .as_ptr()
            .wrapping_add(usize::from(tag.0) * DESCRIPTOR_LEN);
        // SAFETY: the mapping has a descriptor for each of DEPTH requests, and the kernel does not write
        // this one between its fetch and its commit.
        unsafe { from.copy_to_nonoverlapping(bytes.as_mut_ptr(), DESCRIPTOR_LEN) };
        Ok(Descriptor::parse(&bytes))
    }

    /// Copies what a WRITE brings.
    pub(super) fn take_data(&self, tag: Tag, data: &mut [u8]) -> Result<Moved> {
        let read = self.device.read_exact_at(data, abi::data_offset(tag));
        Moved::from(read).context(|| "the data of a request cannot be read")
    }

    /// Gives a READ what it wants.
    pub(super) fn give_data(&self, tag: Tag, data: &[u8]) -> Result<Moved> {
        let wrote = self.device.write_all_at(data, abi::data_offset(tag));
        Moved::from(wrote).context(|| "the data of a request cannot be handed over")
    }

    /// Ends the threads: what they have and did not commit the kernel sends to the next worker.
    pub(crate) fn stop(&self) {
        self.jobs.stop();
        self.inbox.wake();
    }
}

/// What became of the data of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Moved {
    All,
    /// The device was deleted, and the request with it.
    Gone,
}

impl Moved {
    fn from(done: io::Result<()>) -> io::Result<Moved> {
        match done.map_err(|error| (error.raw_os_error(), error)) {
            Ok(()) => Ok(Moved::All),
            Err((Some(libc::EACCES | libc::ENODEV), _)) => Ok(Moved::Gone),
            Err((_, error)) => Err(error),
        }
    }
}

fn open(id: DeviceId) -> Result<File> {
    let path = format!("/dev/ublkc{}", id.0);
    let deadline = Instant::now() + SHOWN;
    loop {
        let opened = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_CLOEXEC)
            .open(&path);
        match opened.map_err(|error| (error.raw_os_error(), error)) {
            Ok(file) => return Ok(file),
            // udev has not made it yet, or looks at it.
            Err((Some(libc::ENOENT | libc::EACCES | libc::EBUSY), _))
                if Instant::now() < deadline =>
            {
                std::thread::sleep(Duration::from_millis(1));
            }
            Err((Some(libc::ENOENT), error)) => {
                return Err(Error::with_source(
                    ErrorKind::Missing,
                    format!(
                        "{path}: the kernel has this device, but /dev shows no node for it within {SHOWN:?}: in \
                         a container, give it the host's /dev"
                    ),
                    error,
                ));
            }
            Err((_, error)) => return Err(Error::io(format!("{path}: cannot be opened"), error)),
        }
    }
}
