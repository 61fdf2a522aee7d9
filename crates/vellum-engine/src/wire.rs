//! What commands and the servers of devices say to each other: JSON, over control sockets.

use serde::Serialize;
use serde_json::Value;

use vellum_base::error::{Error, ErrorKind, Result};

/// A message, encoded.
pub(super) fn encode<T: Serialize>(message: &T) -> Result<Value> {
    serde_json::to_value(message)
        .map_err(|error| Error::internal(format!("a message cannot be encoded: {error}")))
}

/// The answer of a server, decoded.
///
/// # Errors
/// [`ErrorKind::Protocol`] for one of another form, as another version's may be.
pub fn decode<T: serde::de::DeserializeOwned>(answer: Value) -> Result<T> {
    serde_json::from_value(answer).map_err(|error| {
        Error::with_source(
            ErrorKind::Protocol,
            "the server's answer makes no sense (is it of another version of Vellum?)",
            error,
        )
    })
}
