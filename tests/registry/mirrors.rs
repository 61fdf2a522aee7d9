//! Mirrors by `hosts.toml`, as containerd has it: who is asked, who is not, and what happens when one is gone or wrong.

use std::fs;
use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::common::TestStore;
use crate::faulty::read_head;
use crate::lazy::{end_fetchers, files};
use crate::login::login;
use crate::ports::free_port;
use crate::registry_support::{Registry, Setup, clean, digests, pushed, store, with_images};

/// A registry that this host does not reach.
const UPSTREAM: &str = "upstream.invalid";

/// A host that notes the heads of all requests, and answers each in the same way.
struct Witness {
    host: String,
    heads: Arc<Mutex<Vec<String>>>,
}

impl Witness {
    fn answering(answer: &'static str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let host = listener.local_addr().unwrap().to_string();
        let heads: Arc<Mutex<Vec<String>>> = Arc::default();
        let noted = heads.clone();
        std::thread::spawn(move || {
            for client in listener.incoming() {
                let mut client: TcpStream = client.unwrap();
                if let Ok(head) = read_head(&mut client) {
                    noted.lock().push(head);
                }
                let _ = write!(
                    client,
                    "HTTP/1.1 {answer}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
                );
            }
        });
        Witness { host, heads }
    }

    fn heads(&self) -> Vec<String> {
        self.heads.lock().clone()
    }
}

/// Says which hosts are asked for what is in a registry, to all commands of a store.
pub fn configure(store: &mut TestStore, registry: &str, hosts: &str) {
    let places = store.path("certs.d");
    let dir = places.join(registry);
    fs::create_dir_all(&dir).unwrap();
    fs::write(dir.join("hosts.toml"), hosts).unwrap();
    let places: &'static str = places.display().to_string().leak();
    store.env.push(("VELLUM_CERTS_D", places));
}

fn host(address: &str, more: &str) -> String {
    format!("[host.\"http://{address}\"]\n{more}\n")
}

#[test]
fn a_password_is_not_sent_to_the_host_that_stands_in_a_registrys_place() {
    let (mut store, witness) = (store(), Witness::answering("200 OK"));
    let server = format!("server = 'http://{}'\n", witness.host);
    configure(&mut store, UPSTREAM, &server);
    let refused = login(&store, UPSTREAM, "secret");
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    let advice = format!("`vellum login {}`", witness.host);
    assert!(
        !refused.status.success() && said.contains(&advice),
        "{said}"
    );
    assert_eq!(witness.heads(), Vec::<String>::new());
}

#[test]
fn a_pull_asks_mirrors_in_order_and_passes_over_those_that_are_gone_or_have_nothing() {
    let (registry, from, mut to) = pushed();
    let (empty, failing) = (
        Witness::answering("404 Not Found"),
        Witness::answering("500 Internal Server Error"),
    );
    let gone = format!("127.0.0.1:{}", free_port());
    let hosts = [
        host(&gone, ""),
        host(
            &empty.host,
            "[host.\"http://EMPTY\".header]\nx-who = ['one', 'two']"
                .replace("EMPTY", &empty.host)
                .as_str(),
        ),
        host(&failing.host, ""),
        host(&registry.host(), "capabilities = ['pull', 'resolve']"),
    ];
    configure(&mut to, UPSTREAM, &hosts.concat());
    for (way, name) in [(&["pull"][..], "whole"), (&["pull", "--lazy"], "lazy")] {
        let image = format!("{UPSTREAM}/web:1");
        let arguments = [way, &[&image, name]].concat();
        to.ok(&arguments);
        assert_eq!(files(&to, name), files(&from, "web"), "{name}");
    }
    to.ok(&["complete", "lazy"]);
    end_fetchers(&to);
    assert_eq!(digests(&to, "lazy"), digests(&from, "web"));
    let asked = empty.heads();
    assert!(!asked.is_empty() && !failing.heads().is_empty());
    for head in asked {
        let head = head.to_lowercase();
        assert!(
            head.contains(&format!("?ns={UPSTREAM} http/1.1\r\n")),
            "{head}"
        );
        assert!(
            head.contains("x-who: one\r\n") && head.contains("x-who: two\r\n"),
            "{head}"
        );
    }
    assert!(failing.heads().iter().all(|head| !head.contains("x-who")));
    clean(&to);
}

#[test]
fn who_pulls_in_vain_hears_of_each_host_why() {
    let mut to = store();
    let empty = Witness::answering("404 Not Found");
    let gone = format!("127.0.0.1:{}", free_port());
    let server = format!("server = \"http://127.0.0.1:{}\"\n", free_port());
    let hosts = [server.clone(), host(&gone, ""), host(&empty.host, "")];
    configure(&mut to, UPSTREAM, &hosts.concat());
    let said = to.fails(&["pull", &format!("{UPSTREAM}/web:1"), "web"]);
    let server = server.split("//").nth(1).unwrap().trim_end_matches("\"\n");
    for part in [&gone, &empty.host, server, "404", "refused"] {
        assert!(said.contains(part), "{part}: {said}");
    }
    assert!(to.names("images").is_empty());
}

#[test]
fn tags_are_asked_only_of_hosts_that_may_resolve_and_pushes_go_only_to_those_that_may_push() {
    let (registry, from, mut to) = pushed();
    let witness = Witness::answering("500 Internal Server Error");
    let hosts = [
        format!("server = \"http://{}\"\n", registry.host()),
        host(&witness.host, "capabilities = ['pull']"),
    ];
    configure(&mut to, UPSTREAM, &hosts.concat());
    to.ok(&["pull", &format!("{UPSTREAM}/web:1"), "web"]);
    let heads = witness.heads();
    assert!(
        heads
            .iter()
            .any(|head| head.contains("/v2/web/manifests/sha256:")),
        "{heads:?}"
    );
    assert!(
        heads.iter().all(|head| !head.contains("manifests/1")),
        "{heads:?}"
    );
    let before = witness.heads().len();
    to.ok(&["push", "web", &format!("{UPSTREAM}/again:1")]);
    assert_eq!(witness.heads().len(), before, "a push went to a mirror");
    let other = store();
    other.ok(&["pull", &registry.image("again:1"), "web"]);
    assert_eq!(files(&other, "web"), files(&from, "web"));
    configure(&mut to, UPSTREAM, "capabilities = ['pull']\n");
    let said = to.fails(&["push", "web", &format!("{UPSTREAM}/again:2")]);
    assert!(
        said.contains("may be pushed to") && said.contains("hosts.toml"),
        "{said}"
    );
}

#[test]
fn credentials_of_one_host_never_go_to_another() {
    let (registry, mut from) = (
        Registry::with(&Setup {
            auth: true,
            ..Setup::default()
        }),
        with_images(),
    );
    let witness = Witness::answering("401 Unauthorized\r\nWWW-Authenticate: Basic realm=\"here\"");
    let host_name = registry.host();
    assert!(login(&from, &host_name, "secret").status.success());
    from.ok(&["push", "web", &registry.image("web:1")]);
    let hosts = [
        format!("server = \"http://{host_name}\"\n"),
        host(&witness.host, ""),
    ];
    configure(&mut from, &host_name, &hosts.concat());
    from.ok(&["rmi", "web"]);
    from.ok(&["pull", &registry.image("web:1"), "web"]);
    let heads = witness.heads();
    assert!(!heads.is_empty());
    for head in heads {
        assert!(!head.to_lowercase().contains("authorization"), "{head}");
    }
}

#[test]
fn a_mirror_that_sends_other_bytes_is_believed_nothing_and_the_next_host_is_asked() {
    let (registry, from, mut to) = pushed();
    let mirror = Registry::new();
    from.ok(&["push", "web", &mirror.image("web:1")]);
    for (file, len) in mirror.blobs() {
        // Blobs, not manifests.
        if len > 20_000 {
            let mut bytes = fs::read(&file).unwrap();
            let middle = bytes.len() / 2;
            bytes[middle] ^= 1;
            fs::write(&file, bytes).unwrap();
        }
    }
    let server = format!("server = \"http://{}\"\n", registry.host());
    configure(
        &mut to,
        UPSTREAM,
        &[server, host(&mirror.host(), "")].concat(),
    );
    let image = format!("{UPSTREAM}/web:1");
    to.ok(&["pull", &image, "whole"]);
    to.ok(&["pull", "--lazy", &image, "lazy"]);
    for name in ["whole", "lazy"] {
        assert_eq!(files(&to, name), files(&from, "web"), "{name}");
    }
    to.ok(&["complete", "lazy"]);
    end_fetchers(&to);
    clean(&to);
}

#[test]
fn a_lazy_layer_goes_on_at_the_next_host_when_its_mirror_dies_and_when_it_is_back() {
    let (mut registry, from, mut to) = pushed();
    let mut mirror = Registry::new();
    from.ok(&["push", "web", &mirror.image("web:1")]);
    let server = format!("server = \"http://{}\"\n", registry.host());
    configure(
        &mut to,
        UPSTREAM,
        &[server, host(&mirror.host(), "")].concat(),
    );
    to.ok(&["pull", "--lazy", &format!("{UPSTREAM}/web:1"), "web"]);
    to.ok(&["create", "web", "--name", "c"]);
    // The mount reads what it needs of the file system from the mirror.
    registry.stop();
    let dir = to.mount("c");
    mirror.stop();
    registry.start_again();
    let shell = fs::read("/bin/busybox").unwrap();
    let half = shell.len() / 2;
    let read = |from: usize, len: usize| {
        let before = to.disk_usage();
        let mut bytes = vec![0; len];
        // Nothing is read ahead of it, or kept.
        let file = fs::File::open(dir.join("bin/sh")).unwrap();
        nix::fcntl::posix_fadvise(
            &file,
            0,
            0,
            nix::fcntl::PosixFadviseAdvice::POSIX_FADV_RANDOM,
        )
        .unwrap();
        file.read_exact_at(&mut bytes, from as u64).unwrap();
        assert!(to.disk_usage() > before, "nothing came from a registry");
        bytes
    };
    assert_eq!(read(0, 4096), shell[..4096]);
    registry.stop();
    mirror.start_again();
    assert_eq!(read(half, 4096), shell[half..half + 4096]);
    to.ok(&["umount", "c"]);
    to.ok(&["rm", "c"]);
    end_fetchers(&to);
    clean(&to);
}

#[test]
fn a_file_that_is_wrong_is_named_with_its_key_and_nothing_is_asked() {
    let (registry, _from, mut to) = pushed();
    for (bad, said_of_it) in [
        ("capabilities = ['pull', 'fly']", "line 1"),
        ("server = 1", "line 1"),
        ("server = 'ftp://x'", "server: it is no address of a host"),
        ("[host.'http://a b']", "host.\"http://a b\""),
        ("dial_timeout = 'soon'", "dial_timeout"),
        (
            "[host.'http://x']\nproxy = 'socks5://y'",
            "host.\"http://x\".proxy",
        ),
        ("[header]\n'a b' = 'c'", "header.a b"),
        ("ca = 'absent.pem'", "absent.pem"),
        (
            "client = [['a.cert', 'b.key', 'c']]",
            "a file, a list of files, or a list of pairs",
        ),
        ("not toml", "line 1"),
    ] {
        configure(&mut to, &registry.host(), bad);
        let said = to.fails(&["pull", &registry.image("web:1"), "web"]);
        assert!(said.contains(said_of_it), "{bad}: {said}");
        let file = format!("{}/hosts.toml", registry.host());
        assert!(
            said.contains(&file) || said.contains("absent.pem"),
            "{bad}: {said}"
        );
    }
    configure(
        &mut to,
        &registry.host(),
        "colour = 'blue'\n[host.'http://127.0.0.1:1']\nsize = 3\n",
    );
    let output = to.output(&["pull", &registry.image("web:1"), "web"]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");
    for key in [
        "colour is not known",
        "host.\"http://127.0.0.1:1\".size is not known",
    ] {
        assert_eq!(said.matches(key).count(), 1, "{said}");
    }
}

#[test]
fn of_the_directories_the_own_one_goes_before_the_default_and_the_first_place_before_the_second() {
    let (registry, from, mut to) = pushed();
    let good = |dir: &Path, name: &str, port: &str| {
        fs::create_dir_all(dir.join(name)).unwrap();
        let server = format!("server = \"http://127.0.0.1:{port}\"\n");
        fs::write(dir.join(name).join("hosts.toml"), server).unwrap();
    };
    let (one, two) = (to.path("one"), to.path("two"));
    let port = registry.host().rsplit(':').next().unwrap().to_owned();
    good(&one, "_default", "1");
    good(&two, "own.invalid_5000_", &port);
    good(&two, "own.invalid:5000", "1");
    good(&two, "_default", "1");
    let places: &'static str = format!("{}:{}", one.display(), two.display()).leak();
    to.env.push(("VELLUM_CERTS_D", places));
    to.ok(&["pull", "own.invalid:5000/web:1", "web"]);
    assert_eq!(files(&to, "web"), files(&from, "web"));
    let said = to.fails(&["pull", "other.invalid/web:1", "x"]);
    assert!(said.contains("127.0.0.1:1"), "{said}");
    good(&one, "_default", &port);
    to.ok(&["pull", "other.invalid/web:1", "other"]);
}

#[test]
fn doctor_lists_the_files_and_what_is_wrong_with_them() {
    let mut store = store();
    let mirror = "[host.'https://mirror.example:5000']\n";
    for (registry, text) in [
        ("good.example", mirror),
        ("_default", "server = 'cache.example'\n"),
        ("absent.example", "ca = 'absent.pem'\n"),
        ("new.example_5000_", "server = 'https://x'\nspeed = 3\n"),
    ] {
        configure(&mut store, registry, text);
    }
    let output = store.output(&["--json", "doctor"]);
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let findings = report["findings"].as_array().unwrap().iter();
    let mirrors: Vec<_> = findings
        .filter(|finding| finding["check"] == "mirrors")
        .map(|finding| {
            (
                finding["state"].as_str().unwrap(),
                finding["found"].as_str().unwrap(),
            )
        })
        .collect();
    for (state, found) in [
        (
            "ok",
            "good.example: https://mirror.example:5000/v2/, then https://good.example/v2/ (",
        ),
        ("ok", "every other registry: https://cache.example/v2/ ("),
        ("warning", "absent.pem is no file of certificates"),
        ("ok", "new.example:5000: https://x/v2/ ("),
        ("warning", "not known here, and ignored: speed"),
    ] {
        let is = |finding: &&(&str, &str)| finding.0 == state && finding.1.contains(found);
        assert_eq!(mirrors.iter().filter(is).count(), 1, "{found}: {mirrors:?}");
    }
}
