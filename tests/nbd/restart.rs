//! `vellum nbd` is killed and started again: clients that reconnect find their export, with every
//! write that was acknowledged, flushed or not.

use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::common::{Running, TestStore, wait_until};
use crate::nbd_client::{Client, FLUSH, FUA, READ, TRIM, WRITE, WRITE_ZEROES};
use crate::nbd_server::Server;

const KIB: usize = 1024;

/// The first byte that differs, which says more than two whole disks.
fn assert_same(found: &[u8], expected: &[u8], when: &str) {
    if found != expected {
        let wrong = found.iter().zip(expected).position(|(a, b)| a != b);
        panic!("{when}: {} bytes, first wrong one {wrong:?}", found.len());
    }
}

/// Bytes of data in the store's layers.
fn on_disk(store: &TestStore) -> u64 {
    let layers = std::fs::read_dir(store.root.join("layers")).unwrap();
    let data = layers.filter_map(|layer| layer.unwrap().path().join("data").metadata().ok());
    data.map(|data| data.blocks() * 512).sum()
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

/// Without that the client whose flush it was, and those that wait for the same flush, would wait for
/// ever, and nothing would start the server again.
#[test]
fn a_panic_ends_the_server_with_advice_and_the_next_one_has_all_that_was_acknowledged() {
    const SIZE: usize = 64 * KIB * KIB;
    let store = store_with_container();
    let log = store.path("nbd.log");
    let mut server = Server::started(&store, &["c"], |command| {
        command
            .env(vellum_base::crash_point::PANIC_VARIABLE, "nbd: flush:2")
            // For a core file, where the host writes those.
            .current_dir(store.path("."))
            .stderr(std::fs::File::create(&log).unwrap());
    });
    let mut client = Client::new(&server.socket, "c");
    let mut other = Client::new(&server.socket, "c");
    let mut expected = client.content(SIZE);
    client.write(0, 64 * KIB, 1);
    client.request(FLUSH, 0, 0, 0, &[]);
    client.write(128 * KIB, 64 * KIB, 2);
    other.write(512 * KIB, 4 * KIB, 3);
    expected[..64 * KIB].fill(1);
    expected[128 * KIB..192 * KIB].fill(2);
    expected[512 * KIB..516 * KIB].fill(3);
    let (client, other, expected) = std::thread::scope(|scope| {
        // Answered by the next server.
        let flush = scope.spawn(|| {
            client.request(FLUSH, 0, 0, 0, &[]);
            client
        });
        let status = server.process.0.wait().unwrap();
        assert_eq!(status.signal(), Some(libc::SIGABRT), "{status}");
        let said = std::fs::read_to_string(&log).unwrap();
        let place = said.find("VELLUM_PANIC_AT").expect(&said);
        let advice = said.find("Start it again").expect(&said);
        assert!(place < advice && said.contains("report"), "{said}");
        server = Server::start(&store, &["c"]);
        (flush.join().unwrap(), other, expected)
    });
    for (mut client, who) in [(client, "the one that flushed"), (other, "the other")] {
        assert_same(&client.content(SIZE), &expected, who);
        assert!(client.reconnects >= 1, "{who}");
    }
    server.kill();
    store.ok(&["check", "--scrub"]);
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
    let mut ended = false;
    while kills < 4 {
        // It writes each block once, so these are spread over all that it does, however fast it is.
        let before = on_disk(&store);
        wait_until("fio writes another part, or ends", || {
            ended = fio.0.try_wait().unwrap().is_some();
            ended || on_disk(&store) >= before + (4 << 20)
        });
        if ended {
            break;
        }
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
