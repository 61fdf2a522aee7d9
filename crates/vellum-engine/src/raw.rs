//! Disk images as layers: every block that is not zero becomes a data block.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};

use vellum_base::block::{BLOCK_LEN, BLOCK_SIZE, Block, Blocks, Offset, Span, part};
use vellum_base::error::{Result, ResultExt};
use vellum_core::layer::WritableLayer;

/// Bytes read at a time.
const CHUNK: usize = 1 << 20;

/// Copies the `len` bytes of the file or block device at `path` into a layer, without its holes and
/// zeros. `progress` hears of bytes that are done with.
///
/// # Errors
/// [`vellum_base::ErrorKind::OutOfRange`] where the file is larger than the layer.
pub fn copy_in(
    layer: &WritableLayer,
    path: &Path,
    len: u64,
    mut progress: impl FnMut(u64),
) -> Result<()> {
    let what = || format!("cannot read {}", path.display());
    let file = File::open(path).context(what)?;
    vellum_base::block::check_range(0, len, layer.header().virtual_size)?;
    let mut buf = vec![0; CHUNK];
    let mut done = 0;
    while let Some((start, end)) = next_data(&file, done, len).context(what)? {
        let mut at = start / BLOCK_SIZE * BLOCK_SIZE;
        while at < end {
            vellum_base::interrupt::check()?;
            let want = (end.next_multiple_of(BLOCK_SIZE) - at).min(CHUNK as u64) as usize;
            let (chunk, _) = buf.split_at_mut(want);
            chunk.fill(0);
            let real = (len - at).min(want as u64) as usize;
            file.read_exact_at(chunk.split_at_mut(real).0, at)
                .context(what)?;
            write_nonzero(layer, chunk, Offset::new(at).block())?;
            at += want as u64;
        }
        let now = at.min(len);
        progress(now - done);
        done = now;
    }
    progress(len - done);
    Ok(())
}

/// The next range of the file from `at` that is not a hole.
fn next_data(file: &File, at: u64, len: u64) -> std::io::Result<Option<(u64, u64)>> {
    if at >= len {
        return Ok(None);
    }
    let start = match lseek(file, at as i64, Whence::SeekData) {
        Ok(start) => start as u64,
        Err(Errno::ENXIO) => return Ok(None),
        // The file system does not know holes.
        Err(Errno::EINVAL) => return Ok(Some((at, len))),
        Err(errno) => return Err(errno.into()),
    };
    let end = lseek(file, start as i64, Whence::SeekHole)? as u64;
    Ok(Some((start, end.min(len))))
}

/// Writes the runs of blocks that are not zero.
fn write_nonzero(layer: &WritableLayer, bytes: &[u8], first: Block) -> Result<()> {
    let is_zero = |block: &[u8]| block.iter().all(|&byte| byte == 0);
    let mut from = 0;
    let mut blocks = bytes.chunks(BLOCK_LEN).enumerate().peekable();
    while let Some((index, block)) = blocks.next() {
        if is_zero(block) {
            from = index + 1;
            continue;
        }
        // The run ends with the buffer or before a zero block.
        if blocks.peek().is_none_or(|(_, next)| is_zero(next)) {
            let run = part(bytes, from * BLOCK_LEN, (index + 1 - from) * BLOCK_LEN);
            let start = first + Blocks::new(from as u64);
            let held = layer.lock_blocks(Span::of_buffer(start, run))?;
            layer.write_blocks(&held, start, run)?;
        }
    }
    Ok(())
}
