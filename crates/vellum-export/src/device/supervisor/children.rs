//! The processes that the supervisor forks: their starts, their deaths, and the end of them all.

use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;
use std::time::Instant;

use nix::fcntl::OFlag;
use nix::sys::signal::Signal;
use nix::unistd::ForkResult;

use super::system::{fork, open_child, reap};
use super::{Role, STANDBY_DELAY, STOP_TIMEOUT, Supervisor, send_ready};
use crate::device::backoff::{Backoff, Death, Verdict};
use crate::device::event::Ready;
use crate::device::failure::Failure;
use crate::device::process::{Identity, Process, monotonic_ns};
use crate::device::state::Status;
use crate::device::watch::{Companion, Hang};
use crate::fuse::slot::{self, Shared};
use crate::ublk::disk::{Mark, UblkDisk};
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};

/// The process that waits to be the next worker, or the next supervisor.
pub(super) struct Standby {
    pub(super) process: Process,
    /// One byte sends it to work; closing this makes it the supervisor.
    pub(super) go: OwnedFd,
}

impl Supervisor {
    /// Sends the standby to work, or forks a worker. Returns a role in the new process.
    pub(super) fn start_worker(&mut self) -> Result<Option<Role>> {
        let resume = self.ever_served;
        self.worker_served = false;
        self.worker_since = Instant::now();
        self.shared.table().worker_ended.store(0, Ordering::Release);
        self.shared.table().worker.beat(0);
        self.shared.forget_notes();
        if let Some(ring) = &self.ring {
            ring.forget_requests();
        }
        self.watch_new_worker();
        if let Some(standby) = self.take_standby() {
            match nix::unistd::write(&standby.go, b"g") {
                Ok(_) => {
                    self.worker = Some(standby.process);
                    // While it opens the device: nobody may take it for a standby.
                    self.state.standby = None;
                    self.state.status = Status::Restarting;
                    self.write_state();
                    return Ok(None);
                }
                Err(_) => {
                    reap(standby.process.pid());
                }
            }
        }
        match fork()? {
            ForkResult::Parent { child } => {
                self.worker = Some(open_child(child)?);
                Ok(None)
            }
            ForkResult::Child => {
                self.forget_children();
                Ok(Some(Role::Worker { resume }))
            }
        }
    }

    /// The standby, unless somebody stopped it: one that does not run cannot take over.
    fn take_standby(&mut self) -> Option<Standby> {
        let standby = self.standby.take()?;
        let pid = standby.process.pid();
        if !matches!(Identity::of(pid), Ok(Some(one)) if one.is_stopped()) {
            return Some(standby);
        }
        tracing::error!("the standby (process {pid}) is stopped: it is killed");
        standby.process.signal(Signal::SIGKILL);
        let _ = standby.process.wait(STOP_TIMEOUT);
        reap(pid);
        None
    }

    /// Forks the process that waits. In it, returns only to become the worker, or, when the
    /// supervisor is dead, goes on as the supervisor.
    pub(super) fn fork_standby(&mut self) -> Result<Option<Role>> {
        let (wait, go) = nix::unistd::pipe2(OFlag::O_CLOEXEC)
            .context(|| "a pipe for the standby cannot be made")?;
        match fork()? {
            ForkResult::Parent { child } => {
                let process = open_child(child)?;
                self.state.standby = Identity::of(child.as_raw()).ok().flatten();
                if let Some(standby) = self.state.standby {
                    // It says so itself once it runs: until then it could be stopped unnoticed.
                    let pulse = &self.shared.table().standby;
                    pulse.belongs_to(standby.pid, standby.start);
                    pulse.beat(monotonic_ns());
                }
                self.standby = Some(Standby { process, go });
                self.write_state();
                Ok(None)
            }
            ForkResult::Child => {
                drop(go);
                self.forget_children();
                if self.stand_by(&wait) {
                    return Ok(Some(Role::Worker { resume: true }));
                }
                self.promote();
                Ok(None)
            }
        }
    }

    /// In a fork: what belongs to the supervisor alone is closed.
    pub(super) fn forget_children(&mut self) {
        self.ready = None;
        self.worker = None;
        self.standby = None;
        self.old_standby = None;
    }

    /// The standby becomes the supervisor, since that one is dead.
    pub(super) fn promote(&mut self) {
        tracing::warn!("the supervisor died: the standby takes its place");
        self.state.supervisor = Identity::current();
        self.state.standby = None;
        self.event_bytes.clear();
        self.backoff = Backoff::default();
        self.restart_at = None;
        self.stopping = None;
        // Where that cannot be told, another worker is started, which waits for the layer's lease.
        self.worker = serving_process(&self.shared).unwrap_or_else(|error| {
            tracing::error!("the worker: {error}");
            None
        });
        let worker = self.worker.as_ref();
        self.state.worker = worker.map(|_| serving_identity(&self.shared));
        self.worker_since = Instant::now();
        self.worker_served = true;
        self.upgrade = None;
        self.companion = Companion::new(self.args.limits());
        self.show_myself();
        self.watch_new_worker();
        if self.worker.is_none() {
            self.state.status = Status::Restarting;
            self.note_death();
            self.restart_at = Some(Instant::now());
        } else {
            self.standby_at = Some(Instant::now() + STANDBY_DELAY);
        }
        self.note_counts();
        self.write_state();
    }

    pub(super) fn note_death(&self) {
        let table = self.shared.table();
        table.death_ns.store(monotonic_ns(), Ordering::Release);
        table.restarts.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn worker_died(&mut self) -> Result<Option<Role>> {
        let Some(worker) = self.worker.take() else {
            return Ok(None);
        };
        let killed = reap(worker.pid());
        let hang = self.hang.take();
        if hang.is_none() {
            self.state.hang = None;
        }
        self.state.worker = None;
        let ended = self.shared.table().worker_ended.load(Ordering::Acquire);
        if ended == slot::ENDED_SESSION_OVER || self.stopping.is_some() {
            return Ok(Some(self.end(Status::Ended, None)));
        }
        // Whoever stopped it may have done so before it served.
        if let Some(hang) = hang
            && (self.ever_served || hang == Hang::Stopped)
        {
            return Ok(self.hung_worker_died(hang));
        }
        if !self.ever_served {
            let error = Error::new(
                ErrorKind::Io,
                format!(
                    "the device server died before it served (see {})",
                    self.run_dir.now().log().display()
                ),
            );
            return Ok(Some(self.end(Status::Failed, Some(error))));
        }
        self.note_death();
        if ended == slot::ENDED_STOPPED {
            self.restart_at = Some(Instant::now());
            return Ok(None);
        }
        let death = Death {
            killed,
            served: self.worker_served,
            lived: self.worker_since.elapsed(),
        };
        match self.backoff.judge(death) {
            Verdict::Restart(delay) => {
                tracing::warn!(
                    killed,
                    deaths = self.backoff.deaths(),
                    "the worker died and is replaced"
                );
                self.restart_at = Some(Instant::now() + delay);
                self.state.deaths = self.backoff.deaths();
                // The replacement is on its way: the state is written when it serves, or now if
                // that takes a while.
                if !delay.is_zero() {
                    self.state.status = Status::Restarting;
                    self.write_state();
                }
                Ok(None)
            }
            Verdict::GiveUp => {
                self.state.deaths = self.backoff.deaths();
                let reason = self.state.error.take();
                let error = Error::new(
                    ErrorKind::Io,
                    format!(
                        "the device server died {} times in a row{} and is given up: its users get \
                         I/O errors, nothing that was flushed is lost (see {})",
                        self.backoff.deaths(),
                        reason.map_or(String::new(), |reason| format!(" ({reason})")),
                        self.run_dir.now().log().display()
                    ),
                );
                Ok(Some(self.end(Status::Failed, Some(error))))
            }
        }
    }

    /// The end of the device: nobody else holds the session when this process is gone.
    pub(super) fn end(&mut self, status: Status, error: Option<Error>) -> Role {
        if let Some(worker) = self.worker.take() {
            worker.signal(Signal::SIGKILL);
            let _ = worker.wait(STOP_TIMEOUT);
            reap(worker.pid());
        }
        for standby in [self.standby.take(), self.old_standby.take()]
            .into_iter()
            .flatten()
        {
            standby.process.signal(Signal::SIGKILL);
            let _ = standby.process.wait(STOP_TIMEOUT);
            reap(standby.process.pid());
        }
        self.delete_ublk_device();
        self.state.status = status;
        self.state.worker = None;
        self.state.standby = None;
        self.state.error = error.as_ref().map(Error::to_string);
        self.write_state();
        if let (Some(mut ready), Some(error)) = (self.ready.take(), &error) {
            send_ready(&mut ready, &Ready::Failed(Failure::from(error)));
        }
        Role::End(error.map_or(Ok(()), Err))
    }
}

impl Supervisor {
    /// The kernel keeps a ublk device for a server that will not come, and lets those who use it wait.
    fn delete_ublk_device(&self) {
        let Some(id) = self.features.ublk else { return };
        let deleted = UblkDisk(id).delete_marked(Mark::of(&self.run_dir.now()));
        if let Err(error) = deleted {
            tracing::error!("{error}");
        }
    }
}

/// The worker that serves now, whoever its parent is.
///
/// # Errors
/// Where it cannot be told whether there is one.
pub(super) fn serving_process(shared: &Shared) -> Result<Option<Process>> {
    serving_identity(shared).open()
}

/// The worker that serves now, or served last.
pub(super) fn serving_identity(shared: &Shared) -> Identity {
    let table = shared.table();
    Identity {
        pid: table.worker.pid.load(Ordering::Acquire) as i32,
        start: table.worker.start.load(Ordering::Acquire),
    }
}
