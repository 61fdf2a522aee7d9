//! A connection whose requests name a host that means something.
//!
//! On a unix socket there is no host, and Go clients before gRPC 1.34, among them what Debian 12
//! builds containerd's tools with, put the socket's path into `:authority`. The HTTP/2 library
//! refuses that (hyperium/h2#442), rightly by RFC 9113, section 8.3.1, and cannot be told not to.
//! So the value is replaced on the way in: a literal value of the static name `:authority`
//! (RFC 7541, appendix A, index 1) in a HEADERS frame (RFC 9113, section 6.2) becomes one letter.
//!
//! That is sound for header compression: the decoder's table then holds a smaller entry than the
//! encoder's, so it evicts later, and what the encoder still refers to has the same index in both.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::UnixStream;
use tonic::transport::server::Connected;

const PREFACE: usize = 24;
const FRAME_HEADER: usize = 9;
const TYPE_HEADERS: u8 = 1;
const FLAG_PADDED: u8 = 8;
const FLAG_PRIORITY: u8 = 0x20;
const AUTHORITY: u64 = 1;
/// A string of one byte that is not Huffman-coded: `v`.
const REPLACEMENT: [u8; 2] = [1, b'v'];
const READ_LEN: usize = 32 << 10;

/// A connection from containerd.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    incoming: Incoming,
}

impl Connection {
    /// Wraps an accepted connection.
    pub fn new(stream: UnixStream) -> Self {
        Connection {
            stream,
            incoming: Incoming::default(),
        }
    }
}

impl Connected for Connection {
    type ConnectInfo = ();
    fn connect_info(&self) {}
}

/// Bytes on the way in: cut into frames, changed, and waiting to be read.
#[derive(Debug, Default)]
struct Incoming {
    raw: Vec<u8>,
    ready: Vec<u8>,
    taken: usize,
    after_preface: bool,
}

impl Incoming {
    fn push(&mut self, bytes: &[u8]) {
        self.raw.extend_from_slice(bytes);
        let mut at = 0;
        if !self.after_preface {
            // The rest of it is yet to come.
            let Some(preface) = self.raw.get(..PREFACE) else {
                return;
            };
            self.ready.extend_from_slice(preface);
            self.after_preface = true;
            at = PREFACE;
        }
        while let Some(frame) = whole_frame(self.raw.split_at(at).1) {
            match rewritten(frame) {
                Some(changed) => self.ready.extend_from_slice(&changed),
                None => self.ready.extend_from_slice(frame),
            }
            at += frame.len();
        }
        self.raw.drain(..at);
    }

    /// The other side will send nothing more.
    fn end(&mut self) {
        self.ready.append(&mut self.raw);
    }

    #[expect(clippy::indexing_slicing, reason = "no more was taken than is there")]
    fn take(&mut self, buf: &mut ReadBuf<'_>) -> bool {
        let rest = &self.ready[self.taken..];
        if rest.is_empty() {
            self.ready.clear();
            self.taken = 0;
            return false;
        }
        let len = rest.len().min(buf.remaining());
        buf.put_slice(&rest[..len]);
        self.taken += len;
        true
    }
}

fn whole_frame(bytes: &[u8]) -> Option<&[u8]> {
    let len = match bytes {
        [a, b, c, ..] => u32::from_be_bytes([0, *a, *b, *c]) as usize,
        _ => return None,
    };
    bytes.get(..FRAME_HEADER + len)
}

/// The frame with another authority; `None` where it has none, or makes no sense to us.
fn rewritten(frame: &[u8]) -> Option<Vec<u8>> {
    let (header, payload) = frame.split_at_checked(FRAME_HEADER)?;
    let (kind, flags) = (*header.get(3)?, *header.get(4)?);
    if kind != TYPE_HEADERS {
        return None;
    }
    let mut start = 0;
    let mut end = payload.len();
    if flags & FLAG_PADDED != 0 {
        end = end.checked_sub(usize::from(*payload.first()?))?;
        start += 1;
    }
    if flags & FLAG_PRIORITY != 0 {
        start += 5;
    }
    let block = payload.get(start..end)?;
    let value = authority_value(block)?;
    let (from, to) = (start + value.start, start + value.end);
    let mut out = header.to_vec();
    out.extend_from_slice(payload.get(..from)?);
    out.extend_from_slice(&REPLACEMENT);
    out.extend_from_slice(payload.get(to..)?);
    let len = u32::try_from(out.len() - FRAME_HEADER).ok()?;
    out.get_mut(..3)?
        .copy_from_slice(len.to_be_bytes().get(1..)?);
    Some(out)
}

/// Where in a header block the literal value of `:authority` lies, its length in front included.
/// A block that goes on in another frame may be cut anywhere after it.
fn authority_value(block: &[u8]) -> Option<std::ops::Range<usize>> {
    let mut at = 0;
    loop {
        let first = *block.get(at)?;
        // RFC 7541, section 6: the representations, by their first bits.
        let (prefix, literal) = match first {
            0x80.. => (7, false),
            0x40.. => (6, true),
            0x20.. => (5, false),
            _ => (4, true),
        };
        let (name, next) = integer(block, at, prefix)?;
        at = next;
        if !literal {
            continue;
        }
        if name == 0 {
            at = skip_string(block, at)?;
        }
        let end = skip_string(block, at)?;
        // An empty one stays: the table's entry must not grow.
        if name == AUTHORITY && end > at + 1 {
            return Some(at..end);
        }
        at = end;
    }
}

fn skip_string(block: &[u8], at: usize) -> Option<usize> {
    let (len, next) = integer(block, at, 7)?;
    let end = next.checked_add(usize::try_from(len).ok()?)?;
    (end <= block.len()).then_some(end)
}

/// RFC 7541, section 5.1: an integer with a prefix of `bits`, and where it ends.
fn integer(block: &[u8], at: usize, bits: u32) -> Option<(u64, usize)> {
    let most = (1u64 << bits) - 1;
    let mut value = u64::from(*block.get(at)?) & most;
    let mut at = at + 1;
    if value < most {
        return Some((value, at));
    }
    for shift in (0..28).step_by(7) {
        let byte = *block.get(at)?;
        at += 1;
        value += u64::from(byte & 0x7F) << shift;
        if byte & 0x80 == 0 {
            return Some((value, at));
        }
    }
    None
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        loop {
            if this.incoming.take(buf) {
                return Poll::Ready(Ok(()));
            }
            let mut bytes = [0; READ_LEN];
            let mut read = ReadBuf::new(&mut bytes);
            match Pin::new(&mut this.stream).poll_read(context, &mut read) {
                Poll::Ready(Ok(())) if read.filled().is_empty() => {
                    this.incoming.end();
                    this.incoming.take(buf);
                    return Poll::Ready(Ok(()));
                }
                Poll::Ready(Ok(())) => this.incoming.push(read.filled()),
                other => return other,
            }
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
        let mut frame = vec![0, 0, payload.len() as u8, kind, flags, 0, 0, 0, 1];
        frame.extend_from_slice(payload);
        frame
    }

    /// Method POST (indexed), a literal name and value, then the authority, then a path.
    fn block(authority: &[u8]) -> Vec<u8> {
        let mut block = vec![0x83, 0x40, 1, b'a', 1, b'b', 0x41, authority.len() as u8];
        block.extend_from_slice(authority);
        block.extend_from_slice(&[0x44, 2, b'/', b'x']);
        block
    }

    #[test]
    fn the_authority_becomes_one_letter_and_the_rest_stays_however_it_is_cut() {
        let sent = [
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(),
            frame(4, 0, &[]),
            frame(1, 4, &block(b"/tmp/a.sock")),
            frame(0, 1, b"\x41\x03abc"),
        ]
        .concat();
        let expected = [
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(),
            frame(4, 0, &[]),
            frame(1, 4, &block(b"v")),
            frame(0, 1, b"\x41\x03abc"),
        ]
        .concat();
        for piece in [1, 7, 30, sent.len()] {
            let mut incoming = Incoming::default();
            for bytes in sent.chunks(piece) {
                incoming.push(bytes);
            }
            assert_eq!(incoming.ready, expected, "in pieces of {piece}");
        }
    }

    #[test]
    fn padding_and_priority_are_kept() {
        let payload = [vec![2, 0, 0, 0, 0, 9], block(b"/s"), vec![0, 0]].concat();
        let changed = [vec![2, 0, 0, 0, 0, 9], block(b"v"), vec![0, 0]].concat();
        let flags = FLAG_PADDED | FLAG_PRIORITY | 4;
        assert_eq!(
            rewritten(&frame(1, flags, &payload)),
            Some(frame(1, flags, &changed))
        );
    }

    #[test]
    fn frames_that_make_no_sense_are_left_to_the_library() {
        for payload in [&[0x41, 200][..], &[0x7F, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF], &[]] {
            assert_eq!(rewritten(&frame(1, 4, payload)), None);
        }
        assert_eq!(rewritten(&frame(1, FLAG_PADDED, &[200])), None);
        assert_eq!(rewritten(&frame(1, 4, &block(b""))), None);
    }
}
