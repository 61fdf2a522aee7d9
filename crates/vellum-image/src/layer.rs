//! The layers of an image, and the stream that yields one and checks it on the way.

use std::io::{self, BufRead, BufReader, Read, Take};

use sha2::{Digest, Sha256, Sha512};

use super::compress::{Decoder, buffered};
use super::{Progress, as_io_error, read_failure};
use vellum_base::{Error, ErrorKind, Result};

/// One layer of an image, as its manifest describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct LayerRef {
    /// The digest of the uncompressed tar, `sha256:…`.
    pub diff_id: String,
    /// The digest of the blob as stored; `None` in the older Docker archives, which have none.
    pub digest: Option<String>,
    /// The media type, as written.
    pub media_type: String,
    /// The size of the blob as stored, in bytes.
    pub size: u64,
}

/// A digest being computed.
#[derive(Debug)]
pub enum Hasher {
    /// What nearly everything has.
    Sha256(Sha256),
    /// What the specification allows as well.
    Sha512(Sha512),
}

impl Hasher {
    /// For the algorithm of `digest` (`sha256:…`).
    ///
    /// # Errors
    ///
    /// `Corrupt` for what is not a SHA-256 or SHA-512 digest.
    pub fn like(digest: &str) -> Result<Hasher> {
        match parse_digest(digest)?.0 {
            "sha512" => Ok(Hasher::Sha512(Sha512::new())),
            _ => Ok(Hasher::Sha256(Sha256::new())),
        }
    }

    /// For SHA-256.
    pub fn sha256() -> Hasher {
        Hasher::Sha256(Sha256::new())
    }

    /// Adds bytes.
    pub fn update(&mut self, data: &[u8]) {
        match self {
            Hasher::Sha256(hasher) => hasher.update(data),
            Hasher::Sha512(hasher) => hasher.update(data),
        }
    }

    /// The digest with its algorithm in front.
    pub fn finish(self) -> String {
        match self {
            Hasher::Sha256(hasher) => format!("sha256:{}", hex(&hasher.finalize())),
            Hasher::Sha512(hasher) => format!("sha512:{}", hex(&hasher.finalize())),
        }
    }
}

/// Bytes in hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    let mut text = String::with_capacity(bytes.len() * 2);
    for byte in bytes {
        // Writing to a string cannot fail.
        let _ = write!(text, "{byte:02x}");
    }
    text
}

/// Takes `sha256:…` or `sha512:…` apart into algorithm and hexadecimal digits.
///
/// # Errors
///
/// `Corrupt` for anything else, so that a digest can be part of a path.
pub(super) fn parse_digest(digest: &str) -> Result<(&str, &str)> {
    let parts = digest.split_once(':').filter(|(algorithm, digits)| {
        let length = match *algorithm {
            "sha256" => 64,
            "sha512" => 128,
            _ => return false,
        };
        digits.len() == length
            && digits
                .bytes()
                .all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
    });
    parts.ok_or_else(|| {
        Error::new(
            ErrorKind::Corrupt,
            format!("{digest:?} is not a sha256 or sha512 digest"),
        )
    })
}

/// Hashes and counts what is read through it.
struct Hashing<R> {
    input: R,
    hasher: Option<Hasher>,
    progress: Option<Progress<'static>>,
}

impl<R: Read> Read for Hashing<R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        vellum_base::interrupt::check_io()?;
        let count = self.input.read(into)?;
        if let Some(hasher) = &mut self.hasher {
            hasher.update(into.split_at(count).0);
        }
        if let Some(progress) = &mut self.progress {
            progress(count as u64);
        }
        Ok(count)
    }
}

type Blob = BufReader<Hashing<Take<Box<dyn Read + Send>>>>;

/// The uncompressed tar of a layer.
///
/// It checks the blob's digest and the layer's diff_id while it is read; the read that would
/// report the end fails instead when either does not match, so a reader that saw the end has
/// seen the right bytes. The error inside is an [`Error`] of kind `Corrupt`.
pub struct LayerReader {
    decoder: Decoder<Blob>,
    diff: Option<Hasher>,
    digest: Option<String>,
    diff_id: String,
}

impl LayerReader {
    /// Reads the layer `layer` from `blob`, which holds it as stored.
    pub(super) fn new(
        blob: Box<dyn Read + Send>,
        layer: &LayerRef,
        progress: Option<Progress<'static>>,
    ) -> Result<LayerReader> {
        let hasher = layer.digest.as_deref().map(Hasher::like).transpose()?;
        let blob = Hashing {
            input: blob.take(layer.size),
            hasher,
            progress,
        };
        Ok(LayerReader {
            decoder: Decoder::new(buffered(blob))?,
            diff: Some(Hasher::like(&layer.diff_id)?),
            digest: layer.digest.clone(),
            diff_id: layer.diff_id.clone(),
        })
    }

    fn check(&mut self) -> Result<()> {
        let Some(diff) = self.diff.take() else {
            return Ok(());
        };
        let blob = self
            .decoder
            .get_mut()
            .ok_or_else(|| Error::internal("the layer was left in the middle of a read"))?;
        loop {
            let count = blob
                .fill_buf()
                .map_err(|error| read_failure("reading the rest of the layer", error))?
                .len();
            if count == 0 {
                break;
            }
            blob.consume(count);
        }
        let hasher = blob.get_mut().hasher.take();
        if let (Some(expected), Some(hasher)) = (&self.digest, hasher) {
            compare("blob", expected, &hasher.finish())?;
        }
        compare("uncompressed layer", &self.diff_id, &diff.finish())
    }
}

fn compare(what: &str, expected: &str, actual: &str) -> Result<()> {
    if expected == actual {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Corrupt,
        format!("the {what} should be {expected} but is {actual}: the image is damaged"),
    ))
}

impl Read for LayerReader {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let count = self.decoder.read(into)?;
        if count == 0 && !into.is_empty() {
            self.check().map_err(as_io_error)?;
        } else if let Some(diff) = &mut self.diff {
            diff.update(into.split_at(count).0);
        }
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer(data: &[u8]) -> LayerRef {
        let digest = format!("sha256:{}", hex(&Sha256::digest(data)));
        LayerRef {
            diff_id: digest.clone(),
            digest: Some(digest),
            media_type: String::new(),
            size: data.len() as u64,
        }
    }

    fn read(data: &[u8], layer: &LayerRef) -> Result<Vec<u8>> {
        let mut reader = LayerReader::new(Box::new(io::Cursor::new(data.to_vec())), layer, None)?;
        let mut out = Vec::new();
        match reader.read_to_end(&mut out) {
            Ok(_) => Ok(out),
            Err(error) => Err(read_failure("reading", error)),
        }
    }

    #[test]
    fn the_right_bytes_pass() {
        assert_eq!(read(b"layer", &layer(b"layer")).unwrap(), b"layer");
    }

    #[test]
    fn a_wrong_digest_a_wrong_diff_id_and_missing_bytes_are_corrupt() {
        let good = layer(b"layer");
        for (data, layer) in [
            (&b"later"[..], good.clone()),
            (&b"laye"[..], good.clone()),
            (
                &b"layer"[..],
                LayerRef {
                    diff_id: layer(b"x").diff_id,
                    ..good.clone()
                },
            ),
        ] {
            let error = read(data, &layer).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt);
            assert!(error.to_string().contains("should be sha256:"), "{error}");
        }
    }

    #[test]
    fn digests_that_could_be_paths_are_refused() {
        assert!(parse_digest(&format!("sha256:{}", "a".repeat(64))).is_ok());
        assert!(parse_digest(&format!("sha256:{}", "A".repeat(64))).is_err());
        assert!(parse_digest("sha256:../../etc/passwd").is_err());
        assert!(parse_digest("md5:aaaa").is_err());
        assert!(parse_digest("").is_err());
    }
}
