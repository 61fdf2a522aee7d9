//! The sockets that the NBD server listens on.

// Helpers outside of #[test] functions fail tests too.
use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use vellum_base::ErrorKind;
use vellum_export::nbd::{bind_tcp, bind_unix};

#[test]
fn tcp_addresses_without_a_host_mean_this_host_alone() {
    let taken = bind_tcp("0").unwrap();
    let address = taken.local_addr().unwrap();
    assert!(address.ip().is_loopback());
    let error = bind_tcp(&format!(":{}", address.port())).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InUse);
    let error = bind_tcp("no-such-host.invalid:1").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
}

#[test]
fn a_unix_socket_is_private_and_goes_with_its_owner() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("nbd.sock");
    let (listener, file) = bind_unix(&path).unwrap();
    let mode = path.symlink_metadata().unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let error = bind_unix(&path).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InUse, "{error}");
    drop(listener);
    drop(file);
    assert!(!path.exists());
}

#[test]
fn the_socket_of_a_dead_server_is_replaced_and_survives_its_first_owner() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("nbd.sock");
    // A server that was killed leaves its file.
    drop(UnixListener::bind(&path).unwrap());
    let (dead, file) = bind_unix(&path).unwrap();
    drop(dead);
    let (_listener, _file) = bind_unix(&path).unwrap();
    drop(file);
    assert!(UnixStream::connect(&path).is_ok());
}

#[test]
fn what_is_not_a_socket_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("nbd.sock");
    std::fs::write(&path, "precious").unwrap();
    let error = bind_unix(&path).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AlreadyExists);
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
    let error = bind_unix(&dir.path().join("x".repeat(200))).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
}

/// A store with one container, whose server says where it listens and what is dangerous about it.
struct Served {
    _dir: tempfile::TempDir,
    root: PathBuf,
}

impl Served {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("store");
        let image = dir.path().join("disk");
        fs::File::create(&image).unwrap().set_len(16 << 20).unwrap();
        let made = Command::new("/usr/sbin/mkfs.ext4")
            .args(["-q", "-F"])
            .arg(&image)
            .status()
            .expect("mkfs.ext4 is missing: apt-get install e2fsprogs");
        assert!(made.success());
        let served = Served { _dir: dir, root };
        served.ok(&["import", "disk", image.to_str().unwrap()]);
        served.ok(&["create", "disk", "--name", "c"]);
        served
    }

    fn vellum(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vellum"));
        command.arg("--root").arg(&self.root).args(arguments);
        command
    }

    fn ok(&self, arguments: &[&str]) {
        let output = self.vellum(arguments).output().unwrap();
        assert!(
            output.status.success(),
            "{arguments:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }

    /// What `vellum nbd c` with these arguments says until it listens; it is stopped then.
    fn says(&self, arguments: &[&str]) -> String {
        let mut server = self
            .vellum(&[&["nbd", "c"], arguments].concat())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = String::new();
        let mut lines = BufReader::new(server.stderr.take().unwrap());
        while !said.contains("listening on") && lines.read_line(&mut said).unwrap() > 0 {}
        if arguments.is_empty() {
            assert!(UnixStream::connect(self.root.join("run/nbd.sock")).is_ok());
        }
        let pid = nix::unistd::Pid::from_raw(server.id() as i32);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
        assert!(server.wait().unwrap().success(), "{said}");
        said
    }
}

#[test]
fn a_server_that_is_told_no_place_listens_on_a_private_socket_and_not_on_tcp() {
    let served = Served::new();
    let said = served.says(&[]);
    let socket = served.root.join("run/nbd.sock");
    assert_eq!(said, format!("listening on {}\n", socket.display()));
    assert!(!socket.exists());
}

#[test]
fn a_server_on_tcp_that_anybody_may_use_says_who_and_what_to_do() {
    let served = Served::new();
    let local = served.says(&["--listen", "0"]);
    assert!(
        local.contains("every user of this host, and every container on its network")
            && local.contains("read and write c:"),
        "{local}"
    );
    let open = served.says(&["--listen", "0.0.0.0:0", "--read-only"]);
    assert!(
        open.contains("anybody who reaches this address may read what it serves")
            && open.contains("--tls-verify-clients"),
        "{open}"
    );
}
