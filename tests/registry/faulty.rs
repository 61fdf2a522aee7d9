//! A lazy image behind a registry that fails in every way that passes: who reads it sees right bytes and no error.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crate::lazy::{end_fetchers, files};
use crate::registry_support::{Registry, clean, digests, pushed};

/// What is done to requests for parts of blobs, one after the other; then all is well.
const FAULTS: [Fault; 8] = [
    Fault::Says("429 Too Many Requests\r\nRetry-After: 1"),
    Fault::Says("503 Service Unavailable"),
    Fault::Closes,
    Fault::CutsOff,
    Fault::Flips,
    Fault::SendsAllOfIt,
    Fault::Says("504 Gateway Timeout"),
    Fault::StandsStill,
];

#[derive(Debug, Clone, Copy)]
enum Fault {
    /// An answer without the bytes.
    Says(&'static str),
    /// No answer.
    Closes,
    /// The front of the bytes.
    CutsOff,
    /// One of the bytes is another.
    Flips,
    /// The whole blob rather than the part.
    SendsAllOfIt,
    /// Nothing, for longer than a registry is waited for.
    StandsStill,
}

/// Stands before a registry; returns its address, and how many requests it has failed.
fn proxy(registry: &Registry) -> (String, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let host = listener.local_addr().unwrap().to_string();
    let (to, failed) = (registry.host(), Arc::new(AtomicUsize::new(0)));
    let (count, parts) = (failed.clone(), Arc::new(AtomicUsize::new(0)));
    std::thread::spawn(move || {
        for client in listener.incoming() {
            let (to, count, parts) = (to.clone(), count.clone(), parts.clone());
            std::thread::spawn(move || {
                // A client that goes away has what it wanted.
                let _ = serve(client.unwrap(), &to, &parts, &count);
            });
        }
    });
    (host, failed)
}

/// Passes one request on, or fails it.
fn serve(
    mut client: TcpStream,
    to: &str,
    parts: &AtomicUsize,
    failed: &AtomicUsize,
) -> std::io::Result<()> {
    let head = read_head(&mut client)?;
    let is_part = head.contains("/blobs/") && head.to_ascii_lowercase().contains("\r\nrange: ");
    // The first ones are of the pull, which looks whether all is there.
    let fails = is_part && parts.fetch_add(1, Ordering::SeqCst) > 4;
    let fault = match fails {
        true => FAULTS.get(failed.fetch_add(1, Ordering::SeqCst)).copied(),
        false => None,
    };
    match fault {
        Some(Fault::Says(what)) => {
            let answer =
                format!("HTTP/1.1 {what}\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{{}}");
            return client.write_all(answer.as_bytes());
        }
        Some(Fault::Closes) => return Ok(()),
        Some(Fault::StandsStill) => {
            std::thread::sleep(Duration::from_secs(12));
            return Ok(());
        }
        _ => {}
    }
    let range = |line: &&str| !line.to_ascii_lowercase().starts_with("range:");
    let lines = head.trim_end().lines();
    let kept = |line: &&str| {
        let all = matches!(fault, Some(Fault::SendsAllOfIt));
        (!all || range(line)) && !line.to_ascii_lowercase().starts_with("connection:")
    };
    let mut request: Vec<&str> = lines.filter(kept).collect();
    request.push("Connection: close\r\n\r\n");
    let mut server = TcpStream::connect(to)?;
    server.write_all(request.join("\r\n").as_bytes())?;
    let mut answer = Vec::new();
    server.read_to_end(&mut answer)?;
    match fault {
        Some(Fault::CutsOff) => answer.truncate(answer.len() - 20),
        Some(Fault::Flips) => {
            if let Some(byte) = answer.iter_mut().rev().nth(30) {
                *byte ^= 1;
            }
        }
        _ => {}
    }
    client.write_all(&answer)
}

pub fn read_head(client: &mut TcpStream) -> std::io::Result<String> {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        client.read_exact(&mut byte)?;
        head.push(byte[0]);
    }
    Ok(String::from_utf8_lossy(&head).into_owned())
}

#[test]
fn who_reads_a_lazy_image_behind_a_faulty_registry_sees_right_bytes_and_no_error() {
    let (registry, from, to) = pushed();
    let (host, failed) = proxy(&registry);
    let report = to.json(&["pull", "--lazy", &format!("{host}/web:1"), "web"]);
    assert_eq!(report["came"], "lazily");
    assert_eq!(files(&to, "web"), files(&from, "web"));
    to.ok(&["complete", "web"]);
    end_fetchers(&to);
    assert!(
        failed.load(Ordering::SeqCst) >= FAULTS.len(),
        "only {} requests failed",
        failed.load(Ordering::SeqCst)
    );
    assert_eq!(digests(&to, "web"), digests(&from, "web"));
    clean(&to);
}
