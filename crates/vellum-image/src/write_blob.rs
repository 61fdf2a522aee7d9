//! Writes a layer's tar as the blob that a registry keeps: compressed, and hashed on both sides of that.

use std::io::{self, Write};

use sha2::{Digest, Sha256};

use super::compress::{Compression, Encoder};
use super::layer::hex;
use vellum_base::Result;
use vellum_base::error::ResultExt;

/// What a blob is known by. Digests are the digits of SHA-256 alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerBlob {
    /// Of the blob.
    pub digest: String,
    /// Bytes of the blob.
    pub size: u64,
    /// Of the tar in it: its diff_id.
    pub diff_id: String,
}

/// Writes the tar that `write` makes to `output`, compressed; gives the output back.
///
/// # Errors
///
/// What `write` fails with; `Io` when `output` fails.
pub fn write_blob<W: Write>(
    output: W,
    compression: Compression,
    write: impl FnOnce(&mut dyn Write) -> Result<()>,
) -> Result<(W, LayerBlob)> {
    let failed = || "compressing a layer";
    let encoder = Encoder::new(Hashed::new(output), compression).context(failed)?;
    let mut tar = Hashed::new(encoder);
    write(&mut tar)?;
    let (encoder, diff_id, _) = tar.finish();
    let (output, digest, size) = encoder.finish().context(failed)?.finish();
    let blob = LayerBlob {
        digest,
        size,
        diff_id,
    };
    Ok((output, blob))
}

/// Hashes and counts what is written through it.
struct Hashed<W> {
    output: W,
    hasher: Sha256,
    written: u64,
}

impl<W: Write> Hashed<W> {
    fn new(output: W) -> Self {
        Hashed {
            output,
            hasher: Sha256::new(),
            written: 0,
        }
    }

    /// The output, the digits of the digest and the number of bytes.
    fn finish(self) -> (W, String, u64) {
        (self.output, hex(&self.hasher.finalize()), self.written)
    }
}

impl<W: Write> Write for Hashed<W> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let count = self.output.write(data)?;
        self.hasher.update(data.split_at(count).0);
        self.written += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.output.flush()
    }
}
