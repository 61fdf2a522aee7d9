//! A server of `vellum nbd` is killed after it acknowledged what no flush followed, and another
//! takes its place.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod common;

use std::fs;
use std::path::PathBuf;
use std::process::{ChildStdin, Command, Stdio};
use std::{io::Read, io::Write};

use common::{Running, TestStore, kill, run, wait_until};

fn serve(store: &TestStore, name: &str) -> (Running, PathBuf) {
    let socket = store.path("nbd.sock");
    // The one before may have had no time to remove it.
    let _ = fs::remove_file(&socket);
    let child = store
        .command()
        .args(["-q", "nbd", name, "--socket"])
        .arg(&socket)
        .spawn()
        .unwrap();
    let server = Running(child);
    wait_until("the server listens", || socket.exists());
    (server, socket)
}

fn uri(name: &str, socket: &std::path::Path) -> String {
    format!("nbd+unix:///{name}?socket={}", socket.display())
}

/// A client that keeps its connection until it is killed: qemu-io flushes when it ends in order.
struct Client {
    child: Running,
    input: ChildStdin,
    answers: std::process::ChildStdout,
}

impl Client {
    fn new(uri: &str) -> Client {
        let mut child = Command::new("qemu-io")
            .args(["-f", "raw", "-t", "writeback", "-d", "unmap", uri])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("qemu-io is missing: apt-get install qemu-utils");
        let input = child.stdin.take().unwrap();
        let answers = child.stdout.take().unwrap();
        Client {
            child: Running(child),
            input,
            answers,
        }
    }

    /// Sends commands and waits until the last of them is answered.
    fn say(&mut self, commands: &[String], answers: usize) {
        for command in commands {
            writeln!(self.input, "{command}").unwrap();
        }
        self.input.flush().unwrap();
        let mut text = String::new();
        let mut buf = [0; 4096];
        while text.matches(" ops; ").count() < answers {
            let len = self.answers.read(&mut buf).unwrap();
            assert_ne!(len, 0, "qemu-io ended: {text}");
            text.push_str(&String::from_utf8_lossy(&buf[..len]));
            assert!(!text.contains("failed"), "{text}");
        }
    }
}

fn content(store: &TestStore, name: &str, socket: &std::path::Path) -> Vec<u8> {
    let raw = store.arg("out.raw");
    let _ = fs::remove_file(&raw);
    run("nbdcopy", &[uri(name, socket).as_str(), raw.as_str()]);
    fs::read(raw).unwrap()
}

#[test]
fn a_restarted_server_shows_every_write_zero_and_discard_that_the_killed_one_acknowledged() {
    let store = TestStore::new();
    store.small_image("base");
    store.ok(&["create", "base", "--name", "c"]);
    let (mut server, socket) = serve(&store, "c");
    let mut expected = content(&store, "c", &socket);
    const K: usize = 1024;
    for round in 1..=8_usize {
        let mut client = Client::new(&uri("c", &socket));
        let base = (round % 3) * 1600 * K;
        // (command, offset, length, what the range holds then)
        let steps: [(&str, usize, usize, u8); 7] = [
            ("write", base, 256 * K, round as u8),
            ("write", base + 600 * K + 512, 3 * K, 0x40 + round as u8),
            ("write -z", base + 16 * K, 32 * K, 0),
            ("write -zu", base + 64 * K, 32 * K, 0),
            ("discard", base + 128 * K, 64 * K, 0),
            ("write", base + 132 * K, 4 * K, 0x80 + round as u8),
            ("write", base + 1000 * K, 8 * K, 0xc0 + round as u8),
        ];
        let mut commands = Vec::new();
        for (verb, offset, len, byte) in steps {
            commands.push(match verb {
                "write" => format!("write -P {byte} {offset} {len}"),
                verb => format!("{verb} {offset} {len}"),
            });
            if verb == "discard" {
                // A discarded block of the image shows the image's bytes or zeroes: read it below.
                continue;
            }
            expected[offset..offset + len].fill(byte);
        }
        client.say(&commands, steps.len());
        // What it shows of the discarded range is what must stay.
        let (from, to) = (base + 128 * K, base + 192 * K);
        let shown = content(&store, "c", &socket);
        expected[from..to].copy_from_slice(&shown[from..to]);
        expected[base + 132 * K..base + 136 * K].fill(0x80 + round as u8);
        assert!(shown == expected, "round {round}: before the kill");
        kill(server.0.id() as i32);
        server.0.wait().unwrap();
        kill(client.child.0.id() as i32);
        (server, _) = serve(&store, "c");
        let found = content(&store, "c", &socket);
        let wrong = found.iter().zip(&expected).position(|(a, b)| a != b);
        assert_eq!(wrong, None, "round {round}: first wrong byte");
    }
    kill(server.0.id() as i32);
    server.0.wait().unwrap();
    store.ok(&["check", "--scrub"]);
    let (server, socket) = serve(&store, "c");
    assert!(content(&store, "c", &socket) == expected, "after a check");
    drop(server);
}
