//! The file `sums` of a lazy layer: checksums of the blocks that came, and what the one who evicts and those who read tell
//! each other. format.md, section 8.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::super::codec::{Reader, Writer, check_crc};
use super::super::header::Header;
use vellum_base::block::{
    BLOCK_LEN, Block, Blocks, Span, WindowPower, in_memory, part_from, part_mut,
};
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_base::storage::{OpenMode, Storage, StorageFile};

/// The file's name.
pub(in crate::layer) const SUMS_FILE: &str = "sums";

const MAGIC: &[u8; 8] = b"VELLUMSM";
const VERSION: u32 = 1;
/// Of the header that has a CRC, with it.
const HEADER: usize = 64;
/// Where the number of evictions is, and behind it that of laps: in a sector of their own.
const TURNS: u64 = 512;
const LAPS: u64 = TURNS + 8;
/// Where checksums begin.
const SUMS: u64 = 4096;
/// Bytes of a checksum.
const SUM_LEN: usize = 4;
/// Checksums that are read at a time.
const AT_ONCE: Blocks = Blocks::new(64);

/// What the one who evicts says. It counts for processes of one boot: after a crash any of it may be lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Turns {
    /// Another number after each eviction.
    pub evictions: u64,
    /// Another number each time that reads are to be noted anew; 0 where nobody wants to know of them.
    pub laps: u64,
}

/// The file, open.
#[derive(Debug)]
pub(super) struct Sums {
    path: PathBuf,
    file: Arc<dyn StorageFile>,
    /// Where it is noted which windows were read.
    reads: u64,
}

impl Sums {
    /// Makes the file of a new layer, durably but for its name.
    ///
    /// # Errors
    /// Where the host refuses.
    pub fn make(
        storage: &dyn Storage,
        dir: &Path,
        header: &Header,
        power: WindowPower,
    ) -> Result<()> {
        let windows = header.blocks().get().div_ceil(power.blocks().get());
        let path = dir.join(SUMS_FILE);
        let mut out = Writer::with_capacity(HEADER);
        out.bytes(MAGIC);
        out.u32(VERSION);
        out.u32(0);
        out.bytes(header.uuid.as_bytes());
        out.u64(header.virtual_size);
        out.pad_to(HEADER - 4);
        out.crc();
        let make = || -> std::io::Result<()> {
            // One that was left is of a layer that was not made to its end.
            let file = storage.open(&path, OpenMode::Create)?;
            file.set_len(0)?;
            file.set_len(reads_at(header) + windows)?;
            file.write_at(&out.into_bytes(), 0)?;
            file.sync()
        };
        make().context(|| format!("cannot make {}", path.display()))
    }

    /// Opens the file of a layer.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] and [`ErrorKind::Unsupported`]; the message names the file.
    pub fn open(
        storage: &dyn Storage,
        dir: &Path,
        header: &Header,
        mode: OpenMode,
    ) -> Result<Self> {
        let path = dir.join(SUMS_FILE);
        let opened = storage.open(&path, mode);
        let file = opened.context(|| format!("cannot open {}", path.display()))?;
        let reads = reads_at(header);
        let sums = Sums { path, file, reads };
        let mut bytes = [0; HEADER];
        sums.read(&mut bytes, 0)?;
        sums.check_header(&bytes, header).context(|| sums.named())?;
        Ok(sums)
    }

    fn check_header(&self, bytes: &[u8; HEADER], header: &Header) -> Result<()> {
        let mut input = Reader::new(bytes);
        if input.take(8)? != MAGIC {
            // `have` says that they are there.
            let text = "no checksums of a lazy layer (wrong magic)";
            return Err(Error::new(ErrorKind::Corrupt, text));
        }
        let version = input.u32()?;
        if version != VERSION {
            let text = format!(
                "version {version}; this build reads version {VERSION}: use a newer vellum"
            );
            return Err(Error::new(ErrorKind::Unsupported, text));
        }
        check_crc(bytes, "header")?;
        input.u32()?;
        let (uuid, virtual_size) = (input.uuid()?, input.u64()?);
        if uuid != header.uuid || virtual_size != header.virtual_size {
            let text = format!("it is of the layer {uuid} of {virtual_size} bytes");
            return Err(Error::new(ErrorKind::Corrupt, text));
        }
        Ok(())
    }

    fn named(&self) -> String {
        self.path.display().to_string()
    }

    fn read(&self, bytes: &mut [u8], offset: u64) -> Result<()> {
        let read = self.file.read_at(bytes, offset);
        read.context(|| format!("cannot read {}", self.path.display()))
    }

    fn write(&self, bytes: &[u8], offset: u64) -> Result<()> {
        let written = self.file.write_at(bytes, offset);
        written.context(|| format!("cannot write {}", self.path.display()))
    }

    /// Notes the checksums of blocks.
    ///
    /// # Errors
    /// Where the host refuses.
    pub fn put(&self, first: Block, bytes: &[u8]) -> Result<()> {
        let blocks = bytes.chunks_exact(BLOCK_LEN);
        let sums: Vec<u8> = blocks
            .flat_map(|block| crc32fast::hash(block).to_le_bytes())
            .collect();
        self.write(&sums, place(first))
    }

    /// The first of these blocks that has another checksum.
    ///
    /// # Errors
    /// Where the host refuses.
    pub fn first_wrong(&self, span: Span, bytes: &[u8]) -> Result<Option<Block>> {
        let mut stored = [0; in_memory(AT_ONCE.get()) * SUM_LEN];
        for piece in span.pieces(AT_ONCE) {
            let sums = part_mut(&mut stored, 0, in_memory(piece.len().get()) * SUM_LEN);
            self.read(sums, place(piece.start()))?;
            let bytes = part_from(bytes, (piece.start() - span.start()).buffer_len());
            let both = sums
                .chunks_exact(SUM_LEN)
                .zip(bytes.chunks_exact(BLOCK_LEN));
            for (block, (sum, bytes)) in piece.blocks().zip(both) {
                if crc32fast::hash(bytes).to_le_bytes() != sum {
                    return Ok(Some(block));
                }
            }
        }
        Ok(None)
    }

    /// Makes durable what was noted.
    ///
    /// # Errors
    /// Where the host refuses.
    pub fn sync(&self) -> Result<()> {
        let synced = self.file.sync_data();
        synced.context(|| format!("syncing {}", self.path.display()))
    }

    /// What the one who evicts says now.
    ///
    /// # Errors
    /// Where the host refuses.
    pub fn turns(&self) -> Result<Turns> {
        let mut bytes = [0; 16];
        self.read(&mut bytes, TURNS)?;
        let mut input = Reader::new(&bytes);
        Ok(Turns {
            evictions: input.u64()?,
            laps: input.u64()?,
        })
    }

    /// Says that blocks are about to be evicted, which nobody finds in `have` any more.
    ///
    /// # Errors
    /// Where the host refuses.
    pub fn note_eviction(&self) -> Result<()> {
        let next = self.turns()?.evictions.wrapping_add(1);
        self.write(&next.to_le_bytes(), TURNS)
    }

    /// Has whoever reads note it, anew.
    ///
    /// # Errors
    /// Where the host refuses.
    pub fn next_lap(&self) -> Result<()> {
        // 32 bits are enough to be another number, and fit where readers keep it.
        let next = self.turns()?.laps % u64::from(u32::MAX) + 1;
        self.write(&next.to_le_bytes(), LAPS)
    }

    /// Notes that blocks of a window were read.
    ///
    /// # Errors
    /// Where the host refuses.
    pub fn note_read(&self, window: u32) -> Result<()> {
        self.write(&[1], self.reads + u64::from(window))
    }

    /// Whether blocks of a window were read since this was asked last.
    ///
    /// # Errors
    /// Where the host refuses.
    pub fn take_read(&self, window: u32) -> Result<bool> {
        let at = self.reads + u64::from(window);
        let mut byte = [0];
        self.read(&mut byte, at)?;
        let read = byte != [0];
        if read {
            self.write(&[0], at)?;
        }
        Ok(read)
    }
}

/// Where it is noted which windows were read.
fn reads_at(header: &Header) -> u64 {
    place(Block::FIRST + header.blocks()).next_multiple_of(SUMS)
}

/// Where the checksum of a block is.
fn place(block: Block) -> u64 {
    SUMS + block.get() * SUM_LEN as u64
}
