//! The NBD server: what a client sends, from its first byte to its last.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read, Write};
use std::sync::Arc;

use vellum_base::block::MemoryDevice;
use vellum_export::nbd::handshake::{Handshake, Outcome};
use vellum_export::nbd::protocol::{
    self as wire, Command, Headers, Request, chunk, command_flag, option,
};
use vellum_export::nbd::{Export, MetaContext, session_over};

use crate::Seed;

/// A client that stops listening after this many bytes.
const PATIENCE: usize = 4 << 20;

/// The client's side of a connection.
struct Client<'a> {
    input: &'a [u8],
    at: usize,
    out: Vec<u8>,
    gone: bool,
}

impl<'a> Client<'a> {
    fn new(input: &'a [u8]) -> Self {
        Client {
            input,
            at: 0,
            out: Vec::new(),
            gone: false,
        }
    }
}

impl Read for Client<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let rest = &self.input[self.at..];
        let len = rest.len().min(buf.len());
        buf[..len].copy_from_slice(&rest[..len]);
        self.at += len;
        Ok(len)
    }
}

impl Write for Client<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let len = buf.len().min(PATIENCE - self.out.len());
        self.out.extend_from_slice(&buf[..len]);
        if len == 0 && !buf.is_empty() {
            self.gone = true;
            return Err(io::Error::from(io::ErrorKind::BrokenPipe));
        }
        Ok(len)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A context of an export's own, in which every other stripe of so many bytes has another number.
struct Stripes {
    name: &'static str,
    bytes: u64,
    numbers: [u32; 2],
}

impl MetaContext for Stripes {
    fn name(&self) -> &str {
        self.name
    }

    fn statuses(&self, offset: u64, len: u64, max: usize) -> vellum_base::Result<Vec<(u64, u32)>> {
        let mut runs = Vec::new();
        let mut at = offset;
        while at < offset + len && runs.len() < max {
            let stripe = at / self.bytes;
            let end = (stripe + 1) * self.bytes;
            runs.push((end - at, self.numbers[stripe as usize % 2]));
            at = end;
        }
        Ok(runs)
    }
}

/// The numbers that a context has, by its own name; `None` is `base:allocation`.
fn numbers(own: Option<&str>) -> &'static [u64] {
    match own {
        None => &[0, 1, 2, 3],
        Some("qemu:dirty-bitmap:monday") => &[0, 1],
        Some("qemu:allocation-depth") => &[2, 7],
        Some(other) => panic!("a context {other}"),
    }
}

fn exports() -> Vec<Arc<Export>> {
    let monday = Stripes {
        name: "qemu:dirty-bitmap:monday",
        bytes: 4096,
        numbers: [0, 1],
    };
    let depth = Stripes {
        name: "qemu:allocation-depth",
        bytes: 100_000,
        numbers: [2, 7],
    };
    let mut disk = Export::new("disk", Arc::new(MemoryDevice::new(1 << 20)));
    disk.contexts = vec![Arc::new(monday), Arc::new(depth)];
    let mut described = Export::new("large", Arc::new(MemoryDevice::new(40 << 20)));
    described.description = "forty MiB".into();
    let fixed = Export::new("fixed", Arc::new(MemoryDevice::new(8 << 10).read_only()));
    vec![Arc::new(disk), Arc::new(described), Arc::new(fixed)]
}

/// A session, from the greeting on: handshake and transmission.
///
/// * Before TLS, where TLS is asked for, nobody gets an export.
/// * The session does what the handshake alone does, and goes on with what that left unread.
/// * Every request gets one whole reply, in order here, with its cookie and an error number of the
///   protocol; reads get exactly the bytes that they asked for; nothing else is sent.
pub fn session(input: &[u8]) {
    let exports = exports();

    let mut client = Client::new(input);
    let mut secure = Handshake::new(&exports[..], true);
    let outcome = secure
        .greet(&mut client)
        .and_then(|()| secure.haggle(&mut client));
    assert!(!matches!(outcome, Ok(Outcome::Transmit(_))));

    let mut client = Client::new(input);
    let mut plain = Handshake::new(&exports[..], false);
    let outcome = plain
        .greet(&mut client)
        .and_then(|()| plain.haggle(&mut client));
    let (said, read) = (client.out, client.at);

    let mut client = Client::new(input);
    let _ = session_over(&mut client, &exports);
    let replies = client.out.strip_prefix(&said[..]);
    let replies = replies.expect("the handshake says something else in a session");
    match outcome {
        Ok(Outcome::Transmit(negotiated)) => {
            let own = |own: &Arc<dyn MetaContext>| numbers(Some(own.name()));
            let contexts = negotiated.contexts.iter();
            let mut check = Replies {
                rest: replies,
                headers: negotiated.headers,
                contexts: contexts
                    .map(|it| (it.id, it.own.as_ref().map_or(numbers(None), own)))
                    .collect(),
            };
            let whole = check.follow(&input[read..]);
            assert!(
                whole.is_none() || check.rest.is_empty() || client.gone,
                "{} bytes that no request asked for",
                check.rest.len()
            );
        }
        _ => assert!(replies.is_empty(), "it goes on after the handshake ended"),
    }
}

struct Replies<'a> {
    rest: &'a [u8],
    headers: Headers,
    /// Those that the client selected, and what numbers each has.
    contexts: BTreeMap<u32, &'static [u64]>,
}

impl<'a> Replies<'a> {
    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.rest.split_at_checked(len)?;
        self.rest = rest;
        Some(head)
    }

    fn field<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.take(N).map(|bytes| bytes.try_into().unwrap())
    }

    fn u16(&mut self) -> Option<u16> {
        self.field().map(u16::from_be_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.field().map(u32::from_be_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.field().map(u64::from_be_bytes)
    }

    /// Takes the reply to each of the requests in `input`; `None` where replies end in the middle
    /// of one.
    fn follow(&mut self, input: &[u8]) -> Option<()> {
        let mut input = input;
        while let Ok(Some(request)) = Request::parse(input, self.headers) {
            input = &input[self.headers.request_len()..];
            let command = Command::from_wire(request.command);
            let known = command.is_some_and(|c| request.flags & !c.valid_flags(self.headers) == 0);
            if known && command == Some(Command::Disconnect) {
                break;
            }
            let payload = request.payload_len(self.headers) as usize;
            input = input.get(payload..).unwrap_or_default();
            if self.rest.is_empty() {
                // The client was cut off within a payload, or announced an absurd one.
                break;
            }
            self.reply(&request, command)?;
        }
        Some(())
    }

    fn reply(&mut self, request: &Request, command: Option<Command>) -> Option<()> {
        let read = command == Some(Command::Read);
        let magic = self.u32()?;
        if magic == wire::SIMPLE_REPLY_MAGIC {
            let (error, cookie) = (self.u32()?, self.u64()?);
            assert_eq!(cookie, request.cookie);
            check_errno(error, true);
            let allowed = match self.headers {
                Headers::Simple => true,
                Headers::Structured => !read,
                Headers::Extended => false,
            };
            assert!(allowed, "a simple reply to {request:?}");
            if read && error == 0 {
                self.take(request.len as usize)?;
            }
            return Some(());
        }
        let mut magic = magic;
        let mut covered = 0;
        let mut failed = false;
        let mut answered = BTreeSet::new();
        loop {
            assert_eq!(magic, self.chunk_magic(), "what begins a chunk");
            let (flags, kind) = (self.u16()?, self.u16()?);
            assert_eq!(self.u64()?, request.cookie);
            let len = if self.headers == Headers::Extended {
                assert_eq!(self.u64()?, request.offset);
                self.u64()? as usize
            } else {
                self.u32()? as usize
            };
            match kind {
                chunk::OFFSET_DATA | chunk::OFFSET_HOLE if read => {
                    covered += self.read_chunk(kind, len, request.offset + covered)?;
                }
                chunk::BLOCK_STATUS | chunk::BLOCK_STATUS_EXT => {
                    assert_eq!(command, Some(Command::BlockStatus));
                    let id = self.status_chunk(kind, len, request)?;
                    assert!(answered.insert(id), "context {id} twice");
                }
                chunk::NONE => {
                    assert_eq!(self.headers, Headers::Extended);
                    assert!(!read && len == 0);
                }
                chunk::ERROR => {
                    check_errno(self.u32()?, false);
                    let text = usize::from(self.u16()?);
                    assert_eq!(len, 6 + text);
                    std::str::from_utf8(self.take(text)?).unwrap();
                    failed = true;
                }
                _ => panic!("a chunk of type {kind} for {request:?}"),
            }
            if flags & chunk::FLAG_DONE != 0 {
                break;
            }
            magic = self.u32()?;
        }
        if read && !failed {
            assert_eq!(covered, request.len);
        }
        if command == Some(Command::BlockStatus) && !failed {
            assert_eq!(answered.len(), self.contexts.len());
        }
        Some(())
    }

    fn chunk_magic(&self) -> u32 {
        match self.headers {
            Headers::Simple => panic!("a chunk that nobody agreed to"),
            Headers::Structured => wire::STRUCTURED_REPLY_MAGIC,
            Headers::Extended => wire::EXTENDED_REPLY_MAGIC,
        }
    }

    /// Takes a chunk of a read; returns how many bytes it is about.
    fn read_chunk(&mut self, kind: u16, len: usize, at: u64) -> Option<u64> {
        assert_eq!(self.u64()?, at);
        if kind == chunk::OFFSET_DATA {
            self.take(len - 8)?;
            return Some(len as u64 - 8);
        }
        assert_eq!(len, 12);
        self.u32().map(u64::from)
    }

    /// Takes what one context says of a range; returns which.
    fn status_chunk(&mut self, kind: u16, len: usize, request: &Request) -> Option<u32> {
        let id = self.u32()?;
        let numbers = *self.contexts.get(&id).expect("a context that was selected");
        let mut sum = 0;
        if kind == chunk::BLOCK_STATUS {
            assert_eq!(self.headers, Headers::Structured);
            assert!(len > 4 && (len - 4).is_multiple_of(8));
            for _ in 0..(len - 4) / 8 {
                sum += u64::from(self.u32()?);
                assert!(numbers.contains(&self.u32()?.into()));
            }
        } else {
            assert_eq!(self.headers, Headers::Extended);
            let count = self.u32()? as usize;
            assert!(count > 0 && len == 8 + 16 * count);
            for _ in 0..count {
                sum += self.u64()?;
                assert!(numbers.contains(&self.u64()?));
            }
        }
        assert!(sum <= request.len);
        Some(id)
    }
}

fn check_errno(error: u32, may_be_none: bool) {
    let known = [1, 5, 12, 22, 28, 75, 95, 108];
    assert!(
        (may_be_none && error == 0) || known.contains(&error),
        "{error}"
    );
}

fn options(list: &[(u32, Vec<u8>)]) -> Vec<u8> {
    let mut out = 3u32.to_be_bytes().to_vec();
    for (option, data) in list {
        out.extend(wire::OPTION_MAGIC.to_be_bytes());
        out.extend(option.to_be_bytes());
        out.extend((data.len() as u32).to_be_bytes());
        out.extend(data);
    }
    out
}

fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u32).to_be_bytes()[..], text.as_bytes()].concat()
}

fn go(name: &str) -> Vec<u8> {
    [string(name), vec![0, 2, 0, 1, 0, 3]].concat()
}

fn request(command: u16, flags: u16, offset: u64, len: u32, payload: &[u8]) -> Vec<u8> {
    let mut out = wire::REQUEST_MAGIC.to_be_bytes().to_vec();
    out.extend(flags.to_be_bytes());
    out.extend(command.to_be_bytes());
    out.extend((offset ^ 0x1234).to_be_bytes());
    out.extend(offset.to_be_bytes());
    out.extend(len.to_be_bytes());
    out.extend(payload);
    out
}

/// As [`request`], with an extended header.
fn extended_request(command: u16, flags: u16, offset: u64, len: u64, payload: &[u8]) -> Vec<u8> {
    let mut out = wire::EXTENDED_REQUEST_MAGIC.to_be_bytes().to_vec();
    out.extend(flags.to_be_bytes());
    out.extend(command.to_be_bytes());
    for field in [offset ^ 0x1234, offset, len] {
        out.extend(field.to_be_bytes());
    }
    out.extend(payload);
    out
}

/// A session with extended headers.
fn extended_session(meta: &[u8]) -> Vec<u8> {
    let payload = command_flag::PAYLOAD_LEN;
    [
        options(&[
            (option::EXTENDED_HEADERS, vec![]),
            (option::SET_META_CONTEXT, meta.to_vec()),
            (option::GO, go("disk")),
        ]),
        extended_request(1, payload, 4096, 600, &[7; 600]),
        extended_request(1, 0, 100, 5, b"hello"),
        extended_request(0, 0, 0, 8192, &[]),
        extended_request(0, payload, 0, 3, b"odd"),
        extended_request(4, 0, 0, 1 << 20, &[]),
        extended_request(6, 0, 0, 1 << 33, &[]),
        extended_request(7, 0, 0, 1 << 20, &[]),
        extended_request(2, 0, 0, 0, &[]),
    ]
    .concat()
}

/// Asks for all contexts of the export.
fn own_contexts() -> Vec<u8> {
    [
        string("disk"),
        vec![0, 0, 0, 3],
        string("base:allocation"),
        string("qemu:allocation-depth"),
        string("qemu:dirty-bitmap:monday"),
    ]
    .concat()
}

#[expect(clippy::too_many_lines, reason = "a list")]
pub fn session_seeds() -> Vec<Seed> {
    let all_requests = [
        request(1, 0, 4096, 600, &[7; 600]),
        request(1, command_flag::FUA, 100, 5, b"hello"),
        request(0, 0, 0, 8192, &[]),
        request(0, command_flag::DF, 4096, 512, &[]),
        request(3, 0, 0, 0, &[]),
        request(4, command_flag::FUA, 0, 4096, &[]),
        request(6, command_flag::NO_HOLE, 8192, 100, &[]),
        request(6, command_flag::FAST_ZERO, 8192, 4096, &[]),
        request(7, 0, 0, 1 << 20, &[]),
        request(7, command_flag::REQ_ONE, 0, 1 << 20, &[]),
        request(5, 0, 0, 65536, &[]),
        request(0, 0, (1 << 20) - 1, 2, &[]),
        request(9, 0, 0, 1, &[]),
        request(0, 0, 0, 0, &[]),
        request(2, 0, 0, 0, &[]),
    ]
    .concat();
    let meta = [string("disk"), vec![0, 0, 0, 1], string("base:allocation")].concat();
    let structured = options(&[
        (option::STRUCTURED_REPLY, vec![]),
        (
            option::LIST_META_CONTEXT,
            [string("disk"), vec![0; 4]].concat(),
        ),
        (option::SET_META_CONTEXT, meta.clone()),
        (option::GO, go("disk")),
    ]);
    let simple = options(&[(option::GO, go("disk"))]);
    let own = own_contexts();
    let large = options(&[
        (option::STRUCTURED_REPLY, vec![]),
        (option::GO, go("large")),
    ]);
    let haggling = options(&[
        (option::LIST, vec![]),
        (option::INFO, go("nobody")),
        (option::INFO, go("large")),
        (option::STARTTLS, vec![]),
        (77, b"what".to_vec()),
        (option::LIST, vec![0; 70_000 - 60_000]),
        (option::ABORT, vec![]),
    ]);
    let old = [
        options(&[(option::EXPORT_NAME, b"fixed".to_vec())]),
        request(0, 0, 0, 4096, &[]),
        request(1, 0, 0, 4, b"none"),
        request(2, 0, 0, 0, &[]),
    ];
    let mut with_zeroes = old.concat();
    with_zeroes[3] = 1;
    vec![
        (
            "structured".into(),
            [structured, all_requests.clone()].concat(),
        ),
        ("extended".into(), extended_session(&meta)),
        (
            "own-contexts".into(),
            [
                options(&[
                    (option::STRUCTURED_REPLY, vec![]),
                    (option::LIST_META_CONTEXT, own.clone()),
                    (option::SET_META_CONTEXT, own.clone()),
                    (option::GO, go("disk")),
                ]),
                request(7, 0, 1000, 200_000, &[]),
                request(7, command_flag::REQ_ONE, 99_999, 5, &[]),
                request(2, 0, 0, 0, &[]),
            ]
            .concat(),
        ),
        ("own-contexts-extended".into(), extended_session(&own)),
        ("simple".into(), [simple, all_requests].concat()),
        (
            "large".into(),
            [
                large,
                request(0, 0, 0, 32 << 20, &[]),
                request(1, 0, 4096, 32 << 20, &[1; 3000]),
            ]
            .concat(),
        ),
        ("haggling".into(), haggling),
        ("export-name".into(), old.concat()),
        ("export-name-with-zeroes".into(), with_zeroes),
    ]
}
