//! Disk images as layers: every block that is not zero becomes a data block.

use vellum_base::block::{BLOCK_LEN, BLOCK_SIZE, Block, Blocks, Offset, Span, part};
use vellum_base::error::{Result, ResultExt};
use vellum_core::layer::WritableLayer;
use vellum_image::DiskImage;

/// Bytes read at a time.
const CHUNK: usize = 1 << 20;

/// Copies a disk into a layer, without its holes and zeros. `progress` hears of bytes that are done with.
///
/// # Errors
/// [`vellum_base::ErrorKind::OutOfRange`] where the disk is larger than the layer.
pub fn copy_in(
    layer: &WritableLayer,
    disk: &DiskImage,
    mut progress: impl FnMut(u64),
) -> Result<()> {
    let what = || format!("cannot read {}", disk.path.display());
    let len = disk.size;
    vellum_base::block::check_range(0, len, layer.header().virtual_size)?;
    let mut buf = vec![0; CHUNK];
    let mut done = 0;
    while let Some(range) = disk.next_data(done).context(what)? {
        let mut at = range.start / BLOCK_SIZE * BLOCK_SIZE;
        while at < range.end {
            vellum_base::interrupt::check()?;
            let want = (range.end.next_multiple_of(BLOCK_SIZE) - at).min(CHUNK as u64) as usize;
            let (chunk, _) = buf.split_at_mut(want);
            chunk.fill(0);
            let real = (len - at).min(want as u64) as usize;
            disk.read_at(chunk.split_at_mut(real).0, at).context(what)?;
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
