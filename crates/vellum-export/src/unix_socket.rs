//! Unix sockets, connected to without waiting for ever; those to listen on are made where nothing is, or in place of one that nobody answers on, and of
//! nothing else.

use std::fs::{self, File, Permissions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{self, Flock, FlockArg, OFlag};
use nix::sys::socket::{self, AddressFamily, Backlog, SockFlag, SockType, UnixAddr};
use nix::sys::stat::Mode;

use vellum_base::error::{Error, ErrorKind, Result, ResultExt};

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 128;

/// The file of a listening unix socket; removes it when dropped, unless it is another's by then.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    /// Keeps the file's inode, so that no later file can have the same number.
    inode: OwnedFd,
}

impl SocketFile {
    /// Where the socket is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Leaves the file where it is.
    pub(crate) fn keep(mut self) {
        self.path.clear();
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let Ok(ours) = nix::sys::stat::fstat(&self.inode) else {
            return;
        };
        let same = fs::symlink_metadata(&self.path)
            .is_ok_and(|file| (file.dev(), file.ino()) == (ours.st_dev, ours.st_ino));
        if same {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Listens on a unix socket at `path` that only its owner can connect to (mode 0600). The socket
/// of a server that died is replaced.
///
/// # Errors
/// [`ErrorKind::InUse`] when a server listens there, [`ErrorKind::AlreadyExists`] when something
/// else than a socket is there, [`ErrorKind::InvalidInput`] when the path is too long for a socket.
pub fn bind_unix(path: &Path) -> Result<(UnixListener, SocketFile)> {
    let shown = path.display();
    let dir = match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    };
    let dir = File::open(dir).context(|| format!("opening the directory of {shown}"))?;
    let _lock = lock(dir);
    bind_locked(path, path)
}

/// As [`bind_unix`], for one who keeps others from binding the same path meanwhile. `shown` is how
/// errors call it.
pub(crate) fn bind_locked(path: &Path, shown: &Path) -> Result<(UnixListener, SocketFile)> {
    let shown = shown.display();
    remove_dead_socket(path, &shown)?;
    let address = unix_address(path)?;
    let fd = new_socket(SockFlag::SOCK_CLOEXEC)?;
    socket::bind(fd.as_raw_fd(), &address).context(|| format!("binding {shown}"))?;
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let inode = fcntl::open(path, flags, Mode::empty()).context(|| format!("opening {shown}"))?;
    let file = SocketFile {
        path: path.to_owned(),
        inode,
    };
    // Nobody can connect before the listen below, so the mode is never wider than this.
    fs::set_permissions(path, Permissions::from_mode(0o600))
        .context(|| format!("setting the mode of {shown}"))?;
    let backlog = Backlog::new(BACKLOG).context(|| "sizing the backlog")?;
    socket::listen(&fd, backlog).context(|| format!("listening on {shown}"))?;
    Ok((UnixListener::from(fd), file))
}

/// Connects to the socket at `path`, waiting at most `timeout` for room among those who wait there:
/// a server that hangs takes nobody in.
///
/// # Errors
/// As connect(2); [`io::ErrorKind::WouldBlock`] where there was no room.
pub(crate) fn connect(path: &Path, timeout: Duration) -> io::Result<UnixStream> {
    let address = UnixAddr::new(path)?;
    let flags = SockFlag::SOCK_CLOEXEC;
    let fd = socket::socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    let stream = UnixStream::from(fd);
    stream.set_write_timeout(Some(timeout))?;
    socket::connect(stream.as_raw_fd(), &address)?;
    Ok(stream)
}

/// True while some process listens on the socket at `path`, whether or not it answers. It is proof
/// that a server lives which needs neither its pid nor its help, and works across namespaces.
pub(crate) fn is_listened(path: &Path) -> bool {
    let Ok(address) = UnixAddr::new(path) else {
        return false;
    };
    let Ok(probe) = new_socket(SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK) else {
        return false;
    };
    // Without waiting: those who wait there may be as many as can.
    matches!(
        socket::connect(probe.as_raw_fd(), &address),
        Ok(()) | Err(Errno::EAGAIN)
    )
}

fn new_socket(flags: SockFlag) -> Result<OwnedFd> {
    socket::socket(AddressFamily::Unix, SockType::Stream, flags, None)
        .context(|| "making a unix socket")
}

/// Keeps two servers that start at once from replacing the same dead socket, the second the
/// first one's new one. The lock is on the directory, so that it leaves no file behind; where
/// somebody holds it for other ends, a server must start all the same.
fn lock(dir: File) -> Option<Flock<File>> {
    let mut dir = dir;
    for _ in 0..100 {
        match Flock::lock(dir, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Some(lock),
            Err((again, Errno::EWOULDBLOCK | Errno::EINTR)) => dir = again,
            Err(_) => return None,
        }
        thread::sleep(Duration::from_millis(10));
    }
    None
}

fn remove_dead_socket(path: &Path, shown: &impl std::fmt::Display) -> Result<()> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Error::io(format!("looking at {shown}"), error)),
        Ok(file) if !file.file_type().is_socket() => {
            return Err(Error::new(
                ErrorKind::AlreadyExists,
                format!("{shown} is there and is not a socket: remove it, or choose another path"),
            ));
        }
        Ok(_) => {}
    }
    // Without waiting: the backlog of a busy server may be full.
    let probe = new_socket(SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK)?;
    match socket::connect(probe.as_raw_fd(), &unix_address(path)?) {
        Err(Errno::ECONNREFUSED) => {
            fs::remove_file(path).context(|| format!("removing the dead socket {shown}"))
        }
        Err(Errno::ENOENT) => Ok(()),
        Ok(()) | Err(Errno::EAGAIN) => Err(Error::new(
            ErrorKind::InUse,
            format!("a server listens on {shown} already: stop it or choose another path"),
        )),
        Err(errno) => Err(errno).context(|| format!("trying the socket {shown}")),
    }
}

fn unix_address(path: &Path) -> Result<UnixAddr> {
    UnixAddr::new(path).map_err(|_| {
        Error::new(
            ErrorKind::InvalidInput,
            format!(
                "{} is too long for a socket: use a path of at most 107 bytes",
                path.display()
            ),
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_is_listened_on_as_long_as_a_process_has_it_and_a_full_one_keeps_nobody_waiting() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        assert!(!is_listened(&path));
        let (listener, file) = bind_locked(&path, &path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        let wait = Duration::from_millis(20);
        let mut waiting = Vec::new();
        let error = loop {
            match connect(&path, wait) {
                Ok(stream) => waiting.push(stream),
                Err(error) => break error,
            }
            assert!(waiting.len() <= 2 * BACKLOG as usize);
        };
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        assert!(is_listened(&path));
        drop(listener);
        file.keep();
        assert!(!is_listened(&path));
        assert!(connect(&path, wait).is_err());
    }
}
