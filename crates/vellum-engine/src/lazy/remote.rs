//! Where the blocks of a lazy layer are: the files `remote` and `table`, and of an encrypted one `key`. docs/lazy.md,
//! docs/encryption.md.

use std::num::NonZeroU64;
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::hot::HOT_FILE;
use super::read_noted;
use crate::registry::digest_of;
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_base::storage::Storage;
use vellum_core::layer::LazyLayer;
use vellum_registry::artifact::{LayerKey, MAX_TABLE, Table};
use vellum_registry::{Access, Location};
use vellum_store::Store;
use zeroize::Zeroizing;

const REMOTE_FILE: &str = "remote";
const TABLE_FILE: &str = "table";
const KEY_FILE: &str = "key";
/// The longest file `key`.
const MAX_KEY: u64 = 1 << 10;
/// The longest file `remote`.
const MAX_REMOTE: u64 = 64 << 10;

/// The files of a lazy layer's directory that say where its blocks are.
pub const REMOTE_FILES: [&str; 4] = [REMOTE_FILE, TABLE_FILE, KEY_FILE, HOT_FILE];

/// Where a layer's blocks are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Remote {
    /// The registry and repository, or the layout, with the tag or digest that was pulled, as [`Location::parse`] takes
    /// them.
    pub reference: String,
    /// The registry is spoken to without TLS.
    #[serde(default)]
    pub plain_http: bool,
    /// The digest of the table's blob.
    pub table: String,
    /// The digest of the data's blob; none where the layer has no data.
    pub data: Option<String>,
    /// The layer is to be completed although nobody waits for it.
    #[serde(default)]
    pub background: Option<Background>,
    /// Somebody wanted all of the layer: nothing of it is evicted.
    #[serde(default)]
    pub keep: bool,
}

/// How a layer is completed in the background.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Background {
    /// Bytes of a second that are fetched, at most; none is as fast as it comes.
    pub rate: Option<NonZeroU64>,
}

impl Remote {
    /// Writes the files of a new layer, with the table's key if it is encrypted. They are durable with its names.
    ///
    /// # Errors
    /// Where the host refuses.
    pub fn write(
        &self,
        storage: &dyn Storage,
        dir: &Path,
        (table, key): (&[u8], Option<&LayerKey>),
    ) -> Result<()> {
        write_key(storage, dir, key)?;
        write(storage, &dir.join(TABLE_FILE), table)?;
        self.write_again(storage, dir)
    }

    /// Writes the file `remote` alone.
    pub(super) fn write_again(&self, storage: &dyn Storage, dir: &Path) -> Result<()> {
        let remote = serde_json::to_vec_pretty(self).map_err(|error| {
            Error::with_source(ErrorKind::Internal, "where blocks are, as JSON", error)
        })?;
        write(storage, &dir.join(REMOTE_FILE), &remote)
    }

    /// Whether all of the layer is to be here.
    pub fn is_kept(&self) -> bool {
        self.keep || self.background.is_some()
    }

    /// Notes where the blocks of a sealed layer are that was pushed: the newest place counts. It is durable on return; what
    /// a crash leaves is the note from before, or none. The caller holds the store's lock: another push may note another
    /// table.
    ///
    /// # Errors
    /// Where the host refuses.
    pub fn note_push(
        &self,
        storage: &dyn Storage,
        dir: &Path,
        (table, key): (&[u8], Option<&LayerKey>),
    ) -> Result<()> {
        let path = dir.join(REMOTE_FILE);
        let noted = Remote::read(storage, dir)?;
        if noted.is_some_and(|noted| noted.table == self.table) {
            write_key(storage, dir, key)?;
            return self.write_again(storage, dir);
        }
        if Remote::is_known(dir) {
            // Never one that goes with another's table.
            let removed = storage.remove_file(&path);
            removed.context(|| format!("cannot remove {}", path.display()))?;
            let synced = storage.sync_dir(dir);
            synced.context(|| format!("cannot sync {}", dir.display()))?;
        }
        self.write(storage, dir, (table, key))
    }

    /// Whether the layer in `dir` is encrypted where its blocks are.
    pub fn is_encrypted(dir: &Path) -> bool {
        dir.join(KEY_FILE).exists()
    }

    /// Whether it is known where the blocks of the layer in `dir` are.
    pub fn is_known(dir: &Path) -> bool {
        dir.join(REMOTE_FILE).exists()
    }

    /// How the layer in `dir` is to be completed although nobody waits for it; `None` for one that is not, or is whole
    /// whatever its header says. What cannot be read is others' to tell.
    pub(super) fn background(storage: &dyn Storage, dir: &Path) -> Option<Background> {
        let remote = Remote::read(storage, dir).ok().flatten()?;
        let how = remote.background?;
        matches!(LazyLayer::open(storage, dir), Ok(Some(_))).then_some(how)
    }

    /// Where the blocks of the layer in `dir` are; `None` where it came from nowhere.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`]; the message names the file.
    pub fn read(storage: &dyn Storage, dir: &Path) -> Result<Option<Self>> {
        read_noted(storage, &dir.join(REMOTE_FILE), MAX_REMOTE)
    }

    /// The layer's table, which is what its digest says.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] and [`ErrorKind::Unsupported`]; the message names the file.
    pub fn read_table(&self, storage: &dyn Storage, dir: &Path) -> Result<Table> {
        let path = dir.join(TABLE_FILE);
        let named = || path.display().to_string();
        let bytes = storage.read_all(&path, MAX_TABLE).context(named)?;
        let found = digest_of(Sha256::digest(&bytes).into());
        if found != self.table {
            let text = format!("{}: it has the digest {found}, not {}", named(), self.table);
            return Err(Error::new(ErrorKind::Corrupt, text));
        }
        let table = match Table::is_encrypted(&bytes) {
            true => Table::decode_encrypted(&bytes, &read_key(storage, dir)?),
            false => Table::decode(&bytes),
        };
        table.map_err(|error| error.context(named()))
    }

    /// Where the blocks of the layer in `dir` are, with its table; `None` where it came from nowhere. A push that notes
    /// another place meanwhile is waited for.
    ///
    /// # Errors
    /// As [`Remote::read`] and [`Remote::read_table`].
    pub(super) fn read_with_table(store: &Store, dir: &Path) -> Result<Option<(Self, Table)>> {
        let storage = &**store.storage();
        let read = || -> Result<Option<(Self, Table)>> {
            let Some(remote) = Remote::read(storage, dir)? else {
                return Ok(None);
            };
            let table = remote.read_table(storage, dir)?;
            Ok(Some((remote, table)))
        };
        match read() {
            // The two were of different pushes.
            Err(error) if error.kind() == ErrorKind::Corrupt => {
                let _guard = store.lock()?;
                read()
            }
            other => other,
        }
    }

    /// Puts the key of a table beside the layer in `dir`, where that is of the table and has lost it, or has another.
    ///
    /// # Errors
    /// Where it cannot be written.
    pub fn bring_key(storage: &dyn Storage, dir: &Path, table: &str, key: &LayerKey) -> Result<()> {
        let remote = Remote::read(storage, dir);
        let is_of_it = matches!(remote, Ok(Some(remote)) if remote.table == table);
        let has_it = || read_key(storage, dir).is_ok_and(|there| *there.digits() == *key.digits());
        match is_of_it && !has_it() {
            true => write_key(storage, dir, Some(key)),
            false => Ok(()),
        }
    }

    /// Which place to ask, and how.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for what is no reference.
    pub fn place(&self) -> Result<(Location, Access)> {
        let access = Access {
            plain_http: self.plain_http,
        };
        Ok((Location::parse(&self.reference)?, access))
    }
}

/// The key of an encrypted layer's table.
fn read_key(storage: &dyn Storage, dir: &Path) -> Result<LayerKey> {
    let path = dir.join(KEY_FILE);
    let lost = |why: &str| {
        let text = format!(
            "{}: the key of the encrypted layer {why}: pull the image once more, under another name if need be (`vellum pull REF \
             NAME`)",
            path.display()
        );
        Error::new(ErrorKind::Corrupt, text)
    };
    let bytes = storage.read_all(&path, MAX_KEY).map(Zeroizing::new);
    let bytes = bytes.map_err(|error| lost(&format!("cannot be read ({error})")))?;
    let key = str::from_utf8(&bytes).ok().map(LayerKey::parse);
    key.and_then(Result::ok).ok_or_else(|| lost("is damaged"))
}

/// Writes the key of a table that is to be written next, or removes that of another.
fn write_key(storage: &dyn Storage, dir: &Path, key: Option<&LayerKey>) -> Result<()> {
    let path = dir.join(KEY_FILE);
    match key {
        // The storage makes all files for the owner alone.
        Some(key) => write(storage, &path, key.digits().as_bytes()),
        None if path.exists() => {
            let removed = storage.remove_file(&path);
            removed.context(|| format!("cannot remove {}", path.display()))
        }
        None => Ok(()),
    }
}

fn write(storage: &dyn Storage, path: &Path, bytes: &[u8]) -> Result<()> {
    storage
        .write_atomic(path, bytes)
        .context(|| format!("cannot write {}", path.display()))
}
