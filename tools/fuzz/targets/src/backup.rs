//! Backups: whatever the bytes are, what is read of them makes sense, and what was checked goes on.

use uuid::Uuid;
use vellum_backup::{Header, Reader, Writer};
use vellum_base::ErrorKind;
use vellum_base::block::{BLOCK_LEN, BLOCK_SIZE, Block, BlockState, Blocks, Span};

use crate::input::with_mode;
use crate::{Seed, fixup};

/// Bit of the first byte: checksums are made to fit.
const FIX: u8 = 1;

/// Extents are in order, within the device, and have the bytes that they say. What is damaged or cut off can be
/// gone on with behind the last good chunk, and is whole then.
pub fn backup(input: &[u8]) {
    let Some((&mode, bytes)) = input.split_first() else {
        return;
    };
    let mut bytes = bytes.to_vec();
    if mode & FIX != 0 {
        fixup::backup(&mut bytes);
    }
    let mut reader = match Reader::new(&bytes[..]) {
        Ok(reader) => reader,
        Err(error) => {
            assert!(
                [ErrorKind::Corrupt, ErrorKind::Unsupported].contains(&error.kind()),
                "{error:?}"
            );
            return;
        }
    };
    let size = reader.header().virtual_size;
    assert!(size > 0 && size.is_multiple_of(BLOCK_SIZE));
    let mut at = Block::FIRST;
    loop {
        match reader.chunk() {
            Ok(None) => return,
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::Corrupt, "{error:?}");
                break;
            }
            Ok(Some(chunk)) => {
                for (run, bytes) in chunk.pieces() {
                    assert!(at <= run.start() && !run.is_empty());
                    at = run.end();
                    assert!(at.offset().get() <= size);
                    let data = run.value == BlockState::Data;
                    assert_eq!(bytes.len(), if data { run.len().buffer_len() } else { 0 });
                }
            }
        }
    }
    let resume = reader.into_resume();
    bytes.truncate(resume.len as usize);
    let (totals, whole) = Writer::resume(bytes, resume).unwrap().finish().unwrap();
    let mut again = Reader::new(&whole[..]).unwrap();
    while again.chunk().unwrap().is_some() {}
    assert_eq!(again.totals(), totals);
}

/// A full backup, a delta with each kind of extent, and one without any.
pub fn backup_seeds() -> Vec<Seed> {
    let header = |base| Header {
        backup: Uuid::from_u128(1),
        container: Uuid::from_u128(2),
        state: Uuid::from_u128(3),
        base,
        virtual_size: 1 << 40,
        device_size: (1 << 40) - 512,
        created: 1,
    };
    let written = |base, extents: &[(u64, u64, bool)]| {
        let mut writer = Writer::new(Vec::new(), &header(base), b"{}").unwrap();
        for &(start, len, zero) in extents {
            let span = Span::new(Block::new(start), Blocks::new(len));
            match zero {
                true => writer.zero(span).unwrap(),
                false => {
                    let bytes = vec![start as u8; len as usize * BLOCK_LEN];
                    writer.data(span.start(), &bytes).unwrap();
                }
            }
        }
        writer.finish().unwrap().1
    };
    let base = Some(Uuid::from_u128(4));
    [
        ("full", written(None, &[(0, 2, false), (300, 1, false)])),
        (
            "delta",
            written(
                base,
                &[(1, 1, false), (2, 1 << 20, true), (1 << 27, 300, false)],
            ),
        ),
        ("empty", written(base, &[])),
    ]
    .map(|(name, bytes)| (name.to_owned(), with_mode(FIX, &bytes)))
    .into()
}
