//! The sockets that the NBD server listens on.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};

use vellum::ErrorKind;
use vellum::export::nbd::{bind_tcp, bind_unix};

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
