//! The limits of a server.

use std::time::Duration;

use super::tls::TlsConfig;

/// Limits of a server, and its TLS.
#[derive(Debug, Clone)]
pub struct ServerConfig {
    /// Clients served at once, over all exports. One more takes the place of a client that was let
    /// in longer ago than a handshake may take and has asked for nothing since; where there is
    /// none, it is refused with a message when it asks for an export.
    pub max_connections: usize,
    /// Clients in their handshake at once. When there are more, the one that has taken longest
    /// is dropped: real clients are through in milliseconds. Best not fewer than `max_connections`, since
    /// all of those connect again at the same moment when the server was started again.
    pub max_handshakes: usize,
    /// How long a handshake may take in all.
    pub handshake_timeout: Duration,
    /// How long a served client may stall in the middle of a request, or not take its replies.
    /// Between requests it may be silent for ever.
    pub stall_timeout: Duration,
    /// How long [`super::Server::shutdown`] waits for requests in flight before it closes the sockets,
    /// and how long after that for the device before it gives up.
    pub drain_timeout: Duration,
    /// Threads of one connection, at least 1, hence its requests in flight.
    pub threads_per_connection: usize,
    /// Threads of one connection whose requests may wait for what others bring, such as the blocks of a lazy image: they
    /// are started as requests wait.
    pub threads_where_reads_stall: usize,
    /// Threads of all connections together, beyond two that each may have. A connection that gets none
    /// serves its slow requests with those two.
    pub helpers: usize,
    /// Bytes of requests longer than 64 KiB that one connection may have in flight. A single
    /// request of up to 32 MiB is served whatever this says.
    pub bytes_in_flight: usize,
    /// Bytes that the requests of all connections may take, beyond 2 MiB that each connection has
    /// for one request. (Longer writes go to the device in pieces, as they come.) A request that
    /// finds no room waits for others to end; one alone is served whatever it takes.
    pub memory: usize,
    /// Serve over TLS, and only so.
    pub tls: Option<TlsConfig>,
}

impl Default for ServerConfig {
    fn default() -> Self {
        ServerConfig {
            max_connections: 256,
            max_handshakes: 256,
            handshake_timeout: Duration::from_secs(10),
            stall_timeout: Duration::from_secs(30),
            drain_timeout: Duration::from_secs(10),
            threads_per_connection: 16,
            // Linux sends 128 requests, and one thread reads on.
            threads_where_reads_stall: 130,
            helpers: 1024,
            bytes_in_flight: 16 << 20,
            memory: 256 << 20,
            tls: None,
        }
    }
}
