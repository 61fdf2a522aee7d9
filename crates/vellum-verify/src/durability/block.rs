//! Blocks that say what they are, sector by sector, so that a torn, stale or misplaced one is found
//! out.
//!
//! Each sector of 512 bytes, all integers little-endian: magic `VELLUMDV` (8), run (16), block (8),
//! sequence number (8), number of the sector within the block (4), reserved (4), 460 bytes that
//! follow from the fields before, CRC-32 of all before (4).

use uuid::Uuid;

use vellum_base::storage::SeededRng;

/// What a disk writes whole or not at all, in bytes.
pub(super) const SECTOR: usize = 512;
/// The largest block, in bytes.
const MAX_BLOCK: u64 = 1 << 20;

const MAGIC: &[u8; 8] = b"VELLUMDV";
const CRC_AT: usize = SECTOR - 4;

/// What one version of a block is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stamp {
    /// The call of [`super::write()`] that wrote it.
    pub(super) run: Uuid,
    /// Number of the block within the target.
    pub(super) block: u64,
    /// Grows with every write of the thread that owns the block.
    pub(super) sequence: u64,
}

/// What a sector turned out to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sector {
    /// Written by this run to this place.
    Version(u64),
    /// A whole sector of this tool, but of another run or another place.
    Foreign(Stamp),
    /// It has the magic, and its bytes contradict its checksum.
    Damaged,
    /// Nothing that this tool wrote.
    Other {
        /// All bytes are zero.
        zero: bool,
    },
}

/// True for a block size that works.
pub(super) fn is_block_size(block: u64) -> bool {
    block.is_power_of_two() && (SECTOR as u64..=MAX_BLOCK).contains(&block)
}

/// Appends the bytes of a block of `len` bytes, a multiple of [`SECTOR`].
pub(super) fn encode(out: &mut Vec<u8>, stamp: Stamp, len: usize) {
    for index in 0..len / SECTOR {
        let start = out.len();
        out.extend_from_slice(MAGIC);
        out.extend_from_slice(stamp.run.as_bytes());
        out.extend_from_slice(&stamp.block.to_le_bytes());
        out.extend_from_slice(&stamp.sequence.to_le_bytes());
        out.extend_from_slice(&(index as u32).to_le_bytes());
        out.extend_from_slice(&[0; 4]);
        // Different in every sector, so that nothing below can store it as something shorter.
        let mut rng = SeededRng::new(stamp.block << 32 ^ stamp.sequence << 8 ^ index as u64);
        while out.len() < start + CRC_AT {
            let room = start + CRC_AT - out.len();
            out.extend(rng.bits().to_le_bytes().into_iter().take(room));
        }
        let crc = crc32fast::hash(out.split_at(start).1);
        out.extend_from_slice(&crc.to_le_bytes());
    }
}

/// Says what sector `index` of `block` holds, where the run `run` is looked for.
pub(super) fn decode(sector: &[u8], run: Uuid, block: u64, index: usize) -> Sector {
    if sector.get(..8) != Some(MAGIC) {
        let zero = sector.iter().all(|&byte| byte == 0);
        return Sector::Other { zero };
    }
    let fields = || {
        let number = |at: usize| -> Option<u64> {
            Some(u64::from_le_bytes(*sector.get(at..)?.first_chunk()?))
        };
        let crc = u32::from_le_bytes(*sector.get(CRC_AT..)?.first_chunk()?);
        if crc32fast::hash(sector.get(..CRC_AT)?) != crc {
            return None;
        }
        let stamp = Stamp {
            run: Uuid::from_bytes(*sector.get(8..)?.first_chunk()?),
            block: number(24)?,
            sequence: number(32)?,
        };
        Some((stamp, number(40)? as u32))
    };
    match fields() {
        None => Sector::Damaged,
        Some((stamp, at)) if stamp.run == run && stamp.block == block && at as usize == index => {
            Sector::Version(stamp.sequence)
        }
        Some((stamp, _)) => Sector::Foreign(stamp),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STAMP: Stamp = Stamp {
        run: Uuid::from_u128(7),
        block: 12,
        sequence: 345,
    };

    #[test]
    fn a_sector_says_what_it_is_and_any_changed_byte_shows() {
        let mut bytes = Vec::new();
        encode(&mut bytes, STAMP, 4096);
        assert_eq!(bytes.len(), 4096);
        for (index, sector) in bytes.chunks(SECTOR).enumerate() {
            assert_eq!(decode(sector, STAMP.run, 12, index), Sector::Version(345));
            assert_eq!(decode(sector, STAMP.run, 13, index), Sector::Foreign(STAMP));
            assert_eq!(
                decode(sector, STAMP.run, 12, index + 1),
                Sector::Foreign(STAMP)
            );
            for at in 8..SECTOR {
                let mut changed = sector.to_vec();
                changed[at] ^= 0x10;
                assert_eq!(decode(&changed, STAMP.run, 12, index), Sector::Damaged);
            }
        }
        let zeros = [0; SECTOR];
        assert_eq!(
            decode(&zeros, STAMP.run, 12, 0),
            Sector::Other { zero: true }
        );
    }
}
