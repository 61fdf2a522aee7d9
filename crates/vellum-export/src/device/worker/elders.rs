//! Supervisor and standby as their worker sees them: it watches over both, and starts another
//! supervisor where neither is left.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::context::Worker;
use crate::device::command_line::ARG0;
use crate::device::event::event_pipe;
use crate::device::handover::{Resume, own_arguments, set_close_on_exec, witness};
use crate::device::process::{Identity, kill, monotonic_ns};
use crate::device::state::RunState;
use crate::device::watch::{Companion, Limits, PERIOD};
use crate::fuse::slot::Shared;
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};

/// Supervisor and standby, which a worker looks at: where both are stopped nobody else would.
pub(super) struct Elders {
    next: Instant,
    supervisor: Companion,
    standby: Companion,
}

impl Elders {
    pub(super) fn new(limits: Limits) -> Elders {
        Elders {
            next: Instant::now(),
            supervisor: Companion::new(limits),
            standby: Companion::new(limits),
        }
    }

    /// Says that this worker runs, and kills the two where both hang: then [`adopt_alone`] starts
    /// others.
    pub(super) fn look(&mut self, shared: &Shared) {
        let now = Instant::now();
        if now < self.next {
            return;
        }
        self.next = now + PERIOD;
        let table = shared.table();
        table.worker.beat(monotonic_ns());
        let supervisor = self.supervisor.look(&table.supervisor);
        let standby = self.standby.look(&table.standby);
        let Some((supervisor, hang)) = supervisor else {
            return;
        };
        // A standby that runs sees to it.
        let pid = table.standby.pid.load(Ordering::Acquire) as i32;
        let start = table.standby.start.load(Ordering::Acquire);
        if standby.is_none() && pid != 0 && (Identity { pid, start }).is_alive() {
            return;
        }
        let reason = hang.reason();
        tracing::error!("the supervisor (process {}) {reason}", supervisor.pid);
        // First, or it would take the place of the other.
        if let Some((standby, _)) = standby {
            kill(standby);
        }
        kill(supervisor);
    }
}

/// Starts a supervisor, since this worker has none. Returns when to try again.
pub(super) fn adopt_alone(worker: &Worker) -> Option<Instant> {
    match adopt(worker) {
        Ok(_) => {
            tracing::warn!("supervisor and standby died: another supervisor was started");
            None
        }
        // Not quite dead.
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {
            Some(Instant::now() + Duration::from_millis(20))
        }
        Err(error) => {
            tracing::error!("{error}");
            Some(Instant::now() + Duration::from_secs(1))
        }
    }
}

/// Starts a supervisor for a worker that has none any more.
pub(super) fn adopt(worker: &Worker) -> Result<Value> {
    let what = || "a supervisor cannot be started";
    // Held to the end, so that two calls do not start two.
    let mut events = worker.events.lock();
    if RunState::read(&worker.run_dir.now())?.is_some_and(|state| state.supervisor.is_alive()) {
        return Err(Error::new(
            ErrorKind::AlreadyExists,
            "the device has a supervisor",
        ));
    }
    let (events_in, events_out) = event_pipe()?;
    // Copies that the new program inherits; ours stay closed to it.
    let copies = [
        worker.session.as_fd(),
        worker.listener.as_fd(),
        worker.shared.fd().as_fd(),
        events_in.as_fd(),
        events_out.as_fd(),
    ]
    .into_iter()
    .map(|fd| fd.try_clone_to_owned())
    .collect::<std::io::Result<Vec<OwnedFd>>>()
    .context(what)?;
    let mut fds: Vec<i32> = copies.iter().map(AsRawFd::as_raw_fd).collect();
    let &[session, listener, shared, events_read, events_write] = fds.as_slice() else {
        return Err(Error::internal(what()));
    };
    let ring = worker.ring.as_ref().map(|ring| ring.fd().try_clone());
    let ring = ring.transpose().context(what)?;
    let witness = witness();
    let held = witness.as_ref().map(|(file, _)| file.as_raw_fd());
    let resume = Resume {
        session,
        listener,
        shared,
        ring: ring.as_ref().map(AsRawFd::as_raw_fd),
        events_in: events_read,
        events_out: events_write,
        standby: None,
        features: worker.features,
        generation: worker.generation,
        witness: held.zip(witness.as_ref().map(|(_, token)| *token)),
    };
    fds.extend(held.into_iter().chain(resume.ring));
    let resume = serde_json::to_string(&resume)
        .map_err(|error| Error::internal(format!("{}: {error}", what())))?;
    set_close_on_exec(&fds, false);
    let status = Command::new("/proc/self/exe")
        .arg0(ARG0)
        .args(own_arguments(&worker.run_dir.now()))
        .arg("--resume")
        .arg(resume)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .status()
        .context(what)?;
    if !status.success() {
        return Err(Error::new(
            ErrorKind::Command,
            format!("{}: {status}", what()),
        ));
    }
    *events = Arc::new(events_out);
    Ok(Value::Null)
}
