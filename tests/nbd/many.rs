//! Many clients at once: all are served, alike, by a bounded number of threads in bounded memory.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::{Duration, Instant};

use vellum_export::nbd::ServerConfig;

use crate::common::{TestStore, wait_until};
use crate::lab::{Lab, PATIENCE};
use crate::nbd_client::{FUA, WRITE_ZEROES};
use crate::nbd_server::Server;
use crate::raw::{Client, DISC, FLUSH, READ, Running, WRITE, header};

const EXPORTS: [&str; 4] = ["c0", "c1", "c2", "c3"];
const CLIENTS: usize = 64;
const BLOCK: u64 = 4096;
/// Blocks that each client has for itself.
const BLOCKS: u64 = 128;
/// How long the clients work.
const WORK: Duration = Duration::from_secs(3);
/// Requests that a client has in flight.
const DEPTH: u64 = 4;

fn store_with_containers() -> TestStore {
    let store = TestStore::new();
    store.small_image("base");
    for name in EXPORTS {
        store.ok(&["create", "base", "--name", name]);
    }
    store
}

/// A number of the kernel's about a process: the line `name` of its status.
fn status(process: u32, name: &str) -> usize {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(name));
    let number = line.unwrap().trim_start_matches(':').split_whitespace();
    number.take(1).next().unwrap().parse().unwrap()
}

fn block(id: u64, round: u64, number: u64) -> Vec<u8> {
    let word = (id << 48 | round << 8 | (number & 0xff)).to_le_bytes();
    word.repeat(BLOCK as usize / word.len())
}

/// Mixed requests, [`DEPTH`] at a time, until `until`; how many were answered. What is read is what was written.
fn work(client: &mut Client, id: u64, until: Instant) -> u64 {
    let base = (id / EXPORTS.len() as u64) * BLOCKS * BLOCK + (8 << 20);
    let mut model: BTreeMap<u64, Vec<u8>> = BTreeMap::new();
    let mut answered = 0;
    for round in 0.. {
        if Instant::now() >= until {
            break;
        }
        // Each round has blocks of its own, so that the order of its requests does not matter.
        let numbers = (0..DEPTH).map(|i| (round * 7 + i * (BLOCKS / DEPTH)) % BLOCKS);
        let mut bytes = Vec::new();
        let mut reads = BTreeMap::new();
        for (cookie, number) in (1..).zip(numbers) {
            let at = base + number * BLOCK;
            let mut send = |command, flags| {
                bytes.extend(header(command, flags, cookie, at, BLOCK as u32));
            };
            match (round + cookie) % 8 {
                0..=3 => {
                    send(WRITE, if round % 16 == 0 { FUA } else { 0 });
                    let data = block(id, round, number);
                    bytes.extend(&data);
                    model.insert(number, data);
                }
                4 => {
                    send(WRITE_ZEROES, 0);
                    model.insert(number, vec![0; BLOCK as usize]);
                }
                5 => bytes.extend(header(FLUSH, 0, cookie, 0, 0)),
                _ if model.contains_key(&number) => {
                    send(READ, 0);
                    reads.insert(cookie, number);
                }
                _ => bytes.extend(header(FLUSH, 0, cookie, 0, 0)),
            }
        }
        client.stream.write_all(&bytes).unwrap();
        for _ in 0..DEPTH {
            let (error, cookie) = client.reply().unwrap();
            assert_eq!(error, 0, "client {id}, round {round}");
            if let Some(number) = reads.get(&cookie) {
                let mut data = vec![0; BLOCK as usize];
                client.stream.read_exact(&mut data).unwrap();
                assert!(data == model[number], "client {id}, round {round}");
            }
            answered += 1;
        }
    }
    for (number, data) in &model {
        let found = client.read(base + number * BLOCK, BLOCK as u32);
        assert!(found == *data, "client {id}, block {number}");
    }
    answered
}

#[test]
fn sixty_four_clients_of_four_exports_are_served_alike_with_few_threads_and_little_memory() {
    let store = store_with_containers();
    let server = Server::start(&store, &EXPORTS);
    let process = server.process.0.id();
    // One of them may be of the client by which it was found to listen.
    let threads_before = status(process, "Threads");
    let before = status(process, "VmRSS");
    let together = Barrier::new(CLIENTS + 1);
    let (socket, together) = (&server.socket, &together);
    let (answered, threads) = thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS as u64)
            .map(|id| {
                scope.spawn(move || {
                    let export = EXPORTS[id as usize % EXPORTS.len()];
                    let mut client = Client::of(socket, export).unwrap();
                    together.wait();
                    let answered = work(&mut client, id, Instant::now() + WORK);
                    client.send(DISC, 0, 0, 0, 0);
                    client.closed();
                    answered
                })
            })
            .collect();
        together.wait();
        thread::sleep(WORK / 2);
        let threads = status(process, "Threads");
        let joined = clients.into_iter().map(|client| client.join().unwrap());
        (joined.collect::<Vec<_>>(), threads)
    });
    let (slowest, fastest) = (
        answered.iter().min().unwrap(),
        answered.iter().max().unwrap(),
    );
    let took = status(process, "VmHWM").saturating_sub(before) >> 10;
    eprintln!("{slowest} to {fastest} answers, {threads} threads, {took} MiB");
    assert!(slowest * 5 >= *fastest, "{answered:?}");
    // One for each request in flight, one that reads the next, and one that was too many; and what a layer has.
    let of_clients = CLIENTS * (DEPTH as usize + 2);
    assert!(
        threads <= threads_before + of_clients + 4 * EXPORTS.len(),
        "{threads} threads"
    );
    assert!(took <= 64, "{took} MiB");
    wait_until("the threads have ended", || {
        status(process, "Threads") <= threads_before
    });
    server.process.end();
    store.ok(&["check", "--scrub"]);
}

#[test]
fn as_many_clients_as_are_served_may_connect_at_the_same_moment() {
    let running = Running::new(ServerConfig::default(), crate::raw::memory());
    let connected: Vec<_> = (0..256).map(|_| running.silent()).collect();
    let mut clients: Vec<_> = connected
        .into_iter()
        .map(|stream| Client::go(stream, "disk").unwrap())
        .collect();
    for (number, client) in clients.iter_mut().enumerate() {
        client.write(0, number as u64 * BLOCK, &[number as u8; 512]);
    }
    assert!(running.try_client().is_err());
}

/// Runs a client that must succeed.
fn ok(program: &str, arguments: &[String]) {
    let output = Command::new("timeout")
        .args(["120", program])
        .args(arguments)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {said}");
}

fn uri(socket: &Path, export: &str) -> String {
    format!("nbd+unix:///{export}?socket={}", socket.display())
}

#[test]
fn sixty_four_jobs_of_fio_verify_what_they_wrote_and_nbdcopy_with_64_connections_copies_it() {
    let store = store_with_containers();
    let server = Server::start(&store, &EXPORTS);
    let mut fio: Vec<String> = [
        "--ioengine=nbd",
        "--thread=1",
        "--rw=randrw",
        "--bsrange=4k-128k",
        "--blockalign=4k",
        "--size=1m",
        "--offset=8m",
        "--offset_increment=1m",
        "--numjobs=16",
        "--iodepth=4",
        "--fsync=16",
        "--loops=2",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--do_verify=1",
        "--verify_state_save=0",
    ]
    .map(String::from)
    .into();
    for name in EXPORTS {
        fio.push(format!("--name={name}"));
        fio.push(format!("--uri={}", uri(&server.socket, name)));
    }
    ok("fio", &fio);
    let copies = ["first", "second"].map(|name| store.arg(name));
    for copy in &copies {
        let from = uri(&server.socket, "c0");
        let arguments = ["--connections=64", "--requests=64", &from, copy].map(String::from);
        ok("nbdcopy", &arguments);
    }
    let [first, second] = copies.map(|copy| std::fs::read(copy).unwrap());
    assert!(first == second && first.iter().any(|byte| *byte != 0));
    server.process.end();
}

#[test]
fn a_client_that_finds_no_place_is_told_why_and_so_is_the_log() {
    let store = store_with_containers();
    let log = store.path("nbd.log");
    let server = Server::started(&store, &["c0"], |command| {
        command
            .args(["--max-connections", "2"])
            .env("VELLUM_LOG", "warn")
            .stderr(std::fs::File::create(&log).unwrap());
    });
    let mut clients = [0, 1].map(|_| Client::of(&server.socket, "c0").unwrap());
    for client in &mut clients {
        client.write(0, 0, &[1; 512]);
    }
    let said = Client::of(&server.socket, "c0").err().unwrap().to_string();
    assert!(said.contains("serves 2 clients already"), "{said}");
    let said = std::fs::read_to_string(&log).unwrap();
    assert!(said.contains("--max-connections"), "{said}");
    // With a client that people use, too.
    let output = Command::new("qemu-img")
        .args(["info", &uri(&server.socket, "c0")])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    let told = said.contains("serves 2 clients already");
    assert!(!output.status.success() && told, "{said}");
    for client in &mut clients {
        client.write(0, 0, &[2; 512]);
    }
    server.process.end();
}

fn slow(helpers: usize) -> (Arc<Lab>, Running) {
    let config = ServerConfig {
        helpers,
        ..ServerConfig::default()
    };
    let lab = Arc::new(Lab::slow(Duration::from_millis(20)));
    (lab.clone(), Running::new(config, lab))
}

/// Threads of this process that help a connection.
fn helpers() -> usize {
    let threads = std::fs::read_dir("/proc/self/task").unwrap();
    let name = |thread: std::io::Result<std::fs::DirEntry>| {
        std::fs::read_to_string(thread.unwrap().path().join("comm")).unwrap_or_default()
    };
    threads
        .map(name)
        .filter(|name| name.trim() == "nbd-helper")
        .count()
}

#[test]
fn connections_share_a_bounded_number_of_threads_and_none_is_left_without() {
    const READS: u64 = 16;
    let (lab, running) = slow(4);
    let mut clients: Vec<_> = (0..8).map(|_| running.client()).collect();
    let began = Instant::now();
    for _ in 0..2 {
        for client in &mut clients {
            for cookie in 0..READS {
                client.send(READ, 0, cookie, cookie * BLOCK, BLOCK as u32);
            }
        }
        for client in &mut clients {
            for _ in 0..READS {
                assert_eq!(client.reply().unwrap().0, 0);
                client.stream.read_exact(&mut [0; BLOCK as usize]).unwrap();
            }
        }
    }
    assert!(began.elapsed() < PATIENCE);
    let most = lab.most.load(SeqCst);
    // Two for each connection, and four more.
    assert!((12..=20).contains(&most), "{most} at a time");
}

#[test]
fn threads_that_have_nothing_to_do_end_and_others_come_when_they_are_wanted() {
    let (lab, running) = slow(256);
    let mut client = running.client();
    for _ in 0..2 {
        lab.most.store(0, SeqCst);
        for cookie in 0..32 {
            client.send(READ, 0, cookie, cookie * BLOCK, BLOCK as u32);
        }
        for _ in 0..32 {
            assert_eq!(client.reply().unwrap().0, 0);
            client.stream.read_exact(&mut [0; BLOCK as usize]).unwrap();
        }
        assert!(lab.most.load(SeqCst) >= 8);
        assert!(helpers() >= 8);
        wait_until("the threads end", || helpers() <= 1);
    }
}

#[test]
fn without_a_thread_to_spare_no_write_waits_for_room_in_the_place_of_the_discard_that_makes_it() {
    let lab = Arc::new(Lab::new());
    lab.full.store(true, SeqCst);
    let config = ServerConfig {
        helpers: 0,
        ..ServerConfig::default()
    };
    let running = Running::new(config, lab.clone());
    let mut client = running.client();
    for cookie in 0..4 {
        client.send_write(0, cookie, cookie * BLOCK, &[1; 4096]);
    }
    client.send(crate::raw::TRIM, 0, 77, 0, 4096);
    // All but one of the writes are told at once.
    let mut replies: Vec<_> = (0..4).map(|_| client.reply().unwrap()).collect();
    replies.sort_unstable();
    assert!(replies.contains(&(0, 77)), "{replies:?}");
    assert_eq!(replies.iter().filter(|(error, _)| *error == 28).count(), 3);
    lab.full.store(false, SeqCst);
    assert_eq!(client.reply().unwrap().0, 0);
}
