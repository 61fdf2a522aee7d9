//! TCP ports for servers that a test starts.
#![allow(missing_docs)]

use std::net::TcpListener;
use std::ops::Range;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};

/// Ports that the kernel gives to nobody who does not name one: a server that is started again, or only later,
/// finds its port as it was.
const PORTS: Range<u16> = 10_000..30_000;

/// A port of this host that is free, and that no other test gets while this one's process lives.
pub fn free_port() -> u16 {
    let first = std::process::id() as usize * 97;
    let ports = (first..).map(|number| PORTS.start + (number % PORTS.len()) as u16);
    let is_free = |port: &u16| {
        let name = format!("vellum-test-port-{port}");
        let name = SocketAddr::from_abstract_name(name).unwrap();
        let Ok(taken) = UnixListener::bind_addr(&name) else {
            return false;
        };
        let free = TcpListener::bind(("127.0.0.1", *port)).is_ok();
        if free {
            // Until the process ends.
            std::mem::forget(taken);
        }
        free
    };
    ports.take(PORTS.len()).find(is_free).expect("a free port")
}
