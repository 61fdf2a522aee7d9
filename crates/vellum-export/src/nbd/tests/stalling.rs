//! A connection while as many reads as a client sends wait for blocks from elsewhere.

use std::os::unix::net::UnixStream;
use std::time::Duration;

use super::super::{Server, ServerConfig, bind_unix};
use super::transmission::{FLUSH, READ, WRITE};
use super::*;
use crate::stalling::{Stalling, assert_not_held_up, p99};

/// Requests that Linux has on their way on a connection.
const IN_FLIGHT: u64 = 128;

/// A client that knows the replies to its own requests by their cookies.
struct Client(UnixStream);

impl Client {
    fn new(path: &std::path::Path) -> Self {
        let mut stream = UnixStream::connect(path).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(30)))
            .unwrap();
        let script = Script::new().option(option::EXPORT_NAME, b"disk");
        stream.write_all(&script.input).unwrap();
        // The greeting, the size and the flags.
        stream.read_exact(&mut [0; 18 + 10]).unwrap();
        Client(stream)
    }

    fn send(&mut self, command: u16, cookie: u64, offset: u64, len: u32, payload: &[u8]) {
        let mut bytes = REQUEST_MAGIC.to_be_bytes().to_vec();
        bytes.extend([0; 2]);
        bytes.extend(command.to_be_bytes());
        bytes.extend(cookie.to_be_bytes());
        bytes.extend(offset.to_be_bytes());
        bytes.extend(len.to_be_bytes());
        bytes.extend(payload);
        self.0.write_all(&bytes).unwrap();
    }

    /// The cookie of a reply without an error, and `len` bytes behind it.
    fn reply(&mut self, len: usize) -> (u64, Vec<u8>) {
        let mut head = [0; 16];
        self.0.read_exact(&mut head).unwrap();
        assert_eq!(head[4..8], [0; 4], "an error");
        let mut data = vec![0; len];
        self.0.read_exact(&mut data).unwrap();
        (u64::from_be_bytes(head[8..].try_into().unwrap()), data)
    }

    /// Writes, reads what is here, and flushes: each is the next to be answered.
    fn round(&mut self) {
        self.send(WRITE, 1000, 4096, 4096, &[7; 4096]);
        assert_eq!(self.reply(0).0, 1000);
        self.send(READ, 1001, 4096, 4096, &[]);
        assert_eq!(self.reply(4096), (1001, vec![7; 4096]));
        self.send(FLUSH, 1002, 0, 0, &[]);
        assert_eq!(self.reply(0).0, 1002);
    }
}

#[test]
fn as_many_cold_reads_as_a_client_sends_hold_up_neither_writes_nor_flushes_nor_what_is_here() {
    let device = Arc::new(Stalling::new());
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("nbd.sock");
    let (listener, _socket) = bind_unix(&path).unwrap();
    let server = Server::new(ServerConfig::default()).unwrap();
    server
        .add_export(Export::new("disk", device.clone()))
        .unwrap();
    let serving = server.clone();
    let serving = std::thread::spawn(move || serving.serve_unix(listener));
    let mut client = Client::new(&path);
    let idle = p99(|| client.round());
    let cold = IN_FLIGHT - 1;
    for cookie in 0..cold {
        let offset = Stalling::FAR + cookie * 4096;
        client.send(READ, cookie, offset, 4096, &[]);
    }
    device.wait_for(cold as usize);
    let beside = p99(|| client.round());
    device.come();
    let mut answered: Vec<u64> = (0..cold).map(|_| client.reply(4096).0).collect();
    answered.sort_unstable();
    assert!(answered.into_iter().eq(0..cold));
    drop(client);
    server.shutdown().unwrap();
    serving.join().unwrap().unwrap();
    assert_not_held_up(idle, beside);
}
