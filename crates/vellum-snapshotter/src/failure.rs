//! Why an operation failed: for containerd it makes a difference whether the snapshot or the host is
//! to blame.

use vellum_base::error::{Error, ErrorKind};

/// Why an operation failed.
#[derive(Debug)]
pub enum Failure {
    /// What was asked cannot be done; the kind says why, as containerd understands it.
    Request(Error),
    /// The host failed: whatever the kind, this is no answer about the snapshot.
    Host(Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Failure::Host(error)
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
