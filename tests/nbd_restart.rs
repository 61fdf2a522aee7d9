//! `vellum nbd` is killed and started again: clients that reconnect find their export, with every
//! write that was acknowledged, flushed or not.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod common;

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::{Running, TestStore, wait_until};

const READ: u16 = 0;
const WRITE: u16 = 1;
const FLUSH: u16 = 3;
const TRIM: u16 = 4;
const WRITE_ZEROES: u16 = 6;
const FUA: u16 = 1;
const KIB: usize = 1024;

/// `vellum nbd`, always on the same socket.
struct Server {
    process: Running,
    socket: PathBuf,
}

impl Server {
    fn start(store: &TestStore, names: &[&str]) -> Server {
        let socket = store.path("nbd.sock");
        let child = store
            .command()
            .args(["-q", "nbd"])
            .args(names)
            .arg("--socket")
            .arg(&socket)
            .spawn()
            .unwrap();
        let server = Server {
            process: Running(child),
            socket,
        };
        wait_until("the server listens", || {
            UnixStream::connect(&server.socket).is_ok()
        });
        server
    }

    /// SIGKILL, and another one that serves the same. The dead one's socket is in its way.
    fn replaced(self, store: &TestStore, names: &[&str]) -> Server {
        self.kill();
        assert!(store.path("nbd.sock").exists());
        Server::start(store, names)
    }

    fn kill(mut self) {
        self.process.0.kill().unwrap();
        self.process.0.wait().unwrap();
    }
}

/// A client with one request in flight, which connects again, and sends the unanswered request
/// again, whenever the connection ends.
struct Client {
    socket: PathBuf,
    name: String,
    stream: Option<UnixStream>,
    cookie: u64,
    reconnects: u32,
}

impl Client {
    fn new(socket: &Path, name: &str) -> Client {
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
        stream.set_read_timeout(Some(Duration::from_secs(20)))?;
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
    fn request(
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
        let deadline = Instant::now() + Duration::from_secs(30);
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

    fn write(&mut self, offset: usize, len: usize, byte: u8) {
        self.request(WRITE, 0, offset, len, &vec![byte; len]);
    }

    fn content(&mut self, size: usize) -> Vec<u8> {
        let step = 1024 * KIB;
        let mut content = Vec::with_capacity(size);
        for at in (0..size).step_by(step) {
            content.extend_from_slice(&self.request(READ, 0, at, step.min(size - at), &[]));
        }
        content
    }
}

/// The first byte that differs, which says more than two whole disks.
fn assert_same(found: &[u8], expected: &[u8], when: &str) {
    if found != expected {
        let wrong = found.iter().zip(expected).position(|(a, b)| a != b);
        panic!("{when}: {} bytes, first wrong one {wrong:?}", found.len());
    }
}

fn store_with_container() -> TestStore {
    let store = TestStore::new();
    store.small_image("base");
    store.ok(&["create", "base", "--name", "c"]);
    store
}

#[test]
fn a_restarted_server_shows_every_write_zero_and_discard_that_the_killed_one_acknowledged() {
    const SIZE: usize = 64 * KIB * KIB;
    let store = store_with_container();
    let mut server = Server::start(&store, &["c"]);
    let mut client = Client::new(&server.socket, "c");
    let mut expected = client.content(SIZE);
    for round in 1..=6_usize {
        let base = (round % 3) * 1600 * KIB;
        let byte = round as u8;
        // (command, offset, length, what the range holds then), the last two over earlier ones.
        let steps = [
            (WRITE, base, 256 * KIB, byte),
            (WRITE, base + 600 * KIB + 512, 3 * KIB, 0x40 + byte),
            (WRITE_ZEROES, base + 16 * KIB, 32 * KIB, 0),
            (TRIM, base + 128 * KIB, 64 * KIB, 0),
            (WRITE, base + 132 * KIB, 4 * KIB, 0x80 + byte),
            (WRITE, base + 1000 * KIB, 8 * KIB, 0xc0 + byte),
        ];
        for (command, offset, len, byte) in steps {
            match command {
                WRITE => client.write(offset, len, byte),
                _ => {
                    client.request(command, 0, offset, len, &[]);
                }
            }
            expected[offset..offset + len].fill(byte);
        }
        server = server.replaced(&store, &["c"]);
        // The same client, on a new connection.
        assert_same(&client.content(SIZE), &expected, &format!("kill {round}"));
        assert!(client.reconnects >= round as u32, "kill {round}");
    }
    server.kill();
    store.ok(&["check", "--scrub"]);
    let server = Server::start(&store, &["c"]);
    assert_same(&client.content(SIZE), &expected, "after a check");
    drop(server);
}

/// Several clients write, flush and use FUA while the server is killed and started again; none of
/// them sees more than a connection that ends.
#[test]
fn clients_that_reconnect_while_the_server_is_killed_ten_times_lose_no_acknowledged_write() {
    const CLIENTS: usize = 3;
    const BLOCKS: usize = 256;
    let store = store_with_container();
    store.ok(&["create", "base", "--name", "d"]);
    let names = ["c", "d"];
    let server = Server::start(&store, &names);
    let stop = AtomicBool::new(false);
    let done = AtomicU64::new(0);
    let (socket, stop, done) = (&server.socket.clone(), &stop, &done);
    std::thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS)
            .map(|index| {
                scope.spawn(move || {
                    // Two on one export, one on the other, each in a range of its own.
                    let mut client = Client::new(socket, names[index % 2]);
                    let base = (index + 1) * 8 * KIB * KIB;
                    let mut told = vec![None; BLOCKS];
                    for step in 0_usize.. {
                        if stop.load(Ordering::Acquire) {
                            break;
                        }
                        let block = (step * 37 + index) % BLOCKS;
                        let byte = (step % 251) as u8;
                        let data = vec![byte; 4 * KIB];
                        let at = base + block * 4 * KIB;
                        let flags = if step % 11 == 0 { FUA } else { 0 };
                        client.request(WRITE, flags, at, data.len(), &data);
                        told[block] = Some(byte);
                        if step % 17 == 0 {
                            client.request(FLUSH, 0, 0, 0, &[]);
                        }
                        done.fetch_add(1, Ordering::AcqRel);
                    }
                    (client, base, told)
                })
            })
            .collect();
        // Stops the clients also where a restart fails.
        struct Stop<'a>(&'a AtomicBool);
        impl Drop for Stop<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::Release);
            }
        }
        let end = Stop(stop);
        let mut server = server;
        for _ in 0..10 {
            let before = done.load(Ordering::Acquire);
            wait_until("the clients work", || {
                done.load(Ordering::Acquire) > before + 200
            });
            server = server.replaced(&store, &names);
        }
        drop(end);
        for client in clients {
            let (mut client, base, told) = client.join().unwrap();
            assert!(client.reconnects >= 10, "{}", client.reconnects);
            for (block, byte) in told.iter().enumerate() {
                let Some(byte) = byte else { continue };
                let found = client.request(READ, 0, base + block * 4 * KIB, 4 * KIB, &[]);
                assert_same(&found, &vec![*byte; 4 * KIB], &format!("block {block}"));
            }
        }
        drop(server);
    });
    println!("{} writes acknowledged", done.load(Ordering::Acquire));
    store.ok(&["check", "--scrub"]);
}

/// nbdkit as the client: its retry filter opens the connection again and repeats what failed.
#[test]
fn fio_behind_a_client_that_retries_verifies_its_data_while_the_server_is_killed() {
    let store = store_with_container();
    let mut server = Server::start(&store, &["c"]);
    let front = store.path("front.sock");
    let nbdkit = Command::new("nbdkit")
        .args(["-f", "-U"])
        .arg(&front)
        .args(["--filter=retry", "nbd"])
        .arg(format!(
            "uri=nbd+unix:///c?socket={}",
            server.socket.display()
        ))
        .args(["retries=20", "retry-delay=1", "retry-exponential=no"])
        .stdin(Stdio::null())
        .spawn()
        .expect("nbdkit is missing: apt-get install nbdkit");
    let nbdkit = Running(nbdkit);
    wait_until("nbdkit listens", || UnixStream::connect(&front).is_ok());
    let fio = Command::new("fio")
        .args([
            "--name=retried",
            "--ioengine=nbd",
            "--rw=randwrite",
            "--bs=8k",
        ])
        .arg(format!("--uri=nbd+unix:///?socket={}", front.display()))
        .args(["--size=24m", "--offset=32m", "--iodepth=8", "--fsync=16"])
        // Slow enough for kills while it writes.
        .args(["--rate_iops=600", "--verify=crc32c", "--verify_fatal=1"])
        .arg("--verify_state_save=0")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("fio is missing: apt-get install fio");
    let mut fio = Running(fio);
    let mut kills = 0;
    while fio.0.try_wait().unwrap().is_none() && kills < 4 {
        std::thread::sleep(Duration::from_millis(700));
        server = server.replaced(&store, &["c"]);
        kills += 1;
    }
    let status = fio.0.wait().unwrap();
    let mut text = String::new();
    fio.0
        .stdout
        .take()
        .unwrap()
        .read_to_string(&mut text)
        .unwrap();
    fio.0
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut text)
        .unwrap();
    assert!(
        status.success() && !text.contains("verify:"),
        "fio: {status}\n{text}"
    );
    assert!(kills >= 2, "fio ended after {kills} kills\n{text}");
    drop(nbdkit);
    drop(server);
    store.ok(&["check", "--scrub"]);
}
