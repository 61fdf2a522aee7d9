//! Messages of the transmission phase: requests, and the headers of replies.

use super::{
    EXTENDED_REPLY_MAGIC, EXTENDED_REQUEST_MAGIC, Fields, MAX_PAYLOAD, REQUEST_MAGIC,
    SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC, command_flag,
};
use vellum_base::error::{Error, ErrorKind};

/// How requests and replies are framed, as the handshake settled it. Each can what those before it can.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Headers {
    /// Compact requests, simple replies.
    #[default]
    Simple,
    /// Compact requests, replies in chunks: `OPT_STRUCTURED_REPLY`.
    Structured,
    /// Lengths of 64 bits in requests and replies, all of them in chunks: `OPT_EXTENDED_HEADERS`.
    Extended,
}

impl Headers {
    /// The length of a request's header in bytes.
    pub const fn request_len(self) -> usize {
        match self {
            Headers::Simple | Headers::Structured => 28,
            Headers::Extended => 32,
        }
    }

    /// The first word of a request.
    pub const fn request_magic(self) -> u32 {
        match self {
            Headers::Simple | Headers::Structured => REQUEST_MAGIC,
            Headers::Extended => EXTENDED_REQUEST_MAGIC,
        }
    }

    /// True where replies come in chunks.
    pub fn chunks(self) -> bool {
        self >= Headers::Structured
    }
}

/// What a request asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Command {
    /// Bytes of the export.
    Read,
    /// Store the bytes that follow the request.
    Write,
    /// The client goes away; no reply.
    Disconnect,
    /// Make everything written so far durable.
    Flush,
    /// The range is no longer needed.
    Trim,
    /// A hint that the range will be read.
    Cache,
    /// Make the range read as zeros.
    WriteZeroes,
    /// Which parts of the range are data, which are holes.
    BlockStatus,
}

impl Command {
    /// The command of that number, if there is one.
    pub fn from_wire(number: u16) -> Option<Command> {
        Some(match number {
            0 => Command::Read,
            1 => Command::Write,
            2 => Command::Disconnect,
            3 => Command::Flush,
            4 => Command::Trim,
            5 => Command::Cache,
            6 => Command::WriteZeroes,
            7 => Command::BlockStatus,
            _ => return None,
        })
    }

    /// The flags that a client may set with it, beside FUA, which is valid with all.
    pub fn valid_flags(self, headers: Headers) -> u16 {
        command_flag::FUA
            | match self {
                Command::Read => command_flag::DF,
                Command::Write if headers == Headers::Extended => command_flag::PAYLOAD_LEN,
                Command::WriteZeroes => command_flag::NO_HOLE | command_flag::FAST_ZERO,
                Command::BlockStatus => command_flag::REQ_ONE,
                _ => 0,
            }
    }
}

/// An error number in a reply. The protocol fixes the values, whatever the host's errno are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Errno {
    /// A write to a read-only export.
    Perm = 1,
    /// The storage failed.
    Io = 5,
    /// No such range, command or flag.
    Inval = 22,
    /// The host is full, or a write reaches beyond the end.
    NoSpc = 28,
    /// Too long to be answered in one piece.
    Overflow = 75,
    /// Understood, but not possible (fast).
    NotSup = 95,
    /// The server stops.
    Shutdown = 108,
}

impl From<ErrorKind> for Errno {
    fn from(kind: ErrorKind) -> Errno {
        match kind {
            ErrorKind::InvalidInput | ErrorKind::OutOfRange => Errno::Inval,
            ErrorKind::NoSpace => Errno::NoSpc,
            ErrorKind::ReadOnly | ErrorKind::Permission => Errno::Perm,
            ErrorKind::Unsupported => Errno::NotSup,
            _ => Errno::Io,
        }
    }
}

/// A request's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// Bits of [`command_flag`].
    pub flags: u16,
    /// Number of the command, known or not.
    pub command: u16,
    /// What the client calls the request; the reply repeats it.
    pub cookie: u64,
    /// First byte.
    pub offset: u64,
    /// Length in bytes; of 32 bits where headers are compact.
    pub len: u64,
}

impl Request {
    /// The header that `bytes` starts with; `None` when they are too few.
    ///
    /// # Errors
    /// [`ErrorKind::Protocol`] for a wrong magic: where the next request begins is then unknown.
    pub fn parse(bytes: &[u8], headers: Headers) -> Result<Option<Request>, Error> {
        let mut fields = Fields(bytes);
        let Some(magic) = fields.u32() else {
            return Ok(None);
        };
        let expected = headers.request_magic();
        if magic != expected {
            return Err(Error::new(
                ErrorKind::Protocol,
                format!(
                    "the client sent {magic:#010x} where a request begins with {expected:#010x}"
                ),
            ));
        }
        let mut rest = || {
            Some(Request {
                flags: fields.u16()?,
                command: fields.u16()?,
                cookie: fields.u64()?,
                offset: fields.u64()?,
                len: match headers {
                    Headers::Simple | Headers::Structured => fields.u32()?.into(),
                    Headers::Extended => fields.u64()?,
                },
            })
        };
        Ok(rest())
    }

    /// Bytes that follow the header, whatever becomes of the request.
    pub fn payload_len(&self, headers: Headers) -> u64 {
        let announced = headers == Headers::Extended && self.flags & command_flag::PAYLOAD_LEN != 0;
        // A write has one also where the flag is missing, which the protocol wants there.
        if announced || Command::from_wire(self.command) == Some(Command::Write) {
            self.len
        } else {
            0
        }
    }

    /// True where a read or a write is longer than clients may count on.
    pub fn is_too_long(&self) -> bool {
        self.len > MAX_PAYLOAD.into()
    }
}

/// A simple reply's header.
pub fn simple_reply(error: u32, cookie: u64) -> [u8; 16] {
    let mut bytes = [0; 16];
    put(
        &mut bytes,
        &[
            &SIMPLE_REPLY_MAGIC.to_be_bytes(),
            &error.to_be_bytes(),
            &cookie.to_be_bytes(),
        ],
    );
    bytes
}

/// The header of a chunk of a reply.
#[derive(Debug, Clone, Copy)]
pub struct ChunkHeader {
    bytes: [u8; 32],
    len: usize,
}

impl ChunkHeader {
    /// That of a chunk whose payload has `len` bytes, of the reply to `request`.
    pub fn new(headers: Headers, flags: u16, kind: u16, request: &Request, len: u32) -> Self {
        let (flags, kind) = (flags.to_be_bytes(), kind.to_be_bytes());
        let cookie = request.cookie.to_be_bytes();
        let mut bytes = [0; 32];
        let len = if headers == Headers::Extended {
            let magic = EXTENDED_REPLY_MAGIC.to_be_bytes();
            let offset = request.offset.to_be_bytes();
            let payload = u64::from(len).to_be_bytes();
            put(
                &mut bytes,
                &[&magic, &flags, &kind, &cookie, &offset, &payload],
            );
            32
        } else {
            let magic = STRUCTURED_REPLY_MAGIC.to_be_bytes();
            put(
                &mut bytes,
                &[&magic, &flags, &kind, &cookie, &len.to_be_bytes()],
            );
            20
        };
        ChunkHeader { bytes, len }
    }

    /// As it goes to the client.
    pub fn bytes(&self) -> &[u8] {
        self.bytes.split_at(self.len).0
    }
}

/// Copies `fields` one after the other into `bytes`, as far as they fit.
fn put(bytes: &mut [u8], fields: &[&[u8]]) {
    let mut rest = bytes;
    for field in fields {
        let Some((target, tail)) = rest.split_at_mut_checked(field.len()) else {
            return;
        };
        target.copy_from_slice(field);
        rest = tail;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nbd::protocol::chunk;

    fn request(magic: u32) -> Vec<u8> {
        let mut bytes = magic.to_be_bytes().to_vec();
        bytes.extend([0, 1, 0, 7]);
        bytes.extend(0x0102_0304_0506_0708u64.to_be_bytes());
        bytes.extend(4096u64.to_be_bytes());
        bytes.extend(512u32.to_be_bytes());
        bytes
    }

    #[test]
    fn a_request_is_parsed_field_by_field() {
        let parsed = Request::parse(&request(REQUEST_MAGIC), Headers::Simple)
            .unwrap()
            .unwrap();
        assert_eq!(
            parsed,
            Request {
                flags: 1,
                command: 7,
                cookie: 0x0102_0304_0506_0708,
                offset: 4096,
                len: 512
            }
        );
    }

    #[test]
    fn an_extended_request_has_a_length_of_64_bits() {
        let mut bytes = request(EXTENDED_REQUEST_MAGIC);
        bytes.truncate(24);
        bytes.extend((5u64 << 40).to_be_bytes());
        let parsed = Request::parse(&bytes, Headers::Extended).unwrap().unwrap();
        assert_eq!((parsed.offset, parsed.len), (4096, 5 << 40));
        for len in 0..bytes.len() {
            let prefix = Request::parse(&bytes[..len], Headers::Extended);
            assert_eq!(prefix.unwrap(), None, "{len} bytes");
        }
        assert!(Request::parse(&bytes, Headers::Structured).is_err());
    }

    #[test]
    fn only_writes_and_what_says_so_have_a_payload() {
        let mut request = Request {
            flags: 0,
            command: 1,
            cookie: 0,
            offset: 0,
            len: 9,
        };
        assert_eq!(request.payload_len(Headers::Simple), 9);
        assert_eq!(request.payload_len(Headers::Extended), 9);
        request.command = 7;
        assert_eq!(request.payload_len(Headers::Extended), 0);
        request.flags = command_flag::PAYLOAD_LEN;
        assert_eq!(request.payload_len(Headers::Extended), 9);
        assert_eq!(request.payload_len(Headers::Structured), 0);
    }

    #[test]
    fn every_prefix_of_a_request_asks_for_more() {
        let bytes = request(REQUEST_MAGIC);
        for len in 0..bytes.len() {
            assert_eq!(
                Request::parse(&bytes[..len], Headers::Simple).unwrap(),
                None,
                "{len} bytes"
            );
        }
    }

    #[test]
    fn a_wrong_request_magic_is_a_protocol_error_as_soon_as_it_is_there() {
        let bytes = request(REQUEST_MAGIC ^ 1);
        for len in 4..=bytes.len() {
            let error = Request::parse(&bytes[..len], Headers::Simple).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Protocol);
        }
    }

    #[test]
    fn reply_headers_have_the_protocols_layout() {
        assert_eq!(
            simple_reply(28, 0x1122),
            [
                0x67, 0x44, 0x66, 0x98, 0, 0, 0, 28, 0, 0, 0, 0, 0, 0, 0x11, 0x22
            ]
        );
        let request = Request {
            flags: 0,
            command: 0,
            cookie: 3,
            offset: 0x99,
            len: 1,
        };
        let header =
            |headers| ChunkHeader::new(headers, chunk::FLAG_DONE, chunk::ERROR, &request, 6);
        assert_eq!(
            header(Headers::Structured).bytes(),
            [
                0x66, 0x8e, 0x33, 0xef, 0, 1, 0x80, 1, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 6
            ]
        );
        assert_eq!(
            header(Headers::Extended).bytes(),
            [
                0x6e, 0x8a, 0x27, 0x8c, 0, 1, 0x80, 1, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0,
                0x99, 0, 0, 0, 0, 0, 0, 0, 6
            ]
        );
    }
}
