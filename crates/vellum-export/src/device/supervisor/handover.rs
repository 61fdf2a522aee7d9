//! From one program to the next: upgrades, and supervisors for workers that lost theirs.

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use nix::unistd::ForkResult;

use super::children::{Standby, serving_identity, serving_process};
use super::system::{block_signals, fork, prepare_process, reap};
use super::{Held, STOP_TIMEOUT, Supervisor, SupervisorArgs, hold};
use crate::device::command_line::ARG0;
use crate::device::failure::Failure;
use crate::device::handover::{Resume, own_arguments, set_close_on_exec, witness};
use crate::device::process::Process;
use crate::device::state::{RunState, Status};
use crate::fuse::ring::memory::{LAYOUT, RingMemory};
use crate::fuse::slot::{self, Shared};
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_base::storage::Witness;
use vellum_fs::run_dir::RunDir;

/// What a program answers to `--probe` when it can take a session of this version over.
pub(super) const PROBE_ANSWER: &str = "vellum-device 1";

impl Supervisor {
    /// Takes the session over from the program that executed this one, or from a worker that lost
    /// its supervisor; `None` in the foreground process, whose part is done.
    pub(super) fn resume(args: &SupervisorArgs, resume: &str) -> Result<Option<Supervisor>> {
        let resume: Resume = serde_json::from_str(resume).map_err(|error| {
            Error::with_source(ErrorKind::InvalidInput, "--resume is no hand-over", error)
        })?;
        if resume.standby.is_none() && matches!(fork()?, ForkResult::Parent { .. }) {
            return Ok(None);
        }
        // In an upgrade the process leads a session already, which is no failure.
        let _ = nix::unistd::setsid();
        prepare_process();
        let shared = Shared::inherit(adopt_fd(resume.shared)?)?;
        match resume.witness {
            Some((file, token)) => Witness::inherit(adopt_fd(file)?, token),
            None => Witness::hold(args.run_dir.path()),
        }
        .context(|| "the file system of the store cannot be held")?;
        let worker = serving_process(&shared)?;
        let run_dir = hold(&args.run_dir)?;
        let mut state = RunState::new(args.read_only, &run_dir)?;
        state.features = Some(resume.features);
        state.generation = resume.generation;
        state.status = if worker.is_some() {
            Status::Serving
        } else {
            Status::Restarting
        };
        state.worker = worker.as_ref().map(|_| serving_identity(&shared));
        let old_standby = match resume.standby {
            None => None,
            Some((pid, go)) => Some(Standby {
                process: Process::open(pid)
                    .context(|| "the standby of the program before is gone")?,
                go: adopt_fd(go)?,
            }),
        };
        let mut supervisor = Supervisor::new(Held {
            args: SupervisorArgs {
                resume: None,
                ..args.clone()
            },
            run_dir,
            session: Arc::new(File::from(adopt_fd(resume.session)?)),
            features: resume.features,
            listener: UnixListener::from(adopt_fd(resume.listener)?),
            shared,
            ring: resume
                .ring
                .map(|fd| RingMemory::inherit(adopt_fd(fd)?))
                .transpose()?,
            events_in: File::from(adopt_fd(resume.events_in)?),
            events_out: File::from(adopt_fd(resume.events_out)?),
            signals: block_signals()?,
            state,
        });
        let now = Instant::now();
        supervisor.restart_at = worker.is_none().then_some(now);
        supervisor.standby_at = worker.is_some().then_some(now);
        supervisor.worker = worker;
        supervisor.worker_served = true;
        supervisor.old_standby = old_standby;
        supervisor.ever_served = true;
        supervisor.show_myself();
        supervisor.note_counts();
        supervisor.write_state();
        Ok(Some(supervisor))
    }

    /// Carries out an upgrade that was asked for, once a worker serves and a standby waits, which is
    /// soon after a death.
    pub(super) fn begin_upgrade(&mut self, now: Instant) {
        let ready = self.worker_served && self.worker.is_some() && self.standby.is_some();
        let late = self
            .upgrade
            .as_ref()
            .is_some_and(|(_, until)| *until <= now);
        if !(ready || late) || self.stopping.is_some() {
            return;
        }
        let Some((program, _)) = self.upgrade.take() else {
            return;
        };
        if let Err(error) = self.upgrade_to(&program) {
            tracing::error!("upgrade: {error}");
            self.state.failed_upgrades += 1;
            self.state.upgrade_error = Some(Failure::from(&error));
            self.write_state();
        }
    }

    /// Executes `program` in this process, with the session. Returns only on failure, or when the
    /// worker is to be started again by this program.
    fn upgrade_to(&mut self, program: &Path) -> Result<()> {
        probe(program, &self.run_dir.now(), self.ring.is_some())?;
        if self.standby.is_none() {
            // The old program's standby is what saves the device if the new program fails.
            return Err(Error::new(
                ErrorKind::InUse,
                "the device has had no standby for a while, which would save it if the new program \
                 failed: see its log",
            ));
        }
        if let Some(worker) = self.worker.take() {
            worker.signal(Signal::SIGTERM);
            if !worker.wait(STOP_TIMEOUT)? {
                worker.signal(Signal::SIGKILL);
                worker.wait(STOP_TIMEOUT)?;
            }
            reap(worker.pid());
            self.state.worker = None;
            let ended = self.shared.table().worker_ended.load(Ordering::Acquire);
            if ended == slot::ENDED_SESSION_OVER {
                // Unmounted meanwhile: the next worker will find that and end.
                self.restart_at = Some(Instant::now());
                return Ok(());
            }
        }
        self.note_death();
        self.state.status = Status::Restarting;
        self.write_state();
        let error = self.execute(program);
        self.restart_at = Some(Instant::now());
        Err(error)
    }

    fn execute(&mut self, program: &Path) -> Error {
        let Some(standby) = &self.standby else {
            return Error::new(ErrorKind::InUse, "no standby");
        };
        let fds = [
            self.session.as_raw_fd(),
            self.listener.as_raw_fd(),
            self.shared.fd().as_raw_fd(),
            self.events_in.as_raw_fd(),
            self.events_out.as_raw_fd(),
            standby.go.as_raw_fd(),
        ];
        let [session, listener, shared, events_in, events_out, standby_go] = fds;
        let witness = witness();
        let held = witness.as_ref().map(|(file, _)| file.as_raw_fd());
        let ring = self.ring.as_ref().map(|ring| ring.fd().as_raw_fd());
        let resume = Resume {
            session,
            listener,
            shared,
            ring,
            events_in,
            events_out,
            standby: Some((standby.process.pid(), standby_go)),
            features: self.features,
            generation: self.state.generation + 1,
            witness: held.zip(witness.as_ref().map(|(_, token)| *token)),
        };
        let resume = match serde_json::to_string(&resume) {
            Ok(resume) => resume,
            Err(error) => return Error::internal(format!("the hand-over: {error}")),
        };
        let fds: Vec<i32> = fds.into_iter().chain(held).chain(ring).collect();
        set_close_on_exec(&fds, false);
        let error = Command::new(program)
            .arg0(ARG0)
            .args(own_arguments(&self.run_dir.now()))
            .arg("--resume")
            .arg(resume)
            .exec();
        set_close_on_exec(&fds, true);
        Error::io(format!("{}: cannot be executed", program.display()), error)
    }
}

/// Says whether this program can take a ring over whose memory has that layout. One that knows nothing of
/// rings refuses the option.
pub(super) fn can_take_ring_over(layout: Option<u64>) -> Result<()> {
    match layout {
        None | Some(LAYOUT) => Ok(()),
        Some(layout) => Err(Error::new(
            ErrorKind::Unsupported,
            format!("this program knows the ring {LAYOUT:#x} and not {layout:#x}"),
        )),
    }
}

/// Asks `program` whether it can take over.
fn probe(program: &Path, run_dir: &RunDir, ring: bool) -> Result<()> {
    let what = || format!("{}: --probe", program.display());
    let layout = ring.then(|| format!("--ring-layout={LAYOUT}"));
    let mut child = Command::new(program)
        .arg0(ARG0)
        .args(own_arguments(run_dir))
        .arg("--probe")
        .args(layout)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context(what)?;
    let process = Process::open(child.id() as i32).context(what)?;
    if !process.wait(Duration::from_secs(5))? {
        process.signal(Signal::SIGKILL);
        let _ = child.wait();
        return Err(Error::new(
            ErrorKind::Timeout,
            format!("{}: no answer within 5 s", what()),
        ));
    }
    let output = child.wait_with_output().context(what)?;
    let answer = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() || answer.trim() != PROBE_ANSWER {
        return Err(Error::new(
            ErrorKind::Unsupported,
            format!(
                "{}: it cannot take the session over (answer {:?}, {})",
                what(),
                answer.trim(),
                output.status
            ),
        ));
    }
    Ok(())
}

/// Owns a descriptor that the program before left open for us.
fn adopt_fd(fd: i32) -> Result<OwnedFd> {
    if fd <= 2 || !Path::new(&format!("/proc/self/fd/{fd}")).exists() {
        return Err(Error::new(
            ErrorKind::InvalidInput,
            format!("--resume names descriptor {fd}, which is not open"),
        ));
    }
    // SAFETY: the descriptor is open, and nothing else in this new program owns it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    set_close_on_exec(&[fd.as_raw_fd()], true);
    Ok(fd)
}
