//! The server: exports, listeners, and who is connected.

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Weak};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{self, Shutdown, sockopt};
use parking_lot::{Condvar, Mutex};

use super::Export;
use super::config::ServerConfig;
use super::connection::{Connection, Helpers, Limits};
use super::exec::Session;
use super::handshake::{Directory, Handshake, Negotiated, Outcome};
use super::memory::Memory;
use super::stream::{Deadline, Socket};
use super::tls::{self, TlsStream};
use crate::accept::accept;
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};

/// How long the listener rests after it had to turn a client away, so that a flood of them does
/// not take the processor from those who are served.
const REST: Duration = Duration::from_millis(1);

/// An export as [`Server::exports`] describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportStatus {
    /// Its name.
    pub name: String,
    /// Clients that are served from it now.
    pub connections: usize,
}

/// An NBD server. Clones are handles to the same server.
///
/// ```no_run
/// use std::sync::Arc;
/// use vellum_base::block::MemoryDevice;
/// use vellum_export::nbd::{Export, Server, ServerConfig, bind_unix};
///
/// let server = Server::new(ServerConfig::default())?;
/// server.add_export(Export::new("disk", Arc::new(MemoryDevice::new(1 << 30))))?;
/// let (listener, _file) = bind_unix("/run/disk.sock".as_ref())?;
/// server.serve_unix(listener)?; // returns once another thread calls server.shutdown()
/// # Ok::<(), vellum_base::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Server {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    config: ServerConfig,
    memory: Arc<Memory>,
    helpers: Arc<Helpers>,
    state: Mutex<State>,
    /// Clients that found no place so far, so that many of them do not fill the log.
    refused: AtomicU64,
    /// A connection or a listener has ended.
    ended: Condvar,
    /// Readable for ever once the server stops.
    stop: EventFd,
    /// The server stops: no request waits for room on the host's disk any more.
    ends: Arc<AtomicBool>,
}

#[derive(Debug, Default)]
struct State {
    exports: BTreeMap<String, Arc<Export>>,
    /// By age: numbers grow.
    clients: BTreeMap<u64, Client>,
    next: u64,
    listeners: usize,
    stopping: bool,
}

impl State {
    fn served(&self) -> usize {
        let is_served = |client: &&Client| matches!(client.phase, Phase::Served(_));
        self.clients.values().filter(is_served).count()
    }
}

#[derive(Debug)]
struct Client {
    socket: Arc<Socket>,
    phase: Phase,
}

#[derive(Debug)]
enum Phase {
    Handshake,
    /// Had to make room for another; the thread has yet to notice.
    Dropped,
    Served(Served),
}

#[derive(Debug)]
struct Served {
    /// Weak, so that the list keeps no device open.
    export: Weak<Export>,
    since: Instant,
    /// It has made a request.
    busy: Arc<AtomicBool>,
}

impl Server {
    /// A server with nothing to serve yet.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for a limit of 0, [`ErrorKind::Io`] when the process has no
    /// file descriptors left.
    pub fn new(config: ServerConfig) -> Result<Self> {
        let smallest = config
            .max_connections
            .min(config.max_handshakes)
            .min(config.threads_per_connection);
        let shortest = config.handshake_timeout.min(config.stall_timeout);
        // A socket's timeout of 0 means none at all, and it counts in microseconds.
        if smallest == 0 || shortest < Duration::from_millis(1) {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                "an NBD server with a limit of 0 cannot serve anything: raise it",
            ));
        }
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let stop = EventFd::from_value_and_flags(0, flags).context(|| "making an eventfd")?;
        Ok(Server {
            shared: Arc::new(Shared {
                memory: Arc::new(Memory::new(config.memory)),
                helpers: Arc::new(Helpers::new(config.helpers)),
                config,
                state: Mutex::default(),
                refused: AtomicU64::new(0),
                ended: Condvar::new(),
                stop,
                ends: Arc::default(),
            }),
        })
    }

    /// Offers an export, from now on.
    ///
    /// # Errors
    /// [`ErrorKind::AlreadyExists`] when there is one of that name, [`ErrorKind::InvalidInput`]
    /// when the protocol cannot carry the name or the description.
    pub fn add_export(&self, export: Export) -> Result<()> {
        export.check()?;
        let mut state = self.shared.state.lock();
        if state.exports.contains_key(&export.name) {
            return Err(Error::new(
                ErrorKind::AlreadyExists,
                format!("an export named {:?} is served already", export.name),
            ));
        }
        state.exports.insert(export.name.clone(), Arc::new(export));
        Ok(())
    }

    /// Withdraws an export: no new clients; the present ones get the replies to what they have
    /// sent, and are disconnected. On return the server holds no reference to the device.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] when there is none of that name, [`ErrorKind::Timeout`] when the
    /// device has not finished a request after twice the [`ServerConfig::drain_timeout`].
    pub fn remove_export(&self, name: &str) -> Result<()> {
        let export = self
            .shared
            .state
            .lock()
            .exports
            .remove(name)
            .ok_or_else(|| {
                Error::new(
                    ErrorKind::NotFound,
                    format!("no export named {name:?} is served"),
                )
            })?;
        let export = {
            let weak = Arc::downgrade(&export);
            drop(export);
            weak
        };
        self.shared.drain(|client| match &client.phase {
            Phase::Served(served) => served.export.ptr_eq(&export),
            Phase::Handshake | Phase::Dropped => false,
        })
    }

    /// The exports on offer and how many clients each has, sorted by name.
    pub fn exports(&self) -> Vec<ExportStatus> {
        let state = self.shared.state.lock();
        let serves = |client: &Client, export: &Arc<Export>| match &client.phase {
            Phase::Served(served) => served.export.ptr_eq(&Arc::downgrade(export)),
            Phase::Handshake | Phase::Dropped => false,
        };
        state
            .exports
            .values()
            .map(|export| ExportStatus {
                name: export.name.clone(),
                connections: state
                    .clients
                    .values()
                    .filter(|client| serves(client, export))
                    .count(),
            })
            .collect()
    }

    /// How many clients are served now from the export of that name; `None` if there is none.
    pub fn connections(&self, name: &str) -> Option<usize> {
        self.exports()
            .into_iter()
            .find(|export| export.name == name)
            .map(|export| export.connections)
    }

    /// Accepts clients on a unix socket until [`Server::shutdown`].
    ///
    /// # Errors
    /// [`ErrorKind::Io`] when the listener fails.
    pub fn serve_unix(&self, listener: UnixListener) -> Result<()> {
        listener
            .set_nonblocking(true)
            .context(|| "setting up the listener")?;
        self.shared.accept(listener.as_fd(), |_| {})
    }

    /// Accepts clients on TCP until [`Server::shutdown`].
    ///
    /// # Errors
    /// [`ErrorKind::Io`] when the listener fails.
    pub fn serve_tcp(&self, listener: TcpListener) -> Result<()> {
        listener
            .set_nonblocking(true)
            .context(|| "setting up the listener")?;
        self.shared.accept(listener.as_fd(), |fd| {
            // Replies are sent whole. A client whose host died is noticed in time.
            let _ = socket::setsockopt(&fd, sockopt::TcpNoDelay, &true);
            let _ = socket::setsockopt(&fd, sockopt::KeepAlive, &true);
        })
    }

    /// Serves a client on a socket that is connected already, in the background, with the
    /// limits that hold for those that a listener accepts.
    pub fn serve_connected(&self, socket: OwnedFd) {
        self.shared.receive(socket);
    }

    /// Stops: no new clients; the present ones get the replies to what they have sent, and are
    /// disconnected. Returns when all of it has ended, the listeners too. Further calls wait
    /// for the same.
    ///
    /// # Errors
    /// [`ErrorKind::Timeout`] when a device has not finished a request after twice the
    /// [`ServerConfig::drain_timeout`].
    pub fn shutdown(&self) -> Result<()> {
        self.shared.state.lock().stopping = true;
        self.shared.ends.store(true, Relaxed);
        // The counter cannot overflow, which is all that could fail.
        let _ = self.shared.stop.write(1);
        self.shared.drain(|_| true)?;
        let mut state = self.shared.state.lock();
        while state.listeners > 0 {
            self.shared.ended.wait(&mut state);
        }
        Ok(())
    }
}

impl Shared {
    fn accept(self: &Arc<Self>, listener: BorrowedFd<'_>, setup: fn(BorrowedFd<'_>)) -> Result<()> {
        self.state.lock().listeners += 1;
        let _listening = Listening(self);
        while let Some(fd) = accept(listener, &self.stop, || self.state.lock().stopping)? {
            setup(fd.as_fd());
            if !self.receive(fd) {
                thread::sleep(REST);
            }
        }
        Ok(())
    }

    /// Starts a thread for a new client, or closes its socket. False when somebody had to go.
    fn receive(self: &Arc<Self>, fd: OwnedFd) -> bool {
        let socket = match Socket::new(fd, self.config.stall_timeout) {
            Ok(socket) => Arc::new(socket),
            Err(error) => {
                tracing::debug!("cannot set up an NBD client's socket: {error}");
                return false;
            }
        };
        let mut state = self.state.lock();
        if state.served() >= self.config.max_connections {
            self.drop_idler(&mut state);
        }
        let served = state.served();
        let others = state.clients.len() - served;
        if state.stopping || others >= self.config.max_handshakes.saturating_mul(2) {
            tracing::debug!(served, others, "turning an NBD client away");
            return false;
        }
        // Where there is no place for it, its handshake says so.
        let full = served >= self.config.max_connections;
        let calm = self.make_room(&mut state) && !full;
        let id = state.next;
        state.next += 1;
        let client = Client {
            socket: Arc::clone(&socket),
            phase: Phase::Handshake,
        };
        state.clients.insert(id, client);
        drop(state);
        let visit = Visit {
            shared: Arc::clone(self),
            id,
            busy: Arc::default(),
        };
        let started = thread::Builder::new()
            .name(format!("nbd-{id}"))
            .spawn(move || visit.run(socket));
        if let Err(error) = &started {
            // The visit was dropped with the closure, and took the client off the list.
            tracing::warn!("cannot start a thread for an NBD client: {error}");
        }
        calm && started.is_ok()
    }

    /// Says that there is no place for a client, to it and to whoever reads the log.
    fn refuse(&self, served: usize) -> String {
        let why = format!("the server serves {served} clients already, its limit");
        let refused = self.refused.fetch_add(1, Relaxed) + 1;
        // Each of the first ones, then ever fewer.
        if refused.is_power_of_two() {
            tracing::warn!(
                refused,
                "an NBD client was refused: {why} (--max-connections)"
            );
        }
        why
    }

    /// Drops the client that has been longest in its handshake when there are too many. True
    /// when there was room.
    fn make_room(&self, state: &mut State) -> bool {
        let is_waiting = |client: &&mut Client| matches!(client.phase, Phase::Handshake);
        let waiting = state.clients.values_mut().filter(is_waiting).count();
        if waiting < self.config.max_handshakes {
            return true;
        }
        match state.clients.values_mut().find(is_waiting) {
            Some(oldest) => {
                oldest.phase = Phase::Dropped;
                oldest.socket.shutdown(Shutdown::Both);
                false
            }
            None => true,
        }
    }

    /// Drops the oldest of the clients that were let in and have asked for nothing since, though
    /// there was time. Real ones read at once, and hundreds that do not would keep all others out.
    fn drop_idler(&self, state: &mut State) {
        let patience = self.config.handshake_timeout;
        let idle = |client: &&mut Client| match &client.phase {
            Phase::Served(served) => {
                !served.busy.load(Relaxed) && served.since.elapsed() >= patience
            }
            Phase::Handshake | Phase::Dropped => false,
        };
        if let Some(idler) = state.clients.values_mut().find(idle) {
            idler.phase = Phase::Dropped;
            idler.socket.shutdown(Shutdown::Both);
        }
    }

    /// Ends the clients that `which` names: first in good order, later by force.
    fn drain(&self, which: impl Fn(&Client) -> bool) -> Result<()> {
        let force = Instant::now() + self.config.drain_timeout;
        let mut state = self.state.lock();
        for client in state.clients.values().filter(|client| which(client)) {
            client.socket.shutdown(match client.phase {
                // What the client has sent is still read; then the stream ends.
                Phase::Served(_) => Shutdown::Read,
                Phase::Handshake | Phase::Dropped => Shutdown::Both,
            });
        }
        let mut forced = false;
        loop {
            let left = state
                .clients
                .values()
                .filter(|client| which(client))
                .count();
            if left == 0 {
                return Ok(());
            }
            let deadline = if forced {
                force + self.config.drain_timeout
            } else {
                force
            };
            if !self.ended.wait_until(&mut state, deadline).timed_out() {
                continue;
            }
            if forced {
                return Err(Error::new(
                    ErrorKind::Timeout,
                    format!("{left} NBD connections still wait for the device"),
                ));
            }
            forced = true;
            for client in state.clients.values().filter(|client| which(client)) {
                client.socket.shutdown(Shutdown::Both);
            }
        }
    }
}

/// Counts a listener for as long as it runs.
struct Listening<'a>(&'a Shared);

impl Drop for Listening<'_> {
    fn drop(&mut self) {
        self.0.state.lock().listeners -= 1;
        self.0.ended.notify_all();
    }
}

/// A client on the server's list; off it when dropped.
struct Visit {
    shared: Arc<Shared>,
    id: u64,
    /// The client has made a request.
    busy: Arc<AtomicBool>,
}

impl Visit {
    fn run(self, socket: Arc<Socket>) {
        match self.serve(socket) {
            Ok(()) => tracing::debug!(id = self.id, "NBD client disconnected"),
            Err(error) => tracing::debug!(id = self.id, "NBD client dropped: {error}"),
        }
    }

    fn serve(&self, socket: Arc<Socket>) -> Result<()> {
        let config = &self.shared.config;
        let mut stream = Deadline {
            socket: &socket,
            deadline: Instant::now() + config.handshake_timeout,
        };
        let mut handshake = Handshake::new(self, config.tls.is_some());
        handshake.greet(&mut stream)?;
        let limits = Limits {
            threads: config.threads_per_connection,
            threads_where_reads_stall: config.threads_where_reads_stall,
            helpers: Arc::clone(&self.shared.helpers),
            bytes_in_flight: config.bytes_in_flight,
            memory: Arc::clone(&self.shared.memory),
            stall: config.stall_timeout,
        };
        match (handshake.haggle(&mut stream)?, &config.tls) {
            (Outcome::Transmit(negotiated), _) => {
                Connection::new(socket, self.session(negotiated), limits, self.ends()).serve()
            }
            (Outcome::StartTls, Some(tls)) => {
                let mut session = tls.connection()?;
                handshake.secured();
                let mut secure = rustls::Stream::new(&mut session, &mut stream);
                let outcome = handshake.haggle(&mut secure).inspect_err(|error| {
                    if let Some(why) = tls::refusal(error) {
                        self.tell_refusal(&socket, why);
                    }
                })?;
                let stream = TlsStream::new(Arc::clone(&socket), session);
                match outcome {
                    Outcome::Transmit(negotiated) => {
                        Connection::new(stream, self.session(negotiated), limits, self.ends())
                            .serve()
                    }
                    Outcome::StartTls | Outcome::Closed => {
                        super::stream::Stream::finish(&stream);
                        Ok(())
                    }
                }
            }
            (Outcome::StartTls | Outcome::Closed, _) => Ok(()),
        }
    }

    /// Says who did not get in, and why: on the client's side there is an alert's name at best.
    fn tell_refusal(&self, socket: &Socket, why: &dyn std::fmt::Display) {
        let peer = socket.peer();
        tracing::warn!(id = self.id, peer, "TLS with an NBD client failed: {why}");
    }

    fn ends(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.shared.ends)
    }

    fn session(&self, negotiated: Negotiated) -> Session {
        tracing::debug!(id = self.id, export = %negotiated.export.name, "serving an NBD client");
        Session::new(negotiated, Arc::clone(&self.busy))
    }
}

impl Drop for Visit {
    fn drop(&mut self) {
        self.shared.state.lock().clients.remove(&self.id);
        self.shared.ended.notify_all();
    }
}

impl Directory for Visit {
    fn exports(&self) -> Vec<Arc<Export>> {
        self.shared.state.lock().exports.values().cloned().collect()
    }

    fn stopping(&self) -> bool {
        self.shared.state.lock().stopping
    }

    fn admit(&self, export: &Arc<Export>) -> Result<(), String> {
        let mut state = self.shared.state.lock();
        let offered = state
            .exports
            .get(&export.name)
            .is_some_and(|offered| Arc::ptr_eq(offered, export));
        if !offered || state.stopping {
            return Err("the export is being withdrawn".into());
        }
        let served = state.served();
        if served >= self.shared.config.max_connections {
            return Err(self.shared.refuse(served));
        }
        match state.clients.get_mut(&self.id) {
            Some(client) if matches!(client.phase, Phase::Handshake) => {
                client.phase = Phase::Served(Served {
                    export: Arc::downgrade(export),
                    since: Instant::now(),
                    busy: Arc::clone(&self.busy),
                });
                Ok(())
            }
            _ => Err("the handshake took too long".into()),
        }
    }
}
