//! The seal of a layer is made: checksums of all blocks, and the digest. format.md, section 4.

use std::path::Path;

use super::digest::walk;
use super::{SEAL_FILE, SealedLayer, SealedMap};
use crate::layer::data::DataFiles;
use crate::layer::files::{remove_if_there, sync_names};
use crate::layer::header::Header;
use crate::layer::index::Index;
use crate::layer::journal::remove_journal;
use crate::layer::lazy::{self, HAVE_FILE, SUMS_FILE};
use crate::layer::map_file::MAP_FILE;
use crate::layer::recovery::extents_of;
use crate::layer::space::RESERVE_FILE;
use crate::layer::table::{DIGEST_LEN, MapExtent, TableContent, TableKind};
use vellum_base::block::{BLOCK_LEN, Blocks};
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_base::storage::Storage;

/// Gives a sealed layer its checksums and digest, and removes what they replace. Safe to repeat
/// after a crash, and to do while the layer is being read. `progress` is called with the number of
/// blocks just read. Returns the digest.
///
/// # Errors
/// As [`SealedLayer::open`]; the layer stays readable as it was.
pub fn seal_in_place(
    storage: &dyn Storage,
    dir: &Path,
    progress: impl FnMut(Blocks),
) -> Result<[u8; DIGEST_LEN]> {
    let layer = SealedLayer::open(storage, dir)?;
    let digest = match &layer.map {
        SealedMap::Table(table) => {
            // Whoever made the seal may have died before its name was durable.
            sync_names(storage, dir)?;
            if layer.header.lazy {
                lazy::finish(storage, dir, &layer.header)?;
            }
            table.digest
        }
        SealedMap::Pending(_) if layer.is_lazy() => {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!(
                    "{}: the layer is lazy: `vellum complete` its image",
                    dir.display()
                ),
            ));
        }
        SealedMap::Pending(index) => {
            let read = read_whole(&layer.header, &layer.data, index, progress)?;
            read.write_seal(storage, dir, &layer.header)?;
            read.digest
        }
        // `open` makes none.
        SealedMap::Written(_) | SealedMap::Unsealed(_) => {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                "the layer is not sealed",
            ));
        }
    };
    remove_what_a_seal_replaces(storage, dir)?;
    Ok(digest)
}

/// Removes the files that a layer with a seal has no use for.
///
/// # Errors
/// Where the host refuses.
pub(in crate::layer) fn remove_what_a_seal_replaces(
    storage: &dyn Storage,
    dir: &Path,
) -> Result<()> {
    for name in [MAP_FILE, RESERVE_FILE, HAVE_FILE, SUMS_FILE] {
        remove_if_there(storage, &dir.join(name))?;
    }
    remove_journal(storage, dir)
}

/// All of a layer, read.
struct ReadWhole {
    extents: Vec<MapExtent>,
    /// Of each data block, in order.
    sums: Vec<u32>,
    digest: [u8; DIGEST_LEN],
}

fn read_whole(
    header: &Header,
    data: &DataFiles,
    map: &Index,
    mut progress: impl FnMut(Blocks),
) -> Result<ReadWhole> {
    let extents = extents_of(map);
    let mut sums = Vec::new();
    let digest = walk(header, data, &extents, |span, bytes| {
        sums.extend(bytes.chunks_exact(BLOCK_LEN).map(crc32fast::hash));
        progress(span.len());
        Ok(())
    })?;
    Ok(ReadWhole {
        extents,
        sums,
        digest,
    })
}

impl ReadWhole {
    /// Writes the seal, durably.
    fn write_seal(&self, storage: &dyn Storage, dir: &Path, header: &Header) -> Result<()> {
        let content = TableContent {
            kind: TableKind::Seal,
            uuid: header.uuid,
            generation: 0,
            virtual_size: header.virtual_size,
            extents: &self.extents,
            sums: &self.sums,
            digest: self.digest,
        };
        let path = dir.join(SEAL_FILE);
        storage
            .write_atomic(&path, &content.encode())
            .context(|| format!("cannot write {}", path.display()))
    }
}

/// Reads all of a layer whose blocks are all in its data files, and writes its seal if it has the digest that it
/// should; false where it has another one.
///
/// # Errors
/// Where the host refuses.
pub(in crate::layer) fn seal_as_expected(
    storage: &dyn Storage,
    dir: &Path,
    header: &Header,
    data: &DataFiles,
    map: &Index,
    digest: &[u8; DIGEST_LEN],
    progress: impl FnMut(Blocks),
) -> Result<bool> {
    let read = read_whole(header, data, map, progress)?;
    let right = read.digest == *digest;
    if right {
        read.write_seal(storage, dir, header)?;
    }
    Ok(right)
}
