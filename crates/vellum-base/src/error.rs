//! One error type: a small kind to match on, what was being done, and the cause below it.

use std::error::Error as StdError;
use std::fmt;
use std::io;

/// The result of everything in this crate that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What sort of failure an [`Error`] is: what a caller may want to act on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// An argument that can never work: a bad name, an unaligned size, a contradictory option.
    InvalidInput,
    /// An offset or length beyond the end of the device.
    OutOfRange,
    /// The host has no space (or no quota) left; nothing that was flushed is harmed.
    NoSpace,
    /// A write to something read-only.
    ReadOnly,
    /// The host's storage failed.
    Io,
    /// Bytes on disk contradict their checksum or each other.
    Corrupt,
    /// A file that is not ours, or of a version or with features that this build does not know.
    Unsupported,
    /// A sync failed earlier on this layer, so nothing it says about durability can be trusted.
    Poisoned,
    /// No such image, container, layer, volume or file.
    NotFound,
    /// The name or file is there already.
    AlreadyExists,
    /// Something else uses it: the message says what.
    InUse,
    /// The caller lacks a privilege.
    Permission,
    /// A program, kernel feature or device that is needed is missing on this host.
    Missing,
    /// The other side of a connection broke the protocol.
    Protocol,
    /// It took longer than it may.
    Timeout,
    /// An external program failed.
    Command,
    /// A signal asked this process to end, and what was half done was undone.
    Interrupted,
}

impl ErrorKind {
    /// The errno that a block client sees for this kind.
    pub fn errno(self) -> i32 {
        match self {
            ErrorKind::InvalidInput | ErrorKind::OutOfRange => libc::EINVAL,
            ErrorKind::NoSpace => libc::ENOSPC,
            ErrorKind::ReadOnly => libc::EROFS,
            ErrorKind::NotFound => libc::ENOENT,
            ErrorKind::AlreadyExists => libc::EEXIST,
            ErrorKind::InUse => libc::EBUSY,
            ErrorKind::Permission => libc::EPERM,
            ErrorKind::Timeout => libc::ETIMEDOUT,
            ErrorKind::Unsupported | ErrorKind::Missing => libc::EOPNOTSUPP,
            ErrorKind::Interrupted => libc::EINTR,
            _ => libc::EIO,
        }
    }
}

/// A failure: its [`ErrorKind`], a sentence that says what failed and why, and its cause.
pub struct Error {
    kind: ErrorKind,
    context: String,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

impl Error {
    /// An error of `kind`; `context` says what, why and, where it helps, what to do.
    pub fn new(kind: ErrorKind, context: impl Into<String>) -> Self {
        Error {
            kind,
            context: context.into(),
            source: None,
        }
    }

    /// An error of `kind` caused by `source`.
    pub fn with_source(
        kind: ErrorKind,
        context: impl Into<String>,
        source: impl Into<Box<dyn StdError + Send + Sync>>,
    ) -> Self {
        Error {
            kind,
            context: context.into(),
            source: Some(source.into()),
        }
    }

    /// An [`io::Error`] with what was being done; the kind comes from its errno.
    pub fn io(context: impl Into<String>, source: io::Error) -> Self {
        let kind = match source.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG) => ErrorKind::NoSpace,
            Some(libc::EPERM | libc::EACCES) => ErrorKind::Permission,
            Some(libc::EROFS) => ErrorKind::ReadOnly,
            Some(libc::ENOENT) => ErrorKind::NotFound,
            Some(libc::EEXIST) => ErrorKind::AlreadyExists,
            Some(libc::EBUSY) => ErrorKind::InUse,
            Some(libc::EOPNOTSUPP) => ErrorKind::Unsupported,
            _ => match source.kind() {
                io::ErrorKind::NotFound => ErrorKind::NotFound,
                io::ErrorKind::AlreadyExists => ErrorKind::AlreadyExists,
                io::ErrorKind::PermissionDenied => ErrorKind::Permission,
                io::ErrorKind::StorageFull => ErrorKind::NoSpace,
                io::ErrorKind::UnexpectedEof | io::ErrorKind::InvalidData => ErrorKind::Corrupt,
                io::ErrorKind::TimedOut => ErrorKind::Timeout,
                io::ErrorKind::Unsupported => ErrorKind::Unsupported,
                io::ErrorKind::Interrupted => ErrorKind::Interrupted,
                _ => ErrorKind::Io,
            },
        };
        let mut context = context.into();
        if source.raw_os_error() == Some(libc::EFBIG) {
            context = format!("{context} ({})", size_limit());
        }
        Error {
            kind,
            context,
            source: Some(Box::new(source)),
        }
    }

    /// The same failure seen from further up: `context` goes in front, the kind stays.
    pub fn context(mut self, context: impl fmt::Display) -> Self {
        self.context = format!("{context}: {}", self.context);
        self
    }

    /// What sort of failure it is.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The errno that a block client sees for it.
    pub fn errno(&self) -> i32 {
        self.kind.errno()
    }

    /// True where others' giving space back helps: the host has none, and it is not a limit of the
    /// file's size.
    pub fn is_full_disk(&self) -> bool {
        let errno = self
            .source
            .as_ref()
            .and_then(|source| source.downcast_ref::<io::Error>())
            .and_then(io::Error::raw_os_error);
        self.kind == ErrorKind::NoSpace && errno != Some(libc::EFBIG)
    }
}

/// Why a file may not be as large as it should be, and what to do.
fn size_limit() -> String {
    use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};
    match getrlimit(Resource::RLIMIT_FSIZE) {
        Ok((soft, _)) if soft != RLIM_INFINITY => {
            format!("this process may write files of at most {soft} bytes: raise `ulimit -f`")
        }
        _ => "its file system has no files that large: take a smaller --size, or put the store on \
              another file system (XFS has the largest files)"
            .into(),
    }
}

impl fmt::Display for Error {
    /// The whole story on one line: context, then every cause.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.context)?;
        if let Some(source) = &self.source {
            write!(f, ": {source}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {self}", self.kind)
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}

/// Adds what was being done to a bare [`io::Error`] or to one of ours.
pub trait ResultExt<T> {
    /// Puts `context()` in front of the failure.
    fn context<C: Into<String>>(self, context: impl FnOnce() -> C) -> Result<T>;
}

impl<T> ResultExt<T> for io::Result<T> {
    fn context<C: Into<String>>(self, context: impl FnOnce() -> C) -> Result<T> {
        self.map_err(|source| Error::io(context(), source))
    }
}

impl<T> ResultExt<T> for Result<T> {
    fn context<C: Into<String>>(self, context: impl FnOnce() -> C) -> Result<T> {
        self.map_err(|error| error.context(context().into()))
    }
}

impl<T> ResultExt<T> for nix::Result<T> {
    fn context<C: Into<String>>(self, context: impl FnOnce() -> C) -> Result<T> {
        self.map_err(|errno| Error::io(context(), io::Error::from(errno)))
    }
}
