//! TCP sockets to listen on.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, ToSocketAddrs};

use vellum_base::error::{Error, ErrorKind, Result};

/// The port that IANA keeps for NBD.
const PORT: u16 = 10809;
/// Listens on TCP. `address` is `HOST:PORT`, or `PORT`, `:PORT` or nothing for this host alone
/// (127.0.0.1) and the port that it names or NBD's, 10809. To be reached from other hosts the
/// address has to say so, as in `0.0.0.0:10809`.
///
/// # Errors
/// [`ErrorKind::InvalidInput`] for an address that cannot be resolved, [`ErrorKind::InUse`] when
/// the port is taken.
pub fn bind_tcp(address: &str) -> Result<TcpListener> {
    let loopback = |port| vec![SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port)];
    let port = address.strip_prefix(':').unwrap_or(address);
    let addresses = if port.is_empty() {
        loopback(PORT)
    } else if let Ok(port) = port.parse() {
        loopback(port)
    } else if let Ok(ip) = address.parse::<IpAddr>() {
        vec![SocketAddr::new(ip, PORT)]
    } else {
        address
            .to_socket_addrs()
            .map_err(|error| {
                Error::with_source(
                    ErrorKind::InvalidInput,
                    format!("{address:?} is not an address to listen on, as 127.0.0.1:10809 is"),
                    error,
                )
            })?
            .collect()
    };
    TcpListener::bind(addresses.as_slice()).map_err(|error| match error.kind() {
        io::ErrorKind::AddrInUse => Error::with_source(
            ErrorKind::InUse,
            format!("something listens on {address:?} already: choose another port"),
            error,
        ),
        _ => Error::io(format!("listening on {address:?}"), error),
    })
}
