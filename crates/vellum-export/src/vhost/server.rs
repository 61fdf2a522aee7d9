//! The server: one client after the other.

use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;

use nix::sys::eventfd::{EfdFlags, EventFd};
use parking_lot::Mutex;
use vhost::vhost_user::{BackendReqHandler, Error as VhostError};

use super::Disk;
use super::channel::{Channel, Next, peek};
use super::config::MAX_QUEUES;
use super::handler::Handler;
use crate::accept::accept;
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};

/// A vhost-user-blk server of one disk. Clones are handles to the same server.
///
/// ```no_run
/// use std::sync::Arc;
/// use vellum_base::block::MemoryDevice;
/// use vellum_export::vhost::{Disk, Server, bind_unix};
///
/// let disk = Disk {
///     device: Arc::new(MemoryDevice::new(1 << 30)),
///     serial: "disk".into(),
///     read_only: false,
/// };
/// let server = Server::new(disk, 1)?;
/// let (listener, _file) = bind_unix("/run/disk.sock".as_ref())?;
/// server.serve(listener)?; // returns once another thread calls server.shutdown()
/// # Ok::<(), vellum_base::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Server {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    disk: Arc<Disk>,
    queues: u16,
    state: Mutex<State>,
    /// Readable for ever once the server stops.
    stop: EventFd,
}

#[derive(Debug, Default)]
struct State {
    /// The client that is served.
    client: Option<UnixStream>,
    channel: Option<Channel>,
    stopping: bool,
}

impl Server {
    /// A server of a disk with so many queues.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for a number that no disk has, [`ErrorKind::Io`] when the process has no
    /// file descriptors left.
    pub fn new(disk: Disk, queues: u16) -> Result<Server> {
        if queues == 0 || queues > MAX_QUEUES {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("a disk has 1 to {MAX_QUEUES} queues, not {queues}"),
            ));
        }
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        Ok(Server {
            shared: Arc::new(Shared {
                disk: Arc::new(disk),
                queues,
                state: Mutex::default(),
                stop: EventFd::from_value_and_flags(0, flags).context(|| "making an eventfd")?,
            }),
        })
    }

    /// Serves one client after the other until [`Server::shutdown`], and has answered by then what was taken.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] when the listener fails.
    pub fn serve(&self, listener: UnixListener) -> Result<()> {
        listener
            .set_nonblocking(true)
            .context(|| "setting up the listener")?;
        let shared = &self.shared;
        let stopping = || shared.state.lock().stopping;
        while let Some(client) = accept(listener.as_fd(), &shared.stop, stopping)? {
            shared.visit(UnixStream::from(client));
        }
        Ok(())
    }

    /// Tells the client that the disk has another size by now. One that connects later is told then.
    pub fn size_changed(&self) {
        self.shared.tell_size();
    }

    /// Stops: no new clients, and the present one is disconnected once what was taken is answered.
    /// [`Server::serve`] returns then.
    pub fn shutdown(&self) {
        let mut state = self.shared.state.lock();
        state.stopping = true;
        // The counter cannot overflow, which is all that could fail.
        let _ = self.shared.stop.write(1);
        if let Some(client) = &state.client {
            let _ = client.shutdown(Shutdown::Both);
        }
    }
}

impl Shared {
    fn tell_size(&self) {
        let state = self.state.lock();
        let Some(channel) = &state.channel else {
            return;
        };
        if let Err(error) = channel.config_changed() {
            tracing::warn!(%error, "the machine was not told that its disk grew");
        }
    }

    /// Serves a client to its end.
    fn visit(&self, client: UnixStream) {
        tracing::info!(disk = %self.disk.serial, "a machine is connected");
        let handler = Arc::new(std::sync::Mutex::new(Handler::new(
            Arc::clone(&self.disk),
            self.queues,
        )));
        match self.talk(client, &handler) {
            Ok(()) => tracing::info!(disk = %self.disk.serial, "the machine has disconnected"),
            Err(error) => {
                tracing::warn!(disk = %self.disk.serial, "the machine is disconnected: {error}");
            }
        }
        // Before the socket is closed: whoever connects again finds what was taken answered.
        if let Ok(mut handler) = handler.lock() {
            handler.stop();
        }
        let mut state = self.state.lock();
        state.client = None;
        state.channel = None;
    }

    fn talk(
        &self,
        client: UnixStream,
        handler: &Arc<std::sync::Mutex<Handler>>,
    ) -> Result<(), VhostError> {
        let ours = client.try_clone().map_err(VhostError::SocketError)?;
        {
            let mut state = self.state.lock();
            if state.stopping {
                return Ok(());
            }
            state.client = Some(ours.try_clone().map_err(VhostError::SocketError)?);
        }
        let mut messages = BackendReqHandler::from_stream(client, Arc::clone(handler));
        loop {
            match peek(&ours).map_err(|errno| VhostError::SocketError(errno.into()))? {
                Next::End => return Ok(()),
                Next::Other => {
                    messages.handle_request()?;
                    // It may have grown while nobody was connected, of which QEMU does not ask.
                    if handler
                        .lock()
                        .is_ok_and(|mut handler| handler.take_untold())
                    {
                        self.tell_size();
                    }
                }
                Next::Channel(channel) => {
                    messages.handle_request()?;
                    self.state.lock().channel = Some(channel);
                }
            }
        }
    }
}
