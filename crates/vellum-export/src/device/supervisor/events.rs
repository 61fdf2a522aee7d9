//! What the supervisor is told by its children, and what it tells `attach`.

use std::fs::File;
use std::io::{self, Read, Write};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use super::system::reap;
use super::{Role, STANDBY_DELAY, STOP_TIMEOUT, Supervisor};
use crate::device::event::{Event, Ready};
use crate::device::process::{Identity, Process};
use crate::device::state::Status;
use vellum_base::error::{Error, Result};

/// How long an upgrade may wait until a worker serves and a standby waits, as soon after a death.
const UPGRADE_WAIT: Duration = Duration::from_secs(20);

impl Supervisor {
    pub(super) fn read_events(&mut self) -> Result<Option<Role>> {
        let mut buf = [0; 4096];
        match self.events_in.read(&mut buf) {
            Ok(read) => self.event_bytes.extend_from_slice(buf.split_at(read).0),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(Error::io("the pipe of events", error)),
        }
        while let Some(end) = self.event_bytes.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.event_bytes.drain(..=end).collect();
            let Ok(event) = serde_json::from_slice(&line) else {
                continue;
            };
            if let Some(role) = self.event(event)? {
                return Ok(Some(role));
            }
        }
        Ok(None)
    }

    pub(super) fn event(&mut self, event: Event) -> Result<Option<Role>> {
        match event {
            Event::Serving(pid) => {
                if self.worker.as_ref().map(Process::pid) != Some(pid) {
                    return Ok(None);
                }
                self.serving(pid)
            }
            Event::OpenFailed(failure) => {
                if self.ever_served {
                    tracing::error!("the device cannot be opened again: {}", failure.error);
                    self.state.error = Some(failure.error);
                    Ok(None)
                } else {
                    Ok(Some(self.end(Status::Failed, Some(Error::from(failure)))))
                }
            }
            Event::Stop => Ok(self.begin_stop()),
            Event::Upgrade(program) => {
                self.upgrade = Some((program, Instant::now() + UPGRADE_WAIT));
                // Without a standby it has to wait for one.
                if self.standby.is_none() && self.worker_served {
                    self.standby_at = Some(Instant::now());
                }
                Ok(None)
            }
        }
    }

    pub(super) fn serving(&mut self, pid: i32) -> Result<Option<Role>> {
        self.ever_served = true;
        self.worker_served = true;
        // Without it, whoever looks for the worker finds it by its command line.
        self.state.worker = Identity::of(pid).ok().flatten();
        self.state.status = Status::Serving;
        if self.standby.is_none() {
            // Not one that was forked while this worker was opening the device.
            self.state.standby = None;
        }
        self.state.error = None;
        self.note_counts();
        let delay = match self.upgrade {
            None => STANDBY_DELAY,
            Some(_) => Duration::ZERO,
        };
        self.standby_at = Some(Instant::now() + delay);
        if let Some(old) = self.old_standby.take() {
            // Killed before its pipe is closed, or it would take over.
            old.process.signal(Signal::SIGKILL);
            let _ = old.process.wait(STOP_TIMEOUT);
            reap(old.process.pid());
        }
        self.write_state();
        if let Some(mut ready) = self.ready.take()
            && !send_ready(&mut ready, &Ready::Serving(self.features))
        {
            tracing::warn!("the command that wanted the device is gone");
            return Ok(self.begin_stop());
        }
        Ok(None)
    }

    /// Copies what the processes count together into the state.
    pub(super) fn note_counts(&mut self) {
        let table = self.shared.table();
        self.state.restarts = table.restarts.load(Ordering::Relaxed);
        self.state.hangs = table.hangs.load(Ordering::Relaxed);
        self.state.last_pause_us = table.last_pause_ns.load(Ordering::Relaxed) / 1000;
        self.state.longest_pause_us = table.longest_pause_ns.load(Ordering::Relaxed) / 1000;
    }

    /// Asks the worker to stop; a role when there is none, so that all ends at once.
    pub(super) fn begin_stop(&mut self) -> Option<Role> {
        self.restart_at = None;
        match &self.worker {
            Some(worker) => {
                worker.signal(Signal::SIGTERM);
                if self.stopping.is_none() {
                    self.stopping = Some(Instant::now() + STOP_TIMEOUT);
                }
                None
            }
            None => Some(self.end(Status::Ended, None)),
        }
    }
}

/// Tells `attach`; false when it does not listen any more.
pub(super) fn send_ready(ready: &mut File, message: &Ready) -> bool {
    let Ok(mut line) = serde_json::to_vec(message) else {
        return false;
    };
    line.push(b'\n');
    ready.write_all(&line).is_ok()
}
