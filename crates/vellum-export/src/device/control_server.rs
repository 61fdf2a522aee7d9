//! A control socket for servers that are no device: one thread that listens, one a connection.

use std::io::{BufRead, BufReader, Read};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;
use serde_json::Value;

use super::control::{Call, ControlHandler, MAX_LINE, Reply, bind_at, send};
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_fs::run_dir::DirSocket;

/// Connections served at once, where nobody needs more; further ones are closed.
const FEW: usize = 8;
/// A connection that says nothing for this long is closed.
const IDLE: Duration = Duration::from_secs(10);

/// A socket on which others ask a server; it is removed when this is dropped.
#[derive(Debug)]
pub struct ControlServer {
    path: PathBuf,
    stop: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

impl ControlServer {
    /// Listens on `socket`, mode 0600, and has `handler` answer. A socket that a killed
    /// server left is replaced.
    ///
    /// # Errors
    /// [`ErrorKind::Permission`] or [`ErrorKind::Io`].
    pub fn start(socket: &DirSocket, handler: Arc<dyn ControlHandler>) -> Result<Self> {
        ControlServer::start_for(FEW, socket, handler)
    }

    /// As [`ControlServer::start`], for so many connections at once.
    ///
    /// # Errors
    /// As [`ControlServer::start`].
    pub fn start_for(
        connections: usize,
        socket: &DirSocket,
        handler: Arc<dyn ControlHandler>,
    ) -> Result<Self> {
        let listener = bind_at(socket)?;
        let path = socket.path();
        let what = || path.display().to_string();
        listener.set_nonblocking(true).context(what)?;
        let stop = Arc::new(EventFd::new().context(what)?);
        let told = Arc::clone(&stop);
        let thread = std::thread::Builder::new()
            .name("control".into())
            .spawn(move || listen(&listener, &told, &handler, connections))
            .context(what)?;
        Ok(ControlServer {
            path,
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for ControlServer {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
        let told = self.stop.write(1).is_ok();
        if let (Some(thread), true) = (self.thread.take(), told) {
            // It panics nowhere, and there is nothing to do about it here.
            let _ = thread.join();
        }
    }
}

fn listen(listener: &UnixListener, stop: &EventFd, handler: &Arc<dyn ControlHandler>, most: usize) {
    let connections = Arc::new(AtomicUsize::new(0));
    loop {
        let mut fds = [
            PollFd::new(stop.as_fd(), PollFlags::POLLIN),
            PollFd::new(listener.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return tracing::warn!(%error, "the control socket"),
        }
        let [stopped, _] = fds;
        if stopped.any().unwrap_or(true) {
            return;
        }
        let Ok((stream, _)) = listener.accept() else {
            continue;
        };
        if connections.fetch_add(1, Ordering::AcqRel) >= most {
            connections.fetch_sub(1, Ordering::AcqRel);
            continue;
        }
        let (handler, counted) = (Arc::clone(handler), Arc::clone(&connections));
        let spawned = std::thread::Builder::new()
            .name("control".into())
            .spawn(move || {
                let answer = |verb: &str, args| handler.handle(verb, args);
                if let Err(error) = converse(&stream, || (), answer) {
                    tracing::debug!("control connection: {error}");
                }
                counted.fetch_sub(1, Ordering::AcqRel);
            });
        if spawned.is_err() {
            connections.fetch_sub(1, Ordering::AcqRel);
        }
    }
}

/// Answers one connection until the other side closes it: one line for each that it sends. What
/// `begin` returns when a line has come is kept until its answer was sent.
///
/// # Errors
/// Where the connection fails, is silent for too long, or sends what is not text.
pub fn converse<Held>(
    stream: &UnixStream,
    mut begin: impl FnMut() -> Held,
    answer: impl Fn(&str, Value) -> Result<Value>,
) -> Result<()> {
    let what = || "the connection";
    stream.set_nonblocking(false).context(what)?;
    stream.set_read_timeout(Some(IDLE)).context(what)?;
    stream.set_write_timeout(Some(IDLE)).context(what)?;
    let mut reader = BufReader::new(stream);
    loop {
        let mut line = String::new();
        let read = (&mut reader)
            .take(MAX_LINE)
            .read_line(&mut line)
            .context(what)?;
        if read == 0 {
            return Ok(());
        }
        let held = begin();
        let result = serde_json::from_str::<Call>(&line)
            .map_err(|error| {
                Error::with_source(ErrorKind::Protocol, "a line that is no command", error)
            })
            .and_then(|call| answer(&call.verb, call.args));
        let sent = send(stream, &Reply::from(result));
        drop(held);
        sent.context(what)?;
    }
}

#[cfg(test)]
mod tests {
    use super::super::control::{NoCommands, call_at};
    use super::*;

    #[test]
    fn a_server_answers_until_it_is_dropped_and_leaves_no_socket() {
        let dir = tempfile::tempdir().unwrap();
        // Of a server that was killed.
        drop(UnixListener::bind(dir.path().join("a.sock")).unwrap());
        std::fs::write(dir.path().join("file"), "somebody's").unwrap();
        let socket = |name: &str| DirSocket::new(dir.path(), name.to_owned());
        let start = |name| ControlServer::start(&socket(name), Arc::new(NoCommands));
        assert_eq!(start("file").unwrap_err().kind(), ErrorKind::AlreadyExists);
        std::fs::remove_file(dir.path().join("file")).unwrap();
        let server = start("a.sock").unwrap();
        let ask = || {
            let null = serde_json::Value::Null;
            call_at(&socket("a.sock"), "x", null, IDLE).unwrap_err()
        };
        assert_eq!(ask().kind(), ErrorKind::Unsupported);
        assert_eq!(ask().kind(), ErrorKind::Unsupported);
        drop(server);
        assert_eq!(ask().kind(), ErrorKind::NotFound);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
