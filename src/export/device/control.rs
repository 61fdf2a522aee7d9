//! The control socket of a device: one JSON object a line, each way.
//!
//! Request: `{"verb": "status", "args": …}`. Answer: `{"ok": true, "result": …}` or
//! `{"ok": false, "kind": "NoSpace", "error": "…"}`. The supervisor binds the socket and every
//! worker inherits it, so a call that comes while a worker is replaced waits for the next one.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::state::CONTROL;
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::export::unix_socket;

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

/// An [`Error`] that travels between processes: kind and the whole text.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Failure {
    /// The name of an [`ErrorKind`].
    pub kind: String,
    /// The whole story on one line.
    pub error: String,
}

const KINDS: [ErrorKind; 17] = [
    ErrorKind::InvalidInput,
    ErrorKind::OutOfRange,
    ErrorKind::NoSpace,
    ErrorKind::ReadOnly,
    ErrorKind::Io,
    ErrorKind::Corrupt,
    ErrorKind::Unsupported,
    ErrorKind::Poisoned,
    ErrorKind::NotFound,
    ErrorKind::AlreadyExists,
    ErrorKind::InUse,
    ErrorKind::Permission,
    ErrorKind::Missing,
    ErrorKind::Protocol,
    ErrorKind::Timeout,
    ErrorKind::Command,
    ErrorKind::Interrupted,
];

impl From<&Error> for Failure {
    fn from(error: &Error) -> Self {
        // One line, and short enough that a pipe takes it in one piece.
        let text: String = error
            .to_string()
            .replace('\n', " ")
            .chars()
            .take(900)
            .collect();
        Failure {
            kind: format!("{:?}", error.kind()),
            error: text,
        }
    }
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        let known = KINDS
            .into_iter()
            .find(|kind| format!("{kind:?}") == failure.kind);
        Error::new(known.unwrap_or(ErrorKind::Io), failure.error)
    }
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

/// A path to a file of `dir` that is short however long the path of `dir` is: a socket's path has
/// room for 107 bytes. Valid while the returned file is open.
fn short_path(dir: &Path, name: &str) -> Result<(File, PathBuf)> {
    let handle = std::fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH | libc::O_DIRECTORY | libc::O_CLOEXEC)
        .open(dir)
        .context(|| dir.display().to_string())?;
    let path = PathBuf::from(format!("/proc/self/fd/{}/{name}", handle.as_raw_fd()));
    Ok((handle, path))
}

/// Makes the socket in `run_dir`, mode 0600, replacing one that nobody answers on.
///
/// # Errors
/// [`ErrorKind::InUse`] where somebody does, [`ErrorKind::AlreadyExists`] where something else is
/// there; [`ErrorKind::Permission`] or [`ErrorKind::Io`].
pub fn bind(run_dir: &Path) -> Result<UnixListener> {
    bind_at(run_dir, CONTROL)
}

/// As [`bind`], with a name for the socket.
///
/// # Errors
/// As [`bind`].
pub fn bind_at(dir: &Path, socket: &str) -> Result<UnixListener> {
    let (_handle, path) = short_path(dir, socket)?;
    let (listener, file) = unix_socket::bind_locked(&path, &dir.join(socket))?;
    // Whoever made the directory removes it, and others than this process listen on the socket.
    file.keep();
    Ok(listener)
}

/// Calls the device of `run_dir` and waits at most `timeout` for its answer.
///
/// # Errors
/// What the device answered, [`ErrorKind::NotFound`] when there is none, [`ErrorKind::Timeout`]
/// when it does not answer.
pub fn call(run_dir: &Path, verb: &str, args: Value, timeout: Duration) -> Result<Value> {
    call_at(run_dir, CONTROL, verb, args, timeout)
}

/// As [`call`], with the name of the socket.
///
/// # Errors
/// As [`call`].
pub fn call_at(
    dir: &Path,
    socket: &str,
    verb: &str,
    args: Value,
    timeout: Duration,
) -> Result<Value> {
    let name = dir.join(socket);
    let what = || format!("{}: {verb}", name.display());
    let (_handle, path) = short_path(dir, socket)?;
    let stream = UnixStream::connect(&path).map_err(|error| match error.raw_os_error() {
        Some(libc::ECONNREFUSED | libc::ENOENT) => Error::with_source(
            ErrorKind::NotFound,
            format!("{}: no server is there", what()),
            error,
        ),
        _ => Error::io(what(), error),
    })?;
    stream.set_read_timeout(Some(timeout)).context(what)?;
    stream.set_write_timeout(Some(timeout)).context(what)?;
    let call = Call {
        verb: verb.to_string(),
        args,
    };
    send(&stream, &call).context(what)?;
    let mut line = String::new();
    let read = BufReader::new((&stream).take(MAX_LINE)).read_line(&mut line);
    match read {
        Ok(0) => Err(Error::new(
            ErrorKind::Io,
            format!("{}: the server went away before it answered", what()),
        )),
        Ok(_) => {
            let reply: Reply = serde_json::from_str(&line)
                .map_err(|error| Error::with_source(ErrorKind::Protocol, what(), error))?;
            match reply.failure {
                Some(failure) if !reply.ok => Err(Error::from(failure)),
                _ => Ok(reply.result),
            }
        }
        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => Err(Error::new(
            ErrorKind::Timeout,
            format!("{}: no answer within {timeout:?}", what()),
        )),
        Err(error) => Err(Error::io(what(), error)),
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
    fn every_kind_of_error_survives_the_way_between_processes() {
        for kind in KINDS {
            let failure = Failure::from(&Error::new(kind, "what\nhappened"));
            let error = Error::from(failure);
            assert_eq!(error.kind(), kind);
            assert_eq!(error.to_string(), "what happened");
        }
    }

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
