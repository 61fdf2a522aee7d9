//! Images in registries, object stores and archives: docs/registry.md, docs/object-stores.md.
//!
//! * [`artifact`]: an image's block layers as blobs, and back.
//! * [`Location`]: where an image is: in a registry, or in an OCI layout in a directory or a bucket.
//! * [`Place`]: what it names there, for one command; blobs fetched and sent. [`BlobReader`]: parts of blobs, for lazy
//!   layers. Who uses these does not care which of the two it is.
//! * [`Session`], [`Ranges`]: the same of a registry.
//! * [`Recipients`], [`Identities`]: to whom an artifact is encrypted, and who reads it.
//! * [`login`], [`logout`]: credentials where docker keeps them.
//!
//! Nothing here knows of a store: blobs are files in a directory that the caller names.
//!
//! HTTP is spoken by `reqwest` itself rather than by way of `oci-client` (0.18), which asks for tokens of one
//! repository alone, so that it cannot mount blobs of another; does not know identity tokens; shows neither
//! `Retry-After` nor the status by which a retry is decided; and neither resumes an upload nor goes on with a download.
//! What would be left of it are the paths of five requests.

pub mod artifact;

mod auth;
mod blobs;
mod client;
mod credentials;
mod document;
mod encryption;
mod failure;
mod find;
mod hedge;
mod hosts;
mod layout;
mod location;
mod place;
mod ranges;
mod redirects;
mod reference;
mod retry;
mod session;
mod source;
mod tls;
mod upload;

pub use credentials::{Credential, Keychain, Stored, is_of_registry, login, logout};
pub use document::{
    CONTAINERD_NAME, Descriptor, Document, INDEX_TYPE, MANIFEST_TYPE, Manifest, NAME_ANNOTATION,
    REF_NAME,
};
pub use encryption::{Identities, Recipients};
pub use failure::Failure;
pub use find::Found;
pub use hedge::Traffic;
pub use hosts::{HostsFile, all_hosts_files};
pub use location::{LayoutReference, Location};
pub use place::{BlobReader, Named, Place};
pub use ranges::{Flow, Part, Ranges};
pub use reference::Reference;
pub use session::{Access, Outcome, Push, Session, Upload};
pub use source::Seen;
