//! Compression, told by the first bytes and never by a name.

use std::io::{self, BufRead, BufReader, Read, Write};

use vellum_base::{Error, ErrorKind, Result};

/// How a stream is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Compression {
    /// Not at all.
    #[default]
    None,
    /// gzip, of any number of members.
    Gzip,
    /// Zstandard, of any number of frames, skippable ones included.
    Zstd,
}

/// The largest window that a zstd frame may ask for: the most that the format's own decoder can do
/// (`zstd --long=31`). Memory is taken as far as the content fills it, so that a small frame which
/// asks for much costs little.
const ZSTD_WINDOW_LOG: u32 = 31;

impl Compression {
    /// Tells it by `head`, the first bytes of a stream.
    ///
    /// # Errors
    ///
    /// `Unsupported` for xz, bzip2, lz4 and the like, with the command that helps.
    pub fn detect(head: &[u8]) -> Result<Compression> {
        let foreign = |name: &str, tool: &str| {
            Err(Error::new(
                ErrorKind::Unsupported,
                format!(
                    "it is compressed with {name}, which is not read here: \
                     decompress it first ({tool}) or pipe it to a source of \"-\""
                ),
            ))
        };
        match head {
            [0x1f, 0x8b, ..] => Ok(Compression::Gzip),
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Ok(Compression::Zstd),
            // A skippable frame, with which some writers begin.
            [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Ok(Compression::Zstd),
            [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => foreign("xz", "xz -d"),
            [b'B', b'Z', b'h', b'1'..=b'9', b'1', b'A', b'Y', ..] => foreign("bzip2", "bzip2 -d"),
            [0x04, 0x22, 0x4d, 0x18, ..] => foreign("lz4", "lz4 -d"),
            [b'P', b'K', 3, 4, ..] => foreign("zip", "unzip"),
            [b'7', b'z', 0xbc, 0xaf, ..] => foreign("7z", "7z x"),
            _ => Ok(Compression::None),
        }
    }

    /// The OCI media type of a layer that is compressed so.
    pub fn layer_media_type(self) -> String {
        let suffix = match self {
            Compression::None => "",
            Compression::Gzip => "+gzip",
            Compression::Zstd => "+zstd",
        };
        format!("application/vnd.oci.image.layer.v1.tar{suffix}")
    }
}

/// A stream with its compression undone.
pub(super) enum Decoder<R: BufRead> {
    Plain(R),
    Gzip(Members<R>),
    Zstd(zstd::Decoder<'static, R>),
}

impl<R: BufRead> Decoder<R> {
    /// Looks at the first bytes of `input` and undoes what it finds.
    pub fn new(mut input: R) -> Result<Decoder<R>> {
        let head = input
            .fill_buf()
            .map_err(|error| super::read_failure("reading the first bytes", error))?;
        Ok(match Compression::detect(head)? {
            Compression::None => Decoder::Plain(input),
            Compression::Gzip => Decoder::Gzip(Members::new(input)),
            Compression::Zstd => {
                let mut decoder = zstd::Decoder::with_buffer(input)
                    .map_err(|error| Error::io("starting zstd", error))?;
                decoder
                    .window_log_max(ZSTD_WINDOW_LOG)
                    .map_err(|error| Error::io("starting zstd", error))?;
                Decoder::Zstd(decoder)
            }
        })
    }

    /// What it reads from, which is out of reach only in the middle of a call.
    pub fn get_mut(&mut self) -> Option<&mut R> {
        match self {
            Decoder::Plain(input) => Some(input),
            Decoder::Gzip(Members::Member(member)) => Some(member.get_mut()),
            Decoder::Gzip(Members::Ended(input)) => Some(input),
            Decoder::Gzip(Members::Between) => None,
            Decoder::Zstd(decoder) => Some(decoder.get_mut()),
        }
    }
}

impl<R: BufRead> Read for Decoder<R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let (name, result) = match self {
            Decoder::Plain(input) => return input.read(into),
            Decoder::Gzip(decoder) => ("gzip", decoder.read(into)),
            Decoder::Zstd(decoder) => ("zstd", decoder.read(into)),
        };
        result.map_err(|error| match error.kind() {
            // An error of the reader below is none of the data's fault.
            io::ErrorKind::Interrupted => error,
            _ if error.raw_os_error().is_some() => error,
            _ if error.get_ref().is_some_and(|inner| inner.is::<Error>()) => error,
            _ => super::as_io_error(Error::with_source(
                ErrorKind::Corrupt,
                format!("the {name} data is damaged or cut off"),
                error,
            )),
        })
    }
}

/// A gzip stream of any number of members. Zeros behind the last one are padding, as gzip(1) takes
/// them: tapes and block devices leave them.
pub(super) enum Members<R: BufRead> {
    Member(flate2::bufread::GzDecoder<R>),
    /// All was read, or what follows is no member.
    Ended(R),
    /// Only while one gives way to the next.
    Between,
}

impl<R: BufRead> Members<R> {
    fn new(input: R) -> Self {
        Members::Member(flate2::bufread::GzDecoder::new(input))
    }

    /// Goes on to the next member; false at the end.
    fn advance(&mut self) -> io::Result<bool> {
        let mut input = match std::mem::replace(self, Members::Between) {
            Members::Member(done) => done.into_inner(),
            other => {
                *self = other;
                return Ok(false);
            }
        };
        let more = has_member(&mut input);
        *self = match more {
            Ok(true) => Members::new(input),
            _ => Members::Ended(input),
        };
        more
    }
}

/// Whether another gzip member follows, rather than padding and the end.
fn has_member(input: &mut impl BufRead) -> io::Result<bool> {
    let mut padded = false;
    loop {
        let next = input.fill_buf()?;
        let zeros = next.iter().take_while(|byte| **byte == 0).count();
        let (ends, is_empty) = (zeros == next.len(), next.is_empty());
        if !ends {
            return match padded || zeros > 0 {
                true => Err(io::Error::other("there is data behind its padding")),
                false => Ok(true),
            };
        }
        if is_empty {
            return Ok(false);
        }
        padded = true;
        input.consume(zeros);
    }
}

impl<R: BufRead> Read for Members<R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        while let Members::Member(member) = self {
            let count = member.read(into)?;
            if count > 0 || into.is_empty() || !self.advance()? {
                return Ok(count);
            }
        }
        Ok(0)
    }
}

/// A reader with a buffer large enough for a look at its head.
pub(super) fn buffered<R: Read>(input: R) -> BufReader<R> {
    BufReader::with_capacity(128 * 1024, input)
}

/// Compresses what is written to it.
pub(super) enum Encoder<W: Write> {
    Plain(W),
    Gzip(flate2::write::GzEncoder<W>),
    Zstd(zstd::Encoder<'static, W>),
}

impl<W: Write> Encoder<W> {
    /// Compresses into `output`, at the level that the format's own tools take.
    pub fn new(output: W, compression: Compression) -> io::Result<Encoder<W>> {
        Ok(match compression {
            Compression::None => Encoder::Plain(output),
            Compression::Gzip => Encoder::Gzip(flate2::write::GzEncoder::new(
                output,
                flate2::Compression::default(),
            )),
            Compression::Zstd => Encoder::Zstd(zstd::Encoder::new(output, 3)?),
        })
    }

    /// Writes what is held back and gives the output back.
    pub fn finish(self) -> io::Result<W> {
        match self {
            Encoder::Plain(output) => Ok(output),
            Encoder::Gzip(encoder) => encoder.finish(),
            Encoder::Zstd(encoder) => encoder.finish(),
        }
    }
}

impl<W: Write> Write for Encoder<W> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        match self {
            Encoder::Plain(output) => output.write(data),
            Encoder::Gzip(encoder) => encoder.write(data),
            Encoder::Zstd(encoder) => encoder.write(data),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Encoder::Plain(output) => output.flush(),
            Encoder::Gzip(encoder) => encoder.flush(),
            Encoder::Zstd(encoder) => encoder.flush(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(data: &[u8]) -> io::Result<Vec<u8>> {
        let mut out = Vec::new();
        Decoder::new(data).unwrap().read_to_end(&mut out)?;
        Ok(out)
    }

    fn encode(data: &[u8], compression: Compression) -> Vec<u8> {
        let mut encoder = Encoder::new(Vec::new(), compression).unwrap();
        encoder.write_all(data).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn every_compression_comes_back() {
        for compression in [Compression::None, Compression::Gzip, Compression::Zstd] {
            assert_eq!(decode(&encode(b"hello", compression)).unwrap(), b"hello");
        }
    }

    #[test]
    fn several_gzip_members_and_zstd_frames_are_one_stream() {
        for compression in [Compression::Gzip, Compression::Zstd] {
            let mut data = encode(b"one ", compression);
            data.extend(encode(b"two", compression));
            assert_eq!(decode(&data).unwrap(), b"one two");
        }
    }

    #[test]
    fn skippable_zstd_frames_are_passed_over_at_either_end() {
        let skippable = [0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 1, 2, 3];
        let mut data = skippable.to_vec();
        data.extend(encode(b"data", Compression::Zstd));
        data.extend(skippable);
        assert_eq!(decode(&data).unwrap(), b"data");
    }

    #[test]
    fn zeros_behind_gzip_are_padding_and_anything_else_there_is_corrupt() {
        let mut data = encode(b"one ", Compression::Gzip);
        data.extend(encode(b"two", Compression::Gzip));
        data.extend([0; 10_000]);
        assert_eq!(decode(&data).unwrap(), b"one two");
        for behind in [&b"x"[..], b"\0\0x"] {
            let mut data = encode(b"one", Compression::Gzip);
            data.extend(behind);
            let error = crate::read_failure("x", decode(&data).unwrap_err());
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
        }
    }

    #[test]
    fn zstd_with_a_window_of_two_gigabytes_is_read() {
        // As `zstd --long=31` writes a stream: the frame's magic, no flags, the window's exponent,
        // and one raw block.
        let frame = b"\x28\xb5\x2f\xfd\x00\xa8\x21\x00\x00data";
        assert_eq!(decode(frame).unwrap(), b"data");
    }

    #[test]
    fn cut_off_data_is_corrupt() {
        for compression in [Compression::Gzip, Compression::Zstd] {
            let data = encode(&[7; 10_000], compression);
            let error = decode(&data[..data.len() - 5]).unwrap_err();
            let error = crate::read_failure("x", error);
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
        }
    }

    #[test]
    fn foreign_compressions_are_named_with_the_tool_that_helps() {
        let error = Compression::detect(b"\xfd7zXZ\0\0").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(error.to_string().contains("xz -d"), "{error}");
        assert!(Compression::detect(b"BZh91AY&SY").is_err());
        assert_eq!(Compression::detect(b"").unwrap(), Compression::None);
    }
}
