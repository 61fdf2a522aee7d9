//! An NBD client of a few lines, whose requests are what the test says and nothing else: no flush at
//! the end, no read ahead.
#![allow(dead_code, reason = "each test program uses a part of it")]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    missing_docs,
    reason = "helpers of tests fail the test"
)]

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

pub const READ: u16 = 0;
pub const WRITE: u16 = 1;
pub const FLUSH: u16 = 3;
pub const TRIM: u16 = 4;
pub const WRITE_ZEROES: u16 = 6;
pub const FUA: u16 = 1;

const KIB: usize = 1024;

/// A client with one request in flight, which connects again, and sends the unanswered request
/// again, whenever the connection ends.
pub struct Client {
    socket: PathBuf,
    name: String,
    stream: Option<UnixStream>,
    cookie: u64,
    pub reconnects: u32,
}

impl Client {
    pub fn new(socket: &Path, name: &str) -> Client {
        Client {
            socket: socket.to_owned(),
            name: name.to_owned(),
            stream: None,
            cookie: 0,
            reconnects: 0,
        }
    }

    fn connect(&self) -> io::Result<UnixStream> {
        let mut stream = UnixStream::connect(&self.socket)?;
        stream.set_read_timeout(Some(Duration::from_secs(120)))?;
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting)?;
        assert_eq!(&greeting[..16], b"NBDMAGICIHAVEOPT");
        // Fixed newstyle without zeroes, then GO.
        let mut hello = 3_u32.to_be_bytes().to_vec();
        hello.extend(b"IHAVEOPT");
        hello.extend(7_u32.to_be_bytes());
        hello.extend((4 + self.name.len() as u32 + 2).to_be_bytes());
        hello.extend((self.name.len() as u32).to_be_bytes());
        hello.extend(self.name.as_bytes());
        hello.extend(0_u16.to_be_bytes());
        stream.write_all(&hello)?;
        loop {
            let mut reply = [0; 20];
            stream.read_exact(&mut reply)?;
            let number = |at: usize| u32::from_be_bytes(reply[at..at + 4].try_into().unwrap());
            let mut data = vec![0; number(16) as usize];
            stream.read_exact(&mut data)?;
            match number(12) {
                1 => return Ok(stream),
                3 => {}
                error => panic!("GO {}: reply {error:#x}", self.name),
            }
        }
    }

    fn exchange(&mut self, request: &[u8], answer: &mut [u8]) -> io::Result<u32> {
        let mut stream = match self.stream.take() {
            Some(stream) => stream,
            None => self.connect()?,
        };
        stream.write_all(request)?;
        let mut reply = [0; 16];
        stream.read_exact(&mut reply)?;
        assert_eq!(&reply[..4], &0x6744_6698_u32.to_be_bytes());
        assert_eq!(&reply[8..], &self.cookie.to_be_bytes());
        let error = u32::from_be_bytes(reply[4..8].try_into().unwrap());
        if error == 0 {
            stream.read_exact(answer)?;
        }
        self.stream = Some(stream);
        Ok(error)
    }

    /// Sends a request until it is answered, which must be with success.
    pub fn request(
        &mut self,
        command: u16,
        flags: u16,
        offset: usize,
        len: usize,
        data: &[u8],
    ) -> Vec<u8> {
        self.cookie += 1;
        let mut request = 0x2560_9513_u32.to_be_bytes().to_vec();
        request.extend(flags.to_be_bytes());
        request.extend(command.to_be_bytes());
        request.extend(self.cookie.to_be_bytes());
        request.extend((offset as u64).to_be_bytes());
        request.extend((len as u32).to_be_bytes());
        request.extend(data);
        let mut answer = vec![0; if command == READ { len } else { 0 }];
        let deadline = Instant::now() + Duration::from_secs(120);
        loop {
            match self.exchange(&request, &mut answer) {
                Ok(error) => {
                    assert_eq!(error, 0, "command {command} at {offset}");
                    return answer;
                }
                Err(error) => {
                    assert!(Instant::now() < deadline, "command {command}: {error}");
                    self.reconnects += 1;
                    std::thread::sleep(Duration::from_millis(2));
                }
            }
        }
    }

    pub fn write(&mut self, offset: usize, len: usize, byte: u8) {
        self.request(WRITE, 0, offset, len, &vec![byte; len]);
    }

    pub fn content(&mut self, size: usize) -> Vec<u8> {
        let step = 1024 * KIB;
        let mut content = Vec::with_capacity(size);
        for at in (0..size).step_by(step) {
            content.extend_from_slice(&self.request(READ, 0, at, step.min(size - at), &[]));
        }
        content
    }
}
