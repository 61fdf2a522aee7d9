//! Images into registries and out of them: docs/registry.md. [`vellum_registry`] has the formats and talks to
//! registries; here they meet the store.

mod artifact;
mod description;
mod hot;
mod layout;
mod pull;
mod push;
mod pushed;
mod receive;
mod remote_image;

pub(crate) use layout::digest_of;
pub use pull::{Came, PullOptions, PullReport, pull};
pub use push::{PushFormat, PushOptions, PushReport, TraceSource, push};
pub use remote_image::RemoteImage;
