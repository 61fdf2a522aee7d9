//! The hidden `vellum fetcher`: docs/lazy.md.

use super::Context;
use vellum_base::error::{Result, ResultExt};
use vellum_engine::lazy::fetcher::serve;

/// Goes into the background, for whoever started it to go on, and serves.
pub(super) fn run(context: &Context) -> Result<()> {
    let store = context.store_to_change()?;
    nix::unistd::daemon(false, true).context(|| "the fetcher cannot go into the background")?;
    serve(&store)
}
