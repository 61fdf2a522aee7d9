//! The handshake: greeting and option haggling, up to the point where transmission begins.
//!
//! Generic over the stream, so that it runs over sockets, TLS, and bytes made up by a fuzzer. It
//! reads exactly what it needs: whatever the client sends after the handshake is still in the
//! stream when it returns.

use std::fmt;
use std::io::{self, Read, Write};
use std::sync::Arc;

use super::protocol::{
    self as wire, Headers, InfoRequest, MetaRequest, OptionHeader, info, option,
    option_reply as reply, transmission_flag as flag,
};
use super::{Export, MetaContext};
use vellum_base::error::{Error, ErrorKind, Result};

/// The longest data of an option that is looked at, in bytes: a name, and room for many queries.
const MAX_OPTION_DATA: u32 = 64 << 10;
/// The longest data of an option that is skipped with a reply, in bytes; beyond it is an attack.
const MAX_SKIPPED_DATA: u32 = 1 << 20;
/// The most metadata contexts that one connection may select: each takes memory in each reply.
const MAX_CONTEXTS: usize = 16;
/// The most options in one handshake. A client that lists exports sends a few for each of them.
const MAX_OPTIONS: u32 = 100_000;

/// What the handshake needs to know of the server.
pub trait Directory {
    /// The exports on offer, in the order in which they are listed.
    fn exports(&self) -> Vec<Arc<Export>>;

    /// True once the server stops: options are then refused.
    fn stopping(&self) -> bool {
        false
    }

    /// Counts the connection as one that is served from now on.
    ///
    /// # Errors
    /// Why it cannot be served, as a text for the client.
    fn admit(&self, _export: &Arc<Export>) -> Result<(), String> {
        Ok(())
    }
}

impl Directory for [Arc<Export>] {
    fn exports(&self) -> Vec<Arc<Export>> {
        self.to_vec()
    }
}

/// What the two sides agreed on.
#[derive(Debug, Clone)]
pub struct Negotiated {
    /// The export that the client chose.
    pub export: Arc<Export>,
    /// How requests and replies are framed.
    pub headers: Headers,
    /// What the client may ask of the export's bytes.
    pub contexts: Vec<Selected>,
}

/// A metadata context that a client selected, and what stands for it in replies.
#[derive(Clone)]
pub struct Selected {
    /// The number.
    pub id: u32,
    /// The export's own; `None` for `base:allocation`.
    pub own: Option<Arc<dyn MetaContext>>,
}

impl Selected {
    /// All that an export has.
    fn all(export: &Export) -> Vec<Selected> {
        let own = export.contexts.iter().cloned().map(Some);
        let all = std::iter::once(None).chain(own);
        let numbered = (wire::BASE_ALLOCATION_ID..).zip(all);
        numbered.map(|(id, own)| Selected { id, own }).collect()
    }

    fn name(&self) -> &str {
        match &self.own {
            None => wire::BASE_ALLOCATION,
            Some(own) => own.name(),
        }
    }
}

impl fmt::Debug for Selected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} as {}", self.name(), self.id)
    }
}

/// How a handshake ended.
#[derive(Debug)]
pub enum Outcome {
    /// Transmission follows.
    Transmit(Negotiated),
    /// The client asked for TLS and was told to go ahead: upgrade the stream, then call
    /// [`Handshake::secured`] and [`Handshake::haggle`] again.
    StartTls,
    /// The client went away in good order.
    Closed,
}

/// How much TLS the server insists on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Tls {
    Off,
    Required,
    Active,
}

/// The state of one handshake.
pub struct Handshake<'a, D: ?Sized> {
    directory: &'a D,
    tls: Tls,
    headers: Headers,
    /// What was selected, for the export of a name.
    selected: Option<(String, Vec<Selected>)>,
    no_zeroes: bool,
    options: u32,
}

impl<'a, D: Directory + ?Sized> Handshake<'a, D> {
    /// A handshake about the exports of `directory`; `tls_required` refuses everything in plain
    /// text but the request for TLS.
    pub fn new(directory: &'a D, tls_required: bool) -> Self {
        Handshake {
            directory,
            tls: if tls_required {
                Tls::Required
            } else {
                Tls::Off
            },
            headers: Headers::Simple,
            selected: None,
            no_zeroes: false,
            options: 0,
        }
    }

    /// Exchanges greeting and client flags.
    ///
    /// # Errors
    /// [`ErrorKind::Protocol`] for flags that the server did not offer, or the stream's error.
    pub fn greet(&mut self, stream: &mut (impl Read + Write)) -> Result<()> {
        let mut greeting = Vec::with_capacity(18);
        greeting.extend_from_slice(&wire::GREETING_MAGIC.to_be_bytes());
        greeting.extend_from_slice(&wire::OPTION_MAGIC.to_be_bytes());
        let offered = wire::FLAG_FIXED_NEWSTYLE | wire::FLAG_NO_ZEROES;
        greeting.extend_from_slice(&offered.to_be_bytes());
        write(stream, &greeting)?;
        let mut flags = [0; 4];
        read(stream, &mut flags)?;
        let flags = u32::from_be_bytes(flags);
        if flags & !u32::from(offered) != 0 {
            return Err(Error::new(
                ErrorKind::Protocol,
                format!("the client set flags {flags:#x} that the server does not offer"),
            ));
        }
        self.no_zeroes = flags & u32::from(wire::FLAG_NO_ZEROES) != 0;
        Ok(())
    }

    /// Says that the stream is TLS now. What was agreed in plain text is forgotten, since anybody
    /// on the way could have put it there.
    pub fn secured(&mut self) {
        self.tls = Tls::Active;
        self.headers = Headers::Simple;
        self.selected = None;
    }

    /// Answers options until one of them ends the handshake.
    ///
    /// # Errors
    /// [`ErrorKind::Protocol`] when the client breaks the framing or asks by `EXPORT_NAME`, which
    /// has no error reply, for what it cannot have; or the stream's error. Close the stream then.
    pub fn haggle(&mut self, stream: &mut (impl Read + Write)) -> Result<Outcome> {
        let mut data = Vec::new();
        let mut out = Vec::new();
        loop {
            self.options += 1;
            if self.options > MAX_OPTIONS {
                return Err(Error::new(
                    ErrorKind::Protocol,
                    "the client sends options without end",
                ));
            }
            let mut header = [0; OptionHeader::WIRE_LEN];
            read(stream, &mut header)?;
            let OptionHeader { option, len } = OptionHeader::parse(&header)?;
            if len > MAX_OPTION_DATA {
                if len > MAX_SKIPPED_DATA || option == option::EXPORT_NAME {
                    return Err(Error::new(
                        ErrorKind::Protocol,
                        format!("the client sent option {option} with {len} bytes of data"),
                    ));
                }
                skip(stream, len)?;
                let text = format!("the data of an option is limited to {MAX_OPTION_DATA} bytes");
                wire::push_option_reply(&mut out, option, reply::ERR_TOO_BIG, &[text.as_bytes()]);
                write(stream, &out)?;
                out.clear();
                continue;
            }
            data.clear();
            data.resize(len as usize, 0);
            read(stream, &mut data)?;
            let outcome = self.answer(option, &data, &mut out)?;
            let sent = write(stream, &out);
            out.clear();
            match outcome {
                // A client may well be gone before the acknowledgement of its goodbye.
                Some(Outcome::Closed) => return Ok(Outcome::Closed),
                Some(outcome) => {
                    sent?;
                    return Ok(outcome);
                }
                None => sent?,
            }
        }
    }

    /// Puts the replies to one option into `out`; says so when it ends the handshake.
    fn answer(&mut self, option: u32, data: &[u8], out: &mut Vec<u8>) -> Result<Option<Outcome>> {
        let refusal = match self.consider(option, data, out)? {
            Answer::Done => return Ok(None),
            Answer::End(outcome) => return Ok(Some(outcome)),
            Answer::Refuse(kind, text) => (kind, text),
        };
        let (kind, text) = refusal;
        if option == option::EXPORT_NAME {
            return Err(Error::new(
                ErrorKind::Protocol,
                format!("the client asked by EXPORT_NAME, which cannot be refused: {text}"),
            ));
        }
        wire::push_option_reply(out, option, kind, &[text.as_bytes()]);
        Ok(None)
    }

    fn consider(&mut self, option: u32, data: &[u8], out: &mut Vec<u8>) -> Result<Answer> {
        let plain = self.tls == Tls::Required;
        if plain && !matches!(option, option::STARTTLS | option::ABORT) {
            return Ok(refuse(
                reply::ERR_TLS_REQD,
                "this server serves over TLS only",
            ));
        }
        if self.directory.stopping() && option != option::ABORT {
            return Ok(refuse(reply::ERR_SHUTDOWN, "the server is stopping"));
        }
        Ok(match option {
            option::EXPORT_NAME => self.export_name(data, out),
            option::ABORT => {
                wire::push_option_reply(out, option, reply::ACK, &[]);
                Answer::End(Outcome::Closed)
            }
            option::LIST if data.is_empty() => {
                for export in self.directory.exports() {
                    let len = (export.name.len() as u32).to_be_bytes();
                    let parts: [&[u8]; 3] =
                        [&len, export.name.as_bytes(), export.description.as_bytes()];
                    wire::push_option_reply(out, option, reply::SERVER, &parts);
                }
                acknowledge(out, option)
            }
            option::STARTTLS if data.is_empty() => match self.tls {
                Tls::Off => refuse(reply::ERR_POLICY, "this server has no TLS"),
                Tls::Active => refuse(reply::ERR_INVALID, "TLS is active already"),
                Tls::Required => {
                    wire::push_option_reply(out, option, reply::ACK, &[]);
                    Answer::End(Outcome::StartTls)
                }
            },
            option::STRUCTURED_REPLY if data.is_empty() => match self.headers {
                Headers::Extended => refuse(
                    reply::ERR_EXT_HEADER_REQD,
                    "extended headers were agreed on, which have structured replies",
                ),
                Headers::Simple | Headers::Structured => {
                    self.headers = Headers::Structured;
                    acknowledge(out, option)
                }
            },
            option::EXTENDED_HEADERS if data.is_empty() => match self.headers {
                Headers::Extended => refuse(
                    reply::ERR_INVALID,
                    "extended headers were agreed on already",
                ),
                Headers::Simple | Headers::Structured => {
                    self.headers = Headers::Extended;
                    acknowledge(out, option)
                }
            },
            option::LIST
            | option::STARTTLS
            | option::STRUCTURED_REPLY
            | option::EXTENDED_HEADERS => refuse(reply::ERR_INVALID, "this option takes no data"),
            option::INFO | option::GO => self.info(option, data, out),
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => self.meta(option, data, out),
            _ => refuse(reply::ERR_UNSUP, "the server does not know this option"),
        })
    }

    fn export_name(&mut self, data: &[u8], out: &mut Vec<u8>) -> Answer {
        let name = match wire::name(data) {
            Ok(name) => name,
            Err(text) => return refuse(reply::ERR_INVALID, text),
        };
        let Some(export) = self.find(name) else {
            return refuse(reply::ERR_UNKNOWN, "no export has that name");
        };
        if let Err(text) = self.directory.admit(&export) {
            return Answer::Refuse(reply::ERR_POLICY, text);
        }
        out.extend_from_slice(&export.device.size().to_be_bytes());
        out.extend_from_slice(&self.flags(&export).to_be_bytes());
        if !self.no_zeroes {
            out.extend_from_slice(&[0; 124]);
        }
        Answer::End(Outcome::Transmit(self.negotiated(export)))
    }

    fn info(&mut self, option: u32, data: &[u8], out: &mut Vec<u8>) -> Answer {
        let request = match InfoRequest::parse(data) {
            Ok(request) => request,
            Err(text) => return refuse(reply::ERR_INVALID, text),
        };
        let Some(export) = self.find(request.name) else {
            return refuse(reply::ERR_UNKNOWN, "no export has that name");
        };
        if option == option::GO
            && let Err(text) = self.directory.admit(&export)
        {
            return Answer::Refuse(reply::ERR_POLICY, text);
        }
        let mut push = |kind: u16, parts: [&[u8]; 3]| {
            let kind = kind.to_be_bytes();
            let [a, b, c] = parts;
            wire::push_option_reply(out, option, reply::INFO, &[&kind, a, b, c]);
        };
        push(
            info::EXPORT,
            [
                &export.device.size().to_be_bytes(),
                &self.flags(&export).to_be_bytes(),
                &[],
            ],
        );
        if request.wants(info::NAME) {
            push(info::NAME, [export.name.as_bytes(), &[], &[]]);
        }
        if request.wants(info::DESCRIPTION) && !export.description.is_empty() {
            push(info::DESCRIPTION, [export.description.as_bytes(), &[], &[]]);
        }
        if request.wants(info::BLOCK_SIZE) {
            push(
                info::BLOCK_SIZE,
                [
                    &1u32.to_be_bytes(),
                    &wire::PREFERRED_BLOCK.to_be_bytes(),
                    &wire::MAX_PAYLOAD.to_be_bytes(),
                ],
            );
        }
        wire::push_option_reply(out, option, reply::ACK, &[]);
        if option == option::GO {
            Answer::End(Outcome::Transmit(self.negotiated(export)))
        } else {
            Answer::Done
        }
    }

    fn meta(&mut self, option: u32, data: &[u8], out: &mut Vec<u8>) -> Answer {
        let set = option == option::SET_META_CONTEXT;
        if set {
            self.selected = None;
        }
        if !self.headers.chunks() {
            return refuse(
                reply::ERR_INVALID,
                "metadata contexts need structured replies: send STRUCTURED_REPLY or EXTENDED_HEADERS first",
            );
        }
        let request = match MetaRequest::parse(data) {
            Ok(request) => request,
            Err(text) => return refuse(reply::ERR_INVALID, text),
        };
        let Some(export) = self.find(request.name) else {
            return refuse(reply::ERR_UNKNOWN, "no export has that name");
        };
        let mut chosen = Selected::all(&export);
        chosen.retain(|context| match set {
            true => request.selects(context.name()),
            false => request.lists(context.name()),
        });
        if set && chosen.len() > MAX_CONTEXTS {
            let text = format!("a connection has at most {MAX_CONTEXTS} metadata contexts");
            return Answer::Refuse(reply::ERR_TOO_BIG, text);
        }
        for context in &chosen {
            // Lists carry no number: it means something only once the context is selected.
            let id = if set { context.id } else { 0 };
            let parts: [&[u8]; 2] = [&id.to_be_bytes(), context.name().as_bytes()];
            wire::push_option_reply(out, option, reply::META_CONTEXT, &parts);
        }
        if set {
            self.selected = Some((export.name.clone(), chosen));
        }
        acknowledge(out, option)
    }

    /// The export of that name; the empty name stands for the only one, where there is only one.
    fn find(&self, name: &str) -> Option<Arc<Export>> {
        let exports = self.directory.exports();
        let only = exports.len() == 1 && name.is_empty();
        exports
            .into_iter()
            .find(|export| only || export.name == name)
    }

    fn negotiated(&self, export: Arc<Export>) -> Negotiated {
        let contexts = match &self.selected {
            Some((name, selected)) if self.headers.chunks() && *name == export.name => {
                selected.clone()
            }
            _ => Vec::new(),
        };
        Negotiated {
            contexts,
            headers: self.headers,
            export,
        }
    }

    fn flags(&self, export: &Export) -> u16 {
        // One flush covers the writes of every connection: BlockDevice::flush promises it.
        let mut flags = flag::HAS_FLAGS
            | flag::SEND_FLUSH
            | flag::SEND_FUA
            | flag::CAN_MULTI_CONN
            | flag::SEND_CACHE;
        if export.is_read_only() {
            flags |= flag::READ_ONLY;
        } else {
            flags |= flag::SEND_TRIM | flag::SEND_WRITE_ZEROES | flag::SEND_FAST_ZERO;
        }
        if self.headers.chunks() {
            flags |= flag::SEND_DF;
        }
        flags
    }
}

/// What becomes of an option.
enum Answer {
    /// Answered; the next one follows.
    Done,
    /// Answered, and the handshake is over.
    End(Outcome),
    /// To be answered with this error and text.
    Refuse(u32, String),
}

fn refuse(kind: u32, text: &str) -> Answer {
    Answer::Refuse(kind, text.to_owned())
}

fn acknowledge(out: &mut Vec<u8>, option: u32) -> Answer {
    wire::push_option_reply(out, option, reply::ACK, &[]);
    Answer::Done
}

fn read(stream: &mut impl Read, buf: &mut [u8]) -> Result<()> {
    stream.read_exact(buf).map_err(|error| match error.kind() {
        io::ErrorKind::UnexpectedEof => Error::new(
            ErrorKind::Protocol,
            "the client went away during the handshake",
        ),
        _ => Error::io("reading from the client during the handshake", error),
    })
}

fn write(stream: &mut impl Write, bytes: &[u8]) -> Result<()> {
    stream
        .write_all(bytes)
        .and_then(|()| stream.flush())
        .map_err(|error| Error::io("writing to the client during the handshake", error))
}

fn skip(stream: &mut impl Read, len: u32) -> Result<()> {
    let mut rest = len as usize;
    let mut sink = [0; 4096];
    while rest > 0 {
        let piece = rest.min(sink.len());
        read(stream, sink.split_at_mut(piece).0)?;
        rest -= piece;
    }
    Ok(())
}
