//! A small NBD client: enough to write, flush and read an export. The source is the NBD project's
//! `doc/proto.md`; fixed newstyle, simple replies, one request at a time on a connection.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use percent_encoding::percent_decode_str;

use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_export::nbd::protocol::{
    FLAG_FIXED_NEWSTYLE, FLAG_NO_ZEROES, Fields, GREETING_MAGIC, OPTION_MAGIC, OPTION_REPLY_MAGIC,
    REQUEST_MAGIC, SIMPLE_REPLY_MAGIC, command_flag, info, option, option_reply, transmission_flag,
};

const DEFAULT_PORT: u16 = 10809;
/// A server that says nothing for so long has failed.
const SILENCE: Duration = Duration::from_secs(60);
/// How long a server that was just started, or started again, may take until it listens.
const START: Duration = Duration::from_secs(5);
/// The longest reply to an option that makes sense here.
const MAX_OPTION_REPLY: u32 = 64 << 10;

const READ: u16 = 0;
const WRITE: u16 = 1;
const DISCONNECT: u16 = 2;
const FLUSH: u16 = 3;

/// Connects, also to a server that does not listen yet: who starts one in the background and then tests it
/// would have to wait for it otherwise.
fn patiently<T>(connect: impl Fn() -> io::Result<T>) -> io::Result<T> {
    let deadline = Instant::now() + START;
    loop {
        let result = connect();
        let starting = result.as_ref().is_err_and(|error| {
            matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
            )
        });
        if !starting || Instant::now() >= deadline {
            return result;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Where an export is: an `nbd://` or `nbd+unix://` URI.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Address {
    place: Place,
    export: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Place {
    Unix(PathBuf),
    Tcp(String, u16),
}

impl Address {
    /// Reads a URI as the NBD project's `doc/uri.md` has it; `None` for a text that is none.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for one that cannot be used; [`ErrorKind::Unsupported`] for TLS.
    pub(super) fn parse(uri: &str) -> Result<Option<Self>> {
        let bad = |why: &str| {
            Error::new(
                ErrorKind::InvalidInput,
                format!(
                    "{uri}: {why}: write nbd://HOST[:PORT]/EXPORT or \
                     nbd+unix:///EXPORT?socket=PATH"
                ),
            )
        };
        let Some((scheme, rest)) = uri.split_once("://") else {
            return Ok(None);
        };
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, export) = path.split_once('/').unwrap_or((path, ""));
        let decode = |text: &str| {
            percent_decode_str(text)
                .decode_utf8()
                .map(|text| text.into_owned())
                .map_err(|_| bad("it is not UTF-8"))
        };
        let export = decode(export)?;
        let place = match scheme {
            "nbd" => {
                let (host, port) = match authority.rsplit_once(':') {
                    Some((host, port)) if !port.ends_with(']') => (
                        host,
                        port.parse().map_err(|_| bad("the port is no number"))?,
                    ),
                    _ => (authority, DEFAULT_PORT),
                };
                let host = host.trim_start_matches('[').trim_end_matches(']');
                let host = if host.is_empty() { "localhost" } else { host };
                Place::Tcp(host.to_owned(), port)
            }
            "nbd+unix" => {
                let socket = query
                    .split('&')
                    .find_map(|pair| pair.strip_prefix("socket="))
                    .ok_or_else(|| bad("it names no socket"))?;
                Place::Unix(decode(socket)?.into())
            }
            "nbds" | "nbds+unix" => {
                return Err(Error::new(
                    ErrorKind::Unsupported,
                    format!("{uri}: TLS is not spoken here: use the server's unix socket"),
                ));
            }
            _ => return Err(bad("it is no NBD URI")),
        };
        Ok(Some(Address { place, export }))
    }

    pub(super) fn connect(&self) -> Result<Client> {
        let stream = match &self.place {
            Place::Unix(path) => {
                let stream = patiently(|| UnixStream::connect(path))
                    .context(|| format!("cannot connect to {}", path.display()))?;
                stream
                    .set_read_timeout(Some(SILENCE))
                    .and_then(|()| stream.set_write_timeout(Some(SILENCE)))
                    .context(|| "cannot limit the wait for the NBD server")?;
                Stream::Unix(stream)
            }
            Place::Tcp(host, port) => {
                let stream = patiently(|| TcpStream::connect((host.as_str(), *port)))
                    .context(|| format!("cannot connect to {host} port {port}"))?;
                stream
                    .set_read_timeout(Some(SILENCE))
                    .and_then(|()| stream.set_write_timeout(Some(SILENCE)))
                    .and_then(|()| stream.set_nodelay(true))
                    .context(|| "cannot limit the wait for the NBD server")?;
                Stream::Tcp(stream)
            }
        };
        let mut client = Client {
            stream,
            cookie: 0,
            size: 0,
            flags: 0,
        };
        client
            .negotiate(&self.export)
            .map_err(|error| error.context(format!("the NBD export {:?}", self.export)))?;
        Ok(client)
    }
}

#[derive(Debug)]
enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Stream {
    fn send(&mut self, bytes: &[u8]) -> Result<()> {
        match self {
            Stream::Unix(stream) => stream.write_all(bytes),
            Stream::Tcp(stream) => stream.write_all(bytes),
        }
        .map_err(|error| gone(error, "cannot send to the NBD server"))
    }

    fn receive(&mut self, buf: &mut [u8]) -> Result<()> {
        match self {
            Stream::Unix(stream) => stream.read_exact(buf),
            Stream::Tcp(stream) => stream.read_exact(buf),
        }
        .map_err(|error| gone(error, "the NBD server does not answer"))
    }
}

/// A connection that ends is no damaged file.
fn gone(error: io::Error, what: &str) -> Error {
    Error::with_source(ErrorKind::Io, what, error)
}

/// A connection to one export.
#[derive(Debug)]
pub(super) struct Client {
    stream: Stream,
    cookie: u64,
    size: u64,
    flags: u16,
}

impl Client {
    /// Bytes of the export.
    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// True where the server offers what `flag` (of [`transmission_flag`]) means.
    pub(super) fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }

    fn negotiate(&mut self, export: &str) -> Result<()> {
        let greeting: [u8; 18] = self.take()?;
        let mut fields = Fields(&greeting);
        let magic = (fields.u64(), fields.u64());
        let flags = fields.u16().filter(|flags| {
            magic == (Some(GREETING_MAGIC), Some(OPTION_MAGIC)) && flags & FLAG_FIXED_NEWSTYLE != 0
        });
        let Some(flags) = flags else {
            return Err(protocol(
                "it does not speak the fixed newstyle NBD protocol",
            ));
        };
        let answer = u32::from(FLAG_FIXED_NEWSTYLE | flags & FLAG_NO_ZEROES);
        self.stream.send(&answer.to_be_bytes())?;

        let mut data = (export.len() as u32).to_be_bytes().to_vec();
        data.extend_from_slice(export.as_bytes());
        // No information is asked for; what is needed comes all the same.
        data.extend_from_slice(&0u16.to_be_bytes());
        let mut request = OPTION_MAGIC.to_be_bytes().to_vec();
        request.extend_from_slice(&option::GO.to_be_bytes());
        request.extend_from_slice(&(data.len() as u32).to_be_bytes());
        request.extend_from_slice(&data);
        self.stream.send(&request)?;
        loop {
            let head: [u8; 20] = self.take()?;
            let mut fields = Fields(&head);
            let known = (fields.u64(), fields.u32());
            let (Some(kind), Some(len @ ..=MAX_OPTION_REPLY), true) = (
                fields.u32(),
                fields.u32(),
                known == (Some(OPTION_REPLY_MAGIC), Some(option::GO)),
            ) else {
                return Err(protocol("it answers something else than was asked"));
            };
            let mut data = vec![0; len as usize];
            self.stream.receive(&mut data)?;
            match kind {
                option_reply::ACK => return Ok(()),
                option_reply::INFO => {
                    let mut fields = Fields(&data);
                    if fields.u16() == Some(info::EXPORT) {
                        let (Some(size), Some(flags)) = (fields.u64(), fields.u16()) else {
                            return Err(protocol("it does not say how large the export is"));
                        };
                        (self.size, self.flags) = (size, flags);
                    }
                }
                option_reply::ERR_UNKNOWN => {
                    return Err(Error::new(
                        ErrorKind::NotFound,
                        format!("the server has no such export{}", said(&data)),
                    ));
                }
                _ => {
                    return Err(protocol(&format!(
                        "the server refuses it (reply {kind:#x}){}",
                        said(&data)
                    )));
                }
            }
        }
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.stream.receive(&mut bytes)?;
        Ok(bytes)
    }

    fn request(&mut self, command: u16, flags: u16, offset: u64, len: u32) -> Vec<u8> {
        self.cookie += 1;
        let mut bytes = REQUEST_MAGIC.to_be_bytes().to_vec();
        bytes.extend_from_slice(&flags.to_be_bytes());
        bytes.extend_from_slice(&command.to_be_bytes());
        bytes.extend_from_slice(&self.cookie.to_be_bytes());
        bytes.extend_from_slice(&offset.to_be_bytes());
        bytes.extend_from_slice(&len.to_be_bytes());
        bytes
    }

    fn reply(&mut self, what: &str) -> Result<()> {
        let head: [u8; 16] = self.take()?;
        let mut fields = Fields(&head);
        let known = fields.u32() == Some(SIMPLE_REPLY_MAGIC);
        let (error, cookie) = (fields.u32(), fields.u64());
        match error.filter(|_| known && cookie == Some(self.cookie)) {
            None => Err(protocol("it answers something else than was asked")),
            Some(0) => Ok(()),
            // The values of Linux.
            Some(errno) => Err(Error::io(
                format!("the NBD server fails a {what}"),
                io::Error::from_raw_os_error(errno as i32),
            )),
        }
    }

    pub(super) fn write(&mut self, bytes: &[u8], offset: u64, durable: bool) -> Result<()> {
        let flags = if durable { command_flag::FUA } else { 0 };
        let mut request = self.request(WRITE, flags, offset, bytes.len() as u32);
        request.extend_from_slice(bytes);
        self.stream.send(&request)?;
        self.reply("write")
    }

    pub(super) fn flush(&mut self) -> Result<()> {
        let request = self.request(FLUSH, 0, 0, 0);
        self.stream.send(&request)?;
        self.reply("flush")
    }

    pub(super) fn read(&mut self, buf: &mut [u8], offset: u64) -> Result<()> {
        let request = self.request(READ, 0, offset, buf.len() as u32);
        self.stream.send(&request)?;
        self.reply("read")?;
        self.stream.receive(buf)
    }

    /// True where flushes on one connection cover what others wrote, and several may be open.
    pub(super) fn may_have_company(&self) -> bool {
        self.has(transmission_flag::CAN_MULTI_CONN)
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let request = self.request(DISCONNECT, 0, 0, 0);
        // The server may be gone, which is what this is all about.
        let _ = self.stream.send(&request);
    }
}

fn protocol(why: &str) -> Error {
    Error::new(ErrorKind::Protocol, why)
}

fn said(data: &[u8]) -> String {
    let text = String::from_utf8_lossy(data).replace(char::is_control, "?");
    if text.is_empty() {
        String::new()
    } else {
        format!(": {text}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uris_of_the_nbd_project_are_understood_and_other_texts_are_paths() {
        let parse = |uri| Address::parse(uri).unwrap();
        assert_eq!(parse("/dev/nbd0"), None);
        assert_eq!(
            parse("nbd+unix:///a%20b?socket=/run/x.sock"),
            Some(Address {
                place: Place::Unix("/run/x.sock".into()),
                export: "a b".into()
            })
        );
        let tcp = |host: &str, port, export: &str| {
            Some(Address {
                place: Place::Tcp(host.into(), port),
                export: export.into(),
            })
        };
        assert_eq!(parse("nbd://host/web"), tcp("host", 10809, "web"));
        assert_eq!(parse("nbd://[::1]:7/"), tcp("::1", 7, ""));
        assert_eq!(parse("nbd://[::1]"), tcp("::1", 10809, ""));
        for (bad, kind) in [
            ("nbd+unix:///web", ErrorKind::InvalidInput),
            ("http://host/", ErrorKind::InvalidInput),
            ("nbd://host:x/", ErrorKind::InvalidInput),
            ("nbds://host/", ErrorKind::Unsupported),
        ] {
            assert_eq!(Address::parse(bad).unwrap_err().kind(), kind, "{bad}");
        }
    }

    /// A server that answers the handshake with an export of which it says too little.
    fn half_a_server(socket: &std::path::Path) -> std::thread::JoinHandle<()> {
        use std::io::{Read, Write};
        let listener = std::os::unix::net::UnixListener::bind(socket).unwrap();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.write_all(&GREETING_MAGIC.to_be_bytes()).unwrap();
            stream.write_all(&OPTION_MAGIC.to_be_bytes()).unwrap();
            stream
                .write_all(&FLAG_FIXED_NEWSTYLE.to_be_bytes())
                .unwrap();
            let mut asked = [0; 4 + 16 + 4 + 1 + 2];
            stream.read_exact(&mut asked).unwrap();
            let size = 1u32.to_be_bytes();
            let data = [&info::EXPORT.to_be_bytes()[..], &size].concat();
            for field in [
                &OPTION_REPLY_MAGIC.to_be_bytes()[..],
                &option::GO.to_be_bytes(),
                &option_reply::INFO.to_be_bytes(),
                &(data.len() as u32).to_be_bytes(),
                &data,
            ] {
                stream.write_all(field).unwrap();
            }
        })
    }

    #[test]
    fn a_server_that_is_still_starting_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("s");
        let address = Address::parse(&format!("nbd+unix:///x?socket={}", socket.display()));
        let address = address.unwrap().unwrap();
        let late = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(200));
            half_a_server(&socket)
        });
        let error = address.connect().map(drop).unwrap_err();
        late.join().unwrap().join().unwrap();
        assert_eq!(error.kind(), ErrorKind::Protocol, "it was reached: {error}");
    }

    #[test]
    fn an_export_without_a_size_is_an_error_and_not_an_empty_export() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("s");
        let server = half_a_server(&socket);
        let uri = format!("nbd+unix:///x?socket={}", socket.display());
        let address = Address::parse(&uri).unwrap().unwrap();
        let error = address.connect().map(drop).unwrap_err();
        server.join().unwrap();
        assert_eq!(error.kind(), ErrorKind::Protocol);
        assert!(error.to_string().contains("how large"), "{error}");
    }
}
