//! Images into registries, object stores and archives and out of them: docs/registry.md, docs/object-stores.md.
//! [`vellum_registry`] has the formats and talks to all of these; here they meet the store.

mod artifact;
mod description;
mod hot;
mod layout;
mod load;
mod metadata;
mod pull;
mod push;
mod pushed;
mod receive;
mod remote_image;
mod salt;
mod save;
mod sealed;

pub(crate) use layout::digest_of;
pub use load::{LoadReport, load};
pub use pull::{Came, PullOptions, PullReport, pull};
pub use push::{PushFormat, PushOptions, PushReport, TraceSource, push};
pub use remote_image::RemoteImage;
pub use salt::{Encryption, SaltSource};
pub use save::{SaveOptions, SaveReport, SavedImage, save};
