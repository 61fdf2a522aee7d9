//! The process that owns a device's FUSE session, and what its forks become.
//!
//! It is one type, [`Supervisor`], whose methods lie in the files below by subject: what happens to its
//! children, what it is told, hand-over to another program, who watches whom. Each of them may end the
//! device or start a process, which is another's subject, so these files and this one know each other. That
//! circle stays: it is one state machine, and its parts mean nothing alone.

mod children;
mod events;
mod handover;
mod namespace;
mod system;
mod watching;

use children::Standby;
use events::send_ready;
use system::{block_signals, fork, prepare_process, reap, take_stdout};

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::builder::{PathBufValueParser, TypedValueParser};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use nix::sys::signalfd::SignalFd;
use nix::unistd::ForkResult;
use parking_lot::Mutex;

use super::backoff::Backoff;
use super::control;
use super::event::{Ready, event_pipe};
use super::failure::Failure;
use super::opened::Open;
use super::process::Process;
use super::state::{RunState, Status};
use super::transport::TransportChoice;
use super::watch::{Companion, Hang, Limits, PERIOD, Watch};
use super::worker::{self, Worker};
use crate::fuse::ring::memory::RingMemory;
use crate::fuse::session::{self, Features, Session};
use crate::fuse::slot::{Shared, USUAL_THREADS};
use crate::ublk::disk::Mark;
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_base::storage::Witness;
use vellum_fs::run_dir::{HeldRunDir, RunDir};

/// A standby is made this long after a worker began to serve, so that a device that is attached
/// and detached at once does not pay for it.
const STANDBY_DELAY: Duration = Duration::from_millis(300);
/// A worker that was told to stop and does not is killed after this long.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);

/// The options of the hidden subcommand that [`super::attach()`] starts.
#[derive(Debug, Clone, clap::Args)]
pub struct SupervisorArgs {
    /// Directory for the device's state, sockets and mount point
    #[arg(long, value_name = "DIR", default_value = "",
        value_parser = PathBufValueParser::new().map(RunDir::at))]
    pub run_dir: RunDir,
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
    /// How requests come from the kernel
    #[arg(long, value_name = "HOW", value_enum, default_value_t = TransportChoice::Classic)]
    pub transport: TransportChoice,
    /// With --probe: the layout of the memory of the ring that is to be taken over
    #[arg(long, hide = true, value_name = "LAYOUT")]
    pub ring_layout: Option<u64>,
    /// Without the guard of a ring, to test that a kill is seen then
    #[arg(long, hide = true)]
    pub no_guard: bool,
    /// A worker that makes no progress for so many seconds hangs
    #[arg(long, hide = true, value_name = "SECONDS", default_value_t = 30)]
    pub hang_after: u64,
}

impl SupervisorArgs {
    pub(super) fn limits(&self) -> Limits {
        Limits::new(Duration::from_secs(self.hang_after))
    }
}

/// Which process `Supervisor::run` returned in.
enum Role {
    Worker { resume: bool },
    End(Result<()>),
}

struct Supervisor {
    args: SupervisorArgs,
    run_dir: HeldRunDir,
    session: Arc<File>,
    features: Features,
    listener: UnixListener,
    shared: Arc<Shared>,
    ring: Option<Arc<RingMemory>>,
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
    /// A program that shall take over as soon as a standby is there, and until when it may wait.
    upgrade: Option<(PathBuf, Instant)>,
    /// When to look at the others next.
    look_at: Instant,
    watch: Watch,
    companion: Companion,
    /// The worker was killed because it hung.
    hang: Option<Hang>,
    hangs_in_a_row: u32,
}

/// What a supervisor begins with, whether it mounted the session or took it over.
struct Held {
    args: SupervisorArgs,
    run_dir: HeldRunDir,
    session: Arc<File>,
    features: Features,
    listener: UnixListener,
    shared: Arc<Shared>,
    ring: Option<Arc<RingMemory>>,
    events_in: File,
    events_out: File,
    signals: SignalFd,
    state: RunState,
}

/// Runs a device: the body of the hidden subcommand. `open` is called in each worker, with the memory
/// that they share.
///
/// It returns in every process that it forks, when that process is to end. The calling process
/// must have no other threads. Standard output is the pipe that `attach` reads.
///
/// # Errors
/// What kept the device from being served; the caller of `attach` gets the same text.
pub fn supervise(args: &SupervisorArgs, open: Open<'_>) -> Result<()> {
    if args.probe {
        handover::can_take_ring_over(args.ring_layout)?;
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
                run_dir: supervisor.run_dir,
                session: Arc::clone(&supervisor.session),
                features: supervisor.features,
                use_resend: supervisor.features.resend && !supervisor.args.no_resend,
                threads: supervisor.args.threads.clamp(1, USUAL_THREADS),
                shared: Arc::clone(&supervisor.shared),
                ring: supervisor.ring.clone(),
                guarded: !supervisor.args.no_guard,
                listener: supervisor.listener,
                events: Mutex::new(Arc::new(supervisor.events_out)),
                supervisor: supervisor.state.supervisor,
                generation: supervisor.state.generation,
                resume,
                limits: supervisor.args.limits(),
            };
            // Only the standby may hold the reading end.
            drop(supervisor.events_in);
            worker::run(worker, open)
        }
    }
}

/// Makes what requests come by, and the memory for it where a ring is.
fn begin_session(args: &SupervisorArgs) -> Result<(Session, Option<Arc<RingMemory>>)> {
    if let Some(control) = args.transport.ublk_control()? {
        let id = control.add(Mark::of(&args.run_dir).bits())?;
        let session = Session {
            device: control.into_file(),
            features: Features::of_ublk(id),
        };
        return Ok((session, None));
    }
    let dev = args.run_dir.dev();
    fs::write(&dev, b"").context(|| dev.display().to_string())?;
    let ring = args.transport.ring_memory()?;
    let session = session::mount_file(&dev, "vellum", args.read_only, ring.is_some())?;
    let ring = ring.filter(|_| session.features.ring);
    if args.transport == TransportChoice::Ring && ring.is_none() {
        return Err(Error::new(
            ErrorKind::Unsupported,
            "the kernel does not offer FUSE over io_uring for this mount: leave out `--transport ring`",
        ));
    }
    Ok((session, ring))
}

/// Opens the run directory for as long as the device lives.
fn hold(run_dir: &RunDir) -> Result<HeldRunDir> {
    let held = run_dir.hold();
    held.context(|| format!("{run_dir}: cannot be opened"))
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

    /// Without a worker, and without a standby: the first worker is due.
    fn new(held: Held) -> Supervisor {
        let limits = held.args.limits();
        let now = Instant::now();
        Supervisor {
            args: held.args,
            run_dir: held.run_dir,
            session: held.session,
            features: held.features,
            listener: held.listener,
            shared: held.shared,
            ring: held.ring,
            events_in: held.events_in,
            events_out: held.events_out,
            event_bytes: Vec::new(),
            signals: held.signals,
            state: held.state,
            ready: None,
            worker: None,
            worker_since: now,
            worker_served: false,
            standby: None,
            old_standby: None,
            backoff: Backoff::default(),
            restart_at: Some(now),
            standby_at: None,
            stopping: None,
            ever_served: false,
            upgrade: None,
            look_at: now + PERIOD,
            watch: Watch::new(limits, now),
            companion: Companion::new(limits),
            hang: None,
            hangs_in_a_row: 0,
        }
    }

    fn mount(args: &SupervisorArgs) -> Result<Supervisor> {
        let run_dir = &args.run_dir;
        let held = hold(run_dir)?;
        let mut state = RunState::new(args.read_only, &held)?;
        let shared = Shared::create()?;
        // Before anything is forked: a killed worker's successor knows by it that the page cache is
        // there.
        Witness::hold(run_dir.path()).context(|| run_dir.to_string())?;
        // First the socket, which proves that somebody lives, then the state that says who.
        let listener = control::bind(run_dir)?;
        state.write(run_dir)?;
        let (events_in, events_out) = event_pipe()?;
        let signals = block_signals()?;
        // The kernel makes threads for the commands to ublk, which stay in the namespace of the first; a FUSE
        // file is mounted in the caller's.
        let by_ublk = args.transport == TransportChoice::Ublk;
        if by_ublk {
            namespace::leave(run_dir);
        }
        let (session, ring) = begin_session(args)?;
        if !by_ublk {
            namespace::leave(run_dir);
        }
        // What was opened before belongs to the caller's mounts, whose names may go with them.
        let held = hold(run_dir)?;
        state.features = Some(session.features);
        if !session.features.resend && ring.is_none() {
            tracing::warn!(
                "this kernel cannot resend requests (Linux 6.9 can): a killed server's \
                 unanswered requests are taken from shared memory"
            );
        }
        let supervisor = Supervisor::new(Held {
            args: args.clone(),
            run_dir: held,
            session: Arc::new(session.device),
            features: session.features,
            listener,
            shared,
            ring,
            events_in,
            events_out,
            signals,
            state,
        });
        supervisor.show_myself();
        Ok(supervisor)
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
        self.beat();
        if self.look_at <= now {
            self.look_around();
        }
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
        self.begin_upgrade(now);
        if self.stopping.is_some_and(|at| at <= now) {
            self.stopping = Some(now + STOP_TIMEOUT);
            if let Some(worker) = &self.worker {
                tracing::warn!("the worker did not stop in time and is killed");
                worker.signal(Signal::SIGKILL);
            }
        }
        let due = [self.restart_at, self.standby_at, self.stopping];
        let next = due.into_iter().flatten().fold(self.look_at, Instant::min);
        let left = next.saturating_duration_since(Instant::now()).as_millis() + 1;
        let timeout = PollTimeout::from(left.min(60_000) as u16);
        // A child that is not there polls as the signals once more, and its answer is not looked at.
        let signals = self.signals.as_fd();
        let worker = self.worker.as_ref().map(AsFd::as_fd);
        let standby = self.standby.as_ref().map(|standby| standby.process.as_fd());
        let mut fds = [
            signals,
            self.events_in.as_fd(),
            worker.unwrap_or(signals),
            standby.unwrap_or(signals),
        ]
        .map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        match poll(&mut fds, timeout) {
            Ok(_) => {}
            Err(Errno::EINTR) => return Ok(None),
            Err(errno) => return Err(Error::io("poll", errno.into())),
        }
        let [signal, event, worker, standby] = fds.map(|fd| fd.any() == Some(true));
        let worker_died = self.worker.is_some() && worker;
        let standby_died = self.standby.is_some() && standby;
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

    fn write_state(&self) {
        // A full host must not end the device.
        if let Err(error) = self.state.write(&self.run_dir.now()) {
            tracing::warn!("{error}");
        }
    }
}
