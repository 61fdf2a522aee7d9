//! What the L2 tables of a qcow2 refer to, looked at before anybody reads data by them. Source: QEMU's
//! docs/interop/qcow2.rst.

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::{corrupt, cut_off};
use vellum_base::error::ResultExt;
use vellum_base::interrupt;
use vellum_base::{Error, ErrorKind, Result};

/// The bits of an entry, of an L1 table too, that say where its cluster lies.
pub(super) const OFFSET: u64 = 0x00FF_FFFF_FFFF_FE00;
/// The cluster is compressed.
const COMPRESSED: u64 = 1 << 62;
/// The cluster reads as zeros, though it has a place.
const ZERO: u64 = 1;
/// The most compressed clusters, since all are kept in memory for a while: 512 MiB. In clusters of the usual
/// size those are 4 TiB.
const MAX_COMPRESSED: usize = 1 << 26;

/// Looks whether the data that `tables` (offsets in bytes, each within the file) refer to begin within the
/// file, which has `len` bytes, and whether there is a place for each: a small file that names the same data
/// many times made a disk of any size. The last bytes of a cluster may be missing in a file, where they are
/// zeros.
///
/// # Errors
/// `Corrupt`; `Unsupported` for more compressed clusters than can be looked at.
pub(super) fn check(
    file: &File,
    len: u64,
    tables: &[u64],
    cluster_bits: u32,
    entry_len: usize,
) -> Result<()> {
    let cluster = 1u64 << cluster_bits;
    // Above it stands how many sectors the compressed data have.
    let compressed_offset = (1u64 << (70 - cluster_bits)) - 1;
    let mut compressed = Vec::new();
    let mut plain = 0u64;
    let mut table = vec![0; cluster as usize];
    for offset in tables {
        interrupt::check()?;
        file.read_exact_at(&mut table, *offset)
            .context(|| "reading its tables")?;
        let entries = table.chunks_exact(entry_len);
        for entry in entries.filter_map(|entry| entry.first_chunk()) {
            let entry = u64::from_be_bytes(*entry);
            let (at, reads_zero) = match entry & COMPRESSED {
                0 => (entry & OFFSET, entry & ZERO != 0),
                _ => (entry & compressed_offset, false),
            };
            if at >= len && !reads_zero {
                return Err(cut_off());
            }
            if entry & COMPRESSED != 0 {
                if compressed.len() == MAX_COMPRESSED {
                    return Err(too_many());
                }
                compressed.push(at);
            } else if at != 0 {
                plain += cluster;
            }
        }
    }
    compressed.sort_unstable();
    let twice = compressed
        .windows(2)
        .any(|pair| pair.first() == pair.last());
    // The sum of what lies in the tables of a file cannot overflow: they have fewer bytes than it.
    match twice || plain > len.saturating_add(cluster) {
        true => Err(corrupt(
            "its tables refer to the same data many times: it is damaged, or made to fill disks",
        )),
        false => Ok(()),
    }
}

fn too_many() -> Error {
    Error::new(
        ErrorKind::Unsupported,
        format!(
            "it has more than {MAX_COMPRESSED} compressed clusters: copy it into a file that is not compressed \
             (qemu-img convert -O qcow2)"
        ),
    )
}
