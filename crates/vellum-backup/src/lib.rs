//! The backup format, `docs/backup.md`: one moment of a device, whole or as what differs from an older
//! one, as a stream of checked and compressed chunks that is written and read from front to back.
//!
//! * [`Header`]: what it is a backup of.
//! * [`Writer`]: blocks into a stream; [`Writer::resume`] goes on with one that was cut off.
//! * [`Reader`]: a stream into blocks, each of them checked.
//! * [`LayerWriter`] and [`LayerReader`]: the same of an image's layers, `docs/images.md`, "Layer files".
//!
//! ```
//! use uuid::Uuid;
//! use vellum_backup::{Header, Reader, Writer};
//! use vellum_base::block::{Block, BlockState, Blocks, Span};
//!
//! # fn main() -> vellum_base::Result<()> {
//! let header = Header {
//!     backup: Uuid::from_u128(1),
//!     container: Uuid::from_u128(2),
//!     state: Uuid::from_u128(3),
//!     base: None,
//!     virtual_size: 1 << 20,
//!     device_size: 1 << 20,
//!     created: 0,
//! };
//! let mut stream = Vec::new();
//! let mut writer = Writer::new(&mut stream, &header, b"{}")?;
//! writer.data(Block::new(7), &[1; 4096])?;
//! writer.zero(Span::new(Block::new(9), Blocks::new(100)))?;
//! writer.finish()?;
//!
//! let mut reader = Reader::new(&stream[..])?;
//! assert_eq!(reader.header(), &header);
//! while let Some(chunk) = reader.chunk()? {
//!     for (run, bytes) in chunk.pieces() {
//!         assert_eq!(run.value == BlockState::Data, run.len().buffer_len() == bytes.len());
//!     }
//! }
//! # Ok(())
//! # }
//! ```

mod front;
mod header;
mod layers;
mod read;
mod record;
mod write;

pub use header::{Header, MAX_DESCRIPTION};
pub use layers::{LAYER_FILE_MAGIC, LayerEntry, LayerPart, LayerReader, LayerWriter};
pub use read::{Chunk, Reader, Resume, ends_before_chunks};
pub use record::{LAYER_HEADER_LEN, Totals};
pub use write::Writer;
