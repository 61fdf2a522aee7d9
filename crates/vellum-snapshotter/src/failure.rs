//! Why an operation failed: for containerd it makes a difference whether the snapshot or the host is
//! to blame.

use std::fmt;

use tonic::Code;

use vellum_base::error::{Error, ErrorKind};

/// Why an operation failed.
#[derive(Debug)]
pub enum Failure {
    /// What was asked cannot be done; the kind says why, as containerd understands it.
    Request(Error),
    /// The host failed: whatever the kind, this is no answer about the snapshot.
    Host(Error),
    /// containerd, which was asked for something in turn, did not do it. Its code is passed on.
    Containerd(Code, Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Failure::Host(error)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Failure::Request(error) | Failure::Host(error) | Failure::Containerd(_, error)) = self;
        error.fmt(f)
    }
}

pub(super) type Result<T> = std::result::Result<T, Failure>;

/// What the caller is to blame for.
pub(super) fn request<T>(result: vellum_base::Result<T>) -> Result<T> {
    result.map_err(Failure::Request)
}

/// What was asked makes no sense.
pub(super) fn invalid(text: impl Into<String>) -> Failure {
    Failure::Request(Error::new(ErrorKind::InvalidInput, text))
}

/// What was asked is for another of containerd's plugins, which it asks next.
pub(super) fn not_ours(text: impl Into<String>) -> Failure {
    Failure::Request(Error::new(ErrorKind::Unsupported, text))
}

/// What containerd did not do.
pub(super) fn containerd(code: Code, text: impl Into<String>) -> Failure {
    Failure::Containerd(code, Error::new(ErrorKind::Io, text))
}
