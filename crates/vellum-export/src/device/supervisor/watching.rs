//! Who watches whom: the supervisor looks after worker and standby, the standby after the supervisor.
//! What hangs is killed, and then replaced as what dies is.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::time::Instant;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;

use super::{Role, Supervisor};
use crate::device::process::{Identity, kill, monotonic_ns};
use crate::device::state::Status;
use crate::device::watch::{Companion, Hang, PERIOD, Watch};
use crate::ublk::disk::UblkDisk;
use vellum_base::error::{Error, ErrorKind, Result};

/// Workers in a row that hung soon, after which the device is given up: then the next one would hang
/// too, and errors are better than waiting for ever.
const MAX_HANGS: u32 = 5;

impl Supervisor {
    /// Says that this process runs.
    pub(super) fn beat(&self) {
        self.shared.table().supervisor.beat(monotonic_ns());
    }

    /// Makes this process the one that the others look at as the supervisor.
    pub(super) fn show_myself(&self) {
        let me = Identity::current();
        let table = self.shared.table();
        table.supervisor.belongs_to(me.pid, me.start);
        self.beat();
    }

    /// Looks at worker and standby, once a second, and kills what hangs.
    pub(super) fn look_around(&mut self) {
        self.look_at = Instant::now() + PERIOD;
        if let (Some(worker), None) = (&self.worker, self.hang) {
            let queued = match self.features.ublk {
                Some(id) => UblkDisk(id).has_requests(),
                None => has_requests(&self.session),
            };
            let pid = worker.pid();
            let ring = self.ring.as_deref();
            let look = self
                .watch
                .look(pid, self.worker_served, queued, &self.shared, ring);
            if let Some(hang) = self.watch.judge(&look, Instant::now()) {
                self.kill_hung(hang);
            }
        }
        let Some(standby) = &self.standby else { return };
        let hung = self.companion.look(&self.shared.table().standby);
        if let Some((identity, hang)) = hung
            && identity.pid == standby.process.pid()
        {
            tracing::error!("the standby {} and is replaced", hang.reason());
            standby.process.signal(Signal::SIGKILL);
        }
    }

    fn kill_hung(&mut self, hang: Hang) {
        let Some(worker) = &self.worker else { return };
        let pid = worker.pid();
        worker.signal(Signal::SIGKILL);
        tracing::error!("the worker (process {pid}) {}: it is killed", hang.reason());
        self.hang = Some(hang);
        self.shared.table().hangs.fetch_add(1, Ordering::Relaxed);
        self.note_counts();
        self.state.hang = Some(format!("the worker (process {pid}) {}", hang.reason()));
        self.state.status = Status::Restarting;
        self.write_state();
    }

    /// Judges the death of a worker that was killed because it hung.
    pub(super) fn hung_worker_died(&mut self, hang: Hang) -> Option<Role> {
        self.note_death();
        self.restart_at = Some(Instant::now());
        if hang == Hang::Stopped {
            return None;
        }
        // What it answered meanwhile proves nothing: the request that it hung over is sent again.
        if self.worker_since.elapsed() > self.args.limits().row() {
            self.hangs_in_a_row = 0;
        }
        self.hangs_in_a_row += 1;
        if self.hangs_in_a_row <= MAX_HANGS {
            return None;
        }
        let error = Error::new(
            ErrorKind::Io,
            format!(
                "the device server hung {} times in a row and is given up: its \
                 users get I/O errors, nothing that was flushed is lost (see {})",
                self.hangs_in_a_row,
                self.run_dir.now().log().display()
            ),
        );
        Some(self.end(Status::Failed, Some(error)))
    }

    /// Begins to watch a worker that was just started or found.
    pub(super) fn watch_new_worker(&mut self) {
        self.hang = None;
        self.watch = Watch::new(self.args.limits(), Instant::now());
    }

    /// In the standby: waits to be needed. True when it shall be the worker, false when the
    /// supervisor is dead, or was found to hang and killed here.
    pub(super) fn stand_by(&self, wait: &OwnedFd) -> bool {
        let table = self.shared.table();
        let me = Identity::current();
        table.standby.belongs_to(me.pid, me.start);
        let mut companion = Companion::new(self.args.limits());
        let told = loop {
            table.standby.beat(monotonic_ns());
            let mut fds = [PollFd::new(wait.as_fd(), PollFlags::POLLIN)];
            match poll(&mut fds, PollTimeout::from(PERIOD.as_millis() as u16)) {
                Ok(0) => {
                    if let Some((supervisor, hang)) = companion.look(&table.supervisor) {
                        let pid = supervisor.pid;
                        tracing::error!("the supervisor (process {pid}) {}", hang.reason());
                        kill(supervisor);
                    }
                }
                Ok(_) => {
                    let mut byte = [0];
                    match nix::unistd::read(wait, &mut byte) {
                        Err(Errno::EINTR) => {}
                        Ok(1) => break true,
                        _ => break false,
                    }
                }
                Err(Errno::EINTR) => {}
                Err(_) => break false,
            }
        };
        table.standby.belongs_to(0, 0);
        told
    }
}

/// True while the kernel has requests of the session that nobody took.
fn has_requests(session: &File) -> bool {
    let mut fds = [PollFd::new(session.as_fd(), PollFlags::POLLIN)];
    let ready: Result<i32, Errno> = poll(&mut fds, PollTimeout::ZERO);
    let [session] = fds;
    let events = session.revents().unwrap_or(PollFlags::empty());
    // An error means that the session is over, which the worker finds out.
    ready.is_ok() && events.contains(PollFlags::POLLIN) && !events.contains(PollFlags::POLLERR)
}
