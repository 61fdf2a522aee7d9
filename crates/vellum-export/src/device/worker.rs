//! The process that serves a device: opens it, answers the kernel, listens to commands.

mod commands;
mod context;
mod elders;
mod ring;
mod ublk;

use std::os::fd::AsFd;
use std::os::unix::thread::JoinHandleExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use commands::{accept, finish_commands};
pub(super) use context::Worker;
use context::{Context, Way, report};
use elders::{Elders, adopt_alone};

use super::event::Event;
use super::failure::Failure;
use super::opened::{Memory, Open};
use super::process::{Identity, monotonic_ns};
use super::watch::PERIOD;
use crate::fuse::readers::Readers;
use crate::fuse::ring::crew::Crew;
use crate::fuse::server::Server;
use crate::fuse::session;
use crate::fuse::slot::{
    ENDED_SESSION_OVER, ENDED_STOPPED, EXTRA_LEN, MAX_THREADS, Shared, Slot, USUAL_THREADS,
};
use crate::fuse::transport::{Classic, Ended};
use crate::shortage::Shortage;
use crate::space_thread::SpaceThread;
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_base::fault;
use vellum_base::storage::{listen_for_waits, note_waits_in};

/// From include/uapi/linux/prctl.h (Linux 5.6).
const PR_SET_IO_FLUSHER: i32 = 57;
/// So many stand by for others from the start; more start when they are wanted.
const FIRST_SPARES: usize = 2;
/// So many threads never wait for room on the host's disk.
const SERVING_ALWAYS: usize = 4;

/// Serves until the session is over or SIGTERM asks to stop. Returns when the process should end.
pub(super) fn run(worker: Worker, open: Open<'_>) -> Result<()> {
    let me = Identity::current();
    let table = worker.shared.table();
    table.worker.belongs_to(me.pid, me.start);
    // Whatever the process before held, it is resent or replayed.
    table.held.store(0, Ordering::Release);
    // For as long as this process lives, and its threads with it.
    let shared: &'static Arc<Shared> = Box::leak(Box::new(Arc::clone(&worker.shared)));
    note_waits_in(&shared.table().waits);
    prepare_process()?;
    let result = serve(worker, open);
    if let Err(error) = &result {
        tracing::error!("the worker ends: {error}");
    }
    result
}

fn serve(worker: Worker, open: Open<'_>) -> Result<()> {
    let started = Instant::now();
    let memory = Memory {
        file: worker.shared.fd(),
        offset: worker.shared.extra_at(),
        len: EXTRA_LEN,
    };
    let opened = match open(memory, &worker.run_dir.now()) {
        Ok(opened) => opened,
        Err(error) => {
            cannot_serve(&worker, &error);
            return Err(error);
        }
    };
    let wake = EventFd::new().context(|| "an eventfd cannot be made")?;
    let shortage = Shortage::new()?;
    let readers = Readers::new(worker.threads, shortage.clone());
    let way = match way(&worker, &shortage) {
        // It was deleted while nobody served it.
        Err(error) if error.kind() == ErrorKind::NotFound => {
            tracing::info!("{error}");
            let table = worker.shared.table();
            table
                .worker_ended
                .store(ENDED_SESSION_OVER, Ordering::Release);
            return opened.device.flush();
        }
        way => way.inspect_err(|error| cannot_serve(&worker, error))?,
    };
    let context = Arc::new(Context {
        worker,
        started,
        opened,
        readers,
        shortage,
        way,
        failures: AtomicU64::new(0),
        connections: AtomicUsize::new(0),
        busy: AtomicUsize::new(0),
        fresh: AtomicUsize::new(0),
        stop: AtomicBool::new(false),
        wake,
    });
    let started = start(&context);
    let mut threads = started.inspect_err(|error| cannot_serve(&context.worker, error))?;
    note_pause(&context.worker);
    report(
        &context.worker,
        &Event::Serving(nix::unistd::getpid().as_raw()),
    );
    start_spares(&context, &mut threads, FIRST_SPARES);
    let space = SpaceThread::start(Arc::clone(&context.opened.device));
    let result = main_loop(&context, &mut threads);
    context.stop.store(true, Ordering::Release);
    context.readers.close();
    context.way.stop();
    let ended = join(threads);
    // No request is under way, so it waits for none.
    drop(space);
    let ended = ended?;
    result?;
    finish_commands(&context);
    // What was answered is in the kernel; this makes it durable too before the device closes.
    context.opened.device.flush()?;
    let ended = match ended {
        Ended::SessionOver => ENDED_SESSION_OVER,
        Ended::Stopped => ENDED_STOPPED,
    };
    let table = context.worker.shared.table();
    table.worker_ended.store(ended, Ordering::Release);
    Ok(())
}

/// Has the supervisor know why this worker does not serve.
fn cannot_serve(worker: &Worker, error: &Error) {
    report(worker, &Event::OpenFailed(Failure::from(error)));
}

/// How requests come.
fn way(worker: &Worker, shortage: &Shortage) -> Result<Way> {
    if let Some(id) = worker.features.ublk {
        return ublk::take_over(worker, id, shortage.clone()).map(Way::Ublk);
    }
    let Some(memory) = worker.ring.clone() else {
        return Ok(Way::Classic);
    };
    let session = Arc::clone(&worker.session);
    let crew = Crew::new(
        memory,
        session,
        worker.resume,
        worker.guarded,
        shortage.clone(),
    )?;
    Ok(Way::Ring(Arc::new(crew)))
}

/// Starts the threads that it takes to serve, and sees to what the worker before left.
fn start(context: &Arc<Context>) -> Result<Vec<JoinHandle<Result<Ended>>>> {
    match &context.way {
        Way::Ring(crew) => return ring::start(context, crew),
        Way::Ublk(crew) => return ublk::start(context, crew),
        Way::Classic => {}
    }
    recover(context)?;
    let threads = 0..context.worker.threads;
    threads
        .map(|index| serving_thread(context, index))
        .collect()
}

/// Starts so many of those that serve while others wait, as far as a device may have them.
fn start_spares(
    context: &Arc<Context>,
    threads: &mut Vec<JoinHandle<Result<Ended>>>,
    number: usize,
) {
    // As many as the loop device has requests on their way, and some: writes do not wait behind reads that stall.
    let most = match context.opened.device.may_stall() {
        true => MAX_THREADS,
        false => USUAL_THREADS,
    };
    for index in (threads.len()..most).take(number) {
        let thread = match &context.way {
            Way::Ring(crew) => ring::spare_thread(context, crew, index),
            Way::Ublk(crew) => ublk::spare_thread(context, crew, index),
            Way::Classic => serving_thread(context, index),
        };
        match thread {
            Ok(thread) => threads.push(thread),
            // It serves, with less in flight.
            Err(error) => {
                tracing::warn!("{error}");
                break;
            }
        }
    }
}

/// Starts thread `index` of those that answer requests.
fn serving_thread(context: &Arc<Context>, index: usize) -> Result<JoinHandle<Result<Ended>>> {
    let mut slot = context.worker.shared.slot(index)?;
    spawn(context, format!("fuse-{index}"), move |context| {
        let readers = Arc::clone(&context.readers);
        listen_for_waits(move || readers.relieve());
        context.server().run(&mut context.classic(&mut slot))
    })
}

/// Starts a thread that serves, whose end wakes the main loop.
fn spawn(
    context: &Arc<Context>,
    name: String,
    serve: impl FnOnce(&Context) -> Result<Ended> + Send + 'static,
) -> Result<JoinHandle<Result<Ended>>> {
    let context = Arc::clone(context);
    std::thread::Builder::new()
        .name(name)
        .spawn(move || {
            run_before_clients();
            let result = serve(&context);
            let _ = context.wake.write(1);
            result
        })
        .context(|| "a serving thread cannot be started")
}

/// Tells whether a thread's way to the kernel could be made in it.
fn made<T>(tell: mpsc::Sender<Result<()>>, made: Result<T>) -> Result<T> {
    let _ = tell.send(made.as_ref().map(drop).map_err(Error::clone));
    made
}

impl Context {
    fn server(&self) -> Server<'_> {
        Server {
            device: &*self.opened.device,
            stop: &self.stop,
            failures: &self.failures,
            held: &self.worker.shared.table().held,
            held_at_most: (USUAL_THREADS - SERVING_ALWAYS) as u64,
        }
    }

    fn classic<'a>(&'a self, slot: &'a mut Slot) -> Classic<'a> {
        Classic {
            session: &self.worker.session,
            slot,
            readers: &self.readers,
            stop: &self.stop,
            remember: !self.worker.use_resend,
        }
    }
}

/// Sees to the requests that the worker before took and did not answer.
fn recover(context: &Context) -> Result<()> {
    if !context.worker.resume {
        return Ok(());
    }
    if context.worker.use_resend {
        match session::resend(&context.worker.session) {
            Ok(()) => return Ok(()),
            // Unmounted meanwhile: the first read says so.
            Err(error) => tracing::warn!("{error}"),
        }
        return Ok(());
    }
    for index in 0..MAX_THREADS {
        let mut slot = context.worker.shared.slot(index)?;
        context.server().replay(&mut context.classic(&mut slot))?;
    }
    Ok(())
}

/// Records how long nobody served.
fn note_pause(worker: &Worker) {
    let table = worker.shared.table();
    let death = table.death_ns.swap(0, Ordering::AcqRel);
    if death != 0 {
        let pause = monotonic_ns().saturating_sub(death);
        table.last_pause_ns.store(pause, Ordering::Relaxed);
        table.longest_pause_ns.fetch_max(pause, Ordering::Relaxed);
    }
}

/// Waits for the end: of the session, by SIGTERM, or of a thread. Takes control connections.
fn main_loop(context: &Arc<Context>, threads: &mut Vec<JoinHandle<Result<Ended>>>) -> Result<()> {
    let mut mask = SigSet::empty();
    mask.add(Signal::SIGTERM);
    let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
        .context(|| "signals cannot be watched")?;
    let listener = &context.worker.listener;
    listener
        .set_nonblocking(true)
        .context(|| "the control socket")?;
    // Clients may wait for the threads that it starts.
    run_before_clients();
    let mut adopt_at: Option<Instant> = None;
    let mut elders = Elders::new(context.worker.limits);
    loop {
        let left = adopt_at.map(|at| at.saturating_duration_since(Instant::now()));
        elders.look(&context.worker.shared);
        let events = Arc::clone(&context.worker.events.lock());
        let mut fds = vec![
            PollFd::new(signals.as_fd(), PollFlags::POLLIN),
            PollFd::new(context.wake.as_fd(), PollFlags::POLLIN),
            PollFd::new(listener.as_fd(), PollFlags::POLLIN),
            PollFd::new(context.shortage.fd(), PollFlags::POLLIN),
        ];
        let timeout = match left {
            Some(left) if !left.is_zero() => {
                PollTimeout::from(left.min(PERIOD).as_millis() as u16 + 1)
            }
            _ => {
                // An error there means that nobody can read it: supervisor and standby are dead.
                fds.push(PollFd::new(events.as_fd(), PollFlags::empty()));
                PollTimeout::from(PERIOD.as_millis() as u16)
            }
        };
        match poll(&mut fds, timeout) {
            Ok(_) => {}
            Err(Errno::EINTR) => continue,
            Err(errno) => return Err(Error::io("poll", errno.into())),
        }
        let alone = fds.get(4).is_some_and(|fd| fd.any() == Some(true));
        if matches!(signals.read_signal(), Ok(Some(_))) {
            return Ok(());
        }
        if threads.iter().any(JoinHandle::is_finished) || context.stop.load(Ordering::Acquire) {
            return Ok(());
        }
        if context.shortage.take() {
            // As many again: who waits for a disk waits with more, soon.
            let number = threads.len();
            start_spares(context, threads, number);
        }
        if alone {
            adopt_at = adopt_alone(&context.worker);
        }
        accept(context);
    }
}

/// Waits for the serving threads, waking those that wait for a request. The session is over when
/// one of them found it so.
fn join(threads: Vec<JoinHandle<Result<Ended>>>) -> Result<Ended> {
    wake_until_ended(&threads);
    let mut all = Ok(Ended::Stopped);
    for thread in threads {
        match thread.join() {
            Ok(Ok(Ended::SessionOver)) => all = all.map(|_| Ended::SessionOver),
            Ok(Ok(Ended::Stopped)) => {}
            Ok(Err(error)) => all = Err(error),
            Err(_) => {
                all = Err(Error::internal("a serving thread panicked"));
            }
        }
    }
    all
}

/// Returns once all threads have ended. All are woken before any is waited for: whoever unmounts waits
/// for this.
fn wake_until_ended(threads: &[JoinHandle<Result<Ended>>]) {
    let mut pause = Duration::from_micros(50);
    loop {
        let running = || threads.iter().filter(|thread| !thread.is_finished());
        // A signal that comes just before a thread begins to wait is lost: it is sent again.
        for thread in running() {
            // SAFETY: the thread was not joined, so its handle is valid.
            unsafe { libc::pthread_kill(thread.as_pthread_t() as libc::pthread_t, libc::SIGUSR1) };
        }
        if running().next().is_none() {
            return;
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(1));
    }
}

/// Gives this thread the priority that the kernel gives its own block workers: those who wait for it
/// hold the processors otherwise, and each of their requests waits for a turn. Best effort.
fn run_before_clients() {
    // SAFETY: the call takes integers and changes the priority of this thread alone.
    unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, -20) };
}

fn prepare_process() -> Result<()> {
    let _ = nix::sys::prctl::set_name(c"vellum-worker");
    // For want of memory rather this process than the supervisor, from which it was forked.
    let adjustment = "/proc/self/oom_score_adj";
    if let Ok(text) = std::fs::read_to_string(adjustment)
        && let Ok(supervisors) = text.trim().parse::<i32>()
    {
        let _ = std::fs::write(adjustment, (supervisors + 1).min(1000).to_string());
    }
    // Reclaiming memory must not wait for I/O on our own device. It can fail even for root.
    // SAFETY: the call takes integers and changes a flag of this thread, which its threads inherit.
    unsafe { libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) };
    let action = SigAction::new(
        SigHandler::Handler(wake_up),
        SaFlags::empty(),
        SigSet::empty(),
    );
    // SAFETY: the handler does nothing, so it is safe at any point; it is there so that a
    // blocked read returns.
    unsafe { sigaction(Signal::SIGUSR1, &action) }.context(|| "a signal handler")?;
    // A thread that panics must not leave a device that is half served.
    fault::abort_on_panic(
        "this is a fault of Vellum's own: the worker ends, and its successor goes on without loss; \
         please report the lines above",
    );
    Ok(())
}

extern "C" fn wake_up(_: i32) {}
