//! The server in this process, and clients that say what the test says, byte by byte.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use vellum_base::Result;
use vellum_base::block::{BlockDevice, MemoryDevice};
use vellum_export::nbd::{Export, Server, ServerConfig, SocketFile, bind_unix};

use crate::lab::{PATIENCE, SIZE};

pub const READ: u16 = 0;
pub const WRITE: u16 = 1;
pub const DISC: u16 = 2;
pub const FLUSH: u16 = 3;
pub const TRIM: u16 = 4;

/// A server on a unix socket in a directory of its own; stops when dropped.
pub struct Running {
    pub server: Server,
    pub path: PathBuf,
    listener: Option<thread::JoinHandle<Result<()>>>,
    _socket: SocketFile,
    _dir: tempfile::TempDir,
}

impl Running {
    pub fn new(config: ServerConfig, device: Arc<dyn BlockDevice>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("nbd.sock");
        let (listener, socket) = bind_unix(&path).unwrap();
        let server = Server::new(config).unwrap();
        server.add_export(Export::new("disk", device)).unwrap();
        let serving = server.clone();
        let listener = Some(thread::spawn(move || serving.serve_unix(listener)));
        Running {
            server,
            path,
            listener,
            _socket: socket,
            _dir: dir,
        }
    }

    pub fn silent(&self) -> UnixStream {
        connect(&self.path)
    }

    pub fn client(&self) -> Client {
        self.try_client().unwrap()
    }

    pub fn try_client(&self) -> io::Result<Client> {
        Client::go(self.silent(), "disk")
    }

    /// Waits until so many clients are served.
    pub fn await_connections(&self, wanted: usize) {
        let began = Instant::now();
        while self.server.connections("disk") != Some(wanted) {
            assert!(
                began.elapsed() < PATIENCE,
                "{:?} connections, not {wanted}",
                self.server.connections("disk")
            );
            thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let stopped = self.server.shutdown();
        let listened = self.listener.take().map(thread::JoinHandle::join);
        if !thread::panicking() {
            stopped.unwrap();
            listened.unwrap().unwrap().unwrap();
        }
    }
}

/// A client in its transmission phase, with simple replies.
pub struct Client {
    pub stream: UnixStream,
}

impl Client {
    /// Of an export of the server at `socket`.
    pub fn of(socket: &Path, export: &str) -> io::Result<Client> {
        Client::go(connect(socket), export)
    }

    /// Of an export, by a stream on which nothing was said yet.
    pub fn go(mut stream: UnixStream, export: &str) -> io::Result<Client> {
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting)?;
        stream.write_all(&go_script(export))?;
        // The reply to GO: INFO with the size and flags, and ACK.
        let mut reply = [0; 20];
        stream.read_exact(&mut reply)?;
        if reply[12..16] != 3u32.to_be_bytes() {
            let mut why = vec![0; u32::from_be_bytes(reply[16..].try_into().unwrap()) as usize];
            stream.read_exact(&mut why)?;
            return Err(io::Error::other(String::from_utf8(why).unwrap()));
        }
        stream.read_exact(&mut [0; 12 + 20])?;
        Ok(Client { stream })
    }

    pub fn send(&mut self, command: u16, flags: u16, cookie: u64, offset: u64, len: u32) {
        self.stream
            .write_all(&header(command, flags, cookie, offset, len))
            .unwrap();
    }

    pub fn send_write(&mut self, flags: u16, cookie: u64, offset: u64, data: &[u8]) {
        self.send(WRITE, flags, cookie, offset, data.len() as u32);
        self.stream.write_all(data).unwrap();
    }

    /// The next reply's error and cookie.
    pub fn reply(&mut self) -> io::Result<(u32, u64)> {
        let mut bytes = [0; 16];
        self.stream.read_exact(&mut bytes)?;
        assert_eq!(bytes[..4], 0x6744_6698u32.to_be_bytes());
        Ok((
            u32::from_be_bytes(bytes[4..8].try_into().unwrap()),
            u64::from_be_bytes(bytes[8..].try_into().unwrap()),
        ))
    }

    pub fn write(&mut self, flags: u16, offset: u64, data: &[u8]) {
        self.send_write(flags, 1, offset, data);
        assert_eq!(self.reply().unwrap(), (0, 1));
    }

    pub fn read(&mut self, offset: u64, len: u32) -> Vec<u8> {
        self.send(READ, 0, 2, offset, len);
        assert_eq!(self.reply().unwrap(), (0, 2));
        let mut data = vec![0; len as usize];
        self.stream.read_exact(&mut data).unwrap();
        data
    }

    /// Asserts that the server has closed the connection, in whatever way.
    pub fn closed(&mut self) {
        closed(&mut self.stream);
    }
}

fn connect(socket: &Path) -> UnixStream {
    let stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    stream
}

pub fn closed(stream: &mut impl Read) {
    let mut sink = [0; 4096];
    loop {
        match stream.read(&mut sink) {
            Ok(0) => return,
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return,
            Err(error) => panic!("not closed: {error}"),
        }
    }
}

/// Asks for an export.
pub fn go_script(export: &str) -> Vec<u8> {
    let mut script = vec![0, 0, 0, 3];
    script.extend(b"IHAVEOPT");
    script.extend(7u32.to_be_bytes());
    script.extend((4 + export.len() as u32 + 2).to_be_bytes());
    script.extend((export.len() as u32).to_be_bytes());
    script.extend(export.as_bytes());
    script.extend([0, 0]);
    script
}

pub fn header(command: u16, flags: u16, cookie: u64, offset: u64, len: u32) -> Vec<u8> {
    let mut bytes = 0x2560_9513u32.to_be_bytes().to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(command.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    bytes.extend(len.to_be_bytes());
    bytes
}

pub fn memory() -> Arc<MemoryDevice> {
    Arc::new(MemoryDevice::new(SIZE))
}
