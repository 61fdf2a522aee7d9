//! Names within a layer's directory.

use std::path::Path;

use vellum_base::error::{Result, ResultExt};
use vellum_base::storage::Storage;

/// Removes a file; one that is gone is fine.
pub(super) fn remove_if_there(storage: &dyn Storage, path: &Path) -> Result<()> {
    match storage.remove_file(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        other => other.context(|| format!("cannot remove {}", path.display())),
    }
}

/// Makes the names in a layer durable that another process may have left in memory only: wanted
/// before anything else is made to depend on them.
pub(super) fn sync_names(storage: &dyn Storage, dir: &Path) -> Result<()> {
    storage
        .sync_dir(dir)
        .context(|| format!("cannot sync {}", dir.display()))
}
