//! Errors on their way between the processes of a device and those who call it.

use serde::{Deserialize, Serialize};

use vellum_base::error::{Error, ErrorKind};

/// An [`Error`] that travels between processes: kind and the whole text.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Failure {
    /// The [`ErrorKind::name`].
    pub kind: String,
    /// The whole story on one line.
    pub error: String,
}

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
            kind: error.kind().name().to_owned(),
            error: text,
        }
    }
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        // A newer program may have kinds that this one does not know.
        let kind = ErrorKind::parse(&failure.kind).unwrap_or(ErrorKind::Io);
        Error::new(kind, failure.error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_error_survives_the_way_between_processes() {
        for &kind in ErrorKind::ALL {
            let failure = Failure::from(&Error::new(kind, "what\nhappened"));
            let error = Error::from(failure);
            assert_eq!(error.kind(), kind);
            assert_eq!(error.to_string(), "what happened");
        }
    }
}
