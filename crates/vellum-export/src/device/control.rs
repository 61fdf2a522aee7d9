//! The control socket of a device: one JSON object a line, each way.
//!
//! Request: `{"verb": "status", "args": …}`. Answer: `{"ok": true, "result": …}` or
//! `{"ok": false, "kind": "NoSpace", "error": "…"}`. The supervisor binds the socket and every
//! worker inherits it, so a call that comes while a worker is replaced waits for the next one.

use std::io::{BufRead, BufReader, ErrorKind as ErrorIo, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::failure::Failure;
use super::state::{is_halted, stopped};
use crate::unix_socket;
use vellum_base::error::{Error, ErrorKind, Result};
use vellum_fs::run_dir::{DirSocket, RunDir};

/// After this long without an answer it is looked whether anybody can answer.
const HALTED_CHECK: Duration = Duration::from_secs(2);
/// No call waits for less than this.
const SHORTEST: Duration = Duration::from_millis(10);
/// The longest line that either side takes.
pub const MAX_LINE: u64 = 1 << 20;

/// Commands that a worker takes beside `status`, `flush`, `stop`, `upgrade` and `adopt`.
pub trait ControlHandler: Send + Sync {
    /// Carries out `verb`. Calls may come from several threads at once.
    ///
    /// # Errors
    /// What the caller is told; [`ErrorKind::Unsupported`] for a verb that it does not know.
    fn handle(&self, verb: &str, args: Value) -> Result<Value>;
}

/// A handler that knows no further command.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoCommands;

impl ControlHandler for NoCommands {
    fn handle(&self, verb: &str, _: Value) -> Result<Value> {
        Err(Error::new(
            ErrorKind::Unsupported,
            format!("the device server knows no command {verb:?}"),
        ))
    }
}

/// One request line.
#[derive(Debug, Serialize, Deserialize)]
pub struct Call {
    /// What to do.
    pub verb: String,
    /// With what.
    #[serde(default)]
    pub args: Value,
}

impl Call {
    fn new(verb: &str, args: Value) -> Call {
        Call {
            verb: verb.to_owned(),
            args,
        }
    }
}

/// One answer line.
#[derive(Debug, Serialize, Deserialize)]
pub struct Reply {
    /// True for success.
    pub ok: bool,
    /// What came out.
    #[serde(default)]
    pub result: Value,
    /// What went wrong.
    #[serde(flatten)]
    pub failure: Option<Failure>,
}

impl From<Result<Value>> for Reply {
    fn from(result: Result<Value>) -> Self {
        match result {
            Ok(result) => Reply {
                ok: true,
                result,
                failure: None,
            },
            Err(error) => Reply {
                ok: false,
                result: Value::Null,
                failure: Some(Failure::from(&error)),
            },
        }
    }
}

/// Makes the socket in `run_dir`, mode 0600, replacing one that nobody answers on.
///
/// # Errors
/// [`ErrorKind::InUse`] where somebody does, [`ErrorKind::AlreadyExists`] where something else is
/// there; [`ErrorKind::Permission`] or [`ErrorKind::Io`].
pub fn bind(run_dir: &RunDir) -> Result<UnixListener> {
    bind_at(&run_dir.control())
}

/// As [`bind`], another socket.
///
/// # Errors
/// As [`bind`].
pub fn bind_at(socket: &DirSocket) -> Result<UnixListener> {
    let (_handle, path) = socket.short_path()?;
    let (listener, file) = unix_socket::bind_locked(&path, &socket.path())?;
    // Whoever made the directory removes it, and others than this process listen on the socket.
    file.keep();
    Ok(listener)
}

/// Calls the device of `run_dir` and waits at most `timeout` for its answer.
///
/// # Errors
/// What the device answered, [`ErrorKind::NotFound`] when there is none, [`ErrorKind::Timeout`]
/// when it does not answer, with what is known of that and what to do.
pub fn call(run_dir: &RunDir, verb: &str, args: Value, timeout: Duration) -> Result<Value> {
    let call = Call::new(verb, args);
    match ask(&run_dir.control(), &call, timeout, || is_halted(run_dir)) {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(error)) | Err(error) => Err(explain(run_dir, error)),
    }
}

/// As [`call`], for a command that may be carried out twice: where the worker dies before it has
/// answered, the next one is asked.
///
/// # Errors
/// As [`call`].
pub fn call_again(run_dir: &RunDir, verb: &str, args: Value, timeout: Duration) -> Result<Value> {
    let call = Call::new(verb, args);
    let socket = run_dir.control();
    let deadline = Instant::now() + timeout;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        match ask(&socket, &call, left.max(SHORTEST), || is_halted(run_dir)) {
            Ok(answer) => return answer.map_err(|error| explain(run_dir, error)),
            Err(error) if left.is_zero() => return Err(error),
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}

/// Adds to a [`ErrorKind::Timeout`] why nobody answers, where that can be seen.
fn explain(run_dir: &RunDir, error: Error) -> Error {
    if error.kind() != ErrorKind::Timeout {
        return error;
    }
    match stopped(run_dir) {
        Some(stopped) => Error::new(ErrorKind::Timeout, format!("{error}: {stopped}")),
        None => error,
    }
}

/// As [`call`], of a server that is no device.
///
/// # Errors
/// As [`call`].
pub fn call_at(socket: &DirSocket, verb: &str, args: Value, timeout: Duration) -> Result<Value> {
    ask(socket, &Call::new(verb, args), timeout, || false)?
}

/// Asks, and waits no longer where the server is `halted`. The outer error is that the server went away
/// before it answered, the inner all others.
fn ask(
    socket: &DirSocket,
    call: &Call,
    timeout: Duration,
    halted: impl Fn() -> bool,
) -> Result<Result<Value>> {
    let began = Instant::now();
    let what = || format!("{}: {}", socket.path().display(), call.verb);
    let failed = |error: std::io::Error| match error.kind() {
        ErrorIo::WouldBlock => Ok(Err(Error::new(
            ErrorKind::Timeout,
            format!(
                "{}: no answer within {} s",
                what(),
                began.elapsed().as_secs_f32().round()
            ),
        ))),
        ErrorIo::ConnectionRefused | ErrorIo::NotFound => Ok(Err(Error::with_source(
            ErrorKind::NotFound,
            format!("{}: no server is there", what()),
            error,
        ))),
        ErrorIo::BrokenPipe | ErrorIo::ConnectionReset => Err(Error::io(what(), error)),
        _ => Ok(Err(Error::io(what(), error))),
    };
    let (_handle, path) = match socket.short_path() {
        Ok(path) => path,
        Err(error) => return Ok(Err(error)),
    };
    let exchange = || {
        let stream = unix_socket::connect(&path, timeout)?;
        stream.set_read_timeout(Some(timeout))?;
        send(&stream, call)?;
        wait_for_answer(&stream, timeout, halted)?;
        let mut line = String::new();
        BufReader::new((&stream).take(MAX_LINE)).read_line(&mut line)?;
        Ok(line)
    };
    let line: String = match exchange() {
        Ok(line) => line,
        Err(error) => return failed(error),
    };
    if !line.ends_with('\n') && (line.len() as u64) < MAX_LINE {
        return Err(Error::new(
            ErrorKind::Io,
            format!("{}: the server went away before it answered", what()),
        ));
    }
    let reply: Reply = match serde_json::from_str(&line) {
        Ok(reply) => reply,
        Err(error) => return Ok(Err(Error::with_source(ErrorKind::Protocol, what(), error))),
    };
    Ok(match reply.failure {
        Some(failure) if !reply.ok => Err(Error::from(failure)),
        _ => Ok(reply.result),
    })
}

/// Waits until there is something to read, at most for `timeout`, and not for one that is `halted`.
fn wait_for_answer(
    stream: &UnixStream,
    timeout: Duration,
    halted: impl Fn() -> bool,
) -> std::io::Result<()> {
    let deadline = Instant::now() + timeout;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let wait = left.min(HALTED_CHECK).as_millis() as u16;
        let mut fds = [PollFd::new(stream.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::from(wait)) {
            Ok(0) if left.is_zero() || halted() => return Err(ErrorIo::WouldBlock.into()),
            Ok(0) | Err(Errno::EINTR) => {}
            Ok(_) => return Ok(()),
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Sends one line.
pub(super) fn send(mut stream: &UnixStream, message: &impl Serialize) -> std::io::Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    stream.write_all(&line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reply_is_one_line_of_json() {
        let reply = Reply::from(Err(Error::new(ErrorKind::NoSpace, "full")));
        assert_eq!(
            serde_json::to_string(&reply).unwrap(),
            r#"{"ok":false,"result":null,"kind":"NoSpace","error":"full"}"#
        );
        let reply: Reply = serde_json::from_str(r#"{"ok":true,"result":3}"#).unwrap();
        assert!(reply.failure.is_none());
    }

    #[test]
    fn a_run_directory_with_a_long_path_has_a_socket_all_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let long = dir.path().join("x".repeat(200));
        std::fs::create_dir(&long).unwrap();
        let long = RunDir::at(long);
        let listener = bind(&long).unwrap();
        let server = std::thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            let mut line = String::new();
            BufReader::new(&stream).read_line(&mut line).unwrap();
            let call: Call = serde_json::from_str(&line).unwrap();
            send(&stream, &Reply::from(Ok(call.args))).unwrap();
        });
        let answer = call(&long, "echo", Value::from(5), Duration::from_secs(5)).unwrap();
        assert_eq!(answer, 5);
        server.join().unwrap();
        let error = call(&long, "echo", Value::Null, Duration::from_secs(5)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound);
    }
}
