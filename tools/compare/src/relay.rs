//! A delay line: passes on what comes over TCP, later. For links with a round trip in kernels without
//! netem, whose queue would delay packets; this delays bytes, so a connection is made at once.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

/// Bytes that are taken at once.
const PIECE: usize = 64 << 10;
/// Pieces under way in one direction of a connection: 32 MiB, more than any link here holds.
const PIECES: usize = 512;

/// Relays connections to `listen` to `to`, for ever; each direction adds `delay`.
///
/// # Errors
/// When it cannot listen or accept.
pub fn listen(listen: &str, to: &str, delay: Duration) -> Result<()> {
    let listener = TcpListener::bind(listen).with_context(|| format!("listening on {listen}"))?;
    serve(&listener, to, delay)
}

fn serve(listener: &TcpListener, to: &str, delay: Duration) -> Result<()> {
    for client in listener.incoming() {
        let client = client.context("accepting a connection")?;
        // A client whose server is not there sees its connection closed.
        if let Err(error) = connect(client, to, delay) {
            eprintln!("relay: {to}: {error:#}");
        }
    }
    Ok(())
}

fn connect(client: TcpStream, to: &str, delay: Duration) -> Result<()> {
    let server = TcpStream::connect(to)?;
    for stream in [&client, &server] {
        stream.set_nodelay(true)?;
    }
    let (back, forth) = (server.try_clone()?, client.try_clone()?);
    thread::spawn(move || pass(client, server, delay));
    thread::spawn(move || pass(back, forth, delay));
    Ok(())
}

/// Passes on one direction until its end, or until either side is gone.
fn pass(mut from: TcpStream, mut to: TcpStream, delay: Duration) {
    let (sender, receiver) = mpsc::sync_channel::<(Instant, Vec<u8>)>(PIECES);
    thread::spawn(move || {
        for (due, bytes) in receiver {
            thread::sleep(due.saturating_duration_since(Instant::now()));
            if to.write_all(&bytes).is_err() {
                break;
            }
        }
        drop(to.shutdown(Shutdown::Write));
    });
    let mut piece = vec![0; PIECE];
    while let Ok(read) = from.read(&mut piece) {
        let bytes = piece.get(..read).unwrap_or_default().to_vec();
        if read == 0 || sender.send((Instant::now() + delay, bytes)).is_err() {
            break;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_come_whole_in_order_and_later_in_both_directions() {
        let relay = TcpListener::bind("127.0.0.1:0").unwrap();
        let listen = relay.local_addr().unwrap();
        let echo = TcpListener::bind("127.0.0.1:0").unwrap();
        let to = echo.local_addr().unwrap().to_string();
        thread::spawn(move || {
            let (mut stream, _) = echo.accept().unwrap();
            let mut all = Vec::new();
            stream.read_to_end(&mut all).unwrap();
            stream.write_all(&all).unwrap();
        });
        let delay = Duration::from_millis(40);
        thread::spawn(move || serve(&relay, &to, delay).unwrap());
        let mut client = TcpStream::connect(listen).unwrap();
        let sent: Vec<u8> = (0..3_000_000_u32).map(|n| (n / 7) as u8).collect();
        let start = Instant::now();
        client.write_all(&sent).unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        let mut came = Vec::new();
        client.read_to_end(&mut came).unwrap();
        assert!(came == sent);
        assert!(start.elapsed() >= 2 * delay, "{:?}", start.elapsed());
    }
}
