//! The NBD server against other people's clients: libnbd, QEMU, fio, nbd-client, GnuTLS.

// Helpers outside of #[test] functions fail tests too.
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use vellum_base::ErrorKind;
use vellum_base::block::{BlockDevice, Durability, MemoryDevice};
use vellum_export::nbd::{
    ClientCertificates, Export, Server, ServerConfig, SocketFile, TlsConfig, bind_tcp, bind_unix,
};

const MIB: u64 = 1 << 20;

/// A server on a unix socket in a directory of its own; stops when dropped.
struct Running {
    server: Server,
    socket: PathBuf,
    dir: tempfile::TempDir,
    listeners: Vec<thread::JoinHandle<vellum_base::Result<()>>>,
    _file: SocketFile,
}

impl Running {
    fn new(exports: Vec<Export>) -> Self {
        Running::with(ServerConfig::default(), exports)
    }

    fn with(config: ServerConfig, exports: Vec<Export>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("nbd.sock");
        let (listener, file) = bind_unix(&socket).unwrap();
        let server = Server::new(config).unwrap();
        for export in exports {
            server.add_export(export).unwrap();
        }
        let serving = server.clone();
        Running {
            server,
            socket,
            dir,
            listeners: vec![thread::spawn(move || serving.serve_unix(listener))],
            _file: file,
        }
    }

    /// One empty writable export of `size` bytes, named "disk".
    fn disk(size: u64) -> (Self, Arc<MemoryDevice>) {
        let device = Arc::new(MemoryDevice::new(size));
        let export = Export::new("disk", device.clone());
        (Running::new(vec![export]), device)
    }

    fn uri(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.socket.display())
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).display().to_string()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let stopped = self.server.shutdown();
        let listened: Vec<_> = self.listeners.drain(..).map(|l| l.join()).collect();
        if !thread::panicking() {
            stopped.unwrap();
            for listener in listened {
                listener.unwrap().unwrap();
            }
        }
    }
}

/// The Debian package that a program comes from.
fn package(program: &str) -> &str {
    match program {
        "nbdinfo" | "nbdcopy" => "libnbd-bin",
        "qemu-io" | "qemu-img" => "qemu-utils",
        program => program,
    }
}

/// Runs a client for at most a minute.
fn run(program: &str, args: &[&str]) -> Output {
    let output = Command::new("timeout")
        .args(["60", program])
        .args(args)
        .output()
        .unwrap();
    // What timeout says when there is no such program.
    assert_ne!(
        output.status.code(),
        Some(127),
        "{program} is missing: apt-get install {}",
        package(program)
    );
    output
}

fn text(output: &Output) -> String {
    let out = String::from_utf8_lossy(&output.stdout);
    format!("{out}{}", String::from_utf8_lossy(&output.stderr))
}

/// Runs a client that must succeed, and returns what it printed.
fn ok(program: &str, args: &[&str]) -> String {
    let output = run(program, args);
    let text = text(&output);
    assert!(output.status.success(), "{program} {args:?}: {text}");
    String::from_utf8(output.stdout).unwrap()
}

/// Runs a client that must fail, and returns what it said.
fn fails(program: &str, args: &[&str]) -> String {
    let output = run(program, args);
    let text = text(&output);
    assert!(!output.status.success(), "{program} {args:?}: {text}");
    assert_ne!(output.status.code(), Some(124), "{program} hung: {text}");
    text
}

fn json(program: &str, args: &[&str]) -> Value {
    serde_json::from_str(&ok(program, args)).unwrap()
}

/// Bytes that repeat nowhere near.
fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// A file of 40 MiB with data at both ends, holes between, and an odd length of data.
fn sparse_file(path: &str) -> Vec<u8> {
    let mut content = vec![0; 40 << 20];
    content[..5 << 20].copy_from_slice(&noise(5 << 20, 1));
    content[(20 << 20) + 513..(21 << 20) + 77].copy_from_slice(&noise((1 << 20) + 77 - 513, 2));
    content[(40 << 20) - 4096..].copy_from_slice(&noise(4096, 3));
    let mut file = fs::File::create(path).unwrap();
    file.write_all(&content).unwrap();
    content
}

#[test]
fn nbdinfo_lists_every_export_with_its_properties() {
    let writable = Export {
        description: "scratch space".into(),
        ..Export::new("a", Arc::new(MemoryDevice::new(64 * MIB)))
    };
    let read_only = Export {
        read_only: true,
        ..Export::new("größe b", Arc::new(MemoryDevice::new(1 << 40)))
    };
    let running = Running::new(vec![writable, read_only]);
    let all = json("nbdinfo", &["--list", "--json", &running.uri("")]);
    assert_eq!(all["protocol"], "newstyle-fixed");
    assert_eq!(all["structured"], true);
    let exports = all["exports"].as_array().unwrap();
    assert_eq!(exports.len(), 2);
    let (a, b) = (&exports[0], &exports[1]);
    assert_eq!(a["export-name"], "a");
    assert_eq!(a["description"], "scratch space");
    assert_eq!(a["export-size"], 64 * MIB);
    assert_eq!(a["contexts"], serde_json::json!(["base:allocation"]));
    for can in [
        "can_cache",
        "can_df",
        "can_fast_zero",
        "can_flush",
        "can_fua",
        "can_multi_conn",
        "can_trim",
        "can_zero",
    ] {
        assert_eq!(a[can], true, "{can}");
    }
    assert_eq!(a["is_read_only"], false);
    assert_eq!(a["block_size_minimum"], 1);
    assert_eq!(a["block_size_preferred"], 4096);
    assert_eq!(a["block_size_maximum"], 32 * MIB);
    assert_eq!(b["export-name"], "größe b");
    assert_eq!(b["export-size"], 1u64 << 40);
    assert_eq!(b["is_read_only"], true);
    assert_eq!(b["can_trim"], false);
}

#[test]
fn nbdinfo_is_told_when_there_is_no_such_export() {
    let (running, _) = Running::disk(MIB);
    let said = fails("nbdinfo", &[&running.uri("nothing")]);
    assert!(said.contains("No such file or directory"), "{said}");
    // The server lives.
    assert_eq!(
        ok("nbdinfo", &["--size", &running.uri("disk")]).trim(),
        MIB.to_string()
    );
    assert_eq!(
        ok("nbdinfo", &["--size", &running.uri("")]).trim(),
        MIB.to_string()
    );
}

#[test]
fn nbdinfo_maps_holes_and_data() {
    let (running, device) = Running::disk(64 * MIB);
    device
        .write_at(&[1; 8192], MIB, Durability::Buffered)
        .unwrap();
    let map = json("nbdinfo", &["--map", "--json", &running.uri("disk")]);
    let extents: Vec<(u64, u64, u64)> = map
        .as_array()
        .unwrap()
        .iter()
        .map(|e| {
            let field = |name: &str| e[name].as_u64().unwrap();
            (field("offset"), field("length"), field("type"))
        })
        .collect();
    let after = MIB + 8192;
    assert_eq!(
        extents,
        [(0, MIB, 3), (MIB, 8192, 0), (after, 64 * MIB - after, 3)]
    );
}

#[test]
fn nbdcopy_in_and_out_over_several_connections_keeps_every_byte_and_hole() {
    let (running, device) = Running::disk(40 * MIB);
    let (from, to) = (running.path("from"), running.path("to"));
    let content = sparse_file(&from);
    let uri = running.uri("disk");
    ok("nbdcopy", &["--flush", "--connections=4", &from, &uri]);
    let mut held = vec![0; content.len()];
    device.read_at(&mut held, 0).unwrap();
    assert!(held == content);
    ok("nbdcopy", &["--connections=4", &uri, &to]);
    assert!(fs::read(&to).unwrap() == content);
    // The zeros in between came as zeros, not as data, and take no space.
    let data: u64 = device
        .extents(0, 40 * MIB, 100)
        .unwrap()
        .iter()
        .filter(|extent| extent.kind == vellum_base::block::ExtentKind::Data)
        .map(|extent| extent.len)
        .sum();
    assert!(data < 8 * MIB, "{data} bytes of data");
    // And with simple requests, one at a time.
    let plain = running.path("plain");
    ok("nbdcopy", &["--synchronous", "--no-extents", &uri, &plain]);
    assert!(fs::read(&plain).unwrap() == content);
}

fn qemu_io(uri: &str, commands: &[&str]) -> String {
    let mut args = vec!["-f", "raw"];
    for command in commands {
        args.extend(["-c", command]);
    }
    args.push(uri);
    let said = ok("qemu-io", &args);
    for bad in ["failed", "error", "Pattern verification"] {
        assert!(!said.contains(bad), "{said}");
    }
    said
}

#[test]
fn qemu_io_writes_zeroes_discards_and_reads_back_patterns() {
    let (running, _) = Running::disk(64 * MIB);
    qemu_io(
        &running.uri("disk"),
        &[
            "write -P 0xaa 0 64k",
            "write -f -P 0xbb 65536 4096",
            "aio_write -P 0xcc 1M 3M",
            "aio_write -P 0xdd 5000704 512",
            "aio_flush",
            "read -P 0xaa 0 64k",
            "read -P 0xbb 65536 4096",
            "read -P 0xcc 1M 3M",
            "read -P 0xdd 5000704 512",
            "write -z 4096 8192",
            "write -z -u 2M 64k",
            "write -z -u -n 3M 64k",
            "discard 0 4096",
            "flush",
            "read -P 0 0 12288",
            "read -P 0xaa 12288 4096",
            "read -P 0 2M 64k",
            "read -P 0 3M 64k",
            "read -P 0xcc 1M 1M",
            "writev -P 0x11 8M 4096 65536 512",
            "readv -P 0x11 8M 512 65536 4096",
            // A request in the largest pieces that the server announces.
            "write -P 0x22 10M 48M",
            "read -P 0x22 10M 48M",
        ],
    );
}

#[test]
fn qemu_io_is_refused_writes_to_a_read_only_export() {
    let export = Export {
        read_only: true,
        ..Export::new("disk", Arc::new(MemoryDevice::new(MIB)))
    };
    let running = Running::new(vec![export]);
    let uri = running.uri("disk");
    fails("qemu-io", &["-f", "raw", "-c", "write 0 4k", &uri]);
    ok(
        "qemu-io",
        &["-r", "-f", "raw", "-c", "read -P 0 0 1M", &uri],
    );
}

#[test]
fn qemu_img_maps_converts_and_compares() {
    let (running, _) = Running::disk(40 * MIB);
    let (raw, qcow2) = (running.path("raw"), running.path("qcow2"));
    sparse_file(&raw);
    let uri = running.uri("disk");
    ok(
        "qemu-img",
        &[
            "convert", "-n", "-W", "-m", "8", "-f", "raw", "-O", "raw", &raw, &uri,
        ],
    );
    ok(
        "qemu-img",
        &["compare", "-f", "raw", "-F", "raw", &raw, &uri],
    );
    ok(
        "qemu-img",
        &["convert", "-f", "raw", "-O", "qcow2", &uri, &qcow2],
    );
    ok(
        "qemu-img",
        &["compare", "-f", "qcow2", "-F", "raw", &qcow2, &uri],
    );
    let map = json("qemu-img", &["map", "-f", "raw", "--output=json", &uri]);
    let extents = map.as_array().unwrap();
    let data: u64 = extents
        .iter()
        .filter(|extent| extent["data"] == true)
        .map(|extent| extent["length"].as_u64().unwrap())
        .sum();
    let all: u64 = extents
        .iter()
        .map(|extent| extent["length"].as_u64().unwrap())
        .sum();
    assert_eq!(all, 40 * MIB);
    assert!((6 * MIB..8 * MIB).contains(&data), "{data} bytes of data");
}

#[test]
fn fio_verifies_what_several_jobs_write() {
    let (running, _) = Running::disk(64 * MIB);
    let uri = format!("--uri={}", running.uri("disk"));
    ok(
        "fio",
        &[
            "--name=verify",
            "--ioengine=nbd",
            &uri,
            "--rw=randrw",
            "--bsrange=512-128k",
            "--blockalign=512",
            "--size=16m",
            "--offset_increment=16m",
            "--numjobs=4",
            "--iodepth=16",
            "--fsync=64",
            "--verify=crc32c",
            "--verify_fatal=1",
            "--do_verify=1",
            "--verify_state_save=0",
        ],
    );
}

#[test]
fn tcp_clients_are_served_too() {
    let (mut running, _) = Running::disk(40 * MIB);
    let listener = bind_tcp("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let server = running.server.clone();
    running
        .listeners
        .push(thread::spawn(move || server.serve_tcp(listener)));
    let (from, to) = (running.path("from"), running.path("to"));
    let content = sparse_file(&from);
    let uri = format!("nbd://127.0.0.1:{port}/disk");
    ok("nbdcopy", &["--flush", &from, &uri]);
    ok("nbdcopy", &[&uri, &to]);
    assert!(fs::read(&to).unwrap() == content);
    let port = port.to_string();
    let listed = ok("nbd-client", &["-l", "127.0.0.1", &port]);
    assert!(listed.contains("disk"), "{listed}");
}

/// Makes a CA, and a server's and a client's certificate, as QEMU and libnbd name the files.
fn make_certificates(dir: &Path) {
    let openssl = |args: &[&str]| {
        let output = Command::new("openssl").args(args).current_dir(dir).output();
        let output = output.expect("openssl is missing: apt-get install openssl");
        assert!(output.status.success(), "openssl: {}", text(&output));
    };
    let key = [
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
    ];
    for ca in ["ca", "other-ca"] {
        let (cert, key_file) = (format!("{ca}-cert.pem"), format!("{ca}-key.pem"));
        let mut args = vec!["req", "-x509", "-days", "2", "-subj", "/CN=test ca"];
        args.extend(key);
        args.extend(["-keyout", &key_file, "-out", &cert]);
        openssl(&args);
    }
    for (name, ca, usage) in [
        ("server", "ca", "serverAuth"),
        ("client", "ca", "clientAuth"),
        ("other", "other-ca", "clientAuth"),
    ] {
        let ext = format!("subjectAltName=DNS:localhost,IP:127.0.0.1\nextendedKeyUsage={usage}\n");
        fs::write(dir.join("ext"), ext).unwrap();
        let (key_file, cert) = (format!("{name}-key.pem"), format!("{name}-cert.pem"));
        let mut args = vec!["req", "-new", "-subj", "/CN=localhost"];
        args.extend(key);
        args.extend(["-keyout", &key_file, "-out", "request"]);
        openssl(&args);
        let (ca_cert, ca_key) = (format!("{ca}-cert.pem"), format!("{ca}-key.pem"));
        openssl(&[
            "x509",
            "-req",
            "-days",
            "2",
            "-in",
            "request",
            "-extfile",
            "ext",
            "-CAcreateserial",
            "-CA",
            &ca_cert,
            "-CAkey",
            &ca_key,
            "-out",
            &cert,
        ]);
    }
    // What clients that are not invited would use: no certificate, and another CA's.
    for (who, pair) in [
        ("nobody", None),
        ("stranger", Some("other")),
        ("friend", Some("client")),
    ] {
        let own = dir.join(who);
        fs::create_dir(&own).unwrap();
        fs::copy(dir.join("ca-cert.pem"), own.join("ca-cert.pem")).unwrap();
        for part in ["cert", "key"] {
            if let Some(pair) = pair {
                let from = dir.join(format!("{pair}-{part}.pem"));
                fs::copy(from, own.join(format!("client-{part}.pem"))).unwrap();
            }
        }
    }
}

/// A TLS server, and the directory with everybody's certificates.
fn tls(clients: ClientCertificates) -> (Running, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    make_certificates(dir.path());
    let config = ServerConfig {
        tls: Some(TlsConfig::load(dir.path(), clients).unwrap()),
        ..ServerConfig::default()
    };
    let device = Arc::new(MemoryDevice::new(40 * MIB));
    let running = Running::with(config, vec![Export::new("disk", device)]);
    (running, dir)
}

fn tls_uri(running: &Running, certificates: &Path) -> String {
    format!(
        "nbds+unix://localhost/disk?socket={}&tls-certificates={}",
        running.socket.display(),
        certificates.display()
    )
}

#[test]
fn tls_carries_data_both_ways_for_clients_without_a_certificate() {
    let (running, dir) = tls(ClientCertificates::NotRequired);
    let uri = tls_uri(&running, &dir.path().join("nobody"));
    let info = json("nbdinfo", &["--json", &uri]);
    assert_eq!(info["TLS"], true);
    assert_eq!(info["exports"][0]["export-size"], 40 * MIB);
    let (from, to) = (running.path("from"), running.path("to"));
    let content = sparse_file(&from);
    ok("nbdcopy", &["--flush", "--connections=2", &from, &uri]);
    ok("nbdcopy", &[&uri, &to]);
    assert!(fs::read(&to).unwrap() == content);
}

#[test]
fn tls_with_required_certificates_serves_those_of_its_ca_alone() {
    let log = Log::start();
    let (running, dir) = tls(ClientCertificates::Required);
    let size = |who: &str| tls_uri(&running, &dir.path().join(who));
    let friend = ok("nbdinfo", &["--size", &size("friend")]);
    assert_eq!(friend.trim(), (40 * MIB).to_string());
    assert_eq!(log.text(), "", "nobody was refused");
    for (who, why) in [
        ("nobody", "certificate"),
        ("stranger", "invalid peer certificate"),
    ] {
        fails("nbdinfo", &["--size", &size(who)]);
        let deadline = Instant::now() + Duration::from_secs(120);
        loop {
            let said = log.text();
            let line = said
                .lines()
                .find(|line| line.contains("TLS with an NBD client failed"));
            if line.is_some_and(|line| line.contains(why)) {
                break;
            }
            assert!(Instant::now() < deadline, "{who}: {said}");
            thread::sleep(Duration::from_millis(5));
        }
        log.0.lock().unwrap().clear();
    }
    ok("nbdinfo", &["--size", &size("friend")]);
}

/// What this process logs from now on.
#[derive(Clone)]
struct Log(Arc<std::sync::Mutex<Vec<u8>>>);

impl Log {
    fn start() -> Log {
        let log = Log(Arc::default());
        let writer = log.clone();
        tracing_subscriber::fmt()
            .with_max_level(tracing::Level::WARN)
            .with_ansi(false)
            .with_writer(move || writer.clone())
            .init();
        log
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().unwrap()).into_owned()
    }
}

impl std::io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn tls_servers_refuse_plain_text_and_say_why() {
    let (running, _dir) = tls(ClientCertificates::NotRequired);
    let uri = running.uri("disk");
    let said = fails("nbdinfo", &["--size", &uri]);
    assert!(said.contains("TLS"), "{said}");
    fails("nbdinfo", &["--list", &uri]);
    fails(
        "qemu-io",
        &["-f", "raw", "-c", "read 0 512", &running.uri("disk")],
    );
}

#[test]
fn qemu_speaks_tls_with_the_same_directory() {
    let (running, dir) = tls(ClientCertificates::Required);
    let creds = format!(
        "tls-creds-x509,id=tls0,endpoint=client,dir={}",
        dir.path().join("friend").display()
    );
    let image = format!(
        "driver=raw,file.driver=nbd,file.server.type=unix,file.server.path={},\
         file.export=disk,file.tls-creds=tls0,file.tls-hostname=localhost",
        running.socket.display()
    );
    let said = ok(
        "qemu-io",
        &[
            "--object",
            &creds,
            "--image-opts",
            "-c",
            "write -P 7 1M 3M",
            "-c",
            "read -P 7 1M 3M",
            &image,
        ],
    );
    assert!(!said.contains("failed"), "{said}");
}

#[test]
fn a_client_that_insists_on_tls_is_refused_by_a_server_without() {
    let (running, _) = Running::disk(MIB);
    let uri = running.uri("disk");
    fails("nbdinfo", &["--size", &uri.replace("nbd+", "nbds+")]);
    assert_eq!(ok("nbdinfo", &["--size", &uri]).trim(), MIB.to_string());
}

#[test]
fn certificates_that_are_missing_or_broken_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let load = |clients| TlsConfig::load(dir.path(), clients).unwrap_err();
    let error = load(ClientCertificates::NotRequired);
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(error.to_string().contains("server-cert.pem"), "{error}");
    make_certificates(dir.path());
    fs::write(dir.path().join("ca-cert.pem"), "nothing of use").unwrap();
    let error = load(ClientCertificates::Required);
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    assert!(error.to_string().contains("ca-cert.pem"), "{error}");
    TlsConfig::load(dir.path(), ClientCertificates::NotRequired).unwrap();
    // A key that belongs to another certificate.
    fs::copy(
        dir.path().join("client-key.pem"),
        dir.path().join("server-key.pem"),
    )
    .unwrap();
    let error = load(ClientCertificates::NotRequired);
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
}
