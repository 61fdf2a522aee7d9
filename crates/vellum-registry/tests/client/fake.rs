//! A server that answers as a test says, since real registries fail only by chance.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use sha2::{Digest, Sha256};
use vellum_registry::{Access, Reference, Session};

/// A request, as far as it came.
#[derive(Debug, Clone)]
pub struct Request {
    pub method: String,
    pub path: String,
    pub headers: String,
    pub body: Vec<u8>,
}

impl Request {
    pub fn header(&self, name: &str) -> Option<&str> {
        let mut lines = self.headers.lines();
        lines.find_map(|line| {
            let (key, value) = line.split_once(':')?;
            key.eq_ignore_ascii_case(name).then(|| value.trim())
        })
    }
}

/// What is answered: the head, the body, and whether the connection breaks there.
pub struct Answer(pub String, pub Vec<u8>);

pub fn answer(status: &str, headers: &[&str], body: &[u8]) -> Answer {
    let length = format!("Content-Length: {}", body.len());
    let own = headers
        .iter()
        .any(|line| line.starts_with("Content-Length"));
    let mut head = format!("HTTP/1.1 {status}\r\nConnection: close\r\n");
    for line in headers.iter().copied().chain((!own).then_some(&length[..])) {
        head += &format!("{line}\r\n");
    }
    Answer(head + "\r\n", body.to_vec())
}

/// Serves one request a connection, of whose body it reads at most what `limit` says.
pub fn serve(
    limit: impl Fn(&Request, usize) -> usize + Send + 'static,
    handle: impl Fn(&Request, usize) -> Answer + Send + 'static,
) -> (String, Arc<Mutex<Vec<Request>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let host = listener.local_addr().unwrap().to_string();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let requests = seen.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let number = requests.lock().unwrap().len();
            let Some(request) = read(&mut stream, |request| limit(request, number)) else {
                continue;
            };
            let Answer(head, body) = handle(&request, number);
            requests.lock().unwrap().push(request);
            let _ = stream.write_all(head.as_bytes());
            let _ = stream.write_all(&body);
        }
    });
    (host, seen)
}

/// As [`serve`], of one who wants a token, and gives out `tN` as answer N: `handle` is asked what a token is good for, and
/// anything else is refused.
pub fn serve_with_tokens(
    handle: impl Fn(&Request, &str, usize) -> Option<Answer> + Send + 'static,
) -> (String, Arc<Mutex<Vec<Request>>>) {
    let address = Arc::new(Mutex::new(String::new()));
    let own = address.clone();
    let (host, seen) = serve(
        |_, _| 0,
        move |request, number| {
            if request.path.starts_with("/token") {
                let token = format!(r#"{{"token":"t{number}"}}"#);
                return answer("200 OK", &[], token.as_bytes());
            }
            let token = request.header("authorization").unwrap_or("Bearer none");
            let token = token.strip_prefix("Bearer ").unwrap();
            handle(request, token, number).unwrap_or_else(|| {
                let realm = own.lock().unwrap().clone();
                let challenge = format!(
                    r#"WWW-Authenticate: Bearer realm="http://{realm}/token",service="here""#
                );
                answer("401 Unauthorized", &[&challenge], b"{}")
            })
        },
    );
    address.lock().unwrap().clone_from(&host);
    (host, seen)
}

pub fn read(stream: &mut TcpStream, limit: impl Fn(&Request) -> usize) -> Option<Request> {
    let mut input = BufReader::new(stream);
    let mut line = String::new();
    input.read_line(&mut line).ok()?;
    let mut words = line.split(' ').map(str::to_owned);
    let mut request = Request {
        method: words.next()?,
        path: words.next()?,
        headers: String::new(),
        body: Vec::new(),
    };
    loop {
        let mut line = String::new();
        input.read_line(&mut line).ok()?;
        if line.trim().is_empty() {
            break;
        }
        request.headers += &line;
    }
    let len = request
        .header("content-length")
        .map_or(0, |len| len.parse().unwrap());
    let len = limit(&request).min(len);
    request.body = vec![0; len];
    input.read_exact(&mut request.body).ok()?;
    Some(request)
}

pub fn session(host: &str) -> Session {
    let reference = Reference::parse(&format!("{host}/team/web:1")).unwrap();
    Session::open(&reference, Access::default()).unwrap()
}

pub fn digest(bytes: &[u8]) -> String {
    let hex: String = Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    format!("sha256:{hex}")
}

pub fn some_bytes() -> Vec<u8> {
    (0..1_000_000_u32)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 9) as u8)
        .collect()
}
