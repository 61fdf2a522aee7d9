//! A registry that keeps blobs in an object store, and sends who reads them there with an address that is good for a while.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;

use parking_lot::Mutex;

use crate::bucket_support::Buckets;
use crate::faulty::read_head;
use crate::lazy::{end_fetchers, files};
use crate::login::login;
use crate::registry_support::{Registry, Setup, clean, digests, store, with_images};

/// Stands before a server, and notes what is asked of it.
struct Watched {
    host: String,
    heads: Arc<Mutex<Vec<String>>>,
    /// What it answers itself, to the next so many requests for parts.
    answers: Arc<Mutex<Vec<&'static str>>>,
}

impl Watched {
    /// `to` is known once the server that needs this address has started.
    fn before(to: &Arc<Mutex<String>>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let host = listener.local_addr().unwrap().to_string();
        let watched = Watched {
            host,
            heads: Arc::default(),
            answers: Arc::default(),
        };
        let (heads, answers) = (watched.heads.clone(), watched.answers.clone());
        let to = to.clone();
        std::thread::spawn(move || {
            for client in listener.incoming() {
                let (to, heads, answers) = (to.lock().clone(), heads.clone(), answers.clone());
                std::thread::spawn(move || {
                    let mut client = client.unwrap();
                    let head = read_head(&mut client)?;
                    let is_part = head.to_ascii_lowercase().contains("\r\nrange: ");
                    heads.lock().push(head.clone());
                    let answer = match is_part {
                        true => answers.lock().pop(),
                        false => None,
                    };
                    match answer {
                        Some(answer) => write!(
                            client,
                            "HTTP/1.1 {answer}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
                        ),
                        None => pass_on(client, &to, &head),
                    }
                });
            }
        });
        watched
    }

    fn parts(&self) -> Vec<String> {
        let heads = self.heads.lock();
        let parts = heads.iter().map(|head| head.to_ascii_lowercase());
        parts.filter(|head| head.contains("\r\nrange: ")).collect()
    }
}

/// Passes one request without chunks on, with the answer.
fn pass_on(mut client: TcpStream, to: &str, head: &str) -> std::io::Result<()> {
    let lines = head.trim_end().lines();
    let is_kept = |line: &&str| !line.to_ascii_lowercase().starts_with("connection:");
    let mut request: Vec<&str> = lines.filter(is_kept).collect();
    request.push("Connection: close\r\n\r\n");
    let mut server = TcpStream::connect(to)?;
    server.write_all(request.join("\r\n").as_bytes())?;
    let len = head.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        let is_len = name.eq_ignore_ascii_case("content-length");
        is_len.then(|| value.trim().parse::<u64>().unwrap())
    });
    if let Some(len) = len {
        std::io::copy(&mut (&mut client).take(len), &mut server)?;
    }
    std::io::copy(&mut server, &mut client).map(drop)
}

/// A registry before an object store, both watched, with `web:1`.
struct Setting {
    _buckets: Buckets,
    _registry: Registry,
    store: Watched,
    front: Watched,
}

impl Setting {
    fn new() -> Self {
        let buckets = Buckets::new();
        // Signatures are of the name by which the store was asked.
        let to = Arc::new(Mutex::new(buckets.endpoint().replace("http://", "")));
        let store = Watched::before(&to);
        let storage = format!(
            "s3: {{accesskey: key, secretkey: secret, region: us-east-1, bucket: bucket, secure: false, v4auth: true, \
             regionendpoint: 'http://{}'}}",
            store.host
        );
        let registry = Registry::with(&Setup {
            auth: true,
            storage: Some(storage),
            ..Setup::default()
        });
        let front = Watched::before(&Arc::new(Mutex::new(registry.host())));
        Setting {
            _buckets: buckets,
            _registry: registry,
            store,
            front,
        }
    }

    fn image(&self) -> String {
        format!("{}/team/web:1", self.front.host)
    }
}

#[test]
fn blobs_behind_redirections_are_pushed_pulled_and_read_lazily_by_few_of_them_and_without_the_password()
 {
    let setting = Setting::new();
    let (from, to) = (with_images(), store());
    for store in [&from, &to] {
        assert!(login(store, &setting.front.host, "secret").status.success());
    }
    from.ok(&["push", "web", &setting.image()]);
    to.ok(&["pull", &setting.image(), "whole"]);
    assert_eq!(files(&to, "whole"), files(&from, "web"));
    to.ok(&["rmi", "whole"]);
    to.ok(&["prune"]);
    let report = to.json(&["pull", "--lazy", &setting.image(), "lazy"]);
    assert_eq!(report["came"], "lazily");
    setting.front.heads.lock().clear();
    setting.store.heads.lock().clear();
    assert_eq!(files(&to, "lazy"), files(&from, "web"));
    // A redirection serves many ranges; those that are asked for at once in the beginning get one each.
    let (asked, read) = (setting.front.parts().len(), setting.store.parts().len());
    assert!(
        read >= 6 && asked * 2 <= read,
        "{asked} of the registry, {read} of the object store"
    );
    // The addresses expire, or the object store forgets them: the registry is asked anew, and nobody who reads notices.
    *setting.store.answers.lock() = vec!["403 Forbidden", "404 Not Found", "503 Slow Down"];
    to.ok(&["complete", "lazy"]);
    end_fetchers(&to);
    assert_eq!(digests(&to, "lazy"), digests(&from, "web"));
    for head in setting.store.heads.lock().iter() {
        // The registry's own requests to it are signed; ours have no name in them but in the address.
        let head = head.to_ascii_lowercase();
        assert!(!head.contains("authorization: basic"), "{head}");
        assert!(
            !head.contains("x-amz-signature") || !head.contains("\r\nauthorization:"),
            "{head}"
        );
    }
    clean(&to);
}
