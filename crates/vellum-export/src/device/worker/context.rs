//! What a worker has: from the process that it was forked from, and what its threads share.

use std::fs::File;
use std::io::Write;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize};
use std::time::Instant;

use nix::sys::eventfd::EventFd;
use parking_lot::Mutex;

use crate::device::event::Event;
use crate::device::opened::Opened;
use crate::device::process::Identity;
use crate::device::watch::Limits;
use crate::fuse::readers::Readers;
use crate::fuse::ring::crew::Crew;
use crate::fuse::ring::memory::RingMemory;
use crate::fuse::session::Features;
use crate::fuse::slot::Shared;
use crate::shortage::Shortage;
use crate::ublk;
use vellum_fs::run_dir::HeldRunDir;

/// What a worker gets from the process that it was forked from.
pub(in crate::device) struct Worker {
    pub run_dir: HeldRunDir,
    pub session: Arc<File>,
    pub features: Features,
    pub use_resend: bool,
    /// Threads that take requests at once; more stand by for when they wait for the disk.
    pub threads: usize,
    pub shared: Arc<Shared>,
    /// The entries of the ring, where requests come by one.
    pub ring: Option<Arc<RingMemory>>,
    /// The ring has its guard, as always but in a test.
    pub guarded: bool,
    pub listener: UnixListener,
    /// The pipe to the supervisor.
    pub events: Mutex<Arc<File>>,
    pub supervisor: Identity,
    pub generation: u32,
    /// Another worker served before.
    pub resume: bool,
    /// When the others hang.
    pub limits: Limits,
}

/// How requests come, and what its threads share.
pub(super) enum Way {
    /// By /dev/fuse.
    Classic,
    /// By the entries of a ring.
    Ring(Arc<Crew>),
    /// By a ublk device.
    Ublk(Arc<ublk::crew::Crew>),
}

impl Way {
    /// Ends the threads.
    pub(super) fn stop(&self) {
        match self {
            Way::Classic => {}
            Way::Ring(crew) => crew.stop(),
            Way::Ublk(crew) => crew.stop(),
        }
    }
}

/// What control connections and the main thread share.
pub(super) struct Context {
    pub(super) worker: Worker,
    pub(super) started: Instant,
    pub(super) opened: Opened,
    pub(super) readers: Arc<Readers>,
    /// Told when no thread is spare any more: the main thread starts more.
    pub(super) shortage: Shortage,
    pub(super) way: Way,
    pub(super) failures: AtomicU64,
    pub(super) connections: AtomicUsize,
    /// Commands that are being carried out.
    pub(super) busy: AtomicUsize,
    /// Connections without an answer so far: the first command is on its way.
    pub(super) fresh: AtomicUsize,
    pub(super) stop: AtomicBool,
    /// Written to end the main thread's wait.
    pub(super) wake: EventFd,
}

/// Tells the supervisor. One that is dead is no reason to end.
pub(super) fn report(worker: &Worker, event: &Event) -> bool {
    let Ok(mut line) = serde_json::to_vec(event) else {
        return false;
    };
    line.push(b'\n');
    let events = Arc::clone(&worker.events.lock());
    (&*events).write_all(&line).is_ok()
}
