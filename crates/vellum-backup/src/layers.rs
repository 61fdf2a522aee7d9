//! Layer files: several layers on each other in one stream. docs/images.md, "Layer files".

use std::io::{Read, Write};

use crate::front::Front;
use crate::header::MAX_DESCRIPTION;
use crate::read::{self, Chunk};
use crate::record::{Kind, LAYER_FRONT, LAYER_HEADER_LEN, LAYER_PAYLOAD, Totals, corrupt, put};
use crate::write;
use vellum_base::block::{
    BLOCK_SIZE, Block, Blocks, MAX_VIRTUAL_SIZE, Span, part, part_from, u32_at, u64_at,
};
use vellum_base::error::{Error, ErrorKind, Result};

/// What a layer file begins with.
pub const LAYER_FILE_MAGIC: &[u8; 8] = b"VELLUMLF";
const HEADER_LEN: usize = 64;
const CRC_AT: usize = HEADER_LEN - 4;
const FRONT: Front = Front {
    magic: LAYER_FILE_MAGIC,
    what: LAYER_FILE,
    made_by: "`vellum export --format layer`",
    version: 1,
    known_incompatible: 0,
};
/// The most layers of a file.
const MAX_LAYERS: u32 = 4096;
/// What a layer file is called in messages.
const LAYER_FILE: &str = "layer file";

const SIZE_AT: usize = 32;
const FLAGS_AT: usize = 40;
const LAYER_HEADER_AT: usize = 48;
const LEFT_OUT: u32 = 1;

/// What is said of a layer in front of its blocks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerEntry {
    /// Its digest: docs/format.md, section 5.
    pub digest: [u8; 32],
    /// Virtual size in bytes: a multiple of 4096, up to 64 TiB.
    pub virtual_size: u64,
    /// Its blocks are not in the file.
    pub left_out: bool,
    /// Its header as it lies on disk: docs/format.md, section 1.
    pub header: [u8; LAYER_HEADER_LEN],
    /// What it came from. The format knows nothing of it.
    pub info: Vec<u8>,
}

impl LayerEntry {
    fn encode(&self) -> Result<Vec<u8>> {
        check_size(self.virtual_size, ErrorKind::InvalidInput)?;
        let mut bytes = vec![0; LAYER_FRONT];
        put(&mut bytes, 0, &self.digest);
        put(&mut bytes, SIZE_AT, &self.virtual_size.to_le_bytes());
        let flags = if self.left_out { LEFT_OUT } else { 0 };
        put(&mut bytes, FLAGS_AT, &flags.to_le_bytes());
        put(&mut bytes, LAYER_HEADER_AT, &self.header);
        bytes.extend_from_slice(&self.info);
        match LAYER_PAYLOAD.contains(&bytes.len()) {
            true => Ok(bytes),
            false => Err(too_long("a layer", self.info.len())),
        }
    }

    /// Reads a payload of a length that a layer's may have.
    fn decode(bytes: &[u8]) -> Result<Self> {
        let flags = u32_at(bytes, FLAGS_AT);
        if flags & !LEFT_OUT != 0 {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!("a layer of the layer file has the flags {flags:#x}: use a newer vellum"),
            ));
        }
        let virtual_size = u64_at(bytes, SIZE_AT);
        check_size(virtual_size, ErrorKind::Corrupt)?;
        let mut entry = LayerEntry {
            digest: [0; 32],
            virtual_size,
            left_out: flags & LEFT_OUT != 0,
            header: [0; LAYER_HEADER_LEN],
            info: part_from(bytes, LAYER_FRONT).to_vec(),
        };
        entry.digest.copy_from_slice(part(bytes, 0, SIZE_AT));
        let header = part(bytes, LAYER_HEADER_AT, LAYER_HEADER_LEN);
        entry.header.copy_from_slice(header);
        Ok(entry)
    }
}

fn check_size(size: u64, kind: ErrorKind) -> Result<()> {
    if size > 0 && size.is_multiple_of(BLOCK_SIZE) && size <= MAX_VIRTUAL_SIZE {
        return Ok(());
    }
    Err(Error::new(kind, format!("a layer of {size} bytes")))
}

fn too_long(what: &str, len: usize) -> Error {
    let text = format!("what is to be said of {what} takes {len} bytes: that is too much");
    Error::new(ErrorKind::InvalidInput, text)
}

/// Writes a layer file: for each layer what it is, then its blocks in order. Each record is one write.
#[derive(Debug)]
pub struct LayerWriter<W> {
    records: write::Records<W>,
    /// Layers that are still to come.
    left: u32,
}

impl<W: Write> LayerWriter<W> {
    /// Begins a file of so many layers: writes the header, and the description, which the format knows nothing of.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for no layers or more than 4096, or a description longer than
    /// [`MAX_DESCRIPTION`]; where `out` fails.
    pub fn new(out: W, layers: usize, description: &[u8]) -> Result<Self> {
        let count = u32::try_from(layers).ok();
        let Some(count) = count.filter(|count| (1..=MAX_LAYERS).contains(count)) else {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("a layer file has 1 to {MAX_LAYERS} layers, not {layers}"),
            ));
        };
        let len = u32::try_from(description.len()).ok();
        let Some(len) = len.filter(|_| description.len() <= MAX_DESCRIPTION) else {
            return Err(too_long("the image", description.len()));
        };
        let mut front = vec![0; HEADER_LEN];
        put(&mut front, 0, LAYER_FILE_MAGIC);
        put(&mut front, 8, &FRONT.version.to_le_bytes());
        put(&mut front, 12, &len.to_le_bytes());
        put(&mut front, 32, &count.to_le_bytes());
        put(&mut front, 36, &(BLOCK_SIZE as u32).to_le_bytes());
        put(&mut front, 40, &crc32fast::hash(description).to_le_bytes());
        let crc = crc32fast::hash(part(&front, 0, CRC_AT));
        put(&mut front, CRC_AT, &crc.to_le_bytes());
        front.extend_from_slice(description);
        Ok(LayerWriter {
            records: write::Records::new(out, LAYER_FILE, &front, Blocks::NONE)?,
            left: count,
        })
    }

    /// Begins the next layer. Asserts that there is one more to come.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for an impossible size, or where more is said of it than a record takes; where the
    /// stream cannot be written.
    pub fn layer(&mut self, entry: &LayerEntry) -> Result<()> {
        assert!(self.left > 0, "more layers than the header says");
        self.left -= 1;
        let blocks = match entry.left_out {
            true => Blocks::NONE,
            false => Blocks::whole_in(entry.virtual_size),
        };
        self.records.layer(&entry.encode()?, blocks)
    }

    /// The whole blocks in `data`, from `start` on. Asserts that they are behind those before, and within the
    /// layer, which is not left out.
    ///
    /// # Errors
    /// Where the stream cannot be written: then it is cut off there.
    pub fn data(&mut self, start: Block, data: &[u8]) -> Result<()> {
        self.records.data(start, data)
    }

    /// Blocks that are zero, as [`LayerWriter::data`].
    ///
    /// # Errors
    /// As [`LayerWriter::data`].
    pub fn zero(&mut self, span: Span) -> Result<()> {
        self.records.zero(span)
    }

    /// Writes what is left, and the end. Nothing is synced. Asserts that all layers were written.
    ///
    /// # Errors
    /// As [`LayerWriter::data`].
    pub fn finish(self) -> Result<(Totals, W)> {
        assert!(self.left == 0, "fewer layers than the header says");
        self.records.finish()
    }
}

/// What comes next in a layer file.
#[derive(Debug)]
pub enum LayerPart<'a> {
    /// A layer begins.
    Layer(Box<LayerEntry>),
    /// Blocks of the layer that began last.
    Chunk(Chunk<'a>),
}

/// Reads a layer file, and checks every byte of it: records as they come, the whole at its end. What the headers
/// of its layers say is left to the caller.
pub struct LayerReader<R> {
    records: read::Records<R>,
    description: Vec<u8>,
    layers: u32,
    /// Layers that are still to come.
    left: u32,
    /// Blocks of a layer may come.
    within: bool,
}

impl<R> std::fmt::Debug for LayerReader<R> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "LayerReader({} of {} layers to come)",
            self.left, self.layers
        )
    }
}

impl<R: Read> LayerReader<R> {
    /// Reads the header and the description.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] for what is no layer file, or of another version or with features that are not
    /// known; [`ErrorKind::Corrupt`] where it is damaged or cut off; where `input` fails.
    pub fn new(input: R) -> Result<Self> {
        let mut records = read::Records::new(input, LAYER_FILE)?;
        let mut front = [0; HEADER_LEN];
        records.front(&mut front)?;
        check_front(&front)?;
        let layers = u32_at(&front, 32);
        let len = u32_at(&front, 12) as usize;
        if len > MAX_DESCRIPTION || !(1..=MAX_LAYERS).contains(&layers) {
            return Err(corrupt(format!(
                "a description of {len} bytes and {layers} layers"
            )));
        }
        let mut description = vec![0; len];
        records.front(&mut description)?;
        if crc32fast::hash(&description) != u32_at(&front, 40) {
            return Err(corrupt("the description does not match its CRC"));
        }
        Ok(LayerReader {
            records,
            description,
            layers,
            left: layers,
            within: false,
        })
    }

    /// What the writer said of the image.
    pub fn description(&self) -> &[u8] {
        &self.description
    }

    /// The next layer or chunk; `None` once the end was read, the digest is right and nothing follows. Before
    /// that what was read may be replaced or cut off, and is to be shown to nobody.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] where it is damaged or cut off; [`ErrorKind::Unsupported`] for a flag of a layer that
    /// is not known; where the input fails.
    pub fn next_part(&mut self) -> Result<Option<LayerPart<'_>>> {
        match self.records.next()? {
            Some(Kind::Layer) => {
                self.left = self.left.checked_sub(1).ok_or_else(|| {
                    corrupt(format!(
                        "more layers than the {} of the header",
                        self.layers
                    ))
                })?;
                let entry = LayerEntry::decode(self.records.payload())?;
                self.within = !entry.left_out;
                self.records.begin(Blocks::whole_in(entry.virtual_size));
                Ok(Some(LayerPart::Layer(Box::new(entry))))
            }
            Some(_) if self.within => Ok(Some(LayerPart::Chunk(self.records.chunk()))),
            Some(_) => Err(corrupt("blocks of no layer, or of one that is left out")),
            None if self.left > 0 => Err(corrupt(format!(
                "{} of {} layers are missing",
                self.left, self.layers
            ))),
            None => Ok(None),
        }
    }
}

fn check_front(front: &[u8; HEADER_LEN]) -> Result<()> {
    FRONT.check(front)?;
    let block = u32_at(front, 36);
    if u64::from(block) != BLOCK_SIZE {
        return Err(corrupt(format!(
            "block size {block} instead of {BLOCK_SIZE}"
        )));
    }
    Ok(())
}
