//! What the description of a container for the OCI runtime cannot say.

use oci_spec::OciSpecError;

use vellum_base::error::{Error, ErrorKind};

/// A value that has no place in the description.
pub(super) fn failure(error: OciSpecError) -> Error {
    Error::with_source(
        ErrorKind::InvalidInput,
        "cannot describe the container to the OCI runtime",
        error,
    )
}
