//! Room on the store's disk: some is kept so that commands work while it is full, and what crashes
//! left reserved is given back.

use std::path::PathBuf;

use super::Store;
use vellum_base::error::{Result, ResultExt};
use vellum_base::storage::OpenMode;
use vellum_core::layer::{Header, LayerOptions, RESERVE_FILE, WritableLayer};

/// Kept in a file of this name under the root: running state, and what a layer reserves for itself.
const ROOM_FILE: &str = "reserve";
const ROOM: u64 = 4 << 20;
/// With less left on the disk nothing new is kept: it is there, or it is wanted elsewhere.
const PLENTY: u64 = 64 << 20;
/// With less left the disk counts as full: file systems keep some megabytes back.
const SCARCE: u64 = 16 << 20;

impl Store {
    fn room_file(&self) -> PathBuf {
        self.root.join(ROOM_FILE)
    }

    /// Keeps room for [`Store::with_room`], where the disk has plenty.
    pub fn keep_room(&self) {
        let keep = || -> std::io::Result<()> {
            let path = self.room_file();
            let space = self.storage.disk_space(&self.root)?;
            if space.is_none_or(|space| space.free < PLENTY) {
                return Ok(());
            }
            let file = self.storage.open(&path, OpenMode::Create)?;
            if file.allocated()? < ROOM {
                file.allocate(0, ROOM)?;
            }
            Ok(())
        };
        // The command that comes by does not need it.
        if let Err(error) = keep() {
            tracing::debug!(%error, "no room is kept in the store");
        }
    }

    /// Does work that must succeed on a full disk too, with the room that the store keeps where it
    /// fails without. The work must bear being cut off and repeated.
    ///
    /// # Errors
    /// Those of the work.
    pub fn with_room<T>(&self, mut work: impl FnMut() -> Result<T>) -> Result<T> {
        // What is made then would find no room later, where nobody can retry: in the kernel.
        let space = self.storage.disk_space(&self.root).ok().flatten();
        if space.is_some_and(|space| space.free < SCARCE) {
            self.use_room();
        }
        let first = work();
        if first.as_ref().is_err_and(vellum_base::Error::is_full_disk) && self.use_room() {
            return work();
        }
        first
    }

    /// False where none is kept.
    fn use_room(&self) -> bool {
        let file = self.storage.open(&self.room_file(), OpenMode::Write);
        let given = file.and_then(|file| Ok(file.allocated()? > 0 && file.set_len(0).is_ok()));
        let given = given.unwrap_or(false);
        if given {
            tracing::warn!("the store's disk is full: uses the room that it keeps for such a case");
        }
        given
    }

    /// Gives back what writable layers have reserved that nobody has open: a crash left it. They are
    /// recovered for that. Returns the bytes.
    pub(super) fn give_back_reserves(&self) -> Result<u64> {
        let mut given = 0;
        for layer in self.layers()? {
            let dir = self.layer_dir(layer);
            let path = dir.join(RESERVE_FILE);
            let exists = self.storage.exists(&path);
            if !exists.context(|| format!("cannot look for {}", path.display()))? {
                continue;
            }
            let Ok(Some(_lease)) = self.try_lease(&dir) else {
                continue;
            };
            // Only a count, of what may be gone a moment later.
            let held = || {
                let file = self.storage.open(&path, OpenMode::Read);
                file.and_then(|file| file.allocated()).unwrap_or(0)
            };
            let before = held();
            // What cannot be opened `check` explains.
            let closed = match Header::read(&*self.storage, &dir) {
                Ok(header) if header.sealed => self
                    .storage
                    .remove_file(&path)
                    .context(|| format!("cannot remove {}", path.display())),
                _ => WritableLayer::open(self.storage.clone(), &dir, LayerOptions::default())
                    .and_then(|layer| layer.close()),
            };
            if let Err(error) = closed {
                tracing::debug!(%layer, %error, "its reserve stays");
            }
            given += before.saturating_sub(held());
        }
        Ok(given)
    }
}
