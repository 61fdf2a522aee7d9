//! The header of a backup: docs/backup.md, "Header".

use uuid::Uuid;

use crate::front::Front;
use crate::record::{corrupt, put};
use vellum_base::block::{BLOCK_SIZE, MAX_VIRTUAL_SIZE, part, u32_at, u64_at};
use vellum_base::error::{Error, ErrorKind, Result};

pub(crate) const MAGIC: &[u8; 8] = b"VELLUMBK";
const FRONT: Front = Front {
    magic: MAGIC,
    what: "backup",
    made_by: "`vellum backup`",
    version: 1,
    known_incompatible: 0,
};
pub(crate) const HEADER_LEN: usize = 256;
const CRC_AT: usize = HEADER_LEN - 4;

/// The longest description, in bytes.
pub const MAX_DESCRIPTION: usize = 1 << 20;

/// What a backup is of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// This backup.
    pub backup: Uuid,
    /// The container.
    pub container: Uuid,
    /// The moment of it: the id of the snapshot.
    pub state: Uuid,
    /// The older moment that this is a delta to; `None` for a full backup.
    pub base: Option<Uuid>,
    /// Bytes of the layers: a multiple of 4096, up to 64 TiB.
    pub virtual_size: u64,
    /// Bytes that the device shows: less than a block less, at most.
    pub device_size: u64,
    /// When the backup was made, in seconds since 1970.
    pub created: u64,
}

/// Length and CRC of the description that follows a header.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Described {
    pub len: usize,
    pub crc: u32,
}

impl Header {
    /// The header as it lies in front of `description`.
    pub(crate) fn encode(&self, description: &[u8]) -> Result<Vec<u8>> {
        check_sizes(self.virtual_size, self.device_size, ErrorKind::InvalidInput)?;
        let len = u32::try_from(description.len()).ok();
        let Some(len) = len.filter(|_| description.len() <= MAX_DESCRIPTION) else {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!(
                    "what is to be said of a backup takes {} bytes: at most {MAX_DESCRIPTION} are allowed",
                    description.len()
                ),
            ));
        };
        let mut bytes = vec![0; HEADER_LEN];
        put(&mut bytes, 0, MAGIC);
        put(&mut bytes, 8, &FRONT.version.to_le_bytes());
        put(&mut bytes, 12, &len.to_le_bytes());
        put(&mut bytes, 32, self.backup.as_bytes());
        put(&mut bytes, 48, self.container.as_bytes());
        put(&mut bytes, 64, self.state.as_bytes());
        put(&mut bytes, 80, self.base.unwrap_or(Uuid::nil()).as_bytes());
        put(&mut bytes, 96, &self.virtual_size.to_le_bytes());
        put(&mut bytes, 104, &self.device_size.to_le_bytes());
        put(&mut bytes, 112, &(BLOCK_SIZE as u32).to_le_bytes());
        put(&mut bytes, 116, &crc32fast::hash(description).to_le_bytes());
        put(&mut bytes, 120, &self.created.to_le_bytes());
        let crc = crc32fast::hash(part(&bytes, 0, CRC_AT));
        put(&mut bytes, CRC_AT, &crc.to_le_bytes());
        Ok(bytes)
    }

    /// Reads a header.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] for what is no backup, another version or unknown incompatible features;
    /// [`ErrorKind::Corrupt`] for a CRC or a field.
    pub(crate) fn decode(bytes: &[u8; HEADER_LEN]) -> Result<(Self, Described)> {
        FRONT.check(bytes)?;
        let uuid = |at| {
            let mut id = [0; 16];
            id.copy_from_slice(part(bytes, at, 16));
            Uuid::from_bytes(id)
        };
        let base = uuid(80);
        let header = Header {
            backup: uuid(32),
            container: uuid(48),
            state: uuid(64),
            base: (!base.is_nil()).then_some(base),
            virtual_size: u64_at(bytes, 96),
            device_size: u64_at(bytes, 104),
            created: u64_at(bytes, 120),
        };
        if header.state.is_nil() || header.base == Some(header.state) {
            return Err(corrupt(format!("impossible state {}", header.state)));
        }
        if u64::from(u32_at(bytes, 112)) != BLOCK_SIZE {
            return Err(corrupt(format!(
                "block size {} instead of {BLOCK_SIZE}",
                u32_at(bytes, 112)
            )));
        }
        check_sizes(header.virtual_size, header.device_size, ErrorKind::Corrupt)?;
        let len = u32_at(bytes, 12) as usize;
        if len > MAX_DESCRIPTION {
            return Err(corrupt(format!("a description of {len} bytes")));
        }
        let crc = u32_at(bytes, 116);
        Ok((header, Described { len, crc }))
    }
}

fn check_sizes(virtual_size: u64, device_size: u64, kind: ErrorKind) -> Result<()> {
    let whole = virtual_size > 0
        && virtual_size.is_multiple_of(BLOCK_SIZE)
        && virtual_size <= MAX_VIRTUAL_SIZE;
    let shown = virtual_size
        .checked_sub(device_size)
        .is_some_and(|hidden| hidden < BLOCK_SIZE);
    if whole && shown && device_size > 0 {
        return Ok(());
    }
    Err(Error::new(
        kind,
        format!("a device of {device_size} bytes in layers of {virtual_size} bytes"),
    ))
}
