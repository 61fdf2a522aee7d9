//! The digest of a layer, taken while all of its data is read: format.md, section 5.

use std::cell::Cell;
use std::sync::mpsc;

use sha2::{Digest, Sha256};

use crate::layer::data::DataFiles;
use crate::layer::header::Header;
use crate::layer::table::{DIGEST_LEN, MapExtent};
use vellum_base::block::{BlockState, Blocks, Span, part, part_mut};
use vellum_base::error::{Error, Result};

/// What is hashed in front of a layer's content.
const DIGEST_PREFIX: &[u8; 16] = b"vellum layer v1\n";

/// Blocks read at a time when a whole layer is read: 1 MiB.
const SCRUB: Blocks = Blocks::new(256);

/// Buffers of that length between the thread that reads and the one that computes the digest.
const PIECES: usize = 4;

/// So many bytes need no second thread.
const ALONE: u64 = 8 << 20;

/// What goes into a digest.
enum Piece {
    /// Start, length and state of an extent.
    Head([u8; MapExtent::LEN]),
    /// So many bytes of this buffer.
    Data(Vec<u8>, usize),
}

/// A digest in the making.
struct Digesting(Sha256);

impl Digesting {
    fn new(header: &Header) -> Self {
        let mut hash = Sha256::new();
        hash.update(DIGEST_PREFIX);
        hash.update(header.virtual_size.to_le_bytes());
        Digesting(hash)
    }

    /// Takes a piece; a buffer comes back.
    fn take(&mut self, piece: Piece) -> Option<Vec<u8>> {
        match piece {
            Piece::Head(head) => {
                self.0.update(head);
                None
            }
            Piece::Data(buf, len) => {
                self.0.update(part(&buf, 0, len));
                Some(buf)
            }
        }
    }

    fn finish(self) -> [u8; DIGEST_LEN] {
        self.0.finalize().into()
    }
}

/// Reads all data of a layer in order, calls `each` with pieces of whole blocks, and returns the
/// digest. That of much data is computed in a thread of its own, while `each` goes on.
pub(super) fn walk(
    header: &Header,
    data: &DataFiles,
    extents: &[MapExtent],
    mut each: impl FnMut(Span, &[u8]) -> Result<()>,
) -> Result<[u8; DIGEST_LEN]> {
    let held = extents.iter().filter(|e| e.state() == BlockState::Data);
    let blocks: Blocks = held.map(|extent| extent.span().len()).sum();
    if blocks.bytes() <= ALONE {
        let mut digest = Digesting::new(header);
        let spare = Cell::new(Vec::new());
        let mut take = |piece| {
            if let Some(buf) = digest.take(piece) {
                spare.set(buf);
            }
        };
        read_pieces(data, extents, &|| spare.take(), &mut take, &mut each)?;
        return Ok(digest.finish());
    }
    std::thread::scope(|scope| {
        let (pieces, to_hash) = mpsc::sync_channel(PIECES);
        let (emptied, free) = mpsc::channel();
        (0..PIECES).for_each(|_| drop(emptied.send(Vec::new())));
        let hasher = scope.spawn(move || {
            let mut digest = Digesting::new(header);
            for piece in to_hash {
                if let Some(buf) = digest.take(piece) {
                    // Who read has ended with an error.
                    let _ = emptied.send(buf);
                }
            }
            digest.finish()
        });
        // There is none where the thread that computes the digest panicked: that is told when it is joined.
        let buffer = || free.recv().unwrap_or_else(|_| Vec::new());
        let mut take = |piece| drop(pieces.send(piece));
        let read = read_pieces(data, extents, &buffer, &mut take, &mut each);
        drop(pieces);
        let digest = hasher
            .join()
            .map_err(|_| Error::internal("the thread that computes a digest panicked"));
        read.and(digest)
    })
}

/// Reads the data of extents into buffers that `buffer` gives, of any length, and passes all that
/// the digest is of to `take`.
fn read_pieces(
    data: &DataFiles,
    extents: &[MapExtent],
    buffer: &dyn Fn() -> Vec<u8>,
    take: &mut dyn FnMut(Piece),
    each: &mut dyn FnMut(Span, &[u8]) -> Result<()>,
) -> Result<()> {
    for extent in extents {
        take(Piece::Head(extent.bytes()));
        if extent.state() != BlockState::Data {
            continue;
        }
        for span in extent.span().pieces(SCRUB) {
            vellum_base::interrupt::check()?;
            let len = span.len().buffer_len();
            let mut buf = buffer();
            if buf.len() < len {
                buf.resize(SCRUB.buffer_len(), 0);
            }
            let bytes = part_mut(&mut buf, 0, len);
            data.read(bytes, span.offset())?;
            each(span, bytes)?;
            take(Piece::Data(buf, len));
        }
    }
    Ok(())
}
