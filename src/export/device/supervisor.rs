//! The process that owns a device's FUSE session, and what its forks become.

mod handover;
mod system;

pub(super) use handover::{Resume, own_arguments, set_close_on_exec};
pub(super) use system::event_pipe;
use system::{block_signals, fork, open_child, prepare_process, reap, take_stdout};

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use nix::sys::signalfd::SignalFd;
use nix::unistd::ForkResult;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::backoff::{Backoff, Death, Verdict};
use super::control::{self, Failure};
use super::process::{Identity, Process, monotonic_ns};
use super::state;
use super::state::{DEV, RunState, Status};
use super::worker::{self, Worker};
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::export::fuse::session::{self, Features};
use crate::export::fuse::slot::{self, MAX_THREADS, Shared};

/// What the processes of a device are called in `ps`. The first character tells systemd's
/// shutdown to leave them alone until the file systems on them are unmounted.
pub const ARG0: &str = "@vellum-device";

/// A standby is made this long after a worker began to serve, so that a device that is attached
/// and detached at once does not pay for it.
const STANDBY_DELAY: Duration = Duration::from_millis(300);
/// A worker that was told to stop and does not is killed after this long.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);
/// The options of the hidden subcommand that [`super::attach()`] starts.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct SupervisorArgs {
    /// Directory for the device's state, sockets and mount point
    #[arg(long, value_name = "DIR", default_value = "")]
    pub run_dir: PathBuf,
    /// Threads that serve the device
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub threads: usize,
    /// Mount the device read-only
    #[arg(long)]
    pub read_only: bool,
    /// Answer whether this program can take a session over, and end
    #[arg(long)]
    pub probe: bool,
    /// Take over the session that these descriptors hold (JSON)
    #[arg(long, value_name = "JSON")]
    pub resume: Option<String>,
    /// Do not use the kernel's resending of requests
    #[arg(long)]
    pub no_resend: bool,
}

/// What a child tells the supervisor: one line of JSON in a pipe, shorter than PIPE_BUF.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Event {
    /// The worker with this pid serves.
    Serving(i32),
    /// The worker could not open the device.
    OpenFailed(Failure),
    /// End the device.
    Stop,
    /// Let this program take over.
    Upgrade(PathBuf),
}

/// The first line that `attach` reads.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Ready {
    /// The device is served.
    Serving(Features),
    /// It could not be opened or mounted.
    Failed(Failure),
}

struct Standby {
    process: Process,
    /// One byte sends it to work; closing this makes it the supervisor.
    go: OwnedFd,
}

/// Which process `Supervisor::run` returned in.
enum Role {
    Worker { resume: bool },
    End(Result<()>),
}

struct Supervisor {
    args: SupervisorArgs,
    session: Arc<File>,
    features: Features,
    listener: UnixListener,
    shared: Arc<Shared>,
    events_in: File,
    events_out: File,
    event_bytes: Vec<u8>,
    signals: SignalFd,
    state: RunState,
    ready: Option<File>,
    worker: Option<Process>,
    worker_since: Instant,
    /// The worker said that it serves.
    worker_served: bool,
    standby: Option<Standby>,
    /// The standby of the program before an upgrade: kept until our own worker serves.
    old_standby: Option<Standby>,
    backoff: Backoff,
    restart_at: Option<Instant>,
    standby_at: Option<Instant>,
    stopping: Option<Instant>,
    ever_served: bool,
}

/// Runs a device: the body of the hidden subcommand. `open` is called in each worker, with the memory
/// that they share.
///
/// It returns in every process that it forks, when that process is to end. The calling process
/// must have no other threads. Standard output is the pipe that `attach` reads.
///
/// # Errors
/// What kept the device from being served; the caller of `attach` gets the same text.
pub fn supervise(args: &SupervisorArgs, open: super::Open<'_>) -> Result<()> {
    if args.probe {
        return writeln!(io::stdout(), "{}", handover::PROBE_ANSWER)
            .context(|| "the answer to --probe");
    }
    let supervisor = match &args.resume {
        Some(resume) => Supervisor::resume(args, resume)?,
        None => Supervisor::start(args)?,
    };
    // None in the parent of the fork that goes to the background.
    let Some(mut supervisor) = supervisor else {
        return Ok(());
    };
    match supervisor.run() {
        Role::End(result) => result,
        Role::Worker { resume } => {
            let worker = Worker {
                run_dir: supervisor.args.run_dir.clone(),
                session: Arc::clone(&supervisor.session),
                features: supervisor.features,
                use_resend: supervisor.features.resend && !supervisor.args.no_resend,
                threads: supervisor.args.threads.clamp(1, MAX_THREADS),
                shared: Arc::clone(&supervisor.shared),
                listener: supervisor.listener,
                events: Mutex::new(supervisor.events_out),
                supervisor: supervisor.state.supervisor,
                generation: supervisor.state.generation,
                resume,
            };
            // Only the standby may hold the reading end.
            drop(supervisor.events_in);
            worker::run(worker, open)
        }
    }
}

impl Supervisor {
    /// Mounts the session and gets all that the forks will need; `None` in the foreground process,
    /// whose part is done.
    fn start(args: &SupervisorArgs) -> Result<Option<Supervisor>> {
        let ready = take_stdout()?;
        let result = Supervisor::start_in_background(args, ready);
        if let Err((error, Some(mut ready))) = result {
            send_ready(&mut ready, &Ready::Failed(Failure::from(&error)));
            return Err(error);
        }
        result.map_err(|(error, _)| error)
    }

    #[allow(
        clippy::type_complexity,
        reason = "the pipe comes back so that the error can be told"
    )]
    fn start_in_background(
        args: &SupervisorArgs,
        ready: File,
    ) -> Result<Option<Supervisor>, (Error, Option<File>)> {
        match fork() {
            Ok(ForkResult::Parent { .. }) => return Ok(None),
            Ok(ForkResult::Child) => {}
            Err(error) => return Err((error, Some(ready))),
        }
        // Neither can fail: a fork leads no group, and `/` is there.
        let _ = nix::unistd::setsid();
        let _ = std::env::set_current_dir("/");
        prepare_process();
        match Supervisor::mount(args) {
            Ok(mut supervisor) => {
                supervisor.ready = Some(ready);
                Ok(Some(supervisor))
            }
            Err(error) => Err((error, Some(ready))),
        }
    }

    fn mount(args: &SupervisorArgs) -> Result<Supervisor> {
        let run_dir = &args.run_dir;
        let mut state = RunState::new(args.read_only);
        state.write(run_dir)?;
        let shared = Shared::create()?;
        let listener = control::bind(run_dir)?;
        let (events_in, events_out) = event_pipe()?;
        let signals = block_signals()?;
        let dev = run_dir.join(DEV);
        fs::write(&dev, b"").context(|| dev.display().to_string())?;
        let session = session::mount_file(&dev, "vellum", args.read_only)?;
        state.features = Some(session.features);
        if !session.features.resend {
            tracing::warn!(
                "this kernel cannot resend requests (Linux 6.9 can): a killed server's \
                 unanswered requests are taken from shared memory"
            );
        }
        Ok(Supervisor {
            args: args.clone(),
            session: Arc::new(session.device),
            features: session.features,
            listener,
            shared,
            events_in,
            events_out,
            event_bytes: Vec::new(),
            signals,
            state,
            ready: None,
            worker: None,
            worker_since: Instant::now(),
            worker_served: false,
            standby: None,
            old_standby: None,
            backoff: Backoff::default(),
            restart_at: Some(Instant::now()),
            standby_at: None,
            stopping: None,
            ever_served: false,
        })
    }

    fn run(&mut self) -> Role {
        loop {
            match self.step() {
                Ok(None) => {}
                Ok(Some(role)) => return role,
                Err(error) => {
                    tracing::error!("the supervisor cannot go on: {error}");
                    return self.end(Status::Failed, Some(error));
                }
            }
        }
    }

    /// Does what is due, then waits for the next thing to happen.
    fn step(&mut self) -> Result<Option<Role>> {
        let now = Instant::now();
        if self.restart_at.is_some_and(|at| at <= now) {
            self.restart_at = None;
            if let Some(role) = self.start_worker()? {
                return Ok(Some(role));
            }
        }
        if self.standby_at.is_some_and(|at| at <= now) {
            self.standby_at = None;
            if self.standby.is_none()
                && let Some(role) = self.fork_standby()?
            {
                return Ok(Some(role));
            }
        }
        if self.stopping.is_some_and(|at| at <= now) {
            self.stopping = Some(now + STOP_TIMEOUT);
            if let Some(worker) = &self.worker {
                tracing::warn!("the worker did not stop in time and is killed");
                worker.signal(Signal::SIGKILL);
            }
        }
        let deadline = [self.restart_at, self.standby_at, self.stopping]
            .into_iter()
            .flatten()
            .min();
        let timeout = match deadline {
            None => PollTimeout::NONE,
            Some(at) => {
                let left = at.saturating_duration_since(Instant::now()).as_millis() + 1;
                PollTimeout::from(left.min(60_000) as u16)
            }
        };
        let mut fds = vec![
            PollFd::new(self.signals.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.events_in.as_fd(), PollFlags::POLLIN),
        ];
        // A child that is not there polls as the signals once more, and its answer is not looked at.
        for child in [
            self.worker.as_ref(),
            self.standby.as_ref().map(|standby| &standby.process),
        ] {
            let fd = child.map_or(self.signals.as_fd(), |child| child.as_fd());
            fds.push(PollFd::new(fd, PollFlags::POLLIN));
        }
        match poll(&mut fds, timeout) {
            Ok(_) => {}
            Err(Errno::EINTR) => return Ok(None),
            Err(errno) => return Err(Error::io("poll", errno.into())),
        }
        let hit: Vec<bool> = fds.iter().map(|fd| fd.any() == Some(true)).collect();
        let hit = |at: usize| hit.get(at).copied().unwrap_or(false);
        let (signal, event) = (hit(0), hit(1));
        let worker_died = self.worker.is_some() && hit(2);
        let standby_died = self.standby.is_some() && hit(3);
        if signal && let Ok(Some(info)) = self.signals.read_signal() {
            tracing::info!(signal = info.ssi_signo, "told to stop");
            if let Some(role) = self.begin_stop() {
                return Ok(Some(role));
            }
        }
        // Events before deaths: a worker says why it could not open and dies.
        if event && let Some(role) = self.read_events()? {
            return Ok(Some(role));
        }
        if worker_died && let Some(role) = self.worker_died()? {
            return Ok(Some(role));
        }
        if standby_died {
            if let Some(standby) = self.standby.take() {
                reap(standby.process.pid());
            }
            self.standby_at = Some(Instant::now() + STANDBY_DELAY);
        }
        Ok(None)
    }

    /// Sends the standby to work, or forks a worker. Returns a role in the new process.
    fn start_worker(&mut self) -> Result<Option<Role>> {
        let resume = self.ever_served;
        self.worker_served = false;
        self.worker_since = Instant::now();
        self.shared.table().worker_ended.store(0, Ordering::Release);
        if let Some(standby) = self.standby.take() {
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

    /// Forks the process that waits. In it, returns only to become the worker, or, when the
    /// supervisor is dead, goes on as the supervisor.
    fn fork_standby(&mut self) -> Result<Option<Role>> {
        let (wait, go) = nix::unistd::pipe2(OFlag::O_CLOEXEC)
            .context(|| "a pipe for the standby cannot be made")?;
        match fork()? {
            ForkResult::Parent { child } => {
                let process = open_child(child)?;
                self.state.standby = Identity::of(child.as_raw());
                self.standby = Some(Standby { process, go });
                self.write_state();
                Ok(None)
            }
            ForkResult::Child => {
                drop(go);
                self.forget_children();
                let mut byte = [0];
                let told = loop {
                    match nix::unistd::read(&wait, &mut byte) {
                        Err(Errno::EINTR) => {}
                        Ok(1) => break true,
                        _ => break false,
                    }
                };
                if told {
                    return Ok(Some(Role::Worker { resume: true }));
                }
                self.promote();
                Ok(None)
            }
        }
    }

    /// In a fork: what belongs to the supervisor alone is closed.
    fn forget_children(&mut self) {
        self.ready = None;
        self.worker = None;
        self.standby = None;
        self.old_standby = None;
    }

    /// The standby becomes the supervisor, since that one is dead.
    fn promote(&mut self) {
        tracing::warn!("the supervisor died: the standby takes its place");
        self.state.supervisor = Identity::current();
        self.state.standby = None;
        self.event_bytes.clear();
        self.backoff = Backoff::default();
        self.restart_at = None;
        self.stopping = None;
        self.worker = serving_process(&self.shared);
        self.state.worker = self
            .worker
            .as_ref()
            .and_then(|worker| Identity::of(worker.pid()));
        self.worker_since = Instant::now();
        self.worker_served = true;
        if self.worker.is_none() {
            self.state.status = Status::Restarting;
            self.note_death();
            self.restart_at = Some(Instant::now());
        } else {
            self.standby_at = Some(Instant::now() + STANDBY_DELAY);
        }
        self.write_state();
    }

    fn note_death(&self) {
        let table = self.shared.table();
        table.death_ns.store(monotonic_ns(), Ordering::Release);
        table.restarts.fetch_add(1, Ordering::Relaxed);
    }

    fn worker_died(&mut self) -> Result<Option<Role>> {
        let Some(worker) = self.worker.take() else {
            return Ok(None);
        };
        let killed = reap(worker.pid());
        self.state.worker = None;
        let ended = self.shared.table().worker_ended.load(Ordering::Acquire);
        if ended == slot::ENDED_SESSION_OVER || self.stopping.is_some() {
            return Ok(Some(self.end(Status::Ended, None)));
        }
        if !self.ever_served {
            let error = Error::new(
                ErrorKind::Io,
                format!(
                    "the device server died before it served (see {})",
                    self.args.run_dir.join(state::LOG).display()
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
                // The replacement is on its way: the state is written when it serves, or now if
                // that takes a while.
                if !delay.is_zero() {
                    self.state.status = Status::Restarting;
                    self.write_state();
                }
                Ok(None)
            }
            Verdict::GiveUp => {
                let reason = self.state.error.take();
                let error = Error::new(
                    ErrorKind::Io,
                    format!(
                        "the device server died {} times in a row{}: given up, its users get I/O \
                         errors; nothing flushed is lost: detach and attach again (see {})",
                        self.backoff.deaths(),
                        reason.map_or(String::new(), |reason| format!(" ({reason})")),
                        self.args.run_dir.join(state::LOG).display()
                    ),
                );
                Ok(Some(self.end(Status::Failed, Some(error))))
            }
        }
    }

    fn read_events(&mut self) -> Result<Option<Role>> {
        let mut buf = [0; 4096];
        match self.events_in.read(&mut buf) {
            Ok(read) => self
                .event_bytes
                .extend_from_slice(buf.get(..read).unwrap_or_default()),
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

    fn event(&mut self, event: Event) -> Result<Option<Role>> {
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
                if let Err(error) = self.upgrade(&program) {
                    tracing::error!("upgrade: {error}");
                    self.state.error = Some(error.to_string());
                    self.write_state();
                }
                Ok(None)
            }
        }
    }

    fn serving(&mut self, pid: i32) -> Result<Option<Role>> {
        self.ever_served = true;
        self.worker_served = true;
        self.state.worker = Identity::of(pid);
        self.state.status = Status::Serving;
        self.state.standby = None;
        self.state.error = None;
        self.standby_at = Some(Instant::now() + STANDBY_DELAY);
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

    /// Asks the worker to stop; a role when there is none, so that all ends at once.
    fn begin_stop(&mut self) -> Option<Role> {
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

    /// The end of the device: nobody else holds the session when this process is gone.
    fn end(&mut self, status: Status, error: Option<Error>) -> Role {
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
        self.state.status = status;
        self.state.worker = None;
        self.state.standby = None;
        self.state.error = error.as_ref().map(Error::to_string);
        if status == Status::Failed && !self.ever_served {
            // Nobody has seen the device: leave nothing behind.
            let dev = self.args.run_dir.join(DEV);
            let _ = nix::mount::umount2(&dev, nix::mount::MntFlags::MNT_DETACH);
        }
        self.write_state();
        if let (Some(mut ready), Some(error)) = (self.ready.take(), &error) {
            send_ready(&mut ready, &Ready::Failed(Failure::from(error)));
        }
        Role::End(error.map_or(Ok(()), Err))
    }

    fn write_state(&self) {
        // A full host must not end the device.
        if let Err(error) = self.state.write(&self.args.run_dir) {
            tracing::warn!("{error}");
        }
    }
}

/// The worker that serves now, whoever its parent is.
fn serving_process(shared: &Shared) -> Option<Process> {
    let table = shared.table();
    let worker = Identity {
        pid: table.worker_pid.load(Ordering::Acquire) as i32,
        start: table.worker_start.load(Ordering::Acquire),
    };
    worker.open()
}

/// Tells `attach`; false when it does not listen any more.
fn send_ready(ready: &mut File, message: &Ready) -> bool {
    let Ok(mut line) = serde_json::to_vec(message) else {
        return false;
    };
    line.push(b'\n');
    ready.write_all(&line).is_ok()
}
