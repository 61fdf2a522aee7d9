//! The bytes of a file: where they come from, and how they are written, with holes for long runs of zeros.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use vellum_base::error::ResultExt;
use vellum_base::{Error, ErrorKind, Result};

/// Zero runs of this length, so aligned in the file, become holes. Bytes.
const HOLE: usize = 64 * 1024;

/// How much content is moved at a time, in bytes; a multiple of [`HOLE`].
pub(super) const CHUNK: usize = 256 * 1024;

/// Where the bytes of a file come from.
pub(super) trait Content {
    /// Reads the next bytes of the file's data; 0 at its end.
    fn read(&mut self, into: &mut [u8]) -> Result<usize>;
}

/// Where the bytes of a file are written.
pub(super) struct Place<'a> {
    pub file: &'a File,
    /// The byte of it at which the file's first is.
    pub first: u64,
    /// Hears which bytes of the file were written.
    pub written: &'a mut dyn FnMut(Range<u64>),
}

/// Writes `length` bytes of `content` at `offset`, except for long runs of zeros, by way of `buffer`, which has
/// [`CHUNK`] bytes. Returns the bytes written.
#[expect(
    clippy::indexing_slicing,
    reason = "`filled` stays below `step` while the loop runs"
)]
pub(super) fn fill(
    place: &mut Place<'_>,
    buffer: &mut [u8],
    offset: u64,
    length: u64,
    content: &mut dyn Content,
) -> Result<u64> {
    let (mut at, mut left) = (offset, length);
    let mut written = 0;
    while left > 0 {
        // The first step ends on a boundary of HOLE, so that later ones are aligned.
        let room = CHUNK as u64 - at % HOLE as u64;
        let step = room.min(left) as usize;
        let (buffer, _) = buffer.split_at_mut(step);
        let mut filled = 0;
        while filled < step {
            let count = content.read(&mut buffer[filled..])?;
            if count == 0 {
                return Err(Error::new(
                    ErrorKind::Corrupt,
                    format!("its content ends {} bytes early", left - filled as u64),
                ));
            }
            filled += count;
        }
        written +=
            write_with_holes(place, buffer, at).context(|| format!("writing at byte {at}"))?;
        at += step as u64;
        left -= step as u64;
    }
    Ok(written)
}

/// Writes `data` at `offset`, leaving out aligned zero runs; returns the bytes written.
#[expect(
    clippy::indexing_slicing,
    reason = "pieces are cut out of `data`, in order, up to its length"
)]
fn write_with_holes(place: &mut Place<'_>, data: &[u8], offset: u64) -> io::Result<u64> {
    let mut written = 0;
    let mut at = offset;
    let mut pending: (u64, usize, usize) = (offset, 0, 0);
    let mut position = 0;
    // Neighbouring data pieces go out in one call.
    let mut flush = |(start, from, to): (u64, usize, usize)| -> io::Result<u64> {
        let piece = &data[from..to];
        let len = piece.len() as u64;
        if !piece.is_empty() {
            place.file.write_all_at(piece, place.first + start)?;
            (place.written)(start..start + len);
        }
        Ok(len)
    };
    while position < data.len() {
        let step = (HOLE - (at % HOLE as u64) as usize).min(data.len() - position);
        let piece = &data[position..position + step];
        if is_zero(piece) {
            written += flush(pending)?;
            pending = (at + step as u64, position + step, position + step);
        } else {
            pending.2 = position + step;
        }
        position += step;
        at += step as u64;
    }
    written += flush(pending)?;
    Ok(written)
}

fn is_zero(data: &[u8]) -> bool {
    // Real data shows itself in the first word; the comparison of a piece with its neighbour
    // is one memcmp.
    match data.split_first() {
        None => true,
        Some((first, rest)) => *first == 0 && data.split_at(rest.len()).0 == rest,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn whole(file: &File) -> Place<'_> {
        Place {
            file,
            first: 0,
            written: Box::leak(Box::new(|_| ())),
        }
    }

    #[test]
    fn zero_runs_are_left_out_and_the_rest_is_written() {
        use std::os::unix::fs::MetadataExt;
        let file = tempfile::tempfile().unwrap();
        let mut data = vec![0u8; 1 << 20];
        data[3] = 1;
        data[700_000] = 2;
        let mut written = 0;
        for (index, chunk) in data.chunks(CHUNK).enumerate() {
            written += write_with_holes(&mut whole(&file), chunk, (index * CHUNK) as u64).unwrap();
        }
        file.set_len(1 << 20).unwrap();
        assert_eq!(written, 2 * HOLE as u64);
        let mut back = vec![1u8; 1 << 20];
        file.read_exact_at(&mut back, 0).unwrap();
        assert_eq!(back, data);
        assert!(file.metadata().unwrap().blocks() * 512 < 400 * 1024);
    }

    #[test]
    fn unaligned_writes_leave_out_only_aligned_runs() {
        let file = tempfile::tempfile().unwrap();
        let mut data = vec![0u8; 200_000];
        data[0] = 9;
        data[199_999] = 9;
        write_with_holes(&mut whole(&file), &data, 1000).unwrap();
        let mut back = vec![1u8; 200_000];
        file.read_exact_at(&mut back, 1000).unwrap();
        assert_eq!(back, data);
    }
}
