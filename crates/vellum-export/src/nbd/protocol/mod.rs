//! The NBD wire format: constants, and pure functions between bytes and values.
//!
//! The source is the NBD project's `doc/proto.md` ("The NBD protocol"); names here are its names
//! without the `NBD_` prefix. Everything on the wire is big-endian. Nothing in this file does I/O
//! or allocates more than its input is long, so that all of it can be fuzzed.

mod message;

pub use message::{ChunkHeader, Command, Errno, Headers, Request, simple_reply};

use vellum_base::error::{Error, ErrorKind};

/// First word of the server's greeting, `NBDMAGIC`.
pub const GREETING_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// Second word of the greeting and first of every option, `IHAVEOPT`.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// First word of every reply to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// First word of every request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// First word of a simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// First word of a chunk of a structured reply with compact headers.
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;

/// First word of every request with extended headers.
pub const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
/// First word of every chunk with extended headers.
pub const EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

/// The longest string (an export's name, a query) that the protocol allows, in bytes.
pub const MAX_STRING: usize = 4096;
/// The longest payload of a request or a reply, in bytes: what clients may count on everywhere.
pub const MAX_PAYLOAD: u32 = 32 << 20;
/// The block size that the server suggests, in bytes.
pub const PREFERRED_BLOCK: u32 = 4096;

/// Handshake flag: fixed newstyle, options get replies.
pub const FLAG_FIXED_NEWSTYLE: u16 = 1 << 0;
/// Handshake flag: the 124 zero bytes after `OPT_EXPORT_NAME` can be left out.
pub const FLAG_NO_ZEROES: u16 = 1 << 1;

/// Transmission flags, sent with an export's size.
pub mod transmission_flag {
    #![allow(missing_docs)]
    pub const HAS_FLAGS: u16 = 1 << 0;
    pub const READ_ONLY: u16 = 1 << 1;
    pub const SEND_FLUSH: u16 = 1 << 2;
    pub const SEND_FUA: u16 = 1 << 3;
    pub const SEND_TRIM: u16 = 1 << 5;
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    pub const SEND_DF: u16 = 1 << 7;
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    pub const SEND_CACHE: u16 = 1 << 10;
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
}

/// Options that a client sends before transmission.
pub mod option {
    #![allow(missing_docs)]
    pub const EXPORT_NAME: u32 = 1;
    pub const ABORT: u32 = 2;
    pub const LIST: u32 = 3;
    pub const STARTTLS: u32 = 5;
    pub const INFO: u32 = 6;
    pub const GO: u32 = 7;
    pub const STRUCTURED_REPLY: u32 = 8;
    pub const LIST_META_CONTEXT: u32 = 9;
    pub const SET_META_CONTEXT: u32 = 10;
    pub const EXTENDED_HEADERS: u32 = 11;
}

/// Types of replies to options; those with the top bit set are errors.
pub mod option_reply {
    #![allow(missing_docs)]
    pub const ACK: u32 = 1;
    pub const SERVER: u32 = 2;
    pub const INFO: u32 = 3;
    pub const META_CONTEXT: u32 = 4;
    pub const ERR_UNSUP: u32 = (1 << 31) + 1;
    pub const ERR_POLICY: u32 = (1 << 31) + 2;
    pub const ERR_INVALID: u32 = (1 << 31) + 3;
    pub const ERR_TLS_REQD: u32 = (1 << 31) + 5;
    pub const ERR_UNKNOWN: u32 = (1 << 31) + 6;
    pub const ERR_SHUTDOWN: u32 = (1 << 31) + 7;
    pub const ERR_TOO_BIG: u32 = (1 << 31) + 9;
    pub const ERR_EXT_HEADER_REQD: u32 = (1 << 31) + 10;
}

/// Kinds of information in replies to `INFO` and `GO`.
pub mod info {
    #![allow(missing_docs)]
    pub const EXPORT: u16 = 0;
    pub const NAME: u16 = 1;
    pub const DESCRIPTION: u16 = 2;
    pub const BLOCK_SIZE: u16 = 3;
}

/// Flags of a request.
pub mod command_flag {
    #![allow(missing_docs)]
    pub const FUA: u16 = 1 << 0;
    pub const NO_HOLE: u16 = 1 << 1;
    pub const DF: u16 = 1 << 2;
    pub const REQ_ONE: u16 = 1 << 3;
    pub const FAST_ZERO: u16 = 1 << 4;
    pub const PAYLOAD_LEN: u16 = 1 << 5;
}

/// Types of chunks of a structured reply.
pub mod chunk {
    #![allow(missing_docs)]
    pub const NONE: u16 = 0;
    pub const OFFSET_DATA: u16 = 1;
    pub const OFFSET_HOLE: u16 = 2;
    pub const BLOCK_STATUS: u16 = 5;
    pub const BLOCK_STATUS_EXT: u16 = 6;
    pub const ERROR: u16 = (1 << 15) + 1;
    /// Flag: the last chunk of its reply.
    pub const FLAG_DONE: u16 = 1 << 0;
}

/// The metadata context that every export has.
pub const BASE_ALLOCATION: &str = "base:allocation";
/// The number that stands for [`BASE_ALLOCATION`] in replies; those of an export's own contexts follow.
pub const BASE_ALLOCATION_ID: u32 = 1;
/// `base:allocation` status bit: takes no space.
pub const STATE_HOLE: u32 = 1 << 0;
/// `base:allocation` status bit: reads as zeros.
pub const STATE_ZERO: u32 = 1 << 1;

/// Takes fixed-width fields from the front of a byte slice.
#[derive(Debug, Clone, Copy)]
pub struct Fields<'a>(pub &'a [u8]);

impl<'a> Fields<'a> {
    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*head)
    }

    /// The next 16 bits.
    pub fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    /// The next 32 bits.
    pub fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    /// The next 64 bits.
    pub fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }

    /// A 32-bit length and so many bytes of UTF-8.
    fn string(&mut self) -> Result<&'a str, &'static str> {
        let len = self.u32().ok_or("the data ends within a string's length")? as usize;
        let (text, rest) = self
            .0
            .split_at_checked(len)
            .ok_or("a string is longer than the data")?;
        self.0 = rest;
        name(text)
    }
}

/// Checks a string of the protocol: UTF-8, no NUL, at most [`MAX_STRING`] bytes.
///
/// # Errors
/// What is wrong with it, as a text for the client.
pub fn name(bytes: &[u8]) -> Result<&str, &'static str> {
    if bytes.len() > MAX_STRING {
        return Err("a string is longer than 4096 bytes");
    }
    if bytes.contains(&0) {
        return Err("a string holds a NUL byte");
    }
    std::str::from_utf8(bytes).map_err(|_| "a string is not UTF-8")
}

/// An option's header: its number and how long its data is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OptionHeader {
    /// Number of the option, known or not.
    pub option: u32,
    /// Length of the data that follows, in bytes.
    pub len: u32,
}

impl OptionHeader {
    /// Length on the wire, in bytes.
    pub const WIRE_LEN: usize = 16;

    /// Parses the header.
    ///
    /// # Errors
    /// [`ErrorKind::Protocol`] for a wrong magic.
    pub fn parse(bytes: &[u8; Self::WIRE_LEN]) -> Result<OptionHeader, Error> {
        let mut fields = Fields(bytes);
        match (fields.u64(), fields.u32(), fields.u32()) {
            (Some(OPTION_MAGIC), Some(option), Some(len)) => Ok(OptionHeader { option, len }),
            _ => Err(Error::new(
                ErrorKind::Protocol,
                "the client sent something else where an option begins with IHAVEOPT",
            )),
        }
    }
}

/// The data of `INFO` and `GO`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InfoRequest<'a> {
    /// The export's name, empty for the default one.
    pub name: &'a str,
    /// Bitmask over the kinds of [`info`] below 16 that the client asks for.
    pub wanted: u16,
}

impl<'a> InfoRequest<'a> {
    /// Parses an option's data.
    ///
    /// # Errors
    /// What is wrong, as a text for the client.
    pub fn parse(data: &'a [u8]) -> Result<Self, &'static str> {
        let mut fields = Fields(data);
        let name = fields.string()?;
        let count = fields.u16().ok_or("the number of requests is missing")?;
        if fields.0.len() != usize::from(count) * 2 {
            return Err("the number of requests does not fit the length of the data");
        }
        let mut wanted = 0;
        while let Some(kind) = fields.u16() {
            // Kinds that this server does not know are not answered.
            wanted |= 1u16.checked_shl(kind.into()).unwrap_or(0);
        }
        Ok(InfoRequest { name, wanted })
    }

    /// True when the client asked for that kind of information.
    pub fn wants(&self, kind: u16) -> bool {
        assert!(
            kind < 16,
            "the kinds of information are numbered from 0 to 4"
        );
        self.wanted & (1 << kind) != 0
    }
}

/// The data of `LIST_META_CONTEXT` and `SET_META_CONTEXT`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MetaRequest<'a> {
    /// The export's name, empty for the default one.
    pub name: &'a str,
    /// Names of contexts, and the beginnings of such.
    pub queries: Vec<&'a str>,
}

impl<'a> MetaRequest<'a> {
    /// Parses an option's data.
    ///
    /// # Errors
    /// What is wrong, as a text for the client.
    pub fn parse(data: &'a [u8]) -> Result<Self, &'static str> {
        let mut fields = Fields(data);
        let name = fields.string()?;
        let count = fields.u32().ok_or("the number of queries is missing")?;
        let mut queries = Vec::new();
        // Every query takes at least 4 bytes, so a wild count ends at the end of the data.
        for _ in 0..count {
            let query = fields.string()?;
            if !query.contains(':') {
                return Err("a query names no namespace: use base:allocation");
            }
            queries.push(query);
        }
        if !fields.0.is_empty() {
            return Err("there is more data than the queries take");
        }
        Ok(MetaRequest { name, queries })
    }

    /// Whether a context is listed: one that is asked for, one of a namespace or a kind that is
    /// (`base:`, `qemu:dirty-bitmap:`), and each where nothing is asked for.
    pub fn lists(&self, context: &str) -> bool {
        let asked = |query: &&str| match query.ends_with(':') {
            true => context.starts_with(query),
            false => context == *query,
        };
        self.queries.is_empty() || self.queries.iter().any(asked)
    }

    /// Whether a context is selected: one that is asked for by its whole name.
    pub fn selects(&self, context: &str) -> bool {
        self.queries.contains(&context)
    }
}

/// Appends a reply to an option.
pub fn push_option_reply(out: &mut Vec<u8>, option: u32, kind: u32, data: &[&[u8]]) {
    let len: usize = data.iter().map(|part| part.len()).sum();
    out.extend_from_slice(&OPTION_REPLY_MAGIC.to_be_bytes());
    out.extend_from_slice(&option.to_be_bytes());
    out.extend_from_slice(&kind.to_be_bytes());
    // Replies are at most a name and a description, both bounded.
    out.extend_from_slice(&(len as u32).to_be_bytes());
    for part in data {
        out.extend_from_slice(part);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn info_requests_with_wrong_counts_or_lengths_are_refused() {
        let good = [0, 0, 0, 1, b'a', 0, 2, 0, 1, 0, 3];
        let parsed = InfoRequest::parse(&good).unwrap();
        assert_eq!(parsed.name, "a");
        assert!(parsed.wants(info::NAME) && parsed.wants(info::BLOCK_SIZE));
        assert!(!parsed.wants(info::DESCRIPTION));
        for len in 0..good.len() {
            assert!(InfoRequest::parse(&good[..len]).is_err(), "{len} bytes");
        }
        let mut long = good.to_vec();
        long.push(0);
        assert!(InfoRequest::parse(&long).is_err());
        assert!(InfoRequest::parse(&[0xff; 16]).is_err());
        // A kind of information beyond the mask is passed over, as unknown ones are.
        let unknown = InfoRequest::parse(&[0, 0, 0, 0, 0, 1, 0xff, 0xff]).unwrap();
        assert_eq!(unknown.wanted, 0);
    }

    #[test]
    fn meta_requests_select_whole_names_and_list_beginnings_too() {
        let mut data = vec![0, 0, 0, 0, 0, 0, 0, 2];
        for query in ["qemu:dirty-bitmap:", BASE_ALLOCATION] {
            data.extend((query.len() as u32).to_be_bytes());
            data.extend(query.as_bytes());
        }
        let parsed = MetaRequest::parse(&data).unwrap();
        assert!(parsed.selects(BASE_ALLOCATION) && parsed.lists(BASE_ALLOCATION));
        let bitmap = "qemu:dirty-bitmap:monday";
        assert!(parsed.lists(bitmap) && !parsed.selects(bitmap));
        assert!(!parsed.lists("qemu:allocation-depth"));
        let all = MetaRequest::parse(&[0; 8]).unwrap();
        assert!(all.lists(bitmap) && !all.selects(bitmap));
        for len in 0..data.len() {
            assert!(MetaRequest::parse(&data[..len]).is_err(), "{len} bytes");
        }
        data.push(0);
        assert!(MetaRequest::parse(&data).is_err());
    }

    #[test]
    fn a_query_count_beyond_the_data_is_refused_and_not_allocated_for() {
        assert!(MetaRequest::parse(&[0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]).is_err());
    }

    #[test]
    fn names_must_be_short_utf8_without_nul() {
        assert_eq!(name("größe".as_bytes()), Ok("größe"));
        assert!(name(&[0xff]).is_err());
        assert!(name(b"a\0b").is_err());
        assert!(name(&[b'a'; MAX_STRING]).is_ok());
        assert!(name(&[b'a'; MAX_STRING + 1]).is_err());
    }

    #[test]
    fn replies_to_options_have_the_protocols_layout() {
        let mut out = Vec::new();
        push_option_reply(&mut out, option::GO, option_reply::ACK, &[b"ab", b"c"]);
        assert_eq!(out.len(), 23);
        assert_eq!(
            &out[8..],
            [0, 0, 0, 7, 0, 0, 0, 1, 0, 0, 0, 3, b'a', b'b', b'c']
        );
    }
}
