//! What processes say to each other, and what containerd's clients say to us.

use std::cell::RefCell;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use vellum_base::{Error, ErrorKind};
use vellum_core::chain::LatencySnapshot;
use vellum_engine::device::{DeviceStats, MapPart};
use vellum_export::device::RunState;
use vellum_export::device::control::{ControlHandler, Reply};
use vellum_export::device::control_server::converse;
use vellum_fs::run_dir::RunDir;
use vellum_snapshotter::authority::Connection;

use crate::Seed;
use crate::input::with_mode;

struct Echo;

impl ControlHandler for Echo {
    fn handle(
        &self,
        verb: &str,
        args: serde_json::Value,
    ) -> vellum_base::Result<serde_json::Value> {
        match verb {
            "echo" => Ok(args),
            _ => Err(Error::new(
                ErrorKind::Unsupported,
                format!("no command {verb:?}"),
            )),
        }
    }
}

/// The control socket, by the first byte: lines to a server, each of which gets one line of answer
/// unless the connection ends; or an answer, a device's counters, its map, its state (in which
/// `@BOOT@` stands for the id of this boot).
pub fn control(input: &[u8]) {
    let Some((kind, rest)) = input.split_first() else {
        return;
    };
    match kind % 5 {
        0 => lines(rest),
        1 => {
            if let Ok(reply) = serde_json::from_slice::<Reply>(rest)
                && let Some(failure) = reply.failure
            {
                let _ = Error::from(failure).to_string();
            }
        }
        2 => {
            if let Ok(snapshot) = serde_json::from_slice::<LatencySnapshot>(rest) {
                let histogram = snapshot.histogram().unwrap();
                let _ = (
                    histogram.value_at_quantile(0.99),
                    snapshot.count_up_to(1 << 20),
                );
            }
        }
        3 => {
            if let Ok(stats) = serde_json::from_slice::<DeviceStats>(rest) {
                let text = serde_json::to_vec(&stats).unwrap();
                assert_eq!(serde_json::from_slice::<DeviceStats>(&text).unwrap(), stats);
            }
            let _ = serde_json::from_slice::<MapPart>(rest);
        }
        _ => {
            let temporary = tempfile::tempdir().unwrap();
            let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
            let state = String::from_utf8_lossy(rest).replace("@BOOT@", boot.trim());
            std::fs::write(temporary.path().join("state.json"), state).unwrap();
            let dir = RunDir::at(temporary.path().to_owned());
            if let Some(state) = RunState::read(&dir).unwrap() {
                state.write(&dir).unwrap();
                assert!(RunState::read(&dir).unwrap().is_some());
            }
        }
    }
}

fn lines(input: &[u8]) {
    // Few enough that a socket holds all the answers.
    let mut ends = input.iter().enumerate().filter(|(_, byte)| **byte == b'\n');
    let input = match ends.nth(50) {
        Some((end, _)) => &input[..end],
        None => input,
    };
    let (mut client, server) = UnixStream::pair().unwrap();
    client.write_all(input).unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    let ended = converse(&server, || (), |verb, args| Echo.handle(verb, args));
    drop(server);
    let mut answers = String::new();
    client.read_to_string(&mut answers).unwrap();
    let mut count = 0;
    for line in answers.lines() {
        let reply: Reply = serde_json::from_str(line).unwrap();
        assert_eq!(reply.ok, reply.failure.is_none());
        count += 1;
    }
    if ended.is_ok() {
        let asked = input.split_inclusive(|byte| *byte == b'\n').count();
        assert_eq!(count, asked);
    }
}

pub fn control_seeds() -> Vec<Seed> {
    let seed =
        |name: &str, kind: u8, text: &str| (name.to_owned(), with_mode(kind, text.as_bytes()));
    let stats = serde_json::to_string(&DeviceStats::default()).unwrap();
    vec![
        seed(
            "lines",
            0,
            "{\"verb\":\"echo\",\"args\":[1,{\"a\":null}]}\n{\"verb\":\"status\"}\nnonsense\n",
        ),
        seed("line-without-end", 0, "{\"verb\":\"echo\"}"),
        seed("answer", 1, r#"{"ok":true,"result":{"a":[1,2]}}"#),
        seed(
            "failure",
            1,
            r#"{"ok":false,"result":null,"kind":"NoSpace","error":"full"}"#,
        ),
        seed(
            "latency",
            2,
            r#"{"count":3,"sum_ns":900,"max_ns":500,"buckets":[[200,1],[511,2]]}"#,
        ),
        seed("counters", 3, &stats),
        seed(
            "map",
            3,
            r#"{"depth":2,"virtual_size":1048576,"runs":[[5,-1],[3,0],[248,2]]}"#,
        ),
        seed(
            "state",
            4,
            r#"{"version":1,"boot_id":"@BOOT@","status":"serving","error":null,"supervisor":{"pid":1,"start":2},"worker":null,"standby":null,"features":null,"read_only":false,"generation":0}"#,
        ),
    ]
}

thread_local! {
    static RUNTIME: RefCell<tokio::runtime::Runtime> = RefCell::new(
        tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .build()
            .unwrap()
    );
}

/// What a connection makes of `input` when it comes in pieces of `step` bytes.
fn through(input: &[u8], step: usize) -> Vec<u8> {
    RUNTIME.with_borrow_mut(|runtime| {
        runtime.block_on(async {
            let (mut client, server) = tokio::net::UnixStream::pair().unwrap();
            let mut connection = Connection::new(server);
            let mut out = Vec::new();
            let sending = async {
                for piece in input.chunks(step) {
                    client.write_all(piece).await.unwrap();
                    tokio::task::yield_now().await;
                }
                drop(client);
            };
            let receiving = connection.read_to_end(&mut out);
            let ((), received) = tokio::join!(sending, receiving);
            received.unwrap();
            out
        })
    })
}

fn frame(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let [a, b, c, ..] = bytes else {
        return None;
    };
    let len = u32::from_be_bytes([0, *a, *b, *c]) as usize;
    bytes.split_at_checked(9 + len)
}

/// The bytes of an HTTP/2 connection on their way in, whose `:authority` is replaced.
///
/// * It does not matter in which pieces they come.
/// * Frames stay frames; only those with headers change, and they never grow.
pub fn authority(input: &[u8]) {
    let Some((step, input)) = input.split_first() else {
        return;
    };
    let out = through(input, input.len().max(1));
    assert!(
        through(input, usize::from(*step) * 4 + 1) == out,
        "in pieces it becomes something else"
    );
    let (Some(mut before), Some(mut after)) = (input.get(24..), out.get(24..)) else {
        assert_eq!(input, out);
        return;
    };
    assert_eq!(input[..24], out[..24]);
    while let Some((was, rest)) = frame(before) {
        let (is, rest_after) = frame(after).expect("a frame is gone");
        assert_eq!(was[3..9], is[3..9]);
        assert!(is.len() <= was.len());
        assert!(was[3] == 1 || was == is, "a frame without headers changed");
        (before, after) = (rest, rest_after);
    }
    assert_eq!(before, after);
}

pub fn authority_seeds() -> Vec<Seed> {
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    let frame = |kind: u8, flags: u8, payload: &[u8]| {
        let len = (payload.len() as u32).to_be_bytes();
        [&len[1..], &[kind, flags, 0, 0, 0, 1], payload].concat()
    };
    let path = b"%2Frun%2Fvellum%2Fvellum.sock";
    let mut block = vec![0x83, 0x86, 0x41, path.len() as u8];
    block.extend(path);
    block.extend([0x44, 2, b'/', b'x', 0x40, 1, b'a', 1, b'b']);
    let padded = [&[3u8][..], &block, &[0, 0, 0]].concat();
    let priority = [&[0, 0, 0, 0, 16][..], &block].concat();
    let whole = |frames: &[Vec<u8>]| [&[7u8][..], preface, &frames.concat()].concat();
    vec![
        (
            "call".into(),
            whole(&[
                frame(4, 0, &[0, 3, 0, 0, 0, 100]),
                frame(1, 4, &block),
                frame(0, 1, b"data"),
            ]),
        ),
        ("padded".into(), whole(&[frame(1, 12, &padded)])),
        (
            "priority".into(),
            whole(&[frame(1, 0x24, &priority), frame(9, 4, &block)]),
        ),
        ("cut".into(), whole(&[frame(1, 4, &block)[..20].to_vec()])),
    ]
}
