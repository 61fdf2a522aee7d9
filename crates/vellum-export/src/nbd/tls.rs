//! TLS: the certificates, and a stream that several threads can use.

use std::fmt;
use std::io::{self, Read, Write};
use std::path::Path;
use std::sync::Arc;

use nix::sys::socket::Shutdown;
use parking_lot::Mutex;
use rustls::crypto::ring;
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConnection};
use rustls_pki_types::pem::{self, PemObject};
use rustls_pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer};

use super::stream::{Socket, Stream};
use vellum_base::error::{Error, ErrorKind, Result};

/// Bytes of ciphertext that are received at once.
const CIPHERTEXT: usize = 64 << 10;
/// Bytes of ciphertext that may wait for the socket while plaintext is taken in.
const OUTGOING: usize = 256 << 10;

/// Whether clients have to show a certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClientCertificates {
    /// Every client needs one that `ca-cert.pem` vouches for, and `ca-crl.pem`, where that is
    /// there, does not revoke.
    Required,
    /// Clients need none: TLS encrypts and proves who the server is, and anybody may connect.
    NotRequired,
}

/// TLS for a server. With it the server refuses to serve in plain text.
#[derive(Clone)]
pub struct TlsConfig {
    config: Arc<rustls::ServerConfig>,
}

impl TlsConfig {
    /// Reads the files that QEMU, nbdkit and libnbd use too from the directory `dir`:
    /// `server-cert.pem`, `server-key.pem`, and for client certificates `ca-cert.pem` and
    /// `ca-crl.pem`.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] for a missing file, [`ErrorKind::InvalidInput`] for one that does
    /// not hold what its name says or does not fit the others.
    pub fn load(dir: &Path, clients: ClientCertificates) -> Result<Self> {
        let chain: Vec<CertificateDer<'static>> = load_all(&dir.join("server-cert.pem"))?;
        let key_path = dir.join("server-key.pem");
        let key = PrivateKeyDer::from_pem_file(&key_path)
            .map_err(|error| unreadable(&key_path, error))?;
        let provider = Arc::new(ring::default_provider());
        let builder = rustls::ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(|error| unusable(dir, error))?;
        let builder = match clients {
            ClientCertificates::NotRequired => builder.with_no_client_auth(),
            ClientCertificates::Required => {
                let mut roots = RootCertStore::empty();
                for certificate in load_all(&dir.join("ca-cert.pem"))? {
                    roots
                        .add(certificate)
                        .map_err(|error| unusable(dir, error))?;
                }
                let crl = dir.join("ca-crl.pem");
                let crls: Vec<CertificateRevocationListDer<'static>> = if crl.exists() {
                    load_all(&crl)?
                } else {
                    Vec::new()
                };
                let verifier =
                    WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
                        .with_crls(crls)
                        .build()
                        .map_err(|error| unusable(dir, error))?;
                builder.with_client_cert_verifier(verifier)
            }
        };
        let config = builder
            .with_single_cert(chain, key)
            .map_err(|error| unusable(dir, error))?;
        Ok(TlsConfig {
            config: Arc::new(config),
        })
    }

    /// A new connection's state, before its handshake.
    pub(super) fn connection(&self) -> Result<ServerConnection> {
        let mut connection = ServerConnection::new(Arc::clone(&self.config))
            .map_err(|error| Error::with_source(ErrorKind::Io, "starting TLS", error))?;
        connection.set_buffer_limit(Some(OUTGOING));
        Ok(connection)
    }
}

impl fmt::Debug for TlsConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsConfig").finish_non_exhaustive()
    }
}

/// Everything of one kind in a PEM file, which must be at least one.
fn load_all<T: PemObject>(path: &Path) -> Result<Vec<T>> {
    let all: Result<Vec<T>, pem::Error> =
        T::pem_file_iter(path).and_then(|objects| objects.collect());
    match all {
        Ok(all) if all.is_empty() => Err(unreadable(path, pem::Error::NoItemsFound)),
        Ok(all) => Ok(all),
        Err(error) => Err(unreadable(path, error)),
    }
}

fn unreadable(path: &Path, error: pem::Error) -> Error {
    let context = format!("reading {} for TLS", path.display());
    match error {
        pem::Error::Io(error) => Error::io(context, error),
        error => Error::with_source(ErrorKind::InvalidInput, context, error),
    }
}

fn unusable(dir: &Path, error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    Error::with_source(
        ErrorKind::InvalidInput,
        format!("the certificates in {} cannot be used", dir.display()),
        error,
    )
}

/// An established TLS session over a socket. The socket is received from outside the lock, so
/// that a reader that waits does not hold up those who send.
pub(super) struct TlsStream {
    socket: Arc<Socket>,
    session: Mutex<ServerConnection>,
    incoming: Mutex<Incoming>,
}

/// Ciphertext that was received and not yet decrypted.
struct Incoming {
    bytes: Vec<u8>,
    start: usize,
    end: usize,
}

impl TlsStream {
    pub(super) fn new(socket: Arc<Socket>, session: ServerConnection) -> Self {
        TlsStream {
            socket,
            session: Mutex::new(session),
            incoming: Mutex::new(Incoming {
                bytes: vec![0; CIPHERTEXT],
                start: 0,
                end: 0,
            }),
        }
    }
}

/// What TLS itself did not like, where that is why a handshake failed: a certificate that is missing,
/// out of date or of nobody we know; or what the client says it does not like of ours.
pub(super) fn refusal(error: &Error) -> Option<&rustls::Error> {
    let cause = std::error::Error::source(error)?;
    let cause = cause.downcast_ref::<io::Error>()?.get_ref()?;
    cause.downcast_ref()
}

/// Sends all ciphertext that is waiting.
fn drain(session: &mut ServerConnection, socket: &Socket) -> io::Result<()> {
    while session.wants_write() {
        session.write_tls(&mut Sender(socket))?;
    }
    Ok(())
}

impl Stream for TlsStream {
    #[expect(
        clippy::indexing_slicing,
        reason = "`start` and `end` lie within the bytes, in this order"
    )]
    fn recv(&self, buf: &mut [u8]) -> io::Result<usize> {
        let mut incoming = self.incoming.lock();
        let Incoming { bytes, start, end } = &mut *incoming;
        loop {
            {
                let mut session = self.session.lock();
                match session.reader().read(buf) {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    result => return result,
                }
                let mut rest = &bytes[*start..*end];
                if !rest.is_empty() {
                    *start += session.read_tls(&mut rest)?;
                    let state = session.process_new_packets();
                    // Also the alert that tells the client what was wrong.
                    drain(&mut session, &self.socket)?;
                    state.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
                    continue;
                }
            }
            *start = 0;
            *end = 0;
            match self.socket.recv(bytes)? {
                0 => return Ok(0),
                len => *end = len,
            }
        }
    }

    fn has_input(&self) -> bool {
        let decrypted = {
            let incoming = self.incoming.lock();
            incoming.start == incoming.end
        };
        !decrypted || self.socket.has_input()
    }

    fn send(&self, bytes: &[u8]) -> io::Result<()> {
        let mut session = self.session.lock();
        let mut rest = bytes;
        while !rest.is_empty() {
            let taken = session.writer().write(rest)?;
            (_, rest) = rest.split_at(taken);
            drain(&mut session, &self.socket)?;
        }
        Ok(())
    }

    fn finish(&self) {
        let mut session = self.session.lock();
        session.send_close_notify();
        // The client may be gone already.
        let _ = drain(&mut session, &self.socket);
        self.socket.shutdown(Shutdown::Write);
    }

    fn abort(&self) {
        self.socket.abort();
    }
}

/// A socket as `ServerConnection::write_tls` wants it.
struct Sender<'a>(&'a Socket);

impl Write for Sender<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.send(bytes)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
