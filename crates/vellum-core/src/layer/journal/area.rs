//! The two files that hold the journal's records. format.md, section 3.2.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::record::AlignedBuf;
use crate::layer::files::remove_if_there;
use crate::layer::options::MAX_AREA;
use vellum_base::block::in_memory;
use vellum_base::error::{Error, Result, ResultExt};
use vellum_base::storage::{OpenMode, Storage, StorageFile, Unsynced};

/// The largest area that is read.
const MAX_AREA_READ: u64 = 2 * MAX_AREA;

/// The names of the two areas.
pub(in crate::layer) const AREA_FILES: [&str; 2] = ["journal.0", "journal.1"];

/// One of the two files that hold generations.
#[derive(Debug)]
pub(in crate::layer) struct Area {
    path: PathBuf,
    file: Arc<dyn StorageFile>,
    len: u64,
}

impl Area {
    /// Makes an area of `len` bytes: filled with zeros, synced, durable under its name. An older
    /// file of that name is replaced.
    pub(super) fn create(
        storage: &dyn Storage,
        dir: &Path,
        name: &'static str,
        len: u64,
    ) -> Result<Self> {
        let path = dir.join(name);
        let make = || -> std::io::Result<Arc<dyn StorageFile>> {
            let file = storage.open(&path, OpenMode::Create)?;
            // The old records go first: were they to stay, some could survive behind the zeros.
            file.set_len(0)?;
            let zeros = vec![0; 64 << 10];
            let mut at = 0;
            while at < len {
                let piece = (len - at).min(zeros.len() as u64);
                let (piece_of_zeros, _) = zeros.split_at(in_memory(piece));
                file.write_at(piece_of_zeros, at)?;
                at += piece;
            }
            let unsynced = [Unsynced::File(file.clone()), Unsynced::Names(dir.into())];
            storage.sync_together(&unsynced)?;
            Ok(file)
        };
        let file = make()
            .inspect_err(|_| {
                // What space it took others need now; that it fails changes nothing.
                let _ = storage.remove_file(&path);
            })
            .context(|| format!("cannot make the journal {} of {len} bytes", path.display()))?;
        Ok(Area { path, file, len })
    }

    /// Bytes that records can take.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// Writes a record at `offset`, durable on return.
    pub(super) fn write(&self, record: &AlignedBuf, offset: u64) -> Result<()> {
        self.assert_fits(record, offset);
        self.file
            .write_durable(record.as_slice(), offset)
            .context(|| format!("writing the journal {}", self.path.display()))
    }

    /// Writes a record at `offset`, durable after [`Area::sync`].
    pub(super) fn write_unsynced(&self, record: &AlignedBuf, offset: u64) -> Result<()> {
        self.assert_fits(record, offset);
        self.file
            .write_direct(record.as_slice(), offset)
            .context(|| format!("writing the journal {}", self.path.display()))
    }

    fn assert_fits(&self, record: &AlignedBuf, offset: u64) {
        let end = offset + record.as_slice().len() as u64;
        assert!(end <= self.len, "a record past the end of its area");
    }

    /// Makes all records durable.
    pub(super) fn sync(&self) -> Result<()> {
        self.file
            .sync_data()
            .context(|| format!("syncing the journal {}", self.path.display()))
    }
}

/// The bytes of the area called `name` for recovery; `None` where there is no such file.
pub(in crate::layer) fn load_area(
    storage: &dyn Storage,
    dir: &Path,
    name: &str,
) -> Result<Option<Vec<u8>>> {
    let path = dir.join(name);
    match storage.read_all(&path, MAX_AREA_READ) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io(format!("cannot read {}", path.display()), error)),
    }
}

/// Removes the areas; their generations are all in the checkpoint.
pub(in crate::layer) fn remove_journal(storage: &dyn Storage, dir: &Path) -> Result<()> {
    AREA_FILES
        .iter()
        .try_for_each(|name| remove_if_there(storage, &dir.join(name)))
}

/// True when an area is there.
pub(in crate::layer) fn has_journal(storage: &dyn Storage, dir: &Path) -> Result<bool> {
    for name in AREA_FILES {
        let path = dir.join(name);
        let found = storage
            .exists(&path)
            .context(|| format!("cannot look at {}", path.display()))?;
        if found {
            return Ok(true);
        }
    }
    Ok(false)
}
