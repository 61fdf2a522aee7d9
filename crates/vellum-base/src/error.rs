//! One error type: a small kind to match on, what was being done, and the cause below it.

use std::error::Error as StdError;
use std::fmt;
use std::io;
use std::sync::Arc;

/// The result of everything in this crate that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Declares the kinds once, so that each has a name by which it is found again.
macro_rules! kinds {
    ($($(#[$doc:meta])* $kind:ident,)+) => {
        /// What sort of failure an [`Error`] is: what a caller may want to act on.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum ErrorKind {
            $($(#[$doc])* $kind,)+
        }

        impl ErrorKind {
            /// Every kind.
            pub const ALL: &[ErrorKind] = &[$(ErrorKind::$kind),+];

            /// The name by which programs tell each other of the kind: the control protocol of
            /// devices has it. It never changes.
            pub const fn name(self) -> &'static str {
                match self {
                    $(ErrorKind::$kind => stringify!($kind),)+
                }
            }

            /// The kind of that [`ErrorKind::name`]; `None` for one that this build does not know.
            pub fn parse(name: &str) -> Option<ErrorKind> {
                match name {
                    $(stringify!($kind) => Some(ErrorKind::$kind),)+
                    _ => None,
                }
            }
        }
    };
}

kinds! {
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
    /// Blocks of a lazy layer are not here, and could not be had.
    Absent,
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
    /// A fault of ours: something that cannot happen did. The message says so, and asks for a report.
    Internal,
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
            ErrorKind::Io
            | ErrorKind::Corrupt
            | ErrorKind::Poisoned
            | ErrorKind::Absent
            | ErrorKind::Protocol
            | ErrorKind::Command
            | ErrorKind::Internal => libc::EIO,
        }
    }
}

/// A failure: its [`ErrorKind`], a sentence that says what failed and why, and its cause. Clones
/// share the cause, so that one failure can be told to everyone who waited for the same thing.
#[derive(Clone)]
pub struct Error {
    kind: ErrorKind,
    context: String,
    source: Option<Arc<dyn StdError + Send + Sync>>,
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
            source: Some(Arc::from(source.into())),
        }
    }

    /// A fault of ours, of [`ErrorKind::Internal`]: `what` happened, which cannot. For what can be
    /// told to somebody who waits; an invariant that is broken in the middle of work is asserted.
    pub fn internal(what: impl fmt::Display) -> Self {
        let context = format!(
            "{what}: this is a fault of Vellum's own, please report it with this message and the log"
        );
        Error::new(ErrorKind::Internal, context)
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
            source: Some(Arc::new(source)),
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
        self.kind == ErrorKind::NoSpace && self.raw_os_error() != Some(libc::EFBIG)
    }

    /// The errno that the host's kernel gave, where the failure began with one.
    pub fn raw_os_error(&self) -> Option<i32> {
        let source = self.source.as_ref()?;
        source.downcast_ref::<io::Error>()?.raw_os_error()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_is_found_again_by_a_name_of_its_own() {
        let mut names = std::collections::HashSet::new();
        for kind in ErrorKind::ALL {
            assert!(names.insert(kind.name()), "{kind:?} is there twice");
            assert_eq!(ErrorKind::parse(kind.name()), Some(*kind));
            // What programs of earlier versions write.
            assert_eq!(kind.name(), format!("{kind:?}"));
        }
        assert_eq!(ErrorKind::parse("io"), None);
        assert_eq!(ErrorKind::parse(""), None);
    }

    #[test]
    fn a_clone_tells_the_same_story_down_to_its_cause() {
        let full = io::Error::from_raw_os_error(libc::ENOSPC);
        let error = Error::io("writing a block", full).context("flush");
        let clone = error.clone();
        assert_eq!(clone.kind(), ErrorKind::NoSpace);
        assert_eq!(clone.to_string(), error.to_string());
        assert!(clone.is_full_disk());
        let cause = StdError::source(&clone).unwrap();
        let cause = cause.downcast_ref::<io::Error>().unwrap();
        assert_eq!(cause.raw_os_error(), Some(libc::ENOSPC));
    }

    #[test]
    fn a_fault_of_ours_asks_for_a_report() {
        let error = Error::internal("the listener panicked");
        assert_eq!(
            (error.kind(), error.errno()),
            (ErrorKind::Internal, libc::EIO)
        );
        let text = error.to_string();
        assert!(
            text.starts_with("the listener panicked") && text.contains("report"),
            "{text}"
        );
    }
}
