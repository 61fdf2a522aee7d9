//! Sessions over scripted bytes: what a client sends, and what it must get for it.

mod devices;
mod extended;
mod handshake;
mod stalling;
mod transmission;

use std::collections::VecDeque;
use std::io::{self, Cursor, Read, Write};
use std::sync::Arc;

use super::protocol::*;
use super::{Export, session_over};
use vellum_base::block::{BlockDevice, MemoryDevice};
use vellum_base::error::{Error, ErrorKind, Result};

/// Size of the device in these tests, in bytes.
const SIZE: u64 = 128 << 20;

/// What a client sends, and what came back.
#[derive(Default)]
struct Script {
    input: Vec<u8>,
    output: Vec<u8>,
    result: Option<Result<()>>,
}

/// A stream that yields the script and keeps the answers.
struct Wire<'a> {
    input: Cursor<&'a [u8]>,
    output: &'a mut Vec<u8>,
}

impl Read for Wire<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.input.read(buf)
    }
}

impl Write for Wire<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.output.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Script {
    /// A client that sets both client flags.
    fn new() -> Self {
        Script {
            input: vec![0, 0, 0, 3],
            ..Script::default()
        }
    }

    fn option(mut self, option: u32, data: &[u8]) -> Self {
        self.input.extend(OPTION_MAGIC.to_be_bytes());
        self.input.extend(option.to_be_bytes());
        self.input.extend((data.len() as u32).to_be_bytes());
        self.input.extend(data);
        self
    }

    fn structured(self) -> Self {
        self.option(option::STRUCTURED_REPLY, &[])
    }

    fn go(self, name: &str) -> Self {
        self.option(option::GO, &info_data(name, &[]))
    }

    fn request(mut self, command: u16, flags: u16, offset: u64, len: u32) -> Self {
        self.input.extend(REQUEST_MAGIC.to_be_bytes());
        self.input.extend(flags.to_be_bytes());
        self.input.extend(command.to_be_bytes());
        // The cookie says which request of the script it is.
        self.input.extend(COOKIE.to_be_bytes());
        self.input.extend(offset.to_be_bytes());
        self.input.extend(len.to_be_bytes());
        self
    }

    /// As [`Script::request`], with an extended header.
    fn extended_request(mut self, command: u16, flags: u16, offset: u64, len: u64) -> Self {
        self.input.extend(EXTENDED_REQUEST_MAGIC.to_be_bytes());
        self.input.extend(flags.to_be_bytes());
        self.input.extend(command.to_be_bytes());
        for field in [COOKIE, offset, len] {
            self.input.extend(field.to_be_bytes());
        }
        self
    }

    fn bytes(mut self, bytes: &[u8]) -> Self {
        self.input.extend(bytes);
        self
    }

    fn run(self, exports: &[Arc<Export>]) -> Answers {
        let mut script = self;
        script.result = Some(session_over(
            Wire {
                input: Cursor::new(&script.input),
                output: &mut script.output,
            },
            exports,
        ));
        Answers {
            bytes: script.output.into(),
            result: script.result.unwrap(),
            offset: None,
        }
    }

    /// Runs against one empty device named "disk".
    fn run_on_disk(self) -> Answers {
        self.run(&[disk()])
    }
}

const COOKIE: u64 = 0x00c0_ffee_0000_0001;

/// What the server sent, taken from the front.
struct Answers {
    bytes: VecDeque<u8>,
    result: Result<()>,
    /// What the last extended header said.
    offset: Option<u64>,
}

/// A reply in the transmission phase.
#[derive(Debug, PartialEq, Eq)]
enum Reply {
    Simple(u32),
    Chunk {
        flags: u16,
        kind: u16,
        data: Vec<u8>,
    },
}

impl Answers {
    fn take(&mut self, len: usize) -> Vec<u8> {
        assert!(
            self.bytes.len() >= len,
            "{len} bytes wanted, {} sent; the session ended with {:?}",
            self.bytes.len(),
            self.result
        );
        self.bytes.drain(..len).collect()
    }

    fn u16(&mut self) -> u16 {
        u16::from_be_bytes(self.take(2).try_into().unwrap())
    }

    fn u32(&mut self) -> u32 {
        u32::from_be_bytes(self.take(4).try_into().unwrap())
    }

    fn u64(&mut self) -> u64 {
        u64::from_be_bytes(self.take(8).try_into().unwrap())
    }

    fn greeting(&mut self) -> &mut Self {
        assert_eq!(self.u64(), GREETING_MAGIC);
        assert_eq!(self.u64(), OPTION_MAGIC);
        assert_eq!(self.u16(), FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES);
        self
    }

    /// The next reply to an option: its type and data.
    fn option(&mut self, option: u32) -> (u32, Vec<u8>) {
        assert_eq!(self.u64(), OPTION_REPLY_MAGIC);
        assert_eq!(self.u32(), option);
        let kind = self.u32();
        let len = self.u32() as usize;
        (kind, self.take(len))
    }

    /// Asserts the next reply to an option is of that type.
    fn expect(&mut self, option: u32, kind: u32) -> Vec<u8> {
        let (got, data) = self.option(option);
        assert_eq!(got, kind, "{}", String::from_utf8_lossy(&data));
        data
    }

    /// Passes over the replies up to the acknowledgement of GO.
    fn transmitting(&mut self) -> &mut Self {
        self.greeting();
        loop {
            assert_eq!(self.u64(), OPTION_REPLY_MAGIC);
            let option = self.u32();
            let kind = self.u32();
            let len = self.u32() as usize;
            let data = self.take(len);
            assert!(kind & (1 << 31) == 0, "{}", String::from_utf8_lossy(&data));
            if (option, kind) == (option::GO, option_reply::ACK) {
                return self;
            }
        }
    }

    fn reply(&mut self) -> Reply {
        match self.u32() {
            SIMPLE_REPLY_MAGIC => {
                let error = self.u32();
                assert_eq!(self.u64(), COOKIE);
                Reply::Simple(error)
            }
            STRUCTURED_REPLY_MAGIC => {
                let flags = self.u16();
                let kind = self.u16();
                assert_eq!(self.u64(), COOKIE);
                let len = self.u32() as usize;
                let data = self.take(len);
                Reply::Chunk { flags, kind, data }
            }
            EXTENDED_REPLY_MAGIC => {
                let flags = self.u16();
                let kind = self.u16();
                assert_eq!(self.u64(), COOKIE);
                self.offset = Some(self.u64());
                let len = self.u64() as usize;
                let data = self.take(len);
                Reply::Chunk { flags, kind, data }
            }
            magic => panic!("a reply begins with {magic:#x}"),
        }
    }

    fn success(&mut self) -> &mut Self {
        assert_eq!(self.reply(), Reply::Simple(0));
        self
    }

    /// The error of a simple or structured error reply.
    fn error(&mut self) -> u32 {
        match self.reply() {
            Reply::Simple(error) if error != 0 => error,
            Reply::Chunk { flags, kind, data } if kind == chunk::ERROR => {
                assert_eq!(flags, chunk::FLAG_DONE);
                let len = u16::from_be_bytes(data[4..6].try_into().unwrap());
                assert_eq!(data.len(), 6 + usize::from(len));
                assert!(std::str::from_utf8(&data[6..]).is_ok());
                u32::from_be_bytes(data[..4].try_into().unwrap())
            }
            reply => panic!("{reply:?} where an error was expected"),
        }
    }

    /// Asserts that nothing else was sent and how the session ended.
    fn end(&mut self) -> &Result<()> {
        assert_eq!(self.bytes.len(), 0, "more was sent than expected");
        &self.result
    }

    fn protocol_error(&mut self) {
        let kind = self.end().as_ref().map_err(Error::kind).err();
        assert_eq!(kind, Some(ErrorKind::Protocol));
    }
}

fn disk() -> Arc<Export> {
    named("disk", MemoryDevice::new(SIZE))
}

fn named(name: &str, device: impl BlockDevice + 'static) -> Arc<Export> {
    Arc::new(Export::new(name, Arc::new(device)))
}

fn string(text: &str) -> Vec<u8> {
    let mut bytes = (text.len() as u32).to_be_bytes().to_vec();
    bytes.extend(text.as_bytes());
    bytes
}

fn info_data(name: &str, wanted: &[u16]) -> Vec<u8> {
    let mut data = string(name);
    data.extend((wanted.len() as u16).to_be_bytes());
    for kind in wanted {
        data.extend(kind.to_be_bytes());
    }
    data
}

fn meta_data(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = string(name);
    data.extend((queries.len() as u32).to_be_bytes());
    for query in queries {
        data.extend(string(query));
    }
    data
}
