//! Images in registries: docs/registry.md.
//!
//! * [`artifact`]: an image's block layers as blobs, and back.
//! * [`Session`]: talks to a registry for one command: what a tag names, blobs fetched and sent.
//! * [`Ranges`]: parts of blobs, for lazy layers.
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
mod failure;
mod hedge;
mod hosts;
mod ranges;
mod redirects;
mod reference;
mod retry;
mod session;
mod source;
mod tls;
mod upload;

pub use credentials::{Stored, login, logout};
pub use document::{Descriptor, Document, INDEX_TYPE, MANIFEST_TYPE, Manifest};
pub use failure::Failure;
pub use hedge::Traffic;
pub use hosts::{HostsFile, all_hosts_files};
pub use ranges::{Flow, Part, Ranges};
pub use reference::Reference;
pub use session::{Access, Found, Outcome, Push, Session, Upload};
pub use source::Seen;
