//! The snapshotter as a daemon: its socket, its lock, its log, and what it tells systemd.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::process::Command;
use std::time::Duration;

use crate::snapshotter_support::{Area, Daemon, wait_for};
use nix::sys::signal::Signal;

fn command(area: &Area, root: &str, socket: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vellum"));
    command
        .args(["--root", &area.at(root), "snapshotter"])
        .args(["--config", &area.at("config.toml")])
        .args(["--address", &area.at(socket)]);
    command
}

fn mode(path: &str) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[test]
fn systemd_hears_when_it_is_ready_and_a_dead_ones_socket_is_replaced() {
    let area = Area::new();
    fs::write(area.at("config.toml"), "[log]\nformat = 'json'\n").unwrap();
    let systemd = UnixDatagram::bind(area.at("notify")).unwrap();
    systemd
        .set_read_timeout(Some(Duration::from_secs(30)))
        .unwrap();
    let log = area.path().join("log");
    let socket = area.at("socket/vellum.sock");
    for signal in [Signal::SIGKILL, Signal::SIGTERM] {
        let mut start = command(&area, "root", "socket/vellum.sock");
        start.env("NOTIFY_SOCKET", area.at("notify"));
        let mut daemon = Daemon::start(&mut start, &log);
        let mut word = [0; 64];
        let len = systemd.recv(&mut word).unwrap();
        assert_eq!(&word[..len], b"READY=1");
        UnixStream::connect(&socket).unwrap();
        assert_eq!(mode(&area.at("socket")), 0o700);
        assert_eq!(mode(&area.at("root")), 0o755);
        assert_eq!(mode(&area.at("root/layers")), 0o700);
        daemon.signal(signal);
    }
    assert!(!fs::exists(&socket).unwrap(), "SIGTERM leaves no socket");
    for line in fs::read_to_string(log).unwrap().lines() {
        serde_json::from_str::<serde_json::Value>(line).unwrap();
    }
}

#[test]
fn what_is_at_the_address_and_no_socket_is_left_alone_and_paths_are_absolute() {
    let area = Area::new();
    fs::write(area.at("config.toml"), "").unwrap();
    fs::write(area.at("file"), "somebody's").unwrap();
    fs::create_dir(area.at("dir")).unwrap();
    std::os::unix::fs::symlink("nowhere", area.at("dangling")).unwrap();
    for socket in ["file", "dir", "dangling"] {
        let output = command(&area, "root", socket).output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{socket}");
        assert!(text.contains("is not a socket"), "{socket}: {text}");
    }
    assert_eq!(fs::read(area.at("file")).unwrap(), b"somebody's");
    assert!(
        fs::symlink_metadata(area.at("dangling"))
            .unwrap()
            .is_symlink()
    );
    for (config, arguments, why) in [
        ("root = ''", &[][..], "root is empty"),
        ("address = 'v.sock'", &[], "address is \"v.sock\""),
        ("", &["--address", "v.sock"], "--address is \"v.sock\""),
    ] {
        fs::write(area.at("config.toml"), config).unwrap();
        let output = Command::new(env!("CARGO_BIN_EXE_vellum"))
            .args(["snapshotter", "--config", &area.at("config.toml")])
            .args(arguments)
            .current_dir(area.path())
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(
            !output.status.success() && text.contains(why),
            "{config}: {text}"
        );
    }
}

#[test]
fn a_second_one_on_the_same_root_or_socket_is_refused_with_the_reason() {
    let area = Area::new();
    fs::write(area.at("config.toml"), "").unwrap();
    let log = area.path().join("log");
    let _first = Daemon::start(&mut command(&area, "root", "one.sock"), &log);
    wait_for("it listens", Duration::from_secs(20), || {
        UnixStream::connect(area.at("one.sock")).is_ok()
    });
    for (root, socket, why) in [
        ("root", "two.sock", "another snapshotter serves"),
        ("other", "one.sock", "a server listens on"),
    ] {
        let output = command(&area, root, socket).output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && text.contains(why), "{text}");
    }
    UnixStream::connect(area.at("one.sock")).unwrap();
}
