//! A part of a blob that stands still is asked for a second time, and few others are.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::common::TestStore;
use crate::faulty::read_head;
use crate::lazy::end_fetchers;
use crate::registry_support::{Registry, clean, pushed};

/// How long a request stands still: the registry is waited for longer than any of this test's limits.
const STALL: Duration = Duration::from_secs(8);

/// Stands before a registry, and holds back single requests for parts.
struct Proxy {
    host: String,
    /// The next part stands still.
    stall: Arc<AtomicBool>,
    /// Every part is refused so often.
    busy: Arc<AtomicUsize>,
    parts: Arc<AtomicUsize>,
}

impl Proxy {
    fn before(registry: &Registry) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let proxy = Proxy {
            host: listener.local_addr().unwrap().to_string(),
            stall: Arc::default(),
            busy: Arc::default(),
            parts: Arc::default(),
        };
        let (to, stall, busy, parts) = (
            registry.host(),
            proxy.stall.clone(),
            proxy.busy.clone(),
            proxy.parts.clone(),
        );
        std::thread::spawn(move || {
            for client in listener.incoming() {
                let (to, stall, busy, parts) =
                    (to.clone(), stall.clone(), busy.clone(), parts.clone());
                std::thread::spawn(move || {
                    // A client that goes away has what it wanted.
                    let _ = serve(client.unwrap(), &to, &stall, &busy, &parts);
                });
            }
        });
        proxy
    }
}

fn serve(
    mut client: TcpStream,
    to: &str,
    stall: &AtomicBool,
    busy: &AtomicUsize,
    parts: &AtomicUsize,
) -> std::io::Result<()> {
    let head = read_head(&mut client)?;
    if head.to_ascii_lowercase().contains("\r\nrange: ") {
        parts.fetch_add(1, Ordering::SeqCst);
        let less = |left: usize| left.checked_sub(1);
        if busy
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, less)
            .is_ok()
        {
            let answer = "HTTP/1.1 503 Busy\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
            return client.write_all(answer.as_bytes());
        }
        if stall.swap(false, Ordering::SeqCst) {
            std::thread::sleep(STALL);
        }
    }
    let kept = |line: &&str| !line.to_ascii_lowercase().starts_with("connection:");
    let mut request: Vec<&str> = head.trim_end().lines().filter(kept).collect();
    request.push("Connection: close\r\n\r\n");
    let mut server = TcpStream::connect(to)?;
    server.write_all(request.join("\r\n").as_bytes())?;
    let mut answer = Vec::new();
    server.read_to_end(&mut answer)?;
    client.write_all(&answer)
}

fn counted(store: &TestStore, counter: &str) -> u64 {
    let stats: Value = store.json(&["stats", "c"]);
    stats[0]["fetcher"][counter].as_u64().unwrap()
}

#[test]
fn a_part_that_stands_still_is_asked_for_twice_and_none_is_while_the_registry_is_busy() {
    let (registry, _from, to) = pushed();
    let proxy = Proxy::before(&registry);
    to.ok(&["pull", "--lazy", &format!("{}/web:1", proxy.host), "web"]);
    to.ok(&["create", "web", "--name", "c"]);
    let dir = to.mount("c");
    let shell = std::fs::read("/bin/busybox").unwrap();
    let read = |at: usize| {
        // Nothing is read ahead of it.
        let file = std::fs::File::open(dir.join("bin/sh")).unwrap();
        let random = nix::fcntl::PosixFadviseAdvice::POSIX_FADV_RANDOM;
        nix::fcntl::posix_fadvise(&file, 0, 0, random).unwrap();
        let (mut bytes, began) = (vec![0; 4096], Instant::now());
        file.read_exact_at(&mut bytes, at as u64).unwrap();
        assert_eq!(bytes, shell[at..at + 4096]);
        began.elapsed()
    };
    assert_eq!(counted(&to, "hedges"), 0, "nothing stood still");
    proxy.stall.store(true, Ordering::SeqCst);
    let took = read(shell.len() / 8 * 7 / 4096 * 4096);
    assert!(!proxy.stall.load(Ordering::SeqCst), "no part was asked for");
    assert!(took < STALL / 2, "{took:?}");
    assert_eq!((counted(&to, "hedges"), counted(&to, "hedges_won")), (1, 1));
    // A registry with too much to do is asked no more than once, however long that takes.
    let parts = proxy.parts.load(Ordering::SeqCst);
    proxy.busy.store(1, Ordering::SeqCst);
    read(shell.len() / 2 / 4096 * 4096);
    proxy.stall.store(true, Ordering::SeqCst);
    let took = read(shell.len() / 4 / 4096 * 4096);
    assert!(took >= STALL, "{took:?}");
    assert_eq!(proxy.parts.load(Ordering::SeqCst) - parts, 3);
    assert_eq!(counted(&to, "hedges"), 1);
    assert!(counted(&to, "requests") >= 3);
    to.ok(&["umount", "c"]);
    to.ok(&["rm", "c"]);
    end_fetchers(&to);
    clean(&to);
}
